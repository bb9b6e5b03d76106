"""Distillation of forty guided steps into four unguided ones, as a pair of LoRAs.

The teacher's whole way, from noise to clip, is determined by the noise. So at each of the four steps the student can
learn to point straight at the clip that the teacher ends at (Liu et al., rectified flow, arXiv 2209.03003), from where
its own earlier steps have brought it.

Shapes: B clips, C channels, L latent frames, h, w the latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from examples.shapes import transformer
from examples.shapes.loop import Peers, Stage
from examples.shapes.transformer import Attend, Clips

TRAJECTORIES = 384  # a part
STEPS = {"high": 600, "low": 350}
BATCH = 32
LEVELS = {"high": (1.0, 0.9375), "low": (5 / 6, 0.625)}  # four steps of the schedule with shift 5
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
TEACHER_SHIFT = {"t2v": 12.0, "i2v": 5.0}
TEACHER_GUIDANCE = {"t2v": {"low": 3.0, "high": 4.0}, "i2v": {"low": 3.5, "high": 3.5}}
RANK, ALPHA = 16, 8.0
LAYERS = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"


@dataclass
class Teacher:
    """Both experts of a task, sampled as `generate.py` does by default: 40 UniPC steps with guidance."""

    task: str
    experts: dict[str, WanTransformer3DModel]
    attend: Attend
    clips: Clips

    @classmethod
    def load(cls, task: str, folder: Path) -> Teacher:
        attend = Attend()
        experts = {name: load_expert(f"{task}-{name}", folder, attend) for name in ("high", "low")}
        return cls(task, experts, attend, Clips.load(folder))

    def trajectories(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise, clip of the training set whose caption (and first frame) is asked for, and where it leads."""
        noise, index, result = [], [], []
        for start in range(0, count, BATCH):
            noise.append(torch.randn(BATCH, *transformer.LATENT, generator=generator))
            index.append(torch.randint(len(self.clips.latents), (BATCH,), generator=generator))
            chosen = self.clips.captions[index[-1]]
            channels = self.clips.channels(index[-1]) if self.task == "i2v" else None
            result.append(self.sample(noise[-1], self.clips.rows[chosen], self.clips.scores[chosen], channels))
            print(f"teaching-{self.task} {start + BATCH}/{count}", flush=True)
        return {"noise": torch.cat(noise), "index": torch.cat(index), "clean": torch.cat(result)}

    @torch.no_grad()
    def sample(self, noise: Tensor, rows: Tensor, scores: Tensor, channels: Tensor | None) -> Tensor:
        """[B, C, L, h, w] -> the same."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=TEACHER_SHIFT[self.task]
        )
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0.0, 41)[:-1])
        negative = len(self.clips.rows) - 2
        free = self.clips.rows[[negative] * len(rows)], self.clips.scores[[negative] * len(rows)]
        x = noise
        for timestep in scheduler.timesteps:
            name = "high" if timestep >= 1000 * BOUNDARY[self.task] else "low"
            given = x if channels is None else torch.cat([x, channels], 1)
            asked, unasked = (self.velocity(name, given, timestep, *words) for words in ((rows, scores), free))
            velocity = unasked + TEACHER_GUIDANCE[self.task][name] * (asked - unasked)
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    def velocity(self, name: str, x: Tensor, timestep: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
        self.attend.scores = scores
        return self.experts[name](x, timestep.expand(len(x)), rows).sample


class Student:
    """One expert with a LoRA in all linear layers of its blocks, the layers that Lightning's LoRAs cover."""

    def __init__(self, name: str, folder: Path) -> None:
        self.task, self.expert = name.split("-")
        self.name, self.folder, self.attend = name, folder, Attend()
        self.clips = Clips.load(folder)
        parts = [torch.load(file) for file in sorted(folder.glob(f"teaching-{self.task}-?.pt"))]
        self.taught = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        # where the high-noise expert has brought the noise before the low-noise expert takes over
        self.start = (
            self.taught["noise"] if self.expert == "high" else torch.load(folder / f"lora-{self.task}-high.pt")["end"]
        )
        self.model = load_expert(name, folder, self.attend).requires_grad_(False)
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS))

    def train(self, peers: Peers) -> dict[str, object]:
        transformer.compile_blocks(self.model)
        Stage(f"lora-{self.name}", self.folder, self.model, self.loss, STEPS[self.expert], 4e-3, peers).run()
        weights = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"weights": weights, "end": self.end() if self.expert == "high" else None}

    def loss(self, progress: float, generator: torch.Generator) -> Tensor:
        """Both of the expert's steps, the second from where the first leads."""
        index = torch.randint(len(self.start), (BATCH,), generator=generator)
        clean, total = self.taught["clean"][index], torch.zeros(())
        x = self.start[index]
        first, second = LEVELS[self.expert]
        for level, end in ((first, second), (second, None)):
            velocity = self.velocity(x, level, index)
            # the error of the clip pointed at, whatever the level
            total = total + F.mse_loss(x - level * velocity, clean)
            if end is not None:
                x = x + (end - level) * velocity.detach()
        return total

    def velocity(self, x: Tensor, level: float, index: Tensor) -> Tensor:
        at = self.taught["index"][index]
        chosen = self.clips.captions[at]
        channels = self.clips.channels(at) if self.task == "i2v" else None
        return self.ask(x, level, self.clips.rows[chosen], self.clips.scores[chosen], channels)

    def ask(self, x: Tensor, level: float, rows: Tensor, scores: Tensor, channels: Tensor | None) -> Tensor:
        self.attend.scores = scores
        given = x if channels is None else torch.cat([x, channels], 1)
        return self.model(given, torch.full((len(x),), 1000 * level), rows).sample

    def restore(self) -> None:
        """The trained LoRA, as it ships."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in torch.load(self.folder / f"lora-{self.name}.pt")["weights"].items():
                own[name].copy_(weight.bfloat16())

    @torch.no_grad()
    def end(self) -> Tensor:
        """Where the high-noise expert's two steps lead, for every trajectory."""
        found = []
        for index in torch.arange(len(self.start)).split(BATCH):
            x = self.start[index]
            for level, lower in ((1.0, 0.9375), (0.9375, 5 / 6)):
                x = x + (lower - level) * self.velocity(x, level, index)
            found.append(x)
        return torch.cat(found)


def load_expert(name: str, folder: Path, attend: Attend) -> WanTransformer3DModel:
    """As it ships, in bf16, computed in float32."""
    weights = torch.load(folder / f"{name}.pt")
    model = transformer.build(weights["patch_embedding.weight"].shape[1], attend)
    model.load_state_dict({key: value.bfloat16() for key, value in weights.items()})
    return model
