"""Records of videos: enough to make a video again, to judge it, and to see that it is there already.
A record holds nothing of the environment: no variables, no keys, no host names."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wan import __version__
from wan.checkpoints.safetensors_file import TensorStore, reading
from wan.cli.options import SCHEMA
from wan.configs import TASKS, TaskConfig
from wan.jobs.job import Job, Replayed
from wan.media.images import save_contact_sheet
from wan.media.video import count_frames, read_record
from wan.planning.plan import Plan
from wan.planning.report import as_dict
from wan.utils.errors import InputError, JobError, TensorFileError, WanError
from wan.utils.files import Beside, latents_elsewhere, parse_json, replacing, write_file

if TYPE_CHECKING:
    import torch

PROMPTS = ("prompt", "original_prompt", "negative_prompt")
ABSOLUTE = re.compile(r"^(\w+=)?(?:[/~\\]|[A-Za-z]:[/\\]).*[/\\]", re.DOTALL)  # the folders of a path, after `high=`
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "imageio-ffmpeg")


def describe(plan: Plan, job: Job, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a job as far as it is known before there is a video. pipeline: `info()` of the pipeline in use."""
    plan = plan.of(job)
    pictures = {name: path and path.absolute() for name, path in job.pictures.items()}
    return {
        "schema": SCHEMA, "request": plan.request.recorded(), "job": {**plain(job), **plain(pictures)},
        "meaning": plan.meaning(job), "plan": plain(as_dict(replace(plan, jobs=(job,)))),
        "pipeline": plain(pipeline), "versions": versions(),
    }  # fmt: skip


def differences(plan: Plan, replayed: Replayed) -> list[str]:
    """A sentence for each difference between a replay and the run that wrote the record."""
    record, file = replayed.record, f"--replay {replayed.path}"
    then, now = record.get("meaning", {}), plain(plan.meaning(plan.jobs[0]))
    changed = [name for name in now if name not in replayed.others and name in then and then[name] != now[name]]
    lines = [f"{file}: --{name} is not what the record was made with" for name in changed]
    here, others = versions().items(), record.get("versions", {})
    return lines + [f"{file}: made with {n} {others[n]}, here is {v}" for n, v in here if others.get(n, v) != v]


def outcome(video: Path, frames: int, size: tuple[int, int], fps: float) -> dict[str, Any]:
    """The end of every record: contents of the file, and the time when it was finished."""
    output = {"file": video.name, "frames": frames, "width": size[0], "height": size[1], "fps": fps}
    return {"output": output, "finished": datetime.now(UTC).isoformat(timespec="seconds")}


def in_video(record: dict[str, Any], how: str) -> dict[str, Any] | None:
    """The part of `record` that the video file holds, by `--record`: "portable" has names instead of paths."""
    if how != "portable":
        return record if how == "full" else None
    return {name: value if name == "meaning" else _without_paths(value) for name, value in record.items()}


def _without_paths(value: Any) -> Any:
    # with file names instead of absolute paths; prompts stay, warnings (sentences with paths) go
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if not isinstance(value, dict):
        return ABSOLUTE.sub(lambda found: found[1] or "", value) if isinstance(value, str) else value
    shorter: dict[str, Any] = {}
    for name, each in value.items():
        bare = ABSOLUTE.sub("", name)
        while bare in shorter:  # files of one name in two folders
            bare += "'"
        if name != "warnings":
            shorter[bare] = each if name in PROMPTS else _without_paths(each)
    return shorter


class State(NamedTuple):
    """State of the file at a job's output path."""

    kind: str  # "nothing" (whole), "whole", "equal" (nothing, but `file` is this very video), "other" (video or file)
    file: Path
    trouble: str = "already exists"  # why "other" is in the way, as the end of a sentence


def find_videos(plan: Plan) -> list[tuple[Job, State]]:
    """Each job with the state of its file; a job that follows a whole clip starts from that clip. With `--resume` a
    video also counts under another number, for rows may have been inserted; but names that the user chose are kept."""
    found = []

    @cache
    def elsewhere() -> dict[str, Path]:  # videos with a record in the folders of the jobs, by the key of their meaning
        there = {}
        for file in (file for folder in {job.save_file.parent for job in plan.jobs} for file in folder.glob("*.json")):
            with suppress(WanError, KeyError, TypeError, AttributeError):  # another program's file
                record = read_record(file)
                there[key_of(record["meaning"])] = file.parent / record["output"]["file"]
        return there

    last: dict[Path | None, State] = {}  # by chain
    for job in plan.jobs:
        before = last.get(job.joined) if job.follows else None
        if before:
            job = replace(job, image=before.file)
        if not plan.request.resume:
            state = State("other" if job.save_file.exists() else "nothing", job.save_file)
        elif before and before.kind not in ("whole", "equal"):  # this clip hangs on one that is still to be made
            state = State("nothing", job.save_file)
        else:
            state = find_video(plan, job)
            other = elsewhere().get(key_of(plan.meaning(job))) if state.kind == "nothing" else None
            if other and find_video(plan, replace(job, save_file=other)).kind == "whole":
                state = State("equal" if job.named else "whole", other)
        last[job.joined] = state
        found.append((job, state))
    return found


