"""The passes over rows of tokens between the transformer's matrix products: norms, modulation, rotation, residuals.

Shapes: R rows (tokens), D width, d head width. Rows do not depend on each other, so a pass may be given any share of
them. A pass reads and writes memory far longer than it computes. PyTorch's compiler makes one kernel of each, which
reads its inputs once and writes its output once; without a compiler the same functions run operation by operation, on
a CPU for a strip of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.utils.errors import first_line

FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST = {FP8: torch.finfo(FP8).max, torch.int8: 127.0}
STRIP = 1 << 16  # numbers of a pass's rows that a core takes at a time: four tensors of float32 fit its second cache
LEAST = 1e-12  # taken for a row's largest magnitude where it is smaller: a row of zeros has a scale too


def norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor) -> None:
    """out [R, D] = LayerNorm(x) * scale + shift with rows [D], rounded once, to out's dtype."""
    _into(out, torch.addcmul, shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def add(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """x += y * gate, into the float32 x [R, D]; gate [D]."""
    x.addcmul_(y, gate)


def add_norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> None:
    """`add`, then `norm` of the sum into y."""
    add(x, y, gate)
    norm(x, scale, shift, eps, y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """x [R, D] = x / rms(x) * weight (arXiv 1910.07467): float32 statistics, rounded to x's dtype, then scaled."""
    _divide_by_rms(x, eps)
    _into(x, torch.mul, x, weight)


def rms_norm_rotate(x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> None:
    """`rms_norm` over the whole width, then each head of x [R, D] turned by rotary [R, d/2, 2], rounded at the end."""
    _divide_by_rms(x, eps)
    scaled = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    _into(scaled, torch.mul, x, weight)
    x.copy_(rotate(scaled.float().unflatten(-1, (-1, 2 * rotary.shape[1])), rotary).flatten(1))


def guide(x: Tensor, away: Tensor, scale: float, tau: float, alpha: float) -> None:
    """x [R, D] led away from `away`, both results of attention (NAG, arXiv 2505.21179): x and scale * x - (scale - 1) *
    away, whose L1 norm is limited to tau times x's in each row, mixed by alpha."""
    plain = x.float()
    guided = (scale * plain).sub_(away, alpha=scale - 1)
    before, after = (torch.linalg.vector_norm(each, ord=1, dim=-1, keepdim=True) for each in (plain, guided))
    limit = (tau * before / after.clamp_(min=LEAST)).clamp_(max=1.0)
    x.copy_(plain.lerp_(guided.mul_(limit), alpha))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each adjacent pair of a head's channels by its angle: float32 [L, N, d] and [L, d/2, 2] -> [L, N, d], a
    product of complex numbers. PyTorch has a fast kernel for it, which overwrites `x`; its compiler makes no code for
    complex numbers, but fuses the product written out, of which the last bit may differ."""
    pairs, turns = x.unflatten(-1, (-1, 2)), table[:, None]
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs).mul_(torch.view_as_complex(turns))).flatten(-2)


def quantise(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """x [R, I] as e4m3 or int8 q [R, I] times float32 scale [R, 1]: each row's largest magnitude becomes the format's.
    In float32 up to the one rounding to q, so that the result is the same on every device and for any share of rows."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scale.copy_(largest.clamp_(min=LEAST) / LARGEST[q.dtype])
    scaled = x / scale
    q.copy_(scaled if q.dtype == FP8 else scaled.round_())


def scale_sums(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor, out: Tensor) -> None:
    """out [R, O] = sums * rows [R, 1] * columns [O] + bias [O] of int32 sums, in float32 and rounded once."""
    out.copy_((sums * rows).mul_(columns).add_(bias))


def _divide_by_rms(x: Tensor, eps: float) -> None:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    _into(x, torch.mul, x, torch.rsqrt(length.square() / x.shape[-1] + eps))


def _into(out: Tensor, operation: Callable[..., Tensor], *operands: Tensor) -> None:
    """out = operation(*operands), computed in float32. A GPU's kernels convert what they read and write; a CPU's are
    several times slower at that than at conversions of their own."""
    if out.is_cpu or torch.compiler.is_compiling():
        out.copy_(operation(*(each.float() for each in operands)))
    else:
        operation(*operands, out=out)


class Passes(NamedTuple):
    norm: Callable[[Tensor, Tensor, Tensor, float, Tensor], None] = norm
    add: Callable[[Tensor, Tensor, Tensor], None] = add
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], None] = add_norm
    rms_norm: Callable[[Tensor, Tensor, float], None] = rms_norm
    rms_norm_rotate: Callable[[Tensor, Tensor, Tensor, float], None] = rms_norm_rotate
    guide: Callable[[Tensor, Tensor, float, float, float], None] = guide
    quantise: Callable[[Tensor, Tensor, Tensor], None] = quantise
    scale_sums: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = scale_sums


def in_strips(each: Callable[..., None]) -> Callable[..., None]:
    """The same pass; on a CPU all its steps over a few rows, then the next ones: what it makes between two steps stays
    in the cores' caches, and is memory that they have had before. Operands with rows have two axes or more."""

    @wraps(each)
    def run(x: Tensor, *operands: Tensor | float) -> None:
        if not x.is_cpu or x.numel() <= STRIP:
            each(x, *operands)
            return
        rows = max(1, STRIP * torch.get_num_threads() // x.shape[1])
        for start in range(0, len(x), rows):
            strip = slice(start, start + rows)
            each(x[strip], *(o[strip] if isinstance(o, Tensor) and o.ndim > 1 else o for o in operands))

    return run


EAGER = Passes(*(in_strips(each) for each in Passes()))

SAVED = 74  # bytes that compiled passes do not move, for each token, channel and layer of a forward (bf16; counted)
RATE = 2e12  # bytes a second of a device's memory, about: cards differ by a factor of five
COMPILING = 20  # seconds at most; a few when the compiler's cache on disk has them
SHAPES = 128  # of rows, times their dtypes, that one process compiles a pass for; what comes after them is not compiled


@cache
def compiled() -> Passes:
    """Each made one kernel by PyTorch's compiler, at its first call and for the shapes of that call."""
    options: dict[str, Any] = {"dynamic": False}
    if "recompile_limit" in signature(torch.compile).parameters:  # there the setting below is the calling thread's own
        options["recompile_limit"] = SHAPES
    else:
        config = torch._dynamo.config
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6's name
        setattr(config, limit, max(SHAPES, getattr(config, limit)))  # its own, 8: two sizes of videos that pin an image
    return Passes(*(torch.compile(each, **options) for each in Passes()))


def choose_passes(device: torch.device, tokens: int, width: int, layers: int, forwards: int) -> tuple[Passes, str]:
    """Compiled passes where a run of this many forwards gains more than compiling takes, and a sentence if they are
    (or, where the compiler fails, why not). A CPU computes for minutes what it would gain seconds on."""
    gain = SAVED * tokens * width * layers * forwards / RATE
    if device.type != "cuda" or not find_spec("triton") or gain < COMPILING:
        return EAGER, ""
    try:
        compiled().add(*(torch.zeros(size, device=device) for size in ((16, width), (16, width), (width,))))
    except Exception as e:  # noqa: BLE001 - a compiler on the user's machine may fail in any way
        return EAGER, f"warning: the passes between matrix products are not compiled ({first_line(e)})"
    note = f"compiling the passes between matrix products: about {COMPILING} s, and {gain:.0f} s less in this run"
    return compiled(), note
