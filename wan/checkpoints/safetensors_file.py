"""Named tensors in safetensors files: names and shapes from headers alone, then one tensor (or some rows) at a time.

The data is read with plain reads into a buffer, not through a memory map: pages of a map count as resident memory
until the file is closed, which for a 57 GB float32 expert is twice the size of the model being built.
The format (huggingface/safetensors): 8 bytes header length, that many bytes of JSON, then the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.checkpoints.outside import misread, reading, size_of
from wan.utils.errors import TensorFileError
from wan.utils.files import parse_json

if TYPE_CHECKING:
    import torch

# safetensors' names -> (torch's name, bytes an element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# safetensors' names -> struct's, for single numbers
SCALAR_FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}
UPPER_HALVES = {"BF16": "f", "F8_E5M2": "e"}  # formats that are the upper half of one that struct knows
INDEX_SUFFIX = ".safetensors.index.json"
AT_ONCE = 16  # reads
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_AXES = 32


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: it starts `offset` bytes into it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries by name in file order, metadata) of one safetensors file; no tensor data is read.

    TensorFileError for a file that is truncated, corrupt, of another kind or not readable, OSError for other failures.
    """
    size = size_of(path)
    with reading(path, "the safetensors header is corrupt"):
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise misread(path, f"not a safetensors file, or cut off in its header ({size:,} bytes)")
            values = parse_json(file.read(length))
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text by name")
        end = 8 + length
        found = sorted((_parse_entry(path, name, end, value) for name, value in values.items()), key=itemgetter(0))
        for (first, last), name, entry in found:
            if last - first != entry.bytes:
                raise ValueError(f"tensor {name:.60} has a shape that does not fit its bytes")
            if entry.offset != end:
                raise ValueError(f"tensor {name:.60} does not start where the one before it ends")
            end += entry.bytes
    if end > size:
        cut = next(name for _, name, entry in found if entry.offset + entry.bytes > size)
        sizes = f"{end:,} bytes expected, {size:,} found"
        raise TensorFileError(f"{path}: truncated, {sizes}; tensor {cut:.100} is cut off")
    if end < size:
        raise TensorFileError(f"{path}: {size - end:,} bytes at its end belong to no tensor")
    return {name: entry for _, name, entry in found}, metadata


def _parse_entry(path: Path, name: str, start: int, value: dict[str, Any]) -> tuple[tuple[int, int], str, Entry]:
    """((first byte, end), name, entry). ValueError for anything that is not exactly so. start: of the data."""
    if not name.isprintable():
        raise ValueError(f"a tensor is named {name[:60]!r}")
    dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
    if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last)):
        raise ValueError(f"tensor {name[:60]} has an impossible shape or offset")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name[:60]} has the unsupported dtype {dtype!r:.40}")
    return (first, last), name, Entry(path, dtype, tuple(shape), start + first)


