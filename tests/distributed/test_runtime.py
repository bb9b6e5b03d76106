"""Starting, agreeing, failing and ending together: `launch` in processes with torchrun's environment."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import launched, run_ranks
from wan.distributed.runtime import Runtime, launch
from wan.distributed.team import Team
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
    assert team.from_first(lambda: {"seed": 7, "rank": team.rank}) == {"seed": 7, "rank": 0}
    assert team.agree(lambda: team.rank) == team.rank
    return team.rank  # 2 is the worst


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
    """With it goes the store through which processes learn who failed first."""
    if runtime.team.first:
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
        (raise_on_one, None, "error in process 1:\nTraceback"),
        (job_error_on_one, None, "error: no space left on the disk\n"),
        (killed_in_a_collective, 1, "lost another one, which was killed, crashed or hangs"),
        (killed_while_others_wait_patiently, 1, "lost another one, which was killed, crashed or hangs"),
        (first_is_killed, 0, None),
    ],
)
def test_a_failure_anywhere_ends_everyone_and_is_told_once(
    work: Work, killed: int | None, words: str | None, tmp_path: Path
) -> None:
    began = time.monotonic()
    codes, said = launched(partial(launch, work), 3, tmp_path, seconds=60)
    assert time.monotonic() - began < 30, "not by waiting for a time limit"
    assert codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    if words is not None:
        assert [words in text for text in said].count(True) == 1, said
        assert [text for text in said if text and words not in text] == [], "nobody else says anything"


def wait_for_the_first(runtime: Runtime) -> int:
    def long_work() -> int:
        time.sleep(1.5)
        return 5

    return runtime.team.from_first(long_work)


def wait_in_a_collective(runtime: Runtime) -> int:
    if runtime.team.first:
        time.sleep(1.5)
    return int(sum_over_ranks(runtime))


@pytest.mark.parametrize(("work", "code"), [(wait_for_the_first, 5), (wait_in_a_collective, 1)])
def test_work_of_one_rank_may_take_longer_than_a_collective(
    work: Work, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.distributed.runtime.COLLECTIVE_LIMIT", timedelta(seconds=0.5))
    assert launched(partial(launch, work), 2, tmp_path)[0] == [code, code]


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
        return team.from_first(work) if how == "first" else team.agree(work)
    except (InputError, OSError, JobError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize(
    ("failing", "how", "expected"),
    [
        (3, "input", ["fine"] * 3),
        (1, "input", ["InputError: one\ntwo"] * 3),
        (2, "os", ["OSError: [Errno 28] No space left on device"] * 3),
        (2, "unpicklable", ["JobError: RuntimeError: odd"] * 2 + ["RuntimeError: odd"]),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(failing: int, how: str, expected: list[str]) -> None:
    assert run_ranks(outcome, 3, failing, how) == expected


def from_first(runtime: Runtime) -> str:
    def refuse() -> str:
        assert runtime.team.first, "only the first rank works"
        raise InputError("--size 7*7: must be a multiple of 16")

    try:
        return runtime.team.from_first(refuse)
    except InputError as e:
        return "; ".join(e.problems)


def test_bad_input_found_by_the_first_rank_is_known_to_all() -> None:
    assert run_ranks(from_first, 2) == ["--size 7*7: must be a multiple of 16"] * 2


def test_alone_everything_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch(lambda runtime: runtime.team.size + 6) == 7
    team = Team()
    assert (team.first, team.gather(3), team.from_first(lambda: 4), team.agree(lambda: 5)) == (True, [3], 4, 5)
    with pytest.raises(ZeroDivisionError):
        launch(lambda _: 1 // 0)
    assert not dist.is_initialized()
