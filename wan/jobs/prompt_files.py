"""Prompt files and image lists: reading them, writing them, and naming the videos they lead to."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wan.utils.files import replacing
from wan.utils.strict_json import parse_json

SLUG_LENGTH, SLUG_BYTES = 50, 150  # the name, its longest neighbour's and a part's decorations stay within 255 bytes
TEXT, JSON_LINES, CSV = ("", ".txt"), (".jsonl", ".json"), (".csv",)  # what the end of a prompt file's name means
ROWS = '.jsonl, with one object such as {"prompt": "a cat"} a line'
JSON_IN_TEXT = f"holds JSON, not a prompt a line; name it {ROWS}"
YAML_IN_TEXT = f"holds YAML, not a prompt a line; make it a {ROWS}"
LONGEST_NUMBER = 30  # digits; what fits is told by the checks of each number


@dataclass(frozen=True)
class Row:
    """One prompt as the user gave it; None where the run's own setting is meant, "" where an empty text is."""

    prompt: str
    source: str  # for messages: "prompts.txt line 3"
    image: Path | None = None
    last_image: Path | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    size: str | None = None
    frame_num: int | None = None
    save_file: str | None = None
    original_prompt: str | None = None  # before prompt extension, in files that --extend_only wrote


KEYS = tuple(field.name for field in fields(Row) if field.name != "source")
WHOLE_NUMBERS = ("seed", "frame_num")
PICTURES = ("image", "last_image")
NEVER_EMPTY = (*PICTURES, "size", "save_file")


def read_rows(path: Path, problems: list[str]) -> tuple[list[Row], int]:
    """(rows, number of blank lines skipped) of a `.txt`, `.jsonl` or `.csv` file in UTF-8.

    Text files (a name without an end is one) hold a prompt a line; `.jsonl` and `.json` an object a line, or one list
    of objects. In a CSV an empty cell is a value not given; JSON
    tells `""` (empty) from null (not given). What is wrong is appended to `problems`, with file and line.
    """
    kind = path.suffix.lower()
    if kind not in TEXT + JSON_LINES + CSV:
        problems.append(
            f"{path}: a prompt file is a .txt (a prompt a line), .jsonl or .csv (rows), not {kind}; write it as one"
        )
        return [], 0
    text = _text_of(path, "prompt file", problems)
    if text is None:
        return [], 0
    before = len(problems)
    if kind in CSV:
        rows, blank = _csv_rows(path, text, problems), 0
    elif kind in JSON_LINES and (listed := _json_list(text)) is not None:
        entries = [(f"{path} entry {number}", values) for number, values in enumerate(listed, 1)]
        rows, blank = [row for source, values in entries if (row := _json_row(path, source, values, problems))], 0
    else:
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        filled = [(f"{path} line {number}", line) for number, line in lines if line]
        blank = len(lines) - len(filled) - text.endswith("\n")
        if kind in JSON_LINES:
            rows = [row for source, line in filled if (row := _json_line(path, source, line, problems))]
        else:
            rows = [Row(line, source) for source, line in filled]
            data = JSON_IN_TEXT if _are_rows(_json_list(text)) else None
            if wrong := data or next((wrong for row in rows if (wrong := _no_prompt(row.prompt))), None):
                problems.append(f"{path}: {wrong}")
    if not rows and len(problems) == before:
        problems.append(f"{path}: the prompt file holds no prompt")
    return rows, blank


def _json_list(text: str) -> list[object] | None:
    """The values of a text that is one JSON list, or one object over several lines; else None."""
    begin = text.strip()
    if begin[:1] != "[" and not (begin[:1] == "{" and begin[1:2].isspace()):
        return None
    try:
        whole = parse_json(text)
    except ValueError:
        return None
    return whole if isinstance(whole, list) else [whole]


def _are_rows(values: object) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], dict | str)


def _no_prompt(line: str) -> str | None:
    """Why a line of a text file is data and no prompt, None if it may be one."""
    if line[0] in "{[":
        try:
            values = parse_json(line)
        except ValueError:
            return None
        if isinstance(values, dict) or _are_rows(values):
            return JSON_IN_TEXT
    if re.match(r"-\s+prompt\s*:", line):
        return JSON_IN_TEXT.replace("holds JSON", "holds YAML").replace("name it", "write it as")
    cells = [cell.strip().strip('"') for cell in re.split("[,;\t]", line)]
    if len(cells) > 1 and "prompt" in cells and all(cell in KEYS for cell in cells):
        return f"starts as a table with the columns {', '.join(cells)}, not with a prompt; name it .csv, with commas"
    return None


def text_problem(text: str) -> str | None:
    """What keeps a text or a name from being used, encoded and written; None if nothing does."""
    if "\0" in text:
        return "holds a NUL character; remove it"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return f"is not valid Unicode text at character {e.start + 1} (bytes that are not UTF-8, or half a character)"
    return None


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
    path = expanded(name)
    near = file.parent / path  # an absolute path stays what it is
    return near if os.path.exists(near) else path


