"""Fixtures that several rooms share: tiny checkpoints and their bundles, made once for all processes of a session."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import ImageFile

# Before torch is imported. The models are tiny: threads that wait for each other cost more than they bring, and on a
# busy machine a hundred times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before triton is: its kernels run in its interpreter, on the CPU. What is compiled is compiled in a child process.
os.environ["TRITON_INTERPRET"] = "1"


# What a shell runs in the background ignores Ctrl-C, and so would the programs that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What the tests' modules import stays. Garbage is looked for again after that, and not among those million objects.
gc.disable()

TINY = ("tiny", "tiny_gemma", "tiny_qwen", "tiny_tiles", "synthetic_family")

Make = Callable[[str, Callable[[Path], Any]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: they have the long ones, and none of those begins when all else is done."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: count[item.path])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(
        20_000, 25, 50
    )  # a trace makes a million objects, and nearly all go without being looked for
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # C++ libraries complain at the end of what is left


@pytest.fixture(autouse=True)
def _strict_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, which other tests import, tells Pillow to fill up images that are cut off."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Name and what writes it → its path, written once by whichever of xdist's processes asks first."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    place = place / "shared"
    place.mkdir(exist_ok=True)

    def made(name: str, write: Callable[[Path], Any]) -> Path:
        folder = place / name
        with FileLock(place / f"{name}.lock"):
            done = place / f"{name}.done"  # a folder that a failed test left half written is none
            if not done.exists():
                write(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(made_once: Make, traced_once: None) -> Callable[[str], Path]:
    """Name of a variant of the TINY modules → its checkpoint; to be copied before it is changed."""

    def checkpoint(variant: str) -> Path:
        modules: Iterator[Any] = (import_module(f"tests.{name}") for name in TINY)
        module = next(one for one in modules if variant in one.VARIANTS)
        return made_once(variant, lambda root: module.write_checkpoint(root, module.VARIANTS[variant]))

    return checkpoint


@pytest.fixture(scope="session")
def traced_once(made_once: Make) -> Iterator[None]:
    """Exports share what they trace, and the processes that run their graphs."""
    from tests import traces, workers

    with traces.kept(made_once), workers.shared():
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Callable[[str], Path], made_once: Make) -> Callable[..., Path]:
    """Variant, or "demo", and the fields of `exporter.options.Options` → its bundle, exported once a session."""
    from resprune.exporter.export import export
    from resprune.exporter.options import Options

    def bundle(variant: str, **options: Any) -> Path:
        asked = Options(**options)
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:12]

        def write(out: Path) -> None:
            export("demo" if variant == "demo" else str(tiny_checkpoint(variant)), out, asked)

        return made_once(f"{variant}-{key}", write)

    return bundle


@pytest.fixture(scope="session")
def demo_bundle(tiny_bundle: Callable[..., Path]) -> Path:
    """The trained demo model, exported with a ninth of its visual tokens as the README exports it."""
    return tiny_bundle("demo", k=16, split=True)
