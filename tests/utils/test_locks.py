"""Locks between real processes: one holder at a time, nothing waits for a dead one, nothing alive is robbed."""

import errno
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.utils.test_files import run_python
from wan.utils import files
from wan.utils.errors import JobError
from wan.utils.files import LockedElsewhere, clean_up, locked, make_part

HOLD = """
import sys, time
from pathlib import Path
from wan.utils.files import make_part
from wan.utils.files import locked
video = Path(sys.argv[1])
with locked(video, print):
    make_part(video)
    print("held", flush=True)
    time.sleep(60)
"""
# Makes each of N "videos" once: leaves those that are there or being made, until all are there. The making of one is a
# line in the log at its begin and one at its end.
WORK = """
import sys, time
from pathlib import Path
from wan.utils.files import replacing
from wan.utils.files import LockedElsewhere, locked
folder = Path(sys.argv[1])
todo = [folder / f"{n}.mp4" for n in range(int(sys.argv[2]))]
def log(text):
    with open(folder / "log", "a") as file:
        file.write(text + "\\n")
while todo:
    video = todo.pop(0)
    try:
        with locked(video, lambda text: None):
            if not video.exists():
                log(f"begin {video.name}")
                with replacing(video) as part:
                    part.write_text("half")
                    time.sleep(0.02)
                    part.write_text("whole")
                    log(f"end {video.name}")
    except LockedElsewhere:
        todo.append(video)
        time.sleep(0.005)
"""


def hold(video: Path) -> subprocess.Popen[str]:
    process = run_python(HOLD, video)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_holder_at_a_time_and_nothing_left_at_the_end(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    with locked(video, pytest.fail):
        with pytest.raises(LockedElsewhere, match=r"a\.mp4"), locked(video, pytest.fail):
            pytest.fail("two holders")
        with locked(tmp_path / "b.mp4", pytest.fail):
            assert names(tmp_path) == [".a.mp4.lock", ".b.mp4.lock"]
    assert names(tmp_path) == []


def test_it_is_released_where_the_block_fails(tmp_path: Path) -> None:
    def run() -> None:
        with locked(tmp_path / "a.mp4", pytest.fail):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(tmp_path) == []


def test_a_living_holder_keeps_it_and_a_killed_one_does_not(tmp_path: Path) -> None:
    """The next holder removes what the killed one left of this video, and of no other."""
    video, printed = tmp_path / "a.mp4", []
    process = hold(video)
    other = make_part(tmp_path / "other.mp4")
    process.send_signal(signal.SIGSTOP)  # frozen is not dead, however long
    long_ago = time.time() - 100_000
    os.utime(tmp_path / ".a.mp4.lock", (long_ago, long_ago))
    with pytest.raises(LockedElsewhere), locked(video, pytest.fail):
        pass
    clean_up([video], pytest.fail)
    assert len(names(tmp_path)) == 3
    kill(process)
    with locked(video, printed.append):
        assert names(tmp_path) == sorted([".a.mp4.lock", other.name])
    assert len(printed) == 1
    assert names(tmp_path) == [other.name]


def test_the_leftovers_of_whole_videos_go(tmp_path: Path) -> None:
    kill(hold(tmp_path / "a.mp4"))
    kill(hold(tmp_path / "b.mp4"))
    (tmp_path / "mine.lock").write_text("keep")
    clean_up([tmp_path / "a.mp4"], lambda _: None)
    assert not [name for name in names(tmp_path) if ".a." in name]
    assert len([name for name in names(tmp_path) if ".b." in name]) == 2
    assert "mine.lock" in names(tmp_path)


def make_all(folder: Path, videos: int, kills: int, seconds: float) -> None:
    """Four processes, of which a random one is killed and started again every so often, make each video once."""
    chance = random.Random(21)
    workers = [run_python(WORK, folder, videos) for _ in range(4)]
    for _ in range(kills):
        time.sleep(chance.uniform(0, seconds))
        victim = chance.randrange(4)
        kill(workers[victim])
        workers[victim] = run_python(WORK, folder, videos)
    for worker in workers:
        worker.communicate(timeout=300)
        assert worker.returncode == 0
    log = (folder / "log").read_text().splitlines()
    ends = [line for line in log if line.startswith("end")]
    assert {line.split()[1] for line in ends} == {f"{n}.mp4" for n in range(videos)}
    assert len(ends) <= videos + kills, "a kill may come between the log and the name"
    assert len(log) - len(ends) <= videos + kills, "only a killed process's video is begun again"
    assert all((folder / f"{n}.mp4").read_text() == "whole" for n in range(videos))
    clean_up([folder / f"{n}.mp4" for n in range(videos)], lambda _: None)
    assert names(folder) == sorted([*(f"{n}.mp4" for n in range(videos)), "log"])


def test_four_processes_make_each_video_once_though_some_are_killed(tmp_path: Path) -> None:
    make_all(tmp_path, videos=40, kills=3, seconds=0.6)


@pytest.mark.slow
def test_four_processes_and_sixty_kills(tmp_path: Path) -> None:
    make_all(tmp_path, videos=400, kills=60, seconds=0.5)


def test_many_processes_that_find_one_dead_holder(tmp_path: Path) -> None:
    kill(hold(tmp_path / "0.mp4"))
    workers = [run_python(WORK, tmp_path, 5) for _ in range(4)]
    for worker in workers:
        worker.communicate(timeout=300)
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log) == sorted(f"{what} {n}.mp4" for n in range(5) for what in ("begin", "end"))


