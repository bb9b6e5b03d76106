"""Starting, agreeing, failing and ending together: `launch` in processes with torchrun's environment."""

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import generate
from tests.distributed.ranks import launched, run_ranks
from wan.distributed.launch import Runtime, _take_gpu, interrupts_held, launch
from wan.distributed.mesh import Team, patience
from wan.utils.errors import InputError, JobError

Work = Callable[[Runtime], int]


def sum_over_ranks(runtime: Runtime) -> float:
    x = torch.ones(3)
    dist.all_reduce(x)
    return x.sum().item() / runtime.team.size


def agree_on_things(runtime: Runtime) -> int:
    team = runtime.team
    assert sum_over_ranks(runtime) == 3
    assert team.gather(team.rank * 2) == [0, 2, 4]
    assert team.broadcast(lambda: {"seed": 7, "rank": team.rank}) == {"seed": 7, "rank": 0}
    assert team.all_or_none(lambda: team.rank) == team.rank
    return team.rank  # 2 is the worst


def test_a_signal_inside_an_import_counts_at_its_end() -> None:
    passed, earlier = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012 - what is raised is raised by the end
            signal.raise_signal(signal.SIGINT)
            passed.append(True)
        assert passed
        with interrupts_held():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_the_worst_exit_code_is_everybodys(tmp_path: Path) -> None:
    codes, said = launched(partial(launch, agree_on_things), 3, tmp_path)
    assert codes == [2, 2, 2]
    assert said == ["", "", ""]


def raise_on_one(runtime: Runtime) -> int:
    if runtime.team.rank == 1:
        raise ValueError("a bug")
    sum_over_ranks(runtime)
    return 0


def killed_in_a_collective(runtime: Runtime) -> int:
    sum_over_ranks(runtime)
    if runtime.team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_over_ranks(runtime)
    return 0


def killed_while_others_wait_patiently(runtime: Runtime) -> int:
    if runtime.team.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    runtime.team.gather(None)
    return 0


def first_is_killed(runtime: Runtime) -> int:
    """With it goes the store through which processes learn who failed first, and which they need to meet at all."""
    sum_over_ranks(runtime)
    if runtime.team.is_rank0:
        os.kill(os.getpid(), signal.SIGKILL)
    sum_over_ranks(runtime)
    return 0


def job_error_on_one(runtime: Runtime) -> int:
    if runtime.team.rank == 1:
        raise JobError("no space left on the disk")
    return runtime.team.gather(0)[0]


@pytest.mark.parametrize(
    ("work", "killed", "words"),
    [
        (raise_on_one, None, "in process 1:\nTraceback"),
        (job_error_on_one, None, "error: no space left on the disk\n"),
        (killed_in_a_collective, 1, "lost another process, which was killed or crashed"),
        (killed_while_others_wait_patiently, 1, "lost another process, which was killed or crashed"),
        (first_is_killed, 0, "error: process 1 lost process 0, which was killed or crashed if it does not say"),
    ],
)
def test_a_failure_anywhere_ends_all_processes_with_one_message(
    work: Work, killed: int | None, words: str, tmp_path: Path
) -> None:
    codes, said = launched(partial(launch, work), 3, tmp_path)
    assert codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    assert [words in text for text in said].count(True) == 1, said
    assert [text for text in said if text and words not in text] == [], "nobody else says anything"


def wait_for_the_first(runtime: Runtime) -> int:
    def long_work() -> int:
        time.sleep(1.5)
        return 5

    return runtime.team.broadcast(long_work)


def wait_in_a_collective(runtime: Runtime) -> int:
    if runtime.team.is_rank0:
        time.sleep(1.5)
    with runtime.team.exchange():
        return int(sum_over_ranks(runtime)) - 1


