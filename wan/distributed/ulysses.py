"""Sequence parallelism: Ulysses (arXiv 2309.14509), and a ring (arXiv 2310.01889) where the heads do not suffice.

Shapes: L a rank's tokens, padding included (equal on all ranks), S = ranks x L, N heads, d head width, P Ulysses ranks,
R ring ranks. A rank holds some tokens of all heads; for attention, all tokens of its Ulysses group and N / P heads.
In a ring Lq are a rank's queries and Lk the keys that it holds now, perhaps none. Keys and values travel round the
ranks, and partial results are merged: o = sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i), in float32.

Padding follows the last real token. It is cut off before attention, so no mask is needed and no kernel ruled out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from wan.distributed.mesh import Layout, Mesh, unbroken
from wan.modules.model import SelfAttention, TokenSplit, WanModel

aten = torch.ops.aten


def split_tokens(model: WanModel, mesh: Mesh) -> None:
    """Divide the tokens of every forward of `model` over the sequence group."""
    if mesh.sequence is None:
        return
    model.tokens = SequenceSplit(mesh)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attend = SequenceAttention(module, mesh)  # type: ignore[method-assign]  # the seam is a method


class SequenceSplit(TokenSplit):
    """Each rank has the same number of consecutive tokens, the last ones padding."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.rank, self.size = mesh, mesh.team.rank, mesh.layout.sequence

    def span(self, total: int) -> tuple[int, int]:
        share = -(-total // self.size)
        return self.rank * share, (self.rank + 1) * share

    def shard(self, x: Tensor) -> Tensor:
        """[total, ...] -> [L, ...]. A copy, so that the whole can be freed."""
        start, stop = self.span(x.shape[0])
        part = x[start:stop]
        return torch.cat([part, part.new_zeros(stop - start - part.shape[0], *part.shape[1:])])

    def gather(self, x: Tensor, total: int) -> Tensor:
        """[L, ...] -> [total, ...]."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous(), self.mesh)
        return out[:total]


class SequenceAttention:
    """Attention of this rank's queries to the tokens of all ranks; replaces `SelfAttention.attend`."""

    def __init__(self, attention: SelfAttention, mesh: Mesh) -> None:
        self.attention, self.mesh = attention, mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
        """[L, N, d] each -> [L, N, d]; `total` real tokens on all ranks together."""
        mesh = self.mesh
        share = q.shape[0] * mesh.layout.ulysses  # tokens of one Ulysses group
        real = [min(max(total - share * index, 0), share) for index in range(mesh.layout.ring)]
        if mesh.ulysses is not None:
            q, k, v = tokens_to_heads(q, k, v, mesh)
        q, k, v = (x[: real[mesh.ring_rank]] for x in (q, k, v))
        out = self.attention.backend(q, k, v) if mesh.ring is None else ring_attention(q, k, v, real, mesh)
        if out.shape[0] < share:
            out = torch.cat([out, out.new_zeros(share - out.shape[0], *out.shape[1:])])
        if mesh.ulysses is None:
            return out
        return rearrange(all_to_all(out.contiguous(), mesh), "(p l) n d -> l (p n) d", p=mesh.layout.ulysses)


def exchange_bytes(layout: Layout, tokens: int, width: int, itemsize: int) -> int:
    """Peak bytes of attention over several ranks, beside a rank's queries, keys, values and their result.

    tokens: of one rank. Ulysses holds three such tensors while it sends and receives, or a result twice and what it
    received. A ring also holds its keys and values and the next ones, and the result of a step; in float32 the sum so
    far, both terms of the next sum, and the next sum.
    """
    one = tokens * width * itemsize
    received = 3 * one if layout.ulysses > 1 else 0
    if layout.ring > 1:
        return received + 4 * one + 4 * tokens * width * torch.float32.itemsize
    return received + 2 * one if layout.ulysses > 1 else 0


def tokens_to_heads(q: Tensor, k: Tensor, v: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """[L, N, d] each -> views [P L, N / P, d] of one received buffer: one exchange and one copy, not three."""
    ranks = mesh.layout.ulysses
    tokens, heads, width = q.shape
    send = q.new_empty(ranks, tokens, 3, heads // ranks, width)
    for index, x in enumerate((q, k, v)):
        send[:, :, index] = rearrange(x, "l (p n) d -> p l n d", p=ranks)
    q, k, v = all_to_all(send, mesh).flatten(0, 1).unbind(1)
    return q, k, v


def all_to_all(send: Tensor, mesh: Mesh) -> Tensor:
    """Send the r-th of P equal parts to rank r of the Ulysses group; the received parts by rank."""
    received = torch.empty_like(send)
    with mesh.team.exchange():
        dist.all_to_all_single(received, send, group=mesh.ulysses)
    return received


def all_gather(out: Tensor, x: Tensor, mesh: Mesh) -> None:
    """Every rank's `x`, one after the other, into `out`. torch 2.13 renamed the collective."""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with mesh.team.exchange():
        collective(out, x, group=mesh.sequence)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int], mesh: Mesh) -> Tensor:
    """[Lq, N, d], [Lk, N, d] twice -> [Lq, N, d] in q's dtype: attention to the keys of all ranks of the ring.
    tokens: how many each rank holds. The next keys travel while these are attended to."""
    size, rank = mesh.layout.ring, mesh.ring_rank
    pairs = torch.stack([k, v])
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    weight = torch.full(q.shape[:2], -torch.inf, device=q.device)  # log-sum-exp of the keys in `out`
    for step in range(size):
        last = step + 1 == size
        coming = pairs.new_empty(2, 0 if last else tokens[(rank - step - 1) % size], *pairs.shape[2:])
        with nullcontext() if last else _passed_on(pairs, coming, mesh):
            if pairs.shape[1] and q.shape[0]:
                part, part_weight = attention_and_weight(q, pairs[0], pairs[1])
                total = torch.logaddexp(weight, part_weight)
                out = out * (weight - total).exp()[..., None] + part * (part_weight - total).exp()[..., None]
                weight = total
        pairs = coming
    return out.to(q.dtype)


@contextmanager
def _passed_on(sent: Tensor, received: Tensor, mesh: Mesh) -> Iterator[None]:
    """While the block runs, even if it fails, send to the next rank of the ring and receive from the one before."""
    group, transfers = mesh.ring, []
    assert group is not None, "called where there is a ring"
    for direction, tensor, way in ((dist.isend, sent, 1), (dist.irecv, received, -1)):
        if tensor.numel():
            neighbour = dist.get_global_rank(group, (mesh.ring_rank + way) % mesh.layout.ring)
            transfers.append(dist.P2POp(direction, tensor, neighbour, group))
    with mesh.team.exchange():
        started = dist.batch_isend_irecv(transfers) if transfers else []
    try:
        yield
    finally:
        with unbroken():
            for transfer in started:
                transfer.wait()


def attention_and_weight(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [Lq, N, d], log-sum-exp float32 [Lq, N]) by a PyTorch kernel that returns both."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.device.type == "cpu":
        out, weight = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:  # flash kernels are 16-bit only; this one's second result is padded
        out, weight = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        weight = weight[..., : q.shape[2]]
    else:
        out, weight = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out[0].transpose(0, 1), weight[0].transpose(0, 1)
