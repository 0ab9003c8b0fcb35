"""Token ids as the Hugging Face processor makes them, and which of them are the nouns of the question."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.picture import Expansion
from resprune.runtime.prompt.prompter import Prompter, Turn
from resprune.runtime.prompt.template import DEFAULT_TEMPLATE
from tests.runtime.bundles import bundle_of_files
from tests.runtime.test_template import LLAVA_15
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
    tiles = Expansion(token, f"red {token} blue {token}")
    prompt = writer.prompt(question, 2, expansions=[tiles, None])
    assert prompt.ids.count(writer.image_token_id) == 3
    assert prompt.text == plain.text.replace(token, tiles.text, 1)
    assert prompt.nouns == plain.nouns
    assert prompt.text_token_ids == plain.text_token_ids
    with pytest.raises(ResPruneError, match="contains <image>"):
        writer.prompt(f"what is {token}?", 1, expansions=[tiles])
