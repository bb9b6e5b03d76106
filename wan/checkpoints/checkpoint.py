"""Checkpoints, opened from headers: every part is there and fits the others, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from wan.checkpoints import hub, layout
from wan.checkpoints.outside import in_one_line, misread, size_of
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.transformer_sizes import count_blocks, transformer_sizes
from wan.checkpoints.weights import EXPERT, TEXT_ENCODER, VAE, as_ours, kinds_in, open_expert, open_file
from wan.configs import TaskConfig, download_command, task_of
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder, UMT5Tokenizer
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


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
    warnings: tuple[str, ...] = ()

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
    experts = {name: _open_part(partial(opener.expert, name), problems) for name in config.experts}
    text_encoder = _open_part(opener.text_encoder, problems)
    tokenizer = _open_part(partial(opener.tokenizer, text_encoder), problems)
    vae = _open_part(opener.vae, problems)
    opened = {name: part for name, part in experts.items() if part is not None}
    if vae is None or text_encoder is None or tokenizer is None or len(opened) < len(experts):
        raise InputError(problems)
    text_width = text_encoder.weights["token_embedding.weight"].shape[1]
    for name, part in opened.items():
        if (width := part.weights["text_embedding.0.weight"].shape[1]) != text_width:
            problems.append(f"{opener.place(name)}: reads text of width {width}, the encoder has {text_width}")
    if problems:
        raise InputError(problems)
    warnings = tuple(opener.warnings({**opened, TEXT_ENCODER: text_encoder, VAE: vae}))
    return OpenCheckpoint(folder, files, opened, text_encoder, vae, tokenizer, opener.path("tokenizer"), warnings)


def open_single(part: str, file: Path, config: TaskConfig) -> Part[Any]:
    """One file as the VAE, the text encoder or an expert, judged as for a run. InputError with all problems."""
    opener = _Opener(None, config, {part: file})
    with _readable():
        if part == VAE:
            return opener.vae()
        return opener.text_encoder() if part == TEXT_ENCODER else opener.expert(part)


def _open_part(work: Callable[[], Result], problems: list[str]) -> Result | None:
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
    """Opens the parts of one checkpoint; each method raises InputError with all problems of its part."""

    folder: Path | None
    config: TaskConfig
    files: Mapping[str, Path]

    def path(self, part: str) -> Path:
        """The file, or index, that holds the part."""
        if part in self.files or self.folder is None:
            return self.files[part]
        return layout.path_of(self.folder, self.config, part)

    def place(self, expert: str) -> Path:
        """The expert in messages: its own file, or its folder."""
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
        if name in self.files and config and not config.is_file():
            config = None
        sizes = transformer_sizes(config, shapes, where, self.config.text_len)
        with torch.device("meta"):
            module = WanModel.from_config(sizes, text_dim=shapes["text_embedding.0.weight"][1])
        _check_names_and_shapes(module, store, where)
        return Part(module, store)

    def text_encoder(self) -> Part[UMT5Encoder]:
        part = self._sized_by_weights(TEXT_ENCODER, UMT5Encoder.from_shapes)
        shapes = part.weights.shapes
        width, heads = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.pos_embedding.embedding.weight"][1]
        if not heads or width % heads:
            where = self.path(TEXT_ENCODER)
            raise InputError(f"{where}: not a UMT5 encoder: {heads} heads do not divide a width of {width}")
        return part

    def tokenizer(self, text_encoder: Part[UMT5Encoder] | None) -> UMT5Tokenizer:
        file = self.path("tokenizer")
        size_of(file)
        file.open("rb").close()  # the library reports a file without permission as a damaged one
        try:
            tokenizer = UMT5Tokenizer(file.parent, self.config.text_len)
            if len(tokenizer("a cat")) < 2:
                raise ValueError("it makes no tokens of a text")
        except Exception as e:  # the library raises nothing more special
            raise misread(file, f"not a tokenizer ({in_one_line(e)}); get the file again") from e
        rows = text_encoder.weights["token_embedding.weight"].shape[0] if text_encoder else len(tokenizer)
        if len(tokenizer) > rows:
            raise InputError(f"{file}: has {len(tokenizer):,} tokens, the text encoder {rows:,}: not of one model")
        return tokenizer

    def vae(self) -> Part[WanVAE]:
        part, config = self._sized_by_weights(VAE, WanVAE.from_shapes), self.config
        if part.module.stride != config.vae_stride:
            stride = f"has stride {part.module.stride}"
            raise InputError(f"{self.path(VAE)}: {stride}, --task {config.name} needs another VAE")
        return part

    def warnings(self, parts: Mapping[str, Part[Any]]) -> Iterator[str]:
        """Sentences on files that work, but may not be meant."""
        paths = {name: self.path(name) for name in self.config.experts}
        if len(paths) > len(set(paths.values())):
            yield f"{next(iter(paths.values()))} serves as {' and '.join(paths)} noise expert: the same weights"
        for name, part in parts.items():
            kind = name if name in (TEXT_ENCODER, VAE) else EXPERT
            if others := [other.replace("_", " ") for other in kinds_in(part.weights.source) if other != kind]:
                yield f"{self.path(name)}: besides, it holds the {' and '.join(others)}, left out for --{kind}"

    def _sized_by_weights(self, part: str, build: Callable[[Mapping[str, tuple[int, ...]]], Module]) -> Part[Module]:
        """A network whose sizes follow from the shapes of its weights."""
        path = self.path(part)
        store = as_ours(open_file(path), part, str(path))
        try:
            count_blocks(store.shapes)
            with torch.device("meta"):
                module = build(store.shapes)
        except Exception as e:  # whatever PyTorch trips over in a file is the file's fault
            raise InputError(f"{path}: {in_one_line(e)}") from e
        _check_names_and_shapes(module, store, str(path))
        return Part(module, store)


def _check_names_and_shapes(module: nn.Module, store: TensorStore, where: str) -> None:
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


def checkpoint_folder(ckpt_dir: Path, config: TaskConfig) -> Path:
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
