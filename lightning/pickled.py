"""The tensors of a `.pth` file as a TensorStore. Only plain tensors are accepted: nothing in the file is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.errors import TensorFileError
from lightning.tensorfile import DTYPES, Entry, TensorStore

if TYPE_CHECKING:
    from torch import Tensor


class PickledTensors(TensorStore):
    """Entries tell dtype and shape; their offset is the tensor's number in the file. `read` gives views of its map."""

    def __init__(self, path: Path) -> None:
        """TensorFileError for a file that is damaged, or holds anything but a flat dictionary of tensors."""
        import torch

        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as e:
            raise TensorFileError(f"{path}: no zipped .pth file of plain tensors, or damaged; not opened") from e
        names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
        entries: dict[str, Entry] = {}
        for number, (name, tensor) in enumerate(state.items() if isinstance(state, dict) else ()):
            if not isinstance(tensor, torch.Tensor) or str(tensor.dtype).removeprefix("torch.") not in names:
                raise TensorFileError(f"{path}: not a flat dictionary of tensors ({name!r} is none)")
            entries[name] = Entry(path, names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), number)
        if not entries:
            raise TensorFileError(f"{path}: not a flat dictionary of tensors")
        super().__init__(entries)
        self._state: dict[str, Tensor] = state

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        tensor = self._state[name]
        return tensor if rows is None else tensor[rows]
