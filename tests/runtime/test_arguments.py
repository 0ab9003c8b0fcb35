"""What callers of the Python API pass: wrong types and values are one line that names the argument."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resprune import Pipeline, ResPruneError
from resprune.runtime.answer import Answer
from resprune.runtime.arguments import number, whole, words
from resprune.runtime.backends.servers import _image_rows, server
from resprune.runtime.backends.session import SessionOptions
from resprune.runtime.bundle.files import describe_file, read_bundle, write_manifest
from resprune.runtime.choose import Chooser
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.pipeline import View
from resprune.runtime.prompt.fixed import fixed_prompt
from resprune.runtime.prompt.messages import Turn
from resprune.runtime.sampling import Sampling
from tests.runtime.bundles import one_sentence
from tests.runtime.pipelines import with_manifest

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
        ({"engines": ["tensorrt"]}, "engines should be one of tensorrt, tensorrt-rtx, not list"),
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


MESSAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}


def said(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a path for images": (lambda vlm: vlm.ask_batch("a.png", [QUESTION]), "images should be a list"),
    "no list of images": (lambda vlm: vlm.ask_batch(5, [QUESTION]), "images should be a list"),
    "one question": (lambda vlm: vlm.ask_batch([IMAGE], QUESTION), "questions should be a list of questions"),
    "no list of questions": (
        lambda vlm: vlm.ask_batch([IMAGE], 3),
        "questions should be a list of questions",
    ),
    "a number as question": (
        lambda vlm: vlm.ask_batch([IMAGE], [3]),
        "the question should be a string, not int 3",
    ),
    "a word about all": (
        lambda vlm: vlm.ask_batch([IMAGE], [QUESTION], about="square"),
        "about should be a list",
    ),
    "plain text as a word": (
        lambda vlm: vlm.ask(IMAGE, QUESTION, plain_text="no"),
        "plain_text should be True or False, not str 'no'",
    ),
    "a stream of 1": (
        lambda vlm: vlm.ask(IMAGE, QUESTION, stream=1),
        "stream should be True or False, not int 1",
    ),
    "a number as size": (lambda vlm: vlm.boxes(5), "image_size should be a pair, not int 5"),
    "a word as size": (lambda vlm: vlm.boxes("x"), "image_size should be a pair, not str 'x'"),
    "a size of one side": (lambda vlm: vlm.boxes((3,)), "image_size should be width and height"),
    "a size of words": (lambda vlm: vlm.boxes(("a", 1)), "each side of image_size should be a whole number"),
    "an empty size": (lambda vlm: vlm.boxes((0, 1)), "each side of image_size should be 1 or more"),
    "a huge size": (lambda vlm: vlm.boxes((10**400, 1)), "image_size should be width and height of at most"),
    "a history that is none": (
        lambda vlm: vlm.look(IMAGE).ask(QUESTION, history="x"),
        "history should be a list of turns, not str 'x'",
    ),
    "a turn that is none": (
        lambda vlm: vlm.look(IMAGE).ask(QUESTION, history=[("q", "a")]),
        "each entry of history should be a Turn, not tuple",
    ),
    "a turn of numbers": (
        lambda vlm: vlm.look(IMAGE).ask(QUESTION, history=[Turn("q", 5)]),
        "the question should be a string, not int 5",
    ),
    "no messages": (lambda vlm: vlm.look(IMAGE).answer([]), "the last message should be the user's"),
    "an answer last": (
        lambda vlm: vlm.look(IMAGE).answer([MESSAGE, said("yes", "assistant")]),
        "the last message should be the user's",
    ),
    "a message of words": (
        lambda vlm: vlm.look(IMAGE).answer(["hello"]),
        "messages[0] should be a dict, not str",
    ),
    "a role there is not": (
        lambda vlm: vlm.look(IMAGE).answer([said([], "tool"), MESSAGE]),
        "the role of messages[0] should be one of system, user, assistant, not str 'tool'",
    ),
    "no content": (
        lambda vlm: vlm.look(IMAGE).answer([{"role": "user"}]),
        "the content of messages[0] should be a text or a list of parts, not NoneType",
    ),
    "a part of words": (
        lambda vlm: vlm.look(IMAGE).answer([MESSAGE, said(["x"])]),
        "each part of messages[1] should be a dict, not str 'x'",
    ),
    "a part of no type": (
        lambda vlm: vlm.look(IMAGE).answer([said([{"text": "x"}])]),
        "the type of each part of messages[0] should be one of text, image, not NoneType",
    ),
    "a text of numbers": (
        lambda vlm: vlm.look(IMAGE).answer([said([{"type": "text", "text": 5}])]),
        "each text of messages[0] should be a string, not int 5",
    ),
    "an image too many": (
        lambda vlm: vlm.look(IMAGE).answer([MESSAGE, MESSAGE]),
        "the messages show 2 images, and there are 1",
    ),
    "views of nothing": (lambda vlm: View.joined([]), "views should be of one pipeline, not of 0"),
    "views of words": (lambda vlm: View.joined(["x"]), "each of views should be a View, not str 'x'"),
    "a budget of digits": (
        lambda vlm: vlm.ask(IMAGE, QUESTION, tokens="9" * 5000),
        "is no number of tokens to keep; give a number from 1",
    ),
    "a setting there is not": (lambda vlm: vlm.ask(IMAGE, QUESTION, hot=1), "there is no setting hot"),
    "a prompt of words": (
        lambda vlm: fixed_prompt(vlm._bundle, QUESTION, images="x"),
        "images should be a whole number",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_in_a_call_is_named(vlm: Pipeline, name: str) -> None:
    call, says = CALLS[name]
    with pytest.raises(ResPruneError) as error:
        call(vlm)
    assert says in one_sentence(error.value)
    assert len(str(error.value)) < 400


class Evil:
    """An object that fails wherever it is looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")


