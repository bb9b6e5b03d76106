"""Checkpoints: what must be there, read off the headers before any weight is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from wan.checkpoints import hub, layout
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, TEXT_ENCODER, VAE, as_ours, open_expert, open_file
from wan.configs import TaskConfig, download_command
from wan.configs.task import PATCH
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.tokenizers import UMT5Tokenizer
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError
from wan.utils.strict_json import parse_json

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")

HEAD_WIDTH = 128  # of every published Wan transformer; their weights do not tell it
# sizes in config.json -> the tensor, its axis, and how many times the size that axis is
TOLD_BY = {
    "dim": ("text_embedding.0.weight", 0, 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0, 1),
    "in_dim": ("patch_embedding.weight", 1, 1),
    "out_dim": ("head.head.weight", 0, math.prod(PATCH)),
    "freq_dim": ("time_embedding.0.weight", 1, 1),
}
DIFFUSERS_KEYS = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}


@dataclass(frozen=True)
class Part(Generic[Module]):
    """One network: its module on the meta device, and the file of its weights."""

    module: Module
    weights: TensorStore


@dataclass(frozen=True)
class OpenCheckpoint:
    """A whole checkpoint, known from its headers.

    folder: None where files alone serve. files: by part, those that serve in place of the folder's.
    """

    folder: Path | None
    files: Mapping[str, Path]
    experts: Mapping[str, Part[WanModel]]
    text_encoder: Part[UMT5Encoder]
    vae: Part[WanVAE]
    tokenizer: UMT5Tokenizer
    tokenizer_file: Path

    def weight_files(self) -> dict[str, list[Path]]:
        """Files by network, and the tokenizer's, which affects a video too."""
        files = {f"{name} expert": part.weights.files for name, part in self.experts.items()}
        files |= {"text encoder": self.text_encoder.weights.files, "VAE": self.vae.weights.files}
        return files | {"tokenizer": [self.tokenizer_file]}


def open_checkpoint(folder: Path | None, config: TaskConfig, files: Mapping[str, Path] | None = None) -> OpenCheckpoint:
    """Open every part; no weight is read. InputError with all problems.

    files: by part (see `layout`), those that serve in place of the folder's; without a folder, all of them.
    """
    files = dict(files or {})
    if folder is not None:
        with _readable():
            layout.check_complete(folder, config, files)
    opener, problems = _Opener(folder, config, files), list[str]()
    experts = {name: _attempt(partial(opener.expert, name), problems) for name in config.experts}
    text_encoder = _attempt(opener.text_encoder, problems)
    tokenizer = _attempt(partial(opener.tokenizer, text_encoder), problems)
    vae = _attempt(opener.vae, problems)
    opened = {name: part for name, part in experts.items() if part is not None}
    if vae is None or text_encoder is None or tokenizer is None or len(opened) < len(experts):
        raise InputError(problems)
    _attempt(partial(opener.check_fit, opened, text_encoder, vae), problems)
    if problems:
        raise InputError(problems)
    return OpenCheckpoint(folder, files, opened, text_encoder, vae, tokenizer, opener.path("tokenizer"))


def open_single(part: str, file: Path, config: TaskConfig) -> Part[Any]:
    """One file as the VAE, the text encoder or an expert, judged as for a run. InputError with all problems."""
    opener = _Opener(None, config, {part: file})
    with _readable():
        if part == VAE:
            return opener.vae()
        return opener.text_encoder() if part == TEXT_ENCODER else opener.expert(part)


