"""`python -m wan.gallery DIR`: one static page over the videos of a folder, from the records beside them.

It names files by paths relative to itself, and needs no server. Text from records is data in it, never markup.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wan.utils.errors import need_packages

if __name__ == "__main__":
    need_packages()

from wan.cli.options import VARIED, Request
from wan.configs import TASKS
from wan.media.video import CONTAINERS, read_record
from wan.utils.argument_parser import Parser, not_one_of
from wan.utils.errors import InputError, WanError, exit_code
from wan.utils.files import Beside, write_file
from wan.utils.progress import tell

PAGE = "index.html"
TEMPLATE = Path(__file__).with_suffix(".html")
MARK = '<meta name="generator" content="wan.gallery">'  # in every page of ours, which may be written again
# The page has the data inside a script element, whose end a "<" could spell; the two others end lines in JS.
HARMLESS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page_folder(request: Request) -> Path:
    """The folder that the page of a run covers."""
    return (Path(request.save_dir) if request.save_file is None else Path(request.save_file).parent).expanduser()


def check_page(folder: Path) -> None:
    """InputError if the page's place is taken by something that is not a page of ours."""
    page = folder / PAGE
    ours = not page.exists()
    with suppress(OSError):  # another user's
        ours = ours or (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:1000])
    if not ours:
        raise InputError(f"{page} already exists and is no gallery page; move it away, or choose another folder")


def write_page(folder: Path, axes: Sequence[str] = ()) -> Path:
    """Write the page over the videos in `folder` and below it; return its path. InputError, WanError.
    axes: one or two options whose values become the columns and rows of a table of videos, and a montage of it."""
    check_page(folder)
    entries, unread = find_entries(folder)
    grid = _swept_table(folder, entries, axes) if axes else None
    page, text = folder / PAGE, TEMPLATE.read_text(encoding="utf-8")
    for name, data in (("entries", entries), ("unread", unread), ("grid", grid)):
        shown = json.dumps(data, ensure_ascii=False, allow_nan=False).translate(HARMLESS)
        text = text.replace(f"[/* {name} */]", shown)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(page, text.encode("utf-8", "replace"))
    except OSError as e:
        raise WanError(f"{page}: the gallery page cannot be written ({e.strerror})") from e
    return page


def _swept_table(folder: Path, entries: Sequence[dict[str, Any]], axes: Sequence[str]) -> dict[str, Any] | None:
    """The newest video of each pair of values, with PSNR and SSIM to the first; also written as grid.mp4 and .png."""
    from wan.media.montage import compare, save_montage

    across, down = (*axes, "")[:2]
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in reversed(entries):
        if "options" in entry:
            kept[entry["options"].get(across, "default"), entry["options"].get(down, "default" if down else "")] = entry
    if not kept:
        return None
    number = re.compile(r"-?\d+(\.\d+)?").fullmatch
    columns, rows = (
        sorted({key[axis] for key in kept}, key=lambda value: (float(value) if number(value) else math.inf, value))
        for axis in (0, 1)
    )
    first = next(kept[x, y] for y in rows for x in columns if (x, y) in kept)
    files = {key: folder / entry["file"] for key, entry in kept.items()}
    found = {files[key]: compare(files[key], folder / first["file"]) for key in kept}
    cells = [[(f"{across} {x} {down} {y}".rstrip(), files.get((x, y))) for x in columns] for y in rows]
    frames = min(entry["frames"] for entry in kept.values())
    save_montage(cells, (first["width"], first["height"]), frames, first["fps"], folder / "grid.mp4")
    shown = [[kept[x, y] | {"metrics": found[files[x, y]]} if (x, y) in kept else None for x in columns] for y in rows]
    return {"across": across, "down": down, "columns": columns, "rows": rows, "cells": shown}


