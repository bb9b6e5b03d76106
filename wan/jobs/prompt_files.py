"""Prompt files and image lists: reading them, writing them, and naming the videos they lead to."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from wan.cli.options import VARIED
from wan.utils.argument_parser import closest, cut
from wan.utils.files import parse_json, write_file

# The kind of a prompt file by the end of its name; tables by separator, the usual one first.
TEXT, JSON_LINES, TABLES = ("", ".txt"), (".jsonl", ".json"), {".csv": ",;\t", ".tsv": "\t,;"}
EXAMPLE = '{"prompt": "a cat"}'
LONGEST_TEXT = 20_000  # characters; a model reads 512 tokens of a prompt
LARGEST_FILE, MOST_LINES = 32 * 2**20, 200_000  # bytes of a file, and its lines


@dataclass(frozen=True)
class Row:
    """One prompt as the user gave it; None: the run's own setting, "": an empty text."""

    prompt: str
    source: str  # for messages: "prompts.txt line 3"
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    size: str | None = None
    frame_num: int | None = None
    save_file: str | None = None
    original_prompt: str | None = None  # before prompt extension, in files that --extend_only wrote
    options: tuple[tuple[str, str], ...] = ()  # further options of the command line


OWN = tuple(field.name for field in fields(Row) if field.name not in ("source", "options"))
KEYS = (*OWN, *(name for name in VARIED if name not in (*OWN, "base_seed")))
WHOLE_NUMBERS = ("seed", "frame_num")
PICTURES = ("image", "last_image", "video")
NEVER_EMPTY = (*PICTURES, "size", "save_file")


def read_rows(path: Path, problems: list[str], warnings: list[str]) -> list[Row]:
    """Rows of a `.txt`, `.jsonl`, `.csv` or `.tsv` file; faults go to `problems`, with file and line.
    In a table an empty cell is a value not given; JSON tells `""` (empty) from null (not given)."""
    kind = path.suffix.lower()
    if kind not in (*TEXT, *JSON_LINES, *TABLES):
        problems.append(f"--prompt_file {path}: not a .txt, .jsonl, .csv or .tsv; save it as one of them")
        return []
    if (text := _read_text(path, "--prompt_file", problems)) is None:
        return []
    before, lines = len(problems), enumerate(map(str.strip, text.split("\n")), 1)
    filled = [(f"{path} line {number}", line) for number, line in lines if line]
    if kind in TABLES:
        rows = _table_rows(path, text, problems, warnings)
    elif kind in JSON_LINES:
        rows = _json_rows(path, _json_list(text, r"\[|\{\s"), filled, problems)
    else:
        rows = [Row(line, source) for source, line in filled]
        problems.extend(f"{row.source}: {fault}" for row in rows if (fault := text_problem(row.prompt)))
        if any(_json_list(each, r"[\[{]") for each in (text, *(row.prompt for row in rows))):
            problems.append(f"--prompt_file {path}: holds JSON, not one prompt per line; write a .jsonl file")
    if not rows and len(problems) == before:
        problems.append(f"--prompt_file {path}: the prompt file holds no prompt")
    return rows


def _json_list(text: str, begin: str) -> list[object] | None:
    """The rows of a text that is one JSON list or object and begins so; else None."""
    with suppress(ValueError):  # no JSON
        whole = parse_json(text) if re.match(rf"\s*({begin})", text) else None
        values = [whole] if isinstance(whole, dict) else whole
        if isinstance(values, list) and values and isinstance(values[0], dict | str):
            return values
    return None


def text_problem(text: str) -> str | None:
    """Why a text or a name cannot be used, encoded or written; None if it can."""
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters; at most {LONGEST_TEXT:,} are possible"
    if "\0" in text:
        return "holds a NUL character; remove it"
    half = re.search("[\ud800-\udfff]", text)  # what Python makes of bytes that are not UTF-8, or half a character
    return f"is not valid Unicode text at character {half.start() + 1}" if half else None


