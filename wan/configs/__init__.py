"""The models' constants, one table by task name. Importing it imports no torch."""

from easydict import EasyDict

from wan.configs.i2v_A14B import i2v_A14B
from wan.configs.t2v_A14B import t2v_A14B
from wan.configs.ti2v_5B import ti2v_5B

WAN_CONFIGS: dict[str, EasyDict] = {config.name: config for config in (t2v_A14B, i2v_A14B, ti2v_5B)}
# The sizes by task, (width, height) of each, and its area, under the original's names.
SUPPORTED_SIZES: dict[str, tuple[str, ...]] = {name: config.sizes for name, config in WAN_CONFIGS.items()}
SIZE_CONFIGS: dict[str, tuple[int, int]] = {
    size: (int(width), int(height))
    for sizes in SUPPORTED_SIZES.values()
    for size in sizes
    for width, height in [size.split("*")]
}
MAX_AREA_CONFIGS: dict[str, int] = {size: width * height for size, (width, height) in SIZE_CONFIGS.items()}


def sizes_by_name(config: EasyDict) -> dict[str, str]:
    """What the sizes that the task was trained for are called: `720p`, and upright `720p-portrait`."""
    names = {}
    for size in config.sizes:
        width, height = SIZE_CONFIGS[size]
        name = f"{480 if min(width, height) == 480 else 720}p"  # the 5B model's 704 rows are sold as 720p
        names[name if width > height else f"{name}-portrait"] = size
    return names


def download_command(config: EasyDict) -> str:
    """How to get the released checkpoint."""
    return f"hf download {config.hub_id} --local-dir {config.hub_id.split('/')[1]}"