def _attempt(work: Callable[[], Result], problems: list[str]) -> Result | None:
    """`work()`, or None where its problems have joined the list."""
    try:
        with _readable():
            return work()
    except InputError as e:
        problems.extend(e.problems)
    return None


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
    """Opens the parts of one checkpoint, one by one; each method raises InputError with all problems of its part."""

    folder: Path | None
    config: TaskConfig
    files: Mapping[str, Path]

    def path(self, part: str) -> Path:
        """The file, or index, that holds the part."""
        if part in self.files or self.folder is None:
            return self.files[part]
        return layout.path_of(self.folder, self.config, part)

    def _name(self, expert: str) -> Path:
        """The expert in messages: its own file, or its folder."""
        return self.path(expert) if expert in self.files else self.path(expert).parent

    def expert(self, name: str) -> Part[WanModel]:
        path, where = self.path(name), str(self._name(name))
        store = open_expert(path) if name in self.files else as_ours(open_file(path), EXPERT, where)
        config = layout.path_of(self.folder, self.config, name).with_name("config.json") if self.folder else None
        if name in self.files and config and not config.is_file():
            config = None
        sizes = transformer_sizes(config, store.shapes, where, self.config.text_len)
        with torch.device("meta"):
            module = WanModel.from_config(sizes, text_dim=store["text_embedding.0.weight"].shape[1])
        _check_names_and_shapes(module, store, where)
        return Part(module, store)

    def text_encoder(self) -> Part[UMT5Encoder]:
        part = self._sized_by_weights("text_encoder", TEXT_ENCODER, UMT5Encoder.from_shapes)
        shapes = part.weights.shapes
        width, heads = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.pos_embedding.embedding.weight"][1]
        if not heads or width % heads:
            where = self.path("text_encoder")
            raise InputError(f"{where}: not a UMT5 encoder: {heads} heads do not divide a width of {width}")
        return part

    def tokenizer(self, text_encoder: Part[UMT5Encoder] | None) -> UMT5Tokenizer:
        file = self.path("tokenizer")
        file.open("rb").close()  # the library reports a file without permission as a damaged one
        try:
            tokenizer = UMT5Tokenizer(file.parent, self.config.text_len)
            works = len(tokenizer("a cat")) > 1
        except Exception as e:  # the library raises nothing more special
            raise InputError(f"{file}: not a tokenizer ({_line(e)}); get the file again") from e
        if not works:
            raise InputError(f"{file}: a tokenizer that makes no tokens of a text; get the file again")
        rows = text_encoder.weights["token_embedding.weight"].shape[0] if text_encoder else len(tokenizer)
        if len(tokenizer) > rows:
            raise InputError(f"{file}: has {len(tokenizer):,} tokens, the text encoder {rows:,}: not of one model")
        return tokenizer

    def vae(self) -> Part[WanVAE]:
        return self._sized_by_weights("vae", VAE, WanVAE.from_shapes)

    def check_fit(
        self, experts: Mapping[str, Part[WanModel]], text_encoder: Part[UMT5Encoder], vae: Part[WanVAE]
    ) -> None:
        """InputError if the parts do not belong to one model, or not to the task."""
        config, stride = self.config, vae.module.stride
        if stride != config.vae_stride:
            raise InputError(f"{self.path('vae')}: has stride {stride}, --task {config.name} needs another VAE")
        problems = []
        text_dim = text_encoder.weights["token_embedding.weight"].shape[1]
        z_dim, mask = vae.module.z_dim, config.mask_channels
        expected = z_dim + (mask + z_dim if mask else 0)
        for name, part in experts.items():
            where, shapes = self._name(name), part.weights.shapes
            channels, width = shapes["patch_embedding.weight"][1], shapes["text_embedding.0.weight"][1]
            if channels != expected:
                task = f"--task {config.name} gives {expected}: a checkpoint of another task?"
                problems.append(f"{where}: takes {channels} channels, {task}")
            if width != text_dim:
                problems.append(f"{where}: reads text of width {width}, the encoder has {text_dim}")
        if problems:
            raise InputError(problems)

    def _sized_by_weights(
        self, part: str, kind: str, build: Callable[[Mapping[str, tuple[int, ...]]], Module]
    ) -> Part[Module]:
        """A network whose sizes follow from the shapes of its weights."""
        path = self.path(part)
        try:
            store = as_ours(open_file(path), kind, str(path))
            _count_blocks(store.shapes)
            with torch.device("meta"):
                module = build(store.shapes)
        except (InputError, OSError):
            raise
        except Exception as e:  # whatever PyTorch trips over in a file is the file's fault
            raise InputError(f"{path}: {_line(e)}") from e
        _check_names_and_shapes(module, store, str(path))
        return Part(module, store)


