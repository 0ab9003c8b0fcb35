"""llama.cpp as a backend, as far as it goes where it is not installed; tests/hosts has the real one."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from resprune.runtime.backends import llama_library
from resprune.runtime.backends.llama_cpp import llamacpp
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.runtime.bundles import one_sentence
from tests.runtime.pipelines import with_manifest

PICTURE = Path(__file__).parents[2] / "demo" / "pictures" / "shapes.png"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What begins as a GGUF file."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    return path


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gguf", "{model}", "--server", "http://127.0.0.1:9"], "--server and --gguf both say who answers"),
        (["--gpu-layers", "3"], "--gpu-layers is for --gguf"),
        (["--gguf", "{model}", "--gpu-layers", "-2"], "gpu_layers"),
        (["--gguf", "{model}.not"], "cannot be read"),
        (["--gguf", "{bundle}/resprune.json"], "is not a GGUF file"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], said: str, bundle: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(model=model, bundle=bundle) for word in options]
    assert main(["ask", str(bundle), str(PICTURE), "what?", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_missing_package_is_one_line(bundle: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(
        ResPruneError, match=r"needs llama-cpp-python; pip install 'resprune\[llamacpp\]'"
    ) as caught:
        Pipeline.load(bundle, generator=llamacpp(model))
    one_sentence(caught.value)


def test_positions_with_gaps_are_refused(bundle: Path, model: Path, tmp_path: Path) -> None:
    original = with_manifest(bundle, tmp_path, positions="original")
    with pytest.raises(ResPruneError, match="takes no gaps between the positions") as caught:
        Pipeline.load(original, generator=llamacpp(model))
    one_sentence(caught.value)


def test_proportional_attention_is_refused(tiny_bundle: Callable[..., Path], model: Path) -> None:
    bundle = tiny_bundle("clip-llama", k=7, split=True, attention="proportional")
    with pytest.raises(ResPruneError, match=r"llama\.cpp attends to every row alike") as caught:
        Pipeline.load(bundle, generator=llamacpp(model))
    one_sentence(caught.value)


def test_threads_share_one_library_and_hear_their_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp calls its only listener, which must live; an error is told to the thread that made the call."""
    listeners: list[Callable[[int, bytes, None], None]] = []
    second = threading.Barrier(2)

    def initialise() -> None:
        with suppress(threading.BrokenBarrierError):  # whoever loads it too comes here as well
            second.wait(0.1)

    functions = SimpleNamespace(
        llama_log_callback=lambda hear: hear,
        llama_backend_init=initialise,
        llama_log_set=lambda listener, data: listeners.append(listener),
    )
    monkeypatch.setattr(llama_library, "_import", lambda: functions)
    monkeypatch.setattr(llama_library, "_loaded", cache(llama_library._Library))
    told = threading.Barrier(2)

    def fail(name: bytes) -> list[str]:
        loaded = llama_library.library()
        listeners[0](llama_library.ERROR_LEVEL, name, None)
        told.wait(30)
        return list(loaded.errors.told)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(fail, (b"one", b"other"))) == [["one"], ["other"]]
    assert len(listeners) == 1
