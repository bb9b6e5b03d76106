"""Scripts written for the original packages: the names that they import, and the frames that they get."""

import argparse
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from tests.forked import python
from tests.prompt_extension.fake_services import FakeService
from tests.prompt_extension.tiny_qwen import build_text, build_vision
from tests.support import TESTS, checkpoint, lora_dir, read_frames
from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from wan.media.video import run_ffmpeg
from wan.utils.errors import InputError, JobError
from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander
from wan.utils.utils import merge_video_audio, save_video, str2bool

# In the original's style, with the original's names alone.
SCRIPT = """
import argparse
import wan
from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from wan.distributed.util import get_distributed_backend, init_distributed_group, set_device
from wan.utils.prompt_extend import DashScopePromptExpander, QwenPromptExpander
from wan.utils.utils import merge_video_audio, save_video, str2bool

parser = argparse.ArgumentParser()
parser.add_argument("--task", choices=list(WAN_CONFIGS.keys()))
parser.add_argument("--size", choices=list(SIZE_CONFIGS.keys()))
parser.add_argument("--ckpt_dir")
parser.add_argument("--lora_dir")
parser.add_argument("--offload_model", type=str2bool, default=None)
parser.add_argument("--prompt")
parser.add_argument("--save_file")
args = parser.parse_args()
assert args.size in SUPPORTED_SIZES[args.task] and args.offload_model is True
assert SIZE_CONFIGS[args.size][0] * SIZE_CONFIGS[args.size][1] == MAX_AREA_CONFIGS[args.size]
set_device(0)
assert get_distributed_backend() in ("gloo", "nccl")
init_distributed_group()
cfg = WAN_CONFIGS[args.task]
pipeline = wan.WanT2V(config=cfg, checkpoint_dir=args.ckpt_dir, lora_dir=args.lora_dir, device_id=0, rank=0,
                      t5_fsdp=False, dit_fsdp=False, use_sp=False, t5_cpu=False, convert_model_dtype=False)
video = pipeline.generate(args.prompt, size=(64, 48), frame_num=5, shift=5.0, sample_solver="euler",
                          sampling_steps=4, guide_scale=(1.0, 1.0), seed=42, offload_model=args.offload_model)
save_video(tensor=video[None], save_file=args.save_file, fps=cfg.sample_fps, nrow=1, normalize=True,
           value_range=(-1, 1))
"""


