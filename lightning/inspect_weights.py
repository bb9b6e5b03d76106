"""What files and folders of weights are, and what can be done with them, from names and headers, without torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.distilled import record_of, release_in
from lightning.lora import Lora, check, expert_of, files_of
from lightning.peft_settings import PEFT_CONFIG
from lightning.releases import Release, preset, recognise
from wan.checkpoints.layout import WEIGHTS, is_diffusers
from wan.checkpoints.safetensors_file import INDEX_SUFFIX, TensorStore
from wan.checkpoints.weights import (
    EXPERT,
    GGUF,
    PICKLED,
    TEXT_ENCODER,
    VAE,
    as_ours,
    kind_of,
    open_expert,
    open_file,
    open_part,
)
from wan.configs import TASKS, task_of
from wan.configs.task import PATCH
from wan.modules.released import released_shapes
from wan.utils.errors import InputError, LoraError

Shapes = dict[str, tuple[int, ...]]
SAID = {EXPERT: "full expert", TEXT_ENCODER: "text encoder", VAE: "video autoencoder"}


@dataclass(frozen=True)
class Model:
    """What a file is judged by: the parameters of one expert, or of all that are alike (expert None)."""

    task: str
    expert: str | None
    shapes: Shapes


@dataclass(frozen=True)
class Report:
    """files: what each is, as plain data. uses: sentences about what the path as a whole is good for."""

    files: list[dict[str, Any]]
    uses: list[str]


def models_to_judge_by(task: str | None, ckpt_dir: Path | None) -> list[Model]:
    """The released networks of the task or of all, or the experts of a checkpoint. LoraError if that holds none."""
    if ckpt_dir is None:
        return [Model(task, None, released_shapes(task)) for task in ([task] if task else TASKS)]
    if not (stores := experts_in(ckpt_dir)):
        raise LoraError(f"--ckpt_dir {ckpt_dir} holds no weights of an expert ({WEIGHTS}, or its index and shards)")
    kind = task or task_of(next(iter(stores.values())).shapes) or "an unknown task"
    return [Model(kind, expert, store.shapes) for expert, store in stores.items()]


def experts_in(ckpt_dir: Path) -> dict[str, TensorStore]:
    """The experts of a checkpoint folder, as released or in diffusers' layout, under our names; what is there."""
    most: dict[str, TensorStore] = {}
    for config in TASKS.values():
        opened = {expert: open_part(ckpt_dir, config, expert) for expert in config.experts}
        found = {expert: store for expert, store in opened.items() if store}
        if len(found) == len(opened):
            return found
        most = most or found
    return most


def examine(path: Path, models: list[Model], alpha: float | None = None) -> Report:
    """A file, a folder of files, one that PEFT saved, or a whole checkpoint. InputError if it is none of these."""
    if is_diffusers(path):
        said = f"{path} is a checkpoint in diffusers' layout, for `diffusers.WanPipeline.from_pretrained`"
        shapes = [store.shapes for store in experts_in(path).values()]
        tasks = dict.fromkeys(task for task in map(task_of, shapes) if task)
        return Report([], [said, *(f"and for generate.py --task {task} --ckpt_dir {path}" for task in tasks)])
    files = [path]
    if path.is_dir() and not (path / PEFT_CONFIG).is_file():
        folders = [path, *(path / where for where in ("high_noise_model", "low_noise_model"))]
        files = [file for folder in folders for file in _weights_in(folder)]
        if not files:
            raise LoraError(f"{path}: no safetensors or GGUF file in this folder")
    reports = [_examine(file, models, alpha) for file in files]
    return Report(reports, _uses(path, reports))


def _weights_in(folder: Path) -> list[Path]:
    """Each index for its shards, else every file."""
    return sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted([*folder.glob("*.safetensors"), *folder.glob(f"*{GGUF}")])


def _examine(file: Path, models: list[Model], alpha: float | None) -> dict[str, Any]:
    """Everything the header and the name tell about one file. `error`: why it fits none of the models, else None."""
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
        if file.is_file() and (kind := kind_of(store := open_file(file))):
            return report | _examine_network(file, store, kind, models)
        if file.suffix in (GGUF, *PICKLED):
            raise LoraError(f"{file}: holds neither an expert nor a text encoder nor a video autoencoder of Wan")
        lora = Lora.open(file, default_alpha=alpha)
    except InputError as e:
        return report | {"error": "; ".join(e.problems)}
    report |= {"alphas": sorted(set(lora.alphas.values())), **_storage(lora.store)}
    errors: list[str] = []
    named = expert_of(file.name)
    judged_by = [model for model in models if model.expert in (None, "model", named) or named is None]
    for model in _likely_first(judged_by, release):
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
    """What is told of a file that holds one network's own weights."""
    shapes = (open_expert(file) if kind == EXPERT else as_ours(raw, kind, str(file))).shapes
    found: dict[str, Any] = {"kind": SAID[kind], **_storage(raw), "use": None, "error": None}
    found["fits"] = list(dict.fromkeys(model.task for model in models if _belongs(kind, shapes, model.shapes)))
    if not found["fits"]:
        judged = " or ".join(dict.fromkeys(model.task for model in models))
        found["error"] = f"{file}: names or shapes are not those of {judged}{_hint(models)}"
    elif not file.name.endswith(INDEX_SUFFIX):  # the shards of a checkpoint are used through its folder
        found["use"] = f"--expert {_expert_said(file, found['fits'])}" if kind == EXPERT else f"--{kind}"
        found["use"] += f"{'=' if kind == EXPERT else ' '}{file}"
    return found


