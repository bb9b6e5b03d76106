"""The weights of one network under our names, whatever file they come in and whoever named and quantised them.

Files: safetensors (whole or shards by their index), `.pth`, GGUF. Names: the released ones, behind the prefixes that
other front ends add, diffusers', transformers' and llama.cpp's. Weights quantised with one scale for the tensor or one
for each row (fp8, int8) are given as float32, W = q * scale, which loses nothing beyond that product's rounding, and
e4m3 also as it is stored; GGUF's are float32 as the file gives them. All else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wan.checkpoints import layout
from wan.checkpoints.gguf_file import GgufStore
from wan.checkpoints.key_mapping import original, original_llama_text, original_text, original_vae
from wan.checkpoints.pth_file import PickleStore
from wan.checkpoints.safetensors_file import Entry, TensorStore
from wan.configs import TaskConfig
from wan.utils.errors import LoraError

if TYPE_CHECKING:
    from torch import Tensor

EXPERT, TEXT_ENCODER, VAE = "expert", "text_encoder", "vae"  # kinds of networks
GGUF, PICKLED = ".gguf", (".pth", ".pt", ".bin", ".ckpt")  # suffixes; all other files are safetensors
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
SCALES = (".weight_scale", ".scale_weight")  # LightX2V's and ComfyUI's name for what a layer's weight is multiplied by
ACTIVATION_SCALES = (".input_scale", ".scale_input")  # for products in 8 bits; the weight does not depend on them
NO_WEIGHTS = ("scaled_fp8", "spiece_model")  # a marker, and a tokenizer, that ComfyUI's files carry
SPARSE = "its weights need sparse linear attention (their proj_l tensors), without which they make other videos"
FLOATS = ("F32", "F16", "BF16")
QUANTISED = ("F8_E4M3", "F8_E5M2", "I8")
Naming = Callable[[Iterable[str]], dict[str, str]]  # names in a file -> ours; those that say nothing are left out


class NamedWeights(TensorStore):
    """Tensors of another store by our names, quantised ones as float32. Entries tell the dtype that `read` gives."""

    def __init__(self, raw: TensorStore, names: Mapping[str, str], scales: Mapping[str, str]) -> None:
        """names: ours -> the tensor in `raw`. scales: ours -> what the tensor is multiplied by, in `raw`."""
        entries = {ours: raw[theirs] for ours, theirs in names.items()}
        quantised = {n: Entry(e.file, "F32", e.shape, e.offset) for n, e in entries.items() if e.dtype in QUANTISED}
        super().__init__(entries | quantised, raw.metadata)
        self._raw, self._names, self._scales, self._quantised = raw, names, scales, set(quantised)

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """As TensorStore.read; quantised weights come as q * scale in float32."""
        import torch

        if name not in self._quantised:
            return self._raw.read(self._names[name], rows, buffer)
        stored = self._raw.read(self._names[name], rows)
        room = torch.empty(4 * stored.numel(), dtype=torch.uint8) if buffer is None else buffer[: 4 * stored.numel()]
        weight = room.view(torch.float32).view(stored.shape).copy_(stored)
        if name in self._scales:
            weight.mul_(self._scale(name, rows).reshape(-1, *[1] * (weight.dim() - 1)))
        return weight

    def read_fp8(
        self, name: str, rows: slice | None = None, buffer: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """As TensorStore.read_fp8: the numbers as they are in the file, one scale for all or none as one for each."""
        import torch

        theirs = self._names[name]
        if self._raw[theirs].dtype != "F8_E4M3":
            return None
        q = self._raw.read(theirs, rows, buffer)
        scale = self._scale(name, rows) if name in self._scales else torch.ones(1)
        return q, scale.reshape(-1, 1).expand(len(q), 1)

    def _scale(self, name: str, rows: slice | None) -> Tensor:
        """float32: one number, or one for each of the rows."""
        scale = self._raw[self._scales[name]]
        return self._raw.read(self._scales[name], rows if math.prod(scale.shape) > 1 else None).float()


def open_file(path: Path) -> TensorStore:
    """The tensors of a file of any of the forms, as they are. TensorFileError for a damaged one; headers only."""
    suffix = path.suffix.lower()
    if suffix == GGUF:
        return GgufStore(path)
    return PickleStore(path) if suffix in PICKLED else TensorStore.open(path)


def as_ours(raw: TensorStore, kind: str, where: str) -> TensorStore:
    """The network of this kind (EXPERT, TEXT_ENCODER or VAE) that a file holds, under our names.

    where: the file in messages. LoraError for what is stored in a form that is not known here.
    """
    plain = {name: _plain(name) for name in raw}
    plain = {n: p for n, p in plain.items() if p not in NO_WEIGHTS and not p.endswith(ACTIVATION_SCALES)}
    weight_of = {n: f"{p.rpartition('.')[0]}.weight" if p.endswith(SCALES) else p for n, p in plain.items()}
    ours = NAMINGS[kind](weight_of.values())
    names: dict[str, str] = {}
    scales: dict[str, str] = {}
    for name, weight in weight_of.items():
        if weight in ours:
            into = scales if plain[name].endswith(SCALES) else names
            if into.setdefault(ours[weight], name) != name:
                raise LoraError(f"{where}: {name} says again, in another spelling, what another tensor says")
    odd = [problem for name in {*names, *scales} if (problem := _problem(name, raw, names.get(name), scales.get(name)))]
    if odd:
        raise LoraError(
            f"{where}: {len(odd)} tensors are stored in a form that is not read here (first: {min(odd)}); "
            "weights are floats, or fp8 and int8 with one scale for a tensor or a row"
        )
    if not scales and list(names) == list(raw) and all(entry.dtype in FLOATS for entry in raw.values()):
        return raw  # as it should be
    return NamedWeights(raw, names, scales)


def kind_of(names: Iterable[str]) -> str | None:
    """Which kind of network has parameters of these names, in whatever spelling; None for a LoRA and other things."""
    plain = [_plain(name) for name in names]
    return next((kind for kind, sign in SIGNS.items() if sign in NAMINGS[kind](plain).values()), None)


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _as_they_are_unless(*spellings: tuple[str, Naming]) -> Naming:
    """Names of a network as the first naming has them of which one begins with the sign, else as they are."""

    def ours(names: Iterable[str]) -> dict[str, str]:
        listed = list(names)
        for sign, rename in spellings:
            if any(name.startswith(sign) for name in listed):
                return rename(listed)
        return {name: name for name in listed}

    return ours


# a parameter that each network of the kind has, and no other
SIGNS = {EXPERT: "blocks.0.self_attn.q.weight", TEXT_ENCODER: "blocks.0.attn.q.weight", VAE: "decoder.conv1.weight"}
NAMINGS: dict[str, Naming] = {
    EXPERT: _as_they_are_unless(("condition_embedder.", original)),
    TEXT_ENCODER: _as_they_are_unless(("encoder.block.", original_text), ("enc.blk.", original_llama_text)),
    VAE: _as_they_are_unless(("quant_conv.", original_vae)),
}


def _problem(name: str, raw: TensorStore, stored: str | None, scaled_by: str | None) -> str | None:
    """What keeps this weight from being read, None if nothing does."""
    if stored is None:
        return f"{name} has a scale but is missing"
    entry = raw[stored]
    if entry.dtype not in FLOATS + QUANTISED:
        return f"{name} is {entry.dtype}"
    if scaled_by is None:
        return f"{name} is int8 without a scale" if entry.dtype == "I8" else None
    if entry.dtype not in QUANTISED:
        return f"{name} has a scale but is {entry.dtype}"
    scale = raw[scaled_by]
    if scale.dtype not in FLOATS or scale.shape not in _scale_shapes(entry.shape):
        return f"{name} has a scale of {list(scale.shape)} {scale.dtype}"
    return None


def _scale_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One number, or one for each row."""
    return [(), (1,), (1, 1), shape[:1], (*shape[:1], *[1] * (len(shape) - 1))]


def open_parts(folder: Path, config: TaskConfig, parts: Collection[str]) -> dict[str, TensorStore]:
    """Networks of a checkpoint folder of either layout under our names; those whose files are missing are left out."""
    found = {}
    for part in parts:
        path = layout.path_of(folder, config, part)
        if path.is_file():
            is_expert = part in config.experts
            where = str(path.parent if is_expert else path)
            found[part] = as_ours(open_file(path), EXPERT if is_expert else part, where)
    return found


def open_expert(path: Path) -> TensorStore:
    """One file as the replacement of an expert, under the base's names.

    Raises TensorFileError for a damaged file, LoraError for one that is no full expert or is quantised otherwise.
    """
    raw = open_file(path)
    if any(".proj_l." in name for name in raw):
        raise LoraError(f"--expert {path} cannot be run: {SPARSE}")
    if kind_of(raw) != EXPERT:
        raise LoraError(f"--expert {path}: not a full expert, {SIGNS[EXPERT]} is missing (a LoRA goes to --lora)")
    return as_ours(raw, EXPERT, f"--expert {path}")
