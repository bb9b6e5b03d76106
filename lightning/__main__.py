"""`python -m lightning inspect PATH` describes weights from headers; `bake` writes a checkpoint with LoRAs merged."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.lora import Lora, check
from lightning.lora_files import PEFT_CONFIG, Choices, choose_loras, expert_of, files_of, named_expert, weights_in
from lightning.lora_matching import UNSUPPORTED, Shapes
from lightning.releases import Release, caution, preset, recognise, release_in
from wan.checkpoints.checkpoint import open_single
from wan.checkpoints.hub import fetch, located
from wan.checkpoints.layout import MODEL_INDEX
from wan.checkpoints.safetensors_file import INDEX_SUFFIX
from wan.checkpoints.weights import EXPERT, PICKLED, TEXT_ENCODER, VAE, kinds_in, open_expert, open_file, open_parts
from wan.configs import TASKS, task_of
from wan.configs.task import PATCH
from wan.modules.model import released_shapes
from wan.utils.argument_parser import Parser, outside, pair
from wan.utils.errors import InputError, LoraError, exit_code, print_errors
from wan.utils.progress import tell

ELSEWHERE = dict.fromkeys(("output", "output_dir", "out_dir", "save_dir", "o"), "--out")  # other programs' names
# Of baked weights: torch's names.
BAKED_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "float8_e4m3fn", "int8": "int8"}
NAMES = {EXPERT: "full expert", TEXT_ENCODER: "text encoder", VAE: "video autoencoder"}
Models = Mapping[str, Mapping[str, Shapes]]  # networks that files are judged by: shapes by task and expert
SHOWN_SETTINGS = ("steps", "solver", "shift", "timesteps", "guidance", "lora_steps", "guidance_steps", "sizes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted. Errors are one line on stderr."""

    def work() -> int:
        args = _build_parser().read(sys.argv[1:] if arguments is None else arguments)
        return int(args.command(args))

    return exit_code(work, "interrupted; the same command goes on where this one stopped")


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
    text = "precision of the weights: bf16 (default), fp32, fp8 or int8"
    add("--dtype", metavar="DTYPE", choices=tuple(BAKED_DTYPES), default="bf16", help=text)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    if not (path := located("inspect", args.path)).exists():
        raise LoraError(f"{path}: no such file or folder")
    files, uses = _examine_all(path, args)
    # the error describes the others
    blocks = [*(_text_of(file) for file in files if file["stored"] or file["release"]), *uses]
    shown = json.dumps(files, indent=2) if args.json else "\n\n".join(blocks)
    tell(sys.stdout, f"{shown}\n" if shown else "")
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
        "settings": settings and _settings_line(settings),
        "sizes": ", ".join(f"{width}*{height}" for width, height in settings.get("sizes", ())),
        **{name: report[name] for name in ("base", "note", "licence", "use")},
    }
    lines = [*rows.items(), *(("warning", warning) for warning in coverage.get("warnings", ()))]
    return "\n".join([report["path"], *(f"  {name:<10}{text}" for name, text in lines if text)])


