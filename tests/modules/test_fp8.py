"""Products with fp8 weights: the hardware's against the same numbers in float32, and what either is off by."""

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
from wan.modules import fp8
from wan.modules.fp8 import Fp8Linear, in_fp8, multiplies_fp8, product_error, shared, why_unpacked, working_bytes
from wan.modules.fused import EAGER, FP8, compiled, quantise
from wan.modules.model import Prompt, WanModel
from wan.offload.reader import Source, load, parameter_dtypes

CPU = torch.device("cpu")


def has_the_product() -> bool:
    """PyTorch multiplies fp8 on a CPU too, since some release."""
    try:
        return product_error(torch.randn(16, 32).bfloat16(), torch.randn(48, 32)) < fp8.RIGHT_PRODUCT
    except (RuntimeError, NotImplementedError):
        return False


needs_the_product = pytest.mark.skipif(not has_the_product(), reason="this PyTorch has no fp8 product on a CPU")


def layer_of(weight: Tensor, dtype: torch.dtype) -> Fp8Linear:
    return in_fp8(weight, torch.linspace(-1, 1, len(weight)).to(dtype))


def with_fp8_weights(model: WanModel, file: Path) -> WanModel:
    """A float32 model's twin in bf16 and, all its blocks, fp8."""
    save_file(dict(model.named_parameters()), file)
    model = model.to("meta")
    model.use_fp8(kept=0)
    return load(model, Source(TensorStore.open(file), parameter_dtypes(torch.bfloat16, False, model)), CPU)


def test_a_cpu_unpacks() -> None:
    """Its fp8 product is made of others, and would round activations for nothing."""
    assert not multiplies_fp8(CPU, torch.bfloat16)


def test_a_plan_tells_why_weights_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that raises, whatever it does so with, and one that is wrong are none."""
    assert why_unpacked(CPU, torch.float32) == "no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    for number, found, reason in (
        (6, None, "compute capability 8.6: GPUs multiply fp8 from 8.9 on"),
        (9, RuntimeError("cutlass\ncannot run"), "2.6.0 has no such product for this GPU: cutlass cannot run"),
        (10, math.nan, "the product of PyTorch 2.6.0 is wrong on this GPU"),
        (11, 0.5, "the product of PyTorch 2.6.0 is wrong on this GPU"),
        (12, 2e-3, ""),
    ):
        monkeypatch.setattr(fp8, "product_error", Mock(side_effect=[found]))
        monkeypatch.setattr(Tensor, "to", lambda x, *_: x)
        device = torch.device("cuda", number)
        assert why_unpacked(device, torch.bfloat16).endswith(reason), number
        assert multiplies_fp8(device, torch.bfloat16) == (not reason)
    assert why_unpacked(torch.device("cuda", 12), torch.float32) == "products in fp8 are for bf16"


@pytest.mark.parametrize("rows", [0, 1, 77])
def test_the_product_is_what_cuda_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch checks operands on meta as on CUDA: a row-major by a column-major matrix of sides that are multiples of
    16, scales [R, 1] and [1, O] in contiguous float32."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: True)
    layer = in_fp8(torch.empty(32, 48, device="meta"), torch.empty(32, device="meta", dtype=torch.bfloat16))
    x = torch.empty(rows, 48, device="meta", dtype=torch.bfloat16)
    assert (layer(x).shape, layer(x).dtype) == ((rows, 32), torch.bfloat16)


@pytest.mark.parametrize(("outputs", "inputs", "multiplies"), [(32, 48, True), (32, 40, False), (40, 32, False)])
def test_one_odd_axis_is_enough_to_unpack(
    outputs: int, inputs: int, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: True)
    layer = in_fp8(torch.randn(outputs, inputs), torch.zeros(outputs))
    assert layer.multiplies(torch.randn(3, inputs)) == multiplies


def test_what_cuda_does_not_take_is_refused_without_it() -> None:
    """So that the test above can fail."""
    layer = in_fp8(torch.empty(32, 48, device="meta"), torch.empty(32, device="meta", dtype=torch.bfloat16))
    given = layer.quantised(torch.empty(77, 48, device="meta", dtype=torch.bfloat16))
    odd = in_fp8(torch.empty(32, 40, device="meta"), layer.bias)
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
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: True)
    monkeypatch.setattr(fp8, "QUANTISED_ROWS", 16)
    torch.manual_seed(0)
    layers, x = [layer_of(torch.randn(48, 32), torch.bfloat16) for _ in range(3)], torch.randn(40, 32).bfloat16()
    given = shared(x, *layers)
    assert isinstance(given, fp8.Quantised)
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
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: True)
    monkeypatch.setattr(fp8, "QUANTISED_ROWS", 16)
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
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: True)
    layer, x = layer_of(torch.randn(20, 40), torch.bfloat16), torch.randn(3, 40).bfloat16()
    weight = layer.weight.float() * layer.weight_scale[:, None]
    assert rms_error(layer(x), x.float() @ weight.t() + layer.bias.float()) < 1e-2


@pytest.mark.parametrize("how", ["unpacked", pytest.param("multiplied", marks=needs_the_product)])
def test_error_of_a_layer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal weights, normed and modulated activations: numbers in e4m3, with 3 bits of mantissa, are off by 2.6% of
    their rms, a sum of products by as much, and by sqrt(2) more where activations are rounded too."""
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: how == "multiplied")
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) / 32
    x = (torch.randn(256, 1024) * (1 + 0.3 * torch.randn(1024)) + 0.3 * torch.randn(1024)).bfloat16()
    layer = layer_of(weight, torch.bfloat16)
    error = rms_error(layer(x) - layer.bias, x.float() @ weight.t())
    expected = 0.026 if how == "unpacked" else 0.026 * math.sqrt(2)
    assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("how", ["unpacked", pytest.param("multiplied", marks=needs_the_product)])
def test_error_of_a_forward(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda *_: how == "multiplied")
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
    model.use_fp8()
    assert working_bytes(model, torch.bfloat16) == 5120 * 13824 * 2


def test_activations_are_rounded_by_a_pass() -> None:
    """So that what compiles the passes compiles this one too."""
    model = random_model()
    model.use_fp8()
    model.use_passes(compiled())
    layers = [layer for layer in model.modules() if isinstance(layer, Fp8Linear)]
    assert {layer.passes for layer in layers} == {compiled()}
    assert EAGER.quantise is quantise
