"""Weights that are distilled already: whole experts in one file (LightX2V's models, other front ends' merges) read as a
TensorStore, and checkpoints with a LoRA baked in; and why no LoRA of the kind may be added to them.

Names lose the prefix some files carry. Weights quantised with one scale for the tensor or one for each row (fp8, int8)
are given back as float32, W = q * scale, which loses nothing beyond that product's rounding. Other kinds are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.adapter_settings import PEFT_WEIGHTS
from lightning.errors import LoraError, TensorFileError
from lightning.releases import SPARSE, Release, preset, recognise
from lightning.tensorfile import Entry, TensorStore, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = (".weight_scale", ".scale_weight")  # LightX2V's and ComfyUI's name for what a layer's weight is multiplied by
ACTIVATION_SCALES = (".input_scale", ".scale_input")  # for products in 8 bits; the weight does not depend on them
SETTINGS = ("name", "steps", "solver", "shift", "guidance", "timesteps", "boundary", "licence")  # kept by `bake`
RECORD = "bake.json"  # inside a baked checkpoint: sources, settings, sha256 of every shard
MARKER = "scaled_fp8"
FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("F8_E4M3", "F8_E5M2", "I8")
A_WEIGHT = "blocks.0.self_attn.q.weight"  # every expert has it, and no LoRA


class ExpertStore(TensorStore):
    """A TensorStore whose quantised weights read as float32. Its entries tell the shape and dtype that `read` gives."""

    def __init__(self, stored: dict[str, Entry], scales: dict[str, Entry], metadata: dict[str, str]) -> None:
        """stored: by the base's names. scales: weight name -> its scale."""
        given = {
            name: Entry(e.file, "F32", e.shape, e.offset) if e.dtype in QUANTISED else e for name, e in stored.items()
        }
        super().__init__(given, metadata)
        self._stored = TensorStore(stored)
        self._scales = TensorStore(scales)

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """As TensorStore.read; quantised weights come as q * scale in float32."""
        import torch

        if self._stored[name].dtype not in QUANTISED:
            return self._stored.read(name, rows, buffer)
        stored = self._stored.read(name, rows)
        room = torch.empty(4 * stored.numel(), dtype=torch.uint8) if buffer is None else buffer[: 4 * stored.numel()]
        weight = room.view(torch.float32).view(stored.shape).copy_(stored)
        if name in self._scales:
            one_for_each_row = math.prod(self._scales[name].shape) > 1
            scale = self._scales.read(name, rows if one_for_each_row else None).float()
            weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
        return weight


def open_expert(path: Path) -> ExpertStore:
    """One safetensors file as the replacement of an expert, under the base's names.

    Raises TensorFileError for a damaged file, LoraError for one that is no full expert or is quantised otherwise.
    """
    if release := recognise(path):
        release.check_supported(f"--expert {path}")
    raw = TensorStore.open(path)
    if any(".proj_l." in name for name in raw):
        raise LoraError(f"--expert {path} cannot be run: {SPARSE}")
    if not holds_expert(raw):
        raise LoraError(f"--expert {path}: not a full expert, {A_WEIGHT} is missing (a LoRA goes to --lora)")
    stored: dict[str, Entry] = {}
    scales: dict[str, Entry] = {}
    for raw_name, entry in raw.items():
        name, into = _plain(raw_name), stored
        if name == MARKER or name.endswith(ACTIVATION_SCALES):
            continue
        if name.endswith(SCALES):
            name, into = f"{name.rpartition('.')[0]}.weight", scales
        if into.setdefault(name, entry) is not entry:
            raise LoraError(f"--expert {path}: {raw_name} says again, in another spelling, what another tensor says")
    problems = [problem for name in {*stored, *scales} if (problem := _problem(name, stored, scales))]
    if problems:
        raise LoraError(
            f"--expert {path}: {len(problems)} tensors are stored in a form this toolkit does not read "
            f"(first: {min(problems)}); fp8 and int8 with one scale for a tensor or a row are read"
        )
    return ExpertStore(stored, scales, raw.metadata)


