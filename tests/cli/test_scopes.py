"""Every option says what it affects, and --resume goes by it: equal videos are found, others are not."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from generate import main
from tests.media.test_video import save, smooth
from tests.support import TINY, checkpoint, lora_dir, read_frames
from wan.cli.options import HOW, OPTIONS, START, VIDEO, Request, Scope
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import earlier_seed, resolve
from wan.planning.build import make_plan
from wan.planning.plan import Plan
from wan.runner.record import plain

FOLDER = str(lora_dir("i2v-A14B"))
USUAL = {
    "task": "i2v-A14B", "ckpt_dir": str(checkpoint("i2v-A14B")), "lora_dir": FOLDER, "prompt": "a cat",
    "image": str(TINY / "input.png"), "size": "64*64", "frame_num": 9, "base_seed": 3, "save_dir": "absent",
    "device": "cpu",
}  # fmt: skip
TI2V = {"task": "ti2v-5B", "ckpt_dir": str(checkpoint("ti2v-5B")), "lora_dir": str(lora_dir("ti2v-5B"))}
# What changes the video: for each option a value other than the usual one, with what it needs beside it.
OTHERS: dict[str, dict[str, Any]] = {
    "task": TI2V,
    "prompt": {"prompt": "a dog"},
    "image": {"image": "other.png"},
    "last_image": {"last_image": "other.png"},
    "video": {**TI2V, "image": None, "video": "clip.mp4"},
    "window": {**TI2V, "image": None, "frame_num": 17, "window": "9"},
    "strength": {**TI2V, "image": None, "video": "clip.mp4", "strength": 0.5},
    "prompt_file": {"prompt": None, "prompt_file": "prompts.txt"},
    "image_path_file": {"image": None, "image_path_file": "images.txt"},
    "negative_prompt": {"negative_prompt": "bad"},
    "size": {"size": "96*96"},
    "frame_num": {"frame_num": 13},
    "seconds": {"frame_num": None, "seconds": 1.0},
    "base_seed": {"base_seed": 4},
    "ckpt_dir": {"ckpt_dir": "other"},
    "lora_dir": {"lora_dir": None, "sample_steps": 4},
    "lora_strength": {"lora_strength": "0.5"},
    "lora": {"lora": (f"{FOLDER}:0.5",)},
    "lora_alpha": {"lora_alpha": 3.0},
    "lora_mode": {"lora_mode": "adapter"},
    "expert": {"expert": ("high=expert.safetensors",)},
    "vae": {"vae": "vae.pth"},
    "text_encoder": {"text_encoder": "t5.pth"},
    "tokenizer": {"tokenizer": "tokens"},
    "preset": {"preset": "i2v-seko-v1", "lora_dir": None},
    "sample_solver": {"sample_solver": "unipc"},
    "sample_steps": {"sample_steps": 5},
    "sample_shift": {"sample_shift": 3.0},
    "sample_guide_scale": {"sample_guide_scale": "2"},
    "cache": {"lora_dir": None, "cache": 0.1},
    "nag": {"nag": "11"},
    "timesteps": {"timesteps": "1000,500"},
    "high_steps": {"high_steps": 1},
    "noise_device": {},  # the CPU's noise is the CPU's noise
    "device": {},  # there is one device here
    "dtype": {"dtype": "bf16"},
    "quantize": {"quantize": "fp8"},
    "attention": {"attention": "sdpa"},
    "vae_dtype": {"vae_dtype": "bf16"},
    "convert_model_dtype": {"convert_model_dtype": True},
}
NEEDS_A_MODEL = {
    "use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang",
    "prompt_extend_options",
}  # fmt: skip
# What does not: how it is made, taken over by --replay, and what concerns one start of the program alone.
SAME: dict[str, Any] = {
    "lora_allow_partial": True, "offload_model": False, "vram": 4.0, "t5_cpu": True, "vae_tiling": True,
    "save_latents": True, "preview": True, "preview_steps": True, "record": "none",
}  # fmt: skip
SAME_START: dict[str, Any] = {
    "chain": True, "num_videos": 2, "sweep": ("sample_steps=2,3",), "quality": "exact", "t5_fsdp": True,
    "dit_fsdp": True, "ulysses_size": 2, "ring_size": 2, "prompt_extend_on_error": "fail", "no_extend_cache": True,
    "extend_only": "prompts.txt", "shard": "1/2", "save_dir": "elsewhere", "save_file": "other.mp4",
    "decode_latents": "a.safetensors", "gallery": True, "grid": True, "overwrite": True, "resume": True,
    "ignore_disk": True, "on_error": "stop", "replay": "a.json", "dry_run": True, "json": True, "debug": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that `OTHERS` names; no test writes into those."""
    folder, source = tmp_path_factory.mktemp("files"), checkpoint("i2v-A14B")
    Image.new("RGB", (64, 64), "red").save(folder / "other.png")
    save(folder / "clip.mp4", smooth(9, 64, 64), 24)
    (folder / "prompts.txt").write_text("a bird")
    (folder / "images.txt").write_text("other.png")
    (folder / "other").mkdir()
    for path in source.iterdir():
        (folder / "other" / path.name).symlink_to(path)
    for name, file in (("vae.pth", "Wan2.1_VAE.pth"), ("t5.pth", "models_t5_umt5-xxl-enc-bf16.pth")):
        state = torch.load(source / file)
        torch.save({key: tensor * 2 for key, tensor in state.items()}, folder / name)
    (folder / "tokens").mkdir()
    text = (source / "google" / "umt5-xxl" / "tokenizer.json").read_text()
    (folder / "tokens" / "tokenizer.json").write_text(text + "\n")
    low = source / "low_noise_model"
    (folder / "other" / "low_noise_model").unlink()
    (folder / "other" / "low_noise_model").symlink_to(source / "high_noise_model")
    whole_file(low, folder / "expert.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for file in files.iterdir():
        Path(file.name).symlink_to(file)


def whole_file(folder: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}, target)


