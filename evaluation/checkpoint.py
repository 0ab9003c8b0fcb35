"""A checkpoint in PyTorch with the reference selection: what a bundle is compared with, and what runs on a GPU."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from resprune.evaluation.model import Model, Stages, check_policies, engine, with_positions
from resprune.evaluation.towers import smaller_pixels
from resprune.method import Selection, Settings
from resprune.runtime.backends.backend import Place
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, one_line, permission_faults, require_packages
from resprune.runtime.families.fixed_grid import FixedGrid
from resprune.runtime.families.preprocessor import PreparedImage, Preprocessor
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.prompt.splice import Bools, Floats, Ints, Spliced
from resprune.runtime.walk import Encoded, Features, Walk

if TYPE_CHECKING:
    from resprune.exporter.checkpoint.checkpoint import Checkpoint
    from resprune.exporter.components import Component, Components
    from resprune.exporter.language import Rows

NEEDED = ("torch", "transformers", "accelerate", "onnxscript", "huggingface_hub")


def open_checkpoint(
    name: str,
    *,
    positions: str | None = None,
    attention: str | None = None,
    device: str = "cpu",
    threads: int = 0,
) -> Model:
    """An alias, hub id or directory, run by Hugging Face's own code; its own selection is the reference.

    In float32 on the CPU, elsewhere in the checkpoint's dtype; `device` is PyTorch's name of one. `positions` and
    `attention` None are the family's defaults. The prompt, the pixels' geometry and the positions are
    the runtime's, as in a bundle. `threads` of the processor are then PyTorch's in this process; 0 leaves them.
    Raises `ResPruneError` for what cannot be found, loaded, or put on `device`.
    """
    check_policies(positions, attention)
    way = 'install with: pip install "resprune[export,eval]"'
    require_packages(f"{name} is no bundle, and a checkpoint", NEEDED, way)
    import torch
    import transformers
    from transformers import AutoImageProcessor, AutoModelForImageTextToText
    from transformers.utils import logging

    from resprune.exporter.checkpoint.checkpoint import resolve

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    with permission_faults(), tempfile.TemporaryDirectory(prefix="resprune-") as folder:
        checkpoint = resolve(name)
        bundle, components = _without_graphs(checkpoint, Path(folder), attention or "plain")
        bundle = with_positions(bundle, positions)
        try:
            dtype = torch.float32 if device == "cpu" else "auto"
            model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint.root, dtype=dtype)
            model = model.to(device).eval()
            load_processor: Any = AutoImageProcessor.from_pretrained
            processor = load_processor(checkpoint.root, backend="pil")
        except (RuntimeError, AssertionError, ValueError, OSError) as error:
            raise ResPruneError(f"{name} cannot be loaded on {device} ({one_line(error)})") from None
        preprocessor = FAMILIES[bundle.manifest.family].preprocessor(bundle)
        family = bundle.manifest.family
        stages = _TorchStages(model, processor, bundle.manifest.selection, components, preprocessor, family)
        return Model(
            bundle,
            Stages(
                Walk(bundle, OrtGraphs(bundle, SessionOptions()), stages.embed),  # there are no graphs
                stages.encode,
                stages.select,
                _TorchDecoder(model, components),
                bundle.manifest.selection.k,
                engine(device, torch.get_num_threads(), torch, transformers),
                stages.early,
                stages.smaller if isinstance(preprocessor, FixedGrid) else None,
            ),
            _fingerprint(checkpoint, bundle, f"{model.dtype} on {device}"),
            attention,
        )


def _fingerprint(checkpoint: Checkpoint, bundle: Bundle, how: str) -> str:
    """What answers depend on; weights are told apart by their files' size and time, for hashing them takes minutes."""
    side_files = {name: spec.sha256 for name, spec in bundle.manifest.files.items()}
    stats = {path.name: path.stat() for path in {tensor.file for tensor in checkpoint.weights.values()}}
    weights = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    digest = hashlib.sha256(json.dumps([side_files, weights], sort_keys=True).encode()).hexdigest()
    return f"{checkpoint.name} {checkpoint.revision} {digest}, {how}"


