"""`python -m lightning inspect PATH` describes weights from headers; `bake` writes a checkpoint with LoRAs merged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.inspect_weights import inspect_path, settings_line
from lightning.lora import Lora
from lightning.lora_files import Choices, choose_loras
from lightning.releases import Release, preset, recognise
from wan.checkpoints.hub import fetch, located
from wan.configs import TASKS
from wan.utils.argument_parser import Parser, outside, pair
from wan.utils.errors import InputError, LoraError, WanError, print_errors
from wan.utils.progress import tell

ELSEWHERE = dict.fromkeys(("output", "output_dir", "out_dir", "save_dir", "o"), "--out")  # other programs' names
BAKED_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "float8_e4m3fn"}  # of baked weights: torch's names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted. Errors are one line on stderr."""
    try:
        args = _build_parser().read(sys.argv[1:] if arguments is None else arguments)
        return int(args.command(args))
    except WanError as e:
        return print_errors(e.problems)
    except OSError as e:
        return print_errors([str(e)])
    except KeyboardInterrupt:
        tell(sys.stderr, "interrupted; the same command goes on where this one stopped\n")
        return 130


def _build_parser() -> Parser:
    text = "LoRAs and distilled weights for Wan2.2."
    parser = Parser(prog="python -m lightning", description=text, elsewhere=ELSEWHERE)
    commands = parser.add_subparsers(required=True, metavar="inspect|bake")
    text = "describe a weight file, or each file of a folder, and its use in a run"
    inspect = commands.add_parser("inspect", help=text, description=f"{text.capitalize()}. Reads headers only.")
    inspect.set_defaults(command=_inspect)
    add = inspect.add_argument
    add("path", help="a file of weights, a folder of them or one saved by PEFT; also on the hub: owner/name/path")
    add("--task", metavar="TASK", choices=TASKS, help=f"judge by this model alone: {' or '.join(TASKS)}")
    add("--ckpt_dir", metavar="DIR", type=Path, help="judge by this checkpoint, of any size")
    add("--lora_alpha", metavar="A", type=float, help="alpha of LoRA files that store none")
    add("--json", action="store_true", help="print a JSON list, one object per file")
    text = "write a checkpoint with LoRAs merged in, for programs without LoRAs or a faster start"
    bake = commands.add_parser("bake", help=text, description=f"{text.capitalize()}.")
    bake.set_defaults(command=_bake)
    add = bake.add_argument
    add("--task", metavar="TASK", choices=TASKS, required=True, help=" or ".join(TASKS))
    add("--ckpt_dir", metavar="DIR", type=Path, required=True, help="folder of the base checkpoint")
    add("--lora_dir", metavar="DIR", help="a release folder with one LoRA per expert")
    add("--lora_strength", metavar="HIGH[,LOW]", help="strength of --lora_dir (default: 1)")
    text = "PATH[:S], high=PATH[:S] or low=PATH[:S]: a LoRA at strength S; repeatable"
    add("--lora", metavar="LORA", action="append", default=[], help=text)
    add("--lora_alpha", metavar="A", type=float, help="alpha of LoRA files that store none")
    add("--lora_allow_partial", action="store_true", help="accept tensors that match nothing")
    add("--preset", metavar="NAME", help="release whose settings the result keeps (default: the recognised one)")
    add("--sample_steps", metavar="N", type=int, help="number of steps that the result keeps")
    add("--sample_shift", metavar="S", type=float, help="timestep shift that it keeps")
    add("--sample_guide_scale", metavar="S|LOW,HIGH", help="guidance that it keeps; 1: none")
    add("--out", metavar="DIR", type=Path, required=True, help="the folder to write; must not exist yet")
    layouts, text = ("released", "diffusers"), "names of the result's files: released (default) or diffusers"
    add("--layout", metavar="LAYOUT", choices=layouts, default="released", help=text)
    text = "precision of the weights: bf16 (default), fp32 or fp8"
    add("--dtype", metavar="DTYPE", choices=tuple(BAKED_DTYPES), default="bf16", help=text)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    path = located("inspect", args.path)
    if not path.exists():
        raise LoraError(f"{path}: no such file or folder")
    files, uses = inspect_path(path, args.task, args.ckpt_dir, args.lora_alpha)
    if args.json:
        tell(sys.stdout, json.dumps(files, indent=2) + "\n")
    else:
        # the error describes the others
        blocks = [*(_text_of(file) for file in files if file["stored"] or file["release"]), *uses]
        tell(sys.stdout, "\n\n".join(blocks) + ("\n" if blocks else ""))
    errors = [file["error"] for file in files if file["error"]]
    return print_errors(errors) if errors else 0


