"""Files that a run writes: their names beside a video, writing each whole or not at all, and the lock of each video.

A file being made is called `.NAME.RANDOM.part`. Whoever holds the lock of a video also owns its unfinished files. The
lock of `NAME` is the file `.NAME.lock`, locked by the kernel, who lets go however the holder ends. On a file system
without locks, `.NAME.softlock` marks the video by filelock's rules: another process on the same machine replaces the
mark of a dead one; a mark from another machine counts until somebody removes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wan.utils.errors import JobError

LONGEST_NAME = 255  # bytes of one name: the limit of the file systems of Linux, and not above those of the others
LONGEST_PATH = 4095
PRIVATE = "wan-lightning-"  # begin of the name of a folder for temporary files
STAND_INS = (  # how files begin that are often taken for others -> their kind, and the remedy
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull or hf download"),
    (rb"\s*<(!doctype\s+html|html)", "an HTML page, such as a login or error page; download the file again"),
)
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
LEFT_OVER = re.compile(r"\.(.+)\.(?:lock|softlock|([0-9a-f]{8})\.part)", re.DOTALL)
_without_locks: set[Path] = set()  # folders


class Beside(NamedTuple):
    """The files of one video."""

    video: Path
    record: Path
    latents: Path  # kept until the video is whole, with --save_latents for good
    sheet: Path  # --preview
    strip: Path  # --preview_steps

    @classmethod
    def of(cls, video: Path) -> Beside:
        endings = ".json", ".latents.safetensors", ".png", ".steps.png"
        folder, stem = video.parent, video.stem
        return cls(video, *(folder / f"{stem}{ending}" for ending in endings))


def latents_elsewhere(video: Path, *, make: bool = False) -> Path:
    """The file for latents that the video's folder does not take: in a temporary folder that only this user can enter.
    Videos of one name in two folders have two files. make: such a folder where there is none. OSError."""
    digest = hashlib.sha256(os.fsencode(video.absolute())).hexdigest()[:12]
    name = f"{os.fsencode(video.stem)[:100].decode('utf-8', 'ignore')}-{digest}.latents.safetensors"
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{PRIVATE}*")):
        with suppress(OSError):  # removed meanwhile, or another user's: not ours
            state = folder.lstat()
            private = os.name == "nt" or (state.st_uid == os.geteuid() and not state.st_mode & 0o077)
            if stat.S_ISDIR(state.st_mode) and private:
                return folder / name
    return Path(tempfile.mkdtemp(prefix=PRIVATE)) / name if make else Path(tempfile.gettempdir()) / PRIVATE / name


def cache_folder() -> Path:
    """In `$XDG_CACHE_HOME`, else the platform's. RuntimeError if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if given and Path(given).is_absolute():  # the XDG standard has relative ones ignored
        return Path(given, "wan-lightning")
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "wan-lightning"


def make_part(path: Path) -> Path:
    """A new, empty file beside `path`, to become `path` once it is whole."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part


def remove_parts(video: Path) -> int:
    """Remove the unfinished files of `video` and return how many; for the holder of its lock."""
    names, removed = {file.name for file in Beside.of(video)}, 0
    for entry in list(os.scandir(video.parent)):
        if (found := LEFT_OVER.fullmatch(entry.name)) and found[2] and found[1] in names:
            with suppress(OSError):  # another user's, or no file
                os.unlink(entry.path)
                removed += 1
    return removed


def longest_name(video: Path) -> str:
    """That of its latents while they are written."""
    return f".{Beside.of(video).latents.name}.{'0' * 8}.part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which becomes `path` if the block ends well."""
    part = make_part(path)
    try:
        yield part
        with part.open("r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `path` whole, text as UTF-8, or leave it as it was."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


class LockedElsewhere(JobError):
    """Another process is making this video: no failure."""


@contextmanager
def locked(video: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `video`, and remove what a killed process left of the video. LockedElsewhere, JobError.
    Look for the video after this: another process may just have finished it."""
    lock = _acquire(video, say)
    try:
        if removed := remove_parts(video):
            say(f"{video}: removed {removed} unfinished file{'s' if removed > 1 else ''} of a run that was killed")
        yield
    finally:
        with suppress(OSError):  # a lock file that stays is harmless
            _lock_file(video).unlink(missing_ok=True)
        with suppress(OSError):  # the video is whole, whatever the file server says to this
            lock.release()


def clean_up(videos: Iterable[Path], say: Callable[[str], None]) -> None:
    """Remove the lock files and unfinished files that killed processes left of `videos`, which are whole."""
    video_of = {(video.parent, file.name): video for video in videos for file in Beside.of(video)}
    for folder in {folder for folder, _ in video_of}:
        names = []
        with suppress(OSError):  # no such folder yet
            names = [found[1] for entry in os.scandir(folder) if (found := LEFT_OVER.fullmatch(entry.name))]
        for video in {video_of[folder, name] for name in names if (folder, name) in video_of}:
            # another process holds the video: its parts stay
            with suppress(JobError), locked(video, say):
                pass


def _acquire(video: Path, say: Callable[[str], None]) -> BaseFileLock:
    path, attempts = _lock_file(video), 0
    while True:
        try:
            with suppress(FileNotFoundError):  # absent, as it should be
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    raise JobError(f"{path} is in the way: it must be a file or absent; remove it")
            lock: BaseFileLock = SoftFileLock(path.with_suffix(".softlock"), blocking=False)
            if path.parent not in _without_locks:  # 0o666: other users of a shared folder may lock the file, too
                lock = FileLock(path, blocking=False, mode=0o666, fallback_to_soft=False)
            lock.acquire()
            return lock
        except Timeout:
            raise LockedElsewhere(f"{video} is being made by another process") from None
        except OSError as error:
            attempts += 1
            if error.errno in NO_LOCKS and path.parent not in _without_locks:
                _without_locks.add(path.parent)
                say(f"{path.parent}: this file system has no locks; files named .softlock mark the videos being made")
            elif error.errno == errno.ESTALE and attempts < 5:  # a file server no longer knows the file
                time.sleep(0.1)
            else:
                raise JobError(f"{path}: the lock cannot be taken ({error.strerror or error})") from error


def _lock_file(video: Path) -> Path:
    return video.with_name(f".{video.name}.lock")


def stand_in(path: Path) -> str | None:
    """Names what the start of a file shows it to be, and the remedy; None if it shows none of `STAND_INS`."""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(512)
    return next((meaning for sign, meaning in STAND_INS if re.match(sign, start, re.IGNORECASE)), None)


def parse_json(text: str | bytes) -> Any:
    """The value that `text` spells, strictly: no NaN, no key twice. ValueError names the fault."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} is given twice")
        values[key] = value
    return values