def read_paths(path: Path, problems: list[str]) -> list[tuple[str, Path]]:
    """(source, path) for each line of an image list; relative paths as `beside` finds them."""
    if (text := _read_text(path, "--image_path_file", problems)) is None:
        return []
    lines = enumerate(map(str.strip, text.split("\n")), 1)
    found = [(f"{path} line {number}", beside(path, line)) for number, line in lines if line]
    problems += [] if found else [f"--image_path_file {path}: the image list names no image"]
    return found


def beside(file: Path, name: str) -> Path:
    """`name` as `file` means it: relative to the file's folder if it exists there, else to the working folder."""
    path = expanded(name)
    near = file.parent / path  # an absolute path stays what it is
    return near if os.path.exists(near) else path


def expanded(name: str) -> Path:
    """`name` with the home folder for `~`; unchanged if there is no such user."""
    return Path(os.path.expanduser(name))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a file that `read_rows` reads: `.txt` keeps the prompts only, `.jsonl` everything."""
    lines = [" ".join(row.prompt.split()) for row in rows]
    if path.suffix.lower() == ".jsonl":
        given = [{key: getattr(row, key) for key in OWN} | dict(row.options) for row in rows]
        values = [{key: value for key, value in row.items() if value is not None} for row in given]
        lines = [json.dumps(row, ensure_ascii=False, default=lambda file: str(file.absolute())) for row in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(f"{line}\n" for line in lines))


def slug(text: str) -> str:
    """`text` as part of a file name: letters and digits of any script and `_-`, at most 50 characters and 150 bytes."""
    # marks count as letters: without its vowel signs a word of many scripts is another word
    kept = "".join(c if c in "_-" or unicodedata.category(c)[0] in "LMN" else " " for c in normal(text))
    short = "_".join(kept.split())[:50].encode("utf-8", "ignore")[:150].decode("utf-8", "ignore")
    return short.strip("_-") or "video"


def normal(text: str) -> str:
    """Composed Unicode (NFC), so that equal-looking names are equal."""
    return unicodedata.normalize("NFC", text)


def _read_text(path: Path, flag: str, problems: list[str]) -> str | None:
    """The file's text with `\\n` line ends and no byte order mark; None, and a problem, if there is none."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # `<(command)` is a pipe
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise OSError(f"it is larger than {LARGEST_FILE:,} bytes")
    except (OSError, ValueError) as e:  # ValueError: a name that cannot be one
        reason = getattr(e, "strerror", None) or e
        fault = "no such file" if isinstance(e, FileNotFoundError) else f"cannot be read ({reason})"
        problems.append(f"{flag} {path}: {fault}")
        return None
    coding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8"  # spreadsheets write both
    try:
        text = re.sub("\r\n?", "\n", content.decode(coding)).lstrip("\ufeff")
        if text.count("\n") > MOST_LINES:
            problems.append(f"{flag} {path}: has more than {MOST_LINES:,} lines; divide it")
            return None
        if "\0" not in text:
            return text
        before, fault = text[: text.index("\0")], "holds a NUL character"
    except UnicodeDecodeError as e:
        before, fault = content[: e.start].decode(e.encoding), "is not UTF-8 text"
    line = len(re.split("\r\n?|\n", before))
    problems.append(f"{flag} {path} line {line}: {fault}; save it as UTF-8 text")
    return None


def _json_rows(
    path: Path, listed: list[object] | None, lines: Sequence[tuple[str, str]], problems: list[str]
) -> list[Row]:
    """Rows of a list, or else of lines with their sources."""
    rows: list[Row | None] = []
    for source, value in lines if listed is None else [(f"{path} entry {n}", v) for n, v in enumerate(listed, 1)]:
        try:
            rows.append(_row(path, source, parse_json(str(value)) if listed is None else value, problems))
        except ValueError as e:
            problems.append(f"{source}: not valid JSON ({e}); a line holds one object such as {EXAMPLE}")
    return list(filter(None, rows))


