"""How a value of an option is read, from a word or from what JSON makes of it, and how a record keeps a path.

A reader raises TypeError, ValueError or OverflowError; its docstring says what it takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LONGEST_PATH = 4096


def text(value: object) -> str:
    """text"""
    if not isinstance(value, str):
        raise TypeError
    return value


def path(value: object) -> str:
    """a path"""
    return text(value)


def paths(value: object) -> tuple[str, ...]:
    """a list of texts"""
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(map(text, value))


def whole(value: object) -> int:
    """a whole number"""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return int(_plain(value))


def real(value: object) -> float:
    """a number"""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    return float(_plain(value))


def _plain(value: Any) -> Any:
    """Not `1_0`, which Python reads as 10: it is a slip."""
    if isinstance(value, str) and "_" in value:
        raise ValueError
    return value


def truth(value: object) -> bool:
    """True or False"""
    words = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    words |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    key = str(value).lower()
    if key not in words:
        raise ValueError
    return words[key]


def absolute(value: Any) -> Any:
    """A text that names something here as an absolute path, in lists and after `high=` too; anything else as it is."""
    if isinstance(value, list | tuple):
        return [absolute(part) for part in value]
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST_PATH:
        return value
    expert, _, rest = value.rpartition("=")
    for named, before in ((value, ""), (rest, f"{expert}=")):
        for end in {len(named), named.rfind(":")} - {-1}:
            path = Path(named[:end]).expanduser()
            if end and _exists(path):
                return f"{before}{path.absolute()}{named[end:]}"
    return value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name, or its folder may not be read
        return False
