"""Checks of single values. All faults of a request are shown at once: a failed check returns a usable value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TypeVar

from wan.utils.argument_parser import not_one_of, outside, real, short
from wan.utils.errors import InputError

Found = TypeVar("Found")
POSITIONS = 1024  # along each axis, height, width and time: of the original's table of rotations
FARTHEST = f"for the model was made for {POSITIONS} positions along each axis"
COMMON_SHIFTS = (3.0, 5.0, 8.0, 12.0)
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

        brought: flags by path; a problem that begins with one of these paths gets its flag.
        """
        try:
            return work()
        except InputError as e:
            for problem in e.problems:
                named = problem.removeprefix("LoRA ")
                flag = next((flag for path, flag in (brought or {}).items() if named.startswith(path)), None)
                self.problem(f"{flag} {named}" if flag else f"{begin}{problem}")
        return None

    def error(self) -> InputError:
        """The first MOST_SHOWN problems, and how many more there are."""
        problems = list(dict.fromkeys(self.problems))
        more = len(problems) - MOST_SHOWN
        return InputError(problems[:MOST_SHOWN] + ([f"and {more:,} more problems"] if more > 0 else []))

    def stop(self) -> None:
        """InputError if there were problems."""
        if self.problems:
            raise self.error()

    def choice(self, flag: str, given: str | None, allowed: Sequence[str], other: str = "") -> str:
        """`given`, else the first of `allowed`. other: pattern of further legal values."""
        if given is None or given in allowed or (other and re.fullmatch(other, given)):
            return given or allowed[0]
        self.problem(not_one_of(f"{flag} ", given, allowed))
        return allowed[0]

    def number(self, flag: str, given: float | None, default: float, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        if given is not None and (problem := outside(flag, given, low, high)):
            self.problem(problem)
            return default
        return default if given is None else given

    def size(self, flag: str, given: str, step: int, named: Mapping[str, str] | None = None) -> tuple[int, int]:
        """(width, height) of `W*H` or `WxH`, multiples of `step`, or of one of the `named` sizes."""
        named = named or {}
        given = named.get(given.strip().lower(), given)
        match = re.fullmatch(r"\s*(\d{1,30})\s*[*xX×]\s*(\d{1,30})\s*", given)
        if not match:
            names = ", ".join(f"{name} ({size})" for name, size in named.items())
            also = f", or one of {names}" if names else ""
            self.problem(f"{flag} {given!r} is not a size; write width*height, such as 832x480{also}")
            return step, step
        width, height = int(match[1]), int(match[2])
        if max(width, height) > POSITIONS * step:
            most = f"a side has at most {POSITIONS * step} pixels, {FARTHEST}"
            self.problem(f"{flag} {width}*{height} is too large; {most}")
            return step, step
        across, down = (max(step, round(side / step) * step) for side in (width, height))
        if (across, down) != (width, height):
            nearest = f"{across}*{down}"
            self.problem(f"{flag} {width}*{height}: both sides must be multiples of {step}; the nearest is {nearest}")
        return across, down

    def frames(self, flag: str, given: int) -> int:
        """A frame count of the form 4n+1: the first frame stands alone, the VAE folds the others by four."""
        longest = (POSITIONS - 1) * 4 + 1
        if given > longest:
            self.problem(f"{flag} {short(given)} is too long; a video has at most {longest} frames, {FARTHEST}")
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
        """An explicit list of final timesteps: falling, within (0, 1000].

        Warns of lists that mean something else in programs that take the list from before the shift.
        """
        values = [real(part) for part in given.split(",")]
        timesteps = tuple(value for value in values if value is not None and math.isfinite(value))
        fault = ""
        if len(timesteps) != len(values):
            fault = f" takes numbers with commas between, such as 1000,937.5,833.33,625, not {given!r}"
        elif beyond := [value for value in timesteps if not 0 < value <= 1000]:
            fault = f": {beyond[0]:g} is outside (0, 1000]"
        elif len(set(timesteps)) != len(timesteps):
            fault = f" {given} names a timestep twice; each must be below the one before"
        elif list(timesteps) != sorted(timesteps, reverse=True):
            fault = f" {given} does not fall; each must be below the one before"
        if fault:
            self.problem(f"--timesteps{fault}")
            return None
        if timesteps[0] != 1000:
            self.warn(f"--timesteps starts at {timesteps[0]:g}, but the video starts as pure noise, which is 1000")
        shift = effective_shift(timesteps) or 0.0
        listed = ", ".join(f"{value:g}" for value in timesteps)
        if math.isclose(shift, 1.0, rel_tol=0.03):
            final = ",".join(f"{shifted(value / 1000, 5.0) * 1000:.6g}" for value in timesteps)
            self.warn(f"--timesteps {listed} looks like a list from before the shift; after shift 5 it is {final}")
        for first, second in combinations_with_replacement(COMMON_SHIFTS, 2):
            if math.isclose(shift, first * second, rel_tol=0.03):
                even = [1 - i / len(timesteps) for i in range(len(timesteps))]
                once = ",".join(f"{shifted(u, second) * 1000:.6g}" for u in even)
                self.warn(
                    f"--timesteps {listed} looks shifted twice (by {first:g} and {second:g}); "
                    f"shifted once by {second:g} it is {once}"
                )
                break
        return timesteps


def shifted(u: float, shift: float) -> float:
    """The flow-matching time shift s u / (1 + (s - 1) u) (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def effective_shift(timesteps: Sequence[float]) -> float | None:
    """The one shift that makes these timesteps of evenly spaced ones, None if there is none.

    Shifting by a, then b, is shifting by a b, so a list that was shifted twice shows the product.
    """
    count = len(timesteps)
    if count < 3 or timesteps[0] != 1000:
        return None
    sigmas = [timestep / 1000 for timestep in timesteps[1:]]
    even = [1 - i / count for i in range(1, count)]
    shifts = [sigma * (1 - u) / (u * (1 - sigma)) for sigma, u in zip(sigmas, even, strict=True)]
    middle = sorted(shifts)[len(shifts) // 2]
    return middle if all(math.isclose(shift, middle, rel_tol=0.03) for shift in shifts) else None


def no_file(path: Path) -> str:
    """The reason why `path` is no file."""
    return "is a folder, not a file" if path.is_dir() else "no such file"
