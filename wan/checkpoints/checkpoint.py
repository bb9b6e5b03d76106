"""Checkpoints, opened from headers: every part is there and fits the others, before any weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import nn

from wan.checkpoints import layout
from wan.checkpoints.safetensors_file import TensorStore, fingerprint, reading
from wan.checkpoints.weights import EXPERT, TEXT_ENCODER, VAE, as_ours, kinds_in, open_expert, open_file
from wan.configs import TaskConfig, task_of
from wan.configs.task import PATCH
from wan.modules.model import WanModel, released_transformer
from wan.modules.t5 import UMT5Encoder, UMT5Tokenizer, released_text_encoder
from wan.modules.vae import WanVAE, released_vae
from wan.utils.errors import InputError, first_line
from wan.utils.files import parse_json

Module = TypeVar("Module", bound=nn.Module)

HEAD_WIDTH = 128  # of every published Wan transformer; it does not follow from the weights
# sizes in config.json -> the tensor, its axis, and how many times the size that axis is
SIZED_BY = {
    "dim": ("text_embedding.0.weight", 0, 1), "ffn_dim": ("blocks.0.ffn.0.weight", 0, 1),
    "in_dim": ("patch_embedding.weight", 1, 1), "out_dim": ("head.head.weight", 0, math.prod(PATCH)),
    "freq_dim": ("time_embedding.0.weight", 1, 1),
}  # fmt: skip
DIFFUSERS_KEYS = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}


@dataclass(frozen=True)
class Part(Generic[Module]):
    """One network: its module on the meta device, and the file of its weights."""

    module: Module
    weights: TensorStore


@dataclass(frozen=True)
class OpenCheckpoint:
    """A whole checkpoint, known from its headers."""

    folder: Path | None  # None where files alone serve
    files: Mapping[str, Path]  # by part, which replace the folder's
    experts: Mapping[str, Part[WanModel]]
    text_encoder: Part[UMT5Encoder]
    vae: Part[WanVAE]
    tokenizer: UMT5Tokenizer
    tokenizer_file: Path | None
    warnings: tuple[str, ...] = ()

    def weight_files(self) -> dict[str, list[Path]]:
        """Files by network, and the tokenizer's, which affects a video too."""
        files = {f"{name} expert": part.weights.files for name, part in self.experts.items()}
        files |= {"text encoder": self.text_encoder.weights.files, "VAE": self.vae.weights.files}
        return files | {"tokenizer": [self.tokenizer_file] if self.tokenizer_file else []}


def released_checkpoint(config: TaskConfig) -> OpenCheckpoint:
    """The released networks without files, for plans and for parts that nothing reads."""
    nothing = TensorStore({})
    experts = {name: Part(released_transformer(config.name), nothing) for name in config.experts}
    encoder, vae = Part(released_text_encoder(), nothing), Part(released_vae(config.name), nothing)
    return OpenCheckpoint(None, {}, experts, encoder, vae, cast(Any, None), None)  # no text is read


def open_checkpoint(
    folder: Path | None, config: TaskConfig, files: Mapping[str, Path] | None = None, *, vae_only: bool = False
) -> OpenCheckpoint:
    """Open every part, or the VAE beside released networks; no weight is read. InputError with all problems.
    files: by part (see `layout`), which replace the folder's; without a folder, all of them."""
    files, problems = dict(files or {}), list[str]()
    opener = _Opener(folder, config, files)
    if vae_only:
        with _readable():
            return replace(released_checkpoint(config), folder=folder, files=files, vae=opener.vae())
    if folder is not None:
        with _readable():
            layout.check_complete(folder, config, files)
    ways: dict[str, Callable[[], Any]] = {name: partial(opener.expert, name) for name in config.experts}
    ways |= {TEXT_ENCODER: opener.text_encoder, VAE: opener.vae, "tokenizer": opener.tokenizer}
    found: dict[str, Any] = {}
    for part, way in ways.items():
        try:
            with _readable():
                found[part] = way()
        except InputError as e:
            problems += e.problems
    if problems:
        raise InputError(problems)
    tokenizer, file = found.pop("tokenizer"), opener.path("tokenizer")
    rows, text_width = found[TEXT_ENCODER].weights["token_embedding.weight"].shape
    if len(tokenizer) > rows:
        problems.append(f"{file}: has {len(tokenizer):,} tokens, the text encoder {rows:,}: not of one model")
    experts = {name: found[name] for name in config.experts}
    for name, expert in experts.items():
        if (width := expert.weights["text_embedding.0.weight"].shape[1]) != text_width:
            problems.append(f"{opener.place(name)}: reads text of width {width}, the encoder has {text_width}")
    if problems:
        raise InputError(problems)
    contents = {tuple(map(fingerprint, expert.weights.files)) for expert in experts.values()}
    same = f"{opener.place(next(iter(experts)))} serves as {' and '.join(experts)} noise expert: the same weights"
    warnings = [same] if len(contents) < len(experts) else []
    for each in dict.fromkeys(files[part] for part in files if part in found):
        parts = [part for part in files if files[part] == each and part in found]
        kinds = {EXPERT if part in experts else part for part in parts}
        if rest := [kind for kind in kinds_in(found[parts[0]].weights.source) if kind not in kinds]:
            read = " and ".join(f"--{kind}" for kind in sorted(kinds))
            warnings.append(f"{each} is a whole checkpoint: it serves as {read}, its {' and '.join(rest)} is left out")
    return OpenCheckpoint(folder, files, experts, found[TEXT_ENCODER], found[VAE], tokenizer, file, tuple(warnings))


