"""Linear layers whose weights are fp8: half the bytes of bf16, and where the hardware multiplies fp8, half the time.

    y = x Wᵀ + b,  W = weight * scale      weight e4m3 [O, I], a float32 scale for each of O outputs

Shapes: R rows (tokens), I and O channels in and out.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.fused import EAGER, FP8, quantise

QUANTISED_ROWS = 2048  # quantised at a time: eager, that takes their float32
MULTIPLE = 16  # of channels, for the kernels; all published networks have such
RIGHT_PRODUCT = 1e-2  # against the same fp8 numbers multiplied in float32: a result in bf16 is off by 2^-9 at most


class Quantised(NamedTuple):
    """Rows [R, I] as e4m3 `q` times a float32 `scale` [R, 1]; `dtype` is what they were, and what products are in."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


class Fp8Linear(nn.Linear):
    """A linear layer with its weights in fp8; the bias, what comes in and what goes out are as without."""

    DTYPES = ("weight", FP8), ("weight_scale", torch.float32)  # of the parameters for which the run's does not matter

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "meta") -> None:
        super().__init__(inputs, outputs, device=device)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=FP8, device=device), requires_grad=False)
        scale = torch.empty(outputs, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.passes = EAGER

    def forward(self, x: Tensor | Quantised) -> Tensor:
        """[R, I] -> [R, O] in x's dtype: in fp8 where the device can, else with the weights in x's dtype."""
        if isinstance(x, Quantised) or self.multiplies(x):
            return self.product(x if isinstance(x, Quantised) else self.quantised(x))
        return F.linear(x, self.weight.to(x.dtype).mul_(self.weight_scale[:, None]), self.bias)

    def multiplies(self, x: Tensor) -> bool:
        """Whether the product with x is one in fp8."""
        return multiplies_fp8(x.device, x.dtype) and not any(size % MULTIPLE for size in self.weight.shape)

    def quantised(self, x: Tensor) -> Quantised:
        """Each row of x [R, I] with a scale of its own."""
        q, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
        for share in zip(*(each.split(QUANTISED_ROWS) for each in (x, q, scale)), strict=True):
            self.passes.quantise(*share)
        return Quantised(q, scale, x.dtype)

    def product(self, x: Quantised) -> Tensor:
        """The product in fp8. Tensor cores of compute capability 8.9 and 9.0 keep fewer bits of float32 sums, a tenth
        of what rounding to fp8 costs: sums are not promoted on the way (`use_fast_accum`)."""
        return torch._scaled_mm(
            x.q, self.weight.t(), scale_a=x.scale, scale_b=self.weight_scale[None], bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip


def shared(x: Tensor, *layers: nn.Module) -> Tensor | Quantised:
    """x [R, I] as the input of all these layers: quantised once if each of them multiplies in fp8."""
    alike = [layer for layer in layers if isinstance(layer, Fp8Linear) and layer.multiplies(x)]
    return alike[0].quantised(x) if len(alike) == len(layers) else x


def working_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The most that a product of one of the model's fp8 layers takes beside its input and result: the weight unpacked,
    or rows while they are quantised. Not counted are inputs in fp8, half of what attention keeps in their place."""
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    taken = [layer.in_features * max(layer.out_features * dtype.itemsize, QUANTISED_ROWS * 4) for layer in layers]
    return max(taken, default=0)


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies fp8 with a scale a row, into `dtype`."""
    return not why_unpacked(device, dtype)


@cache
def why_unpacked(device: torch.device, dtype: torch.dtype) -> str:
    """Why the device does not multiply fp8 with a scale a row into `dtype`; empty if it does. Kernels for it came with
    PyTorch's releases, for one kind of GPU after the other; some releases have but one scale a tensor for a GPU. So a
    product is tried, and must be right. Its rows are an odd number, and enough for the kernels that a run has."""
    if device.type != "cuda":
        return "no CUDA GPU"
    if dtype != torch.bfloat16:
        return "products in fp8 are for bf16"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]}: GPUs multiply fp8 from 8.9 on"
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 512, generator=generator) for rows in (2077, 2048))
    try:
        error = product_error(x.to(device, dtype), weight.to(device))
    except Exception as e:  # noqa: BLE001 - what a kernel that is missing fails with depends on the release
        return f"PyTorch {torch.__version__} has no such product for this GPU: {' '.join(str(e).split())[:100]}"
    return "" if error < RIGHT_PRODUCT else f"the product of PyTorch {torch.__version__} is wrong on this GPU"


def in_fp8(weight: Tensor, bias: Tensor) -> Fp8Linear:
    """The layer of a weight [O, I] and a bias [O], on the device they are on."""
    layer = Fp8Linear(weight.shape[1], weight.shape[0], weight.device)
    quantise(weight, layer.weight, layer.weight_scale[:, None])
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def product_error(x: Tensor, weight: Tensor) -> float:
    """Root mean square error of x [R, I] times weightᵀ [I, O] in fp8, against the same fp8 numbers in float32."""
    layer = in_fp8(weight, x.new_zeros(len(weight)))
    given = layer.quantised(x)
    exact = (given.q.float() * given.scale) @ (layer.weight.float() * layer.weight_scale[:, None]).t()
    return ((layer.product(given).float() - exact).norm() / exact.norm()).item()


def scale_name(weight: str) -> str:
    """Name of the scales of the parameter `weight`, here and in LightX2V's files."""
    return f"{weight}_scale"
