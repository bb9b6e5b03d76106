"""The original's name for connecting processes, for scripts that were written for it."""

import torch.distributed as dist

from wan.distributed.launch import Runtime


def init_distributed_group() -> None:
    """Connect this process to the others that torchrun started, unless the script has done so or it is alone.

    InputError, WanError: see `Runtime.start`.
    """
    if dist.is_available() and not dist.is_initialized():
        Runtime.start()
