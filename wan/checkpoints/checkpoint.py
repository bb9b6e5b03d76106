"""Checkpoints: what must be there, read off the headers before any weight is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

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


class Checkpoint:
    """A checkpoint, known from its headers: a folder, files in place of some of its parts, or files alone.

    `problems` lists, as sentences, everything that keeps it from being loaded; `experts`, `text_encoder` and `vae` are
    (module on meta, store) pairs, present for what could be opened, and so is the `tokenizer`.
    """

    def __init__(
        self, folder: Path | None, task: str, config: TaskConfig, files: Mapping[str, Path] | None = None
    ) -> None:
        """files: by part (see `places`) what serves in place of the folder's; without a folder, all of them."""
        self.folder, self.task, self.config = folder, task, config
        self.files = dict(files or {})
        self.problems: list[str] = []
        self.experts: dict[str, tuple[WanModel, TensorStore]] = {}
        self.text_encoder: tuple[UMT5Encoder, TensorStore] | None = None
        self.vae: tuple[WanVAE, TensorStore] | None = None
        self.tokenizer: UMT5Tokenizer | None = None
        self._places: dict[str, str] = {}
        if self._try(self._complete):
            for name in config.experts:
                self._try(self._open_expert, name)
            self._try(self._open_text_encoder)
            self._try(self._open_tokenizer)
            self._try(self._open_vae)
            self._check_fit()

    def raise_problems(self) -> None:
        if self.problems:
            raise InputError(self.problems)

    def weight_files(self) -> dict[str, list[Path]]:
        """The files that were opened, by network; the tokenizer's too, which has its say in a video as well."""
        files = {f"{name} expert": list(store.files) for name, (_, store) in self.experts.items()}
        for name, part in (("text encoder", self.text_encoder), ("VAE", self.vae)):
            if part:
                files[name] = list(part[1].files)
        if self.tokenizer:
            files["tokenizer"] = [self._place("tokenizer")]
        return files

    def _try(self, opener: Callable[..., bool | None], *arguments: object) -> bool | None:
        """What opening one part gives; what is wrong with it joins the list."""
        try:
            return opener(*arguments)
        except InputError as e:
            self.problems.extend(e.problems)
        except OSError as e:
            why = "there is no permission to read it" if isinstance(e, PermissionError) else f"not read ({e.strerror})"
            self.problems.append(f"{e.filename}: {why}")
        return None

    def _complete(self) -> bool:
        """True where every file is there."""
        if self.folder is not None:  # without one the request was refused if a file was not given
            self._places = layout.places_in(self.folder, self.config)
            layout.check_complete(self.folder, self.config, self.files)
        return True

    def _place(self, part: str) -> Path:
        """The file, or index, that a part is read from."""
        if part in self.files:
            return self.files[part]
        assert self.folder is not None, "without a folder every part is given"
        file = self.folder / self._places[part]
        return layout.weights_at(file) or file

    def _open_expert(self, name: str) -> None:
        path = self._place(name)
        where = str(path if name in self.files else path.parent)
        store = open_expert(path) if name in self.files else as_ours(open_file(path), EXPERT, where)
        config = self.folder / layout.settings_of(self._places[name]) if self.folder else None
        if name in self.files and config and not config.is_file():
            config = None
        sizes = transformer_sizes(config, store.shapes, where, self.config.text_len)
        with torch.device("meta"):
            module = WanModel.from_config(sizes, text_dim=store["text_embedding.0.weight"].shape[1])
        self._match(module, store, where)
        self.experts[name] = module, store

    def _open_text_encoder(self) -> None:
        module, store = self._open_by_shapes("text_encoder", TEXT_ENCODER, UMT5Encoder.from_shapes)
        shapes = store.shapes
        wide, heads = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.pos_embedding.embedding.weight"][1]
        if not heads or wide % heads:
            where = self._place("text_encoder")
            raise InputError(f"{where}: not a UMT5 encoder: {heads} heads do not divide a width of {wide}")
        self.text_encoder = module, store

    def _open_tokenizer(self) -> None:
        file = self._place("tokenizer")
        file.open("rb").close()  # the library does not tell a file that may not be read from one that is none
        try:
            tokenizer = UMT5Tokenizer(file.parent, self.config.text_len)
            works = len(tokenizer("a cat")) > 1
        except Exception as e:  # the library raises nothing more special
            raise InputError(f"{file}: not a tokenizer ({_line(e)}); get the file again") from e
        if not works:
            raise InputError(f"{file}: a tokenizer that makes no tokens of a text; get the file again")
        rows = self.text_encoder[1].shapes["token_embedding.weight"][0] if self.text_encoder else len(tokenizer)
        if len(tokenizer) > rows:
            raise InputError(f"{file}: has {len(tokenizer):,} tokens, the text encoder {rows:,}: not of one model")
        self.tokenizer = tokenizer

    def _open_vae(self) -> None:
        self.vae = self._open_by_shapes("vae", VAE, WanVAE.from_shapes)

    def _check_fit(self) -> None:
        """The parts must belong to one model, and to the task."""
        if not self.vae or not self.text_encoder:
            return
        vae, text_dim = self.vae[0], self.text_encoder[1].shapes["token_embedding.weight"][1]
        if vae.stride != self.config.vae_stride:
            self.problems.append(f"{self._place('vae')}: has stride {vae.stride}, --task {self.task} needs another VAE")
            return
        mask = self.config.mask_channels
        given = vae.z_dim + (mask + vae.z_dim if mask else 0)
        for name, (_, store) in self.experts.items():
            path, shapes = self._place(name), store.shapes
            where = path if name in self.files else path.parent
            channels, width = shapes["patch_embedding.weight"][1], shapes["text_embedding.0.weight"][1]
            if channels != given:
                task = f"--task {self.task} gives {given}: a checkpoint of another task?"
                self.problems.append(f"{where}: takes {channels} channels, {task}")
            if width != text_dim:
                self.problems.append(f"{where}: reads text of width {width}, the encoder has {text_dim}")

    def _open_by_shapes(
        self, part: str, kind: str, build: Callable[[Mapping[str, tuple[int, ...]]], Module]
    ) -> tuple[Module, TensorStore]:
        """A network whose sizes its weights tell."""
        path = self._place(part)
        try:
            store = as_ours(open_file(path), kind, str(path))
            _count_blocks(store.shapes)
            with torch.device("meta"):
                module = build(store.shapes)
        except (InputError, OSError):
            raise
        except Exception as e:  # whatever PyTorch trips over in a file is the file's fault
            raise InputError(f"{path}: {_line(e)}") from e
        self._match(module, store, str(path))
        return module, store

    def _match(self, module: nn.Module, store: TensorStore, where: str) -> None:
        """Names and shapes must be exactly the module's."""
        expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
        found = store.shapes
        if missing := sorted(expected.keys() - found.keys()):
            self.problems.append(f"{where}: {len(missing)} tensors are missing: {_some(missing)}")
        if unexpected := sorted(found.keys() - expected.keys()):
            self.problems.append(f"{where}: {len(unexpected)} tensors are unexpected: {_some(unexpected)}")
        for name in sorted(expected.keys() & found.keys()):
            if expected[name] != found[name]:
                self.problems.append(f"{where}: {name} has shape {list(found[name])}, expected {list(expected[name])}")


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
