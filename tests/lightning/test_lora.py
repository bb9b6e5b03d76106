"""Every published family loads with full coverage and the same result; everything else is refused in one sentence."""

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.sparse import sparse
from lightning.lora import Lora, check
from lightning.lora_files import expert_of, files_of
from lightning.merge import Merge
from lightning.peft_adapter import add_adapters
from tests.lightning.support import (
    ALPHA,
    FAMILIES,
    STORED,
    base,
    diffusers_module,
    family,
    kohya,
    lora_of,
    merged,
    module_tree,
    plain,
    small_pairs,
    spelled,
    write,
)
from tests.support import lora_dir, manifest
from wan.modules.model import released_shapes
from wan.utils.errors import LoraError

SHAPES = base().shapes
PEFT_WEIGHTS = "adapter_model.safetensors"


def expected_weights() -> dict[str, Tensor]:
    store = base()
    return {
        f"{module}.weight": plain(store.read(f"{module}.weight"), up, down, ALPHA / 4)
        for module, (up, down) in small_pairs().items()
    }


def assert_is_the_small_lora(lora: Lora, scale: float | None = None) -> None:
    coverage = check(lora, SHAPES)
    assert coverage.pairs == (20, 20)
    assert not coverage.unmatched
    if scale is not None:
        assert coverage.scales == (scale,)
    found, expected = merged(lora), expected_weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- families


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    stores_alpha = "alpha" in FAMILIES[name][1]
    assert_is_the_small_lora(Lora.open(family(name, tmp_path)), 0.5 if stores_alpha else 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 2},
        {"r": 4, "lora_alpha": 1, "use_rslora": True},
        {"r": 16, "lora_alpha": 64, "alpha_pattern": {r"blocks\.\d+\..*": 2}, "rank_pattern": {r"blocks\.\d+\..*": 4}},
    ],
)
def test_peft_folder(settings: dict, tmp_path: Path) -> None:
    tensors = spelled(small_pairs(), "base_model.model.{}.", halves=("lora_B.weight", "lora_A.weight"), alpha=STORED)
    write(tmp_path / PEFT_WEIGHTS, {name: t for name, t in tensors.items() if not name.endswith("alpha")})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    assert_is_the_small_lora(Lora.open(tmp_path), 0.5)


def test_settings_in_diffusers_metadata(tmp_path: Path) -> None:
    tensors = spelled(small_pairs(), "transformer.{}.", halves=("lora_B.weight", "lora_A.weight"), alpha=STORED)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    path = write(tmp_path / "l.safetensors", {n: t for n, t in tensors.items() if "alpha" not in n}, metadata)
    assert_is_the_small_lora(Lora.open(path), 0.5)


