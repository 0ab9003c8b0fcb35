"""The command: what it prints, and one sentence with exit status 2 for what the user can put right."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from resprune import Pipeline
from resprune.runtime.cli import main

QUESTION = "what colour is the square?"
COMMAND = [sys.executable, "-m", "resprune.runtime.cli"]


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> str:
    return str(tiny_bundle("clip-llama", k=7, split=True))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").resize((60, 50)).convert("RGB").save(path)
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence on stderr of a command that ends with status 2."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resprune: ")
    assert err[:-1].isprintable()
    assert err.endswith("\n")
    return err


def test_ask_prints_the_answer(bundle: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", bundle, photo, QUESTION, "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed == Pipeline.load(bundle).ask(photo, QUESTION, max_new_tokens=8).text + "\n"


def test_ask_json_prints_one_object(bundle: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ask", bundle, photo, photo, QUESTION, "--json", "--max-new-tokens", "8", "--tokens", "4"]
    assert main([*words, "--about", "square, colour"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        *("text", "finish_reason", "token_ids", "prompt_tokens", "prompt_ids", "keywords", "keyword_ids"),
        *("images", "timings", "tokens_per_second"),
    }
    answer = Pipeline.load(bundle).ask([photo, photo], QUESTION, tokens=4, max_new_tokens=8)
    assert report["text"] == answer.text
    assert report["token_ids"] == answer.token_ids
    assert report["prompt_ids"] == answer.prompt.ids
    assert report["prompt_ids"].count(4) == 2, "one image token a picture"
    assert report["keywords"] == ["colour", "square"]
    assert set(report["keyword_ids"]) < set(report["prompt_ids"])
    assert report["prompt_tokens"] == answer.prompt_tokens
    assert (report["finish_reason"], report["tokens_per_second"] > 0) == (answer.finish_reason, True)
    assert [len(image["pick_order"]) for image in report["images"]] == [4, 4]
    assert report["images"][0]["kept_indices"] == sorted(report["images"][0]["pick_order"])
    assert set(report["images"][0]) == {"kept_indices", "pick_order"}, "no counts that are all 1"
    timings = report["timings"]
    stages = ("pixels_ms", "prompt_ms", "vision_ms", "prefill_ms")
    assert list(timings) == ["load_ms", *stages, "first_token_ms", "decode_ms"]
    assert timings["first_token_ms"] == pytest.approx(sum(timings[stage] for stage in stages))


def test_ask_draws_every_picture(bundle: str, photo: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.png"
    assert main(["ask", bundle, photo, photo, QUESTION, "--show", str(kept), "--max-new-tokens", "1"]) == 0
    with Image.open(kept) as first, Image.open(tmp_path / "kept-2.png") as second:
        assert first.size == second.size
        assert first.width >= 60


def test_sampling_options_reach_the_model(
    bundle: str, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*options: str) -> str:
        assert main(["ask", bundle, photo, QUESTION, "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    hot = ("--temperature", "2")
    assert answer(*hot, "--seed", "1") == answer(*hot, "--seed", "1") != answer(*hot, "--seed", "2")
    assert answer(*hot, "--top-p", "0.000001", "--seed", "1") == answer() == answer("--temperature", "0")


def test_inspect_says_what_is_in_it(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", bundle]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 24
    assert max(map(len, screen)) <= 80
    assert {"family", "source", "made", "selection", "graphs", "parity"} <= {
        line.split()[0] for line in screen if line.startswith("  ") and line.strip()
    }
    assert main(["inspect", bundle, "--all"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "llava bundle, format 1",
        "source      clip-llama",
        "keeps 7 of 16 tokens an image, alpha 1, scale minmax, body loop, form quadratic",
        "positions   contiguous",
        "attention   plain",
        "vision_select  fp32",
        "pixel_values float32[batch_size, 3, 32, 32]",
        "picks  21/21",
        "onnxruntime 1.",
    ):
        assert words in shown
    assert main(["inspect", bundle, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["selection"]["k"] == 7
    assert manifest == json.loads((Path(bundle) / "resprune.json").read_text())


def test_wrong_input_is_one_sentence(
    bundle: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(photo).read_bytes()[:-60])
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    for words, sentence in [
        (("ask", bundle, photo, " "), "question is empty"),
        (("ask", bundle, photo, "what is <image>?"), "contains <image>"),
        (("ask", bundle, photo, QUESTION, "--tokens", "8"), "1 to 7, not 8"),
        (("ask", bundle, photo, QUESTION, "--tokens", "0"), "'0' is no number of tokens to keep"),
        (("ask", bundle, photo, QUESTION, "--tokens", str(10**30)), "1 to 7, not 1000"),
        (
            ("ask", bundle, photo, QUESTION, "--tokens", "9" * 5000),
            "give a number from 1, a share like 11%, or all",
        ),
        (("ask", bundle, photo, QUESTION, "--top-p", "2"), "top_p"),
        (
            ("ask", bundle, photo, QUESTION, "--suppress-tokens", "5,a"),
            "'5,a' is no list of token ids such as 5,17",
        ),
        (("ask", bundle, photo, QUESTION, "--threads", "-1"), "threads"),
        (("ask", bundle, photo, QUESTION, "--threads", "100000"), "not 100000"),
        (("ask", bundle, photo, QUESTION, "--temperature", "1e999"), "temperature should be a finite number"),
        (("ask", bundle, photo, QUESTION, "--max-pixels", "0"), "max_pixels should be 1 or more"),
        (("ask", bundle, "a\x1b[2J\nb.png", QUESTION), "there is no file a[2J b.png"),
        (("ask", bundle, photo, "square " * 600), "past the context"),
        (("ask", bundle, str(text), QUESTION), "text.png"),
        (("ask", bundle, str(cut), QUESTION), "cut.png"),
        (("ask", bundle, str(film), QUESTION), "film.mp4 is a video, and this model answers about images"),
        (("ask", bundle, str(tmp_path / "none.png"), QUESTION), "none.png"),
        (("ask", str(tmp_path), photo, QUESTION), "resprune.json"),
        (("inspect", str(tmp_path / "nothing")), "not a directory"),
    ]:
        assert sentence in fails(capsys, *words), words


def test_an_altered_file_is_refused_unless_hashes_are_skipped(
    bundle: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "User"))
    assert "chat_template.jinja was altered" in fails(capsys, "ask", str(copy), photo, QUESTION)
    assert "chat_template.jinja was altered" in fails(capsys, "inspect", str(copy))
    assert main(["ask", str(copy), photo, QUESTION, "--skip-hashes", "--max-new-tokens", "2"]) == 0
    assert main(["inspect", str(copy), "--skip-hashes"]) == 0


def test_a_graph_that_is_no_graph_is_one_sentence(
    bundle: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    graph = copy / "onnx" / "vision_encoder.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    sentence = fails(capsys, "ask", str(copy), photo, QUESTION, "--skip-hashes")
    assert "vision_encoder.onnx is not an ONNX graph" in sentence


@pytest.mark.parametrize(
    "words",
    [
        ["ask"],
        ["ask", "bundle", "photo.png"],
        ["ask", "bundle", "photo.png", "why?", "--tokens", "abc"],
        ["fly"],
        [],
    ],
)
def test_usage_errors_are_one_line_with_the_way_to_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prog = "resprune ask" if words[:1] == ["ask"] else "resprune"
    assert fails(capsys, *words).endswith(f"; see {prog} --help\n")


def test_help_lists_the_commands_of_every_room(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("ask", "inspect", "export"))


def test_a_terminal_that_shows_only_ascii_gets_the_answer(bundle: str, photo: str) -> None:
    words = ["ask", bundle, photo, QUESTION, "--max-new-tokens", "40", "--json"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *words], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    text = Pipeline.load(bundle).ask(photo, QUESTION, max_new_tokens=40).text
    assert not text.isascii(), "shows nothing"
    assert json.loads(done.stdout)["text"] == text.encode("ascii", "replace").decode()


def test_a_reader_that_goes_away_is_no_traceback(bundle: str, photo: str) -> None:
    asking = subprocess.Popen(
        [*COMMAND, "ask", bundle, photo, QUESTION, "--max-new-tokens", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert asking.stdout is not None
    asking.stdout.close()
    _, err = asking.communicate(timeout=120)
    assert err == b""
    assert asking.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("command", ["inspect", "ask"])
def test_a_full_disk_is_one_sentence(bundle: str, photo: str, command: str) -> None:
    words = [command, bundle, *([photo, QUESTION, "--max-new-tokens", "8"] if command == "ask" else [])]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, check=False)
    sentence = b"resprune: the output cannot be written (No space left on device); make room for it\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def test_an_output_that_is_closed_is_no_traceback(bundle: str) -> None:
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "inspect", bundle]
    done = subprocess.run(words, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_is_no_traceback(bundle: str, photo: str) -> None:
    asking = subprocess.Popen(
        [*COMMAND, "ask", bundle, photo, QUESTION, "--max-new-tokens", "490", "--temperature", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1), "the answer has begun"
    asking.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = asking.communicate(timeout=120)
    assert err == b""
    assert asking.returncode in (130, 0)  # 0: it had ended before the signal came
    assert time.monotonic() - started < 60


def test_the_limit_on_pixels_can_be_set(bundle: str, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = fails(capsys, "ask", bundle, photo, QUESTION, "--max-pixels", "2999")
    assert "more than the limit of 2999" in sentence
    assert main(["ask", bundle, photo, QUESTION, "--max-pixels", "3000", "--max-new-tokens", "1"]) == 0
