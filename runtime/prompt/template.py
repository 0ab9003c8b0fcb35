"""Chat templates: which one a checkpoint uses, and rendering it exactly as transformers does."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError, one_line
from resprune.runtime.families.table import family_of
from resprune.runtime.prompt.messages import Message

if TYPE_CHECKING:
    import jinja2

# For checkpoints that carry no template: those are older than templates, and were trained with this one.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ image_token + '\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE = 1 << 20
"""Bytes; those of real checkpoints have some thousands."""


def chat_template(bundle: Bundle) -> str:
    """The bundle's chat template; `DEFAULT_TEMPLATE` where it has none and its family was trained with that.

    `ResPruneError` for a bundle of another family without one.
    """
    files = bundle.manifest.files
    found = find_template(
        lambda name: bundle.json(name) if name in files else {},
        bundle.file_path(TEMPLATE_FILE) if TEMPLATE_FILE in files else None,
    )
    if found is None and not family_of(bundle).plain_prompt:
        raise ResPruneError(
            f"the bundle {bundle.root} has no chat template; export it again with --chat-template FILE"
        )
    return DEFAULT_TEMPLATE if found is None else found


def find_template(json_file: Callable[[str], Mapping[str, Any]], file: Path | None) -> str | None:
    """The template that transformers' processor takes, of all that a checkpoint may have; None if it has none.

    `json_file(name)` is the content of a JSON file, {} if there is none; `file` is a chat_template.jinja. The order is
    that of `ProcessorMixin.get_processor_dict` in transformers 5; the tokenizer's, which stands behind it, was a
    processor's as well in transformers 4. `ResPruneError` for a file that is not text.
    """
    for name in ("processor_config.json", "chat_template.json"):
        if (found := _default(json_file(name))) is not None:
            return found
    if file is None:
        return _default(json_file("tokenizer_config.json"))
    try:
        if file.stat().st_size > MAX_TEMPLATE:
            raise ResPruneError(f"{file} is larger than {MAX_TEMPLATE} bytes; it is no chat template")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ResPruneError(f"{file} is not text in UTF-8 ({error}); download it again") from None


def _default(config: Mapping[str, Any]) -> str | None:
    """A config's template, or the one named default if it has several: as an object, or as a list with their names."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def render(
    messages: Sequence[Message],
    template: str,
    variables: Mapping[str, str],
    *,
    placeholder: str | None = None,
    plain: bool = True,
) -> str:
    """The prompt's text, ending where the answer begins; `variables`: special tokens by their names.

    With `plain` a template made for plain text (`message['content'] + …`) is given the parts joined into a string,
    each image as `variables["image_token"]` and a line break. `placeholder` is what the template writes for an
    image, None for that token. `ResPruneError` if no form renders with as many of them as there are images.
    """
    image_token = placeholder or variables["image_token"]
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    typed = sum(
        part.get("text", "").count(image_token) for message in messages for part in message["content"]
    )
    from resprune.runtime.prompt.sandbox import budget

    compiled = _compile(template)
    fault = f"it gave no {image_token} for an image"
    for as_text in (False, True)[: 1 + plain]:
        form = [as_string(message, image_token) for message in messages] if as_text else messages
        try:
            # What transformers gives where there are none of them: a template may ask whether they `is none`.
            with budget():
                text = compiled.render(
                    messages=form, tools=None, documents=None, add_generation_prompt=True, **variables
                )
        except Exception as error:  # a template is a program of someone else's: it can raise anything
            fault = one_line(error)
            continue
        if text.count(image_token) == images + typed:
            return text
    raise ResPruneError(
        f"the checkpoint's chat template cannot make this prompt ({fault}); correct its template"
    )


def as_string(message: Message, image_token: str) -> Message:
    """A message for a template made for plain text: its parts as one string, each image as a token and a break."""
    parts = (f"{image_token}\n" if part["type"] == "image" else part["text"] for part in message["content"])
    return {"role": message["role"], "content": "".join(parts)}


@lru_cache(maxsize=8)
def _compile(template: str) -> "jinja2.Template":
    """The template in the sandbox, with the settings, tags and functions of transformers."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser

    from resprune.runtime.prompt.sandbox import Sandbox

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what the assistant wrote; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - the name and type jinja2 declares

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Sandbox(
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
        functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        filters={"tojson": _tojson},
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        fault = f"line {error.lineno}: {one_line(error.message)}"
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        # A `break` outside of a loop, and what is nested more deeply than Jinja or Python compile.
        fault = one_line(error)
    raise ResPruneError(
        f"the checkpoint's chat template is not valid Jinja ({fault}); correct it and export again"
    )


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which no checkpoint was trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
