"""Tests of permissions where the tests run as root: a process of its own that has given root's powers over files up."""

from tests.forked import python
from tests.support import TESTS

GIVE_UP = """
import ctypes, os
if os.geteuid() == 0:  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: bits 1, 2 and 3
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for number in range(3):
        sets[number] &= ~0b1110
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
"""


def run_unprivileged(code: str, *arguments: object) -> list[str]:
    """The lines that `code` prints."""
    done = python("-c", GIVE_UP + code, *arguments, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
