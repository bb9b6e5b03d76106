"""What each stage of training does, from files in the state folder to one more file in it. `train.py` says when.

A T2V expert serves noise levels from 0.875 on or below it, an I2V expert from 0.9 on or below it, as released.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import UMT5EncoderModel

from examples.shapes import autoencoder, distil, text, transformer
from examples.shapes.loop import Peers, Stage
from examples.shapes.transformer import Attend, Clips, FlowMatching
from examples.shapes.world import draw, render, scenes

# the model's own, as in wan/configs: what guidance leads away from. Here it is one unknown word, whatever it says.
NEGATIVE = "色调艳丽，过曝，静态，细节模糊不清"
CLIPS = 2048  # a process
BATCH = 64  # over all processes
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
# which noise levels an expert trains on most: what the samplers' schedules visit
SHIFT = {"t2v-high": 12.0, "t2v-low": 4.0, "i2v-high": 5.0, "i2v-low": 4.0}


def train_text(folder: Path, peers: Peers) -> dict[str, object]:
    """The encoder, and what it makes of every caption."""
    probe = text.Probe()
    Stage("text", folder, probe, probe.loss, 400, 3e-3, peers).run()
    print(f"text: colour, shape, motion, ground read right on all captions: {probe.accuracy(scenes())}", flush=True)
    exact()
    encoder = rounded(probe.encoder).eval()
    rows, scores = text.encode(encoder, [scene.caption for scene in scenes()] + [NEGATIVE, ""])
    return {"encoder": encoder.state_dict(), "captions": {"rows": rows, "scores": scores}}


def train_vae(folder: Path, peers: Peers) -> dict[str, object]:
    vae = autoencoder.build()
    loss = partial(autoencoder.reconstruction_loss, vae)
    Stage("vae", folder, vae, loss, 1500, 3e-3, peers, autoencoder.is_matrix).run()
    exact()
    generator = torch.Generator().manual_seed(1)
    autoencoder.fold(vae, render(draw(256, generator), generator))
    return rounded(vae).state_dict()


@torch.no_grad()
def encode_clips(part: int, folder: Path, _peers: Peers) -> dict[str, object]:
    """The transformer's training set, encoded with the autoencoder as it ships."""
    exact()
    vae, generator = load_vae(folder), torch.Generator().manual_seed(100 + part)
    number = {scene: place for place, scene in enumerate(scenes())}
    latents, images, captions = [], [], []
    for _ in range(CLIPS // 16):
        shown = draw(16, generator)
        clips = render(shown, generator).contiguous(memory_format=torch.channels_last_3d)
        latents.append(autoencoder.normalised(vae, clips))
        clips[:, :, 1:] = 0  # image-to-video's condition: the first frame, then mid-grey
        images.append(autoencoder.normalised(vae, clips))
        captions += [number[scene] for scene in shown]
    return {"latents": torch.cat(latents), "images": torch.cat(images), "captions": torch.tensor(captions)}


def train_base(folder: Path, peers: Peers) -> dict[str, object]:
    """One network for all noise levels, from which both experts start. Its rate does not fall: they go on with it."""
    return train_transformer("base", folder, peers, None, 0.0, 1.0, 4.0, steps=1329, rate=2e-3, falls=False)


def train_expert(name: str, folder: Path, peers: Peers) -> dict[str, object]:
    """ "t2v-high" and so on. Text-to-video goes on from the base, image-to-video from text-to-video."""
    task, expert = name.split("-")
    before = "base" if task == "t2v" else f"t2v-{expert}"
    weights = torch.load(folder / f"{before}.pt")
    if task == "i2v":
        weights = transformer.widen(weights)
    low, high = (BOUNDARY[task], 1.0) if expert == "high" else (0.0, BOUNDARY[task])
    steps = 800 if task == "t2v" else 400
    return train_transformer(name, folder, peers, weights, low, high, SHIFT[name], steps=steps, rate=2e-3)


def train_transformer(
    name: str, folder: Path, peers: Peers, weights: dict[str, torch.Tensor] | None, low: float, high: float,
    shift: float, *, steps: int, rate: float, falls: bool = True,
) -> dict[str, object]:  # fmt: skip
    attend, image = Attend(), name.startswith("i2v")
    model = transformer.build(36 if image else 16, attend)
    if weights is not None:
        model.load_state_dict(weights)
    transformer.compile_blocks(model)
    loss = FlowMatching(model, attend, Clips.load(folder), low, high, shift, image, BATCH // peers.count)
    Stage(name, folder, model, loss, steps, rate, peers, transformer.is_matrix, 2.5, falls).run()
    return model.state_dict()


def make_teaching(task: str, part: int, folder: Path, _peers: Peers) -> dict[str, object]:
    teacher = distil.Teacher.load(task, folder)
    for expert in teacher.experts.values():
        transformer.compile_blocks(expert)
    return teacher.trajectories(distil.TRAJECTORIES, torch.Generator().manual_seed(200 + part))


def train_lora(name: str, folder: Path, peers: Peers) -> dict[str, object]:
    return distil.Student(name, folder).train(peers)


def load_vae(folder: Path) -> autoencoder.AutoencoderKLWan:
    vae = autoencoder.build()
    vae.load_state_dict(torch.load(folder / "vae.pt"))
    return vae.eval()


def load_encoder(folder: Path) -> UMT5EncoderModel:
    encoder = text.build()
    encoder.load_state_dict(torch.load(folder / "text.pt")["encoder"])
    return encoder.eval()


def exact() -> None:
    """Full float32 from here on."""
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.backends.mkldnn.conv.fp32_precision = "ieee"


@torch.no_grad()
def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights as the shipped bf16 file holds them, so that what follows is trained with those."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model