def plan(**changes: Any) -> Plan:
    given = {name: value for name, value in {**USUAL, **changes}.items() if value is not None}
    outcome = resolve(given)
    assert isinstance(outcome, Generate)
    return make_plan(outcome, Runtime())


def meaning(made: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plain(made.meaning(made.jobs[0]))))


@cache
def usual_plan() -> Plan:
    return plan()


@cache
def usual() -> dict[str, Any]:
    return meaning(usual_plan())


def test_every_option_has_a_scope_and_every_video_option_an_example_here() -> None:
    assert all(isinstance(row.scope, Scope) for row in OPTIONS.values())
    by_scope = {scope: {name for name, row in OPTIONS.items() if row.scope is scope} for scope in Scope}
    assert by_scope == {VIDEO: OTHERS.keys() | NEEDS_A_MODEL, HOW: SAME.keys(), START: SAME_START.keys()}
    assert all(row.into in ("", *OPTIONS) and set(row.displaces) <= OPTIONS.keys() for row in OPTIONS.values())


@pytest.mark.parametrize("name", [name for name, change in OTHERS.items() if change])
def test_options_that_change_the_video_change_its_meaning(name: str) -> None:
    assert meaning(plan(**OTHERS[name])) != usual()


@pytest.mark.parametrize("name", [*SAME, *SAME_START])
def test_options_that_do_not_change_the_video_keep_its_meaning(name: str) -> None:
    made = usual_plan()
    changed = dataclasses.replace(made, request=dataclasses.replace(made.request, **{name: (SAME | SAME_START)[name]}))
    assert meaning(changed) == usual()


def test_how_a_video_is_made_changes_no_pixel(tmp_path: Path) -> None:
    """All such options at once."""
    how = [f"--{name}" if value is True else f"--{name}={value}" for name, value in SAME.items()]
    start = ["--quality=exact", "--save_dir=elsewhere", "--gallery", "--grid", "--overwrite", "--resume",
             "--ignore_disk",
             "--on_error=stop", "--json", "--debug", "--no_extend_cache", "--sweep=base_seed=3"]  # fmt: skip
    usual = [f"--{name}={value}" for name, value in {**USUAL, "save_dir": "usual"}.items()]
    assert main(usual) == 0
    assert main([*usual[:-1], *how, *start]) == 0
    (one,), (other,) = (list((tmp_path / folder).glob("*_seed3_*.mp4")) for folder in ("usual", "elsewhere"))
    assert (read_frames(one) == read_frames(other)).all()


def test_it_is_the_meaning_that_counts(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(USUAL["ckpt_dir"])
    for change in (
        {"noise_device": "cpu"},
        {"dtype": "fp32"},
        {"ckpt_dir": "linked"},
        {"sample_steps": 4},
        {"frame_num": None, "seconds": 0.5},
        {"prompt": None, "prompt_file": "cat.txt"},
        {"lora_dir": None, "lora": (FOLDER,), "sample_steps": 4, "sample_solver": "euler", "sample_guide_scale": "1"},
    ):
        Path("cat.txt").write_text("a cat")
        assert meaning(plan(**change)) == usual(), change


@pytest.mark.parametrize("name", [*SAME, *SAME_START])
def test_a_drawn_seed_is_found_again_after_a_change_of(name: str) -> None:
    drawn = Request(**{**USUAL, "save_dir": ".", "resume": True, "base_seed": 77})
    Path("made.json").write_text(json.dumps({"request": drawn.recorded()}))
    free = dataclasses.replace(drawn, base_seed=-1)
    if name != "save_dir":
        free = dataclasses.replace(free, **{name: (SAME | SAME_START)[name]})
    assert earlier_seed(free) == 77


def test_a_drawn_seed_is_not_found_for_other_videos() -> None:
    drawn = Request(**{**USUAL, "save_dir": ".", "resume": True, "base_seed": 77})
    Path("made.json").write_text(json.dumps({"request": drawn.recorded()}))
    for name, change in OTHERS.items():
        if change and name not in ("base_seed", "dtype", "attention", "quantize"):
            assert earlier_seed(dataclasses.replace(drawn, base_seed=-1, **change)) is None, name
