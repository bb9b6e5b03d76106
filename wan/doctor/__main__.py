"""Examine this machine: what is there, whether it computes right, how fast it is, what to expect. About a minute.

    python -m wan.doctor [--device cuda:1] [--disk FOLDER] [--json]

What it measures is kept, and a run's plan then says how long it will take. Exit codes: 0 nothing is wrong; 1 something
is, with what to do; 2 the command line is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

from wan.utils.requirements import need_packages

if __name__ == "__main__":
    need_packages()

import torch

from wan.doctor.findings import WRONG, Check, Finding, Machine, Outcome, examine
from wan.doctor.forecast import forecast
from wan.doctor.machine import choose_device, exchange, packages, versions, video_encoder
from wan.doctor.numerics import attention_checks, fp8_layer, golden_checks, lora_merge
from wan.doctor.rates import rate_checks
from wan.utils.argument_parser import Parser
from wan.utils.errors import InputError, print_errors

ROOT = Path(__file__).parents[2]  # a clone's; of an installed package it holds no examples
SENTENCE, INDENT = 9, 6  # columns before what goes on of a finding, which stand under its name, and of a line below it


def main(words: Sequence[str] | None = None) -> int:
    try:
        given = _parser().read(sys.argv[1:] if words is None else words)
    except InputError as e:
        return print_errors(e.problems)
    began = time.perf_counter()
    findings = []
    for finding in findings_of(given.device, given.root, given.disk, given.small):
        findings.append(finding)
        if not given.json:
            _say(finding.line())
    wrong = [finding for finding in findings if finding.verdict == WRONG]
    if given.json:
        report = {"wrong": len(wrong), "seconds": time.perf_counter() - began, "findings": [vars(f) for f in findings]}
        print(json.dumps(report, indent=2, default=str))
    else:
        _say(f"\n{len(findings)} checks in {time.perf_counter() - began:.0f} s, {len(wrong) or 'nothing'} wrong")
        for finding in wrong:
            _say(f"  {finding.name}: {finding.advice or finding.sentence}")
    return 1 if wrong else 0


def _say(text: str) -> None:
    """Print, on a terminal in lines no longer than it is wide; what belongs to a line is indented below it."""
    if sys.stdout.isatty():
        columns, lines = shutil.get_terminal_size().columns, text.splitlines()
        text = "\n".join(
            fill(
                line,
                columns,
                subsequent_indent=" " * (INDENT if line.startswith(" ") else SENTENCE),
                break_long_words=False,
                break_on_hyphens=False,
            )
            for line in lines
        )
    print(text, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m wan.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto (default), cuda, cuda:N or cpu")
    parser.add_argument(
        "--disk", type=Path, default=Path(), metavar="FOLDER", help="whose speed is measured: where the checkpoints lie"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="CLONE",
        help="of the repository, with the expected numbers, which an installation does not bring",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    return parser


def findings_of(device: str, root: Path, disk: Path, small: bool = False) -> Iterator[Finding]:
    """Every finding as soon as it is there."""
    machine = Machine(torch.device("cpu"), root, disk, small)

    def devices(machine: Machine) -> Outcome:
        machine.device, outcome = choose_device(device)
        return outcome

    first = [Check("versions", versions), Check("packages", packages), Check("ffmpeg", video_encoder)]
    for check in [*first, Check("devices", devices)]:
        yield examine(check, machine)
    for check in checks_of(machine):
        yield examine(check, machine)


def checks_of(machine: Machine) -> list[Check]:
    """What is examined once the device is known; the forecast needs the rates before it."""
    return [
        *attention_checks(machine),
        Check("LoRA merge", lora_merge),
        Check("weights in fp8", fp8_layer),
        *golden_checks(machine),
        Check("exchange between GPUs", exchange),
        *rate_checks(),
        Check("forecast", forecast),
    ]


if __name__ == "__main__":
    sys.exit(main())
