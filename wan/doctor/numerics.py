"""Whether the device computes right: attention, LoRA merge, 8 bits, the golden cases, the memory modes and the VAE.

Shapes: L tokens, N heads, d head width; O, I rows and columns of a weight, R rank.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning.lora import Lora
from lightning.merge import Merge
from wan.configs import TASKS
from wan.doctor.machine import GOOD, SKIPPED, WRONG, DoctorCheck, Finding, Machine
from wan.doctor.rates import random_vae
from wan.jobs.job import Sampling
from wan.jobs.weights import both
from wan.media.images import video_size
from wan.modules.attention import BACKENDS, QUANTISED, available
from wan.modules.quantised_linear import in_8_bits, why_unpacked
from wan.original_api import Original
from wan.planning.plan import dtype_name
from wan.sampling import Video
from wan.utils.accelerator import Accelerator, peak_gpu_bytes
from wan.utils.progress import quantity

PRECISIONS = torch.float32, torch.bfloat16
REPORT = "do not trust videos made here; put this report into a bug report"
LEFT_OUT = "runs leave this back end out; reinstall its package for this PyTorch, or remove it"
# Root mean square errors of attention against float32: bf16 rounds inputs' products and the result to 2^-9 at most.
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# SageAttention's scheme (queries and keys int8; the rest 16 bits, or e4m3) written out on a CPU: 1.2e-2 to 3.9e-2.
IN_8_BITS = 6e-2
# A product whose weights are e4m3, against float32: 2.6e-2; with the activations in e4m3 too 3.7e-2. In int8: 1.1e-2.
ERRORS_IN_8_BITS = {"fp8": (2e-2, 5e-2), "int8": (5e-3, 2e-2)}
END_TO_END = 1e-4  # float32: largest error over the largest magnitude, from prompt to latent and to pixels
BF16 = (1e-3, 1.5e-2)  # root mean square of the final latent; below the first it would not be bf16
VAE_PEAK = 1.3  # of the planned bytes; without cuDNN 2.9 in an example
VAE_BF16 = (1e-4, 2e-2)  # root mean square; on a CPU 3e-3 to 8e-3
TILED = 1e-5  # tiles are the same numbers in kernels of other sizes
# Root mean square. With the inputs of every convolution rounded to TF32's 11 bits on a CPU: 1.1e-3 to 1.5e-3.
TF32 = 5e-3
FEWEST = 1_000_000  # bytes of room, planned and not enforced: two slots, whatever the network


def attention_checks(machine: Machine) -> list[DoctorCheck]:
    """One for each back end that is installed, in each precision that it supports."""
    ours = [(name, dtype) for dtype in PRECISIONS for name in available(machine.device, dtype)]
    skipped = Finding(SKIPPED, f"not installed, or not made for {machine.device}; it is not needed")
    absent = [name for name in BACKENDS if name not in {known for known, _ in ours}]
    return [
        *(
            DoctorCheck(f"attention {n} {dtype_name(dtype)}", partial(attention, n, dtype), LEFT_OUT)
            for n, dtype in ours
        ),
        *(DoctorCheck(f"attention {name}", lambda _: skipped) for name in absent),
    ]


def attention(name: str, dtype: torch.dtype, machine: Machine) -> Finding:
    """The back end against the formula in float32, with many keys and with a text's few."""
    length, heads, width = (256, 2, 64) if machine.small else (1024, 8, 128)
    q, k, v = (seeded(n, length, heads, width).to(dtype) for n in range(3))
    errors = []
    for keys in (length, 77):
        scores = torch.einsum("qnd,knd->nqk", q.float(), k[:keys].float()) * width**-0.5
        exact = torch.einsum("nqk,knd->qnd", scores.softmax(-1), v[:keys].float())
        found = BACKENDS[name](*(x.to(machine.device) for x in (q, k[:keys], v[:keys])))
        errors.append(rms_error(found.cpu(), exact))
    limit = IN_8_BITS if name in QUANTISED else ATTENTION[dtype]
    advice = f"use --attention {'sdpa' if name != 'sdpa' else 'flash'}; {REPORT}"
    return judge("error against float32", torch.tensor(errors).max().item(), limit, advice)  # of a NaN it is NaN


def quantised_layer(form: str, machine: Machine) -> Finding:
    """A linear layer of `--quantize` on the device, against float32."""
    rows, inputs, outputs = (32, 128, 64) if machine.small else (512, 5120, 1024)
    weight, x = seeded(0, outputs, inputs) / inputs**0.5, seeded(1, rows, inputs).to(machine.usual)
    bias = torch.zeros(outputs, device=machine.device, dtype=machine.usual)
    layer = in_8_bits(form, weight.to(machine.device), bias)
    error = rms_error(layer(x.to(machine.device)).cpu(), x.float() @ weight.t())
    outcome = judge("root mean square error", error, ERRORS_IN_8_BITS[form], f"leave --quantize out; {REPORT}")
    unpacked = why_unpacked(form, machine.device, machine.usual)
    how = f"no {form} product here: unpacked" if unpacked else f"multiplied in {form}"
    return replace(outcome, sentence=f"{how}, {outcome.sentence}")


