"""Claims: independent processes that share a folder make each video once, and one death costs one video.

A claim is the file `.NAME.claim` beside the video, made exclusively, with its owner's machine, process and time; the
owner touches it every BEAT_SECONDS and removes it at the end. The rule for one that is found:

* its owner is a process of this machine: it holds while that process lives, frozen or not;
* its owner is on another machine: it holds while it was touched in the last STALE_SECONDS (600);
* otherwise it is stale, is removed, and whoever then makes it first has it.

Two that find the same stale claim cannot remove each other's new one: the right to remove is itself an exclusive file,
named after the claim that is to go.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from wan.utils import files
from wan.utils.errors import JobError
from wan.utils.strict_json import parse_json

BEAT_SECONDS = 30.0
ATTEMPTS = 100
CLAIM = re.compile(r"\..+\.claim(\.[0-9a-f]+)?", re.DOTALL)


class ClaimedElsewhere(JobError):
    """Another process is making this video; it is no failure of ours."""


@dataclass(frozen=True)
class Owner:
    """Who made a claim. started: the process's start, in the machine's own count, against numbers used again."""

    machine: str
    pid: int
    started: str
    time: str
    token: str  # of this one claim

    @classmethod
    def me(cls) -> Owner:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(files.machine(), os.getpid(), _started(os.getpid()), now, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.partition('-')[0]}, since {self.time}"


UNKNOWN = Owner("?", 0, "", "?", "0")  # a claim that is just being written, or was never finished


@dataclass
class Claim:
    """A claim that is held. taken_over: a sentence if a stale one was in its place."""

    path: Path
    owner: Owner
    taken_over: str | None

    def holds(self) -> bool:
        """Whether it is still ours: a machine that slept may have been taken for dead."""
        return _read(self.path) == self.owner


@contextmanager
def claimed(video: Path) -> Iterator[Claim]:
    """Hold the claim to `video` for the length of the block. ClaimedElsewhere naming the owner if another has it.

    Look whether the video is there only after this: another process may just have finished it.
    """
    claim = _take(claim_file(video), video)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(claim, ended), name="claim", daemon=True)
    try:
        heart.start()  # which waits for the thread: a Ctrl-C comes here as well
        yield claim
    finally:
        ended.set()
        if heart.ident is not None:
            heart.join()
        if claim.holds():
            claim.path.unlink(missing_ok=True)


def claim_file(video: Path) -> Path:
    return video.with_name(f".{video.name}.claim")


def sweep(folder: Path) -> list[Path]:
    """Remove what dead processes left in `folder`: parts of files, stale claims, rights to remove one. What went."""
    swept = files.sweep_parts(folder)
    with suppress(FileNotFoundError):
        for entry in [entry.name for entry in os.scandir(folder) if CLAIM.fullmatch(entry.name)]:
            path = folder / entry
            with suppress(FileNotFoundError):
                if not entry.endswith(".claim"):  # a right is held for milliseconds
                    if files.seconds_untouched(path) > files.STALE_SECONDS:
                        path.unlink()
                        swept.append(path)
                elif (owner := _read(path)) and _is_stale(path, owner) and _remove(path, owner):
                    swept.append(path)
    return swept


def _take(path: Path, video: Path) -> Claim:
    """Make the claim, after removing a stale one."""
    me, taken_over = Owner.me(), None
    for _ in range(ATTEMPTS):
        if _make(path, json.dumps(asdict(me))):
            return Claim(path, me, taken_over)
        found = _read(path)
        try:
            if found is None:
                continue  # released in this moment
            if not _is_stale(path, found):
                raise ClaimedElsewhere(f"{video}: is being made by {found}")
        except FileNotFoundError:
            continue
        if _remove(path, found):
            taken_over = f"{video}: taken over from {found}, which is gone"
        else:
            time.sleep(0.01)
    raise ClaimedElsewhere(f"{video}: other processes claim it at this moment")


def _make(path: Path, content: str) -> bool:
    """Whether the file was not there and is now."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> Owner | None:
    """Who has the claim; UNKNOWN where the file does not say so, None where there is none."""
    try:
        values = parse_json(path.read_bytes())
        owner = Owner(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return UNKNOWN
    whole = type(owner.pid) is int and re.fullmatch("[0-9a-f]+", str(owner.token))
    texts = (owner.machine, owner.started, owner.time, owner.token)
    return owner if whole and all(isinstance(text, str) for text in texts) else UNKNOWN


def _is_stale(path: Path, owner: Owner) -> bool:
    """The rule above. FileNotFoundError if the claim has gone meanwhile."""
    if files.is_left_over(path, owner.machine, owner.pid):
        return True
    used_again = owner.machine == files.machine() and owner.started != _started(owner.pid)
    return used_again and os.name != "nt"


def _remove(path: Path, stale: Owner) -> bool:
    """Remove this stale claim and no other; whether it was us who did."""
    right = path.with_name(f"{path.name}.{stale.token}")
    if not _make(right, ""):
        with suppress(FileNotFoundError):
            if files.seconds_untouched(right) > files.STALE_SECONDS:
                right.unlink()
        return False
    try:
        if _read(path) != stale:
            return False
        path.unlink()
        return True
    finally:
        right.unlink(missing_ok=True)


def _beat(claim: Claim, ended: threading.Event) -> None:
    """The background thread: while the claim is ours, show that its owner lives."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a file server that does not answer now will at the next beat
            if claim.holds():
                os.utime(claim.path)


def _started(pid: int) -> str:
    """When a process of this machine started, in clock ticks since the machine did; "" where that is not known."""
    return "".join(files.process_status(pid)[19:20])
