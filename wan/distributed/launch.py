"""How the processes of one run start, connect and end. One process alone is the plain case.

torchrun, or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts them. When one fails, the
others notice by their closed connections and end, too. Imports torch only for many processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan.distributed.mesh import PATIENCE_VARIABLE, Broken, Team, origin_of, patience
from wan.utils.errors import InputError, WanError, first_line
from wan.utils.progress import tell

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


@dataclass(frozen=True)
class Runtime:
    """The processes that torchrun started; by default this one alone. uses_gpus: each of many has a GPU of its own."""

    team: Team = field(default_factory=Team)
    uses_gpus: bool = False
    store: Store | None = None

    @classmethod
    def start(cls) -> Runtime:
        """Connect to the processes that the environment names. InputError: it is incomplete; WanError: none come."""
        if (size := _number("WORLD_SIZE", 1)) == 1:
            return cls()
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            lack = f"the environment has WORLD_SIZE={size}, but not {', '.join(missing)}"
            raise InputError(f"{lack}; start the processes with torchrun")
        # torch's C++ code warns of each closed connection; our own line says what matters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        from wan.utils.accelerator import COLLECTIVES, gpu_kind

        rank, limit = _number("RANK", 0), patience()
        try:
            store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(minutes=10)))
            # a restarted run may find the store of the first attempt
            store = PrefixStore(f"attempt {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            uses_gpus = _take_gpu(store, rank, size)
            backend = f"cpu:gloo,{gpu_kind()}:{COLLECTIVES[gpu_kind()]}" if uses_gpus else "gloo"
            groups = PrefixStore("groups", store)
            dist.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=limit)
        except dist.DistError as e:
            raise WanError(f"process {rank} cannot connect to the other {size - 1}: {first_line(e)}") from e
        return cls(_team(limit), uses_gpus, PrefixStore("run", store))

    @classmethod
    def joined(cls) -> Runtime:
        """The processes that the caller's own script has connected with torch.distributed, if any."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls()
        from wan.utils.accelerator import COLLECTIVES

        return cls(_team(patience()), any(name in dist.get_backend_config() for name in COLLECTIVES.values()))

    def stop(self) -> None:
        """Let no process begin another job."""
        if self.store is not None:
            self.store.add("stop", 1)

    def has_stopped(self) -> bool:
        return self.store is not None and self.store.add("stop", 0) > 0

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process now. The others notice and follow; only the first one to fail says why."""
        tell(sys.stdout, "")  # flushes it
        assert self.store is not None, "there are others"
        error = (error.__cause__ or error) if isinstance(error, Broken) else error
        first = ThreadPoolExecutor(1).submit(self.store.add, "failed", 1)
        try:
            words = _last_words(self.team.rank, error) if first.result(timeout=5) == 1 else ""
        except TimeoutError:  # the store's process hangs: two messages are better than none
            words = _last_words(self.team.rank, error)
        except RuntimeError:  # the store is gone with process 0; that nobody can ask who failed, only one says
            lost = "process 1 lost process 0, which was killed or crashed if it does not say itself why it ended"
            words = f"error: {lost}\n" if self.team.rank == 1 and _is_connection(error) else ""
        if words:
            tell(sys.stderr, words)
            tell_launcher(words.splitlines()[-1])
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        os._exit(error.code if isinstance(error, Stopped) else code)  # no clean-up: it would wait for the others


class Stopped(KeyboardInterrupt):
    """A signal ended the work; torchrun sends one to the others when one process has failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def launch(work: Callable[[Runtime], int]) -> int:
    """Run `work` on every process; return the worst of its exit codes. An exception from it ends all processes.
    SIGTERM and SIGHUP end the work as Ctrl-C does, with its clean-up and its messages."""

    def stop(number: int, _: Any) -> NoReturn:
        raise Stopped(number)

    # `nohup` ignores one: it stays so
    with _handled(stop, ("SIGTERM", "SIGHUP"), lambda earlier: earlier is signal.SIG_DFL):
        runtime = Runtime.start()
        if runtime.team.group is None:
            return work(runtime)
        import torch.distributed as dist

        try:
            code = max(runtime.team.gather(work(runtime)))
            time.sleep(0.2)  # for gloo's threads to release their last tensors: else torch 2.13 aborts at exit
            dist.destroy_process_group()
            return code
        except BaseException as error:  # noqa: BLE001 - also an interrupt must end the others
            runtime.give_up(error)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay signals to the end of the block: `import torch` loses an exception, or aborts because of it."""
    held: list[int] = []
    with _handled(lambda number, _: held.append(number), ("SIGINT", "SIGTERM", "SIGHUP"), callable):
        yield
    for number in held[:1]:
        signal.raise_signal(number)


@contextmanager
def _handled(
    handler: Callable[[int, Any], None], names: Sequence[str], replaces: Callable[[Any], bool]
) -> Iterator[None]:
    """`handler` handles those of the signals whose present handler it `replaces`."""
    main = threading.current_thread() is threading.main_thread()  # no other thread may set one
    numbers = [getattr(signal, name) for name in names if main and hasattr(signal, name)]
    earlier = {number: signal.signal(number, handler) for number in numbers if replaces(signal.getsignal(number))}
    try:
        yield
    finally:
        for number, old in earlier.items():
            signal.signal(number, old)


def tell_launcher(sentence: str) -> None:
    """Write why this process failed for torchrun's report."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the run prints the reason itself; torchrun's report only repeats it
            Path(file).write_text(json.dumps({"message": reason}), encoding="utf-8")


