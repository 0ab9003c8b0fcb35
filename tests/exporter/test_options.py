"""What may be asked of an export: each value that is none is one sentence, before a checkpoint is looked for."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resprune.exporter.export import export
from resprune.exporter.options import RULES, EarlyRequest, Options
from resprune.method import Selection, SettingError, Settings
from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError

ALPHA = "alpha should be a number from 0 to 3.40e+38, not "
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k should be a whole number from 1, not 0"),
    ({"k": 2.5}, "k should be a whole number from 1, not 2.5"),
    ({"k": True}, "k should be a whole number from 1, not True"),
    ({"k": "3"}, "k should be a whole number from 1, not '3'"),
    ({"k": None, "share": 0.0}, "share should be above 0 and at most 1, not 0.0"),
    ({"k": None, "share": 7.0}, "share should be above 0 and at most 1, not 7.0"),
    ({"k": None, "share": math.nan}, "share should be above 0 and at most 1, not nan"),
    ({"k": None, "share": True}, "share should be above 0 and at most 1, not True"),
    ({"alpha": -1}, f"{ALPHA}-1"),
    ({"alpha": math.nan}, f"{ALPHA}nan"),
    ({"alpha": math.inf}, f"{ALPHA}inf"),
    ({"alpha": "1"}, f"{ALPHA}'1'"),
    ({"alpha": True}, f"{ALPHA}True"),
    ({"alpha": 1e300}, f"{ALPHA}1e+300"),
    ({"alpha": 10**400}, f"{ALPHA}1000"),
    ({"alpha": 10**5000}, f"{ALPHA}a huge int"),
    ({"scale": "x"}, "scale should be one of minmax, clamp, shifted, not 'x'"),
    ({"scale": None}, "scale should be one of minmax, clamp, shifted, not None"),
    ({"scale": np.zeros(2)}, "scale should be one of minmax, clamp, shifted, not array"),
    ({"body": "x"}, "body should be one of loop, unrolled, not 'x'"),
    ({"form": "x"}, "form should be one of quadratic, linear, not 'x'"),
    ({"positions": "x"}, "positions should be one of contiguous, original, not str 'x'"),
    ({"attention": "proportinal"}, "attention should be one of plain, proportional, not str 'proportinal'"),
    ({"optimize": "foo"}, "optimize should be one of ort, not str 'foo'"),
    ({"optimize": True}, "optimize should be one of ort, not bool True"),
    ({"verify": "ful"}, "verify should be one of auto, full, layers, not str 'ful'"),
    ({"verify": None}, "verify should be one of auto, full, layers, not NoneType"),
    ({"gguf": "q4"}, "gguf should be one of f32, f16, q8_0, not str 'q4'"),
    ({"block": 48}, "block should be one of 32, 64, 128, not 48"),
    ({"block": 32.0}, "block should be a whole number, not float 32.0"),
    ({"max_pixels": 0}, "max_pixels should be 1 to "),
    ({"max_pixels": "x"}, "max_pixels should be a whole number, not str 'x'"),
    ({"max_pixels": 1.5}, "max_pixels should be a whole number, not float 1.5"),
    ({"max_pixels": True}, "max_pixels should be a whole number, not bool True"),
    ({"max_pixels": 10**400}, "max_pixels should be 1 to "),
    ({"early": "8"}, "early '8' is not LAYER:TOKENS"),
    ({"early": "8\n"}, "early '8\\n' is not LAYER:TOKENS"),
    ({"early": 3}, "early should be a string, not int 3"),
    ({"early": b"8:2"}, "early should be a string, not bytes"),
    ({"dtype": "fp12\n"}, "'fp12\\n' is no precision; dtype takes fp32, "),
    ({"dtype": "fp12="}, "dtype 'fp12=': each part should be a component and its precision"),
    ({"dtype": 3}, "dtype should be a string, not int 3"),
    ({"dtype": None}, "dtype should be a string, not NoneType"),
    ({"split": "x"}, "split should be True or False, not str 'x'"),
    ({"language_checkpoint": 1}, "language_checkpoint should be True or False, not int 1"),
    ({"decoder": ""}, "decoder should be True or False, not str ''"),
    ({"force": None}, "force should be True or False, not NoneType"),
    ({"chat_template": 3}, "chat_template should be a Path, not int 3"),
    ({"revision": 3}, "revision should be a string, not int 3"),
    ({"command": None}, "command should be a string, not NoneType"),
    ({"command": "\udcff"}, "command is not valid UTF-8"),
    ({"k": None}, "give the tokens to keep either as a number or as a share"),
    ({"share": 0.5}, "give the tokens to keep either as a number or as a share"),
    ({"optimize": "ort", "dtype": "bf16"}, "optimize makes a decoder of ONNX Runtime's operators"),
    ({"optimize": "ort", "decoder": False}, "optimize is of the decoder"),
    ({"attention": "proportional", "gguf": "f16"}, "a language model by itself is for runtimes"),
]


@pytest.mark.parametrize(("options", "says"), WRONG)
def test_a_value_that_is_none_is_one_sentence(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ResPruneError) as refused:
        export(str(tmp_path / "none"), tmp_path / "out", Options(**{"k": 3} | options))
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    assert "--" not in str(refused.value), "a field has no dashes"
    assert list(tmp_path.iterdir()) == []


def test_every_field_is_judged() -> None:
    """A new one has its rule in `RULES`, or in those of `Settings`, and a wrong value above."""
    names = {field.name for field in dataclasses.fields(Options)}
    assert RULES.keys() | {field.name for field in dataclasses.fields(Settings)} == names
    assert names == {name for options, _ in WRONG for name in options}


def test_numbers_of_numpy_become_pythons() -> None:
    asked = Options(k=np.int64(5), alpha=np.float32(0.5), block=np.int32(64), max_pixels=np.int64(9))  # type: ignore[arg-type]
    checked = asked.check()
    assert checked == Options(k=5, alpha=0.5, block=64, max_pixels=9)
    assert {type(checked.k), type(checked.block), type(checked.max_pixels)} == {int}
    assert type(checked.alpha) is float
    assert type(Selection(k=np.int64(5)).k) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"share": 7.0}, {"alpha": math.nan}, {"scale": "x"}, {"k": 0}, {"counts": "x"}]
)
def test_no_selection_is_made_of_it_either(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Selection(**{"k": 3} | wrong)


@pytest.mark.parametrize("name", ["k", "alpha", "scale", "body", "form", "counts"])
def test_a_selection_leaves_nothing_open(name: str) -> None:
    wrong: dict[str, Any] = {"k": 3, name: None}
    with pytest.raises(SettingError, match=f"{name} should be .*, not None"):
        Selection(**wrong)


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