def test_diffusers_file_with_both_experts(tmp_path: Path) -> None:
    low = {module: (up + 1, down) for module, (up, down) in small_pairs().items()}
    tensors = spelled(small_pairs(), "transformer.{}.", module=diffusers_module)
    path = write(tmp_path / "both.safetensors", tensors | spelled(low, "transformer_2.{}.", module=diffusers_module))
    high_lora, low_lora = (Lora.open(path, expert=expert) for expert in ("high", "low"))
    assert_is_the_small_lora(high_lora, 1.0)
    assert check(low_lora, SHAPES).pairs == (20, 20)
    assert not torch.equal(merged(low_lora)["blocks.0.ffn.0.weight"], merged(high_lora)["blocks.0.ffn.0.weight"])
    with pytest.raises(LoraError, match="says the same as transformer"):
        check(Lora.open(path), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = {module: (up.to(dtype), down.to(dtype)) for module, (up, down) in small_pairs().items()}
    found = merged(lora_of(tmp_path, spelled(pairs, "diffusion_model.{}.", alpha=torch.tensor(2.0, dtype=dtype))))
    store = base()
    for module, (up, down) in pairs.items():
        assert torch.equal(found[f"{module}.weight"], plain(store.read(f"{module}.weight"), up, down, 0.5))


def test_ranks_may_differ_between_modules(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors, expected, store = {}, {}, base()
    for rank, module in enumerate(small_pairs(), 1):
        rows, columns = SHAPES[f"{module}.weight"]
        up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        tensors |= spelled({module: (up, down)}, "diffusion_model.{}.", alpha=torch.tensor(8.0))
        expected[f"{module}.weight"] = plain(store.read(f"{module}.weight"), up, down, 8.0 / rank)
    lora = lora_of(tmp_path, tensors)
    coverage = check(lora, SHAPES)
    assert coverage.ranks == tuple(range(1, 21))
    assert coverage.summary() == "20/20 pairs, alpha/rank 0.4 to 8, 0 unmatched"
    found = merged(lora)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bias_of_the_second_matrix(tmp_path: Path) -> None:
    module, bias = "blocks.0.self_attn.q", torch.arange(64.0)
    tensors = spelled({module: small_pairs()[module]}, "transformer.{}.", halves=("lora_B.weight", "lora_A.weight"))
    tensors[f"transformer.{module}.lora_B.bias"] = bias
    tensors[f"transformer.{module}.alpha"] = torch.tensor(2.0)
    lora = lora_of(tmp_path, tensors, strength=0.5)
    assert torch.equal(merged(lora)[f"{module}.bias"], base().read(f"{module}.bias") + 0.25 * bias)


# -- alpha


def test_first_upload_needs_alpha_that_it_does_not_store(tmp_path: Path) -> None:
    tensors = {n: t for n, t in spelled(small_pairs(), "{}.", alpha=STORED).items() if not n.endswith(".alpha")}
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-V1"
    path = write(folder / "high_noise_model.safetensors", tensors)
    coverage = check(Lora.open(path, expert="high"), SHAPES)
    assert coverage.scales == (2.0,)  # 8 / 4
    assert "stores no alpha; 8/rank" in coverage.warnings[0]
    assert_is_the_small_lora(Lora.open(path, default_alpha=2.0), 0.5)
    assert not check(Lora.open(path, default_alpha=2.0), SHAPES).warnings
    reupload = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1" / "high_noise_model.safetensors"
    assert check(Lora.open(write(reupload, tensors)), SHAPES).scales == (1.0,)


@pytest.mark.parametrize("alpha", [0.0, math.nan, math.inf])
def test_unusable_alpha(alpha: float, tmp_path: Path) -> None:
    tensors = spelled(small_pairs(), "diffusion_model.{}.", alpha=torch.tensor(alpha))
    with pytest.raises(LoraError, match="no usable alpha"):
        check(lora_of(tmp_path, tensors), SHAPES)


# -- differences and leftovers


def differences(target: dict[str, Tensor], prefix: str, modulation: str) -> dict[str, Tensor]:
    """An extractor's files for a full-weight difference: pairs for large matrices, differences for the rest."""
    store, tensors = base(), {}
    for name, weight in target.items():
        change, stem = weight - store.read(name), name.rpartition(".")[0]
        if change.dim() == 2 and change.numel() >= 4096 and "head" not in name:
            u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
            tensors[f"{prefix}{stem}.lora_up.weight"] = (u * s).float()
            tensors[f"{prefix}{stem}.lora_down.weight"] = v.float()
        elif name.endswith("modulation"):
            tensors[f"{prefix}{modulation.format(stem)}"] = change
        else:
            tensors[f"{prefix}{stem}.diff{'_b' if name.endswith('bias') else ''}"] = change
    return tensors


@pytest.mark.parametrize(
    ("prefix", "modulation"),
    [("diffusion_model.", "{}.diff_m"), ("", "{}.modulation.diff"), ("transformer.", "{}.diff_m")],
)
def test_base_and_extracted_lora_give_the_tuned_weights(prefix: str, modulation: str, tmp_path: Path) -> None:
    generator, store = torch.Generator().manual_seed(2), base()
    target = {n: store.read(n) + 0.1 * torch.randn(e.shape, generator=generator) for n, e in store.items()}
    lora = lora_of(tmp_path, differences(target, prefix, modulation))
    coverage = check(lora, SHAPES)
    assert coverage.pairs[0] + coverage.differences[0] == len(SHAPES) == len(target)
    found = merged(lora)
    for name, expected in target.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_differences_take_the_strength_but_not_alpha(tmp_path: Path) -> None:
    change = torch.ones(64)
    module = "blocks.0.self_attn.q"
    tensors = spelled({module: small_pairs()[module]}, "{}.", alpha=STORED) | {f"{module}.diff_b": change}
    found = merged(lora_of(tmp_path, tensors, strength=0.25))
    assert torch.equal(found[f"{module}.bias"], base().read(f"{module}.bias") + 0.25)


def test_image_branch_of_wan21_is_ignored(tmp_path: Path) -> None:
    vector, matrix = torch.ones(64), torch.ones(64, 4)
    extra = {
        "diffusion_model.img_emb.proj.0.diff": vector,
        "diffusion_model.img_emb.proj.1.lora_up.weight": matrix,
        "diffusion_model.img_emb.proj.1.lora_down.weight": matrix.T.contiguous(),
        "diffusion_model.img_emb.proj.1.alpha": STORED,
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": matrix,
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": matrix.T.contiguous(),
        "diffusion_model.blocks.0.cross_attn.k_img.diff_b": vector,
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": vector,
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": matrix,
        "transformer.blocks.0.attn2.add_v_proj.lora_A.weight": matrix,
        "transformer.condition_embedder.image_embedder.ff.net.2.lora_B.weight": matrix,
        "transformer.blocks.0.attn2.norm_added_k.diff": vector,
        "lora_unet_blocks_1_cross_attn_v_img.lora_up.weight": matrix,
    }
    lora = lora_of(tmp_path, spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED) | extra)
    assert_is_the_small_lora(lora)
    summary = check(lora, SHAPES).summary()
    assert summary.startswith("20/20 pairs, alpha/rank 0.5, 13 ignored (Wan2.1 image branch")
    assert summary.endswith(", 0 unmatched")


def test_patch_embedding_for_other_channels_is_skipped_with_its_bias(tmp_path: Path) -> None:
    extra = {"diffusion_model.patch_embedding.diff": torch.ones(64, 36, 1, 2, 2)}
    extra["diffusion_model.patch_embedding.diff_b"] = torch.ones(64)
    tensors = spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED) | extra
    lora = lora_of(tmp_path, tensors)
    assert_is_the_small_lora(lora)
    assert sorted(check(lora, SHAPES).skipped) == sorted(extra)
    i2v = base("i2v-A14B")
    assert check(lora, i2v.shapes).differences == (2, 2)
    found = merged(lora, i2v)["patch_embedding.weight"]
    assert torch.equal(found, i2v.read("patch_embedding.weight") + 1)


