"""A video made from another one: diffusers' pipeline as the oracle, the clip as it is read, and the flags."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import generate
from benchmarks.vae import to_diffusers
from tests.distributed.ranks import run_ranks
from tests.lightning.test_diffusers_export import bake, pipeline
from tests.media.test_video import save, smooth
from tests.support import TINY, checkpoint, command, lora_dir, open_task, relative_error
from tests.test_doctor import CPU, SPEED, counted, released_vae
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate, Sampling
from wan.jobs.resolve import resolve
from wan.media.video import describe_clip, read_clip
from wan.modules.vae import WanVAE
from wan.modules.vae_layers import Region
from wan.original_api import Original
from wan.planning.build import make_plan
from wan.planning.memory import plan_videos
from wan.planning.report import Outlook
from wan.planning.time_estimate import DISK, PINNED, encode_operations, expect, keep_rates
from wan.sampling import Video, make_schedule
from wan.utils.errors import InputError

SIZE, FRAMES, SEED = (64, 96), 9, 5
FOUR = Sampling("euler", 4, 5.0, (1.0, 1.0))


def clip(frames: int = FRAMES, size: tuple[int, int] = SIZE) -> Tensor:
    return smooth(frames, size[1], size[0])


def video(made_from: Tensor | None) -> Video:
    return Video("a red ball", "", SIZE, FRAMES, SEED, video=made_from)


class Experts(nn.Module):
    """Both experts of a diffusers folder, by the timestep, where its video-to-video pipeline knows one."""

    def __init__(self, high: nn.Module, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low, self.config = high, low, high.config
        self.dtype, self.device = high.dtype, high.device

    def forward(self, timestep: Tensor, **inputs: Any) -> Any:
        return (self.high if timestep[0] >= 875 else self.low)(timestep=timestep, **inputs)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bake("t2v-A14B", tmp_path_factory.mktemp("baked") / "out", "--lora_dir", str(lora_dir("t2v-A14B")))


@pytest.mark.parametrize(("strength", "steps"), [(0.75, 3), (0.3, 1), (1.0, 4)])
def test_four_steps_of_both_experts_are_those_of_diffusers(strength: float, steps: int, baked: Path) -> None:
    whole = pipeline(baked, "t2v-A14B")
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    peer = diffusers.WanVideoToVideoPipeline(transformer=Experts(whole.transformer, whole.transformer_2), **parts)
    assert_equal(own(), peer, FOUR, strength, steps)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_guided_steps_are_those_of_diffusers(solver: str, baked: Path) -> None:
    """The low-noise expert's: the start is below the boundary."""
    whole = pipeline(baked, "t2v-A14B")
    sampling = Sampling(solver, 8, 3.0, (4.0, 4.0))
    scheduler = make_schedule(sampling).scheduler  # type: ignore[attr-defined]  # with our levels
    scheduler._begin_index = None
    scheduler.set_timesteps = lambda *_, **__: None
    parts = {name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "vae")}
    peer = diffusers.WanVideoToVideoPipeline(transformer=whole.transformer_2, scheduler=scheduler, **parts)
    assert_equal(own(), peer, sampling, 0.5, 4)


def assert_equal(task: Original, peer: Any, sampling: Sampling, strength: float, steps: int) -> None:
    task.plan = plan_videos(task.plan, replace(sampling, strength=strength), [video(clip())])
    assert len(task.plan.steps) - task.plan.video(video(clip())).first_step == steps
    found = task.sample(video(clip()))
    peer.set_progress_bar_config(disable=True)
    want = peer(
        video=(clip().transpose(0, 1)[None] + 1) / 2, prompt="a red ball", negative_prompt="", width=SIZE[0],
        height=SIZE[1], num_inference_steps=sampling.steps, guidance_scale=sampling.guidance[0], strength=strength,
        generator=torch.Generator().manual_seed(SEED), output_type="latent",
    ).frames[0]  # fmt: skip
    assert relative_error(found, want) < 1e-5


@cache
def own() -> Original:
    return open_task("t2v-A14B", lora=True)


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_the_start_is_the_mean_of_diffusers_posterior_and_noise(task: str) -> None:
    made = open_task(task)
    made.plan = plan_videos(made.plan, replace(FOUR, strength=0.5), [video(clip())])
    latent = made.encode_video(video(clip()))
    peer = to_diffusers(made.load_vae())
    mean, std = (torch.tensor(getattr(peer.config, f"latents_{name}")).view(-1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        want = (peer.encode(clip()[None]).latent_dist.mode()[0] - mean) / std
    assert latent is not None
    assert relative_error(latent, want) < 1e-5
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED))
    seen: list[Tensor] = []
    made.sample(video(clip()), lambda _, sample, __: seen.append(sample))
    sigma = make_schedule(FOUR).timesteps[2] / 1000
    assert relative_error(seen[0], (1 - sigma) * want + sigma * noise) < 1e-5


