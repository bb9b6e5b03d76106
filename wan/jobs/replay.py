"""What an earlier run's records say to this one: --replay makes a record's video again, --resume finds drawn seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan.checkpoints.safetensors_file import read_header
from wan.cli.options import DEFAULTS, OPTIONS, SCHEMA, VIDEO, Request, Scope
from wan.jobs.prompt_files import expanded
from wan.media.video import read_record
from wan.utils.errors import InputError


@dataclass(frozen=True)
class Replayed:
    """A record that is replayed. others: options that were given anew, or have to do with those."""

    path: Path
    record: Mapping[str, Any]
    others: frozenset[str]


# What a record has for its one video.
OF_A_JOB = ("prompt", "negative_prompt", "image", "last_image", "size", "frame_num", "base_seed")
# Told from the machine and the weights once these are open: what a run may differ in and still be gone on with.
LEFT_TO_THE_PLAN = ("base_seed", "device", "dtype", "attention")


def replayed(given: Mapping[str, Any], path: Path) -> tuple[Request, Replayed]:
    """The request that a record holds, narrowed to the record's one video, with the flags of `given` on top.

    The record's prompt is the extended one; it is not extended again. What belongs to one start or one machine is not
    taken over. InputError if this is no record.
    """
    try:
        record = read_record(path)
    except InputError as e:
        raise InputError(f"--replay {e}") from e
    if (schema := record.get("schema", SCHEMA)) != SCHEMA:
        raise InputError(f"--replay {path}: written by another version of this program (schema {schema}, not {SCHEMA})")
    if "clips" in record:
        raise InputError(f"--replay {path}: is joined of several clips; replay one of those")
    try:
        job = record["job"]
        width, height = job["area"]
        of_job = {"size": f"{width}*{height}", "base_seed": job["seed"]}
        of_job |= {name: job[name] for name in ("frame_num", "prompt", "negative_prompt", "image")}
        of_job |= {"last_image": job.get("last_image")}  # records of the first version have none
        earlier = {name: value for name, value in record["request"].items() if _is_replayed(name)} | of_job
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"--replay {path}: not the record of a video") from e
    displaced = {other for name in given for other in OPTIONS[name].displaces}
    earlier = {name: value for name, value in earlier.items() if name not in displaced}
    problems: list[str] = []
    request = Request.from_dict({**earlier, **given}, problems)
    if problems:
        raise InputError([f"--replay {path}: {problem}" for problem in problems])
    others = {name for name in OPTIONS if name in given or name in displaced or OPTIONS[name].into in given}
    return request, Replayed(path, record, frozenset(others | {OPTIONS[name].into for name in given}))


def _is_replayed(name: str) -> bool:
    row = OPTIONS.get(name)
    return row is None or (row.scope is not Scope.START and row.into not in OF_A_JOB)


def earlier_seed(request: Request) -> int | None:
    """The seed that the run which `--resume` goes on with had drawn, from the newest record that asks for the same.

    Until its first video is whole a run has no other record than the one in the latents that it kept.
    """
    folder = expanded(request.save_dir)
    files = [*folder.glob("*.json"), *folder.glob("*.latents.safetensors")]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            kept = file.suffix == ".safetensors"
            record = json.loads(read_header(file)[1]["record"]) if kept else read_record(file)
            recorded = record["request"]
            if _asked_for(recorded) == _asked_for(request.recorded()):
                return int(recorded["base_seed"])
        except (InputError, OSError, KeyError, TypeError, AttributeError, ValueError):
            continue  # another program's file
    return None


def _asked_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """What has a say in how the videos look, as far as the request alone tells. given: as records hold it."""
    names = [n for n, row in OPTIONS.items() if row.scope is VIDEO and n not in LEFT_TO_THE_PLAN]
    return {name: given.get(name, DEFAULTS[name]) for name in names}
