"""The expected failures, of which `wan` has more: each carries sentences for the user.

Anything that is not a `WanError` is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


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


def first_line(error: BaseException) -> str:
    """Of what a library's error says; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, most: int = 200) -> str:
    """Its kind and what it says, at most so many characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


class LoraError(InputError):
    """A LoRA, a release or a distilled file that cannot be used."""


class TensorFileError(InputError):
    """A file of tensors that is damaged, or is none."""
