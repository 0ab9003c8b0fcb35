"""A checkpoint in PyTorch: what is wrong with its weights or its device is said, and never answered over."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from resprune.evaluation.checkpoint import open_checkpoint
from resprune.runtime.errors import ResPruneError


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """A checkpoint that may be changed."""
    return shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("language_model.model.norm.weight"), "1 missing"),
        (lambda weights: weights.update(extra=torch.ones(1)), "1 left over"),
    ],
)
def test_weights_that_do_not_fit_are_not_made_up(change, named, copy):
    """transformers would fill them in at random, or leave them out, and go on."""
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResPruneError, match=f"do not fit its config: {named}"):
        open_checkpoint(str(copy))


def test_a_truncated_file_of_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResPruneError, match="truncated or corrupt"):
        open_checkpoint(str(copy))


def test_another_fingerprint_for_other_weights_of_the_same_size(copy):
    """As a directory has that is trained again; a run that goes on must not mix their answers."""
    first, again = (open_checkpoint(str(copy)).fingerprint for _ in range(2))
    assert first == again
    path = copy / "model.safetensors"
    size = path.stat().st_size
    weights = load_file(path)
    save_file({name: -weight for name, weight in weights.items()}, path, {"format": "pt"})
    assert path.stat().st_size == size
    assert open_checkpoint(str(copy)).fingerprint != first


def test_another_fingerprint_on_another_device(copy):
    """`meta` is one that every machine has; answers of half precision are not those of float32."""
    on_cpu, elsewhere = (open_checkpoint(str(copy), device=device).fingerprint for device in ("cpu", "meta"))
    assert on_cpu.endswith("torch.float32 on cpu")
    assert elsewhere.endswith("on meta")


@pytest.fixture
def threads():
    """PyTorch's, put back afterwards."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_pytorchs(threads, copy):
    assert open_checkpoint(str(copy)).engine.threads == threads
    assert open_checkpoint(str(copy), threads=threads + 1).engine.threads == threads + 1
    assert torch.get_num_threads() == threads + 1


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(tiny_checkpoint, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ResPruneError, match=f"cannot be loaded on {device}"):
        open_checkpoint(str(tiny_checkpoint("clip-llama")), device=device)
