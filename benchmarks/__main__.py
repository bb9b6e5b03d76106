"""All of the ladder (C1-C12, on a GPU G1-G15) in one run, as one table for RESULTS.md; then how cost grows.

    python -m benchmarks [--gpu] [--minutes 9] [--keep FILE] [--plot growth.png]

Results are kept as soon as they are there: a run that was ended goes on where it stopped. What needs a GPU
comes first where there is one. Times of networks are CPU seconds of this process where there is no GPU, so that other
work counts less.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import command_line, full_run, growth, loading, lora_merge, overlap, text_encoder, transformer, vae
from benchmarks.measure import NEEDS_A_GPU, ROOT, Row, run

ELSEWHERE = {  # what a script with random weights cannot tell: where a run says it
    "G10, G11 peak and time with one expert, with blocks in slots": "`generate.py --vram 35`, `--vram 9`: its record",
    "G12, G13 stall at the swap; bytes over PCIe": "the record of the same runs",
    "G14 cold time to the first step": "the record of a first run on released weights",
}


def works() -> dict[str, Callable[[], list[Row]]]:
    """All there is to measure, by name; what needs a GPU, or has more to do where there is one, begins with G."""
    on_a_gpu = {
        **transformer.gpu_works(),
        **full_run.works(),
        **vae.gpu_works(),
        "G15 LoRA merge": merge_on_a_gpu,
    }
    return {
        **on_a_gpu,
        **transformer.works(),
        **vae.works(),
        "C5 LoRA merge": lora_merge.rows,
        "C6, C7 loading": loading.rows,
        "C8 text encoder": text_encoder.rows,
        "C10 command line": command_line.rows,
        "C12 overlap": overlap.rows,
        "G10-G14": elsewhere,
    }


def elsewhere() -> list[Row]:
    return [Row(what, where if torch.cuda.is_available() else NEEDS_A_GPU) for what, where in ELSEWHERE.items()]


def merge_on_a_gpu() -> list[Row]:
    if not torch.cuda.is_available():
        return [Row("G15 LoRA merge on the device", NEEDS_A_GPU)]
    return [row._replace(what=f"G15 {row.what}") for row in lora_merge.rows(device="cuda")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="only what needs a GPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing further is begun")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "benchmarks.jsonl", help="what has been measured")
    parser.add_argument("--plot", type=Path, default=Path("growth.png"), help="where the plot of growth goes")
    given = parser.parse_args()
    asked = {name: work for name, work in works().items() if name.startswith("G") or not given.gpu}
    missing = run(asked, given.keep, 60 * given.minutes)
    if not missing and not given.gpu:
        growth.show(given.plot)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
