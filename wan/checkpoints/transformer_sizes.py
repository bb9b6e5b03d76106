"""The sizes of an expert: config.json, checked against the weights before anything of those sizes is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.checkpoints.outside import in_one_line, misread, size_of
from wan.configs.task import PATCH
from wan.utils.errors import InputError
from wan.utils.files import parse_json

HEAD_WIDTH = 128  # of every published Wan transformer; it does not follow from the weights
# sizes in config.json -> the tensor, its axis, and how many times the size that axis is
SIZED_BY = {
    "dim": ("text_embedding.0.weight", 0, 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0, 1),
    "in_dim": ("patch_embedding.weight", 1, 1),
    "out_dim": ("head.head.weight", 0, math.prod(PATCH)),
    "freq_dim": ("time_embedding.0.weight", 1, 1),
}
DIFFUSERS_KEYS = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}


def transformer_sizes(
    config: Path | None, shapes: Mapping[str, tuple[int, ...]], where: str, max_text: int
) -> dict[str, Any]:
    """The sizes in config.json; without one those of the weights, with heads as wide as in all published models.

    where: the weights in messages. max_text: tokens of the longest prompt. InputError for sizes that do not fit.
    """
    for name, axis, _ in SIZED_BY.values():
        if len(shapes.get(name, ())) <= max(axis, 1):
            raise InputError(f"{where}: not a Wan transformer: tensor {name} is missing, or has too few axes")
    found = {key: shapes[name][axis] / times for key, (name, axis, times) in SIZED_BY.items()}
    try:
        found["num_layers"] = count_blocks(shapes)
    except ValueError as e:
        raise InputError(f"{where}: not a Wan transformer: {e}") from e
    if config is None:
        if found["dim"] % HEAD_WIDTH or not found["dim"] or not found["out_dim"].is_integer():
            raise InputError(
                f"{where}: the weights do not tell their heads, and a width of {found['dim']:g} is no multiple of "
                f"{HEAD_WIDTH}; give the folder with their config.json as --ckpt_dir"
            )
        sizes: dict[str, Any] = {key: int(size) for key, size in found.items()}
        return sizes | {"num_heads": sizes["dim"] // HEAD_WIDTH, "text_len": max_text, "eps": 1e-6}
    sizes = _read_sizes(config, (*found, "num_heads", "text_len", "eps"), max_text)
    own = where == str(config.parent)  # else the weights are a file of their own, which is to blame
    wrong = [
        f"{key} is {sizes[key]!r:.40}, but the weights have {size:g}"
        for key, size in found.items()
        if size != sizes[key]
    ]
    if wrong and not own:
        raise InputError(f"{where}: of another size than the checkpoint: in {config} {'; '.join(wrong)}")
    if sizes["dim"] % (2 * sizes["num_heads"]):
        wrong.append(f"num_heads {sizes['num_heads']!r:.40} does not divide dim {sizes['dim']} into an even width")
    if sizes["text_len"] > max_text:
        wrong.append(f"text_len is {sizes['text_len']!r:.40}, at most {max_text} is possible")
    if wrong:
        raise InputError(f"{config}: does not fit its weights: {'; '.join(wrong)}")
    return sizes


def _read_sizes(config: Path, keys: tuple[str, ...], max_text: int) -> dict[str, Any]:
    """The sizes `keys` of a config.json, the original's or diffusers'. InputError for anything else."""
    size_of(config)
    try:
        values = parse_json(config.read_bytes())
        if "num_attention_heads" in values:
            values |= {ours: values[theirs] for ours, theirs in DIFFUSERS_KEYS.items()} | {"text_len": max_text}
            widths = values["num_heads"], values["attention_head_dim"]
            values["dim"] = math.prod(widths) if all(type(width) is int for width in widths) else None
        sizes: dict[str, Any] = {key: values[key] for key in keys}
    except (ValueError, KeyError, TypeError) as e:
        raise misread(config, f"not the configuration of a Wan transformer ({in_one_line(e)})") from e
    right = {key: type(size) is int and size > 0 for key, size in sizes.items()}
    right["eps"] = isinstance(sizes["eps"], float) and 0 < sizes["eps"] < 1
    if wrong := [f"{key} is {sizes[key]!r:.40}" for key in sizes if not right[key]]:
        raise InputError(f"{config}: not the configuration of a Wan transformer: {', '.join(wrong)}")
    return sizes


def count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of blocks by the names. ValueError where one is left out: a name alone makes no million blocks."""
    found = {match[1] for name in shapes if (match := re.match(r"blocks\.([^.]*)", name))}
    if odd := found - {str(number) for number in range(len(found))}:
        raise ValueError(f"a tensor is of block {min(odd)!r:.40}, but there are {len(found)} blocks")
    return len(found)
