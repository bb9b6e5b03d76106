"""The tensors of a `.pth` file as a TensorStore. Only plain tensors are accepted: nothing in the file is ever run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from wan.checkpoints.safetensors_file import DTYPES, Entry, TensorStore
from wan.utils.errors import TensorFileError

if TYPE_CHECKING:
    from torch import Tensor


class PickleStore(TensorStore):
    """The tensors of a `.pth` file, read from where they lie in it."""

    def __init__(self, path: Path) -> None:
        """TensorFileError if the file is damaged, or holds anything but a flat dictionary of tensors."""
        import torch

        self.path = path
        state = _open_pickle(path)
        starts = _storage_offsets(path, state)
        names = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}
        entries: dict[str, Entry] = {}
        self._strided: dict[str, tuple[TensorStore, Tensor]] = {}
        for name, tensor in state.items():
            if tensor.dtype not in names:
                raise TensorFileError(f"{path}: tensor {name} has the unsupported dtype {tensor.dtype}")
            offset = starts.get(tensor.untyped_storage().data_ptr(), 0)
            offset += int(tensor.storage_offset()) * tensor.element_size()
            entries[name] = Entry(path, names[tensor.dtype], tuple(tensor.shape), offset)
            if not tensor.is_contiguous():
                extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                self._strided[name] = TensorStore({name: Entry(path, names[tensor.dtype], (extent,), offset)}), tensor
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

    path.open("rb").close()  # a file that may not be read is not one that is damaged
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as e:
        raise TensorFileError(f"{path}: holds more than plain tensors, or is damaged; not opened") from e
    except (RuntimeError, OSError, EOFError, ValueError) as e:
        raise TensorFileError(f"{path}: truncated or damaged, or not a zipped .pth file") from e
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise TensorFileError(f"{path}: not a flat dictionary of tensors")
    if odd := [name for name in state if not isinstance(name, str) or not name.isprintable()]:
        raise TensorFileError(f"{path}: a tensor is named {odd[0]!r:.60}")
    return state


def _storage_offsets(path: Path, state: dict[str, Tensor]) -> dict[int, int]:
    """Where in the file the storage at each address of the map lies.

    torch does not tell, but the archive's records, stored uncompressed, lie in the map as they do in the file.
    """
    addresses = {t.untyped_storage().data_ptr() for t in state.values() if t.untyped_storage().nbytes()}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        records = []
        for info in archive.infolist():
            if info.filename.split("/")[-2:-1] == ["data"] and info.file_size:
                file.seek(info.header_offset + 26)  # lengths of name and extra field, in the record's own header
                lengths = file.read(4)
                name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
                records.append(info.header_offset + 30 + name + extra)
    base = min(addresses, default=0) - min(records, default=0)
    offsets = {address: address - base for address in addresses}  # one of an empty tensor is not among them
    if not set(offsets.values()) <= set(records):
        raise TensorFileError(f"{path}: its tensors are not stored as a .pth file stores them")
    return offsets
