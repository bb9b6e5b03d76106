"""The weights of one network under our names, whatever file they come in and whoever named and quantised them.

Quantised weights are given as float32 (see `quantised_formats` and `gguf_file`); e4m3 and int8, with a scale per row or
fewer, also as they are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wan.checkpoints import layout
from wan.checkpoints.gguf_file import GGUF_MAGIC, open_gguf
from wan.checkpoints.key_mapping import LLAMA, original, original_text, original_vae
from wan.checkpoints.pth_file import open_pickle
from wan.checkpoints.quantised_formats import DATA, entry_of, layers_of, markers
from wan.checkpoints.safetensors_file import TensorStore, size_of
from wan.configs import TaskConfig
from wan.configs.task import PATCH
from wan.utils.errors import LoraError

EXPERT, TEXT_ENCODER, VAE = "expert", "text_encoder", "vae"  # kinds of networks
GGUF, PICKLED = ".gguf", (".pth", ".pt", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", GGUF, *PICKLED)  # in lower case; files with others are opened by their first bytes
ZIP_MAGIC = b"PK\x03\x04"  # of a pickle
# a checkpoint in one file: prefix -> the kind of network behind it
ALL_IN_ONE = {"model.diffusion_model.": EXPERT, "text_encoders.umt5xxl.": TEXT_ENCODER, "vae.": VAE,
              "first_stage_model.": VAE}  # fmt: skip
PREFIXES = ("diffusion_model.", "model.", "module.", "pipe.", "dit.", "generator.", "generator_ema.", "transformer.",
            "transformer_2.")  # fmt: skip
# a parameter that each network of the kind has, and no other
SIGNS = {EXPERT: "blocks.0.self_attn.q.weight", TEXT_ENCODER: "blocks.0.attn.q.weight", VAE: "decoder.conv1.weight"}
# how other programs' names of a network begin, and what renames them; other names stay
SPELLINGS: dict[str, dict[str, Callable[[Iterable[str]], dict[str, str]]]] = {
    EXPERT: {"condition_embedder.": original},
    TEXT_ENCODER: {"encoder.block.": original_text, "enc.blk.": partial(original_text, spelling=LLAMA)},
    VAE: {"quant_conv.": original_vae},
}
WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module)\.")  # anywhere in a name
SPARSE = "its weights need sparse linear attention (their proj_l tensors), without which they make other videos"
NO_WEIGHTS = ("scaled_fp8", "spiece_model")  # a marker, and a tokenizer, in ComfyUI's files


def open_file(path: Path) -> TensorStore:
    """The tensors of a file of any form, as they are; headers only. TensorFileError for a damaged one."""
    start, suffix = b"", path.suffix.lower()  # the first bytes decide where the suffix says nothing
    if suffix not in (*WEIGHT_SUFFIXES, ".json") and size_of(path):
        with path.open("rb") as file:
            start = file.read(4)
    if suffix == GGUF or start == GGUF_MAGIC:
        return open_gguf(path)
    return open_pickle(path) if suffix in PICKLED or start == ZIP_MAGIC else TensorStore.open(path)


def as_ours(source: TensorStore, kind: str, where: str) -> TensorStore:
    """The network of this kind (EXPERT, TEXT_ENCODER or VAE) in a file, under our names.
    where: the file in messages. LoraError for weights that are stored in a form that is not known here."""
    parts = {name: _part_of(name) for name in source}
    wanted = kind if kind in parts.values() else None
    plain = {name: strip_prefixes(name) for name, part in parts.items() if part == wanted}
    plain = {name: each for name, each in plain.items() if each not in NO_WEIGHTS}
    here, everywhere = set(plain.values()), {strip_prefixes(name) for name in source}
    marked: dict[str, Any] = {}  # by plain name of a layer of this part, or of one that the file does not have
    try:
        for layer, marker in markers(source):
            name = strip_prefixes(layer)
            elsewhere = f"{name}.weight" in everywhere and f"{name}.weight" not in here
            if _part_of(layer) in (None, kind) and not elsewhere and marked.setdefault(name, marker) != marker:
                raise ValueError(f"its markers of layer {layer:.100} contradict each other")
        layers = layers_of(plain, marked)
    except ValueError as e:
        raise LoraError(f"{where}: {e}") from e
    names: dict[str, str] = {}
    for name, own in _our_names(kind, layers).items():
        if own in names:
            raise LoraError(f"{where}: it has {own} a second time in another spelling")
        names[own] = name
    if kind == EXPERT:
        _restore_axes(source, {own: layers[name].weight for own, name in names.items()})
    ours, problems = TensorStore({}, *source.metadata_by_file), []
    ours.source = source
    for own, name in names.items():
        try:
            ours[own] = entry_of(own, layers[name], source)
        except ValueError as e:
            problems.append(f"{own} {e}")
    if problems:
        what = f"{len(problems)} tensors are stored in a form that is not read here (first: {min(problems)})"
        raise LoraError(f"{where}: {what}")
    return ours


def kinds_in(names: Collection[str]) -> list[str]:
    """The kinds of networks that have parameters of these names, in any spelling; none for a LoRA and other files."""
    found = []
    for kind, sign in SIGNS.items():
        plain = [strip_prefixes(name).removesuffix(DATA) for name in names if _part_of(name) in (None, kind)]
        found += [kind] if sign in _our_names(kind, plain).values() else []
    return found


def open_parts(folder: Path, config: TaskConfig, parts: Collection[str]) -> dict[str, TensorStore]:
    """Networks of a checkpoint folder of either layout under our names; those whose files are missing are left out."""
    found = {}
    for part in parts:
        if (path := layout.path_of(folder, config, part)).is_file():
            kind, where = (EXPERT, path.parent) if part in config.experts else (part, path)
            found[part] = as_ours(open_file(path), kind, str(where))
    return found


def open_expert(path: Path) -> TensorStore:
    """One file as the replacement of an expert, under our names. LoraError for one that is no full expert."""
    source = open_file(path)
    if any(".proj_l." in name for name in source):
        raise LoraError(f"--expert {path} cannot be run: {SPARSE}")
    if EXPERT not in kinds_in(source):
        raise LoraError(f"--expert {path}: not a full expert, {SIGNS[EXPERT]} is missing (a LoRA goes to --lora)")
    return as_ours(source, EXPERT, f"--expert {path}")


def _part_of(name: str) -> str | None:
    return next((kind for prefix, kind in ALL_IN_ONE.items() if name.startswith(prefix)), None)


def strip_prefixes(name: str) -> str:
    """The name without what other programs put before and between its parts."""
    name = WRAPPERS.sub(r"\1", name)
    while prefix := next((each for each in (*ALL_IN_ONE, *PREFIXES) if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def _our_names(kind: str, names: Collection[str]) -> dict[str, str]:
    for sign, rename in SPELLINGS[kind].items():
        if any(name.startswith(sign) for name in names):
            return rename(names)
    return {name: name for name in names}


def _restore_axes(source: TensorStore, names: Mapping[str, str]) -> None:
    """Give the patch embedding its five axes [D, C, 1, 2, 2] where a writer of at most four joined or dropped some."""
    weight, bias = names.get("patch_embedding.weight"), names.get("patch_embedding.bias")
    if not weight or not bias or len(source[bias].shape) != 1 or len(source[weight].shape) == len(PATCH) + 2:
        return
    entry, width = source[weight], source[bias].shape[0]
    channels, rest = divmod(math.prod(entry.shape), width * math.prod(PATCH)) if width else (0, 1)
    if not rest and entry.shape and entry.shape[0] in (width, width * channels):
        source[weight] = replace(entry, shape=(width, channels, *PATCH))
