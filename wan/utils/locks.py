"""Locks: processes that share a folder make each video once, and a process that dies costs one video.

The lock of `NAME` is the file `.NAME.lock` beside it. The kernel locks it and lets go when the holder ends, however it
ends. The holder removes the file before it lets go; filelock never takes a removed file for a lock. A lock file that a
killed process left holds nothing: the next holder removes it. The holder also owns the unfinished files of the video.

On a file system without locks, `.NAME.softlock` marks the video by filelock's rules for such files: another process on
the same machine replaces the mark of a dead one; a mark from another machine counts until somebody removes it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from wan.utils.errors import JobError
from wan.utils.files import Beside, remove_parts

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
ATTEMPTS = 5  # where a file server answers that it no longer knows the file
PAUSE_SECONDS = 0.1
LEFT_OVER = re.compile(r"\.(.+)\.(lock|softlock|[0-9a-f]{8}\.part)", re.DOTALL)
_without_locks: set[Path] = set()  # folders


class LockedElsewhere(JobError):
    """Another process is making this video. It is not a failure."""


@contextmanager
def locked(video: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `video` for the length of the block, and remove what a killed process left of the video.

    say: takes a message. LockedElsewhere if another process holds the lock, JobError if it cannot be taken. Look for
    the video after this: another process may just have finished it.
    """
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
            elif error.errno == errno.ESTALE and attempts < ATTEMPTS:
                time.sleep(PAUSE_SECONDS)
            else:
                raise JobError(f"{path}: the lock cannot be taken ({error.strerror or error})") from error


def _lock_file(video: Path) -> Path:
    return video.with_name(f".{video.name}.lock")
