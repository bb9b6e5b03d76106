"""Products with weights in 8 bits: the hardware's against the same numbers in float32, and what either is off by."""

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.modules.test_model import random_model
from wan.checkpoints.safetensors_file import TensorStore
from wan.doctor.numerics import rms_error
from wan.modules import quantised_linear
from wan.modules.fused import FP8, Passes, compiled, quantise, scale_sums
from wan.modules.model import Prompt, WanModel
from wan.modules.quantised_linear import (
    QuantisedLinear,
    hadamard,
    in_8_bits,
    multiplies,
    product_error,
    rotated,
    rotation_of,
    shared,
    why_unpacked,
    working_bytes,
)
from wan.offload.reader import Source, load, parameter_dtypes

CPU = torch.device("cpu")


def has_the_product() -> bool:
    """PyTorch multiplies fp8 on a CPU too, since some release."""
    try:
        error = product_error("fp8", torch.randn(16, 32).bfloat16(), torch.randn(48, 32))
        return error < quantised_linear.RIGHT_PRODUCT
    except (RuntimeError, NotImplementedError):
        return False


needs_the_product = pytest.mark.skipif(not has_the_product(), reason="this PyTorch has no fp8 product on a CPU")


def layer_of(weight: Tensor, dtype: torch.dtype) -> QuantisedLinear:
    return in_8_bits("fp8", weight, torch.linspace(-1, 1, len(weight)).to(dtype))


def with_fp8_weights(model: WanModel, file: Path) -> WanModel:
    """A float32 model's twin in bf16 and, all its blocks, fp8."""
    save_file(dict(model.named_parameters()), file)
    model = model.to("meta")
    model.quantise("fp8", kept=0)
    return load(model, Source(TensorStore.open(file), parameter_dtypes(torch.bfloat16, False, model)), CPU)


def test_a_cpu_unpacks() -> None:
    """Its fp8 product is made of others, and would round activations for nothing."""
    assert not multiplies("fp8", CPU, torch.bfloat16)


def test_a_plan_says_why_weights_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that raises, whatever it does so with, and one that is wrong are none."""
    assert why_unpacked("fp8", CPU, torch.float32) == "no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    for number, found, reason in (
        (6, None, "compute capability 8.6: GPUs multiply fp8 from 8.9 on"),
        (9, RuntimeError("cutlass\ncannot run"), "2.6.0 has no such product for this device: cutlass cannot run"),
        (10, math.nan, "the product of PyTorch 2.6.0 is wrong on this device"),
        (11, 0.5, "the product of PyTorch 2.6.0 is wrong on this device"),
        (12, 2e-3, ""),
    ):
        monkeypatch.setattr(quantised_linear, "product_error", Mock(side_effect=[found]))
        monkeypatch.setattr(Tensor, "to", lambda x, *_: x)
        device = torch.device("cuda", number)
        assert why_unpacked("fp8", device, torch.bfloat16).endswith(reason), number
        assert multiplies("fp8", device, torch.bfloat16) == (not reason)
    assert why_unpacked("fp8", torch.device("cuda", 12), torch.float32) == "products in fp8 are for bf16"


@pytest.mark.parametrize("rows", [0, 1, 77])
def test_the_product_is_what_cuda_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch checks operands on meta as on CUDA: a row-major by a column-major matrix of sides that are multiples of
    16, scales [R, 1] and [1, O] in contiguous float32."""
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: True)
    layer = in_8_bits("fp8", torch.empty(32, 48, device="meta"), torch.empty(32, device="meta", dtype=torch.bfloat16))
    x = torch.empty(rows, 48, device="meta", dtype=torch.bfloat16)
    assert (layer(x).shape, layer(x).dtype) == ((rows, 32), torch.bfloat16)


@pytest.mark.parametrize(("outputs", "inputs", "multiplies"), [(32, 48, True), (32, 40, False), (40, 32, False)])
def test_one_odd_axis_is_enough_to_unpack(
    outputs: int, inputs: int, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: True)
    layer = in_8_bits("fp8", torch.randn(outputs, inputs), torch.zeros(outputs))
    assert layer.multiplies(torch.randn(3, inputs)) == multiplies


def test_cudas_limits_are_refused_without_cuda() -> None:
    """So that the test above can fail."""
    layer = in_8_bits("fp8", torch.empty(32, 48, device="meta"), torch.empty(32, device="meta", dtype=torch.bfloat16))
    given = layer.quantised(torch.empty(77, 48, device="meta", dtype=torch.bfloat16))
    odd = in_8_bits("fp8", torch.empty(32, 40, device="meta"), layer.bias)
    for product, wrong in (
        (layer.product, given._replace(scale=given.scale.bfloat16())),
        (layer.product, given._replace(scale=given.scale[:, 0])),
        (layer.product, given._replace(q=given.q.t().contiguous().t())),
        (odd.product, given._replace(q=given.q[:, :40].contiguous())),
    ):
        with pytest.raises(RuntimeError):
            product(wrong)


