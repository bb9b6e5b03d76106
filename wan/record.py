"""What is written down about a video: enough to make it again, to judge it, and to see that it is there already.

Nothing of the environment is written: no variables, no keys, no host names.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from wan.request.settings import Job, Run
from wan.utils.errors import InputError, WanError
from wan.utils.progress import peak_memory
from wan.utils.video import VideoWriter, count_frames, read_record, replacing

if TYPE_CHECKING:
    import torch

SCHEMA = 1
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "imageio-ffmpeg")
# Settings that say how the work is done; every other one changes the video.
HOW_NOT_WHAT = {"overwrite", "resume", "on_error", "save_latents", "preview", "offload_model", "t5_cpu"}
HOW_NOT_WHAT |= {"t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size"}
WHAT_OF_A_JOB = ("prompt", "negative_prompt", "image_sha256", "size", "frame_num", "seed")


def describe(run: Run, job: Job, plan: dict[str, Any], pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """A job's record as far as it is known before there is a video.

    plan: of the whole run, as plain data. pipeline: `info()` of the pipeline in use.
    """
    return {
        "schema": SCHEMA,
        "request": plain(run.request),
        "settings": plain(run.settings),
        "job": described(job),
        "plan": plain({**plan, "jobs": [entry for entry in plan["jobs"] if entry["index"] == job.index]}),
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


def found_at_place(run: Run, job: Job, plan: dict[str, Any]) -> str:
    """What lies at `job.save_file`: "nothing", "whole" (this very video), "damaged" (this one, cut off) or "other"."""
    if not job.save_file.exists():
        return "nothing"
    wanted = essence(describe(run, job, plan, {}))
    # a video that was cut off in its index may still have its record beside it
    for source in (job.save_file, job.save_file.with_suffix(".json")):
        try:
            found = essence(read_record(source))
        except (WanError, KeyError, TypeError, AttributeError):
            continue  # not a record of ours: the next source, or "other"
        if found != wanted:
            return "other"
        return "whole" if count_frames(job.save_file) == job.frame_num else "damaged"
    return "other"


def essence(record: dict[str, Any]) -> dict[str, Any]:
    """What decides how the video looks. KeyError, TypeError or AttributeError if this is no record."""
    settings = {name: value for name, value in record["settings"].items() if name not in HOW_NOT_WHAT}
    job = {name: record["job"][name] for name in WHAT_OF_A_JOB}
    return {"settings": settings, "job": job, "weights": record["plan"]["fingerprints"]}


def save_latents(path: Path, latent: torch.Tensor, record: dict[str, Any]) -> None:
    """latent: float32 [C, T, h, w]; whole or not at all, with the record in the file's metadata."""
    from safetensors.torch import save

    data = save({"latent": latent.detach().cpu().contiguous()}, {"record": json.dumps(record, ensure_ascii=False)})
    with replacing(path) as part:
        part.write_bytes(data)


def read_latents(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """(latent [C, T, h, w], the record kept with it). InputError for any other file."""
    try:
        store = TensorStore.open(path)
        latent, record = store.read("latent"), json.loads(store.metadata["record"])
        if latent.ndim != 4 or record["schema"] != SCHEMA:
            raise ValueError(f"shape {tuple(latent.shape)}, schema {record['schema']}")
    except FileNotFoundError:
        raise InputError(f"--decode_latents {path}: no such file") from None
    except (TensorFileError, OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"--decode_latents {path}: not latents that a run kept (.latents.safetensors)") from e
    return latent, record


def described(job: Job) -> dict[str, Any]:
    digest = hashlib.sha256(job.image.read_bytes()).hexdigest() if job.image else None
    return {**plain(job), "image_sha256": digest}


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
