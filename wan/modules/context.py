"""An encoded prompt, with what a network has made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

Made = TypeVar("Made")


class Prompt:
    """One encoded prompt, and what each layer has made of it so far: both depend on nothing else.

    rows: [n, text_dim] encoder output, n at most the model's `text_len`. negative: the prompt that attention leads
    away from at scale `nag` (see `guide`), in the same pass.
    """

    def __init__(self, rows: Tensor, negative: Prompt | None = None, nag: float = 1.0) -> None:
        self.rows, self.negative, self.nag = rows, negative, nag
        self._made: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

    @property
    def attended(self) -> list[Prompt]:
        """This prompt, then its negative one."""
        return [self] if self.negative is None else [self, self.negative]

    def padded(self, length: int) -> Tensor:
        return F.pad(self.rows, (0, 0, 0, length - self.rows.shape[0]))

    def once(self, layer: nn.Module, make: Callable[[], Made]) -> Made:
        """`make()` for this layer, or what it gave the first time. Forgotten when the layer is."""
        if layer not in self._made:
            self._made[layer] = make()
        return self._made[layer]  # type: ignore[return-value]  # each layer stores one kind of thing

    def forget(self) -> None:
        """Drop what layers made, after their weights have changed."""
        self._made.clear()
