"""The JSON files of a checkpoint in diffusers' layout, which `diffusers.WanPipeline.from_pretrained` loads.

    model_index.json  scheduler/  tokenizer/  text_encoder/  vae/  transformer/  transformer_2/

`transformer` is the high-noise expert (or the only one), `transformer_2` the low-noise one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.releases import Release
from wan.checkpoints import layout
from wan.checkpoints.checkpoint import transformer_sizes
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import TEXT_ENCODER, VAE
from wan.configs import TaskConfig
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.released import on_meta
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError


def export_settings(
    stores: Mapping[str, TensorStore], ckpt_dir: Path, config: TaskConfig, release: Release | None
) -> dict[str, dict[str, Any]]:
    """Every JSON file of the folder by its place, except the tokenizer's. InputError if the sizes are not known.

    stores: the networks by part, under our names. release: gives the scheduler its solver and shift.
    """
    places, sources = layout.diffusers(config), layout.places_in(ckpt_dir, config)
    transformer, none = ["diffusers", "WanTransformer3DModel"], [None, None]
    index: dict[str, Any] = {  # library and class of each folder; the tokenizer's class reads tokenizer.json as it is
        "_class_name": config.pipeline,
        "boundary_ratio": config.boundary,
        "expand_timesteps": bool(config.image_fit and not config.mask_channels),  # the first frame's own timestep is 0
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if config.boundary else none,
        "vae": ["diffusers", "AutoencoderKLWan"],
        **({"image_encoder": none, "image_processor": none} if config.mask_channels else {}),
    }
    # UniPC, as in diffusers' own folders; with one order and no corrector it is the Euler step of distilled models.
    # Its grid of levels ends at 0.001 before the shift where ours ends at 0: the levels differ by 1e-3 at most.
    scheduler: dict[str, Any] = {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": release.shift if release else config.sample_shift,
        **({"solver_order": 1, "disable_corrector": list(range(release.steps))} if release else {}),
    }
    found = {layout.MODEL_INDEX: index, "scheduler/scheduler_config.json": scheduler}
    for part, store in stores.items():
        try:
            if part == VAE:
                settings = _vae_config(store.shapes)
            elif part == TEXT_ENCODER:
                settings = _text_config(store.shapes)
            else:
                file = ckpt_dir / layout.config_json(sources[part])
                sizes = transformer_sizes(file, store.shapes, str(file.parent), config.text_len)
                settings = _transformer_config(sizes, store.shapes)
        except ValueError as e:
            raise InputError(f"--ckpt_dir: {ckpt_dir / sources[part]}: {e}") from e
        found[layout.config_json(places[part])] = settings
    return found


def _transformer_config(sizes: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(shapes["patch_embedding.weight"][2:]),
        "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["dim"] // sizes["num_heads"],
        "in_channels": sizes["in_dim"],
        "out_channels": sizes["out_dim"],
        "text_dim": shapes["text_embedding.0.weight"][1],
        **{name: sizes[name] for name in ("freq_dim", "ffn_dim", "num_layers")},
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": sizes["eps"],
        "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """ValueError for another network."""
    vae = on_meta(lambda: WanVAE.from_shapes(shapes))
    channels = 3 * vae.patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": shapes["encoder.conv1.weight"][0],
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": vae.z_dim,
        "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
        "temperal_downsample": [False, True, True], "dropout": 0.0,
        "latents_mean": LATENT_MEAN[vae.z_dim], "latents_std": LATENT_STD[vae.z_dim],
        "is_residual": vae.patch == 2,
        "in_channels": channels, "out_channels": channels,
        "patch_size": vae.patch if vae.patch > 1 else None,
        "scale_factor_temporal": vae.stride[0], "scale_factor_spatial": vae.stride[1],
    }  # fmt: skip


def _text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """ValueError for another network."""
    encoder = on_meta(lambda: UMT5Encoder.from_shapes(shapes))
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocabulary, width = shapes["token_embedding.weight"]
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": len(encoder.blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
        "dropout_rate": 0.0, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
