"""What callers of the Python API pass: wrong types and values are one line that names the argument."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline, ResPruneError
from resprune.runtime.arguments import number, whole, words
from resprune.runtime.bundle.files import describe_file, read_bundle, write_manifest
from resprune.runtime.families.table import FAMILIES
from tests.runtime.bundles import one_sentence
from tests.runtime.test_pipeline import with_manifest

IMAGE = Image.new("RGB", (40, 40), (200, 30, 30))
QUESTION = "what colour is the square?"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=7, split=True)


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipeline:
        yield pipeline


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 1.5}, "tokens should be a whole number, not float 1.5"),
        ({"tokens": True}, "tokens should be a whole number, not bool True"),
        ({"tokens": []}, "tokens should be a whole number, not list"),
        ({"tokens": 10**400}, "tokens"),
        ({"max_new_tokens": "9"}, "max_new_tokens should be a whole number, not str '9'"),
        ({"max_new_tokens": 0}, "max_new_tokens should be 1 or more, not 0"),
        ({"temperature": "hot"}, "temperature should be a finite number, not str 'hot'"),
        ({"temperature": float("nan")}, "temperature should be a finite number, not float nan"),
        ({"temperature": 10**400}, "temperature should be a finite number"),
        ({"top_p": None}, "top_p should be a finite number, not NoneType"),
        ({"seed": 1.0}, "seed should be a whole number"),
        ({"about": 5}, "about should be a list of strings, not int 5"),
        ({"about": [b"square"]}, "each entry of about should be a string, not bytes"),
        ({"about": {"square": 1}}, "about should be a list of strings, not dict"),
    ],
    ids=str,
)
def test_wrong_options_of_a_question_are_named(vlm: Pipeline, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ResPruneError) as error:
        vlm.ask(IMAGE, QUESTION, **options)
    assert says in one_sentence(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": "2"}, "threads (0 for one per physical core) should be a whole number, not str '2'"),
        ({"threads": 100_000}, "not 100000"),
        ({"max_pixels": "9"}, "max_pixels should be a whole number"),
        ({"max_pixels": 0}, "max_pixels should be 1 or more, not 0"),
        ({"providers": 3}, "providers should be a list of strings, not int 3"),
        ({"providers": "gpu"}, "there is no provider gpu"),
        ({"engines": ["tensorrt"]}, "is no flavour of TensorRT"),
    ],
    ids=str,
)
def test_wrong_options_of_a_pipeline_are_named(bundle: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ResPruneError) as error:
        Pipeline.load(bundle, **options)
    assert says in one_sentence(error.value)


@pytest.mark.parametrize(
    "path", [None, 3, b"bundle", "a\0b", "x" * 5000, "\udcff", ""], ids=lambda path: ascii(path)[:9]
)
def test_a_path_that_is_no_bundle_is_named(path: Any) -> None:
    with pytest.raises(ResPruneError) as error:
        Pipeline.load(path)
    assert str(error.value)


def test_strings_and_numpy_integers_are_taken(bundle: Path, vlm: Pipeline) -> None:
    expected = vlm.ask(
        IMAGE, QUESTION, about=["square", "colour"], tokens=4, max_new_tokens=5, seed=3
    ).token_ids
    with Pipeline.load(bundle, providers="cpu", threads=np.int64(1)) as other:  # type: ignore[arg-type]
        said = other.ask(
            IMAGE,
            QUESTION,
            about="square, colour",
            tokens=np.int32(4),
            max_new_tokens=np.int64(5),
            seed=np.uint8(3),
        )
        assert said.token_ids == expected


def test_a_batch_takes_lists(vlm: Pipeline) -> None:
    for images, questions in (("a.png", [QUESTION]), ([IMAGE], QUESTION), ([IMAGE], 3)):
        with pytest.raises(ResPruneError, match="a batch takes a list"):
            vlm.ask_batch(images, questions)  # type: ignore[arg-type]


def test_numbers_are_what_they_say() -> None:
    assert whole(np.int8(3), "k", 0) == 3
    assert number(np.float32(0.5), "p") == 0.5
    assert words(("a", "b"), "w") == words("a, b,", "w") == ["a", "b"]
    for wrong in (True, "1", None, 1.0, [1]):
        with pytest.raises(ResPruneError, match="k should be a whole number"):
            whole(wrong, "k", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_not_the_graphs_is_refused(bundle: Path, tmp_path: Path, family: str) -> None:
    copy = with_manifest(bundle, tmp_path, family=family)
    if family == "llava":
        with Pipeline.load(copy, check_hashes=False) as pipeline:
            assert pipeline.ask(IMAGE, QUESTION, max_new_tokens=1).token_ids
        return
    with pytest.raises(ResPruneError) as error, Pipeline.load(copy, check_hashes=False) as pipeline:
        pipeline.ask(IMAGE, QUESTION, max_new_tokens=1).finish()
    one_sentence(error.value)


def test_a_token_past_the_table_is_named(bundle: Path, tmp_path: Path) -> None:
    import tokenizers

    copy = shutil.copytree(bundle, tmp_path / "copy")
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|one|>", "<|two|>"])
    (copy / "tokenizer.json").write_text(tokenizer.to_str())
    past = tokenizer.token_to_id("<|two|>")
    spec = describe_file(copy, "tokenizer.json")
    manifest = read_bundle(bundle).manifest
    write_manifest(copy, replace(manifest, files=manifest.files | {"tokenizer.json": spec}))
    with Pipeline.load(copy, check_hashes=False) as pipeline:
        with pytest.raises(
            ResPruneError, match=f"has the token {past}, and the model's table ends before it"
        ) as error:
            pipeline.ask(IMAGE, "what is <|two|> here?", max_new_tokens=1).finish()
        one_sentence(error.value)
        assert pipeline.ask(IMAGE, "what is <|two|> here?", max_new_tokens=1, plain_text=True).token_ids
