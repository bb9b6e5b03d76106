"""Command lines: argparse, with one suggestion for an unknown flag, and sentences about wrong values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from wan.utils.errors import InputError

DASHES = "-‐‑‒–—―−"  # word processors make the long ones of two short ones


class Parser(argparse.ArgumentParser):
    """argparse with whole flags only, which raises InputError.
    elsewhere: by what other programs call a flag: ours, or a sentence that says why there is none."""

    def __init__(self, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)
        self.elsewhere = dict(elsewhere or {})

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Values of the flags in `words`. InputError with a sentence for each fault."""
        flags, rest, fault = self._flags(), list(words), ""
        try:
            values, rest = self.parse_known_args(words)
        except argparse.ArgumentError as e:
            flag, fault = (e.argument_name or "").rpartition("/")[2], f"{e.message} (see --help)"
            if flag and fault.startswith("expected"):
                raise InputError(f"{flag} needs a value; one that begins with a dash is written {flag}=VALUE") from e
            if flag:
                raise InputError(f"{flag}: {e.message}") from e
        dashed = [word.partition("=")[0] for word in rest if re.match(rf"[{DASHES}]+[^\W\d]", word)]
        if unknown := [name for name in dashed if name not in flags and " " not in name]:
            raise InputError(f"there is no flag {name}{self._suggestion(name, flags)}" for name in unknown)
        if fault:
            raise InputError(fault)
        if not rest:
            return values
        before = [f": {word} takes no more" for word in words[: words.index(rest[0])] if word in flags]
        unexpected = cut(repr(" ".join(rest))) + "".join(before[-1:])
        raise InputError(f"unexpected {unexpected}; a text with spaces needs straight quotes")

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)  # as newer Pythons do

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # `-height` is not `-h eight`

    def _flags(self) -> list[str]:
        """Those of the commands below included."""
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        below = [flag for parsers in commands for parser in parsers.values() for flag in parser._flags()]
        return [*self._option_string_actions, *below]

    def _suggestion(self, name: str, flags: Iterable[str]) -> str:
        plain = name.strip(DASHES).replace("-", "_").lower()
        answers = self.elsewhere | {flag.strip("-"): flag for flag in flags}
        answer = answers.get(plain if plain in answers else closest(plain, answers), "")
        return f"; did you mean {answer}?" if answer.startswith("--") else answer and f": {answer}"


def closest(word: str, words: Iterable[str]) -> str:
    """The most similar one of `words`; "" if none is similar."""
    return next(iter(get_close_matches(word, words, 1, 0.7)), "")


def cut(text: str) -> str:
    """A text of any length as part of a line."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def not_one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    """A sentence about a value that is not among `allowed`. what: its place, such as "--task "."""
    folded, given = {word.casefold(): word for word in allowed}, value.strip().casefold()
    close = closest(given, folded) or next((word for word in folded if given and given in word), "")
    suggestion = f"; did you mean {folded[close]}?" if close else ""
    return f"{what}{value!r} is not one of {', '.join(allowed)}{suggestion}"


def short(value: object) -> str:
    """A number as part of a line: whole ones without a point, of very long ones the number of digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    if isinstance(value, int) and abs(value) >= 10**21:
        return f"a number of {value.bit_length() * math.log10(2):.0f} digits"
    return str(value)


def real(text: str) -> float | None:
    """The number that `text` spells, if it spells one. `1_0`, which Python reads as 10, is a slip."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def pair(flag: str, value: str) -> tuple[float, float]:
    """`A`, which counts twice, or `A,B`. InputError."""
    parts = value.split(",")
    numbers = [number for part in parts if (number := real(part)) is not None]
    if len(numbers) != len(parts) or len(parts) > 2:
        raise InputError(f"{flag} takes one number or two with a comma between, not {value!r}")
    return numbers[0], numbers[-1]


def outside(flag: str, value: float, low: float, high: float) -> str | None:
    """A sentence about a number that is not between `low` and `high`; None if it is."""
    if low <= value <= high:
        return None
    return f"{flag} {short(value)} is out of range: must be between {short(low)} and {short(high)}"
