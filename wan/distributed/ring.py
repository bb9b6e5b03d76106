"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results are merged.

Shapes: Lq a rank's queries, Lk the keys a rank holds at the moment, N heads, d head width. Any number of heads, and
ranks may hold different numbers of tokens, or none.
    o = sum_i exp(lse_i - lse) o_i,   lse = log sum_i exp(lse_i)        in float32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from wan.distributed.mesh import Mesh, unbroken

aten = torch.ops.aten


def ring_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int], mesh: Mesh) -> Tensor:
    """[Lq, N, d], [Lk, N, d] twice -> [Lq, N, d] in q's dtype: attention to the keys of all ranks of the ring.

    tokens: how many each rank holds. The next keys travel while these are attended to.
    """
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
    """While the block runs, send to the next rank of the ring and receive from the one before; skip empty tensors.

    Waits for the transfers even if the block fails: the neighbours take part in them, and they use the buffers.
    """
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
