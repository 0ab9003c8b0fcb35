"""Token ids as the Hugging Face processor makes them, and which of them are the nouns of the question."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.messages import Turn
from resprune.runtime.prompt.plain_text import PlainText
from resprune.runtime.prompt.prompter import Prompter
from resprune.runtime.prompt.template import DEFAULT_TEMPLATE
from tests.runtime.bundles import bundle_of_files, one_sentence
from tests.runtime.templates import LLAVA_15
from tests.runtime.tokenizers_made import KINDS

WITH_BOS = "{{ bos_token }}" + LLAVA_15
QUESTIONS = [
    "What is the red square?",
    "  what is\n the table  ",
    "日本語 🎉 naïve café, what is the table",
    "the square </s> table",
]


def save_tokenizer(folder: Path, kind: str, add_bos: bool) -> Path:
    """A tokenizer as transformers writes and reads it; `add_bos` as Llama's, which begins every text with <s>."""
    backend: Tokenizer = KINDS[kind]()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def prompter(folder: Path, template: str | None) -> Prompter:
    texts = {name: (folder / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    if template is not None:
        texts["chat_template.jinja"] = template
    image = Tokenizer.from_str(texts["tokenizer.json"]).token_to_id("<image>")
    return Prompter(bundle_of_files(folder, texts, image_token_id=image))


def made(folder: Path, kind: str = "byte_level", template: str | None = LLAVA_15) -> Prompter:
    return prompter(save_tokenizer(folder, kind, add_bos=False), template)


def processor_ids(folder: Path, template: str, question: str, images: int, history: list[Turn]) -> list[int]:
    """What LlavaProcessor.apply_chat_template gives, each picture's run of image tokens as one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    pictures = [{"type": "image", "image": Image.new("RGB", (16, 16))}] * images
    messages = []
    for turn in [*history, Turn(question, "")]:
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        pictures = []
    ids = processor.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"][0]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert list(ids).count(image) == 4 * images
    out: list[int] = []
    run = 0
    for token in ids:
        run = run + 1 if token == image else 0
        if run % 4 in (0, 1) and not (run and run % 4 == 0):
            out.append(int(token))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", [LLAVA_15, WITH_BOS])
def test_ids_are_those_of_the_processor(tmp_path: Path, kind: str, add_bos: bool, template: str) -> None:
    folder = save_tokenizer(tmp_path, kind, add_bos)
    ours = prompter(folder, template)
    history = [Turn("what is the table?", "the red square")]
    for question in QUESTIONS:
        for images, said in [(1, []), (2, history)]:
            prompt = ours.prompt(question, images, history=said)
            assert prompt.ids == processor_ids(folder, template, question, images, said)
            assert prompt.ids.count(ours.image_token_id) == images
    bos = ours.tokenizer.token_to_id("<s>")
    assert prompt.ids.count(bos) == (add_bos or template == WITH_BOS)


def test_without_a_template_it_is_llava_15s(tmp_path: Path) -> None:
    ours = made(tmp_path, template=None)
    assert ours.template == DEFAULT_TEMPLATE
    assert ours.prompt("What is it?", 1).text == "USER: <image>\nWhat is it? ASSISTANT:"


def text_tokens(ours: Prompter, question: str, **more) -> list[str]:
    prompt = ours.prompt(question, 1, **more)
    assert prompt.text_token_ids == [prompt.ids[position] for position in prompt.text_positions]
    return [ours.tokenizer.id_to_token(token) for token in prompt.text_token_ids]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte_level", ["Ġsquare", "Ġtable"]),
        ("sentencepiece", ["▁square", "▁table"]),
        ("metaspace", ["▁square", "▁table"]),
    ],
)
def test_the_nouns_tokens_and_no_others(tmp_path: Path, kind: str, expected: list[str]) -> None:
    ours = made(tmp_path, kind)
    question = "what is the square, the red table"
    assert text_tokens(ours, question, about=["table", "square"]) == expected
    assert ours.prompt(question, 1, about=["table", "square"]).nouns == ["square", "table"]
    assert text_tokens(ours, question) == expected
    assert text_tokens(ours, question, about=[]) == []


def test_every_piece_of_a_noun_counts_its_bytes_too(tmp_path: Path) -> None:
    assert text_tokens(made(tmp_path, "sentencepiece"), "the ü table", about=["ü"]) == ["<0xC3>", "<0xBC>"]
    letters = text_tokens(made(tmp_path, "byte_level"), "the qua ü", about=["qua"])
    assert "".join(letters) == "qua"


def test_words_of_template_and_history_are_never_text(tmp_path: Path) -> None:
    template = "Look at the square table. {{ '' }}" + LLAVA_15 + " table: square"
    ours = made(tmp_path, template=template)
    history = [Turn("the square", "red table"), Turn("the table", "square")]
    prompt = ours.prompt("what is the table", 1, about=["table"], history=history)
    (position,) = prompt.text_positions
    assert ours.tokenizer.id_to_token(prompt.ids[position]) == "Ġtable"
    assert ours.tokenizer.decode(prompt.ids[position:]) == " table ASSISTANT: table: square"


@pytest.mark.parametrize(
    "change", ["| trim", "| upper | lower", "| tojson", "| replace('is', 'IS')", "| indent(2)"]
)
def test_a_template_may_change_the_question(tmp_path: Path, change: str) -> None:
    template = LLAVA_15.replace("{{ content['text'] + ' '}}", "{{ (content['text'] " + change + ") + ' '}}")
    assert change in template
    ours = made(tmp_path, template=template)
    question = '  what "is" the\n square, the table '
    assert text_tokens(ours, question, about=["square", "table"]) == ["Ġsquare", "Ġtable"]


def test_a_template_that_leaves_the_question_out_has_no_text(tmp_path: Path) -> None:
    ours = made(tmp_path, template="<image>\nthe table ASSISTANT:")
    assert text_tokens(ours, "the table", about=["table"]) == []


@pytest.mark.parametrize("question", ["", "  ", "\n\t"])
def test_an_empty_question_is_refused(tmp_path: Path, question: str) -> None:
    with pytest.raises(ResPruneError, match="question is empty"):
        made(tmp_path).prompt(question, 1)


def test_a_question_of_broken_bytes_is_refused(tmp_path: Path) -> None:
    question = b"what is \xff".decode("utf-8", "surrogateescape")  # as a shell argument arrives
    with pytest.raises(ResPruneError, match="not valid UTF-8"):
        made(tmp_path).prompt(question, 1)


def test_a_question_that_types_the_image_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResPruneError, match="contains <image>"):
        made(tmp_path).prompt("what is <image>", 1)


def test_settings_saved_with_a_tokenizer_do_not_cut_prompts(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "byte_level", add_bos=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=900)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = prompter(folder, None)
    assert 15 < len(ours.prompt("What is the red square?", 1).ids) < 100


def test_special_tokens_of_old_checkpoints(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, "byte_level", add_bos=False)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    texts = {path.name: path.read_text() for path in folder.glob("*.json")} | {
        "chat_template.jinja": WITH_BOS
    }
    ours = Prompter(bundle_of_files(folder, texts, image_token_id=3))
    assert ours.prompt("what", 1).text.startswith("<s>USER")


@pytest.mark.parametrize("text", ["", "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ResPruneError, match=r"tokenizer\.json is not a tokenizer"):
        Prompter(bundle_of_files(tmp_path, {"tokenizer.json": text}))


def test_an_image_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    texts = {"tokenizer.json": KINDS["byte_level"]().to_str()}
    with pytest.raises(ResPruneError, match="no token 99999"):
        Prompter(bundle_of_files(tmp_path, texts, image_token_id=99999))


def test_image_tokens_are_embedded_as_another_token(tmp_path: Path) -> None:
    """A table may end before them; what they stand for takes their place."""
    writer = made(tmp_path)
    prompt = writer.prompt("What is the red square?", 2)
    embedded = prompt.ids_to_embed(writer.image_token_id)
    assert prompt.ids.count(writer.image_token_id) == 2
    assert embedded.tolist() == [0 if id_ == writer.image_token_id else id_ for id_ in prompt.ids]


def test_keywords_that_the_question_lacks_are_read_as_inside_a_text(tmp_path: Path) -> None:
    for kind in KINDS:
        writer = made(tmp_path, kind)
        inside = writer.prompt("is there a red square?", 1, about=["square"])
        outside = writer.prompt("what is it?", 1, about=["square"])
        assert outside.text_positions == []
        assert outside.further_ids == outside.text_token_ids
        assert outside.nouns == ["square"]
        word = [writer.tokenizer.id_to_token(token) for token in outside.further_ids]
        assert word == [writer.tokenizer.id_to_token(token) for token in inside.text_token_ids]


def test_an_expansion_stands_in_the_place_of_its_image(tmp_path: Path) -> None:
    writer = made(tmp_path)
    token = writer.variables["image_token"]
    question = "What is the red square?"
    plain = writer.prompt(question, 2)
    tiles = f"red {token} blue {token}"
    prompt = writer.prompt(question, 2, expansions=[tiles, None])
    assert prompt.ids.count(writer.image_token_id) == 3
    assert prompt.text == plain.text.replace(token, tiles, 1)
    assert prompt.nouns == plain.nouns
    assert prompt.text_token_ids == plain.text_token_ids
    with pytest.raises(ResPruneError, match="contains <image>"):
        writer.prompt(f"what is {token}?", 1, expansions=[tiles])


SPOKEN = "the square </s> is <image> <s>here</s>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", [LLAVA_15, WITH_BOS, "</s>" + LLAVA_15 + "</s>"])
def test_plain_text_makes_text_of_typed_special_tokens(
    tmp_path: Path, kind: str, add_bos: bool, template: str
) -> None:
    """What the text decodes to is all there, and the control tokens are those of the prompt of a harmless question."""
    ours = prompter(save_tokenizer(tmp_path, kind, add_bos), template)
    special = {token: ours.tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>")}
    harmless = ours.prompt("the square is here", 2, history=[Turn("square?", "table")])
    plain = ours.prompt(SPOKEN, 2, history=[Turn("</s>square?", "<image>table")], plain_text=True)
    for token in special.values():
        assert plain.ids.count(token) == harmless.ids.count(token)
    assert plain.ids[0] == harmless.ids[0]
    assert SPOKEN in plain.text
    assert plain.messages[-1]["content"][-1]["text"] == SPOKEN
    assert plain.plain_text
    assert plain.nouns == ["square", "image"]
    assert plain.text_positions


@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_what_the_tokenizer_makes_of_text(tmp_path: Path, kind: str) -> None:
    """Between two special tokens stand the ids of `encode_special_tokens`, with which there are none."""
    ours = made(tmp_path, kind, template="{{ messages[0]['content'][1]['text'] }}<image>")
    ids = ours.prompt("square</s>table", 1, plain_text=True).ids
    ours.tokenizer.encode_special_tokens = True
    apart = ours.tokenizer.encode("square</s>table", add_special_tokens=False).ids
    assert ids == [*apart, ours.image_token_id]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_plain_text_changes_nothing_where_no_special_token_is_typed(
    tmp_path: Path, kind: str, add_bos: bool
) -> None:
    ours = prompter(save_tokenizer(tmp_path, kind, add_bos), WITH_BOS)
    for question in ("What is the red square?", "日本語 🎉 <b>"):
        assert ours.prompt(question, 1, plain_text=True) == ours.prompt(question, 1)


def test_a_copy_with_other_names_makes_the_same_ids(tmp_path: Path) -> None:
    """The way through the copy of the tokenizer, for a prompt that needs none."""
    for kind in KINDS:
        for add_bos in (False, True):
            (tmp_path / f"{kind}{add_bos}").mkdir()
            ours = prompter(save_tokenizer(tmp_path / f"{kind}{add_bos}", kind, add_bos), LLAVA_15)
            plain = PlainText(ours.tokenizer, ["<image>"])
            for question in QUESTIONS:
                text = ours.prompt(question, 1).text
                encoding = ours.tokenizer.encode(text, add_special_tokens=True)
                written = plain.written(text)
                assert plain.shown(written) == text
                assert plain.encode(written, add_special_tokens=True)[0] == encoding.ids


def test_a_typed_special_token_is_a_control_token_as_in_hugging_face(tmp_path: Path) -> None:
    ours = made(tmp_path)
    end = ours.tokenizer.token_to_id("</s>")
    assert ours.prompt("the </s> square", 1).ids.count(end) == 1
    assert "contains <image>" in refused(ours, "the <image> square")


def refused(ours: Prompter, question: Any, **options: Any) -> str:
    with pytest.raises(ResPruneError) as error:
        ours.prompt(question, 1, **options)
    return one_sentence(error.value)


@pytest.mark.parametrize("plain_text", [False, True])
def test_a_question_past_the_context_is_refused_before_it_is_encoded(
    tmp_path: Path, plain_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = made(tmp_path)
    said = refused(ours, "square " * 5000, plain_text=plain_text)
    assert "the question is past the context" in said
    assert "limit 4096" in said
    monkeypatch.setattr(ours, "_render", None)  # not even rendered
    long = "y" * (1 << 21)
    for history in (
        [],
        [Turn(long, "y")],
        [Turn("x", long)],
        [Turn("x", long[::4])] * 4,
        [Turn("x", "y")] * 2048,
    ):
        question = "square" if history else "x" * (1 << 21)
        assert "past the context" in refused(ours, question, history=history, plain_text=plain_text)
    assert "about is past the context" in refused(ours, "square", about=["x" * (1 << 21)])


@pytest.mark.parametrize(
    ("question", "options", "says"),
    [
        (None, {}, "the question should be a string, not NoneType"),
        (b"why?", {}, "the question should be a string, not bytes"),
        ("a\ud800", {}, "not valid UTF-8"),
        ("a\ufdd2b", {}, "characters that Unicode reserves"),
        ("why?", {"about": 3}, "about should be a list of strings, not int 3"),
        ("why?", {"about": ["a", 3]}, "each entry of about should be a string"),
        ("why?", {"history": [Turn("why?", None)]}, "should be a string, not NoneType"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_question_is_refused(tmp_path: Path, question: Any, options: Any, says: str) -> None:
    assert says in refused(made(tmp_path), question, **options)


def test_about_may_be_one_string(tmp_path: Path) -> None:
    ours = made(tmp_path)
    one = ours.prompt("the red square and the table", 1, about="square, table")
    assert one.nouns == ours.prompt("the red square and the table", 1, about=["square", "table"]).nouns
    assert one.nouns == ["square", "table"]
