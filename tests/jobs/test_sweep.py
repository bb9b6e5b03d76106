"""`--sweep`, and columns of a prompt file that name options: one run, many settings, each as a run of its own."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import generate
from tests.distributed.ranks import launched
from tests.support import checkpoint, lora_dir
from wan.cli.checks import Check
from wan.jobs.build import combinations, label_of
from wan.pipeline import Pipeline
from wan.sampling import Video

TASK = "t2v-A14B"


def words(folder: Path, *more: str) -> list[str]:
    return [
        "--task", TASK, "--ckpt_dir", str(checkpoint(TASK)), "--lora_dir", str(lora_dir(TASK)), "--prompt", "a cat",
        "--size", "32*32", "--frame_num", "5", "--base_seed", "1", "--device", "cpu", "--save_dir", str(folder),
        *more,
    ]  # fmt: skip


def records(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def latents(folder: Path) -> list[bytes]:
    return [file.read_bytes()[-2048:] for file in sorted(folder.glob("*.latents.safetensors"))]


def test_combinations_change_weights_least() -> None:
    check = Check()
    found = combinations(["base_seed=1,2", "lora_strength=0.5,1"], check)
    assert found == [
        {"lora_strength": "0.5", "base_seed": "1"}, {"lora_strength": "0.5", "base_seed": "2"},
        {"lora_strength": "1", "base_seed": "1"}, {"lora_strength": "1", "base_seed": "2"},
    ]  # fmt: skip
    assert combinations([], check) == [{}]
    assert combinations(["timesteps=1000,500;1000,250"], check) == [
        {"timesteps": "1000,500"}, {"timesteps": "1000,250"},
    ]  # fmt: skip
    assert not check.problems
    assert label_of({"lora_strength": "0.5", "base_seed": "1", "lora": "a/b c.safetensors:0.8"}) == (
        "_lora_strength0.5_lorab-c.safetensors-0.8"
    )


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        ("lora_strength", "NAME=VALUE"), ("lora_strength=", "NAME=VALUE"), ("lora_strenght=1,2", "lora_strength"),
        ("sample_steps=2,many", "--sample_steps"), ("sample_steps=2,0", "--sample_steps"), ("vram=1,2", "vram"),
        ("base_seed=1,1", "twice"), ("size=32*32,33*33", "33*33"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_swept_are_named(sweep: str, named: str, tmp_path: Path, capsys) -> None:
    assert generate.main(words(tmp_path, "--sweep", sweep)) == 2
    assert named in capsys.readouterr().err


SWEEP = ["--sweep", "base_seed=1,2", "--sweep", "lora_strength=0.5,1", "--save_latents", "--record", "none"]


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The latents of the four videos of SWEEP, each made by a run of its own."""
    alone = tmp_path_factory.mktemp("alone")
    for strength in ("0.5", "1"):
        for seed in ("1", "2"):
            more = ["--lora_strength", strength, "--base_seed", seed, "--save_latents", "--record", "none"]
            assert generate.main(words(alone, *more, "--save_file", f"{strength}_{seed}.mp4")) == 0
    return latents(alone)


def dies_in_the_third(folder: Path) -> int:
    """The sweep, killed after a step of its third video, the first with other weights."""
    original, begun = Pipeline.sample, list[Video]()

    def sample(self: Pipeline, video: Video, *arguments: Any, **more: Any) -> Any:
        begun.append(video)
        if len(begun) == 3:
            return original(self, video, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return original(self, video, *arguments, **more)

    Pipeline.sample = sample  # type: ignore[method-assign]  # in this child process only
    return generate.main(words(folder, *SWEEP))


def test_a_sweep_goes_on_after_a_kill(singles: list[bytes], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    codes, _ = launched(partial(dies_in_the_third, out), 1, tmp_path)
    assert codes == [-signal.SIGKILL]
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.mp4")}
    assert len(before) == 2
    assert generate.main(words(out, *SWEEP, "--resume")) == 0
    assert "2 saved, 2 there already" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert latents(out) == singles
    assert [name for name in os.listdir(out) if name.startswith(".") or name.endswith(".part")] == []


def test_a_sweep_equals_single_runs_and_reads_weights_once_per_strength(
    singles: list[bytes], tmp_path: Path, capsys
) -> None:
    swept, sweep = tmp_path / "swept", SWEEP
    assert generate.main(words(swept, *sweep, "--dry_run")) == 0
    assert "read again 1 time" in capsys.readouterr().out
    assert generate.main(words(swept, *sweep)) == 0
    assert latents(swept) == singles
    made = records(swept)
    assert [record["request"].get("lora_strength") for record in made.values()] == ["0.5", "0.5", "1", "1"]
    assert [record["job"]["seed"] for record in made.values()] == [1, 2, 1, 2]
    assert all("lora_strength" in name for name in made)
    capsys.readouterr()
    assert generate.main(words(swept, *sweep, "--resume")) == 0
    assert "4 there already" in capsys.readouterr().err
    next(swept.glob("*_0002_*.mp4")).unlink()
    assert generate.main(words(swept, *sweep, "--resume")) == 0
    assert "1 saved, 3 there already" in capsys.readouterr().err


def test_a_resumed_sweep_keeps_the_seed_that_was_drawn(tmp_path: Path, capsys) -> None:
    sweep = ["--base_seed", "-1", "--sweep", "sample_shift=3,5", "--sample_steps", "2"]
    assert generate.main(words(tmp_path, *sweep)) == 0
    assert generate.main(words(tmp_path, *sweep, "--resume")) == 0
    assert "2 there already" in capsys.readouterr().err


def test_rows_may_have_options_of_their_own(tmp_path: Path, capsys) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("prompt,lora_strength,Sample Shift\na cat,0.5,\na dog,,3\na fox,0.5,\n")
    command = words(tmp_path / "out", "--prompt_file", str(table), "--save_latents")
    command.remove("--prompt"), command.remove("a cat")
    assert generate.main(command) == 0, capsys.readouterr().err
    made = list(records(tmp_path / "out").values())
    assert [record["job"]["index"] for record in made] == [0, 1, 2]
    assert [record["request"].get("lora_strength") for record in made] == ["0.5", None, "0.5"]
    assert [record["plan"]["shift"] for record in made] == [5.0, 3.0, 5.0]
    table.write_text("prompt,lora_strength,sample_shift\na cat,0.5,many\n")
    assert generate.main(command) == 2
    assert "rows.csv line 2: --sample_shift" in capsys.readouterr().err


def test_a_shard_of_a_sweep_and_a_replay_of_one_video(tmp_path: Path) -> None:
    sweep = ["--sweep", "sample_shift=3,5", "--sample_steps", "2"]
    for shard in ("1/2", "2/2"):
        assert generate.main(words(tmp_path, *sweep, "--shard", shard)) == 0
    first, second = (tmp_path / f"{name}.json" for name in records(tmp_path))
    assert generate.main(["--replay", str(second), "--save_dir", str(tmp_path / "again")]) == 0
    (again,) = records(tmp_path / "again").values()
    assert again["meaning"] == json.loads(second.read_text())["meaning"] != json.loads(first.read_text())["meaning"]
