"""Facts of an MP4 file from its boxes (ISO/IEC 14496-12, 4.2): to start a program for each of thousands takes long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

COMMENT = b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"  # the last three are QuickTime's
SAMPLE_SIZES = b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz"


def comment(path: Path, most: int) -> str:
    """The comment tag, cut off after `most` bytes. ValueError if there is none."""
    with path.open("rb") as file:
        for length in _find(file, COMMENT):
            return file.read(most)[8:length].decode()  # after its type and language
    raise ValueError("no comment tag")


def count_frames(path: Path) -> int:
    """Frames of the first track of a file that was not cut off. ValueError for any other file."""
    with path.open("rb") as file:
        for _ in _find(file, SAMPLE_SIZES) if [*_find(file, [b"mdat"])] else ():
            return int.from_bytes(file.read(12)[8:])
    raise ValueError("no data, or no table of frames")


def _find(file: BinaryIO, names: Sequence[bytes], end: int | None = None) -> Iterator[int]:
    """Bytes of each box at the path `names`, the file at their start. ValueError where a box is cut off."""
    if end is None:
        end, _ = file.seek(0, 2), file.seek(0)
    while (start := file.tell()) < end:
        size, name = int.from_bytes(file.read(4)), file.read(4)
        size = int.from_bytes(file.read(8)) if size == 1 else size
        if not 8 <= size <= end - start:
            raise ValueError(f"box {name!r} is cut off")
        if name == names[0]:
            file.seek(4 * (name == b"meta"), 1)  # its version
            yield from _find(file, names[1:], start + size) if names[1:] else [start + size - file.tell()]
        file.seek(start + size)