def expanded(name: str) -> Path:
    """`name` with the home folder for `~`; as it is where there is no such user."""
    return Path(os.path.expanduser(name))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a file that `read_rows` reads: `.txt` keeps the prompts only, `.jsonl` everything."""
    lines: Iterable[str]
    if path.suffix.lower() == ".jsonl":
        given = ({key: value for key in KEYS if (value := getattr(row, key)) is not None} for row in rows)
        lines = (json.dumps(row, ensure_ascii=False, default=_absolute) for row in given)
    else:
        lines = (" ".join(row.prompt.split()) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _absolute(path: Path) -> str:
    return str(path.absolute())


def output_name(task: str, index: int, seed: int, prompt: str, replayed: bool = False) -> str:
    """File name of a video, legal on every platform; a replayed one says so, for the first may lie beside it."""
    return f"{task}_{index:04d}_seed{seed}_{slug(prompt)}{'_replay' if replayed else ''}.mp4"


def slug(text: str) -> str:
    """`text` as part of a file name: letters and digits of any script and `_-`, at most 50 characters and 150 bytes.

    Marks count as letters: without its vowel signs a word of many scripts is another word.
    """
    kept = "".join(c if c in "_-" or unicodedata.category(c)[0] in "LMN" else " " for c in normal(text))
    short = "_".join(kept.split())[:SLUG_LENGTH].encode("utf-8", "ignore")[:SLUG_BYTES].decode("utf-8", "ignore")
    return short.strip("_-") or "video"


def normal(text: str) -> str:
    """Composed Unicode (NFC), so that equal-looking names are equal."""
    return unicodedata.normalize("NFC", text)


def _text_of(path: Path, what: str, problems: list[str]) -> str | None:
    """The file's text with `\\n` line ends and no byte order mark; None, and a problem, if there is none."""
    try:
        if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISFIFO(kind):  # `<(command)` is a pipe
            problems.append(f"{path}: the {what} cannot be read, it is no regular file")
            return None
        text = re.sub("\r\n?", "\n", path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        problems.append(f"{path} line {line}: the {what} is not UTF-8 text; save it as UTF-8")
    except FileNotFoundError:
        problems.append(f"{path}: no such {what}")
    except (OSError, ValueError) as e:  # ValueError: a name that cannot be one
        problems.append(f"{path}: the {what} cannot be read ({getattr(e, 'strerror', None) or e})")
    else:
        if "\0" not in text:
            return text
        line = text[: text.index("\0")].count("\n") + 1
        problems.append(f"{path} line {line}: the {what} holds a NUL character; save it as UTF-8 text")
    return None


def _json_line(path: Path, source: str, line: str, problems: list[str]) -> Row | None:
    try:
        values = parse_json(line)
    except ValueError as e:
        problems.append(f'{source}: not valid JSON ({e}); a line holds one object such as {{"prompt": "a cat"}}')
        return None
    return _json_row(path, source, values, problems)


def _json_row(path: Path, source: str, values: object, problems: list[str]) -> Row | None:
    if not isinstance(values, dict):
        problems.append(f'{source}: a prompt with its settings is one JSON object such as {{"prompt": "a cat"}}')
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
    if len(header) == 1 and "prompt" in (names := re.split("[;\t]", header[0])) and len(names) > 1:
        return f"the columns {', '.join(names)} have {'semicolons' if ';' in header[0] else 'tabs'} between; use commas"
    if unknown := [name for name in header if name not in KEYS]:
        return f"unknown column {_shown(unknown[0])}; the first line names columns among {', '.join(KEYS)}"
    if "prompt" not in header or len(set(header)) != len(header):
        return "the first line must name the columns, each once, 'prompt' among them"
    return None


def _row(path: Path, source: str, values: Mapping[str, object], problems: list[str]) -> Row | None:
    """A row from its JSON or CSV values, or None and what is wrong with it."""
    wrong = [f"unknown key {_shown(key)}; allowed are {', '.join(KEYS)}" for key in values if key not in KEYS]
    given = {key: value for key, value in values.items() if value is not None and key in KEYS}
    if "prompt" not in given:
        wrong.append("no 'prompt'")
    for key, value in given.items():
        if key in WHOLE_NUMBERS:
            given[key] = _whole(value)
            if given[key] is None:
                wrong.append(f"{key!r} must be a whole number, not {_shown(value)}")
        elif not isinstance(value, str):
            wrong.append(f"{key!r} must be text, not {_shown(value)}")
        elif unusable := text_problem(value):
            wrong.append(f"{key!r} {unusable}")
        elif not value.strip() and key in NEVER_EMPTY:
            wrong.append(f"{key!r} is empty; leave it out")
    if wrong:
        problems.extend(f"{source}: {sentence}" for sentence in wrong)
        return None
    given |= {key: beside(path, str(given[key])) for key in PICTURES if key in given}
    row = replace(Row("", source), **given)  # type: ignore[arg-type]  # each value's type was checked above
    return replace(row, prompt=row.prompt.strip())


def _whole(value: object) -> int | None:
    """The whole number that a JSON value is, or a CSV cell spells; None if it is none, or absurdly long."""
    if isinstance(value, str) and re.fullmatch(rf"[+-]?[0-9]{{1,{LONGEST_NUMBER}}}", value):
        return int(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**LONGEST_NUMBER
    return value if fits else None  # type: ignore[return-value]  # an int


def _shown(value: object) -> str:
    """A value of any size as part of a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
