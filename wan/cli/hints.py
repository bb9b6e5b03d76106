"""Hints on a command line: what an unknown flag probably means, and which flags of this one have no effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from wan.cli.options import DEFAULTS, OPTIONS, Request

# What other programs call an option.
ALSO: dict[str, str] = {
    "task": "t task_name model_type",
    "prompt": "p text positive_prompt",
    "image": "i input_image img init_image first_frame start_image image_path",
    "last_image": "end_image last_frame end_frame tail_image",
    "prompt_file": "prompts prompt_list prompts_file prompt_path batch_file",
    "image_path_file": "images image_list image_file",
    "negative_prompt": "negative neg_prompt n_prompt",
    "size": "width height resolution video_size w h s",
    "frame_num": "frames num_frames n_frames length video_length frame_count",
    "seconds": "duration time",
    "base_seed": "seed sample_seed random_seed",
    "num_videos": "n batch_size num_samples repeat",
    "ckpt_dir": "model model_dir model_path model_id checkpoint checkpoint_dir ckpt m",
    "lora_dir": "lora_path lora_folder",
    "lora_strength": "lora_scale lora_weight lora_multiplier",
    "lora": "loras lora_path lora_file lora_model",
    "expert": "dit transformer unet",
    "vae": "vae_path vae_file",
    "text_encoder": "t5 t5_path clip",
    "sample_solver": "solver sampler scheduler",
    "sample_steps": "steps num_inference_steps infer_steps num_steps sampling_steps",
    "sample_shift": "shift flow_shift timestep_shift",
    "sample_guide_scale": "cfg cfg_scale guidance guidance_scale guide_scale",
    "device": "gpu device_id d",
    "dtype": "precision fp16 bf16 fp32",
    "attention": "attn attn_mode attention_mode",
    "offload_model": "offload cpu_offload low_vram lowvram",
    "vram": "max_memory gpu_memory memory",
    "t5_cpu": "text_encoder_cpu",
    "vae_tiling": "tiling tile tiled_vae vae_tiled",
    "ulysses_size": "ulysses ulysses_degree sp_size",
    "ring_size": "ring_degree",
    "use_prompt_extend": "prompt_extend enhance_prompt extend",
    "save_dir": "output output_dir out_dir outdir out o results_dir",
    "save_file": "output output_file output_path save_path filename out o",
    "overwrite": "force f y yes",
    "resume": "skip_existing continue",
    "replay": "from_record recipe config",
    "dry_run": "dry check plan test",
    "debug": "verbose v traceback",
    "gallery": "html",
    "save_latents": "save_latent keep_latents",
}
# What has a say where a start makes no videos, by the option that says so.
MODES: dict[str, str] = {
    "decode_latents": (
        "task ckpt_dir expert vae text_encoder tokenizer device dtype vae_dtype offload_model vram vae_tiling "
        "ulysses_size ring_size save_file decode_latents preview overwrite replay dry_run json debug shard"
    ),
    "extend_only": (
        "task prompt image last_image prompt_file image_path_file base_seed device use_prompt_extend "
        "prompt_extend_method prompt_extend_model prompt_extend_target_lang prompt_extend_on_error no_extend_cache "
        "extend_only overwrite dry_run json debug shard"
    ),
}


def without_effect(given: Mapping[str, Any], request: Request) -> list[str]:
    """A warning for each kind of flags in `given` that this start, whose request is `request`, does not look at."""
    set_here = {name for name in OPTIONS if getattr(request, name) != DEFAULTS[name]}
    told = [name for name in given if name in set_here]
    warnings = []
    for mode, words in MODES.items():
        if mode in set_here and (idle := [name for name in told if name not in words.split()]):
            does = OPTIONS[mode].help
            warnings.append(f"{_flags(idle)} {_has(idle)} no effect beside --{mode}: {does}")
            told = [name for name in told if name not in idle]
    for name in told:
        row = OPTIONS[name]
        if row.needs and not set_here.intersection(row.needs):
            warnings.append(f"--{name} has no effect without {_flags(row.needs, 'or')}")
        elif row.beaten_by in set_here:
            warnings.append(f"--{name} has no effect beside --{row.beaten_by}")
    return warnings


def idle_on(request: Request, device: str, dtype: str) -> list[str]:
    """The same for what the device ("cpu") and the dtype ("float32") of the run leave without effect."""
    rows = [(f"--{name}", row.idle_on) for name, row in OPTIONS.items() if getattr(request, name) != DEFAULTS[name]]
    found = [(flag, place) for flag, place in rows if place and place in (device, dtype)]
    return [f"{flag} has no effect on {'the CPU' if place == 'cpu' else 'a run in ' + place}" for flag, place in found]


def _flags(names: Collection[str], joint: str = "and") -> str:
    *first, last = [f"--{name}" for name in names]
    return f"{', '.join(first)} {joint} {last}" if first else last


def _has(names: Collection[str]) -> str:
    return "has" if len(names) == 1 else "have"
