"""GGUF: processor time and memory of dequantising as weights stream.

python -m benchmarks.gguf_reading [--matrices 12]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch

from benchmarks.measure import grid, machine
from wan.checkpoints.gguf_file import open_gguf
from wan.offload.reader import Source, read_ahead

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
SHAPE = (13824, 5120)  # the largest matrix of an A14B expert
EXPERT = 14_288_491_584  # its values


def write(path: Path, kind: gguf.GGMLQuantizationType, matrices: int) -> None:
    """Blocks of zeros: what they hold does not change the work."""
    values, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((SHAPE[0], SHAPE[1] // values * width), np.uint8)
    writer = gguf.GGUFWriter(path, "wan")
    for number in range(matrices):
        writer.add_tensor(f"blocks.{number}.ffn.0.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def resident() -> float:
    """MB in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def measure(path: Path) -> tuple[float, float]:
    """(processor-seconds a 10^9 values, MB that reading adds at most)."""
    source = Source(open_gguf(path), lambda _: torch.bfloat16)
    pieces = list(source.pieces(source.store))
    before, most, values, start = resident(), 0.0, 0, time.process_time()
    for _, tensor in read_ahead(pieces):
        values, most = values + tensor.numel(), max(most, resident())
    return 1e9 * (time.process_time() - start) / values, most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrices", type=int, default=12)
    matrices = parser.parse_args().matrices
    torch.set_num_threads(1)
    print(machine())
    rows = [
        ("type", "file MB", "as float32 MB", "added at most MB", "processor-s for 10^9 values", "for an A14B expert")
    ]
    for name in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.gguf"
            write(path, gguf.GGMLQuantizationType[name], matrices)
            seconds, added = measure(path)
            size, floats = path.stat().st_size / 1e6, 4 * SHAPE[0] * SHAPE[1] * matrices / 1e6
        rows.append(
            (name, f"{size:.0f}", f"{floats:.0f}", f"{added:.0f}", f"{seconds:.1f}", f"{seconds * EXPERT / 1e9:.0f}")
        )
    grid("Dequantising while streaming, four readers, finite checks included", rows)


if __name__ == "__main__":
    main()
