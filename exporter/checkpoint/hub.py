"""Checkpoints of the hub, through huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from resprune.exporter.transaction import NO_SPACE
from resprune.runtime.errors import ResPruneError, one_line

FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
SECONDS = 10.0
"""How long the hub has to answer the first request."""


def download(repository: str, revision: str | None) -> Path | None:
    """Snapshot of a repository, from the hub, or from the cache where it is complete; None if no name is like this.

    Raises `ResPruneError`: hub unreachable, gated, no such repository or revision, disk full.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if (fault := unreachable(repository, revision)) is not None:
        return cached(repository, revision, fault)
    try:
        return _snapshot(repository, revision, local=False)
    except HFValidationError:
        return None
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
    except (OSError, _http_error()) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise ResPruneError(
                f"the disk is full, so {repository} could not be downloaded; make room, or move the cache with HF_HOME"
            ) from None
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise _unreached(repository, _reason(cause)) from None


def cached(repository: str, revision: str | None, fault: str) -> Path:
    """Snapshot of a repository in the cache; `ResPruneError`, with why the hub is not asked, if it is not whole."""
    try:
        return _snapshot(repository, revision, local=True)
    except OSError:
        raise _unreached(repository, fault) from None


def unreachable(repository: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked; None where it answers within `SECONDS`, be it with an error.

    huggingface_hub tries again for minutes, and waits as long for an address that does not answer. In a thread, as the
    timeout of a request bounds neither the look-up of a name nor how many addresses are tried.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    found: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        fault = None
        try:
            HfApi().model_info(repository, revision=revision, timeout=SECONDS)
        except (HfHubHTTPError, ValueError):
            pass  # the hub's own words, which `download` gets as well
        except (OSError, _http_error()) as error:
            fault = _reason(error)
        found.put(fault)

    Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=SECONDS)
    except Empty:
        return f"no answer in {SECONDS:g} s"


def _snapshot(repository: str, revision: str | None, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=list(FILES), local_files_only=local)
    )


def _unreached(repository: str, why: str) -> ResPruneError:
    return ResPruneError(
        f"the hub could not be reached for {repository} ({why}); download the checkpoint elsewhere and give its "
        "directory as MODEL"
    )


def _http_error() -> type[Exception]:
    """The base error of whichever HTTP library this huggingface_hub uses (httpx until 2.0, then httpx2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")
