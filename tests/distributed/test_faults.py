"""The table of fault runs: whatever happens to a process, whole videos or none, and `--resume` goes on."""

import signal
from pathlib import Path

import pytest

from tests.distributed.faults import VIDEOS, Fault, faults, try_out
from tests.distributed.ranks import sharded

FAULTS = faults(seed=0)
ENDS = {"kill": -signal.SIGKILL, "freeze": None, "interrupt": 130, "raise": 1, "memory": 1}


@sharded
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.what}-{f.where}-{len(f.processes)}" for f in FAULTS])
def test_fault(fault: Fault, tmp_path: Path) -> None:
    hurt, resumed = try_out(fault, tmp_path)
    recovers = fault.what == "memory" and fault.where in ("decode", "write")  # once more, in tiles
    ended = 0 if recovers else ENDS[fault.what]
    assert hurt.codes == [ended if rank in fault.processes else 0 if recovers else 1 for rank in range(2)], hurt
    finishes = fault.what in ("raise", "memory") and fault.where != "load"
    assert hurt.whole == (0 if fault.where == "load" else VIDEOS if recovers else VIDEOS - 1 if finishes else 1), hurt
    stopped = 0 in fault.processes and fault.what in ("kill", "freeze")  # nobody was left to tidy
    unfinished = {"load": (), "write": (".part", ".lock")}.get(fault.where, (".lock",)) if stopped else ()
    allowed = (".latents.safetensors", *unfinished)
    assert all(name.endswith(allowed) for name in hurt.left), hurt
    tracebacks = hurt.printed.count("Traceback (most recent call last):")
    assert tracebacks == (fault.what == "raise"), hurt.printed
    assert (resumed.codes, resumed.whole, resumed.left) == ([0, 0], VIDEOS, [])
