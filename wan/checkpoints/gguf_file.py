"""The tensors of a GGUF file as a TensorStore; quantised ones are float32, computed as they are read, by rows.

The package `gguf` knows what a block of numbers means. The header is read here, within bounds: the package's reader
makes an array of each of the 256,000 words of a text encoder's vocabulary, which takes seconds, and follows whatever
length a file names. The format (ggml-org/ggml, docs/gguf.md), little-endian: magic, version, counts; key, kind and
value of each setting; name, axes from the innermost, type and offset of each tensor; then the data, aligned.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from wan.checkpoints.outside import misread, reading, size_of
from wan.checkpoints.safetensors_file import DTYPES, MAX_HEADER_BYTES, Entry, TensorStore
from wan.utils.errors import TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# a setting's kind -> struct's letter
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MOST_AXES = 8  # ggml itself has 4, ComfyUI's converter writes 5
SHAPE_KEY = "comfy.gguf.orig_shape."  # of a tensor whose rows the converter made fit the blocks
ALIGNMENT_KEY = "general.alignment"
TABLES = ("modulation", "scale_shift_table")  # [1, n, width], of which ggml's own tools drop the first axis
VALUES_AT_ONCE = 1 << 18  # dequantised: they and their source stay in a core's cache


@dataclass(frozen=True)
class _Listed:
    """As in the header: axes from the innermost, the number of the type, offset from the start of the data."""

    name: str
    axes: tuple[int, ...]
    type: int
    offset: int


class GgufStore(TensorStore):
    """The tensors of a GGUF file. Quantised ones are float32 by their entries; `stored_as` gives the file's types."""

    def __init__(self, path: Path) -> None:
        """TensorFileError for a damaged file, for types that are not dequantised, and where the package is missing."""
        self.path = path
        tensors, settings, start = _read_header(path)
        try:
            import gguf
        except ImportError as e:
            raise TensorFileError(f"{path}: GGUF files need the package gguf: pip install gguf ({e})") from None
        entries: dict[str, Entry] = {}
        blocks: dict[str, Entry] = {}
        self._types: dict[str, tuple[str, int]] = {}  # of quantised tensors: (type, numbers in a block)
        for tensor in tensors:
            name, offset = tensor.name, start + tensor.offset
            try:
                kind = gguf.GGMLQuantizationType(tensor.type)
                stored, (values, width) = kind.name, gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                unknown = f"of the type {tensor.type}, which the installed package gguf does not know"
                raise TensorFileError(f"{path}: tensor {name} is {unknown}") from None
            if (row := (tensor.axes or (1,))[0]) % values:
                raise TensorFileError(f"{path}: tensor {name} has rows of {row:,} values, {stored} blocks of {values}")
            if name in entries:
                raise TensorFileError(f"{path}: the header names tensor {name} twice")
            shape = _shape(path, tensor, settings.get(SHAPE_KEY + name))
            entries[name] = Entry(path, stored if stored in DTYPES else "F32", shape, offset)
            blocks[name] = Entry(path, "U8", (math.prod(tensor.axes) // values, width), offset)
            if stored not in DTYPES:
                self._types[name] = stored, values
        super().__init__(entries, {key: value for key, value in settings.items() if isinstance(value, str)})
        self._blocks = TensorStore(blocks)
        self._check(gguf)

    def stored_as(self, name: str) -> str:
        return self._types[name][0] if name in self._types else super().stored_as(name)

    def stored_bytes(self, name: str) -> int:
        return self._blocks[name].bytes

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """As TensorStore.read; quantised tensors as `gguf.quants.dequantize` computes them, float32."""
        if name not in self._types:
            return super().read(name, rows, buffer)
        import numpy as np
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        shape, (stored, values) = self[name].shape, self._types[name]
        first, last, _ = (rows or slice(None)).indices(shape[0])
        last = max(first, last)
        start, stop = (row * math.prod(shape[1:]) for row in (first, last))
        begin = start // values  # rows need not begin where blocks do, if a converter reshaped the tensor
        data = self._blocks.read(name, slice(begin, math.ceil(stop / values))).numpy()
        count = stop - start
        memory = torch.empty(4 * count, dtype=torch.uint8) if buffer is None else buffer[: 4 * count]
        numbers = memory.view(torch.float32)
        at_once = max(1, VALUES_AT_ONCE // values)
        for block in range(0, len(data), at_once):
            with np.errstate(all="ignore"):  # a damaged scale gives NaN or Inf, which loading looks for
                some = dequantize(data[block : block + at_once].reshape(1, -1), GGMLQuantizationType[stored])[0]
            position = (begin + block) * values - start
            piece = torch.from_numpy(some[max(0, -position) : count - position])
            numbers[max(0, position) :][: piece.numel()] = piece
        return numbers.view(last - first, *shape[1:])

    def _check(self, gguf: ModuleType) -> None:
        """TensorFileError if two tensors share bytes, one ends after the file, or the package cannot dequantise one."""
        import numpy as np

        end, size = 0, size_of(self.path)
        for name in self._blocks.in_file_order(self._blocks):
            entry = self._blocks[name]
            if entry.offset < end:
                raise TensorFileError(f"{self.path}: tensor {name} starts inside the one before it")
            end = entry.offset + entry.bytes
            if end > size:
                sizes = f"{end:,} bytes at least, {size:,} found"
                raise TensorFileError(f"{self.path}: truncated, {sizes}; tensor {name} is cut off")
        for stored in sorted({stored for stored, _ in self._types.values()}):
            kind = gguf.GGMLQuantizationType[stored]
            try:
                gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                names = [name for name, (each, _) in self._types.items() if each == stored]
                raise TensorFileError(
                    f"{self.path}: {len(names)} tensors are stored as {stored} (first: {names[0]}), which the package "
                    "gguf cannot dequantise; get a file of another quantisation, such as Q8_0, Q6_K or Q4_K_M"
                ) from None


def _shape(path: Path, tensor: _Listed, original: Any) -> tuple[int, ...]:
    """The tensor's shape in its model. original: the one in the file's settings, if they have one."""
    shape = tuple(reversed(tensor.axes))
    if original is None:
        return (1, *shape) if tensor.name.endswith(TABLES) and len(shape) == 2 else shape
    whole = isinstance(original, tuple) and all(type(size) is int and size > 0 for size in original)
    if not whole or not original or math.prod(original) != math.prod(shape):
        raise TensorFileError(f"{path}: {SHAPE_KEY}{tensor.name} is not a shape of {math.prod(shape):,} values")
    return tuple(original)


def _read_header(path: Path) -> tuple[list[_Listed], dict[str, Any], int]:
    """(tensors, settings, start of the data). Of arrays only short ones of numbers are kept, as tuples."""
    size = size_of(path)
    with reading(path, "the GGUF header is cut off or corrupt"), path.open("rb") as file:
        header = _Header(file, min(size, MAX_HEADER_BYTES))
        if header.take(4) != MAGIC:
            raise misread(path, "not a GGUF file")
        if (version := header.number("I")) not in VERSIONS:
            raise TensorFileError(f"{path}: a GGUF file of version {version:#x}, not of 2 or 3 (little-endian)")
        tensor_count, setting_count = header.number("Q"), header.number("Q")
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = header.text()
            if key in settings:
                raise ValueError(f"it has the key {key!r:.60} twice")
            settings[key] = header.value(header.number("I"))
        tensors = [header.tensor() for _ in range(tensor_count)]
        end = file.tell()
    alignment = settings.get(ALIGNMENT_KEY, 32)
    if type(alignment) is not int or alignment < 1:
        raise TensorFileError(f"{path}: {ALIGNMENT_KEY} must be a whole number above 0, not {alignment!r:.40}")
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

    def tensor(self) -> _Listed:
        name = self.text()
        if not name.isprintable() or not name:
            raise ValueError(f"a tensor is named {name!r:.60}")
        axes = self.number("I")
        if axes > MOST_AXES:
            raise ValueError(f"tensor {name:.60} has {axes:,} axes")
        sizes = tuple(self.number("Q") for _ in range(axes))
        return _Listed(name, sizes, self.number("I"), self.number("Q"))