def holds_expert(names: Iterable[str]) -> bool:
    """Whether tensors of these names are an expert's own weights, not additions to them."""
    return any(_plain(name) == A_WEIGHT for name in names)


def is_full_expert(path: Path) -> bool:
    """Whether the file is a full expert. False for files that cannot be opened."""
    try:
        return holds_expert(TensorStore.open(path))
    except (TensorFileError, OSError):
        return False


def record_of(ckpt_dir: Path) -> dict[str, Any] | None:
    """The record that `bake` left in a checkpoint folder, None for any other folder."""
    try:
        record = json.loads((ckpt_dir / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "shards" in record else None


def distilled_twice(base: Path, lora_file: Path, expert: str | None = None) -> str | None:
    """Why this LoRA must not go onto `base`: it is in it already, or both are distillations. None if nothing says so.

    base: a full expert file, or a checkpoint folder, which may have LoRAs baked in. expert: whose weights it is for.
    """
    if merged := _merged_before(base, lora_file, expert):
        return f"{base} has the LoRA {lora_file} merged in already, as {merged}"
    before, lora = release_in(base), recognise(lora_file)
    if before is None or lora is None:
        return None
    return f"{base} is distilled already ({before.name}); the LoRA {lora_file} ({lora.name}) would do it again"


def release_in(base: Path) -> Release | None:
    """The distillation in these weights, with its settings; None for weights that nothing says it of.

    base: a full expert file, or a checkpoint folder: a baked one keeps the settings in its record, others may be named
    after a release (`FastVideo/FastWan2.2-TI2V-5B-...`, which is a hub id as well).
    """
    if record := record_of(base):
        return _release_from(record)
    release = recognise(base) if base.is_file() else recognise(Path(base.absolute().name))
    if release is None or release.kind != "full" or (base.is_file() and not is_full_expert(base)):
        return None
    return release


def release_record(release: Release | None) -> dict[str, Any] | None:
    """What `bake` writes down of the settings that its result is made for."""
    return None if release is None else {name: getattr(release, name) for name in SETTINGS}


def _release_from(record: dict[str, Any]) -> Release | None:
    if "release" in record:
        kept = record["release"]
        if kept is None:
            return None
        kept = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
        return Release(tasks=(record["task"],), kind="full", source="bake", **kept)
    # written before settings were kept
    names = {lora["release"] for loras in record["loras"].values() for lora in loras} - {None}
    return preset(min(names)) if names else None


def _merged_before(base: Path, lora_file: Path, expert: str | None) -> str | None:
    """The path from which this LoRA was merged into the checkpoint's expert (None: into any), None if it was not."""
    record = record_of(base) or {"loras": {}}
    file = lora_file / PEFT_WEIGHTS if lora_file.is_dir() else lora_file
    for name, loras in record["loras"].items():
        for lora in loras if expert in (None, name) else ():
            if lora.get("fingerprint") and lora["fingerprint"] == fingerprint(file):
                return str(lora["path"])
    return None


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _problem(name: str, stored: dict[str, Entry], scales: dict[str, Entry]) -> str | None:
    """What keeps this weight from being read, None if nothing does."""
    entry, scale = stored.get(name), scales.get(name)
    if entry is None:
        return f"{name} has a scale but is missing"
    if entry.dtype not in FLOATS + QUANTISED:
        return f"{name} is {entry.dtype}"
    if entry.dtype == "I8" and scale is None:
        return f"{name} is int8 without a scale"
    if scale is None:
        return None
    if entry.dtype not in QUANTISED:
        return f"{name} has a scale but is {entry.dtype}"
    if scale.dtype not in FLOATS or scale.shape not in _scale_shapes(entry.shape):
        return f"{name} has a scale of {list(scale.shape)} {scale.dtype}"
    return None


def _scale_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One number, or one for each row."""
    return [(), (1,), (1, 1), shape[:1], (*shape[:1], *[1] * (len(shape) - 1))]
