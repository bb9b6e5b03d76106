"""Where the parts of a checkpoint lie: in the released layout, in diffusers', or each in a file of its own.

A part is an expert (by its name), "text_encoder", "vae" or "tokenizer"; its place is a file relative to the folder.
Where a safetensors file has its place, shards and their index may lie instead.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath

from wan import configs
from wan.checkpoints.safetensors_file import INDEX_SUFFIX
from wan.configs import TaskConfig
from wan.utils.errors import InputError

STEM = "diffusion_pytorch_model"  # of an expert's file or files, in both layouts
MODEL_INDEX = "model_index.json"  # only diffusers' layout has it
FOLDERS = {"high": "transformer", "low": "transformer_2", "model": "transformer"}  # of the experts in that layout
WEIGHTS = f"{STEM}.safetensors"


def released(config: TaskConfig) -> dict[str, str]:
    return {
        **{name: str(PurePosixPath(where, WEIGHTS)) for name, where in config.experts.items()},
        "text_encoder": config.t5_checkpoint,
        "vae": config.vae_checkpoint,
        "tokenizer": f"{config.t5_tokenizer}/tokenizer.json",
    }


def diffusers(config: TaskConfig) -> dict[str, str]:
    return {
        **{name: f"{FOLDERS[name]}/{WEIGHTS}" for name in config.experts},
        "text_encoder": "text_encoder/model.safetensors",
        "vae": f"vae/{WEIGHTS}",
        "tokenizer": "tokenizer/tokenizer.json",
    }


def settings_of(place: str) -> str:
    """Where the sizes of the expert at `place` stand."""
    return str(PurePosixPath(place).parent / "config.json")


def places_in(folder: Path, config: TaskConfig) -> dict[str, str]:
    """The place of each part, by the layout that the folder has."""
    return diffusers(config) if (folder / MODEL_INDEX).is_file() else released(config)


def download_command(folder: Path, config: TaskConfig) -> str:
    """How to get the folder's files again, in its layout."""
    name = f"{config.hub_id}-Diffusers" if (folder / MODEL_INDEX).is_file() else config.hub_id
    return configs.download_command(name)


def weights_at(file: Path) -> Path | None:
    """The index of the shards, or the single file, at a place; None if there is neither."""
    index = _index(file)
    return next((path for path in (index, file) if path.is_file()), None)


def missing(folder: Path, config: TaskConfig, given: Collection[str]) -> list[str]:
    """What the folder lacks of the parts that are not `given` otherwise."""
    lacking = []
    for part, place in places_in(folder, config).items():
        if part in given:
            continue
        if part in config.experts and not (folder / settings_of(place)).is_file():
            lacking.append(settings_of(place))
        file = folder / place
        if weights_at(file) is None:
            in_shards = any(file.parent.glob(f"{file.stem}-*.safetensors"))
            lacking.append(str(PurePosixPath(place).parent / _index(file).name) if in_shards else place)
    return lacking


def check_complete(folder: Path, config: TaskConfig, given: Collection[str]) -> None:
    """InputError, with all that is missing in one sentence, for a folder that lacks files of parts not `given`."""
    if lacking := missing(folder, config, given):
        get = download_command(folder, config)
        raise InputError(f"--ckpt_dir {folder} lacks {', '.join(lacking)}; get them with: {get}")


def patterns(config: TaskConfig, given: Collection[str]) -> list[str]:
    """What to fetch from a hub, in whichever layout the files lie there."""
    wanted = [MODEL_INDEX]
    for layout in (released(config), diffusers(config)):
        for part, place in layout.items():
            if part in config.experts:
                wanted.append(settings_of(place))
            if part == "tokenizer":
                wanted += [] if part in given else [place]
            elif part not in given:
                wanted.append(place.replace(".safetensors", "*"))
    return wanted


def _index(file: Path) -> Path:
    return file.with_name(file.name.removesuffix(".safetensors") + INDEX_SUFFIX)


def is_diffusers(ckpt_dir: Path) -> bool:
    return (ckpt_dir / MODEL_INDEX).is_file()
