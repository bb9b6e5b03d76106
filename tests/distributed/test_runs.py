"""Whole runs of generate.py over processes: batches, failing jobs, and processes that die in the midst of the work."""

import gc
import json
import os
import signal
import socket
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import generate
import wan.pipeline
from tests.distributed.faults import Fault, run_with_fault
from tests.distributed.ranks import launched, run_ranks, sharded
from tests.support import TINY, checkpoint, lora_dir, read_frames, relative_error
from tests.utils.test_events import described
from wan.distributed.launch import Runtime, launch
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.modules.vae import WanVAE
from wan.planning.build import make_plan
from wan.runner.batch import run_jobs
from wan.utils.errors import InputError
from wan.utils.progress import Progress

PROMPTS = ["a cat boxing", "the red ball", "a dog on the blue ball", "the cat", "a ball"]
SPLIT = ["--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp"]


def flags(folder: Path, *more: str, count: int = len(PROMPTS)) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:count]))
    return [
        "--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")),
        "--size", "80*48", "--frame_num", "5", "--prompt_file", str(prompts), "--base_seed", "3", "--save_latents",
        "--save_dir", str(folder / "out"), "--device", "cpu", *more,
    ]  # fmt: skip


def latents(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: load_file(path)["latent"] for path in sorted((folder / "out").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The latents of the batch made by one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert generate.main(flags(folder)) == 0
    return latents(folder)


def check_batch(folder: Path, alone: dict[str, torch.Tensor], count: int = len(PROMPTS)) -> None:
    made = latents(folder)
    assert [*made] == [*alone][:count]
    for name, latent in made.items():
        assert relative_error(latent, alone[name]) < 1e-5
    assert len(list((folder / "out").glob("*.mp4"))) == len(list((folder / "out").glob("*.json"))) == count
    assert not list((folder / "out").glob("*.tmp*"))


@pytest.mark.parametrize(
    ("ranks", "more", "count"),
    [
        pytest.param(4, SPLIT, 3, marks=sharded),
        pytest.param(3, ["--ring_size", "3", "--dit_fsdp"], 2, marks=sharded),
    ],
)
def test_a_batch(ranks: int, more: list[str], count: int, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """3 prompts over 2 groups of 2 and 2 over one ring of 3; 5 over 3 groups of 1 in `test_json_tells_...`."""
    codes, said = launched(partial(generate.main, flags(tmp_path, *more, count=count)), ranks, tmp_path)
    assert codes == [0] * ranks, said
    check_batch(tmp_path, alone, count)
    assert f"{count} saved" in said[0]
    assert said[1:] == [""] * (ranks - 1), "the first process speaks for all"
    assert [(tmp_path / f"{rank}.out").read_text() for rank in range(1, ranks)] == [""] * (ranks - 1)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--ulysses_size", "3"], "--ulysses_size 3"),
        (["--size", "79*48"], "79"),
        (["--dit_fsdp"], "--ulysses_size 2"),
        (["--no_such_flag"], "no flag --no_such_flag"),
    ],
)
def test_bad_input_is_reported_once(more: list[str], expected: str, tmp_path: Path) -> None:
    codes, said = launched(partial(generate.main, flags(tmp_path, *more)), 2, tmp_path)
    assert codes == [2, 2]
    assert expected in said[0]
    assert said[1] == ""


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_a_sentence(device: str, tmp_path: Path) -> None:
    if getattr(torch, device).is_available():
        pytest.skip(f"there is {device} here, so what is said where there is none cannot be seen")
    codes, said = launched(partial(generate.main, flags(tmp_path, "--device", device, "--dry_run")), 2, tmp_path)
    assert codes == [2, 2]
    assert said[0].startswith(f"error: --device {device}: there is no such device here")
    assert said[0].endswith("; usable: auto, cpu\n")
    assert said[1] == ""


def test_help_is_printed_once(tmp_path: Path) -> None:
    codes, said = launched(partial(generate.main, ["--help", "all"]), 2, tmp_path)
    assert (codes, said) == ([0, 0], ["", ""])
    first, second = ((tmp_path / f"{rank}.out").read_text() for rank in range(2))
    assert "--ulysses_size" in first
    assert second == ""


def test_two_jobs_for_three_processes_and_one_random_seed(tmp_path: Path) -> None:
    words = flags(tmp_path, "--base_seed", "-1", "--prompt_file", str(tmp_path / "two.txt"))
    (tmp_path / "two.txt").write_text("a cat\na dog")
    assert launched(partial(generate.main, words), 3, tmp_path)[0] == [0] * 3
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len({record["job"]["seed"] for record in records}) == 1
    assert len(records) == 2


def batch_with_a_bad_row(runtime: Runtime, folder: Path, on_error: str = "continue") -> int:
    """Image-to-video jobs, of which the second one's image has gone since it was checked."""
    image = str(TINY / "input.png")
    given = {
        "task": "i2v-A14B", "ckpt_dir": str(checkpoint("i2v-A14B")), "lora_dir": str(lora_dir("i2v-A14B")),
        "size": "64*48", "frame_num": 5, "prompt": "a cat", "image": image, "num_videos": 5, "base_seed": 1,
        "save_dir": str(folder), "ulysses_size": 2, "on_error": on_error, "device": "cpu",
    }  # fmt: skip
    outcome = resolve(given)
    assert isinstance(outcome, Generate)
    plan = make_plan(outcome, runtime)
    broken = replace(plan.jobs[1], image=folder / "gone.png")
    plan = replace(plan, jobs=(plan.jobs[0], broken, *plan.jobs[2:]))
    return run_jobs(plan, Progress(quiet=not runtime.team.is_rank0), runtime)


def test_a_bad_row_fails_its_own_job_only(tmp_path: Path) -> None:
    codes, said = launched(partial(launch, partial(batch_with_a_bad_row, folder=tmp_path)), 4, tmp_path)
    assert codes == [1] * 4, said  # the number of failed jobs, known to all
    assert sorted(path.name.split("_")[1] for path in tmp_path.glob("*.mp4")) == ["0000", "0002", "0003", "0004"]
    assert "4 saved, 1 failed" in said[0]
    assert said[0].count("gone.png") >= 1
    assert said[1:] == ["", "", ""]


def test_kept_latents_are_decoded_together(tmp_path: Path) -> None:
    assert generate.main(flags(tmp_path, "--prompt_file", str(one_prompt(tmp_path)))) == 0
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    (whole,) = (tmp_path / "out").glob("*.mp4")
    words = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--decode_latents", str(kept)]
    words += ["--save_file", str(tmp_path / "again.mp4"), "--ulysses_size", "2", "--device", "cpu"]
    codes, said = launched(partial(generate.main, words), 2, tmp_path)
    assert codes == [0, 0], said
    again, first = (read_frames(file).astype(int) for file in (tmp_path / "again.mp4", whole))
    assert abs(again - first).max() <= 1
    codes, said = launched(partial(generate.main, words), 2, tmp_path)
    assert (codes, said[0].count("already exist"), said[1]) == ([2, 2], 1, "")


def test_json_has_the_jobs_of_all_groups(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Three groups of one process; the record says how many processes there were."""
    codes, said = launched(partial(generate.main, flags(tmp_path, "--json")), 3, tmp_path)
    assert codes == [0] * 3, said
    check_batch(tmp_path, alone)
    events = described((tmp_path / "0.out").read_text().splitlines())
    assert sorted(event["index"] for event in events if event["event"] == "saved") == list(range(len(PROMPTS)))
    (summary,) = [event for event in events if event["event"] == "summary"]
    assert (summary["saved"], summary["failed"]) == (len(PROMPTS), 0)
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["pipeline"]["processes"] == "3 processes = data 3 x ulysses 1"


def one_prompt(folder: Path) -> Path:
    (folder / "one.txt").write_text("a cat")
    return folder / "one.txt"


def stop_at_a_bad_row(runtime: Runtime, folder: Path) -> int:
    return batch_with_a_bad_row(runtime, folder, on_error="stop")


def test_stopping_stops_the_other_group_too(tmp_path: Path) -> None:
    codes, said = launched(partial(launch, partial(stop_at_a_bad_row, folder=tmp_path)), 4, tmp_path)
    assert codes == [1] * 4
    assert "1 failed" in said[0]
    assert not list(tmp_path.glob("*_0003_*.mp4")), "the failed group's next job"
    assert not list(tmp_path.glob("*_0004_*.mp4")), "the other group's last job"


@sharded
@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("kill", "load"),
        ("raise", "load"),
        ("memory", "load"),
        ("kill", "step"),
        pytest.param("kill", "decode", marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_one_process_ends_the_run(what: str, where: str, tmp_path: Path) -> None:
    fault = Fault(what, where, (3,))
    codes, said = launched(partial(run_with_fault, fault, flags(tmp_path, *SPLIT)), 4, tmp_path)
    assert codes == [1, 1, 1, -signal.SIGKILL if what == "kill" else 1]
    lines = "".join(said).splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert lines.count("Traceback (most recent call last):") == (what == "raise"), "of a bug only, and once"
    said_last = next(text for text in said if "error: " in text).splitlines()[-1]
    words = {
        "kill": "lost another process", "raise": "process 3: ValueError: a bug",
        "memory": f"process 3 on {socket.gethostname()}: out of memory on the device (CUDA out of memory) in load",
    }  # fmt: skip
    assert words[what] in said_last
    # the other group may finish what it does; torchrun would end it
    assert 3 not in {int(path.name.split("_")[1]) for path in (tmp_path / "out").glob("*.mp4")}
    assert not list((tmp_path / "out").glob("*.part"))


@sharded
@pytest.mark.parametrize(
    ("what", "where", "processes"),
    [
        ("memory", "step", (3,)),
        ("raise", "decode", (3,)),
        ("raise", "step", (2, 3)),
        pytest.param("raise", "step", (3,), marks=pytest.mark.slow),
        pytest.param("raise", "decode", (2, 3), marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_fails_one_job_of_its_group(
    what: str, where: str, processes: tuple[int, ...], alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """In a step the others wait for this process's tokens and shards; the next forward must be right all the same."""
    fault = Fault(what, where, processes, 1 if where == "step" else 0)
    codes, said = launched(partial(run_with_fault, fault, flags(tmp_path, *SPLIT)), 4, tmp_path)
    assert codes == [1] * 4, said
    assert "4 saved, 1 failed" in said[0]
    reason = {"raise": "ValueError: a bug", "memory": "out of memory on the device (CUDA out of memory)"}[what]
    assert f"prompts.txt line 4: {reason}" in said[0]
    assert "".join(said).count("Traceback (most recent call last):") == (what == "raise"), said
    made = latents(tmp_path)
    assert len(made) == (5 if where == "decode" else 4), "finished latents are kept"
    assert all(relative_error(latent, alone[name]) < 1e-5 for name, latent in made.items())
    assert {path.name.split("_")[1] for path in (tmp_path / "out").glob("*.mp4")} == {"0000", "0001", "0002", "0004"}
    assert ("--decode_latents" in said[0]) == (where == "decode")


def test_a_good_video_outlives_a_process_that_fails_in_decoding_its_successor(tmp_path: Path) -> None:
    words = flags(tmp_path, "--ulysses_size", "2", "--prompt_file", str(one_prompt(tmp_path)), "--frame_num", "9")
    assert launched(partial(generate.main, words), 2, tmp_path)[0] == [0, 0]
    (video,) = (tmp_path / "out").glob("*.mp4")
    before = {path.name: path.read_bytes() for path in (video, video.with_suffix(".json"))}
    for call in (0, 1):
        work = partial(run_with_fault, Fault("raise", "decode", (1,), call), [*words, "--overwrite"], first_video=1)
        codes, said = launched(work, 2, tmp_path)
        assert (codes, "1 failed" in said[0]) == ([1, 1], True), said
        assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
        assert not list((tmp_path / "out").glob("*.part"))


@sharded
@pytest.mark.parametrize("where", ["load", "step", "decode"])
def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_PATIENCE", "0.1")
    work = partial(run_with_fault, Fault("freeze", where, (1,)), flags(tmp_path, *SPLIT), first_video=1)
    codes, said = launched(work, 2, tmp_path, until_others_end=True)
    assert codes == [1, None], said
    assert said[0].splitlines()[-1].startswith("error: process 0 waited 0.1 minutes for another process, which hangs (")
    assert "Traceback" not in said[0]
    assert not list((tmp_path / "out").glob("*.mp4")) + list((tmp_path / "out").glob("*.part"))


def without_a_vae(words: list[str], rank: str) -> int:
    """generate.py where the file of the VAE is damaged on the machine of one process."""
    original = wan.pipeline.load

    def faulty(module: torch.nn.Module, *arguments: Any, **more: Any) -> Any:
        if isinstance(module, WanVAE) and os.environ["RANK"] == rank:
            raise InputError("Wan2.1_VAE.pth: damaged")
        return original(module, *arguments, **more)

    wan.pipeline.load = faulty  # type: ignore[assignment]  # in this child process only
    return generate.main(words)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_kept_latents_where_one_process_cannot_load_its_vae(rank: str, tmp_path: Path) -> None:
    assert generate.main(flags(tmp_path, "--prompt_file", str(one_prompt(tmp_path)))) == 0
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    words = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--decode_latents", str(kept)]
    words += ["--save_file", str(tmp_path / "again.mp4"), "--ulysses_size", "2", "--device", "cpu"]
    codes, said = launched(partial(without_a_vae, words, rank), 2, tmp_path)
    whose = "" if rank == "0" else f"process 1 on {socket.gethostname()}: "
    assert (codes, "".join(said).count(f"error: {whose}Wan2.1_VAE.pth: damaged\n")) == ([2, 2], 1), said
    assert not list(tmp_path.glob("again*"))


def short_of_memory(words: list[str]) -> int:
    """generate.py where the last process lacks memory to decode its region at once."""
    original = WanVAE.decode

    def faulty(self: WanVAE, *arguments: Any, **more: Any) -> Iterator[torch.Tensor]:
        tiles = more.get("tiles", arguments[2] if len(arguments) > 2 else None)
        if os.environ["RANK"] == "1" and tiles == (1, 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments, **more)

    WanVAE.decode = faulty  # type: ignore[method-assign]  # in this child process only
    return generate.main(words)


def test_without_room_on_one_process_all_decode_in_tiles(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    words = flags(tmp_path, "--ulysses_size", "2", count=2)
    codes, said = launched(partial(short_of_memory, words), 2, tmp_path)
    assert codes == [0, 0], said
    assert said[0].count("once more, in tiles") == 2
    check_batch(tmp_path, alone, 2)


def hold_memory(runtime: Runtime) -> bool:
    """Whether what a failed attempt held is free again, once its error has been dealt with."""
    held: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> None:
        large = torch.empty(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    with suppress(torch.OutOfMemoryError):
        runtime.team.all_or_none(attempt)
    return held[0]() is None


def test_an_agreed_error_holds_no_memory() -> None:
    assert run_ranks(hold_memory, 2) == [True, True]


def test_a_dry_run_says_how_the_work_is_divided(tmp_path: Path) -> None:
    codes, said = launched(partial(generate.main, flags(tmp_path, *SPLIT, "--dry_run")), 4, tmp_path)
    assert (codes, said[1:]) == ([0] * 4, [""] * 3)
    plan = (tmp_path / "0.out").read_text()
    assert "4 processes = data 2 x ulysses 2: 2 videos at a time, 2 processes each" in plan
    assert "a forward sends from each: ulysses" in plan
    codes, said = launched(partial(generate.main, flags(tmp_path, "--ulysses_size", "3", "--dry_run")), 3, tmp_path)
    assert codes == [2] * 3
    assert "must divide the 3 processes and the model's 4 heads; legal: 1" in said[0]
