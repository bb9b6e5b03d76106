"""Savings and costs of `--quantize`: bytes brought to the device a step, a block's bytes, errors of layers, golden
cases and the demo.

    python -m benchmarks.quantised

Products in fp8 are the device's where it has them (CUDA, compute capability 8.9 on). On a CPU they are those of
PyTorch's own kernel there, which a run does not use: it unpacks the weights. Products in int8 are the CPU's own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import imageio.v3 as iio
import numpy as np
import torch

from benchmarks.demo import LORAS, agreement, decibels, make, spread
from benchmarks.measure import ROOT, grid, machine, rms_error
from benchmarks.transformer import static_block
from examples.shapes.detector import judge
from examples.shapes.world import held_out, trained
from wan.configs.precision import keeps_float32
from wan.doctor.forecast import released_plan
from wan.doctor.machine import Machine
from wan.doctor.numerics import expectation, open_task, sample
from wan.modules import quantised_linear
from wan.modules.fused import FP8
from wan.modules.model import WanModel
from wan.modules.quantised_linear import GROUPS, in_8_bits
from wan.offload.budget import schedule
from wan.offload.networks import group
from wan.offload.reader import parameter_dtypes
from wan.planning.memory import plan_video
from wan.planning.plan import Plan

VIDEOS = {"t2v-A14B": ((1280, 720), (8, 12, 16, 24)), "ti2v-5B": ((1280, 704), (8,))}  # size, GB of the device
FILES = ("float32", "bf16", "fp8")  # the released experts, baked ones, and baked or published ones
LAYERS = ((5120, 5120), (5120, 13824), (13824, 5120))  # of A14B
HERE = Machine(torch.device("cpu"), ROOT, ROOT)


def main() -> None:
    print(machine())
    heading: tuple[str, ...] = (
        "network, size", "GB", "weights", "experts, GB", "slots", "parts that stay", "files of", "GB to the device",
    )  # fmt: skip
    brought = [row for task, (_, rooms) in VIDEOS.items() for room in rooms for row in streamed(task, room)]
    grid("brought in steps 2 / 3 / 4 of 4 (counted)", [heading, *brought])
    heading = ("", "bf16", "fp8, unpacked", "fp8", "int8")
    grid("a block of A14B at 1280x720x81: bytes to and from memory, operations (counted)", [heading, *blocks()])
    grid("a layer: rms error against float32", [("inputs x outputs", *WAYS), *map(layer, LAYERS)])
    wide = [layer(size, largest) for size in LAYERS[:1] for largest in (10, 30)]
    grid("the same, one of 256 channels 10 or 30 times as large", [("inputs x outputs", *WAYS), *wide])
    grid("golden cases, every block quantised: rms error of the final latent", [("case", *WAYS), *golden()])
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for task in LORAS for row in demo(task, Path(folder))]
    grid("the trained demo, 4 steps", [("task", "", "as asked", "dB to float32", "least", "dB to bf16"), *rows])


class Way(NamedTuple):
    """How layers compute. groups: channels that a rotation may mix."""

    form: str
    multiplied: bool = False
    groups: tuple[int, ...] = GROUPS


WAYS = {
    "bf16": Way("none"), "fp8, unpacked": Way("fp8"), "fp8": Way("fp8", True),
    "int8, not rotated": Way("int8", True, ()), "int8, unpacked": Way("int8"), "int8": Way("int8", True),
}  # fmt: skip


@contextmanager
def products(way: Way) -> Iterator[None]:
    """Inside this layers multiply in 8 bits, or not, whatever the device."""
    with (
        patch.object(quantised_linear, "multiplies", lambda *_: way.multiplied),
        patch.object(quantised_linear, "GROUPS", way.groups),
    ):
        yield


# -- bytes


def streamed(task: str, room: int) -> Iterator[tuple[str, ...]]:
    """Rows for bf16 and fp8 weights, with each kind of file that they can come from."""
    width, height = VIDEOS[task][0]
    for quantize in ("none", "fp8"):
        plan = released_plan(task, True, room * 10**9, Machine(torch.device("cuda"), ROOT, ROOT))
        models = [part.module for part in plan.checkpoint.experts.values()]
        if quantize == "fp8":
            for model in models:
                model.quantise("fp8")
        budget = plan_video(plan, (width, height), plan.config.frame_num).budget
        assert budget is not None, "there is room to share"
        sizes = next(iter(budget.experts.values()))
        weights = sum(each.blocks * each.block_bytes + each.resident for each in budget.experts.values())
        for file in FILES if quantize == "fp8" else FILES[:2]:
            steps = [size / 1e9 for size in by_step(plan, budget.slots, file)]
            yield (
                f"{task} {width}x{height}", f"{room}", "bf16" if quantize == "none" else "fp8", f"{weights / 1e9:.1f}",
                f"{budget.slots}", f"{budget.staying(sizes)} of {sizes.blocks}", file,
                " / ".join(f"{size:.1f}" for size in steps[1:]),
            )  # fmt: skip


def by_step(plan: Plan, slots: int, file: str) -> list[int]:
    """Bytes of the files that pass to the device in each step, as the prefetcher would bring them."""
    uses: list[int] = []
    step_of: list[int] = []
    block_bytes: list[int] = []
    numbers: dict[str, list[int]] = {}
    for name, part in plan.checkpoint.experts.items():
        model = part.module
        _, blocks, block_of, _ = group(model, parameter_dtypes(plan.dtype, False, model))
        numbers[name] = [len(block_bytes) + block for block in block_of]
        stored = file_bytes(model, file)
        block_bytes += [sum(stored[each] for each in names) for names in blocks]
    for index, step in enumerate(plan.steps):
        uses += numbers[step.expert]
        step_of += [index] * len(numbers[step.expert])
    brought = [0] * len(plan.steps)
    for move in schedule(uses, slots, again=False):
        brought[step_of[move.use]] += block_bytes[move.block]
    return brought


def file_bytes(model: WanModel, file: str) -> dict[str, int]:
    """Bytes of each parameter in such a `file`."""

    def width(name: str, parameter: torch.Tensor) -> int:
        if file == "float32" or keeps_float32(name):
            return 0 if name.endswith("weight_scale") and file != "fp8" else 4
        return 1 if file == "fp8" and parameter.dtype == FP8 else 2

    return {name: parameter.numel() * width(name, parameter) for name, parameter in model.named_parameters()}


def blocks() -> Iterator[tuple[str, ...]]:
    for passes, fused in (("compiled", True), ("not compiled", False)):
        counts = [static_block(fused)]
        for way in (WAYS["fp8, unpacked"], WAYS["fp8"], WAYS["int8"]):
            with products(way):
                counts.append(static_block(fused, form=way.form))
        yield f"passes {passes}", *(f"{each.traffic / 1e9:.1f} GB, {each.calls}" for each in counts)


# -- errors


def layer(size: tuple[int, int], largest: float = 1) -> tuple[str, ...]:
    """Normal weights; activations as after a norm and its modulation, which differs by channel."""
    inputs, outputs = size
    generator = torch.Generator().manual_seed(0)
    weight, x, scale, shift = (
        torch.randn(*shape, generator=generator) for shape in ((outputs, inputs), (256, inputs), (inputs,), (inputs,))
    )
    x = x * (1 + 0.3 * scale) + 0.3 * shift
    x[:, ::256] *= largest
    x, bias = x.bfloat16(), torch.zeros(outputs, dtype=torch.bfloat16)
    exact = x.float() @ weight.t()
    errors = [rms_error(x @ weight.bfloat16().t(), exact)]
    for way in list(WAYS.values())[1:]:
        with products(way):
            errors.append(rms_error(in_8_bits(way.form, weight, bias)(x), exact))
    return f"{inputs} x {outputs}", *(f"{error:.1e}" for error in errors)


def golden() -> Iterator[tuple[str, ...]]:
    """With two blocks the small networks have no inner one: here their first and last are quantised too."""
    cases = json.loads((ROOT / "tests" / "golden" / "cases.json").read_text())
    for case in cases:
        expected, errors = expectation(HERE)[f"{case['name']}.latent"], []
        for way in WAYS.values():
            with products(way), patch.object(WanModel, "quantise", partialmethod(WanModel.quantise, kept=0)):
                task = open_task(case, torch.bfloat16, HERE, quantize=way.form)
                errors.append(rms_error(sample(task, case, HERE), expected))
        yield case["name"], *(f"{error:.1e}" for error in errors)


def demo(task: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Videos of known and held-out scenes, judged by the detector, and how far they are from float32's."""
    scenes = [*trained()[7::21], *held_out()[:16]]
    base: list[np.ndarray] = []
    bf16: list[np.ndarray] = []
    for name, way in {"float32": Way("none"), **WAYS}.items():
        flags = () if name == "float32" else ("--dtype", "bf16", "--quantize", way.form)
        with products(way):
            files = make(
                task, scenes, folder / f"{task} {name}".replace(" ", "-"), "--lora_dir", str(LORAS[task]), *flags
            )
        videos = [iio.imread(file, plugin="FFMPEG") for file in files]
        base = base or videos
        bf16 = videos if name == "bf16" else bf16
        right = sum(all(agreement(judge(video), scene)) for video, scene in zip(videos, scenes, strict=True))
        near, to_bf16 = (
            [decibels(*pair) for pair in zip(videos, others, strict=False)] if others else [] for others in (base, bf16)
        )
        found = f"{right} of {len(scenes)}", spread(near), f"{min(near):.1f}", spread(to_bf16) if to_bf16 else ""
        yield task, name, *found


if __name__ == "__main__":
    main()
