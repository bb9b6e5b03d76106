"""Networks written as sharded safetensors files, each whole or not there at all, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning.errors import TensorFileError
from lightning.fp8 import FP8, quantise, scale_name
from lightning.tensorfile import INDEX_SUFFIX, TensorStore

CHUNK = 1 << 24
FORMATS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", FP8: "F8_E4M3"}


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
    stem: str = "diffusion_pytorch_model"
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
        """The safetensors header: length, JSON padded to 8 bytes."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.bytes
            place = {"dtype": FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            table[tensor.name] = place
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

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
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        header = shard.header()
        file.write(header)
        digest.update(header)
        for tensor in shard.tensors:
            data = _bytes_of(_stored(tensor, network))
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def write_index(root: Path, network: Network, shards: Sequence[Shard]) -> None:
    """What tensor is in which of the files."""
    index = {
        "metadata": {"total_size": sum(shard.bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file.name for shard in shards for tensor in shard.tensors},
    }
    write_json(root / network.folder / f"{network.stem}{INDEX_SUFFIX}", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