def test_all_steps_from_pure_noise_forget_the_clip() -> None:
    task = own()
    task.plan = plan_videos(task.plan, replace(FOUR, strength=1.0), [video(clip()), video(None)])
    assert torch.equal(task.sample(video(clip())), task.sample(video(None)))


@pytest.mark.parametrize("solver", ["euler", "dmd", "unipc", "dpm++"])
def test_a_schedule_that_starts_later_has_the_levels_of_the_whole_one(solver: str) -> None:
    sampling = Sampling(solver, 10, 5.0, (1.0, 1.0))
    whole, part = make_schedule(sampling), make_schedule(sampling, first_step=4)
    assert part.timesteps == whole.timesteps[4:]
    assert torch.equal(torch.as_tensor(part.sigmas), torch.as_tensor(whole.sigmas)[4:])


@pytest.mark.parametrize(("steps", "strength", "first"), [(4, 0.75, 1), (50, 0.75, 13), (10, 0.7, 3), (100, 0.29, 71)])
def test_the_first_step(steps: int, strength: float, first: int) -> None:
    assert Sampling("euler", steps, 5.0, (1.0, 1.0), strength=strength).first_step == first


def sample(runtime: Runtime) -> Tensor:
    task = open_task("t2v-A14B", lora=True, runtime=runtime, ulysses_size=runtime.team.size)
    return task.sample_with(FOUR, video(clip()))


def test_two_processes_give_what_one_does() -> None:
    want = sample(Runtime())
    for found in run_ranks(sample, 2):
        assert relative_error(found, want) < 1e-5


# The clip


def bytes_of(frames: Tensor) -> np.ndarray:
    return ((frames + 1) * 127.5).round().numpy()


