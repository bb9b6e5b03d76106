"""The models' constants, one table by task name. Importing it imports no torch."""

from easydict import EasyDict

from wan.configs.i2v_A14B import i2v_A14B
from wan.configs.t2v_A14B import t2v_A14B
from wan.configs.ti2v_5B import ti2v_5B

WAN_CONFIGS: dict[str, EasyDict] = {config.name: config for config in (t2v_A14B, i2v_A14B, ti2v_5B)}


def download_command(config: EasyDict) -> str:
    """How to get the released checkpoint."""
    return f"hf download {config.hub_id} --local-dir {config.hub_id.split('/')[1]}"
