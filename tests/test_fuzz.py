"""A hundred and twenty damaged files in every run of the tests; `python -m tests.fuzz` makes two thousand."""

import pytest

from tests.fuzz import CASES, run

KINDS = list(CASES)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_in_a_line_or_are_whole(kind: str) -> None:
    counts, findings = run([kind], 120 // len(KINDS), seed=1)
    assert not findings, findings[0]
    assert counts[f"{kind} refused"] >= 5  # else the damage does nothing
    assert counts[f"{kind} accepted"] >= 1  # else nothing could be accepted


@pytest.mark.slow
def test_two_thousand_damaged_files() -> None:
    _, findings = run(KINDS, 2000, seed=1000)
    assert not findings, findings[0]
