"""The optimisation profiles of a bundle's engines: how long each named axis of each graph may get."""

from __future__ import annotations

from resprune.exporter.tensorrt.limits import Limits
from resprune.names import DECODER, EMBED_TOKENS
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import GraphSpec, Profile, Range
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.table import family_of


def profiles(bundle: Bundle, limits: Limits) -> dict[str, tuple[Profile, ...]]:
    """Graph → its profiles, for every graph of `bundle`; `ResPruneError` for limits the bundle cannot have.

    The decoder has two, as engines of language models do: prefill takes a whole prompt and no past, decode one token
    and any past, so that each gets kernels of its own. Every other graph has one.
    """
    tokens, prompt, context = limits.of(bundle)
    batch, most = limits.batch, limits.batch[2] * prompt[2]
    vision = family_of(bundle).preprocessor(bundle).axes(batch, tokens) | {"text_tokens": limits.nouns}
    past = (1, min(prompt[1], context - 1), context - 1)
    chosen: dict[str, list[Profile]] = {
        # All prompts in one row, or the next token of each.
        EMBED_TOKENS: [{"batch_size": batch, "sequence_length": (1, min(prompt[1], most), most)}],
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


def _width(bundle: Bundle) -> dict[str, Range]:
    """The selector by itself serves rows of any width; a bundle's are as wide as its prompts'."""
    (embeds,) = bundle.manifest.graphs[EMBED_TOKENS].outputs
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
