"""Examine this machine: what it has, whether it computes right, how fast it is, what to expect. About a minute.

    python -m wan.doctor [--device cuda:1] [--disk FOLDER] [--json]

The measured rates are kept, and a run's plan then says how long it will take. Exit codes: 0 nothing is wrong; 1
something is, with what to do; 2 the command line is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill

from wan.utils.errors import need_packages

if __name__ == "__main__":
    need_packages()

import torch

from wan.doctor import rates
from wan.doctor.forecast import forecast
from wan.doctor.machine import WRONG, DoctorCheck, Finding, Machine, devices, examine, packages, software, video_encoder
from wan.doctor.numerics import attention_checks, golden_checks, lora_merge, quantised_layer, vae_in_bf16
from wan.modules.quantised_linear import KERNELS
from wan.utils.argument_parser import Parser
from wan.utils.errors import exit_code
from wan.utils.progress import tell

ROOT = Path(__file__).parents[2]  # of a clone; an installed package has no examples there


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m wan.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto", metavar="DEVICE", help="auto (default), cuda, cuda:N, mps or cpu")
    add("--disk", type=Path, default=Path(), metavar="FOLDER", help="measure this folder's disk: the checkpoints' one")
    add("--root", type=Path, default=ROOT, metavar="CLONE", help="a clone of the repository, for the expected numbers")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--small", action="store_true", help=argparse.SUPPRESS)
    return exit_code(lambda: _examine_all(parser.read(sys.argv[1:] if words is None else words)))


def _examine_all(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    findings = []
    for finding in findings_of(args.device, args.root, args.disk, args.small):
        findings.append(finding)
        if not args.json:
            _print(finding.line())
    seconds, wrong = time.perf_counter() - began, [finding for finding in findings if finding.verdict == WRONG]
    if args.json:
        report = {"wrong": len(wrong), "seconds": seconds, "findings": [vars(finding) for finding in findings]}
        tell(sys.stdout, json.dumps(report, indent=2, default=str) + "\n")
    else:
        _print(f"\n{len(findings)} checks in {seconds:.0f} s, {len(wrong) or 'nothing'} wrong")
        for finding in wrong:
            _print(f"  {finding.name}: {finding.advice or finding.sentence}")
    return 1 if wrong else 0


def _print(text: str) -> None:
    """Print; a terminal gets lines no longer than it is wide, their further lines indented."""
    if sys.stdout.isatty():
        wrap = partial(fill, width=shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
        lines = text.splitlines()
        text = "\n".join(wrap(line, subsequent_indent=" " * (6 if line.startswith(" ") else 9)) for line in lines)
    tell(sys.stdout, f"{text}\n")


def findings_of(device: str, root: Path, disk: Path, small: bool = False) -> Iterator[Finding]:
    """Every finding as soon as it is made."""
    machine = Machine(torch.device("cpu"), root, disk, small)
    yield examine(DoctorCheck("versions", software), machine)
    yield examine(DoctorCheck("packages", packages), machine)
    yield examine(DoctorCheck("ffmpeg", video_encoder), machine)
    yield examine(DoctorCheck("devices", partial(devices, device)), machine)
    yield from (examine(check, machine) for check in checks_of(machine))


def checks_of(machine: Machine) -> list[DoctorCheck]:
    """The checks of a known device; the forecast needs the rates before it."""
    return [
        *attention_checks(machine),
        DoctorCheck("LoRA merge", lora_merge),
        *(DoctorCheck(f"weights in {form}", partial(quantised_layer, form)) for form in KERNELS),
        DoctorCheck("VAE decode in bf16", vae_in_bf16, "leave --vae_dtype out"),
        *golden_checks(machine),
        DoctorCheck("exchange between GPUs", rates.exchange),
        DoctorCheck("rate: matmul", rates.matmul),
        DoctorCheck("rate: attention", rates.attention),
        DoctorCheck("rate: VAE", rates.vae),
        DoctorCheck("rate: device copy", rates.device_copy),
        DoctorCheck("rate: host to device", rates.host_to_device),
        DoctorCheck("rate: disk read", rates.disk_read, "give --disk FOLDER where 300 MB can be written"),
        DoctorCheck("forecast", forecast),
    ]


if __name__ == "__main__":
    sys.exit(main())
