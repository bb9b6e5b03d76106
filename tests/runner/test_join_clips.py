"""Clips that follow each other: each starts from the last frame of the one before; they are joined into one video."""

import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import generate
import wan.runner.batch
from tests.distributed.ranks import launched
from tests.support import TINY, checkpoint, lora_dir, read_frames
from wan.configs import TASKS
from wan.gallery import find_entries
from wan.jobs.job import Generate, Job
from wan.jobs.resolve import resolve
from wan.media.images import video_size
from wan.media.video import VideoWriter, count_frames, read_record
from wan.pipeline import Pipeline
from wan.runner.video_job import copy_together
from wan.sampling import Video
from wan.utils.errors import InputError, JobError
from wan.utils.files import locked

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat", "save_file": "a.mp4"},
    {"prompt": "the cat", "save_file": "b.mp4", "frame_num": 9},
    {"prompt": "a ball", "save_file": "c.mp4"},
]
FRAMES = [5, 9, 5]
PICTURE = str(TINY / "input.png")
pytestmark = pytest.mark.usefixtures("one_thread")


def go_to(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    for name in ("WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        patch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of `ROWS`, to look at or to copy."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        go_to(folder, patch)
        rows()
        assert generate.main(chain()) == 0
    return folder / "out"


@pytest.fixture
def made(unbroken: Path, _elsewhere: None) -> None:
    """As if that run had been made here."""
    rows()
    shutil.copytree(unbroken, "out")


def rows(given: list[dict[str, Any]] = ROWS, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in given))
    return name


def words(*more: str, task: str = "i2v-A14B", image: bool = True, folder: str = "out") -> list[str]:
    return [
        "--task", task, "--ckpt_dir", str(checkpoint(task)), "--lora_dir", str(lora_dir(task)), "--size", "64*64",
        "--frame_num", "5", "--base_seed", "3", "--device", "cpu", "--save_dir", folder, "--save_latents",
        *(["--image", PICTURE] if image else []), *more,
    ]  # fmt: skip


def chain(*more: str, **how: Any) -> list[str]:
    return words("--prompt_file", "rows.jsonl", "--chain", *more, **how)


def clips(folder: str = "out", names: str = "abc") -> list[np.ndarray]:
    return [read_frames(Path(folder) / f"{name}.mp4") for name in names]


def without_doubles(clips: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([clip[1:] if number else clip for number, clip in enumerate(clips)])


def latent(name: str, folder: str = "out") -> torch.Tensor:
    return load_file(Path(folder) / f"{name}.latents.safetensors")["latent"]


@pytest.mark.parametrize(
    ("task", "image"), [("i2v-A14B", True), ("ti2v-5B", False), pytest.param("ti2v-5B", True, marks=pytest.mark.slow)]
)
def test_a_chain_of_three(task: str, image: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows()
    assert generate.main(chain("--preview", task=task, image=image)) == 0
    printed = capsys.readouterr()
    assert "(from the last frame of job 0001), 5 frames" in printed.out
    assert "jobs 0000, 0001, 0002 joined, 17 frames -> out/a_chain.mp4" in printed.out
    assert "3 saved, 1 joined" in printed.err
    made = clips()
    assert [len(clip) for clip in made] == FRAMES
    joined = read_frames(Path("out/a_chain.mp4"))
    assert np.array_equal(joined, without_doubles(made)), "bit for bit the clips' frames, each seam's once"
    assert len(joined) == count_frames(Path("out/a_chain.mp4")) == 5 + 8 + 4
    assert Path("out/a_chain.png").is_file()
    record = read_record(Path("out/a_chain.mp4"))
    assert record == read_record(Path("out/a_chain.json"))
    assert [part["file"] for part in record["clips"]] == ["a.mp4", "b.mp4", "c.mp4"]

    # a clip of the chain is what its own command makes of the clip before it, and so does its record
    by_hand = words("--prompt", "the cat", "--image", "out/a.mp4", "--frame_num", "9", task=task, image=False)
    assert generate.main([*by_hand, "--save_file", "hand/b.mp4"]) == 0
    assert generate.main(["--replay", "out/b.mp4", "--save_file", "replayed/b.mp4"]) == 0
    for folder in ("hand", "replayed"):
        assert torch.equal(latent("b", folder), latent("b")), folder
        assert read_record(Path(folder) / "b.mp4")["meaning"] == read_record(Path("out/b.mp4"))["meaning"], folder
    assert generate.main(["--replay", "out/a_chain.mp4"]) == 2
    assert "is joined of several clips; replay one of those" in capsys.readouterr().err


def dies_in_the_second(words: list[str]) -> int:
    """generate.py, killed in a step of the second clip."""
    original = Pipeline.sample

    def sample(self: Pipeline, video: Video, *arguments: Any, **more: Any) -> torch.Tensor:
        if video.prompt == "the cat":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, video, *arguments, **more)

    Pipeline.sample = sample  # type: ignore[method-assign]  # in this child process only
    return generate.main(words)


def test_it_goes_on_after_a_kill_in_the_second(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows()
    codes, _ = launched(partial(dies_in_the_second, chain()), 1, tmp_path)
    assert codes == [-signal.SIGKILL]
    assert [path.name for path in sorted(Path("out").glob("*.mp4"))] == ["a.mp4"]
    before = Path("out/a.mp4").stat()
    capsys.readouterr()
    assert generate.main(chain("--resume")) == 0
    assert "2 saved, 1 there already, 1 joined" in capsys.readouterr().err
    assert Path("out/a.mp4").stat() == before
    for name in ("a_chain.mp4", "b.mp4"):
        assert np.array_equal(*(read_frames(Path(folder) / name) for folder in ("out", unbroken)))
    assert sorted(os.listdir("out")) == sorted(os.listdir(unbroken))


@pytest.mark.usefixtures("made")
def test_only_the_joined_file_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    joined = Path("out/a_chain.mp4")
    want = read_frames(joined)
    for spoil in (joined.unlink, lambda: joined.write_bytes(joined.read_bytes()[:-500])):
        spoil()
        capsys.readouterr()
        assert generate.main(chain("--resume")) == 0
        said = capsys.readouterr().err
        assert "3 there already, 1 joined" in said
        assert "load" not in said, "no network is needed"
        assert np.array_equal(read_frames(joined), want)
    before = joined.stat()
    assert generate.main(chain("--resume")) == 0
    assert joined.stat() == before, "it is whole: left alone"


def test_a_row_at_the_end_and_rows_above(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a cat", "the cat", "a ball"]
    rows([{"prompt": prompt} for prompt in prompts[:2]])
    assert generate.main(chain()) == 0
    rows([{"prompt": prompt} for prompt in prompts])
    assert generate.main(chain("--resume")) == 0
    assert "1 saved, 2 there already, 1 joined" in capsys.readouterr().err
    (joined,) = Path("out").glob("*_chain.mp4")
    assert count_frames(joined) == 5 + 4 + 4
    want = read_frames(joined)

    rows([{"prompt": "another"}, {"prompt": prompts[0], "image": PICTURE}, *({"prompt": p} for p in prompts[1:])])
    assert generate.main(chain("--resume")) == 0
    assert "1 saved, 3 there already, 1 joined" in capsys.readouterr().err, "found under their old numbers"
    (moved,) = set(Path("out").glob("*_chain.mp4")) - {joined}
    assert np.array_equal(read_frames(moved), want)


@pytest.mark.usefixtures("made")
def test_a_clip_hangs_on_what_the_one_before_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    def without_the_first() -> None:
        for file in Path("out").glob("a.*"):
            file.unlink()

    without_the_first()  # the same once more: those that follow are as they were
    assert generate.main(chain("--resume")) == 0
    assert "1 saved, 2 there already, 1 joined" in capsys.readouterr().err

    changed = [{**ROWS[0], "prompt": "a dog"}, *ROWS[1:]]
    rows(changed)
    assert generate.main(chain("--resume")) == 2
    assert "out/a.mp4 was made with other settings (--prompt); --overwrite replaces it" in capsys.readouterr().err
    without_the_first()
    assert generate.main(chain("--resume")) == 1
    said = capsys.readouterr().err
    assert "out/b.mp4 was made with other settings (--image); --overwrite replaces it" in said
    assert "1 saved, 1 failed, 1 not tried" in said
    assert generate.main(chain("--resume", "--overwrite")) == 0
    assert "2 saved, 1 there already, 1 joined" in capsys.readouterr().err
    assert np.array_equal(read_frames(Path("out/a_chain.mp4")), without_doubles(clips()))


TWO_CHAINS = [*ROWS, {"prompt": "a dog", "save_file": "d.mp4", "image": PICTURE}, {"prompt": "a", "save_file": "e.mp4"}]


def test_a_failed_clip_ends_its_chain_and_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(TWO_CHAINS)
    make = wan.runner.batch.make_video

    def fails(pipe: Pipeline, job: Job, *more: Any, **options: Any) -> int:
        if job.prompt == "the cat":
            raise JobError("step 2: NaN in the latent")
        return make(pipe, job, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(wan.runner.batch, "make_video", fails)
        assert generate.main(chain()) == 1
    said = capsys.readouterr().err
    assert said.count("failed: rows.jsonl line 2: step 2: NaN in the latent") == 1
    assert said.count("out/c.mp4 is not made: it goes on from out/b.mp4") == 1
    assert "3 saved, 1 failed, 1 not tried, 1 joined" in said
    assert [path.name for path in sorted(Path("out").glob("*.mp4"))] == ["a.mp4", "d.mp4", "d_chain.mp4", "e.mp4"]
    assert generate.main(chain("--resume")) == 0
    assert "2 saved, 3 there already, 1 joined" in capsys.readouterr().err


def test_a_chain_that_another_process_makes_is_left_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows(TWO_CHAINS)
    Path("out").mkdir()
    with locked(Path("out/a.mp4"), pytest.fail):
        assert generate.main(chain("--resume")) == 0
    assert "2 saved, 1 being made by other processes, 2 not tried, 1 joined" in capsys.readouterr().err
    assert not Path("out/b.mp4").exists()
    with locked(Path("out/a_chain.mp4"), pytest.fail):
        assert generate.main(chain("--resume")) == 0
    said = capsys.readouterr().err
    assert "out/a_chain.mp4 is being made by" in said
    assert "3 saved, 2 there already" in said.splitlines()[-1]


def test_clips_that_do_not_follow_are_not_joined(capsys: pytest.CaptureFixture[str]) -> None:
    """A clip made by hand, whose second frame needs the first."""
    rows(ROWS[:2])
    assert generate.main(words("--prompt", "a cat", "--save_file", "out/a.mp4")) == 0
    by_hand = words("--prompt", "the cat", "--image", "out/a.mp4", "--frame_num", "9", image=False)
    assert generate.main([*by_hand, "--save_file", "out/b.mp4"]) == 0
    capsys.readouterr()
    assert generate.main(chain("--resume")) == 1
    said = capsys.readouterr().err
    assert "could not be joined: " in said
    assert "2 there already, 1 not joined" in said
    assert not Path("out/a_chain.mp4").exists()
    assert generate.main(chain("--overwrite")) == 0


@pytest.mark.parametrize("fps", [16, 24])
def test_frames_and_times_of_a_joined_video(fps: int, tmp_path: Path) -> None:
    """Lengths whose last group of pictures ends anywhere, and names that ffmpeg's list must have quoted."""
    made = []
    for number, count in enumerate((5, 9, 5, 13, 33)):
        frames = torch.rand(3, count, 48, 64, generator=torch.Generator().manual_seed(number)) * 2 - 1
        made.append(tmp_path / f"it's #{number} 100%.mp4")
        with VideoWriter(made[-1], fps, follows=number > 0) as video:
            video.write(frames)
            video.finish(None)
    copy_together(made, tmp_path / "all.mp4", fps, 5 + 8 + 4 + 12 + 32)
    assert np.array_equal(read_frames(tmp_path / "all.mp4"), without_doubles([read_frames(path) for path in made]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["all.mp4", *(path.name for path in made)])
    with pytest.raises(JobError, match=r"kept 49 of 48 frames"):
        copy_together(made[2:], tmp_path / "all.mp4", fps, 48)


def outcome(*, given: list[dict[str, Any]] = ROWS, task: str = "i2v-A14B", **flags: Any) -> Generate:
    usual = {
        "task": task, "ckpt_dir": str(checkpoint(task)), "prompt_file": rows(given), "chain": True, "size": "64*64",
        "frame_num": 5, "base_seed": 3, "image": PICTURE,
    }  # fmt: skip
    made = resolve({name: value for name, value in {**usual, **flags}.items() if value is not None})
    assert isinstance(made, Generate)
    return made


def files_of(jobs: tuple[Job, ...]) -> list[tuple[str, str, str]]:
    return [
        (job.save_file.name, job.image.name if job.image else "", job.joined.name if job.joined else "") for job in jobs
    ]


def test_a_chain_for_each_seed_and_a_shard_for_each_chain() -> None:
    given = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "image": PICTURE}, {"prompt": "d", "image": PICTURE}]
    given += [{"prompt": "e", "seed": 9}]
    whole = outcome(given=given, num_videos=2).jobs
    name = "i2v-A14B_{:04d}_seed{}_{}.mp4".format
    first, second = name(0, 3, "a_chain"), name(1, 4, "a_chain")
    assert files_of(whole)[:4] == [
        (name(0, 3, "a"), "input.png", first), (name(1, 4, "a"), "input.png", second),
        (name(2, 3, "b"), name(0, 3, "a"), first), (name(3, 4, "b"), name(1, 4, "a"), second),
    ]  # fmt: skip
    assert files_of(whole)[4] == (name(4, 3, "c"), "input.png", ""), "nothing follows it"
    assert files_of(whole)[8] == (name(8, 9, "e"), name(6, 3, "d"), name(6, 3, "d_chain"))
    shards = [outcome(given=given, num_videos=2, shard=f"{part}/3").jobs for part in (1, 2, 3)]
    assert sorted((job for part in shards for job in part), key=lambda job: job.index) == list(whole)
    assert [[job.index for job in part] for part in shards] == [[0, 2, 5], [1, 3, 6, 8], [4, 7, 9]]


def test_a_chain_keeps_its_size() -> None:
    """The rule for pictures would make another size of a picture of just this size."""
    size = (112, 144)
    assert video_size(TASKS["i2v-A14B"], size, (112, 144)) != size
    Image.new("RGB", size).save("tall.png")
    jobs = outcome(size="128*144", image="tall.png").jobs
    assert [job.size for job in jobs] == [size] * 3
    with VideoWriter(Path("tall.mp4"), 16) as video:
        video.write(torch.zeros(3, 1, 144, 112))
        video.finish(None)
    (alone,) = outcome(size="112*144", image="tall.mp4", prompt="a", prompt_file=None, chain=None).jobs
    assert alone.size == size


def test_the_joined_video_has_the_name_that_is_given() -> None:
    jobs = outcome(save_file="film/all.mp4").jobs
    assert {job.joined for job in jobs} == {Path("film/all.mp4")}
    assert jobs[0].save_file == Path("outputs/a.mp4")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"prompt_file": None, "prompt": "a"}, "--chain lets the rows of a --prompt_file"),
        (
            {"task": "t2v-A14B", "image": None},
            "--chain: t2v-A14B takes no image to continue from",
        ),
        ({"image": None, "image_path_file": "p.txt"}, "--chain and --image_path_file exclude each other"),
        ({"use_prompt_extend": True}, "--extend_only FILE.txt and without --chain"),
        ({"extend_only": "x.txt"}, "--extend_only FILE.txt and without --chain"),
        ({"decode_latents": "x.safetensors"}, "--chain lets the rows of a --prompt_file continue each other"),
        ({"image": None}, "needs an image"),
        ({"given": ROWS[:1]}, "--chain: no row of rows.jsonl "),
        ({"given": [{"prompt": "a"}, {"prompt": "b", "size": "32*32"}]}, "a chain has the size of its first clip"),
        ({"frame_num": 1}, "line 1: a clip of a chain needs 5 frames or more, not 1"),
        ({"num_videos": 2, "given": [{"prompt": "a"}, {"prompt": "b"}], "save_file": "x.mp4"}, "2 chains are joined"),
    ],
)
def test_invalid_combinations_are_refused(flags: dict[str, Any], sentence: str) -> None:
    Path("p.txt").write_text(PICTURE)
    with pytest.raises(InputError, match=re.escape(sentence)):
        outcome(**flags)


