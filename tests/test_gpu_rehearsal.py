"""The CUDA path at released sizes on a CUDA runtime whose kernels do nothing: memory by stage, and what is said.

Such a runtime is loaded in front of PyTorch's CUDA build, so that the allocator, the streams and the program are real
on a machine without a GPU; numbers are not. WAN_FAKE_CUDA holds the words that run a CUDA build's Python on it. It
reads FAKE_GPU_GB and FAKE_GPU_COUNT (what devices there are), FAKE_GPU_CC (compute capability) and FAKE_GPU_ERROR
(the number with which CUDA refuses to count devices).

    WAN_FAKE_CUDA="RUNTIME PYTHON" python -m pytest -m gpu_rehearsal -s     # six minutes on two cores; prints a table
"""

import json
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.full_run import write_headers
from benchmarks.sparse import sparse
from tests.support import FOLDERS, TESTS, TINY, checkpoint
from wan.modules.model import WanModel

ROOT = TESTS.parent
PYTHON = shlex.split(os.environ.get("WAN_FAKE_CUDA", ""))
SIZES = {"t2v-A14B": "1280*720", "i2v-A14B": "1280*720", "ti2v-5B": "1280*704"}
GB = (8, 12, 16, 24, 48, 80)
TOLERANCE = 0.1  # of the planned peak

pytestmark = [
    pytest.mark.gpu_rehearsal,
    pytest.mark.skipif(not PYTHON, reason="WAN_FAKE_CUDA names no CUDA runtime whose kernels do nothing"),
]


