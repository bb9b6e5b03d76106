"""Names of the three kinds of networks in diffusers, transformers and llama.cpp, and the way back to ours.

The way back takes all names of a file, because the two autoencoders use one name for different parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

# Our fragment of a name -> diffusers' (WanTransformer3DModel); each name has at most one of them.
DIFFUSERS = (
    *((f"{x}_embedding.{2 * n}.", f"condition_embedder.{x}_embedder.linear_{n + 1}.")
      for x in ("text", "time") for n in (0, 1)),
    ("time_projection.1.", "condition_embedder.time_proj."),
    *((f"{ours}_attn.{x}", f"{theirs}.{y}") for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
      for x, y in (("q.", "to_q."), ("k.", "to_k."), ("v.", "to_v."), ("o.", "to_out.0."), ("norm_", "norm_"))),
    (".norm3.", ".norm2."),  # the norm before cross-attention; our norm2 has no parameters
    (".ffn.0.", ".ffn.net.0.proj."), (".ffn.2.", ".ffn.net.2."), ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"), (".modulation", ".scale_shift_table"),
)  # fmt: skip
# our pattern -> diffusers', of both autoencoders, one after the other
VAE_NAMES = (
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."),
    (r"\.conv1\.", ".conv_in."), (r"\.head\.0\.", ".norm_out."), (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    # Wan2.2 nests a level's layers, Wan2.1 counts them on: three blocks and a sampler in each level of the decoder
    (r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(?=resample|time_conv)", r".\1_blocks.\2.\1sampler."),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.downsamples\.(\d+)\.", r".down_blocks.\1."),
    *((rf"\.upsamples\.{4 * level + n}\.", f".up_blocks.{level}.{name}.") for level in range(4)
      for n, name in enumerate(("resnets.0", "resnets.1", "resnets.2", "upsamplers.0"))),
    *((rf"\.residual\.{n}\.", f".{name}.") for n, name in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (6, "conv2"))),
    (r"\.shortcut\.", ".conv_shortcut."),
)  # fmt: skip
# a text encoder's names: ours, transformers', llama.cpp's
TEXT_BLOCKS = ("blocks.", "encoder.block.", "enc.blk.")
TEXT = (
    ("norm1", "layer.0.layer_norm", "attn_norm"),
    *((f"attn.{x}", f"layer.0.SelfAttention.{x}", f"attn_{x}") for x in "qkvo"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("norm2", "layer.1.layer_norm", "ffn_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo", "ffn_down"),
)
TEXT_ENDS = (("token_embedding", "shared", "token_embd"), ("norm", "encoder.final_layer_norm", "enc.output_norm"))
OURS, TRANSFORMERS, LLAMA = range(3)  # columns of these tables


def diffusers_name(name: str) -> str:
    """diffusers' name of the parameter that the original network calls `name`."""
    return next((name.replace(ours, theirs) for ours, theirs in DIFFUSERS if ours in name), name)


def original(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a transformer's parameters -> ours."""
    rows = DIFFUSERS[::-1]  # the more particular of the two modulations is at the end of the table
    return {name: next((name.replace(theirs, ours) for ours, theirs in rows if theirs in name), name) for name in names}


def vae_name(name: str) -> str:
    """diffusers' name of a parameter of either autoencoder's checkpoint."""
    for ours, theirs in VAE_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def original_vae(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of an autoencoder's parameters -> the checkpoint's."""
    names = list(names)
    ours = _vae_names(48 if any(".down_blocks.0.resnets." in name for name in names) else 16)
    return {name: ours.get(name, name) for name in names}


@cache
def _vae_names(channels: int) -> dict[str, str]:
    """diffusers' name -> ours of each parameter of the autoencoder with this number of latent channels."""
    import torch

    from wan.modules.vae import VAES, WanVAE

    with torch.device("meta"):
        return {vae_name(name): name for name, _ in WanVAE(*VAES[channels]).named_parameters()}


def text_name(name: str, source: int = OURS, target: int = TRANSFORMERS) -> str:
    """One spelling of a parameter of the text encoder's checkpoint in another."""
    block = re.match(re.escape(TEXT_BLOCKS[source]) + r"(\d+)\.", name)
    start, rest = (f"{TEXT_BLOCKS[target]}{block[1]}.", name[block.end() :]) if block else ("", name)
    for row in TEXT if block else TEXT_ENDS:
        if rest.startswith(f"{row[source]}."):
            return start + row[target] + rest.removeprefix(row[source])
    return start + rest


def original_text(names: Iterable[str], spelling: int = TRANSFORMERS) -> dict[str, str]:
    """transformers' or llama.cpp's names of a text encoder's parameters -> ours."""
    names, repeated = list(names), "encoder.embed_tokens.weight"  # transformers' repeats `shared`, if there is one
    listed = [name for name in names if name != repeated or "shared.weight" not in names]
    return {name: text_name(name.replace(repeated, "shared.weight"), spelling, OURS) for name in listed}
