"""Claims between real processes: one owner at a time, nothing waits for a dead one, nothing alive is robbed."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.utils.test_files import run_python
from wan.utils import claims, files
from wan.utils.claims import ClaimedElsewhere, claim_file, claimed, sweep

HOLD = """
import sys, time
from pathlib import Path
from wan.utils.claims import claimed
with claimed(Path(sys.argv[1])) as claim:
    print(claim.taken_over, flush=True)
    time.sleep(60)
"""
# Makes each of 20 "videos" once: what is there is skipped, what another makes is left to it, until all are there.
WORK = """
import sys, time
from pathlib import Path
from wan.utils.claims import ClaimedElsewhere, claimed
folder = Path(sys.argv[1])
todo = [folder / f"{n}.mp4" for n in range(20)]
while todo:
    video = todo.pop(0)
    try:
        with claimed(video) as claim:
            if not video.exists():
                time.sleep(0.02)
                with open(folder / "log", "a") as log:
                    log.write(f"{video.name}\\n")
                video.write_text("whole")
    except ClaimedElsewhere:
        todo.append(video)
        time.sleep(0.005)
"""


def hold(video: Path) -> subprocess.Popen[str]:
    process = run_python(HOLD, video)
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    return process


def test_one_owner_at_a_time_and_nothing_left_at_the_end(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    with claimed(video) as claim:
        assert claim.holds()
        assert claim.taken_over is None
        mine = rf"a\.mp4: is being made by process {os.getpid()} on "
        with pytest.raises(ClaimedElsewhere, match=mine), claimed(video):
            pytest.fail("two owners")
        assert claim.holds()
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_where_the_block_fails(tmp_path: Path) -> None:
    def run() -> None:
        with claimed(tmp_path / "a.mp4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_keeps_it_and_a_killed_one_does_not(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    process = hold(video)
    with pytest.raises(ClaimedElsewhere, match=f"process {process.pid} on"), claimed(video):
        pass
    process.send_signal(signal.SIGSTOP)  # frozen is not dead, however long
    long_ago = time.time() - 10 * files.STALE_SECONDS
    os.utime(claim_file(video), (long_ago, long_ago))
    with pytest.raises(ClaimedElsewhere), claimed(video):
        pass
    assert sweep(tmp_path) == []
    process.kill()
    process.wait()
    with claimed(video) as claim:
        assert claim.taken_over is not None
        assert re.search(rf"taken over from process {process.pid} on .*, which is gone", claim.taken_over)
    assert list(tmp_path.iterdir()) == []


def test_a_number_used_again_by_another_process_is_no_owner(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    process = hold(video)
    process.kill()
    process.wait()
    content = json.loads(claim_file(video).read_text())
    claim_file(video).write_text(json.dumps({**content, "pid": os.getpid()}))
    with claimed(video) as claim:
        assert claim.taken_over


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"machine": 1, "pid": "x", "started": 2, "time": 3, "token": "/"}', "[" * 100_000, None],
)
def test_another_machines_or_an_unreadable_claim_goes_by_its_age(tmp_path: Path, content: str | None) -> None:
    video, path = tmp_path / "a.mp4", claim_file(tmp_path / "a.mp4")
    other = {"machine": "node7-f0000000", "pid": 1, "started": "5", "time": "then", "token": "ab"}
    path.write_text(json.dumps(other) if content is None else content)
    with pytest.raises(ClaimedElsewhere, match="is being made by"), claimed(video):
        pass
    assert sweep(tmp_path) == []
    long_ago = time.time() - files.STALE_SECONDS - 5
    os.utime(path, (long_ago, long_ago))
    with claimed(video) as claim:
        assert claim.taken_over
    assert list(tmp_path.iterdir()) == []


def test_an_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    with claimed(tmp_path / "a.mp4") as claim:
        os.utime(claim.path, (0, 0))
        deadline = time.monotonic() + 60
        while claim.path.stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_claim_that_was_taken_away_is_not_removed_from_its_new_owner(tmp_path: Path) -> None:
    with claimed(tmp_path / "a.mp4") as claim:
        claim.path.write_text(json.dumps({"machine": "m", "pid": 1, "started": "", "time": "", "token": "cd"}))
        assert not claim.holds()
    assert claim.path.exists()


def test_many_processes_make_everything_once_though_some_are_killed(tmp_path: Path) -> None:
    """Four workers, two killed in the middle and started again; a video's log line and file are not one step, so a
    killed one may be logged twice, and no other."""
    workers = [run_python(WORK, tmp_path) for _ in range(4)]
    deadline = time.monotonic() + 60
    killed = 0
    for victim in workers[:2]:
        while len(list(tmp_path.glob("*.mp4"))) < 4 * (killed + 1):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim.kill()
        victim.wait()
        killed += 1
    workers[:2] = [run_python(WORK, tmp_path) for _ in range(2)]
    for worker in workers:
        worker.communicate(timeout=300)
    assert [worker.returncode for worker in workers] == [0, 0, 0, 0]
    assert len(list(tmp_path.glob("*.mp4"))) == 20
    made = (tmp_path / "log").read_text().split()
    assert set(made) == {f"{n}.mp4" for n in range(20)}
    assert len(made) - 20 <= killed
    sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_many_processes_that_find_one_dead_owner(tmp_path: Path) -> None:
    """All see the same stale claim at once; exactly one may work on the video at a time."""
    process = hold(tmp_path / "0.mp4")
    process.kill()
    process.wait()
    workers = [run_python(WORK, tmp_path) for _ in range(6)]
    for worker in workers:
        worker.communicate(timeout=300)
    assert sorted((tmp_path / "log").read_text().split()) == sorted(f"{n}.mp4" for n in range(20))


def test_sweeping_takes_the_claims_of_the_dead(tmp_path: Path) -> None:
    process = hold(tmp_path / "a.mp4")
    process.kill()
    process.wait()
    (tmp_path / "mine.claim").write_text("keep")
    with claimed(tmp_path / "b.mp4") as claim:
        assert sweep(tmp_path) == [claim_file(tmp_path / "a.mp4")]
        assert {p.name for p in tmp_path.iterdir()} == {"mine.claim", claim.path.name}


def test_a_claim_whose_taking_is_interrupted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "x.mp4"):
        pass
    assert not list(tmp_path.iterdir())
