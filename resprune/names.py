"""Names of the graphs, and of the inputs and outputs that are ours, once for all rooms; nothing is imported.

The decoder's others are Optimum's (`inputs_embeds`, `past_key_values.0.key`, `logits` …) and stand as they are; the
ops' functions name their own inputs (graphs/functions.py), and a family's modules those of its tower.
"""

VISION_ENCODER, TOKEN_SELECT = "vision_encoder", "token_select"
"""Encoder and selector apart, in a split bundle."""
VISION_SELECT = "vision_select"
"""Both at once."""
EMBED_TOKENS = "embed_tokens"
"""The table of input embeddings."""
DECODER = "decoder_model_merged"
"""The language model's graph."""

IMAGE_FEATURES = "image_features"
"""Output of `vision_encoder` and input of `token_select`, all tokens of each image, float32 [B, N, D]; output of
`vision_select`, the kept ones, [B, K, D]."""
PLANE_FEATURES = "plane_features.{}"
"""Output of the vision graphs and input of `token_select`: plane i of the tokens that `image_features` has."""
TEXT_EMBEDS, TEXT_MASK = "text_embeds", "text_mask"
"""Inputs of the graphs that select: embeddings of the question's keywords, [B, M, D], and which rows are some, bool."""
TOKEN_MASK = "token_mask"  # noqa: S105 - of visual tokens
"""Input of `token_select`: the tokens that can be picked, bool [B, N]; output of a vision tower that selects itself."""
PROTECTED_MASK = "protected_mask"
"""Input of the graphs that select, bool [B, N]: rows that are always kept."""
ATTACHED_TO = "attached_to"
"""Input of the graphs that select, int64 [B, N]: the row that each row is attached to, −1 for none."""
NUM_KEPT = "num_kept"
"""Input of the graphs that select and count, int64 [B]: how many of the picks are kept."""
KEPT_FEATURES = "kept_features"
"""Output of `token_select`, float32 [B, K, D]."""
KEPT_PLANES = "kept_planes.{}"
"""Output of `token_select`: plane i of `kept_features`."""
KEPT_INDICES, PICK_ORDER = "kept_indices", "pick_order"
"""Outputs of the graphs that select, int64 [B, K]: the kept tokens ascending, and as they were picked; −1 for none."""
KEPT_COUNTS = "kept_counts"
"""Output of the graphs that select and count, int64 [B, K]: how many tokens each kept one stands for."""

EARLY_RANKS, EARLY_AXIS = "early_ranks", "num_early"
"""Input of a vision graph that selects in its tower, where images differ in size, int64, and its one axis: its length
says how many tokens go on."""
EARLY_INDICES = "early_indices"
"""Output of a vision graph that selects in its tower, int64 [T, C]: the tokens of each tile that went on."""

PLANE_EMBEDS = "plane_embeds.{}"
"""The decoder's input for plane i, float32 [B, S, D]: zero where there is text."""
IMAGE_NUMBERS = "image_numbers"
"""The decoder's input that says which image of its prompt a row is of, int64 [B, S]: 1 is the first, 0 is text."""
STANDARD_INPUTS = ("inputs_embeds", "attention_mask", "position_ids")
"""The decoder's inputs that every family has; a cache comes after them, and what `PLANE_EMBEDS` says."""
