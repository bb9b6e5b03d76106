"""Deterministic costs: what a piece of model code reads, writes and keeps alive, counted on meta tensors.

No data, no kernel, no clock: full-size networks are counted on any machine, and the numbers repeat exactly.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

OVERWRITES = ("copy_", "zero_", "fill_")


class CostCounter(TorchDispatchMode):
    """Counts, for every operation that is not a view: bytes read (each input once) and written (each output once).

    traffic: bytes read + written; calls: operations; live, peak: bytes of tensors made inside and still referenced, now
    and at most. Weights and other tensors made before are not part of `live`.
    cache: bytes of the device's cache. A tensor made inside stays there until that many bytes, its own included, have
    passed: read by then it costs nothing, and gone by then it was never written to memory.
    """

    def __init__(self, cache: int = 0) -> None:
        super().__init__()
        self.traffic = self.calls = self.live = self.peak = 0
        self.by_operation: Counter[str] = Counter()
        self.cache = cache
        self._passed = 0  # bytes that have come from memory or gone to it
        self._made: dict[int, int] = {}  # storages made inside: bytes passed before
        self._kernel: Kernel | None = None

    def fused(self, function: Callable[..., None]) -> Callable[..., None]:
        """`function` as one operation, which reads and writes once what it is given and keeps the rest in registers."""

        def run(*arguments: Any) -> None:
            self._kernel = kernel = Kernel(_tensors(arguments))
            function(*arguments)
            self._kernel = None
            self._charge(f"fused {function.__name__}", kernel.traffic)

        return run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = list(_tensors((args, kwargs))), list(_tensors(out))
        inputs = {_storage(t) for t in read}
        aliases = all(_storage(t) in inputs for t in written)
        mutates = func._schema.is_mutable
        if "empty" not in func.__name__ and not (aliases and not mutates):
            if "out" in (kwargs or {}) or func.__name__.startswith(OVERWRITES):
                destinations = {_storage(t) for t in written}  # among the inputs, but not read
                read = [t for t in read if _storage(t) not in destinations]
            if self._kernel:
                self._kernel.add(read, written)
            else:
                from_memory = sum(t.nbytes for t in read if not self._in_cache(_storage(t)))
                self._charge(str(func), from_memory + sum(t.nbytes for t in written))
        for tensor in written:
            if not self._kernel and _storage(tensor) not in inputs:  # a view of a weight is not a tensor made inside
                self._track(tensor)
        return out

    def _charge(self, name: str, amount: int) -> None:
        self.traffic += amount
        self._passed += amount
        self.calls += 1
        self.by_operation[name] += amount

    def _in_cache(self, storage: int) -> bool:
        return self._passed - self._made.get(storage, -self.cache) < self.cache

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _storage(tensor)
        if key in self._made or storage.nbytes() == 0:
            return
        self._made[key] = self._passed - storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        if self._in_cache(key):
            self.traffic -= size
            self.by_operation["never left the cache"] -= size
        del self._made[key]
        self.live -= size


class Kernel:
    """Operations that run as one: it reads and writes each tensor that it was given once at most, and no others."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._size = {_storage(t): t.nbytes for t in given}
        self._read: set[int] = set()
        self._written: set[int] = set()

    @property
    def traffic(self) -> int:
        return sum(self._size.get(storage, 0) for storage in (*self._read, *self._written))

    def add(self, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        self._read |= {_storage(t) for t in read} - self._written
        self._written |= {_storage(t) for t in written}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@library.custom_op("benchmarks::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A fused attention kernel, as the counter sees one: reads q, k, v, writes the output. [L, N, d] each."""
    raise NotImplementedError("for counting on meta tensors only")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001 - the signature of the operation
    return torch.empty_like(q)


__all__ = ["CostCounter", "FlopCounterMode", "attention"]