@needs_the_product
def test_an_input_of_several_layers_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same products, to the bit; and for each layer where one of them takes it in bf16."""
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: True)
    monkeypatch.setattr(quantised_linear, "ROWS_AT_ONCE", 16)
    torch.manual_seed(0)
    layers, x = [layer_of(torch.randn(48, 32), torch.bfloat16) for _ in range(3)], torch.randn(40, 32).bfloat16()
    given = shared(x, *layers)
    assert isinstance(given, quantised_linear.QuantisedRows)
    assert all(torch.equal(layer(given), layer(x)) for layer in layers)
    for other in (nn.Linear(32, 48), layer_of(torch.randn(40, 32), torch.bfloat16)):
        assert shared(x, *layers, other) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_weights_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(torch.randn(48, 32), dtype), torch.randn(5, 32).to(dtype)
    weight = (layer.weight.double() * layer.weight_scale.double()[:, None]).to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))


@needs_the_product
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_the_fp8_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same fp8 numbers in float64, in shares of 16 rows; tokens of very different size do not disturb
    each other."""
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: True)
    monkeypatch.setattr(quantised_linear, "ROWS_AT_ONCE", 16)
    torch.manual_seed(0)
    x = (torch.randn(rows, 64) * torch.logspace(-3, 3, rows)[:, None]).bfloat16()
    layer = layer_of(torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None], torch.bfloat16)
    q, scale = torch.empty(x.shape, dtype=FP8), torch.empty(rows, 1)
    quantise(x, q, scale)
    exact = (q.double() * scale) @ (layer.weight.double() * layer.weight_scale[:, None]).t() + layer.bias.double()
    found = layer(x)
    assert found.dtype == torch.bfloat16
    for row in range(rows):
        assert rms_error(found[row], exact[row]) < 2**-8


@needs_the_product
def test_odd_sizes_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: True)
    layer, x = layer_of(torch.randn(20, 40), torch.bfloat16), torch.randn(3, 40).bfloat16()
    weight = layer.weight.float() * layer.weight_scale[:, None]
    assert rms_error(layer(x), x.float() @ weight.t() + layer.bias.float()) < 1e-2


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_a_rotation_is_undone_by_itself_and_changes_no_product(size: int) -> None:
    turn = hadamard(size, CPU, torch.float64)
    assert torch.equal(turn, turn.t())
    assert torch.allclose(turn @ turn, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert (turn.abs() == size**-0.5).all(), "in bf16 too it is exact"
    x, weight = torch.randn(5, 2 * size, dtype=torch.float64), torch.randn(7, 2 * size, dtype=torch.float64)
    assert torch.allclose(rotated(rotated(x, size), size), x)
    assert torch.allclose(rotated(x, size) @ rotated(weight, size).t(), x @ weight.t())
    assert [rotation_of(torch.int8, width) for width in (5120, 13824, 3072, 192, 48, 40)] == [256, 256, 256, 64, 16, 0]
    assert rotation_of(FP8, 5120) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33, 77])
