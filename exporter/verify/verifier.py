"""The export proves itself: every graph in ONNX Runtime against the Hugging Face model in PyTorch, on seeded inputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resprune.exporter.checkpoint.shards import StoredTensor
from resprune.exporter.checkpoint.weightless import blank, fill, lay_over
from resprune.exporter.components import Component, Components
from resprune.exporter.verify.answer import Where, generate, splice
from resprune.exporter.verify.difference import (
    TEXT,
    Counted,
    Difference,
    ParityError,
    difference,
    text_difference,
)
from resprune.exporter.verify.feeds import feeds
from resprune.exporter.verify.layers import (
    chosen_layers,
    cut_out,
    of_layers,
    reference_of,
    unlike_layers,
)
from resprune.exporter.verify.ort_worker import OrtWorker, WorkerBundle
from resprune.exporter.verify.pruning import pruned_picks
from resprune.exporter.verify.question import Question, QuestionWalk, Selected, seeded
from resprune.exporter.verify.reference import counts_within_rounding, keep, kept_counts, whole_groups
from resprune.exporter.verify.text import (
    after_text,
    agreeing,
    every_logit,
    every_position,
    trained,
    whole_text,
)
from resprune.names import (
    DECODER,
    EARLY_INDICES,
    EMBED_TOKENS,
    KEPT_COUNTS,
    KEPT_FEATURES,
    KEPT_INDICES,
    KEPT_PLANES,
    PICK_ORDER,
    TOKEN_MASK,
    TOKEN_SELECT,
    VISION_SELECT,
)
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.precisions import COMPONENTS, TABLE, Choice, Precision
from resprune.runtime.prompt.prompter import Prompt
from resprune.runtime.sampling import LARGEST_ID, Sampling
from resprune.runtime.walk import SPLIT, step

SIZES = {"batch_size": 3, "sequence_length": 4, "past_sequence_length": 6}
"""Other than while tracing, so that an axis that was taken for a constant shows."""
SEEDS = (20, 21, 22)
"""The first is enough, unless two scores or two logits are so close that rounding decides between them: then another
image is tried. A graph that is wrong misses with all."""
PROMPT_TOKENS = 8
GREEDY_TOKENS = 32
SELECTED = ("early picks", "picks", "kept counts", "split picks", "split counts")
COUNTED = (*SELECTED, "greedy tokens")


class Verifier:
    """The Hugging Face model with its real weights, all or a part at a time, beside ONNX Runtime."""

    def __init__(
        self,
        bundle: Bundle,
        components: Components,
        stored: Mapping[str, StoredTensor],
        choice: Choice,
        text: Tensor,
        *,
        whole: bool,
        decoder: bool = True,
    ) -> None:
        """`bundle` may get its graphs later; `text` are token ids [T] of running text for the decoder.

        That is compared `whole` or by layers, or there is no `decoder`.
        """
        self._bundle, self._selection = bundle, bundle.manifest.selection
        self._components, self._stored = components, stored
        self._choice, self._text = choice, text
        self._judges_text = whole and decoder
        self.exact: Collection[str] = ()
        exact = {part: TABLE[getattr(choice, part)].exact for part in COMPONENTS}
        if exact["vision"]:
            self.exact = COUNTED if all(exact.values()) else SELECTED
        self.least: dict[str, float] = {}
        config: Any = copy.deepcopy(components.model.config)
        config._attn_implementation = "sdpa"
        self._config: Any = config
        self._model: Any = None
        self._held: set[str] = set()
        parts = (components.vision, components.embed, components.decoder)
        self._names = {component.name: _parameter_names(component, components) for component in parts}
        self.has_decoder = whole
        # Where memory is short an image at a time is enough: the graphs were traced with two.
        self._images = SIZES["batch_size"] if self.has_decoder else 1
        self._selected: dict[int, Selected] = {}

    def prepare(self) -> None:
        """Compute PyTorch's part of `compare_selection` and `compare_layers`, for which no graph is needed."""
        self._wanted_selection(SEEDS[0])
        if not self.has_decoder:
            _ = self._wanted_layers

    def _holding(self, component: Component) -> Any:
        """The Hugging Face model, with the weights of `component` at least."""
        if self._model is None:
            self._model, self._held = blank(type(self._components.model), self._config), set()
        if component.name not in self._held:
            # To look rows up, the table need be neither copied nor cast; what scales them does so in float32.
            looked_up = type(self._model.get_input_embeddings()) is nn.Embedding
            give = lay_over if component is self._components.embed and looked_up else fill
            give(self._model, self._stored, self._names[component.name])
            self._held.add(component.name)
        return self._model

    def _make_room(self) -> None:
        """Drop the weights before ONNX Runtime takes its own, where there is no room for both."""
        if not self.has_decoder:
            self._model = None

    @property
    def level(self) -> str:
        """What the manifest says was compared: whole answers, or the decoder by layers."""
        return "end to end" if self.has_decoder else "layers"

    def compare(self, worker: OrtWorker, component: Component, graph: Path) -> list[Difference]:
        """One graph against PyTorch on seeded inputs."""
        sizes = {**SIZES, "batch_size": self._images} if component is self._components.vision else SIZES
        inputs = component.samples(sizes, torch.Generator().manual_seed(SEEDS[0]))
        if component is self._components.decoder:
            inputs = self._after_text(self._holding(component))
        # A tower that selects is compared by its own picks, which are judged in `compare_selection`.
        first = worker.run(graph, feeds(component, inputs)) if component.early else {}
        with torch.no_grad():
            wanted = component.reference(self._holding(component), inputs, *_kept_early(first))
        self._make_room()
        got = first or worker.run(graph, feeds(component, inputs))
        return [
            self._difference(graph.stem, spec.name, got[spec.name], want.float())
            for spec, want in zip(component.outputs, wanted, strict=True)
        ]

    def compare_layers(self, worker: OrtWorker, graph: Path) -> tuple[list[Difference], list[int]]:
        """The decoder's first and last layers against PyTorch, and the others against those; and which were run.

        Raises `ParityError` for a layer that is wired otherwise.
        """
        chosen, inputs, wanted = self._wanted_layers
        unlike = unlike_layers(graph, chosen, self._config.text_config.num_hidden_layers)
        if unlike:
            numbers = ", ".join(map(str, unlike))
            raise ParityError(f"{graph.name} computes something else in layer {numbers} than in the others")
        cut = cut_out(graph, chosen)
        try:
            got = worker.run(cut, feeds(self._components.decoder, inputs))
        finally:
            cut.unlink()
        row = self._choice.of_file(graph.stem)
        differences = [
            difference(graph.stem, name, values, want, row.of_layers(name))
            for (name, values), want in zip(got.items(), wanted, strict=True)
        ]
        return differences, chosen

    @cached_property
    def _wanted_layers(self) -> tuple[list[int], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The layers that are run, the whole decoder's inputs, and the outputs of a decoder of those layers."""
        chosen = chosen_layers(self._config.text_config, self._components.plane_layers)
        component = self._components.decoder
        model = reference_of(self._components, self._stored, chosen)
        inputs = self._after_text(model, chosen)
        with torch.no_grad():
            return chosen, inputs, component.reference(model, of_layers(component, chosen, inputs))

    def _after_text(self, model: Any, chosen: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The decoder's inputs after some text, by a `model` of all layers or of the `chosen` ones."""
        component = self._components.decoder
        layers = range(self._config.text_config.num_hidden_layers) if chosen is None else chosen
        present = [f"present.{layer}.{part}" for layer in layers for part in ("key", "value")]

        def prefill(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
            run = inputs if chosen is None else of_layers(component, list(chosen), inputs)
            with torch.no_grad():
                return dict(zip(present, component.reference(model, run)[1:], strict=True))

        return after_text(component, SIZES, SEEDS[0], self._embeds(self._text), prefill)

    def compare_text(self, worker: OrtWorker, graph: Path) -> tuple[list[Difference], dict[str, Counted]]:
        """The decoder's logits at every position of running text, and how many have PyTorch's most likely token."""
        inputs, want = self._wanted_text
        row = self._row(graph.stem)
        self.least = {TEXT: row.agreement}
        wide = every_position(graph)
        try:
            got = worker.run(wide, feeds(self._components.decoder, inputs))["logits"][0]
        finally:
            wide.unlink()
        same = agreeing(torch.from_numpy(got), want)
        return [text_difference(graph.stem, got, want, row)], {TEXT: (sum(same), len(same))}

    @cached_property
    def _wanted_text(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The decoder's inputs of running text, and its logits of every position."""
        component = self._components.decoder
        inputs = whole_text(component, self._embeds(self._text))
        return inputs, every_logit(component, self._holding(component), inputs)

    @cached_property
    def _trained(self) -> bool:
        """Whether the weights are trained as far as can be told: a decoder that is compared by layers tells nothing."""
        return self._judges_text and trained(self._wanted_text[1], self._text)

    def compare_selection(self, worker: OrtWorker) -> tuple[list[Difference], dict[str, Counted]]:
        """`vision_select` against the reference: differences, and how many picks and counts are equal.

        Equal is also what float32 cannot tell from the reference's, see `picks_within_rounding` and
        `counts_within_rounding`.
        """
        differences: list[Difference] = []
        graph, selection = self._path(VISION_SELECT), self._selection
        for seed in SEEDS:
            selected = self._wanted_selection(seed)
            question = selected.question
            num_kept = _shares(selection.k, len(question.nouns))
            got = self._select(worker, question, num_kept)[VISION_SELECT]
            counted: dict[str, Counted] = {}
            for early in _kept_early(got):
                assert selected.early is not None
                same = (early[:, :, None] == selected.early[:, None]).any(dim=2)
                counted["early picks"] = _count(same)
                if not same.all():
                    selected = question.select(self._holding(self._components.vision), selection, early)
                    self._make_room()
            features = selected.planes[0]
            # Against the reference's rows of the graph's own picks, so that one pick that differs hides nothing.
            differences += self._kept_differences(graph, got, selected.planes)
            counted["picks"] = _count(selected.equal_picks(got))
            if self._components.proportional:
                counted["kept counts"] = _equal_counts(
                    got, num_kept, features, selected.candidates, question.attached_to
                )
            if all(equal == total or what not in self.exact for what, (equal, total) in counted.items()):
                break
        if selection.k >= features.shape[1]:
            equal, total = pruned_picks(worker, graph.parent, selection, features.shape[2])
            counted["picks"] = (counted["picks"][0] + equal, counted["picks"][1] + total)
        return differences, counted

    def _kept_differences(
        self, graph: Path, got: Mapping[str, NDArray[Any]], planes: list[Tensor]
    ) -> list[Difference]:
        """Each plane's kept rows against the rows that the graph's own picks have."""
        order, features = torch.from_numpy(got[PICK_ORDER]), self._components.features
        names = (
            features
            if features[0] in got
            else [KEPT_FEATURES, *map(KEPT_PLANES.format, range(len(planes) - 1))]
        )
        return [
            self._difference(graph.stem, name, got[name], keep(plane, order)[0])
            for name, plane in zip(names, planes, strict=True)
        ]

    def _wanted_selection(self, seed: int) -> Selected:
        """What PyTorch selects for a seeded question."""
        if seed not in self._selected:
            question = self._question(self._images, seed)
            self._selected[seed] = question.select(self._holding(self._components.vision), self._selection)
            self._make_room()
        return self._selected[seed]

    def compare_split(self, worker: OrtWorker) -> tuple[list[Difference], dict[str, Counted]]:
        """`vision_encoder` and `token_select` against `vision_select`: rows and picks, and counts of their own."""
        question = self._question(self._images, SEEDS[0])
        num_kept = _shares(self._selection.k, len(question.nouns))
        fused = self._select(worker, question, num_kept)[VISION_SELECT]
        encoded, split = self._select(worker, question, num_kept, SPLIT).values()
        planes = [torch.from_numpy(encoded[name]) for name in self._components.features]
        left = torch.from_numpy(encoded[TOKEN_MASK]) if TOKEN_MASK in encoded else None
        every, order = planes[0], torch.from_numpy(split[PICK_ORDER])
        wanted = torch.from_numpy(fused[PICK_ORDER])
        # Against the rows of its own picks, as `compare_selection` does.
        differences = self._kept_differences(self._path(TOKEN_SELECT), split, planes)
        _, indices = keep(every, order)
        same = (order == wanted) & (torch.from_numpy(split[KEPT_INDICES]) == indices)
        counted = {"split picks": _count(same[(order >= 0) | (wanted >= 0)])}
        if self._components.proportional:
            rules = question.candidates(left), question.attached_to
            counted["split counts"] = _equal_counts(split, num_kept, every, *rules)
        return differences, counted

    def compare_greedy(self, worker: OrtWorker) -> tuple[list[int], list[int]]:
        """A whole answer, and PyTorch's: greedy tokens after a seeded prompt with one pruned image."""
        for seed in SEEDS:
            got, wanted = self._answers(worker, seed)
            if got == wanted or "greedy tokens" not in self.exact:
                break
        return got, wanted

    def _answers(self, worker: OrtWorker, seed: int) -> tuple[list[int], list[int]]:
        question, selection, manifest = self._question(1, seed), self._selection, self._bundle.manifest
        (encoded,) = question.prepared
        prompt = torch.randint(
            self._vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed)
        )
        prompt[prompt == manifest.image_token_id] = 0
        first, *others = (part.tolist() for part in prompt[0].tensor_split(len(encoded.image.spans) + 1))
        ids = [*first, *(each for part in others for each in (manifest.image_token_id, *part))]

        walk, graphs = self._walk(worker, question, (VISION_SELECT, EMBED_TOKENS, DECODER))
        asked = [Prompt([], "", ids, [], [])]
        embeds = walk.embed(asked)
        kept = walk.select([encoded], question.words, [selection.k])
        request = walk.splice(embeds, asked, [kept])
        answers, _ = walk.prefill(graphs, request, Sampling(max_new_tokens=GREEDY_TOKENS))
        got: list[int] = []
        while (pieces := step(answers)) is not None:
            (piece,) = pieces
            assert isinstance(piece, list)
            got += piece

        # The graph's own picks and counts on both sides: they are judged in `compare_selection`.
        selected = graphs.made[VISION_SELECT]
        picks = torch.from_numpy(selected[PICK_ORDER])
        counts = torch.from_numpy(selected.get(KEPT_COUNTS, np.ones_like(selected[PICK_ORDER])))
        model = self._holding(self._components.vision)
        planes = question.select(model, selection, *_kept_early(selected)).planes
        where = Where(picks, counts, encoded.image, manifest.positions, self._components.two_way)
        decoder, text_config = self._components.decoder, self._config.text_config
        with torch.no_grad():
            rows = [keep(plane, picks)[0] for plane in planes]
            whole = splice(self._embeds(prompt), rows, where)
            wanted = generate(decoder, self._holding(decoder), text_config, self._embeds, whole, len(got))
        return got, wanted.tolist()

    def _select(
        self,
        worker: OrtWorker,
        question: Question,
        num_kept: Tensor,
        graphs: Sequence[str] = (VISION_SELECT,),
    ) -> dict[str, dict[str, NDArray[Any]]]:
        """All that each of `graphs` gives while the runtime's walk selects by them."""
        walk, made = self._walk(worker, question, graphs)
        walk.select(question.prepared, question.words, num_kept.tolist())
        return made.made

    def _walk(
        self, worker: OrtWorker, question: Question, graphs: Sequence[str]
    ) -> tuple[QuestionWalk, WorkerBundle]:
        """The runtime's walk over a question, as if the bundle had these graphs alone; and what runs them."""
        paths = {graph: self._path(graph) for graph in graphs}
        manifest = self._bundle.manifest
        specs = {graph: manifest.graphs[graph] for graph in (VISION_SELECT, *graphs)}
        # However many tokens are kept: what a context has no room for, the runtime refuses of questions.
        manifest = replace(manifest, graphs=specs, context_length=LARGEST_ID)
        runner = WorkerBundle(worker, paths)
        return QuestionWalk(replace(self._bundle, manifest=manifest), runner, question), runner

    def _path(self, graph: str) -> Path:
        return self._bundle.root / self._bundle.manifest.graphs[graph].file

    @property
    def _vocab_size(self) -> int:
        return int(self._config.text_config.vocab_size)

    def _embeds(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            embeds: Tensor = self._holding(self._components.embed).get_input_embeddings()(ids)
        return embeds.float()

    def _question(self, batch_size: int, seed: int) -> Question:
        sizes = {**SIZES, "batch_size": batch_size}
        return seeded(self._components, self._embeds, self._vocab_size, sizes, seed)

    def _difference(self, graph: str, output: str, got: NDArray[Any], want: Tensor) -> Difference:
        return difference(graph, output, got, want, self._row(graph))

    def _row(self, graph: str) -> Precision:
        """What a graph is judged by."""
        row = self._choice.of_file(graph)
        return row if self._trained else row.of_untaught()


def _kept_early(got: Mapping[str, NDArray[Any]]) -> tuple[Tensor, ...]:
    """The tokens [T, C] that a graph's tower kept, alone; nothing of one that does not select."""
    return (torch.from_numpy(got[EARLY_INDICES]),) if EARLY_INDICES in got else ()


def _shares(k: int, batch_size: int) -> Tensor:
    """Three quarters of the picks of the first image, half of the second's …: [B] int64, each at least one."""
    return torch.tensor([max(1, k - (image + 1) * k // 4) for image in range(batch_size)])


def _equal_counts(
    got: Mapping[str, NDArray[Any]],
    num_kept: Tensor,
    features: Tensor,
    candidates: Tensor | None,
    attached_to: Tensor | None,
) -> Counted:
    """How many of a graph's `kept_counts` are the reference's for the same picks, as far as float32 can tell."""
    order, counts = torch.from_numpy(got[PICK_ORDER]), torch.from_numpy(got[KEPT_COUNTS])
    if attached_to is not None:
        num_kept = whole_groups(attached_to, order, num_kept)
    first = order.masked_fill(torch.arange(order.shape[1]) >= num_kept[:, None], -1)
    _, indices = keep(features, order)
    real = indices >= 0
    indices = indices.masked_fill((indices[:, :, None] != first[:, None, :]).all(dim=2), -1)
    same = counts == kept_counts(features, indices, candidates)
    if not same.all():
        same |= counts_within_rounding(features, indices, counts, candidates)
    return _count(same[real])


def _count(same: Tensor) -> Counted:
    return int(same.sum()), same.numel()


def _parameter_names(component: Component, components: Components) -> set[str]:
    own = {id(parameter) for parameter in component.module.parameters()}
    return {
        name
        for name, tensor in components.model.named_parameters(remove_duplicate=False)
        if id(tensor) in own
    }