def lora_merge(machine: Machine) -> Finding:
    """The merge on the device against the plain expression on the CPU, both in float32, then rounded to bf16."""
    size, rank, alpha = (128, 8, 4.0) if machine.small else (1024, 64, 8.0)
    weight, up, down = seeded(0, size, size) * 0.03, seeded(1, size, rank), seeded(2, rank, size) * 0.01
    name = "blocks.0.self_attn.q"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        halves = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
        save_file({f"diffusion_model.{name}.{part}": tensor for part, tensor in halves.items()}, file)
        merge = Merge([Lora.open(file)], {f"{name}.weight": (size, size)}, machine.device)
        found = merge(f"{name}.weight", weight.to(machine.device)).cpu()
    expected = weight + (alpha / rank) * (up @ down)
    apart = (found.bfloat16() != expected.bfloat16()).double().mean().item()
    outcome = judge("largest error against the CPU", relative_error(found, expected), 1e-6, REPORT)
    equal = "bit-equal" if torch.equal(found, expected) else f"{apart:.1e} of the numbers differ once rounded to bf16"
    return replace(outcome, sentence=f"{equal}, {outcome.sentence}", values=outcome.values | {"rounded_apart": apart})


def vae_in_bf16(machine: Machine) -> Finding:
    """`--vae_dtype bf16` at the released width, with random weights: its error, and on a GPU the memory it takes."""
    vae, latent = random_vae(machine)
    accelerator, before = Accelerator(machine.device), 0
    with torch.inference_mode(), tf32(False):
        exact = on_cpu(vae.decode(latent))
        vae.decode_in(torch.bfloat16)
        if accelerator.has_memory:
            accelerator.api.reset_peak_memory_stats(machine.device)
            before = accelerator.api.memory_allocated(machine.device)
        found = on_cpu(vae.decode(latent))
    outcome = judge("root mean square error", rms_error(found, exact), VAE_BF16, "leave --vae_dtype out")
    if outcome.verdict != GOOD or not accelerator.has_memory:
        return outcome
    channels, frames, rows, columns = latent.shape
    peak, planned = peak_gpu_bytes()[0] - before, vae.decode_peak((channels, frames, rows, columns))
    memory = f"{outcome.sentence}; at its peak {quantity(peak, 'B')}, planned {quantity(planned, 'B')}"
    if peak > VAE_PEAK * planned:
        return Finding(WRONG, memory, "leave --vae_dtype out: this PyTorch decodes in bf16 without cuDNN")
    return Finding(GOOD, memory, values=outcome.values | {"peak": peak, "planned": planned})


# -- with the small checkpoints


def golden_checks(machine: Machine) -> list[DoctorCheck]:
    """Every golden case in both precisions, and the other checks of a checkpoint; skipped by name without a clone."""
    others = {
        "memory modes": memory_modes, "VAE decode": vae_decode, "VAE decode in tiles": vae_tiles,
        "VAE decode with TF32": vae_tf32,
    }  # fmt: skip
    file = machine.root / "tests" / "golden" / "cases.json"
    if not file.exists() or not (machine.root / "examples" / "tiny").is_dir():
        reason = f"{machine.root} is no clone of the repository: run it in one, or with --root CLONE"
        return [DoctorCheck(name, lambda _: Finding(SKIPPED, reason)) for name in ("golden cases", *others)]
    cases = json.loads(file.read_text())
    checks = [
        DoctorCheck(f"golden {case['name']} {dtype_name(dtype)}", partial(golden_case, case, dtype))
        for case in cases[: 1 if machine.small else None]
        for dtype in PRECISIONS
    ]
    return [*checks, *(DoctorCheck(name, partial(check, cases[0])) for name, check in others.items())]


def golden_case(case: dict[str, Any], dtype: torch.dtype, machine: Machine) -> Finding:
    """Prompt to latent, and in float32 to pixels, against the results of the original on a CPU in float32."""
    expected, task = expectation(machine), open_task(case, dtype, machine)
    with tf32(False):
        latent = sample(task, case, machine)
        if dtype != torch.float32:
            error = rms_error(latent.cpu(), expected[f"{case['name']}.latent"])
            return judge("root mean square error of the latent", error, BF16, REPORT)
        error = relative_error(latent.cpu(), expected[f"{case['name']}.latent"])
        error = max(error, relative_error(on_cpu(task.decode(latent)), expected[f"{case['name']}.video"]))
    return judge("largest error of latent and video", error, END_TO_END, REPORT)


