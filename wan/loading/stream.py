"""Tensors on their way from disk into a module: read, merged, cast, placed, one after the other.

Modules are built on the meta device. Each tensor is read, merged, cast and placed before the next one is kept, so the
peak is the finished module and two tensors in flight (one is read ahead while the other is worked on).
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning.errors import TensorFileError
from lightning.merge import Merge
from lightning.names import keeps_float32
from wan.utils.errors import InputError

REOPEN_BYTES = 1 << 26
Module = TypeVar("Module", bound=nn.Module)


class Store(Protocol):
    """Named tensors on disk: shapes for free, data one tensor at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def file(self, name: str) -> Path: ...
    def in_file_order(self, names: Iterable[str]) -> list[str]: ...
    def buffer_bytes(self, name: str, rows: slice | None = None) -> int: ...
    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor: ...


class PickleStore:
    """The tensors of a `.pth` file. Only plain tensors are accepted (`weights_only`): nothing in it is ever run."""

    def __init__(self, path: Path) -> None:
        """TensorFileError if the file is damaged, or holds anything but a flat dictionary of tensors."""
        self.path = path
        self._state, self._served = self._open(), 0
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in self._state.items()}
        self.dtypes: Mapping[str, str] = {n: str(t.dtype).removeprefix("torch.") for n, t in self._state.items()}

    def _open(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            raise TensorFileError(f"{self.path}: holds more than plain tensors, or is damaged; not opened") from e
        except (RuntimeError, OSError, EOFError, ValueError) as e:
            raise TensorFileError(f"{self.path}: truncated or damaged, or not a zipped .pth file") from e
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise TensorFileError(f"{self.path}: not a flat dictionary of tensors")
        return state

    def file(self, name: str) -> Path:
        return self.path

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=list(self.shapes).index)

    def buffer_bytes(self, name: str, rows: slice | None = None) -> int:
        return 0  # views of the map need none

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """A view of the mapped file. The map is made anew every 64 MiB: its pages count as resident until then."""
        if self._served > REOPEN_BYTES:
            self._state, self._served = self._open(), 0
        tensor = self._state[name]
        self._served += tensor.nbytes
        return tensor if rows is None else tensor[rows]


def load(
    module: Module,
    store: Store,
    *,
    home: torch.device,
    dtype: Callable[[str], torch.dtype],
    merge: Merge | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Module:
    """Give a meta-built module its weights on `home`: read, merge, cast, place, one tensor after the other.

    `dtype` tells a parameter's dtype by name; `report` gets the bytes read. InputError as from `read_ahead`.
    """
    names = [name for name, _ in module.named_parameters()]
    state = {}
    for name, tensor in read_ahead(store, names, pin=home.type == "cuda"):
        report(tensor.nbytes)
        state[name] = finished(name, tensor, home, dtype(name), merge)
        del tensor
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def finished(
    name: str, tensor: Tensor, home: torch.device, dtype: torch.dtype, merge: Merge | None, rows: slice | None = None
) -> Tensor:
    """One tensor (or `rows` of it) as the module keeps it: merged in float32, cast once; never a view."""
    if merge is not None and merge.touches(name):
        tensor = merge(name, tensor, rows)
    caster = home if tensor.device.type == "cpu" else tensor.device  # an accelerator casts faster, wherever it goes
    return tensor.to(caster).to(dtype, copy=True).to(home)


def read_ahead(
    store: Store, names: Iterable[str], rows: Callable[[str], slice | None] = lambda _: None, pin: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor or its `rows`) in the order of the file, the next one being read while the caller works on this.

    A tensor is valid until the next is asked for: two buffers are used in turn. InputError for one with NaN or Inf.
    """
    order = store.in_file_order(names)
    largest = max((store.buffer_bytes(name, rows(name)) for name in order), default=0)
    buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        reads = (pool.submit(_read_finite, store, n, rows(n), buffers[i % 2]) for i, n in enumerate(order))
        pending = next(reads, None)
        for name in order:
            assert pending is not None
            tensor = pending.result()
            pending = next(reads, None)  # into the buffer that the caller has just done with
            yield name, tensor


def _read_finite(store: Store, name: str, rows: slice | None, buffer: Tensor) -> Tensor:
    """The tensor, or InputError if it holds NaN or Inf."""
    tensor = store.read(name, rows, buffer)
    # the sum of finite numbers may overflow: then look at each
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise InputError(f"{store.file(name)}: tensor {name} holds NaN or Inf: the file is corrupt")
    return tensor


def parameter_dtypes(dtype: torch.dtype, convert_all: bool) -> Callable[[str], torch.dtype]:
    """The transformer's precision: `dtype`, but float32 for the parameters that the original keeps in float32.

    convert_all (`--convert_model_dtype`): `dtype` for every parameter.
    """
    return lambda name: torch.float32 if not convert_all and keeps_float32(name) else dtype


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Configurations hold dtypes or their names."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def free_memory() -> None:
    """Hand freed memory back, after something large was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
