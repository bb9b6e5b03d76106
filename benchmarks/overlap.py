"""Decoding beside writing (C12): both at once over the longer one alone. One thread decodes, ffmpeg has the rest.

python -m benchmarks.overlap [--size 160x96] [--frames 17]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Row, interleaved, randomise, report
from wan.media.video import VideoWriter
from wan.modules.vae import VAES, WanVAE


def write(chunks: Iterable[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder, "video.mp4"), 16) as video:
        for chunk in chunks:
            video.write(chunk)
        video.finish(None)


def rows(size: str = "160x96", frames: int = 17) -> list[Row]:
    width, height = map(int, size.split("x"))
    vae = WanVAE(*VAES[16]).eval()
    randomise(vae)
    latent = torch.randn(vae.z_dim, (frames - 1) // 4 + 1, height // 8, width // 8)

    def decode() -> Iterator[Tensor]:
        with torch.no_grad():
            yield from vae.decode(latent)

    chunks = list(decode())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, writing, both = interleaved([lambda: list(decode()), lambda: write(chunks), lambda: write(decode())], 3)
    torch.set_num_threads(threads)
    figure = f"**{both / max(alone, writing):.2f}** (decode {alone:.2f} s, write {writing:.2f} s, both {both:.2f} s)"
    return [Row(f"C12 decode and mp4 writing at once over the longer one alone, {size}x{frames}", figure, "must 1.15")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="160x96")
    parser.add_argument("--frames", type=int, default=17)
    report(rows(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
