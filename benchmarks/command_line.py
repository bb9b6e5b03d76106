"""The command line (C10): wall time of `generate.py --help` and of a mistyped flag, each in a process of its own.

python -m benchmarks.command_line [--repeats 5]
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import ROOT, Row, command_parser, interleaved, report


def run(*flags: str) -> None:
    subprocess.run([sys.executable, "generate.py", *flags], capture_output=True, cwd=ROOT, check=False)


def rows(repeats: int = 5) -> list[Row]:
    bare, help_, wrong = interleaved(
        [
            lambda: subprocess.run([sys.executable, "-c", ""], check=True),
            lambda: run("--help"),
            lambda: run("--sample_step", "4"),
        ],
        repeats,
    )
    what = "C10 `generate.py --help`; a mistyped flag"
    figure = f"{help_:.2f} s; {wrong:.2f} s"
    return [Row(what, figure, "must 1.5, good 0.5, best 0.2 s", f"python alone {bare:.2f} s")]


def main() -> None:
    report(rows(command_parser(__doc__, repeats=5).parse_args().repeats))


if __name__ == "__main__":
    main()
