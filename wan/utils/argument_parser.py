"""How a command line's words are taken: a fault is one sentence that names the flag and what was probably meant."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from wan.utils.errors import InputError

DASHES = "‐‑‒–—―−"  # what word processors make of two short ones
CURLY = "“”„‟‘‚«»"  # and of straight quotes, which alone hold a text together in a shell
LIKENESS = 0.7  # of two words, for one to be offered in place of the other
NUMBER = re.compile(r"-\.?\d.*")


class Parser(argparse.ArgumentParser):
    """argparse with whole flags only, and an InputError for what it cannot take.

    also: what other programs call a flag, by flag.
    """

    def __init__(self, also: Mapping[str, Sequence[str]] | None = None, **more: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **more)
        self.also = dict(also or {})

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of the flags in `words`. InputError with a sentence for each fault."""
        flags = self._flags()
        if dashed := [word for word in words if _meant_by_dashes(word, flags)]:
            raise InputError(
                f"{_name(word)} begins with a long dash, not with two short ones; write {_meant_by_dashes(word, flags)}"
                for word in dashed
            )
        try:
            known, unknown = self.parse_known_args(words)
        except argparse.ArgumentError as e:
            raise InputError(self._faults(e, words, flags)) from e
        if unknown:
            raise InputError(self._strangers(words, unknown, flags))
        return known

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)  # as newer Pythons do

    def _flags(self) -> dict[str, argparse.Action]:
        """By name, those of the commands below included."""
        flags = dict(self._option_string_actions)
        for action in self._actions:
            for parser in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
                flags |= parser._flags()
        return flags

    def _faults(
        self, error: argparse.ArgumentError, words: Sequence[str], flags: Mapping[str, argparse.Action]
    ) -> list[str]:
        """What is wrong with the value of one flag, or with those that are there where others are missing."""
        if error.argument_name is not None:
            return [self._fault(error, words, flags)]
        strange = [_name(word) for word in words if word.startswith("--") and _name(word) not in {*flags, "--"}]
        told = [f"there is no flag {name}{self.suggestion(name, flags)}" for name in strange]
        return [*told, f"{error.message.replace('the following arguments are required', 'missing')} (see --help)"]

    def _fault(self, error: argparse.ArgumentError, words: Sequence[str], flags: Mapping[str, argparse.Action]) -> str:
        """What is wrong with the value of one flag."""
        assert error.argument_name is not None, "of a flag"
        flag = error.argument_name.rpartition("/")[2]
        if mistaken := next((word for word in words if flag == "--help" and re.match("-h.", word)), None):
            return f"there is no flag {_name(mistaken)}{self.suggestion(_name(mistaken), flags)}"  # argparse reads -h
        if wrong := re.match(r"invalid choice: (['\"])(.*)\1 \(choose", error.message):
            command = flag not in flags
            allowed = flag.split("|") if command else list(map(str, flags[flag].choices or ()))
            return not_one_of("" if command else f"{flag} ", wrong[2], allowed)
        if flag not in flags:
            return f"{flag}: {error.message}"
        given = next((word for word in words if word.startswith(f"{flag}=")), None)
        if flags[flag].nargs == 0 and given:
            return _no_value(flag, given.partition("=")[2])
        if reads := re.match("invalid (int|float) value: (.*)", error.message):
            return f"{flag} takes a {'whole ' if reads[1] == 'int' else ''}number, not {reads[2]}"
        if not error.message.startswith("expected"):
            return f"{flag}: {error.message}"
        followers = [after for word, after in zip(words, [*words[1:], ""], strict=True) if word == flag]
        dashed = next((word for word in followers if word.startswith("-") and _name(word) not in flags), "")
        looks = f"; {dashed!r} looks like a flag: if it is the value, write {flag}={dashed}" if dashed else ""
        return f"{flag} needs a value, {_placeholder(flags[flag])}{looks}"

    def _strangers(
        self, words: Sequence[str], unknown: Sequence[str], flags: Mapping[str, argparse.Action]
    ) -> list[str]:
        """A sentence for each flag that does not exist, and for each run of words that belong to no flag."""
        sentences, left = [], list(unknown)
        stray: list[str] = []
        flag, stranger = "", False  # the last flag before a word, and whether it is unknown
        for word in [*words, "--"]:
            if not (left and word == left[0]):
                if _name(word) in flags or word == "--":
                    sentences += [_stray(stray, flag, flags)] if stray else []
                    stray, flag, stranger = [], _name(word), False
                continue
            left.pop(0)
            if word.startswith("-") and not NUMBER.fullmatch(word):
                sentences += [_stray(stray, flag, flags)] if stray else []
                sentences.append(f"there is no flag {_name(word)}{self.suggestion(_name(word), flags)}")
                stray, flag, stranger = [], _name(word), True
            elif not stranger:  # else the value of an unknown flag
                stray.append(word)
        return sentences

    def suggestion(self, name: str, flags: Iterable[str]) -> str:
        """`; did you mean --x?` for a flag that does not exist, by what others call it or how it is spelled."""
        plain = name.lstrip("-").replace("-", "_")
        called = [flag for flag, names in self.also.items() if plain in names or plain.lower() in names]
        if not called:
            spelled = {other: flag for flag, names in self.also.items() for other in names if len(other) > 3}
            spelled |= {flag.lstrip("-"): flag for flag in flags}
            called = [spelled[close] for close in get_close_matches(plain.lower(), spelled, 1, LIKENESS)]
        return f"; did you mean {' or '.join(called)}?" if called else ""


