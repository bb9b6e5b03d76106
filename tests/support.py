"""Shared by tests: the golden numbers, the small checkpoints, and settings to run them with."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan
from wan.configs import TASKS, TaskConfig
from wan.doctor.numerics import relative_error as relative_error
from wan.modules.vae import WanVAE
from wan.original_api import Original

TESTS = Path(__file__).parent
TINY = TESTS.parent / "examples" / "tiny"
CASES = {case["name"]: case for case in json.loads((TESTS / "golden" / "cases.json").read_text())}
FOLDERS = {"t2v-A14B": "Wan2.2-T2V-A14B", "i2v-A14B": "Wan2.2-I2V-A14B", "ti2v-5B": "Wan2.2-TI2V-5B"}
LORAS = {"t2v-A14B": "lora-t2v", "i2v-A14B": "lora-i2v", "ti2v-5B": "lora-ti2v"}


@cache
def golden() -> dict[str, Tensor]:
    """Results of the original pipelines, by `case.stage`."""
    return load_file(TESTS / "golden" / "expected.safetensors")


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a released network."""
    content = json.loads((TESTS / "manifests" / f"manifest_{name}.json").read_text())
    return {k: tuple(v["shape"] if isinstance(v, dict) else v) for k, v in content.items()}


def checkpoint(task: str) -> Path:
    return TINY / FOLDERS[task]


def lora_dir(task: str) -> Path:
    return TINY / LORAS[task]


def config_of(task: str, dtype: torch.dtype = torch.float32) -> TaskConfig:
    return replace(TASKS[task], param_dtype=dtype, t5_dtype=dtype)


def assert_decodes(video: Tensor, vae: WanVAE, case: str, tolerance: float) -> None:
    """`video` is what `vae` makes of the case's golden latent, by way of a float64 run of it.

    The golden float32 video is itself up to 6.8e-6 from float64, ours up to 5.6e-6, and on some processors both errors
    fall on one pixel with opposite signs. So each must be within the tolerance of float64: the golden one says that the
    function is right, ours that its float32 is.
    """
    exact = copy.deepcopy(vae).double()
    reference = torch.cat(list(exact.decode(golden()[f"{case}.latent"].double())), dim=1)
    assert video.dtype == torch.float32
    assert relative_error(golden()[f"{case}.video"], reference) < tolerance
    assert relative_error(video, reference) < tolerance


def read_frames(path: Path) -> np.ndarray:
    """The frames of a video file, uint8 [F, H, W, 3]."""
    return iio.imread(path, plugin="FFMPEG")


def command(task: str, *words: str, lora: bool = True) -> list[str]:
    """Words of `generate.py` for a video of the small checkpoint of `task` on the CPU, then `words`."""
    base = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--device", "cpu", "--size", "64*64"]
    base += ["--frame_num", "5", "--base_seed", "5", "--prompt", "a red ball"]
    base += ["--lora_dir", str(lora_dir(task))] if lora else []
    base += ["--image", str(TINY / "input.png")] if task == "i2v-A14B" else []
    return [*base, *words]


def run(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m generate WORDS` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(TESTS.parent), **environment}
    argv = [sys.executable, "-m", "generate", *words]
    return subprocess.run(argv, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def open_task(task: str, dtype: torch.dtype = torch.float32, lora: bool = False, **options: Any) -> Original:
    """The public class of `task` over its small checkpoint, on the CPU."""
    build = getattr(wan, TASKS[task].public_class.partition(":")[2])
    folder = lora_dir(task) if lora else None
    opened: Original = build(config_of(task, dtype), checkpoint(task), lora_dir=folder, device="cpu", **options)
    return opened