def find_entries(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The page's data of each record in `folder` and below whose video is there, the newest first.
    Then the .json files beside videos that are no records; other files are passed over."""
    entries, unread = [], []
    for file in folder.rglob("*.json"):
        try:
            record = read_record(file)
            video = Beside.of(file.with_name(record["output"]["file"]))
            if video.record == file and video.video.is_file():
                entries.append(_entry(folder, record, video))
        except (InputError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError):
            if any(file.with_suffix(end).is_file() for end in CONTAINERS):
                unread.append(file.relative_to(folder).as_posix())
    return sorted(entries, key=lambda entry: (entry["finished"], entry["file"]), reverse=True), sorted(unread)


def _entry(folder: Path, record: dict[str, Any], beside: Beside) -> dict[str, Any]:
    def address(file: Path) -> str:  # "./" in front, so that no name is taken for an address with a scheme
        return "./" + quote(os.fsencode(file.relative_to(folder).as_posix()))

    output = record["output"]
    width, height, frames, fps = (_finite(output[name]) for name in ("width", "height", "frames", "fps"))
    entry = {
        "file": beside.video.relative_to(folder).as_posix(),
        "video": address(beside.video), "record": address(beside.record),
        "sheet": address(beside.sheet) if beside.sheet.is_file() else "",
        "width": width, "height": height, "frames": int(frames), "fps": fps,
        "middle": _finite(frames / fps / 2),  # seconds
        "finished": str(record["finished"]),
    }  # fmt: skip
    length = f"{frames:g} frames, {frames / fps:.1f} s"
    settings = {"task": "", "size": f"{width:g}×{height:g}", "length": length}
    if "clips" in record:  # joined from them
        prompts, seeds, files = ([str(clip[name]) for clip in record["clips"]] for name in ("prompt", "seed", "file"))
        entry |= {"prompt": "\n".join(prompts), "seed": ", ".join(dict.fromkeys(seeds)), "seconds": 0}
        settings |= {"task": record["task"], "joined of": "\n".join(files)}
    else:
        job, seconds = record["job"], _finite(sum(map(_finite, record["seconds"].values())))
        # the seed as text: JavaScript's numbers end at 2^53
        entry |= {"prompt": str(job["prompt"]), "seed": str(job["seed"]), "seconds": seconds}
        values = {name: record["request"][name] for name in VARIED if name in record["request"]}
        entry["options"] = {name: str(value) for name, value in values.items()} | {"base_seed": str(job["seed"])}
        settings |= _video_settings(record)
        settings["replay"] = shlex.join(["python", "generate.py", "--replay", str(beside.video)])
    return {**entry, "settings": {name: str(value) for name, value in settings.items() if value not in ("", None)}}


def _video_settings(record: dict[str, Any]) -> dict[str, Any]:
    job, meaning, plan, request = (record[name] for name in ("job", "meaning", "plan", "request"))
    steps, usual = meaning["sample_steps"], TASKS[meaning["task"]].sample_neg_prompt
    experts = [str(each).partition("=") for each in request.get("expert", ())]
    loras = []
    for expert, lora in ((expert, lora) for expert, files in plan["loras"].items() for lora in files):
        path = Path(lora["path"])
        name = path.parent.name if path.stem in ("high_noise_model", "low_noise_model") else path.name
        loras.append(f"{expert}: {name} at {_finite(lora.get('strength', 1)):g}")
    return {
        "task": meaning["task"], "steps": f"{len(steps)} {meaning['sample_solver']}",
        "guidance": ", ".join(dict.fromkeys(f"{_finite(step['guidance']):g}" for step in steps)),
        "shift": plan.get("shift"),
        "timesteps": ", ".join(f"{_finite(step['timestep']):.1f} {step['expert']}" for step in steps),
        "preset": plan.get("preset"), "weights": Path(request.get("ckpt_dir") or "").name,
        "experts": "\n".join(f"{name}={Path(file).name}" for name, _, file in experts),
        "LoRA": "\n".join(loras),
        "quantize": "" if meaning.get("quantize") == "none" else meaning.get("quantize"),
        "dtype": meaning["dtype"], "device": record["pipeline"]["device"],
        "image": Path(job["image"]).name if job["image"] else "",
        "negative prompt": "" if job["negative_prompt"] == usual else job["negative_prompt"],
        "written": job["original_prompt"] if job["original_prompt"] != job["prompt"] else "",
        "number": job.get("index"),
        "row": "" if str(job.get("source")).startswith("--") else job.get("source"),
    }  # fmt: skip


def _finite(value: Any) -> float:
    """The value if it is a finite number, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with an error on stderr if no page was written, or 130 when interrupted."""
    text = "Write one page over the videos in a folder and below it: with prompts, seeds and settings."
    parser = Parser(prog="python -m wan.gallery", description=text)
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the videos are; index.html is written there")
    grid = "a table of the videos by two options, such as --grid x=lora_strength y=base_seed, and a montage"
    parser.add_argument("--grid", metavar=("x=NAME", "y=NAME"), nargs=2, default=[], help=grid)

    def work() -> int:
        given = parser.read(sys.argv[1:] if argv is None else argv)
        folder, axes = given.folder, [axis.removeprefix("x=").removeprefix("y=") for axis in given.grid]
        if odd := [axis for axis in axes if axis not in VARIED]:
            raise InputError(f"--grid {not_one_of('', odd[0], VARIED)}")
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        tell(sys.stdout, f"{write_page(folder, axes)}\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
