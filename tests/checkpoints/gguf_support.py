"""GGUF files for the tests, made by the package's own writer and quantisers, or of drawn blocks."""

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

# ggml's name of a type -> where in a block its float16 scales lie
SCALES_AT = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def drawn_blocks(kind: str, shape: tuple[int, ...], seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Bytes of a tensor of this type and shape, drawn: any bits are numbers, and the scales are finite."""
    values, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (math.prod(shape) // values, width), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        scales = chance.uniform(-scale, scale, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    kind: Callable[[str, Tensor], str] = lambda *_: "F32",
    architecture: str = "wan",
    settings: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """The tensors as gguf's own writer and quantisers store them. kind: ggml's name of each one's type.

    Rows that blocks do not divide are reshaped, as ComfyUI's converter does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    settings(writer)
    for name, tensor in tensors.items():
        stored = gguf.GGMLQuantizationType[kind(name, tensor)]
        values = gguf.GGML_QUANT_SIZES[stored][0]
        array = tensor.float().numpy()
        if tensor.shape[-1] % values:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in tensor.shape])
            array = array.reshape(-1, values)
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
