"""The tables of docs/ that the program knows: flags, presets, events. `python -m benchmarks.documents` writes them.

Each stands between `<!-- table: NAME -->` and `<!-- end -->`; a test compares them with the program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.measure import ROOT
from lightning.releases import RELEASES, Release
from wan.checkpoints.quantised_formats import TABLE
from wan.cli.options import OPTIONS, paths
from wan.utils.progress import EVENT_PARTS, EVENTS

DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def flags() -> str:
    """A table of flags per group of the help."""
    blocks = []
    for group in dict.fromkeys(row.group for row in OPTIONS.values()):
        rows = [
            (f"`--{name}`", row.takes + (", repeatable" if row.read is paths else ""), row.help)
            for name, row in OPTIONS.items()
            if row.group == group
        ]
        blocks.append(f"## {group.capitalize()}\n\n{table(('flag', 'takes', 'meaning'), rows)}")
    return "\n".join(blocks)


def presets() -> str:
    """Every release and recipe that runs, with its settings."""
    rows = [
        (
            f"`{release.name}`",
            ", ".join(release.tasks),
            {"lora": "LoRA", "full": "whole expert"}.get(release.kind, release.kind),
            release.source,
            f"{release.steps} {release.solver}",
            f"{release.shift:g}",
            guidance(release),
            "; ".join(filter(None, (release.note, release.licence))),
        )
        for release in RELEASES
        if not release.refused
    ]
    return table(("name", "tasks", "kind", "published as", "steps", "shift", "guidance", "note"), rows)


def guidance(release: Release) -> str:
    if release.guidance_steps:
        return " ".join(f"{scale:g}" for scale in release.guidance_steps)
    return ",".join(f"{scale:g}" for scale in dict.fromkeys(release.guidance))


def refused() -> str:
    """Releases that are recognised and refused, with the reason."""
    rows = [(release.name, release.source, release.refused) for release in RELEASES if release.refused]
    return table(("name", "published as", "why it cannot run here"), rows)


def quantised() -> str:
    """Formats of quantised weights: read, or refused with the program that runs them."""
    rows = [(f"`{row.name}`", f"no; {row.runs} runs it" if row.runs else "yes") for row in TABLE]
    return table(("format", "read"), rows)


def events() -> str:
    rows = [(f"`{kind}`", when, fields(types)) for kind, (when, types) in EVENTS.items()]
    return table(("event", "when", "fields"), rows)


def plan_fields() -> str:
    rows = [(f"`{name}`", what, fields(types)) for name, (what, types) in EVENT_PARTS.items()]
    return table(("field", "what", "of each"), rows)


def fields(types: dict[str, str]) -> str:
    return ", ".join(f"`{name}` {kind}" for name, kind in types.items())


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "flags": flags, "presets": presets, "refused": refused, "quantised": quantised, "events": events,
    "plan": plan_fields,
}  # fmt: skip


def filled(text: str) -> str:
    """The text of a page with its tables as the program has them now."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", text)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (now := filled(before)) != before:
            page.write_text(now, encoding="utf-8")
            print(page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page)


if __name__ == "__main__":
    main()
