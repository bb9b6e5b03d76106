"""Describe files and folders of weights, and how a run takes them, from names and headers alone."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.lora import Lora, check
from lightning.lora_files import PEFT_CONFIG, expert_of, files_of, named_expert, weights_in
from lightning.lora_matching import Shapes
from lightning.releases import Release, preset, recognise, record_of, release_in
from wan.checkpoints.checkpoint import open_single
from wan.checkpoints.layout import MODEL_INDEX
from wan.checkpoints.safetensors_file import INDEX_SUFFIX
from wan.checkpoints.weights import EXPERT, PICKLED, TEXT_ENCODER, VAE, kind_of, open_expert, open_file, open_parts
from wan.configs import TASKS, task_of
from wan.configs.task import PATCH
from wan.modules.model import released_shapes
from wan.utils.errors import InputError, LoraError

NAMES = {EXPERT: "full expert", TEXT_ENCODER: "text encoder", VAE: "video autoencoder"}
Models = Mapping[str, Mapping[str, Shapes]]  # networks that files are judged by: shapes by task and expert
SHOWN_SETTINGS = ("steps", "solver", "shift", "timesteps", "guidance", "lora_steps", "guidance_steps", "sizes")


def inspect_path(
    path: Path, task: str | None, ckpt_dir: Path | None, alpha: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Each file as plain data, and sentences on how a run takes the path as a whole.

    path: a file, a folder of files, one that PEFT saved, or a whole checkpoint. InputError if it is none of these.
    It is judged by the experts of `ckpt_dir`, without one by the released networks of the task, or of all.
    """
    tasks, models, hint = [task] if task else list(TASKS), _models_in(ckpt_dir or path), ""
    if ckpt_dir and not models:
        raise LoraError(f"--ckpt_dir {ckpt_dir} holds no expert of {' or '.join(TASKS)}")
    if not models or (not ckpt_dir and not models.keys() <= set(tasks)):  # a checkpoint has its own sizes
        models = {each: dict.fromkeys(TASKS[each].experts, released_shapes(each)) for each in tasks}
        hint = " (--ckpt_dir judges by a checkpoint of other sizes)"
    if (path / MODEL_INDEX).is_file():
        uses = [f"{path} is a checkpoint in diffusers' layout, for `diffusers.WanPipeline.from_pretrained`"]
        return [], uses + [f"and for {_command(each, '--ckpt_dir', path)}" for each in _models_in(path)]
    if not path.is_dir() or (path / PEFT_CONFIG).is_file():
        return [_examine(path, models, hint, alpha)], []
    folders = dict.fromkeys(path / where for config in TASKS.values() for where in (".", *config.experts.values()))
    # each index for its shards, else every file
    files = [file for each in folders for file in sorted(each.glob(f"*{INDEX_SUFFIX}")) or weights_in(each)]
    files = [file for file in files if file.suffix.lower() not in PICKLED] or files
    if not files:
        raise LoraError(f"{path}: no safetensors or GGUF file in this folder")
    reports = [_examine(file, models, hint, alpha) for file in files]
    return reports, _uses(path, reports)


def _models_in(ckpt_dir: Path) -> dict[str, dict[str, Shapes]]:
    """Shapes of the experts in a checkpoint folder, by task and expert: of a task that has all, else what is there."""
    found = [(config, open_parts(ckpt_dir, config, config.experts)) for config in TASKS.values()]
    _, stores = max(found, key=lambda each: (len(each[1]) == len(each[0].experts), len(each[1])))
    kinds = dict.fromkeys(task_of(store.shapes) or "an unknown task" for store in stores.values())
    return {kind: {expert: store.shapes for expert, store in stores.items()} for kind in kinds}


def _command(task: str | None, *words: object) -> str:
    return shlex.join(["generate.py", "--task", str(task), *map(str, words)])


def _examine(file: Path, models: Models, hint: str, alpha: float | None) -> dict[str, Any]:
    """All that header and name tell about one file. `error`: why it fits none of the models, else None."""
    release = recognise(file)
    report: dict[str, Any] = {
        "path": str(file), "kind": "LoRA",
        "release": release and release.name, "source": release and release.source,
        "settings": release and release_settings(release),
        "note": (release and release.note) or "", "licence": (release and release.licence) or "",
        "use": None, "stored": {}, "gigabytes": 0.0, "alphas": [], "fits": [], "coverage": None, "error": None,
    }  # fmt: skip
    try:
        if release:
            release.check_supported(str(file))
        if file.is_file() and (kind := kind_of(store := open_file(file))):
            judged = _judge_network(file, kind, models) | {"kind": NAMES[kind]}
        else:
            lora = Lora.open(file, default_alpha=alpha)
            if not lora.keys:
                raise LoraError(f"{file}: holds neither an expert nor a text encoder nor a video autoencoder of Wan")
            store = lora.store
            judged = _judge_lora(file, models, alpha, release) | {"alphas": sorted(set(lora.alphas.values()))}
    except InputError as e:
        return report | {"error": "; ".join(e.problems)}
    if judged.get("error"):
        judged["error"] += hint
    stored = Counter(store.stored(name)[0] for name in store)  # how many tensors are of which type
    gigabytes = round(sum(store.stored(name)[1] for name in store) / 1e9, 6)
    return report | judged | {"stored": dict(sorted(stored.items())), "gigabytes": gigabytes}