def test_pair_on_a_convolution(tmp_path: Path) -> None:
    up, down = torch.randn(64, 3, 1, 1, 1), torch.randn(3, 16, 1, 2, 2)
    lora = lora_of(tmp_path, {"patch_embedding.lora_up.weight": up, "patch_embedding.lora_down.weight": down})
    weight = base().read("patch_embedding.weight")
    expected = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert torch.equal(merged(lora)["patch_embedding.weight"], expected)


# -- full size, from headers


@pytest.mark.parametrize("network", ["dit_t2v_a14b", "dit_i2v_a14b"])
def test_published_layout_covers_the_released_networks(network: str, tmp_path: Path) -> None:
    tensors = {name: ("F32" if shape else "I64", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<q", 8) for name, (dtype, _) in tensors.items() if dtype == "I64"}
    path = sparse(tmp_path / "high_noise_model.safetensors", tensors, alphas)
    assert path.stat().st_size == 1_226_977_424  # the size of the published files
    coverage = check(Lora.open(path, expert="high"), manifest(network))
    assert coverage.summary() == "400/400 pairs, alpha/rank 0.125, 0 unmatched"
    assert coverage.tensors == 1200
    assert not coverage.warnings


def test_experts_of_different_rank(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-250928"
    folder.mkdir()
    for expert, rank in {"high": 128, "low": 64}.items():
        tensors = {
            name: ("F32" if shape else "F64", tuple(rank if axis == 64 else axis for axis in shape))
            for name, shape in manifest("lightning_lora").items()
        }
        alphas = {name: struct.pack("<d", 8) for name, (dtype, _) in tensors.items() if dtype == "F64"}
        sparse(folder / f"{expert}_noise_model.safetensors", tensors, alphas)
    for expert, path in files_of(folder, ("high", "low")).items():
        coverage = check(Lora.open(path, expert=expert), released_shapes("t2v-A14B"))
        rank = {"high": 128, "low": 64}[expert]
        assert (coverage.release, coverage.ranks, coverage.scales) == ("t2v-250928", (rank,), (8 / rank,))


# -- refusals


def lightning_tensors() -> dict[str, Tensor]:
    return spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED)


Q = "diffusion_model.blocks.0.self_attn.q"
FOREIGN = ("b_norm", "boft_r", "ia3_l", "lora_a", "lora_b", "lora_embedding_A", "lora_embedding_B", "lora_mid",
           "oft_diag", "reshape_weight", "set_weight", "w_norm")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{Q}.lora_up.weight": None}, r"1 of 59 tensors do not fit .*lora_down.weight has no up matrix beside it"),
        ({f"{Q}.lora_up.weight": torch.ones(63, 4)}, r"is \[63, 4\] x \[4, 64\] where the model's blocks.0.self_attn"),
        ({f"{Q}.lora_down.weight": torch.ones(5, 64)}, r"is \[64, 4\] x \[5, 64\] where"),
        ({f"{Q}.lora_down.weight": torch.ones(4, 63)}, r"is \[64, 4\] x \[4, 63\] where"),
        (
            {"diffusion_model.head.head.alpha": torch.ones(())},
            r"1 of 61 tensors \(first: diffusion_model.head.head.alpha",
        ),
        ({f"{Q}.diff_b": torch.ones(65)}, r"q.diff_b is \[65\] where the model's blocks.0.self_attn.q.bias is \[64\]"),
        ({f"{Q}.diff": torch.ones(64, 64, dtype=torch.int8)}, r"q.diff is stored as I8, not as floating point"),
        ({f"{Q}.dora_scale": torch.ones(63)}, r"q.dora_scale is \[63\], not one norm for each of the 64 rows"),
        ({f"{Q}.dora_scale": torch.ones(1, 64)}, r"q.dora_scale is \[1, 64\], not one norm for each of the 64 rows"),
        ({"diffusion_model.head.head.dora_scale": torch.ones(64)}, "head.dora_scale has no LoRA beside it"),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4)}, r"of a kind not supported: lora_mid"),
        (
            {f"{Q}.{kind}{'.weight' * kind.startswith('lora')}": torch.ones(4) for kind in FOREIGN},
            f"not supported: {', '.join(FOREIGN)}$",
        ),
        ({"diffusion_model.blocks.9.self_attn.q.lora_up.weight": torch.ones(4)}, r"1 of 61 tensors \(first: diffusion"),
        ({"text_encoder.layers.0.q.lora_A.weight": torch.ones(4)}, r"match no part of the model; --lora_allow_partial"),
        (
            {"diffusion_model.blocks.1.alpha": torch.ones(())},
            r"1 of 61 tensors \(first: diffusion_model.blocks.1.alpha",
        ),
        ({f"{Q}.lora_down.weight": torch.ones(()), f"{Q}.lora_up.weight": torch.ones(())}, r"is \[\] x \[\] where"),
    ],
)
def test_refusals(changes: dict[str, Tensor | None], sentence: str, tmp_path: Path) -> None:
    tensors = {name: t for name, t in (lightning_tensors() | changes).items() if t is not None}
    lora = lora_of(tmp_path, tensors)
    with pytest.raises(LoraError, match=sentence) as caught:
        check(lora, SHAPES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "arguments", "sentence"),
    [
        ("lora_unet_{}.", {"module": kohya}, "20 of 60 tensors .* is for the same weight as .*, in another spelling"),
        ("transformer.{}.", {"module": diffusers_module}, "40 of 100 tensors .* is for the same weight as"),
        ("{}.", {}, "40 of 100 .* says the same as"),
        ("diffusion_model.{}.", {"halves": ("lora_B.weight", "lora_A.weight")}, "40 of 100 .* says the same as"),
    ],
)
def test_one_module_in_two_spellings(form: str, arguments: dict, sentence: str, tmp_path: Path) -> None:
    again = {n: t for n, t in spelled(small_pairs(), form, alpha=STORED, **arguments).items() if "alpha" not in n}
    if "lora_unet" in form:  # only the alphas are kohya's
        again = {n: t for n, t in spelled(small_pairs(), form, alpha=STORED, **arguments).items() if "alpha" in n}
    first = {n: t for n, t in lightning_tensors().items() if "lora_unet" not in form or "alpha" not in n}
    lora = lora_of(tmp_path, first | again)
    with pytest.raises(LoraError, match=sentence):
        check(lora, SHAPES)
    with pytest.raises(LoraError, match=r"says the same as|in another spelling"):
        Merge([lora], SHAPES)
    with pytest.raises(LoraError, match=r"says the same as|in another spelling"):
        add_adapters(module_tree(base()), [lora])


