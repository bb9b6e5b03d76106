"""LoKr, LoHa and DoRA against sums worked out in float64 numpy, and against what peft makes of its own adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning.lora import Lora, check
from lightning.merge import Merge
from lightning.peft_adapter import add_adapters
from tests.lightning.support import base, diffusers_module, kohya, lora_of, merged, module_tree, small_pairs, write
from wan.checkpoints.key_mapping import diffusers_name
from wan.utils.errors import LoraError

MODULES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "blocks.1.ffn.2")
SHAPES = base().shapes
SPELLINGS: dict[str, Callable[[str], str]] = {
    "comfy": lambda module: f"diffusion_model.{module}",
    "musubi": lambda module: f"lora_unet_{kohya(module)}",
    "peft": lambda module: f"base_model.model.{diffusers_module(module)}",
    "lycoris, simpletuner": lambda module: f"lycoris_{kohya(diffusers_module(module))}",
    "diffsynth": lambda module: f"pipe.dit.{module}",
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32) * 0.2


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


Made = tuple[dict[str, Tensor], np.ndarray]  # tensors by the end of their names; the change, float64


def lokr(rows: int, columns: int, form: str) -> Made:
    """form: which of the two factors are products ("a" of w1, "b" of w2); rank 3, alpha 6."""
    w1, w2 = numbers(8, 4), numbers(rows // 8, columns // 4, seed=1)
    tensors, one, two = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(6.0)}, numpy_of(w1), numpy_of(w2)
    if "a" in form:
        a, b = numbers(8, 3), numbers(3, 4)
        tensors |= {"lokr_w1_a": a, "lokr_w1_b": b}
        del tensors["lokr_w1"]
        one = numpy_of(a) @ numpy_of(b)
    if "b" in form:
        a, b = numbers(rows // 8, 3), numbers(3, columns // 4)
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
        del tensors["lokr_w2"]
        two = numpy_of(a) @ numpy_of(b)
    if not form:
        tensors["alpha"] = torch.tensor(1e10)
    return tensors, np.kron(one, two) * (2.0 if form else 1.0)


def loha(rows: int, columns: int) -> Made:
    a1, b1, a2, b2 = numbers(rows, 4), numbers(4, columns), numbers(rows, 4, seed=1), numbers(4, columns, seed=1)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(2)}
    return tensors, 0.5 * (numpy_of(a1) @ numpy_of(b1)) * (numpy_of(a2) @ numpy_of(b2))


def pair(rows: int, columns: int) -> Made:
    up, down = numbers(rows, 4), numbers(4, columns)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    return tensors, 0.5 * numpy_of(up) @ numpy_of(down)


MAKERS: dict[str, Callable[[int, int], Made]] = {
    "pair": pair,
    "loha": loha,
    "lokr, whole": lambda rows, columns: lokr(rows, columns, ""),
    "lokr, w1 a product": lambda rows, columns: lokr(rows, columns, "a"),
    "lokr, w2 a product": lambda rows, columns: lokr(rows, columns, "b"),
    "lokr, both products": lambda rows, columns: lokr(rows, columns, "ab"),
}


def file_of(maker: str, spell: Callable[[str], str], dora: bool = False) -> tuple[dict[str, Tensor], dict]:
    """A LoRA of some modules; the changes, by parameter. dora: with norms, and the changes are DoRA's."""
    tensors, changes = {}, {}
    for module in MODULES:
        rows, columns = SHAPES[f"{module}.weight"]
        made, change = MAKERS[maker](rows, columns)
        if dora:
            norms, weight = numbers(rows, 1).abs() + 0.5, numpy_of(base().read(f"{module}.weight"))
            made["dora_scale"] = norms
            changed = weight + change
            change = numpy_of(norms) * changed / np.linalg.norm(changed, axis=1, keepdims=True) - weight
        tensors |= {f"{spell(module)}.{end}": tensor for end, tensor in made.items()}
        changes[f"{module}.weight"] = change
    return tensors, changes