def open_single(part: str, file: Path, config: TaskConfig) -> Part[Any]:
    """One file as the VAE or the text encoder, judged as for a run. InputError with all problems."""
    opener = _Opener(None, config, {part: file})
    with _readable():
        return opener.vae() if part == VAE else opener.text_encoder()


@contextmanager
def _readable() -> Iterator[None]:
    """Turn errors of the file system into InputError."""
    try:
        yield
    except OSError as e:
        why = "there is no permission to read it" if isinstance(e, PermissionError) else f"not read ({e.strerror})"
        raise InputError(f"{e.filename}: {why}") from e


@dataclass(frozen=True)
class _Opener:
    """Each method raises InputError with all problems of its part."""

    folder: Path | None
    config: TaskConfig
    files: Mapping[str, Path]

    def path(self, part: str) -> Path:
        if part in self.files or self.folder is None:
            return self.files[part]
        return layout.path_of(self.folder, self.config, part)

    def place(self, expert: str) -> Path:
        return self.path(expert) if expert in self.files else self.path(expert).parent

    def expert(self, name: str) -> Part[WanModel]:
        path, where = self.path(name), str(self.place(name))
        store = open_expert(path) if name in self.files else as_ours(open_file(path), EXPERT, where)
        shapes = store.shapes
        channels = (*shapes.get("patch_embedding.weight", ()), 0, 0)[1]
        if channels not in (0, self.config.in_dim):
            belongs = f"it belongs to {task_of(shapes)}, " if task_of(shapes) else ""
            needed = f"--task {self.config.name} needs {self.config.in_dim}"
            raise InputError(f"{where} has {channels} input channels: {belongs}{needed}")
        config = layout.path_of(self.folder, self.config, name).with_name("config.json") if self.folder else None
        sizes = transformer_sizes(config if config and config.is_file() else None, shapes, where, self.config.text_len)
        with torch.device("meta"):
            module = WanModel.from_config(sizes, text_dim=shapes["text_embedding.0.weight"][1])
        return _matched(module, store, where)

    def text_encoder(self) -> Part[UMT5Encoder]:
        part = self._sized_by_weights(TEXT_ENCODER, UMT5Encoder.from_shapes)
        shapes = part.weights.shapes
        width, heads = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.pos_embedding.embedding.weight"][1]
        if not heads or width % heads:
            where = self.path(TEXT_ENCODER)
            raise InputError(f"{where}: not a UMT5 encoder: {heads} heads do not divide a width of {width}")
        return part

    def tokenizer(self) -> UMT5Tokenizer:
        file = self.path("tokenizer")
        with reading(file, "not a tokenizer"):
            file.open("rb").close()  # the library reports a file without permission as a damaged one
            tokenizer = UMT5Tokenizer(file.parent, self.config.text_len)
            if len(tokenizer("a cat")) < 2:
                raise ValueError("it makes no tokens of a text")
        return tokenizer

    def vae(self) -> Part[WanVAE]:
        part = self._sized_by_weights(VAE, WanVAE.from_shapes)
        if part.module.stride != self.config.vae_stride:
            stride = f"has stride {part.module.stride}"
            raise InputError(f"{self.path(VAE)}: {stride}, --task {self.config.name} needs another VAE")
        return part

    def _sized_by_weights(self, part: str, build: Callable[[Mapping[str, tuple[int, ...]]], Module]) -> Part[Module]:
        """A network whose sizes follow from the shapes of its weights."""
        path = self.path(part)
        store = as_ours(open_file(path), part, str(path))
        try:
            _count_blocks(store.shapes)
            with torch.device("meta"):
                module = build(store.shapes)
        except Exception as e:  # whatever PyTorch trips over in a file is the file's fault
            raise InputError(f"{path}: {first_line(e)}") from e
        return _matched(module, store, str(path))


