"""The two video autoencoders against what the originals computed, and against diffusers on the same random weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.counters import CostCounter
from benchmarks.measure import randomise
from benchmarks.vae import CACHE, count_decode, to_diffusers
from examples.shapes.world import held_out, render
from tests.support import CASES, TINY, assert_decodes, checkpoint, golden, manifest, relative_error
from wan.checkpoints.pth_file import open_pickle
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAES, WanVAE, released_vae
from wan.modules.vae_layers import (
    FEW_PRODUCTS,
    NORM_EPSILON,
    STRIPS,
    ClipState,
    Region,
    RMSNorm,
    convolve,
    convolve_causally,
    doubling,
)
from wan.offload.reader import Source, load

SHAPES = Path(__file__).parents[2] / "examples" / "shapes" / "Wan2.2-T2V-A14B"
KINDS = {"2.1": (16, 8, 8, False), "2.2": (48, 8, 12, True)}
STAGE = 1e-5  # largest error over the stage's largest magnitude, float32 on a CPU

RELEASED = {"2.1": VAES[16], "2.2": VAES[48]}


def random_vae(kind: str, dtype: torch.dtype = torch.float32) -> WanVAE:
    """Small widths, no parameter at a special value: gammas of one would hide their use."""
    torch.manual_seed(0)
    vae = WanVAE(*KINDS[kind]).to(dtype)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return vae


def random_clip(frames: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


def whole(vae: WanVAE, latent: Tensor, **arguments: object) -> Tensor:
    return torch.cat(list(vae.decode(latent, **arguments)), dim=1)


def statistics(vae: WanVAE) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values[vae.z_dim])[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
    return mean, std


# The released checkpoints


@pytest.mark.parametrize(("name", "z_dim", "stride"), [("vae2_1", 16, (4, 8, 8)), ("vae2_2", 48, (4, 16, 16))])
def test_parameters_are_the_released_ones(name: str, z_dim: int, stride: tuple[int, int, int]) -> None:
    shapes = manifest(name)
    with torch.device("meta"):
        vae = WanVAE.from_shapes(shapes)
    assert {k: tuple(v.shape) for k, v in vae.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in vae.parameters())
    assert (vae.z_dim, vae.stride) == (z_dim, stride)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"conv2.weight": None}, "conv2.weight"),
        ({"decoder.middle.1.proj.bias": None}, "decoder.middle.1.proj.bias is missing"),
        ({"decoder.extra": (3,)}, "decoder.extra is not part of it"),
        ({"encoder.middle.1.to_qkv.weight": (1, 2, 1, 1)}, r"encoder.middle.1.to_qkv.weight is \(1, 2, 1, 1\), not "),
        ({"conv2.weight": (4, 4, 1, 1, 1)}, "4 latent channels, not 16 or 48"),
        ({"encoder.conv1.weight": (64, 3, 3, 3, 3)}, "and [0-9]+ more"),
    ],
)
def test_other_shapes_are_refused(change: dict, named: str) -> None:
    shapes = {k: v for k, v in {**manifest("vae2_1"), **change}.items() if v is not None}
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        WanVAE.from_shapes(shapes)


# Results of the originals


def golden_vae(task: str) -> WanVAE:
    [path] = checkpoint(task).glob("*_VAE.pth")
    tensors = torch.load(path, weights_only=True)
    with torch.device("meta"):
        vae = WanVAE.from_shapes({name: tensor.shape for name, tensor in tensors.items()})
    vae.load_state_dict(tensors, assign=True)
    return vae


def image_of(case: dict) -> Tensor:
    """[3, H, W]: I2V stretches the image to the size, without smoothing; TI2V covers the size and cuts the middle."""
    height, width = case["video_shape"][2:]
    with Image.open(TINY / case["image"]) as file:
        image = file.convert("RGB")
    if case["task"] == "ti2v-5B":
        scale = max(width / image.width, height / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    pixels = (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    return F.interpolate(pixels[None], (height, width), mode="bicubic")[0] if case["task"] == "i2v-A14B" else pixels


@pytest.mark.parametrize("name", CASES)
def test_golden_decode(name: str) -> None:
    vae = golden_vae(CASES[name]["task"])
    assert_decodes(whole(vae, golden()[f"{name}.latent"]), vae, name, STAGE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "image" in case])
def test_golden_image_latent(name: str) -> None:
    case, expected = CASES[name], golden()[f"{name}.image_latent"]
    frames = 1 if case["task"] == "ti2v-5B" else case["args"]["frame_num"]
    latent = golden_vae(case["task"]).encode(image_of(case)[:, None], frames=frames)
    assert latent.dtype == torch.float32
    assert latent.shape == expected.shape
    assert (latent - expected).abs().max() <= STAGE * expected.abs().max()


# diffusers


@pytest.mark.parametrize("frames", [1, 5, 17, 19])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_diffusers(kind: str, frames: int) -> None:
    vae = random_vae(kind)
    vae.decoder.head["2"].weight.data *= 0.1  # so that nothing is clamped and every error shows
    vae.decoder.head["2"].bias.data *= 0.1
    peer = to_diffusers(vae)
    clip = random_clip(frames, 32, 64)
    mean, std = statistics(vae)
    with torch.no_grad():
        expected = peer.encode(clip[None]).latent_dist.mode()[0]
        latent = vae.encode(clip)
        assert latent.shape[1] == (frames - 1) // 4 + 1
        assert (latent * std + mean - expected).abs().max() <= STAGE * expected.abs().max()
        latent = torch.randn(latent.shape)
        expected = peer.decode((latent * std + mean)[None]).sample[0]
        video = whole(vae, latent)
    assert expected.abs().max() < 1
    assert (video - expected).abs().max() <= STAGE * expected.abs().max()


def test_attention_takes_part() -> None:
    vae, clip = random_vae("2.1"), random_clip(1, 32, 32)
    before = vae.encode(clip)
    vae.encoder.middle[1].proj.weight.data.zero_()
    assert (vae.encode(clip) - before).abs().max() > 0.01


# Bad input, precision, cost


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5, 20, 32), "multiples of 8, not 32 x 20"),
        ((3, 0, 16, 16), r"not \[3, 0, 16, 16\]"),
        ((1, 5, 16, 16), r"not \[1, 5, 16, 16\]"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_vae("2.1").encode(torch.zeros(shape))


def test_calls_that_make_no_sense_are_refused() -> None:
    vae = random_vae("2.1")
    with pytest.raises(ValueError, match=r"\[16, frames, rows, columns\], not \[48, 1, 2, 2\]"):
        whole(vae, torch.zeros(48, 1, 2, 2))
    with pytest.raises(ValueError, match="3 x 1 tiles do not fit a grid of 2 x 2 cells"):
        whole(vae, torch.zeros(16, 1, 2, 2), tiles=(3, 1))
    with pytest.raises(ValueError, match="chunk must be 1 or more, not 0"):
        whole(vae, torch.zeros(16, 1, 2, 2), chunk=0)
    with pytest.raises(ValueError, match="chunk 1 or more, not 5 and 0"):
        vae.encode(torch.zeros(3, 5, 16, 16), chunk=0)


def decibels(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of videos in [-1, 1]."""
    return -10 * (found - expected).square().mean().div(4).log10().item()