@pytest.mark.parametrize(
    ("minutes", "work", "codes"),
    [("1", wait_for_the_first, [5, 5]), ("1", wait_in_a_collective, [2, 2]), ("0.01", wait_in_a_collective, [1, 1])],
)
def test_patience(minutes: str, work: Work, codes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_PATIENCE", minutes)
    assert launched(partial(launch, work), 2, tmp_path)[0] == codes


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", "1e6"])
def test_patience_that_makes_no_sense(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_PATIENCE", given)
    with pytest.raises(InputError, match=f"WAN_PATIENCE={given}: must be minutes"):
        patience()


PEER = f"process 1 on {socket.gethostname()}: "


def outcome(runtime: Runtime, failing: int, how: str) -> str:
    team = runtime.team

    def work() -> str:
        if team.rank < failing:
            return "fine"
        if how == "unpicklable":
            error = RuntimeError("odd")
            error.odd = lambda: None  # type: ignore[attr-defined]  # what makes it so
            raise error
        raise InputError(["one", "two"]) if how == "input" else OSError(28, "No space left on device")

    try:
        return team.broadcast(work) if how == "first" else team.all_or_none(work)
    except (InputError, OSError, JobError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize(
    ("failing", "how", "expected"),
    [
        (3, "input", ["fine"] * 3),
        (0, "input", ["InputError: one\ntwo"] * 3),
        (1, "input", [f"InputError: {PEER}one\n{PEER}two"] * 3),
        (2, "os", ["OSError: [Errno 28] No space left on device"] * 3),
        (
            2,
            "unpicklable",
            [f"JobError: process 2 on {socket.gethostname()}: RuntimeError: odd"] * 2 + ["RuntimeError: odd"],
        ),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(failing: int, how: str, expected: list[str]) -> None:
    assert run_ranks(outcome, 3, failing, how) == expected


def broadcast(runtime: Runtime) -> str:
    def refuse() -> str:
        assert runtime.team.is_rank0, "only the first rank works"
        raise InputError("--size 7*7: must be a multiple of 16")

    try:
        return runtime.team.broadcast(refuse)
    except InputError as e:
        return "; ".join(e.problems)


def test_bad_input_found_by_the_first_rank_is_known_to_all() -> None:
    assert run_ranks(broadcast, 2) == ["--size 7*7: must be a multiple of 16"] * 2


def test_alone_everything_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch(lambda runtime: runtime.team.size + 6) == 7
    team = Team()
    assert (team.is_rank0, team.gather(3), team.broadcast(lambda: 4), team.all_or_none(lambda: 5)) == (True, [3], 4, 5)
    with pytest.raises(ZeroDivisionError):
        launch(lambda _: 1 // 0)
    assert not dist.is_initialized()


def bug_on_one_of_an_agreeing_team(runtime: Runtime) -> int:
    def work() -> None:
        if runtime.team.rank == 1:
            raise ValueError("a bug")

    runtime.team.all_or_none(lambda: runtime.team.all_or_none(work))
    return 0


def test_a_peers_bug_is_printed_once_with_its_traceback(tmp_path: Path) -> None:
    codes, said = launched(partial(launch, bug_on_one_of_an_agreeing_team), 3, tmp_path)
    (printed,) = filter(None, said)
    assert codes == [1, 1, 1]
    assert printed.startswith("in process 1:\nTraceback (most recent call last):\n")
    assert printed.endswith("\nValueError: a bug\nerror: process 1: ValueError: a bug\n")
    assert printed.count("Traceback") == 1


def leave_in_the_midst(runtime: Runtime, failing: int) -> tuple[int, str]:
    """Meetings that a rank has had when it learns that `failing` has failed before its third."""
    team, met = runtime.team, 0

    def work() -> None:
        nonlocal met
        for index in range(5):
            if team.rank == failing and index == 2:
                raise JobError("no memory")
            team.barrier()
            met += 1

    try:
        team.all_or_none(work)
    except JobError as e:
        printed = str(e)
    assert team.gather(met) == [2] * team.size, "after it all are in step again"
    return met, printed


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_is_missed_at_the_next_meeting(failing: int) -> None:
    assert (
        run_ranks(leave_in_the_midst, 3, failing)
        == [(2, f"process 2 on {socket.gethostname()}: no memory" if failing else "no memory")] * 3
    )


def error_in_an_exchange(runtime: Runtime) -> int:
    def work() -> None:
        with runtime.team.exchange():
            if runtime.team.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            dist.barrier()

    runtime.team.all_or_none(work)
    return 0


def test_a_failed_exchange_ends_the_run(tmp_path: Path) -> None:
    """The others are in it already; they notice by the connection that this process closes."""
    codes, said = launched(partial(launch, error_in_an_exchange), 2, tmp_path)
    assert (codes, said) == ([1, 1], ["", "error: process 1: OutOfMemoryError: CUDA out of memory\n"])


def terminated(runtime: Runtime) -> int:
    try:
        if runtime.team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        sum_over_ranks(runtime)
    finally:
        print("tidied", flush=True)
    return 0


def test_sigterm_leaves_time_to_tidy(tmp_path: Path) -> None:
    codes, said = launched(partial(launch, terminated), 2, tmp_path)
    assert (codes, said) == ([1, 143], ["", "terminated\n"])
    assert [(tmp_path / f"{rank}.out").read_text() for rank in range(2)] == ["tidied\n"] * 2


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", None, "WORLD_SIZE=2, but not RANK"),
        ("MASTER_ADDR", None, "WORLD_SIZE=2, but not MASTER_ADDR"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two in the environment: must be a whole number"),
        ("WAN_PATIENCE", "long", "WAN_PATIENCE=long: must be minutes"),
    ],
)
def test_an_environment_that_lacks_something(
    name: str, value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, given in (ENVIRONMENT | {name: value}).items():
        if given is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, given)
    assert generate.main([]) == 2
    assert expected in capsys.readouterr().err


def place(runtime: Runtime, gpus: int, seen: list[str], printed: bool = False) -> tuple[bool, int | None]:
    """Whether a process that sees this number of GPUs takes one, and which. seen: CUDA_VISIBLE_DEVICES of each process;
    printed: whether the launcher numbers those of a machine."""
    taken: list[int] = []
    torch.cuda.device_count, torch.cuda.set_device = lambda: gpus, taken.append  # type: ignore[assignment]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[runtime.team.rank]
    if printed:
        os.environ |= {"LOCAL_RANK": str(runtime.team.rank), "LOCAL_WORLD_SIZE": str(runtime.team.size)}
    store = dist.distributed_c10d._get_default_store()
    return _take_gpu(store, runtime.team.rank, runtime.team.size), taken[0] if taken else None


@pytest.mark.parametrize(
    ("gpus", "seen", "expected"),
    [
        (2, ["0,1", "0,1"], [(True, 0), (True, 1)]),
        (1, ["0", "0"], [(False, None), (False, None)]),
        (1, ["0", "1"], [(True, 0), (True, 0)]),
        (0, ["", ""], [(False, None), (False, None)]),
    ],
)
def test_gpus_where_the_launcher_says_nothing_of_machines(gpus: int, seen: list[str], expected: list) -> None:
    """srun without LOCAL_RANK and LOCAL_WORLD_SIZE; the third: it gives each process a GPU of its own."""
    assert run_ranks(place, 2, gpus, seen) == expected
    if gpus:  # and the same where they are given
        assert run_ranks(place, 2, gpus, seen, True) == expected