def memory_modes(case: dict[str, Any], machine: Machine) -> Finding:
    """The final latent must be the same with everything resident and with blocks through two slots, bit for bit."""
    resident = sample(open_task(case, machine.usual, machine, init_on_cpu=False), case, machine)
    task = open_task(case, machine.usual, machine)
    errors = {"all that fits": relative_error(sample(task, case, machine), resident)}
    task = open_task(case, machine.usual, machine)
    task.plan = replace(task.plan, room=FEWEST)
    errors["blocks through two slots"] = relative_error(sample(task, case, machine), resident)
    if not any(errors.values()):
        return Finding(GOOD, f"{', '.join(errors)}: equal to everything resident, bit for bit")
    differing = ", ".join(f"{mode} by {error:.1e}" for mode, error in errors.items() if error)
    advice = f"--offload_model False; {REPORT}"
    return Finding(WRONG, f"differs from everything resident: {differing}", advice, errors)


def vae_decode(case: dict[str, Any], machine: Machine) -> Finding:
    error = relative_error(decode(case, machine), expectation(machine)[f"{case['name']}.video"])
    return judge("float32 without TF32, largest error", error, END_TO_END, REPORT)


def vae_tiles(case: dict[str, Any], machine: Machine) -> Finding:
    error = relative_error(decode(case, machine, tiled=True), decode(case, machine))
    if error == 0:
        return Finding(GOOD, "equal to the whole frame, bit for bit")
    return judge("largest difference from the whole frame", error, TILED, f"leave --vae_tiling out; {REPORT}")


def vae_tf32(case: dict[str, Any], machine: Machine) -> Finding:
    """Convolutions as PyTorch has them by default on a GPU."""
    if not machine.is_gpu:
        return Finding(SKIPPED, f"{machine.device} has no TF32")
    error = rms_error(decode(case, machine, in_tf32=True), expectation(machine)[f"{case['name']}.video"])
    return judge("root mean square error", error, TF32, REPORT)


def open_task(case: dict[str, Any], dtype: torch.dtype, machine: Machine, **how: Any) -> Original:
    """The case's public class on the device, over its small checkpoint."""
    config, tiny = TASKS[case["task"]], machine.root / "examples" / "tiny"
    opened: Original = resolve_name(config.public_class)(
        replace(config, param_dtype=dtype, t5_dtype=dtype), tiny / config.hub_id.partition("/")[2],
        lora_dir=tiny / f"lora-{config.name.partition('-')[0]}" if case["lora"] else None,
        device=machine.device, noise_device="cpu", **how,
    )  # fmt: skip
    return opened


def sample(task: Original, case: dict[str, Any], machine: Machine) -> Tensor:
    """The case's final latent."""
    args, config = case["args"], task.plan.config
    image, size = None, args.get("size")
    if "image" in case:
        image = Image.open(machine.root / "examples" / "tiny" / case["image"]).convert("RGB")
        size = video_size(config, image.size, (args["max_area"], 1))
    sampling = Sampling(args["sample_solver"], args["sampling_steps"], args["shift"], both(args["guide_scale"]))
    video = Video(case["prompt"], config.sample_neg_prompt, tuple(size), args["frame_num"], args["seed"], image)
    return task.sample_with(sampling, video)


def decode(case: dict[str, Any], machine: Machine, *, tiled: bool = False, in_tf32: bool = False) -> Tensor:
    """The video of the case's golden latent, on the CPU."""
    task = open_task(case, machine.usual, machine, vae_tiling=tiled)
    with tf32(in_tf32):
        return on_cpu(task.decode(expectation(machine)[f"{case['name']}.latent"]))


def expectation(machine: Machine) -> dict[str, Tensor]:
    """The results of the original pipelines, by `case.stage`."""
    return load_file(machine.root / "tests" / "golden" / "expected.safetensors")


def on_cpu(chunks: Iterable[Tensor]) -> Tensor:
    """A decoded video, whole."""
    return torch.cat([chunk.cpu() for chunk in chunks], dim=1)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Convolutions in TF32 or not, where a GPU can; PyTorch's default leaves matrix products in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def judge(name: str, error: float, limits: float | tuple[float, float], advice: str) -> Finding:
    """The verdict on an error with a limit, or with two; NaN is wrong."""
    least, limit = limits if isinstance(limits, tuple) else (0.0, limits)
    good, allowed = least <= error <= limit, f"{least:g} to {limit:g}" if least else f"at most {limit:g}"
    values = {"error": error, "least": least, "limit": limit}
    return Finding(GOOD if good else WRONG, f"{name} {error:.1e}, allowed {allowed}", "" if good else advice, values)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square error over the reference's root mean square."""
    difference = found.double() - reference.double()
    return (difference.square().mean() / reference.double().square().mean()).sqrt().item()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the stage's largest magnitude."""
    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} is compared with {list(expected.shape)}")
    return ((found - expected).abs().max() / expected.abs().max()).item()
