"""The Wan2.2 diffusion transformer (DiT).

Shapes: L tokens, D width, N heads, d = D / N, T timesteps (one, or two when the first frame is pinned), F, H, W token
grid, C latent channels. There is no batch axis: of a guided step's two passes one follows the other, through the whole
network or, where weights are streamed, through each block (`Residency.batch_guidance`).

Precision follows the parameters: a linear layer runs in the dtype of its bias, but the time layers and the head
multiply in float32; the residual stream, the norms' statistics, the modulation and the output are float32.

There are three seams and no second forward: `WanModel.tokens` (how tokens are divided over ranks),
`SelfAttention.attend` (attention over all tokens) and `WanModel.residency` (where the weights are). Their defaults are
the plain case. So are `Attention.backend` (the kernel) and `passes` (the work between the matrix products).

Memory: row-wise work takes `WanModel.rows` tokens at a time. At 1280x720x81 the residual stream has 1.5 GB; the normed
input, queries and keys (later values) have 0.8 GB each. Passes that share the blocks have a residual stream each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs import TASKS
from wan.configs.precision import takes_8_bits
from wan.configs.task import PATCH
from wan.modules.attention import Attend, sdpa
from wan.modules.fused import EAGER, Passes
from wan.modules.quantised_linear import QuantisedLinear, shared

ROWS = 8192  # of a feed-forward's 4 D columns: less than what attention keeps of all tokens, at 480p too
THETA = 10000.0
# (row of the time embedding, some tokens that it applies to): what a row-wise pass takes at a time
Spans = Sequence[tuple[int, slice]]
# a pass's prompt, then the one that attention leads away from, with what the text embedding has made of each
Texts = Sequence[tuple["Prompt", Tensor]]
Made = TypeVar("Made")


class WanModel(nn.Module):
    """Predicts the flow-matching velocity of a latent video (Peebles & Xie, arXiv 2212.09748, with 3-axis RoPE)."""

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        in_dim: int,
        out_dim: int,
        num_heads: int,
        num_layers: int,
        text_dim: int,
        freq_dim: int = 256,
        text_len: int = 512,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.freq_dim, self.text_len, self.num_heads, self.head_width = freq_dim, text_len, num_heads, dim // num_heads
        self.tokens: TokenSplit = TokenSplit()
        self.residency: Residency = Residency()
        self.rows = ROWS
        self.patch_embedding = PatchEmbedding(in_dim, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, out_dim, eps)

    @classmethod
    def from_config(cls, config: Mapping[str, int | float | str], text_dim: int) -> WanModel:
        """Build from a checkpoint's config.json; `text_dim`, which it lacks, is read off `text_embedding.0.weight`."""
        names = ("dim", "ffn_dim", "in_dim", "out_dim", "num_heads", "num_layers", "freq_dim", "text_len")
        sizes = {name: int(config[name]) for name in names}
        return cls(**sizes, text_dim=text_dim, eps=float(config["eps"]))

    def forward(
        self, latent: Tensor, timestep: float, prompt: Prompt | Sequence[Prompt], pinned_frames: int = 0
    ) -> Tensor:
        """[C_in, f, h, w] latent at `timestep` (0 to 1000) -> float32 velocity [C_out, f, h, w]; of P prompts in a
        sequence [P, C_out, f, h, w]. The tokens of the first `pinned_frames` latent frames are clean: timestep 0."""
        if isinstance(prompt, Prompt):
            return self._velocities(latent, timestep, [prompt], pinned_frames)[0]
        groups = [prompt] if self.residency.batch_guidance else [[each] for each in prompt]
        return torch.stack([v for group in groups for v in self._velocities(latent, timestep, group, pinned_frames)])

    def _velocities(
        self, latent: Tensor, timestep: float, prompts: Sequence[Prompt], pinned_frames: int
    ) -> list[Tensor]:
        """As above; each block does all prompts before the next one begins."""
        f, h, w = grid = (latent.shape[1] // PATCH[0], latent.shape[2] // PATCH[1], latent.shape[3] // PATCH[2])
        x = self.patch_embedding(latent)
        total = x.shape[0]
        start, stop = self.tokens.span(total)
        x = self.tokens.shard(x)
        rotary = rotary_table(grid, self.head_width, start, stop, x.device)

        times = [0.0, timestep] if pinned_frames else [timestep]
        time = _in_float32(self.time_embedding, sinusoid(times, self.freq_dim).to(x.device, non_blocking=True))
        with self.residency.use(0):
            rows = _in_float32(self.time_projection, time).unflatten(-1, (6, -1))
        spans = spans_of(pinned_frames * h * w, start, stop, self.rows)

        texts = [[(each, each.once(self, self._text, each)) for each in prompt.attended] for prompt in prompts]
        streams = [x, *(x.clone() for _ in prompts[1:])]
        del x
        for unit, block in enumerate(self.blocks, 1):
            with self.residency.use(unit):
                streams = block(streams, rows, spans, rotary, total, texts)
        sizes = {"f": f, "h": h, "w": w, "q": PATCH[1], "r": PATCH[2]}
        return [
            rearrange(
                self.tokens.gather(self.head(x, time, spans), total), "(f h w) (q r c) -> c f (h q) (w r)", **sizes
            )
            for x in streams
        ]

    def _text(self, prompt: Prompt) -> Tensor:
        """[text_len, D]."""
        padded = F.pad(prompt.rows, (0, 0, 0, self.text_len - len(prompt.rows)))
        return self.text_embedding(padded.to(next(self.text_embedding.parameters()).dtype))

    @staticmethod
    def unit_of(name: str) -> int | None:
        """The unit of a parameter: 0 for the time projection, nearly a block in size because it is float32; then come
        the blocks. None for the small ones that are always there."""
        part, number, *_ = name.split(".")
        return 1 + int(number) if part == "blocks" else 0 if part == "time_projection" else None

    def use_attention(self, attend: Attend) -> None:
        """Let every attention of the model run through this back end."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = attend

    def use_passes(self, passes: Passes) -> None:
        """Let everything between the matrix products run through these functions."""
        for module in self.modules():
            if isinstance(module, Block | Attention | Head | QuantisedLinear):
                module.passes = passes

    def quantise(self, form: str, rotations: Mapping[str, int] | None = None, kept: int = 1) -> None:
        """Have layers for weights in `form`, before any are loaded; the first and last `kept` blocks stay as they are.
        rotations: by parameter, where a file has int8 numbers to be taken as they are."""
        for name, parameter in list(self.named_parameters()):
            if takes_8_bits(name, len(self.blocks), kept):
                outputs, inputs = parameter.shape
                layer = QuantisedLinear(inputs, outputs, form, (rotations or {}).get(name))
                self.set_submodule(name.removesuffix(".weight"), layer)


def released_transformer(task: str) -> WanModel:
    """One released expert of `task` on the meta device."""
    with torch.device("meta"):
        return WanModel.from_config(vars(TASKS[task]), text_dim=TASKS[task].text_dim)


def released_shapes(task: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of one released expert of `task`, in the order of the network."""
    return {name: tuple(parameter.shape) for name, parameter in released_transformer(task).named_parameters()}


class PatchEmbedding(nn.Conv3d):
    """A convolution over patches that do not overlap, as a matrix product: in bf16 some releases of PyTorch compute a
    Conv3d without cuDNN, and on all devices the product needs no copy to put the tokens in rows."""

    def forward(self, latent: Tensor) -> Tensor:
        """[C, f, h, w] -> [L, D]."""
        t, q, r = PATCH
        patches = rearrange(latent, "c (f t) (h q) (w r) -> (f h w) (c t q r)", t=t, q=q, r=r)
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """The last modulated norm and the projection of every token to its patch."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.passes = EAGER
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))
        self.head = nn.Linear(dim, PATCH[0] * PATCH[1] * PATCH[2] * out_dim)

    def forward(self, x: Tensor, time: Tensor, spans: Spans) -> Tensor:
        """x [L, D], time float32 [T, D] -> float32 [L, patch * C_out]."""
        shift, scale = (self.modulation + time[:, None]).unbind(1)
        out = x.new_empty(x.shape[0], self.head.out_features, dtype=torch.float32)
        weight, bias = self.head.weight.float(), self.head.bias.float()
        for row, span in spans:
            y = torch.empty_like(x[span], dtype=torch.float32)
            self.passes.norm(x[span], 1 + scale[row], shift[row], self.eps, y)
            out[span] = F.linear(y, weight, bias)
        return out


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and last modulated by the timestep.
    Norms hold their weights only: `passes` computes them."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.passes = EAGER
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), Gelu(), nn.Linear(ffn_dim, dim))

    def forward(
        self, streams: list[Tensor], rows: Tensor, spans: Spans, rotary: Tensor, total: int, texts: Sequence[Texts]
    ) -> list[Tensor]:
        """One pass for each residual stream [L, D] (overwritten once float32), prompt and text [text_len, D]; rows are
        float32 [T, 6, D]. Returns float32 [L, D] in the same list: nobody keeps a converted stream."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + rows).unbind(1)
        norm3, ungated = self.norm3, torch.ones_like(gate1)
        dtype = self.self_attn.q.bias.dtype  # the weights may be in 8 bits
        for attended in texts:
            x = streams.pop(0)
            # attentions run by `forward`: a module called as such keeps what it was given until it returns
            y = self.self_attn.forward(self.normed(x, 1 + scale1, shift1, spans, dtype), rotary, total, spans)
            # x comes in the patch embedding's dtype; from the first gated addition on it is float32, as in the original
            x = x.float()
            for row, span in spans:
                self.passes.add_norm(x[span], y[span], gate1[row], norm3.weight, norm3.bias, self.eps)
            y = self.cross_attn.forward(y, attended, spans)
            for row, span in spans:
                self.passes.add_norm(x[span], y[span], ungated[row], 1 + scale2[row], shift2[row], self.eps)
                self.passes.add(x[span], self.ffn(y[span]), gate2[row])
            streams.append(x)
            del x, y  # before the next pass
        return streams

    def normed(self, x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, dtype: torch.dtype) -> Tensor:
        """LayerNorm(x) * scale + shift with each token's row of [T, D]: [L, D] -> `dtype` [L, D]."""
        y = torch.empty_like(x, dtype=dtype)
        for row, span in spans:
            self.passes.norm(x[span], scale[row], shift[row], self.eps, y[span])
        return y


class Gelu(nn.Module):
    """GELU, tanh form (arXiv 1606.08415, eq. 2), in place: a feed-forward's columns are there once."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x, approximate="tanh")


class Attention(nn.Module):
    """The layers that self- and cross-attention share: projections, and RMS norms over the whole width D."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.backend: Attend = sdpa
        self.passes = EAGER
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        """[L, D] -> [L, N, d]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention of all video tokens to each other, with rotary positions."""

    def forward(self, x: Tensor, rotary: Tensor, total: int, spans: Spans) -> Tensor:
        """This rank's tokens [L, D] -> [L, D]; total: real tokens of all ranks."""
        given = shared(x, self.q, self.k, self.v)
        del x
        q, k = self.q(given), self.k(given)
        for _, span in spans:
            self.passes.rms_norm_rotate(q[span], self.norm_q.weight, rotary[span], self.eps)
            self.passes.rms_norm_rotate(k[span], self.norm_k.weight, rotary[span], self.eps)
        v = self.v(given)
        del given
        x = self.attend(self.heads(q), self.heads(k), self.heads(v), total).flatten(1)
        del q, k, v
        return self.o(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
        """[L, N, d] each -> [L, N, d]. The seam: a parallel run puts another function here."""
        return self.backend(q, k[:total], v[:total])


class CrossAttention(Attention):
    """Attention of the video tokens to the text, all `text_len` rows of it: the padding is attended, as in training."""

    def forward(self, x: Tensor, texts: Texts, spans: Spans) -> Tensor:
        """x [L, D], texts [text_len, D] -> [L, D]. Keys and values depend on a prompt alone and are made once."""
        x = self.q(x)
        for _, span in spans:
            self.passes.rms_norm(x[span], self.norm_q.weight, self.eps)
        q = self.heads(x)
        made = [prompt.once(self, self._keys_values, text) for prompt, text in texts]
        x, *away = (self.backend(q, k, v).flatten(1) for k, v in made)
        del q
        for y in away:
            for _, span in spans:
                self.passes.guide(x[span], y[span], *texts[0][0].guide)
        return self.o(x)

    def _keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k(text)
        self.passes.rms_norm(k, self.norm_k.weight, self.eps)
        return self.heads(k), self.heads(self.v(text))


class Prompt:
    """One encoded prompt, and what each layer has made of it so far: both depend on nothing else."""

    def __init__(self, rows: Tensor, negative: Prompt | None = None, guide: Sequence[float] = ()) -> None:
        """rows: [n, text_dim] encoder output, n at most the model's `text_len`. negative: the prompt that attention
        leads away from in the same pass. guide: scale, tau and alpha of it, see `fused.guide`."""
        self.rows, self.negative, self.guide = rows, negative, guide
        self._made: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()

    @property
    def attended(self) -> list[Prompt]:
        return [self] if self.negative is None else [self, self.negative]

    def once(self, layer: nn.Module, make: Callable[..., Made], *arguments: object) -> Made:
        """`make(*arguments)` for this layer, or what it gave the first time. Forgotten when the layer is."""
        if layer not in self._made:
            self._made[layer] = make(*arguments)
        return self._made[layer]  # type: ignore[return-value]  # each layer stores one kind of thing

    def forget(self) -> None:
        """Drop what layers made, after their weights have changed."""
        self._made.clear()


class Residency:
    """Where a network's weights are when it computes. The plain case: all of them on the device, always.
    A unit is a group of weights that is used together, numbered in the order of their use; see `unit_of`."""

    batch_guidance = False  # each unit runs all passes over one latent before the next begins, so it is brought once

    def use(self, unit: int) -> AbstractContextManager[None]:
        """The weights of `unit` are on the device inside this."""
        return nullcontext()


class TokenSplit:
    """How the tokens are divided over ranks. The plain case: one rank has them all."""

    def span(self, total: int) -> tuple[int, int]:
        """First token and end of this rank's share of `total` tokens; the end may lie beyond: padding."""
        return 0, total

    def shard(self, x: Tensor) -> Tensor:
        """[total, ...] on every rank -> this rank's share."""
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """Inverse of `shard`, padding dropped, on every rank."""
        return x


@lru_cache(maxsize=1)  # plans count one table
def rotary_table(grid: tuple[int, int, int], head_width: int, start: int, stop: int, device: torch.device) -> Tensor:
    """(cos, sin) of every pair's angle for tokens `start` to `stop` of a (frames, rows, columns) grid, in that order.

    float32 [stop - start, d / 2, 2], made from float64 angles. c = d/2 pairs: c // 3 turn with the row, c // 3
    with the column and the rest with the frame, each axis with its own frequencies theta^(-2j / axis width)
    (RoFormer, arXiv 2104.09864, eq. 15). Tokens past the grid's end get angle 0: they are padding.
    """
    frames, rows, columns = grid
    token = torch.arange(start, stop, dtype=torch.int64)
    position = [token // (rows * columns), token // columns % rows, token % columns]
    third = head_width // 2 // 3
    pairs = [head_width // 2 - 2 * third, third, third]
    angles = [
        torch.outer(p.double(), THETA ** (-torch.arange(n, dtype=torch.float64) / n))
        for p, n in zip(position, pairs, strict=True)
    ]
    angle = torch.cat(angles, dim=1) * (token < frames * rows * columns)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)


def sinusoid(times: Sequence[float], width: int) -> Tensor:
    """[cos | sin] of t * 10000^(-i / half), angles in float64 -> float32 [T, width] (arXiv 1706.03762, section 3.5)."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.tensor(times, dtype=torch.float64), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


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


def _in_float32(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Apply linear layers and activations in float32, also with weights in bf16 (`--convert_model_dtype`)."""
    for layer in layers:
        x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
    return x
