"""The models' constants: `TASKS` for this program, and the original's tables for its scripts. Imports no torch."""

from collections.abc import Mapping

from easydict import EasyDict

from wan.configs.i2v_A14B import i2v_A14B
from wan.configs.t2v_A14B import t2v_A14B
from wan.configs.task import TaskConfig as TaskConfig
from wan.configs.ti2v_5B import ti2v_5B

TASKS: dict[str, TaskConfig] = {config.name: config for config in (t2v_A14B, i2v_A14B, ti2v_5B)}


def _as_the_original(config: TaskConfig) -> EasyDict:
    """The attributes that scripts of Wan2.2 and Wan2.2-Lightning read and change."""
    files = {f"{expert}_noise_checkpoint": folder for expert, folder in config.experts.items()}
    loras = {f"{expert}_noise_lora_checkpoint": f"{expert}_noise_model.safetensors" for expert in config.experts}
    if config.boundary is None:
        files, loras = {}, {"lora_checkpoint": "diffusion_pytorch_model.safetensors"}
    return EasyDict(vars(config), __name__=f"Config: Wan {config.name}", **files, **loras)


WAN_CONFIGS: dict[str, EasyDict] = {name: _as_the_original(config) for name, config in TASKS.items()}
# The sizes by task, (width, height) of each, and its area, under the original's names.
SUPPORTED_SIZES: dict[str, tuple[str, ...]] = {name: config.sizes for name, config in TASKS.items()}
SIZE_CONFIGS: dict[str, tuple[int, int]] = {
    size: (int(size.split("*")[0]), int(size.split("*")[1])) for sizes in SUPPORTED_SIZES.values() for size in sizes
}
MAX_AREA_CONFIGS: dict[str, int] = {size: width * height for size, (width, height) in SIZE_CONFIGS.items()}


def task_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The published task whose transformer has as many input channels as these parameters; None if none has."""
    channels = shapes.get("patch_embedding.weight", (0, 0))[1]
    return next((name for name, config in TASKS.items() if config.in_dim == channels), None)


def download_command(hub_id: str) -> str:
    """How to get a checkpoint from the hub."""
    return f"hf download {hub_id} --local-dir {hub_id.split('/')[1]}"
