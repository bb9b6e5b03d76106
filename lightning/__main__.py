"""`python -m lightning inspect FILE|DIR`: what a LoRA or distilled weight is, from its header alone, without torch.
`python -m lightning bake`: write a checkpoint with LoRAs merged in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.inspect_weights import examine, models_to_judge_by, settings_line
from lightning.lora import Lora
from lightning.lora_args import Choices, choose_loras
from lightning.releases import Release, preset, recognise
from wan.checkpoints.hub import located, whole
from wan.configs import TASKS
from wan.utils.argument_parser import Parser, outside, pair
from wan.utils.errors import InputError, LoraError, print_errors

ELSEWHERE = dict.fromkeys(("output", "output_dir", "out_dir", "save_dir", "o"), "--out")  # other programs' names
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "float8_e4m3fn"}  # of baked weights: torch's names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted. Errors are one line on stderr."""
    try:
        args = _parser().read(sys.argv[1:] if arguments is None else arguments)
        return int(args.command(args))
    except InputError as e:
        return print_errors(e.problems)
    except OSError as e:
        return print_errors([str(e)])
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lightning", description="LoRAs and distilled weights for Wan2.2.", elsewhere=ELSEWHERE
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|bake")
    says = "say what a weight file is, or each of a folder's, and what it would do in a run"
    inspect = commands.add_parser(
        "inspect", help=says, description=f"{says[0].upper()}{says[1:]}. Only headers are read."
    )
    inspect.add_argument(
        "path", help="a safetensors file, a folder of them, or one saved by PEFT; also on the hub: owner/name/path"
    )
    inspect.add_argument(
        "--task", metavar="TASK", choices=TASKS, help=f"judge by this model alone: {' or '.join(TASKS)}"
    )
    inspect.add_argument("--ckpt_dir", metavar="DIR", type=Path, help="judge by this checkpoint, of whatever sizes")
    inspect.add_argument("--lora_alpha", metavar="A", type=float, help="alpha of LoRA files that store none")
    inspect.add_argument("--json", action="store_true", help="a JSON list on stdout, one object a file")
    inspect.set_defaults(command=_inspect)
    says = "write a checkpoint with LoRAs merged in, for programs that take none, or to start faster"
    bake = commands.add_parser("bake", help=says, description=f"{says[0].upper()}{says[1:]}.")
    bake.add_argument("--task", metavar="TASK", choices=TASKS, required=True, help=" or ".join(TASKS))
    bake.add_argument("--ckpt_dir", metavar="DIR", type=Path, required=True, help="the base checkpoint's folder")
    bake.add_argument("--lora_dir", metavar="DIR", help="a release folder with one LoRA for each expert")
    bake.add_argument("--lora_strength", metavar="HIGH[,LOW]", help="scales --lora_dir; default 1")
    bake.add_argument(
        "--lora", action="append", default=[], metavar="LORA",
        help="PATH[:S], high=PATH[:S] or low=PATH[:S]: a LoRA at strength S; may be given several times",
    )  # fmt: skip
    bake.add_argument("--lora_alpha", metavar="A", type=float, help="alpha of LoRA files that store none")
    bake.add_argument("--lora_allow_partial", action="store_true", help="accept tensors that match nothing")
    bake.add_argument(
        "--preset", metavar="NAME", help="release whose settings the result keeps; default: as recognised"
    )
    bake.add_argument("--sample_steps", metavar="N", type=int, help="steps that the result keeps as its own")
    bake.add_argument("--sample_shift", metavar="S", type=float, help="timestep shift that it keeps")
    bake.add_argument("--sample_guide_scale", metavar="S|LOW,HIGH", help="guidance that it keeps; 1: none")
    bake.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write; must not exist yet")
    bake.add_argument(
        "--layout", metavar="LAYOUT", choices=("released", "diffusers"), default="released",
        help="released (default) or diffusers: how the result's files are named",
    )  # fmt: skip
    bake.add_argument(
        "--dtype",
        metavar="DTYPE",
        choices=tuple(DTYPES),
        default="bf16",
        help="of its weights: bf16 (default), fp32 or fp8",
    )
    bake.set_defaults(command=_bake)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    path = located("inspect", args.path)
    if not path.exists():
        raise LoraError(f"{path}: no such file or folder")
    report = examine(path, models_to_judge_by(args.task, args.ckpt_dir), args.lora_alpha)
    if args.json:
        print(json.dumps(report.files, indent=2))
    else:
        known = [file for file in report.files if file["stored"] or file["release"]]  # of others the error says it all
        blocks = [*map(_text_of, known), *report.uses]
        print("\n\n".join(blocks), end="\n" if blocks else "")
    errors = [file["error"] for file in report.files if file["error"]]
    return print_errors(errors) if errors else 0


