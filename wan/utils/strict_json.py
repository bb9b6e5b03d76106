"""JSON that others wrote: whatever is wrong with it is one ValueError."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that `text` spells, strictly: no NaN, no key twice, no number or nesting that Python gives up on.

    ValueError says in a few words what is wrong, and of a syntax error where.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError:
        raise
    except ValueError as e:
        if "integer string conversion" in str(e):
            raise ValueError("a number of thousands of digits") from None
        raise


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return values
