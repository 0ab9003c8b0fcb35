"""The exported attention against PyTorch's own."""

import pytest
import torch
from torch import nn

from resprune.exporter.trace.attention import grouped_attention


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_grouped_attention_is_scaled_dot_product_attention(heads, groups):
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(2, heads, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, groups, 7, 8, generator=generator)
    mask = torch.where(torch.rand(2, 1, 5, 7, generator=generator) > 0.3, 0.0, -1e30)
    want = nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(
        1, 2
    )
    got = grouped_attention(query, key, value, mask, None, torch.float32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