@pytest.mark.parametrize(("fps", "taken"), [(16.0, [0, 1, 2, 3, 4]), (32.0, [0, 2, 4, 6, 8]), (8.0, [0, 0, 1, 1, 2])])
def test_frames_are_taken_at_the_models_rate(fps: float, taken: list[int], tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", clip(11), fps)
    found = bytes_of(read_clip(tmp_path / "a.mp4", 5, 16, SIZE))
    assert np.abs(found - bytes_of(clip(11)[:, taken])).mean() < 1.5, "the codec's; a neighbour is 4 off"


@pytest.mark.parametrize("size", [(64, 96), (64, 48), (32, 96), (128, 192)])
def test_it_covers_the_video_and_is_cut_at_its_centre(size: tuple[int, int], tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", clip(1))
    found = read_clip(tmp_path / "a.mp4", 1, 16, size)
    scale = max(size[0] / 64, size[1] / 96)
    cover = torch.nn.functional.interpolate(
        clip(1).transpose(0, 1), size=(round(96 * scale), round(64 * scale)), mode="bicubic", antialias=True
    )[0]
    top, left = (cover.shape[1] - size[1]) // 2, (cover.shape[2] - size[0]) // 2
    want = cover[:, top : top + size[1], left : left + size[0]]
    assert found.shape == (3, 1, size[1], size[0])
    assert np.abs(bytes_of(found[:, 0]) - bytes_of(want)).mean() < 1.5


# What hangs on the flag


def outcome(**flags: Any) -> Generate:
    given = {"task": "t2v-A14B", "ckpt_dir": str(checkpoint("t2v-A14B")), "lora_dir": str(lora_dir("t2v-A14B"))}
    made = resolve({**given, "prompt": "a", "size": "64*96", "frame_num": FRAMES, "device": "cpu", **flags})
    assert isinstance(made, Generate)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "clip.mp4", clip(20))
    Path("no.mp4").write_text("not a video")
    return tmp_path


def test_the_plan_counts_the_clip_and_the_steps_that_are_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    keep_rates(CPU, SPEED | {DISK: 1e18, PINNED: 1e18})
    plan, without = (make_plan(outcome(**flags), Runtime()) for flags in ({"video": "clip.mp4"}, {}))
    facts, other = plan.video(plan.jobs[0]), without.video(without.jobs[0])
    assert (facts.encoded, other.encoded) == (facts.latent, None)
    assert (facts.first_step, other.first_step) == (1, 0)
    assert facts.budget is not None
    assert facts.budget.peaks["image"] > 0
    assert any("(from the first 9 frames of clip.mp4, from step 2 of 4 on)" in line for line in Outlook(plan).lines())
    assert describe_clip(Path("clip.mp4"), 20, 16) == "clip.mp4"
    stages, rest = (expect(each, each.jobs)["stages"] for each in (plan, without))  # type: ignore[index]
    assert stages["denoise"] == pytest.approx(rest["denoise"] * 3 / 4)
    assert stages["image"] > 0
    assert "image" not in rest


def test_the_operations_of_a_whole_clip_are_those_that_are_counted() -> None:
    vae = released_vae("t2v-A14B")
    frames = torch.empty(3, 25, 40, 32, device="meta")
    assert encode_operations(vae, (vae.z_dim, 7, 5, 4), still=False) == counted(lambda: vae.encode(frames))


def test_where_room_is_short_the_clip_is_encoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, pixel_chunks = [], WanVAE._pixel_chunks

    def noted(vae: WanVAE, frames: Tensor, window: Region, *rest: int) -> Any:
        windows.append(window)
        return pixel_chunks(vae, frames, window, *rest)

    monkeypatch.setattr(WanVAE, "_pixel_chunks", noted)
    latents = []
    for more in ({"vram": 0.001}, {}):
        task = open_task("t2v-A14B", **more)
        small = Video("", "", (32, 48), 5, SEED, video=clip(5, (32, 48)))
        task.plan = plan_videos(task.plan, FOUR, [small])
        latents.append(task.encode_video(small))
    assert len(windows) == 4 * 4 + 1, "the most tiles for 6 x 4 cells, and one"
    assert relative_error(*latents) < 1e-5


def test_rows_records_resume_and_replay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "video": "clip.mp4", "save_file": "a.mp4"}, {"prompt": "a", "save_file": "b.mp4"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [*command("t2v-A14B")[:-4], "--lora_dir", str(lora_dir("t2v-A14B")), "--strength", "0.5", "--size", "32*32"]
    batch = [*words, "--prompt_file", "p.jsonl", "--save_dir", ".", "--save_latents", "--resume"]
    assert generate.main(batch) == 0
    record, other = (json.loads(Path(f"{name}.json").read_text()) for name in "ab")
    assert record["job"]["video"] == str(here / "clip.mp4")
    assert (len(record["meaning"]["sample_steps"]), len(other["meaning"]["sample_steps"])) == (2, 4)
    assert other["meaning"]["video"] is None

    capsys.readouterr()
    assert generate.main(batch) == 0
    assert "2 there already" in capsys.readouterr().err
    for name in "ab":
        assert generate.main(["--replay", f"{name}.mp4", "--save_file", "again.mp4", "--overwrite"]) == 0
        assert torch.equal(*(load_file(f"{each}.latents.safetensors")["latent"] for each in ("again", name)))

    save(Path("clip.mp4"), -clip(20))  # another clip is another video
    assert generate.main(batch) == 2
    assert "(--video)" in capsys.readouterr().err


@pytest.mark.parametrize("video", [{"video": "clip.mp4"}, {}])
@pytest.mark.usefixtures("here")
def test_a_row_with_a_strength_of_its_own_needs_a_video(video: dict[str, str], capsys: Any) -> None:
    """Also beside a row of the same options that has one."""
    rows = [{"prompt": "a", "strength": 0.5, **video}, {"prompt": "b", "strength": 0.5}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = command("t2v-A14B", "--prompt_file", "p.jsonl")
    words = [word for word in words if word not in ("--prompt", "a red ball")]
    assert generate.main(words) == 2
    assert f"p.jsonl line {2 if video else 1}: strength" in capsys.readouterr().err
    assert generate.main([*words, "--video", "clip.mp4", "--dry_run"]) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"video": "absent.mp4"}, "--video absent.mp4: no such video file"),
        ({"video": "no.mp4"}, "--video no.mp4: not a video that can be read"),
        ({"video": str(TINY / "input.png")}, "input.png: not a video that can be read"),
        (
            {"video": "clip.mp4", "frame_num": 21},
            "20 frames at 16 a second, and 21 are needed; --frame_num 17 fits",
        ),
        ({"video": "clip.mp4", "strength": 0.0}, "--strength"),
        ({"video": "clip.mp4", "strength": 1.5}, "--strength"),
        ({"video": "clip.mp4", "strength": 0.2}, "--strength 0.2 leaves none of 4 steps"),
        ({"strength": 0.5}, "--strength is about a video to start from; give --video"),
        ({"video": "clip.mp4", "prompt": ""}, "the prompt is empty"),
        ({"video": "clip.mp4", "save_file": "clip.mp4", "overwrite": True}, "is read by this run"),
        (
            {"video": "clip.mp4", "task": "i2v-A14B", "image": str(TINY / "input.png")},
            "--video clip.mp4: i2v-A14B takes no video; --task t2v-A14B and ti2v-5B",
        ),
        (
            {"video": "clip.mp4", "task": "ti2v-5B", "image": str(TINY / "input.png")},
            "--video clip.mp4: leave it out with an image",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_invalid_combinations_are_refused(flags: dict[str, Any], sentence: str) -> None:
    if task := flags.get("task"):
        flags = {**flags, "ckpt_dir": str(checkpoint(task)), "lora_dir": str(lora_dir(task))}
    with pytest.raises(InputError, match=sentence):
        outcome(**flags)
