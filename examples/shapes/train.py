"""Trains the small Wan from nothing and writes it in the released layout: `python -m examples.shapes.train`.

Stages that do not need each other run at the same time, each process on one thread. A finished stage leaves a file in
the state folder; started again, the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from examples.shapes import export, stages
from examples.shapes.loop import Peers

STAGES: dict[str, Callable[[Path, Peers], dict[str, object]]] = {
    "text": stages.train_text,
    "vae": stages.train_vae,
    **{f"clips-{part}": partial(stages.encode_clips, part) for part in (0, 1)},
    "base": stages.train_base,
    **{name: partial(stages.train_expert, name) for name in ("t2v-high", "t2v-low", "i2v-high", "i2v-low")},
    **{
        f"teaching-{task}-{part}": partial(stages.make_teaching, task, part)
        for task in ("t2v", "i2v")
        for part in (0, 1)
    },
    **{f"lora-{name}": partial(stages.train_lora, name) for name in ("t2v-high", "i2v-high", "t2v-low", "i2v-low")},
}
# for the compiler too, whose own processes would disturb the others
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# (stage, processes) that run at the same time
ROUNDS = [
    [("text", 1)],
    [("vae", 2)],
    [("clips-0", 1), ("clips-1", 1)],
    [("base", 2)],
    [("t2v-high", 1), ("t2v-low", 1)],
    [("i2v-high", 1), ("i2v-low", 1)],
    [("teaching-t2v-0", 1), ("teaching-i2v-0", 1)],
    [("teaching-t2v-1", 1), ("teaching-i2v-1", 1)],
    [("lora-t2v-high", 1), ("lora-i2v-high", 1)],
    [("lora-t2v-low", 1), ("lora-i2v-low", 1)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--state", type=Path, default=Path("outputs/shapes-training"), help="where stages leave their results"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where checkpoints and LoRAs go")
    parser.add_argument("--stage", choices=STAGES, help="one process of one stage, as this command starts them")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if torch.__version__ < "2.9":  # mkldnn's precision by operation, in run_process
        parser.error(f"training needs PyTorch 2.9 or newer, this is {torch.__version__}")
    arguments.state.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        run_process(arguments.stage, arguments.state, arguments.rank, arguments.processes)
        return
    for group in ROUNDS:
        left = [(stage, count) for stage, count in group if not finished(arguments.state, stage).exists()]
        run_round(left, arguments.state)
    for task in ("t2v", "i2v"):
        export.write_checkpoint(task, arguments.state, arguments.out)
        export.write_lora(task, arguments.state, arguments.out)
        export.check(task, arguments.state, arguments.out)


def finished(state: Path, stage: str) -> Path:
    return state / f"{stage}.pt"


def run_round(group: list[tuple[str, int]], state: Path) -> None:
    """Start all processes of these stages and wait for them. Stops all at the first that fails."""
    running = []
    for stage, count in group:
        (state / f"{stage}.meeting").unlink(missing_ok=True)
        for rank in range(count):
            command = [sys.executable, "-m", "examples.shapes.train", "--state", str(state)]
            command += ["--stage", stage, "--rank", str(rank), "--processes", str(count)]
            # each in a session of its own: by those Linux divides a busy machine's cores
            running.append((stage, subprocess.Popen(command, env=os.environ | ONE_THREAD, start_new_session=True)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what follows is done then too
    begun = time.monotonic()
    try:
        for stage, process in running:
            if process.wait():
                sys.exit(f"stage {stage} failed with exit code {process.returncode}")
    finally:
        for _, process in running:
            process.terminate()
    if group:
        print(f"{', '.join(stage for stage, _ in group)}: {time.monotonic() - begun:.0f} s", flush=True)


def run_process(stage: str, state: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all processes of a stage begin with the same weights
    # matrix products and convolutions round their inputs to bf16 where the processor can; all else is float32
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    peers = Peers.connect(state / f"{stage}.meeting", rank, count)
    result = STAGES[stage](state, peers)
    if rank == 0:
        spare = state / f"{stage}.spare"
        torch.save(result, spare)
        spare.replace(finished(state, stage))


if __name__ == "__main__":
    main()