def test_a_holder_that_waits_does_not_get_a_removed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between another's opening of the file and its locking, the holder removes the file and lets go."""
    video, flock = tmp_path / "a.mp4", fcntl.flock
    first = locked(video, pytest.fail)
    first.__enter__()

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(LockedElsewhere), locked(video, pytest.fail):
        pytest.fail("the lock of a file that has no name")
    with locked(video, pytest.fail), pytest.raises(LockedElsewhere), locked(video, pytest.fail):
        pytest.fail("two holders")


IN_THE_WAY: list[Callable[[Path], object]] = [
    Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(__file__),
    lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
]  # fmt: skip


@pytest.mark.parametrize("make", IN_THE_WAY)
def test_a_folder_or_pipe_at_the_name_is_one_sentence(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / ".a.mp4.lock")
    with pytest.raises(JobError, match=r"\.a\.mp4\.lock"), locked(tmp_path / "a.mp4", pytest.fail):
        pass
    assert names(tmp_path) == [".a.mp4.lock"]


def failing(monkeypatch: pytest.MonkeyPatch, number: int, times: int, operation: int) -> None:
    """The first calls of flock with `operation` fail."""
    flock, left = fcntl.flock, [times]

    def fail(descriptor: int, asked: int) -> None:
        if asked & operation and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        flock(descriptor, asked)

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("operation", [fcntl.LOCK_EX, fcntl.LOCK_UN])
def test_a_stale_file_handle_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    failing(monkeypatch, errno.ESTALE, 2, operation)
    with locked(tmp_path / "a.mp4", pytest.fail):
        pass
    assert names(tmp_path) == []


def test_a_file_system_that_stays_broken_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.ESTALE, 100, fcntl.LOCK_EX)
    with pytest.raises(JobError, match=r"\.a\.mp4\.lock"), locked(tmp_path / "a.mp4", pytest.fail):
        pass


@pytest.mark.parametrize("number", sorted(files.NO_LOCKS))
def test_without_locks_a_file_marks_the_video_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    printed: list[str] = []
    monkeypatch.setattr(files, "_without_locks", set())
    failing(monkeypatch, number, 10_000, fcntl.LOCK_EX)
    video = tmp_path / "a.mp4"
    for _ in range(2):
        with locked(video, printed.append):
            assert ".a.mp4.softlock" in names(tmp_path)
            with pytest.raises(LockedElsewhere), locked(video, printed.append):
                pytest.fail("two holders")
        assert names(tmp_path) == []
    assert len(printed) == 1
    assert str(tmp_path) in printed[0]


def test_without_locks_a_killed_process_of_this_machine_is_known_by_its_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_without_locks", {tmp_path})
    process = run_python(HOLD.replace("with locked", "files._without_locks.add(video.parent)\nwith locked").replace(
        "from wan.utils.files", "from wan.utils import files\nfrom wan.utils.files"), tmp_path / "a.mp4")  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LockedElsewhere), locked(tmp_path / "a.mp4", pytest.fail):
        pass
    kill(process)
    with locked(tmp_path / "a.mp4", lambda _: None):
        pass
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a host name of its own")
def test_machines_whose_host_names_begin_alike(tmp_path: Path) -> None:
    """A machine's host name is in no name, so a second machine never takes the first one's files for a dead one's."""
    video = tmp_path / "a.mp4"
    command = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']
    code = [sys.executable, "-c", HOLD, str(video)]
    first = subprocess.Popen([*command, "gpu-cluster-node-001", *code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    if first.stdout.readline() != "held\n":
        pytest.skip("no right to a host name of one's own")
    before = names(tmp_path)
    second = subprocess.run([*command, "gpu-cluster-node-002", *code], capture_output=True, text=True, check=False)
    assert "LockedElsewhere" in second.stderr
    assert names(tmp_path) == before
    kill(first)
