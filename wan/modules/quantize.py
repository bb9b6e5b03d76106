"""Weights as 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa, up to 448) with one scale per row: W = q * scale.

Shapes: R rows (a weight's output channels, or tokens), I columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST = 1e-12  # taken for a row's largest magnitude where it is smaller: a row of zeros has a scale too
NAN = 0x7F  # of e4m3, beside the sign; the format has no infinities


def quantise(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """x [R, I] as e4m3 q [R, I] times float32 scale [R, 1]: each row's largest magnitude becomes the format's largest.

    In float32 up to the one rounding to q, so that the result is the same on every device and for any share of rows.
    """
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale.copy_(largest.clamp_(min=LEAST) / LARGEST)
    q.copy_(x / scale)


def is_finite(q: Tensor) -> bool:
    """Whether e4m3 numbers hold no NaN."""
    return not (q.view(torch.uint8) & NAN == NAN).any()


def scale_name(weight: str) -> str:
    """What the scales of the parameter `weight` are called, here and in LightX2V's files."""
    return f"{weight}_scale"
