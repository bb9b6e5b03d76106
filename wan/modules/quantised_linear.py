"""Linear layers whose weights are in 8 bits: half the bytes of bf16, and where the hardware multiplies them, half the
time.

    y = x Wᵀ + b,  W = (weight * scale) R      weight e4m3 or int8 [O, I], a float32 scale for each of O outputs

R is the identity for e4m3. For int8, whose steps are as wide for small numbers as for large ones, it spreads single
large channels over a group of them before both operands are rounded: blocks of a Hadamard matrix, so R R = 1 and
(x R) (W R)ᵀ = x Wᵀ (ConvRot's, arXiv 2512.03673). Shapes: R rows (tokens), I and O channels in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.modules.fused import EAGER, FP8, quantise

ROWS_AT_ONCE = 2048  # at a time: eager, quantising takes their float32, and int8 the sums of a product
GROUPS = (256, 64, 16)  # channels that R mixes: the first that divides the width
FEWEST_ROWS = 17  # of CUDA's int8 product
RIGHT_PRODUCT = 1e-2  # against the same numbers multiplied in float32: a result in bf16 is off by 2^-9 at most


class QuantisedRows(NamedTuple):
    """Rows [R, I] as 8-bit `q` times `scale`, float32 [R, 1]; `dtype` is what they were, and what products are in."""

    q: Tensor
    scale: Tensor
    dtype: torch.dtype


class Kernel(NamedTuple):
    """The product of numbers in 8 bits. multiple: of channels that it takes; all published networks have such."""

    dtype: torch.dtype
    multiple: int
    product: Callable[[QuantisedLinear, QuantisedRows], Tensor]


class QuantisedLinear(nn.Linear):
    """A linear layer with its weights in 8 bits; the bias, what comes in and what goes out are as without."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        form: str,
        rotation: int | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        """form: of KERNELS. rotation: see `rotation_of`."""
        super().__init__(inputs, outputs, device=device)
        dtype = KERNELS[form].dtype
        self.form, self.rotation = form, rotation_of(dtype, inputs, rotation)
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device), requires_grad=False)
        scale = torch.empty(outputs, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.passes = EAGER

    @property
    def dtypes(self) -> tuple[tuple[str, torch.dtype], ...]:
        """The parameters for which the run's does not matter."""
        return ("weight", KERNELS[self.form].dtype), ("weight_scale", torch.float32)

    def forward(self, x: Tensor | QuantisedRows) -> Tensor:
        """[R, I] -> [R, O] in x's dtype: in 8 bits where the device can, else with the weights in x's dtype."""
        if isinstance(x, QuantisedRows) or self.multiplies(x):
            return self.product(x if isinstance(x, QuantisedRows) else self.quantised(x))
        weight = self.weight.to(x.dtype).mul_(self.weight_scale[:, None])
        return F.linear(x, rotated(weight, self.rotation), self.bias)

    def multiplies(self, x: Tensor) -> bool:
        """Whether the product with x is one in 8 bits."""
        odd = any(size % KERNELS[self.form].multiple for size in self.weight.shape)
        return not odd and multiplies(self.form, x.device, x.dtype)

    def quantised(self, x: Tensor) -> QuantisedRows:
        """Each row of x R [R, I] with a scale of its own."""
        q = x.new_empty(x.shape, dtype=self.weight.dtype)
        scale = x.new_empty(len(x), 1, dtype=torch.float32)
        for share in zip(*(each.split(ROWS_AT_ONCE) for each in (x, q, scale)), strict=True):
            self.passes.quantise(rotated(share[0], self.rotation), *share[1:])
        return QuantisedRows(q, scale, x.dtype)

    def product(self, x: QuantisedRows) -> Tensor:
        """The product in 8 bits."""
        return KERNELS[self.form].product(self, x)

    def fp8_product(self, x: QuantisedRows) -> Tensor:
        """Tensor cores of compute capability 8.9 and 9.0 keep fewer bits of float32 sums, a tenth of what rounding to
        fp8 costs: sums are not promoted on the way (`use_fast_accum`)."""
        return torch._scaled_mm(
            x.q, self.weight.t(), scale_a=x.scale, scale_b=self.weight_scale[None], bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip

    def int8_product(self, x: QuantisedRows) -> Tensor:
        """Exact sums in int32, then scales and bias in float32, rounded once."""
        out = x.q.new_empty(len(x.q), self.out_features, dtype=x.dtype)
        for q, scale, rows in zip(*(each.split(ROWS_AT_ONCE) for each in (x.q, x.scale, out)), strict=True):
            enough = q if len(q) >= FEWEST_ROWS else F.pad(q, (0, 0, 0, FEWEST_ROWS - len(q)))
            sums = torch._int_mm(enough, self.weight.t())[: len(q)]
            self.passes.scale_sums(sums, scale, self.weight_scale, self.bias, rows)
        return out


KERNELS = {
    "fp8": Kernel(FP8, 16, QuantisedLinear.fp8_product),
    "int8": Kernel(torch.int8, 8, QuantisedLinear.int8_product),
}
EIGHT_BITS = [each.dtype for each in KERNELS.values()]


def rotation_of(dtype: torch.dtype, inputs: int, stored: int | None = None) -> int:
    """Channels that are mixed before a weight of this width is rounded to `dtype`, 0 for none. stored: those of a file
    whose int8 numbers can be taken as they are."""
    usual = next((size for size in GROUPS if inputs % size == 0), 0)
    return 0 if dtype != torch.int8 else usual if stored is None else stored


@cache
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, size], a Kronecker power of H4, orthogonal and symmetric; size: a power of 4."""
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    made = h4
    while len(made) < size:
        made = torch.kron(h4, made)
    return made.to(device, dtype)


def rotated(x: Tensor, size: int) -> Tensor:
    """x R of x [R, I], `size` channels at a time; twice is x again. size: 0 for x as it is."""
    return (x.reshape(-1, size) @ hadamard(size, x.device, x.dtype)).view(x.shape) if size else x


def round_rows(x: Tensor, rotation: int, q: Tensor, scale: Tensor) -> None:
    """A weight's rows x [R, I], rotated in float32, as 8-bit q [R, I] times float32 scale [R, 1]."""
    quantise(rotated(x.float(), rotation) if rotation else x, q, scale)


def shared(x: Tensor, *layers: nn.Module) -> Tensor | QuantisedRows:
    """x [R, I] as the input of all these layers: quantised once if each of them multiplies in 8 bits."""
    alike = [layer for layer in layers if isinstance(layer, QuantisedLinear) and layer.multiplies(x)]
    same = len({layer.rotation for layer in alike}) == 1  # a file may have rotated some
    return alike[0].quantised(x) if same and len(alike) == len(layers) else x


def working_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The most that a product of one of the model's quantised layers takes beside its input and result: the weight
    unpacked (and rotated), or rows while they are quantised and multiplied. Not counted are inputs in 8 bits, half of
    what attention keeps in their place."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    taken = []
    for layer in layers:
        unpacked = layer.weight.numel() * dtype.itemsize * (2 if layer.rotation else 1)
        summed = 8 * layer.out_features if layer.form == "int8" else 0  # int32, float32
        taken.append(max(unpacked, ROWS_AT_ONCE * max((8 if layer.rotation else 4) * layer.in_features, summed)))
    return max(taken, default=0)


def multiplies(form: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies such numbers with a scale per row, into `dtype`."""
    return not why_unpacked(form, device, dtype)


@cache
def why_unpacked(form: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the device does not multiply such numbers with a scale per row into `dtype`; empty if it does. Kernels for it
    came with PyTorch's releases, for one kind of GPU after the other; some releases have but one scale per tensor for a
    GPU. So a product is tried, and must be right. Its rows are an odd number, and enough for the kernels that a run
    has; half of them are +-1, as kernels without int8 products add pairs in 16 bits."""
    if form == "fp8":
        if device.type != "cuda":
            return "no CUDA GPU"
        if dtype != torch.bfloat16:
            return "products in fp8 are for bf16"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return f"compute capability {capability[0]}.{capability[1]}: GPUs multiply fp8 from 8.9 on"
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 512, generator=generator) for rows in (2077, 2048))
    for each in (x, weight):
        each[::2].sign_()
    try:
        error = product_error(form, x.to(device, dtype), weight.to(device))
    except Exception as e:  # noqa: BLE001 - what a kernel that is missing fails with depends on the release
        return f"PyTorch {torch.__version__} has no such product for this device: {' '.join(str(e).split())[:100]}"
    return "" if error < RIGHT_PRODUCT else f"the product of PyTorch {torch.__version__} is wrong on this device"


def in_8_bits(form: str, weight: Tensor, bias: Tensor, rotation: int | None = None) -> QuantisedLinear:
    """The layer of a weight [O, I] and a bias [O], on the device they are on."""
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], form, rotation, weight.device)
    round_rows(weight, layer.rotation, layer.weight, layer.weight_scale[:, None])
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def product_error(form: str, x: Tensor, weight: Tensor) -> float:
    """Root mean square error of x [R, I] times weightᵀ [I, O] in 8 bits, against the same numbers in float32."""
    layer = in_8_bits(form, weight, x.new_zeros(len(weight)), rotation=0)
    given = layer.quantised(x)
    exact = (given.q.float() * given.scale) @ (layer.weight.float() * layer.weight_scale[:, None]).t()
    return ((layer.product(given).float() - exact).norm() / exact.norm()).item()


def scale_name(weight: str) -> str:
    """Name of the scales of the parameter `weight`, here and in LightX2V's files."""
    return f"{weight}_scale"
