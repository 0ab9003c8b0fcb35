"""Which engines of a bundle this machine can run: by flavour of TensorRT, by GPU, by version, by what they are of."""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.bundle.manifest import EngineSet, EngineSpec, Profile
from resprune.runtime.errors import ResPruneError, one_line

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": 'pip install "resprune[tensorrt]" --extra-index-url https://pypi.nvidia.com',
    "tensorrt-rtx": 'pip install "resprune[tensorrt-rtx]"',
}
# The option of resprune build that bounds an axis; of any other, it is an image's --tokens.
WIDENED_BY = {
    "batch_size": "--batch",
    "num_tiles": "--batch",
    "text_tokens": "--nouns",
    "sequence_length": "--prompt",
    "past_sequence_length": "--context",
}
Capability = tuple[int, int]


def tensorrt_module(flavour: str) -> Any:
    """The Python module of a flavour of TensorRT; `ResPruneError`, saying what to install, if it is not there."""
    try:
        return importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:  # OSError: the module is there and a library it loads is not
        raise ResPruneError(
            f"{flavour} cannot be imported ({one_line(error)}); install it with: {INSTALL[flavour]}"
        ) from None


def installed_flavours() -> list[str]:
    """The flavours of TensorRT that are installed here."""
    return [flavour for flavour, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def target_name(capability: Capability) -> str:
    """(8, 6) → `sm_86`."""
    return f"sm_{capability[0]}{capability[1]}"


def capability_of(target: str) -> Capability:
    """`sm_86` → (8, 6); `ResPruneError` for what is no compute capability."""
    if not (match := re.fullmatch(r"sm_(\d{1,2})(\d)", target)):
        raise ResPruneError(f"{target} is no target; one is written like sm_86, the GPU's compute capability")
    return int(match[1]), int(match[2])


def set_name(flavour: str, target: str) -> str:
    """The name of an engine set, which is also its folder's."""
    return f"{flavour}-{target}"


def graph_sources(bundle: Bundle, graph: str) -> dict[str, str]:
    """The files a graph is made of, and their SHA-256."""
    return {name: bundle.manifest.files[name].sha256 for name in bundle.manifest.graphs[graph].files()}


def choose_engines(bundle: Bundle, flavour: str, version: str, capability: Capability) -> EngineSet:
    """The bundle's engines for this flavour, its installed `version`, and a GPU of this compute capability.

    `ResPruneError`, naming what differs and how to build, if there are none, or if they are for another GPU, by
    another version of TensorRT, or of another graph than the one that lies beside them.
    """
    target = target_name(capability)
    build = f"build them with: resprune build {bundle.root} --flavour {flavour} --target {target}"
    chosen = bundle.manifest.engines.get(set_name(flavour, target))
    if chosen is None:
        others = [
            engines.target for engines in bundle.manifest.engines.values() if engines.flavour == flavour
        ]
        what = f"{flavour} engines for {', '.join(others)}" if others else f"no {flavour} engines"
        raise ResPruneError(f"the bundle {bundle.root} has {what} and this GPU is {target}; {build}")
    for graph in bundle.manifest.graphs:
        if graph not in chosen.graphs:
            raise ResPruneError(f"the bundle {bundle.root} has no {flavour} engine of {graph}; {build}")
        engine = chosen.graphs[graph]
        if (built_by := engine.versions.get(flavour)) != version:
            raise ResPruneError(
                f"{engine.file} was built by {flavour} {built_by} and {version} is installed; {build}"
            )
        if engine.sources != graph_sources(bundle, graph):
            raise ResPruneError(f"{engine.file} was built from another {graph} than the bundle has; {build}")
    return chosen


def choose_profile(graph: str, engine: EngineSpec, sizes: Mapping[str, int]) -> int:
    """Index of the first of an engine's profiles that takes these sizes of the named axes.

    `ResPruneError`, naming axis, limits and the option that widens them, if none does.
    """
    outside = [_outside(profile, sizes) for profile in engine.profiles]
    if [] in outside:
        return outside.index([])
    # Of the profile that comes nearest: fewest axes outside, then the one that takes more of them.
    nearest = min(
        range(len(outside)),
        key=lambda index: (len(outside[index]), -engine.profiles[index][outside[index][0]][2]),
    )
    axis = outside[nearest][0]
    least, _, most = engine.profiles[nearest][axis]
    raise ResPruneError(
        f"the engine of {graph} takes {axis} from {least} to {most}, not {sizes[axis]}; ask for less at once, or build "
        f"it again with a wider {WIDENED_BY.get(axis, '--tokens')} (resprune build --help)"
    )


def _outside(profile: Profile, sizes: Mapping[str, int]) -> list[str]:
    """The axes whose sizes the profile does not take."""
    return [axis for axis, size in sizes.items() if not profile[axis][0] <= size <= profile[axis][2]]
