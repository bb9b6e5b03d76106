"""The names of the Wan2.2 DiT's parameters: the released networks' shapes, and every spelling LoRA files use for them.

Shapes: D model width, F feed-forward width, C channels in, O channels out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from wan.checkpoints.key_mapping import diffusers_name

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
