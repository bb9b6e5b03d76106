"""A block of the transformer: attention of the video to itself and to the text, and a feed-forward.

Shapes: L tokens, D width, N heads, d = D / N, T rows of the time embedding. Precision and memory: `wan.modules.model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wan.modules.attention import Attend, sdpa
from wan.modules.context import Prompt
from wan.modules.fp8 import shared
from wan.modules.fused import EAGER

# (row of the time embedding, some tokens that it applies to): what a row-wise pass takes at a time
Spans = Sequence[tuple[int, slice]]


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and last modulated by the timestep."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.passes = EAGER
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = AffineNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    def forward(
        self,
        streams: list[Tensor],
        rows: Tensor,
        spans: Spans,
        rotary: Tensor,
        total: int,
        prompts: Sequence[Prompt],
        texts: Mapping[Prompt, Tensor],
    ) -> list[Tensor]:
        """One pass after the other, each with its residual stream and its prompt.

        streams [L, D] (overwritten once they are float32), rows float32 [T, 6, D], texts: [text_len, D] of each
        prompt attended -> float32 [L, D], in the same list: nobody keeps a stream that has been converted.
        """
        for prompt in prompts:
            streams.append(self._pass(streams.pop(0), rows, spans, rotary, total, prompt, texts))
        return streams

    def _pass(
        self,
        x: Tensor,
        rows: Tensor,
        spans: Spans,
        rotary: Tensor,
        total: int,
        prompt: Prompt,
        texts: Mapping[Prompt, Tensor],
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + rows).unbind(1)
        norm3, ungated, dtype = self.norm3, torch.ones_like(gate1), self.self_attn.q.bias.dtype  # weights may be fp8

        # attentions run by `forward`: a module called as such keeps what it was given until it returns
        y = self.self_attn.forward(self.normed(x, 1 + scale1, shift1, spans, dtype), rotary, total, spans)
        # x arrives in the patch embedding's dtype; from the first gated addition on it is float32, as in the original
        x = x.float()
        for row, span in spans:
            self.passes.add_norm(x[span], y[span], gate1[row], norm3.weight, norm3.bias, self.eps)
        y = self.cross_attn.forward(y, prompt, texts, spans)
        for row, span in spans:
            self.passes.add_norm(x[span], y[span], ungated[row], 1 + scale2[row], shift2[row], self.eps)
            self.passes.add(x[span], self.ffn(y[span]), gate2[row])
        return x

    def normed(self, x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
        """LayerNorm(x) * scale + shift with each token's row of [T, D]: [L, D] -> `dtype` [L, D]."""
        y = torch.empty_like(x, dtype=dtype)
        for row, span in spans:
            self.passes.norm(x[span], scale[row], shift[row], self.eps, y[span])
        return y


class Attention(nn.Module):
    """The layers that self- and cross-attention share: projections, and RMS norms over the whole width D."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.backend: Attend = sdpa
        self.passes = EAGER
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = Scale(dim), Scale(dim)

    def heads(self, x: Tensor) -> Tensor:
        """[L, D] -> [L, N, d]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention of all video tokens to each other, with rotary positions."""

    def forward(self, x: Tensor, rotary: Tensor, total: int, spans: Spans) -> Tensor:
        """This rank's tokens [L, D] -> [L, D]; `total` is the number of real tokens over all ranks."""
        given = shared(x, self.q, self.k, self.v)
        del x
        q, k = self.q(given), self.k(given)
        for y, scale in ((q, self.norm_q), (k, self.norm_k)):
            for _, span in spans:
                self.passes.rms_norm_rotate(y[span], scale.weight, rotary[span], self.eps)
        v = self.v(given)
        del given, y
        x = self.attend(self.heads(q), self.heads(k), self.heads(v), total).flatten(1)
        del q, k, v
        return self.o(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
        """[L, N, d] each -> [L, N, d]. The seam: a parallel run puts another function here."""
        return self.backend(q, k[:total], v[:total])


class CrossAttention(Attention):
    """Attention of the video tokens to the text, all `text_len` rows of it: the padding is attended, as in training."""

    def forward(self, x: Tensor, prompt: Prompt, texts: Mapping[Prompt, Tensor], spans: Spans) -> Tensor:
        """x [L, D], texts [text_len, D] -> [L, D]. Keys and values depend on a prompt alone and are made once."""
        x = self.q(x)
        for _, span in spans:
            self.passes.rms_norm(x[span], self.norm_q.weight, self.eps)
        q = self.heads(x)
        x, *away = (self.attend(q, each, texts[each]) for each in prompt.attended)
        del q
        for y in away:
            for _, span in spans:
                self.passes.guide(x[span], y[span], prompt.nag)
        return self.o(x)

    def attend(self, q: Tensor, prompt: Prompt, text: Tensor) -> Tensor:
        """q [L, N, d] -> [L, D]."""
        k, v = prompt.once(self, lambda: self.keys_values(text))
        return self.backend(q, k, v).flatten(1)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k(text)
        self.passes.rms_norm(k, self.norm_k.weight, self.eps)
        return self.heads(k), self.heads(self.v(text))


class Scale(nn.Module):
    """The weight [D] of an RMS norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


class AffineNorm(Scale):
    """The weight and bias [D] of a LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.bias = nn.Parameter(torch.empty(dim))


def spans_of(pinned: int, start: int, stop: int, most: int) -> Spans:
    """This rank's tokens `start` to `stop` in shares of at most `most`, each with its row: the pinned tokens', then
    the current timestep's. Shares are alike where that takes less than twice as many: each size is compiled anew."""
    edge = min(max(pinned - start, 0), stop - start)
    spans = []
    for row, first, end in ((0, 0, edge), (1 if pinned else 0, edge, stop - start)):
        least = -(-(end - first) // most)
        parts = next((n for n in range(least, 2 * least) if (end - first) % n == 0), least)
        size = -(-(end - first) // max(parts, 1))
        spans += [(row, slice(i, min(i + size, end))) for i in range(first, end, max(size, 1))]
    return spans
