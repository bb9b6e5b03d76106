"""All of the ladder (C1-C12, on a GPU G1-G15) in one run, as one table for RESULTS.md; then how cost grows.

    python -m benchmarks [--plot growth.png]

Times of networks are CPU seconds of this process where there is no GPU, so that other work counts less.
"""

import argparse
import sys
import traceback
from pathlib import Path

import torch

from benchmarks import command_line, full_run, growth, loading, lora_merge, overlap, text_encoder, transformer, vae
from benchmarks.measure import NEEDS_A_GPU, Row, report

PARTS = (transformer, vae, lora_merge, loading, text_encoder, command_line, overlap, full_run)
ELSEWHERE = {  # what a script with random weights cannot tell: where a run says it
    "G10, G11 peak and time with one expert, with blocks in slots": "`generate.py --vram 35`, `--vram 9`: its record",
    "G12, G13 stall at the swap; bytes over PCIe": "the record of the same runs",
    "G14 cold time to the first step": "the record of a first run on released weights",
}


def on_a_gpu() -> list[Row]:
    """What is left of G1-G15."""
    rows = [Row(what, where if torch.cuda.is_available() else NEEDS_A_GPU) for what, where in ELSEWHERE.items()]
    if not torch.cuda.is_available():
        return [*rows, Row("G15 LoRA merge on the device", NEEDS_A_GPU)]
    return [*rows, *(row._replace(what=f"G15 {row.what}") for row in lora_merge.rows(device="cuda"))]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, default=Path("growth.png"), help="where the plot of growth goes")
    plot = parser.parse_args().plot
    rows: list[Row] = []
    failed = []
    for part in (*(module.rows for module in PARTS), on_a_gpu):
        print(f"{part.__module__} ...", file=sys.stderr)
        try:
            rows += part()
        except Exception:  # noqa: BLE001 - one part must not cost the others their figures
            traceback.print_exc()
            failed.append(part.__module__)
    report(rows)
    growth.show(plot)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
