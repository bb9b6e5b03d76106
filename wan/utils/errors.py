"""The expected failures. Each carries sentences for the user; `generate.py` alone prints them and picks exit codes.

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


class JobError(WanError):
    """One job failed after work had started; the other jobs go on (exit code 1)."""
