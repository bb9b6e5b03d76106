"""Ring attention (arXiv 2310.01889): keys and values travel round the ranks, partial results are merged.

Shapes: Lq a rank's queries, Lk the keys a rank holds at the moment, N heads, d head width. Any number of heads, and
ranks may hold different numbers of tokens, or none.
    o = sum_i exp(lse_i - lse) o_i,   lse = log sum_i exp(lse_i)        in float32
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

aten = torch.ops.aten


def ring_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[Lq, N, d], [Lk, N, d] twice -> [Lq, N, d] in q's dtype: attention to the keys of all ranks of `group`.

    tokens: how many each rank holds. The next keys are on their way while these are attended to.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    pairs = torch.stack([k, v])
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    weight = torch.full(q.shape[:2], -torch.inf, device=q.device)  # log-sum-exp of what `out` holds
    for step in range(size):
        coming = pairs.new_empty(0)
        transfers = []
        if step + 1 < size:
            coming = pairs.new_empty(2, tokens[(rank - step - 1) % size], *pairs.shape[2:])
            transfers = _pass_on(pairs, coming, (rank + 1) % size, (rank - 1) % size, group)
        if pairs.shape[1] and q.shape[0]:
            part, part_weight = attention_and_weight(q, pairs[0], pairs[1])
            total = torch.logaddexp(weight, part_weight)
            out = out * (weight - total).exp()[..., None] + part * (part_weight - total).exp()[..., None]
            weight = total
        for transfer in transfers:
            transfer.wait()
        pairs = coming
    return out.to(q.dtype)


def _pass_on(sent: Tensor, received: Tensor, to: int, source: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Start sending to and receiving from the neighbours in the ring; what is empty is not sent."""
    transfers = []
    if sent.numel():
        transfers.append(dist.P2POp(dist.isend, sent, dist.get_global_rank(group, to), group))
    if received.numel():
        transfers.append(dist.P2POp(dist.irecv, received, dist.get_global_rank(group, source), group))
    return dist.batch_isend_irecv(transfers) if transfers else []


def attention_and_weight(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [Lq, N, d], log-sum-exp float32 [Lq, N]) by the PyTorch kernel that also gives the latter."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.device.type == "cpu":
        out, weight = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:  # flash kernels are 16-bit only; this one's second result is padded
        out, weight = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        weight = weight[..., : q.shape[2]]
    else:
        out, weight = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out[0].transpose(0, 1), weight[0].transpose(0, 1)
