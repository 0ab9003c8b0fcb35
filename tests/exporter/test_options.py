"""What may be asked of an export: each value that is none is one sentence, before a checkpoint is looked for."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from resprune.exporter.export import export
from resprune.exporter.options import CHOICES, EarlyRequest, Options
from resprune.method import Selection, SettingError, Settings
from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k should be a whole number from 1, not 0"),
    ({"k": 2.5}, "k should be a whole number from 1, not 2.5"),
    ({"k": None, "share": 0.0}, "share should be above 0 and at most 1, not 0.0"),
    ({"k": None, "share": 7.0}, "share should be above 0 and at most 1, not 7.0"),
    ({"k": None, "share": math.nan}, "share should be above 0 and at most 1, not nan"),
    ({"alpha": -1}, "alpha should be a number from 0, not -1"),
    ({"alpha": math.nan}, "alpha should be a number from 0, not nan"),
    ({"alpha": "1"}, "alpha should be a number from 0, not '1'"),
    ({"scale": "x"}, "scale should be one of minmax, clamp, shifted, not 'x'"),
    ({"body": "x"}, "body should be one of loop, unrolled, not 'x'"),
    ({"form": "x"}, "form should be one of quadratic, linear, not 'x'"),
    ({"positions": "x"}, "positions should be one of contiguous, original, not 'x'"),
    ({"attention": "proportinal"}, "attention should be one of plain, proportional, not 'proportinal'"),
    ({"optimize": "foo"}, "optimize should be one of ort, not 'foo'"),
    ({"verify": "ful"}, "verify should be one of auto, full, layers, not 'ful'"),
    ({"verify": None}, "verify should be one of auto, full, layers, not None"),
    ({"gguf": "q4"}, "gguf should be one of f32, f16, q8_0, not 'q4'"),
    ({"block": 48}, "block should be one of 32, 64, 128, not 48"),
    ({"max_pixels": 0}, "--max-pixels 0 is no size of an image"),
    ({"early": "8"}, "--early 8 is not LAYER:TOKENS"),
    ({"dtype": "fp12"}, "fp12 is no precision"),
    ({"k": None}, "give the tokens to keep either as a number or as a share"),
    ({"share": 0.5}, "give the tokens to keep either as a number or as a share"),
]


@pytest.mark.parametrize(("options", "says"), WRONG)
def test_a_value_that_is_none_is_one_sentence(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ResPruneError) as refused:
        export(str(tmp_path / "none"), tmp_path / "out", Options(**{"k": 3} | options))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


def test_every_word_that_is_chosen_is_judged() -> None:
    """Of a new field that is one of some words, its choices are to stand in the table, or its rule in `Settings`."""
    free = {"dtype", "early", "chat_template", "revision", "command"}
    words = {field.name for field in dataclasses.fields(Options) if "str" in str(field.type)} - free
    judged = {name for options, _ in WRONG for name in options}
    assert words <= judged
    assert CHOICES.keys() <= judged


@pytest.mark.parametrize("wrong", [{"share": 7.0}, {"alpha": math.nan}, {"scale": "x"}, {"k": 0}])
def test_no_selection_is_made_of_it_either(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Selection(**{"k": 3} | wrong)


@pytest.mark.parametrize("most", ["num_tokens", "max_tokens"])
def test_no_selection_keeps_more_than_there_are(most: str) -> None:
    assert Selection(k=9, **{most: 9}).k == 9
    with pytest.raises(SettingError, match=f"k should be at most {most} = 8"):
        Selection(k=9, **{most: 8})


def test_what_is_not_asked_is_the_default() -> None:
    defaults = {"k": 4, "alpha": 0.5, "form": "linear", "num_tokens": 16}
    assert Settings().settle(**defaults) == Selection(**defaults)
    asked = Options(share=0.5, alpha=0, scale="clamp", positions="original").settle(**defaults)
    assert asked == Selection(**defaults | {"share": 0.5, "alpha": 0, "scale": "clamp"})


@pytest.mark.parametrize(
    ("text", "layer", "tokens"),
    [("8:288", Budget(8), Budget(288)), ("33%:11.1%", Budget(share=0.33), Budget(share=0.111))],
)
def test_both_halves_of_early_are_budgets(text: str, layer: Budget, tokens: Budget) -> None:
    assert EarlyRequest.parse(text) == EarlyRequest(layer, tokens)


@pytest.mark.parametrize("text", ["8", "8:", ":8", "8:0", "0%:8", "all:8", "8:all", "8:9:10", "8:101%"])
def test_what_is_not_two_budgets_is_refused(text: str) -> None:
    with pytest.raises(ResPruneError, match="is not LAYER:TOKENS; give numbers from 1"):
        EarlyRequest.parse(text)


def test_a_selection_has_a_number_of_tokens() -> None:
    with pytest.raises(TypeError, match="k"):
        Selection()  # type: ignore[call-arg]
