"""The manifest of a bundle, `resprune.json`: this file is the only definition of it, for writer and reader.

Everything in a manifest is checked before it is used, for it may come from anywhere: each fault is one
`ResPruneError`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from resprune.elements import ELEMENTS
from resprune.method import Selection, SettingError, check, share_of
from resprune.names import DECODER, PLANE_FEATURES, VISION_ENCODER, VISION_SELECT
from resprune.runtime.bundle import fields, precisions
from resprune.runtime.errors import ResPruneError, shown

FORMAT_VERSION = 3
"""The newest that is read. A bundle has the oldest that says all of it, see COUNTS and EARLY."""
MANIFEST_NAME = fields.FILE
LANGUAGE_GGUF = "language_model.gguf"
"""What `resprune export --for gguf` writes."""
ENGINES_FOLDER = "engines"
"""Where `resprune build` writes, and no export does."""
MAX_RANK = 8
MAX_NAME = 255
"""Bytes of a file's name in most file systems."""
MAX_TOKENS = 1 << 20
"""Of one image: N of the largest family is some thousands, and places are made for all of them."""
MAX_ID = (1 << 31) - 1

POSITIONS = ("contiguous", "original")
ATTENTION = ("plain", "proportional")
"""How the language model attends to kept tokens."""
COUNTS = 2
"""The format version that came with proportional attention."""
EARLY = 3
"""The format version that came with a first selection inside the vision tower."""
OPTIMIZE = ("ort",)
SELECTION = ("k", "num_tokens", "alpha", "scale", "body", "max_tokens", "share", "form")
"""Its keys, as they are written; `attention` says the rest."""
FLAVOURS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a string in `shape` names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph: its file relative to the bundle, precision of its weights, inputs and outputs.

    `weights` is the file that has them, which several graphs may share; None if the graph has none.
    """

    file: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: str | None = None

    def files(self) -> tuple[str, ...]:
        """The files that the graph is made of, relative to the bundle: its own, and that of its weights."""
        return (self.file,) if self.weights is None else (self.file, self.weights)

    def axes(self) -> set[str]:
        """The names of the inputs' dynamic axes; those of a sum singly."""
        return {name for tensor in self.inputs for axis in tensor.shape for name in axis_names(axis)}


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and lower-case hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Early:
    """A first selection inside the vision tower: after `layer` blocks `tokens` of `of` go on, of an image or tile.

    Where images differ in size both are of the largest; `share` is the part that was asked for in place of a number.
    """

    layer: int
    tokens: int
    of: int
    share: float | None = None

    def left(self, num_tokens: int) -> int:
        """How many of the `num_tokens` of an image or tile go on."""
        return min(num_tokens, self.tokens if self.share is None else share_of(self.share, num_tokens))


