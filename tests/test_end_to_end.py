"""generate.py from flags to files, on the small checkpoints: the golden latents and every way to reach them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from tests.support import CASES, TINY, checkpoint, command, golden, lora_dir, read_frames, relative_error

END_TO_END = 1e-4


def flags_of(case: dict) -> list[str]:
    """The command of the golden case."""
    arguments = case["args"]
    step = 32 if case["task"] == "ti2v-5B" else 16
    size = arguments.get("size") or [arguments["max_area"] // step, step]  # with an image only the area counts
    guidance = arguments["guide_scale"]
    flags = [
        "--task", case["task"], "--ckpt_dir", str(checkpoint(case["task"])), "--prompt", case["prompt"],
        "--size", f"{size[0]}*{size[1]}", "--frame_num", str(arguments["frame_num"]),
        "--sample_solver", arguments["sample_solver"], "--sample_steps", str(arguments["sampling_steps"]),
        "--sample_shift", str(arguments["shift"]), "--base_seed", str(arguments["seed"]),
        "--sample_guide_scale", ",".join(map(str, guidance)) if isinstance(guidance, list) else str(guidance),
        "--device", "cpu",
    ]  # fmt: skip
    if "image" in case:
        flags += ["--image", str(TINY / case["image"])]
    if case["lora"]:
        flags += ["--lora_dir", str(lora_dir(case["task"]))]
    return flags


def run(*flags: str, folder: Path, name: str = "x.mp4") -> Path:
    file = folder / name
    assert generate.main([*flags, "--save_file", str(file), "--save_latents"]) == 0
    return file


def latent_of(video: Path) -> torch.Tensor:
    return load_file(video.with_name(f"{video.stem}.latents.safetensors"))["latent"]


@pytest.mark.parametrize("name", CASES)
def test_a_command_makes_the_golden_video(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    video = run(*flags_of(case), folder=tmp_path)
    assert relative_error(latent_of(video), golden()[f"{name}.latent"]) < END_TO_END
    frames = read_frames(video)
    _, count, height, width = case["video_shape"]
    assert tuple(frames.shape) == (count, height, width, 3)
    record = json.loads(video.with_suffix(".json").read_text())
    assert [step["timestep"] for step in record["plan"]["steps"]] == sorted(set(case["timesteps"]), reverse=True)


LIGHTNING = CASES["t2v_lightning"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The video of that case, with its latents and its record beside it."""
    return run(*flags_of(LIGHTNING), folder=tmp_path_factory.mktemp("whole"))


def expected() -> torch.Tensor:
    return golden()["t2v_lightning.latent"]


def test_adapters_equal_the_merge(tmp_path: Path) -> None:
    video = run(*flags_of(LIGHTNING), "--lora_mode", "adapter", folder=tmp_path)
    assert relative_error(latent_of(video), expected()) < END_TO_END


def test_two_halves_of_a_lora_equal_the_whole(tmp_path: Path) -> None:
    flags = flags_of(LIGHTNING)[:-2]
    halves = [f"{e}={lora_dir('t2v-A14B')}/{e}_noise_model.safetensors:0.5" for e in ("high", "low") for _ in range(2)]
    video = run(*flags, *(word for half in halves for word in ("--lora", half)), folder=tmp_path)
    assert relative_error(latent_of(video), expected()) < END_TO_END


def test_a_merged_expert_file_equals_base_and_lora(tmp_path: Path) -> None:
    from lightning.lora import Lora
    from lightning.merge import Merge
    from wan.checkpoints.safetensors_file import TensorStore

    for expert in ("high", "low"):
        folder = checkpoint("t2v-A14B") / f"{expert}_noise_model"
        store = TensorStore.open(folder / "diffusion_pytorch_model.safetensors.index.json")
        merge = Merge([Lora.open(lora_dir("t2v-A14B") / f"{expert}_noise_model.safetensors")], store.shapes)
        merged = {f"model.diffusion_model.{n}": merge(n, store.read(n)).clone() for n in store}
        save_file(merged, tmp_path / f"{expert}.safetensors")
    experts = [f"{e}={tmp_path}/{e}.safetensors" for e in ("high", "low")]
    video = run(*flags_of(LIGHTNING)[:-2], *(w for e in experts for w in ("--expert", e)), folder=tmp_path)
    assert relative_error(latent_of(video), expected()) < END_TO_END


def test_tiled_decode_equals_whole(whole: Path, tmp_path: Path) -> None:
    tiled = run(*flags_of(LIGHTNING), "--vae_tiling", folder=tmp_path)
    assert np.array_equal(read_frames(whole), read_frames(tiled))


def test_decoding_kept_latents_equals_the_first_run(whole: Path, tmp_path: Path) -> None:
    latents = whole.with_name(f"{whole.stem}.latents.safetensors")
    again = tmp_path / "again.mp4"
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--decode_latents", str(latents)]
    assert generate.main([*flags, "--save_file", str(again), "--device", "cpu"]) == 0
    assert np.array_equal(read_frames(whole), read_frames(again))


