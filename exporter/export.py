"""From a checkpoint to a bundle, in one transaction that proves itself before it ends."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from resprune.exporter.checkpoint.checkpoint import Checkpoint, family_of, resolve
from resprune.exporter.checkpoint.draft import write_draft
from resprune.exporter.checkpoint.language_checkpoint import LanguageCheckpoint, language_checkpoint
from resprune.exporter.checkpoint.shards import StoredTensor, passed_over, read_soon
from resprune.exporter.checkpoint.side_files import check_side_files, read_template
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.components import Component, Components
from resprune.exporter.early import with_early
from resprune.exporter.estimate import estimate
from resprune.exporter.families import split_model
from resprune.exporter.language import proportional
from resprune.exporter.memory import available_memory, bytes_whole
from resprune.exporter.options import EarlyRequest, Options
from resprune.exporter.selection import selection_of
from resprune.exporter.trace.ahead import traced_ahead
from resprune.exporter.trace.grouped_query import optimize_decoder
from resprune.exporter.trace.packed import pack
from resprune.exporter.trace.precision import TORCH
from resprune.exporter.trace.quantize import quantize
from resprune.exporter.trace.tracer import Traced
from resprune.exporter.trace.weights import bytes_needed, find_weights
from resprune.exporter.trace.writer import GraphWriter, ahead, progress_bar
from resprune.exporter.transaction import new_directory, require_space
from resprune.exporter.verify.difference import (
    TEXT,
    Counted,
    Difference,
    ParityError,
    equal_tokens,
    nearest,
    require,
    verdict,
)
from resprune.exporter.verify.ort_worker import OrtWorker
from resprune.exporter.verify.text import ids_of
from resprune.exporter.verify.verifier import Verifier
from resprune.graphs import attach_selection, token_select_model
from resprune.method import Selection
from resprune.names import TOKEN_SELECT, VISION_ENCODER, VISION_SELECT
from resprune.runtime.bundle.files import describe_files, read_bundle, write_manifest
from resprune.runtime.bundle.manifest import COUNTS, EARLY, Early, Manifest
from resprune.runtime.bundle.precisions import TABLE, Choice, parse_dtype
from resprune.runtime.console import bytes_text
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.table import Family

if TYPE_CHECKING:
    from resprune.exporter.checkpoint.gguf_file import GgufModel

PACKAGES = ("resprune", "torch", "transformers", "onnx", "onnxscript")
Report = Callable[[str], None]


def export(model: str, out: Path, options: Options, report: Report = print) -> Path:
    """Export `model` (alias, hub id or directory) to the bundle `out`, which is there whole or not at all.

    Returns `out`. `report` gets one line a stage. Raises `ResPruneError` for what the user can put right and
    `ParityError` if a graph differs from PyTorch by more than it may.
    """
    options = options.check()
    with new_directory(out, force=options.force) as work:
        _Export(model, out, options, report, work).run()
    return out


@dataclass
class _Export:
    """One export under way; `work` is the directory that becomes the bundle."""

    model: str
    out: Path
    options: Options
    report: Report
    work: Path
    early: Early | None = None
    differences: list[Difference] = field(default_factory=list)
    counts: dict[str, Counted] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    stage: int = 0
    since: float = field(default_factory=perf_counter)

    def run(self) -> None:
        checkpoint = resolve(self.model, revision=self.options.revision)
        family = family_of(checkpoint)
        checkpoint = self._limit_pixels(checkpoint, family)
        if self.options.chat_template is not None:
            checkpoint = replace(checkpoint, template=read_template(self.options.chat_template))
        positions = family.policy(self.options.positions)
        plain = (
            "plain" if self.options.language_checkpoint or self.options.gguf else family.defaults.attention
        )
        check_side_files(checkpoint)
        mode = fake_mode()
        choice = parse_dtype(self.options.dtype)
        dtype = TORCH[choice.element]
        components = split_model(checkpoint, dtype, mode)
        if self.options.early is not None:
            self.early = EarlyRequest.parse(self.options.early).of(components, family.title)
            components = replace(components, vision=with_early(components.vision, self.early, mode))
        counts = (self.options.attention or plain) == "proportional"
        selection = selection_of(self.options, family, components, counts=counts, early=self.early)
        draft = write_draft(checkpoint, components, selection, self.work)
        if counts:
            components = proportional(components)
        if self.options.optimize:
            components = optimize_decoder(components, dtype)
        stored = find_weights(checkpoint, components.model)
        if (note := passed_over(checkpoint.root)) is not None:
            self.report(note)
        languages = self._languages(components, stored)
        extra = sum(language.nbytes for language in languages)
        needed = bytes_needed(components, choice, self.options.block, decoder=self.options.decoder)
        require_space(self.work.parent, needed + extra)
        parameters = sum(tensor.numel() for tensor in components.model.parameters())
        size = sum(tensor.nbytes for tensor in checkpoint.weights.values())
        whole = bytes_whole(components.model, choice.element, self.options.verify)
        self.report(estimate(components, choice, needed + extra, size, whole))
        self._line("checkpoint", size, f"{family.title}, {parameters / 1e6:,.1f} M parameters")

        parts = (components.embed, components.vision, components.decoder)[: 2 + self.options.decoder]
        writer = GraphWriter(self.work, choice, stored)
        manifest = replace(
            draft.manifest,
            format_version=EARLY if self.early else COUNTS if selection.counts else 1,
            positions=positions,
            graphs=writer.graphs,
            versions=_versions(),
            command=self.options.command,
            optimize=self.options.optimize,
            early=self.early,
        )
        bundle = replace(draft, manifest=manifest)
        with (
            ahead() as in_turn,
            traced_ahead(parts, components.model, mode) as graphs,
            OrtWorker(widened=choice.element == "bfloat16", packed=_packed(choice)) as worker,
            writer,
        ):
            room = available_memory() // 2
            Thread(target=read_soon, args=(stored.values(), room), daemon=True).start()
            write = partial(self._write, components, graphs, selection, writer, choice, stored)
            written = in_turn(partial(write, part) for part in parts)
            tokenizer = Tokenizer.from_file(str(self.work / "tokenizer.json"))
            text = ids_of(tokenizer, int(components.decoder.outputs[0].shape[2]))
            verifier = Verifier(
                bundle,
                components,
                stored,
                choice,
                text,
                whole=whole is not None,
                decoder=self.options.decoder,
            )
            verifier.prepare()  # while the first graphs are traced
            self._embed(next(written), components, verifier, worker)
            self._vision(next(written), components, verifier, worker)
            if self.options.decoder:
                self._decoder(next(written), components, verifier, worker)
            require(self.differences, self.counts, exact=verifier.exact, least=verifier.least)
            self._weights(writer)
            note = "not compared: the decoder was, by layers"
            if not self.options.decoder:
                note = "not compared: there is no decoder"
            elif verifier.has_decoder:
                answers = verifier.compare_greedy(worker)
                note = f"{self._count({'greedy tokens': equal_tokens(*answers)})}: {verdict(*answers)}"
            self._line("generation", None, note)
            require(self.differences, self.counts, exact=verifier.exact, least=verifier.least)

        for language in languages:
            self._language(language)
        level = verifier.level if self.options.decoder else "without decoder"
        self._manifest(bundle.manifest, level, writer)
        total = read_bundle(self.work, check_hashes=False).nbytes
        of = selection.num_tokens or f"up to {selection.max_tokens}"
        self._line(str(self.out), total, f"K {selection.k} of {of}")

    def _write(
        self,
        components: Components,
        graphs: Iterator[Traced],
        selection: Selection,
        writer: GraphWriter,
        choice: Choice,
        stored: Mapping[str, StoredTensor],
        component: Component,
    ) -> list[Path]:
        """Write the next of `graphs`, which is of `component`; returns the paths of what it becomes.

        The vision graph becomes vision_select, and with --split the encoder and the selector apart as well.
        """
        traced = next(graphs)
        if self.options.optimize and component is components.decoder:
            traced = pack(traced)
        row = choice.of(component.name)
        if row.word != choice.element_word:
            traced = quantize(traced, row, self.options.block, stored)
        if component is not components.vision:
            return [writer.write(component.name, traced)]
        protected, attached = components.protected is not None, components.attached_to is not None
        selecting = attach_selection(
            traced.model,
            selection,
            padding=components.padding,
            protected=protected,
            attached=attached,
        )
        fused = Traced(selecting, traced.weights)
        if not self.options.split:
            return [writer.write(VISION_SELECT, fused)]
        encoder = writer.write(VISION_ENCODER, traced)
        selector = token_select_model(
            selection, planes=components.planes, protected=protected, attached=attached
        )
        return [
            writer.write(VISION_SELECT, fused, owner=encoder),
            encoder,
            writer.write(TOKEN_SELECT, Traced(selector, {})),
        ]

    def _embed(
        self, paths: list[Path], components: Components, verifier: Verifier, worker: OrtWorker
    ) -> None:
        (path,) = paths
        self._compared(path, verifier.compare(worker, components.embed, path), "")

    def _vision(
        self,
        paths: list[Path],
        components: Components,
        verifier: Verifier,
        worker: OrtWorker,
    ) -> None:
        fused, *split = paths
        differences, counted = verifier.compare_selection(worker)
        self._compared(fused, differences, self._count(counted))
        if split:
            encoder, selector = split
            self._compared(encoder, verifier.compare(worker, components.vision, encoder), "")
            differences, counted = verifier.compare_split(worker)
            self._compared(selector, differences, self._count(counted))

    def _decoder(
        self, paths: list[Path], components: Components, verifier: Verifier, worker: OrtWorker
    ) -> None:
        (path,) = paths
        if verifier.has_decoder:
            differences, counted = verifier.compare_text(worker, path)
            equal, total = counted[TEXT]
            note = f"{self._count(counted)} ({100 * equal / total:.0f} %)"
            self._compared(path, [*verifier.compare(worker, components.decoder, path), *differences], note)
        else:
            differences, self.layers = verifier.compare_layers(worker, path)
            layers = " and ".join(map(str, self.layers))
            self._compared(path, differences, f"layers {layers}, the others like them")

    def _weights(self, writer: GraphWriter) -> None:
        """Every weight of every graph against the checkpoint's."""
        wrong, total, size = writer.compare()
        if wrong:
            more = ", …" if len(wrong) > 3 else ""
            raise ParityError(
                f"{len(wrong)} of {total} weights are not the checkpoint's, so no bundle was written: "
                f"{', '.join(wrong[:3])}{more}"
            )
        self.counts["weights"] = (total, total)
        self._line("weights", size, f"equal {total}/{total}")

    def _languages(
        self, components: Components, stored: Mapping[str, StoredTensor]
    ) -> list[LanguageCheckpoint | GgufModel]:
        """The language model once more, in each form that was asked for."""
        languages: list[LanguageCheckpoint | GgufModel] = []
        if self.options.language_checkpoint:
            languages.append(language_checkpoint(components.model, stored))
        if self.options.gguf is not None:
            from resprune.exporter.checkpoint.gguf_file import gguf_model

            languages.append(gguf_model(components.model, stored, self.options.gguf, components.planes))
        return languages

    def _language(self, language: LanguageCheckpoint | GgufModel) -> None:
        with progress_bar("language_model", language.nbytes) as bar:
            language.write(self.work / language.file, self.work, bar.update)
        self._line(language.file, language.nbytes, language.kind)

    def _compared(self, path: Path, differences: list[Difference], note: str) -> None:
        self.differences += differences
        size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
        text = nearest(differences).words if differences else ""
        self._line(path.name, size, "   ".join(part for part in (text, note) if part))
        if all(row.least_snr >= TABLE["fp32"].snr for row in differences):
            return
        caches = [row for row in differences if row.output.startswith("present.")]
        for row in (row for row in differences if row not in caches):
            self.report(_fitted(f"      {row.output:28}", row.words))
        if caches:
            worst = nearest(caches)
            self.report(_fitted(f"      {worst.output:28}", f"{worst.words}   the worst of present.*"))

    def _count(self, counted: Mapping[str, Counted]) -> str:
        self.counts |= counted
        return "   ".join(f"{what} {equal}/{total}" for what, (equal, total) in counted.items())

    def _line(self, what: str, size: int | None, note: str) -> None:
        """The line of a stage: what was done since the one before it."""
        self.stage += 1
        before, self.since = self.since, perf_counter()
        stages = 6 + 2 * self.options.split + self.options.decoder
        stages += self.options.language_checkpoint + (self.options.gguf is not None)
        amount = "" if size is None else bytes_text(size)
        seconds = f"{self.since - before:.1f} s"
        self.report(_fitted(f"[{self.stage}/{stages}] {what:28} {seconds:>8} {amount:>12}", note))

    def _limit_pixels(self, checkpoint: Checkpoint, family: Family) -> Checkpoint:
        if self.options.max_pixels is None:
            return checkpoint
        if not family.any_size:
            raise ResPruneError(
                f"{family.title} brings every image to sizes of its own; leave out --max-pixels"
            )
        return replace(checkpoint, image_processor={"max_pixels": self.options.max_pixels})

    def _manifest(self, manifest: Manifest, level: str, writer: GraphWriter) -> None:
        parity: dict[str, Any] = {"level": level, "outputs": {}}
        for row in self.differences:
            outputs = parity["outputs"].setdefault(row.graph, {})
            if row.output not in outputs or row.max_diff > outputs[row.output]["max_diff"]:
                outputs[row.output] = {"max_diff": row.max_diff, "scale": row.scale}
                if math.isfinite(row.atol):
                    outputs[row.output]["atol"] = row.atol
                if math.isfinite(row.snr):
                    outputs[row.output]["snr"] = round(row.snr, 1)
        if self.layers:
            parity["layers"] = self.layers
        parity |= {what.replace(" ", "_"): f"{equal}/{total}" for what, (equal, total) in self.counts.items()}
        described = describe_files(self.work, writer.files)
        files = {name: spec for name, spec in described.items() if not name.startswith(".")}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        write_manifest(self.work, replace(manifest, files=files, parity=parity, created=created))


def _packed(choice: Choice) -> bool:
    """Whether a component's weights are packed."""
    return any(TABLE[word].bits for word in (choice.vision, choice.decoder, choice.embed))


def _versions() -> dict[str, str]:
    """Of Python and the packages; onnxruntime's by its own word, for other packages may have taken its place."""
    import onnxruntime

    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], **packages, "onnxruntime": onnxruntime.__version__}


def _fitted(head: str, note: str) -> str:
    """A line of 80 columns at most: its parts, which three spaces divide, go on in the next where they do not fit."""
    lines = [head]
    for part in note.split("   "):
        if len(lines[-1]) + 3 + len(part) <= 80:
            lines[-1] += f"   {part}"
        else:
            lines.append(f"         {part}")
    return "\n".join(lines)