def test_a_script_of_the_originals_style_gives_the_command_lines_frames(tmp_path: Path) -> None:
    weights = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B"))]
    asked = ["--task", "t2v-A14B", *weights, "--prompt", "a cat boxing", "--offload_model", "True"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [*asked, "--size", "1280*720", "--save_file", str(tmp_path / "theirs.mp4")]
    done = python(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # the original computes in bfloat16, which here is the default on a GPU only
    here = ["--size", "64*48", "--frame_num", "5", "--base_seed", "42", "--dtype", "bf16", "--device", "cpu"]
    assert generate.main([*asked, *here, "--save_file", str(tmp_path / "ours.mp4")]) == 0
    theirs, ours = read_frames(tmp_path / "theirs.mp4"), read_frames(tmp_path / "ours.mp4")
    assert theirs.shape == (5, 48, 64, 3)
    assert np.array_equal(theirs, ours)
    assert not (tmp_path / "theirs.json").exists()  # a script's settings are not known


READ = (  # by the scripts of Wan2.2 and Wan2.2-Lightning
    "num_heads dim ffn_dim num_layers eps patch_size freq_dim window_size qk_norm cross_attn_norm num_train_timesteps "
    "param_dtype t5_model t5_dtype text_len t5_checkpoint t5_tokenizer vae_checkpoint vae_stride sample_fps frame_num "
    "sample_steps sample_shift sample_guide_scale sample_neg_prompt"
)
OF_EXPERTS = "boundary low_noise_checkpoint high_noise_checkpoint low_noise_lora_checkpoint high_noise_lora_checkpoint"


@pytest.mark.parametrize("task", WAN_CONFIGS)
def test_the_attributes_that_scripts_read(task: str) -> None:
    for name in [*READ.split(), *(OF_EXPERTS.split() if task != "ti2v-5B" else ["lora_checkpoint"])]:
        assert getattr(WAN_CONFIGS[task], name) is not None, name
    folder = lora_dir(task)
    for name in OF_EXPERTS.split()[3:] if task != "ti2v-5B" else ["lora_checkpoint"]:
        assert (folder / WAN_CONFIGS[task][name]).is_file()


@pytest.mark.parametrize(
    ("task", "files"),
    [
        ("t2v-A14B", "--prompt_file examples/prompt_list.txt"),
        ("i2v-A14B", "--prompt_file examples/i2v_prompt_list.txt --image_path_file examples/i2v_image_path_list.txt"),
        ("i2v-A14B", "--prompt a --image examples/i2v_input.JPG"),
    ],
)
def test_example_files_have_the_originals_names(
    task: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS.parent)
    weights = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--lora_dir", str(lora_dir(task))]
    assert generate.main([*weights, *files.split(), "--size", "480p", "--save_dir", str(tmp_path), "--dry_run"]) == 0


def test_sound_is_added(tmp_path: Path) -> None:
    path, sound = tmp_path / "a.mp4", tmp_path / "a.wav"
    save_video(torch.rand(1, 3, 9, 32, 32), path, fps=8, value_range=(0, 1))
    before = read_frames(path)
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(32_000))
    merge_video_audio(path, sound)
    shown = run_ffmpeg("-loglevel", "info", "-i", str(path)).stderr
    assert b"Audio: aac" in shown
    assert np.array_equal(read_frames(path), before)
    with pytest.raises(JobError, match=r"a\.mp4: the sound of"):
        merge_video_audio(path, tmp_path / "absent.wav")
    assert np.array_equal(read_frames(path), before)


def test_sizes_are_those_of_the_tasks() -> None:
    assert SUPPORTED_SIZES["ti2v-5B"] == ("1280*704", "704*1280")
    assert set(SUPPORTED_SIZES) == set(WAN_CONFIGS)
    assert set(SIZE_CONFIGS) == set(MAX_AREA_CONFIGS) == {size for sizes in SUPPORTED_SIZES.values() for size in sizes}
    assert SIZE_CONFIGS["480*832"] == (480, 832)
    assert MAX_AREA_CONFIGS["1280*720"] == 921_600


def test_str2bool() -> None:
    assert [str2bool(word) for word in ("yes", "True", "1", True)] == [True] * 4
    assert [str2bool(word) for word in ("no", "F", "0", False)] == [False] * 4
    parser = argparse.ArgumentParser()
    parser.add_argument("--offload_model", type=str2bool)
    with pytest.raises(SystemExit):
        parser.parse_args(["--offload_model", "maybe"])


def test_several_videos_lie_in_a_grid(tmp_path: Path) -> None:
    videos = torch.stack([torch.full((3, 2, 16, 24), value) for value in (0.0, 0.5, 1.0)])
    path = Path(save_video(videos, tmp_path / "new" / "grid.mp4", fps=8, nrow=2, value_range=(0, 1)))
    frames = read_frames(path).astype(int)
    assert frames.shape == (2, 2 * 18 + 2, 2 * 26 + 2, 3)
    for row, column, value in ((10, 14, 0), (10, 40, 128), (28, 14, 255), (28, 40, 0)):
        assert abs(frames[:, row, column] - value).max() <= 3


def test_values_outside_the_range_are_clamped_and_a_file_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = save_video(torch.full((1, 3, 1, 16, 16), 7.0), fps=8, normalize=False, value_range=(0, 0.5))
    assert abs(read_frames(Path(path)).astype(int) - 128).max() <= 2


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Any:
    with FakeService() as running:
        monkeypatch.setenv("DASH_API_URL", running.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("DASH_API_KEY", raising=False)
        yield running


def test_dashscope_expander(service: Any) -> None:
    expander = DashScopePromptExpander(api_key="key", model_name=None, task="i2v-A14B", is_vl=True, retry_times=4)
    found = expander("a cat", tar_lang="en", image=Image.new("RGB", (32, 32)), seed=7)
    assert found.status
    assert found.prompt
    assert found.prompt in found.message
    assert found.seed == 7
    body = service.requests[0].json
    assert body["model"] == "qwen-vl-max"
    assert body["parameters"]["seed"] == 7
    system, user = body["input"]["messages"]
    assert system["content"] == [{"text": found.system_prompt}]
    assert user["content"][0]["image"].startswith("data:image/png")


def test_a_refusal_leaves_the_users_prompt(service: Any) -> None:
    service.plan.append((401, {"code": "InvalidApiKey", "message": "no"}))
    found = DashScopePromptExpander("key", task="t2v-A14B")("a cat", "my own instructions", seed=-1)
    assert (found.status, found.prompt, found.system_prompt) == (False, "a cat", "my own instructions")
    assert "401" in found.message
    assert found.seed >= 0


@pytest.mark.usefixtures("service")
def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DASH_API_KEY"):
        DashScopePromptExpander(task="t2v-A14B")
    with pytest.raises(InputError, match="no such folder"):
        QwenPromptExpander(str(tmp_path / "absent"), task="t2v-A14B")
    with pytest.raises(InputError, match="tar_lang"):
        DashScopePromptExpander("key")("a cat", tar_lang="fr")


def test_qwen_expander(tmp_path: Path) -> None:
    text = QwenPromptExpander(str(build_text(tmp_path / "text")), task="t2v-A14B", device="cpu")
    first, second = (text("a cat", tar_lang="en", seed=3) for _ in range(2))
    assert first == second
    assert first.status
    assert first.prompt != "a cat"
    assert first.prompt in first.message
    vision = QwenPromptExpander(str(build_vision(tmp_path / "vision")), task="i2v-A14B", device="cpu", is_vl=True)
    seen = vision("", tar_lang="en", image=Image.new("RGB", (56, 56), "red"), seed=3)
    assert seen.system_prompt != first.system_prompt
    assert seen.seed == 3
