"""A hundred wrong command lines in every run of the tests; `python -m tests.wrong_lines` makes five hundred."""

import pytest

from tests.wrong_lines import run
from wan.cli.hints import ALSO, MODES
from wan.cli.options import OPTIONS


def test_wrong_lines_are_answered_in_a_line_that_names_the_flag() -> None:
    assert run(100, seed=1) == []


@pytest.mark.slow
def test_five_hundred_wrong_lines() -> None:
    assert run(500, seed=0) == []


def test_hints_name_options_and_nothing_that_is_one() -> None:
    """What others call an option is not the name of one of ours, which would be taken as such."""
    assert set(ALSO) <= set(OPTIONS)
    assert not [other for names in ALSO.values() for other in names.split() if other in OPTIONS]
    assert all(name in OPTIONS for mode, names in MODES.items() for name in (mode, *names.split()))
    assert all(name in OPTIONS for row in OPTIONS.values() for name in (*row.needs, row.beaten_by) if name)