def run(*words: str, limit: float = 600, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in settings.items()}}
    return subprocess.run([*PYTHON, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a task's checkpoint: headers of the released sizes, holes for data."""

    @cache
    def folder(task: str) -> Path:
        path = tmp_path_factory.mktemp(task)
        write_headers(path, task, None, None)
        return path

    yield folder
    for task in SIZES:
        shutil.rmtree(folder(task), ignore_errors=True)


def flags(task: str, folder: Path, out: Path) -> list[str]:
    """A video of the default length, with a step of each expert."""
    image = ["--image", str(TINY / "input.png")] if task == "i2v-A14B" else []
    return [
        "--task", task, "--ckpt_dir", str(folder), *image, "--size", SIZES[task], "--prompt", "cat",
        "--sample_solver", "euler", "--sample_steps", "2", "--sample_shift", "5", "--sample_guide_scale", "1",
        "--base_seed", "1", "--save_dir", str(out),
    ]  # fmt: skip


def check(seen: dict[str, Any], room: int, title: str) -> None:
    """Every stage takes at most the planned bytes, the largest one at least 90 % of them.

    Prints a table's row.
    """
    planned = {name: size / 1e9 for name, size in seen["planned"].items()}
    found = {name: seen["allocated"][name] / 1e9 for name in planned if name in seen["allocated"]}
    most, tiles = max(seen["reserved"].values()) / 1e9, "x".join(map(str, seen["tiles"]))
    cells = [
        f"{found[n]:.2f} of {planned[n]:.2f}" if n in found else "" for n in ("text", "image", "denoise", "decode")
    ]
    print(f"\n| {title} | {room} GB | {' | '.join(cells)} | {tiles} | {most:.2f} |")
    assert seen["code"] == 0
    stage = max(planned, key=planned.__getitem__)
    assert found[stage] > (1 - TOLERANCE) * planned[stage]
    assert not {name: size for name, size in found.items() if size > planned[name]}
    assert most <= room


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("room", GB)
@pytest.mark.parametrize("task", SIZES)
def test_one_gpu(task: str, room: int, released: Any, tmp_path: Path) -> None:
    done = run("-m", "tests.rehearsal", *flags(task, released(task), tmp_path), FAKE_GPU_GB=room, FAKE_GPU_CC=89)
    assert done.returncode == 0, done.stderr[-3000:]
    check(last_line(done.stdout), room, f"{task} {SIZES[task]}")


@pytest.fixture(scope="module")
def lightning(released: Any) -> Path:
    """A folder of LoRAs of rank 64 for every linear layer of T2V-A14B, in holes."""
    folder = released("t2v-A14B") / "lora"
    folder.mkdir(exist_ok=True)
    config = json.loads((folder.parent / "high_noise_model" / "config.json").read_text())
    with torch.device("meta"):
        model = WanModel.from_config(config, text_dim=4096)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            tensors[f"diffusion_model.{name}.lora_down.weight"] = "BF16", (64, layer.in_features)
            tensors[f"diffusion_model.{name}.lora_up.weight"] = "BF16", (layer.out_features, 64)
    for expert in ("high", "low"):
        sparse(folder / f"{expert}_noise_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("title", "room", "more"),
    [
        ("guided", 8, ["--sample_guide_scale", "4"]),
        ("guided", 24, ["--sample_guide_scale", "4"]),
        ("guided", 80, ["--sample_guide_scale", "4"]),
        ("LoRA merged", 8, ["--lora_dir", "LORA"]),
        ("LoRA merged", 80, ["--lora_dir", "LORA"]),
        ("LoRA as an adapter", 24, ["--lora_dir", "LORA", "--lora_mode", "adapter"]),
        ("fp8", 8, ["--quantize", "fp8"]),
        ("fp8", 16, ["--quantize", "fp8"]),
        ("fp8", 48, ["--quantize", "fp8"]),
        ("decode in bf16", 12, ["--vae_dtype", "bf16"]),
        ("three videos", 8, ["--num_videos", "3"]),
        ("three videos", 48, ["--num_videos", "3"]),
    ],
)
def test_other_ways(title: str, room: int, more: list[str], released: Any, lightning: Path, tmp_path: Path) -> None:
    task, videos = "t2v-A14B", 3 if "--num_videos" in more else 1
    words = [str(lightning) if word == "LORA" else word for word in more]
    words = [*flags(task, released(task), tmp_path), *words]
    done = run("-m", "tests.rehearsal", *words, FAKE_GPU_GB=room, FAKE_GPU_CC=89)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = last_line(done.stdout)
    if videos > 1:  # beside decoding the next one's first blocks wait, as far as there is room
        seen["planned"]["decode"] = max(seen["planned"].values())
    check(seen, room, f"{task}, {title}")
    assert len(list(tmp_path.glob("*.mp4"))) == videos


def test_latents_are_decoded_later(released: Any, tmp_path: Path) -> None:
    """Only the VAE is loaded; decoding takes no more than in a whole run."""
    words = [*flags("t2v-A14B", released("t2v-A14B"), tmp_path), "--save_latents"]
    whole = run("-m", "tests.rehearsal", *words, FAKE_GPU_GB=8, FAKE_GPU_CC=89)
    (latents,) = tmp_path.glob("*.latents.safetensors")
    words = ["--ckpt_dir", str(released("t2v-A14B")), "--decode_latents", str(latents)]
    words += ["--save_file", str(tmp_path / "later.mp4")]
    done = run("-m", "tests.rehearsal", *words, FAKE_GPU_GB=8, FAKE_GPU_CC=89)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, before = last_line(done.stdout), last_line(whole.stdout)
    assert seen["code"] == 0
    assert set(seen["allocated"]) == {"load", "decode", "save"}
    assert seen["allocated"]["decode"] <= before["allocated"]["decode"]


def test_every_byte_is_read(released: Any, tmp_path: Path) -> None:
    """114 GB of holes go through the slots; the process holds little of it."""
    words = flags("t2v-A14B", released("t2v-A14B"), tmp_path)
    done = run("-m", "tests.rehearsal", *words, FAKE_GPU_GB=8, FAKE_GPU_CC=89, REHEARSE_READS=1, limit=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    check(last_line(done.stdout), 8, "t2v-A14B, every byte read")


def test_two_gpus_share_a_guided_video(released: Any, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.rehearsal"]
    words = [*flags("t2v-A14B", released("t2v-A14B"), tmp_path), "--sample_guide_scale", "4", "--ulysses_size", "2"]
    done = run(*torchrun, *words, FAKE_GPU_GB=80, FAKE_GPU_COUNT=2, FAKE_GPU_CC=90)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    assert len(seen) == 2
    check(max(seen, key=lambda each: len(each["allocated"])), 80, "t2v-A14B, 2 GPUs, guided")


@pytest.mark.parametrize(("task", "ring"), [*((task, 1) for task in SIZES), ("t2v-A14B", 2), ("t2v-A14B", 4)])
def test_four_gpus_share_a_video(task: str, ring: int, released: Any, tmp_path: Path) -> None:
    """Images and decoding too: what is planned is the share of the busiest process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "tests.rehearsal"]
    split, title = ["--ulysses_size", str(4 // ring)], f"{task} {SIZES[task]}, 4 GPUs"
    if ring > 1:
        split, title = [*split, "--ring_size", str(ring)], f"{title}, ring {ring}"
    words = [*flags(task, released(task), tmp_path), *split]
    done = run(*torchrun, *words, FAKE_GPU_GB=80, FAKE_GPU_COUNT=4, FAKE_GPU_CC=90)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]
    assert len(seen) == 4
    check(max(seen, key=lambda each: len(each["allocated"])), 80, title)


@pytest.mark.parametrize("task", FOLDERS)
def test_sharded_weights_on_four_gpus(task: str, tmp_path: Path) -> None:
    """The small checkpoint, to the video: the host's part of NCCL and of sharding."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "generate.py"]
    small = [*flags(task, checkpoint(task), tmp_path), "--size", "64*64", "--frame_num", "5"]
    done = run(
        *torchrun, *small, "--dit_fsdp", "--t5_fsdp", "--ulysses_size", "2", "--ring_size", "2", FAKE_GPU_COUNT=4
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 saved" in done.stderr


@pytest.mark.parametrize(
    ("settings", "device", "sentence"),
    [
        ({"FAKE_GPU_ERROR": 35}, "auto", "but PyTorch cannot use a GPU: The NVIDIA driver on your system is too old"),
        ({"FAKE_GPU_ERROR": 35}, "cuda", "there is no such device here (The NVIDIA driver on your system is too old"),
        ({"FAKE_GPU_ERROR": 803}, "auto", "but PyTorch cannot use a GPU: Unexpected error from cudaGetDeviceCount"),
        ({"FAKE_GPU_ERROR": 100}, "cuda", "there is no such device here (No CUDA GPUs are available); usable: auto"),
        ({}, "cuda:7", "--device cuda:7: there is no such device here; usable: auto, cuda"),
        ({"FAKE_GPU_GB": 0.05}, "cuda", "0.0 GB are free"),
        ({"FAKE_GPU_CC": 75}, "auto", "use --dtype fp32"),
    ],
)
def test_an_unusable_gpu_is_one_line(settings: dict[str, Any], device: str, sentence: str) -> None:
    words = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--size", "64*48", "--frame_num", "5", "--prompt", "cat"]
    done = run("generate.py", *words, "--device", device, "--dry_run", **settings)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


IN_A_THREAD = """
import json, threading, torch
from tests.support import checkpoint, config_of
from wan import WanT2V
task = WanT2V(config_of("t2v-A14B", torch.bfloat16), checkpoint("t2v-A14B"), device_id=1)
give_back, current = torch.cuda.empty_cache, []
torch.cuda.empty_cache = lambda: (current.append(torch.cuda.current_device()), give_back())
ask = lambda: task.generate("cat", size=(64, 48), frame_num=5, sampling_steps=2, guide_scale=1.0, seed=1)
thread = threading.Thread(target=ask)
thread.start()
thread.join()
print(json.dumps({"current": current, "most": [torch.cuda.max_memory_allocated(index) for index in range(2)]}))
"""


def test_a_thread_of_the_caller_works_on_the_gpu_of_the_pipeline() -> None:
    """A server makes it in one thread and uses it in others, where CUDA's current device is the first one."""
    done = run("-c", IN_A_THREAD, FAKE_GPU_COUNT=2)
    seen = last_line(done.stdout)
    assert seen["most"][0] == 0 < seen["most"][1], done.stderr
    assert set(seen["current"]) == {1}


def test_without_a_gpu_auto_is_the_cpu() -> None:
    words = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--size", "64*48", "--frame_num", "5", "--prompt", "cat"]
    done = run("generate.py", *words, "--dry_run", FAKE_GPU_ERROR=100)
    assert (done.returncode, "cpu, float32" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("form", "capability", "how"),
    [
        ("fp8", 86, "unpacked for each product (compute capability 8.6: GPUs multiply fp8 from 8.9 on)"),
        ("fp8", 89, "multiplied in fp8"),
        ("fp8", 90, "multiplied in fp8"),
        ("fp8", 120, "multiplied in fp8"),
        ("int8", 80, "multiplied in int8"),
        ("int8", 86, "multiplied in int8"),
        ("int8", 120, "multiplied in int8"),
    ],
)
def test_weights_in_8_bits(form: str, capability: int, how: str, tmp_path: Path) -> None:
    """The demo, two of whose four blocks are in 8 bits: what PyTorch checks on the host before it multiplies."""
    trained = ROOT / "examples" / "shapes" / "Wan2.2-T2V-A14B"
    small = [*flags("t2v-A14B", trained, tmp_path), "--size", "64*64", "--frame_num", "5"]
    done = run("generate.py", *small, "--quantize", form, FAKE_GPU_GB=8, FAKE_GPU_CC=capability)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"weights of inner blocks in {form}, {how}\n" in done.stdout + done.stderr
