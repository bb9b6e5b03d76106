"""Files that a run writes: their names beside a video, writing each whole or not at all, and what dead runs left.

While a file is being made it is `.NAME.HOST-SPACE-PID.part`: hidden, of one process, and told from what the user has.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

LONGEST_NAME = 255  # bytes of one name: the limit of the file systems of Linux, and not above those of the others
LONGEST_PATH = 4095
PART = re.compile(
    r"\..+\.(?P<machine>[A-Za-z0-9_]{1,16}-[0-9a-f]{1,8})-(?P<pid>\d{1,10})(\.encoding)?\.part", re.DOTALL
)
STALE_SECONDS = 600.0  # what another machine's process has not touched for so long is given up


class Beside(NamedTuple):
    """Every file that may be written for one video."""

    video: Path
    record: Path
    latents: Path  # kept until the video is whole, with --save_latents for good
    sheet: Path  # --preview
    strip: Path  # --preview_steps

    @classmethod
    def of(cls, video: Path) -> Beside:
        folder, stem = video.parent, video.stem
        latents, strip = folder / f"{stem}.latents.safetensors", folder / f"{stem}.steps.png"
        return cls(video, folder / f"{stem}.json", latents, folder / f"{stem}.png", strip)


def latents_elsewhere(video: Path) -> Path:
    """Where latents are kept if there is no room beside the video: videos of one name in two folders do not meet."""
    digest = hashlib.sha256(os.fsencode(video.absolute())).hexdigest()[:12]
    stem = os.fsencode(video.stem)[:100].decode("utf-8", "ignore")
    return Path(tempfile.gettempdir()) / f"{stem}-{digest}.latents.safetensors"


def cache_folder() -> Path:
    """This program's: in `$XDG_CACHE_HOME`, else the platform's. Raises RuntimeError if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if given and Path(given).is_absolute():  # the XDG standard has relative ones ignored
        base = Path(given)
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "wan-lightning"


@cache
def machine() -> str:
    """This host and process space: two containers of one host, whose process numbers mean different things, differ."""
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:16] or "host"
    try:
        space = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        space = ""
    return f"{host}-{int(space or 0) % 2**32:x}"


def part_of(path: Path, stage: str = "") -> Path:
    """The name under which this process makes `path`; `stage` tells two of one file apart (".encoding")."""
    return path.parent / f".{path.name}.{machine()}-{os.getpid()}{stage}.part"


def make_part(path: Path, stage: str = "") -> Path:
    """`part_of` as a new, empty file. One that is there is from a dead process that had our number."""
    part = part_of(path, stage)
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part


def longest_name(video: Path) -> str:
    """The longest of the names that making `video` needs: that of its latents while they are written."""
    return part_of(Beside.of(video).latents).name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to; it becomes `path` if the block ends well, and is removed if not."""
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


def is_running(pid: int) -> bool:
    """Whether a process of this machine with that number lives. On Windows it cannot be asked without harm: True."""
    if os.name == "nt":
        return True
    if pid < 1:  # would ask for whole groups of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return process_status(pid)[:1] not in (["Z"], ["X"])  # killed, and its parent has not asked yet


def process_status(pid: int) -> list[str]:
    """What Linux tells of a process of this machine, from its state letter on; empty elsewhere, and of none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def seconds_untouched(path: Path) -> float:
    """How long ago `path` was last written, by the clock of its own file system. OSError if it is not there."""
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime


def is_left_over(path: Path, owner: str, pid: int) -> bool:
    """Whether the process `pid` of the machine `owner`, which made `path`, is dead.

    On this machine that can be asked; a process of another one counts as dead when it has not touched its file for
    STALE_SECONDS.
    """
    if owner == machine() and os.name != "nt":
        return not is_running(pid)
    return seconds_untouched(path) > STALE_SECONDS


def sweep_parts(folder: Path) -> list[Path]:
    """Remove the parts that dead processes left in `folder`; what was removed. A missing folder has none."""
    swept: list[Path] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            found = PART.fullmatch(entry.name)
            path = folder / entry.name
            with suppress(FileNotFoundError):  # its owner was quicker
                if found and is_left_over(path, found["machine"], int(found["pid"])):
                    path.unlink()
                    swept.append(path)
    return swept
