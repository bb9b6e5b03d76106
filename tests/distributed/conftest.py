"""The ranks of these tests run one thread each; so does what they are compared with, or the last bits differ."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
