"""Several ranks inside a test, without ports and without torchrun: forked children that meet through a file."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # FSDP imports it when first called: once here is less than once in every rank
import torch.distributed as dist
import torch.multiprocessing as mp

import wan.distributed.fsdp  # noqa: F401 - imported once here, not in every rank
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Layout, Mesh, Team, make_mesh

# seconds: what is not done by then hangs, also on a busy machine; and far less than the hour of the program's patience
LIMIT = 300.0

sharded = pytest.mark.skipif(torch.__version__ < "2.7", reason="sharded weights on a CPU need PyTorch 2.7")


def run_ranks(work: Callable[..., Any], world: int, *arguments: Any, seconds: float = LIMIT) -> list[Any]:
    """`work(runtime, *arguments)` on `world` ranks; what each returned. AssertionError with their tracebacks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = (work, world, folder, arguments, seconds)
        context = mp.start_processes(_rank, args=started, nprocs=world, join=False, start_method="fork")
        failure, end = "", time.monotonic() + seconds
        try:
            while not context.join(timeout=0.05):
                if time.monotonic() > end:
                    failure = f"not done after {seconds} s"
                    break
        except mp.ProcessExitedException as e:
            failure = str(e)
        for process in context.processes:
            process.kill()
            process.join()
        if failure:
            raise AssertionError("\n".join([failure, *(file.read_text() for file in sorted(folder.glob("*.error")))]))
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[..., Any], world: int, folder: Path, arguments: Any, seconds: float) -> None:
    _be_a_rank()
    code = 0
    try:
        meet, limit = (folder / "store").as_uri(), timedelta(seconds=seconds)
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=limit)
        runtime = Runtime(Team(rank, world, dist.group.WORLD))
        torch.save(work(runtime, *arguments), folder / f"{rank}.result")
        dist.barrier()
    except BaseException:  # noqa: BLE001 - whatever it was, the test shows it
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    os._exit(code)  # not through the interpreter's end, where gloo's threads may abort


def launched(
    work: Callable[[], int], world: int, folder: Path, seconds: float = LIMIT, until_others_end: bool = False
) -> tuple[list[int | None], list[str]]:
    """Exit code and stderr of `work` in processes with torchrun's environment; a code of None: it had to be stopped.

    until_others_end: once only one process is left, it is not waited for any longer than 5 seconds, or not at all if it
    is stopped: torchrun ends it.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(work, r, world, port, folder)) for r in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and (alive := [process for process in processes if process.is_alive()]):
        if until_others_end and len(alive) == 1:
            end = min(end, time.monotonic() + (0 if _is_stopped(alive[0].pid) else 5))
            until_others_end = False
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, [(folder / f"{rank}.err").read_text() for rank in range(world)]


def _is_stopped(pid: int) -> bool:
    with suppress(ChildProcessError):  # it has ended since
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _process(work: Callable[[], int], rank: int, world: int, port: int, folder: Path) -> None:
    _be_a_rank()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    sys.stdout, sys.stderr = ((folder / f"{rank}.{kind}").open("w") for kind in ("out", "err"))
    code = work()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _be_a_rank() -> None:
    torch.set_num_threads(1)  # first of all: a forked child of a parent that has used OpenMP hangs otherwise
    torch.cuda.device_count = lambda: 0  # ranks compute on the CPU: where the parent has used a GPU, they could not


def mesh_of(runtime: Runtime, ulysses: int = 1, ring: int = 1) -> Mesh:
    return make_mesh(Layout(runtime.team.size, ulysses, ring), "cpu", runtime.team.rank)