def trained() -> WanVAE:
    store = open_pickle(SHAPES / "Wan2.1_VAE.pth")
    with torch.device("meta"):
        vae = WanVAE.from_shapes(store.shapes)
    return load(vae, Source(store, lambda _: torch.float32), torch.device("cpu"))


def test_bf16_decode_stays_near_and_encode_stays_the_same() -> None:
    """With trained weights on true clips, 56 to 61 dB from float32 were measured; rounding to 8 bits is at 59."""
    vae = trained()
    for number, scene in enumerate(held_out()[:2]):
        latent = vae.encode(clip := render([scene], torch.Generator().manual_seed(number))[0])
        vae.decode_in(torch.float32)
        expected = whole(vae, latent)
        vae.decode_in(torch.bfloat16)
        found = whole(vae, latent)
        assert found.dtype == torch.float32
        assert decibels(found, expected) > 54
        assert torch.equal(vae.encode(clip), latent)


@pytest.mark.parametrize("kind", ["2.1", pytest.param("2.2", marks=pytest.mark.slow)])
def test_bf16_decode_at_the_released_widths(kind: str) -> None:
    """47.2 dB from float32 with random weights, which keep more noise than trained ones."""
    vae = WanVAE(*RELEASED[kind])
    randomise(vae)
    latent = torch.randn(vae.z_dim, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = whole(vae, latent)
    vae.decode_in(torch.bfloat16)
    assert decibels(whole(vae, latent), expected) > 46


def test_weight_layout_changes_nothing_but_layout() -> None:
    vae = random_vae("2.2")
    latent, names = torch.randn(48, 2, 2, 3), list(vae.state_dict())
    before = whole(vae, latent)
    vae.use_channels_last()
    assert vae.decoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert list(vae.state_dict()) == names
    assert (whole(vae, latent) - before).abs().max() < 1e-5


@pytest.mark.parametrize(("channels", "out"), [(8, 4), (6, 6)])
def test_doubling_equals_repeating_pixels_and_convolving(channels: int, out: int) -> None:
    """Up to the rounding of the weights' sums: 2e-7 of the largest value measured, 1e-6 asked."""
    conv, x = nn.Conv2d(channels, out, 3, padding=1), torch.randn(3, channels, 5, 7)
    with torch.no_grad():
        expected = conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        found = F.conv_transpose2d(x, doubling(conv.weight), conv.bias, stride=2, padding=1)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("chunk", "tiles", "region", "dtype"),
    [
        (2, (1, 1), None, torch.float32),
        (1, (1, 1), None, torch.bfloat16),
        (1, (2, 3), None, torch.float32),
        (2, (1, 1), Region(10, 20, 13, 26), torch.float32),
    ],
)
def test_peak_of_a_decode_is_predicted(
    kind: str, chunk: int, tiles: tuple[int, int], region: Region | None, dtype: torch.dtype
) -> None:
    """Counted at the released widths, by the same rules as the benchmark's."""
    shape = (KINDS[kind][0], 2 * chunk + 1, 30, 52)
    with torch.device("meta"), torch.inference_mode():
        vae = WanVAE(*RELEASED[kind])
        vae.decode_in(dtype)
        with CostCounter() as counter:
            latent = torch.empty(shape)
            share = vae.decode_region(vae.decode_features(latent, chunk), region, chunk) if region else None
            for part in share or vae.decode(latent, chunk, tiles):
                del part
    waiting = 0 if tiles == (1, 1) else 4 * 3 * (4 * shape[1] - 3) * shape[2] * shape[3] * vae.stride[1] ** 2
    assert 1 <= vae.decode_peak(shape, chunk, tiles, region) / (counter.peak - waiting) < 1.1


