"""Where each tensor of a LoRA goes: every one ends in exactly one list of `Resolved`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning import lora_keys
from wan.checkpoints.safetensors_file import Entry

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PATCH_EMBEDDING = "patch_embedding.weight"


@dataclass(frozen=True)
class Delta:
    """One addition to parameter `target`: scale * up @ down (`tensors` is that pair) or scale * diff (one tensor)."""

    target: str
    tensors: tuple[str, ...]
    scale: float  # alpha / rank for pairs, 1 for differences; without the strength
    rank: int  # 0 for a difference


@dataclass
class Resolved:
    deltas: list[Delta] = field(default_factory=list)
    alphas: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # Wan2.1's image branch, or the other expert's half
    skipped: list[str] = field(default_factory=list)  # a patch embedding for another number of channels
    unmatched: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    conflicts: dict[str, str] = field(default_factory=dict)  # tensor -> what is wrong with it
    is_full_weights: bool = False


def resolve(
    entries: Mapping[str, Entry],
    keys: Mapping[str, lora_keys.Key],
    scale: Callable[[str, str | None, int], float],
    shapes: Mapping[str, tuple[int, ...]],
    expert: str | None,
) -> Resolved:
    """Match tensors (`entries`, with their names taken apart in `keys`) with the parameters in `shapes`.

    scale(module, alpha tensor, rank) gives alpha / rank. expert picks the half of a file that holds both experts.
    """
    table = lora_keys.spellings(shapes)
    out = Resolved()
    halves = {key.expert for key in keys.values()}
    modules: dict[str, dict[str, str]] = {}  # stem -> kind -> tensor
    spelled: dict[str, lora_keys.Key] = {}  # parameter -> the first tensor that names it
    for name in entries:
        key = keys.get(name)
        if lora_keys.UNSUPPORTED.search(name):
            out.unsupported.append(name)
        elif key is None:
            (out.ignored if lora_keys.IMAGE_BRANCH.search(name) else out.unmatched).append(name)
        elif len(halves) > 1 and expert in ("high", "low") and (key.expert or "high") != expert:
            out.ignored.append(name)
        elif (first := modules.setdefault(key.stem, {}).setdefault(key.kind, name)) != name:
            out.conflicts[name] = f"says the same as {first}"
        elif (target := lora_keys.find(table, key.stem, key.kind)) and spelled.setdefault(target, key).stem != key.stem:
            out.conflicts[name] = f"is for the same weight as {spelled[target].raw}, in another spelling"
    for stem, parts in modules.items():
        _module(out, stem, parts, table, entries, scale, shapes)
    out.is_full_weights = any(name.removeprefix("model.").removeprefix("diffusion_model.") in table for name in entries)
    return out


def _module(
    out: Resolved,
    stem: str,
    parts: dict[str, str],
    table: dict[str, str],
    entries: Mapping[str, Entry],
    scale: Callable[[str, str | None, int], float],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Place all tensors of one module: a pair with its alpha and bias, differences, or things unknown."""
    targets = {kind: target for kind in parts if (target := lora_keys.find(table, stem, kind))}
    placed = {kind: name for kind, name in parts.items() if kind in targets}
    for kind, name in parts.items():
        if kind not in targets:
            (out.ignored if lora_keys.IMAGE_BRANCH.search(name) else out.unmatched).append(name)
    if PATCH_EMBEDDING in targets.values() and _other_channels(placed, entries, shapes[PATCH_EMBEDDING]):
        out.skipped.extend(placed.values())
        return
    rank = next(iter(entries[placed["down"]].shape), 0) if "down" in placed else 0
    pair_scale = scale(stem, placed.get("alpha"), rank) if rank else 1.0
    for kind in ("diff", "diff_b", "diff_m", "up_bias"):
        if kind in placed:
            factor = pair_scale if kind == "up_bias" else 1.0
            _add(out, Delta(targets[kind], (placed[kind],), factor, 0), entries, shapes)
    if "up" in placed and "down" in placed:
        _add(out, Delta(targets["up"], (placed["up"], placed["down"]), pair_scale, rank), entries, shapes)
    elif "up" in placed or "down" in placed:
        here, missing = ("up", "down") if "up" in placed else ("down", "up")
        out.conflicts[placed[here]] = f"has no {missing} matrix beside it"
    if "alpha" in placed:  # beside a difference alone it means nothing; alone it explains nothing
        (out.alphas if len(placed) > 1 else out.unmatched).append(placed["alpha"])


def _add(out: Resolved, delta: Delta, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Take a delta whose shapes and dtypes fit its parameter; note it as a conflict otherwise."""
    shape, given = tuple(shapes[delta.target]), [entries[name].shape for name in delta.tensors]
    fits = given == [shape] if len(given) == 1 else _fits(given[0], given[1], shape)
    if odd := [name for name in delta.tensors if entries[name].dtype not in FLOATS]:
        out.conflicts[odd[0]] = f"is stored as {entries[odd[0]].dtype}, not as floating point"
    elif not fits:
        said = " x ".join(str(list(s)) for s in given)
        out.conflicts[delta.tensors[0]] = f"is {said} where the model's {delta.target} is {list(shape)}"
    else:
        out.deltas.append(delta)


def _fits(up: tuple[int, ...], down: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether up [out, rank, 1...] @ down [rank, in...] gives a weight of this shape (convolutions flattened)."""
    return (
        len(up) >= 2
        and len(down) >= 2
        and up[0] == shape[0]
        and math.prod(up[1:]) == down[0] > 0
        and math.prod(down[1:]) == math.prod(shape[1:])
    )


def _other_channels(placed: dict[str, str], entries: Mapping[str, Entry], shape: tuple[int, ...]) -> bool:
    """Whether a patch embedding's difference or pair was made for a model with another number of input channels."""
    name = placed.get("diff") or placed.get("down")
    given = entries[name].shape if name else ()
    return len(given) == len(shape) and given[1] != shape[1] and given[2:] == shape[2:]
