"""Prompt to mp4 at full size with random weights: time by stage and peak memory on the program's own path (G4-G10).

The checkpoint is made of headers only (sparse files: no weight is on disk, and none is read); the networks get random
weights where they compute. Loading is therefore not part of the times; everything else is what `generate.py` runs.

    python -m benchmarks.full_run --task t2v-A14B --size 1280*720     # one GPU with 80 GB or more
    python -m benchmarks.full_run --layers 2 --width 64 --size 64*48 --frames 9     # a small size, on any machine
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import nn

import wan
from benchmarks.measure import NEEDS_A_GPU, ROOT, Row, randomise, report, synchronize
from benchmarks.sparse import sparse
from wan.checkpoints.layout import WEIGHTS
from wan.checkpoints.safetensors_file import DTYPES
from wan.configs import TASKS
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5_XXL, UMT5Encoder
from wan.modules.vae import VAES, WanVAE
from wan.offload.networks import Experts
from wan.offload.reader import Piece, Source
from wan.pipeline import Pipeline
from wan.planning.build import make_plan
from wan.planning.plan import Plan
from wan.runner.batch import run_jobs
from wan.utils.progress import Progress

TOKENIZER = ROOT / "examples" / "tiny" / "Wan2.2-T2V-A14B" / "google"


Network = TypeVar("Network", bound=nn.Module)


def write_headers(folder: Path, task: str, layers: int | None, width: int | None) -> None:
    """A checkpoint in the released layout and dtypes whose weights are holes in sparse files."""
    config = TASKS[task]
    keys = ("dim", "ffn_dim", "in_dim", "out_dim", "num_heads", "num_layers", "freq_dim", "text_len", "eps")
    sizes = {key: getattr(config, key) for key in keys}
    if width:
        sizes |= {"dim": width, "ffn_dim": 2 * width, "num_heads": max(1, width // 128)}
    if layers:
        sizes |= {"num_layers": layers}
    t5 = UMT5_XXL | {"num_layers": layers or UMT5_XXL["num_layers"]}
    if width:
        t5 |= {"dim": width, "dim_attn": 64, "dim_ffn": 64, "num_heads": 1}
    with torch.device("meta"):
        model = WanModel.from_config(sizes, text_dim=t5["dim"])
    for where in config.experts.values():
        (folder / where).mkdir(parents=True, exist_ok=True)
        (folder / where / "config.json").write_text(json.dumps(sizes))
        sparse(folder / where / WEIGHTS, {n: ("F32", tuple(p.shape)) for n, p in model.named_parameters()})
    z_dim, encoder, decoder, nested = VAES[config.out_dim]
    if width:
        encoder, decoder = 16, 16
    parts = {config.t5_checkpoint: lambda: UMT5Encoder(**t5).bfloat16(),
             config.vae_checkpoint: lambda: WanVAE(z_dim, encoder, decoder, nested)}  # fmt: skip
    for name, build in parts.items():
        with torch.device("meta"):
            module = build()
        with torch.serialization.skip_data():
            torch.save(module.to_empty(device="cpu").state_dict(), folder / name)
    shutil.copytree(TOKENIZER, folder / "google")


def unread(source: Source, piece: Piece, buffer: torch.Tensor) -> torch.Tensor:
    """Instead of `Source.read`: the buffer as it is, for where nothing depends on what weights are."""
    entry = source.store[piece.name]
    shape = entry.shape if piece.rows is None else (piece.rows.stop - piece.rows.start, *entry.shape[1:])
    dtype, width = DTYPES[entry.dtype]
    return buffer[: math.prod(shape) * width].view(getattr(torch, dtype)).view(shape)


class RandomWeights(Pipeline):
    """Loads networks with random weights made where they compute, in the precision of the run; all else is as it is.

    The text encoder, read block by block, has zeros.
    """

    def load_experts(self) -> Experts:
        fresh, experts = self.experts is None, super().load_experts()
        for model in experts.models.values() if fresh else ():
            assert not any(p.is_meta for p in model.parameters()), "all of them stay on the device"
            randomise(model)
        return experts

    def load(self, module: Network, source: Source, home: torch.device, *_: Any, sharded: bool) -> Network:
        state = {n: torch.empty(p.shape, dtype=source.dtype(n), device=home) for n, p in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        randomise(module)
        synchronize()
        return module.eval()


def random_pipeline(plan: Plan, progress: Progress, runtime: Runtime) -> Pipeline:
    public = getattr(wan, plan.config.public_class.partition(":")[2])
    random: type[Pipeline] = type("Random", (RandomWeights, public), {})
    return random.of_plan(plan, progress, runtime)


class Run(NamedTuple):
    """One run: the task and size of the row, and sizes for a small machine instead of the released ones."""

    task: str = "t2v-A14B"
    size: str = "1280*720"
    frames: int | None = None  # the task's
    steps: int = 4
    videos: int = 2  # the first one warms up
    image: str | None = None
    guidance: str = "1"  # LOW,HIGH
    solver: str = "euler"
    shift: float | None = 5.0  # None: the task's
    layers: int | None = None
    width: int | None = None


def make(run: Run) -> dict[str, Any]:
    """The record of the run's last video."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_headers(folder, run.task, run.layers, run.width)
        given = {
            "task": run.task, "ckpt_dir": str(folder), "size": run.size, "frame_num": run.frames,
            "sample_steps": run.steps, "base_seed": 1, "sample_solver": run.solver, "sample_shift": run.shift,
            "sample_guide_scale": run.guidance, "num_videos": run.videos, "image": run.image,
            "prompt": "a cat boxing the red ball", "save_dir": str(folder / "out"), "offload_model": False,
        }  # fmt: skip
        outcome = resolve({name: value for name, value in given.items() if value is not None})
        assert isinstance(outcome, Generate)
        runtime = Runtime()
        with patch.object(Source, "read", lambda source, piece, buffer: unread(source, piece, buffer.zero_())):
            failed = run_jobs(make_plan(outcome, runtime), Progress(), runtime, load=random_pipeline)
        assert not failed, "a job failed"
        record: dict[str, Any] = json.loads(max(folder.glob("out/*.mp4")).with_suffix(".json").read_text())
    return record