def test_a_modulation_in_two_spellings(tmp_path: Path) -> None:
    twice = {"blocks.0.diff_m": torch.ones(1, 6, 64), "blocks.0.modulation.diff": torch.ones(1, 6, 64)}
    with pytest.raises(LoraError, match=r"blocks\.0\..* is for the same weight as blocks\.0\..*, in another spelling"):
        check(lora_of(tmp_path, twice), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = {module: (up.to(dtype), down.to(dtype)) for module, (up, down) in small_pairs().items()}
    tensors = {n: t for n, t in spelled(pairs, "diffusion_model.{}.", alpha=STORED).items() if "alpha" not in n}
    lora = lora_of(tmp_path, tensors)
    found, store = merged(lora), base()
    for module, (up, down) in pairs.items():
        assert torch.equal(found[f"{module}.weight"], plain(store.read(f"{module}.weight"), up, down, 1.0))
    model = module_tree(store)
    add_adapters(model, [lora])
    for module, (up, down) in pairs.items():
        layer = model.get_submodule(module)
        assert torch.equal(layer.get_delta_weight("lora_0"), up.float() @ down.float())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_nan_is_found_when_loading_in_both_modes(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) for n, t in lightning_tensors().items() if "alpha" not in n}
    last = list(tensors)[-1]
    as_float = tensors[last].float()
    as_float[0, 0] = value
    lora = lora_of(tmp_path, tensors | {last: as_float.to(dtype)})
    sentence = f"LoRA .*lora.safetensors: tensor {re.escape(last)} holds NaN or Inf"
    with pytest.raises(LoraError, match=sentence):
        merged(lora)
    with pytest.raises(LoraError, match=sentence):
        add_adapters(module_tree(base()), [lora])


