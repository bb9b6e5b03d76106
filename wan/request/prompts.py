"""Prompt files and image lists: reading them, writing them, and naming the videos they lead to."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

SLUG_LENGTH = 50


@dataclass(frozen=True)
class Row:
    """One prompt as the user gave it; None where the run's own setting is meant."""

    prompt: str
    source: str  # for messages: "prompts.txt line 3"
    image: Path | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    size: str | None = None
    frame_num: int | None = None
    save_file: str | None = None
    original_prompt: str | None = None  # before prompt extension, in files that --extend_only wrote


KEYS = tuple(field.name for field in fields(Row) if field.name != "source")
WHOLE_NUMBERS = ("seed", "frame_num")


def read_rows(path: Path, problems: list[str]) -> tuple[list[Row], int]:
    """(rows, number of blank lines skipped) of a `.txt`, `.jsonl` or `.csv` file in UTF-8.

    Text files hold a prompt a line. What is wrong is appended to `problems`, with file and line.
    """
    text = _text_of(path, "prompt file", problems)
    if text is None:
        return [], 0
    if path.suffix.lower() == ".csv":
        rows, blank = _csv_rows(path, text, problems), 0
    else:
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        filled = [(f"{path} line {number}", line) for number, line in lines if line]
        blank = len(lines) - len(filled) - text.endswith("\n")
        if path.suffix.lower() in (".jsonl", ".json"):
            rows = [row for source, line in filled if (row := _json_row(path, source, line, problems))]
        else:
            rows = [Row(line, source) for source, line in filled]
    if not rows and not any(problem.startswith(str(path)) for problem in problems):
        problems.append(f"{path}: the prompt file holds no prompt")
    return rows, blank


def read_paths(path: Path, problems: list[str]) -> list[tuple[str, Path]]:
    """(source, path) for each line of an image list; relative paths as `beside` finds them."""
    text = _text_of(path, "image list", problems)
    lines = enumerate(map(str.strip, text.split("\n")), 1) if text is not None else ()
    found = [(f"{path} line {number}", beside(path, line)) for number, line in lines if line]
    if not found and text is not None:
        problems.append(f"{path}: the image list names no image")
    return found


def beside(file: Path, name: str) -> Path:
    """`name` as `file` means it: relative to the file's folder if it is there, else to the working folder."""
    path = Path(name).expanduser()
    near = file.parent / path  # an absolute path stays what it is
    return near if near.exists() else path


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a file that `read_rows` reads: `.txt` keeps the prompts only, `.jsonl` everything."""
    lines: Iterable[str]
    if path.suffix.lower() == ".jsonl":
        given = ({key: value for key in KEYS if (value := getattr(row, key)) is not None} for row in rows)
        lines = (json.dumps(row, ensure_ascii=False, default=_absolute) for row in given)
    else:
        lines = (" ".join(row.prompt.split()) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _absolute(path: Path) -> str:
    return str(path.absolute())


def output_name(task: str, index: int, seed: int, prompt: str, replayed: bool = False) -> str:
    """File name of a video, legal on every platform; a replayed one says so, for the first may lie beside it."""
    return f"{task}_{index:04d}_seed{seed}_{slug(prompt)}{'_replay' if replayed else ''}.mp4"


def slug(text: str) -> str:
    """`text` as part of a file name: letters and digits of any script and `_-`, at most 50 characters.

    Marks count as letters: without its vowel signs a word of many scripts is another word.
    """
    kept = "".join(c if c in "_-" or unicodedata.category(c)[0] in "LMN" else " " for c in normal(text))
    return "_".join(kept.split())[:SLUG_LENGTH].strip("_-") or "video"


def normal(text: str) -> str:
    """Composed Unicode (NFC), so that equal-looking names are equal."""
    return unicodedata.normalize("NFC", text)


def _text_of(path: Path, what: str, problems: list[str]) -> str | None:
    """The file's text with `\\n` line ends and no byte order mark; None, and a problem, if there is none."""
    try:
        data = path.read_bytes()
        return re.sub("\r\n?", "\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        problems.append(f"{path} line {line}: the {what} is not UTF-8 text; save it as UTF-8")
    except FileNotFoundError:
        problems.append(f"{path}: no such {what}")
    except OSError as e:
        problems.append(f"{path}: the {what} cannot be read ({e.strerror})")
    return None


def _json_row(path: Path, source: str, line: str, problems: list[str]) -> Row | None:
    try:
        values = json.loads(line)
    except ValueError as e:
        problems.append(f'{source}: not valid JSON ({e}); a line holds one object such as {{"prompt": "a cat"}}')
        return None
    if not isinstance(values, dict):
        problems.append(f'{source}: a line holds one JSON object such as {{"prompt": "a cat"}}')
        return None
    return _row(path, source, values, problems)


def _csv_rows(path: Path, text: str, problems: list[str]) -> list[Row]:
    def records() -> Iterator[tuple[str, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        start = 1
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield f"{path} line {start}", cells
                start = reader.line_num + 1
        except csv.Error as e:
            problems.append(f"{path} line {start}: not valid CSV ({e})")

    rows: list[Row] = []
    header: list[str] | None = None
    for source, cells in records():
        if header is None:
            header = [cell.strip() for cell in cells]
            if wrong := _header_problem(header):
                problems.append(f"{source}: {wrong}")
                break
        elif len(cells) != len(header):
            problems.append(f"{source}: {len(cells)} cells, but the header names {len(header)} columns")
        else:
            values = {key: cell.strip() for key, cell in zip(header, cells, strict=True) if cell.strip()}
            if row := _row(path, source, values, problems):
                rows.append(row)
    return rows


def _header_problem(header: list[str]) -> str | None:
    if unknown := [name for name in header if name not in KEYS]:
        return f"unknown column {unknown[0]!r}; the first line names columns among {', '.join(KEYS)}"
    if "prompt" not in header or len(set(header)) != len(header):
        return "the first line must name the columns, each once, 'prompt' among them"
    return None


def _row(path: Path, source: str, values: Mapping[str, object], problems: list[str]) -> Row | None:
    """A row from its JSON or CSV values, or None and what is wrong with it."""
    wrong = [f"unknown key {key!r}; allowed are {', '.join(KEYS)}" for key in values if key not in KEYS]
    given = {key: value for key, value in values.items() if value is not None and key in KEYS}
    if "prompt" not in given:
        wrong.append("no 'prompt'")
    for key, value in given.items():
        if key in WHOLE_NUMBERS:
            if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
                given[key] = int(value)
            elif not isinstance(value, int) or isinstance(value, bool):
                wrong.append(f"{key!r} must be a whole number, not {value!r}")
        elif not isinstance(value, str):
            wrong.append(f"{key!r} must be text, not {value!r}")
    if wrong:
        problems.extend(f"{source}: {sentence}" for sentence in wrong)
        return None
    image = given.pop("image", None)
    row = replace(Row("", source), **given)  # type: ignore[arg-type]  # each value's type was checked above
    row = replace(row, prompt=row.prompt.strip())
    return replace(row, image=beside(path, str(image))) if image else row