def _examine_all(path: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Each file as plain data, and sentences on how a run takes the path as a whole.
    It is judged by the experts of --ckpt_dir, or its own, else by the released networks of --task or of all tasks."""
    ckpt_dir, tasks, alpha, hint = args.ckpt_dir, [args.task] if args.task else list(TASKS), args.lora_alpha, ""
    models: Models = _models_in(ckpt_dir or path)
    if ckpt_dir and not models:
        raise LoraError(f"--ckpt_dir {ckpt_dir} holds no expert of {' or '.join(TASKS)}")
    if not models or (not ckpt_dir and not models.keys() <= set(tasks)):
        models = {each: dict.fromkeys(TASKS[each].experts, released_shapes(each)) for each in tasks}
        hint = " (--ckpt_dir judges by a checkpoint of other sizes)"
    if (path / MODEL_INDEX).is_file():
        uses = [f"{path} is a checkpoint in diffusers' layout, for `diffusers.WanPipeline.from_pretrained`"]
        return [], uses + [f"and for {_command(each, ckpt_dir=path)}" for each in _models_in(path)]
    files, alone = [path], not path.is_dir() or (path / PEFT_CONFIG).is_file()
    if not alone:
        folders = dict.fromkeys(path / where for config in TASKS.values() for where in (".", *config.experts.values()))
        # each index for its shards, else every file
        files = [file for each in folders for file in sorted(each.glob(f"*{INDEX_SUFFIX}")) or weights_in(each)]
        files = [file for file in files if file.suffix.lower() not in PICKLED] or files
    if not files:
        raise LoraError(f"{path}: no safetensors or GGUF file in this folder")
    bases = dict.fromkeys(TASKS, ckpt_dir)
    reports = [_examine(file, models, hint, alpha) for file in files]
    misfit = hint and any(report["stored"] and report["error"] for report in reports)
    if misfit and (near := _models_near(path, files[0], tasks, alpha)):
        models = {task: own[task] for task, (_, own) in near.items()}
        again = [_examine(file, models, hint, alpha) for file in files]
        if not any(report["error"] for report in again):
            bases = {task: folder for task, (folder, _) in near.items()}
            reports = [r | {"base": ", ".join(dict.fromkeys(str(bases[task]) for task in r["fits"]))} for r in again]
    return reports, [] if alone else _uses(path, reports, bases)


def _models_near(path: Path, file: Path, tasks: Sequence[str], alpha: float | None) -> dict[str, tuple[Path, Models]]:
    """The nearest checkpoint around `path` that a file fits, with its models, by task."""
    found: dict[str, tuple[Path, Models]] = {}
    for folder in path.absolute().parents[:2]:
        with suppress(OSError):  # a folder that cannot be listed
            for each in (folder, *sorted(folder.iterdir())):
                with suppress(InputError, OSError):  # a damaged checkpoint is none
                    for task, experts in _models_in(each).items():
                        whole = task in tasks and experts.keys() == TASKS[task].experts.keys()
                        if whole and task not in found and not _examine(file, {task: experts}, "", alpha)["error"]:
                            found[task] = each, {task: experts}
    return found


def _models_in(ckpt_dir: Path) -> dict[str, dict[str, Shapes]]:
    """Shapes of the experts in a checkpoint folder, by task and expert: of a task that has all, else those found."""
    found = [(config, open_parts(ckpt_dir, config, config.experts)) for config in TASKS.values()]
    _, stores = max(found, key=lambda each: (len(each[1]) == len(each[0].experts), len(each[1])))
    kinds = dict.fromkeys(task_of(store.shapes) or "an unknown task" for store in stores.values())
    return {kind: {expert: store.shapes for expert, store in stores.items()} for kind in kinds}


def _command(task: str, **folders: Path | None) -> str:
    words = (word for flag, folder in folders.items() if folder for word in (f"--{flag}", str(folder)))
    return shlex.join(["python", "generate.py", "--task", task, *words])


def _examine(file: Path, models: Models, hint: str, alpha: float | None) -> dict[str, Any]:
    """All that header and name tell about one file. `error`: why it fits none of the models, else None."""
    release = recognise(file)
    report: dict[str, Any] = {
        "path": str(file), "kind": "LoRA",
        "release": release and release.name, "source": release and release.source,
        "settings": release and _settings_of(release),
        "note": (release and release.note) or caution(file) or "", "licence": (release and release.licence) or "",
        "base": "", "use": None, "stored": {}, "gigabytes": 0.0, "alphas": [], "fits": [], "coverage": None,
        "error": None,
    }  # fmt: skip
    try:
        if release:
            release.check_supported(str(file))
        if file.is_file() and (networks := kinds_in(store := open_file(file))):
            found = [_judge_network(file, kind, models) for kind in networks]  # several of a checkpoint in one file
            usable = [each for each in found if not each.get("error")]
            judged = (usable or found)[0] | {"kind": ", ".join(NAMES[kind] for kind in networks)}
            if usable:
                judged["use"] = " and ".join(each["use"] for each in usable if each["use"]) or None
                report["note"] = "; ".join(filter(None, [report["note"], *(each.get("error") for each in found)]))
        else:
            lora = Lora.open(file, default_alpha=alpha)
            if not lora.keys and not any(map(UNSUPPORTED.search, lora.store)):
                raise LoraError(f"{file}: holds neither an expert nor a text encoder nor a video autoencoder of Wan")
            store = lora.store
            judged = _judge_lora(file, models, alpha, release) | {"alphas": sorted(set(lora.alphas.values()))}
    except InputError as e:
        return report | {"error": "; ".join(e.problems)}
    if judged.get("error"):
        judged["error"] += hint
    kinds, sizes = zip(*map(store.stored, store), strict=True)
    stored = dict(sorted(Counter(kinds).items()))  # how many tensors are of which type
    return report | judged | {"stored": stored, "gigabytes": round(sum(sizes) / 1e9, 6)}


def _judge_lora(file: Path, models: Models, alpha: float | None, release: Release | None) -> dict[str, Any]:
    """The tasks that the LoRA fits and its coverage of the likeliest, as a run finds them: expert by expert."""
    named, errors, fits, report = named_expert(file), list[str](), list[str](), dict[str, Any]()
    for task, experts in sorted(models.items(), key=lambda item: not (release and item[0] in release.tasks)):
        chosen = [named] if named and named in experts else list(experts)
        try:
            found = {e: check(Lora.open(file, default_alpha=alpha, expert=e), experts[e]) for e in chosen}
        except LoraError as e:
            errors += e.problems
            continue
        fits.append(task)
        summary = "; ".join(f"{expert}: {coverage.summary()}" for expert, coverage in found.items())
        if len({coverage.summary() for coverage in found.values()}) == 1:
            summary = found[chosen[0]].summary()
        warnings = list(dict.fromkeys(warning for coverage in found.values() for warning in coverage.warnings))
        report = report or {"coverage": asdict(found[chosen[0]]) | {"warnings": warnings, "summary": summary}}
    if not fits:
        return {"error": errors[0]}
    return report | {"fits": fits, "use": shlex.join(["--lora", f"{named}={file}" if named else str(file)])}


def _judge_network(file: Path, kind: str, models: Models) -> dict[str, Any]:
    """The tasks that a file with one network's own weights fits, and its flags."""

    def belongs_to(task: str, expert: Shapes) -> bool:
        if kind == EXPERT:
            return open_expert(file).shapes == expert
        shapes = open_single(kind, file, TASKS.get(task, TASKS["t2v-A14B"])).weights.shapes
        if kind == TEXT_ENCODER:
            return shapes["token_embedding.weight"][1:] == expert["text_embedding.0.weight"][1:]
        return shapes["conv2.weight"][0] * math.prod(PATCH) == expert["head.head.weight"][0]

    fits, errors = list[str](), list[str]()
    for task, own in models.items():
        try:
            fits += [task] if any(belongs_to(task, expert) for expert in own.values()) else []
        except InputError as e:
            errors.append("; ".join(e.problems))
    if not fits:
        return {"error": next(iter(errors), f"{file}: names or shapes are not those of {' or '.join(models)}")}
    named = expert_of(file) or expert_of(file.absolute().parent)
    single = all(len(TASKS[task].experts) == 1 for task in fits if task in TASKS)
    experts = ["model"] if single else [named] if named else ["high", "low"]
    values = [f"{expert}={file}" for expert in experts] if kind == EXPERT else [str(file)]
    use = " or ".join(shlex.join([f"--{kind}", value]) for value in values)
    # the shards of a checkpoint are used through its folder
    return {"fits": fits, "use": None if file.name.endswith(INDEX_SUFFIX) else use}


def _uses(path: Path, reports: list[dict[str, Any]], bases: Mapping[str, Path | None]) -> list[str]:
    published = [preset(report["release"]).tasks if report["release"] else TASKS for report in reports]
    fitting = [set(report["fits"]).intersection(own) for report, own in zip(reports, published, strict=True)]
    tasks = [task for task in TASKS if all(task in fits for fits in fitting)]
    kinds, uses = {report["kind"] for report in reports}, list[str]()
    for task in tasks:  # of several kinds of files each one's report names its use
        experts = TASKS[task].experts
        if kinds == {"LoRA"}:
            with suppress(LoraError):  # no file for some expert: not a release of this task
                files_of(path, experts)
                uses.append(f"{path} is a release: {_command(task, ckpt_dir=bases[task], lora_dir=path)}")
        elif kinds == {NAMES[EXPERT]} and len(open_parts(path, TASKS[task], experts)) == len(experts):
            uses.append(f"{path} is a checkpoint: {_command(task, ckpt_dir=path)}")
    if kinds == {NAMES[EXPERT]} and (release := release_in(path)):
        uses.append(f"it is sampled as {release.name}: {_settings_line(_settings_of(release))}")
    return uses


def _settings_of(release: Release) -> dict[str, Any]:
    return {name: value for name in SHOWN_SETTINGS if (value := getattr(release, name)) is not None}


def _settings_line(settings: dict[str, Any]) -> str:
    """Settings, without the sizes, as one line; a slash between the numbers of a pair."""
    numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in settings.items()}
    numbers.pop("sizes", None)
    texts = {name: [n if isinstance(n, str) else f"{n:g}" for n in several] for name, several in numbers.items()}
    return ", ".join(f"{name} {'/'.join(several)}" for name, several in texts.items())


def _bake(args: argparse.Namespace) -> int:
    import torch

    from lightning.bake import Bake

    chosen = choose_loras(TASKS[args.task].experts.keys(), args.lora_dir, args.lora_strength, args.lora)
    loras: dict[str, list[Lora]] = {expert: [] for expert in TASKS[args.task].experts}
    for choice in chosen.loras:
        with chosen.noting():
            path = fetch(choice.path)
            loras[choice.expert].append(Lora.open(path, choice.strength, args.lora_alpha, choice.expert))
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
        with chosen.noting():
            changes["guidance"] = pair("--sample_guide_scale", args.sample_guide_scale)
            numbers += [("guide_scale", scale, 0, 100) for scale in {*changes["guidance"]}]
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
