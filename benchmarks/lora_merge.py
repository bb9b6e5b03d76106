"""How fast LoRA deltas are added to weights: ours, the plain expression, and peft's own merge, in one run.

    python -m benchmarks.lora_merge [--size 5120] [--rank 64] [--repeat 5] [--threads N] [--device cpu] [--dtype T]

The rate counts the float32 bytes of the merged weight. Excluded for all three: reading the base weight. Ours also
reads its LoRA from the file on every call, the other two have it in memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning.lora import Lora
from lightning.merge import Merge

NAME = "blocks.0.self_attn.q"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the weight")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base weight")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    generator = torch.Generator().manual_seed(0)
    up = torch.randn(args.size, args.rank, generator=generator)
    down = torch.randn(args.rank, args.size, generator=generator) * 0.01
    weight = (torch.randn(args.size, args.size, generator=generator) * 0.03).to(device, getattr(torch, args.dtype))
    alpha, shapes = 8.0, {f"{NAME}.weight": (args.size, args.size)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
        save_file({f"diffusion_model.{NAME}.{k}": v for k, v in tensors.items()}, file)
        merge = Merge([Lora.open(file)], shapes, device)
        up, down = up.to(device), down.to(device)
        peft_layer = _peft_layer(weight, up, down, alpha)
        runs: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: merge(f"{NAME}.weight", weight),
            "plain": lambda: weight.float() + (alpha / args.rank) * (up.float() @ down.float()),
            "peft": lambda: _peft_merge(peft_layer),
        }
        results = {name: run().clone() for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeat):  # in turn, so that a busy moment of the machine meets all of them
            for name, run in runs.items():
                if name == "peft":
                    peft_layer.unmerge()
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                times[name].append(time.perf_counter() - start)
    rates = {name: weight.numel() * 4 / statistics.median(t) / 1e9 for name, t in times.items()}
    report = {
        "gigabytes_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ours_over_plain": round(rates["ours"] / rates["plain"], 2),
        "ours_over_peft": round(rates["ours"] / rates["peft"], 2),
        "bit_equal_to_plain": torch.equal(results["ours"], results["plain"]),
        "largest_difference_from_peft": (results["ours"] - results["peft"].float()).abs().max().item(),
        "settings": {**vars(args), "torch": torch.__version__, "machine": platform.processor() or platform.machine()},
    }
    print(json.dumps(report, indent=2))


def _peft_layer(weight: Tensor, up: Tensor, down: Tensor, alpha: float) -> Linear:
    """A linear layer of these weights with the LoRA as peft's adapter on it."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = LoraConfig(r=up.shape[1], lora_alpha=int(alpha), target_modules=["layer"])
    layer: Linear = inject_adapter_in_model(config, nn.ModuleDict({"layer": base}), "lora")["layer"]
    layer.lora_A["lora"].weight.data = down
    layer.lora_B["lora"].weight.data = up
    return layer


def _peft_merge(layer: Linear) -> Tensor:
    layer.merge(adapter_names=["lora"])
    merged: Tensor = layer.get_base_layer().weight.data
    return merged


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
