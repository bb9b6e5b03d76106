"""Tensors from disk to device: read, merged, cast and placed, one piece after the other.

A piece is some rows of a tensor. Several are read ahead while one is placed, so the peak is the piece being placed and
a few buffers, however large a tensor is.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning.merge import Merge
from wan.checkpoints.quantised_formats import Quantised, int8_rotations
from wan.checkpoints.safetensors_file import Entry, TensorStore
from wan.configs.precision import keeps_float32
from wan.modules.fused import FP8
from wan.modules.quantised_linear import EIGHT_BITS, QuantisedLinear, rotation_of, round_rows, scale_name
from wan.utils.accelerator import Accelerator
from wan.utils.errors import InputError, JobError, first_line

PIECE_BYTES = 16 << 20  # a power of two: pinned memory is handed out in such sizes
STRIP_BYTES = 2 << 20  # read, checked, merged and cast, one after the other, it stays in a core's cache
READERS = 4
CPU = torch.device("cpu")
Module = TypeVar("Module", bound=nn.Module)


class ReadError(JobError):
    """A weight file cannot be read, or has changed. One of several processes alone may see it."""


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of one source; None for a tensor without rows."""

    source: Source
    name: str
    rows: slice | None

    @property
    def bytes(self) -> int:
        return self.source.store[self.name].rows(self.rows).bytes


