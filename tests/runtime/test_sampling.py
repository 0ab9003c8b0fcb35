"""The settings of sampling: what a checkpoint says, what may be changed, what is refused."""

import re
from dataclasses import replace
from typing import Any

import pytest
from transformers import GenerationConfig

from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.table import FAMILIES
from resprune.runtime.sampling import (
    Sampling,
    bundle_sampling,
    checkpoint_sampling,
    eos_token_ids,
    require_supported,
)
from tests.runtime.bundles import bundle_of_files, one_sentence

QWEN25_VL = {  # as Qwen/Qwen2.5-VL-7B-Instruct is published
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
}


def test_a_checkpoint_that_says_nothing_is_greedy_and_draws_from_fifty_when_it_is_asked_to() -> None:
    silent = checkpoint_sampling({})
    assert silent == Sampling(top_k=50)
    assert not silent.processed
    theirs = GenerationConfig._get_default_generation_params()
    assert (silent.top_k, silent.top_p) == (theirs["top_k"], theirs["top_p"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (QWEN25_VL, Sampling(temperature=0.000001, top_k=50, repetition_penalty=1.05)),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, Sampling(top_k=50, top_p=0.6)),
        (
            {"do_sample": True, "temperature": 0.9, "top_p": 0.6},
            Sampling(temperature=0.9, top_k=50, top_p=0.6),
        ),
        ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, Sampling(temperature=1.0, min_p=0.1)),
        ({"top_k": None, "suppress_tokens": None, "max_length": 4096}, Sampling(top_k=50)),
        ({"max_new_tokens": 7, "min_new_tokens": 2}, Sampling(7, top_k=50, min_new_tokens=2)),
        (
            {"suppress_tokens": [1, 2], "begin_suppress_tokens": [3], "forced_eos_token_id": 4},
            Sampling(top_k=50, suppress_tokens=(1, 2), begin_suppress_tokens=(3,), forced_eos_token_id=(4,)),
        ),
    ],
)
def test_what_a_checkpoint_says(settings: dict[str, Any], expected: Sampling) -> None:
    assert checkpoint_sampling(settings) == expected
    require_supported(settings)


def test_where_it_is_said(tmp_path) -> None:
    silent = {
        "config.json": '{"do_sample": true, "text_config": {"repetition_penalty": 1.3, "do_sample": false}}'
    }
    assert bundle_sampling(bundle_of_files(tmp_path, silent)) == Sampling(
        temperature=1.0, top_k=50, repetition_penalty=1.3
    )
    said = silent | {"generation_config.json": "{}"}
    assert bundle_sampling(bundle_of_files(tmp_path, said)) == Sampling(top_k=50)


def test_nothing_of_it_depends_on_the_family(tmp_path) -> None:
    made = bundle_of_files(tmp_path, {"generation_config.json": '{"do_sample": true, "top_p": 0.8}'})
    found = {
        bundle_sampling(replace(made, manifest=replace(made.manifest, family=name))) for name in FAMILIES
    }
    assert found == {Sampling(temperature=1.0, top_k=50, top_p=0.8)}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2},
        {"max_time": 1.5},
        {"bad_words_ids": [[3]]},
        {"min_length": 9},
        {"guidance_scale": 1.5},
        {"stop_strings": "\n"},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "eta_cutoff": 1e-3},
    ],
)
def test_what_nothing_here_does_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ResPruneError) as caught:
        require_supported(settings)
    assert next(name for name in settings if name != "do_sample") in one_sentence(caught.value)


def test_what_changes_nothing_is_let_pass() -> None:
    require_supported(
        {
            "num_beams": 1,
            "typical_p": 1.0,
            "bad_words_ids": None,
            "min_length": 0,
            "encoder_repetition_penalty": 1.0,
        }
    )
    require_supported({"do_sample": False, "typical_p": 0.5})  # only read where tokens are drawn


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"no_repeat_ngram_size": -1},
        {"min_new_tokens": None},
        {"suppress_tokens": 3},
        {"begin_suppress_tokens": ["x"]},
        {"forced_eos_token_id": [1.5]},
        {"seed": -1},
        {"seed": "x" * 1000},
    ],
)
def test_wrong_settings_name_themselves(wrong: dict[str, Any], tmp_path) -> None:
    (name,) = wrong
    with pytest.raises(ResPruneError, match=name) as caught:
        Sampling().changed(wrong)
    one_sentence(caught.value)


def test_a_setting_there_is_not_is_named() -> None:
    with pytest.raises(ResPruneError, match="there is no setting do_sample"):
        Sampling().changed({"do_sample": True})


def test_a_bundle_with_a_wrong_setting_says_where(tmp_path) -> None:
    bundle = bundle_of_files(tmp_path, {"generation_config.json": '{"repetition_penalty": "x"}'})
    with pytest.raises(ResPruneError, match=re.escape("generation_config.json in ")):
        bundle_sampling(bundle)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": '{"eos_token_id": 2}', "config.json": '{"eos_token_id": 5}'}, {2}),
        ({"generation_config.json": '{"eos_token_id": [2, 7]}'}, {2, 7}),
        ({"generation_config.json": "{}", "config.json": '{"text_config": {"eos_token_id": 0}}'}, {0}),
    ],
)
def test_end_tokens(tmp_path, files: dict[str, str], expected: set[int]) -> None:
    assert eos_token_ids(bundle_of_files(tmp_path, files)) == expected


def test_a_checkpoint_without_an_end_token_is_refused(tmp_path) -> None:
    with pytest.raises(ResPruneError, match="eos_token_id"):
        eos_token_ids(bundle_of_files(tmp_path, {"config.json": "{}"}))
