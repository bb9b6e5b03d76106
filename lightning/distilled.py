"""Distilled weights: whole experts in one file, and checkpoints that `bake` wrote, with the settings they need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.lora_files import exists, weight_file
from lightning.releases import Release, preset, recognise
from wan.checkpoints.safetensors_file import fingerprint
from wan.checkpoints.weights import EXPERT, kind_of, open_file
from wan.utils.errors import LoraError, TensorFileError, first_line
from wan.utils.files import parse_json

RECORD = "bake.json"  # inside a baked checkpoint: sources, settings, sha256 of every shard
SETTINGS = ("name", "steps", "solver", "shift", "guidance", "timesteps", "licence")  # of the release, in the record


def is_full_expert(path: Path) -> bool:
    """Whether the file is a full expert. False for files that cannot be opened."""
    try:
        return kind_of(open_file(path)) == EXPERT
    except (TensorFileError, OSError):
        return False


def record_of(ckpt_dir: Path) -> dict[str, Any] | None:
    """The record that `bake` wrote into a checkpoint folder, None for any other folder.

    LoraError if the record is damaged, unfinished or of another version.
    """
    file = ckpt_dir / RECORD
    if not exists(file):
        return None
    try:
        record: dict[str, Any] = parse_json(file.read_bytes())
        for loras in record["loras"].values():
            for lora in loras:
                _check_types(lora, {"path": str, "release": str | None, "fingerprint": str | None})
        _check_types(record, {"task": str, "shards": dict, "release": dict | None})
        _release_in_record(record)
    except OSError as e:
        raise LoraError(f"{file}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError, LoraError) as e:
        raise LoraError(
            f"{file} is damaged, unfinished or from another version ({first_line(e)}); bake again, or remove the file "
            "to use the folder without its record"
        ) from e
    return record


def distilled_twice(base: Path, lora_file: Path, expert: str | None = None) -> str | None:
    """Why this LoRA must not go onto `base`: it is merged already, or both are distillations. None if it may.

    base: a full expert file, or a checkpoint folder, which may have LoRAs baked in. expert: whose weights it is for.
    """
    file, record = weight_file(lora_file), record_of(base)
    for name, loras in record["loras"].items() if record else ():
        for merged in loras if expert in (None, name) else ():
            if merged.get("fingerprint") == fingerprint(file):
                return f"{base} has the LoRA {lora_file} merged in already, as {merged['path']}"
    before, lora = release_in(base), recognise(lora_file)
    if before is None or lora is None:
        return None
    return f"{base} is distilled already ({before.name}); the LoRA {lora_file} ({lora.name}) would do it again"


def release_in(base: Path) -> Release | None:
    """The distillation in these weights, with its settings; None where nothing names one.

    base: a full expert file, or a checkpoint folder: a baked one keeps the settings in its record, others may be named
    after a release (`FastVideo/FastWan2.2-TI2V-5B-...`, which is a hub id as well).
    """
    if record := record_of(base):
        return _release_in_record(record)
    is_file = exists(base) and base.is_file()
    release = recognise(base if is_file else Path(base.absolute().name))
    return release if release and release.kind == "full" and (not is_file or is_full_expert(base)) else None


def _release_in_record(record: Mapping[str, Any]) -> Release | None:
    """The settings in a bake's record. TypeError, ValueError, KeyError or LoraError for those that are unusable."""
    if "release" not in record:  # written before settings were kept
        names = {lora["release"] for loras in record["loras"].values() for lora in loras} - {None}
        return preset(min(names)) if names else None
    if record["release"] is None:
        return None
    values = {name: record["release"][name] for name in SETTINGS if name in record["release"]}
    kinds = {"steps": int, "solver": str, "licence": str, "guidance": list}
    _check_types(values, {"name": str} | {name: kind for name, kind in kinds.items() if name in values})
    low, high = values.get("guidance", (1.0, 1.0))
    timesteps = tuple(values.get("timesteps") or ()) or None
    numbers = [float(number) for number in (values.get("shift", 5.0), low, high, *(timesteps or ()))]
    if values.get("steps", 4) < 1 or numbers[0] <= 0 or min(numbers) < 0:
        raise ValueError("a setting is out of range")
    values |= {"guidance": (low, high), "timesteps": timesteps}
    return Release(tasks=(record["task"],), kind="full", source="bake", **values)


def _check_types(values: Any, kinds: Mapping[str, Any]) -> None:
    """TypeError for a value of another type; a missing one is None."""
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise TypeError(f"{name} is {values.get(name)!r:.40}")
