"""Named tensors in safetensors files: names and shapes from headers alone, then one tensor (or some rows) at a time.

The data is read with plain reads into a buffer, not through a memory map: pages of a map count as resident memory until
the file is closed. The format (huggingface/safetensors): 8 bytes header length, that many bytes of JSON, then the
data."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wan.utils.errors import InputError, TensorFileError, first_line
from wan.utils.files import parse_json, stand_in

if TYPE_CHECKING:
    from torch import Tensor

# safetensors' names -> (torch's name, bytes an element)
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "I64": ("int64", 8), "I32": ("int32", 4),
    "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
INDEX_SUFFIX = ".safetensors.index.json"
AT_ONCE = 16  # reads of a few bytes: on the hub each is a request
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: it starts `offset` bytes into it. Other readers' entries compute as they read."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stored: tuple[str, int] | None = None  # (type by the file's own name, bytes) where reading gives another dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    def rows(self, rows: slice | None) -> Entry:
        """Rows `rows.start:rows.stop` of it as a tensor of their own; None: all of it."""
        if rows is None or not self.shape:
            return self
        start, stop, _ = rows.indices(self.shape[0])
        row = self.bytes // max(1, self.shape[0])
        return replace(self, shape=(max(0, stop - start), *self.shape[1:]), offset=self.offset + start * row)

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """As `TensorStore.read`. name: in messages."""
        import torch

        part = self.rows(rows)
        data = torch.empty(part.bytes, dtype=torch.uint8) if buffer is None else buffer[: part.bytes]
        with part.file.open("rb", buffering=0) as file:
            file.seek(part.offset)
            view, done = data.numpy().data, 0
            while done < part.bytes:
                got = file.readinto(view[done:])
                if not got:
                    raise TensorFileError(f"{part.file}: ended inside tensor {name}")
                done += got
        return data.view(getattr(torch, DTYPES[part.dtype][0])).reshape(part.shape)


class TensorStore(dict[str, Entry]):
    """The tensors of one safetensors file, or of an index's shards: name -> `Entry`, from headers alone."""

    def __init__(self, entries: Mapping[str, Entry], *metadata_by_file: dict[str, str]) -> None:
        super().__init__(entries)
        self.metadata_by_file = metadata_by_file
        self.source: TensorStore = self  # of the file itself, with its own names

    @classmethod
    def open(cls, path: Path) -> TensorStore:
        """`path` is a safetensors file, or an index (`*.safetensors.index.json`) of the shards beside it."""
        if not path.name.endswith(INDEX_SUFFIX):
            return cls(*read_header(path))
        with reading(path, "not a safetensors index"):
            weight_map: dict[str, str] = parse_json(path.read_bytes())["weight_map"]
            for name, shard in weight_map.items():
                if not name.isprintable():
                    raise ValueError(f"a tensor is named {name!r:.60}")
                if not shard.isprintable() or re.search(r"[/\\:]", shard) or len(shard.encode()) > 255:
                    raise ValueError(f"{shard!r:.60} names no shard beside it")
            if not weight_map:
                raise misread(path, "the index names no tensor; get the file again")
        shards = sorted(set(weight_map.values()))
        if absent := [s for s in shards if not (path.parent / s).is_file()]:
            raise TensorFileError(f"{path}: names shards that are not there: {', '.join(absent)}")
        by_shard, entries = {s: read_header(path.parent / s) for s in shards}, {}
        for name, shard in weight_map.items():
            if name not in by_shard[shard][0]:
                raise TensorFileError(f"{path}: tensor {name} is not in {shard}, where the index puts it")
            entries[name] = by_shard[shard][0][name]
        return cls(entries, *(metadata for _, metadata in by_shard.values()))

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata; where several files share a key, the last file's value."""
        return {key: value for metadata in self.metadata_by_file for key, value in metadata.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.items()}

    def stored(self, name: str) -> tuple[str, int]:
        """(the file's own name for its type, bytes in the file) of a tensor; `read` may give another dtype."""
        return self[name].stored or (self[name].dtype, self[name].bytes)

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """`names` in the order in which a disk reads them fastest."""
        return sorted(names, key=lambda name: (self[name].file, self[name].offset))

    def scalars(self, names: Iterable[str]) -> dict[str, float]:
        """The values of one-element tensors. TensorFileError for any other tensor."""

        def value(name: str) -> float:
            if math.prod(self[name].shape) != 1 or self[name].dtype == "BOOL":
                raise TensorFileError(f"{self[name].file}: tensor {name} is not a single number ({self[name].dtype})")
            return float(self.read(name).double())

        names = list(names)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(names, pool.map(value, names), strict=True))

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """The tensor, or rows `rows.start:rows.stop` of its first axis, on the CPU in its entry's dtype.
        buffer: a uint8 tensor to read into; the result is then a view of it, valid until its next use."""
        return self[name].read(name, rows, buffer)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries by name in file order, metadata) of one safetensors file; no tensor data is read. TensorFileError for a
    file that is truncated, corrupt, of another kind or not readable, OSError for other failures."""
    entries: dict[str, Entry] = {}
    with reading(path, "the safetensors header is corrupt") as size:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise misread(path, f"not a safetensors file, or cut off in its header ({size:,} bytes)")
            values = parse_json(file.read(length))
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text by name")
        end = start = 8 + length
        for name, value in sorted(values.items(), key=lambda item: item[1]["data_offsets"]):
            if not name.isprintable():
                raise ValueError(f"a tensor is named {name[:60]!r}")
            dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
            if len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last)):
                raise ValueError(f"tensor {name[:60]} has an impossible shape or offset")
            if dtype not in DTYPES:
                raise ValueError(f"tensor {name[:60]} has the unsupported dtype {dtype!r:.40}")
            entries[name] = entry = Entry(path, dtype, tuple(shape), start + first)
            if (entry.offset, start + last) != (end, end + entry.bytes):
                raise ValueError(f"tensor {name:.60} does not fill the bytes from the one before it on")
            end += entry.bytes
    if end > size:
        cut = next(name for name, entry in entries.items() if entry.offset + entry.bytes > size)
        raise TensorFileError(f"{path}: truncated, {size:,} of {end:,} bytes; tensor {cut:.100} is cut off")
    if end < size:
        raise TensorFileError(f"{path}: {size - end:,} bytes at its end belong to no tensor")
    return entries, metadata


def header_bytes(table: Mapping[str, object]) -> bytes:
    """The start of a safetensors file whose header holds `table`: length, JSON padded to 8 bytes."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size, first and last MiB: cheap, and it tells releases apart."""
    with path.open("rb") as file:
        start = file.read(1 << 20)
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 20)))
        return hashlib.sha256(size.to_bytes(8) + start + file.read(1 << 20)).hexdigest()


@contextmanager
def reading(path: Path, problem: str) -> Iterator[int]:
    """Context manager around code that interprets a file, of the size given: all that it raises is a TensorFileError.
    problem: says that the file could not be understood. Only interpretation belongs inside: bugs are hidden here."""
    size = size_of(path)
    try:
        yield size
    except InputError:
        raise
    except (PermissionError, MemoryError) as e:
        lack = "memory left" if isinstance(e, MemoryError) else "permission"
        raise TensorFileError(f"{path}: there is no {lack} to read it") from None
    except Exception as e:  # parsers raise anything on a damaged file; each becomes one error that names the file
        if isinstance(e, OSError) and e.errno is not None:  # from the file system; a library's own has no number
            raise
        raise misread(path, f"{problem} ({first_line(e)})") from e


def misread(path: Path, problem: str) -> TensorFileError:
    """The error for a file that is not what it should be: names what it is instead, if its start shows it."""
    return TensorFileError(f"{path}: {stand_in(path) or problem}")


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
