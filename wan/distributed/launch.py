"""The processes of one run: how they start, connect and end. One process alone is the plain case.

torchrun, or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts the processes. When one
ends badly, the others notice by their closed connections and end, too. Imports torch only for many processes.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan.distributed.process_group import PATIENCE, Broken, Team, origin_of, patience
from wan.utils.errors import InputError, WanError, first_line
from wan.utils.progress import tell

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

CONNECT_LIMIT = timedelta(minutes=10)  # for all processes to start
GLOO_REST = 0.2  # seconds in which gloo's threads let go of their last tensors; without them torch 2.13 aborts at exit
# Told by process 1 alone. Others cannot know which it was: process 0 keeps the store, unless torchrun's agent does.
KEEPER_LOST = "error: process 1 lost process 0, which was killed or crashed if it does not say itself why it ended\n"
LAST_QUESTION = 5.0  # seconds for the store to say who failed first: it may be in a process that hangs


@dataclass(frozen=True)
class Runtime:
    """The world of processes that torchrun started; by default this process alone."""

    team: Team = field(default_factory=Team)
    uses_gpus: bool = False  # of many processes: each has a GPU of its own and NCCL connects them
    store: Store | None = None

    @classmethod
    def start(cls) -> Runtime:
        """Connect to the others, if the environment says that there are any. InputError for an environment that lacks
        something, WanError if the others do not come."""
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        _check_environment(size)
        # torch's C++ warns of each connection that another process has closed; what matters of that is said in one line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        from wan.utils.accelerator import COLLECTIVES, gpu_kind

        rank, limit = _number("RANK", 0), patience()
        try:
            store, _, _ = next(rendezvous("env://", rank, size, timeout=CONNECT_LIMIT))
            # a restarted run may find the same store, with what the first attempt has left in it
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
        """The processes that the caller's own script has connected with torch.distributed, if it has."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(_team(patience()), "nccl" in dist.get_backend_config())

    def stop(self) -> None:
        """Tell all processes that no further job shall begin."""
        if self.store is not None:
            self.store.add("stop", 1)

    def has_stopped(self) -> bool:
        return self.store is not None and self.store.add("stop", 0) > 0

    def finish(self, code: int) -> int:
        """Leave together; the worst exit code of all."""
        code = max(self.team.gather(code))
        if self.team.group is not None:
            import torch.distributed as dist

            time.sleep(GLOO_REST)
            dist.destroy_process_group()
        return code

    def give_up(self, error: BaseException) -> NoReturn:
        """End this process now. The others notice and follow; whoever fails first is the only one to say why."""
        tell(sys.stdout, "")  # flushes it
        first = self._fails_first()
        if first or (first is None and self.team.rank == 1 and _is_connection(_cause(error))):
            words = _last_words(self.team.rank, error) if first else KEEPER_LOST
            tell(sys.stderr, words)
            tell_launcher(words.splitlines()[-1])
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        os._exit(error.code if isinstance(error, Stopped) else code)  # no clean-up: it would wait for the others

    def _fails_first(self) -> bool | None:
        """Whether no other process has failed before; None if the store is gone with the process that kept it."""
        assert self.store is not None, "there are others"
        answers: list[bool | None] = []

        def ask(store: Store) -> None:
            try:
                answers.append(store.add("failed", 1) == 1)
            except RuntimeError:
                answers.append(None)

        asking = threading.Thread(target=ask, args=(self.store,), daemon=True)
        asking.start()
        asking.join(LAST_QUESTION)
        return answers[0] if answers else True  # no answer: better told twice than not at all


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end, as Ctrl-C does; torchrun sends one to the others when one has failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def launch(work: Callable[[Runtime], int]) -> int:
    """Run `work`, which gives an exit code, on every process of the run; the worst code of all.

    Errors that `work` does not turn into a code end the whole run; in a process alone they are simply raised.
    """
    with _signals_interrupt():
        runtime = Runtime.start()
        if runtime.team.group is None:
            return work(runtime)
        try:
            return runtime.finish(work(runtime))
        except BaseException as error:  # noqa: BLE001 - also an interrupt must end the others
            runtime.give_up(error)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does: nothing half is left, and what to do next is told."""

    def stop(number: int, _: Any) -> NoReturn:
        raise Stopped(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # one that is ignored stays so: `nohup` asks for that
    earlier = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A signal that comes inside the block counts at its end: importing torch loses an exception, or aborts by it."""
    held: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    for number in ours:
        signal.signal(number, lambda came, _: held.append(came))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    for number in held[:1]:
        signal.raise_signal(number)


