"""Prompt files: what is data and no prompt, what cannot be text, and what stays apart."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wan.cli.checks import MOST_SHOWN, Check
from wan.jobs.prompt_files import (
    LARGEST_FILE,
    MOST_LINES,
    Row,
    beside,
    expanded,
    read_paths,
    read_rows,
    slug,
    text_problem,
    write_rows,
)
from wan.utils.argument_parser import pair
from wan.utils.errors import InputError
from wan.utils.files import longest_name


def rows_of(path: Path, content: str | bytes) -> tuple[list[Row], list[str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    problems: list[str] = []
    return read_rows(path, problems, []), problems


def problem(path: Path, content: str | bytes) -> str:
    _, (found,) = rows_of(path, content)
    assert "\n" not in found
    assert len(found) < 600
    return found


@pytest.mark.parametrize("end", [".yaml", ".yml", ".xlsx", ".md", ".mp4"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, end: str) -> None:
    found = problem(tmp_path / f"p{end}", "prompt\tseed\na cat\t1\n")
    assert found.startswith(f"--prompt_file {tmp_path / f'p{end}'}: not a .txt")


@pytest.mark.parametrize("read", [lambda *words: read_rows(*words, []), read_paths], ids=["prompts", "images"])
def test_the_size_of_a_file_is_limited(tmp_path: Path, read: Callable[..., list]) -> None:
    file, problems = tmp_path / "p.txt", list[str]()
    for size, sign in ((LARGEST_FILE + 1, "larger than"), (1 << 40, "larger than"), (LARGEST_FILE, "NUL character")):
        with file.open("wb") as sparse:
            sparse.truncate(size)
        began = time.process_time()
        assert read(file, problems) == []
        assert sign in problems.pop()
        assert time.process_time() - began < 2
    file.write_text("a\n" * (MOST_LINES + 1))
    assert read(file, problems) == []
    assert "lines" in problems.pop()
    file.write_text("\n" * (MOST_LINES - 1) + "a cat")
    assert len(read(file, problems)) == 1


def test_a_name_without_an_end_is_text(tmp_path: Path) -> None:
    assert [row.prompt for row in rows_of(tmp_path / "prompts", "a cat\n")[0]] == ["a cat"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('a cat\n{"prompt": "a dog", "seed": 3}\n', "holds JSON, not one prompt per line; write a .jsonl"),
        ('["a cat", "a dog"]\n', "holds JSON"),
        ('[{"prompt": "a dog"}]', "holds JSON"),
    ],
)
def test_data_in_a_text_file_is_not_filmed(tmp_path: Path, content: str, sentence: str) -> None:
    assert sentence in problem(tmp_path / "p.txt", content)


TABLE = ["Prompt ,SEED,Frame Num,negative-prompt,,", "a cat,3.0,5,,,", '"two\nlines", 4 ,9.,no,,', ",,,,,"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spreadsheets_encodings_are_read(coding: str, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes("prompt\tseed\nein Fuchs läuft\t7\n".encode(coding))
    problems: list[str] = []
    (row,) = read_rows(tmp_path / "p.tsv", problems, [])
    assert (row.prompt, row.seed, problems) == ("ein Fuchs läuft", 7, [])


@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\ufeff"])
@pytest.mark.parametrize(
    ("name", "sign", "first"),
    [("p.csv", ",", ""), ("p.csv", ";", ""), ("p.csv", "\t", ""), ("p.tsv", "\t", ""), ("p.tsv", ",", ""),
     ("p.csv", "|", "sep=|\r\n"), ("p.csv", ";", '"sep=;"\n')],
)  # fmt: skip
def test_tables_as_spreadsheets_write_them(tmp_path: Path, name: str, sign: str, first: str, mark: str) -> None:
    """Headers in any case, other separators, byte order marks, `3.0`, empty columns and rows at the end."""
    rows, problems = rows_of(tmp_path / name, mark + first + "\r\n".join(TABLE).replace(",", sign))
    assert problems == []
    assert [(row.prompt, row.seed, row.frame_num, row.negative_prompt) for row in rows] == [
        ("a cat", 3, 5, None), ("two\nlines", 4, 9, "no"),
    ]  # fmt: skip
    begin = 2 if first else 1
    assert [row.source.rpartition(" ")[2] for row in rows] == [str(begin + 1), str(begin + 2)]


def test_commas_in_a_prompt_are_no_separators(tmp_path: Path) -> None:
    rows, problems = rows_of(tmp_path / "p.csv", "prompt;seed\na cat, a dog;3\n")
    assert ([(row.prompt, row.seed) for row in rows], problems) == ([("a cat, a dog", 3)], [])


def test_other_columns_are_named_in_one_warning(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,prompt,notes,,Notes 2\n1,a cat,nice,,\n2,a dog,,,\n")
    problems, warnings = list[str](), list[str]()
    assert [row.prompt for row in read_rows(tmp_path / "p.csv", problems, warnings)] == ["a cat", "a dog"]
    assert problems == []
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in (str(tmp_path / "p.csv"), "'id'", "'notes'", "'notes_2'"))


@pytest.mark.parametrize(
    ("name", "content", "meant"),
    [
        ("p.csv", "prompt,sead\na,3\n", "seed"), ("p.csv", "promt\na\n", "prompt"),
        ("p.jsonl", '{"prompt": "a", "sead": 3}', "seed"), ("p.jsonl", '{"promt": "a"}', "prompt"),
        ("p.jsonl", '{"prompt": "a", "Negative Prompt": "b"}', "negative_prompt"),
    ],
)  # fmt: skip
def test_a_nearly_right_name_is_suggested_once(tmp_path: Path, name: str, content: str, meant: str) -> None:
    found = problem(tmp_path / name, content)
    assert found.startswith(f"{tmp_path / name} line 1: unknown ")
    assert f"; did you mean {meant}?" in found


def test_a_long_text_is_refused_at_once(tmp_path: Path) -> None:
    long, begun = "cat " * 1_200_000, time.process_time()
    for name, content in (("p.txt", long), ("p.jsonl", json.dumps({"prompt": long})), ("p.csv", f"prompt\n{long}\n")):
        assert problem(tmp_path / name, content).startswith(f"{tmp_path / name} line ")
    assert "has 20,001 characters" in (text_problem("a" * 20_001) or "")
    assert time.process_time() - begun < 5


ALMOST_DATA = ["{a red | a blue} cat", "[close-up] a cat", "[1]", '"quoted"', "prompt", "a prompt, a seed", "{", "3"]


@pytest.mark.parametrize("line", [*ALMOST_DATA, "[" * 5000])
def test_prompts_that_look_a_little_like_data(tmp_path: Path, line: str) -> None:
    rows, problems = rows_of(tmp_path / "p.txt", f"{line}\n")
    assert ([row.prompt for row in rows], problems) == ([line], [])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", b"good\na\0b\n", "p.txt line 2: holds a NUL"),
        ("p.txt", "text".encode("utf-16-le"), "p.txt line 1: holds a NUL"),
        ("p.csv", b"prompt\na\0b\n", "p.csv line 2: holds a NUL"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}', "p.jsonl line 1: 'prompt' holds a NUL character"),
        ("p.jsonl", '{"prompt": "half \\ud83d"}', "p.jsonl line 1: 'prompt' is not valid Unicode text at character 6"),
        ("p.jsonl", '{"prompt": "a", "save_file": "\\udce9.mp4"}', "'save_file' is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "image": ""}', "p.jsonl line 1: 'image' is empty; leave it out"),
        ("p.jsonl", '{"prompt": "a", "save_file": " "}', "'save_file' is empty"),
        ("p.jsonl", "[" * 100_000, "p.jsonl line 1: not valid JSON (nested too deeply)"),
        ("p.jsonl", '{"prompt": ' * 20_000, "not valid JSON (nested too deeply)"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "7" * 5000 + "}", "p.jsonl line 1: not valid JSON (Exceeds the limit"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "7" * 4000 + "}", "'seed' must be a whole number, not 7777"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e999}', "'seed' must be a whole number, not inf"),
        ("p.jsonl", '{"prompt": "a", "seed": NaN}', "not valid JSON (NaN is not a number of JSON)"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "not valid JSON (the key 'prompt' is given twice)"),
        ("p.jsonl", '{"prompt": "a", "' + "k" * 9000 + '": 1}', "unknown key 'kkkk"),
        ("p.csv", "prompt,seed\na," + "7" * 5000 + "\n", "'seed' must be a whole number, not '777"),
        ("p.csv", "prompt,seed\na,٣\n", "'seed' must be a whole number"),
        ("p.csv", "prompt\n" + "a" * 200_000, "p.csv line 2: not valid CSV (field larger"),
    ],
)
def test_invalid_rows_are_refused(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    assert sentence in problem(tmp_path / name, content)


def test_no_file_makes_it_wait(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for path in (tmp_path / "folder.txt", Path("/dev/zero")):
        problems: list[str] = []
        assert read_rows(path, problems, []) == []
        assert problems == [f"--prompt_file {path}: cannot be read (it is no regular file)"]
        assert read_paths(path, problems) == []


@pytest.mark.parametrize("name", ["a\0b.txt", "n" * 300 + ".txt"])
def test_names_that_cannot_be_files(tmp_path: Path, name: str) -> None:
    problems: list[str] = []
    assert read_rows(tmp_path / name, problems, []) == []
    assert len(problems) == 1
    assert "cannot be read" in problems[0]
    assert beside(tmp_path / "p.jsonl", name) == Path(name)


def test_an_unknown_user_is_no_crash() -> None:
    assert expanded("~no-such-user-here/a.png") == Path("~no-such-user-here/a.png")
    assert expanded("~") == Path.home()


def test_an_empty_negative_prompt_is_not_an_absent_one(tmp_path: Path) -> None:
    rows, _ = rows_of(
        tmp_path / "p.jsonl", '{"prompt": "a", "negative_prompt": ""}\n{"prompt": "b", "negative_prompt": null}'
    )
    assert [row.negative_prompt for row in rows] == ["", None]
    write_rows(tmp_path / "o.jsonl", rows)
    assert [row.negative_prompt for row in read_rows(tmp_path / "o.jsonl", [], [])] == ["", None]
    rows, _ = rows_of(tmp_path / "p.csv", "prompt,negative_prompt\na,\n")
    assert rows[0].negative_prompt is None


def test_texts() -> None:
    assert text_problem("猫 \U0001f600") is None
    assert "NUL" in (text_problem("a\0") or "")
    assert "at character 4" in (text_problem(b"caf\xe9".decode("utf-8", "surrogateescape")) or "")


def test_every_default_name_can_be_written() -> None:
    """Letters of four bytes, the largest index and seed: with what is added, within 255 bytes."""
    assert len(slug("\U00020000" * 60).encode()) <= 150
    assert slug("猫" * 60) == "猫" * 50
    for letter in ("a", "猫", "\U00020000"):
        name = f"t2v-A14B_99999_seed{2**63 - 1}_{slug(letter * 80)}_replay.mp4"
        assert len(longest_name(Path(name)).encode()) <= 255
    assert slug("half \ud83d") == "half"


def test_a_hundred_thousand_bad_rows_are_not_a_hundred_thousand_lines(tmp_path: Path) -> None:
    check = Check()
    (tmp_path / "p.jsonl").write_text("x\n" * 100_000)
    read_rows(tmp_path / "p.jsonl", check.problems, [])
    with pytest.raises(InputError) as raised:
        check.stop()
    assert len(raised.value.problems) == MOST_SHOWN + 1
    assert raised.value.problems[-1] == "and 99,950 more problems"


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**4000, float("inf")])
def test_numbers_of_any_length_are_one_line(number: float) -> None:
    check = Check()
    assert check.number("--base_seed", number, 5, 0, 2**63 - 1) == 5
    if isinstance(number, int):
        check.frames("frame_num", number)
    assert all(len(sentence) < 200 for sentence in check.problems)
    assert len(check.problems) == (2 if isinstance(number, int) else 1)


def test_digits_grouped_as_in_python_are_no_number() -> None:
    with pytest.raises(InputError) as raised:
        pair("--sample_guide_scale", "1_0")
    assert raised.value.problems == ["--sample_guide_scale takes one number or two with a comma between, not '1_0'"]


def test_extended_rows_name_their_images_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are written to another folder than the one that a relative path counts from."""
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    extended = Row("a cat", "", image=Path("a.png"), options=(("sample_shift", "3"),))
    write_rows(tmp_path / "sub" / "rows.jsonl", [extended])
    (row,) = read_rows(tmp_path / "sub" / "rows.jsonl", [], [])
    assert (row.image, row.options) == (tmp_path / "a.png", (("sample_shift", "3"),))
