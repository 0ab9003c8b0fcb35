"""`resprune prompt`: the prompt that a device without a tokenizer asks, and the text its tokens stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from resprune import Pipeline
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.pieces import vocabulary_pieces
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.sampling import eos_token_ids
from tests.runtime.tokenizers_made import KINDS

QUESTION = "what colour is the square?"
TOKENIZERS = {kind: make() for kind, make in KINDS.items()}


def write(bundle: Path, out: Path, *words: str) -> dict:
    assert main(["prompt", str(bundle), QUESTION, "--out", str(out), *words]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def joined(pieces: list[str | list[int]], ids: list[int]) -> str:
    parts = (
        piece.encode() if isinstance(piece, str) else bytes(piece) for piece in map(pieces.__getitem__, ids)
    )
    return b"".join(parts).decode()


@pytest.mark.parametrize("words", [[], ["--images", "2"], ["--about", "square, colour"]])
def test_prompt_is_the_pipelines(tiny_bundle: Callable[..., Path], tmp_path: Path, words: list[str]) -> None:
    root = tiny_bundle("clip-llama", k=7, split=True)
    bundle = read_bundle(root)
    found = write(root, tmp_path / "prompt.json", *words)
    images = 2 if "--images" in words else 1
    about = ["square", "colour"] if "--about" in words else None
    prompt = Prompter(bundle).prompt(QUESTION, images, about=about)
    assert found["ids"] == prompt.ids
    assert found["text"] == prompt.text
    assert [found["ids"][place] for place in found["image_places"]] == [
        bundle.manifest.image_token_id
    ] * images
    assert found["keywords"] == prompt.nouns
    assert found["keyword_ids"] == [found["ids"][place] for place in found["keyword_places"]]
    assert found["keyword_ids"] == prompt.text_token_ids
    assert (found["positions"], found["position_axes"]) == (bundle.manifest.positions, 1)
    assert found["stop_ids"] == sorted(eos_token_ids(bundle))
    assert found["tokenizer_sha256"] == bundle.manifest.files["tokenizer.json"].sha256


def test_special_tokens_are_text_where_they_are_asked_to_be(
    tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    root, question = tiny_bundle("clip-llama", k=7, split=True), "what is </s> <image>?"
    out = tmp_path / "prompt.json"
    assert main(["prompt", str(root), question, "--out", str(out), "--plain-text"]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["ids"] == Prompter(read_bundle(root)).prompt(question, 1, plain_text=True).ids
    assert not set(found["stop_ids"]) & set(found["ids"])
    assert main(["prompt", str(root), "what is </s>?", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["stop_ids"]) & set(found["ids"])


def test_mrope_has_three_axes(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    found = write(tiny_bundle("qwen25", share=0.4), tmp_path / "prompt.json")
    assert (found["positions"], found["position_axes"]) == ("original", 3)


def test_pieces_write_the_answer(demo_bundle: Path, tmp_path: Path) -> None:
    found = write(demo_bundle, tmp_path / "prompt.json")
    image = Path(__file__).parents[2] / "demo" / "pictures" / "shapes.png"
    answer = Pipeline.load(demo_bundle).ask(image, QUESTION, stream=False)
    assert joined(found["pieces"], answer.token_ids).lstrip() == answer.text != ""


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1)
)
def test_pieces_are_the_tokenizers_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = vocabulary_pieces(tokenizer)
    assert joined(pieces, ids).lstrip() == tokenizer.decode(ids).lstrip()


def test_bytes_of_half_a_character_stay_bytes() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    pieces = vocabulary_pieces(tokenizer)
    ids = tokenizer.encode("🎉").ids
    assert [pieces[token] for token in ids] == [[byte] for byte in "🎉".encode()]


def test_special_tokens_write_nothing() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    assert vocabulary_pieces(tokenizer)[tokenizer.token_to_id("</s>")] == ""


def test_an_unknown_decoder_is_one_line() -> None:
    tokenizer: Tokenizer = KINDS["byte_level"]()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ResPruneError, match="WordPiece"):
        vocabulary_pieces(tokenizer)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--images", "0"], "images should be 1 to"),
        (["--out", "missing/prompt.json"], "cannot be written"),
    ],
)
def test_faults_are_one_line(
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = tiny_bundle("clip-llama", k=7, split=True)
    assert main(["prompt", str(bundle), QUESTION, "--out", "prompt.json", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
