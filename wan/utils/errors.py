"""Expected failures, each with a message for the user; all others are bugs and keep their traceback."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec

from wan.utils.progress import tell

FAILED, BAD_INPUT = 1, 2  # exit codes: a job failed; nothing was started
LONGEST = 1500  # characters of a problem
NEEDED = ("torch", "easydict")  # of all that requirements.txt brings, what nothing starts without
# How PyTorch and CUDA's libraries report that they get no memory.
NO_MEMORY = re.compile(
    "out of memory|GET was unable to find an engine|Unable to find a valid cuDNN algorithm|_STATUS_ALLOC_FAILED|"
    "CUDA_ERROR_OUT_OF_MEMORY|DefaultCPUAllocator: "
)


class WanError(Exception):
    """An expected failure, with a sentence for each fault."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        listed = [problems] if isinstance(problems, str) else problems
        # values of files are any size
        self.problems = [p if len(p) <= LONGEST else f"{p[:LONGEST]}..." for p in listed]
        super().__init__(self.problems)  # from which pickle makes it anew in another process

    def __str__(self) -> str:
        return "\n".join(self.problems)


class InputError(WanError):
    """Bad input, found before any work: nothing was started. All faults are collected, to be shown at once."""


class JobError(WanError):
    """One job failed after work had started; the other jobs go on."""


class LoraError(InputError):
    """A LoRA, a release or a distilled file that cannot be used."""


class TensorFileError(InputError):
    """A file of tensors that is damaged, or is none."""


def print_errors(problems: Iterable[str], code: int = BAD_INPUT) -> int:
    """Print an `error:` line for each problem, and return the exit code."""
    for problem in problems:
        tell(sys.stderr, f"error: {problem}\n")
    return code


def exit_code(work: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of a command, `work`. Expected failures become `error:` lines, Ctrl-C a line and 130."""
    try:
        return work()
    except (WanError, OSError) as e:
        return print_errors(getattr(e, "problems", [str(e)]))
    except KeyboardInterrupt:
        tell(sys.stderr, f"{interrupted}\n")
        return 130


def first_line(error: BaseException) -> str:
    """First line of a library's error, at most 200 characters; the name of its class where it has no text."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return " ".join(next(filter(str.strip, text.splitlines()), type(error).__name__).split())[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device has no memory left. Imports no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def need_packages() -> None:
    """SystemExit with code 2 if this Python, which may be any, is too old or lacks the packages."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info < (3, 11):  # noqa: UP036 - that is what an installation forbids, and a clone cannot
        lack = f"Python 3.11 or newer is needed; {sys.executable} is {platform.python_version()}"
    elif missing:
        advice = "after make demo: source .venv/bin/activate; else: pip install -r requirements.txt"
        lack = f"{sys.executable or 'this Python'} has no package {' and no '.join(missing)}; {advice}"
    else:
        return
    sys.exit(print_errors([lack]))
