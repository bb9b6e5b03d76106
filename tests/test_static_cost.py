"""Deterministic cost of the full-size transformer at 1280x720x81, counted without data: it must not creep up."""

import torch

from benchmarks.counters import CostCounter
from benchmarks.transformer import static_block, static_forward


def test_the_counter_counts_by_hand() -> None:
    with torch.device("meta"):
        a, b = torch.empty(100), torch.empty(100)
        with CostCounter() as counter:
            c = a + b  # reads 800, writes 400
            d = c.view(10, 10)  # a view: free
            torch.add(a, b, out=c)  # reads 800, writes 400
            c.add_(a)  # reads 800, writes 400
            del d, c
            e = a * 2  # reads 400, writes 400
    assert counter.traffic == 1200 * 3 + 800
    assert counter.calls == 4
    assert counter.peak == 400
    assert e.numel() == 100


def test_traffic_of_one_block() -> None:
    """The original moves 230.9 GB; the bound is the project's own goal of 80."""
    assert static_block().traffic < 80e9


def test_peak_of_a_forward() -> None:
    """The original holds 36.6 GB of activations; the bound is the project's own goal of 9."""
    assert static_forward().peak < 9e9