def test_nothing_matches(tmp_path: Path) -> None:
    lora = lora_of(tmp_path, {"unet.down_blocks.0.to_q.lora_A.weight": torch.ones(4, 4)})
    for allow_partial in (False, True):
        with pytest.raises(LoraError, match="nothing in it matches: 0 of 1 tensors belong to this model"):
            check(lora, SHAPES, allow_partial=allow_partial)


def test_partial_is_allowed_on_request_only(tmp_path: Path) -> None:
    lora = lora_of(tmp_path, lightning_tensors() | {"blocks.9.ffn.0.lora_up.weight": torch.ones(4, 4)})
    with pytest.raises(LoraError, match="1 of 61 tensors"):
        check(lora, SHAPES)
    coverage = check(lora, SHAPES, allow_partial=True)
    assert coverage.unmatched == ["blocks.9.ffn.0.lora_up.weight"]
    assert coverage.summary() == "20/20 pairs, alpha/rank 0.5, 1 unmatched"
    assert "1 of 61 tensors (first: blocks.9" in coverage.warnings[0]


def test_wrong_model_size_and_full_weights(tmp_path: Path) -> None:
    lora = Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors")
    with pytest.raises(LoraError, match="20 of 60 tensors do not fit the model"):
        check(lora, released_shapes("ti2v-5B"))
    with pytest.raises(LoraError, match=r"do not fit the model .* match no part of the model$"):  # no partial way out
        check(lora, {"blocks.0.cross_attn.k.weight": (8, 8)})
    full = write(tmp_path / "full.safetensors", {name: base().read(name) for name in base()})
    with pytest.raises(LoraError, match="is a full weight file, not a LoRA"):
        check(Lora.open(full), SHAPES)


