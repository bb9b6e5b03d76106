"""Describe files and folders of weights, and how a run takes them, from names and headers alone."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.distilled import record_of, release_in
from lightning.lora import Lora, check
from lightning.lora_files import PEFT_CONFIG, expert_of, files_of
from lightning.releases import Release, preset, recognise
from wan.checkpoints.layout import MODEL_INDEX
from wan.checkpoints.safetensors_file import INDEX_SUFFIX, TensorStore
from wan.checkpoints.weights import (
    EXPERT,
    GGUF,
    PICKLED,
    TEXT_ENCODER,
    VAE,
    as_ours,
    kinds_in,
    open_expert,
    open_file,
    open_parts,
)
from wan.configs import TASKS, task_of
from wan.configs.task import PATCH
from wan.modules.released import released_shapes
from wan.utils.errors import InputError, LoraError

Shapes = dict[str, tuple[int, ...]]
NAMES = {EXPERT: "full expert", TEXT_ENCODER: "text encoder", VAE: "video autoencoder"}
SETTINGS = ("steps", "solver", "shift", "timesteps", "guidance", "lora_steps", "guidance_steps", "sizes")


@dataclass(frozen=True)
class Model:
    """A network that files are judged by: one expert, or all experts of a task where they are alike (None)."""

    task: str
    expert: str | None
    shapes: Shapes


@dataclass(frozen=True)
class Report:
    """files: each file as plain data. uses: sentences on what the path as a whole is good for."""

    files: list[dict[str, Any]]
    uses: list[str]


def models_to_judge_by(task: str | None, ckpt_dir: Path | None) -> list[Model]:
    """The released networks of the task or of all, or the experts of a checkpoint. LoraError if that holds none."""
    if ckpt_dir is None:
        return [Model(task, None, released_shapes(task)) for task in ([task] if task else TASKS)]
    if not (stores := experts_in(ckpt_dir)):
        raise LoraError(f"--ckpt_dir {ckpt_dir} holds no expert of {' or '.join(TASKS)}")
    kind = task or task_of(next(iter(stores.values())).shapes) or "an unknown task"
    return [Model(kind, expert, store.shapes) for expert, store in stores.items()]


def experts_in(ckpt_dir: Path) -> dict[str, TensorStore]:
    """The experts of a checkpoint folder under our names: all of the first task that has all, else what is there."""
    found = [(config, open_parts(ckpt_dir, config, config.experts)) for config in TASKS.values()]
    whole = (experts for config, experts in found if len(experts) == len(config.experts))
    return next(whole, None) or max((experts for _, experts in found), key=len)


def examine(path: Path, models: list[Model], alpha: float | None = None) -> Report:
    """A file, a folder of files, one that PEFT saved, or a whole checkpoint. InputError if it is none of these."""
    if (path / MODEL_INDEX).is_file():
        uses = [f"{path} is a checkpoint in diffusers' layout, for `diffusers.WanPipeline.from_pretrained`"]
        tasks = dict.fromkeys(task_of(store.shapes) for store in experts_in(path).values())
        return Report([], uses + [f"and for generate.py --task {task} --ckpt_dir {path}" for task in tasks if task])
    files = [path]
    if path.is_dir() and not (path / PEFT_CONFIG).is_file():
        folders = dict.fromkeys(path / where for config in TASKS.values() for where in (".", *config.experts.values()))
        files = [file for folder in folders for file in _weights_in(folder)]
        if not files:
            raise LoraError(f"{path}: no safetensors or GGUF file in this folder")
    reports = [_examine(file, models, alpha) for file in files]
    return Report(reports, _uses(path, reports))


def _weights_in(folder: Path) -> list[Path]:
    """Each index for its shards, else every file."""
    return sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted([*folder.glob("*.safetensors"), *folder.glob(f"*{GGUF}")])


def _examine(file: Path, models: list[Model], alpha: float | None) -> dict[str, Any]:
    """All that header and name tell about one file. `error`: why it fits none of the models, else None."""
    release = recognise(file)
    report: dict[str, Any] = {
        "path": str(file),
        "kind": "LoRA",
        "release": release.name if release else None,
        "source": release.source if release else None,
        "settings": settings_of(release) if release else None,
        "note": release.note if release else "",
        "licence": release.licence if release else "",
        "use": None,
        "stored": {},
        "gigabytes": 0.0,
        "alphas": [],
        "fits": [],
        "coverage": None,
        "error": None,
    }
    try:
        if release:
            release.check_supported(str(file))
        if file.is_file() and (kinds := kinds_in(store := open_file(file))):
            return report | _examine_network(file, store, kinds[0], models)
        if file.suffix in (GGUF, *PICKLED):
            raise LoraError(f"{file}: holds neither an expert nor a text encoder nor a video autoencoder of Wan")
        lora = Lora.open(file, default_alpha=alpha)
    except InputError as e:
        return report | {"error": "; ".join(e.problems)}
    report |= {"alphas": sorted(set(lora.alphas.values())), **_storage(lora.store)}
    errors: list[str] = []
    named = expert_of(file)
    judged_by = [model for model in models if model.expert in (None, "model", named) or named is None]
    for model in sorted(judged_by, key=lambda model: model.task not in (release.tasks if release else ())):
        try:
            coverage = check(lora, model.shapes, expert=named)
        except LoraError as e:
            errors += e.problems
            continue
        report["fits"] += [model.task] if model.task not in report["fits"] else []
        report["coverage"] = report["coverage"] or {**coverage.as_dict(), "summary": coverage.summary()}
    if not report["fits"]:
        return report | {"error": errors[0] + _hint(models)}
    return report | {"use": f"--lora {'' if named is None else f'{named}='}{file}"}


def _examine_network(file: Path, raw: TensorStore, kind: str, models: list[Model]) -> dict[str, Any]:
    """Report on a file that holds one network's own weights."""
    shapes = (open_expert(file) if kind == EXPERT else as_ours(raw, kind, str(file))).shapes
    found: dict[str, Any] = {"kind": NAMES[kind], **_storage(raw), "use": None, "error": None}
    found["fits"] = list(dict.fromkeys(model.task for model in models if _belongs(kind, shapes, model.shapes)))
    if not found["fits"]:
        judged = " or ".join(dict.fromkeys(model.task for model in models))
        found["error"] = f"{file}: names or shapes are not those of {judged}{_hint(models)}"
    elif not file.name.endswith(INDEX_SUFFIX):  # the shards of a checkpoint are used through its folder
        named = expert_of(file) or expert_of(file.absolute().parent) or "high (or low)"
        single = all(list(TASKS[task].experts) == ["model"] for task in found["fits"] if task in TASKS)
        found["use"] = f"--expert {'model' if single else named}={file}" if kind == EXPERT else f"--{kind} {file}"
    return found