def test_replay_of_a_record_makes_the_same_latent(whole: Path, tmp_path: Path) -> None:
    again = run("--replay", str(whole), folder=tmp_path)
    assert torch.equal(latent_of(whole), latent_of(again))


def test_motion_8_runs_the_first_step_without_the_lora(tmp_path: Path) -> None:
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")),
             "--prompt", "a cat", "--size", "64*48", "--frame_num", "5", "--base_seed", "1"]  # fmt: skip
    video = run(*flags, "--preset", "motion-8", folder=tmp_path)
    steps = json.loads(video.with_suffix(".json").read_text())["plan"]["steps"]
    assert [step["lora"] for step in steps] == [0.0] + [1.0] * 7
    assert [step["guidance"] for step in steps] == [3.5] + [1.0] * 7


def test_a_batch_of_rows_each_with_its_own_settings(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "seed": 1}, {"prompt": "一只狗", "size": "48*64", "seed": 2, "frame_num": 9}]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")),
             "--size", "64*48", "--frame_num", "5", "--prompt_file", str(prompts)]  # fmt: skip
    assert generate.main([*flags, "--save_dir", str(tmp_path / "out")]) == 0
    first, second = sorted((tmp_path / "out").glob("*.mp4"))
    assert read_frames(first).shape == (5, 48, 64, 3)
    assert read_frames(second).shape == (9, 64, 48, 3)
    assert "一只狗" in second.name


def test_nan_weights_stop_before_any_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(checkpoint("t2v-A14B"), tmp_path / "ckpt")
    shard = tmp_path / "ckpt" / "low_noise_model" / "diffusion_pytorch_model-00001-of-00003.safetensors"
    state = load_file(shard)
    state[next(iter(state))].fill_(float("nan"))
    save_file(state, shard)
    flags = flags_of(LIGHTNING)
    flags[3] = str(tmp_path / "ckpt")
    assert generate.main([*flags, "--save_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(shard) in error
    assert "holds NaN or Inf" in error
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_resume_goes_on_with_the_seed_that_was_drawn(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    flags = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")),
             "--size", "64*48", "--frame_num", "5", "--prompt_file", str(prompts)]  # fmt: skip
    flags += ["--save_dir", str(tmp_path / "out"), "--save_latents"]
    assert generate.main(flags) == 0
    first, second = sorted((tmp_path / "out").glob("*.mp4"))
    untouched = first.stat().st_mtime_ns
    second.unlink()
    assert generate.main([*flags, "--resume"]) == 0
    assert sorted((tmp_path / "out").glob("*.mp4")) == [first, second]
    assert first.stat().st_mtime_ns == untouched
    for path in [*first.parent.glob("*.json"), first, second]:
        path.unlink()
    assert generate.main([*flags, "--resume"]) == 0, "a run that ended in its first decode left latents alone"
    assert sorted((tmp_path / "out").glob("*.mp4")) == [first, second]
    assert generate.main([*flags, "--resume", "--sample_shift", "4"]) == 0, "another command draws another seed"
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4


def test_a_baked_checkpoint_runs_as_the_release_that_is_in_it(tmp_path: Path) -> None:
    """Four guidance-free steps by default, bit-equal to base and LoRA; and no second distillation on top."""
    from lightning.__main__ import main as lightning

    release = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    release.symlink_to(lora_dir("t2v-A14B"))
    base = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B"))]
    assert (
        lightning(["bake", *base, "--lora_dir", str(release), "--out", str(tmp_path / "baked"), "--dtype", "fp32"]) == 0
    )
    rest = ["--prompt", "a cat", "--size", "64*48", "--frame_num", "5", "--base_seed", "1"]
    whole = run(*base, *rest, "--lora_dir", str(release), folder=tmp_path)
    baked = ["--task", "t2v-A14B", "--ckpt_dir", str(tmp_path / "baked"), *rest]
    assert torch.equal(latent_of(run(*baked, folder=tmp_path, name="baked.mp4")), latent_of(whole))
    assert generate.main([*baked, "--lora_dir", str(release), "--save_dir", str(tmp_path / "out")]) == 2


def test_a_name_that_fits_nothing_is_accepted_in_a_run_and_in_its_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(lora_dir("t2v-A14B") / "high_noise_model.safetensors")
    save_file(tensors | {"blocks.9.ffn.0.lora_up.weight": torch.ones(4, 4)}, tmp_path / "more.safetensors")
    words = command("t2v-A14B", "--lora", f"high={tmp_path / 'more.safetensors'}", "--size", "32*32", lora=False)
    words += ["--frame_num", "1", "--sample_steps", "2", "--save_file", str(tmp_path / "a.mp4")]
    assert generate.main(words) == 2
    assert "--lora_allow_partial" in capsys.readouterr().err
    assert generate.main([*words, "--lora_allow_partial"]) == 0
    capsys.readouterr()
    assert generate.main(["--replay", str(tmp_path / "a.mp4"), "--overwrite", "--dry_run"]) == 0
    assert "20/20 pairs, alpha/rank 0.5, 1 unmatched" in capsys.readouterr().out
