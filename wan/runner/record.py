"""What is written down about a video: enough to make it again, to judge it, and to see that it is there already.

Nothing of the environment is written: no variables, no keys, no host names.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan import __version__
from wan.checkpoints.safetensors_file import TensorStore
from wan.cli.options import SCHEMA
from wan.configs import TaskConfig
from wan.jobs.job import Job
from wan.jobs.replay import Replayed
from wan.media.previews import save_contact_sheet
from wan.media.video import VideoWriter, count_frames, read_record
from wan.planning.plan import Plan
from wan.planning.report import as_dict
from wan.utils.errors import InputError, TensorFileError, WanError
from wan.utils.files import Beside, latents_elsewhere, replacing
from wan.utils.progress import peak_memory

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "imageio-ffmpeg")


def describe(plan: Plan, job: Job, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """A job's record as far as it is known before there is a video. pipeline: `info()` of the pipeline in use."""
    whole = as_dict(plan)
    pictures = {name: path and path.absolute() for name, path in job.pictures.items()}
    return {
        "schema": SCHEMA,
        "request": plan.request.recorded(),
        "job": {**plain(job), **plain(pictures)},
        "meaning": plan.meaning(job),
        "plan": plain({**whole, "jobs": [entry for entry in whole["jobs"] if entry["index"] == job.index]}),
        "pipeline": plain(pipeline),
        "versions": versions(),
    }


def differences(plan: Plan, replayed: Replayed) -> list[str]:
    """What a replay will do otherwise than the run that wrote the record, a sentence each."""
    record, told = replayed.record, []
    job = next(iter(plan.jobs))
    meaning = record.get("meaning", {})
    for name, value in plain(plan.meaning(job)).items():
        if name not in replayed.others and name in meaning and meaning[name] != value:
            told.append(f"--replay {replayed.path}: --{name} is not what the record was made with")
    here = versions()
    for name, then in record.get("versions", {}).items():
        if here.get(name) not in (None, then):
            told.append(f"--replay {replayed.path}: made with {name} {then}, here is {here[name]}")
    return told


def completed(record: dict[str, Any], video: VideoWriter, seconds: dict[str, float]) -> dict[str, Any]:
    """`record` with what is known at the end. seconds: by stage, up to the saving of the file."""
    return {
        **record,
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        **outcome(video.path, video.frames, video.size or (0, 0), video.fps),
    }


def outcome(video: Path, frames: int, size: tuple[int, int], fps: float) -> dict[str, Any]:
    """The end of every record: what the file holds, and when it was finished."""
    output = {"file": video.name, "frames": frames, "width": size[0], "height": size[1], "fps": fps}
    return {"output": output, "finished": datetime.now(UTC).isoformat(timespec="seconds")}


@dataclass(frozen=True)
class Found:
    """What lies where a job's video is to come: "nothing", "whole" (this very video), "damaged" (this one, cut off),
    "other" (another video or another file), or "later" (it hangs on a video that is not there yet).

    differing: the options that made the other video, as far as it says; None where nobody asked.
    """

    state: str
    file: Path
    differing: tuple[str, ...] | None = None


def find_videos(plan: Plan) -> list[tuple[Job, Found]]:
    """Each job with what there is of its video; one that follows a clip that was found starts from that.

    With `--resume` also under another number: rows may have been inserted. A clip that follows one which is still to be
    made cannot be told from another: "later".
    """
    resume, found = plan.request.resume, []
    elsewhere = _recorded(plan) if resume else {}
    last: dict[Path | None, Found] = {}  # by chain
    for job in plan.jobs:
        before = last.get(job.joined) if job.follows else None
        if before:
            job = replace(job, image=before.file)
        if not resume:
            here = Found("other" if job.save_file.exists() else "nothing", job.save_file)
        elif before and before.state != "whole":
            here = Found("later", job.save_file)
        else:
            here = find_video(plan, job)
            if here.state == "nothing" and (other := elsewhere.get(_key(plain(plan.meaning(job))))):
                moved = find_video(plan, replace(job, save_file=other))
                here = moved if moved.state == "whole" else here
        last[job.joined] = here
        found.append((job, here))
    return found


