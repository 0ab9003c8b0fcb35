"""TensorRT engines of a bundle's graphs, by polygraphy, in either flavour of TensorRT.

`tensorrt-rtx` builds for any GPU it knows on a machine that has none; `tensorrt` builds for the GPU at hand. Networks
are strongly typed and TF32 is off, so that precision is the graph's own: the selection's Gram product is float32.
"""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from tqdm import tqdm

from resprune.exporter.tensorrt.limits import Limits
from resprune.exporter.tensorrt.plugin import plugin_versions, with_plugin
from resprune.exporter.tensorrt.profiles import profiles
from resprune.exporter.transaction import NO_SPACE, lock
from resprune.runtime.backends.cuda import gpu_at_hand
from resprune.runtime.backends.engines import (
    INSTALL,
    Capability,
    capability_of,
    graph_sources,
    installed_flavours,
    set_name,
    target_name,
    tensorrt_module,
)
from resprune.runtime.bundle.files import Bundle, describe_file, read_bundle, write_manifest
from resprune.runtime.bundle.manifest import (
    ENGINES_FOLDER,
    EngineSet,
    EngineSpec,
    FileSpec,
    Profile,
    axis_size,
)
from resprune.runtime.bundle.precisions import TABLE
from resprune.runtime.console import bytes_text
from resprune.runtime.errors import ResPruneError, one_line

TIMING_CACHE = "timing.cache"
NEW = ".new-"
# The quantised graphs' operators are those of ONNX Runtime, or quantise activations as they come.
PRECISIONS = tuple(row.word for row in TABLE.values() if not row.quantized)
Report = Callable[[str], None]


def build(
    root: Path,
    flavour: str | None = None,
    targets: Sequence[str] = (),
    limits: Limits | None = None,
    report: Report = print,
) -> None:
    """Build the engines of the bundle at `root` for each target (`sm_86`; none: the GPU at hand).

    `flavour` None takes the one that is installed. An engine that was built from the same graph, by the same versions,
    for the same profiles is kept. After each engine the bundle is whole again: a build that was cut off leaves what it
    had, and goes on from there. `report` gets a line an engine. Raises `ResPruneError` for what the user can put right.
    """
    flavour = flavour or _installed_flavour()
    wanted = _targets(flavour, targets)
    bundle = read_bundle(root)
    _check_operators(bundle)
    of_graph = profiles(bundle, limits or Limits())
    with _folder(bundle) as work:
        builder = _Builder(bundle, flavour, work, _versions(flavour), report)
        for target in wanted:
            for graph_name, ranges in of_graph.items():
                builder.build(target, graph_name, ranges)


@dataclass
class _Builder:
    """Builds into `work` and moves each engine into the bundle when it is complete."""

    bundle: Bundle
    flavour: str
    work: Path
    versions: dict[str, str]
    report: Report

    def build(self, target: str, graph: str, ranges: tuple[Profile, ...]) -> None:
        """One engine, unless the bundle has the same already."""
        started = perf_counter()
        name = set_name(self.flavour, target)
        file = f"{ENGINES_FOLDER}/{name}/{graph}.engine"
        path, selection = self.bundle.graph_path(graph), self.bundle.manifest.selection
        most = selection.num_tokens or selection.max_tokens or 0
        plugin, note = plugin_versions(path, self.flavour, most)
        spec = EngineSpec(file, graph_sources(self.bundle, graph), self.versions | plugin, ranges)
        engines = self.bundle.manifest.engines.get(name, EngineSet(self.flavour, target, {}))
        if engines.graphs.get(graph) == spec:
            self._line(file, "reused", None, note)
            return
        cache = self.bundle.root / ENGINES_FOLDER / name / TIMING_CACHE
        if cache.exists():
            shutil.copy(cache, self.work / TIMING_CACHE)
        with TemporaryDirectory(dir=self.bundle.root / ENGINES_FOLDER, prefix=NEW) as folder:
            path = with_plugin(path, Path(folder)) if plugin else path
            engine, layers = _engine_bytes(
                self.bundle,
                graph,
                path,
                self.flavour,
                capability_of(target),
                ranges,
                self.work / TIMING_CACHE,
            )
        with (self.work / f"{graph}.engine").open("wb") as stream:
            stream.write(engine)
        (self.work / f"{graph}.layers.txt").write_text(layers, encoding="utf-8")
        self._commit(name, replace(engines, graphs=engines.graphs | {graph: spec}))
        self._line(file, f"{perf_counter() - started:.1f} s", engine.nbytes, note)

    def _commit(self, name: str, engines: EngineSet) -> None:
        """Move what `work` holds into the set's folder.

        What is replaced leaves the manifest first, so that at any moment the files it lists are as it says.
        """
        manifest = self.bundle.manifest
        names = sorted(
            path.name for path in self.work.iterdir() if path.suffix != ".lock"
        )  # the timing cache's
        new = {file: f"{ENGINES_FOLDER}/{name}/{file}" for file in names}
        kept = {file: spec for file, spec in manifest.files.items() if file not in new.values()}
        listed = {
            set_: replace(
                value, graphs={graph: spec for graph, spec in value.graphs.items() if spec.file in kept}
            )
            for set_, value in manifest.engines.items()
        }
        if len(kept) < len(manifest.files):
            write_manifest(self.bundle.root, replace(manifest, files=kept, engines=listed))
        folder = self.bundle.root / ENGINES_FOLDER / name
        folder.mkdir(exist_ok=True)
        for file in new:
            with (self.work / file).open("rb") as stream:
                os.fsync(stream.fileno())
            (self.work / file).replace(folder / file)
        made: dict[str, FileSpec] = {file: describe_file(self.bundle.root, file) for file in new.values()}
        manifest = replace(manifest, files=kept | made, engines=listed | {name: engines})
        write_manifest(self.bundle.root, manifest)
        self.bundle = Bundle(self.bundle.root, manifest)

    def _line(self, file: str, what: str, size: int | None, note: str) -> None:
        amount = "" if size is None else bytes_text(size)
        self.report(f"{file:64} {what:>8} {amount:>12}   {note}".rstrip())


