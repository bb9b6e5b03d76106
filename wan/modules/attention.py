"""Attention back ends behind one signature, chosen once by name.

Shapes: Lq query tokens, Lk key tokens, N heads, d head width.
`attend(q, k, v)` takes [Lq, N, d], [Lk, N, d], [Lk, N, d] and returns [Lq, N, d] in q's dtype: softmax(q kᵀ / √d) v,
every key attended. Keys that are padding are not masked but cut off by the caller, so every kernel may serve.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.utils.errors import InputError, first_line

aten = torch.ops.aten
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel PyTorch picks."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own flash kernel, called as such: `sdpa_kernel` would set flags of the whole process."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v)[0][0].transpose(0, 1)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's kernel: the fastest of PyTorch's own on some GPUs, the slowest on others."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0][0].transpose(0, 1)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 2 (package `flash-attn`)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q[None], k[None], v[None])[0]


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 3 (package `flash_attn_interface`, Hopper only)."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q[None], k[None], v[None])
    return (out[0] if isinstance(out, tuple) else out)[0]  # some versions return (out, log-sum-exp)


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention 2 (package `sageattention`): queries and keys in 8 bits, so another result than all the others'."""
    return _sage_kernel()(q[None], k[None], v[None], tensor_layout="NHD", is_causal=False)[0]


@cache
def _sage_kernel() -> Callable[..., Tensor]:
    """Not of version 1: it overwrites the keys, which others still need, and where their number is no multiple of 64
    it attends to the missing ones, as if they were zeros."""
    from sageattention import sageattn

    found = version("sageattention")
    if int(found.partition(".")[0]) < 2:
        raise ImportError(f"sageattention {found} attends to keys that are not there; build version 2")
    return sageattn


BACKENDS: dict[str, Attend] = {each.__name__: each for each in (sdpa, flash, cudnn, flash2, flash3, sage)}
# Change the numbers: never taken unless named. Bytes that each adds per channel of a token: SageAttention 8 bits of
# queries, keys and values and, on compute capability 9.0, where it takes most, two copies of values in 16 bits.
QUANTISED = {"sage": 7}
WRONG_RESULT = "its result is wrong on this GPU"
RIGHT = 0.1  # of a result's length: farther from the formula is no rounding, not even to 8 bits


class Choice(NamedTuple):
    name: str
    warnings: tuple[str, ...] = ()  # a sentence for each that was left out because it failed


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the back ends that are installed and made for this device, `sdpa` first. They may still fail."""
    if device.type != "cuda" or dtype == torch.float32:
        return ["sdpa"]
    generation = torch.cuda.get_device_capability(device)[0]
    usable = {
        "sdpa": True,
        "flash": generation >= 8,
        "cudnn": torch.backends.cudnn.is_available(),
        "flash2": find_spec("flash_attn"),
        "flash3": find_spec("flash_attn_interface") and generation == 9,
        "sage": find_spec("sageattention") and generation >= 8,
    }
    return [name for name, here in usable.items() if here]


@cache
def choose(name: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> Choice:
    """The back end to use: `name`, or for "auto" the one that measures fastest of those that compute exactly. One that
    cannot be imported, fails its first call or computes something else is left out; InputError if `name` is."""
    names = available(device, dtype)
    if name not in ("auto", *names):
        raise InputError(f"--attention {name} cannot run here: on this machine choose auto, {', '.join(names)}")
    exact = [each for each in names if each not in QUANTISED]
    if name == "sdpa" or (name == "auto" and exact == ["sdpa"]):
        return Choice("sdpa")
    times, failed = {}, {}
    for each in exact if name == "auto" else [name]:
        try:
            times[each] = _milliseconds(BACKENDS[each], device, dtype, heads, width)
        except Exception as e:  # noqa: BLE001 - what a foreign package or kernel fails with cannot be known
            failed[each] = f"{type(e).__name__}: {first_line(e)}"
    if name in failed:
        raise InputError(f"--attention {name} fails here ({failed[name]}): choose auto or sdpa")
    reasons = [f"attention {each} is left out: {reason}" for each, reason in failed.items()]
    if times:
        return Choice(min(times, key=lambda each: times[each]), tuple(reasons))
    if WRONG_RESULT not in failed["sdpa"]:
        raise InputError(f"--attention auto: no back end works on this GPU ({'; '.join(reasons)})")
    return Choice("sdpa", (*reasons, "attention sdpa is used all the same: see what `python -m wan.doctor` says"))


def _milliseconds(attend: Attend, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> float:
    """Median time of one call on 8,192 tokens. Fails as the back end does, with few keys (the text's) or many."""
    q = torch.randn(8192, heads, width, device=device, dtype=dtype)
    for keys in (q[:512], q):
        _check(attend(q, keys, keys), q, keys)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attend(q, q, q)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2]


def _check(found: Tensor, q: Tensor, k: Tensor) -> None:
    """ValueError if the ends of `found`, attention to keys that are their own values, are not what the formula gives:
    kernels have been released that are wrong on one kind of GPU."""
    for rows in (slice(0, 32), slice(-32, None)):
        scores = torch.einsum("qnd,knd->nqk", q[rows].float(), k.float()) * q.shape[-1] ** -0.5
        exact = torch.einsum("nqk,knd->qnd", scores.softmax(-1), k.float())
        if not (found[rows].float() - exact).norm() <= RIGHT * exact.norm():  # NaN compares false
            raise ValueError(WRONG_RESULT)
