"""The autoencoder over ranks: the numbers of one process, and no rank left waiting when one fails."""

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.vae import count_decode
from tests.distributed.ranks import mesh_of, run_ranks
from tests.support import TESTS, checkpoint, config_of, relative_error
from wan.checkpoints.pth_file import open_pickle
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Layout
from wan.distributed.vae_parallel import SplitVAE, decode_peak, divide
from wan.doctor.forecast import released_plan
from wan.doctor.machine import Machine
from wan.modules.vae import WanVAE, released_vae
from wan.modules.vae_layers import Region, ResidualBlock
from wan.offload.reader import Source, load
from wan.planning.memory import plan_video
from wan.utils.errors import JobError

TASKS = ["t2v-A14B", "ti2v-5B"]  # one for each autoencoder
GRID = (9, 11)  # latent rows and columns: enough for each of 4 ranks to get a region, and not all alike


@cache
def vae_of(task: str) -> WanVAE:
    store = open_pickle(checkpoint(task) / config_of(task).vae_checkpoint)
    with torch.device("meta"):
        vae = WanVAE.from_shapes(store.shapes)
    return load(vae, Source(store, lambda _: torch.float32), torch.device("cpu"))


def latent_of(vae: WanVAE, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(vae.z_dim, 4, *grid, generator=torch.Generator().manual_seed(5))


def image_of(vae: WanVAE, grid: tuple[int, int] = GRID) -> Tensor:
    size = [grid[0] * vae.stride[1], grid[1] * vae.stride[2]]
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(6)) * 2 - 1


