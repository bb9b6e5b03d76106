"""The tensors of a PyTorch pickle (.pth, .pt, .bin, .ckpt) as a TensorStore. Nothing in the file is ever run.

The format (torch.save): a zip of stored records, of which `data.pkl` pickles a dictionary of tensors; each refers to
its storage, the record `data/KEY`, by `persistent_load`. Reading it here and not by torch.load needs no data: headers
of a file on the hub are enough."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wan.checkpoints.safetensors_file import DTYPES, MAX_HEADER_BYTES, Entry, TensorStore, misread, reading
from wan.utils.errors import TensorFileError, first_line

if TYPE_CHECKING:
    from torch import Tensor

# torch's classes of storages -> safetensors' names of dtypes
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
RECORD_HEADER = 30  # bytes before a record's name in a zip; the last four are the lengths of name and padding
MAX_DEPTH = 5  # of dictionaries in each other: one may hold itself
# keys of dictionaries around the tensors
NESTED = ("state_dict", "model_state_dict", "model", "module", "ema", "generator", "generator_ema", "generator_lora")


class Pickled(NamedTuple):
    """A tensor as it is pickled; offset, strides and the storage's size count elements."""

    dtype: str
    storage: tuple[str, str, int]  # dtype, key, size
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Strided(Entry):
    """A tensor whose elements are apart, among `extent` of its storage."""

    extent: int
    stride: tuple[int, ...]

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        flat = Entry(self.file, self.dtype, (self.extent,), self.offset).read(name)
        return flat.as_strided(self.shape, self.stride)[rows or ...].contiguous()


class _Unpickler(pickle._Unpickler):  # the one in C takes as much memory as a number in the file says
    """Makes dictionaries of `Pickled` and refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return STORAGES.get(name, name)
        known: dict[tuple[str, str], str | Callable[..., object]] = {
            **{("torch", kind): dtype for dtype, (kind, _) in DTYPES.items()},
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        return str(pid[1]), str(pid[2]), int(pid[4])


def _rebuild(storage: Any, offset: int, shape: Any, stride: Any, _: Any, __: Any, dtype: object = None) -> Pickled:
    kind = dtype if isinstance(dtype, str) else storage[0]  # `_rebuild_tensor_v3` makes tensors from bytes
    tensor = Pickled(kind, storage, offset, tuple(shape), tuple(stride))
    numbers = (offset, storage[2], *tensor.shape, *tensor.stride)
    if len(tensor.shape) != len(tensor.stride) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise pickle.UnpicklingError("impossible shape")
    return tensor


def open_pickle(path: Path) -> TensorStore:
    """TensorFileError if the file is damaged, or holds no dictionary of tensors."""
    with reading(path, "truncated or damaged, or not a zipped .pth file"):
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                infos, directory = archive.infolist(), archive.start_dir
                pickled = next(info for info in infos if info.filename.endswith("/data.pkl"))
                if pickled.file_size > MAX_HEADER_BYTES or any(info.compress_type for info in infos):
                    raise zipfile.BadZipFile("compressed, or too large")
                content = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        except pickle.UnpicklingError as e:
            raise misread(path, f"holds more than plain tensors ({first_line(e)}), or is damaged; not opened") from e
    tensors = _find_tensors(path, content)
    if odd := [name for name in tensors if not isinstance(name, str) or not name.isprintable()]:
        raise TensorFileError(f"{path}: a tensor is named {odd[0]!r:.60}")
    with reading(path, "truncated or damaged"):
        records = _records(path, infos, directory)
    store = TensorStore({})
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TensorFileError(f"{path}: tensor {name} has the unsupported dtype {tensor.dtype:.40}")
        kind, key, count = tensor.storage
        start, size = records.get(key, (0, 0))
        width, shape = DTYPES[tensor.dtype][1], tensor.shape
        last = sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
        extent = last + 1 if math.prod(shape) else 0  # elements of its storage from its first to its last
        needed = max(count * DTYPES.get(kind, ("", 1))[1], (tensor.offset + extent) * width)
        if needed > size:
            what = f"the record of tensor {name:.100} has {size:,} of {needed:,} bytes"
            raise TensorFileError(f"{path}: truncated or damaged: {what}")
        store[name] = Entry(path, tensor.dtype, shape, start + tensor.offset * width)
        packed = [n < 2 or tensor.stride[axis] == math.prod(shape[axis + 1 :]) for axis, n in enumerate(shape)]
        if extent and not all(packed):
            store[name] = Strided(**vars(store[name]), extent=extent, stride=tensor.stride)
    return store


def _records(path: Path, infos: list[zipfile.ZipInfo], directory: int) -> dict[str, tuple[int, int]]:
    """(first byte, bytes) of each storage's record, by key. directory: where the zip's begins, after all records."""
    ends = dict(pairwise([*sorted(info.header_offset for info in infos), directory]))

    def data_of(info: zipfile.ZipInfo) -> tuple[int, int]:
        # torch.save aligns the data and puts check sum and sizes behind it (flag 8; in zip64 24 bytes): nothing is read
        behind = 24 if max(info.header_offset, info.file_size) >= 0xFFFFFFFF else 16
        start = ends[info.header_offset] - behind - info.file_size
        if not info.flag_bits & 8 or start % 64 or start <= info.header_offset:
            with path.open("rb", buffering=0) as file:
                file.seek(info.header_offset + RECORD_HEADER - 4)
                start = info.header_offset + RECORD_HEADER + sum(struct.unpack("<HH", file.read(4)))
        return start, info.file_size

    return {i.filename.rpartition("/")[2]: data_of(i) for i in infos if i.filename.split("/")[-2:-1] == ["data"]}


def _find_tensors(path: Path, content: Any) -> dict[str, Pickled]:
    """The dictionary of tensors, itself or under the usual keys. TensorFileError for none, or several."""
    for _ in range(MAX_DEPTH):
        if not isinstance(content, dict) or not content:
            break
        if all(isinstance(value, Pickled) for value in content.values()):
            return content
        networks = [key for key in NESTED if isinstance(content.get(key), dict)]
        if len(networks) > 1:
            names = ", ".join(networks)
            raise TensorFileError(f"{path}: holds several networks ({names}); save the one to use in a file of its own")
        content = content[networks[0]] if networks else None
    raise TensorFileError(f"{path}: holds no dictionary of tensors, itself or under {', '.join(NESTED)}")
