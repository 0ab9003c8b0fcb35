"""The CUDA that engines need, through NVIDIA's own bindings: which GPU there is, memory on it, one stream."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from resprune.runtime.console import bytes_text
from resprune.runtime.errors import FailedError, ResPruneError, one_line

ALIGNMENT = 512  # cudaMalloc's own, more than the 256 bytes that TensorRT asks for


@dataclass(frozen=True)
class Gpu:
    """A GPU's name, its compute capability, the CUDA version of its driver, as in (13, 0), and its multiprocessors."""

    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]
    processors: int


def gpu_at_hand() -> Gpu:
    """The first GPU that CUDA shows; `ResPruneError` if there is none that it can use."""
    cuda = _runtime()
    try:
        (count,) = _checked(cuda.cudaGetDeviceCount())
    except Exception as error:  # a driver that is missing or too old fails in several ways
        raise ResPruneError(f"there is no GPU that CUDA can use here ({one_line(error)})") from None
    if count == 0:
        raise ResPruneError("there is no GPU that CUDA can use here")
    (properties,) = _checked(cuda.cudaGetDeviceProperties(0))
    (driver,) = _checked(cuda.cudaDriverGetVersion())
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(
        name,
        (properties.major, properties.minor),
        (driver // 1000, driver % 1000 // 10),
        int(properties.multiProcessorCount),
    )


class Stream:
    """A CUDA stream: what is put on it runs in that order, after the call has returned."""

    def __init__(self) -> None:
        (self.stream,) = _checked(_runtime().cudaStreamCreate())
        self.handle = int(self.stream)

    def synchronize(self) -> None:
        """Wait until all that was put on the stream is done."""
        _checked(_runtime().cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Give it back."""
        _checked(_runtime().cudaStreamDestroy(self.stream))


class Buffer:
    """Memory on the GPU that grows when it must and never shrinks; growing forgets what it held."""

    def __init__(self) -> None:
        self.address = 0
        self.size = 0

    def reserve(self, size: int, spare: float = 1.0) -> int:
        """Make room for `size` bytes, or `spare` times as many if it has to grow; returns the address."""
        if size > self.size or self.address == 0:
            self.close()
            wanted = -(-max(int(size * spare), 1) // ALIGNMENT) * ALIGNMENT
            (self.address,) = _checked(_runtime().cudaMalloc(wanted), wanted)
            self.size = wanted
        return self.address

    def close(self) -> None:
        """Give the memory back."""
        if self.address:
            _checked(_runtime().cudaFree(self.address))
            self.address = self.size = 0


def upload(array: npt.NDArray[Any], address: int, stream: Stream) -> None:
    """Copy a contiguous array to the GPU; it must stay as it is until the stream has come to it."""
    cuda = _runtime()
    kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    _checked(cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream.stream))


def download(address: int, array: npt.NDArray[Any], stream: Stream) -> None:
    """Fill a contiguous array from the GPU; what it holds counts once the stream is synchronised."""
    cuda = _runtime()
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    _checked(cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream.stream))


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportAttributeAccessIssue] - a binary module
    except ImportError:
        raise ResPruneError(
            'engines need cuda-bindings; install with: pip install "resprune[tensorrt-rtx]" or "resprune[tensorrt]"'
        ) from None
    return runtime


def _checked(result: tuple[Any, ...], wanted: int | None = None) -> tuple[Any, ...]:
    """What a call of the CUDA runtime returns beside its status; `ResPruneError` if that is an error."""
    status, *values = result
    if int(status) == 0:
        return tuple(values)
    if status.name == "cudaErrorMemoryAllocation" and wanted is not None:
        raise ResPruneError(
            f"the GPU is out of memory: {bytes_text(wanted)} more are needed; close other programs on it, ask for less "
            "at once, or build engines with a smaller --batch, --prompt or --context"
        )
    raise FailedError(f"CUDA failed ({status.name}); see whether nvidia-smi shows the GPU in order")