def find_video(plan: Plan, job: Job) -> Found:
    """What lies at `job.save_file`."""
    if not job.save_file.exists():
        return Found("nothing", job.save_file)
    # a video that was cut off in its index may still have its record beside it
    for source in (job.save_file, Beside.of(job.save_file).record):
        try:
            found = read_record(source)["meaning"]
            differing = tuple(f"--{name}" for name, v in plan.meaning(job).items() if found.get(name) != plain(v))
        except (WanError, KeyError, TypeError, AttributeError):
            continue  # not a record of ours: the next source, or "other"
        if differing:
            return Found("other", job.save_file, differing)
        state = job.save_file.stat()
        whole = _count_frames(job.save_file, state.st_mtime_ns, state.st_size) == job.frame_num
        return Found("whole" if whole else "damaged", job.save_file)
    return Found("other", job.save_file, ())


@cache
def _count_frames(path: Path, *_: int) -> int:
    """`count_frames` of a file as it is now: it starts a program, and a run asks for its plan and once more."""
    return count_frames(path)


def repair(plan: Plan, job: Job, found: Found) -> list[str]:
    """Put right what a death between two files left beside a whole video; a sentence for each thing done."""
    beside, done = Beside.of(found.file), []
    if not beside.record.exists():
        with replacing(beside.record) as part:
            part.write_text(json.dumps(read_record(found.file), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        done.append(f"{beside.record}: written again from the video")
    if plan.request.preview and not beside.sheet.exists():
        done.append(f"{save_contact_sheet(found.file, job.frame_num)}: made")
    if not plan.request.save_latents:
        moved = replace(job, save_file=found.file)
        if (kept := find_latents(plan, moved)[1]) and not _wanted(kept):
            kept.unlink()
            done.append(f"{kept}: removed, the video is whole")
    return done


def _wanted(latents: Path) -> bool:
    """Whether the run that kept them was asked to."""
    record = json.loads(TensorStore.open(latents).metadata["record"])
    return bool(record["request"].get("save_latents"))


def _recorded(plan: Plan) -> dict[str, Path]:
    """Every video with a record in the folders of the jobs, by what its options come to."""
    videos = {}
    for folder in {job.save_file.parent for job in plan.jobs}:
        for file in folder.glob("*.json"):
            try:
                record = read_record(file)
                videos[_key(record["meaning"])] = folder / record["output"]["file"]
            except (WanError, KeyError, TypeError, AttributeError):
                continue  # another program's file
    return videos


def _key(meaning: Any) -> str:
    return json.dumps(meaning, sort_keys=True)


def find_latents(plan: Plan, job: Job) -> tuple[torch.Tensor | None, Path | None]:
    """The latents of this very video that a run kept, and their file; (None, None) if there are none."""
    for path in (Beside.of(job.save_file).latents, latents_elsewhere(job.save_file)):
        if path.exists():
            try:
                latent, record = read_latents(path, plan.config)
            except InputError:
                continue  # half a file, or another's: the steps are done again
            if record["meaning"] == plain(plan.meaning(job)):
                return latent, path
    return None, None


def save_latents(path: Path, latent: torch.Tensor, record: dict[str, Any]) -> None:
    """latent: float32 [C, T, h, w]; whole or not at all, with the record in the file's metadata."""
    from safetensors.torch import save

    data = save({"latent": latent.detach().cpu().contiguous()}, {"record": json.dumps(record, ensure_ascii=False)})
    with replacing(path) as part:
        part.write_bytes(data)


def read_latents(path: Path, config: TaskConfig) -> tuple[torch.Tensor, dict[str, Any]]:
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
    """As JSON gives it back: dataclasses as dicts, sequences as lists, paths as text."""
    return json.loads(json.dumps(value, default=lambda inner: vars(inner) if is_dataclass(inner) else str(inner)))
