"""Every setting of generation_config.json, token for token as transformers' `generate` answers with it.

K is N, so that the ids and the rows are those of the unpruned prompt.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.answer import Answer
from resprune.runtime.bundle.files import read_bundle, write_manifest
from resprune.runtime.bundle.manifest import FileSpec
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from resprune.runtime.sampling import SETTINGS_FILE
from tests.exporter.hugging_face import HuggingFace

TOKENS, STEPS, SEED = 16, 12, 5
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
EARLY = [2, 272]  # the third token of the plain answer
QUESTION = "how many red circles are there"
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.05},  # Qwen2.5-VL's
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 0.2},
    {"eos_token_id": EARLY},
    {"eos_token_id": EARLY, "min_new_tokens": 5},
    {"suppress_tokens": list(range(40, 200))},
    {"begin_suppress_tokens": list(range(250, 480))},
    {"forced_eos_token_id": 2},
    {"do_sample": False, "temperature": 0.3, "top_k": 2, "top_p": 0.2},
    {"do_sample": True},
    {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},  # Qwen2.5-VL's
    {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001},  # Qwen2-VL's
    {"do_sample": True, "temperature": 0.9, "top_p": 0.6},  # LLaVA-1.6's
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},  # Qwen3-VL's
    {"do_sample": True, "temperature": 2.0, "top_k": 0},
    {"do_sample": True, "temperature": 2.0, "min_p": 0.1, "no_repeat_ngram_size": 1},
]


@pytest.fixture(scope="module")
def whole(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle("clip-llama", k=TOKENS, split=True)


def bundle_that_says(whole: Path, out: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(whole, out)
    said = json.loads((out / SETTINGS_FILE).read_text())
    text = json.dumps(said | settings).encode()
    (out / SETTINGS_FILE).write_bytes(text)
    manifest = read_bundle(whole).manifest
    files = {**manifest.files, SETTINGS_FILE: FileSpec(len(text), sha256(text).hexdigest())}
    write_manifest(out, dataclasses.replace(manifest, files=files))
    return out


def ask(bundle: Path, **options: Any) -> Answer:
    with Pipeline.load(bundle, threads=1) as pipeline:
        return pipeline.ask(PICTURE, QUESTION, stream=False, **options)


def draw_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `generate` draw with our random numbers: at the same place of the summed probabilities."""
    generator = np.random.default_rng(SEED)

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        summed = np.cumsum(probabilities.numpy().astype(np.float64), axis=-1)
        drawn = generator.random((len(summed), 1)) * summed[:, -1:]
        return torch.from_numpy((summed <= drawn).sum(axis=-1, keepdims=True))

    monkeypatch.setattr(torch, "multinomial", multinomial)


def theirs(model: HuggingFace, prompt: list[int], settings: dict[str, Any]) -> list[int]:
    image = model.model.config.image_token_id
    ids = [token for id_ in prompt for token in [id_] * (TOKENS if id_ == image else 1)]
    with torch.no_grad():
        out = model.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            **model._inputs([PICTURE]),
            generation_config=GenerationConfig(**settings, pad_token_id=3),
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda settings: " ".join(f"{k}={v}"[:40] for k, v in settings.items())
)
def test_the_checkpoint_says_and_generate_answers(
    settings: dict[str, Any],
    whole: Path,
    hugging_face: Callable[[str], HuggingFace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_new_tokens": STEPS, "eos_token_id": 2} | settings
    answer = ask(bundle_that_says(whole, tmp_path / "bundle", settings), seed=SEED)
    draw_as_we_do(monkeypatch)
    expected = theirs(hugging_face("clip-llama"), answer.prompt.ids, settings)
    assert answer.token_ids == expected


def test_these_settings_change_the_answer(whole: Path, tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    plain = ask(whole, max_new_tokens=STEPS).token_ids
    for settings in SETTINGS:
        if settings.get("do_sample") is None and settings != {"repetition_penalty": 1.05}:
            bundle = bundle_that_says(whole, tmp_path / str(len(list(tmp_path.iterdir()))), settings)
            assert ask(bundle, max_new_tokens=STEPS).token_ids != plain, settings
    assert ask(whole, max_new_tokens=STEPS, temperature=2.0, seed=SEED).token_ids != plain


def test_a_question_goes_before_what_the_checkpoint_says(whole: Path, tmp_path: Path) -> None:
    said = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 1.8, "max_new_tokens": 3}
    bundle = bundle_that_says(whole, tmp_path / "bundle", said)
    answer = ask(bundle, temperature=0, repetition_penalty=1.0, max_new_tokens=STEPS)
    assert answer.token_ids == ask(whole, max_new_tokens=STEPS).token_ids
    assert len(ask(bundle).token_ids) <= 3


def test_a_setting_that_nothing_here_does_never_becomes_a_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root = shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "checkpoint")
    said = json.loads((root / SETTINGS_FILE).read_text())
    for settings in ({"num_beams": 3}, {"repetition_penalty": 0}):
        (root / SETTINGS_FILE).write_text(json.dumps(said | settings))
        with pytest.raises(ResPruneError, match=next(iter(settings))):
            export(str(root), tmp_path / "out", Options(k=4))
        assert not (tmp_path / "out").exists()