def find_video(plan: Plan, job: Job) -> State:
    """State of the file at `job.save_file`."""
    video, trouble = job.save_file, "was made with other settings"
    if not video.exists():
        return State("nothing", video)
    for source in (video, Beside.of(video).record):  # beside a video that was cut off in its index
        with suppress(WanError, KeyError, TypeError, AttributeError):  # not a record of ours
            found = read_record(source)["meaning"]
            differing = [f"--{name}" for name, v in plain(plan.meaning(job)).items() if found.get(name) != v]
            if differing:
                return State("other", video, f"{trouble} ({', '.join(differing)})")
            return State("whole" if count_frames(video) == job.frame_num else "nothing", video)
    return State("other", video, trouble)


def repair(plan: Plan, job: Job, video: Path, say: Callable[[str], None]) -> None:
    """Complete the files beside a whole video, as far as they can be made from it, and say each thing done."""
    request, beside = plan.request, Beside.of(video)
    try:
        if not beside.record.exists():
            _write_record(beside.record, read_record(video))
            say(f"{beside.record}: written again from the video")
        if request.preview and not beside.sheet.exists():
            say(f"{save_contact_sheet(video, job.frame_num)}: made")
        file, _, record = find_latents(plan, replace(job, save_file=video)) or (None, None, {})
        if file and not request.save_latents and not record["request"].get("save_latents"):
            file.unlink()
            say(f"{file}: removed, the video is whole")
    except (JobError, OSError) as error:
        say(f"warning: the files beside {video} are left as they are ({error})")
    for missing, asked in ((beside.latents, request.save_latents), (beside.strip, request.preview_steps)):
        if asked and not missing.exists():
            say(f"warning: {missing} is not there, and only making the video again gives it (--overwrite)")


def copy_video(source: Path, target: Path, *, latents: bool) -> None:
    """Copy a whole video and its record, and kept latents if asked for, to another name. OSError."""
    record = read_record(source)
    record["output"]["file"] = target.name
    kept, copy_of_kept = Beside.of(source).latents, Beside.of(target).latents
    if latents and kept.exists():
        with replacing(copy_of_kept) as part:
            shutil.copyfile(kept, part)
    with replacing(target) as part:
        shutil.copyfile(source, part)
    _write_record(Beside.of(target).record, record)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    write_file(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def key_of(meaning: Mapping[str, Any]) -> str:
    """The same text for equal meanings (`Plan.meaning`)."""
    return json.dumps(plain(meaning), sort_keys=True)


def find_latents(plan: Plan, job: Job) -> tuple[Path, torch.Tensor, dict[str, Any]] | None:
    """(file, latent, record) of this very video's final latents that a run kept; None if there are none."""
    for path in (Beside.of(job.save_file).latents, latents_elsewhere(job.save_file)):
        with suppress(InputError):  # none, half a file, or another's: the steps are done again
            latent, record = read_latents(path, plan.config)
            if record["meaning"] == plain(plan.meaning(job)):
                return path, latent, record
    return None


def save_latents(path: Path, latent: torch.Tensor, record: dict[str, Any]) -> None:
    """Write `latent` (float32 [C, T, h, w]) whole or not at all, with the record in the file's metadata."""
    from safetensors.torch import save

    kept = {"latent": latent.detach().cpu().contiguous()}
    write_file(path, save(kept, {"record": json.dumps(record, ensure_ascii=False)}))


def read_latents(path: Path, config: TaskConfig) -> tuple[torch.Tensor, dict[str, Any]]:
    """(latent [C, T, h, w], the record kept with it). InputError for any other file, and for another task's latents."""
    try:
        with reading(path, "another file"):
            store = TensorStore.open(path)
            latent, record = store.read("latent"), parse_json(store.metadata["record"])
            made_for, kind = record["meaning"]["task"], (store["latent"].dtype, latent.ndim, len(latent))
            right = record["schema"] == SCHEMA and isinstance(record["job"], dict) and latent.numel() > 0
            if not right or kind != ("F32", 4, TASKS[made_for].out_dim):
                raise ValueError(f"{list(latent.shape)} {kind[0]}")
    except FileNotFoundError:
        raise InputError(f"--decode_latents {path}: no such file") from None
    except (TensorFileError, OSError) as e:
        raise InputError(f"--decode_latents {path}: not latents that a run kept (.latents.safetensors)") from e
    if made_for != config.name:
        raise InputError(f"--decode_latents {path}: made with --task {made_for}, not {config.name}")
    return latent, record


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of this program and of the packages that the numbers depend on."""
    own = {"python": platform.python_version(), "wan-lightning": __version__}
    return own | {name: version(name) for name in PACKAGES}


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: dataclasses as dicts, sequences as lists, paths as text."""
    return json.loads(json.dumps(value, default=lambda inner: vars(inner) if is_dataclass(inner) else str(inner)))
