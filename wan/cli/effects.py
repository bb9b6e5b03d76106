"""Warnings about flags that have no effect in this start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from wan.cli.options import DEFAULTS, MODES, OPTIONS, Request


def without_effect(values: Mapping[str, Any], request: Request) -> list[str]:
    """Warnings about flags in `values` that this start, whose request is `request`, ignores: one for each reason."""
    active = {name for name in OPTIONS if getattr(request, name) != DEFAULTS[name]}
    flags = [name for name in values if name in active]
    warnings = []
    for mode in MODES:
        if mode in active and (idle := [name for name in flags if mode not in OPTIONS[name].counts_with]):
            has = "has" if len(idle) == 1 else "have"
            warnings.append(f"{_list(idle, 'and')} {has} no effect beside --{mode}: {OPTIONS[mode].help}")
            flags = [name for name in flags if name not in idle]
    for name in flags:
        row = OPTIONS[name]
        if row.needs and not active.intersection(row.needs):
            warnings.append(f"--{name} has no effect without {_list(row.needs, 'or')}")
        elif row.beaten_by in active:
            warnings.append(f"--{name} has no effect beside --{row.beaten_by}")
    return warnings


def idle_on(request: Request, device: str, dtype: str) -> list[str]:
    """Warnings about flags that have no effect on this device ("cpu") or in this dtype ("float32")."""
    rows = {name: row for name, row in OPTIONS.items() if row.idle_on and getattr(request, name) != DEFAULTS[name]}
    places = {device: "the CPU", dtype: f"a run in {dtype}"}
    return [f"--{n} has no effect on {places[row.idle_on]}" for n, row in rows.items() if row.idle_on in places]


def _list(names: Collection[str], joint: str) -> str:
    *first, last = [f"--{name}" for name in names]
    return f"{', '.join(first)} {joint} {last}" if first else last