STRANGE = [
    None, 5, -1, 0, 1.5, float("nan"), True, "x", "", b"x", [], (), {}, {"a": 1}, [None], [5], ["x"], [[]], [b"x"],
    object(), Evil(), np.zeros(3), np.array(["a"]), np.array([[1, 2], [3, 4]]), np.float64("nan"), range(3), 10**5000,
    int, ValueError("x"), "\udcff", "\0", "\ufdd0", {"x"}, complex(1, 2), "a" * 100,
]  # fmt: skip
OPTIONS = (
    "about", "tokens", "plain_text", "stream", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
    "forced_eos_token_id", "seed",
)  # fmt: skip
TEXT = {"type": "text", "text": QUESTION}


def test_nothing_strange_raises_anything_else(bundle: Path, vlm: Pipeline) -> None:
    """Whatever stands in whichever place is taken, or is one line."""
    view = vlm.look(IMAGE)

    def answered(*content: Any, role: Any = "user") -> object:
        return view.answer([{"role": role, "content": list(content)}], max_new_tokens=1)

    places: list[Callable[[Any], object]] = [
        lambda value: vlm.ask(value, QUESTION, max_new_tokens=1),
        lambda value: vlm.ask([value], QUESTION, max_new_tokens=1),
        lambda value: vlm.ask(IMAGE, value, max_new_tokens=1),
        lambda value: vlm.ask_batch(value, [QUESTION], max_new_tokens=1),
        lambda value: vlm.ask_batch([value], [QUESTION], max_new_tokens=1),
        lambda value: vlm.ask_batch([[value]], [QUESTION], max_new_tokens=1),
        lambda value: vlm.ask_batch([IMAGE], value, max_new_tokens=1),
        lambda value: vlm.ask_batch([IMAGE], [value], max_new_tokens=1),
        lambda value: vlm.ask_batch([IMAGE], [QUESTION], about=[value], max_new_tokens=1),
        lambda value: vlm.look(value),
        lambda value: vlm.boxes(value),
        lambda value: vlm.boxes((value, 1)),
        lambda value: view.budgets(value),
        lambda value: View.joined(value),
        lambda value: View.joined([value]),
        lambda value: view.ask(value, max_new_tokens=1),
        lambda value: view.ask(QUESTION, history=value, max_new_tokens=1),
        lambda value: view.ask(QUESTION, history=[value], max_new_tokens=1),
        lambda value: view.ask(QUESTION, history=[Turn(value, "a")], max_new_tokens=1),
        lambda value: view.ask(QUESTION, history=[Turn("q", value)], max_new_tokens=1),
        lambda value: view.answer(value, max_new_tokens=1),
        lambda value: view.answer([value], max_new_tokens=1),
        lambda value: view.answer([said(value)], max_new_tokens=1),
        lambda value: answered({"type": "image"}, TEXT, role=value),
        lambda value: answered({"type": "image"}, TEXT, value),
        lambda value: answered({"type": "image"}, {"type": "text", "text": value}),
        lambda value: answered({"type": value}, TEXT),
        lambda value: fixed_prompt(vlm._bundle, value),
        lambda value: fixed_prompt(vlm._bundle, QUESTION, images=value),
        lambda value: fixed_prompt(vlm._bundle, QUESTION, about=value),
        lambda value: Pipeline.load(value),
        lambda value: Pipeline(value, SessionOptions()),
        lambda value: Pipeline(vlm._bundle, value),
        *(
            lambda value, name=name: view.ask(QUESTION, **{"max_new_tokens": 1, name: value})
            for name in OPTIONS
        ),
        *(
            lambda value, name=name: server(**{"url": "http://127.0.0.1:1", name: value})
            for name in ("url", "api", "model", "timeout", "deadline")
        ),
        *(
            lambda value, name=name: Pipeline.load(bundle, **{"threads": 10**6, name: value})
            for name in ("check_hashes", "providers", "threads", "max_pixels", "engines")
        ),
    ]
    for place in places:
        for value in STRANGE:
            refused = ""
            try:
                found = place(value)
            except ResPruneError as error:
                refused = str(error)
            except Exception as error:
                raise AssertionError(f"{type(value)} in place {places.index(place)}") from error
            else:
                if isinstance(found, Answer | Pipeline):
                    found.close()
            assert len(refused) < 700
            assert "\n" not in refused


