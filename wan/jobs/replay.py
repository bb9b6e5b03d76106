"""Records of earlier runs: --replay makes a record's video again, --resume finds the seed that a run had drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
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
    """A record that is replayed. others: options that were given anew, or depend on those."""

    path: Path
    record: Mapping[str, Any]
    others: frozenset[str]


# Options that a record holds for its one video.
OF_A_JOB = ("prompt", "negative_prompt", "image", "last_image", "size", "frame_num", "base_seed")
# Decided by the machine and the weights once these are open: a run that differs in them can still be continued.
LEFT_TO_THE_PLAN = ("base_seed", "device", "dtype", "attention")


def replayed(given: Mapping[str, Any], path: Path) -> tuple[Request, Replayed]:
    """The request of a record, narrowed to its one video, with the flags of `given` on top.

    The record's prompt is the extended one; it is not extended again. Options of one start or one machine are not
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
        if not all(isinstance(record.get(name, {}), dict) for name in ("meaning", "versions")):
            raise TypeError
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
    """The seed that the run to be resumed had drawn, from the newest record that asks for the same.

    Until its first video is whole, a run's only record is the one in the latents that it kept.
    """
    folder = expanded(request.save_dir)
    written: dict[Path, float] = {}
    for file in (*folder.glob("*.json"), *folder.glob("*.latents.safetensors")):
        with suppress(OSError):  # another process has just removed it, or a link that leads nowhere
            written[file] = file.stat().st_mtime
    for file in sorted(written, key=lambda file: written[file], reverse=True):
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
    """Options that affect how the videos look, as far as the request alone tells. given: as records hold them."""
    names = [n for n, row in OPTIONS.items() if row.scope is VIDEO and n not in LEFT_TO_THE_PLAN]
    return {name: given.get(name, DEFAULTS[name]) for name in names}
