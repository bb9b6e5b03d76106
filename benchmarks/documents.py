"""The tables of docs/ that the program knows: flags, presets, events. `python -m benchmarks.documents` writes them.

Each is between `<!-- table: NAME -->` and `<!-- end -->`; a test compares them with the program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.measure import ROOT
from lightning.releases import RELEASES, Release
from wan.checkpoints.quantised_formats import TABLE
from wan.cli.options import OPTIONS, paths

DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Kind -> when it comes, and type by field: text, number, truth, list or object; "?" where it may be null.
EVENTS: dict[str, tuple[str, dict[str, str]]] = {
    "plan": ("everything is checked; nothing is loaded yet", {
        "task": "text", "solver": "text?", "shift": "number?", "preset": "text?", "steps": "list", "loras": "object",
        "fingerprints": "object", "device": "text", "dtype": "text", "attention": "text", "layout": "text",
        "weight_bytes": "object", "peak_bytes": "object?", "jobs": "list", "expected": "object?", "host": "object",
        "disk": "list", "warnings": "list"}),
    "begin": ("a stage begins", {"stage": "text", "total": "number?", "unit": "text"}),
    "advance": ("a stage goes on", {
        "stage": "text", "done": "number", "total": "number?", "unit": "text", "note": "text", "seconds": "number"}),
    "end": ("a stage ends, whole or not", {
        "stage": "text", "done": "number", "unit": "text", "seconds": "number", "whole": "truth"}),
    "message": ("a line for people", {"text": "text"}),
    "saved": ("a video is there", {"index": "number", "file": "text", "frames": "number"}),
    "failed": ("a video could not be made", {"index": "number", "file": "text", "reason": "text"}),
    "elsewhere": ("another process makes it", {"index": "number", "file": "text"}),
    "there": ("a clip of a chain was there already", {"index": "number", "file": "text"}),
    "joined": ("a chain's video is there", {"file": "text"}),
    "not joined": ("a chain's video could not be made", {"file": "text", "reason": "text"}),
    "extended": ("--extend_only has written its file", {"file": "text"}),
    "checked": ("the end of a --dry_run", {}),
    "summary": ("the end of a run: how many videos", {
        "saved": "number", "there already": "number", "failed": "number", "being made by other processes": "number",
        "not tried": "number", "joined": "number", "not joined": "number"}),
    "error": ("the run ends with this exit code", {"code": "number", "problems": "list"}),
}  # fmt: skip
# Fields of the entries of a plan's lists and objects, by the list's own field.
EVENT_PARTS: dict[str, tuple[str, dict[str, str]]] = {
    "steps": ("guidance 1: none", {"timestep": "number", "expert": "text", "guidance": "number", "lora": "number"}),
    "jobs": ("the videos; done: --resume has found it", {
        "index": "number", "prompt": "text", "size": "list", "image": "text?", "frames": "number", "tokens": "number",
        "seed": "number", "save_file": "text", "joined": "text?", "done": "truth"}),
    "expected": ("seconds by rates that wan.doctor measured: of the longest video by stage, until all are made", {
        "stages": "object", "whole": "number", "communication": "truth"}),
    "host": ("bytes of memory, for all processes on this machine", {"needed": "number?", "available": "number"}),
    "disk": ("bytes to write, an estimate with its spread", {
        "folder": "text", "needed": "number", "least": "number", "most": "number", "free": "number?"}),
}  # fmt: skip


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
