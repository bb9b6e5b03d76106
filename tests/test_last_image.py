"""A video from one picture to another: the conditioning against diffusers', and everything that hangs on the flag."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file

import generate
from benchmarks.vae import to_diffusers
from tests.distributed.ranks import run_ranks
from tests.support import TINY, checkpoint, config_of, lora_dir, relative_error
from wan import WanI2V
from wan.cli.options import Request
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate, Sampling
from wan.jobs.resolve import resolve
from wan.media.images import i2v_tensor
from wan.modules.vae import WanVAE
from wan.modules.vae_layers import Region
from wan.pipeline import Start
from wan.planning.memory import plan_videos
from wan.sampling import Video
from wan.utils.errors import InputError

COMMAND = [
    "--task", "i2v-A14B", "--ckpt_dir", str(checkpoint("i2v-A14B")), "--lora_dir", str(lora_dir("i2v-A14B")),
    "--image", str(TINY / "input.png"), "--size", "64*64", "--frame_num", "5", "--base_seed", "3", "--device", "cpu",
]  # fmt: skip


def open_task(runtime: Runtime) -> WanI2V:
    return WanI2V(
        config_of("i2v-A14B"), checkpoint("i2v-A14B"), lora_dir=lora_dir("i2v-A14B"), device="cpu", runtime=runtime,
        ulysses_size=runtime.team.size,
    )  # fmt: skip


@cache
def alone() -> WanI2V:
    return open_task(Runtime())


def started(task: WanI2V, video: Video) -> Start:
    task.plan = plan_videos(task.plan, Sampling("euler", 1, 5.0, (1.0, 1.0)), [video])
    return task.start(video)


def pictures(size: tuple[int, int] = (64, 48)) -> tuple[Image.Image, Image.Image]:
    """Two pictures; the second one has another ratio."""
    noise = torch.randint(0, 256, (2, 3, 40, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    first, last = (Image.fromarray(values.permute(1, 2, 0).numpy()) for values in noise)
    return first.resize(size), last.resize((50, 90))


@pytest.mark.parametrize(("size", "frames"), [((64, 48), 5), ((48, 80), 9), ((32, 32), 21), ((16, 96), 33)])
@pytest.mark.parametrize("between", [True, False])
def test_the_conditioning_is_that_of_diffusers(size: tuple[int, int], frames: int, between: bool) -> None:
    first, last = pictures(size)
    task = alone()
    found = started(task, Video("", "", size, frames, 0, first, last if between else None))
    peer = SimpleNamespace(
        vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, vae=to_diffusers(task.load_vae()),
        config=SimpleNamespace(expand_timesteps=False),
    )  # fmt: skip
    _, want = WanImageToVideoPipeline.prepare_latents(
        peer, i2v_tensor(first, size)[None], 1, 16, size[1], size[0], frames, torch.float32, torch.device("cpu"),
        last_image=i2v_tensor(last, size)[None] if between else None,
    )  # fmt: skip
    assert found.channels is not None
    assert torch.equal(found.channels[:4], want[0, :4]), "the mask"
    assert relative_error(found.channels[4:], want[0, 4:]) < 1e-5


@pytest.mark.parametrize("between", [True, False])
def test_where_room_is_short_both_pictures_are_encoded_in_tiles(between: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = pictures()
    windows, pixel_chunks = [], WanVAE._pixel_chunks

    def noted(vae: WanVAE, video: torch.Tensor, window: Region, *rest: int) -> Iterator[torch.Tensor]:
        windows.append(window)
        return pixel_chunks(vae, video, window, *rest)

    monkeypatch.setattr(WanVAE, "_pixel_chunks", noted)
    short = WanI2V(config_of("i2v-A14B"), checkpoint("i2v-A14B"), device="cpu", vram=0.001)
    video = Video("", "", (64, 48), 5, 0, first, last if between else None)
    found, want = (started(task, video) for task in (short, alone()))
    assert len(windows) == 6 * 6 + 1, "the most tiles for 6 x 8 cells, and one"
    assert relative_error(found.channels, want.channels) < 1e-5


def sample(runtime: Runtime) -> torch.Tensor:
    first, last = pictures()
    task = alone() if runtime.team.size == 1 else open_task(runtime)
    sampling = Sampling("euler", 4, 5.0, (1.0, 1.0))
    return task.sample_with(sampling, Video("a cat", "", (64, 48), 9, 3, first, last))


def test_two_processes_give_what_one_does() -> None:
    want = sample(Runtime())
    for found in run_ranks(sample, 2):
        assert relative_error(found, want) < 1e-5


def test_the_class_makes_what_the_command_line_makes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    flags = ["--image", str(tmp_path / "first.png"), "--last_image", str(tmp_path / "last.png"), "--prompt", "a cat"]
    video = ["--save_file", str(tmp_path / "a.mp4"), "--save_latents", "--negative_prompt", "bad"]
    assert generate.main([*COMMAND, *flags, *video]) == 0
    want = load_file(tmp_path / "a.latents.safetensors")["latent"]
    first, last = pictures()
    given = {"frame_num": 5, "sample_solver": "euler", "sampling_steps": 4, "guide_scale": 1.0, "seed": 3}
    found = alone().generate("a cat", first, 64 * 64, **given, last_image=last)
    assert found is not None
    assert torch.equal(found, torch.cat(list(alone().decode(want)), dim=1))
    with pytest.raises(InputError, match="need 5 frames or more, not 1"):
        alone().generate("a cat", first, 64 * 64, **{**given, "frame_num": 1}, last_image=last)


def write_pictures(folder: Path) -> None:
    for name, picture in zip(("first.png", "last.png"), pictures(), strict=True):
        picture.save(folder / name)


def test_rows_records_resume_and_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path)
    rows = [{"prompt": "a", "last_image": "last.png", "save_file": "a.mp4"}, {"prompt": "a", "save_file": "b.mp4"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = [*COMMAND, "--prompt_file", "p.jsonl", "--save_dir", ".", "--save_latents", "--resume"]
    assert generate.main(batch) == 0
    assert "to 50x90" in capsys.readouterr().out
    assert Path("a.latents.safetensors").read_bytes() != Path("b.latents.safetensors").read_bytes()
    record = json.loads(Path("a.json").read_text())
    assert record["job"]["last_image"] == str(tmp_path / "last.png")
    assert record["meaning"]["last_image"] != record["meaning"]["image"]

    assert generate.main(batch) == 0
    assert "2 there already" in capsys.readouterr().err
    assert generate.main(["--replay", "a.mp4", "--save_file", "again.mp4"]) == 0
    assert torch.equal(*(load_file(f"{name}.latents.safetensors")["latent"] for name in ("again", "a")))
    again = json.loads(Path("again.json").read_text())
    assert again["meaning"] == record["meaning"]

    pictures()[0].save("last.png")  # another picture is another video
    assert generate.main(batch) == 2
    assert "(--last_image)" in capsys.readouterr().err


def outcome(**flags: object) -> Generate:
    given = {"task": "i2v-A14B", "ckpt_dir": str(checkpoint("i2v-A14B")), "prompt": "a", "size": "64*64"}
    made = resolve({**given, "image": str(TINY / "input.png"), "frame_num": 5, **flags})
    assert isinstance(made, Generate)
    return made


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"last_image": "absent.png"}, "--last_image absent.png: no such image file"),
        (
            {"last_image": str(TINY / "input.png"), "frame_num": 1},
            "--frame_num: a first and a last frame need 5 frames or more, not 1",
        ),
        (
            {"last_image": str(TINY / "input.png"), "task": "ti2v-5B", "ckpt_dir": str(checkpoint("ti2v-5B"))},
            "ti2v-5B takes no last image; --task i2v-A14B",
        ),
    ],
)
def test_invalid_combinations_are_refused(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        outcome(**flags)


def test_records_without_a_last_image_are_replayed(tmp_path: Path) -> None:
    """Those of before there was one."""
    job = {"area": [64, 64], "seed": 3, "frame_num": 5, "prompt": "a", "negative_prompt": "", "image": "x.png"}
    (tmp_path / "r.json").write_text(json.dumps({"job": job, "request": Request(task="i2v-A14B").recorded()}))
    with pytest.raises(InputError, match=r"x\.png: no such image file"):
        resolve({"replay": str(tmp_path / "r.json"), "ckpt_dir": str(checkpoint("i2v-A14B"))})


def test_the_plan_reads_no_last_image_over_its_output(tmp_path: Path) -> None:
    file = tmp_path / "x.mp4"
    file.write_bytes(b"a video that is read")
    with pytest.raises(InputError, match="is read by this run"):
        outcome(last_image=str(file), save_file=str(file), overwrite=True)
