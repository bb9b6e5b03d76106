"""diffusers' and transformers' names for the parameters of the three kinds of networks, and the way back.

ours -> theirs: `diffusers_name` (transformer, in names.py), `vae_name`, `text_name`; back: `original`, `original_vae`,
`original_text`, which take all names of a file, because the two autoencoders use one name for different places.
llama.cpp has names of its own for a text encoder's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Spellings = Iterable[tuple[str, str]]  # ours, theirs
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
RESIDUAL = (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"),
            ("shortcut", "conv_shortcut"))  # fmt: skip
ENDS = (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
TEXT = (
    ("norm1", "layer.0.layer_norm"),
    *((f"attn.{x}", f"layer.0.SelfAttention.{x}") for x in "qkvo"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("norm2", "layer.1.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
)
TEXT_ENDS = (("token_embedding", "shared"), ("norm", "encoder.final_layer_norm"))
LLAMA_TEXT = (
    ("norm1", "attn_norm"),
    *((f"attn.{x}", f"attn_{x}") for x in "qkvo"),
    ("pos_embedding.embedding", "attn_rel_b"),
    ("norm2", "ffn_norm"),
    ("ffn.gate.0", "ffn_gate"),
    ("ffn.fc1", "ffn_up"),
    ("ffn.fc2", "ffn_down"),
)
LLAMA_TEXT_ENDS = (("token_embedding", "token_embd"), ("norm", "enc.output_norm"))
RESNETS = 3  # of a decoder level, after which the 2.1 autoencoder counts its upsampling on


def original(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a transformer's parameters -> ours."""
    return {name: _original(name) for name in names}


def _original(name: str) -> str:
    for ours, theirs in reversed(DIFFUSERS):  # the more particular of the two modulations comes last there
        if theirs in name:
            return name.replace(theirs, ours)
    return name


def vae_name(name: str) -> str:
    """What diffusers calls a parameter of either autoencoder's checkpoint."""
    half, _, rest = name.partition(".")
    if half in ("conv1", "conv2"):
        return f"{'quant_conv' if half == 'conv1' else 'post_quant_conv'}.{rest}"
    if rest.startswith("middle."):
        rest = f"mid_block.{MIDDLE[int(rest[7])]}{rest[8:]}"
    rest = _renamed(rest, ENDS)
    place = re.match(r"(down|up)samples\.(\d+)\.(?:\1samples\.(\d+)\.)?", rest)
    if not place:
        return f"{half}.{_renamed_in(rest)}"
    inner = rest[place.end() :]
    layers = [int(number) for number in place.groups()[1:] if number]
    sampler = inner.startswith(("resample.", "time_conv."))
    return f"{half}.{_vae_place(layers, place[1], sampler)}{_renamed_in(inner)}"


def _vae_place(numbers: list[int], way: str, sampler: bool) -> str:
    if len(numbers) == 2:  # Wan2.2 nests a level's layers
        level, layer = numbers
        return f"{way}_blocks.{level}.{f'{way}sampler' if sampler else f'resnets.{layer}'}."
    if way == "down":
        return f"down_blocks.{numbers[0]}."
    level, layer = divmod(numbers[0], RESNETS + 1)
    return f"up_blocks.{level}.{'upsamplers.0' if sampler else f'resnets.{layer}'}."


def original_vae(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of an autoencoder's parameters -> the checkpoint's."""
    names = list(names)
    nested = any(".down_blocks.0.resnets." in name for name in names)
    return {name: _original_vae(name, nested) for name in names}


def _original_vae(name: str, nested: bool) -> str:
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if half == 'quant_conv' else 'conv2'}.{rest}"
    for number, part in enumerate(MIDDLE):
        rest = rest.replace(f"mid_block.{part}.", f"middle.{number}.")
    if (end := _renamed(rest, _back(ENDS))) != rest:
        return f"{half}.{end}"
    block = re.match(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)\.|(?:down|up)samplers?\.(?:0\.)?)?", rest)
    if not block:
        return f"{half}.{_renamed_in(rest, back=True)}"
    way, level = block[1], int(block[2])
    last = RESNETS if way == "up" else RESNETS - 1
    layer = int(block[3]) if block[3] else last
    flat = level if way == "down" else level * (RESNETS + 1) + layer
    place = f"{way}samples.{level}.{way}samples.{layer}" if nested else f"{way}samples.{flat}"
    return f"{half}.{place}.{_renamed_in(rest[block.end() :], back=True)}"


def text_name(name: str) -> str:
    """What transformers' UMT5EncoderModel calls a parameter of the text encoder's checkpoint."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return f"encoder.block.{block[1]}.{_renamed(name[block.end() :], TEXT)}"
    return _renamed(name, TEXT_ENDS)


def original_text(names: Iterable[str]) -> dict[str, str]:
    """transformers' names of a text encoder's parameters -> ours. `encoder.embed_tokens` repeats `shared`."""
    names, repeated = list(names), "encoder.embed_tokens.weight"
    ends = TEXT_ENDS if "shared.weight" in names else (*TEXT_ENDS, ("token_embedding", "encoder.embed_tokens"))
    listed = [name for name in names if name != repeated or ends is not TEXT_ENDS]
    return {name: _original_text(name, r"encoder\.block\.(\d+)\.", TEXT, ends) for name in listed}


def original_llama_text(names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's names of a text encoder's parameters -> ours."""
    return {name: _original_text(name, r"enc\.blk\.(\d+)\.", LLAMA_TEXT, LLAMA_TEXT_ENDS) for name in names}


def _original_text(name: str, start: str, inside: Spellings, outside: Spellings) -> str:
    """start: matches what stands before a block's own names."""
    if block := re.match(start, name):
        return f"blocks.{block[1]}.{_renamed(name[block.end() :], _back(inside))}"
    return _renamed(name, _back(outside))


def _back(table: Spellings) -> list[tuple[str, str]]:
    return [(theirs, ours) for ours, theirs in table]


def _renamed(name: str, table: Spellings) -> str:
    """`name` with its beginning, up to a dot, replaced."""
    for before, after in table:
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    return name


def _renamed_in(name: str, back: bool = False) -> str:
    """The parts of a residual block, wherever they stand in the name."""
    for ours, theirs in RESIDUAL:
        before, after = (theirs, ours) if back else (ours, theirs)
        name = re.sub(rf"(^|\.){re.escape(before)}\.", rf"\g<1>{after}.", name)
    return name


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


def diffusers_name(name: str) -> str:
    """What diffusers calls the parameter that the original network calls `name`."""
    for ours, theirs in DIFFUSERS:
        if ours in name:
            return name.replace(ours, theirs)
    return name
