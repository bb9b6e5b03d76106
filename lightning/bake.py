"""Write a checkpoint with its LoRAs merged in, in the released layout or diffusers': a start reads half the bytes.

Every tensor is stored as a bf16 run keeps it (bf16, or float32 for the few that stay in it; with --dtype fp8 as a run
with `--quantize fp8` keeps it, with a scale per row), so that running the baked folder equals merging on the fly,
tensor for tensor. Files are written into `OUT.partial`, which becomes `OUT` by one rename at the end: a stopped run
leaves nothing under that name, and the next one finishes it.
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

from lightning.diffusers_export import export_settings
from lightning.distilled import RECORD, SETTINGS, distilled_twice, record_of, release_in
from lightning.lora import Lora, check
from lightning.merge import Merge
from lightning.releases import Release
from wan.checkpoints import layout as layouts
from wan.checkpoints.key_mapping import diffusers_name, text_name, vae_name
from wan.checkpoints.safetensors_file import DTYPES, TensorStore, fingerprint, read_header
from wan.checkpoints.weights import FLOATS, TEXT_ENCODER, VAE, open_parts
from wan.checkpoints.writer import NetworkToWrite, plan_shards, sha256, write_index, write_json, write_shard
from wan.configs import TASKS, TaskConfig, task_of
from wan.configs.precision import keeps_float32, takes_fp8
from wan.modules.quantize import FP8
from wan.utils.errors import LoraError
from wan.utils.files import parse_json
from wan.utils.locks import LockedElsewhere, locked

OTHER_NAMES = {VAE: vae_name, TEXT_ENCODER: text_name}  # diffusers' names of the networks beside the experts


@dataclass(frozen=True, kw_only=True)
class Bake:
    """A checkpoint to write: that of `task` in `ckpt_dir` with `loras` (by expert) merged in, as the folder `out`.

    release: the settings that the result is sampled with, kept in its record; by default those of `ckpt_dir`'s own.
    layout: "released", or "diffusers", which is also written without LoRAs.
    """

    task: str
    ckpt_dir: Path
    loras: Mapping[str, Sequence[Lora]]
    out: Path
    dtype: torch.dtype = torch.bfloat16
    allow_partial: bool = False
    release: Release | None = None
    layout: str = "released"
    shard_bytes: int = 10_000_000_000
    report: Callable[[str], None] = print

    def write(self) -> None:
        """Write the folder. Everything is checked before: one InputError with all faults."""
        self._check_request()
        config, ckpt_dir = self.config, self.ckpt_dir
        places, parts = layouts.places_in(ckpt_dir, config), list(config.experts)
        if self.to_diffusers:
            layouts.check_complete(ckpt_dir, config)
            parts += [TEXT_ENCODER, VAE]
        stores = open_parts(ckpt_dir, config, parts)
        if lacking := [places[part] for part in parts if part not in stores]:
            raise LoraError(f"--ckpt_dir {ckpt_dir} lacks {', '.join(lacking)}")
        sources = self._sources({name: stores[name] for name in config.experts})
        release = self.release or release_in(ckpt_dir)
        sources["release"] = release and {name: getattr(release, name) for name in SETTINGS}
        settings = export_settings(stores, ckpt_dir, config, release) if self.to_diffusers else {}
        if self.to_diffusers and release and release.solver == "dmd":
            self.report(
                f"warning: {release.name} is made for re-noising (dmd); generate.py does it, diffusers does not"
            )
        networks = [self._network(part, store) for part, store in stores.items()]
        try:
            with locked(self.out, self.report):
                self._check_out()  # another bake may have finished it
                partial = _prepare(self.out, sources)
                digests = self._write_weights(networks, partial)
                if self.to_diffusers:
                    tokenizer = (ckpt_dir / places["tokenizer"]).parent
                    shutil.copytree(tokenizer, partial / "tokenizer", dirs_exist_ok=True)
                else:
                    _bring_others(ckpt_dir, partial, config)
                for place, content in settings.items():
                    write_json(partial / place, content)
                write_json(partial / RECORD, {**sources, "shards": digests})
                os.replace(partial, self.out)
        except LockedElsewhere:
            problem = f"--out {self.out}: another bake is writing it; wait for it, or give another name"
            raise LoraError(problem) from None
        self.report(f"baked: {self.out}")

    @property
    def config(self) -> TaskConfig:
        return TASKS[self.task]

    @property
    def to_diffusers(self) -> bool:
        return self.layout == "diffusers"

    def _check_request(self) -> None:
        """LoraError for a request that cannot be met, whatever the files hold."""
        ckpt_dir, out, released = self.ckpt_dir, self.out, not self.to_diffusers
        if not ckpt_dir.is_dir():
            raise LoraError(f"--ckpt_dir {ckpt_dir}: no such folder")
        self._check_out()
        if ckpt_dir.resolve() in out.resolve().parents:
            raise LoraError(f"--out {out} is inside --ckpt_dir {ckpt_dir}; give a folder outside")
        if released and layouts.is_diffusers(ckpt_dir):
            raise LoraError(f"--ckpt_dir {ckpt_dir} is in diffusers' layout: add --layout diffusers")
        if released and self.dtype != FP8 and not any(self.loras.values()):
            raise LoraError("nothing to bake: give --lora_dir or --lora")
        if not released and self.dtype == FP8:
            raise LoraError("--dtype fp8: diffusers does not read a scale per row; use --layout released, or bf16")

    def _check_out(self) -> None:
        if self.out.exists():
            raise LoraError(f"--out {self.out} already exists; give another name or remove it")

    def _sources(self, experts: Mapping[str, TensorStore]) -> dict[str, Any]:
        """The sources of the result, for its record. LoraError with everything that does not fit."""
        problems: list[str] = []
        before = (record_of(self.ckpt_dir) or {"loras": {}})["loras"]
        dtype = str(self.dtype).removeprefix("torch.")
        sources: dict[str, Any] = {"task": self.task, "dtype": dtype, "base": {}, "loras": {}, "layout": self.layout}
        for expert, store in experts.items():
            if (found := task_of(store.shapes)) not in (None, self.task):
                raise LoraError(f"--task {self.task}: the checkpoint in {self.ckpt_dir} is one of {found}")
            if odd := next(((name, entry) for name, entry in store.items() if entry.dtype not in FLOATS), None):
                problems.append(f"--ckpt_dir: {odd[1].file}: tensor {odd[0]} is {odd[1].dtype}, not a float")
            sources["base"][expert] = [_identity(file) for file in store.files]
            sources["loras"][expert] = list(before.get(expert, ()))
            for lora in self.loras.get(expert, ()):
                try:
                    sources["loras"][expert].append(self._source_of(lora, expert, store))
                except LoraError as e:
                    problems += [problem for problem in e.problems if problem not in problems]
        if problems:
            raise LoraError(problems)
        return sources

    def _source_of(self, lora: Lora, expert: str, store: TensorStore) -> dict[str, Any]:
        """One LoRA's coverage and identity. LoraError if it does not fit, or is merged already."""
        if (twice := distilled_twice(self.ckpt_dir, lora.path, expert)) and not self.allow_partial:
            raise LoraError(f"--ckpt_dir {twice}; --lora_allow_partial merges it all the same")
        coverage = check(lora, store.shapes, expert=expert, allow_partial=self.allow_partial)
        self.report(f"{expert}: {lora.path}: {coverage.summary()}")
        for warning in coverage.warnings:
            self.report(f"warning: {warning}")
        (file,) = lora.store.files
        return {**coverage.as_dict(), "fingerprint": fingerprint(file), "sha256": {file.name: sha256(file)}}

    def _network(self, part: str, store: TensorStore) -> NetworkToWrite:
        """One network to write: an expert with its LoRAs merged, another part as it is."""
        place = Path((layouts.diffusers if self.to_diffusers else layouts.released)(self.config)[part])
        blocks = len({name.split(".")[1] for name in store if name.startswith("blocks.")})

        def stored(name: str) -> torch.dtype:
            if part in OTHER_NAMES:
                return getattr(torch, DTYPES[store[name].dtype][0])
            if keeps_float32(name):
                return torch.float32
            return self.dtype if self.dtype != FP8 or takes_fp8(name, blocks) else torch.bfloat16

        rename = OTHER_NAMES.get(part) or (diffusers_name if self.to_diffusers else str)
        merge = Merge(self.loras.get(part, ()), store.shapes)  # of another part: changes nothing
        return NetworkToWrite(part, store, place.parent, stored, place.stem, rename, merge)

    def _write_weights(self, networks: Sequence[NetworkToWrite], partial: Path) -> dict[str, str]:
        """Write all weights into `partial`; the sha256 by place. LoraError if the disk is too full."""
        plans = [(network, plan_shards(network, self.shard_bytes)) for network in networks]
        needed = sum(shard.bytes for _, plan in plans for shard in plan if not (partial / shard.file).exists())
        if needed > (free := shutil.disk_usage(partial).free):
            where = f"the disk of {partial.parent} has {free / 1e9:.1f} GB free"
            raise LoraError(f"--out needs {needed / 1e9:.1f} GB, {where}")
        digests = {}
        for network, plan in plans:
            for shard in plan:
                self.report(f"{network.name}: {shard.file} ({shard.bytes / 1e9:.2f} GB)")
                digests[str(shard.file)] = write_shard(partial / shard.file, shard, network)
            write_index(partial, network, plan)
        return digests


def _identity(file: Path) -> dict[str, Any]:
    """Identifies a base file without reading all of it."""
    read_header(file)  # refuses a length that is too large to read
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
    for rest in partial.rglob(".*.part"):
        rest.unlink()
    return partial


def _bring_others(ckpt_dir: Path, partial: Path, config: TaskConfig) -> None:
    """Everything of the checkpoint except the experts' weights: hard links where the disk allows, else copies."""
    experts = {ckpt_dir / where for where in config.experts.values()}
    for file in sorted(ckpt_dir.rglob("*")):
        inside = file.relative_to(ckpt_dir)
        is_weights = file.parent in experts and file.name.startswith(layouts.STEM)
        if is_weights or inside == Path(RECORD) or not file.is_file() or any(p.startswith(".") for p in inside.parts):
            continue
        target = partial / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a stopped run may have copied half of it
        try:
            os.link(file.resolve(), target)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(file, target)
