"""Checks of single values. All faults of a request are shown at once: a failed check returns a usable value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from wan.utils.argument_parser import not_one_of, outside, real, short
from wan.utils.errors import InputError

Found = TypeVar("Found")
POSITIONS = 1024  # along each axis, height, width and time: of the original's table of rotations
BECAUSE = f", for the model was made for {POSITIONS} positions along each axis"
MOST_SHOWN = 50  # problems; a file of a hundred thousand bad rows has one cause


class Check:
    """Collects problems, which stop the run, and warnings, which do not. Equal ones count once."""

    def __init__(self, problems: Sequence[str] = ()) -> None:
        self.problems, self.warnings = list(problems), list[str]()

    def problem(self, sentence: str) -> None:
        self.problems.append(sentence)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)

    def attempt(
        self, work: Callable[[], Found], brought: Mapping[str, str] | None = None, begin: str = ""
    ) -> Found | None:
        """`work()`, or None if it raises InputError, whose problems are noted, with `begin` in front of each.
        brought: flags by path; a problem that begins with one of these paths gets its flag."""
        try:
            return work()
        except InputError as e:
            for problem in e.problems:
                named = problem.removeprefix("LoRA ")
                flag = next((flag for path, flag in (brought or {}).items() if named.startswith(path)), None)
                self.problem(f"{flag} {named}" if flag else f"{begin}{problem}")
        return None

    def stop(self) -> None:
        """InputError if there were problems."""
        if self.problems:
            raise self.error()

    def error(self) -> InputError:
        """The first MOST_SHOWN problems, and how many more there are."""
        problems = list(dict.fromkeys(self.problems))
        more = len(problems) - MOST_SHOWN
        return InputError(problems[:MOST_SHOWN] + ([f"and {more:,} more problems"] if more > 0 else []))

    def choice(self, flag: str, given: str | None, allowed: Sequence[str], other: str = "") -> str:
        """`given`, else the first of `allowed`. other: pattern of further legal values."""
        if given is None or given in allowed or (other and re.fullmatch(other, given)):
            return given or allowed[0]
        self.problem(not_one_of(f"{flag} ", given, allowed))
        return allowed[0]

    def number(self, flag: str, given: float | None, default: float, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        problem = outside(flag, given, low, high) if given is not None else None
        self.problems += [problem] if problem else []
        return default if given is None or problem else given

    def size(self, flag: str, given: str, step: int, named: Mapping[str, str] | None = None) -> tuple[int, int]:
        """(width, height) of `W*H` or `WxH`, multiples of `step`, or of one of the `named` sizes."""
        named = named or {}
        given = named.get(given.strip().lower(), given)
        match = re.fullmatch(r"\s*(\d{1,30})\s*[*xX×]\s*(\d{1,30})\s*", given)
        if not match:
            also = f", or one of {', '.join(named)}" if named else ""
            self.problem(f"{flag} {given!r} is not a size; write width*height, such as 832x480{also}")
            return step, step
        width, height = int(match[1]), int(match[2])
        if max(width, height) > POSITIONS * step:
            self.problem(f"{flag} {width}*{height} is too large; a side has at most {POSITIONS * step} pixels{BECAUSE}")
            return step, step
        across, down = (max(step, round(side / step) * step) for side in (width, height))
        if (across, down) != (width, height):
            sides = f"both sides must be multiples of {step}; the nearest is {across}*{down}"
            self.problem(f"{flag} {width}*{height}: {sides}")
        return across, down

    def frames(self, flag: str, given: int) -> int:
        """A frame count of the form 4n+1: the VAE folds four frames into one, except the first."""
        longest = (POSITIONS - 1) * 4 + 1
        if given > longest:
            self.problem(f"{flag} {short(given)} is too long; a video has at most {longest} frames{BECAUSE}")
            return 1
        below = max(1, (given - 1) // 4 * 4 + 1)
        if given != below:
            nearest = f"values are {short(below)} or {short(below + 4)}" if given > 1 else "value is 1"
            self.problem(f"{flag} {short(given)} is not of the form 4n+1; the nearest valid {nearest}")
        return below

    def several(self, what_needs: str, frames: int) -> None:
        """More than one frame. what_needs: begin of the sentence, "p.txt line 3: a clip of a chain needs"."""
        if frames < 5:
            self.problem(f"{what_needs} 5 frames or more, not {frames}")

    def timesteps(self, given: str) -> tuple[float, ...] | None:
        """An explicit list of final timesteps: falling, within (0, 1000]."""
        timesteps = tuple(number for part in given.split(",") if (number := real(part)) is not None)
        fault = ""
        if len(timesteps) <= given.count(",") or not all(map(math.isfinite, timesteps)):
            fault = f" takes numbers with commas between, such as 1000,937.5,833.33,625, not {given!r}"
        elif beyond := [value for value in timesteps if not 0 < value <= 1000]:
            fault = f": {beyond[0]:g} is outside (0, 1000]"
        elif any(after >= before for before, after in pairwise(timesteps)):
            fault = f" {given}: each must be below the one before"
        elif timesteps[0] != 1000:
            self.warn(f"--timesteps starts at {timesteps[0]:g}, but the video starts as pure noise, which is 1000")
        if fault:
            self.problem(f"--timesteps{fault}")
        return None if fault else timesteps
