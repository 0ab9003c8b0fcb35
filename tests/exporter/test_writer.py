"""Writing ahead of the comparison: in order, and over at once when the export is."""

import sys
import threading
from pathlib import Path

import pytest

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.exporter.trace import writer
from resprune.exporter.trace.writer import ahead
from resprune.exporter.verify.difference import ParityError


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_jobs_are_done_in_order_and_on_linux_before_they_are_asked_for(
    platform: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "platform", platform)
    done: list[int] = []
    second = threading.Event()

    def job(number: int) -> int:
        done.append(number)
        if number == 2:
            second.set()
        return 10 * number

    with ahead() as in_turn:
        results = in_turn((lambda number=number: job(number)) for number in (1, 2))  # type: ignore[misc]
        assert next(results) == 10
        assert second.wait(5) if platform == "linux" else done == [1]
        assert next(results) == 20
    assert done == [1, 2]


def test_an_export_that_fails_ends_while_the_next_graph_is_being_written(
    tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The vision graph differs from PyTorch while the decoder's weights are on their way."""
    under_way, failed = threading.Event(), threading.Event()
    ended: list[str] = []
    write_weights = writer.write_weights

    def slow(traced, path, stored, progress):
        if not path.name.startswith("decoder"):
            return write_weights(traced, path, stored, progress)
        under_way.set()
        assert failed.wait(30)
        try:
            while True:  # a decoder without end
                progress(1, 0)
        except RuntimeError as error:
            ended.append(str(error))
            raise

    def differs(*arguments: object) -> None:
        assert under_way.wait(30)
        failed.set()
        raise ParityError("it differs")

    monkeypatch.setattr(writer, "write_weights", slow)
    monkeypatch.setattr("resprune.exporter.verify.verifier.Verifier.compare_selection", differs)
    with pytest.raises(ParityError, match="it differs"):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", Options(k=3))
    assert ended == ["the export has ended while decoder_model_merged.onnx was being written"]
    assert list(tmp_path.iterdir()) == []
