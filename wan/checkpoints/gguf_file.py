"""The tensors of a GGUF file as a TensorStore; quantised ones are float32, computed as they are read, by rows.

The header is read here, within bounds: the package's reader takes seconds for a text encoder's vocabulary and follows
whatever length a file names. The format (ggml-org/ggml, docs/gguf.md), little-endian: magic, version, counts; key, kind
and value of each setting; name, axes from the innermost, type and offset of each tensor; then the data, aligned."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from wan.checkpoints.safetensors_file import DTYPES, MAX_HEADER_BYTES, Entry, TensorStore, misread, reading
from wan.utils.errors import TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

GGUF_MAGIC = b"GGUF"
# a setting's kind -> struct's letter
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MOST_AXES = 8  # ggml itself has 4, ComfyUI's converter writes 5
SHAPE_KEY = "comfy.gguf.orig_shape."  # of a tensor whose rows the converter made fit the blocks
TABLES = ("modulation", "scale_shift_table")  # [1, n, width], of which ggml's own tools drop the first axis
Listed = tuple[str, tuple[int, ...], int, int]  # name, axes from the innermost, number of the type, offset in the data


class Blocks(Entry):
    """A quantised tensor: float32 as `gguf.quants.dequantize` computes it, for the rows that are read."""

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        import numpy as np
        import torch
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        assert self.stored is not None
        part, kind = self.rows(rows), GGMLQuantizationType[self.stored[0]]
        count, (values, width) = math.prod(part.shape), GGML_QUANT_SIZES[kind]
        start = (part.offset - self.offset) // 4  # numbers before the first row
        begin = start // values  # rows need not begin where blocks do, if a converter reshaped the tensor
        blocks = Entry(self.file, "U8", (self.stored[1] // width, width), self.offset)
        data = blocks.read(name, slice(begin, math.ceil((start + count) / values))).numpy()
        memory = torch.empty(part.bytes, dtype=torch.uint8) if buffer is None else buffer[: part.bytes]
        numbers = memory.view(torch.float32)
        at_once = max(1, (1 << 18) // values)  # they and their source stay in a core's cache
        for block in range(0, len(data), at_once):
            with np.errstate(all="ignore"):  # a damaged scale gives NaN or Inf, which loading looks for
                some = dequantize(data[block : block + at_once].reshape(1, -1), kind)[0]
            position = (begin + block) * values - start
            piece = torch.from_numpy(some[max(0, -position) : count - position])
            numbers[max(0, position) :][: piece.numel()] = piece
        return numbers.view(part.shape)


def open_gguf(path: Path) -> TensorStore:
    """TensorFileError for a damaged file, for types that are not dequantised, and where the package is missing."""
    tensors, settings, start = _read_header(path)
    try:
        import gguf
    except ImportError as e:
        raise TensorFileError(f"{path}: GGUF files need the package gguf: pip install gguf ({e})") from None
    entries: dict[str, Entry] = {}
    for name, axes, number, offset in tensors:
        try:
            kind = gguf.GGMLQuantizationType(number)
            values, width = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            unknown = f"tensor {name} is of the type {number}, which the installed package gguf does not know"
            raise TensorFileError(f"{path}: {unknown}") from None
        if (row := (axes or (1,))[0]) % values:
            raise TensorFileError(f"{path}: tensor {name} has rows of {row:,} values, {kind.name} blocks of {values}")
        if name in entries:
            raise TensorFileError(f"{path}: the header names tensor {name} twice")
        shape = axes[::-1]
        if (original := settings.get(SHAPE_KEY + name)) is not None:
            sizes = isinstance(original, tuple) and original and all(type(n) is int and n > 0 for n in original)
            if not sizes or math.prod(original) != math.prod(shape):
                raise TensorFileError(f"{path}: {SHAPE_KEY}{name} is not a shape of {math.prod(shape):,} values")
            shape = original
        elif name.endswith(TABLES) and len(shape) == 2:
            shape = 1, *shape
        stored = kind.name, math.prod(shape) // values * width
        plain = Entry(path, kind.name, shape, start + offset)
        entries[name] = plain if kind.name in DTYPES else Blocks(path, "F32", shape, start + offset, stored)
    store = TensorStore(entries, {key: value for key, value in settings.items() if isinstance(value, str)})
    _check(store, path, gguf)
    return store


def _check(store: TensorStore, path: Path, gguf: ModuleType) -> None:
    """TensorFileError if two tensors share bytes, one ends after the file, or the package cannot dequantise one."""
    import numpy as np

    end, size = 0, path.stat().st_size
    for name in store.in_file_order(store):
        if store[name].offset < end:
            raise TensorFileError(f"{path}: tensor {name} starts inside the one before it")
        end = store[name].offset + store.stored(name)[1]
        if end > size:
            raise TensorFileError(f"{path}: truncated, at {size:,} bytes tensor {name} is cut off")
    for stored in sorted({entry.stored[0] for entry in store.values() if entry.stored}):
        kind = gguf.GGMLQuantizationType[stored]
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            first = next(name for name in store if store.stored(name)[0] == stored)
            what = f"tensors are stored as {stored} (first: {first}), which the package gguf cannot dequantise"
            raise TensorFileError(f"{path}: {what}; get another quantisation, such as Q8_0") from None


def _read_header(path: Path) -> tuple[list[Listed], dict[str, Any], int]:
    """(tensors, settings, start of the data). Of arrays only short ones of numbers are kept, as tuples."""
    with reading(path, "the GGUF header is cut off or corrupt") as size, path.open("rb") as file:
        header = _Header(file, min(size, MAX_HEADER_BYTES))
        if header.take(4) != GGUF_MAGIC:
            raise misread(path, "not a GGUF file")
        if (version := header.number("I")) not in (2, 3):
            raise ValueError(f"of version {version:#x}, not of 2 or 3 (little-endian)")
        tensor_count, setting_count = header.number("Q"), header.number("Q")
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = header.text()
            if key in settings:
                raise ValueError(f"it has the key {key!r:.60} twice")
            settings[key] = header.value(header.number("I"))
        tensors = [header.tensor() for _ in range(tensor_count)]
        end = file.tell()
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment must be a whole number above 0, not {alignment!r:.40}")
    return tensors, settings, -(-end // alignment) * alignment


class _Header:
    """Values one after the other. ValueError where the file, or the limit of a header, ends before they do."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"{count:,} more bytes are named, {self._left:,} are left")
        self._left -= count
        return self._file.read(count)

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A setting's value; None for an array that is long, or not of numbers."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a setting is of the unknown kind {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            data = self.take(count * struct.calcsize(f"<{NUMBERS[inner]}"))
            return struct.unpack(f"<{count}{NUMBERS[inner]}", data) if count <= MOST_AXES else None
        if inner != TEXT:
            raise ValueError(f"a setting is an array of the unknown kind {inner}")
        for _ in range(count):
            self.take(self.number("Q"))
        return None

    def tensor(self) -> Listed:
        name = self.text()
        if not name.isprintable() or not name:
            raise ValueError(f"a tensor is named {name!r:.60}")
        axes = self.number("I")
        if axes > MOST_AXES:
            raise ValueError(f"tensor {name:.60} has {axes:,} axes")
        sizes = tuple(self.number("Q") for _ in range(axes))
        return name, sizes, self.number("I"), self.number("Q")
