"""MODEL on the command line → a checkpoint directory: an alias, a hub id, or a directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from resprune.exporter.checkpoint.shards import StoredTensor, open_weights
from resprune.exporter.transaction import NO_SPACE
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.table import FAMILIES, Family, aliases, known_families

DEMO = "demo"
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


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
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not (self.root / "config.json").is_file():
            raise ResPruneError(
                f"{self.root} has no config.json; give the directory of a Hugging Face checkpoint"
            )
        object.__setattr__(self, "config", self.json("config.json"))

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """Every stored weight by the name that the checkpoint gives it."""
        return open_weights(self.root)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; `{}` if there is none."""
        path = self.root / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ResPruneError(f"{path} is not valid JSON ({error}); download it again") from None
        if not isinstance(value, dict):
            raise ResPruneError(f"{path} should hold a JSON object; download it again")
        return value


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
    """The checkpoint's config as an object of transformers; `ResPruneError` if it has what that class refuses."""
    with config_faults(checkpoint):
        return config_class.from_dict(checkpoint.config)


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
    )
    try:
        yield
    except (StrictDataclassError, *kinds) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ResPruneError(
            f"{checkpoint.root / 'config.json'} is not a valid {checkpoint.config['model_type']} config ({reason}); "
            "correct it, or download it again"
        ) from None


def resolve(model: str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `model` names, downloaded if it is on the hub.

    Raises `ResPruneError`: no such alias or directory, hub unreachable, gated, or no such repository or revision.
    """
    here = model == DEMO or os.path.isdir(model)  # noqa: PTH112 - Path.is_dir raises for a name that is too long
    if here and revision is not None:
        raise ResPruneError(f"--revision is for a hub id, and {model} is a directory; leave it out")
    if model == DEMO:
        return Checkpoint(_demo_directory(), DEMO)
    if here:
        return Checkpoint(Path(model), Path(model).resolve().name)
    repository = aliases().get(model, model)
    if not _is_hub_id(repository):
        raise _unknown(model)
    root, commit = _download(repository, revision)
    return Checkpoint(root, model, commit)


def _unknown(model: str) -> ResPruneError:
    names = ", ".join([DEMO, *aliases()])
    return ResPruneError(f"{model} is not a directory, a hub id like owner/name, or one of {names}")


def _demo_directory() -> Path:
    """`demo/model` of the checkout that this package runs from, or of the one that holds the working directory."""
    here = Path(__file__).resolve().parent
    for checkout in (here.parent, *_parents(Path.cwd())):
        if (checkout / "demo" / "model" / "config.json").is_file():
            return checkout / "demo" / "model"
    raise ResPruneError("the demo model is not in the package; run this inside a checkout of the repository")


def _parents(directory: Path) -> Iterator[Path]:
    yield directory
    yield from directory.parents


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return (
        bool(slash and owner and repository)
        and "/" not in repository
        and not name.startswith((".", "~", "/"))
    )


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Snapshot of a hub repository and the commit that it is of; the cache is used where it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The base error of whichever HTTP library this huggingface_hub uses (httpx until 2.0, then httpx2).
    unreachable: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=list(DOWNLOADED)))
    except HFValidationError:  # has characters that no repository's name has
        raise _unknown(repository) from None
    except GatedRepoError:
        raise ResPruneError(
            f"{repository} is gated: accept its terms on its hub page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise ResPruneError(
            f"{repository} has no revision {revision}; give one of its branches or commits"
        ) from None
    except RepositoryNotFoundError:
        raise ResPruneError(
            f"the hub has no {repository}, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except (OSError, unreachable) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise ResPruneError(
                f"the disk is full, so {repository} could not be downloaded; make room, or move the cache with HF_HOME"
            ) from None
        raise ResPruneError(
            f"the hub could not be reached for {repository} ({type(error).__name__}); download the checkpoint "
            "elsewhere and give its directory as MODEL"
        ) from None
    # The cache lays snapshots out as …/snapshots/<commit>.
    return path, path.name
