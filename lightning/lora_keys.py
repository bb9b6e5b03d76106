"""The names of LoRA tensors taken apart, and every spelling that LoRA files use for the model's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightning.lora_kinds import TENSOR_SUFFIXES
from wan.checkpoints.key_mapping import diffusers_name

# Parts of Wan2.1's image branch, which Wan2.2 does not have: original and diffusers names, dotted or flattened.
IMAGE_BRANCH = re.compile(
    r"(?:^|[._])(?:img_emb|k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k|image_embedder)(?:[._]|$)"
)
UNSUPPORTED = re.compile(
    r"\.(lora_mid|lora_embedding_[AB]|w_norm|b_norm|set_weight|reshape_weight|oft_\w+|boft_\w+|ia3_\w+)(?=\.|$)"
)
_PREFIX = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer_2|transformer|model|unet|module"
    r"|pipe\.dit|dit|generator|generator_ema)\.)+"
)
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FLAT = re.compile(r"(?:lora_unet_{1,2}|lycoris_)")
_KEY = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in TENSOR_SUFFIXES.items()) + ")")


@dataclass(frozen=True)
class Key:
    """A LoRA tensor's name, taken apart: `stem` names a module or a parameter in whatever spelling the file uses.

    role: of the tensor in its module (`lora_kinds.SUFFIXES`). expert: "low" where the name itself says so, else None.
    """

    raw: str
    stem: str
    role: str
    expert: str | None


def parse_key(raw: str) -> Key | None:
    """The parts of a LoRA tensor's name; None for a name that no LoRA family uses."""
    name = _WRAPPERS.sub("", raw)
    prefix = _PREFIX.match(name)
    found = _KEY.fullmatch(name, prefix.end() if prefix else 0)
    if not found or not found.lastgroup:
        return None
    expert = "low" if prefix and "transformer_2." in prefix.group() else None
    return Key(raw, _FLAT.sub("", found["stem"], count=1), found.lastgroup, expert)


def flat(name: str) -> str:
    """A name as kohya's trainers spell it."""
    return name.replace(".", "_")


def spellings(parameters: Iterable[str]) -> dict[str, str]:
    """The original and diffusers' name of every parameter, flattened -> its name in the model.

    A table and not a rule, because a flattened name cannot be taken apart: module names contain underscores.
    """
    return {flat(spelling): name for name in parameters for spelling in (name, diffusers_name(name))}


def find(table: dict[str, str], stem: str, role: str) -> str | None:
    """The parameter that a tensor of this role changes, looked up in the table of `spellings`."""
    leaf = {"up_bias": "bias", "diff_b": "bias", "diff_m": "modulation"}.get(role, "weight")
    target = table.get(f"{flat(stem)}_{leaf}")
    return target or (table.get(flat(stem)) if role == "diff" else None)  # `blocks.0.modulation.diff` names it in full
