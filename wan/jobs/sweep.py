"""`--sweep NAME=V,V`: the combinations of values that a run goes through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from wan.cli.checks import Check
from wan.cli.options import OPTIONS, VARIED, WEIGHTS
from wan.utils.argument_parser import not_one_of

IN_EVERY_NAME = ("base_seed",)  # options that all file names show
VALUE_LENGTH = 40  # characters of a value in a file name
UNUSUAL = r"[^\w.,-]+"


def combinations(sweeps: Sequence[str], check: Check) -> list[dict[str, str]]:
    """Values by option, one for each combination; `[{}]` without sweeps.

    Options of weights vary slowest, because a change of them reads weights again.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, listed = text.partition("=")
        name = name.strip().lstrip("-")
        values = [value.strip() for value in listed.split(";" if ";" in listed else ",")]
        if not equals or not all(values):
            check.problem(f"--sweep {text}: write NAME=VALUE,VALUE, such as lora_strength=0.5,1")
        elif name not in VARIED:
            check.problem(f"--sweep {text}: {not_one_of('', name, VARIED)}")
        elif name in axes:
            check.problem(f"--sweep {name} is given twice; give all its values at once")
        elif len(set(values)) < len(values):
            check.problem(f"--sweep {text}: names a value twice")
        else:
            axes[name] = values
    slowest_first = sorted(axes, key=lambda name: OPTIONS[name].group != WEIGHTS)
    return [dict(zip(slowest_first, values, strict=True)) for values in product(*(axes[n] for n in slowest_first))]


def label_of(values: Mapping[str, str]) -> str:
    """The part of a file name that says the values: "_lora_strength0.5"."""
    shown = {name: Path(value).name for name, value in values.items() if name not in IN_EVERY_NAME}
    return "".join(f"_{name}{re.sub(UNUSUAL, '-', value)[:VALUE_LENGTH]}" for name, value in shown.items())
