"""Where a network's weights are when it computes: one seam, as for the split of tokens. The plain case does nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class Residency:
    """The plain case: all weights are on the device, always.

    A unit is a group of weights that is used together, numbered in the order in which a forward uses them; a network's
    `unit_of` tells a parameter's.
    together: of several passes over one latent, a unit does all before the next begins, so that it is brought once.
    """

    together = False

    def use(self, unit: int) -> AbstractContextManager[None]:
        """The weights of `unit` are on the device inside this."""
        return nullcontext()