@pytest.mark.parametrize("rotation", [0, 16, None])
def test_the_int8_product_is_that_of_int32(
    rows: int, rotation: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in shares of 32 rows, none of which has fewer than the 17 that CUDA takes."""
    monkeypatch.setattr(quantised_linear, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(torch, "_int_mm", Mock(wraps=torch._int_mm))
    torch.manual_seed(0)
    x = (torch.randn(rows, 192) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    layer = in_8_bits("int8", torch.randn(40, 192), torch.linspace(-1, 1, 40).to(dtype), rotation)
    assert layer.rotation == (64 if rotation is None else rotation)
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(rows, 1)
    quantise(rotated(x, layer.rotation), q, scale)
    sums = q.int() @ layer.weight.int().t()
    found = layer(x)
    assert torch.equal(found, (sums * scale * layer.weight_scale + layer.bias).to(dtype))
    assert torch.equal(layer(layer.quantised(x)), found)
    seen = [call.args[0].shape for call in torch._int_mm.call_args_list]  # type: ignore[attr-defined]
    assert all(shape[0] > 16 for shape in seen if rows)
    if rows:
        assert rms_error(found, x.double() @ weight_of(layer).t() + layer.bias.double()) < 2e-2


def weight_of(layer: QuantisedLinear) -> Tensor:
    """Return the layer's full weight in float64."""
    return rotated(layer.weight.double() * layer.weight_scale.double()[:, None], layer.rotation)


@pytest.mark.parametrize(("outputs", "inputs", "can"), [(40, 192, True), (36, 192, False), (40, 36, False)])
def test_int8_of_odd_sizes_is_unpacked(outputs: int, inputs: int, can: bool) -> None:
    torch.manual_seed(0)
    layer, x = in_8_bits("int8", torch.randn(outputs, inputs), torch.zeros(outputs)), torch.randn(20, inputs)
    assert layer.multiplies(x) == can
    if not can:
        assert rms_error(layer(x), x.double() @ weight_of(layer).t()) < 1e-6


def test_layers_of_other_rotations_share_no_input() -> None:
    x, bias = torch.randn(20, 64), torch.zeros(32)
    one, other = (in_8_bits("int8", torch.randn(32, 64), bias, rotation) for rotation in (64, 16))
    assert isinstance(shared(x, one, one), quantised_linear.QuantisedRows)
    assert shared(x, one, other) is x


def test_an_int8_product_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose sums overflow, for the largest numbers alone."""
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: product(x, w).clamp(-(2**19), 2**19))
    quantised_linear.why_unpacked.cache_clear()
    assert "wrong on this device" in why_unpacked("int8", CPU, torch.float32)
    monkeypatch.undo()
    quantised_linear.why_unpacked.cache_clear()
    assert why_unpacked("int8", CPU, torch.float32) == why_unpacked("int8", CPU, torch.bfloat16) == ""


@pytest.mark.parametrize(
    ("largest", "rotation", "expected"), [(1, 0, 0.011), (1, None, 0.011), (30, 0, 0.051), (30, None, 0.0096)]
)
def test_error_of_an_int8_layer(largest: float, rotation: int | None, expected: float) -> None:
    """Normal numbers: a row's largest is 3.3 times its rms, so a step is 2.6 % of it and an operand off by 0.75 %.
    Where one of 256 channels is `largest` times the others, its rows' steps grow as much, but for the rotation."""
    torch.manual_seed(0)
    weight, x = torch.randn(512, 1024) / 32, torch.randn(256, 1024)
    x[:, ::256] *= largest
    layer = in_8_bits("int8", weight, torch.zeros(512), rotation)
    assert rms_error(layer(x), x @ weight.t()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("how", ["unpacked", pytest.param("multiplied", marks=needs_the_product)])
def test_error_of_a_layer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal weights, normed and modulated activations: numbers in e4m3, with 3 bits of mantissa, are off by 2.6% of
    their rms, a sum of products by as much, and by sqrt(2) more where activations are rounded too."""
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: how == "multiplied")
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) / 32
    x = (torch.randn(256, 1024) * (1 + 0.3 * torch.randn(1024)) + 0.3 * torch.randn(1024)).bfloat16()
    layer = layer_of(weight, torch.bfloat16)
    error = rms_error(layer(x) - layer.bias, x.float() @ weight.t())
    expected = 0.026 if how == "unpacked" else 0.026 * math.sqrt(2)
    assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("how", ["unpacked", pytest.param("multiplied", marks=needs_the_product)])
def test_error_of_a_forward(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: how == "multiplied")
    model = random_model()
    latent, prompt = torch.randn(16, 3, 6, 10), torch.randn(7, 48)
    with torch.no_grad():
        exact = model(latent, 937.5, Prompt(prompt))
        found = with_fp8_weights(model, tmp_path / "model.safetensors")(latent, 937.5, Prompt(prompt))
    assert 5e-3 < rms_error(found, exact) < 6e-2


def test_memory_beside_a_product() -> None:
    with torch.device("meta"):
        model = WanModel(
            dim=5120, ffn_dim=13824, in_dim=16, out_dim=16, num_heads=40, num_layers=3, text_dim=4096
        )  # fmt: skip
    assert working_bytes(model, torch.bfloat16) == 0
    model.quantise("fp8")
    assert working_bytes(model, torch.bfloat16) == 5120 * 13824 * 2
    model.quantise("int8")
    assert working_bytes(model, torch.bfloat16) == 5120 * 13824 * 2 * 2, "unpacked, and rotated"


def test_activations_are_rounded_by_a_pass() -> None:
    """So that what compiles the passes compiles this one too."""
    model = random_model()
    model.quantise("fp8")
    model.use_passes(compiled())
    layers = [layer for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert {layer.passes for layer in layers} == {compiled()}
    assert Passes().quantise is quantise
    assert Passes().scale_sums is scale_sums
