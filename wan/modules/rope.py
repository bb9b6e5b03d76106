"""Rotary position embedding over the three axes of the token grid.

Shapes: L tokens, N heads, d head width. Token order is (frame, row, column).
"""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


@lru_cache(maxsize=1)  # plans count one table
def rotary_table(grid: tuple[int, int, int], head_width: int, start: int, stop: int, device: torch.device) -> Tensor:
    """(cos, sin) of every pair's angle for tokens `start` to `stop` of a (frames, rows, columns) grid.

    float32 [stop - start, d / 2, 2], made from float64 angles. Of the c = d/2 pairs, c // 3 turn with the row, c // 3
    with the column and the rest with the frame, each axis with its own frequencies theta^(-2j / axis width)
    (RoFormer, arXiv 2104.09864, eq. 15). Tokens past the grid's end get angle 0: they are padding.
    """
    rows, columns = grid[1:]
    real = grid[0] * rows * columns
    token = torch.arange(start, stop, dtype=torch.int64)
    position = [token // (rows * columns), token // columns % rows, token % columns]
    third = head_width // 2 // 3
    pairs = [head_width // 2 - 2 * third, third, third]
    angles = [
        torch.outer(p.double(), THETA ** (-torch.arange(n, dtype=torch.float64) / n))
        for p, n in zip(position, pairs, strict=True)
    ]
    angle = torch.cat(angles, dim=1) * (token < real)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each adjacent pair of a head's channels by its angle: float32 [L, N, d] and [L, d/2, 2] -> [L, N, d].

    It is a product of complex numbers. PyTorch has a fast kernel for it, which overwrites `x`; its compiler makes no
    code for complex numbers, but fuses the product written out, of which the last bit may differ.
    """
    pairs, turns = x.unflatten(-1, (-1, 2)), table[:, None]
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs).mul_(torch.view_as_complex(turns))).flatten(-2)
