"""Which parameters keep float32 in a bf16 run, and which `--quantize` stores in 8 bits."""

from __future__ import annotations

import re

_MATRIX = re.compile(r"blocks\.(\d+)\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


def takes_8_bits(name: str, blocks: int, kept: int = 1) -> bool:
    """Whether `--quantize` holds this parameter in 8 bits: the matrices of all blocks but the first and last `kept`."""
    found = _MATRIX.fullmatch(name)
    return found is not None and kept <= int(found[1]) < blocks - kept


def keeps_float32(name: str) -> bool:
    """Whether a run in bf16 keeps this parameter in float32: time embedding, head, and the norms' weights."""
    return name.startswith(("time_embedding.", "time_projection.", "head.")) or any(
        part in name for part in (".norm3.", ".norm_q.", ".norm_k.")
    )
