"""Write a checkpoint with its LoRAs merged in, in the released layout or diffusers': a start reads half the bytes.

Every tensor is stored as a bf16 run keeps it (bf16, or float32 for the few that stay in it; in fp8, with a scale for
each row, what a run with `--quantize fp8` has so), so that running the baked folder equals merging on the fly, tensor
for tensor. All is written into `OUT.partial`, which becomes `OUT` by one rename at the end: a run that was stopped
leaves nothing under that name, and the next one finishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lightning.diffusers_export import rest_of, settings_of
from lightning.distilled import RECORD, distilled_twice, record_of, release_in, release_record
from lightning.lora import Lora, check
from lightning.merge import Merge
from lightning.releases import Release
from wan.checkpoints.key_mapping import diffusers_name
from wan.checkpoints.layout import FOLDERS, STEM, is_diffusers, tokenizer_of
from wan.checkpoints.safetensors_file import INDEX_SUFFIX, TensorStore, fingerprint, read_header
from wan.checkpoints.weights import EXPERT, FLOATS, as_ours, open_network
from wan.checkpoints.writer import Network, plan_shards, replacing, sha256, write_index, write_json, write_shard
from wan.configs import TASKS, task_of
from wan.configs.precision import keeps_float32, takes_fp8
from wan.modules.quantize import FP8
from wan.utils.errors import LoraError
from wan.utils.strict_json import parse_json

SHARD_BYTES = 10_000_000_000


def bake(
    task: str,
    ckpt_dir: Path,
    loras: Mapping[str, Sequence[Lora]],
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    allow_partial: bool = False,
    release: Release | None = None,
    layout: str = "released",
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = print,
) -> None:
    """Merge `loras` (by expert) into the checkpoint of `task` in `ckpt_dir`; the result is the folder `out`.

    release: the settings that the result is sampled with, kept in its record; by default those of `ckpt_dir`'s own.
    layout: "released", or "diffusers", which is also written without LoRAs.
    Everything is checked before anything is written, and all that is wrong is told: InputError.
    """
    _check_places(ckpt_dir, out)
    if layout == "released" and is_diffusers(ckpt_dir):
        raise LoraError(f"--ckpt_dir {ckpt_dir} is in diffusers' layout, and so is its result: give --layout diffusers")
    if layout == "released" and dtype != FP8 and not any(loras.values()):
        raise LoraError("nothing to bake: give --lora_dir or --lora")
    if layout == "diffusers" and dtype == FP8:
        raise LoraError("--dtype fp8: diffusers does not read scales of rows; take the released layout, or bf16")
    stores = _open_experts(task, ckpt_dir)
    sources = _sources(task, ckpt_dir, stores, loras, dtype, allow_partial, report)
    sources["layout"] = layout
    made_for = release or release_in(ckpt_dir)
    sources["release"] = release_record(made_for)
    networks = _networks(ckpt_dir, task, stores, loras, dtype, layout)
    settings = settings_of(networks, task, made_for) if layout == "diffusers" else {}
    if settings and made_for and made_for.solver == "dmd":
        report(
            f"warning: {made_for.name} is made for re-noising (dmd), which diffusers has no scheduler for: the "
            "folder's is an Euler-like one, another sampler; generate.py samples the folder as it is made for"
        )
    with _locked(out):
        partial = _prepare(out, sources)
        digests = _write(networks, partial, shard_bytes, report)
        if layout == "released":
            _bring_others(ckpt_dir, partial, task)
        else:
            shutil.copytree(tokenizer_of(ckpt_dir), partial / "tokenizer", dirs_exist_ok=True)
        for place, content in settings.items():
            write_json(partial / place, content)
        write_json(partial / RECORD, {**sources, "shards": digests})
        os.replace(partial, out)
    report(f"baked: {out}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Context manager: this process alone writes `out`. LoraError while another one does, or if it has."""
    lock = FileLock(out.with_name(f"{out.name}.partial.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise LoraError(f"--out {out}: another bake is writing it; wait for it, or give another name") from None
    try:
        if out.exists():
            raise LoraError(f"--out {out} already exists; give another name or remove it")
        yield
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()  # only now: a bake that comes later finds `out`
    finally:
        lock.release()


def _write(
    networks: Sequence[Network], partial: Path, shard_bytes: int, report: Callable[[str], None]
) -> dict[str, str]:
    """Write all weights into `partial`; the sha256 of each file, by its place. LoraError if the disk is too full."""
    plans = [(network, plan_shards(network, shard_bytes)) for network in networks]
    needed = sum(shard.bytes for _, plan in plans for shard in plan if not (partial / shard.file).exists())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise LoraError(f"--out needs {needed / 1e9:.1f} GB, the disk of {partial.parent} has {free / 1e9:.1f} GB free")
    digests = {}
    for network, plan in plans:
        for shard in plan:
            report(f"{network.name}: {shard.file} ({shard.bytes / 1e9:.2f} GB)")
            digests[str(shard.file)] = write_shard(partial / shard.file, shard, network)
        write_index(partial, network, plan)
    return digests


def _networks(
    ckpt_dir: Path,
    task: str,
    stores: Mapping[str, TensorStore],
    loras: Mapping[str, Sequence[Lora]],
    dtype: torch.dtype,
    layout: str,
) -> list[Network]:
    """The networks whose weights are written: the experts, and in diffusers' layout the others too."""
    networks = []
    for expert, store in stores.items():
        blocks = 1 + max((int(name.split(".")[1]) for name in store if name.startswith("blocks.")), default=0)

        def stored(name: str, blocks: int = blocks) -> torch.dtype:
            if keeps_float32(name):
                return torch.float32
            return dtype if dtype != FP8 or takes_fp8(name, blocks) else torch.bfloat16

        merge = Merge(loras.get(expert, ()), store.shapes)
        if layout == "released":
            networks.append(Network(expert, store, Path(TASKS[task].experts[expert]), stored, change=merge))
        else:
            folder = Path(FOLDERS[expert])
            networks.append(Network(expert, store, folder, stored, rename=diffusers_name, change=merge))
    return networks if layout == "released" else [*networks, *rest_of(ckpt_dir)]


def _check_places(ckpt_dir: Path, out: Path) -> None:
    if not ckpt_dir.is_dir():
        raise LoraError(f"--ckpt_dir {ckpt_dir}: no such folder")
    if out.exists():
        raise LoraError(f"--out {out} already exists; give another name or remove it")
    if ckpt_dir.resolve() in out.resolve().parents:
        raise LoraError(f"--out {out} lies inside --ckpt_dir {ckpt_dir}; give a place outside")


def _sources(
    task: str,
    ckpt_dir: Path,
    stores: Mapping[str, TensorStore],
    loras: Mapping[str, Sequence[Lora]],
    dtype: torch.dtype,
    allow_partial: bool,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """What the result is made from, for its record. InputError with everything that does not fit."""
    problems: list[str] = []
    before = (record_of(ckpt_dir) or {"loras": {}})["loras"]
    sources: dict[str, Any] = {"task": task, "dtype": str(dtype).removeprefix("torch."), "base": {}, "loras": {}}
    for expert, store in stores.items():
        if (found := task_of(store.shapes)) not in (None, task):
            raise LoraError(f"--task {task}: the checkpoint in {ckpt_dir} is one of {found}")
        if odd := [name for name, entry in store.items() if entry.dtype not in FLOATS]:
            problems.append(f"--ckpt_dir: {store[odd[0]].file}: tensor {odd[0]} is {store[odd[0]].dtype}, not a float")
        sources["base"][expert] = [_fingerprint(file) for file in store.files]
        sources["loras"][expert] = list(before.get(expert, ()))
        for lora in loras.get(expert, ()):
            try:
                if (twice := distilled_twice(ckpt_dir, lora.path, expert)) and not allow_partial:
                    raise LoraError(f"--ckpt_dir {twice}; --lora_allow_partial does it all the same")
                coverage = check(lora, store.shapes, expert=expert, allow_partial=allow_partial)
            except LoraError as e:
                problems += [problem for problem in e.problems if problem not in problems]
                continue
            report(f"{expert}: {lora.path}: {coverage.summary()}")
            for warning in coverage.warnings:
                report(f"warning: {warning}")
            (file,) = lora.store.files
            identity = {"fingerprint": fingerprint(file), "sha256": {file.name: sha256(file)}}
            sources["loras"][expert].append({**coverage.as_dict(), **identity})
    if problems:
        raise LoraError(problems)
    return sources


def _open_experts(task: str, ckpt_dir: Path) -> dict[str, TensorStore]:
    """The task's experts, in whichever layout, under our names."""
    folders = FOLDERS if is_diffusers(ckpt_dir) else TASKS[task].experts
    stores = {}
    for expert in TASKS[task].experts:
        folder = ckpt_dir / folders[expert]
        if (store := open_network(folder)) is None:
            raise LoraError(f"--ckpt_dir: {folder} holds no {STEM}{INDEX_SUFFIX} and no {STEM}.safetensors")
        stores[expert] = as_ours(store, EXPERT, str(folder))
    return stores


def _fingerprint(file: Path) -> dict[str, Any]:
    """What identifies a base file without reading all of it."""
    read_header(file)  # so that the length below is a sane one
    with file.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(struct.unpack("<Q", start)[0])
    state = file.stat()
    digest = hashlib.sha256(start + header).hexdigest()
    return {"file": file.name, "bytes": state.st_size, "modified": state.st_mtime_ns, "header_sha256": digest}


def _prepare(out: Path, sources: dict[str, Any]) -> Path:
    """`OUT.partial`, empty or left by an earlier run of the same command; never one of another bake."""
    partial = out.with_name(out.name + ".partial")
    if (partial / RECORD).is_file():
        try:
            before = parse_json((partial / RECORD).read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict) or {**before, "shards": 0} != json.loads(json.dumps({**sources, "shards": 0})):
            raise LoraError(f"{partial} was left by a bake from other sources or settings; remove it and run again")
    elif partial.exists() and any(partial.iterdir()):
        raise LoraError(f"{partial} is in the way, and not from an earlier bake; remove it and run again")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / RECORD, sources)
    for rest in partial.rglob("*.tmp"):
        rest.unlink()
    return partial


def _bring_others(ckpt_dir: Path, partial: Path, task: str) -> None:
    """Everything of the checkpoint that is no expert's weights: hard links where the disk allows, else copies."""
    experts = {ckpt_dir / where for where in TASKS[task].experts.values()}
    for file in sorted(ckpt_dir.rglob("*")):
        inside = file.relative_to(ckpt_dir)
        is_weights = file.parent in experts and file.name.startswith(STEM)
        if is_weights or inside == Path(RECORD) or not file.is_file() or any(p.startswith(".") for p in inside.parts):
            continue
        with replacing(partial / inside) as target:
            try:
                os.link(file.resolve(), target)
            except OSError:  # another disk, or one without hard links
                shutil.copy2(file, target)
