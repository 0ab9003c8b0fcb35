"""The entry for PyTorch tensors, with the shapes that a GPU gets, in Triton's interpreter."""

import pytest
import torch

from resprune.exporter.verify.reference import residual_select as reference
from resprune.graphs.kernels.selection import (
    MAX_PROGRAMS,
    MAX_TOKENS,
    constants,
    programs_of_an_image,
    residual_select,
)
from tests.graphs.kernels.interpreted import features, gains


def test_equals_the_reference_without_a_mask():
    visual, gain = features(0, 70, 40), gains(1, 70)
    assert torch.equal(residual_select(visual, gain, 5), reference(visual, gain, 5))


def test_inputs_need_not_be_contiguous_and_gain_not_float32():
    visual, gain = features(2, 40, 24), gains(3, 40).double()
    mask = torch.ones(40, 1, dtype=torch.bool).T
    mask[0, ::3] = False
    transposed = visual.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(residual_select(transposed, gain, 3, mask), reference(visual, gain, 3, mask))


def test_programs_share_the_multiprocessors():
    assert [programs_of_an_image(132, pictures) for pictures in (1, 2, 132, 500)] == [132, 66, 1, 1]
    assert programs_of_an_image(1000, 1) == MAX_PROGRAMS


def test_all_tokens_have_a_block():
    assert 1024 * constants(8, 1, "float32")["TOKENS"] == MAX_TOKENS


def test_arguments_out_of_range_are_refused():
    visual, gain = torch.ones(1, 4, 8), torch.ones(1, 4)
    with pytest.raises(ValueError, match="k must"):
        residual_select(visual, gain, 0)
    with pytest.raises(ValueError, match="float64"):
        residual_select(visual.double(), gain, 1)
    with pytest.raises(ValueError, match="at most 256 programs"):
        residual_select(visual, gain, 1, programs=257)
    with pytest.raises(ValueError, match="at most 32768 tokens"):
        residual_select(torch.ones(1, 1, 1).expand(1, MAX_TOKENS + 1, 1), gain, 1)