def _judge_lora(file: Path, models: Models, alpha: float | None, release: Release | None) -> dict[str, Any]:
    """The tasks that the LoRA fits and its coverage of the likeliest, as a run finds them: expert by expert."""
    named, errors, fits, report = named_expert(file), list[str](), list[str](), dict[str, Any]()
    likely = release.tasks if release else ()
    for task, experts in sorted(models.items(), key=lambda item: item[0] not in likely):
        chosen = [named] if named and named in experts else list(experts)
        try:
            found = {e: check(Lora.open(file, default_alpha=alpha, expert=e), experts[e]) for e in chosen}
        except LoraError as e:
            errors += e.problems
            continue
        fits.append(task)
        summaries = {expert: coverage.summary() for expert, coverage in found.items()}
        one = summaries[chosen[0]] if len(set(summaries.values())) == 1 else None
        summary = one or "; ".join(f"{expert}: {text}" for expert, text in summaries.items())
        warnings = list(dict.fromkeys(warning for coverage in found.values() for warning in coverage.warnings))
        report = report or {"coverage": asdict(found[chosen[0]]) | {"warnings": warnings, "summary": summary}}
    if not fits:
        return {"error": errors[0]}
    return report | {"fits": fits, "use": shlex.join(["--lora", f"{named}={file}" if named else str(file)])}


def _judge_network(file: Path, kind: str, models: Models) -> dict[str, Any]:
    """The tasks that a file with one network's own weights fits, and its flags."""
    opened = open_expert(file) if kind == EXPERT else open_single(kind, file, next(iter(TASKS.values()))).weights
    shapes = opened.shapes

    def belongs_to(expert: Shapes) -> bool:
        """Whether it is that expert, or goes with it: the same text width, the same channels."""
        if kind == TEXT_ENCODER:
            return shapes["token_embedding.weight"][1:] == expert["text_embedding.0.weight"][1:]
        if kind == VAE:
            return shapes["conv2.weight"][0] * math.prod(PATCH) == expert["head.head.weight"][0]
        return shapes == expert

    fits = [task for task, experts in models.items() if any(map(belongs_to, experts.values()))]
    if not fits:
        return {"error": f"{file}: names or shapes are not those of {' or '.join(models)}"}
    named = expert_of(file) or expert_of(file.absolute().parent)
    single = all(list(models[task]) == ["model"] for task in fits)
    uses = [f"{expert}={file}" for expert in (["model"] if single else [named] if named else ["high", "low"])]
    uses = [shlex.join(["--expert", use]) for use in uses] if kind == EXPERT else [shlex.join([f"--{kind}", str(file)])]
    # the shards of a checkpoint are used through its folder
    return {"fits": fits, "use": None if file.name.endswith(INDEX_SUFFIX) else " or ".join(uses)}


def _uses(path: Path, reports: list[dict[str, Any]]) -> list[str]:
    """Sentences on how a run takes the whole folder."""
    published = [preset(report["release"]).tasks if report["release"] else TASKS for report in reports]
    fitting = [set(report["fits"]).intersection(own) for report, own in zip(reports, published, strict=True)]
    tasks = [task for task in TASKS if all(task in fits for fits in fitting)]
    kinds = {report["kind"] for report in reports}
    if kinds == {"LoRA"}:
        uses = []
        for task in tasks:
            with suppress(LoraError):  # no file for some expert: not a release of this task
                files_of(path, TASKS[task].experts)
                uses.append(f"{path} is a release: {_command(task, '--lora_dir', path)}")
        return uses
    if "LoRA" in kinds:
        return []  # each file's own report names its use
    experts = {task: TASKS[task].experts for task in tasks}
    whole = [task for task in tasks if len(open_parts(path, TASKS[task], experts[task])) == len(experts[task])]
    if kinds != {NAMES[EXPERT]} or not whole:
        return []
    uses = [f"{path} is a checkpoint: {_command(task, '--ckpt_dir', path)}" for task in whole]
    if record := record_of(path):
        merged = sorted({lora["path"] for loras in record["loras"].values() for lora in loras})
        uses.append(f"merged into it: {', '.join(merged)}")
    if release := release_in(path):
        uses.append(f"it is sampled as {release.name}: {settings_line(release_settings(release))}")
    return uses


def release_settings(release: Release) -> dict[str, Any]:
    """The settings that a release is sampled with, by name."""
    return {name: value for name in SHOWN_SETTINGS if (value := getattr(release, name)) is not None}


def settings_line(settings: dict[str, Any]) -> str:
    """Settings, without the sizes, as one line; a slash between the numbers of a pair."""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return "/".join(map(text, value))
        return value if isinstance(value, str) else f"{value:g}"

    return ", ".join(f"{name} {text(value)}" for name, value in settings.items() if name != "sizes")