def _check_operators(bundle: Bundle) -> None:
    """`ResPruneError` for graphs whose operators TensorRT does not know."""
    if bundle.manifest.optimize is not None:
        raise ResPruneError(
            f"the decoder of {bundle.root} is of ONNX Runtime's own operators; for TensorRT, export the bundle without "
            "--optimize"
        )
    for name, graph in bundle.manifest.graphs.items():
        if graph.precision not in PRECISIONS:
            raise ResPruneError(
                f"{name} of {bundle.root} is {graph.precision}, whose operators TensorRT does not take; export it with "
                f"--dtype {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
            )


def known_targets(flavour: str) -> list[str]:
    """What can be built for, like "sm_86": all that TensorRT-RTX knows; with classic TensorRT the GPU at hand."""
    if flavour == "tensorrt-rtx":
        names: list[str] = list(tensorrt_module(flavour).ComputeCapability.__members__)
        return [f"sm_{name[2:]}" for name in names if name.startswith("SM")]
    tensorrt_module(flavour)
    return [target_name(gpu_at_hand().capability)]


def _targets(flavour: str, targets: Sequence[str]) -> list[str]:
    known = known_targets(flavour)
    wanted = list(targets) or [_target_at_hand()]
    for target in wanted:
        capability_of(target)
        if target not in known:
            builds = "builds for" if flavour == "tensorrt-rtx" else "builds only for the GPU at hand,"
            raise ResPruneError(f"{flavour} {builds} {', '.join(known)}, not for {target}; choose from these")
    return list(dict.fromkeys(wanted))


def _target_at_hand() -> str:
    try:
        return target_name(gpu_at_hand().capability)
    except ResPruneError as error:
        raise ResPruneError(f"{error}; name what to build for, as in --target sm_86") from None


def _installed_flavour() -> str:
    installed = installed_flavours()
    if not installed:
        raise ResPruneError(
            f"no TensorRT is installed; install one of its flavours: {INSTALL['tensorrt-rtx']} (builds on any "
            f"machine), or {INSTALL['tensorrt']}"
        )
    return installed[-1]  # tensorrt-rtx, which needs no GPU, where both are


def _versions(flavour: str) -> dict[str, str]:
    """What an engine depends on beside its graph."""
    return {flavour: tensorrt_module(flavour).__version__, "resprune": importlib.metadata.version("resprune")}