class Source:
    """The weights of one network on disk, with the dtype of each parameter and the LoRAs to merge."""

    def __init__(self, store: TensorStore, dtype: Callable[[str], torch.dtype], merge: Merge | None = None) -> None:
        self.store, self.dtype, self.merge = store, dtype, merge
        self._stamps = {file: _stamp(file) for file in store.files}
        self._rotations = int8_rotations(store)
        self._finite: set[tuple[str, int]] = set()  # pieces by first row
        self._scales: dict[tuple[str, int], Tensor] = {}  # of pieces that stay as they are stored

    def pieces(
        self, names: Iterable[str], rows: Callable[[str], slice] = lambda _: slice(None), size: int | None = None
    ) -> Iterator[Piece]:
        """`names` (or `rows` of each) in the order of the file, in nearly equal pieces; scales come with weights."""
        for name in self.store.in_file_order(name for name in names if name in self.store):
            entry = self.store[name]
            if not entry.shape:
                yield Piece(self, name, None)
                continue
            start, stop, _ = rows(name).indices(entry.shape[0])
            total = stop - start
            count = min(total, max(1, math.ceil(entry.rows(slice(start, stop)).bytes / (size or PIECE_BYTES))))
            for i in range(count):  # of nearly equal size: products of few rows may be summed in another order
                yield Piece(self, name, slice(start + total * i // count, start + total * (i + 1) // count))

    def fork(self) -> Source:
        """This source for another thread: its merge has buffers of its own."""
        twin = copy.copy(self)
        if twin.merge:
            twin.merge = copy.copy(twin.merge)
            twin.merge.free_buffers()
        return twin

    def read(self, piece: Piece, buffer: Tensor) -> Tensor:
        """The piece in the file's dtype, in `buffer`. ReadError; InputError if it holds NaN or Inf."""
        entry = self.store[piece.name]
        file, key = entry.file, (piece.name, piece.rows.start if piece.rows else 0)
        try:
            if _stamp(file) != self._stamps[file]:
                raise ReadError(f"{file}: has changed since this run opened it; start again")
            quantised = entry if isinstance(entry, Quantised) and not self._merged(piece) else None
            if quantised and quantised.by_row == self.dtype(piece.name):
                tensor, self._scales[key] = quantised.read_as_stored(piece.name, piece.rows, buffer)
            else:
                tensor = self.store.read(piece.name, piece.rows, buffer)
        except OSError as e:
            raise ReadError(f"{file}: tensor {piece.name} cannot be read ({e.strerror or e})") from e
        if key not in self._finite:
            if not _is_finite(tensor) or (key in self._scales and not _is_finite(self._scales[key])):
                raise InputError(f"{file}: tensor {piece.name} holds NaN or Inf: the file is corrupt")
            self._finite.add(key)
        return tensor

    def _merged(self, piece: Piece) -> bool:
        return self.merge is not None and self.merge.touches(piece.name)

    def place(self, piece: Piece, tensor: Tensor, targets: Mapping[str, Tensor], start: int = 0) -> None:
        """Merge in float32, round once, write into the parameter's target, which holds its rows from `start` on."""
        target, rows = targets[piece.name], slice(None)
        if self.merge is not None and self._merged(piece):
            tensor = self.merge(piece.name, tensor, piece.rows)
        elif target.device.type != "cpu":
            tensor = tensor.to(target.device)  # an accelerator casts faster
        if piece.rows is not None:
            rows = slice(piece.rows.start - start, piece.rows.stop - start)
            target = target[rows]
        if target.dtype not in EIGHT_BITS:
            target.copy_(tensor)
            return
        scale = targets[scale_name(piece.name)][rows, None]
        if tensor.dtype != target.dtype:
            rotation = rotation_of(target.dtype, target.shape[1], self._rotations.get(piece.name))
            round_rows(tensor, rotation, target, scale)
        else:
            target.copy_(tensor)
            scale.copy_(self._scales[piece.name, piece.rows.start if piece.rows else 0])


def read_ahead(pieces: Sequence[Piece], home: torch.device = CPU) -> Generator[tuple[Piece, Tensor]]:
    """Each piece and its tensor, valid until the next one. They are read ahead. home: where the tensors go next."""
    buffers = _buffers(pieces, READERS + 1, pin=Accelerator(home).has_memory)
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        turns = zip(pieces, cycle(buffers), strict=False)

        def begin(count: int) -> Iterator[tuple[Piece, Future[Tensor]]]:
            return ((piece, pool.submit(piece.source.read, piece, buffer)) for piece, buffer in islice(turns, count))

        ahead = deque(begin(READERS))
        while ahead:
            piece, reading = ahead.popleft()
            tensor = reading.result()
            ahead.extend(begin(1))  # into the buffer that the caller has just finished with
            yield piece, tensor


def _buffers(pieces: Iterable[Piece], count: int, *, pin: bool = False) -> list[Tensor]:
    largest = max((piece.bytes for piece in pieces), default=0)
    return [allocate(largest, pin=pin) for _ in range(count)]


def allocate(count: int, device: torch.device = CPU, pin: bool = False) -> Tensor:
    """uint8 [count] on the device. JobError if host memory is full."""
    try:
        return torch.empty(count, dtype=torch.uint8, device=device, pin_memory=pin)
    except torch.OutOfMemoryError:
        raise  # the device is full: the caller knows what to do
    except RuntimeError as e:
        raise JobError(f"host memory is full: {count / 1e6:.0f} MB of weights do not fit ({first_line(e)})") from e


def load(module: Module, source: Source, home: torch.device, report: Callable[[int], None] = lambda _: None) -> Module:
    """A copy of a meta-built module with its weights on `home`. report: gets the bytes read. Errors: `Source.read`."""
    module = copy.deepcopy(module)
    fill(module, source, [name for name, _ in module.named_parameters()], home, report)
    return module.eval().requires_grad_(False)


def fill(
    module: nn.Module, source: Source, names: list[str], home: torch.device, report: Callable[[int], None]
) -> None:
    """Load the parameters `names` of `module` to `home`."""
    pieces = list(source.pieces(names))
    targets = {
        name: torch.empty(module.get_parameter(name).shape, dtype=source.dtype(name), device=home) for name in names
    }
    if home.type == "cpu":
        _place_by_threads(source, pieces, targets, report)
    else:  # one thread does the copies to a device
        for piece, tensor in read_ahead(pieces, home):
            report(piece.bytes)
            source.place(piece, tensor, targets)
    for name, target in targets.items():
        set_parameter(module.get_submodule(name.rpartition(".")[0]), name, target)


def _place_by_threads(
    source: Source, pieces: list[Piece], targets: Mapping[str, Tensor], report: Callable[[int], None]
) -> None:
    free = [(source.fork(), buffer) for buffer in _buffers(pieces, READERS)]  # one for each thread

    def bring(piece: Piece) -> int:
        own, buffer = free.pop()
        try:
            plain = type(own.store[piece.name]) is Entry  # other reads take memory, each anew
            rows, size = piece.rows or slice(None), STRIP_BYTES if plain else PIECE_BYTES
            for strip in own.pieces([piece.name], lambda _: rows, size):
                own.place(strip, own.read(strip, buffer), targets)
        finally:
            free.append((own, buffer))
        return piece.bytes

    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        for count in pool.map(bring, pieces):
            report(count)


def set_parameter(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """name: in the whole network."""
    setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))


def parameter_dtypes(
    dtype: torch.dtype, convert_all: bool, module: nn.Module | None = None
) -> Callable[[str], torch.dtype]:
    """The dtype of each parameter of the transformer: `dtype`, but float32 where the original keeps float32.
    convert_all (`--convert_model_dtype`): `dtype` for each. module: its quantised layers keep their own dtypes."""
    layers = [] if module is None else module.named_modules()
    in_8_bits = {name: layer for name, layer in layers if isinstance(layer, QuantisedLinear)}
    kept = {f"{name}.{leaf}": own for name, layer in in_8_bits.items() for leaf, own in layer.dtypes}
    return lambda name: kept.get(name) or (torch.float32 if not convert_all and keeps_float32(name) else dtype)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == FP8:
        return not (tensor.view(torch.uint8) & 0x7F == 0x7F).any()  # NaN, beside the sign; e4m3 has no infinities
    # the sum of finite numbers may overflow: then look at each. bf16, summed as float32, would be copied first
    wide = torch.float32 if tensor.dtype == torch.float16 else None
    return math.isfinite(tensor.sum(dtype=wide)) or bool(torch.isfinite(tensor).all())


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
