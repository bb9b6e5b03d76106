"""What is written down about a video: enough to make it again, to judge it, and to see that it is there already.

Nothing of the environment is written: no variables, no keys, no host names.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.errors import TensorFileError
from lightning.tensorfile import TensorStore
from wan import __version__
from wan.plan import Plan
from wan.request.settings import Job
from wan.utils.errors import InputError, WanError
from wan.utils.progress import peak_memory
from wan.utils.video import VideoWriter, count_frames, read_record, replacing

if TYPE_CHECKING:
    import torch
    from easydict import EasyDict

SCHEMA = 2
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "imageio-ffmpeg")


def describe(plan: Plan, job: Job, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """A job's record as far as it is known before there is a video. pipeline: `info()` of the pipeline in use."""
    whole = plan.as_dict()
    return {
        "schema": SCHEMA,
        "request": plan.request.recorded(),
        "job": plain(dataclasses.replace(job, image=job.image and job.image.absolute())),
        "meaning": plan.meaning(job),
        "plan": plain({**whole, "jobs": [entry for entry in whole["jobs"] if entry["index"] == job.index]}),
        "pipeline": plain(pipeline),
        "versions": versions(),
    }


def completed(record: dict[str, Any], video: VideoWriter, seconds: dict[str, float]) -> dict[str, Any]:
    """`record` with what is known at the end. seconds: by stage, up to the saving of the file."""
    width, height = video.size or (0, 0)
    output = {"file": video.path.name, "frames": video.frames, "width": width, "height": height, "fps": video.fps}
    return {
        **record,
        "output": output,
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def found_at_place(plan: Plan, job: Job) -> tuple[str, str]:
    """What lies at `job.save_file`, and what differs.

    "nothing", "whole" (this very video), "damaged" (this one, cut off) or "other": another video or another file.
    """
    if not job.save_file.exists():
        return "nothing", ""
    # a video that was cut off in its index may still have its record beside it
    for source in (job.save_file, job.save_file.with_suffix(".json")):
        try:
            found = read_record(source)["meaning"]
            differences = [f"--{name}" for name, value in plan.meaning(job).items() if found.get(name) != plain(value)]
        except (WanError, KeyError, TypeError, AttributeError):
            continue  # not a record of ours: the next source, or "other"
        if differences:
            return "other", ", ".join(differences)
        return ("whole" if count_frames(job.save_file) == job.frame_num else "damaged"), ""
    return "other", ""


def save_latents(path: Path, latent: torch.Tensor, record: dict[str, Any]) -> None:
    """latent: float32 [C, T, h, w]; whole or not at all, with the record in the file's metadata."""
    from safetensors.torch import save

    data = save({"latent": latent.detach().cpu().contiguous()}, {"record": json.dumps(record, ensure_ascii=False)})
    with replacing(path) as part:
        part.write_bytes(data)


def read_latents(path: Path, config: EasyDict) -> tuple[torch.Tensor, dict[str, Any]]:
    """(latent [C, T, h, w], the record kept with it). InputError for any other file, and for another task's latents."""
    try:
        store = TensorStore.open(path)
        latent, record = store.read("latent"), json.loads(store.metadata["record"])
        made_for, schema = record["job"] and record["meaning"]["task"], record["schema"]
        if latent.ndim != 4 or schema != SCHEMA:
            raise ValueError(f"shape {tuple(latent.shape)}, schema {schema}")
    except FileNotFoundError:
        raise InputError(f"--decode_latents {path}: no such file") from None
    except (TensorFileError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise InputError(f"--decode_latents {path}: not latents that a run kept (.latents.safetensors)") from e
    if made_for != config.name:
        raise InputError(f"--decode_latents {path}: made with --task {made_for}, not {config.name}")
    return latent, record


def versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "wan-lightning": __version__}
    return own | {name: version(name) for name in PACKAGES}


def plain(value: Any) -> Any:
    """As JSON would give it back: dataclasses and mappings as dicts, sequences as lists, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