def _without_graphs(checkpoint: Checkpoint, root: Path, attention: str) -> tuple[Bundle, Components]:
    """What an export writes beside its graphs, and the facts its manifest would have, with K as large as N.

    The components say what else the model is; they are weightless.
    """
    import torch

    from resprune.exporter.checkpoint.checkpoint import family_of
    from resprune.exporter.checkpoint.draft import write_draft
    from resprune.exporter.checkpoint.side_files import check_side_files
    from resprune.exporter.checkpoint.weightless import fake_mode
    from resprune.exporter.families import split_model
    from resprune.exporter.selection import selection_of
    from resprune.exporter.trace.weights import find_weights

    family = family_of(checkpoint)
    check_side_files(checkpoint)
    components = split_model(checkpoint, torch.float32, fake_mode())
    find_weights(checkpoint, components.model)  # transformers fills those that are missing with random values
    every = selection_of(Settings(share=1.0), family, components, counts=attention == "proportional")
    return write_draft(checkpoint, components, every, root), components


@contextmanager
def _faults(what: str, device: Any) -> Iterator[None]:
    """Turn what PyTorch raises while a model runs, out of memory above all, into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ResPruneError(
            f"PyTorch could not {what} on {device} ({one_line(error)}); where memory is short, take fewer "
            "questions at once, fewer tokens, or another --device"
        ) from None


class _TorchStages:
    """Encoder, embedding and selection of a Hugging Face model; arrays in, arrays out."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        selection: Selection,
        components: Components,
        preprocessor: Preprocessor,
        family: str,
    ) -> None:
        self._family = family
        self._model = model
        self._processor = processor
        self._selection = selection
        self._components = components
        self._preprocessor = preprocessor

    def encode(self, images: Sequence[Image.Image], prepared: Sequence[PreparedImage]) -> list[Encoded]:
        import torch

        encoded: list[Encoded] = []
        # One by one: images differ in size, and what one needs is bounded.
        for image, one in zip(images, prepared, strict=True):
            with _faults("encode an image", self._model.device), torch.inference_mode():
                if self._components.planes:
                    # Only the family knows how its model gives them: its reference for the vision graph does it.
                    encoded.append(_encoded(one, self._reference(self._components.vision, one)))
                    continue
                inputs = self._processor(images=[np.asarray(image)], return_tensors="pt")
                tiles = self._model.get_image_features(**inputs.to(self._model.device)).pooler_output
                encoded.append(_encoded(one, [torch.cat(list(tiles))[None]]))
        return encoded

    def _reference(self, vision: Component, image: PreparedImage) -> tuple[Any, ...]:
        import torch

        arrays = self._preprocessor.batch([image])
        tensors = [torch.from_numpy(arrays[spec.name]).to(self._model.device) for spec in vision.inputs]
        inputs = tuple(one.to(self._model.dtype) if one.is_floating_point() else one for one in tensors)
        return vision.reference(self._model, inputs)

    def early(self, setting: str) -> Callable[[Sequence[PreparedImage]], list[Encoded]]:
        """With a first selection inside the tower, `setting` being what `resprune export --early` takes."""
        import torch

        from resprune.exporter.options import EarlyRequest
        from resprune.exporter.verify.early import early_reference

        vision = self._components.vision
        early = EarlyRequest.parse(setting).of(self._components, FAMILIES[self._family].title)
        assert vision.tower is not None
        selecting = replace(vision, reference=early_reference(vision, vision.tower, early))

        def encode(images: Sequence[PreparedImage]) -> list[Encoded]:
            with _faults("encode an image", self._model.device), torch.inference_mode():
                found = [(image, *self._reference(selecting, image)) for image in images]
            return [_encoded(image, planes, left[0].cpu().numpy()) for image, *planes, left, _ in found]

        return encode

    def smaller(self, image: PreparedImage, k: int) -> Encoded:
        """The image of a tower of one size with about `k` tokens: its table of positions is interpolated."""
        import torch

        assert isinstance(self._preprocessor, FixedGrid)
        pixels = smaller_pixels(image.arrays["pixel_values"], self._preprocessor.patch_size, k)
        # DINOv2's tower interpolates whatever it gets.
        fixed = self._model.config.vision_config.model_type != "dinov2"
        how = {"interpolate_pos_encoding": True} if fixed else {}
        with _faults("encode an image", self._model.device), torch.inference_mode():
            rows = self._model.get_image_features(pixels.to(self._model.device, self._model.dtype), **how)
            features = torch.cat(list(rows.pooler_output))[None]
        count = features.shape[1]
        return _encoded(PreparedImage.one_span({}, np.arange(count), count), [features])

    def embed(self, input_ids: Ints) -> Floats:
        import torch

        with _faults("embed a question", self._model.device), torch.inference_mode():
            ids = torch.from_numpy(input_ids).to(self._model.device)
            embeds: Floats = self._model.get_input_embeddings()(ids).float().cpu().numpy()
        return embeds

    def select(self, encoded: Encoded, text: Floats, k: int) -> Ints:
        import torch

        from resprune.exporter.verify.reference import select

        image, tokens = encoded.image, encoded.tokens
        with _faults("select tokens", self._model.device):
            visual, words = (
                torch.from_numpy(rows)[None].to(self._model.device) for rows in (tokens.rows, text)
            )
            rules = (
                None if rule is None else torch.from_numpy(rule)[None].to(self._model.device)
                for rule in (tokens.left, image.protected, image.attached_to)
            )
            _, order = select(visual, words, None, replace(self._selection, k=k), *rules)
            picks: Ints = order[0].cpu().numpy()
        return picks[picks >= 0]


