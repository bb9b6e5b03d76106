"""Linear layers whose weights are fp8: half the bytes of bf16, and where the hardware multiplies fp8, half the time.

    y = x Wᵀ + b,  W = weight * scale      weight e4m3 [O, I], a float32 scale for each of O outputs

Shapes: R rows (tokens), I and O channels in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning.fp8 import FP8, quantise
from wan.modules.passes import EAGER

ROWS = 2048  # multiplied at a time: enough for a product's full rate, and little memory for their float32
MULTIPLE = 16  # of channels, for the kernels; all published networks have such
# Of products in fp8 against the same numbers in float32: a result in bf16 is off by 2^-9 at most.
RIGHT = 1e-2


class Fp8Linear(nn.Linear):
    """A linear layer with its weights in fp8; the bias, what comes in and what goes out are as without."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "meta") -> None:
        super().__init__(inputs, outputs, device=device)
        self.weight_scale: nn.Parameter
        shapes = {"weight": (outputs, inputs), "weight_scale": (outputs,)}
        for leaf, dtype in self.dtypes():
            memory = torch.empty(shapes[leaf], dtype=dtype, device=device)
            setattr(self, leaf, nn.Parameter(memory, requires_grad=False))
        self.passes = EAGER

    @staticmethod
    def dtypes() -> Iterator[tuple[str, torch.dtype]]:
        """The parameters whose dtype does not depend on the run's, with it."""
        yield "weight", FP8
        yield "weight_scale", torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """[R, I] -> [R, O] in x's dtype: in fp8 where the device can, else with the weights in x's dtype."""
        if not multiplies_fp8(x.device, x.dtype) or any(size % MULTIPLE for size in self.weight.shape):
            return F.linear(x, self.weight.to(x.dtype).mul_(self.weight_scale[:, None]), self.bias)
        out = x.new_empty(len(x), self.out_features)
        for part, result in zip(x.split(ROWS), out.split(ROWS), strict=True):
            self.multiply(part, result)
        return out

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """The product in fp8: each row of x with a scale of its own, sums in float32."""
        q, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
        self.passes.quantise(x, q, scale)
        torch._scaled_mm(
            q, self.weight.t(), scale_a=scale, scale_b=self.weight_scale[None], bias=self.bias, out_dtype=out.dtype,
            use_fast_accum=True, out=out,
        )  # fmt: skip


def working_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The most that a product of one of the model's fp8 layers takes beside its input and result."""
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    unpacked = (layer.in_features * layer.out_features * dtype.itemsize for layer in layers)
    quantised = (layer.in_features * ROWS * (1 + torch.float32.itemsize) for layer in layers)
    return max((*unpacked, *quantised), default=0)


@cache
def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies fp8 with a scale a row, into `dtype`: a small product is tried, and must be right.

    The kernels came with PyTorch's releases, for one kind of GPU after the other, and only for bf16 results.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 128, generator=generator) for _ in range(2))
    try:
        return product_error(x.to(device, dtype), weight.to(device)) < RIGHT
    except Exception:  # noqa: BLE001 - what a kernel that is missing fails with depends on the release
        return False


def in_fp8(weight: Tensor, bias: Tensor) -> Fp8Linear:
    """The layer of a weight [O, I] and a bias [O], on the device they are on."""
    layer = Fp8Linear(weight.shape[1], weight.shape[0], weight.device)
    quantise(weight, layer.weight, layer.weight_scale[:, None])
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def product_error(x: Tensor, weight: Tensor) -> float:
    """Root mean square error of x [R, I] times weightᵀ [I, O] in fp8, against the same fp8 numbers in float32."""
    layer = in_fp8(weight, x.new_zeros(len(weight)))
    q, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
    quantise(x, q, scale)
    exact = (q.float() * scale) @ (layer.weight.float() * layer.weight_scale[:, None]).t()
    found = x.new_empty(exact.shape)
    layer.multiply(x, found)
    return ((found.float() - exact).norm() / exact.norm()).item()
