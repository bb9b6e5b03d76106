"""Files from outside that cannot be understood: one boundary around reading them, and a guess at what they are."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan.utils.errors import InputError, TensorFileError

PERMISSION = "there is no permission to read it"
# what the start of a file shows -> what the file is, and what to do
STAND_INS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull or hf download"),
    (rb"\s*<(!doctype\s+html|html|\?xml)", "an HTML page, such as a login or error page; download the file again"),
    (rb"(\.\.?/)+[\w./@+-]{3,}\s*\Z", "the text of a link, not the file it points to; copy it again, following links"),
    (rb"\0{64,}", "empty at its start: the download was not finished; download the file again"),
)


@contextmanager
def reading(path: Path, problem: str) -> Iterator[None]:
    """Context manager around code that interprets a file's content: whatever it raises is a TensorFileError.

    problem: says that the file could not be understood. Only interpretation belongs inside: bugs are hidden here.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except PermissionError:
        raise TensorFileError(f"{path}: {PERMISSION}") from None
    except Exception as e:  # parsers raise anything on a damaged file; each becomes one error that names the file
        if isinstance(e, OSError) and e.errno is not None:  # from the file system; a library's own has no number
            raise
        raise misread(path, f"{problem} ({in_one_line(e)})") from e


def misread(path: Path, problem: str) -> TensorFileError:
    """The error for a file that is not what it should be: names what it is instead, if its start shows it."""
    return TensorFileError(f"{path}: {stand_in(path) or problem}")


def stand_in(path: Path) -> str | None:
    """What a file is in place of the expected one; None if it is nothing known."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    return next((meaning for sign, meaning in STAND_INS if re.match(sign, start, re.IGNORECASE)), None)


def in_one_line(error: Exception) -> str:
    """An error's text in one line of at most 200 characters."""
    text = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    return (text or type(error).__name__)[:200]


def size_of(path: Path) -> int:
    """Bytes of a regular file. TensorFileError for anything else (a pipe would block), and for half a download."""
    try:
        found = path.stat()
    except PermissionError:
        raise TensorFileError(f"{path}: there is no permission to reach it") from None
    if not stat.S_ISREG(found.st_mode):
        raise TensorFileError(f"{path}: not a regular file")
    if path.with_name(f"{path.name}.aria2").exists():
        raise TensorFileError(f"{path}: its download is not finished ({path.name}.aria2 is beside it); let aria2 go on")
    return found.st_size
