"""Join the clips of a chain into one video, without the frame that two neighbours share.

A clip that follows another starts from the other's last frame, as the file shows it. Joining copies the packets, so
every frame is bit for bit the clip's. It drops the first frame of a clip that follows, which the model made of the
frame before; decoding can start at its second frame (`VideoWriter.follows`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from wan.cli.options import SCHEMA
from wan.jobs.chains import frames_joined
from wan.jobs.job import Job
from wan.media.ffmpeg import file_argument
from wan.media.previews import save_contact_sheet
from wan.media.video import count_frames, publish, read_record
from wan.planning.plan import Plan
from wan.runner.record import in_video, key_of, outcome, versions
from wan.runner.video_job import hold_lock
from wan.utils.errors import InputError
from wan.utils.files import make_part
from wan.utils.progress import Progress

MICROSECONDS = 1_000_000


def join(plan: Plan, clips: Sequence[Job], progress: Progress) -> None:
    """Join the whole videos of a chain. JobError, OSError; LockedElsewhere if another process joins them."""
    joined = clips[0].joined
    assert joined is not None, "these clips are in a chain"
    frames, fps = frames_joined(clips), plan.config.sample_fps
    record = {
        "schema": SCHEMA,
        "task": plan.request.task,
        "clips": _entries(plan, clips),
        "versions": versions(),
        **outcome(joined, frames, clips[0].size, fps),
    }
    with ExitStack() as locks, progress.stage("join"):
        hold_lock(locks, joined, progress)
        copy_together([clip.save_file for clip in clips], joined, fps, frames, record, plan.request.record)
    written = [joined, *([save_contact_sheet(joined, frames)] if plan.request.preview else [])]
    progress.say(f"joined {len(clips)} videos, {frames} frames: {', '.join(map(str, written))}")


def is_joined(plan: Plan, clips: Sequence[Job]) -> bool:
    """Whether the joined video of these whole clips is there, or they are no chain."""
    joined = clips[0].joined
    return joined is None or (
        clips_of(joined) == _entries(plan, clips) and count_frames(joined) == frames_joined(clips)
    )


def clips_of(joined: Path) -> list[dict[str, Any]] | None:
    """The clips in the record of a joined video; None if there is no such video."""
    try:
        clips = read_record(joined).get("clips") if joined.exists() else None
    except InputError:
        return None
    return clips if isinstance(clips, list) else None


def copy_together(
    clips: Sequence[Path], joined: Path, fps: int, frames: int, record: dict[str, Any] | None = None, how: str = "full"
) -> None:
    """Copy `clips`, which follow each other, into `joined`, of `frames` frames. JobError if one does not follow."""
    listing = make_part(joined)
    second = math.ceil(MICROSECONDS / fps) / MICROSECONDS  # where the second frame is, in the list's own unit
    try:
        with listing.open("w", encoding="utf-8") as file:
            file.write("ffconcat version 1.0\n")
            for number, clip in enumerate(clips):
                escaped = file_argument(clip.absolute()).replace("'", r"'\''")
                file.write(f"file '{escaped}'\n" + (f"inpoint {second:.6f}\n" if number else ""))
        publish(
            joined,
            ["-f", "concat", "-safe", "0", "-i", file_argument(listing)],
            frames,
            record,
            partial(in_video, how=how),
        )
    finally:
        listing.unlink(missing_ok=True)


def _entries(plan: Plan, clips: Sequence[Job]) -> list[dict[str, Any]]:
    """The clips in the record of the joined video."""
    return [
        {
            "file": clip.save_file.name, "prompt": clip.prompt, "seed": clip.seed, "frames": clip.frame_num,
            "meaning": hashlib.sha256(key_of(plan.meaning(clip)).encode()).hexdigest(),
        }
        for clip in clips
    ]  # fmt: skip
