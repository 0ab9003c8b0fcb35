"""The tensor file written without torch is one that torch reads, weights only, as a server does."""

import io
import pickletools
import zipfile

import numpy as np
import pytest
import torch

from resprune.runtime.backends.torch_save import torch_save


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(16, 128), (1, 1), (0, 8), (300,), (), (2, 3, 70000)])
def test_torch_loads_what_is_written(shape: tuple[int, ...], dtype: type) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    loaded = torch.load(io.BytesIO(torch_save(array)), weights_only=True)
    assert loaded.dtype == torch.from_numpy(array).dtype
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.numpy(), array)


def test_rows_picked_out_of_an_array_are_written_in_their_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array[::2], array.T, array[:, ::-1]):
        np.testing.assert_array_equal(
            torch.load(io.BytesIO(torch_save(view)), weights_only=True).numpy(), view
        )


def test_torch_writes_the_same_pickle_but_for_its_memo() -> None:
    """What torch.load may call is what torch.save itself names, and nothing else."""

    def operations(file: bytes) -> list[tuple[str, object]]:
        pickled = zipfile.ZipFile(io.BytesIO(file)).read("archive/data.pkl")
        named = {"BININT1": "BININT", "BININT2": "BININT", "TUPLE2": "TUPLE"}
        return [
            (named.get(operation.name, operation.name), argument)
            for operation, argument, _ in pickletools.genops(pickled)
            if operation.name not in ("BINPUT", "MARK")
        ]

    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    written = io.BytesIO()
    torch.save(torch.from_numpy(array), written)
    assert operations(torch_save(array)) == operations(written.getvalue())
