"""Write a checkpoint with its LoRAs merged in, in the released layout: the next start reads half the bytes.

Every tensor is stored as a bf16 run keeps it (bf16, or float32 for the few that stay in it), so that running the
baked folder equals merging on the fly, tensor for tensor. All is written into `OUT.partial`, which becomes `OUT` by
one rename at the end: a run that was stopped leaves nothing under that name, and the next one finishes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning.distilled import FLOATS, RECORD, distilled_twice, record_of, release_in, release_record
from lightning.errors import LoraError, TensorFileError
from lightning.lora import Lora, check
from lightning.merge import Merge
from lightning.names import EXPERTS, keeps_float32, task_of
from lightning.releases import Release
from lightning.tensorfile import INDEX_SUFFIX, Entry, TensorStore, fingerprint, read_header

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 10_000_000_000
CHUNK = 1 << 24
FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Shard:
    """One file to write: tensor names with their stored dtypes and shapes, in the order of the file."""

    file: Path  # relative to the baked folder
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    def header(self) -> bytes:
        """The safetensors header: length, JSON padded to 8 bytes."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in self.tensors:
            start, end = end, end + dtype.itemsize * shape_size(shape)
            table[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def bytes(self) -> int:
        return sum(dtype.itemsize * shape_size(shape) for _, dtype, shape in self.tensors)


def shape_size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def bake(
    task: str,
    ckpt_dir: Path,
    loras: Mapping[str, Sequence[Lora]],
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    allow_partial: bool = False,
    release: Release | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = print,
) -> None:
    """Merge `loras` (by expert) into the checkpoint of `task` in `ckpt_dir`; the result is the folder `out`.

    release: the settings that the result is sampled with, kept in its record; by default those of `ckpt_dir`'s own.
    Everything is checked before anything is written, and all that is wrong is told: InputError.
    """
    _check_places(ckpt_dir, out, loras)
    stores = {expert: _open(ckpt_dir / where) for expert, where in EXPERTS[task].items()}
    sources = _sources(task, ckpt_dir, stores, loras, dtype, allow_partial, report)
    sources["release"] = release_record(release or release_in(ckpt_dir))
    partial = _prepare(out, sources)
    shards = {expert: _plan(store, Path(EXPERTS[task][expert]), dtype, shard_bytes) for expert, store in stores.items()}
    _check_room(partial, [shard for plan in shards.values() for shard in plan])
    digests = {}
    for expert, store in stores.items():
        merge = Merge(loras.get(expert, ()), store.shapes)
        for shard in shards[expert]:
            report(f"{expert}: {shard.file} ({shard.bytes / 1e9:.2f} GB)")
            digests[str(shard.file)] = _finish(partial / shard.file, shard, store, merge)
        _write_index(partial, shards[expert])
    _bring_others(ckpt_dir, partial, task)
    _write(partial / RECORD, json.dumps({**sources, "shards": digests}, indent=1).encode())
    os.replace(partial, out)
    report(f"baked: {out}")


def _check_places(ckpt_dir: Path, out: Path, loras: Mapping[str, Sequence[Lora]]) -> None:
    if not ckpt_dir.is_dir():
        raise LoraError(f"--ckpt_dir {ckpt_dir}: no such folder")
    if out.exists():
        raise LoraError(f"--out {out} exists already; give another name or remove it")
    if ckpt_dir.resolve() in out.resolve().parents:
        raise LoraError(f"--out {out} lies inside --ckpt_dir {ckpt_dir}; give a place outside")
    if not any(loras.values()):
        raise LoraError("nothing to bake: give --lora_dir or --lora")


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
            identity = {"fingerprint": fingerprint(file), "sha256": {file.name: _sha256(file)}}
            sources["loras"][expert].append({**coverage.as_dict(), **identity})
    if problems:
        raise LoraError(problems)
    return sources


def _open(folder: Path) -> TensorStore:
    for name in (f"{STEM}{INDEX_SUFFIX}", f"{STEM}.safetensors"):
        if (folder / name).is_file():
            return TensorStore.open(folder / name)
    raise LoraError(f"--ckpt_dir: {folder} holds no {STEM}{INDEX_SUFFIX} and no {STEM}.safetensors")


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
        before = json.loads((partial / RECORD).read_bytes())
        before.pop("shards", None)
        if before != json.loads(json.dumps(sources)):
            raise LoraError(f"{partial} was left by a bake from other sources or settings; remove it and run again")
    elif partial.exists() and any(partial.iterdir()):
        raise LoraError(f"{partial} is in the way, and not from an earlier bake; remove it and run again")
    partial.mkdir(parents=True, exist_ok=True)
    _write(partial / RECORD, json.dumps(sources, indent=1).encode())
    for rest in partial.rglob("*.tmp"):
        rest.unlink()
    return partial


def _plan(store: TensorStore, where: Path, dtype: torch.dtype, shard_bytes: int) -> list[Shard]:
    """Split an expert's tensors into shards, in the order of the base's files; float32 first within a shard."""
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    room = shard_bytes
    for name in store.in_file_order(store):
        entry: Entry = store[name]
        stored = torch.float32 if keeps_float32(name) else dtype
        size = stored.itemsize * shape_size(entry.shape)
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append((name, stored, entry.shape))
        room -= size
    return [
        Shard(
            where / f"{STEM}-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(sorted(group, key=lambda tensor: -tensor[1].itemsize)),
        )
        for number, group in enumerate(groups, 1)
    ]


def _check_room(partial: Path, shards: Sequence[Shard]) -> None:
    needed = sum(shard.bytes for shard in shards if not (partial / shard.file).exists())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise LoraError(f"--out needs {needed / 1e9:.1f} GB, the disk of {partial.parent} has {free / 1e9:.1f} GB free")


def _finish(path: Path, shard: Shard, store: TensorStore, merge: Merge) -> str:
    """Write one shard, or keep it if an earlier run wrote it whole; its sha256."""
    if path.is_file() and _is_whole(path, shard):
        return _sha256(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        header = shard.header()
        file.write(header)
        digest.update(header)
        for name, dtype, _ in shard.tensors:
            data = _bytes_of(_merged(name, store, merge).to(dtype))
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def _merged(name: str, store: TensorStore, merge: Merge) -> Tensor:
    tensor = store.read(name)
    if not tensor.isfinite().all():
        raise TensorFileError(f"{store[name].file}: tensor {name} holds NaN or Inf")
    return merge(name, tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _is_whole(path: Path, shard: Shard) -> bool:
    header = shard.header()
    if path.stat().st_size != len(header) + shard.bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _write_index(partial: Path, shards: Sequence[Shard]) -> None:
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {name: shard.file.name for shard in shards for name, _, _ in shard.tensors},
    }
    _write(partial / shards[0].file.parent / f"{STEM}{INDEX_SUFFIX}", json.dumps(index, indent=1).encode())


def _bring_others(ckpt_dir: Path, partial: Path, task: str) -> None:
    """Everything of the checkpoint that is no expert's weights: hard links where the disk allows, else copies."""
    experts = {ckpt_dir / where for where in EXPERTS[task].values()}
    for file in sorted(ckpt_dir.rglob("*")):
        inside = file.relative_to(ckpt_dir)
        is_weights = file.parent in experts and file.name.startswith(STEM)
        if is_weights or inside == Path(RECORD) or not file.is_file() or any(p.startswith(".") for p in inside.parts):
            continue
        target = partial / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        try:
            os.link(file.resolve(), temporary)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(file, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # replacing a link by another to the same file leaves both names


def _write(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
