"""From the released sizes to slots and peaks, without a weight."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.support import checkpoint, config_of, manifest
from wan.checkpoints.checkpoint import open_checkpoint
from wan.configs import TASKS
from wan.modules.model import released_transformer
from wan.modules.t5 import UMT5Encoder
from wan.offload.budget import FLOOR_BYTES, LEAST_SLOTS, POOLS_BYTES, Budget, Sizes, fit
from wan.offload.networks import Networks, sizes_of
from wan.offload.reader import Source, parameter_dtypes

GB = 10**9


@cache
def released(task: str, dtype: torch.dtype = torch.bfloat16) -> Sizes:
    return sizes_of(released_transformer(task), parameter_dtypes(dtype, convert_all=False))


@cache
def released_text_encoder() -> Sizes:
    with torch.device("meta"):
        return sizes_of(UMT5Encoder.from_shapes(manifest("umt5_xxl")), lambda _: torch.bfloat16)


def a14b(free: float, activations: float, decode: float = 6.0, **more: int) -> Budget:
    experts = dict.fromkeys(("high", "low"), released("t2v-A14B"))
    work = {"activations": int(activations * GB), "decode": int(decode * GB)}
    return fit(int(free * GB), experts, released_text_encoder(), **work, **more)


def test_sizes_of_the_released_networks() -> None:
    sizes = released("t2v-A14B")
    assert sizes.blocks == 41
    assert sizes.block_bytes == pytest.approx(0.703 * GB, rel=0.01)
    assert sizes.resident < 0.22 * GB
    assert released_text_encoder().block_bytes == pytest.approx(0.386 * GB, rel=0.01)
    assert released_text_encoder().resident < 10_000


def test_a14b_at_720p_takes_8_gb_with_the_activations_of_the_sheet() -> None:
    """5.4 GB live in a forward, two slots, what is always there of both experts, and what is in transit."""
    budget = a14b(8.0, 5.4)
    assert budget.problem is None
    assert budget.slots == LEAST_SLOTS
    assert budget.peaks["denoise"] == pytest.approx(7.32 * GB, rel=0.01)
    assert budget.peaks["text"] < 1.4 * GB


def test_too_little_is_a_sentence_that_names_the_parts() -> None:
    problem = a14b(6.0, 5.4).problem or ""
    assert problem.startswith("denoise needs at least 7.3 GB of the device (blocks 1.4, other weights 0.4, in transit")
    assert problem.endswith("work 5.4), 6.0 GB are free: use a smaller --size or fewer frames")
    assert "--vae_tiling" in (a14b(24.0, 5.4, decode=25.0).problem or "")


@pytest.mark.parametrize(
    ("free", "line"),
    [
        (8, "GPU 8.0 GB free: high and low expert: 0 of 41 blocks stay, 41 pass through 2 slots; "
            "text encoder passes through 3 slots; peaks in GB: denoise 7.3, decode 6.4, text 1.3"),
        (24, "GPU 24.0 GB free: high and low expert: 21 of 41 blocks stay, 20 pass through 3 slots; "
             "text encoder passes through 3 slots; peaks in GB: denoise 22.8, decode 6.4, text 1.3"),
        (48, "GPU 48.0 GB free: high and low expert: all 41 blocks stay while it runs, then their slots go to "
             "the next; text encoder passes through 3 slots; peaks in GB: denoise 46.7, decode 6.4, text 1.3"),
        (80, "GPU 80.0 GB free: high and low expert: all blocks stay; text encoder passes through 3 slots; "
             "peaks in GB: denoise 63.5, decode 6.4, text 1.3"),
    ],
)  # fmt: skip
def test_the_plan_says_what_stays(free: int, line: str) -> None:
    assert a14b(free, 5.4).line() == line


@pytest.mark.parametrize("free", [8, 12, 16, 24, 48, 80])
@pytest.mark.parametrize("task", TASKS)
def test_a_budget_uses_what_there_is_and_no_more(task: str, free: int) -> None:
    experts = {"model": released(task)} if task == "ti2v-5B" else dict.fromkeys(("high", "low"), released(task))
    budget = fit(free * GB, experts, None, activations=4 * GB, decode=2 * GB)
    assert budget.problem is None
    unused = max(0.03 * free * GB, 1.05 * FLOOR_BYTES) + POOLS_BYTES
    assert budget.resident or free * GB - budget.peak < unused + budget.experts[next(iter(experts))].block_bytes


def test_keeping_everything_takes_all_of_it() -> None:
    problem = a14b(48.0, 5.4, keep=True).problem or ""
    assert problem.startswith("decode needs at least 64.0 GB of the device")
    assert problem.endswith("48.0 GB are free: use --offload_model True")
    assert a14b(80.0, 5.4, keep=True).peaks["decode"] > 60 * GB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", [False, True])
def test_the_sizes_are_those_of_the_networks(dtype: torch.dtype, text: bool) -> None:
    """The estimate before loading against the bytes that lie there after it."""
    opened = open_checkpoint(checkpoint("t2v-A14B"), config_of("t2v-A14B"))
    part = opened.text_encoder if text else opened.experts["high"]
    dtypes: Callable[[str], torch.dtype] = (lambda _: dtype) if text else parameter_dtypes(dtype, convert_all=False)
    sizes = sizes_of(part.module, dtypes)
    networks = Networks({"it": (part.module, Source(part.weights, dtypes))}, torch.device("cpu"))
    assert networks.prefetcher.slot_bytes == sizes.block_bytes
    assert len(networks.prefetcher.blocks) == sizes.blocks
    there = sum(p.nbytes for p in networks.models["it"].parameters() if p.device.type != "meta")
    assert there <= sizes.resident < there + 256 * 100


@pytest.mark.parametrize(
    ("free", "slots", "batch_guidance"),
    [
        (8, 2, False),  # both residual streams do not fit: the passes run one after the other, as without
        (10, 2, True),
        (24, 22, True),
        (48, 58, False),  # an expert stays while it is at work: nothing comes twice
        (80, 82, False),
    ],
)
def test_passes_go_together_where_blocks_stream_and_memory_suffices(
    free: int, slots: int, batch_guidance: bool
) -> None:
    alone, budget = a14b(free, 5.4), a14b(free, 5.4, second_pass=int(1.55 * GB))
    assert (budget.slots, budget.batch_guidance) == (slots, batch_guidance)
    assert alone.slots - budget.slots in ((2, 3) if batch_guidance else (0,)), "1.55 GB are two slots and a part"
    assert budget.peaks["denoise"] <= free * GB
    assert budget.stages["denoise"]["work"] == int(5.4 * GB) + batch_guidance * int(1.55 * GB)
    assert ("each block serves both passes of a step" in budget.line()) == batch_guidance
    assert not a14b(free, 5.4, second_pass=int(1.55 * GB), keep=True).batch_guidance


def test_the_vae_leaves_where_parts_pass_through() -> None:
    """TI2V-5B's 2.8 GB are ten blocks; where all of an expert has room, or the VAE is asked for, it stays."""
    experts, vae = {"model": released("ti2v-5B")}, int(2.8 * GB)

    def budget(free: int, **more: bool) -> Budget:
        return fit(free * GB, experts, None, activations=3 * GB, decode=2 * GB, vae=vae, **more)

    short, kept, ample = budget(8), budget(8, vae_stays=True), budget(24)
    assert (short.vae_leaves, kept.vae_leaves, ample.vae_leaves) == (True, False, False)
    assert short.slots >= kept.slots + 8
    assert kept.stages["denoise"]["other weights"] - short.stages["denoise"]["other weights"] == vae
    assert short.stages["decode"] == kept.stages["decode"]
    assert all(each.peak <= each.free for each in (short, kept, ample))


@pytest.mark.parametrize(("free", "decode", "between"), [(8, 6.0, 0), (24, 8.0, 16), (80, 22.8, 65), (80, 6.0, 82)])
def test_between_two_videos_what_has_room_beside_the_decode_stays(free: int, decode: float, between: int) -> None:
    budget = a14b(free, 5.4, decode, vae=GB // 2)
    assert budget.between == between
    assert budget.between * budget.experts["high"].block_bytes + budget.peaks["decode"] <= free * GB