def row(metric: str, run: Run, limit: str, compute: float | None) -> Row:
    """The last video's seconds by stage, loading aside, over `compute`, those of its operations at a matmul's rate."""
    record = make(run)
    seconds, peak = record["seconds"], record["peak_memory_bytes"]
    seconds.pop("load", None)  # of nothing: no weight was read
    total = sum(seconds.values())
    ratio = f" ({total / compute:.2f} x the roofline)" if compute else ""
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())
    memory = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in peak.items())
    steps = f"{run.steps} steps, guidance {run.guidance}"
    what = f"{metric} prompt to mp4, warm, random weights: {run.task} {run.size}, {steps}"
    return Row(what, f"{total:.1f} s{ratio}: {stages}; peak {memory}", limit)


GPU = (  # rooflines on an H200, performance.md
    ("G4, G6, G9", Run(), "G4: must 1.6, good 1.4, best 1.25 x 33.9 s; G9: 69 GB x 1.25, 1.15, 1.10", 33.9),
    ("G5, G6", Run(size="832*480"), "G5: must 1.9, good 1.6, best 1.4 x 8.9 s", 8.9),
    ("G8", Run("ti2v-5B", "1280*704"), "must 4, good 3, best 2.2 x 5.2 s", 5.2),
)


def works() -> dict[str, Callable[[], list[Row]]]:
    """G4-G9 by name."""
    return {f"{each[0]} {each[1].task} {each[1].size}": partial(rows_of, *each) for each in GPU}


def rows_of(metric: str, asked: Run, limit: str, compute: float) -> list[Row]:
    if not torch.cuda.is_available():
        return [Row(f"{metric} {asked.task} {asked.size}", NEEDS_A_GPU, limit)]
    return [row(metric, asked, limit, compute)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2v-A14B", choices=list(TASKS))
    parser.add_argument("--size", default="1280*720")
    parser.add_argument("--frames", type=int, default=None, help="default: the task's")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--videos", type=int, default=2, help="the first one warms up")
    parser.add_argument("--image", default=None)
    parser.add_argument("--layers", type=int, default=None, help="instead of the released depth")
    parser.add_argument("--width", type=int, default=None, help="instead of the released width")
    report([row("", Run(**vars(parser.parse_args())), "", None)])


if __name__ == "__main__":
    main()
