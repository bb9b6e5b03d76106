"""The transformer: static cost of a 720p forward (C1, C2), wall time beside diffusers' module (C3), and on a GPU the
full-size forward against the roofline (G1-G3).

    python -m benchmarks.transformer [--repeats 5]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.counters import CostCounter, FlopCounterMode, attention
from benchmarks.measure import NEEDS_A_GPU, Row, command_parser, interleaved, randomise, rms_error, run, synchronize
from wan.checkpoints.key_mapping import diffusers_name
from wan.modules.attention import BACKENDS, available, choose
from wan.modules.fused import EAGER, Passes, compiled
from wan.modules.model import Prompt, WanModel
from wan.offload.reader import parameter_dtypes

A14B = {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "out_dim": 16, "num_heads": 40, "text_dim": 4096}
SMALL = {"dim": 1024, "ffn_dim": 4096, "in_dim": 16, "out_dim": 16, "num_heads": 8, "text_dim": 512, "num_layers": 4}
IN_A_ROW = 3  # forwards timed together, as a run's steps come: memory that one gave back serves the next
LIMITS = {
    "720p": "roofline x 1.45, good 1.30, best 1.20; rest 8, 5, 3 %",
    "480p": "roofline x 1.6, good 1.4, best 1.25; rest 8, 5, 3 %",
}
LATENTS = {"720p": (16, 21, 90, 160), "480p": (16, 21, 60, 104)}


def bf16(model: WanModel) -> WanModel:
    """The precision of a run in bf16."""
    dtype = parameter_dtypes(torch.bfloat16, False, model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype(name))
    return model.eval().requires_grad_(False)


def static_block(fused: bool = True, tokens: int = 75_600, form: str | None = None) -> CostCounter:
    """C1: one full-size block at 720p x 81 frames, keys and values of the text made already; its passes compiled, each
    counted as one operation, or plain; its weights in bf16 or of `form`."""
    with torch.device("meta"), torch.no_grad():
        model = WanModel(**A14B, num_layers=1)
        if form:
            model.quantise(form, kept=0)
        bf16(model)
        model.use_attention(attention)
        x, rows, text = torch.empty(tokens, 5120), torch.empty(1, 6, 5120), torch.empty(512, 5120).bfloat16()
        rotary, prompt = torch.empty(tokens, 64, 2), Prompt(torch.empty(100, 4096).bfloat16())
        arguments = ([x], rows, [(0, slice(0, tokens))], rotary, tokens, [[(prompt, text)]])
        model.blocks[0](*arguments)
        counter = CostCounter()
        if fused:
            model.use_passes(Passes(*(counter.fused(each) for each in EAGER)))
        with counter:
            model.blocks[0](*arguments)
    return counter


def static_forward(layers: int = 2) -> CostCounter:
    """C2: a 720p forward; what is alive at once does not depend on the number of layers."""
    with torch.device("meta"), torch.no_grad():
        model = bf16(WanModel(**A14B, num_layers=layers))
        model.use_attention(attention)
        latent, prompt = torch.empty(LATENTS["720p"]), Prompt(torch.empty(100, 4096).bfloat16())
        model(latent, 1000.0, prompt)
        with CostCounter() as counter:
            model(latent, 1000.0, prompt)
    return counter


def static_rows() -> list[Row]:
    block, plain, forward = static_block(), static_block(fused=False), static_forward()
    original, limit = "original 230.9 GB, 87 operations; ", "must 110, good 80, best 45 GB"
    what = "C1 traffic of one transformer block, 1280x720x81, bf16 (static): passes compiled"
    peak = Row("C2 peak live bytes of a forward at 1280x720x81, passes not compiled (static)",
               f"**{forward.peak / 1e9:.2f} GB**", "original 36.6 GB; must 14, good 9, best 7 GB")  # fmt: skip
    return [
        Row(what, f"**{block.traffic / 1e9:.1f} GB**, {block.calls} operations", original + limit),
        Row("the same, passes not compiled", f"{plain.traffic / 1e9:.1f} GB, {plain.calls} operations"),
        peak,
    ]


@torch.no_grad()
def rows_beside_diffusers(repeats: int) -> list[Row]:
    """C3: 3,120 tokens, bf16, the same weights in diffusers' module; errors against our float32. Ours eager and with
    compiled passes, theirs eager and compiled whole."""
    model = WanModel(**SMALL)
    randomise(model)
    latent, text = torch.randn(16, 5, 48, 52), torch.randn(40, SMALL["text_dim"])
    expected = model.eval()(latent, 937.5, Prompt(text))
    twin = _diffusers_twin(model).to(torch.bfloat16)
    fused = copy.deepcopy(bf16(model))
    fused.use_passes(compiled())
    whole = torch.compile(copy.copy(twin), dynamic=False)
    padded = torch.cat([text, torch.zeros(512 - len(text), text.shape[1])]).bfloat16()[None]
    batch, timestep = latent.bfloat16()[None], torch.tensor([937.5])

    def ours(module: WanModel, prompt: Prompt) -> Tensor:
        return module(latent, 937.5, prompt)

    def theirs(module: Callable[..., Any]) -> Tensor:
        return module(batch, timestep, padded).sample[0]

    ways = [partial(theirs, twin), partial(ours, model, Prompt(text.bfloat16()))]
    compiling = []
    try:
        for way in (partial(theirs, whole), partial(ours, fused, Prompt(text.bfloat16()))):
            start = time.perf_counter()
            way()
            compiling.append(time.perf_counter() - start)
            ways.append(way)
    except Exception as e:  # noqa: BLE001 - a compiler on this machine may fail in any way
        print(f"nothing is compiled here: {type(e).__name__}: {e}"[:200])
        del ways[2:]
    errors = [rms_error(way(), expected) for way in ways]
    steps = [partial(_in_a_row, way) for way in ways]
    seconds = [spent / IN_A_ROW for spent in interleaved(steps, repeats, clock=time.process_time)]
    words = [f"{second:.2f} s, rms error {error:.1e}" for second, error in zip(seconds, errors, strict=True)]
    peer = f"diffusers {words[0]}"
    what = "C3 forward, dim 1024, 8 heads, 4 layers, 3,120 tokens, bf16, CPU seconds"
    found = [Row(what, f"{words[1]} (**{seconds[0] / seconds[1]:.2f} x**)", "1.1 x diffusers", peer)]
    if len(ways) > 2:
        ratios = f"**{seconds[0] / seconds[3]:.2f} x**; {seconds[2] / seconds[3]:.2f} x compiled"
        ratios += f", not compiled {seconds[2] / seconds[1]:.2f} x compiled"
        figure = f"{words[3]} ({ratios}), compiling took {compiling[1]:.0f} s"
        limit = "1.0 x diffusers compiled"
        found.append(Row("the same, our passes compiled, diffusers' module compiled whole", figure, limit,
                         f"compiled: {words[2]}, compiling took {compiling[0]:.0f} s"))  # fmt: skip
    return found


def _in_a_row(way: Callable[[], Any]) -> None:
    for _ in range(IN_A_ROW):
        way()


def _diffusers_twin(model: WanModel) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    twin = WanTransformer3DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_width,
        in_channels=16,
        out_channels=16,
        text_dim=SMALL["text_dim"],
        ffn_dim=SMALL["ffn_dim"],
        num_layers=SMALL["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    twin.load_state_dict({diffusers_name(name): p for name, p in model.state_dict().items()})
    return twin.eval().requires_grad_(False)


def gpu_works() -> dict[str, Callable[[], list[Row]]]:
    """G1-G3 by name, each with a network of its own: a minute on a GPU, and one that fails costs the others nothing."""
    if not torch.cuda.is_available():
        return {f"G1-G3 {size}": partial(_absent, size) for size in LATENTS}
    device = torch.device("cuda")
    works: dict[str, Callable[[], list[Row]]] = {
        "G1-G3 rates of the machine": partial(machine_rates, device),
        "G1-G3 bf16 beside float32": partial(beside_float32, device),
    }
    for size in LATENTS:
        for name in available(device, torch.bfloat16):
            works[f"G1-G3 {size} {name}"] = partial(forward_on_gpu, device, size, name)
        works[f"G1-G3 {size}, not compiled"] = partial(forward_on_gpu, device, size, "auto", False)
    return works


def _absent(size: str) -> list[Row]:
    return [Row(f"G1-G3 forward of T2V-A14B, 81 frames, {size}", NEEDS_A_GPU, LIMITS[size])]


def machine_rates(device: torch.device) -> list[Row]:
    """The base that all other rows are divided by, and the choice of "auto"."""
    rates = f"{matmul_rate(device) / 1e12:.0f} TFLOP/s; {copy_rate(device) / 1e12:.2f} TB/s"
    chosen = choose("auto", device, torch.bfloat16, A14B["num_heads"], 128)
    return [Row("bf16 matmul 8192^3; device copy", rates), Row("what `--attention auto` picks", str(chosen))]


@torch.no_grad()
def forward_on_gpu(
    device: torch.device, size: str, name: str, fused: bool = True, layers: int = 40, repeats: int = 3
) -> list[Row]:
    """The full-size forward with one attention back end, against this machine's own matmul rate."""
    if name == "auto":
        name = choose("auto", device, torch.bfloat16, A14B["num_heads"], 128).name
    with torch.device("meta"):
        model = bf16(WanModel(**A14B, num_layers=layers))
    randomise(model.to_empty(device=device))
    model.use_passes(compiled() if fused else EAGER)
    model.use_attention(BACKENDS[name])
    latent, prompt = torch.randn(LATENTS[size], device=device), Prompt(torch.randn(100, 4096, device=device).bfloat16())
    floor = flops(model, latent) / matmul_rate(device)
    forward = partial(model, latent, 937.5, prompt)
    forward()  # compiles, makes the keys of the prompt
    torch.cuda.reset_peak_memory_stats()
    (seconds,) = interleaved([forward], repeats, warm_up=0)
    peak = torch.cuda.max_memory_allocated() / 1e9
    passed = "compiled" if fused else "not compiled"
    what = f"G1-G3 forward of T2V-A14B, 81 frames, {size}, {layers} layers, {name}, passes {passed}"
    figure = f"{seconds:.2f} s, **{seconds / floor:.2f} x** the roofline of {floor:.2f} s, peak {peak:.1f} GB"
    return [Row(what, f"{figure}, {share_of_the_rest(forward)}", LIMITS[size])]


