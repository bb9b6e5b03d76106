"""The names of the Wan2.2 DiT's parameters: the released networks' shapes, and every spelling LoRA files use for them.

Shapes: D model width, F feed-forward width, C channels in, O channels out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What the published tasks are made of: D, F, blocks, C, O.
NETWORKS = {
    "t2v-A14B": (5120, 13824, 40, 16, 16),
    "i2v-A14B": (5120, 13824, 40, 36, 16),
    "ti2v-5B": (3072, 14336, 30, 48, 48),
}
# Where a checkpoint folder of a task keeps its experts.
EXPERTS = {
    "t2v-A14B": {"high": "high_noise_model", "low": "low_noise_model"},
    "i2v-A14B": {"high": "high_noise_model", "low": "low_noise_model"},
    "ti2v-5B": {"model": "."},
}
STEM = "diffusion_pytorch_model"  # of an expert's file or files, in both layouts
# Where diffusers' layout keeps them.
MODEL_INDEX = "model_index.json"  # only that layout has it
FOLDERS = {"high": "transformer", "low": "transformer_2", "model": "transformer"}
TEXT_WIDTH, TIME_WIDTH = 4096, 256
PATCH = (1, 2, 2)

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

# Parts of Wan2.1's image branch, which Wan2.2 does not have: original and diffusers names, dotted or flattened.
IMAGE_BRANCH = re.compile(
    r"(?:^|[._])(?:img_emb|k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k|image_embedder)(?:[._]|$)"
)
UNSUPPORTED = re.compile(
    r"\.(lora_mid|dora_scale|lora_magnitude_vector|lora_embedding_[AB]|w_norm|b_norm|set_weight|reshape_weight"
    r"|lokr_\w+|hada_\w+|oft_\w+|boft_\w+|ia3_\w+)(?=\.|$)"
)
_PREFIX = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer_2|transformer|model|unet)\.)+"
)
_KOHYA = re.compile(r"lora_unet_{1,2}")
_NAMED = r"(?:\.[^.]+)?"  # PEFT may put the adapter's name here
_KINDS = (
    ("down", rf"(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down|\.lora_A{_NAMED})\.weight|\.lora_A"),
    ("up", rf"(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up|\.lora_B{_NAMED})\.weight|\.lora_B"),
    ("up_bias", rf"\.lora_B{_NAMED}\.bias"),
    ("alpha", r"\.alpha"),
    ("diff", r"\.diff"),
    ("diff_b", r"\.diff_b"),
    ("diff_m", r"\.diff_m"),
)
_MATRIX = re.compile(r"blocks\.(\d+)\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
_KEY = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<{kind}>{suffix})" for kind, suffix in _KINDS) + ")")


@dataclass(frozen=True)
class Key:
    """A LoRA tensor's name, taken apart: `stem` names a module or a parameter in whatever spelling the file uses.

    kind: down, up, up_bias, alpha, diff, diff_b or diff_m. expert: "low" where the name itself says so, else None.
    """

    raw: str
    stem: str
    kind: str
    expert: str | None


def parse(raw: str) -> Key | None:
    """The parts of a LoRA tensor's name; None for a name that no LoRA family uses."""
    prefix = _PREFIX.match(raw)
    found = _KEY.fullmatch(raw, prefix.end() if prefix else 0)
    if not found or not found.lastgroup:
        return None
    expert = "low" if prefix and "transformer_2." in prefix.group() else None
    return Key(raw, _KOHYA.sub("", found["stem"], count=1), found.lastgroup, expert)


def spellings(parameters: Iterable[str]) -> dict[str, str]:
    """Every spelling of every parameter -> its name in the model: original and diffusers, dotted and flattened (kohya).

    A table and not a rule, because a flattened name cannot be taken apart: module names contain underscores.
    """
    table: dict[str, str] = {}
    for name in parameters:
        for spelling in (name, diffusers_name(name)):
            table[spelling] = table[spelling.replace(".", "_")] = name
    return table


def find(table: dict[str, str], stem: str, kind: str) -> str | None:
    """The parameter that a tensor of this kind adds to, looked up in `spellings`' table."""
    leaf = {"up_bias": "bias", "diff_b": "bias", "diff_m": "modulation"}.get(kind, "weight")
    for spelling in (f"{stem}.{leaf}", f"{stem}_{leaf}"):
        if spelling in table:
            return table[spelling]
    return table.get(stem) if kind == "diff" else None  # `blocks.0.modulation.diff` names the parameter in full


def diffusers_name(name: str) -> str:
    """What diffusers calls the parameter that the original network calls `name`."""
    for ours, theirs in DIFFUSERS:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def released_shapes(task: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of one released expert of `task`, in the order of the network."""
    width, feed_forward, blocks, channels_in, channels_out = NETWORKS[task]
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (width, channels_in, *PATCH)}
    shapes["patch_embedding.bias"] = (width,)

    def linear(name: str, out_width: int, in_width: int) -> None:
        shapes[f"{name}.weight"] = (out_width, in_width)
        shapes[f"{name}.bias"] = (out_width,)

    linear("text_embedding.0", width, TEXT_WIDTH)
    linear("text_embedding.2", width, width)
    linear("time_embedding.0", width, TIME_WIDTH)
    linear("time_embedding.2", width, width)
    linear("time_projection.1", 6 * width, width)
    for block in (f"blocks.{i}" for i in range(blocks)):
        shapes[f"{block}.modulation"] = (1, 6, width)
        for attention in ("self_attn", "cross_attn"):
            if attention == "cross_attn":
                shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (width,)
            for layer in "qkvo":
                linear(f"{block}.{attention}.{layer}", width, width)
            shapes[f"{block}.{attention}.norm_q.weight"] = (width,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (width,)
        linear(f"{block}.ffn.0", feed_forward, width)
        linear(f"{block}.ffn.2", width, feed_forward)
    shapes["head.modulation"] = (1, 2, width)
    linear("head.head", channels_out * PATCH[0] * PATCH[1] * PATCH[2], width)
    return shapes


def task_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The published task whose network takes as many channels as this one, None if there is none."""
    channels = shapes.get("patch_embedding.weight", (0, 0))[1]
    return next((task for task, (*_, channels_in, _) in NETWORKS.items() if channels_in == channels), None)


def takes_fp8(name: str, blocks: int, kept: int = 1) -> bool:
    """Whether a run in fp8 holds this parameter in it: the matrices of all blocks but the first and last `kept`."""
    found = _MATRIX.fullmatch(name)
    return found is not None and kept <= int(found[1]) < blocks - kept


def keeps_float32(name: str) -> bool:
    """Whether a run in bf16 keeps this parameter in float32: time embedding, head, and the norms' weights."""
    return name.startswith(("time_embedding.", "time_projection.", "head.")) or any(
        part in name for part in (".norm3.", ".norm_q.", ".norm_k.")
    )