Range = tuple[int, int, int]
"""Least, usual, most."""
Profile = dict[str, Range]
"""Of each named axis of an engine's inputs, the sizes that one optimisation profile takes; sums follow from these."""


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT engine of one graph: its file, and all that it was built from.

    `sources` are the graph's files and their SHA-256 at the time, `versions` those of the packages that built it.
    """

    file: str
    sources: dict[str, str]
    versions: dict[str, str]
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class EngineSet:
    """The engines of one flavour of TensorRT for one `target`, such as `sm_86`, by the name of their graph."""

    flavour: str
    target: str
    graphs: dict[str, EngineSpec]


@dataclass(frozen=True)
class Manifest:
    """The contents of `resprune.json` (docs/bundle.md); `files` has every file of the bundle but the manifest itself.

    `optimize` "ort" means a decoder for ONNX Runtime alone; `early` None that the vision tower sees every token to
    its end.
    """

    format_version: int
    family: str
    model: str
    revision: str | None
    selection: Selection
    positions: str
    image_token_id: int
    context_length: int
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    versions: dict[str, str]
    command: str
    parity: dict[str, Any]
    created: str
    optimize: str | None = None
    early: Early | None = None
    engines: dict[str, EngineSet] = field(default_factory=dict)

    @property
    def has_decoder(self) -> bool:
        """Whether it can answer by itself: an export --without-decoder left that to something else."""
        return DECODER in self.graphs

    @property
    def num_planes(self) -> int:
        """How many further planes the features of an image have."""
        graph = self.graphs.get(VISION_ENCODER) or self.graphs.get(VISION_SELECT)
        plane = PLANE_FEATURES.format("")
        return sum(tensor.name.startswith(plane) for tensor in graph.outputs) if graph else 0

    @property
    def attention(self) -> str:
        """How the language model attends: "proportional" if the selection counts, else "plain"."""
        return "proportional" if self.selection.counts else "plain"

    def to_json(self) -> str:
        """Text of `resprune.json`; raises `ValueError` for a number JSON has no way to write (NaN)."""
        table = dataclasses.asdict(self)
        table["selection"] = {key: table["selection"][key] for key in SELECTION}
        last = {key: table.pop(key) for key in ("early", "engines")}
        table |= {"attention": self.attention} | last
        return json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "Manifest":
        """Parse and check the text of a `resprune.json`; every fault is a `ResPruneError` that names it."""
        top = fields.parse(text)
        version = fields.member(top, "format_version", int)
        if version > FORMAT_VERSION:
            raise ResPruneError(
                f"the bundle has format version {shown(version)} and this resprune reads up to "
                f"{FORMAT_VERSION}; upgrade resprune"
            )
        if version < 1:
            raise fields.fault("format_version", "1 or more", version)
        files = {name: _file_spec(name, spec) for name, spec in fields.member(top, "files", dict).items()}
        graphs = {
            name: _graph_spec(name, spec, files) for name, spec in fields.member(top, "graphs", dict).items()
        }
        for name, graph in graphs.items():
            if graph.file not in files or not graph.file.endswith(".onnx"):
                raise fields.fault(f"graphs.{name}.file", "one of the .onnx files in files", graph.file)
            if graph.weights is not None and graph.weights not in files:
                raise fields.fault(f"graphs.{name}.weights", "one of the names in files", graph.weights)
        built = fields.member(top, "engines", dict) if "engines" in top else {}
        engines = {name: _engine_set(name, value) for name, value in built.items()}
        for name, engine_set in engines.items():
            for graph_name, engine in engine_set.graphs.items():
                where = f"engines.{name}.graphs.{graph_name}"
                if graph_name not in graphs:
                    raise fields.fault(where, "named after one of the graphs", graph_name)
                if engine.file not in files:
                    raise fields.fault(f"{where}.file", "one of the names in files", engine.file)
                if any(profile.keys() != graphs[graph_name].axes() for profile in engine.profiles):
                    raise fields.fault(
                        f"{where}.profiles", "sizes of the axes of its graph's inputs", engine.profiles
                    )
        revision = top.get("revision")
        attention = fields.choice(top, "attention", ATTENTION) if "attention" in top else "plain"
        return Manifest(
            format_version=version,
            family=fields.member(top, "family", str),
            model=fields.member(top, "model", str),
            revision=None if revision is None else fields.member(top, "revision", str),
            selection=_selection(fields.member(top, "selection", dict), attention),
            positions=fields.choice(top, "positions", POSITIONS),
            image_token_id=fields.whole(top, "image_token_id", least=0, most=MAX_ID),
            context_length=fields.whole(top, "context_length", least=1),
            graphs=graphs,
            files=files,
            versions={
                name: fields.expect(f"versions.{name}", value, str)
                for name, value in fields.member(top, "versions", dict).items()
            },
            command=fields.member(top, "command", str),
            parity=fields.member(top, "parity", dict),
            created=fields.member(top, "created", str),
            optimize=None if top.get("optimize") is None else fields.choice(top, "optimize", OPTIMIZE),
            early=None if top.get("early") is None else _early(fields.member(top, "early", dict)),
            engines=engines,
        )


def axis_size(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of one axis of a TensorSpec: a number, the size of a name, or of a sum of names."""
    return axis if isinstance(axis, int) else sum(sizes[name] for name in axis_names(axis))


def axis_names(axis: int | str) -> list[str]:
    """The names an axis is made of: none of a number, several of a sum."""
    return [] if isinstance(axis, int) else [name.strip() for name in axis.split("+")]


def safe_name(name: str) -> str:
    """`name` if it is a relative posix path that stays inside and is one file on every system; else `ResPruneError`."""
    parts = name.split("/")
    bad = (
        PurePosixPath(name).is_absolute()
        or any(part in ("", ".", "..") for part in parts)
        or any(character in '\\:*?"<>|' or not character.isprintable() for character in name)
        or name == MANIFEST_NAME
        or len(os.fsencode(name)) > 1024
        or any(len(os.fsencode(part)) > MAX_NAME for part in parts)
    )
    if bad:
        raise fields.fault("a name in files", "a relative path that stays inside the bundle", name)
    return name


def _selection(table: dict[str, Any], attention: str) -> Selection:
    where = "selection."
    k = fields.whole(table, "k", where, least=1, most=MAX_TOKENS)
    num_tokens, max_tokens = (
        None if table.get(key) is None else fields.whole(table, key, where, least=1, most=MAX_TOKENS)
        for key in ("num_tokens", "max_tokens")
    )
    with _setting_faults(where):
        return Selection(
            k=k,
            num_tokens=num_tokens,
            alpha=fields.member(table, "alpha", float, where),
            scale=fields.member(table, "scale", str, where),
            body=fields.member(table, "body", str, where),
            max_tokens=max_tokens,
            share=_share(table, where),
            form=fields.member(table, "form", str, where)
            if "form" in table
            else "quadratic",  # which old ones do not name
            counts=attention == "proportional",
        )


