"""Networks as sharded safetensors files, each written whole or not at all, so that a stopped run can continue."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.checkpoints.layout import STEM
from wan.checkpoints.quantised_formats import METADATA_KEY, int8_marker
from wan.checkpoints.safetensors_file import DTYPES, INDEX_SUFFIX, TensorStore, header_bytes
from wan.modules.quantised_linear import EIGHT_BITS, rotation_of, round_rows, scale_name
from wan.utils.errors import TensorFileError
from wan.utils.files import replacing, write_file

STORED_NAMES = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}  # torch's dtype -> safetensors' name


class NetworkToWrite(NamedTuple):
    """One network to write into `folder`, relative to the checkpoint."""

    name: str
    store: TensorStore
    folder: Path
    stored: Callable[[str], torch.dtype]  # by our name; 8 bits add a tensor with a scale for each row
    stem: str = STEM
    rename: Callable[[str], str] = lambda name: name  # our name -> the one in the file
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor  # a `Merge`


class Target(NamedTuple):
    """One tensor of a file to write. scales: those of the rows of `source` in 8 bits, not its numbers."""

    source: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scales: bool = False

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Shard(NamedTuple):
    """One file to write, relative to the checkpoint; its tensors in the order of the file."""

    file: Path
    tensors: tuple[Target, ...]

    def header(self) -> bytes:
        table: dict[str, Any] = {"__metadata__": self.metadata()}
        ends = [0, *accumulate(tensor.bytes for tensor in self.tensors)]
        for tensor, offsets in zip(self.tensors, pairwise(ends), strict=True):
            dtype = STORED_NAMES[tensor.dtype]
            table[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets}
        return header_bytes(table)

    def metadata(self) -> dict[str, str]:
        """With the rotation of the weights in int8, as ComfyUI writes it; those in fp8 need no mark."""
        marks = {
            tensor.name.removesuffix(".weight"): int8_marker(rotation_of(tensor.dtype, tensor.shape[1]))
            for tensor in self.tensors if tensor.dtype == torch.int8
        }  # fmt: skip
        layers = {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": marks})} if marks else {}
        return {"format": "pt"} | layers

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def plan_shards(network: NetworkToWrite, shard_bytes: int) -> list[Shard]:
    """Split a network's tensors into files, in the order of the base's; the widest dtype first within a file."""
    groups: list[list[Target]] = [[]]
    left = shard_bytes
    for name in network.store.in_file_order(network.store):
        targets = [Target(name, network.rename(name), network.stored(name), network.store[name].shape)]
        if targets[0].dtype in EIGHT_BITS:
            shape = targets[0].shape[0], 1
            targets.append(Target(name, scale_name(targets[0].name), torch.float32, shape, scales=True))
        size = sum(target.bytes for target in targets)
        if size > left and groups[-1]:
            groups.append([])
            left = shard_bytes
        groups[-1] += targets
        left -= size
    shards = []
    for number, group in enumerate(groups, 1):
        file = network.folder / f"{network.stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(file, tuple(sorted(group, key=lambda target: -target.dtype.itemsize))))
    return shards


def write_shard(path: Path, shard: Shard, network: NetworkToWrite) -> str:
    """Write one file, or keep it if an earlier run wrote it whole; its sha256. TensorFileError for NaN or Inf."""
    header = shard.header()
    if path.is_file() and path.stat().st_size == len(header) + shard.bytes:
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                return sha256(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(header)
    with replacing(path) as part, part.open("wb") as file:
        file.write(header)
        for target in shard.tensors:
            data = _converted(target, network).contiguous().flatten().view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _converted(target: Target, network: NetworkToWrite) -> Tensor:
    """The tensor as it is written. A weight in 8 bits and its scales are apart in the file: both are computed twice."""
    tensor = network.store.read(target.source)
    if not tensor.isfinite().all():
        raise TensorFileError(f"{network.store[target.source].file}: tensor {target.source} holds NaN or Inf")
    tensor = network.change(target.source, tensor)
    dtype = network.stored(target.source)
    if dtype not in EIGHT_BITS:
        return tensor.to(dtype)
    q, scale = torch.empty(tensor.shape, dtype=dtype), torch.empty(len(tensor), 1)
    round_rows(tensor, rotation_of(dtype, tensor.shape[1]), q, scale)
    return scale if target.scales else q


def write_index(root: Path, network: NetworkToWrite, shards: Sequence[Shard]) -> None:
    """Write which file holds which tensor."""
    size = sum(shard.bytes for shard in shards)
    places = {tensor.name: shard.file.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(root / network.folder / f"{network.stem}{INDEX_SUFFIX}", index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