def tell_launcher(sentence: str) -> None:
    """Why this process ends badly, where torchrun looks for it: its own report, which stands last, then says so."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")


def speaks_alone() -> bool:
    """Whether this is the process that speaks for all, before they are connected."""
    return os.environ.get("RANK", "0") == "0"


def _team(limit: timedelta) -> Team:
    import torch.distributed as dist

    return Team(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=limit, backend="gloo"))


def _number(name: str, default: int) -> int:
    """A whole number of the environment. InputError if it is none."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise InputError(f"{name}={given} in the environment: must be a whole number")
    return int(given)


def _check_environment(size: int) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size} in the environment says that there are {size} processes, but not {', '.join(missing)}; "
            "start them with torchrun, or have the launcher set RANK, MASTER_ADDR and MASTER_PORT, too"
        )


def _take_gpu(store: Store, rank: int, size: int) -> bool:
    """Take the GPU that is this process's own. False where there are fewer than processes.

    Launchers other than torchrun may not say how many processes share a machine and which of them this is: those that
    see the same GPUs on the same machine are counted. Where each sees only its own, each counts as the only one,
    whatever number the launcher gave it.
    """
    import torch

    from wan.utils.accelerator import gpu_kind

    place = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    store.set(f"place {rank}", place)
    sharing = [other for other in range(size) if store.get(f"place {other}").decode() == place]
    index, here = 0, 1
    if len(sharing) > 1:
        index = _number("LOCAL_RANK", sharing.index(rank))
        here = _number("LOCAL_WORLD_SIZE", len(sharing))
    gpus = torch.get_device_module(gpu_kind())
    if gpus.device_count() < max(here, index + 1):
        return False
    gpus.set_device(index)
    return True


def _last_words(rank: int, error: BaseException) -> str:
    """Why the run ends: a line, after the traceback if it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "terminated\n" if isinstance(error, Stopped) else "interrupted\n"
    error = _cause(error)
    if _is_connection(error):
        return f"error: process {rank} {_how_lost(error)}\n"
    if isinstance(error, WanError):
        return f"error: {error}\n"
    origin = origin_of(error)
    line = f"error: process {origin.process}: {type(error).__name__}: {first_line(error)}\n"
    return f"{origin.traceback}\n{line}".lstrip()


def _cause(error: BaseException) -> BaseException:
    """Why an exchange failed; any other error is its own."""
    return (error.__cause__ or error) if isinstance(error, Broken) else error


def _how_lost(error: BaseException) -> str:
    """gloo and NCCL report a time limit that has passed in several words, all with "time" in them."""
    reason = re.sub(r"^\[[^]]*\] *", "", first_line(error)).partition(". ")[0]  # without the C++ file, and advice
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        minutes = patience().total_seconds() / 60
        return f"has waited {minutes:g} minutes for another one, which hangs ({reason}; {PATIENCE} sets the minutes)"
    return f"lost another one, which was killed or crashed ({reason})"


def _is_connection(error: BaseException) -> bool:
    """Whether it is the exchange that failed, not what was done for it (no memory left for a buffer).

    PyTorch raises RuntimeError for gloo's failures and DistError for others.
    """
    import torch.distributed as dist

    gloo = isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "Connection closed by peer" in str(error))
    return gloo or isinstance(error, dist.DistError)
