"""Tokens divided over ranks give the numbers of one process: attention alone, and whole forwards."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.counters import CostCounter
from tests.distributed.ranks import mesh_of, run_ranks
from tests.support import relative_error
from wan.distributed import ulysses
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Layout
from wan.distributed.ulysses import SequenceAttention, SequenceSplit, exchange_bytes, split_tokens
from wan.modules.attention import sdpa
from wan.modules.model import Prompt, SelfAttention, WanModel

# (ranks, ulysses, ring)
LAYOUTS = [(2, 2, 1), (4, 4, 1), (2, 1, 2), (4, 2, 2), (3, 1, 3), (4, 1, 4)]
TOKENS = [3, 5, 7, 60, 61, 257]  # of 5 over 4 ranks, a share is 2: the last rank has none, and no negative number


def random_attention(total: int, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    q, k, v = torch.randn(3, total, heads, 16, generator=generator).to(dtype)
    return q, k, v


def attend_over_ranks(runtime: Runtime, ulysses: int, ring: int, heads: int, padding_attended: bool) -> dict:
    mesh = mesh_of(runtime, ulysses, ring)
    split, attend = SequenceSplit(mesh), SequenceAttention(SelfAttention(heads * 16, heads, 1e-6), mesh)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for total in TOKENS:
            mine = [split.shard(x) for x in random_attention(total, heads, dtype)]
            padded = mine[0].shape[0] * runtime.team.size
            out = attend(*mine, padded if padding_attended else total)
            found[dtype, total] = split.gather(out, total)
    return found


@pytest.mark.parametrize(("ranks", "ulysses", "ring"), LAYOUTS)
def test_attention_of_all_tokens(ranks: int, ulysses: int, ring: int) -> None:
    heads = 4 if ulysses > 1 else 3
    for found in run_ranks(attend_over_ranks, ranks, ulysses, ring, heads, False):
        for (dtype, total), out in found.items():
            want = sdpa(*random_attention(total, heads, dtype))
            # float32 sums differ in order only; bf16 kernels round each part of a ring to 2^-9 of its size, and the
            # result once more
            assert relative_error(out.float(), want.float()) < (1e-6 if dtype == torch.float32 else 2**-7), total


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_attended_padding_would_show(ulysses: int, ring: int) -> None:
    found = run_ranks(attend_over_ranks, 2, ulysses, ring, 4, True)[0]
    want = sdpa(*random_attention(61, 4, torch.float32))
    assert (found[torch.float32, 61] - want).abs().max() > 1e-3


def random_model(heads: int, width: int, text_dim: int = 32) -> WanModel:
    torch.manual_seed(heads)
    sizes = {"dim": heads * width, "ffn_dim": 96, "in_dim": 8, "out_dim": 8, "num_heads": heads, "num_layers": 2}
    model = WanModel(**sizes, text_dim=text_dim, text_len=16)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    return model.eval().requires_grad_(False)


def forwards(model: WanModel, grids: list[tuple[int, int, int]]) -> list[Tensor]:
    """Each grid at one timestep, with the first frame pinned (two timesteps), and led away from a negative prompt."""
    found = []
    for grid in grids:
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(8, grid[0], 2 * grid[1], 2 * grid[2], generator=generator)
        prompt = Prompt(torch.randn(5, 32, generator=generator))
        with torch.no_grad():
            found += [model(latent, 625.0, prompt, pinned) for pinned in (0, 1)]
            negative = Prompt(torch.randn(3, 32, generator=generator))
            found.append(model(latent, 625.0, Prompt(prompt.rows, negative, (11.0, 2.5, 0.25))))
    return found


GRIDS = [(3, 4, 5), (2, 3, 3), (1, 1, 2), (2, 5, 7)]  # 60, 18, 2 and 70 tokens: fewer than ranks, and not divisible


def split_forwards(runtime: Runtime, heads: int, ulysses: int, ring: int) -> list[Tensor]:
    model = random_model(heads, 12)
    split_tokens(model, mesh_of(runtime, ulysses, ring))
    return forwards(model, GRIDS)


@pytest.mark.parametrize(
    ("ranks", "heads", "ulysses", "ring"),
    [(3, 24, 3, 1), (4, 24, 4, 1), (4, 40, 2, 1), (2, 3, 1, 2), (4, 24, 2, 2), (3, 40, 1, 3)],
)
def test_forward(ranks: int, heads: int, ulysses: int, ring: int) -> None:
    want = forwards(random_model(heads, 12), GRIDS)
    assert max(x.abs().max() for x in want) > 0.1, "the network says something"
    for found in run_ranks(split_forwards, ranks, heads, ulysses, ring):
        for x, y in zip(found, want, strict=True):
            assert relative_error(x, y) < 1e-5


def fails_before_the_gather(runtime: Runtime) -> str:
    """The head of one rank fails; the others are about to gather its tokens."""
    mesh, model = mesh_of(runtime, 2), random_model(4, 12)
    split_tokens(model, mesh)

    def fail(*_: object) -> None:
        raise ValueError("no head")

    if runtime.team.rank == 1:
        model.head.register_forward_pre_hook(fail)
    try:
        mesh.team.all_or_none(lambda: forwards(model, GRIDS[:1]))
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_rank_that_fails_before_the_gather_is_not_waited_for() -> None:
    assert run_ranks(fails_before_the_gather, 2) == ["no head"] * 2


def test_a_rings_buffers_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in the middle, whose keys and values and the next ones are there: counted at sizes where the small
    tensors of logarithms are a tenth."""
    layout = Layout(4, 1, 4)
    mesh = cast(Any, SimpleNamespace(layout=layout, ulysses=None, ring="a group", ring_rank=0))
    monkeypatch.setattr(ulysses, "_passed_on", lambda *_: nullcontext())
    weights = partial(torch.empty, dtype=torch.float32)
    monkeypatch.setattr(ulysses, "attention_and_weight", lambda q, *_: (torch.empty_like(q), weights(q.shape[:2])))
    with torch.device("meta"):
        q, k, v = (torch.empty(300, 8, 128, dtype=torch.bfloat16) for _ in range(3))
        attend = SequenceAttention(SelfAttention(1024, 8, 1e-6), mesh)
        with CostCounter() as counter:
            attend(q, k, v, 1200)
    assert counter.peak == pytest.approx(exchange_bytes(layout, 300, 1024, 2), rel=0.12)


def test_an_exchanges_buffers_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside queries, keys and values, which are there before."""
    layout = Layout(4, 4, 1)
    mesh = cast(Any, SimpleNamespace(layout=layout, ulysses="a group", ring=None, ring_rank=0))
    monkeypatch.setattr(ulysses, "all_to_all", lambda send, _: torch.empty_like(send))
    with torch.device("meta"):
        attention = SelfAttention(64, 8, 1e-6)
        attention.backend = lambda q, *_: torch.empty(q.shape, dtype=q.dtype)
        q, k, v = (torch.empty(300, 8, 8, dtype=torch.bfloat16) for _ in range(3))
        with CostCounter() as counter:
            out = SequenceAttention(attention, mesh)(q, k, v, 1200)
    assert counter.peak == exchange_bytes(layout, 300, 64, 2) + out.nbytes
    assert exchange_bytes(Layout(4, 1, 1), 300, 64, 2) == 0
