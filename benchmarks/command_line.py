"""The command line (C10): wall time of `generate.py --help` and of a mistyped flag, each in a process of its own.

python -m benchmarks.command_line [--repeats 5]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.measure import ROOT, interleaved, machine, table


def run(*flags: str) -> None:
    subprocess.run([sys.executable, "generate.py", *flags], capture_output=True, cwd=ROOT, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of which the median is taken")
    repeats = parser.parse_args().repeats
    print(machine())
    bare, help_, wrong = interleaved(
        [
            lambda: subprocess.run([sys.executable, "-c", ""], check=True),
            lambda: run("--help"),
            lambda: run("--sample_step", "4"),
        ],
        repeats,
    )
    table(
        "C10: seconds to an answer (must 1.5, good 0.5, best 0.2)",
        [
            ("command", "seconds"),
            ("python -c ''", f"{bare:.2f}"),
            ("generate.py --help", f"{help_:.2f}"),
            ("generate.py --sample_step 4", f"{wrong:.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
