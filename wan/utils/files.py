"""Files that a run writes: their names beside a video, and writing each whole or not at all. JSON that others wrote.

A file being made is called `.NAME.RANDOM.part`: hidden, and never the same for two processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_NAME = 255  # bytes of one name: the limit of the file systems of Linux, and not above those of the others
LONGEST_PATH = 4095
PRIVATE = "wan-lightning-"  # begin of the name of a folder for temporary files
STAND_INS = (  # how files begin that are often taken for others -> their kind, and the remedy
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull or hf download"),
    (rb"\s*<(!doctype\s+html|html)", "an HTML page, such as a login or error page; download the file again"),
)
PART = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)  # the name of a file being made, with its own inside


class Beside(NamedTuple):
    """Every file that may be written for one video."""

    video: Path
    record: Path
    latents: Path  # kept until the video is whole, with --save_latents for good
    sheet: Path  # --preview
    strip: Path  # --preview_steps

    @classmethod
    def of(cls, video: Path) -> Beside:
        endings = ".json", ".latents.safetensors", ".png", ".steps.png"
        return cls(video, *(video.parent / f"{video.stem}{ending}" for ending in endings))


def latents_elsewhere(video: Path, *, make: bool = False) -> Path:
    """The file for latents that the video's folder does not take: in a temporary folder that only this user can enter,
    under a name that nobody guesses. Videos of one name in two folders have two files. OSError.

    make: make such a folder where there is none. Without one the path is that of no file.
    """
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
    """This program's: in `$XDG_CACHE_HOME`, else the platform's. Raises RuntimeError if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    if given and Path(given).is_absolute():  # the XDG standard has relative ones ignored
        return Path(given, "wan-lightning")
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "wan-lightning"


def make_part(path: Path) -> Path:
    """A new, empty file in the folder of `path`, under a name of its own, to become `path` once it is whole."""
    part = _part(path, secrets.token_hex(4))
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return part


def remove_parts(video: Path) -> int:
    """Remove the unfinished files of `video` and return how many; only the holder of its lock may do so."""
    names, removed = {file.name for file in Beside.of(video)}, 0
    for entry in list(os.scandir(video.parent)):
        found = PART.fullmatch(entry.name)
        if found and found[1] in names:
            with suppress(OSError):  # another user's, or no file
                os.unlink(entry.path)
                removed += 1
    return removed


def longest_name(video: Path) -> str:
    """The longest of the names that making `video` needs: that of its latents while they are written."""
    return _part(Beside.of(video).latents, "0" * 8).name


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


def stand_in(path: Path) -> str | None:
    """Names what the start of a file shows it to be, and the remedy; None if it shows none of `STAND_INS`."""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(512)
    return next((meaning for sign, meaning in STAND_INS if re.match(sign, start, re.IGNORECASE)), None)


def _part(path: Path, token: str) -> Path:
    return path.parent / f".{path.name}.{token}.part"


def parse_json(text: str | bytes) -> Any:
    """The value that `text` spells, strictly: no NaN, no key twice, no number or nesting that Python gives up on.
    ValueError says in a few words what is wrong, and of a syntax error where."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except ValueError as e:
        if "integer string conversion" in str(e):
            raise ValueError("a number of thousands of digits") from None
        raise


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands twice")
        values[key] = value
    return values
