"""The processes of one run: how they start, agree, fail together and end. Alone is the plain case of the same calls.

torchrun starts the processes and ends all of them when one ends badly. Two kinds of waiting are kept apart: collectives
of the computation give up after `COLLECTIVE_LIMIT`; a `Team` waits as long as the others work (prompt extension, a slow
disk), and ends at once if one of them dies, because its connection closes. Imports torch only when it is needed.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from wan.utils.errors import InputError, JobError, WanError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

Result = TypeVar("Result")
COLLECTIVE_LIMIT = timedelta(minutes=10)
PATIENCE = timedelta(days=7)
GLOO_REST = 0.2  # seconds for gloo's threads to let go of their last tensors (torch 2.13 aborts otherwise)


@dataclass(frozen=True)
class Team:
    """Processes that tell each other things; `first` is the one that speaks and writes for all."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """Everyone's value, by rank, for everyone."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], Result]) -> Result:
        """`make()` of the first rank, for everyone; what it raises as expected (or to exit) is raised everywhere."""
        return self._outcome(make if self.first else None, (WanError, SystemExit))

    def agree(self, work: Callable[[], Result]) -> Result:
        """`work()` on every rank; if it fails anywhere, the error of the first rank that failed is raised on all.

        For work that ends everywhere: what communicates within it must have completed its part when it raises.
        """
        return self._outcome(work, (Exception,))

    def _outcome(self, work: Callable[[], Result] | None, caught: tuple[type[BaseException], ...]) -> Result:
        """`work()`, or of a rank that has none the first rank's result; or the first error that any rank `caught`."""
        result, error = None, None
        if work is not None:
            if self.group is None:
                return work()
            try:
                result = work()
            except caught as e:
                error = e
        told = (result if work else None, error and portable(error)) if error or self.first else (None, None)
        outcomes = self.gather(told)
        for rank, (_, foreign) in enumerate(outcomes):
            if foreign is not None:
                raise error if error and rank == self.rank else foreign
        return result if work is not None else outcomes[0][0]  # type: ignore[return-value]  # of the first: a Result
