"""Networks written as sharded safetensors files, each whole or not there at all, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.checkpoints.layout import STEM
from wan.checkpoints.safetensors_file import DTYPES, INDEX_SUFFIX, TensorStore, header_bytes
from wan.modules.quantize import FP8, quantise, scale_name
from wan.utils.errors import TensorFileError

FORMATS = {getattr(torch, ours): theirs for theirs, (ours, _) in DTYPES.items()}


@dataclass(frozen=True)
class Network:
    """One network to write: where its tensors come from, and where they go.

    folder: relative to the checkpoint. stored: dtype by our name; fp8 brings a scale for each row, in a tensor beside.
    rename: our name -> the one in the file.
    change: what becomes of a tensor on the way (a `Merge`).
    """

    name: str
    store: TensorStore
    folder: Path
    stored: Callable[[str], torch.dtype]
    stem: str = STEM
    rename: Callable[[str], str] = lambda name: name
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor


class Target(NamedTuple):
    """One tensor of a file to write. scales: not the weight `source`, but what its rows in fp8 are multiplied by."""

    source: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scales: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shard:
    """One file to write, relative to the checkpoint; its tensors in the order of the file."""

    file: Path
    tensors: tuple[Target, ...]

    def header(self) -> bytes:
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.bytes
            place = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            table[tensor.name] = place
        return header_bytes(table)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def plan_shards(network: Network, shard_bytes: int) -> list[Shard]:
    """Split a network's tensors into files, in the order of the base's; the widest dtype first within a file."""
    groups: list[list[Target]] = [[]]
    room = shard_bytes
    for name in network.store.in_file_order(network.store):
        targets = [Target(name, network.rename(name), network.stored(name), network.store[name].shape)]
        if targets[0].dtype == FP8:
            shape = targets[0].shape[0], 1
            targets.append(Target(name, scale_name(targets[0].name), torch.float32, shape, scales=True))
        size = sum(target.bytes for target in targets)
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1] += targets
        room -= size
    return [
        Shard(
            network.folder / f"{network.stem}-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(sorted(group, key=lambda target: -target.dtype.itemsize)),
        )
        for number, group in enumerate(groups, 1)
    ]


def write_shard(path: Path, shard: Shard, network: Network) -> str:
    """Write one file, or keep it if an earlier run wrote it whole; its sha256."""
    if path.is_file() and _is_whole(path, shard):
        return sha256(path)
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        tensors = (_stored(tensor, network) for tensor in shard.tensors)
        for data in chain([memoryview(shard.header())], map(_bytes_of, tensors)):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_index(root: Path, network: Network, shards: Sequence[Shard]) -> None:
    """What tensor is in which of the files."""
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file.name for shard in shards for tensor in shard.tensors},
    }
    write_json(root / network.folder / f"{network.stem}{INDEX_SUFFIX}", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write `path`, so that it is there whole or not at all; what a stopped run leaves ends in `.tmp`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # replacing a link by another to the same file leaves both names


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stored(target: Target, network: Network) -> Tensor:
    """As it is written. A weight in fp8 and its scales lie apart in the file, and each makes both."""
    tensor = _changed(target.source, network)
    if target.dtype != FP8 and not target.scales:
        return tensor.to(target.dtype)
    q, scale = torch.empty(tensor.shape, dtype=FP8), torch.empty(len(tensor), 1)
    quantise(tensor, q, scale)
    return scale if target.scales else q


def _changed(name: str, network: Network) -> Tensor:
    tensor = network.store.read(name)
    if not tensor.isfinite().all():
        raise TensorFileError(f"{network.store[name].file}: tensor {name} holds NaN or Inf")
    return network.change(name, tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _is_whole(path: Path, shard: Shard) -> bool:
    header = shard.header()
    if path.stat().st_size != len(header) + shard.bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header