def speaks_alone() -> bool:
    """Whether this process prints for all, before they are connected."""
    return os.environ.get("RANK", "0") == "0"


def _team(limit: timedelta) -> Team:
    import torch.distributed as dist

    return Team(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=limit, backend="gloo"))


def _number(name: str, default: int) -> int:
    """A variable of the environment. InputError if it is no whole number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text} in the environment: must be a whole number")
    return int(text)


def _take_gpu(store: Store, rank: int, size: int) -> bool:
    """Take this process's own GPU. False if there are fewer GPUs than processes.
    Launchers other than torchrun may not give LOCAL_RANK and LOCAL_WORLD_SIZE: then those that see the same GPUs on the
    same machine are counted. One that alone sees its GPU takes number 0, whatever its rank."""
    import torch

    from wan.utils.accelerator import gpu_kind

    place = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    store.set(f"place {rank}", place)
    sharing = [other for other in range(size) if store.get(f"place {other}").decode() == place]
    alone = len(sharing) == 1
    index = 0 if alone else _number("LOCAL_RANK", sharing.index(rank))
    here = 1 if alone else _number("LOCAL_WORLD_SIZE", len(sharing))
    gpus = torch.get_device_module(gpu_kind())
    if gpus.device_count() < max(here, index + 1):
        return False
    gpus.set_device(index)
    return True


def _last_words(rank: int, error: BaseException) -> str:
    """Why the run ends: one line, after the traceback if it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "terminated\n" if isinstance(error, Stopped) else "interrupted\n"
    if _is_connection(error):  # all messages of gloo and NCCL about a time limit hold "time"
        # without the C++ file and the advice
        reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).partition(". ")[0]
        lost = "lost another process, which was killed or crashed"
        if re.search("timed out|timeout", reason, re.IGNORECASE):
            minutes, reason = patience().total_seconds() / 60, f"{reason}; see {PATIENCE_VARIABLE}"
            lost = f"waited {minutes:g} minutes for another process, which hangs"
        return f"error: process {rank} {lost} ({reason})\n"
    if isinstance(error, WanError):
        return f"error: {error}\n"
    process, traceback = origin_of(error)
    return f"{traceback}\nerror: process {process}: {type(error).__name__}: {first_line(error)}\n".lstrip()


def _is_connection(error: BaseException) -> bool:
    """Whether the connection failed, not the work around it (no memory for a buffer)."""
    import torch.distributed as dist

    gloo = isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "Connection closed by peer" in str(error))
    return gloo or isinstance(error, dist.DistError)
