"""The tensors of a PyTorch pickle (.pth, .pt, .bin, .ckpt) as a TensorStore. Nothing in the file is ever run."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.checkpoints.outside import misread, reading, size_of
from wan.checkpoints.safetensors_file import DTYPES, Entry, TensorStore
from wan.utils.errors import TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

MAX_DEPTH = 3  # of dictionaries around the tensors
NESTED = ("state_dict", "model", "module", "generator", "generator_ema", "generator_lora", "model_state_dict", "ema")


class PickleStore(TensorStore):
    """The tensors of a pickle, read from their places in the file."""

    def __init__(self, path: Path) -> None:
        """TensorFileError if the file is damaged, or holds no dictionary of tensors."""
        import torch

        state = _open_pickle(path)
        starts = _storage_offsets(path, state)
        dtypes = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}
        entries: dict[str, Entry] = {}
        self._strided: dict[str, tuple[TensorStore, Tensor]] = {}
        for name, tensor in state.items():
            if tensor.dtype not in dtypes:
                raise TensorFileError(f"{path}: tensor {name} has the unsupported dtype {tensor.dtype}")
            offset = starts.get(tensor.untyped_storage().data_ptr(), 0)
            offset += int(tensor.storage_offset()) * tensor.element_size()
            entries[name] = Entry(path, dtypes[tensor.dtype], tuple(tensor.shape), offset)
            if not tensor.is_contiguous():
                extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                self._strided[name] = TensorStore({name: Entry(path, dtypes[tensor.dtype], (extent,), offset)}), tensor
        super().__init__(entries)

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        if name not in self._strided:
            return super().read(name, rows, buffer)
        flat, tensor = self._strided[name]
        found = flat.read(name).as_strided(tensor.shape, tensor.stride())
        return (found if rows is None else found[rows]).contiguous()


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """Views of the mapped file: no data is read."""
    import torch

    size_of(path)
    path.open("rb").close()  # torch reports a file without permission as a damaged one
    with reading(path, "truncated or damaged, or not a zipped .pth file"):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            raise misread(path, "holds more than plain tensors, or is damaged; not opened") from e
    state = _tensors_in(path, content)
    if odd := [name for name in state if not isinstance(name, str) or not name.isprintable()]:
        raise TensorFileError(f"{path}: a tensor is named {odd[0]!r:.60}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise TensorFileError(f"{path}: tensor {name} is not a plain tensor of numbers")
    return state


def _tensors_in(path: Path, content: Any, depth: int = MAX_DEPTH) -> dict[str, Tensor]:
    """The dictionary of tensors, itself or under one of the usual keys. TensorFileError for none, or several."""
    import torch

    if isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
        networks = [key for key in NESTED if isinstance(content.get(key), Mapping)]
        if len(networks) > 1:
            names = ", ".join(networks)
            raise TensorFileError(f"{path}: holds several networks ({names}); save the one to use in a file of its own")
        if networks and depth:
            return _tensors_in(path, content[networks[0]], depth - 1)
    raise TensorFileError(f"{path}: holds no dictionary of tensors, itself or under {', '.join(NESTED)}")


def _storage_offsets(path: Path, state: dict[str, Tensor]) -> dict[int, int]:
    """Address of a storage in the map -> its offset in the file. TensorFileError for one that its record is short of.

    torch gives no offsets, but the archive's records, stored uncompressed, are in the map as they are in the file.
    """
    storages = {t.untyped_storage().data_ptr(): (t.untyped_storage().nbytes(), name) for name, t in state.items()}
    storages = {address: found for address, found in storages.items() if found[0]}  # an empty one has no record
    records: dict[int, int] = {}  # offset -> bytes
    with reading(path, "not a zipped .pth file"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.filename.split("/")[-2:-1] == ["data"] and info.file_size:
                file.seek(info.header_offset + 26)  # lengths of name and extra field, in the record's own header
                lengths = file.read(4)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
                records[start] = info.file_size if info.compress_type == zipfile.ZIP_STORED else 0
    base = min(storages, default=0) - min(records, default=0)
    for address, (size, name) in storages.items():
        if address - base not in records:
            raise TensorFileError(f"{path}: its tensors are not stored as a .pth file stores them")
        if records[address - base] < size:
            found = f"{records[address - base]:,} of {size:,} bytes"
            raise TensorFileError(f"{path}: truncated; the record of tensor {name} has {found}")
    return {address: address - base for address in storages}
