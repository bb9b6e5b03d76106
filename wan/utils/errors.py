"""The expected failures; `generate.py` alone prints them and picks exit codes. Their base is lightning's."""

from lightning.errors import InputError as InputError
from lightning.errors import WanError as WanError
from lightning.errors import first_line as first_line
from lightning.errors import one_line as one_line

# What PyTorch and CUDA's libraries say, each in its own words, when they get no memory.
NO_MEMORY = (
    "out of memory",
    "GET was unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "DefaultCPUAllocator: ",  # "can't allocate memory", or "not enough memory"
)


class JobError(WanError):
    """One job failed after work had started; the other jobs go on (exit code 1)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room, in whatever dress that comes. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
