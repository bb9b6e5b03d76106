"""Merging a LoRA (C5): rate of ours beside the plain expression with fresh float32 temporaries, and peft's own merge.

python -m benchmarks.lora_merge [--size 5120] [--rank 64] [--threads N] [--device cuda] [--dtype bfloat16]

The rate counts the float32 bytes of the merged weight; reading the base weight is excluded. Ours reads its LoRA from
the file at every call, the other two have it in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.measure import Row, command_parser, interleaved, report
from lightning.lora import Lora
from lightning.merge import Merge

MODULE, ALPHA = "blocks.0.self_attn.q", 8.0


def main() -> None:
    parser = command_parser(__doc__, repeats=7)
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the weight")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base weight")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report(rows(args.repeats, args.size, args.rank, args.device, args.dtype))


def rows(repeats: int = 7, size: int = 5120, rank: int = 64, device: str = "cpu", dtype: str = "float32") -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) * 0.03).to(device, getattr(torch, dtype))
    up = torch.randn(size, rank, generator=generator)
    down = torch.randn(rank, size, generator=generator) * 0.01
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        halves = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(ALPHA)}
        save_file({f"diffusion_model.{MODULE}.{name}": tensor for name, tensor in halves.items()}, file)
        merge = Merge([Lora.open(file)], {f"{MODULE}.weight": tuple(weight.shape)}, torch.device(device))
        return [measure(merge, weight, up.to(device), down.to(device), repeats)]


def measure(merge: Merge, weight: Tensor, up: Tensor, down: Tensor, repeats: int) -> Row:
    layer = peft_layer(weight, up, down)

    def ours() -> Tensor:
        return merge(f"{MODULE}.weight", weight)

    def plain() -> Tensor:
        return weight.float() + (ALPHA / up.shape[1]) * (up.float() @ down.float())

    expected = plain()
    equal = "bit-equal to" if torch.equal(ours(), expected) else "DIFFERENT from"
    layer.merge()
    difference = (layer.get_base_layer().weight.float() - expected).abs().max().item()
    layer.unmerge()
    seconds = interleaved([ours, plain, layer.merge, layer.unmerge], repeats)
    mine, naive, peft = (weight.numel() * 4 / time / 1e9 for time in seconds[:3])
    return Row(
        f"C5 LoRA merge, {weight.shape[0]} x {weight.shape[1]} {str(weight.dtype)[6:]}, rank {up.shape[1]}, "
        f"{weight.device}",
        f"{mine:.2f} GB/s ({mine / naive:.1f} x), {equal} the plain expression",
        "must 2.5, good 3, best 3.5 x the plain expression",
        f"plain {naive:.2f} GB/s, peft {peft:.2f} GB/s (largest difference {difference:.0e})",
    )


def peft_layer(weight: Tensor, up: Tensor, down: Tensor) -> Linear:
    """A linear layer of these weights with the LoRA as peft's adapter on it."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = LoraConfig(r=up.shape[1], lora_alpha=int(ALPHA), target_modules=["layer"])
    layer: Linear = inject_adapter_in_model(config, nn.ModuleDict({"layer": base}), "lora")["layer"]
    layer.lora_A["lora"].weight.data = down
    layer.lora_B["lora"].weight.data = up
    return layer


if __name__ == "__main__":
    main()