def _text_of(report: dict[str, Any]) -> str:
    coverage, settings, stored = report["coverage"] or {}, report["settings"] or {}, report["stored"]
    gigabytes = report["gigabytes"]
    size = f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.3g} MB"
    counts = [f"{count} {kind}" for kind, count in stored.items()]
    rows = {
        "kind": ", ".join(filter(None, [report["kind"], "/".join(stored), size if gigabytes else ""])),
        "tensors": ", ".join(counts) if report["kind"] != "LoRA" and len(counts) > 1 else "",
        "release": f"{report['release']} ({report['source']})" if report["release"] else "not recognised",
        "fits": ", ".join(report["fits"]) or "none of the tasks",
        "coverage": coverage.get("summary"),
        "rank": coverage and (", ".join(map(str, coverage["ranks"])) or "-"),
        "alpha": coverage and (", ".join(f"{alpha:g}" for alpha in report["alphas"]) or "none stored"),
        "settings": settings and settings_line(settings),
        "sizes": ", ".join(f"{width}*{height}" for width, height in settings.get("sizes", ())),
        **{name: report[name] for name in ("note", "licence", "use")},
    }
    lines = [*rows.items(), *(("warning", warning) for warning in coverage.get("warnings", ()))]
    return "\n".join([report["path"], *(f"  {name:<10}{text}" for name, text in lines if text)])


def _bake(args: argparse.Namespace) -> int:
    import torch

    from lightning.bake import Bake

    chosen = choose_loras(TASKS[args.task].experts.keys(), args.lora_dir, args.lora_strength, args.lora)
    loras: dict[str, list[Lora]] = {expert: [] for expert in TASKS[args.task].experts}
    for choice in chosen.loras:
        try:
            path = fetch(choice.path)
            loras[choice.expert].append(Lora.open(path, choice.strength, args.lora_alpha, choice.expert))
        except InputError as e:
            chosen.problems += [problem for problem in e.problems if problem not in chosen.problems]
    release = _settings_kept(args, chosen)
    if chosen.problems:
        raise LoraError(chosen.problems)
    for warning in chosen.warnings:
        tell(sys.stderr, f"warning: {warning}\n")
    Bake(
        task=args.task, ckpt_dir=args.ckpt_dir, loras=loras, out=args.out, layout=args.layout, release=release,
        dtype=getattr(torch, BAKED_DTYPES[args.dtype]), allow_partial=args.lora_allow_partial,
        report=lambda line: tell(sys.stderr, f"{line}\n"),
    ).write()  # fmt: skip
    return 0


def _settings_kept(args: argparse.Namespace, chosen: Choices) -> Release | None:
    """The settings to sample the result with, changed by the flags: --preset's, else of the first path that names some.

    A LoRA of no known release counts as a distillation if it came with settings or, as in generate.py, as --lora_dir.
    """
    numbers = [("steps", args.sample_steps, 1, 1000), ("shift", args.sample_shift, 0.01, 100)]
    changes: dict[str, Any] = {name: value for name, value, *_ in numbers if value is not None}
    changes |= {"timesteps": None} if changes else {}
    if args.sample_guide_scale is not None:
        try:
            changes["guidance"] = pair("--sample_guide_scale", args.sample_guide_scale)
            numbers += [("guide_scale", scale, 0, 100) for scale in {*changes["guidance"]}]
        except InputError as e:
            chosen.problems += e.problems
    chosen.problems += filter(None, (outside(f"--sample_{n}", x, *ends) for n, x, *ends in numbers if x is not None))
    paths = [*([Path(args.lora_dir)] if args.lora_dir else []), *(choice.path for choice in chosen.loras)]
    if args.preset:
        release = preset(args.preset)
        release.check_supported(f"--preset {args.preset}")
        if args.task not in release.tasks or release.kind == "recipe":
            chosen.problems.append(f"--preset {args.preset} is not a distillation of {args.task}")
        return replace(release, **changes)
    found = next(filter(None, map(recognise, paths)), None)
    if found is None and paths and (changes or args.lora_dir):
        found = Release(paths[0].absolute().stem, (args.task,), "lora", "")
    return replace(found, **changes) if found else None


if __name__ == "__main__":
    sys.exit(main())
