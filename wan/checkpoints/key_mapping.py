"""Names of the three kinds of networks in diffusers, transformers and llama.cpp, and the way back to ours.

ours -> theirs: `diffusers_name` (transformer), `vae_name`, `text_name`; back: `original`, `original_vae`,
`original_text`, which take all names of a file, because the two autoencoders use one name for different parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

# Our fragment of a name -> diffusers' (WanTransformer3DModel); each name has at most one of them.
DIFFUSERS = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    *((f"self_attn.{x}.", f"attn1.to_{x}.") for x in "qkv"),
    ("self_attn.o.", "attn1.to_out.0."),
    ("self_attn.norm_", "attn1.norm_"),
    *((f"cross_attn.{x}.", f"attn2.to_{x}.") for x in "qkv"),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("cross_attn.norm_", "attn2.norm_"),
    (".norm3.", ".norm2."),  # the norm before cross-attention; our norm2 has no parameters
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
)
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
RESIDUAL = (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"),
            ("shortcut", "conv_shortcut"))  # fmt: skip
ENDS = (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
RESNETS = 3  # of a decoder level, after which the 2.1 autoencoder counts its upsampling on
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
    for ours, theirs in DIFFUSERS:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def original(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a transformer's parameters -> ours."""
    found = {}
    for name in names:  # the more particular of the two modulations is at the end of the table
        ours, theirs = next((pair for pair in reversed(DIFFUSERS) if pair[1] in name), ("", ""))
        found[name] = name.replace(theirs, ours)
    return found


def vae_name(name: str) -> str:
    """diffusers' name of a parameter of either autoencoder's checkpoint."""
    half, _, rest = name.partition(".")
    if half in ("conv1", "conv2"):
        return f"{'quant_conv' if half == 'conv1' else 'post_quant_conv'}.{rest}"
    if rest.startswith("middle."):
        rest = f"mid_block.{MIDDLE[int(rest[7])]}{rest[8:]}"
    rest = _renamed(rest, ENDS)
    if level := re.match(r"(down|up)samples\.(\d+)\.(?:\1samples\.(\d+)\.)?", rest):
        inner, way = rest[level.end() :], level[1]
        sampler = inner.startswith(("resample.", "time_conv."))
        if level[3]:  # Wan2.2 nests a level's layers
            layer = f"{level[2]}.{f'{way}sampler' if sampler else f'resnets.{level[3]}'}"
        elif way == "down":
            layer = level[2]
        else:
            block, number = divmod(int(level[2]), RESNETS + 1)
            layer = f"{block}.{'upsamplers.0' if sampler else f'resnets.{number}'}"
        rest = f"{way}_blocks.{layer}.{inner}"
    for ours, theirs in RESIDUAL:  # of a residual block, anywhere in the name
        rest = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", rest)
    return f"{half}.{rest}"


def original_vae(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of an autoencoder's parameters -> the checkpoint's."""
    names = list(names)
    ours = _vae_names(48 if any(".down_blocks.0.resnets." in name for name in names) else 16)
    return {name: ours.get(name, name) for name in names}


@cache
def _vae_names(channels: int) -> dict[str, str]:
    """diffusers' name -> ours of each parameter of the autoencoder with so many latent channels."""
    import torch

    from wan.modules.vae import VAES, WanVAE

    with torch.device("meta"):
        return {vae_name(name): name for name, _ in WanVAE(*VAES[channels]).named_parameters()}


def text_name(name: str, source: int = OURS, target: int = TRANSFORMERS) -> str:
    """One spelling of a parameter of the text encoder's checkpoint in another."""
    if block := re.match(re.escape(TEXT_BLOCKS[source]) + r"(\d+)\.", name):
        return f"{TEXT_BLOCKS[target]}{block[1]}.{_renamed(name[block.end() :], TEXT, source, target)}"
    return _renamed(name, TEXT_ENDS, source, target)


def original_text(names: Iterable[str], spelling: int = TRANSFORMERS) -> dict[str, str]:
    """transformers' or llama.cpp's names of a text encoder's parameters -> ours."""
    names, repeated = list(names), "encoder.embed_tokens.weight"  # transformers' repeats `shared`, if there is one
    listed = [name for name in names if name != repeated or "shared.weight" not in names]
    return {name: text_name(name.replace(repeated, "shared.weight"), spelling, OURS) for name in listed}


def _renamed(name: str, table: Iterable[Sequence[str]], source: int = 0, target: int = 1) -> str:
    """`name` with its beginning, up to a dot, replaced."""
    for row in table:
        if name.startswith(f"{row[source]}."):
            return row[target] + name.removeprefix(row[source])
    return name