def _table_rows(path: Path, text: str, problems: list[str], warnings: list[str]) -> list[Row]:
    """Rows of a table: its first line names the columns, in any case; columns that mean nothing here are ignored."""
    signs, first = TABLES[path.suffix.lower()], text.lstrip("\n").partition("\n")[0]
    start, separator = 1, max(signs, key=first.count)
    if declared := re.match('"?sep=(.)"?\n', text):  # Excel's own way to say it
        start, separator, text = 2, declared[1], text[declared.end() :]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    rows, line = list[Row](), start
    try:
        for cells in reader:
            source, line = f"{path} line {line}", start + reader.line_num
            while cells and not cells[-1].strip() and (header is None or len(cells) > len(header)):
                cells.pop()  # empty columns at the end, which spreadsheets write
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [re.sub(r"[\s_-]+", "_", cell.strip().lower()) for cell in cells]
                unknown = {name: closest(name, KEYS) for name in header if name not in KEYS}
                faults = [f"unknown column {cut(repr(name))}; did you mean {close}?" for name, close in unknown.items()
                          if close and close not in header]  # fmt: skip
                if "prompt" not in header or any(header.count(key) > 1 for key in KEYS):
                    faults.append("the first line must name the columns, each once, 'prompt' among them")
                if faults:
                    problems.append(f"{source}: {faults[0]}")
                    return []
                if unknown:
                    ignored = ", ".join(cut(repr(name)) for name in unknown)
                    warnings.append(f"{path}: columns that mean nothing here are ignored: {ignored}")
            elif len(cells) != len(header):
                problems.append(f"{source}: {len(cells)} cells, but the header names {len(header)} columns")
            else:
                pairs = zip(header, cells, strict=True)
                values = {key: cell.strip() for key, cell in pairs if cell.strip() and key in KEYS}
                if row := _row(path, source, values, problems):
                    rows.append(row)
    except csv.Error as e:
        problems.append(f"{path} line {line}: not valid CSV ({e})")
    return rows


def _row(path: Path, source: str, values: object, problems: list[str]) -> Row | None:
    """A row from its JSON or table values; None, and one problem for each fault."""
    if not isinstance(values, dict):
        problems.append(f"{source}: a prompt with its settings is one JSON object such as {EXAMPLE}")
        return None
    meant = {key: closest(str(key)[:100].lower(), KEYS) for key in values if key not in KEYS}
    allowed = f"allowed are {', '.join(KEYS)}"
    hints = {key: f"did you mean {close}?" if close else allowed for key, close in meant.items()}
    faults = [f"unknown key {cut(repr(key))}; {hint}" for key, hint in hints.items()]
    given = {key: value for key, value in values.items() if value is not None and key in KEYS}
    if "prompt" not in given and "prompt" not in meant.values():
        faults.append("no 'prompt'")
    for key, value in given.items():
        if key not in OWN:
            given[key] = value = str(value)
        if key in WHOLE_NUMBERS:
            given[key] = _whole(value)
            if given[key] is None:
                faults.append(f"{key!r} must be a whole number, not {cut(repr(value))}")
        elif not isinstance(value, str):
            faults.append(f"{key!r} must be text, not {cut(repr(value))}")
        elif unusable := text_problem(value):
            faults.append(f"{key!r} {unusable}")
        elif not value.strip() and key in NEVER_EMPTY:
            faults.append(f"{key!r} is empty; leave it out")
    if faults:
        problems.extend(f"{source}: {fault}" for fault in faults)
        return None
    given |= {key: beside(path, given[key]) for key in PICTURES if key in given}
    options = tuple((key, given.pop(key)) for key in KEYS if key in given and key not in OWN)
    return Row(given.pop("prompt").strip(), source, options=options, **given)


def _whole(value: object) -> int | None:
    """The whole number that a JSON value is, or a cell spells (also as `3.0`); None if it is none, or absurdly long."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else "" if isinstance(value, bool) else repr(value)
    found = re.fullmatch(r"([+-]?[0-9]{1,30})(\.0*)?", text)
    return int(found[1]) if found else None
