"""Time and error, as the doctor, the tests and the benchmarks measure them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from wan.utils.accelerator import synchronize


def interleaved(
    candidates: Sequence[Callable[[], object]],
    repeats: int = 5,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each candidate; they take turns, so that drift of the machine affects all of them alike."""
    for candidate in candidates:
        for _ in range(warm_up):
            candidate()
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats):
        for candidate, series in zip(candidates, times, strict=True):
            synchronize()
            start = clock()
            candidate()
            synchronize()
            series.append(clock() - start)
    return [statistics.median(series) for series in times]


def rms_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square error over the reference's root mean square."""
    difference = found.double() - reference.double()
    return (difference.square().mean() / reference.double().square().mean()).sqrt().item()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the stage's largest magnitude."""
    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} is compared with {list(expected.shape)}")
    return ((found - expected).abs().max() / expected.abs().max()).item()