@torch.no_grad()
def beside_float32(device: torch.device) -> list[Row]:
    """bf16 on the GPU against float32 on the CPU, same weights, two full-width blocks, every back end."""
    model = WanModel(**A14B, num_layers=2)
    randomise(model)
    latent, text = torch.randn(16, 3, 16, 16), torch.randn(20, 4096)
    expected = model(latent, 937.5, Prompt(text))
    bf16(model).to(device)
    errors = {}
    for name in available(device, torch.bfloat16):
        model.use_attention(BACKENDS[name])
        found = model(latent.to(device), 937.5, Prompt(text.to(device).bfloat16())).cpu()
        errors[name] = rms_error(found, expected)
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return [Row("two blocks in bf16 against float32 on the CPU, rms error", listed, "must 2e-2")]


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 8192,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of a product of two square matrices of random data."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = interleaved([lambda: a @ b], 20, warm_up=5, clock=clock)
    return 2 * size**3 / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read plus written, of a 4 GB copy within the device."""
    a = torch.randn(1 << 30, device=device)
    b = torch.empty_like(a)
    (seconds,) = interleaved([lambda: b.copy_(a)], 10, warm_up=2)
    return 2 * a.nbytes / seconds


def flops(model: WanModel, latent: Tensor) -> int:
    """Operations of the forward's linear layers and attention (4 L^2 D a block), counted without running it."""
    with torch.device("meta"):
        twin = WanModel(**A14B, num_layers=len(model.blocks))
        twin.use_attention(attention)
        with FlopCounterMode(display=False) as counter:
            twin(torch.empty(latent.shape), 1000.0, Prompt(torch.empty(100, 4096)))
    tokens = latent[0].numel() // 4
    return counter.get_total_flops() + len(model.blocks) * 4 * (tokens**2 + tokens * 512) * A14B["dim"]


def share_of_the_rest(forward: Callable[[], object]) -> str:
    """Share of the GPU's time in kernels that are neither matmul nor attention, in words."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        forward()
        synchronize()
    known = ("gemm", "cutlass", "flash", "fmha", "nvjet", "attention", "cudnn", "sm90", "xmma")
    times = {event.key: event.self_device_time_total for event in trace.key_averages()}
    whole = sum(times.values())
    if not whole:  # in a container the profiler may see nothing
        return "of what is neither matmul nor attention the profiler says nothing here"
    rest = sum(t for key, t in times.items() if not any(word in key.lower() for word in known))
    return f"{rest / whole:.1%} neither matmul nor attention"


def works(repeats: int = 5) -> dict[str, Callable[[], list[Row]]]:
    """Measurements without a GPU, by name."""
    return {"C1, C2 transformer": static_rows, "C3 transformer": partial(rows_beside_diffusers, repeats)}


def main() -> None:
    run({**works(command_parser(__doc__, repeats=5).parse_args().repeats), **gpu_works()})


if __name__ == "__main__":
    main()