def _belongs(kind: str, shapes: Shapes, expert: Shapes) -> bool:
    """Whether a network of these shapes is that expert's, or goes with it: the same text width, the same channels."""
    if kind == TEXT_ENCODER:
        return shapes.get("token_embedding.weight", (0, 0))[1:] == expert["text_embedding.0.weight"][1:]
    if kind == VAE:
        return shapes.get("conv2.weight", (0,))[0] * math.prod(PATCH) == expert["head.head.weight"][0]
    return shapes == expert


def _expert_said(file: Path, fits: list[str]) -> str:
    if fits == ["ti2v-5B"]:
        return "model"
    return expert_of(file.name) or expert_of(file.absolute().parent.name) or "high (or low)"


def _hint(models: list[Model]) -> str:
    return "" if any(model.expert for model in models) else " (--ckpt_dir judges by a checkpoint of other sizes)"


def _uses(path: Path, reports: list[dict[str, Any]]) -> list[str]:
    """What a whole folder can be given as."""
    if not path.is_dir() or (path / PEFT_CONFIG).is_file():
        return []
    fitting = [
        set(report["fits"]).intersection(preset(report["release"]).tasks if report["release"] else TASKS)
        for report in reports
    ]
    tasks = [task for task in TASKS if fitting and all(task in fits for fits in fitting)]
    kinds = {report["kind"] for report in reports}
    if "LoRA" in kinds and len(kinds) > 1:
        return []  # what each file is good for stands beside it
    if kinds == {SAID[EXPERT]} and (whole := _whole(path, tasks)):
        said = [f"{path} is a checkpoint: generate.py --task {task} --ckpt_dir {path}" for task in whole]
        if record := record_of(path):
            merged = sorted({lora["path"] for loras in record["loras"].values() for lora in loras})
            said += [f"merged into it: {', '.join(merged)}"]
        if release := release_in(path):
            said += [f"it is sampled as {release.name}: {_plain_settings(release)}"]
        return said
    if "LoRA" not in kinds:
        return _as_files(path, tasks, reports)
    said = []
    for task in tasks:
        try:
            files_of(path, TASKS[task].experts)
        except LoraError:
            continue
        said.append(f"{path} is a release: generate.py --task {task} --lora_dir {path}")
    return said


def _as_files(path: Path, tasks: list[str], reports: list[dict[str, Any]]) -> list[str]:
    """For each task the command that takes the single files, where they are all its experts, each once."""
    uses = [report["use"] for report in reports if report["use"]]
    flags = [report["use"].removesuffix(report["path"]) for report in reports if report["use"]]
    said = []
    for task in tasks:
        needed = {f"--expert {expert}=" for expert in TASKS[task].experts}
        others = set(flags) - needed
        if needed <= set(flags) and others <= {"--vae ", "--text_encoder "} and len(set(flags)) == len(flags):
            rest = "--tokenizer DIR" if len(others) == 2 else "--ckpt_dir DIR"
            said.append(f"{path} holds weights in single files: generate.py --task {task} {' '.join(uses)} {rest}")
    return said


def _whole(path: Path, tasks: list[str]) -> list[str]:
    """The tasks that have all their experts here."""
    return [task for task in tasks if all(_weights_in(path / where) for where in TASKS[task].experts.values())]


def _plain_settings(release: Release) -> str:
    given = settings_of(release).items()
    return ", ".join(f"{name} {plain(value)}" for name, value in given if name != "sizes")


def _storage(store: TensorStore) -> dict[str, Any]:
    """stored: how many tensors are of which type."""
    kinds = Counter(store.stored_as(name) for name in store)
    size = sum(store.stored_bytes(name) for name in store)
    return {"stored": dict(sorted(kinds.items())), "gigabytes": round(size / 1e9, 6)}


def _likely_first(models: list[Model], release: Release | None) -> list[Model]:
    """The release's own tasks before the others, so that the report is about what the file was made for."""
    return sorted(models, key=lambda model: model.task not in (release.tasks if release else ()))


def settings_of(release: Release) -> dict[str, Any]:
    """What it is sampled with, by name."""
    fields = ("steps", "solver", "shift", "timesteps", "guidance", "lora_steps", "guidance_steps", "sizes")
    return {name: value for name in fields if (value := getattr(release, name)) is not None}


def plain(value: Any) -> str:
    """A setting for a reader: pairs with a slash between."""
    if isinstance(value, tuple):
        return "/".join(plain(v) for v in value)
    return value if isinstance(value, str) else f"{value:g}"