def test_a_file_at_the_joined_videos_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    rows()
    Path("out").mkdir()
    Path("out/a_chain.mp4").write_bytes(b"mine")
    assert generate.main(chain()) == 2
    assert "out/a_chain.mp4 already exists" in capsys.readouterr().err
    assert generate.main(chain("--resume")) == 2
    assert "out/a_chain.mp4 already exists" in capsys.readouterr().err
    assert Path("out/a_chain.mp4").read_bytes() == b"mine"


def test_a_chain_is_one_groups_work(tmp_path: Path) -> None:
    """Two processes, each with videos of its own: two chains of unequal length."""
    rows(TWO_CHAINS)
    assert generate.main(chain(folder="one")) == 0
    codes, said = launched(partial(generate.main, chain()), 2, tmp_path)
    assert codes == [0, 0], said
    assert "5 saved, 2 joined" in said[0]
    for name in ("a", "b", "c", "d", "e"):
        assert torch.equal(latent(name), latent(name, "one")), name
    for name in ("a_chain.mp4", "d_chain.mp4"):
        assert np.array_equal(read_frames(Path("out") / name), read_frames(Path("one") / name)), name


@pytest.mark.usefixtures("made")
def test_the_gallery_shows_clips_and_what_they_are_joined_into() -> None:
    assert generate.main(chain("--gallery", "--resume")) == 0
    shown = {entry["file"]: entry for entry in find_entries(Path("out"))[0]}
    assert shown.keys() == {"a.mp4", "b.mp4", "c.mp4", "a_chain.mp4"}
    joined = shown["a_chain.mp4"]
    assert joined["prompt"] == "a cat\nthe cat\na ball"
    assert joined["settings"]["length"] == "17 frames, 1.1 s"
    assert joined["settings"]["joined of"] == "a.mp4\nb.mp4\nc.mp4"
