"""The names of diffusers' layout: those of the real libraries, and back to ours without loss."""

import re
from typing import Any

import gguf
import pytest
import torch

from tests.support import manifest
from wan.checkpoints.key_mapping import (
    LLAMA,
    OURS,
    diffusers_name,
    original,
    original_text,
    original_vae,
    text_name,
    vae_name,
)

NETWORKS = [
    ("dit_t2v_a14b", diffusers_name, original),
    ("dit_ti2v_5b", diffusers_name, original),
    ("vae2_1", vae_name, original_vae),
    ("vae2_2", vae_name, original_vae),
    ("umt5_xxl", text_name, original_text),
]


def real_network(kind: str, blocks: int) -> Any:
    """The library's own network, small in width but with every layer."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    if kind.startswith("dit"):
        return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, ffn_dim=8, num_layers=blocks)
    if kind == "vae2_1":
        return AutoencoderKLWan(base_dim=8)
    if kind == "vae2_2":
        return AutoencoderKLWan(base_dim=8, decoder_base_dim=12, is_residual=True, in_channels=12, out_channels=12)
    return UMT5EncoderModel(UMT5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=blocks, num_heads=2))


def test_llama_cpps_names_are_those_of_its_package() -> None:
    names = list(manifest("umt5_xxl"))
    package = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    there = [package.get_name(text_name(name), (".weight",)) for name in names]
    assert there == [text_name(name, OURS, LLAMA) for name in names]
    assert list(original_text(there, LLAMA).values()) == names


@pytest.mark.parametrize(("kind", "theirs", "ours"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_every_name_of_the_released_networks_there_and_back(kind: str, theirs: Any, ours: Any) -> None:
    names = list(manifest(kind))
    there = [theirs(name) for name in names]
    assert len(set(there)) == len(names)
    assert list(ours(there).values()) == names
    blocks = 1 + max((int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)", name))), default=0)
    with torch.device("meta"):
        library = set(real_network(kind, blocks).state_dict())
    assert set(there) == library - {"encoder.embed_tokens.weight"}
    assert set(ours(library).values()) == set(names)
