"""The optimisation profiles of a bundle's engines: how long each named axis of each graph may get."""

from __future__ import annotations

from dataclasses import dataclass

from resprune.names import DECODER
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import GraphSpec, Profile, Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.table import family_of

MOST_CONTEXT = 4096  # unless asked for: the cache of a whole context is what fills a small GPU


@dataclass(frozen=True)
class Limits:
    """What engines are built for, each as least, usual, most; None is `with_defaults`' to fill in.

    `batch`: images, and questions, at once; `nouns`: tokens of the question's nouns; `tokens`: an image's visual
    tokens before the selection, where that varies; `prompt`: tokens of a pruned prompt; `context`: most tokens of
    prompt and answer together.
    """

    batch: Range = (1, 1, 4)
    nouns: Range = (1, 4, 64)
    tokens: Range | None = None
    prompt: Range | None = None
    context: int | None = None


def profiles(bundle: Bundle, limits: Limits) -> dict[str, tuple[Profile, ...]]:
    """Graph → its profiles, for every graph of `bundle`; `ResPruneError` for limits the bundle cannot have.

    The decoder has two, as engines of language models do: prefill takes a whole prompt and no past, decode one token
    and any past, so that each gets kernels of its own. Every other graph has one.
    """
    tokens, prompt, context = _with_defaults(bundle, limits)
    batch, most = limits.batch, limits.batch[2] * prompt[2]
    vision = family_of(bundle).preprocessor(bundle).axes(batch, tokens) | {"text_tokens": limits.nouns}
    past = (1, min(prompt[1], context - 1), context - 1)
    chosen: dict[str, list[Profile]] = {
        # All prompts in one row, or the next token of each.
        "embed_tokens": [{"batch_size": batch, "sequence_length": (1, min(prompt[1], most), most)}],
        DECODER: [
            {"batch_size": batch, "sequence_length": prompt, "past_sequence_length": (0, 0, 0)},
            {"batch_size": batch, "sequence_length": (1, 1, 1), "past_sequence_length": past},
        ],
    }
    made: dict[str, tuple[Profile, ...]] = {}
    for name, graph in bundle.manifest.graphs.items():
        of_graph = chosen.get(name, [vision | _width(bundle)])
        made[name] = tuple(_of_inputs(name, graph, profile) for profile in of_graph)
    return made


def _with_defaults(bundle: Bundle, limits: Limits) -> tuple[Range, Range, int]:
    """`tokens`, `prompt` and `context` as they are asked for, or what fits the bundle's K and its context."""
    selection, longest = bundle.manifest.selection, bundle.manifest.context_length
    context = min(longest, max(MOST_CONTEXT, 4 * selection.k)) if limits.context is None else limits.context
    if not 2 <= context <= longest:
        raise ResPruneError(f"--context should be 2 to {longest}, this bundle's limit, not {context}")
    largest = selection.num_tokens or selection.max_tokens or selection.k
    tokens = limits.tokens or (1, max(1, largest // 2), largest)
    if tokens[2] > largest:
        raise ResPruneError(f"--tokens should end at {largest}, this bundle's largest image, not {tokens[2]}")
    # Pruned prompts are K and a question long; twice that serves two images or a conversation.
    room = min(context - 1, 2 * selection.k + 512)
    prompt = limits.prompt or (1, min(room, selection.k + 32), room)
    if prompt[2] >= context:
        raise ResPruneError(f"--prompt should stay below the {context} tokens of --context, not {prompt[2]}")
    return tokens, prompt, context


def _width(bundle: Bundle) -> dict[str, Range]:
    """The selector by itself serves rows of any width; a bundle's are as wide as its prompts'."""
    (embeds,) = bundle.manifest.graphs["embed_tokens"].outputs
    width = embeds.shape[-1]
    return {"hidden_size": (width, width, width)} if isinstance(width, int) else {}


def _of_inputs(name: str, graph: GraphSpec, sizes: Profile) -> Profile:
    """The part of `sizes` that the graph's inputs have as axes."""
    axes = graph.axes()
    if unknown := axes - sizes.keys():
        raise ResPruneError(
            f"{name} has axes that this resprune cannot bound, {min(unknown)}; upgrade resprune"
        )
    return {axis: limits for axis, limits in sizes.items() if axis in axes}