def _check_names_and_shapes(module: nn.Module, store: TensorStore, where: str) -> None:
    """InputError, with every difference, unless names and shapes are exactly the module's."""
    problems = []
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found = store.shapes
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"{where}: {len(missing)} tensors are missing: {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        problems.append(f"{where}: {len(unexpected)} tensors are unexpected: {_some(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            problems.append(f"{where}: {name} has shape {list(found[name])}, expected {list(expected[name])}")
    if problems:
        raise InputError(problems)


def transformer_sizes(
    config: Path | None, shapes: Mapping[str, tuple[int, ...]], where: str, most_text: int
) -> dict[str, Any]:
    """config.json, held against the tensors of the weights before anything of those sizes is built.

    Without one the sizes are those of the weights, with heads as wide as all published models have them.
    where: of the weights, for messages. most_text: tokens that a prompt has at most. InputError for what does not fit.
    """
    for name, axis, _ in TOLD_BY.values():
        if len(shapes.get(name, ())) <= max(axis, 1):
            raise InputError(f"{where}: not a Wan transformer: tensor {name} is missing, or has too few axes")
    told = {key: shapes[name][axis] / times for key, (name, axis, times) in TOLD_BY.items()}
    try:
        told["num_layers"] = _count_blocks(shapes)
    except ValueError as e:
        raise InputError(f"{where}: not a Wan transformer: {e}") from e
    if config is None:
        if told["dim"] % HEAD_WIDTH or not told["dim"] or not told["out_dim"].is_integer():
            raise InputError(
                f"{where}: the weights do not tell their heads, and a width of {told['dim']:g} is no multiple of "
                f"{HEAD_WIDTH}; give the folder with their config.json as --ckpt_dir"
            )
        whole_sizes = {key: int(size) for key, size in told.items()}
        return whole_sizes | {"num_heads": whole_sizes["dim"] // HEAD_WIDTH, "text_len": most_text, "eps": 1e-6}
    sizes = _read_sizes(config, (*told, "num_heads", "text_len", "eps"), most_text)
    wrong = [
        f"{key} is {sizes[key]!r:.40}, but the weights have {size:g}"
        for key, size in told.items()
        if size != sizes[key]
    ]
    if sizes["dim"] % (2 * sizes["num_heads"]):
        wrong.append(f"num_heads {sizes['num_heads']!r:.40} does not divide dim {sizes['dim']} into an even width")
    if sizes["text_len"] > most_text:
        wrong.append(f"text_len is {sizes['text_len']!r:.40}, at most {most_text} is possible")
    if wrong:
        raise InputError(f"{config}: does not fit its weights: {'; '.join(wrong)}")
    return sizes


def _read_sizes(config: Path, keys: tuple[str, ...], most_text: int) -> dict[str, Any]:
    """The sizes `keys` as a config.json has them, the original's or diffusers'. InputError for anything else."""
    try:
        given = parse_json(config.read_bytes())
        if "num_attention_heads" in given:
            given |= {ours: given[theirs] for ours, theirs in DIFFUSERS_KEYS.items()} | {"text_len": most_text}
            widths = given["num_heads"], given["attention_head_dim"]
            given["dim"] = math.prod(widths) if all(type(width) is int for width in widths) else None
        sizes: dict[str, Any] = {key: given[key] for key in keys}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{config}: not the configuration of a Wan transformer ({_line(e)})") from e
    whole = [key for key in sizes if key != "eps"]
    wrong = [f"{key} is {sizes[key]!r:.40}" for key in whole if type(sizes[key]) is not int or sizes[key] < 1]
    if not (isinstance(sizes["eps"], float) and 0 < sizes["eps"] < 1):
        wrong.append(f"eps is {sizes['eps']!r:.40}")
    if wrong:
        raise InputError(f"{config}: not the configuration of a Wan transformer: {', '.join(wrong)}")
    return sizes


def _count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many blocks the names tell of. ValueError where they leave one out: a name alone makes no million blocks."""
    found = {match[1] for name in shapes if (match := re.match(r"blocks\.([^.]*)", name))}
    if found != {str(number) for number in range(len(found))}:
        odd = next(
            name for name in sorted(found) if not name.isdecimal() or int(name[:9]) >= len(found) or len(name) > 9
        )
        raise ValueError(f"a tensor is of block {odd!r:.40}, but there are {len(found)} blocks")
    return len(found)


def folder_of(ckpt_dir: Path, config: TaskConfig) -> Path:
    """A local folder as it is, or a place on the hub such as `Wan-AI/Wan2.2-T2V-A14B`. InputError if it is neither."""
    try:
        if ckpt_dir.is_dir():
            return ckpt_dir
        is_file = ckpt_dir.exists()
    except PermissionError:
        raise InputError(f"--ckpt_dir {ckpt_dir}: there is no permission to reach it") from None
    except OSError as e:
        raise InputError(f"--ckpt_dir {ckpt_dir}: no such folder ({e.strerror})") from None
    if is_file or not hub.place(ckpt_dir.as_posix()):
        what = "is a file, not a folder" if is_file else "no such folder"
        raise InputError(f"--ckpt_dir {ckpt_dir}: {what}; get the checkpoint with: {download_command(config.hub_id)}")
    return hub.located("--ckpt_dir", ckpt_dir.as_posix())


def _line(error: Exception) -> str:
    """An error as part of a line."""
    text = " ".join(str(error).split()) if not isinstance(error, KeyError) else f"{error} is missing"
    return (text or type(error).__name__)[:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