def decoded(runtime: Runtime, task: str, grid: tuple[int, int], tiles: tuple[int, int]) -> list[Tensor]:
    vae = SplitVAE(vae_of(task), mesh_of(runtime, runtime.team.size))
    return list(vae.decode(latent_of(vae_of(task), grid), tiles=tiles))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("ranks", "grid", "tiles"), [(2, GRID, (1, 1)), (4, GRID, (2, 2)), (4, (1, 3), (1, 1)), (4, (1, 3), (2, 2))]
)
def test_decode(task: str, ranks: int, grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    want = list(vae_of(task).decode(latent_of(vae_of(task), grid)))
    first, *others = run_ranks(decoded, ranks, task, grid, tiles)
    assert [chunk.shape for chunk in first] == [chunk.shape for chunk in want], "frames come chunk by chunk"
    assert relative_error(torch.cat(first, 1), torch.cat(want, 1)) < 1e-5
    assert others == [[]] * (ranks - 1)


def encoded(runtime: Runtime, task: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    vae = SplitVAE(vae_of(task), mesh_of(runtime, runtime.team.size))
    image = image_of(vae_of(task), grid)
    return vae.encode(image[:, None], tiles=(2, 2)), vae.encode(image[:, None], frames=9)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("ranks", "grid"), [(2, GRID), (4, GRID), (2, (1, 3))])
def test_encode(task: str, ranks: int, grid: tuple[int, int]) -> None:
    vae = vae_of(task)
    image = image_of(vae, grid)[:, None]
    want = vae.encode(image), vae.encode(image, frames=9)
    for found in run_ranks(encoded, ranks, task, grid):
        for x, y in zip(found, want, strict=True):
            assert relative_error(x, y) < 1e-5


def work_of_a_rank(runtime: Runtime, task: str) -> int:
    """Pixels that this rank's blocks of the decoder write."""
    pixels = 0

    def count(_module: torch.nn.Module, _inputs: object, out: Tensor) -> None:
        nonlocal pixels
        pixels += out[..., 0].numel()

    vae = vae_of(task)
    for module in vae.decoder.upsamples.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(count)
    mesh = mesh_of(runtime, runtime.team.size)
    split = vae if mesh.sequence is None else SplitVAE(vae, mesh)
    list(split.decode(torch.zeros(vae.z_dim, 1, 32, 48)))
    return pixels


def test_each_rank_does_its_part_of_the_work() -> None:
    whole = run_ranks(work_of_a_rank, 1, "t2v-A14B")[0]
    assert max(run_ranks(work_of_a_rank, 4, "t2v-A14B")) < 0.45 * whole  # a quarter and the rims


def test_the_first_rank_also_holds_what_it_gathers() -> None:
    """The pixels of a chunk of 8 frames in float32, as received and put together."""
    vae, shape = released_vae("t2v-A14B"), (16, 21, 30, 52)
    busiest = max(vae.decode_peak(shape, 2, (1, 1), region) for region in divide(30, 52, 4))
    assert decode_peak(vae, shape, 4) - busiest == 2 * (3 * 8 * 240 * 416 * 4)
    assert decode_peak(vae, shape, 1) == vae.decode_peak(shape, 2)


@pytest.mark.slow
def test_cost_of_a_720p_decode_on_one_of_eight_processes() -> None:
    """Counted at full size: at least 5 times less work than the 639 TFLOP of one process, and 4 times less memory."""
    cost = count_decode("2.1", chunk=2, tiles=(1, 1), processes=8)
    assert cost.flops < 639e12 / 5
    assert cost.peak < 20.3 * 2**30 / 4


def decode_and_fail(runtime: Runtime, failing: int, after: int) -> str:
    """One rank's network fails (or, on the first rank, what is done with the frames); all must learn of it."""
    vae = vae_of("t2v-A14B")
    mesh = mesh_of(runtime, runtime.team.size)
    split = SplitVAE(vae, mesh)
    if runtime.team.rank == failing and failing:
        split.vae = Failing(vae, after)  # type: ignore[assignment]  # has what SplitVAE uses

    def consume() -> None:
        for index, _ in enumerate(split.decode(latent_of(vae), chunk=1)):
            if failing == 0 and index == after:
                raise JobError("the disk is full")

    try:
        mesh.team.all_or_none(consume)
    except JobError as e:
        first = str(e)
    again = list(split.decode(latent_of(vae), chunk=1)) if failing == 0 else []
    return first + f", then {len(again)} chunks"


class Failing:
    def __init__(self, vae: WanVAE, after: int) -> None:
        self.decode: Callable[..., object] = lambda *_: self.fail(vae, after)

    def fail(self, vae: WanVAE, after: int) -> object:
        features = vae.decode_features(latent_of(vae), chunk=1)
        for index, chunk in enumerate(vae.decode_region(features, Region(0, 2, 0, 2), chunk=1)):
            if index == after:
                raise JobError("no memory left")
            yield chunk


@pytest.mark.parametrize("after", [0, 2])
def test_a_failing_rank_does_not_hold_up_the_others(after: int) -> None:
    peer = f"process 2 on {socket.gethostname()}"
    assert run_ranks(decode_and_fail, 4, 2, after) == [f"{peer}: no memory left, then 0 chunks"] * 4


def test_a_writer_that_stops_early_does_not_hold_up_the_others() -> None:
    found = run_ranks(decode_and_fail, 4, 0, 1)
    assert found == [f"the disk is full, then {chunks} chunks" for chunks in (4, 0, 0, 0)]


def test_tiles_are_planned_for_a_share() -> None:
    """With 12 GB one process decodes 720p in tiles; for each of four its share fits whole."""
    here = Machine(torch.device("cpu"), TESTS, TESTS)
    alone = released_plan("t2v-A14B", True, 12 * 10**9, here)
    shared = replace(alone, layout=Layout(4, 4, 1))
    budgets = [plan_video(plan, (1280, 720), 81).budget for plan in (alone, shared)]
    tiles = [budget.tiles for budget in budgets if budget]
    assert tiles == [(2, 2), (1, 1)]
    assert plan_video(replace(alone, layout=Layout(4, 1, 1)), (1280, 720), 81).budget == budgets[0], (
        "they share no video"
    )


def test_division() -> None:
    at_720p = divide(90, 160, 8)
    assert len(at_720p) == 8
    assert sum(region.area for region in at_720p) == 90 * 160
    assert {(r.bottom - r.top, r.right - r.left) for r in at_720p} == {(45, 40)}, "2 x 4 has the least rim"
    assert len(divide(90, 160, 7)) == 7
    assert len(divide(1, 3, 8)) == 1, "the rim of a part would be the whole"
    assert len(divide(4, 6, 1)) == 1
