"""Weights in blocks of 8 or 4 bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

A row [K] is cut into blocks that have a scale each, kept in half precision. In 8 bits a number n stands for
(n − 128) · scale. In 4 bits it stands for (n − zero) · scale, with a whole zero for each block, and there are three
ways to lay the 16 levels:

- "symmetric": zero 8, the scale by the number of largest magnitude. Exact for weights that came from Q4_0.
- "integer": from the block's smallest number to its largest, with the zero rounded. Best for weights of any origin.
- "offset": the same, and what rounding the zero took away, one number a block, is kept in further columns of the
  matrix; they are multiplied by the sum of the block's inputs. Exact for weights that came from Q4_1, where a rounded
  zero would shift whole blocks by up to half a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_ROWS = 64
HALF_MAX: float = torch.finfo(torch.float16).max
FITS = ("symmetric", "integer", "offset")


@dataclass(frozen=True)
class Blocks:
    """How a matrix [N, K] is cut: `bits` a number, `size` numbers a block, and for 4 bits the `fit`, one of FITS."""

    bits: int
    size: int
    fit: str = "symmetric"

    @property
    def largest(self) -> float:
        """The largest magnitude of a number whose block has a scale in half precision, by any fit."""
        return ((1 << (self.bits - 1)) - 1) * HALF_MAX

    def columns(self, K: int) -> int:
        """Columns of the matrix as it is multiplied: K, and with offsets one more for each block of it."""
        return K + K // self.size if self.offset(K) else K

    def count(self, K: int) -> int:
        """Blocks of a row."""
        return -(-self.columns(K) // self.size)

    def offset(self, K: int) -> bool:
        """Whether a row of K has offsets; not where its last block is cut off."""
        return self.bits == 4 and self.fit == "offset" and K % self.size == 0

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [N, K] → numbers [N, blocks, size · bits / 8] uint8, scales [N, blocks] half, zeros [N, …] uint8.

        Of two 4-bit numbers the first is in the low half of a byte; so are zeros. In 8 bits all zeros are 128.
        """
        blocks = _cut(rows.float(), self.size)  # [N, blocks, size]
        if self.bits == 8:
            scales = _half(blocks.abs().amax(dim=2) / 127)
            numbers = (blocks / scales.float()[..., None]).round_().clamp_(-127, 127) + 128
            return numbers.to(torch.uint8), scales, torch.full(scales.shape, 128, dtype=torch.uint8)
        offset = self.offset(rows.shape[1])
        fit = "integer" if self.fit == "offset" and not offset else self.fit
        numbers, scales, zeros, left = _four_bits(blocks, fit)
        if offset:
            further = _four_bits(_cut(left, self.size), "symmetric")
            numbers, scales, zeros = (
                torch.cat(pair, dim=1) for pair in zip((numbers, scales, zeros), further[:3], strict=True)
            )
        return _nibbles(numbers), scales, _nibbles(zeros)

    def unpack(self, numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The numbers [N, columns] that packed ones stand for, offset columns and all, in float32."""
        if self.bits == 4:
            numbers, zeros = _apart(numbers), _apart(zeros)[:, : scales.shape[1]]
        return ((numbers.float() - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)

    def values(self, rows: Tensor) -> Tensor:
        """What the rows [N, K] are once they have been packed."""
        K = rows.shape[1]
        whole = self.unpack(*self.pack(rows))
        if not self.offset(K):
            return whole[:, :K]
        return whole[:, :K] + whole[:, K : self.columns(K)].repeat_interleave(self.size, dim=1)


def fit_of(samples: list[Tensor], size: int, *, offsets: bool = True) -> str:
    """The fit of 4 bits for matrices of which some rows are given; offsets, which cost time, if they halve the error.

    One for all of a graph, so that like layers stay alike.
    """
    if not samples:
        return "integer"
    loss = {
        fit: sum(float((Blocks(4, size, fit).values(rows) - rows).square().sum()) for rows in samples)
        for fit in FITS
    }
    best = min(("symmetric", "integer"), key=loss.__getitem__)
    return "offset" if offsets and 4 * loss["offset"] < loss[best] else best


def _cut(rows: Tensor, size: int) -> Tensor:
    """Rows [N, K] as blocks [N, blocks, size], filled up with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return padded.view(len(rows), -1, size)


def _half(scales: Tensor) -> Tensor:
    """Scales in half precision; one for a block of zeros, or of numbers too small for any other."""
    half = scales.to(torch.float16)
    return torch.where(half == 0, torch.ones_like(half), half)


def _four_bits(blocks: Tensor, fit: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks [N, blocks, size] → numbers of that shape, scales, zeros and what is left over, [N, blocks] each."""
    if fit == "symmetric":
        largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))[..., 0]
        low, scales = torch.zeros_like(largest), _half(largest / -8)
        zeros = torch.full_like(low, 8)
        numbers = (blocks / scales.float()[..., None]).round_() + 8
    else:
        low, high = blocks.amin(dim=2), blocks.amax(dim=2)
        if fit == "integer":  # zero itself stays one of the levels' neighbours
            low, high = low.clamp(max=0), high.clamp(min=0)
        scales = _half((high - low) / 15)
        zeros = (-low / scales.float()).round_().clamp_(0, 15)
        numbers = ((blocks - low[..., None]) / scales.float()[..., None]).round_()
        if fit == "integer":
            numbers = (blocks / scales.float()[..., None]).round_() + zeros[..., None]
    left = low + zeros * scales.float()
    return numbers.clamp_(0, 15).to(torch.uint8), scales, zeros.to(torch.uint8), left


def _nibbles(numbers: Tensor) -> Tensor:
    """4-bit numbers [..., n] two to a byte; a last one alone gets 8, which is what a zero is by default."""
    padded = torch.nn.functional.pad(numbers, (0, numbers.shape[-1] % 2), value=8)
    return padded[..., ::2] | (padded[..., 1::2] << 4)


def _apart(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
