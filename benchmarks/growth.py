"""How the cost of a video grows with frames, size, steps, prompts and processes: counted, as tables and a plot.

    python -m benchmarks.growth [--plot growth.png]

Operations of the released T2V-A14B networks (a multiplication and an addition are two), bytes of its 40 blocks counted
on one block, bytes that a rank sends by the formula that `benchmarks.communication` checks. Each table changes one
thing of 1280x720, 81 frames, 4 steps without guidance, one prompt, one process. Where a GPU is, one more row each says
the seconds that its measured rates of matrix products and of its memory set as the least.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.measure import grid
from benchmarks.transformer import copy_rate, matmul_rate, static_block
from wan.configs import TASKS
from wan.distributed.mesh import Layout
from wan.modules.t5 import released_text_encoder
from wan.modules.vae import released_vae
from wan.planning.time_estimate import NetworkSizes, decode_operations, sent_bytes

TASK, TOKENS_OF_A_PROMPT = "t2v-A14B", 100
CONFIG = TASKS[TASK]
NETWORK = NetworkSizes(CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_heads, CONFIG.num_layers)
VAE, ENCODER = released_vae(TASK), released_text_encoder()
TEXT_WEIGHTS = sum(p.numel() for name, p in ENCODER.named_parameters() if name != "token_embedding.weight")
SIZES = {"480p": (832, 480), "720p": (1280, 720), "1080p": (1920, 1088)}


@dataclass(frozen=True)
class Video:
    """The request; the defaults are the point that each table starts from."""

    frames: int = 81
    size: tuple[int, int] = SIZES["720p"]
    steps: int = 4
    prompts: int = 1
    ranks: int = 1

    @property
    def latent(self) -> tuple[int, int, int, int]:
        return 16, (self.frames - 1) // 4 + 1, self.size[1] // 8, self.size[0] // 8

    @property
    def tokens(self) -> int:
        _, length, height, width = self.latent
        return length * (height // 2) * (width // 2)


@dataclass(frozen=True)
class Cost:
    """Costs of a run, on one rank: operations by stage, bytes that its transformer moves in memory, bytes sent."""

    denoise: float
    decode: float
    text: float
    moved: float
    sent: float

    @property
    def operations(self) -> float:
        return self.denoise + self.decode + self.text


def cost(video: Video) -> Cost:
    """Ranks share each video by Ulysses; the decode's rims, up to a fifth of its work on each of 8, are left out."""
    released, times = NETWORK, video.steps * video.prompts
    share = -(-video.tokens // video.ranks)
    return Cost(
        denoise=times * released.operations(video.tokens) / video.ranks,
        decode=video.prompts * decode_operations(VAE, video.latent) / video.ranks,
        text=video.prompts * 2.0 * TOKENS_OF_A_PROMPT * TEXT_WEIGHTS,
        moved=times * released.num_layers * block_traffic(share),
        sent=times * sum(sent_bytes(Layout(video.ranks, video.ranks), released, video.tokens, 2).values()),
    )


@cache
def block_traffic(tokens: int) -> int:
    """Bytes that one block reads and writes, its passes not compiled."""
    return static_block(fused=False, tokens=tokens).traffic


def series() -> dict[str, dict[str, Video]]:
    """One thing changed a series."""
    start = Video()
    return {
        "frames": {str(n): replace(start, frames=n) for n in (5, 17, 33, 49, 81, 121, 161)},
        "size": {name: replace(start, size=size) for name, size in SIZES.items()},
        "steps": {str(n): replace(start, steps=n) for n in (1, 2, 4, 8, 20, 40)},
        "prompts": {str(n): replace(start, prompts=n) for n in (1, 2, 4, 8)},
        "ranks": {str(n): replace(start, ranks=n) for n in (1, 2, 4, 8)},
    }


def show(plot: Path) -> None:
    """Print the tables and draw the plot."""
    cuda = torch.device("cuda") if torch.cuda.is_available() else None
    rates = (matmul_rate(cuda), copy_rate(cuda)) if cuda else None
    costs = {name: {at: cost(video) for at, video in videos.items()} for name, videos in series().items()}
    for name, points in costs.items():
        heading = [name, "denoise, PFLOP", "decode, PFLOP", "text, PFLOP", "moved, TB", "sent by a rank, GB"]
        rows = [heading + (["least seconds"] if rates else [])]
        for at, c in points.items():
            numbers = [f"{c.denoise / 1e15:.2f}", f"{c.decode / 1e15:.3f}", f"{c.text / 1e15:.4f}"]
            numbers += [f"{c.moved / 1e12:.1f}", f"{c.sent / 1e9:.1f}"]
            numbers += [f"{max(c.operations / rates[0], c.moved / rates[1]):.1f}"] if rates else []
            rows.append([at, *numbers])
        grid(f"cost by {name} (counted; T2V-A14B, else 1280x720, 81 frames, 4 steps, 1 prompt, 1 process)", rows)
    draw({name: {at: c.operations / 1e15 for at, c in points.items()} for name, points in costs.items()}, plot)
    print(f"\nplot: {plot.name}")


def draw(panels: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of PFLOP on one process, a panel a series."""
    width, height, base = 300, 260, 220
    picture = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(picture)
    for index, (name, values) in enumerate(panels.items()):
        left, step, top = index * width + 10, (width - 20) / len(values), max(values.values())
        pen.text((left, 4), f"PFLOP of a run by {name}", "black")
        for place, (at, value) in enumerate(values.items()):
            x, bar = left + place * step, (base - 50) * value / top
            pen.rectangle((x + 3, base - bar, x + step - 3, base), "steelblue")
            pen.text((x + 3, base - bar - 13), f"{value:.3g}", "black")
            pen.text((x + 3, base + 5), at, "black")
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path("growth.png"))
    show(parser.parse_args().plot)


if __name__ == "__main__":
    main()
