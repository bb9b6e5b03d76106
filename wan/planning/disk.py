"""Disk space for the videos still to be made, against the free space of their folders."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan.jobs.job import Job
from wan.utils.errors import InputError
from wan.utils.progress import quantity

# Bytes of an mp4 for each pixel of each frame. Measured at 832x480: smooth motion 0.013, light grain 0.24, heavy grain
# 0.71, pure noise 0.97.
LEAST, LIKELY, MOST = 0.01, 0.25, 1.0
LATENT = 0.25  # bytes of kept latents for each pixel of each frame: 16 float32 channels for 4 x 8 x 8 pixels
RECORD = 20_000  # bytes in the mp4 and beside it


@dataclass(frozen=True)
class Disk:
    """Bytes to write to one file system, an estimate with its spread, and bytes free (None: it does not say)."""

    folder: Path
    least: float
    likely: float
    most: float
    free: int | None

    def line(self) -> str:
        spread = f"{quantity(self.least, 'B')} to {quantity(self.most, 'B')}, by content"
        free = "free space unknown" if self.free is None else f"{quantity(self.free, 'B')} free"
        return f"disk: about {quantity(self.likely, 'B')} to write in {self.folder} ({spread}), {free}"

    @property
    def warning(self) -> str | None:
        if self.free is None or self.likely <= self.free:
            return None
        return f"warning: {self.folder} may be full before the last video; a video that does not fit fails alone"


def disks(jobs: Sequence[Job], *, latents: bool) -> list[Disk]:
    """The space that `jobs` need, by file system. latents: they are kept for good."""
    jobs_in: dict[Path, list[Job]] = {}
    for job in jobs:
        jobs_in.setdefault(job.save_file.parent, []).append(job)
    groups: dict[int, tuple[Path, list[Job]]] = {}  # by file system
    for parent, some in jobs_in.items():
        folder = parent.absolute()
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        groups.setdefault(nearest.stat().st_dev, (nearest, []))[1].extend(some)
    found = []
    for folder, here in groups.values():
        pixels = [job.frame_num * job.size[0] * job.size[1] for job in here]
        joined = sum(size for job, size in zip(here, pixels, strict=True) if job.joined)
        videos = sum(pixels) + joined + max(pixels)  # one file at a time is there twice, while it is completed
        beside = RECORD * len(here) + LATENT * (sum(pixels) if latents else max(pixels))
        usage = shutil.disk_usage(folder)
        least, likely, most = (rate * videos + beside for rate in (LEAST, LIKELY, MOST))
        found.append(Disk(folder, least, likely, most, usage.free if usage.total else None))
    return found


def check_disks(found: Sequence[Disk]) -> None:
    """InputError where the videos cannot fit, whatever they show."""
    if full := [disk for disk in found if disk.free is not None and disk.least > disk.free]:
        raise InputError(
            f"--save_dir: {quantity(disk.free or 0, 'B')} free in {disk.folder}, the videos need at least "
            f"{quantity(disk.least, 'B')}; free some, choose another --save_dir, or make what fits with --ignore_disk"
            for disk in full
        )
