"""A checkpoint in diffusers' layout, which `diffusers.WanPipeline.from_pretrained` and what is built on it load.

    model_index.json  scheduler/  tokenizer/  text_encoder/  vae/  transformer/  transformer_2/

`transformer` is the high-noise expert (or the only one), `transformer_2` the low-noise one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning.releases import Release
from wan.checkpoints.key_mapping import text_name, vae_name
from wan.checkpoints.layout import MODEL_INDEX, STEM, missing
from wan.checkpoints.safetensors_file import DTYPES, TensorStore
from wan.checkpoints.weights import TEXT_ENCODER, VAE, open_part
from wan.checkpoints.writer import Network
from wan.configs import TASKS, TaskConfig
from wan.configs.task import PATCH, TRAIN_TIMESTEPS
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.utils.errors import LoraError

TEXT_STEM = "model"


def rest_of(ckpt_dir: Path, config: TaskConfig) -> list[Network]:
    """The autoencoder and the text encoder of a checkpoint of either layout, in the precision they are stored in.

    LoraError listing the files that are missing.
    """
    vae, text_encoder = open_part(ckpt_dir, config, VAE), open_part(ckpt_dir, config, TEXT_ENCODER)
    lacking = missing(ckpt_dir, config, own=config.experts)
    if lacking or vae is None or text_encoder is None:
        raise LoraError(f"--ckpt_dir {ckpt_dir} lacks {', '.join(lacking)}, which --layout diffusers needs")
    return [
        Network("vae", vae, Path("vae"), _as_stored(vae), STEM, vae_name),
        Network("text encoder", text_encoder, Path("text_encoder"), _as_stored(text_encoder), TEXT_STEM, text_name),
    ]


def _as_stored(store: TensorStore) -> Callable[[str], torch.dtype]:
    return lambda name: getattr(torch, DTYPES[store[name].dtype][0])


def settings_of(networks: Sequence[Network], task: str, release: Release | None) -> dict[str, dict[str, Any]]:
    """Every JSON file of the folder by its place, but for the tokenizer's. LoraError if something cannot be told.

    release: whose solver and shift the scheduler gets.
    """
    found = {MODEL_INDEX: model_index(task), "scheduler/scheduler_config.json": scheduler_config(task, release)}
    for network in networks:
        folder, shapes = str(network.folder), network.store.shapes
        if folder == "vae":
            config = vae_config(shapes)
        elif folder == "text_encoder":
            config = text_config(shapes)
        else:
            config = transformer_config(_read(network.store.files[0].parent / "config.json"), shapes)
        found[f"{folder}/config.json"] = config
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise LoraError(f"--ckpt_dir: {file} is missing or not JSON") from e
    if not isinstance(content, dict):
        raise LoraError(f"--ckpt_dir: {file} is not a JSON object")
    return content


def transformer_config(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """WanTransformer3DModel's settings. given: config.json of either layout, of which the number of heads is needed."""
    width, channels = shapes["patch_embedding.weight"][:2]
    try:
        heads = int(given["num_heads"] if "num_heads" in given else given["num_attention_heads"])
        eps = float(given.get("eps", 1e-6))
        if heads < 1 or width % heads:
            raise ValueError(heads)
    except (KeyError, TypeError, ValueError) as e:
        raise LoraError(f"--ckpt_dir: config.json gives no number of heads that divides the width {width}") from e
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(PATCH),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": shapes["head.head.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2]),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": len(blocks),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """AutoencoderKLWan's settings."""
    channels = shapes["conv2.weight"][0]
    patch = 2 if shapes["encoder.conv1.weight"][1] == 12 else 1
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": shapes["encoder.conv1.weight"][0],
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": channels,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": LATENT_MEAN[channels],
        "latents_std": LATENT_STD[channels],
        "is_residual": patch == 2,
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8 * patch,
    }


def text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """UMT5EncoderModel's settings."""
    vocabulary, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def scheduler_config(task: str, release: Release | None) -> dict[str, Any]:
    """UniPC, as diffusers' own folders have it; with one order and no corrector it is the distilled models' Euler step.

    Its grid of levels ends at 0.001 before the shift where ours ends at 0: the levels differ by 1e-3 at most.
    """
    config: dict[str, Any] = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": release.shift if release else TASKS[task].sample_shift,
    }
    if release:
        config |= {"solver_order": 1, "disable_corrector": list(range(release.steps))}
    return config


def model_index(task: str) -> dict[str, Any]:
    """Which class of which library each folder is for. The tokenizer's reads tokenizer.json as it is."""
    transformer = ["diffusers", "WanTransformer3DModel"]
    index: dict[str, Any] = {
        "_class_name": TASKS[task].pipeline,
        "boundary_ratio": TASKS[task].boundary,
        "expand_timesteps": task == "ti2v-5B",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if TASKS[task].boundary else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if task == "i2v-A14B":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index