def _text_of(report: dict[str, Any]) -> str:
    """One file's report as text."""
    coverage, settings = report["coverage"], report["settings"]
    gigabytes, stored = report["gigabytes"], report["stored"]
    size = f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.3g} MB"
    rows = {"kind": ", ".join(filter(None, [report["kind"], "/".join(stored), size if gigabytes else ""]))}
    if report["kind"] != "LoRA" and len(stored) > 1:
        rows["tensors"] = ", ".join(f"{count} {kind}" for kind, count in stored.items())
    rows["release"] = f"{report['release']} ({report['source']})" if report["release"] else "not recognised"
    rows["fits"] = ", ".join(report["fits"]) or "none of the tasks"
    if coverage:
        rows["coverage"] = coverage["summary"]
        rows["rank"] = ", ".join(map(str, coverage["ranks"])) or "-"
        rows["alpha"] = ", ".join(f"{alpha:g}" for alpha in report["alphas"]) or "none stored"
    if settings:
        rows["settings"] = settings_line(settings)
        rows["sizes"] = ", ".join(f"{width}*{height}" for width, height in settings["sizes"])
    rows |= {name: report[name] for name in ("note", "licence", "use") if report[name]}
    lines = [*rows.items(), *(("warning", warning) for warning in (coverage or {}).get("warnings", ()))]
    return "\n".join([report["path"], *(f"  {name:<10}{text}" for name, text in lines)])


def _bake(args: argparse.Namespace) -> int:
    import torch

    from lightning.bake import Bake

    if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
        raise LoraError(f"--lora_alpha must be a number above 0, not {args.lora_alpha:g}")
    chosen = choose_loras(TASKS[args.task].experts.keys(), args.lora_dir, args.lora_strength, args.lora)
    loras: dict[str, list[Lora]] = {expert: [] for expert in TASKS[args.task].experts}
    for choice in chosen.loras:
        try:
            path = whole(choice.path)
            loras[choice.expert].append(Lora.open(path, choice.strength, args.lora_alpha, choice.expert))
        except InputError as e:
            chosen.problems += [problem for problem in e.problems if problem not in chosen.problems]
    release = _settings_kept(args, chosen)
    if chosen.problems:
        raise LoraError(chosen.problems)
    for warning in chosen.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    Bake(
        task=args.task,
        ckpt_dir=args.ckpt_dir,
        loras=loras,
        out=args.out,
        dtype=getattr(torch, DTYPES[args.dtype]),
        allow_partial=args.lora_allow_partial,
        release=release,
        layout=args.layout,
        report=lambda line: print(line, file=sys.stderr),
    ).write()
    return 0


def _settings_kept(args: argparse.Namespace, chosen: Choices) -> Release | None:
    """What the result is to be sampled with: its release's settings, and what was given on top of them."""
    changes: dict[str, Any] = {}
    given = [("steps", args.sample_steps, 1, 1000), ("shift", args.sample_shift, 0.01, 100)]
    if args.sample_guide_scale is not None:
        try:
            changes["guidance"] = pair("--sample_guide_scale", args.sample_guide_scale)
            given += [("guide_scale", scale, 0, 100) for scale in dict.fromkeys(changes["guidance"])]
        except InputError as e:
            chosen.problems += e.problems
    for name, value, low, high in given:
        if value is not None and (problem := outside(f"--sample_{name}", value, low, high)):
            chosen.problems.append(problem)
    for name, value in (("steps", args.sample_steps), ("shift", args.sample_shift)):
        if value is not None:
            changes |= {name: value, "timesteps": None}
    release = _release_merged(args, chosen, bool(changes))
    return replace(release, **changes) if release else None


def _release_merged(args: argparse.Namespace, chosen: Choices, distilled: bool) -> Release | None:
    """--preset's, else the first that a path tells; a LoRA of no known one counts as a distillation if settings were
    given for it, or if it came as --lora_dir, as for generate.py."""
    if args.preset:
        release = preset(args.preset)
        release.check_supported(f"--preset {args.preset}")
        if args.task not in release.tasks or release.kind == "recipe":
            chosen.problems.append(f"--preset {args.preset} is not a distillation of {args.task}")
        return release
    paths = [*([Path(args.lora_dir)] if args.lora_dir else []), *(choice.path for choice in chosen.loras)]
    for path in paths:
        if found := recognise(path):
            return found
    return (
        Release(paths[0].absolute().stem, (args.task,), "lora", "") if paths and (distilled or args.lora_dir) else None
    )


if __name__ == "__main__":
    sys.exit(main())
