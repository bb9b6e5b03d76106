"""Plain English: habits that made our texts hard to read, kept out of documents, the program and its tests.

Documents have none, nor have docstrings, comments, help, messages and the names of tests.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.support import TESTS

ROOT = TESTS.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
# A habit and the plain form in its place.
HABITS = {
    r"(?i)\b(?:is|are|was|were|be) told\b": "says, prints",
    r"(?i)\bto be had\b": "available",
    r"(?i)\bstands? (?:beside|alone|where|there|in|for|at|on)\b": "is",
    r"(?i)\b(?:there is )?no room\b": "not enough memory",
    r"(?i)\bso (?:many|much)\b": "N, a number of",
    r"(?i)\bhas a say\b": "affects",
    r"(?i)\bcomes? to be\b": "becomes",
    r"(?i)\bin place of\b": "instead of",
    r"(?i)\bwhat (?:is|are) (?:wrong|left|there)\b": "the fault, the rest",
    r"(?i)\b(?:a|the) (?:line|prompt|row|step|token|GPU|second|video) a \w+\b": "per",
    r"(?i)\b(?:times|GB|dB|scale|bytes) a (?!few)\w+\b": "per",
    r"(?:^|[.:!?] )What (?:is|was|are|a|an|the|there|lies|has|it)\b": "subject first, no leading What",
    r"(?:^|[.:!?] )Of (?:a|an|the|each|several|many)\b": "subject first, no leading Of",
}


def texts(path: Path) -> list[str]:
    """Strings and comments of a Python file, a text each."""
    if path.suffix != ".py":
        prose = re.sub(r"```.*?```|<!-- table.*?<!-- end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        return [re.sub(r"\s*\n(?![\n|*#])", " ", prose)]
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    kinds = (tokenize.STRING, tokenize.COMMENT)
    return [re.sub(r"\s*\n\s*", " ", token.string.strip("#\"' rfb")) for token in tokens if token.type in kinds]


def habits_of(path: Path) -> list[str]:
    """`WORDS (PLAIN FORM)` for each habit found in a file."""
    return [
        f"{path.relative_to(ROOT)}: {found[0].strip()!r} ({plain})"
        for text in texts(path)
        for habit, plain in HABITS.items()
        for found in re.finditer(habit, text, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_have_no_habits(page: Path) -> None:
    assert habits_of(page) == []


@pytest.mark.parametrize("folder", ["wan", "lightning", "tests", "benchmarks", "examples"])
def test_the_program_has_no_habits(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)] + [ROOT / "generate.py"]
    assert [found for path in files for found in habits_of(path)] == []


def test_names_of_tests_have_no_habits() -> None:
    names = [name for path in TESTS.rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))]
    assert [name for name in names if re.search(r"_told\b|_tells_|_stands?_|_lies_|^test_(what|of)_", name)] == []


def test_the_habits_are_recognised(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    # one sentence with several habits, to see the list find them
    page.write_text("What is left is told.\n\nThere is no room for so many, a scale a row.")
    found = [habit for habit in HABITS for _ in re.finditer(habit, texts(page)[0], re.MULTILINE)]
    assert len(found) >= 5
