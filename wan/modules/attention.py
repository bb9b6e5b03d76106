"""Attention back ends behind one signature, chosen once by name.

Shapes: Lq query tokens, Lk key tokens, N heads, d head width.
`attend(q, k, v)` takes [Lq, N, d], [Lk, N, d], [Lk, N, d] and returns [Lq, N, d] in q's dtype: softmax(q kᵀ / √d) v,
every key attended. Keys that are padding are not masked but cut off by the caller, so every kernel may serve.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, with the kernel PyTorch picks."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through cuDNN's kernel: the fastest of PyTorch's own on some GPUs, the slowest on others."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 2 (package `flash-attn`)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q[None], k[None], v[None])[0]


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn 3 (package `flash_attn_interface`, Hopper only)."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q[None], k[None], v[None])
    return (out[0] if isinstance(out, tuple) else out)[0]  # some versions return (out, log-sum-exp)


BACKENDS: dict[str, Attend] = {"sdpa": sdpa, "cudnn": cudnn, "flash2": flash2, "flash3": flash3}


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the back ends that can run here, `sdpa` first."""
    names = ["sdpa"]
    if device.type != "cuda" or dtype == torch.float32:
        return names
    if torch.backends.cudnn.is_available():
        names.append("cudnn")
    if find_spec("flash_attn"):
        names.append("flash2")
    if find_spec("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        names.append("flash3")
    return names


@cache
def choose(name: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> str:
    """The back end to use: `name`, or for "auto" the one that measures fastest on this device.

    ValueError if `name` cannot run here.
    """
    names = available(device, dtype)
    if name == "auto":
        return names[0] if len(names) == 1 else min(names, key=lambda n: _milliseconds(n, device, dtype, heads, width))
    if name not in names:
        raise ValueError(f"--attention {name} cannot run here: on this machine choose auto, {', '.join(names)}")
    return name


def _milliseconds(name: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> float:
    """Median time of one call on 8,192 tokens; infinite for a kernel that refuses the device or the shape."""
    q = torch.randn(8192, heads, width, device=device, dtype=dtype)
    times = []
    try:
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            BACKENDS[name](q, q, q)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    except RuntimeError:
        return float("inf")  # "no available kernel": one of the others serves
    return sorted(times)[2]
