"""The clips of a chain after each other in one video, without the frame that two neighbours share.

Each clip that follows another one starts from that one's last frame, as its mp4 shows it. Clips are joined by copying
what the encoder wrote, so every frame is bit for bit the clip's: the first frame of a clip that follows, which is what
its model made of the frame before it, is left out, and decoding can start at its second one (`VideoWriter.follows`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan.cli.options import SCHEMA
from wan.jobs.chains import frames_joined
from wan.jobs.job import Job
from wan.media.ffmpeg import file_argument
from wan.media.previews import save_contact_sheet
from wan.media.video import count_frames, publish, read_record
from wan.planning.plan import Plan
from wan.runner.record import outcome, plain, versions
from wan.runner.video_job import check_place
from wan.utils.errors import InputError
from wan.utils.files import make_part
from wan.utils.locks import locked
from wan.utils.progress import Progress

MICROSECONDS = 1_000_000


def join(plan: Plan, clips: Sequence[Job], progress: Progress) -> None:
    """Join the whole videos of a chain. JobError, OSError; LockedElsewhere if another process is at it."""
    joined = clips[0].joined
    assert joined is not None, "these clips are in a chain"
    frames, fps = frames_joined(clips), plan.config.sample_fps
    record = {
        "schema": SCHEMA,
        "task": plan.request.task,
        "clips": _parts(plan, clips),
        "versions": versions(),
        **outcome(joined, frames, clips[0].size, fps),
    }
    check_place(joined)
    with locked(joined, progress.say), progress.stage("join"):
        copy_together([clip.save_file for clip in clips], joined, fps, frames, record)
    written = [joined, *([save_contact_sheet(joined, frames)] if plan.request.preview else [])]
    progress.say(f"joined {len(clips)} videos, {frames} frames: {', '.join(map(str, written))}")


def is_joined(plan: Plan, clips: Sequence[Job]) -> bool:
    """Whether the video of these whole clips is there, or they are no chain."""
    joined = clips[0].joined
    return joined is None or (clips_of(joined) == _parts(plan, clips) and count_frames(joined) == frames_joined(clips))


def clips_of(joined: Path) -> list[dict[str, Any]] | None:
    """Which clips a joined video says that it is of; None if there is no such video."""
    try:
        clips = read_record(joined).get("clips") if joined.exists() else None
    except InputError:
        return None
    return clips if isinstance(clips, list) else None


def copy_together(
    clips: Sequence[Path], joined: Path, fps: int, frames: int, record: dict[str, Any] | None = None
) -> None:
    """`clips`, which follow each other, as `joined`: a video of `frames` frames. JobError if one does not follow."""
    listing = make_part(joined)
    second = math.ceil(MICROSECONDS / fps) / MICROSECONDS  # where the second frame is, in the list's own unit
    try:
        with listing.open("w", encoding="utf-8") as file:
            file.write("ffconcat version 1.0\n")
            for number, clip in enumerate(clips):
                escaped = file_argument(clip.absolute()).replace("'", r"'\''")
                file.write(f"file '{escaped}'\n" + (f"inpoint {second:.6f}\n" if number else ""))
        publish(joined, ["-f", "concat", "-safe", "0", "-i", file_argument(listing)], frames, record)
    finally:
        listing.unlink(missing_ok=True)


def _parts(plan: Plan, clips: Sequence[Job]) -> list[dict[str, Any]]:
    """What the joined video's record says of its clips."""
    meanings = [json.dumps(plain(plan.meaning(clip)), sort_keys=True) for clip in clips]
    return [
        {
            "file": clip.save_file.name, "prompt": clip.prompt, "seed": clip.seed, "frames": clip.frame_num,
            "meaning": hashlib.sha256(meaning.encode()).hexdigest(),
        }
        for clip, meaning in zip(clips, meanings, strict=True)
    ]  # fmt: skip