def test_numpy_says_nothing_of_what_is_no_number(bundle: Path, tmp_path: Path, vlm: Pipeline) -> None:
    """Settings of the checkpoint that leave float32, and logits of NaN: one line at most, and no warning beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (np.nan, np.inf, -np.inf):
            choose = Chooser(Sampling(temperature=1.0, repetition_penalty=2.0), [[1, 2]], frozenset({0}))
            with pytest.raises(ResPruneError, match=r"NaN|no token"):
                choose(np.full((1, 8), value, np.float32))
        copy = shutil.copytree(bundle, tmp_path / "copy")
        config = json.loads((copy / "preprocessor_config.json").read_text())
        config |= {"rescale_factor": 1e29, "image_std": [1e-20] * 3}
        (copy / "preprocessor_config.json").write_text(json.dumps(config))
        spec = describe_file(copy, "preprocessor_config.json")
        manifest = read_bundle(bundle).manifest
        write_manifest(copy, replace(manifest, files=manifest.files | {"preprocessor_config.json": spec}))
        with Pipeline.load(copy) as pipeline, suppress(ResPruneError):
            pipeline.ask(IMAGE, QUESTION, max_new_tokens=2).finish()
        assert _image_rows(np.full((2, 3), 1e9, np.float32)) != _image_rows(np.zeros((2, 3), np.float32))


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
    if FAMILIES[family].module == FAMILIES["llava"].module:
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
