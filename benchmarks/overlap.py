"""Decoding beside writing (C12): both at once over the longer one alone. One thread decodes, ffmpeg has the rest.

python -m benchmarks.overlap [--size 320x192] [--frames 33]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import grid, interleaved, machine, randomise
from wan.doctor.counts import VAES
from wan.modules.vae import WanVAE
from wan.utils.video import VideoWriter


def write(chunks: Iterable[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder, "video.mp4"), 16) as video:
        for chunk in chunks:
            video.write(chunk)
        video.finish(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="320x192")
    parser.add_argument("--frames", type=int, default=33)
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    torch.set_num_threads(1)
    vae = WanVAE(*VAES["2.1"]).eval()
    randomise(vae)
    latent = torch.randn(vae.z_dim, (given.frames - 1) // 4 + 1, height // 8, width // 8)

    def decode() -> Iterator[Tensor]:
        with torch.no_grad():
            yield from vae.decode(latent)

    chunks = list(decode())
    alone, writing, both = interleaved([lambda: list(decode()), lambda: write(chunks), lambda: write(decode())], 3)
    print(machine())
    grid(
        f"C12: {given.size}, {given.frames} frames (must 1.15)",
        [
            ("decode alone, s", "write alone, s", "both at once, s", "over the longer"),
            (f"{alone:.2f}", f"{writing:.2f}", f"{both:.2f}", f"{both / max(alone, writing):.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
