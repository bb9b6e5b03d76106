"""A prompt file divided over independent processes: together they make what one makes, whatever dies on the way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import generate
from tests.support import TINY, checkpoint, lora_dir, read_frames
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.utils.errors import InputError

ROOT = TINY.parents[1]
CHECKPOINT = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B"))]
FLAGS = [*CHECKPOINT, "--size", "32*32", "--frame_num", "5", "--device", "cpu", "--save_latents", "--resume"]
NUMBERS = ("ID", "COUNT", "MIN", "STEP")


@pytest.fixture(autouse=True)
def _no_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NUMBERS:
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)


def prompts(count: int) -> str:
    Path("prompts.txt").write_text("".join(f"cat {number}\n" for number in range(count)))
    return "prompts.txt"


def outcome(videos: int = 5, **flags: object) -> Generate:
    given = {"ckpt_dir": str(checkpoint("t2v-A14B")), "prompt_file": prompts(videos), "base_seed": 7, **flags}
    made = resolve({name: value for name, value in given.items() if value is not None})
    assert isinstance(made, Generate)
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("copies", [1, 3])
def test_shards_are_the_whole_file_once(count: int, copies: int) -> None:
    whole = outcome(num_videos=copies).jobs
    parts = [outcome(num_videos=copies, shard=f"{index}/{count}") for index in range(1, count + 1)]
    assert sorted((job for part in parts for job in part.jobs), key=lambda job: job.index) == list(whole)
    for part in parts:
        asked = {item.prompt for item in generate._questions(part.jobs)}
        assert asked == {job.prompt for job in part.jobs}, "only these are extended"
    assert max(len(part.jobs) for part in parts) - min(len(part.jobs) for part in parts) <= 1


@pytest.mark.parametrize(
    ("numbers", "shard"),
    [
        (("0", "4", "0", None), "1/4"),
        (("7", "4", "5", None), "3/4"),
        (("20", "3", "10", "5"), "3/3"),
    ],
)
def test_the_place_in_a_slurm_array(
    numbers: tuple[str | None, ...], shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(NUMBERS, numbers, strict=True):
        if value is not None:
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert outcome(shard="slurm").request.shard == shard
    assert outcome(shard="2/5").request.shard == "2/5"
    assert outcome().request.shard is None, "an array of other things is left alone"


@pytest.mark.parametrize("numbers", [("3", None, "0", None), (None, "4", "0", None), (None,) * 4])
def test_slurm_outside_of_an_array(numbers: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NUMBERS, numbers, strict=True):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value) if value else None
    with pytest.raises(InputError, match="--shard slurm: not a task of a Slurm array"):
        outcome(shard="slurm")


def test_the_whole_file_is_no_shard() -> None:
    made = outcome(shard="1/1", base_seed=None)
    assert made.request.shard is None
    assert len({job.seed for job in made.jobs} - {-1}) == 1, "a seed is drawn"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"shard": "0/4"}, "--shard takes I/N with I from 1 to N, such as 2/4, or slurm, not '0/4'"),
        ({"shard": "5/4"}, "not '5/4'"),
        ({"shard": "two"}, "not 'two'"),
        ({"shard": "1/2", "base_seed": None}, "give the same --base_seed to all of them"),
        ({"shard": "1/2", "extend_only": "x.txt"}, "leave it out with --extend_only"),
    ],
)
def test_invalid_combinations_are_refused(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        outcome(**flags)


def test_an_uneven_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NUMBERS, ("9", "3", "0", None), strict=True):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value) if value else None
    with pytest.raises(InputError, match="evenly; give --shard I/N"):
        outcome(shard="slurm")


def test_another_shards_videos_are_in_nobodys_way() -> None:
    Path("outputs").mkdir()
    whole = outcome().jobs
    whole[1].save_file.write_bytes(b"a video")
    assert [job.index for job in outcome(shard="1/2").jobs] == [0, 2, 4]
    with pytest.raises(InputError, match="already exists"):
        outcome(shard="2/2")


def words(videos: int, folder: Path, *more: str) -> list[str]:
    return [*FLAGS, "--prompt_file", prompts(videos), "--base_seed", "5", "--save_dir", str(folder), *more]


def assert_equal_videos(found: Path, wanted: Path, count: int) -> None:
    names = sorted(file.name for file in wanted.glob("*.mp4"))
    assert len(names) == count
    assert sorted(file.name for file in found.iterdir()) == sorted(file.name for file in wanted.iterdir())
    for name in names:
        latents = name.replace(".mp4", ".latents.safetensors")
        assert torch.equal(load_file(found / latents)["latent"], load_file(wanted / latents)["latent"]), name
        assert np.array_equal(read_frames(found / name), read_frames(wanted / name)), name


def test_two_shards_make_what_one_process_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(words(3, Path("one"))) == 0
    for shard in ("2/2", "1/2"):
        assert generate.main(words(3, Path("many"), "--shard", shard)) == 0
    printed = capsys.readouterr()
    assert re.search(r"^video 0002 \(2 of 2\): many/t2v-A14B_0002_", printed.err, re.M)
    assert re.search(r"^job 0002: .* -> many/t2v-A14B_0002_", printed.out, re.M)
    (record,) = Path("many").glob("t2v-A14B_0002_*.json")
    assert json.loads(record.read_text())["job"]["index"] == 2
    assert_equal_videos(Path("many"), Path("one"), 3)
    assert generate.main(words(3, Path("many"), "--shard", "4/4")) == 0, "none falls to it"


def start(number: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = Path(f"log{number}").open("ab")  # noqa: SIM115 - the process writes to it until it ends
    with log:
        return subprocess.Popen([sys.executable, str(ROOT / "generate.py"), *arguments], env=env, stderr=log)


def has_made(number: int, count: int) -> bool:
    """Whether a process has saved this number of videos, and is at another one."""
    log = Path(f"log{number}").read_text()
    return log.count("saved ") >= count and "video " in log.rpartition("saved ")[2]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_forty_videos_by_four_processes_two_of_them_killed(sharded: bool) -> None:
    """40 whole videos, equal to one process's, none made twice but the two during which a process was killed.

    With a shard each, and with all of the file each: then nothing but the locks divides the work.
    """
    folder, chance = Path("many"), random.Random(15)
    shards = [["--shard", f"{index}/4"] if sharded else [] for index in (1, 2, 3, 4)]
    commands = [words(40, folder, *shard) for shard in shards]
    processes = [start(number, command) for number, command in enumerate(commands)]
    for victim in chance.sample(range(4), 2):
        wanted = chance.randrange(4)  # the number of its videos that are whole
        while not has_made(victim, wanted):
            assert processes[victim].poll() is None
            time.sleep(0.02)
        time.sleep(chance.random())
        processes[victim].kill()
        assert processes[victim].wait() == -signal.SIGKILL
        processes[victim] = start(victim, commands[victim])
    assert [process.wait(timeout=1200) for process in processes] == [0, 0, 0, 0]

    log = "".join(Path(f"log{number}").read_text() for number in range(4))
    made = Counter(re.findall(r"saved (many/\S+?\.mp4)", log))
    assert set(made.values()) == {1}
    assert len(made) >= 38, "a kill may come between saving a video and saying so"
    assert len(re.findall(r"^denoise 4 steps", log, re.MULTILINE)) <= 42, "only what a kill interrupted is made again"
    assert generate.main(words(40, Path("one"))) == 0
    assert_equal_videos(folder, Path("one"), 40)


def run_shell(command: list[str], **variables: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**env, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers_of(plan: str) -> list[str]:
    return re.findall(r"^job (\d+):", plan, re.MULTILINE)


def test_the_slurm_array_script(tmp_path: Path) -> None:
    script = ROOT / "examples" / "cluster" / "slurm_array.sh"
    first, last = map(int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script.read_text(), re.MULTILINE)[0])
    more = [*CHECKPOINT, "--prompt_file", str(tmp_path / prompts(6)), "--save_dir", str(tmp_path), "--dry_run"]
    array = {"SLURM_ARRAY_TASK_COUNT": str(last - first + 1), "SLURM_ARRAY_TASK_MIN": str(first)}
    plan = run_shell(["bash", str(script), *more], SLURM_ARRAY_TASK_ID=str(first + 1), **array)
    assert numbers_of(plan) == ["0001", "0005"]


@pytest.mark.slow
def test_the_skypilot_task(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "examples" / "cluster" / "skypilot.yaml").read_text())
    variables = {
        **task["envs"], "CKPT_DIR": str(checkpoint("t2v-A14B")), "PROMPT_FILE": str(tmp_path / prompts(6)),
        "SAVE_DIR": str(tmp_path), "MORE": "--dry_run", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
    }  # fmt: skip
    assert task["file_mounts"][task["envs"]["SAVE_DIR"]]["mode"] == "MOUNT"
    assert numbers_of(run_shell(["bash", "-c", task["run"]], **variables)) == ["0001", "0005"]


@pytest.mark.slow
def test_the_ray_example_makes_what_one_process_makes() -> None:
    """With a real Ray on this machine, two actors on its CPUs, one of which dies on its way and is replaced."""
    pytest.importorskip("ray.data")
    script = ROOT / "examples" / "cluster" / "ray_data.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, str(script), *words(6, Path("many"))]
    with Path("log").open("wb") as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    while not (locks := list(Path("many").glob(".*.lock"))):
        assert running.poll() is None, Path("log").read_text()
        time.sleep(0.01)
    holder = re.search(rf"WRITE (\d+) \S+:{locks[0].stat().st_ino} ", Path("/proc/locks").read_text())
    assert holder is not None
    os.kill(int(holder[1]), signal.SIGKILL)
    assert running.wait(timeout=500) == 0, Path("log").read_text()
    assert len(set(re.findall("^saved (.+)$", Path("log").read_text(), re.MULTILINE))) == 6

    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.count("is there already") == 6
    assert generate.main(words(6, Path("one"))) == 0
    assert_equal_videos(Path("many"), Path("one"), 6)
