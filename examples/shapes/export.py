"""Writes what was trained under the names and in the folders of the released checkpoints, in bf16, and checks it.

The check asks the program and the training modules for the same videos, in float32 and from the same noise.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from examples.shapes import autoencoder, text, transformer
from examples.shapes.distil import ALPHA, LEVELS, Student, Teacher
from examples.shapes.stages import exact, load_vae
from examples.shapes.world import SIDE, render, scenes

FOLDERS = {"t2v": "Wan2.2-T2V-A14B", "i2v": "Wan2.2-I2V-A14B"}
NAMES = {
    "transformer": [
        (r"condition_embedder\.text_embedder\.linear_(\d)", lambda m: f"text_embedding.{2 * int(m[1]) - 2}"),
        (r"condition_embedder\.time_embedder\.linear_(\d)", lambda m: f"time_embedding.{2 * int(m[1]) - 2}"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"attn1\.", "self_attn."),
        (r"attn2\.", "cross_attn."),
        (r"to_([qkv])\b", r"\1"),
        (r"to_out\.0", "o"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
    ],
    "vae": [
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"conv_in", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"encoder\.down_blocks", "encoder.downsamples"),
        (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
        (r"(samples\.\d+|middle\.[02])\.norm1", r"\1.residual.0"),
        (r"(samples\.\d+|middle\.[02])\.conv1", r"\1.residual.2"),
        (r"(samples\.\d+|middle\.[02])\.norm2", r"\1.residual.3"),
        (r"(samples\.\d+|middle\.[02])\.conv2", r"\1.residual.6"),
        (r"conv_shortcut", "shortcut"),
    ],
    "text": [
        (r"^shared", "token_embedding"),
        (r"^encoder\.final_layer_norm", "norm"),
        (r"^encoder\.block\.(\d+)", r"blocks.\1"),
        (r"layer\.0\.layer_norm", "norm1"),
        (r"layer\.1\.layer_norm", "norm2"),
        (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
        (r"layer\.0\.SelfAttention", "attn"),
        (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
        (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
    ],
}


def released(name: str, part: str) -> str:
    """diffusers' or transformers' name of a tensor -> the released one."""
    for pattern, replacement in NAMES[part]:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """In bf16, each tensor with memory of its own."""
    return {released(name, part): tensor.bfloat16().contiguous().clone() for name, tensor in weights.items()}


def write_checkpoint(task: str, state: Path, out: Path) -> None:
    folder = out / FOLDERS[task]
    for expert in ("high", "low"):
        place = folder / f"{expert}_noise_model"
        place.mkdir(parents=True, exist_ok=True)
        weights = torch.load(state / f"{task}-{expert}.pt")
        save_file(renamed(weights, "transformer"), place / "diffusion_pytorch_model.safetensors")
        config = {
            "_class_name": "WanModel",
            "dim": transformer.DIM,
            "eps": 1e-6,
            "ffn_dim": 4 * transformer.DIM,
            "freq_dim": 256,
            "in_dim": weights["patch_embedding.weight"].shape[1],
            "model_type": task,
            "num_heads": transformer.HEADS,
            "num_layers": transformer.LAYERS,
            "out_dim": 16,
            "text_len": text.TEXT_LENGTH,
        }
        (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save(renamed(torch.load(state / "vae.pt"), "vae"), folder / "Wan2.1_VAE.pth")
    encoder = torch.load(state / "text.pt")["encoder"]
    encoder.pop("encoder.embed_tokens.weight")  # the same tensor as `shared`
    torch.save(renamed(encoder, "text"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    words = folder / "google" / "umt5-xxl"
    words.mkdir(parents=True, exist_ok=True)
    text.tokenizer().save(str(words / "tokenizer.json"))


def write_lora(task: str, state: Path, out: Path) -> None:
    """In the layout of the published Lightning LoRAs."""
    folder = out / f"lora-{task}"
    folder.mkdir(parents=True, exist_ok=True)
    for expert in ("high", "low"):
        tensors = {}
        for name, weight in torch.load(state / f"lora-{task}-{expert}.pt")["weights"].items():
            layer, side = re.fullmatch(r"(.*)\.lora_([AB])\.default\.weight", name).groups()
            layer = "diffusion_model." + released(layer, "transformer")
            tensors[f"{layer}.lora_{'down' if side == 'A' else 'up'}.weight"] = weight.bfloat16().contiguous()
            tensors[f"{layer}.alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
        save_file(tensors, folder / f"{expert}_noise_model.safetensors")


def check(task: str, state: Path, out: Path) -> None:
    """The program's videos against the training modules': 40 guided steps, and 4 with the LoRA."""
    import wan
    from wan.configs import WAN_CONFIGS

    exact()
    config = copy.deepcopy(WAN_CONFIGS[f"{task}-A14B"])
    config.param_dtype = config.t5_dtype = torch.float32
    make = wan.WanT2V if task == "t2v" else wan.WanI2V
    scene = scenes()[77]
    clip = render([scene], torch.Generator().manual_seed(3))
    picture = Image.fromarray(((clip[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    vae, teacher = load_vae(state), Teacher.load(task, state)
    first = torch.zeros_like(clip)
    first[:, :, 0] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    channels = transformer.beside(autoencoder.normalised(vae, first)) if task == "i2v" else None
    noise = torch.randn(transformer.LATENT, generator=torch.Generator().manual_seed(5))[None]
    rows, scores = (x[[77]] for x in (teacher.clips.rows, teacher.clips.scores))
    forty = teacher.sample(noise, rows, scores, channels)
    four = noise
    for expert, levels in LEVELS.items():
        student = Student(f"{task}-{expert}", state)
        student.restore()
        for level, lower in zip(levels, (*levels[1:], 5 / 6 if expert == "high" else 0.0), strict=True):
            four = four + (lower - level) * student.ask(four, level, rows, scores, channels)
    place = {"size": (SIDE, SIDE)} if task == "t2v" else {"img": picture, "max_area": SIDE * SIDE}
    for lora, latent in ((None, forty), (out / f"lora-{task}", four)):
        pipe = make(config, str(out / FOLDERS[task]), lora_dir=str(lora) if lora else None)
        settings = {"sample_solver": "euler", "sampling_steps": 4, "shift": 5.0, "guide_scale": 1.0}
        if lora is None:
            settings = {"sampling_steps": 40, "shift": config.sample_shift, "guide_scale": config.sample_guide_scale}
        found = pipe.generate(scene.caption, frame_num=9, seed=5, **place, **settings)
        with torch.no_grad():
            error = (found - autoencoder.pixels(vae, latent)[0]).abs().max().item()
        print(f"check {task} {'4 steps' if lora else '40 steps'}: largest difference {error:.1e} of pixels in [-1, 1]")
        if error > 1e-3:
            raise SystemExit(f"the exported {task} checkpoint does not compute what was trained")
