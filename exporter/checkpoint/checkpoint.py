"""MODEL on the command line → a checkpoint directory: an alias, a hub id, or a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resprune.exporter.checkpoint import hub
from resprune.exporter.checkpoint.files import read_json
from resprune.exporter.checkpoint.layouts import check_adapter, check_layout
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.table import FAMILIES, Family, aliases, known_families

if TYPE_CHECKING:
    from resprune.exporter.checkpoint.shards import StoredTensor

DEMO = "demo"


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint on disk; weights are mapped one at a time, never loaded."""

    root: Path
    name: str
    """Alias, hub id or directory name: what the manifest calls the model."""
    revision: str | None = None
    """Commit of the hub's repository; None for a directory."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """Settings that take the place of the image processor's own."""
    template: str | None = None
    """A chat template that takes the place of the checkpoint's."""
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        check_adapter(self.root)
        if not (self.root / "config.json").is_file():
            raise ResPruneError(
                f"{self.root} has no config.json; give the directory of a Hugging Face checkpoint"
            )
        object.__setattr__(self, "config", self.json("config.json"))
        check_layout(self.root, self.config)

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """Every stored weight by the name that the checkpoint gives it."""
        from resprune.exporter.checkpoint.shards import open_weights  # PyTorch's

        return open_weights(self.root)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; `{}` if there is none."""
        path = self.root / name
        return read_json(path) if path.is_file() else {}


def family_of(checkpoint: Checkpoint) -> Family:
    """The row for a checkpoint's config; `ResPruneError`, listing the families, if there is none."""
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in FAMILIES:
        raise ResPruneError(
            f"{checkpoint.root} holds a model of type {model_type}, which is not supported; supported are "
            f"{known_families()}"
        )
    if "quantization_config" in checkpoint.config:
        raise ResPruneError(f"{checkpoint.root} is quantized; export the checkpoint that it was made from")
    return FAMILIES[model_type]


def parse_config(config_class: Any, checkpoint: Checkpoint) -> Any:
    """The checkpoint's config as an object of transformers, and as transformers 5 would load its weights.

    A head that is tied by the config and stored with other values than the embedding table is not tied. `ResPruneError`
    for what that class refuses, and for a model whose size its weights cannot have.
    """
    from resprune.exporter.checkpoint.shards import untied

    parts = [checkpoint.config, *map(checkpoint.config.get, PARTS)]
    _check_layers(checkpoint, [part for part in parts if isinstance(part, dict)])
    with config_faults(checkpoint):
        config = config_class.from_dict(checkpoint.config)
        _check_buffers(checkpoint, [getattr(config, part, None) for part in PARTS])
        if untied(checkpoint.weights):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


PARTS = ("text_config", "vision_config")


def _check_layers(checkpoint: Checkpoint, parts: list[dict[str, Any]]) -> None:
    """Before any list of that many is made: every layer has weights of its own."""
    for key in ("num_hidden_layers", "depth"):
        for count in (part.get(key) for part in parts):
            if isinstance(count, int) and count > len(checkpoint.weights):
                raise ResPruneError(
                    f"{checkpoint.root / 'config.json'} asks for {key} {_number(count)} and there are "
                    f"{len(checkpoint.weights)} weights; it belongs to another model"
                )


def _check_buffers(checkpoint: Checkpoint, parts: list[Any]) -> None:
    """What the model computes when it is built takes memory: no more than its weights have rows or columns."""
    largest = max((size for tensor in checkpoint.weights.values() for size in tensor.shape), default=0)
    for part in parts:
        image, patch = getattr(part, "image_size", None), getattr(part, "patch_size", None)
        sizes = {
            "head_dim": getattr(part, "head_dim", None),
            "hidden_size": getattr(part, "hidden_size", None),
        }
        if isinstance(image, int) and isinstance(patch, int) and patch > 0:
            sizes["image_size"] = (image // patch) ** 2
        for key, size in sizes.items():
            if isinstance(size, int) and size > largest:
                raise ResPruneError(
                    f"{checkpoint.root / 'config.json'} has a {key} of {_number(getattr(part, key))}, for which no "
                    f"weight is large enough (the largest side is {largest}); it belongs to another model"
                )


def _number(value: int) -> str:
    return str(value) if abs(value) < 10**30 else "a huge number"


@contextmanager
def config_faults(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what transformers raises for a config, when it reads it or builds its model, into one sentence."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        MemoryError,
    )
    try:
        yield
    except (StrictDataclassError, *kinds) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ResPruneError(
            f"{checkpoint.root / 'config.json'} is not a valid {checkpoint.config['model_type']} config ({reason}); "
            "correct it, or download it again"
        ) from None


def require_model(model: str, *, revision: str | None = None) -> None:
    """`ResPruneError` as `resolve`, before PyTorch is imported; nothing is downloaded.

    Of a hub id only that the hub answers, or has answered before.
    """
    repository = _hub_id(model)
    if repository is None:
        resolve(model, revision=revision)
    elif (fault := hub.unreachable(repository, revision)) is not None:
        hub.cached(repository, revision, fault)


def resolve(model: str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names, downloaded if it is on the hub.

    Raises `ResPruneError`: no such alias or directory, hub unreachable, gated, or no such repository or revision.
    """
    here = _is_here(model)
    if here and revision is not None:
        raise ResPruneError(f"--revision is for a hub id, and {model} is a directory; leave it out")
    if model == DEMO:
        return Checkpoint(_demo_directory(), DEMO)
    if here:
        return Checkpoint(Path(model), Path(model).resolve().name)
    repository = _hub_id(model)
    if repository is None:
        raise _unknown(model)
    root = hub.download(repository, revision)
    if root is None:
        raise _unknown(model)
    return Checkpoint(root, model, root.name)  # the cache lays snapshots out as …/snapshots/<commit>


def _unknown(model: str) -> ResPruneError:
    names = ", ".join([DEMO, *aliases()])
    return ResPruneError(f"{model} is not a directory, a hub id like owner/name, or one of {names}")


def _demo_directory() -> Path:
    """`demo/model` of the checkout that this package runs from, or of the one that holds the working directory."""
    here = Path(__file__).resolve().parents[2]
    for checkout in (here, *_parents(Path.cwd())):
        if (checkout / "demo" / "model" / "config.json").is_file():
            return checkout / "demo" / "model"
    raise ResPruneError("the demo model is not in the package; run this inside a checkout of the repository")


def _parents(directory: Path) -> Iterator[Path]:
    yield directory
    yield from directory.parents


def _is_here(model: str) -> bool:
    return model == DEMO or os.path.isdir(model)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def _hub_id(model: str) -> str | None:
    """The hub id that `model` is or stands for; None for a directory and for what is none."""
    name = aliases().get(model, model)
    owner, slash, repository = name.partition("/")
    plain = bool(slash and owner and repository) and "/" not in repository
    return name if plain and not name.startswith((".", "~", "/")) and not _is_here(model) else None
