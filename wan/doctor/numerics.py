"""Does it compute right here? Attention, LoRA merge, the golden cases, the memory modes and the VAE, on the device.

Shapes: L tokens, N heads, d head width; O, I rows and columns of a weight, R rank.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan
from lightning.lora import Lora
from lightning.merge import Merge
from wan.configs import TASKS
from wan.doctor.findings import GOOD, SKIPPED, WRONG, Check, Machine, Outcome, within
from wan.doctor.measure import relative_error, rms_error
from wan.jobs.job import Sampling
from wan.media.images import video_size
from wan.modules.attention import BACKENDS, QUANTISED, available
from wan.modules.fp8 import in_fp8, multiplies_fp8
from wan.original_api import Original
from wan.planning.memory import plan_video
from wan.sampling import Video
from wan.utils.accelerator import Accelerator
from wan.utils.progress import quantity

CLASSES = {"t2v-A14B": "WanT2V", "i2v-A14B": "WanI2V", "ti2v-5B": "WanTI2V"}
FOLDERS = {"t2v-A14B": "Wan2.2-T2V-A14B", "i2v-A14B": "Wan2.2-I2V-A14B", "ti2v-5B": "Wan2.2-TI2V-5B"}
LORAS = {"t2v-A14B": "lora-t2v", "i2v-A14B": "lora-i2v", "ti2v-5B": "lora-ti2v"}
REPORT = "do not trust videos made here; put this report into a bug report"
LEFT_OUT = "runs leave this back end out; reinstall its package for this PyTorch, or remove it"
# Root mean square errors of attention against float32: bf16 rounds inputs' products and the result to 2^-9 at most.
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# SageAttention's scheme (queries and keys int8; the rest 16 bits, or e4m3) written out on a CPU: 1.2e-2 to 3.9e-2.
IN_8_BITS = 6e-2
# A product whose weights are e4m3, against float32: 2.6e-2; with the activations in e4m3 too 3.7e-2.
FP8 = (2e-2, 5e-2)
END_TO_END = 1e-4  # float32: largest error over the largest magnitude, from prompt to latent and to pixels
BF16 = (1e-3, 1.5e-2)  # root mean square of the final latent; below the first it would not be bf16
TILED = 1e-5  # tiles are the same numbers in kernels of other sizes
# Root mean square. With the inputs of every convolution rounded to TF32's 11 bits on a CPU: 1.1e-3 to 1.5e-3.
TF32 = 5e-3
FEWEST = 1_000_000  # bytes of room, planned and not enforced: two slots, whatever the network


def attention_checks(machine: Machine) -> list[Check]:
    """One for each back end there is and each precision that it is made for."""
    ours = [(name, dtype) for dtype in machine.dtypes for name in available(machine.device, dtype)]
    checks = [
        Check(f"attention {name} {_name(dtype)}", partial(attention, name, dtype), LEFT_OUT) for name, dtype in ours
    ]
    absent = [name for name in BACKENDS if name not in {known for known, _ in ours}]
    return [*checks, *(Check(f"attention {name}", _absent) for name in absent)]


def _absent(machine: Machine) -> Outcome:
    return Outcome(SKIPPED, f"not installed, or not made for {machine.device}; it is not needed")


def attention(name: str, dtype: torch.dtype, machine: Machine) -> Outcome:
    """The back end against the formula in float32, with many keys and with a text's few."""
    length, heads, width = (256, 2, 64) if machine.small else (1024, 8, 128)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, heads, width, generator=generator).to(dtype) for _ in range(3))
    error = 0.0
    for keys in (length, 77):
        exact = _softmax_attention(q.float(), k[:keys].float(), v[:keys].float())
        found = BACKENDS[name](*(x.to(machine.device) for x in (q, k[:keys], v[:keys])))
        error = max(error, rms_error(found.cpu(), exact)) if found.isfinite().all() else float("nan")
    other = "sdpa" if name != "sdpa" else "flash"
    limit = IN_8_BITS if name in QUANTISED else ATTENTION[dtype]
    return within("error against float32", error, limit, f"use --attention {other}; {REPORT}")


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qnd,knd->nqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


