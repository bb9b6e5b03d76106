"""The documented commands, run by torchrun itself: one machine, two machines (on loopback), and a killed process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
from tests.distributed.ranks import sharded
from tests.distributed.test_runs import SPLIT, check_batch, flags, latents
from tests.support import TESTS

ROOT = TESTS.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """A torchrun command; what it prints goes to a file, so that no pipe fills up."""
    with (folder / f"{name}.txt").open("wb") as out:
        return subprocess.Popen([*TORCHRUN, *words], cwd=folder, env=ENVIRONMENT, stdout=out, stderr=out)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@sharded
@pytest.mark.slow
def test_the_documented_command(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    assert generate.main(flags(alone)) == 0
    words = flags(tmp_path, "--dit_fsdp", "--t5_fsdp", "--ulysses_size", "4")
    process = start(tmp_path, "all", "--standalone", "--nproc-per-node", "4", str(ROOT / "generate.py"), *words)
    assert process.wait(180) == 0, (tmp_path / "all.txt").read_text()
    check_batch(tmp_path, latents(alone))
    assert (tmp_path / "all.txt").read_text().count("5 saved") == 1


@sharded
@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines(rendezvous: str, tmp_path: Path) -> None:
    """Each simulated machine is a torchrun agent with two processes; data 2 x ulysses 2."""
    alone = tmp_path / "alone"
    alone.mkdir()
    assert generate.main(flags(alone)) == 0
    port = str(free_port())
    meet = {
        "static": ["--master-addr", "127.0.0.1", "--master-port", port],
        "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run",
                 "--local-addr", "127.0.0.1"],
    }[rendezvous]  # fmt: skip
    words = [str(ROOT / "generate.py"), *flags(tmp_path, *SPLIT)]
    agents = []
    for machine in range(2):
        place = ["--node-rank", str(machine)] if rendezvous == "static" else []
        agents.append(start(tmp_path, str(machine), "--nnodes", "2", "--nproc-per-node", "2", *place, *meet, *words))
    said = [f"{agent.wait(180)}\n" + (tmp_path / f"{i}.txt").read_text() for i, agent in enumerate(agents)]
    assert [text[0] for text in said] == ["0", "0"], said
    check_batch(tmp_path, latents(alone))
    assert "".join(said).count("5 saved") == 1


@sharded
@pytest.mark.slow
def test_a_killed_process_ends_the_command(tmp_path: Path) -> None:
    words = flags(tmp_path, *SPLIT, "--sample_steps", "200", "--sample_shift", "5")
    process = start(tmp_path, "all", "--standalone", "--nproc-per-node", "4", str(ROOT / "generate.py"), *words)
    try:
        workers: list[int] = []
        end = time.monotonic() + 120
        while time.monotonic() < end and "video 0000 (1 of 5)" not in (tmp_path / "all.txt").read_text():
            assert process.poll() is None, (tmp_path / "all.txt").read_text()
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(word) for word in children.read_text().split()]
        os.kill(workers[-1], signal.SIGKILL)
        assert process.wait(300) == 1, "and not after the hour of the program's patience"
    finally:
        process.kill()
    printed = (tmp_path / "all.txt").read_text()
    lost = "lost another process, which was killed or crashed"
    own = [line for line in printed.splitlines() if line.startswith("error: ")]  # not those of torchrun's report
    assert sum(lost in line for line in own) <= 1
    assert not list((tmp_path / "out").glob("*.part")), "torchrun's SIGTERM leaves time to tidy"
    assert "Signal 9 (SIGKILL)" in printed, "torchrun names the process"


FAILS_ONCE = """
import os, signal, sys
import generate
import wan.runner.batch

make_video = wan.runner.batch.make_video

def fails_once(pipe, job, *more, **options):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], job.index) == ("1", "0", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return make_video(pipe, job, *more, **options)

wan.runner.batch.make_video = fails_once
sys.exit(generate.main())
"""


@pytest.mark.slow
def test_torchrun_starts_again_where_a_process_was_killed(tmp_path: Path) -> None:
    """The agent's store outlives the first attempt, with its keys; `--resume` finds the first video."""
    (tmp_path / "start.py").write_text(FAILS_ONCE)
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "start.py"]
    process = start(tmp_path, "all", *words, *flags(tmp_path, "--ulysses_size", "2", "--resume"))
    code, printed = process.wait(300), (tmp_path / "all.txt").read_text()
    assert code == 0, printed
    assert "4 saved, 1 there already" in printed
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 5
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.slow
def test_torchrun_help(tmp_path: Path) -> None:
    process = start(tmp_path, "all", "--standalone", "--nproc-per-node", "2", str(ROOT / "generate.py"), "--help")
    assert process.wait(120) == 0
    assert (tmp_path / "all.txt").read_text().count("usage: generate.py") == 1