@pytest.mark.parametrize(
    ("known", "tiles", "region"),
    [
        (1, (1, 1), None),
        (1, (1, 2), None),
        (1, (1, 1), Region(10, 20, 13, 26)),
        (13, (1, 1), None),
        (13, (2, 2), Region(0, 30, 0, 26)),
    ],
)
def test_peak_of_an_images_encoding_is_predicted(known: int, tiles: tuple[int, int], region: Region | None) -> None:
    """known: frames that are given: of a clip with a last picture all of them."""
    frames = 25 if known == 1 else known
    with torch.device("meta"), torch.inference_mode():
        vae, clip = WanVAE(*RELEASED["2.1"]), torch.empty(3, known, 240, 416)
        with CostCounter() as counter:
            vae.encode_region(clip, region, frames, tiles=tiles)
    assert 1 <= vae.encode_peak(((frames - 1) // 4 + 1, 30, 52), tiles, region) / counter.peak < 1.1


def test_a_norm_reads_and_writes_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intermediates between norm and SiLU stay in the cache, and strips change no bit."""
    with torch.device("meta"), torch.inference_mode():
        monkeypatch.setitem(STRIPS, "meta", STRIPS["cuda"])
        x, norm = torch.empty(2, 360, 640, 192), RMSNorm(192, axes=3)
        out = torch.empty_like(x)
        with CostCounter(CACHE) as counter:
            norm.activate(x, out)
    assert counter.traffic == pytest.approx(2 * x.nbytes, rel=1e-3)
    x, gamma = torch.randn(2, 100, 64, 96), torch.randn(96)
    norm = RMSNorm(96, axes=0).requires_grad_(False)
    norm.gamma.copy_(gamma)
    norm.activate(x, out := torch.empty_like(x))
    assert torch.equal(out, F.silu(F.rms_norm(x, gamma.shape, gamma, NORM_EPSILON)))


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3)])
def test_convolutions_of_any_kernel_equal_the_plain_one(kernel: tuple[int, int, int]) -> None:
    conv = nn.Conv3d(6, 10, kernel, stride=(2, 1, 1) if kernel[1] == 1 < kernel[0] else 1).double()
    x = torch.randn(5, 4, 7, 6, dtype=torch.float64)
    expected = conv(x.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    assert (convolve(conv, x) - expected).abs().max() < 1e-14


@pytest.mark.slow
def test_cost_of_a_720p_decode() -> None:
    """The original moves 7,353 GB; the limit is 2,300. After the first latent frame every two cost the same."""
    three, five = (count_decode("2.1", length=length) for length in (3, 5))
    assert five.traffic + (five.traffic - three.traffic) / 2 * (21 - 5) <= 2.3e12
    assert five.peak <= 20.5 * 2**30


@pytest.mark.slow
def test_cost_of_a_tiled_720p_decode() -> None:
    assert count_decode("2.1", chunk=1, tiles=(2, 2), length=5).peak <= 6.65 * 2**30


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_norms_of_the_autoencoder_divide_by_the_smallest_lengths(size: float) -> None:
    """The original divides by a length of at least 1e-12: values of 1e-7 become 1, zeros stay zeros."""
    norm, x = RMSNorm(4, axes=3).requires_grad_(False), size * torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(1, 1, 2, 4)
    expected = x.sign()
    torch.testing.assert_close(norm(x), expected)
    out = torch.empty(1, 1, 2, 4)
    norm.activate(x.contiguous(), out)
    torch.testing.assert_close(out, torch.nn.functional.silu(expected))


@pytest.mark.parametrize(("channels", "side", "called"), [(64, 3, "aten.addmm"), (8, 9, "aten.mkldnn_convolution")])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), (1, 1, 1)), ((3, 1, 1), (2, 1, 1))])
@torch.no_grad()
def test_both_ways_of_a_cpu_are_the_convolution(
    monkeypatch: pytest.MonkeyPatch, channels: int, side: int, called: str, kernel: Any, stride: Any
) -> None:
    """Few pixels and many weights are a matrix product, others go to oneDNN."""
    monkeypatch.setattr("wan.modules.vae_layers.WEIGHTS_PER_PIXEL", 20)
    conv = nn.Conv3d(channels, 8, kernel, stride, padding=(0, kernel[1] // 2, kernel[2] // 2))
    x = torch.randn(5, side, side, channels)
    with CostCounter() as counter:
        found = convolve(conv, x)
    assert relative_error(found, convolve(copy.deepcopy(conv).double(), x.double())) < STAGE
    assert any(operation.startswith(called) for operation in counter.by_operation)


@pytest.mark.parametrize(
    ("channels", "cells", "rounded_once"), [(16, 60, True), (16, 62, False), (14, 60, False)], ids=str
)
@torch.no_grad()
def test_long_sums_of_few_products_are_added_in_64_bits(channels: int, cells: int, rounded_once: bool) -> None:
    conv, frames = nn.Conv3d(channels, 15, 3, padding=(0, 1, 1)), torch.randn(5, 7, 9, channels)
    exact = convolve_causally(copy.deepcopy(conv).double(), frames.double(), ClipState(cells))
    found = convolve_causally(conv, frames, ClipState(cells))
    assert torch.equal(found, exact.float()) == rounded_once


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_released_networks_add_in_their_own_precision(task: str) -> None:
    """From 64x64 on, the smallest video that anybody makes with them."""
    vae = released_vae(task)
    convolutions = [layer for layer in vae.modules() if isinstance(layer, nn.Conv3d) and layer.kernel_size[1] > 1]
    least = min(layer.weight.numel() for layer in convolutions)
    assert least * (64 // vae.stride[1]) ** 2 >= FEW_PRODUCTS


def test_every_tile_counts_the_cells_of_the_whole_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    class Counted(ClipState):
        def __init__(self, cells: int) -> None:
            counted.append(cells)
            super().__init__(cells)

    monkeypatch.setattr("wan.modules.vae.ClipState", Counted)
    vae = golden_vae("t2v-A14B")
    video = whole(vae, torch.randn(vae.z_dim, 2, 4, 6), tiles=(2, 3))
    vae.encode(video, tiles=(2, 3))
    assert counted == [4 * 6] * 14, "whole frames and six tiles, both ways"


@torch.no_grad()
def test_a_cpu_makes_no_products_with_the_zeros_before_a_clip() -> None:
    """Weights that would spoil them: the first frame needs one of three, the second two."""
    conv, state = nn.Conv3d(4, 6, 3, padding=(0, 1, 1)), ClipState(9999)
    conv.weight[:, :, 0] = torch.nan
    frames = torch.randn(5, 3, 4, 4)
    first, later = (convolve_causally(conv, frames, state) for _ in range(2))
    assert first.isnan().flatten(1).all(1).tolist() == [False, False, True]
    assert not first[:2].isnan().any()
    assert later.isnan().all()
