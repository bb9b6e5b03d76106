"""Weights that are distilled already: whole experts in one file (LightX2V's models, other front ends' merges), and
checkpoints with a LoRA baked in; and why no LoRA of the kind may be added to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.peft_settings import PEFT_WEIGHTS
from lightning.releases import Release, preset, recognise
from wan.checkpoints.safetensors_file import fingerprint
from wan.checkpoints.weights import EXPERT, kind_of, open_file
from wan.utils.errors import TensorFileError

SETTINGS = ("name", "steps", "solver", "shift", "guidance", "timesteps", "licence")  # kept by `bake`
RECORD = "bake.json"  # inside a baked checkpoint: sources, settings, sha256 of every shard


def is_full_expert(path: Path) -> bool:
    """Whether the file is a full expert. False for files that cannot be opened."""
    try:
        return kind_of(open_file(path)) == EXPERT
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
    try:
        is_file = base.is_file()
    except PermissionError:
        is_file = False
    release = recognise(base if is_file else Path(base.absolute().name))
    if release is None or release.kind != "full" or (is_file and not is_full_expert(base)):
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
        kept = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept.items() if name in SETTINGS
        }
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
