"""Loading (C6, C7): rate of reading float32 into bf16 beside a naive loader and the raw read; peak memory of a load;
CPU seconds beside diffusers' `from_pretrained`, with a LoRA beside its load and fuse.

python -m benchmarks.loading [--gigabytes 1.3]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import ROOT, Row, interleaved, report
from lightning.lora import Lora
from lightning.merge import Merge
from wan.checkpoints.pth_file import open_pickle
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, as_ours
from wan.modules.model import Prompt, WanModel
from wan.modules.t5 import UMT5Encoder
from wan.offload.networks import Networks
from wan.offload.reader import Source, load, parameter_dtypes

CPU = torch.device("cpu")
TI2V_5B = {"dim": 3072, "ffn_dim": 14336, "in_dim": 48, "out_dim": 48, "num_heads": 24, "text_dim": 4096}
WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "lora.safetensors"


def transformer(layers: int) -> WanModel:
    with torch.device("meta"):
        return WanModel(dim=1024, ffn_dim=4096, in_dim=16, out_dim=16, num_heads=8, num_layers=layers, text_dim=256)


def text_encoder(layers: int) -> UMT5Encoder:
    with torch.device("meta"):
        return UMT5Encoder(vocab=8192, dim=1024, dim_attn=1024, dim_ffn=2816, num_heads=16, num_layers=layers)


def noise(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights: the same numbers in each, since drawing a gigabyte takes longer than writing it."""
    most = torch.randn(max(p.numel() for p in module.parameters())).to(dtype)
    return {name: most[: p.numel()].view(p.shape).clone() for name, p in module.named_parameters()}


def write_transformer(path: Path, layers: int) -> None:
    """67 MB a layer of random float32."""
    save_file(noise(transformer(layers), torch.float32), path)


def write_text_encoder(path: Path, layers: int) -> None:
    """26 MB a layer of random bf16."""
    torch.save(noise(text_encoder(layers), torch.bfloat16), path)


def count_layers(names: Iterable[str]) -> int:
    return sum(name.endswith(".modulation") for name in names) - 1  # the head has one, too


def load_transformer(path: Path) -> torch.nn.Module:
    store = TensorStore.open(path)
    layers = count_layers(store)
    return load(transformer(layers), Source(store, parameter_dtypes(torch.bfloat16, False)), CPU)


def load_text_encoder(path: Path) -> torch.nn.Module:
    store = open_pickle(path)
    with torch.device("meta"):
        module = UMT5Encoder.from_shapes(store.shapes)
    return load(module, Source(store, lambda _: torch.float32), CPU)


def load_naively(path: Path) -> torch.nn.Module:
    """All tensors into memory, then into a module, then cast."""
    state = load_file(path)
    model = transformer(count_layers(state)).to_empty(device="cpu")
    model.load_state_dict(state)
    return model.to(torch.bfloat16)


def stream_transformer(path: Path) -> Networks:
    """A forward through two slots."""
    layers = count_layers(TensorStore.open(path))
    source = Source(TensorStore.open(path), parameter_dtypes(torch.bfloat16, False))
    networks = Networks({"model": (transformer(layers), source)}, CPU)
    networks.prefetcher.resize(2)
    with torch.no_grad(), networks.job(["model"] * 2):
        for _ in range(2):
            networks.models["model"](torch.zeros(16, 1, 4, 4), 500.0, Prompt(torch.zeros(1, 256)))
    return networks


