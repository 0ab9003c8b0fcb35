"""One token from logits: what transformers' own processors leave, and draws that follow it."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from resprune.runtime.choose import Chooser, probabilities
from resprune.runtime.errors import FailedError, ResPruneError
from resprune.runtime.sampling import Sampling, checkpoint_sampling

VOCABULARY, EOS = 12, (2, 5)


def chosen(sampling: Sampling, logits: np.ndarray, prompt: list[int] = ()) -> list[int]:
    choose = Chooser(sampling, [list(prompt)] * logits.shape[1], frozenset(EOS))
    return [choose(step).tolist() for step in logits]


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    """Any model: only what it makes of a `GenerationConfig` is asked of it."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def their_processors(model: LlamaForCausalLM, config: GenerationConfig, prompt: list[int]) -> Any:
    """What `generate` would run the logits through, after it has filled the settings in."""
    config, kwargs = model._prepare_generation_config(config)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    config.max_length = len(prompt) + config.max_new_tokens
    return config, model._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(prompt), device="cpu", model_kwargs=kwargs
    )


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.01, 0.5, 0.9, 1.0, 2.5]),
        "top_k": st.integers(0, VOCABULARY + 3),
        "top_p": st.sampled_from([0.0, 0.05, 0.5, 0.73, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.05, 3.0]),
        "no_repeat_ngram_size": st.integers(0, 4),
        "min_new_tokens": st.integers(0, 4),
        "suppress_tokens": st.lists(st.integers(0, VOCABULARY + 2), max_size=3, unique=True),
        "begin_suppress_tokens": st.lists(st.integers(0, VOCABULARY - 1), max_size=3, unique=True),
        "forced_eos_token_id": st.sampled_from([2, [2], [5, 2]]),
    },
)


@settings(max_examples=250, deadline=None)
@given(SETTINGS, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_step_by_step_as_generate_processes(
    theirs: LlamaForCausalLM, said: dict[str, Any], prompt: list[int], seed: int
) -> None:
    """Greedy tokens are equal; drawn ones have the probabilities that theirs have."""
    if said.get("do_sample") and said.get("forced_eos_token_id") == [5, 2]:
        said = said | {
            "forced_eos_token_id": 5
        }  # equal scores, whose order in the nucleus torch.sort leaves open
    assume(
        "forced_eos_token_id" not in said or not {2, 5} & set(said.get("suppress_tokens", []))
    )  # they refuse
    steps = 5
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(steps, 1, VOCABULARY)).astype(np.float32) * 3
    config, processors = their_processors(
        theirs, GenerationConfig(**said, eos_token_id=list(EOS), max_new_tokens=steps), prompt
    )
    sampling = checkpoint_sampling(said).changed({"max_new_tokens": steps, "seed": seed})
    choose, ids = Chooser(sampling, [prompt], frozenset(EOS)), list(prompt)
    for step in logits:
        scores = processors(torch.tensor([ids]), torch.tensor(step.copy()))
        assume(scores.isfinite().any())  # nothing is left to choose
        expected = scores.softmax(-1)[0].numpy()
        ours = choose._processed(step) if sampling.processed else step
        if config.do_sample:
            found = probabilities(ours, sampling)[0]
            assert found == pytest.approx(expected, abs=2e-6)
        (token,) = choose(step).tolist()
        if config.do_sample:
            assert expected[token] > 0
        else:
            assert token == int(scores.argmax())
        ids.append(token)


def test_each_row_of_a_batch_has_its_own_past() -> None:
    logits = np.tile(np.array([3, 2, 0, 1], np.float32), (2, 1))
    choose = Chooser(Sampling(no_repeat_ngram_size=1), [[0], [1]], frozenset())
    assert choose(logits).tolist() == [1, 0]
    assert choose(logits).tolist() == [3, 3]
    assert logits[0].tolist() == [3, 2, 0, 1]  # what the model gave stays as it is


def test_ids_without_a_logit_count_for_nothing() -> None:
    """An image token may stand past the end of the vocabulary."""
    logits = np.array([[[1, 3, 2]]], np.float32)
    sampling = Sampling(repetition_penalty=2.0, no_repeat_ngram_size=1, suppress_tokens=(-1, 99))
    assert chosen(sampling, logits, [1, 77]) == [[2]]


def test_a_plain_greedy_answer_looks_at_nothing_but_the_logits() -> None:
    sampling = checkpoint_sampling({"do_sample": False})
    assert not sampling.processed
    choose = Chooser(sampling, [[1] * 1000], frozenset(EOS))
    assert choose(np.array([[0, 1, 0]], np.float32)).tolist() == [1]
    assert choose._rows == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_say_so(value: float, temperature: float) -> None:
    logits = np.array([[0, value, 1]], np.float32)
    with pytest.raises(FailedError, match=r"logits of answer token 1, so there is no answer"):
        Chooser(Sampling(temperature=temperature), [[]], frozenset())(logits)


def test_settings_that_leave_nothing_say_so() -> None:
    with pytest.raises(ResPruneError, match="leave no token"):
        chosen(Sampling(suppress_tokens=(0, 1), temperature=1.0), np.zeros((1, 1, 2), np.float32))


def test_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    for top_p, inside in [(0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        found = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))[0]
        assert np.flatnonzero(found).tolist() == inside, top_p
        assert found.sum() == pytest.approx(1)
    hot = probabilities(logits, Sampling(temperature=2.0))[0]
    expected = np.sqrt([0.1, 0.5, 0.15, 0.25])
    assert hot == pytest.approx(expected / expected.sum())


def test_sampling_follows_the_probabilities_and_its_seed() -> None:
    logits = np.tile(np.log(np.array([0.2, 0.5, 0.3], np.float32)), (5000, 1))

    def draw(seed: int) -> np.ndarray:
        return Chooser(Sampling(temperature=1.0, seed=seed), [[]] * 5000, frozenset())(logits)

    drawn = draw(3)
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.2, 0.5, 0.3], abs=0.03)
    assert (drawn == draw(3)).all()
    assert (drawn != draw(4)).any()


def test_a_low_temperature_and_a_narrow_nucleus_are_greedy_and_nothing_overflows() -> None:
    logits = np.array([[1e4, -1e4, 1e4 - 1, 0]], np.float32)
    for sampling in (
        Sampling(),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-320),
        Sampling(temperature=5, top_p=1e-9),
    ):
        assert chosen(sampling, logits[None]) == [[0]]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert chosen(Sampling(), np.array([[[1, 3, 3]]], np.float32)) == [[1]]
