"""`resprune bench`: what it compares, what it prints, and that only a plot needs matplotlib."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import resprune.serving
from resprune import Pipeline
from resprune.runtime.bench import measure
from resprune.runtime.bench.measure import STAGES, Case, Timing, question_of
from resprune.runtime.bench.report import STAGE_COLORS, Report
from resprune.runtime.cli import main
from tests.runtime.wire import Model, Wire


def test_stages_have_the_colors_of_the_page() -> None:
    style = (Path(resprune.serving.__file__).parent / "page" / "style.css").read_text()
    found = dict(re.findall(r"--(encode|vision|prefill): (#[0-9a-f]{6});", style))
    assert found == {
        "encode": STAGE_COLORS["encode"].lower(),
        "vision": STAGE_COLORS["select"].lower(),
        "prefill": STAGE_COLORS["prefill"].lower(),
    }
    assert set(STAGES) <= set(STAGE_COLORS)


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> str:
    return str(tiny_bundle("clip-llama", k=7, split=True))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((60, 50)).convert("RGB").save(path)
    return str(path)


def test_the_json_is_one_case_a_budget(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", bundle, "--json", "--repeats", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    cases = report["cases"]
    assert [case["tokens"] for case in cases] == [1, 7, 16]
    assert report["load_repeats"] >= 1
    assert report["repeats"] == 3
    with Pipeline.load(bundle) as vlm:
        question = question_of(vlm, Image.new("RGB", (60, 50)), None)
        lengths = [
            vlm.ask(Image.new("RGB", (60, 50)), question, tokens=k).prompt_tokens for k in (1, 7, "all")
        ]
    assert [case["prompt_tokens"] for case in cases] == lengths
    for case in cases:
        timings = case["timings"]
        assert list(timings) == [f"{name}_ms" for name in (*STAGES, "first_token")]
        for timing in (*timings.values(), case["tokens_per_second"], report["load_ms"]):
            assert 0 < timing["first_quartile"] <= timing["median"] <= timing["third_quartile"]
        assert timings["first_token_ms"]["third_quartile"] >= timings["vision_ms"]["first_quartile"]
        assert 0 < case["vision_share"] < 1
        assert case["gains"]["prefill_ideal"] == lengths[-1] / case["prompt_tokens"]
    peaks = [case["peak_memory_mb"] for case in cases]
    assert peaks == sorted(peaks)
    assert peaks[0] > 20


def test_a_server_is_measured(
    tiny_bundle: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server writes every answer; what stands before the prefill is done here."""
    bundle = str(tiny_bundle("clip-llama", k=7, split=True))
    capsys.readouterr()  # what an export says, where this is the first test to need the bundle
    with Wire(Model(tiny_checkpoint("clip-llama"))) as wire:
        assert main(["bench", bundle, "-k", "3,all", "--repeats", "2", "--server", wire.url, "--json"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert err == ""
        assert report["backend"] == wire.url
        assert [case["tokens"] for case in report["cases"]] == [3, 16]
        assert report["repeats"] == 2
        for case in report["cases"]:
            assert all(case["timings"][f"{stage}_ms"]["median"] > 0 for stage in STAGES)
        asked = [path for path, _, _ in wire.seen]
        assert len(asked) == 2 * (1 + 2), "each budget once to warm up, then twice"
        assert main(["bench", bundle, "-k", "3", "--repeats", "1", "--server", wire.url]) == 0
        assert wire.url in capsys.readouterr().out
    assert main(["bench", bundle, "--server", wire.url]) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_a_prompt_of_a_given_length(bundle: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", bundle, "-k", "3", "--json", "--repeats", "1", "--image", photo]
    assert main([*words, "--prompt-tokens", "200"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert abs(case["prompt_tokens"] - 203) <= 2
    assert main([*words, "--prompt-tokens", "1"]) == 2
    assert "--prompt-tokens should be" in capsys.readouterr().err


def flat(milliseconds: float) -> Timing:
    return Timing(milliseconds, milliseconds * 0.9, milliseconds * 1.1, 5)


def case(tokens: int, prompt: int, prefill: float) -> Case:
    stages = {"pixels": flat(50), "prompt": flat(10), "vision": flat(940), "prefill": flat(prefill)}
    first = flat(1000 + prefill)
    return Case(tokens, 576, prompt, stages, first, flat(12.5), 2_048_400_000)


def made_report(load: Timing, cases: list[Case]) -> Report:
    return Report("x" * 30, "llava", "very long " * 20, 0, "cpu", "made", load, cases)


def test_gains_and_what_more_pruning_can_bring() -> None:
    report = made_report(flat(3210), [case(64, 100, 500), case(576, 600, 4000)])
    least = report.cases[0]
    gains = {"prefill": 8, "prefill_ideal": 6, "first_token": 5000 / 1500, "first_token_limit": 5}
    assert least.gains(report.base) == pytest.approx(gains)
    assert least.vision_share == pytest.approx(940 / 1500)
    table = report.table()
    for cells in (
        ["K", "64", "all"],
        ["ideal", "6.00", "x", "1.00", "x"],
        ["vision's", "share", "63", "%", "19", "%"],
    ):
        assert cells in [line.split() for line in table.splitlines()]
    assert "3.33 x as fast" in " ".join(table.split())
    assert "5.00 x as fast at most" in " ".join(table.split())


def test_the_table_fits_80_columns() -> None:
    cases = [case(tokens, tokens + 40, 90_000.0 * tokens) for tokens in (1, 16, 64, 128, 576)]
    report = made_report(flat(123_456), cases)
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("first token, ") for line in lines) == 2


def test_a_plot_is_drawn(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.png"
    assert main(["bench", bundle, "-k", "2,40%", "--repeats", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("bundle")
    with Image.open(out) as drawn:
        assert drawn.width > 400


def test_a_prompt_that_leaves_one_token_is_refused(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "DECODED", 1)
    assert main(["bench", bundle, "-k", "3", "--repeats", "1"]) == 2
    assert "an answer of one token has no speed" in capsys.readouterr().err


def test_wrong_input_is_one_sentence(
    bundle: str,
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = str(tiny_bundle("clip-llama", k=7))
    capsys.readouterr()  # what the export said
    for words, sentence in (
        ([bundle, "--repeats", "0"], "--repeats should be 1 or more"),
        ([bundle, "-k", "x"], "'x' is no number of tokens to keep"),
        ([bundle, "-k", ","], "-k names no budget"),
        ([bundle, "-k", "8"], "1 to 7, not 8"),
        ([fused, "-k", "3,all"], "1 to 7, not 16"),
        ([bundle, "--image", "none.png"], "no file none.png"),
        ([bundle, "--out", "bench.txt"], "ends as none of them"),
        ([bundle, "--out", str(tmp_path / "no" / "bench.png")], "--out cannot write"),
        ([str(tmp_path)], "resprune.json"),
    ):
        assert main(["bench", *words]) == 2, words
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), sentence in err) == ("", 1, True), err
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main(["bench", bundle, "--out", "bench.png"]) == 2
    assert 'pip install "resprune[eval]"' in capsys.readouterr().err


def test_without_a_plot_the_device_needs_no_more_than_for_an_answer(bundle: str) -> None:
    program = (
        "import sys\nfrom resprune.runtime.cli import main\n"
        f"assert main(['bench', {bundle!r}, '-k', '2', '--repeats', '1']) == 0\n"
        "assert not {'matplotlib', 'torch', 'transformers', 'onnx', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
