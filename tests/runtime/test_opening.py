"""How a pipeline opens: tower and language model side by side, and what had opened is closed where one cannot."""

from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from resprune import Pipeline, ResPruneError
from resprune.runtime.backends.onnxruntime import onnxruntime_backend
from resprune.runtime.backends.session import OrtGraphs, SessionOptions
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.walk import SPLIT
from tests.runtime.pipelines import QUESTION, picture


class Side(OrtGraphs):
    """Graphs whose tower opens only while the language model does; the test's own `together` is where they meet."""

    together: Barrier
    closed = 0

    def open(self, graph: str) -> None:
        if graph not in ("embed_tokens", "token_select"):
            self.together.wait()
        super().open(graph)

    def close(self) -> None:
        super().close()
        type(self).closed += 1


def test_tower_and_language_model_open_side_by_side(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Side, "together", Barrier(2, timeout=60), raising=False)

    def generator(*arguments: Any) -> Any:
        Side.together.wait()
        return onnxruntime_backend(*arguments)

    vlm = Pipeline(read_bundle(split), SessionOptions(), generator=generator, graphs=Side)
    assert vlm.ask(picture(1), QUESTION, max_new_tokens=1, stream=False).token_ids
    assert sorted(vlm._graphs._sessions) == ["embed_tokens", "token_select", "vision_encoder"]


def test_what_had_opened_is_closed_when_the_other_cannot(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Side, "together", Barrier(1), raising=False)
    monkeypatch.setattr(Side, "closed", 0)
    bundle = read_bundle(split)
    closed = []

    class Backend:
        def close(self) -> None:
            closed.append(self)

    def refuses(*arguments: Any) -> Any:
        raise ResPruneError("no language model today")

    with pytest.raises(ResPruneError, match="no language model"):
        Pipeline(bundle, SessionOptions(), generator=refuses, graphs=Side)
    assert (Side.closed, len(closed)) == (1, 0)
    monkeypatch.setattr(OrtGraphs, "open", lambda graph, name: refuses() if name in SPLIT else None)
    with pytest.raises(ResPruneError, match="no language model"):
        Pipeline(bundle, SessionOptions(), generator=lambda *_: Backend(), graphs=Side)  # type: ignore[return-value]
    assert (Side.closed, len(closed)) == (2, 1)
