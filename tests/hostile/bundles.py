"""Bundles: one field, one file or one byte of a whole bundle changed, with hashes that fit or without."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.case import QUESTION, SHORT, Case, World, clean_answer
from tests.hostile.values import damaged, value, with_one_changed, written

TELLS = ("model", "revision", "versions", "command", "parity", "created")
"""Fields of the manifest that change no answer."""
SIDE_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
TEMPLATES = (
    *(
        "{% break %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
    ),
    *(
        "{{ '%999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    ),
    *(
        "{% include '/etc/passwd' %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ 9**9**9**9 }}",
        "{{",
        "",
        "\0",
    ),
    *(
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "<image>" * 900,
    ),
    *(
        "{{ lipsum(n=10**9) }}",
        "{{ raise_exception('\x1b[31mred\nlines') }}",
        "{{ bos_token }}<image>{{ eos_token }}",
    ),
)


def make(random: Random, folder: Path, world: World) -> Case:
    """A case about a bundle."""
    name = random.choice(list(world.bundles))
    bundle = folder / "bundle"
    shutil.copytree(world.bundles[name], bundle, copy_function=os.link)  # what is changed is written anew
    change = random.choice(
        [_manifest, _manifest, _manifest, _side_file, _side_file, _bytes, _template, _external, _links]
    )
    what, same, refused = change(random, bundle, world)
    words = ["ask", str(bundle), str(world.photo), QUESTION, *SHORT]
    if random.random() < 0.1:
        words = ["inspect", str(bundle), *(["--json"] if random.random() < 0.5 else [])]
        return Case("bundle", f"{name}: {what}", words, reason="inspect says what it finds")
    if refused:
        return Case("bundle", f"{name}: {what}", words, refused=True)
    if same:
        return Case(
            "bundle", f"{name}: {what}", words, lambda: clean_answer(world.bundles[name], world.photo)
        )
    return Case("bundle", f"{name}: {what}", words, reason="what was changed is part of the model's answer")


Change = tuple[str, bool, bool]
"""What was changed, whether an answer stays the same, and whether there must be none."""


def write(path: Path, content: bytes) -> None:
    """Replace a file, which may be one file with the clean bundle's."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def fit_hashes(bundle: Path, *names: str) -> None:
    """Let the manifest list the files as they are now."""
    manifest = json.loads((bundle / "resprune.json").read_bytes())
    for name in names:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write(bundle / "resprune.json", json.dumps(manifest).encode())


def _manifest(random: Random, bundle: Path, world: World) -> Change:
    path = bundle / "resprune.json"
    if random.random() < 0.2:
        write(path, damaged(random, path.read_bytes()))
        return "bytes of the manifest", False, False
    manifest = json.loads(path.read_bytes())
    field = random.choice(
        ["selection", "graphs", "files", *manifest]
    )  # those with most below them more often
    if random.random() < 0.1:
        manifest[field], place = value(random), ""
    else:
        manifest[field], place = with_one_changed(random, manifest[field])
    write(path, written(manifest))
    return f"manifest {field}{place}", field in TELLS, False


def _side_file(random: Random, bundle: Path, world: World) -> Change:
    name = random.choice([name for name in SIDE_FILES if (bundle / name).exists()])
    content: Any = json.loads((bundle / name).read_bytes())
    if random.random() < 0.2:
        write(bundle / name, damaged(random, (bundle / name).read_bytes()))
        place = "bytes"
    else:
        content, place = with_one_changed(random, content)
        write(bundle / name, written(content))
    fit_hashes(bundle, name)
    return f"{name} {place}", False, False


def _bytes(random: Random, bundle: Path, world: World) -> Change:
    """Any file but the weights and the tokenizer's own settings, whose bytes are all as good as others."""
    name = random.choice(sorted(path.name for path in (bundle / "onnx").glob("*.onnx")))
    write(bundle / "onnx" / name, damaged(random, (bundle / "onnx" / name).read_bytes()))
    if random.random() < 0.3:
        return f"altered {name}", False, True  # its hash tells
    fit_hashes(bundle, f"onnx/{name}")
    return f"bytes of {name}", False, False


def _template(random: Random, bundle: Path, world: World) -> Change:
    template = random.choice(TEMPLATES)
    names = [name for name in ("chat_template.jinja",) if (bundle / name).exists()]
    for name in names:
        write(bundle / name, template.encode())
    fit_hashes(bundle, *names)
    return f"template {template[:40]!a}", False, False


def _external(random: Random, bundle: Path, world: World) -> Change:
    """Weights in a file that the manifest does not list."""
    import onnx

    path = bundle / "onnx" / "embed_tokens.onnx"
    model = onnx.load(path, load_external_data=False)
    target = random.choice(
        ["/etc/passwd", "../../secret", "secret", "../chat_template.jinja", str(world.photo), ""]
    )
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = target
    write(path, model.SerializeToString())
    fit_hashes(bundle, "onnx/embed_tokens.onnx")
    if target.endswith("chat_template.jinja"):
        return "weights in the template", False, False  # listed, so only the sizes can tell
    return f"weights in {target}", False, True


def _links(random: Random, bundle: Path, world: World) -> Change:
    """Something else than a plain file inside."""
    name = random.choice(["config.json", "tokenizer.json", "onnx/embed_tokens.onnx", "resprune.json"])
    path = bundle / name
    content = path.read_bytes()
    path.unlink()
    kind = random.choice(["missing", "outside", "loop", "pipe", "folder", "inside"])
    if kind == "outside":
        (bundle.parent / "outside").write_bytes(content)
        path.symlink_to(bundle.parent / "outside")
    elif kind == "inside":
        (bundle / "inside").write_bytes(content)
        path.symlink_to(bundle / "inside")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return f"{name} {kind}", kind == "inside", kind != "inside"
