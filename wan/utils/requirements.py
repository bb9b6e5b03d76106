"""What a Python must have before the rest can be imported. A clone is started by any: one that lacks it gets a line."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("torch", "easydict")  # of all that requirements.txt brings, what nothing starts without


def need_packages() -> None:
    """SystemExit with code 2 and a sentence if this Python is too old or lacks the packages."""
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [name for name in NEEDED if find_spec(name) is None]
    if sys.version_info < (3, 11):  # noqa: UP036 - that is what an installation forbids, and a clone cannot
        lack = f"Python 3.11 or newer is needed, and {sys.executable} is {version}; start it with such a one"
    elif missing:
        advice = "after make demo: source .venv/bin/activate; else: pip install -r requirements.txt"
        lack = f"{sys.executable or 'this Python'} has no package {' and no '.join(missing)}; {advice}"
    else:
        return
    print(f"error: {lack}", file=sys.stderr)
    sys.exit(2)
