"""Where a network's weights are when it computes: one seam, as for the split of tokens. The plain case does nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


class Residency:
    """The plain case: all weights are on the device, always.

    A unit is a group of weights that is used together, numbered in the order in which a forward uses them; a network's
    `unit_of` tells a parameter's.
    batch_guidance: each unit runs all passes over one latent before the next unit begins, so it is brought once.
    """

    batch_guidance = False

    def use(self, unit: int) -> AbstractContextManager[None]:
        """The weights of `unit` are on the device inside this."""
        return nullcontext()


class TokenSplit:
    """How the tokens are divided over ranks. The plain case: one rank has them all."""

    def span(self, total: int) -> tuple[int, int]:
        """First token and end of this rank's share of `total` tokens; the end may lie beyond: padding."""
        return 0, total

    def shard(self, x: Tensor) -> Tensor:
        """[total, ...] on every rank -> this rank's share."""
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """Inverse of `shard`, padding dropped, on every rank."""
        return x
