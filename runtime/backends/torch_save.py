"""The file that `torch.save` makes of one tensor, written without torch.

A zip archive, nothing compressed: `data.pkl` is the pickle of the tensor's shape and strides, which refers to
`data/0`, the raw numbers (torch/serialization.py, "Note on the format"). `torch.load(weights_only=True)` reads it.
"""

import io
import pickle
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

STORAGES = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.float16): b"HalfStorage"}


def torch_save(array: npt.NDArray[Any]) -> bytes:
    """The bytes of `torch.save(torch.from_numpy(array), …)`, for a float32 or float16 array of any shape."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(array))
        archive.writestr("archive/byteorder", "little")
        archive.writestr(
            "archive/data/0", np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).data
        )
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _pickled(array: npt.NDArray[Any]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, requires_grad=False, OrderedDict()), protocol 2."""
    strides = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
    storage = _tuple(
        _text("storage"),
        _name(b"torch", STORAGES[array.dtype]),
        _text("0"),  # the numbers are data/0
        _text("cpu"),
        _number(array.size),
    )
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _number(0),
        _tuple(*map(_number, array.shape)),
        _tuple(*map(_number, strides)),
        pickle.NEWFALSE,
        _name(b"collections", b"OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )
    rebuild = _name(b"torch._utils", b"_rebuild_tensor_v2")
    return pickle.PROTO + b"\x02" + rebuild + arguments + pickle.REDUCE + pickle.STOP


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _name(module: bytes, attribute: bytes) -> bytes:
    return pickle.GLOBAL + module + b"\n" + attribute + b"\n"


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    return pickle.BININT + value.to_bytes(4, "little", signed=True)
