"""The transformer: diffusers' WanTransformer3DModel, small, trained by flow matching on latents of the world.

Shapes: B clips, C channels, L latent frames, h, w the latent grid, S text slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from examples.shapes.text import WIDTH

LATENT = (16, 3, 8, 8)
DIM, HEADS, LAYERS = 192, 6, 4


class Attend:
    """Attention as the model has it, but over text rows that carry a score of their own (see `text.encode`)."""

    scores: Tensor | None = None  # [B, S]

    def __call__(
        self,
        layer: WanAttention,
        x: Tensor,
        text: Tensor | None = None,
        mask: None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = x if text is None else text
        q, k, v = layer.norm_q(layer.to_q(x)), layer.norm_k(layer.to_k(source)), layer.to_v(source)
        q, k, v = (y.unflatten(2, (layer.heads, -1)) for y in (q, k, v))
        bias = None
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        else:
            assert self.scores is not None
            bias = self.scores[:, None, None, :]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return layer.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of channels of x [B, tokens, heads, d]; the tables hold every angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), -1).flatten(-2) * sine


def build(channels: int, attend: Attend) -> WanTransformer3DModel:
    """An untrained one. channels: 16, or 36 with the mask and latents of a first frame."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, in_channels=channels,
        out_channels=16, text_dim=WIDTH, freq_dim=256, ffn_dim=4 * DIM, num_layers=LAYERS, cross_attn_norm=True,
        image_dim=None, added_kv_proj_dim=None, rope_max_seq_len=32,
    )  # fmt: skip
    model.condition_embedder.timesteps_proj = Sinusoid()
    nn.init.zeros_(model.proj_out.weight)
    for block in model.blocks:
        block.attn1.set_processor(attend)
        block.attn2.set_processor(attend)
    return model


class Sinusoid(nn.Module):
    """The timestep's embedding with angles in float64, as Wan has it; diffusers' float32 shows after forty steps."""

    def forward(self, timestep: Tensor) -> Tensor:
        """[B] -> float32 [B, 256]."""
        frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angles = timestep.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1).float()


def compile_blocks(model: WanTransformer3DModel) -> None:
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile(dynamic=False)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return name.startswith("blocks.") and parameter.ndim == 2


@torch.no_grad()
def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for 36 channels that do with the first 16 what `weights` do, and nothing yet with the image's."""
    name = "patch_embedding.weight"
    return weights | {name: F.pad(weights[name], (0, 0) * 3 + (0, 20))}


@dataclass
class Clips:
    """The training set: latents, what the first frame alone encodes to, and the number of each caption."""

    latents: Tensor  # [N, 16, L, h, w]
    images: Tensor  # [N, 16, L, h, w]
    captions: Tensor  # [N]
    rows: Tensor  # [captions + 2, S, width]; the last two are the negative prompt and no text at all
    scores: Tensor  # [captions + 2, S]

    @classmethod
    def load(cls, folder: Path) -> Clips:
        parts = [torch.load(file) for file in sorted(folder.glob("clips-?.pt"))]
        joined = {name: torch.cat([part[name] for part in parts]) for name in ("latents", "images", "captions")}
        return cls(**joined, **torch.load(folder / "text.pt")["captions"])

    def channels(self, index: Tensor) -> Tensor:
        """Channels beside the noisy latents for image-to-video: [B, 20, L, h, w]."""
        return beside(self.images[index])


def beside(images: Tensor) -> Tensor:
    """A mask that says that the first frame is known, and the latents of that frame followed by grey."""
    mask = torch.zeros_like(images[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, images], 1)


@dataclass
class FlowMatching:
    """Loss of a velocity model (Lipman et al., arXiv 2210.02747) on noise levels between `low` and `high`."""

    model: WanTransformer3DModel
    attend: Attend
    clips: Clips
    low: float
    high: float
    shift: float
    image: bool
    batch: int

    def __call__(self, progress: float, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(self.clips.latents), (self.batch,), generator=generator)
        clean = self.clips.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        level = self.levels(generator)
        noisy = torch.lerp(clean, noise, level[:, None, None, None, None])
        captions = self.clips.captions[index].clone()
        chance = torch.rand(self.batch, generator=generator)
        captions[chance < 0.10] = -2  # the negative prompt
        captions[chance < 0.02] = -1
        x = torch.cat([noisy, self.clips.channels(index)], 1) if self.image else noisy
        self.attend.scores = self.clips.scores[captions]
        velocity = self.model(x, level * 1000, self.clips.rows[captions]).sample
        return F.mse_loss(velocity, noise - clean)

    def levels(self, generator: torch.Generator) -> Tensor:
        """Evenly spread over the batch in the measure of the shifted schedule, which is how samplers divide it."""
        start, end = (level / (self.shift - (self.shift - 1) * level) for level in (self.low, self.high))
        place = (torch.arange(self.batch) + torch.rand(self.batch, generator=generator)) / self.batch
        even = start + (end - start) * place
        return self.shift * even / (1 + (self.shift - 1) * even)
