"""A hundred wrong command lines in every run of the tests; `python -m tests.wrong_lines` makes five hundred."""

import pytest

from tests.wrong_lines import run
from wan.cli.options import MODES, OPTIONS
from wan.cli.parser import OTHER_NAMES, REASONS


def test_wrong_lines_are_answered_in_a_line_that_names_the_flag() -> None:
    assert run(100, seed=1) == []


@pytest.mark.slow
def test_five_hundred_wrong_lines() -> None:
    assert run(500, seed=0) == []


def test_suggestions_name_options_and_nothing_that_is_one() -> None:
    """Other programs' name for an option is not the name of one of ours, which would be taken as such."""
    assert {flag for flags in OTHER_NAMES for flag in flags.split(" or ")} <= {f"--{name}" for name in OPTIONS}
    others = [other for names in OTHER_NAMES.values() for other in names.split()] + list(REASONS)
    assert not set(others) & set(OPTIONS)
    assert len(set(others)) == len(others)
    for row in OPTIONS.values():
        assert {*row.needs, *row.displaces, *filter(None, (row.beaten_by, row.into))} <= set(OPTIONS)
        assert set(row.counts_with) <= set(MODES)