def header_bytes(table: Mapping[str, object]) -> bytes:
    """The start of a safetensors file whose header holds `table`: length, JSON padded to 8 bytes."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_ranges(ranges: Iterable[tuple[Path, int, int]]) -> list[bytes]:
    """The bytes at each (file, offset, length); several at once, because on the hub each is a request."""

    def read(part: tuple[Path, int, int]) -> bytes:
        with part[0].open("rb", buffering=0) as file:
            file.seek(part[1])
            return file.read(part[2]) or b""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read, ranges))


def _parse_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard beside the index."""
    size_of(path)
    with reading(path, "not a safetensors index"):
        weight_map: dict[str, str] = parse_json(path.read_bytes())["weight_map"]
        for name, shard in weight_map.items():
            if not name.isprintable():
                raise ValueError(f"a tensor is named {name!r:.60}")
            if not shard.isprintable() or re.search(r"[/\\:]", shard) or len(shard.encode()) > 255:
                raise ValueError(f"{shard!r:.60} names no shard beside it")
        if not weight_map:
            raise misread(path, "the index names no tensor; get the file again")
    return weight_map


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size, first and last MiB: cheap, and it tells releases apart."""
    with path.open("rb") as file:
        start = file.read(1 << 20)
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 20)))
        return hashlib.sha256(size.to_bytes(8) + start + file.read()).hexdigest()


def _scalar(dtype: str, raw: bytes) -> float:
    """The value of a tensor of one element, from its bytes."""
    if dtype in UPPER_HALVES:
        return float(struct.unpack(f"<{UPPER_HALVES[dtype]}", b"\0" * len(raw) + raw)[0])
    if dtype != "F8_E4M3":
        return float(struct.unpack(f"<{SCALAR_FORMATS[dtype]}", raw)[0])
    exponent, mantissa = raw[0] >> 3 & 15, raw[0] & 7  # arXiv 2209.05433: no infinities, one NaN of each sign
    value = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)
    return math.nan if raw[0] & 127 == 127 else -value if raw[0] > 127 else value


class TensorStore(Mapping[str, Entry]):
    """The tensors of one safetensors file, or of the shards that a folder's index names, by name.

    A mapping name -> `Entry` (dtype, shape); `read` brings the data. Opened from headers alone.
    """

    def __init__(self, entries: dict[str, Entry], *metadata: dict[str, str]) -> None:
        """metadata: of each file."""
        self.entries = entries
        self.metadata_by_file = metadata
        self.source: TensorStore = self  # of the file itself, with its own names

    @property
    def metadata(self) -> dict[str, str]:
        """Of the one file; of several files each key's last value."""
        return {key: value for metadata in self.metadata_by_file for key, value in metadata.items()}

    @classmethod
    def open(cls, path: Path) -> TensorStore:
        """`path` is a safetensors file, or an index (`*.safetensors.index.json`) of the shards beside it."""
        if not path.name.endswith(INDEX_SUFFIX):
            return cls(*read_header(path))
        weight_map = _parse_index(path)
        shards = sorted(set(weight_map.values()))
        if absent := [s for s in shards if not (path.parent / s).is_file()]:
            raise TensorFileError(f"{path}: names shards that are not there: {', '.join(absent)}")
        by_shard = {s: read_header(path.parent / s) for s in shards}
        entries: dict[str, Entry] = {}
        for name, shard in weight_map.items():
            if name not in by_shard[shard][0]:
                raise TensorFileError(f"{path}: tensor {name} is not in {shard}, where the index puts it")
            entries[name] = by_shard[shard][0][name]
        return cls(entries, *(metadata for _, metadata in by_shard.values()))

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def files(self) -> list[Path]:
        return sorted({e.file for e in self.entries.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def file(self, name: str) -> Path:
        return self.entries[name].file

    def stored_as(self, name: str) -> str:
        """The file's own name for the type in which it holds the tensor; `read` may give another dtype."""
        return self.entries[name].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return self.entries[name].bytes

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """`names` in the order in which a disk reads them fastest."""
        return sorted(names, key=lambda n: (self.entries[n].file, self.entries[n].offset))

    def scalars(self, names: Iterable[str]) -> dict[str, float]:
        """The values of one-element tensors, without torch. TensorFileError for any other tensor."""
        entries = {name: self.entries[name] for name in names}
        for name, entry in entries.items():
            if math.prod(entry.shape) != 1 or entry.dtype not in {*SCALAR_FORMATS, *UPPER_HALVES, "F8_E4M3"}:
                raise TensorFileError(f"{entry.file}: tensor {name} is not a single number ({entry.dtype})")
        found = read_ranges((entry.file, entry.offset, entry.bytes) for entry in entries.values())
        return {name: _scalar(entry.dtype, raw) for (name, entry), raw in zip(entries.items(), found, strict=True)}

    def buffer_bytes(self, name: str, rows: slice | None = None) -> int:
        """Size of the buffer that `read` needs."""
        entry = self.entries[name]
        if rows is None or not entry.shape or not entry.shape[0]:
            return entry.bytes
        return entry.bytes // entry.shape[0] * len(range(*rows.indices(entry.shape[0])))

    def read_fp8(
        self, name: str, rows: slice | None = None, buffer: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(e4m3 numbers, float32 scales [rows, 1]) of a matrix that is stored so; None for any other tensor."""
        return None

    def read(self, name: str, rows: slice | None = None, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, or rows `rows.start:rows.stop` of its first axis, on the CPU in its entry's dtype.

        buffer: a uint8 tensor to read into; the result is then a view of it, valid until its next use.
        """
        import torch

        entry = self.entries[name]
        shape, offset = entry.shape, entry.offset
        if rows is not None:
            step = entry.bytes // shape[0] if shape[0] else 0
            start, stop, _ = rows.indices(shape[0])
            shape, offset = (max(0, stop - start), *shape[1:]), offset + start * step
        dtype, width = DTYPES[entry.dtype]
        count = math.prod(shape) * width
        data = torch.empty(count, dtype=torch.uint8) if buffer is None else buffer[:count]
        if count:
            with entry.file.open("rb", buffering=0) as file:
                file.seek(offset)
                view, done = data.numpy().data, 0
                while done < count:
                    got = file.readinto(view[done:])
                    if not got:
                        raise TensorFileError(f"{entry.file}: ended inside tensor {name}")
                    done += got
        return data.view(getattr(torch, dtype)).reshape(shape)