def _encoded(image: PreparedImage, planes: Sequence[Any], left: Bools | None = None) -> Encoded:
    """Of an image's planes [1, N, D], tensors."""
    first, *further = (plane[0].float().cpu().numpy() for plane in planes)
    return Encoded(image, Features(first, tuple(further), left))


_ANSWER = "go on with an answer"


class _TorchDecoder:
    """`Decoder` by Hugging Face's code."""

    def __init__(self, model: Any, components: Components) -> None:
        self.model = model
        self._components = components

    def start(self, spliced: Spliced) -> _TorchSequence:
        return _TorchSequence(self.model, spliced, self._components)

    def close(self) -> None:
        """Nothing is held beside the model."""


class _TorchSequence:
    """One batch of prompts, with Hugging Face's cache."""

    def __init__(self, model: Any, spliced: Spliced, components: Components) -> None:
        import torch
        from transformers import DynamicCache

        from resprune.exporter.language import Rows

        self._model = model
        self._cache: Any = DynamicCache()
        self._place = Place.of(spliced)
        with _faults(_ANSWER, model.device):
            embeds = torch.from_numpy(spliced.inputs_embeds).to(model.device, model.dtype)
            rows = Rows(components.plane_layers, components.two_way)
            names = [spec.name for spec in rows.specs(("batch_size", "sequence_length"), embeds.shape[2])]
            inputs = (torch.from_numpy(spliced.row_inputs[name]).to(model.device) for name in names)
            self.logits = self._run(embeds, rows, tuple(inputs))

    def step(self, tokens: Ints) -> None:
        import torch

        from resprune.exporter.language import Rows

        self._place.step()
        with _faults(_ANSWER, self._model.device), torch.inference_mode():
            ids = torch.from_numpy(tokens[:, None]).to(self._model.device)
            self.logits = self._run(self._model.get_input_embeddings()(ids), Rows(), ())

    def close(self) -> None:
        self._cache = None

    def _run(self, embeds: Any, rows: Rows, row_inputs: tuple[Any, ...]) -> Floats:
        import torch

        from resprune.exporter.language import additive_masks, position_bias

        language_model = self._model.get_decoder()
        mask = torch.from_numpy(self._place.attention_mask).to(embeds.device)
        planes, numbers, _ = rows.parts(row_inputs)
        how: dict[str, Any] = {"attention_mask": mask, **position_bias(language_model, mask)}
        if numbers is not None:
            config, length = language_model.config, embeds.shape[1]
            masks = additive_masks(
                config, length, mask, numbers, proportional=True, dtype=embeds.dtype
            )  # a count of 1 weighs nothing
            how = {"attention_mask": masks}
        planes = tuple(plane.to(embeds.dtype) for plane in planes)
        with torch.inference_mode(), rows.added(language_model, planes):
            hidden = language_model(
                inputs_embeds=embeds,
                position_ids=torch.from_numpy(self._place.position_ids).to(embeds.device),
                past_key_values=self._cache,
                use_cache=True,
                **how,
            ).last_hidden_state[:, -1]
            logits: Floats = self._model.lm_head(hidden).float().cpu().numpy()
        return logits