def _early(table: dict[str, Any]) -> Early:
    of = fields.whole(table, "of", "early.", least=2, most=MAX_TOKENS)
    tokens = fields.whole(table, "tokens", "early.", least=1, most=of - 1)
    layer = fields.whole(table, "layer", "early.", least=1, most=MAX_TOKENS)
    return Early(layer, tokens, of, _share(table, "early."))


def _share(table: dict[str, Any], where: str) -> float | None:
    """`share`, None where there is none."""
    share = None if table.get("share") is None else fields.member(table, "share", float, where)
    with _setting_faults(where):
        check(share=share)
    return share


@contextmanager
def _setting_faults(where: str) -> Iterator[None]:
    try:
        yield
    except SettingError as error:
        raise fields.fault(f"{where}{error.name}", error.wanted, error.got) from None


def _graph_spec(name: str, value: object, files: Mapping[str, FileSpec]) -> GraphSpec:
    table, where = fields.expect(f"graphs.{name}", value, dict), f"graphs.{name}."
    file = fields.member(table, "file", str, where)
    beside = f"{file}_data"  # where they always are in bundles that do not say
    weights = beside if "weights" not in table and beside in files else table.get("weights")
    return GraphSpec(
        file=file,
        weights=None if weights is None else fields.expect(f"{where}weights", weights, str),
        precision=fields.choice(table, "precision", precisions.TABLE, where),
        inputs=tuple(_tensor_specs(table, "inputs", where)),
        outputs=tuple(_tensor_specs(table, "outputs", where)),
    )


def _engine_set(name: str, value: object) -> EngineSet:
    where = f"engines.{name}."
    table = fields.expect(where[:-1], value, dict)
    target = fields.member(table, "target", str, where)
    if not re.fullmatch(r"sm_[0-9]{2,3}", target):
        raise fields.fault(f"{where}target", "like sm_86", target)
    return EngineSet(
        flavour=fields.choice(table, "flavour", FLAVOURS, where),
        target=target,
        graphs={
            graph: _engine_spec(f"{where}graphs.{graph}.", spec)
            for graph, spec in fields.member(table, "graphs", dict, where).items()
        },
    )


def _engine_spec(where: str, value: object) -> EngineSpec:
    table = fields.expect(where[:-1], value, dict)
    sources, versions = (fields.member(table, key, dict, where) for key in ("sources", "versions"))
    return EngineSpec(
        file=fields.member(table, "file", str, where),
        sources={name: _digest(f"{where}sources.{name}", digest) for name, digest in sources.items()},
        versions={
            name: fields.expect(f"{where}versions.{name}", text, str) for name, text in versions.items()
        },
        profiles=tuple(
            _profile(f"{where}profiles[{index}]", profile)
            for index, profile in enumerate(fields.member(table, "profiles", list, where))
        ),
    )


def _profile(where: str, value: object) -> Profile:
    profile: Profile = {}
    for axis, sizes in fields.expect(where, value, dict).items():
        ordered = isinstance(sizes, list) and len(sizes) == 3 and all(type(size) is int for size in sizes)
        if not ordered or not 0 <= sizes[0] <= sizes[1] <= sizes[2] < 1 << 63:
            raise fields.fault(f"{where}.{axis}", "three ascending sizes", sizes)
        profile[axis] = (sizes[0], sizes[1], sizes[2])
    return profile


def _tensor_specs(table: dict[str, Any], key: str, where: str) -> Iterator[TensorSpec]:
    seen = set()
    for index, value in enumerate(fields.member(table, key, list, where)):
        here = f"{where}{key}[{index}]"
        tensor = fields.expect(here, value, dict)
        name = fields.member(tensor, "name", str, f"{here}.")
        if name in seen:
            raise fields.fault(f"{here}.name", "a name not yet used", name)
        seen.add(name)
        shape = fields.member(tensor, "shape", list, f"{here}.")
        if len(shape) > MAX_RANK:
            raise fields.fault(f"{here}.shape", f"at most {MAX_RANK} axes", len(shape))
        for axis in shape:
            named = isinstance(axis, str) and axis != ""
            fixed = isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < 1 << 63
            if not (named or fixed):
                raise fields.fault(f"{here}.shape", "a list of sizes and axis names", axis)
        yield TensorSpec(name, fields.choice(tensor, "dtype", ELEMENTS, f"{here}."), tuple(shape))


def _file_spec(name: str, value: object) -> FileSpec:
    safe_name(name)
    table, where = fields.expect(f"files.{name}", value, dict), f"files.{name}."
    digest = _digest(f"{where}sha256", fields.member(table, "sha256", str, where))
    return FileSpec(fields.whole(table, "size", where, least=0), digest)


def _digest(where: str, value: object) -> str:
    digest = fields.expect(where, value, str)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise fields.fault(where, "64 lower-case hexadecimal digits", digest)
    return digest
