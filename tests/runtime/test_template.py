"""Prompts as text: the same as transformers renders them, for templates of every make."""

import json
from dataclasses import replace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.prompt.messages import assistant_message, user_message
from resprune.runtime.prompt.template import DEFAULT_TEMPLATE, chat_template, render
from tests.runtime.bundles import bundle_of_files
from tests.runtime.templates import LLAVA_15

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
CHAT = [
    user_message("What is <b>it</b> & why?", 2),
    assistant_message('It\'s a "café" 🎉'),
    user_message("And\nnow?", 0),
]
BLOCKS = """{{ bos_token }}
{%- for message in messages %}
    {% if loop.index > 7 %}
        {% break %}
    {% endif %}
    <|{{ message['role'] }}|>
    {% for part in message['content'] %}
        {% if part.type == 'image' %}<image>{% else %}{{ part.text | trim | tojson }}{% endif %}
    {% endfor %}
{% endfor %}
{% if messages | length > 9 %}{{ raise_exception('too long') }}{% endif %}
{% set ns = namespace(count=1) %}{{ ns.count }}{{ strftime_now('%Y') }}{{ dict(a=1)['a'] }}
"""


# What a template asks of tools and documents: transformers gives None, which is not the same as nothing.
ABSENT = (
    "{%- if tools is not none %}[TOOLS]{% endif %}{% if documents is none %}[none]{% endif %}"
    "{{ tools is defined }}{{ (documents or [])|length }}"
)


@pytest.mark.parametrize("template", [LLAVA_15, BLOCKS, ABSENT + LLAVA_15])
def test_renders_as_transformers_does(template: str) -> None:
    expected, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert render(CHAT, template, VARIABLES) == expected[0]


def test_default_is_the_template_of_llava_15() -> None:
    assert render(CHAT, DEFAULT_TEMPLATE, VARIABLES) == render(CHAT, LLAVA_15, VARIABLES)
    assert render([user_message("Why?", 1)], DEFAULT_TEMPLATE, VARIABLES) == "USER: <image>\nWhy? ASSISTANT:"


PLAIN = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] + '\n' }}{% endfor %}"


def test_a_template_for_plain_text_is_refused_where_its_family_has_no_such_prompt() -> None:
    with pytest.raises(ResPruneError, match="chat template cannot make this prompt"):
        render(CHAT, PLAIN, VARIABLES, plain=False)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen2_vl"])
def test_only_llava_15_has_a_prompt_of_its_own(family, tmp_path) -> None:
    bundle = bundle_of_files(tmp_path, {"tokenizer_config.json": "{}"})
    assert chat_template(bundle) == DEFAULT_TEMPLATE
    other = Bundle(bundle.root, replace(bundle.manifest, family=family))
    with pytest.raises(
        ResPruneError, match="has no chat template; export it again with --chat-template FILE"
    ):
        chat_template(other)


def test_a_template_for_plain_text_gets_strings() -> None:
    assert render(CHAT, PLAIN, VARIABLES) == (
        '[user] <image>\n<image>\nWhat is <b>it</b> & why?\n[assistant] It\'s a "café" 🎉\n[user] And\nnow?\n'
    )


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% if %}", "not valid Jinja"),
        ("no image here", "no <image> for an image"),
        ("{{ raise_exception('only in French') }}", "only in French"),
        ("{{ ''.__class__.__mro__ }}<image>", "chat template cannot make this prompt"),
        ("{{ messages.append(1) }}<image><image>", "chat template cannot make this prompt"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, sentence: str) -> None:
    with pytest.raises(ResPruneError, match=sentence):
        render(CHAT, template, VARIABLES)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "A", "chat_template.json": '{"chat_template": "B"}'}, "B"),
        ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "T"}'}, "A"),
        (
            {
                "processor_config.json": '{"chat_template": "P"}',
                "chat_template.json": '{"chat_template": "B"}',
            },
            "P",
        ),
        ({"chat_template.json": '{"chat_template": "B"}', "tokenizer_config.json": "{}"}, "B"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "T"})}, "T"),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "D"}]})},
            "D",
        ),
        ({"processor_config.json": '{"chat_template": {"default": "D", "rag": "R"}}'}, "D"),
        ({"chat_template.json": '{"chat_template": {"default": "D"}}', "chat_template.jinja": "A"}, "D"),
        ({"chat_template.json": '{"chat_template": [7, {}, {"name": ["default"]}]}'}, DEFAULT_TEMPLATE),
        ({"tokenizer_config.json": "{}"}, DEFAULT_TEMPLATE),
        ({}, DEFAULT_TEMPLATE),
    ],
)
def test_finds_the_template(tmp_path, files: dict[str, str], expected: str) -> None:
    bundle: Bundle = bundle_of_files(tmp_path, files)
    assert chat_template(bundle) == expected


def test_a_template_that_is_not_text_is_one_sentence(tmp_path) -> None:
    bundle = bundle_of_files(tmp_path, {"chat_template.jinja": ""})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ResPruneError, match=r"chat_template\.jinja is not text in UTF-8"):
        chat_template(bundle)
