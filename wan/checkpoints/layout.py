"""Which file of a checkpoint folder holds which part: in the released layout, or in diffusers'.

A part is an expert (by its name), "text_encoder", "vae" or "tokenizer"; shards with an index may serve as any file."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path, PurePosixPath

from wan import configs
from wan.checkpoints.safetensors_file import INDEX_SUFFIX
from wan.configs import TaskConfig
from wan.utils.errors import InputError

STEM = "diffusion_pytorch_model"  # of an expert's file or files, in both layouts
WEIGHTS = f"{STEM}.safetensors"
MODEL_INDEX = "model_index.json"  # only diffusers' layout has it
FOLDERS = {"high": "transformer", "low": "transformer_2", "model": "transformer"}  # of the experts in that layout


def is_diffusers(folder: Path) -> bool:
    return (folder / MODEL_INDEX).is_file()


def released(config: TaskConfig) -> dict[str, str]:
    """Part -> file in the released layout."""
    experts = {name: str(PurePosixPath(folder, WEIGHTS)) for name, folder in config.experts.items()}
    others = {"text_encoder": config.t5_checkpoint, "vae": config.vae_checkpoint}
    return experts | others | {"tokenizer": f"{config.t5_tokenizer}/tokenizer.json"}


def diffusers(config: TaskConfig) -> dict[str, str]:
    """Part -> file in diffusers' layout."""
    experts = {name: f"{FOLDERS[name]}/{WEIGHTS}" for name in config.experts}
    others = {"text_encoder": "text_encoder/model.safetensors", "vae": f"vae/{WEIGHTS}"}
    return experts | others | {"tokenizer": "tokenizer/tokenizer.json"}


def places_in(folder: Path, config: TaskConfig) -> dict[str, str]:
    """Part -> file, relative to the folder, in the layout that the folder has."""
    return diffusers(config) if is_diffusers(folder) else released(config)


def config_json(weights: str) -> str:
    """The file beside an expert's weights that holds its sizes."""
    return str(PurePosixPath(weights).with_name("config.json"))


def path_of(folder: Path, config: TaskConfig, part: str) -> Path:
    """The file of a part, or the index of its shards where there is one."""
    file = places_in(folder, config)[part]
    index = folder / (file.removesuffix(".safetensors") + INDEX_SUFFIX)
    return index if index.is_file() else folder / file


def missing(folder: Path, config: TaskConfig, own: Collection[str] = ()) -> list[str]:
    """Files that the folder lacks; the parts in `own` come from elsewhere."""
    lacking = []
    for part, name in places_in(folder, config).items():
        if part in own:
            continue
        if part in config.experts and not (folder / config_json(name)).is_file():
            lacking.append(config_json(name))
        if not path_of(folder, config, part).is_file():
            stem = name.removesuffix(".safetensors")
            lacking.append(stem + INDEX_SUFFIX if any(folder.glob(f"{stem}-*.safetensors")) else name)
    return lacking


def check_complete(folder: Path, config: TaskConfig, own: Collection[str] = ()) -> None:
    """InputError, with all missing files in one sentence; the parts in `own` come from elsewhere."""
    if lacking := missing(folder, config, own):
        get = configs.download_command(f"{config.hub_id}-Diffusers" if is_diffusers(folder) else config.hub_id)
        advice = f"; get them with: {get}"
        with suppress(OSError):  # a folder that cannot be listed gives no advice; the error stays
            near = [folder.parent, *folder.iterdir(), *folder.rglob("snapshots/*")] if os.path.isdir(folder) else []
            if whole := next((each for each in near if each.is_dir() and not missing(each, config, own)), None):
                advice = f", but {whole} has them all: give that folder"
        raise InputError(f"--ckpt_dir {folder} lacks {', '.join(lacking)}{advice}")


def patterns(config: TaskConfig, own: Collection[str]) -> list[str]:
    """Patterns of the files to fetch from the hub, in either layout; the parts in `own` come from elsewhere."""
    files = [pair for names in (released(config), diffusers(config)) for pair in names.items()]
    settings = [config_json(name) for part, name in files if part in config.experts]
    return [MODEL_INDEX, *settings, *(name.replace(".safetensors", "*") for part, name in files if part not in own)]
