"""Safetensors files of any size that take no space on disk: real headers, holes for data."""

from __future__ import annotations

import math
from pathlib import Path

from wan.checkpoints.safetensors_file import DTYPES, header_bytes


def sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], values: dict[str, bytes] | None = None) -> Path:
    """A safetensors file of any size that takes no space: name -> (dtype, shape), zeros except for `values`."""
    table: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    end = 0
    by_width = sorted(tensors.items(), key=lambda t: (-DTYPES[t[1][0]][1], t[0]))  # as the library does
    for name, (dtype, shape) in by_width:
        count = DTYPES[dtype][1] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        starts[name] = end
        end += count
    header = header_bytes(table)
    with path.open("wb") as file:
        file.write(header)
        for name, value in (values or {}).items():
            file.seek(starts[name] + len(header))
            file.write(value)
        file.truncate(len(header) + end)
    return path
