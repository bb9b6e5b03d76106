"""The tables of names against the released networks and against diffusers' own converter."""

import pytest
import torch

from lightning import lora_matching
from tests.support import manifest
from wan.checkpoints.key_mapping import diffusers_name
from wan.configs import TASKS, task_of
from wan.configs.precision import keeps_float32
from wan.modules.model import released_shapes

MANIFESTS = {"t2v-A14B": "dit_t2v_a14b", "i2v-A14B": "dit_i2v_a14b", "ti2v-5B": "dit_ti2v_5b"}


@pytest.mark.parametrize("task", MANIFESTS)
def test_released_shapes_are_the_manifests(task: str) -> None:
    expected = manifest(MANIFESTS[task])
    assert released_shapes(task) == expected
    assert list(released_shapes(task)) == list(expected)


@pytest.mark.parametrize("task", MANIFESTS)
def test_every_spelling_leads_to_one_parameter(task: str) -> None:
    shapes = released_shapes(task)
    theirs = {diffusers_name(name) for name in shapes}
    assert len(theirs) == len(shapes)
    assert theirs & shapes.keys() == {"patch_embedding.weight", "patch_embedding.bias"}
    for spelled in (list(shapes), list(theirs)):
        assert len({name.replace(".", "_") for name in spelled}) == len(shapes)
    table = lora_matching.spellings(shapes)
    assert set(table.values()) == set(shapes)
    for name in shapes:
        for spelling in (name, diffusers_name(name)):
            half_flat = spelling.replace("blocks.", "blocks_", 1)
            assert {
                lora_matching.find(table, each.rpartition(".")[0], "down" if each.endswith("weight") else "diff_b")
                for each in (spelling, half_flat)
                if each.endswith(("weight", "bias"))
            } <= {name}


def test_diffusers_names_are_those_of_its_converter() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # Each value carries its name as a shape, so that the converter's result tells where every tensor went.
    shapes = released_shapes("ti2v-5B")
    given = {name: torch.empty(number, device="meta") for number, name in enumerate(shapes)}
    converted = convert_wan_transformer_to_diffusers(dict(given))
    found = {tensor.shape[0]: name for name, tensor in converted.items()}
    assert {name: found[number] for number, name in enumerate(shapes)} == {
        name: diffusers_name(name) for name in shapes
    }


def test_task_of_reads_the_channels() -> None:
    for task in TASKS:
        assert task_of(released_shapes(task)) == task
    assert task_of({"patch_embedding.weight": (64, 17, 1, 2, 2)}) is None


@pytest.mark.parametrize(
    ("raw", "stem", "kind", "expert"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_up.weight", "blocks.0.self_attn.q", "up", None),
        ("blocks.0.ffn.2.lora_A.default.weight", "blocks.0.ffn.2", "down", None),
        ("blocks.0.ffn.2.lora_B.default.bias", "blocks.0.ffn.2", "up_bias", None),
        ("lora_unet__blocks_3_cross_attn_o.alpha", "blocks_3_cross_attn_o", "alpha", None),
        ("transformer_2.blocks.0.attn1.to_out.0.lora_B.weight", "blocks.0.attn1.to_out.0", "up", "low"),
        ("diffusion_model.blocks.3.diff_m", "blocks.3", "diff_m", None),
        ("head.head.diff_b", "head.head", "diff_b", None),
        ("blocks.3.modulation.diff", "blocks.3.modulation", "diff", None),
        ("lycoris_blocks_0_attn1_to_q.lokr_w1", "blocks_0_attn1_to_q", "lokr_w1", None),
        ("base_model.model.blocks.0.ffn.2.hada_w1_a", "blocks.0.ffn.2", "hada_w1_a", None),
        ("blocks.0.ffn.2.lora_magnitude_vector.default", "blocks.0.ffn.2", "magnitude", None),
        ("blocks.0.ffn.2.lora_magnitude_vector.default.weight", "blocks.0.ffn.2", "magnitude", None),
        ("pipe.dit.blocks.0.ffn.2.dora_scale", "blocks.0.ffn.2", "magnitude", None),
        ("_orig_mod.blocks.0._fsdp_wrapped_module.ffn.2.lora_down.weight", "blocks.0.ffn.2", "down", None),
        ("module.generator.blocks.0.ffn.2.lora_A.weight", "blocks.0.ffn.2", "down", None),
        *((f"{prefix}.blocks.0.ffn.2.alpha", "blocks.0.ffn.2", "alpha", None) for prefix in (
            "model", "model.diffusion_model", "transformer", "unet", "dit", "generator_ema",
            "_checkpoint_wrapped_module",
        )),
    ],
)  # fmt: skip
def test_parse(raw: str, stem: str, kind: str, expert: str | None) -> None:
    assert lora_matching.parse_key(raw) == lora_matching.Key(raw, stem, kind, expert)


@pytest.mark.parametrize(
    "raw", ["blocks.0.self_attn.q.weight", "alpha", "diffusion_model.blocks.0.q.lora_mid.weight", ""]
)
def test_parse_knows_what_is_no_lora_tensor(raw: str) -> None:
    assert lora_matching.parse_key(raw) is None


def test_parameters_kept_in_float32() -> None:
    kept = {name for name in released_shapes("t2v-A14B") if keeps_float32(name)}
    outside = {name for name in kept if not name.startswith("blocks.")}
    assert outside == {
        *(f"time_embedding.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")),
        "time_projection.1.weight",
        "time_projection.1.bias",
        "head.modulation",
        "head.head.weight",
        "head.head.bias",
    }
    assert {name.split(".", 2)[2] for name in kept - outside} == {
        "norm3.weight",
        "norm3.bias",
        *(f"{attention}.norm_{x}.weight" for attention in ("self_attn", "cross_attn") for x in "qk"),
    }
