"""How quantised weights become numbers: one table of formats; what no row knows is refused by name.

A file names the format of a layer X in a tensor `X.comfy_quant` (JSON), in `_quantization_metadata` of its header (JSON
by layer; of shards in each one), or nowhere: then the dtype, and names and shapes of the scales, decide. W = q * scale,
with one scale for the tensor, a row or a block; rotated formats store W R, so W = (q * scale) R, because R R = 1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from wan.checkpoints.safetensors_file import DTYPES, Entry, TensorStore
from wan.utils.files import parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATS = ("F32", "F16", "BF16")
METADATA_KEY = "_quantization_metadata"
MARKER = ".comfy_quant"
DATA = "._data"  # optimum-quanto: the numbers of the weight before it
SCALES = (".weight_scale", ".scale_weight", ".weight_scale_inv", ".weight._scale")  # multiply the weight
UNUSED = (".input_scale", ".scale_input", ".output_scale")  # for activations in 8 bits; no weight depends on them
KNOWN_FLAGS = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")  # flags that leave the numbers alone
WHOLE, ROW, BLOCK = "tensor", "row", "block"  # what one scale is for


class Format(NamedTuple):
    name: str
    dtype: str = ""
    scales: tuple[str, ...] = ()  # what one scale may be for; none: the numbers are the weight
    flags: tuple[str, ...] = ()  # further ones of its markers
    tensors: tuple[str, ...] = ()  # endings of names that no other format has
    runs: str = ""  # who runs a format that is not read here


TABLE = (
    Format("float64", "F64"),
    Format("float8_e4m3fn", "F8_E4M3", (WHOLE, ROW, BLOCK)),
    Format("float8_e5m2", "F8_E5M2", (WHOLE, ROW, BLOCK)),
    Format("float8_e4m3fn_rowwise", "F8_E4M3", (ROW,), ("per_row",)),
    Format("float8_e4m3fn_blockwise", "F8_E4M3", (BLOCK,), ("group_size",)),
    Format("int8_tensorwise", "I8", (WHOLE, ROW), ("convrot", "convrot_groupsize", "per_row")),
    Format("int8_blockwise", runs="ComfyUI"),
    Format("nvfp4", tensors=(".weight_scale_2",), runs="ComfyUI and LightX2V"),
    Format("mxfp8", runs="ComfyUI"),
    Format("hybrid_mxfp8", runs="ComfyUI"),
    Format("SVDQuant", tensors=(".qweight", ".wscales", ".smooth_factor"), runs="nunchaku"),
    Format("QuIP", tensors=(".Qidxs", ".SU", ".SV"), runs="the program that wrote it"),
    Format("bitsandbytes", tensors=(".absmax", ".quant_map", ".SCB"), runs="diffusers"),
)
FORMATS = {row.name: row for row in TABLE}
UNMARKED = {row.dtype: row for row in reversed(TABLE) if row.dtype}  # the first row of a dtype is the plain one


@dataclass
class Layer:
    """One weight: its tensor and scale in the file, its marker, and tensors beside them that nobody here knows."""

    weight: str = ""
    scale: str | None = None
    marker: dict[str, Any] | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Quantised(Entry):
    """A weight in float32: a scale serves `height` x `width` numbers, `rotation` inputs were rotated together."""

    weight: Entry
    scale: Entry | None = None
    height: int = 1
    width: int = 0  # 0: all of the row
    rotation: int = 0  # 0: none

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        import torch

        from wan.modules.quantised_linear import rotated

        q = self.weight.read(name, rows)
        memory = torch.empty(4 * q.numel(), dtype=torch.uint8) if buffer is None else buffer[: 4 * q.numel()]
        weight = memory.view(torch.float32).view(q.shape).copy_(q)
        if self.scale is not None and q.numel():
            scale = self._scales(name, rows)
            weight.view(len(q) if q.dim() else 1, scale.shape[1], -1).mul_(scale[:, :, None])
        if self.rotation:
            weight.copy_(rotated(weight, self.rotation))
        return weight

    @property
    def by_row(self) -> torch.dtype | None:
        """The dtype of the numbers if each scale covers a row or more; None for scales by block."""
        import torch

        return None if self.width else getattr(torch, DTYPES[self.weight.dtype][0])

    def read_as_stored(
        self, name: str, rows: slice | None = None, buffer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(numbers in 8 bits, float32 scales [rows, 1]): one scale for all, or none, becomes one for each row."""
        q = self.weight.read(name, rows, buffer)
        return q, self._scales(name, rows).expand(len(q), 1)

    def _scales(self, name: str, rows: slice | None) -> Tensor:
        """float32 [rows, scales of a row], or [1, 1] if there is one for the whole tensor."""
        import torch

        if self.scale is None:
            return torch.ones(1, 1)
        if math.prod(self.scale.shape) == 1:
            return self.scale.read(name).float().reshape(1, 1)
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        first, last = start // self.height, math.ceil(stop / self.height)
        scale = self.scale.read(name, slice(first, last)).float().view(last - first, math.prod(self.scale.shape[1:]))
        return scale.repeat_interleave(self.height, 0)[start - first * self.height :][: stop - start]


