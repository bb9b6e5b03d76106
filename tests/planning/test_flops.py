"""Deterministic cost of the full-size transformer at 1280x720x81, counted without data: it must not creep up."""

import pytest
import torch
from torch import Tensor

from benchmarks.counters import CostCounter
from benchmarks.transformer import static_block, static_forward
from wan.modules.fused import SAVED


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


def test_a_view_of_a_weight_is_not_alive() -> None:
    with torch.device("meta"):
        weight, x = torch.empty(20, 10), torch.empty(5, 10)
        with CostCounter() as counter:
            x @ weight.t()
    assert counter.peak == 5 * 20 * 4


def test_a_fused_function_reads_and_writes_once() -> None:
    def function(x: Tensor, y: Tensor, out: Tensor) -> None:
        x.add_(y)  # x and y read, x written
        out.copy_(torch.sin(x * y))  # out written

    with torch.device("meta"):
        x, y, out = (torch.empty(100) for _ in range(3))
        with CostCounter() as counter:
            counter.fused(function)(x, y, out)
    assert counter.traffic == 400 * (2 + 2)
    assert (counter.calls, counter.peak) == (1, 0)


def test_small_intermediates_stay_in_the_cache() -> None:
    with torch.device("meta"):
        a = torch.empty(100)
        with CostCounter(cache=1000) as counter:
            b = a * 2  # reads 400, writes 400 that are gone before 1000 bytes have passed
            c = b * 2  # reads nothing, writes 400
            del b
            d = a * 2  # 800; now c has left
            e = c * d  # reads c, writes 400
    assert counter.traffic == 400 + 400 + 800 + 800
    assert e.numel() == 100


def test_traffic_of_one_block() -> None:
    """The original moves 230.9 GB; the project's own best level is 45, its passes fused."""
    assert static_block().traffic < 45e9


def test_traffic_of_one_block_without_a_compiler() -> None:
    """And what compiling saves is what the choice to compile reckons with."""
    plain, fused = static_block(fused=False).traffic, static_block().traffic
    assert plain < 75e9
    assert (plain - fused) / (75_600 * 5120) == pytest.approx(SAVED, rel=0.02)


def test_peak_of_a_forward() -> None:
    """The original holds 36.6 GB of activations. Six times 0.774 GB is the least while values are made or attended:
    the float32 residual stream, queries, keys, values, and what they come from or go to."""
    assert static_forward().peak < 4.7e9