def _matched(module: Module, store: TensorStore, where: str) -> Part[Module]:
    """InputError, with every difference, unless names and shapes are exactly the module's."""
    expected, found = {name: tuple(p.shape) for name, p in module.named_parameters()}, store.shapes
    problems = []
    for names, what in ((expected.keys() - found.keys(), "missing"), (found.keys() - expected.keys(), "unexpected")):
        if names:
            more = ", ..." if len(names) > 3 else ""
            problems.append(f"{where}: {len(names)} tensors are {what}: {', '.join(sorted(names)[:3])}{more}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"{where}: {name} has shape {list(found[name])}, expected {list(expected[name])}")
    if problems:
        raise InputError(problems)
    return Part(module, store)


def transformer_sizes(
    config: Path | None, shapes: Mapping[str, tuple[int, ...]], where: str, max_text: int
) -> dict[str, Any]:
    """The sizes in config.json; without one those of the weights, with heads as wide as in all published models.
    where: the weights in messages. max_text: tokens of the longest prompt. InputError for sizes that do not fit."""
    found: dict[str, float] = {}
    try:
        for key, (name, axis, times) in SIZED_BY.items():
            if len(shapes.get(name, ())) < 2:
                raise ValueError(f"tensor {name} is missing, or has too few axes")
            found[key] = shapes[name][axis] / times
        found["num_layers"] = _count_blocks(shapes)
    except ValueError as e:
        raise InputError(f"{where}: not a Wan transformer: {e}") from e
    if config is None:
        if found["dim"] % HEAD_WIDTH or not found["dim"] or not found["out_dim"].is_integer():
            odd = f"the weights do not tell their heads, and a width of {found['dim']:g} is no multiple of {HEAD_WIDTH}"
            raise InputError(f"{where}: {odd}; give the folder with their config.json as --ckpt_dir")
        sizes: dict[str, Any] = {key: int(size) for key, size in found.items()}
        return sizes | {"num_heads": sizes["dim"] // HEAD_WIDTH, "text_len": max_text, "eps": 1e-6}
    with reading(config, "not the configuration of a Wan transformer"):
        values = parse_json(config.read_bytes())
        if "num_attention_heads" in values:
            values |= {ours: values[theirs] for ours, theirs in DIFFUSERS_KEYS.items()} | {"text_len": max_text}
            widths = values["num_heads"], values["attention_head_dim"]
            values["dim"] = math.prod(widths) if all(type(width) is int for width in widths) else None
        sizes = {key: values[key] for key in (*found, "num_heads", "text_len", "eps")}
    right = {key: type(size) is int and size > 0 for key, size in sizes.items()}
    right["eps"] = isinstance(sizes["eps"], float) and 0 < sizes["eps"] < 1
    if bad := [f"{key} is {sizes[key]!r:.40}" for key in sizes if not right[key]]:
        raise InputError(f"{config}: not the configuration of a Wan transformer: {', '.join(bad)}")
    differ = [(key, size) for key, size in found.items() if size != sizes[key]]
    wrong = [f"{key} is {sizes[key]!r:.40}, but the weights have {size:g}" for key, size in differ]
    if sizes["dim"] % (2 * sizes["num_heads"]):
        wrong.append(f"num_heads {sizes['num_heads']!r:.40} does not divide dim {sizes['dim']} into an even width")
    if sizes["text_len"] > max_text:
        wrong.append(f"text_len is {sizes['text_len']!r:.40}, at most {max_text} is possible")
    if wrong:
        blamed = config if where == str(config.parent) else where  # a file of its own, not the folder
        raise InputError(f"{blamed}: the weights do not fit {config}: {'; '.join(wrong)}")
    return sizes


def _count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of blocks by the names. ValueError where one is left out: a name alone makes no million blocks."""
    found = {match[1] for name in shapes if (match := re.match(r"blocks\.([^.]*)", name))}
    if odd := found - {str(number) for number in range(len(found))}:
        raise ValueError(f"a tensor is of block {min(odd)!r:.40}, but there are {len(found)} blocks")
    return len(found)