@contextmanager
def _folder(bundle: Bundle) -> Iterator[Path]:
    """A folder to build in, inside the bundle so that what it holds can be renamed into place."""
    engines = bundle.root / ENGINES_FOLDER
    try:
        engines.mkdir(exist_ok=True)
        with (engines / ".lock").open("w") as held:
            if not lock(held):
                raise ResPruneError(f"another resprune build is at work on {bundle.root}; wait for it to end")
            for left in engines.glob(f"{NEW}*"):  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            work = engines / f"{NEW}{uuid.uuid4().hex[:12]}"
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno not in (*NO_SPACE, errno.EACCES, errno.EROFS):
            raise
        raise ResPruneError(
            f"engines cannot be written into {bundle.root} ({error.strerror}); make room there, or build in a copy"
        ) from None


def _engine_bytes(
    bundle: Bundle,
    graph: str,
    path: Path,
    flavour: str,
    capability: Capability,
    ranges: tuple[Profile, ...],
    timing_cache: Path,
) -> tuple[memoryview, str]:
    """The serialised engine of a graph, read from `path`, and its layers with types and shapes, before fusion."""
    trt = tensorrt_module(flavour)
    backend = _polygraphy(flavour)
    with (
        _failures(f"{flavour} cannot build {graph} for {target_name(capability)}"),
        tqdm(desc=graph, leave=False, disable=None) as bar,
    ):
        monitor = _monitor(trt, bar)
        options: dict[str, Any] = {
            "profiles": [_shapes(backend, bundle, graph, profile) for profile in ranges],
            "load_timing_cache": str(timing_cache) if timing_cache.exists() else None,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "progress_monitor": monitor,
        }
        if flavour == "tensorrt-rtx":
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            config = CreateConfigRTX(compute_capabilities=[capability], **options)
        else:
            config = backend.CreateConfig(**options)
        # Polygraphy clears TF32 for classic TensorRT alone, and both flavours have it on.
        without_tf32 = backend.PostprocessConfig(
            config, lambda _builder, _network, made: made.clear_flag(trt.BuilderFlag.TF32)
        )
        network = backend.network_from_onnx_path(str(path), strongly_typed=True)
        # Not `str_from_network`: with TensorRT-RTX polygraphy 0.53.6 looks there for the other flavour.
        layers = "\n".join(
            backend.util.str_from_layer(layer, index) for index, layer in enumerate(network[1])
        )
        engine = backend.engine_bytes_from_network(
            network, config=without_tf32, save_timing_cache=str(timing_cache)
        )
        if monitor.interrupted:
            raise KeyboardInterrupt
    return memoryview(engine), layers


def _polygraphy(flavour: str) -> Any:
    """Polygraphy's backend; it settles on a flavour when it is imported, so a process has one."""
    rtx = flavour == "tensorrt-rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(rtx))
    try:
        import polygraphy.backend.trt
        from polygraphy import config
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise ResPruneError(
            f"building engines needs polygraphy; install it with: {INSTALL[flavour]}"
        ) from None
    if rtx != bool(config.USE_TENSORRT_RTX):
        raise ResPruneError(
            f"this process has built engines of another flavour than {flavour}; start another"
        )
    G_LOGGER.colors = False  # it would print that a package for colours is missing
    G_LOGGER.use_python_logging_system = True
    logging.getLogger("Polygraphy").propagate = False
    return polygraphy.backend.trt


def _shapes(backend: Any, bundle: Bundle, graph: str, sizes: Profile) -> Any:
    """Polygraphy's profile of a graph: the least, usual and most of each input's shape."""
    made = backend.Profile()
    for tensor in bundle.manifest.graphs[graph].inputs:
        least, usual, most = (
            tuple(
                axis_size(axis, {name: limits[index] for name, limits in sizes.items()})
                for axis in tensor.shape
            )
            for index in range(3)
        )
        made.add(tensor.name, min=least, opt=usual, max=most)
    return made


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Turn what TensorRT and polygraphy log and raise into one sentence; a build that goes well logs nothing."""
    from polygraphy.exception import PolygraphyException

    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(one_line(record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("Polygraphy")
    logger.addHandler(handler)
    try:
        yield
    except PolygraphyException as error:
        # On a machine without a GPU the builder complains of that at every step, and goes on.
        told = [line for line in errors if "CUDA driver version" not in line] or [one_line(error)]
        raise ResPruneError(f"{what} ({told[0]})") from None
    finally:
        logger.removeHandler(handler)


def _monitor(trt: Any, bar: Any) -> Any:
    """Counts the builder's steps on a progress bar; Ctrl-C ends the build at the next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        interrupted = False

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bar.total = (bar.total or 0) + num_steps
            bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                bar.update()
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