def int8_rotations(store: TensorStore) -> dict[str, int]:
    """Inputs that were rotated together, by name, of the weights in int8 that can be computed as they are stored."""
    import torch

    found = ((name, entry) for name, entry in store.items() if isinstance(entry, Quantised))
    return {name: entry.rotation for name, entry in found if entry.by_row == torch.int8}


def int8_marker(rotation: int) -> dict[str, Any]:
    """The marker of a weight in int8 with a scale per row; rotation: inputs that were rotated together."""
    rotated = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
    return {"format": "int8_tensorwise", "per_row": True, **rotated}


def markers(store: TensorStore) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layer as the file names it, what header or a tensor says of its format). ValueError if one is unreadable."""
    found: list[tuple[str, Any]] = []
    for metadata in store.metadata_by_file:
        if METADATA_KEY in metadata:
            content = parse_json(metadata[METADATA_KEY])
            version = content.get("format_version", "1.0") if isinstance(content, dict) else None
            if version != "1.0" or not isinstance(content.get("layers"), dict):
                raise ValueError(f"its {METADATA_KEY} has no layers, or another version than 1.0")
            found += content["layers"].items()
    for name, entry in store.items():
        if name.endswith(MARKER):
            try:
                if entry.dtype != "U8" or len(entry.shape) != 1 or entry.bytes > 1 << 16:
                    raise ValueError("no text")
                found.append((name.removesuffix(MARKER), parse_json(store.read(name).numpy().tobytes())))
            except ValueError as e:
                raise ValueError(f"its marker {name:.100} is no JSON: {e}") from e
    for layer, marker in found:
        if not isinstance(marker, dict) or not isinstance(marker.get("format"), str):
            raise ValueError(f"its marker of layer {layer:.100} names no format")
        yield layer, marker


def layers_of(names: Mapping[str, str], marked: Mapping[str, dict[str, Any]]) -> dict[str, Layer]:
    """Weights by plain name, from names in the file -> plain and markers by plain name of the layer. ValueError."""
    layers = {f"{stem}.weight": Layer(marker=marker) for stem, marker in marked.items()}
    by_stem = defaultdict[str, list[str]](list)
    for name, plain in names.items():
        if plain.endswith((*UNUSED, MARKER)):
            continue
        scale = next((ending for ending in SCALES if plain.endswith(ending)), "")
        weight = f"{plain.removesuffix(scale)}.weight" if scale else plain.removesuffix(DATA)
        layer = layers.setdefault(weight, Layer())
        if layer.scale if scale else layer.weight:
            raise ValueError(f"it has {name:.100} a second time in another spelling")
        if scale:
            layer.scale = name
        else:
            layer.weight = name
            by_stem[weight.rpartition(".")[0]].append(weight)
    for weight, layer in layers.items():
        if layer.scale or layer.marker:
            stem = weight.removesuffix(".weight")
            beside = by_stem[stem] + by_stem[weight]
            layer.others = tuple(name for name in beside if name not in (weight, f"{stem}.bias"))
    return layers


def entry_of(plain: str, layer: Layer, store: TensorStore) -> Entry:
    """The weight as floats. ValueError, to follow its name, says why it is not read."""
    if not layer.weight:
        raise ValueError("has a scale or a marker but is missing")
    entry, marker = store[layer.weight], layer.marker or {}
    row = _format_of(plain, layer, entry)
    if row is None:
        return entry
    found = Quantised(entry.file, "F32", entry.shape, entry.offset, store.stored(layer.weight), weight=entry)
    if layer.scale is None:
        if marker or entry.dtype == "I8":
            raise ValueError(f"is {row.name} without a scale")
        return found
    scale, whole = store[layer.scale], list(entry.shape)
    unit, rows, columns = _block(entry.shape, scale.shape)
    if scale.dtype not in FLOATS or unit not in row.scales:
        raise ValueError(f"is {row.name} with a scale of {list(scale.shape)} {scale.dtype}")
    size, shape = marker.get("group_size", columns), marker.get("orig_shape", whole)
    if columns not in (0, size) or (rows not in (1, size, entry.shape[0]) and "group_size" in marker):
        raise ValueError(f"has a group_size of {size!r:.40}, which its scale of {list(scale.shape)} is not")
    if shape != whole:
        raise ValueError(f"was {shape!r:.60}, and is {whole}")
    if layer.marker is None and entry.dtype == "I8" and "convrot" in entry.file.name.lower():
        raise ValueError("is int8, and nothing in the file says how the convrot of its name was applied")
    return replace(found, scale=scale, height=rows, width=columns, rotation=_rotation(marker, entry.shape))


def _format_of(plain: str, layer: Layer, entry: Entry) -> Format | None:
    """The row of the table; None for plain floats."""
    names, marker = (plain, *layer.others), layer.marker or {}
    foreign = (row for row in TABLE if row.tensors and any(name.endswith(row.tensors) for name in names))
    row = FORMATS.get(marker["format"]) if marker else next(foreign, UNMARKED.get(entry.dtype))
    if row is None and marker:
        raise ValueError(f"is in the format {marker['format']!r:.60}, which is not known here")
    if row is None and entry.dtype in FLOATS and not layer.scale:
        return None
    if row is None:
        raise ValueError(f"is stored as {entry.dtype}{' with a scale' if layer.scale else ''}")
    if row.runs:
        raise ValueError(f"is in the format {row.name}, which is not read here; {row.runs} may run it")
    if flags := set(marker) - {*KNOWN_FLAGS, *row.flags}:
        raise ValueError(f"is {row.name} with the unknown flag {min(flags)!r:.60}")
    if layer.others:
        raise ValueError(f"is {row.name} with the unknown tensor {layer.others[0]:.100}")
    if entry.dtype != row.dtype:
        raise ValueError(f"is marked {row.name} but stored as {entry.dtype}")
    return row


def _block(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[str, int, int]:
    """(what a scale is for, its rows, its columns; 0: all of them); ("", 0, 0) where the shapes do not say it. A block
    has a power of two of rows and columns, which no rounding up of their number can imitate. One scale for each column
    is not taken: it may be meant for the rows of a transposed matrix."""
    count = shape[0] if shape else 1
    if math.prod(scale) == 1:
        return WHOLE, count, 0
    if math.prod(scale) == scale[0] == count:
        return ROW, 1, 0
    if len(shape) != 2 or len(scale) != 2 or not all(scale):
        return "", 0, 0
    rows, columns = shape[0] // scale[0], shape[1] // scale[1]
    pairs = zip(scale, shape, (rows, columns), strict=True)
    exact = all(n == 1 or (size == n * block and block.bit_count() == 1) for n, size, block in pairs)
    return (BLOCK, rows, 0 if scale[1] == 1 else columns) if exact and columns > 1 else ("", 0, 0)


def _rotation(marker: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Inputs that were rotated together, 0 for none."""
    rotated, size = marker.get("convrot", False), marker.get("convrot_groupsize", 256)
    if type(rotated) is not bool or ("convrot_groupsize" in marker and "convrot" not in marker):
        raise ValueError(f"is marked with convrot {rotated!r:.40}, neither true nor false")
    if not rotated:
        return 0
    power_of_4 = type(size) is int and size > 1 and size.bit_count() == 1 and size.bit_length() % 2
    if not power_of_4 or len(shape) != 2 or shape[1] % size:
        raise ValueError(f"of {list(shape)} has a convrot_groupsize of {size!r:.40}, not a power of 4 of it")
    return int(size)
