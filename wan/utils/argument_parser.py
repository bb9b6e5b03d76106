"""Parsing of command lines: argparse, with one suggestion for an unknown flag, and sentences about wrong values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from wan.utils.errors import InputError

DASHES = "-‐‑‒–—―−"  # word processors make the long ones of two short ones
SIMILARITY = 0.7  # of two words, for one to be suggested in place of the other


class Parser(argparse.ArgumentParser):
    """argparse with whole flags only, which raises InputError.

    elsewhere: by what other programs call a flag: ours, or a sentence that says why there is none.
    """

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
                fault = e.message.replace("ignored explicit argument", "takes no value, not")
                raise InputError(f"{flag}: {fault}") from e
        dashed = [word.partition("=")[0] for word in rest if re.match(rf"[{DASHES}]+[^\W\d]", word)]
        if unknown := [name for name in dashed if name not in flags and " " not in name]:
            raise InputError(f"there is no flag {name}{self._suggestion(name, flags)}" for name in unknown)
        if fault:
            raise InputError(fault)
        if not rest:
            return values
        shown = cut(repr(" ".join(rest)))
        before = [word for word in words[: words.index(rest[0])] if word in flags]
        if not before:
            raise InputError(f"unexpected {shown}; a value follows its flag")
        one = 'one value; put a text with spaces in straight quotes: "a cat"'
        raise InputError(
            f"unexpected {shown}: {before[-1]} takes {one if flags[before[-1]].nargs != 0 else 'no value'}"
        )

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)  # as newer Pythons do

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # `-height` is not `-h eight`

    def _flags(self) -> dict[str, argparse.Action]:
        """Actions by flag, those of the commands below included."""
        flags = dict(self._option_string_actions)
        for action in self._actions:
            for parser in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
                flags |= parser._flags()
        return flags

    def _suggestion(self, name: str, flags: Mapping[str, argparse.Action]) -> str:
        """`; did you mean --x?` or the reason why there is no such flag; else nothing."""
        plain = name.strip(DASHES).replace("-", "_").lower()
        answers = self.elsewhere | {flag.strip("-"): flag for flag in flags}
        answer = answers.get(plain if plain in answers else closest(plain, answers), "")
        return f"; did you mean {answer}?" if answer.startswith("--") else answer and f": {answer}"


def closest(word: str, words: Iterable[str]) -> str:
    """The most similar one of `words`; "" if none is similar."""
    return next(iter(get_close_matches(word, words, 1, SIMILARITY)), "")


def cut(text: str) -> str:
    """A text of any length as part of a line."""
    return text if len(text) <= 60 else f"{text[:60]}..."


def not_one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    """A sentence about a value that is not among `allowed`. what: its place, such as "--task "."""
    folded = {word.casefold(): word for word in reversed(allowed)}
    key = value.strip().casefold()
    begun = [word for word in folded if key and word.startswith(key)]
    close = begun[-1] if begun else closest(key, folded)
    suggestion = f"; did you mean {folded[close]}?" if close else ""
    return f"{what}{value!r} is not one of {', '.join(allowed)}{suggestion}"


def short(value: object) -> str:
    """A value as part of a line: whole numbers without a point, of very long ones the number of digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    if isinstance(value, int) and abs(value) >= 10**21:
        return f"a number of {value.bit_length() * math.log10(2):.0f} digits"
    return str(value)


def real(text: str) -> float | None:
    """The number that `text` spells, None if it spells none. `1_0`, which Python reads as 10, is a slip."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def pair(flag: str, value: str) -> tuple[float, float]:
    """`A` (twice the same) or `A,B`; InputError for anything else."""
    parts = value.split(",")
    numbers = [number for part in parts if (number := real(part)) is not None]
    if len(numbers) != len(parts) or len(parts) > 2:
        raise InputError(f"{flag} takes one number or two with a comma between, not {value!r}")
    return numbers[0], numbers[-1]


def outside(flag: str, value: float, low: float, high: float) -> str | None:
    """A sentence about a number that is not between `low` and `high`; None if it is."""
    first, last = short(low), short(high)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{flag} must be a finite number from {first} to {last}, not {value}"
    if low <= value <= high:
        return None
    nearest = short(min(max(value, low), high))
    return f"{flag} {short(value)} is out of range: must be between {first} and {last}, the nearest is {nearest}"
