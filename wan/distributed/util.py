"""The original's names for connecting processes, for scripts that were written for it."""

import torch
import torch.distributed as dist

from wan.distributed.launch import Runtime


def init_distributed_group() -> None:
    """Connect this process to the others that torchrun started, unless the script has done so. See `Runtime.start`."""
    if dist.is_available() and not dist.is_initialized():
        Runtime.start()


def get_distributed_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def set_device(local_rank: int) -> None:
    """Make this process's GPU the current one, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
