"""Names of graphs, and of their inputs and outputs, once for all rooms; only the standard library is imported."""

DECODER = "decoder_model_merged"
"""The language model's graph."""
PLANE_FEATURES = "plane_features.{}"
"""Output of the vision graphs and input of `token_select`: plane i of the tokens that `image_features` has."""
KEPT_PLANES = "kept_planes.{}"
"""Output of `token_select`: plane i of `kept_features`."""
PLANE_EMBEDS = "plane_embeds.{}"
"""The decoder's input for plane i, float32 [B, S, D]: zero where there is text."""
IMAGE_NUMBERS = "image_numbers"
"""The decoder's input that says which image of its prompt a row is of, int64 [B, S]: 1 is the first, 0 is text."""
STANDARD_INPUTS = ("inputs_embeds", "attention_mask", "position_ids")
"""The decoder's inputs that every family has; a cache comes after them, and what `PLANE_EMBEDS` says."""