@pytest.mark.parametrize("cut", [0, 4, 100, 30_000])
def test_truncated(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((lora_dir("t2v-A14B") / "high_noise_model.safetensors").read_bytes()[:cut])
    with pytest.raises(LoraError, match=r"cut\.safetensors: (not a safetensors file, or cut off|truncated)"):
        Lora.open(path)


def test_corrupt_header(tmp_path: Path) -> None:
    content = bytearray((lora_dir("t2v-A14B") / "high_noise_model.safetensors").read_bytes())
    content[40] = 0
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(LoraError, match="corrupt"):
        Lora.open(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ('{"peft_type": "OFT"}', "adapters of kind 'OFT' are not supported"),
        ('{"peft_type": "\\u001b[31m"}', r"adapters of kind '\\x1b\[31m' are not"),
        ('{"\\u001b.r": 1}', r"settings are of \['\\x1b'\], not a transformer"),
        ('{"init_lora_weights": "pissa_niter_4"}', "its base is not the released one"),
        ('{"lora_alpha": "x"}', "in the adapter settings are unusable"),
        ('{"alpha_pattern": {"(": 4}}', "in the adapter settings are unusable"),
        ('{"alpha_pattern": {"q": 0}}', "in the adapter settings are unusable"),
        ("{", "the adapter settings are not a JSON object"),
        ("[]", "the adapter settings are not a JSON object"),
        (None, "is a folder without adapter_config.json; name one file"),
    ],
)
def test_folders_that_are_no_plain_lora(settings: str | None, sentence: str, tmp_path: Path) -> None:
    write(tmp_path / PEFT_WEIGHTS, lightning_tensors())
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(LoraError, match=sentence):
        Lora.open(tmp_path)


def test_arguments_of_open(tmp_path: Path) -> None:
    path = write(tmp_path / "l.safetensors", lightning_tensors())
    with pytest.raises(LoraError, match="alpha must be a number above 0, not -1"):
        Lora.open(path, default_alpha=-1)
    with pytest.raises(LoraError, match="no such file"):
        Lora.open(tmp_path / "absent.safetensors")


# -- folders, experts, tasks


def test_files_of(tmp_path: Path) -> None:
    high = lora_dir("t2v-A14B") / "high_noise_model.safetensors"
    assert files_of(lora_dir("t2v-A14B"), ("high", "low"))["high"] == high
    assert list(files_of(lora_dir("ti2v-5B"), ("model",))) == ["model"]
    with pytest.raises(LoraError, match=r"high_noise_model.safetensors and low_noise_model.safetensors missing"):
        files_of(lora_dir("ti2v-5B"), ("high", "low"))
    with pytest.raises(LoraError, match="no such folder"):
        files_of(tmp_path / "absent", ("high", "low"))
    write(tmp_path / "wan2.2_i2v_A14b_high_noise_lora_1022.safetensors", lightning_tensors())
    with pytest.raises(LoraError, match=r"low_noise_model.safetensors missing; the folder holds wan2.2_i2v"):
        files_of(tmp_path, ("high", "low"))
    low = write(tmp_path / "wan2.2_i2v_A14b_low_noise_lora_1022.safetensors", lightning_tensors())
    assert files_of(tmp_path, ("high", "low"))["low"] == low


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model.safetensors", "high"),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora_LOW_fp16.safetensors", "low"),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64.safetensors", "high"),
        ("LowNoise.safetensors", "low"),
        ("slow_motion.safetensors", None),
        ("highlights.safetensors", None),
        ("high_and_low.safetensors", None),
    ],
)
def test_expert_of(name: str, expert: str | None) -> None:
    assert expert_of(name) == expert


def test_warnings_about_expert_and_task(tmp_path: Path) -> None:
    folder = tmp_path / "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1"
    path = write(folder / "high_noise_model.safetensors", lightning_tensors())
    said = check(Lora.open(path, expert="low"), SHAPES).warnings
    assert "is named after the high-noise expert but used for the low-noise one" in said[0]
    assert "was published for i2v-A14B, this is t2v-A14B" in said[1]
    assert not check(Lora.open(path, expert="high"), base("i2v-A14B").shapes).warnings


def test_names_can_say_the_expert_too(tmp_path: Path) -> None:
    path = family("diffusers, low half only", tmp_path)
    assert "is named after the low-noise expert" in check(Lora.open(path, expert="high"), SHAPES).warnings[0]
    assert not check(Lora.open(path, expert="low"), SHAPES).warnings


def test_coverage_is_plain_data() -> None:
    coverage = check(Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors", 0.8), SHAPES)
    assert json.loads(json.dumps(coverage.as_dict()))["pairs"] == [20, 20]
    assert coverage.summary() == "20/20 pairs, alpha/rank 0.5, strength 0.8, 0 unmatched"