def meant(given: str, allowed: Sequence[str]) -> str:
    """A suggestion to append to a sentence about a word that is not among `allowed`."""
    folded = {word.casefold(): word for word in reversed(allowed)}
    key = given.strip().casefold()
    begun = [word for word in folded if key and word.startswith(key)][-1:]
    close = begun or get_close_matches(key, folded, 1, LIKENESS)
    return f"; did you mean {folded[close[0]]}?" if close else ""


def short(value: object) -> str:
    """A value as part of a line: whole numbers as such, of very long ones how many digits they have."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    if isinstance(value, int) and abs(value) >= 10**21:
        return f"a number of {value.bit_length() * math.log10(2):.0f} digits"
    return str(value)


def not_one_of(what: str, given: str, allowed: Sequence[str]) -> str:
    """A sentence about a word that is not among `allowed`. what: where it stands, such as "--task "."""
    return f"{what}{given!r} is not one of {', '.join(allowed)}{meant(given, allowed)}"


def _placeholder(action: argparse.Action) -> str:
    """What the value of a flag is called."""
    return str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper())


def _name(word: str) -> str:
    return word.partition("=")[0]


def _meant_by_dashes(word: str, flags: Iterable[str]) -> str | None:
    """The flag that a word with a long dash stands for."""
    flag = f"--{_name(word).lstrip(DASHES + '-')}"
    return flag if word[:1] and word[0] in DASHES and flag in flags else None


def _no_value(flag: str, given: str) -> str:
    return f"{flag} takes no value, and {given!r} is one: it is on where it stands, and off where it is left out"


def _stray(words: Sequence[str], flag: str, flags: Mapping[str, argparse.Action]) -> str:
    """About words that belong to no flag. flag: the one before them, if any."""
    shown = " ".join(words)
    shown = repr(shown if len(shown) <= 60 else f"{shown[:60]}...")
    if flag not in flags:
        needs = (
            'a value follows its flag, such as --prompt "a cat"'
            if "--prompt" in flags
            else "a name with spaces needs quotes"
        )
        return f"unexpected {shown}; {needs}"
    if flags[flag].nargs == 0:
        return _no_value(flag, shown.strip("'\""))
    takes = f"{flag} takes one value, {_placeholder(flags[flag])}"
    if any(sign in word for word in words for sign in CURLY):
        return f'unexpected {shown}: {takes}; curly quotes do not hold a text together, straight ones do: "a cat"'
    return f"unexpected {shown}: {takes}; a text with spaces needs quotes around it"


def real(text: str) -> float | None:
    """The number that `text` spells, None if it spells none. `1_0`, which Python reads as 10, is a slip."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def pair(flag: str, given: str) -> tuple[float, float]:
    """`A` (twice the same) or `A,B`; InputError for anything else."""
    parts = given.split(",")
    numbers = [number for part in parts if (number := real(part)) is not None]
    if len(numbers) != len(parts) or len(parts) > 2:
        raise InputError(f"{flag} takes one number or two with a comma between, not {given!r}")
    return numbers[0], numbers[-1]


def outside(flag: str, given: float, low: float, high: float) -> str | None:
    """What is wrong with a number that is none from `low` to `high`."""
    first, last = short(low), short(high)
    if isinstance(given, float) and not math.isfinite(given):
        return f"{flag} must be a finite number from {first} to {last}, not {given}"
    if low <= given <= high:
        return None
    nearest = short(min(max(given, low), high))
    return f"{flag} {short(given)} is out of range; it goes from {first} to {last}, the nearest is {nearest}"
