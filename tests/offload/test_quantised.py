"""Weights in 8 bits: the same bits whatever way they take, as they are where a file has them so, and what they save."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quantised import HERE, streamed
from lightning.lora import Lora
from lightning.merge import Merge
from lightning.peft_adapter import add_adapters, set_scale
from tests.lightning.support import write
from tests.support import relative_error
from wan.checkpoints.quantised_formats import int8_rotations
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, as_ours
from wan.configs.precision import takes_8_bits
from wan.doctor.forecast import released_plan
from wan.modules.fused import FP8, LARGEST, quantise
from wan.modules.model import Prompt, WanModel, released_shapes, released_transformer
from wan.modules.quantised_linear import QuantisedLinear, rotated, scale_name
from wan.offload.budget import Sizes
from wan.offload.networks import Networks, sizes_of
from wan.offload.reader import Source, load, parameter_dtypes
from wan.planning.memory import plan_video
from wan.utils.errors import InputError

CPU = torch.device("cpu")
SIZES = {"dim": 32, "ffn_dim": 48, "in_dim": 4, "out_dim": 4, "num_heads": 2, "num_layers": 5, "text_dim": 8}
Q = "blocks.2.self_attn.q.weight"


def blueprint(form: str | None = "fp8", rotations: Mapping[str, int] | None = None) -> WanModel:
    with torch.device("meta"):
        model = WanModel(**SIZES, freq_dim=16, text_len=8)
    if form:
        model.quantise(form, rotations)
    return model


def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(p.shape) / 4 for name, p in blueprint(None).named_parameters()}


def store_of(folder: Path, tensors: Mapping[str, Tensor]) -> TensorStore:
    file = write(folder / "model.safetensors", dict(tensors))
    return as_ours(TensorStore.open(file), EXPERT, str(file))


def lora_of(folder: Path) -> Lora:
    torch.manual_seed(2)
    stem = f"diffusion_model.{Q.removesuffix('.weight')}"
    pair = {"lora_down.weight": torch.randn(4, 32), "lora_up.weight": torch.randn(32, 4)}
    return Lora.open(write(folder / "lora.safetensors", {f"{stem}.{part}": x for part, x in pair.items()}))


def merge_of(folder: Path) -> Merge:
    return Merge([lora_of(folder)], {name: tuple(p.shape) for name, p in blueprint(None).named_parameters()})


def loaded(
    store: TensorStore, merge: Merge | None = None, dtype: torch.dtype = torch.float32, form: str = "fp8"
) -> dict[str, Tensor]:
    model = blueprint(form, int8_rotations(store))
    model = load(model, Source(store, parameter_dtypes(dtype, False, model), merge), CPU)
    return dict(model.named_parameters())


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(weight.shape, dtype=FP8), torch.empty(len(weight), 1)
    quantise(weight, q, scale)
    return q, scale[:, 0]


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# -- which weights, and how


def test_the_matrices_of_inner_blocks_and_nothing_else() -> None:
    model = blueprint()
    ours = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}
    plain = blueprint(None).named_modules()
    inner = tuple(f"blocks.{number}." for number in (1, 2, 3))
    assert ours == {f"{n}.weight" for n, layer in plain if isinstance(layer, nn.Linear) and n.startswith(inner)}
    assert len(ours) == 3 * 10
    released = released_shapes("t2v-A14B")
    assert sum(takes_8_bits(name, 40) for name in released) == 38 * 10


def test_every_row_uses_the_whole_range_and_is_off_by_half_a_step() -> None:
    weight = torch.randn(16, 64) * torch.logspace(-10, 4, 16)[:, None]
    weight[3] = 0
    q, scale = in_fp8(weight)
    assert (q.float().abs().amax(1) == LARGEST[FP8]).tolist() == [row != 3 for row in range(16)]
    back = q.float() * scale[:, None]
    # half a step: 2^-4 of the number; below 2^-6 the steps no longer shrink, and are 2^-9 of what a row is scaled by
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, scale[:, None] / 1024) * 1.0001).all()


def test_precision_of_the_rest(tmp_path: Path) -> None:
    found = loaded(store_of(tmp_path, weights()), dtype=torch.bfloat16)
    assert {found[n].dtype for n in ("blocks.0.ffn.0.weight", "blocks.4.ffn.2.weight", "blocks.2.ffn.0.bias")} == {
        torch.bfloat16
    }
    assert {found[n].dtype for n in ("head.head.weight", "blocks.2.norm3.weight", scale_name(Q))} == {torch.float32}
    assert found[Q].dtype == FP8


# -- one path


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_streamed_weights_are_those_of_a_whole_load(slots: int, with_lora: bool, form: str, tmp_path: Path) -> None:
    store, merge = store_of(tmp_path, weights()), merge_of(tmp_path) if with_lora else None
    whole, model, seen = loaded(store, merge, form=form), blueprint(form), {}
    networks = Networks({"model": (model, Source(store, parameter_dtypes(torch.float32, False, model), merge))}, CPU)
    networks.prefetcher.resize(slots)
    streamed = networks.models["model"]

    def look(block: nn.Module, *_: object) -> None:
        (prefix,) = (f"{name}." for name, found in streamed.named_modules() if found is block)
        seen.update({prefix + name: p.clone() for name, p in block.named_parameters()})

    for block in streamed.blocks:
        block.register_forward_pre_hook(look)
    x, y = torch.linspace(-1, 1, 4 * 2 * 4 * 4).reshape(4, 2, 4, 4), None
    with torch.no_grad(), networks.job(["model"] * 2):
        for _ in range(2):
            y = streamed(x, 500.0, Prompt(torch.ones(3, 8)))
    assert seen.keys() == {name for name in whole if name.startswith("blocks.")}
    assert all(same(seen[name], whole[name]) for name in seen)
    again = load(blueprint(form), Source(store, parameter_dtypes(torch.float32, False, model), merge), CPU)
    with torch.no_grad():
        assert torch.equal(again(x, 500.0, Prompt(torch.ones(3, 8))), y)


def test_a_lora_is_merged_before_the_one_rounding(tmp_path: Path) -> None:
    found, merge = loaded(store_of(tmp_path, weights()), merge_of(tmp_path)), merge_of(tmp_path)
    for name in (Q, "blocks.1.ffn.2.weight"):
        q, scale = in_fp8(merge(name, weights()[name]).clone())
        assert same(found[name], q)
        assert torch.equal(found[scale_name(name)], scale)


# -- files in fp8


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spelling", [".weight_scale", ".scale_weight"])
def test_published_fp8_is_kept_as_it_is(by_row: bool, spelling: str, tmp_path: Path) -> None:
    """Scales that we would not choose, so that a second rounding would show."""
    tensors, name = weights(), "blocks.2.ffn.0.weight"
    for each in (name, Q, "blocks.0.ffn.0.weight"):
        rows = len(tensors[each])
        scale = torch.full((rows, 1), 0.0123) + (torch.arange(rows)[:, None] * 1e-4 if by_row else 0)
        tensors[each.replace(".weight", spelling)] = scale if by_row else scale[0, 0].clone()
        tensors[each] = (tensors[each] / scale).to(FP8)
    kept = store_of(tmp_path, tensors)
    found = loaded(kept)
    assert same(found[name], tensors[name])
    expected = tensors[name.replace(".weight", spelling)].reshape(-1).expand(48)
    assert torch.equal(found[scale_name(name)], expected)
    assert torch.equal(found["blocks.0.ffn.0.weight"], kept.read("blocks.0.ffn.0.weight")), "the first block: float32"
    with_lora, merge = loaded(kept, merge_of(tmp_path)), merge_of(tmp_path)
    assert same(with_lora[name], tensors[name]), "the LoRA does not touch it"
    q, scale = in_fp8(merge(Q, kept.read(Q)).clone())
    assert same(with_lora[Q], q)
    assert torch.equal(with_lora[scale_name(Q)], scale)


def test_fp8_without_a_scale_and_other_eight_bits(tmp_path: Path) -> None:
    tensors = weights()
    tensors[Q] = tensors[Q].to(FP8)
    other = "blocks.1.self_attn.k"
    tensors[f"{other}.weight"], tensors[f"{other}.weight_scale"] = (
        (tensors[f"{other}.weight"] * 1000).to(torch.float8_e5m2),
        torch.tensor(1e-3),
    )
    store = store_of(tmp_path, tensors)
    found = loaded(store)
    assert same(found[Q], tensors[Q])
    assert (found[scale_name(Q)] == 1).all()
    assert same(found[f"{other}.weight"], in_fp8(store.read(f"{other}.weight"))[0])


@pytest.mark.parametrize("wrong", ["number", "scale"])
def test_nan_in_an_fp8_file_is_found(wrong: str, tmp_path: Path) -> None:
    q, scale = weights()[Q].to(FP8), torch.tensor(0.5)
    if wrong == "number":
        q.view(torch.uint8)[5, 7] = 0xFF
    else:
        scale.fill_(float("inf"))
    store = store_of(tmp_path, weights() | {Q: q, Q.replace(".weight", ".scale_weight"): scale})
    with pytest.raises(InputError, match=rf"tensor {Q} holds NaN or Inf"):
        loaded(store)


# -- files in int8


@pytest.mark.parametrize(("group", "by_row"), [(16, True), (4, True), (0, True), (16, False)])
def test_published_int8_is_kept_as_it_is(group: int, by_row: bool, tmp_path: Path) -> None:
    """With the rotation that the file has, not the one that this width would get here (16)."""
    tensors, name = weights(), "blocks.2.ffn.0.weight"
    marks = {"convrot": True, "convrot_groupsize": group} if group else {}
    marker = torch.tensor(list(json.dumps({"format": "int8_tensorwise", **marks}).encode()), dtype=torch.uint8)
    for each in (name, Q):
        scale = torch.full((len(tensors[each]), 1), 0.0123) + torch.arange(len(tensors[each]))[:, None] * 1e-4
        scale = scale if by_row else scale[:1]
        tensors[each] = (rotated(tensors[each], group) / scale).round_().clamp_(-127, 127).to(torch.int8)
        tensors[scale_name(each)] = scale if by_row else scale[0, 0].clone()
        tensors[each.replace("weight", "comfy_quant")] = marker
    store, merge = store_of(tmp_path, tensors), merge_of(tmp_path)
    assert int8_rotations(store) == {name: group, Q: group}
    model = blueprint("int8", int8_rotations(store))
    model = load(model, Source(store, parameter_dtypes(torch.float32, False, model)), CPU)
    found, x = dict(model.named_parameters()), torch.randn(40, 32)
    assert all(same(found[each], tensors[each]) for each in (name, Q))
    assert torch.equal(found[scale_name(Q)], tensors[scale_name(Q)].flatten().expand(32))
    whole = F.linear(x, store.read(name), model.blocks[2].ffn[0].bias)
    assert relative_error(model.blocks[2].ffn[0](x), whole) < 2e-2, "activations alone are rounded"
    with_lora = loaded(store, merge, form="int8")
    assert same(with_lora[name], tensors[name]), "the LoRA does not touch it"
    q, scale = torch.empty(32, 32, dtype=torch.int8), torch.empty(32, 1)
    quantise(rotated(merge(Q, store.read(Q)).clone(), group), q, scale)
    assert same(with_lora[Q], q), "rounded anew, in the file's rotation"
    model = blueprint("fp8", int8_rotations(store))
    model = load(model, Source(store, parameter_dtypes(torch.float32, False, model)), CPU)
    assert same(model.blocks[2].ffn[0].weight, in_fp8(store.read(name))[0]), "e4m3 is not rotated"
    assert relative_error(model.blocks[2].ffn[0](x), whole) < 5e-2


# -- with the rest


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_an_adapter_is_added_in_the_precision_of_the_run(form: str, tmp_path: Path) -> None:
    store, model, lora = store_of(tmp_path, weights()), blueprint(form), lora_of(tmp_path)
    model = load(model, Source(store, parameter_dtypes(torch.bfloat16, False, model)), CPU)
    x = torch.randn(6, 32).bfloat16()
    plain = model.blocks[2].self_attn.q(x)
    add_adapters(model, [lora])
    layer = model.blocks[2].self_attn.q
    assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {torch.bfloat16}
    up, down = (lora.read(name) for name in next(iter(lora.deltas({Q: (32, 32)}))).tensors)
    assert relative_error((layer(x) - plain).float(), x.float() @ down.float().t() @ up.float().t()) < 2e-2
    set_scale(model, 0.0, [lora])
    assert torch.equal(layer(x), plain)


def released(task: str, form: str | None = None) -> Sizes:
    model = released_transformer(task)
    if form:
        model.quantise(form)
    return sizes_of(model, parameter_dtypes(torch.bfloat16, False, model))


@pytest.mark.parametrize(("task", "parts"), [("t2v-A14B", 22), ("ti2v-5B", 17)])
def test_two_blocks_share_a_slot(task: str, parts: int) -> None:
    before, sizes = released(task), released(task, "fp8")
    assert sizes == released(task, "int8")
    assert sizes.blocks == parts
    assert sizes.block_bytes == pytest.approx(before.block_bytes, rel=0.005)
    assert sizes.resident == before.resident


def test_streamed_bytes_are_halved() -> None:
    """By the plan for 8 GB: from files in fp8; other files come to the device as they are."""
    rows = {(row[2], row[6]): float(row[7].split(" / ")[0]) for row in streamed("t2v-A14B", 8)}
    assert rows["bf16", "bf16"] == rows["fp8", "bf16"] == pytest.approx(28.7, abs=0.1)
    assert rows["fp8", "fp8"] < 0.55 * rows["bf16", "bf16"]


def test_attention_in_8_bits_takes_memory() -> None:
    plan = released_plan("t2v-A14B", True, 24 * 10**9, replace(HERE, device=torch.device("cuda")))
    work = [
        budget.stages["denoise"]["work"]
        for attention in ("sdpa", "sage")
        if (budget := plan_video(replace(plan, attention=attention), (1280, 720), 81).budget)
    ]
    assert work[1] - work[0] == 7 * 75_600 * 5120


def test_a_file_in_fp8_is_read_in_fp8(tmp_path: Path) -> None:
    tensors = weights()
    for name in [name for name in tensors if takes_8_bits(name, 5)]:
        tensors[name], scale = in_fp8(tensors[name])
        tensors[scale_name(name)] = scale[:, None]
    model = blueprint()
    source = Source(store_of(tmp_path, tensors), parameter_dtypes(torch.float32, False, model))
    networks, reported = Networks({"model": (model, source)}, CPU), list[int]()
    networks.prefetcher.preload(reported.append)
    streaming = [name for name, _ in model.named_parameters() if model.unit_of(name) is not None]
    assert networks.prefetcher.brought == sum(tensors[n].nbytes for n in streaming if not n.endswith("_scale"))
    assert sum(reported) == sum(source.store[n].bytes for n in streaming if n in source.store), "as files count"