def _belongs(kind: str, shapes: Shapes, expert: Shapes) -> bool:
    """Whether a network of these shapes is that expert's, or goes with it: the same text width, the same channels."""
    if kind == TEXT_ENCODER:
        return shapes.get("token_embedding.weight", (0, 0))[1:] == expert["text_embedding.0.weight"][1:]
    if kind == VAE:
        return shapes.get("conv2.weight", (0,))[0] * math.prod(PATCH) == expert["head.head.weight"][0]
    return shapes == expert


def _hint(models: list[Model]) -> str:
    return "" if any(model.expert for model in models) else " (--ckpt_dir judges by a checkpoint of other sizes)"


def _uses(path: Path, reports: list[dict[str, Any]]) -> list[str]:
    """Sentences on how a run takes the whole folder."""
    if not path.is_dir() or (path / PEFT_CONFIG).is_file():
        return []
    published = [preset(report["release"]).tasks if report["release"] else TASKS for report in reports]
    fitting = [set(report["fits"]).intersection(own) for report, own in zip(reports, published, strict=True)]
    tasks = [task for task in TASKS if fitting and all(task in fits for fits in fitting)]
    kinds = {report["kind"] for report in reports}
    if "LoRA" in kinds and len(kinds) > 1:
        return []  # each file's own report names its use
    whole = [task for task in tasks if all(_weights_in(path / where) for where in TASKS[task].experts.values())]
    if kinds == {NAMES[EXPERT]} and whole:
        uses = [f"{path} is a checkpoint: generate.py --task {task} --ckpt_dir {path}" for task in whole]
        if record := record_of(path):
            merged = sorted({lora["path"] for loras in record["loras"].values() for lora in loras})
            uses.append(f"merged into it: {', '.join(merged)}")
        if release := release_in(path):
            uses.append(f"it is sampled as {release.name}: {settings_line(settings_of(release))}")
        return uses
    if "LoRA" not in kinds:
        return _as_files(path, tasks, reports)
    uses = []
    for task in tasks:
        with suppress(LoraError):
            files_of(path, TASKS[task].experts)
            uses.append(f"{path} is a release: generate.py --task {task} --lora_dir {path}")
    return uses


def _as_files(path: Path, tasks: list[str], reports: list[dict[str, Any]]) -> list[str]:
    """For each task the command that takes the single files, where they are all its experts, each once."""
    uses = [report["use"] for report in reports if report["use"]]
    flags = [report["use"].removesuffix(report["path"]) for report in reports if report["use"]]
    lines = []
    for task in tasks:
        needed = {f"--expert {expert}=" for expert in TASKS[task].experts}
        others = set(flags) - needed
        if needed <= set(flags) and others <= {"--vae ", "--text_encoder "} and len(set(flags)) == len(flags):
            rest = "--tokenizer DIR" if len(others) == 2 else "--ckpt_dir DIR"
            lines.append(f"{path} holds weights in single files: generate.py --task {task} {' '.join(uses)} {rest}")
    return lines


def _storage(store: TensorStore) -> dict[str, Any]:
    """stored: how many tensors are of which type."""
    kinds = Counter(store.stored_as(name) for name in store)
    size = sum(store.stored_bytes(name) for name in store)
    return {"stored": dict(sorted(kinds.items())), "gigabytes": round(size / 1e9, 6)}


def settings_of(release: Release) -> dict[str, Any]:
    """The settings that a release is sampled with, by name."""
    return {name: value for name, value in asdict(release).items() if name in SETTINGS and value is not None}


def settings_line(settings: dict[str, Any]) -> str:
    """Settings, without the sizes, as one line; a slash between the numbers of a pair."""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return "/".join(map(text, value))
        return value if isinstance(value, str) else f"{value:g}"

    return ", ".join(f"{name} {text(settings[name])}" for name in SETTINGS if name in settings and name != "sizes")
