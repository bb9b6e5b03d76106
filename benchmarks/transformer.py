"""The transformer: static cost of a 720p forward (C1, C2), wall time beside diffusers' module (C3), and on a GPU the
full-size forward against the roofline (G1-G3).

    python -m benchmarks.transformer [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.counters import CostCounter, FlopCounterMode, attention
from benchmarks.measure import interleaved, machine, randomise, rms_error, synchronize, table
from lightning.names import diffusers_name
from wan.loading.stream import parameter_dtypes
from wan.modules.attention import BACKENDS, available, choose
from wan.modules.model import Prompt, WanModel
from wan.modules.passes import EAGER, Passes

A14B = {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "out_dim": 16, "num_heads": 40, "text_dim": 4096}
SMALL = {"dim": 1024, "ffn_dim": 4096, "in_dim": 16, "out_dim": 16, "num_heads": 8, "text_dim": 512, "num_layers": 4}
LATENTS = {"720p": (16, 21, 90, 160), "480p": (16, 21, 60, 104)}


def bf16(model: WanModel) -> WanModel:
    """The precision of a run in bf16."""
    dtype = parameter_dtypes(torch.bfloat16, False)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype(name))
    return model.eval().requires_grad_(False)


def static_block(fused: bool = True) -> CostCounter:
    """C1: one full-size block at 720p x 81 frames, keys and values of the text made already; its passes compiled, each
    counted as one operation, or plain."""
    with torch.device("meta"), torch.no_grad():
        model = bf16(WanModel(**A14B, num_layers=1))
        model.use_attention(attention)
        x, rows, text = torch.empty(75_600, 5120), torch.empty(1, 6, 5120), torch.empty(512, 5120).bfloat16()
        rotary, prompt = torch.empty(75_600, 64, 2), Prompt(torch.empty(100, 4096).bfloat16())
        arguments = ([x], rows, [(0, slice(0, 75_600))], rotary, 75_600, [prompt], [text])
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


def report_static() -> None:
    block, plain, forward = static_block(), static_block(fused=False), static_forward()
    table(
        "C1, C2: static cost at 1280x720x81, bf16 (deterministic)",
        [
            ("metric", "original", "must", "good", "best", "ours"),
            ("traffic of one block, GB", "230.9", "110", "80", "45", f"{block.traffic / 1e9:.1f}"),
            ("operations of one block", "87", "", "", "", str(block.calls)),
            ("traffic of one block, passes not compiled, GB", "", "", "", "", f"{plain.traffic / 1e9:.1f}"),
            ("peak live bytes of a forward, GB", "36.6", "14", "9", "7", f"{forward.peak / 1e9:.2f}"),
        ],
    )


@torch.no_grad()
def report_beside_diffusers(repeats: int) -> None:
    """C3: 3,120 tokens, bf16, the same weights in diffusers' module; errors against our float32."""
    model = WanModel(**SMALL)
    randomise(model)
    latent, text = torch.randn(16, 5, 48, 52), torch.randn(40, SMALL["text_dim"])
    expected = model.eval()(latent, 937.5, Prompt(text))
    twin = _diffusers_twin(model).to(torch.bfloat16)
    bf16(model)
    prompt = Prompt(text.bfloat16())
    padded = torch.cat([text, torch.zeros(512 - len(text), text.shape[1])]).bfloat16()[None]
    batch, timestep = latent.bfloat16()[None], torch.tensor([937.5])

    def ours() -> Tensor:
        return model(latent, 937.5, prompt)

    def theirs() -> Tensor:
        return twin(batch, timestep, padded).sample[0]

    seconds, peer = interleaved([ours, theirs], repeats)
    table(
        "C3: forward of dim 1024, 8 heads, 4 layers, 3,120 tokens, bf16",
        [
            ("module", "seconds", "rms error to float32", "speed"),
            ("diffusers", f"{peer:.3f}", f"{rms_error(theirs(), expected):.1e}", "1.00"),
            ("ours", f"{seconds:.3f}", f"{rms_error(ours(), expected):.1e}", f"{peer / seconds:.2f}"),
        ],
    )


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


@torch.no_grad()
def report_gpu(repeats: int, layers: int = 40) -> None:
    """G1-G3: the full-size forward, each attention back end, against this machine's own matmul rate."""
    device = torch.device("cuda")
    rate = matmul_rate(device)
    print(f"\nbf16 matmul 8192^3: {rate / 1e12:.0f} TFLOP/s; device copy: {copy_rate(device) / 1e12:.2f} TB/s")
    with device:
        model = bf16(WanModel(**A14B, num_layers=layers))
    randomise(model)
    check_against_float32(device)
    rows = [("forward", "attention", "seconds", "roofline", "ratio", "peak GB", "not matmul/attention")]
    for size, shape in LATENTS.items():
        latent, prompt = torch.randn(shape, device=device), Prompt(torch.randn(100, 4096, device=device).bfloat16())
        floor = flops(model, latent) / rate
        forward = partial(model, latent, 937.5, prompt)
        for name in available(device, torch.bfloat16):
            model.use_attention(BACKENDS[name])
            torch.cuda.reset_peak_memory_stats()
            (seconds,) = interleaved([forward], repeats)
            peak = torch.cuda.max_memory_allocated() / 1e9
            rest = share_of_the_rest(forward)
            rows.append((size, name, f"{seconds:.2f}", f"{floor:.2f}", f"{seconds / floor:.2f}", f"{peak:.1f}",
                         f"{rest:.1%}"))  # fmt: skip
    table(f"G1-G3: T2V-A14B forward, 81 frames, {layers} layers", rows)
    print(f"auto picks: {choose('auto', device, torch.bfloat16, 40, 128)}")


def check_against_float32(device: torch.device) -> None:
    """bf16 on the GPU against float32 on the CPU, same weights, two full-width blocks, every back end."""
    model = WanModel(**A14B, num_layers=2)
    randomise(model)
    latent, text = torch.randn(16, 3, 16, 16), torch.randn(20, 4096)
    expected = model(latent, 937.5, Prompt(text))
    bf16(model).to(device)
    for name in available(device, torch.bfloat16):
        model.use_attention(BACKENDS[name])
        found = model(latent.to(device), 937.5, Prompt(text.to(device).bfloat16())).cpu()
        error = rms_error(found, expected)
        print(f"{name}: rms error to float32 on the CPU {error:.1e}")
        assert error < 2e-2, f"{name} computes something else"


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 8192 x 8192 x 8192 product on random data."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = interleaved([lambda: a @ b], 20, warm_up=5)
    return 2 * 8192**3 / seconds


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


def share_of_the_rest(forward: Callable[[], object]) -> float:
    """Share of the GPU's time in kernels that are neither matmul nor attention."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        forward()
        synchronize()
    known = ("gemm", "cutlass", "flash", "fmha", "nvjet", "attention", "cudnn", "sm90", "xmma")
    times = {event.key: event.self_device_time_total for event in trace.key_averages()}
    rest = sum(t for key, t in times.items() if not any(word in key.lower() for word in known))
    return rest / sum(times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of which the median is taken")
    repeats = parser.parse_args().repeats
    print(machine())
    report_static()
    report_beside_diffusers(repeats)
    if torch.cuda.is_available():
        report_gpu(repeats)


if __name__ == "__main__":
    main()
