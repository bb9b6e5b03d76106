"""Tests of permissions where the tests run as root: a process of its own that has given root's powers over files up."""

import subprocess
import sys
from pathlib import Path

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
    done = subprocess.run(
        [sys.executable, "-c", GIVE_UP + code, *map(str, arguments)],
        cwd=Path(TESTS).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