def assert_merges(lora: Lora, changes: dict[str, np.ndarray], strength: float = 1.0) -> None:
    coverage = check(lora, SHAPES)
    assert coverage.pairs == (len(changes), len(changes))
    assert not coverage.unmatched
    found = merged(lora)
    assert found.keys() == changes.keys()
    for name, change in changes.items():
        expected = numpy_of(base().read(name)) + strength * change
        np.testing.assert_allclose(numpy_of(found[name]), expected, atol=2e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("maker", MAKERS)
def test_every_kind_in_every_spelling(maker: str, spelling: str, tmp_path: Path) -> None:
    tensors, changes = file_of(maker, SPELLINGS[spelling])
    assert_merges(lora_of(tmp_path, tensors, 0.7), changes, 0.7)


@pytest.mark.parametrize("maker", MAKERS)
def test_dora_gives_each_row_its_norm(maker: str, tmp_path: Path) -> None:
    tensors, changes = file_of(maker, SPELLINGS["comfy"], dora=True)
    assert_merges(lora_of(tmp_path, tensors, 0.6), changes, 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stored_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    for maker in ("lokr, w2 a product", "loha"):
        tensors, _ = file_of(maker, SPELLINGS["comfy"])
        low = {name: tensor if "alpha" in name else tensor.to(dtype) for name, tensor in tensors.items()}
        exact = merged(lora_of(tmp_path / "a", {name: tensor.float() for name, tensor in low.items()}))
        assert all(torch.equal(exact[name], found) for name, found in merged(lora_of(tmp_path / "b", low)).items())


def test_an_alpha_that_float16_cannot_hold_does_not_matter_to_whole_matrices(tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in file_of("lokr, whole", SPELLINGS["comfy"])[0].items()}
    changes = {}
    for module in MODULES:
        w1, w2 = (numpy_of(halves[f"diffusion_model.{module}.lokr_{factor}"]) for factor in ("w1", "w2"))
        changes[f"{module}.weight"] = np.kron(w1, w2)
    assert_merges(lora_of(tmp_path, halves), changes)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_core_in_a_convolution(kind: str, tmp_path: Path) -> None:
    name = "patch_embedding.weight"
    rows, channels, *kernel = SHAPES[name]
    core, a, b = numbers(3, 3, *kernel), numbers(3, rows // 8), numbers(3, channels // 4)
    if kind == "lokr":
        w1 = numbers(8, 4)
        tensors = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = np.einsum("ijxyz,ip,jr->prxyz", *map(numpy_of, (core, a, b)))
        change = np.kron(numpy_of(w1)[:, :, None, None, None], w2)
    else:
        a, b = numbers(3, rows), numbers(3, channels)
        tensors = {"hada_t1": core, "hada_w1_a": a, "hada_w1_b": b, "hada_t2": core * 2, "hada_w2_a": a, "hada_w2_b": b}
        one = np.einsum("ijxyz,ip,jr->prxyz", *map(numpy_of, (core, a, b)))
        change = one * one * 2
    lora = lora_of(tmp_path, {f"patch_embedding.{end}": tensor for end, tensor in tensors.items()})
    found = numpy_of(merged(lora)[name])
    np.testing.assert_allclose(found, numpy_of(base().read(name)) + change, atol=2e-6)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dora", [False, True])
def test_shares_of_rows_are_the_rows_of_the_whole(maker: str, dora: bool, tmp_path: Path) -> None:
    """As each rank of several merges its share."""
    tensors, _ = file_of(maker, SPELLINGS["comfy"], dora)
    lora, name = lora_of(tmp_path, tensors), "blocks.0.ffn.0.weight"
    whole = merged(lora)[name]
    merge, weight = Merge([lora], SHAPES), base().read(name)
    for rows in (slice(0, 7), slice(7, 33), slice(33, len(weight))):
        torch.testing.assert_close(merge(name, weight[rows], rows), whole[rows], atol=1e-6, rtol=0)


def test_several_loras_change_the_same_base(tmp_path: Path) -> None:
    first, one = file_of("loha", SPELLINGS["comfy"], dora=True)
    second, two = file_of("lokr, whole", SPELLINGS["musubi"])
    files = [write(tmp_path / f"{number}.safetensors", tensors) for number, tensors in enumerate((first, second))]
    found = merged([Lora.open(file) for file in files])
    again = merged([Lora.open(file) for file in reversed(files)])
    for name, weight in found.items():
        assert torch.equal(weight, again[name])
        expected = numpy_of(base().read(name)) + one[name] + two[name]
        np.testing.assert_allclose(numpy_of(weight), expected, atol=2e-6)


def test_a_rank_of_zero_changes_nothing(tmp_path: Path) -> None:
    tensors, changes = file_of("pair", SPELLINGS["comfy"])
    stem = SPELLINGS["comfy"](MODULES[0])
    rows, columns = SHAPES[f"{MODULES[0]}.weight"]
    empty = {f"{stem}.lora_up.weight": torch.ones(rows, 0), f"{stem}.lora_down.weight": torch.ones(0, columns)}
    del changes[f"{MODULES[0]}.weight"]
    assert_merges(lora_of(tmp_path, tensors | empty), changes)


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("maker", "changes", "sentence"),
    [
        ("lokr, whole", {f"{Q}.lokr_w1": None}, "has no lokr_w1_a matrix beside it"),
        ("lokr, both products", {f"{Q}.lokr_w2_b": None}, "has no lokr_w2_b matrix beside it"),
        ("lokr, whole", {f"{Q}.lokr_w2": torch.ones(9, 16)}, r"where the model's blocks.0.self_attn.q.weight is"),
        ("lokr, w2 a product", {f"{Q}.lokr_w2": torch.ones(8, 16)}, r"where the model's blocks.0.self_attn.q.weight"),
        ("loha", {f"{Q}.hada_w2_a": torch.ones(63, 4)}, r"where the model's blocks.0.self_attn.q.weight is"),
        ("loha", {f"{Q}.hada_w1_b": torch.ones(5, 64)}, r"where the model's blocks.0.self_attn.q.weight is"),
        ("loha", {f"{Q}.alpha": torch.tensor(0.0)}, "no usable alpha"),
        ("loha", {f"{Q}.hada_w1_a": torch.ones(64, 4, dtype=torch.int8)}, "is stored as I8"),
    ],
)
def test_misfits_are_refused(maker: str, changes: dict, sentence: str, tmp_path: Path) -> None:
    tensors = {n: t for n, t in (file_of(maker, SPELLINGS["comfy"])[0] | changes).items() if t is not None}
    with pytest.raises(LoraError, match=sentence):
        check(lora_of(tmp_path, tensors), SHAPES)


def test_adapter_mode_says_what_it_cannot_do(tmp_path: Path) -> None:
    """DoRA needs the weights: refused. LoKr and LoHa are merged all the same, with a warning; pairs stay beside."""
    dora = lora_of(tmp_path / "dora", file_of("pair", SPELLINGS["comfy"], dora=True)[0])
    with pytest.raises(LoraError, match=r"is a DoRA.*--lora_mode merge"):
        check(dora, SHAPES, as_adapter=True)
    tensors, changes = file_of("loha", SPELLINGS["comfy"])
    mixed = lora_of(tmp_path / "mixed", tensors | {
        f"blocks.1.self_attn.v.lora_{half}.weight": tensor
        for half, tensor in zip(("up", "down"), small_pairs()["blocks.1.self_attn.v"], strict=True)})  # fmt: skip
    (warning,) = check(mixed, SHAPES, as_adapter=True).warnings
    assert "--lora_mode adapter" in warning
    assert "LoHa" in warning
    model, merge = module_tree(base()), Merge([mixed], SHAPES, linear_pairs=False)
    assert set(merge.deltas) == set(changes)
    add_adapters(model, [mixed])
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["blocks.1.self_attn.v"]


def peft_config(kind: str, **settings: Any) -> Any:
    import peft

    targets = ["to_q", "to_v", "net.0.proj", "net.2"]
    if kind == "dora":
        return peft.LoraConfig(target_modules=targets, use_dora=True, **settings)
    return {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[kind](target_modules=targets, **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lokr", {"r": 4, "alpha": 2}),
        ("lokr", {"r": 64, "alpha": 16, "rank_pattern": {"to_q": 32}}),  # whole matrices: PEFT scales them too
        ("lokr", {"r": 2, "alpha": 6, "decompose_both": True, "alpha_pattern": {"to_v": 3}}),
        ("loha", {"r": 4, "alpha": 2}),
        ("loha", {"r": 4, "alpha": 2, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 5}}),
        ("dora", {"r": 4, "lora_alpha": 2}),
        ("dora", {"r": 4, "lora_alpha": 2, "use_rslora": True}),
    ],
)
def test_files_saved_by_peft_merge_as_peft_merges_them(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from peft import get_peft_model

    torch.manual_seed(3)
    plain = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=16, out_channels=16, ffn_dim=80, num_layers=2,
        text_dim=base()["text_embedding.0.weight"].shape[1],
    )  # fmt: skip
    ours = {diffusers_name(name): name for name in base()}
    plain.load_state_dict({name: base().read(own) for name, own in ours.items()})
    model = get_peft_model(plain, peft_config(kind, **settings))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif any(part in name for part in ("lora_", "lokr_", "hada_")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    before = base()
    expected = {ours[name]: weight for name, weight in model.merge_and_unload().state_dict().items() if name in ours}
    lora = Lora.open(tmp_path)
    assert check(lora, SHAPES).pairs == (12, 12)
    found = merged(lora)
    changed = {name for name, weight in expected.items() if not torch.equal(weight, before.read(name))}
    assert found.keys() == changed
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=5e-6, rtol=1e-5)