def write_diffusers(folder: Path, layers: int = 2, rank: int = 64) -> None:
    """0.7 GB per layer of random float32 in diffusers' layout with a LoRA on every linear layer of its blocks, and the
    same in bf16."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=layers
        )
    lora = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("blocks."):
            lora[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.01
            lora[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank)
    for dtype in (torch.float32, torch.bfloat16):
        place = folder / str(dtype)[6:]
        model.save_config(place)
        save_file(noise(model, dtype), place / WEIGHTS)
        save_file({name: tensor.bfloat16() for name, tensor in lora.items()}, place / LORA)


def load_ours(folder: Path, lora: bool = False) -> torch.nn.Module:
    store = as_ours(TensorStore.open(folder / WEIGHTS), EXPERT, WEIGHTS)
    with torch.device("meta"):
        model = WanModel(**TI2V_5B, num_layers=count_layers(store))
    merge = Merge([Lora.open(folder / LORA)], store.shapes) if lora else None
    return load(model, Source(store, parameter_dtypes(torch.bfloat16, True), merge), CPU)


def load_diffusers(folder: Path, lora: bool = False) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    if lora:
        model.load_lora_adapter(folder, weight_name=LORA, prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    return model


def used(module: torch.nn.Module) -> torch.nn.Module:
    """Each weight read once, as the first forward does: a load may only have mapped the file."""
    for parameter in module.parameters():
        parameter.sum()
    return module


def read_raw(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


LOADERS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "streamed": lambda path: stream_transformer(path).models["model"],
    "transformer": load_transformer,
    "text_encoder": load_text_encoder,
    "naive": load_naively,
    "ours": load_ours,
    "diffusers": load_diffusers,
    "ours, used": lambda path: used(load_ours(path)),
    "diffusers, used": lambda path: used(load_diffusers(path)),
    "ours, LoRA": lambda path: load_ours(path, lora=True),
    "diffusers, LoRA": lambda path: load_diffusers(path, lora=True),
}


class Load(NamedTuple):
    seconds: float
    bytes: int  # of the loaded module
    peak: float  # resident memory at most, over those bytes
    cpu: float  # seconds, of user and system


def fresh(loader: str, path: Path, threads: int | None = None) -> Load:
    """A load in a process of its own, as a run has it: memory that a process has used before costs less."""
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", loader, str(path)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout.split()
    return Load(float(out[0]), int(out[1]), float(out[2]), float(out[3]))


def measure(loader: str, path: Path) -> None:
    if loader.startswith("diffusers"):
        import peft  # noqa: F401 - what an import takes is not a load's
        from diffusers import WanTransformer3DModel  # noqa: F401 - likewise
    before, start, spent = peak_resident(), time.perf_counter(), time.process_time()
    module = LOADERS[loader](path)
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    size = sum(p.nbytes for p in module.parameters())
    print(seconds, size, (peak_resident() - before) / size, spent)


def peak_resident() -> int:
    """Bytes, from Linux's VmHWM: unlike getrusage's maximum it does not begin with that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]  # every Linux has the line


def rows(gigabytes: float = 1.3, repeats: int = 5) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path, pickle = Path(folder, "model.safetensors"), Path(folder, "t5.pth")
        write_transformer(path, max(1, round(gigabytes * 1e9 / 67e6)))
        write_text_encoder(pickle, max(1, round(gigabytes * 1e9 / 52e6)))
        (raw,) = interleaved([lambda: read_raw(path)], 3)
        turns = [(fresh("transformer", path), fresh("naive", path)) for _ in range(repeats)]
        ours, naive = (median(load.seconds for load in loads) for loads in zip(*turns, strict=True))
        size, text = path.stat().st_size / 1e9, fresh("text_encoder", pickle).peak
    return [
        Row(f"C6 {size:.2f} GB of float32 into bf16, page cache warm, each load in a new process",
            f"{size / ours:.1f} GB/s ({naive / ours:.1f} x the naive loader)",
            f"must 2 x the naive loader; raw read {size / raw:.1f} GB/s",
            f"naive: load, then cast {size / naive:.1f} GB/s"),
        Row("C7 peak resident memory of a load over the loaded bytes: transformer; text encoder `.pth` into float32",
            f"{turns[0][0].peak:.2f}; {text:.2f}", "must 1.25, good 1.10, best 1.05", f"naive {turns[0][1].peak:.2f}"),
        *rows_beside_diffusers(repeats),
    ]  # fmt: skip


def rows_beside_diffusers(repeats: int = 5) -> list[Row]:
    """CPU seconds of one thread; each load in a new process, ours and theirs in turn."""
    cases = (
        ("float32 into bf16", "float32", ""),
        ("bf16 into bf16, then each weight read once (diffusers maps the file)", "bfloat16", ", used"),
        ("float32 into bf16 with a LoRA of rank 64 (diffusers: load and fuse)", "float32", ", LoRA"),
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_diffusers(Path(folder))
        for what, dtype, how in cases:
            place = Path(folder, dtype)
            turns = [
                [fresh(f"{who}{how}", place, threads=1).cpu for who in ("ours", "diffusers")] for _ in range(repeats)
            ]
            ours, theirs = zip(*turns, strict=True)
            size, ratio = (place / WEIGHTS).stat().st_size / 1e9, median(ours) / median(theirs)
            found.append(Row(f"load of {size:.2f} GB, {what}, CPU seconds", f"{_spread(ours)} (**{ratio:.2f} x**)",
                             "0.8 x diffusers", f"diffusers {_spread(theirs)}"))  # fmt: skip
    return found


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3, help="size of the float32 file")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
        return
    report(rows(arguments.gigabytes))


if __name__ == "__main__":
    main()
