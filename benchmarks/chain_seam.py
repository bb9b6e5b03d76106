"""Three ways to continue a clip: its last frame in pixels, as the mp4 shows it or before, or the last latent itself.

    python -m benchmarks.chain_seam

PSNR to the decoded last frame of what the next clip would start from, on videos of the trained demo.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import generate
from benchmarks.measure import ROOT, grid, machine
from wan.checkpoints.checkpoint import open_checkpoint
from wan.configs import TASKS
from wan.media.images import i2v_tensor, open_image
from wan.modules.vae import WanVAE
from wan.offload.reader import Source, load

SHAPES = ROOT / "examples" / "shapes"
FLAGS = ["--task", "i2v-A14B", "--ckpt_dir", str(SHAPES / "Wan2.2-I2V-A14B"), "--lora_dir", str(SHAPES / "lora-i2v"),
         "--size", "64*64", "--frame_num", "9", "--image", str(SHAPES / "first_frame.png"), "--base_seed", "1",
         "--num_videos", "4", "--save_latents", "--device", "cpu", "--prompt",
         "a purple triangle moves up on a green background"]  # fmt: skip


def frame(vae: WanVAE, latent: Tensor, which: int) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    return torch.cat(list(vae.decode(latent)), 1)[:, which].clamp(-1, 1)


def psnr(found: Tensor, expected: Tensor) -> float:
    return 10 * math.log10(4 / (found - expected).square().mean().item())


def main() -> None:
    print(machine())
    part = open_checkpoint(SHAPES / "Wan2.2-I2V-A14B", TASKS["i2v-A14B"]).vae
    vae = load(part.module, Source(part.weights, lambda _: torch.float32), torch.device("cpu"))
    vae.use_channels_last()
    rows = [["video", "the mp4's frame, encoded", "the decoded frame, encoded", "the last latent as a first"]]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        assert generate.main([*FLAGS, "--save_dir", folder]) == 0, "the demo runs"
        for number, file in enumerate(sorted(Path(folder).glob("*.latents.safetensors")), 1):
            (latent,) = load_file(file).values()
            expected = frame(vae, latent, -1)
            picture = open_image(file.with_name(file.name.replace(".latents.safetensors", ".mp4")))
            handed_on = [vae.encode(pixels[:, None]) for pixels in (i2v_tensor(picture, (64, 64)), expected)]
            found = [psnr(frame(vae, each, 0), expected) for each in (*handed_on, latent[:, -1:])]
            rows.append([str(number), *(f"{each:.1f} dB" for each in found)])
    grid("Start of the next clip, against the last frame of the one before it", rows)


if __name__ == "__main__":
    main()
