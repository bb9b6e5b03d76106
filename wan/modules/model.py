"""The Wan2.2 diffusion transformer (DiT).

Shapes: L tokens, D width, N heads, d = D / N, T timesteps (one, or two when the first frame is pinned),
F, H, W token grid, C latent channels. There is no batch axis: of a guided step's two passes one follows the other,
through the whole network or, where weights are streamed, through each block (`Residency.batch_guidance`).

Precision follows the parameters: a linear layer runs in the dtype of its bias, but the time layers and the head
multiply in float32; the residual stream, the norms' statistics, the modulation and the output are float32. Which
parameter has which dtype is decided when loading.

There are three seams and no second forward: `WanModel.tokens` (how tokens are divided over ranks),
`SelfAttention.attend` (attention over all tokens) and `WanModel.residency` (where the weights are). Their defaults are
the plain case. So are `Attention.backend` (the kernel) and `passes` (what is between the matrix products).

Memory: what is done row by row goes over `WanModel.rows` tokens at a time. At 1280x720x81 what is alive at once is the
float32 residual stream, the normed input, and queries and keys, of 1.5 and thrice 0.8 GB, or values in place of rows.
Passes that go through the blocks together have a residual stream each, the rest in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.configs.precision import takes_fp8
from wan.configs.task import PATCH
from wan.modules.attention import Attend
from wan.modules.block import Attention, Block, Spans, spans_of
from wan.modules.context import Prompt
from wan.modules.fp8 import Fp8Linear
from wan.modules.fused import EAGER, Passes
from wan.modules.hooks import Residency, TokenSplit
from wan.modules.rope import rotary_table

ROWS = 8192  # of a feed-forward's 4 D columns: less than what attention keeps of all tokens, at 480p too


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
        """[C_in, f, h, w] latent at `timestep` (0 to 1000) -> float32 [C_out, f, h, w] velocity, for each prompt.

        Of P prompts in a sequence the velocities are stacked, [P, C_out, f, h, w].
        The tokens of the first `pinned_frames` latent frames are clean and get timestep 0.
        """
        if isinstance(prompt, Prompt):
            return self._velocities(latent, timestep, [prompt], pinned_frames)[0]
        groups = [prompt] if self.residency.batch_guidance else [[each] for each in prompt]
        return torch.stack([v for group in groups for v in self._velocities(latent, timestep, group, pinned_frames)])

    def _velocities(
        self, latent: Tensor, timestep: float, prompts: Sequence[Prompt], pinned_frames: int
    ) -> list[Tensor]:
        """As above; each block does all prompts before the next one begins."""
        grid = (latent.shape[1] // PATCH[0], latent.shape[2] // PATCH[1], latent.shape[3] // PATCH[2])
        x = self.patch_embedding(latent)
        total = x.shape[0]
        start, stop = self.tokens.span(total)
        x = self.tokens.shard(x)
        rotary = rotary_table(grid, self.head_width, start, stop, x.device)

        times = [0.0, timestep] if pinned_frames else [timestep]
        time = _in_float32(self.time_embedding, sinusoid(times, self.freq_dim).to(x.device, non_blocking=True))
        with self.residency.use(0):
            rows = _in_float32(self.time_projection, time).unflatten(-1, (6, -1))
        spans = spans_of(pinned_frames * grid[1] * grid[2], start, stop, self.rows)

        attended = [each for prompt in prompts for each in prompt.attended]
        texts = {each: each.once(self, lambda each=each: self._text(each)) for each in attended}  # type: ignore[misc]
        streams = [x, *(x.clone() for _ in prompts[1:])]
        del x
        for unit, block in enumerate(self.blocks, 1):
            with self.residency.use(unit):
                streams = block(streams, rows, spans, rotary, total, prompts, texts)
        return [self._latent(self.tokens.gather(self.head(x, time, spans), total), grid) for x in streams]

    def _text(self, prompt: Prompt) -> Tensor:
        """[text_len, D]."""
        return _run_blocks(self.text_embedding, prompt.padded(self.text_len))

    @staticmethod
    def _latent(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[F H W, patch * C] -> [C, f, h, w]."""
        f, h, w = grid
        return rearrange(x, "(f h w) (q r c) -> c f (h q) (w r)", f=f, h=h, w=w, q=PATCH[1], r=PATCH[2])

    @staticmethod
    def unit_of(name: str) -> int | None:
        """The unit of a parameter, None for the small ones that are always there.

        Unit 0 is the time projection, nearly a block in size because it is float32; then come the blocks.
        """
        part, _, rest = name.partition(".")
        if part == "blocks":
            return 1 + int(rest.partition(".")[0])
        return 0 if part == "time_projection" else None

    def use_attention(self, attend: Attend) -> None:
        """Let every attention of the model run through this back end."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = attend

    def use_passes(self, passes: Passes) -> None:
        """Let everything between the matrix products run through these functions."""
        for module in self.modules():
            if isinstance(module, Block | Attention | Head | Fp8Linear):
                module.passes = passes

    def use_fp8(self, kept: int = 1) -> None:
        """Have layers for weights in fp8, before any are loaded; the first and last `kept` blocks stay as they are."""
        for name, parameter in list(self.named_parameters()):
            if takes_fp8(name, len(self.blocks), kept):
                outputs, inputs = parameter.shape
                self.set_submodule(name.removesuffix(".weight"), Fp8Linear(inputs, outputs))


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


def sinusoid(times: Sequence[float], width: int) -> Tensor:
    """[cos | sin] of t * 10000^(-i / half), angles in float64 -> float32 [T, width] (arXiv 1706.03762, section 3.5)."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.tensor(times, dtype=torch.float64), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def _in_float32(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Apply linear layers and activations in float32, also with weights in bf16 (`--convert_model_dtype`)."""
    for layer in layers:
        x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
    return x


def _run_blocks(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Apply `layers` in the dtype of their weights."""
    weight = next(layers.parameters())
    return layers(x.to(weight.dtype))