def fp8_layer(machine: Machine) -> Outcome:
    """A linear layer of `--quantize fp8` as a run has it on the device, against float32."""
    rows, inputs, outputs = (32, 128, 64) if machine.small else (512, 5120, 1024)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(rows, inputs, generator=generator).to(machine.usual)
    layer = in_fp8(weight.to(machine.device), torch.zeros(outputs, device=machine.device, dtype=machine.usual))
    error = rms_error(layer(x.to(machine.device)).cpu(), x.float() @ weight.t())
    least, limit = FP8
    outcome = within("root mean square error", error, limit, f"leave --quantize out; {REPORT}", least)
    how = "multiplied in fp8" if multiplies_fp8(machine.device, machine.usual) else "no fp8 product here: unpacked"
    return Outcome(outcome.verdict, f"{how}, {outcome.sentence}", outcome.advice, outcome.values)


def lora_merge(machine: Machine) -> Outcome:
    """The merge on the device against the plain expression on the CPU, both in float32, then rounded to bf16."""
    size, rank, alpha = (128, 8, 4.0) if machine.small else (1024, 64, 8.0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.03
    up, down = torch.randn(size, rank, generator=generator), torch.randn(rank, size, generator=generator) * 0.01
    name = "blocks.0.self_attn.q"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        halves = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
        save_file({f"diffusion_model.{name}.{part}": tensor for part, tensor in halves.items()}, file)
        merge = Merge([Lora.open(file)], {f"{name}.weight": (size, size)}, machine.device)
        found = merge(f"{name}.weight", weight.to(machine.device)).cpu()
    expected = weight + (alpha / rank) * (up @ down)
    rounded = (found.bfloat16() != expected.bfloat16()).double().mean().item()
    outcome = within("largest error against the CPU", relative_error(found, expected), 1e-6, REPORT)
    equal = "bit-equal" if torch.equal(found, expected) else f"{rounded:.1e} of the numbers differ once rounded to bf16"
    return Outcome(
        outcome.verdict, f"{equal}, {outcome.sentence}", outcome.advice, outcome.values | {"rounded_apart": rounded}
    )


# -- with the small checkpoints


def golden_checks(machine: Machine) -> list[Check]:
    """Every golden case in both precisions, and what else needs a checkpoint; skipped by name where there is none."""
    tiny, golden = machine.root / "examples" / "tiny", machine.root / "tests" / "golden"
    absent = [str(folder) for folder in (tiny, golden) if not folder.is_dir()]
    if absent:
        reason = f"{' and '.join(absent)} not there: run it in a clone of the repository, or with --root CLONE"
        skipped = Outcome(SKIPPED, reason)
        names = ("golden cases", "memory modes", "VAE decode", "VAE decode in tiles", "VAE decode with TF32")
        return [Check(name, lambda _: skipped) for name in names]
    cases = json.loads((golden / "cases.json").read_text())
    cases = cases[:1] if machine.small else cases
    checks = [
        Check(f"golden {case['name']} {_name(dtype)}", partial(golden_case, case, dtype))
        for case in cases
        for dtype in machine.dtypes
    ]
    return [
        *checks,
        Check("memory modes", partial(memory_modes, cases[0])),
        Check("VAE decode", partial(vae_decode, cases[0])),
        Check("VAE decode in tiles", partial(vae_tiles, cases[0])),
        Check("VAE decode with TF32", partial(vae_tf32, cases[0])),
    ]


def golden_case(case: dict[str, Any], dtype: torch.dtype, machine: Machine) -> Outcome:
    """Prompt to latent, and in float32 to pixels, against what the original computed on a CPU in float32."""
    expected = expectation(machine)
    task = open_task(case, dtype, machine)
    with tf32(False):
        latent = sample(task, case, machine)
        if dtype != torch.float32:
            least, limit = BF16
            error = rms_error(latent.cpu(), expected[f"{case['name']}.latent"])
            return within("root mean square error of the latent", error, limit, REPORT, least)
        error = relative_error(latent.cpu(), expected[f"{case['name']}.latent"])
        video = torch.cat([part.cpu() for part in task.decode(latent)], dim=1)
    error = max(error, relative_error(video, expected[f"{case['name']}.video"]))
    return within("largest error of latent and video", error, END_TO_END, REPORT)


def memory_modes(case: dict[str, Any], machine: Machine) -> Outcome:
    """The final latent with everything resident, with room for all, and with blocks through two slots: bit for bit."""
    modes = {"all that fits": None, "blocks through two slots": FEWEST}
    resident = sample(open_task(case, machine.usual, machine, init_on_cpu=False), case, machine)
    wrong: dict[str, float] = {}
    for mode, room in modes.items():
        task = open_task(case, machine.usual, machine)
        if room:
            task.plan = replace(task.plan, room=room)
            budget = plan_video(task.plan, tuple(case["args"]["size"]), case["args"]["frame_num"]).budget
            if budget is None or budget.resident:
                return Outcome(WRONG, f"with room for {quantity(room, 'B')} nothing streams", REPORT)
        found = sample(task, case, machine)
        if not torch.equal(found, resident):
            wrong[mode] = relative_error(found, resident)
    if wrong:
        told = ", ".join(f"{mode} by {error:.1e}" for mode, error in wrong.items())
        return Outcome(WRONG, f"differs from everything resident: {told}", f"--offload_model False; {REPORT}", wrong)
    return Outcome(GOOD, f"{', '.join(modes)}: equal to everything resident, bit for bit")


def vae_decode(case: dict[str, Any], machine: Machine) -> Outcome:
    with tf32(False):
        video = decode(case, machine)
    error = relative_error(video, expectation(machine)[f"{case['name']}.video"])
    return within("float32 without TF32, largest error", error, END_TO_END, REPORT)


def vae_tiles(case: dict[str, Any], machine: Machine) -> Outcome:
    with tf32(False):
        whole, tiled = decode(case, machine), decode(case, machine, tiled=True)
    error = relative_error(tiled, whole)
    outcome = within("largest difference from the whole frame", error, TILED, f"leave --vae_tiling out; {REPORT}")
    return Outcome(GOOD, "equal to the whole frame, bit for bit", values=outcome.values) if error == 0 else outcome


def vae_tf32(case: dict[str, Any], machine: Machine) -> Outcome:
    """Convolutions as PyTorch has them by default on a GPU."""
    if not Accelerator(machine.device).has_memory:
        return Outcome(SKIPPED, f"{machine.device} has no TF32")
    with tf32(True):
        video = decode(case, machine)
    error = rms_error(video, expectation(machine)[f"{case['name']}.video"])
    return within("root mean square error", error, TF32, REPORT)


def open_task(case: dict[str, Any], dtype: torch.dtype, machine: Machine, **how: Any) -> Original:
    """The case's public class on the device, its small checkpoint opened."""
    task, tiny = case["task"], machine.root / "examples" / "tiny"
    config = replace(TASKS[task], param_dtype=dtype, t5_dtype=dtype)
    lora = tiny / LORAS[task] if case["lora"] else None
    build = getattr(wan, CLASSES[task])
    opened: Original = build(
        config, tiny / FOLDERS[task], lora_dir=lora, device=machine.device, noise_device="cpu", **how
    )
    return opened


def sample(task: Original, case: dict[str, Any], machine: Machine) -> Tensor:
    """The case's final latent."""
    args, config = case["args"], task.plan.config
    image, size = None, args.get("size")
    if "image" in case:
        image = Image.open(machine.root / "examples" / "tiny" / case["image"]).convert("RGB")
        size = video_size(config, image.size, (args["max_area"], 1))
    scale = args["guide_scale"]
    guidance = (scale[0], scale[1]) if isinstance(scale, list) else (scale, scale)
    sampling = Sampling(args["sample_solver"], args["sampling_steps"], args["shift"], guidance)
    video = Video(case["prompt"], config.sample_neg_prompt, tuple(size), args["frame_num"], args["seed"], image)
    return task.sample_with(sampling, video)


def decode(case: dict[str, Any], machine: Machine, tiled: bool = False) -> Tensor:
    """The video of the case's golden latent, on the CPU."""
    task = open_task(case, machine.usual, machine, vae_tiling=tiled)
    latent = expectation(machine)[f"{case['name']}.latent"]
    return torch.cat([part.cpu() for part in task.decode(latent)], dim=1)


def expectation(machine: Machine) -> dict[str, Tensor]:
    """What the original pipelines computed, by `case.stage`."""
    return load_file(machine.root / "tests" / "golden" / "expected.safetensors")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Convolutions in TF32 or not, where a GPU can; products of matrices are not by PyTorch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
