"""Expected failures, each with a message for the user. `generate.py` alone prints them and picks exit codes.

Anything that is not a `WanError` is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

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


class WanError(Exception):
    """An expected failure whose message is one sentence for the user."""


class InputError(WanError):
    """Nothing was started: bad input, found before any work (exit code 2).

    `problems` holds one sentence per thing that is wrong, so that all of them can be shown at once.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[list[str]]]:
        """Processes tell each other what is wrong: the list must survive."""
        return type(self), (self.problems,)


class JobError(WanError):
    """One job failed after work had started; the other jobs go on (exit code 1)."""


class LoraError(InputError):
    """A LoRA, a release or a distilled file that cannot be used."""


class TensorFileError(InputError):
    """A file of tensors that is damaged, or is none."""


def first_line(error: BaseException) -> str:
    """Of what a library's error says; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, most: int = 200) -> str:
    """Its kind and what it says, at most so many characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room, in whatever dress that comes. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
