"""A checkpoint in PyTorch: what is wrong with its weights or its device is said, and never answered over."""

import errno
import json
import shutil
from functools import reduce
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(name, copy, monkeypatch):
    """The tests may be run by root, who may read anything."""
    usual = Path.open

    def refuse(self, *arguments, **keywords):
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResPruneError, match=rf"/{name} cannot be used \(Permission denied\); give"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_no_file_is_named(name, copy):
    """A link to nothing, and a folder."""
    (copy / name).unlink()
    (copy / name).symlink_to("nowhere")
    with pytest.raises(ResPruneError, match=rf"{copy} has n.* {name}"):
        open_checkpoint(str(copy))
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(ResPruneError, match=rf"{copy} has n.* {name}"):
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


def test_an_image_processor_that_the_runtime_does_not_know(copy):
    path = copy / "preprocessor_config.json"
    path = path if path.exists() else copy / "processor_config.json"
    config = json.loads(path.read_text())
    (config.get("image_processor") or config)["image_processor_type"] = "NopeProcessor"
    path.write_text(json.dumps(config))
    with pytest.raises(ResPruneError, match=r"NopeProcessor is not supported"):
        open_checkpoint(str(copy))


def test_an_image_processor_that_transformers_cannot_make(copy, monkeypatch):
    def unknown(*arguments: object, **options: object) -> None:
        raise ValueError("Unrecognized image processor")

    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", unknown)
    with pytest.raises(ResPruneError, match=r"cannot be loaded on cpu \(Unrecognized image processor\)"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("get_image_features", "encode an image"),
        ("get_input_embeddings", "embed a question"),
        ("select", "select tokens"),
        ("model.language_model.forward", "go on with an answer"),
    ],
)
def test_too_little_memory_is_one_sentence(tiny_checkpoint, monkeypatch, place, what):
    """Wherever it runs out, and whatever a GPU's allocator has to say."""
    model = open_checkpoint(str(tiny_checkpoint("clip-llama")))

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    if place == "select":
        monkeypatch.setattr("resprune.exporter.verify.reference.residual_select", full)
    else:
        *path, name = place.split(".")
        monkeypatch.setattr(reduce(getattr, path, model._stages.encode.__self__._model), name, full)
    with pytest.raises(
        ResPruneError, match=f"could not {what} on cpu .CUDA out of memory. Tried to"
    ) as raised:
        ask(model)
    assert "\n" not in str(raised.value)


def ask(model):
    (encoded,) = model.look([np.zeros((40, 50, 3), np.uint8)])
    asked = model.read("what colour is the square?")
    return model.answer([asked], [[encoded]], [[model.select(encoded, asked, 3)]], 4)


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there(tiny_checkpoint, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ResPruneError, match=f"cannot be loaded on {device}"):
        open_checkpoint(str(tiny_checkpoint("clip-llama")), device=device)
