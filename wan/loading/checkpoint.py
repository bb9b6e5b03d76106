"""Checkpoints in the released layout: what must be there, read off the headers before any weight is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from lightning.distilled import FLOATS, open_expert
from lightning.json_input import parse_json
from lightning.tensorfile import INDEX_SUFFIX, TensorStore
from wan.configs import download_command
from wan.loading.stream import Module, PickleStore, Store
from wan.modules.model import PATCH, WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.tokenizers import UMT5Tokenizer
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
WEIGHTS_INDEX = WEIGHTS.removesuffix(".safetensors") + INDEX_SUFFIX
# sizes in config.json -> the tensor, its axis, and how many times the size that axis is
TOLD_BY = {
    "dim": ("text_embedding.0.weight", 0, 1),
    "ffn_dim": ("blocks.0.ffn.0.weight", 0, 1),
    "in_dim": ("patch_embedding.weight", 1, 1),
    "out_dim": ("head.head.weight", 0, math.prod(PATCH)),
    "freq_dim": ("time_embedding.0.weight", 1, 1),
}


class Checkpoint:
    """A checkpoint folder, known from its headers.

    `problems` lists, as sentences, everything that keeps it from being loaded; `experts`, `text_encoder` and `vae` are
    (module on meta, store) pairs, present for what could be opened, and so is the `tokenizer`.
    """

    def __init__(
        self, folder: Path, task: str, config: EasyDict, expert_files: Mapping[str, Path] | None = None
    ) -> None:
        self.folder, self.task, self.config = folder, task, config
        self.expert_files = dict(expert_files or {})
        self.problems: list[str] = []
        self.experts: dict[str, tuple[WanModel, TensorStore]] = {}
        self.text_encoder: tuple[UMT5Encoder, PickleStore] | None = None
        self.vae: tuple[WanVAE, PickleStore] | None = None
        self.tokenizer: UMT5Tokenizer | None = None
        if self._try(self._complete, self.expert_files):
            for name, where in config.experts.items():
                self._try(self._open_expert, name, folder / where, self.expert_files.get(name))
            self._try(self._open_text_encoder)
            self._try(self._open_tokenizer)
            self._try(self._open_vae)
            self._check_fit()

    def raise_problems(self) -> None:
        if self.problems:
            raise InputError(self.problems)

    def weight_files(self) -> dict[str, list[Path]]:
        """The files that were opened, by network."""
        files = {f"{name} expert": list(store.files) for name, (_, store) in self.experts.items()}
        for name, part in (("text encoder", self.text_encoder), ("VAE", self.vae)):
            if part:
                files[name] = [part[1].path]
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

    def _complete(self, expert_files: Mapping[str, Path]) -> bool:
        """Whether every file is there; if not, one problem that lists all that are missing."""
        folder, config = self.folder, self.config
        get = download_command(config)
        if (folder / "model_index.json").is_file():
            self.problems.append(f"--ckpt_dir {folder} is in diffusers' layout; the original's is read: {get}")
            return False
        wanted = [config.t5_checkpoint, f"{config.t5_tokenizer}/tokenizer.json", config.vae_checkpoint]
        missing = [name for name in wanted if not (folder / name).is_file()]
        for name, where in config.experts.items():
            part = Path(where)
            missing += [] if (folder / part / "config.json").is_file() else [str(part / "config.json")]
            if name not in expert_files and weights_file(folder / part) is None:
                in_shards = any((folder / part).glob("diffusion_pytorch_model-*.safetensors"))
                missing.append(str(part / (WEIGHTS_INDEX if in_shards else WEIGHTS)))
        if missing:
            self.problems.append(f"--ckpt_dir {folder} lacks {', '.join(missing)}; get them with: {get}")
        return not missing

    def _open_expert(self, name: str, folder: Path, replacement: Path | None) -> None:
        if replacement is None:
            weights = weights_file(folder)
            assert weights is not None, "checked by _complete"
            store = TensorStore.open(weights)
        else:
            store = open_expert(replacement)
        where = str(replacement or folder)
        sizes = transformer_sizes(folder / "config.json", store.shapes, where, self.config.text_len)
        with torch.device("meta"):
            module = WanModel.from_config(sizes, text_dim=store["text_embedding.0.weight"].shape[1])
        self._match(module, store, where)
        self.experts[name] = module, store

    def _open_text_encoder(self) -> None:
        path = self.folder / self.config.t5_checkpoint
        module, store = self._open_pickle(path, UMT5Encoder.from_shapes)
        shapes = store.shapes
        wide, heads = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.pos_embedding.embedding.weight"][1]
        if not heads or wide % heads:
            raise InputError(f"{path}: not a UMT5 encoder: {heads} heads do not divide a width of {wide}")
        self.text_encoder = module, store

    def _open_tokenizer(self) -> None:
        folder = self.folder / self.config.t5_tokenizer
        file = folder / "tokenizer.json"
        file.open("rb").close()  # the library does not tell a file that may not be read from one that is none
        try:
            tokenizer = UMT5Tokenizer(folder, self.config.text_len)
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
        path = self.folder / self.config.vae_checkpoint
        self.vae = self._open_pickle(path, WanVAE.from_shapes)

    def _check_fit(self) -> None:
        """The parts must belong to one model, and to the task."""
        if not self.vae or not self.text_encoder:
            return
        vae, text_dim = self.vae[0], self.text_encoder[1].shapes["token_embedding.weight"][1]
        if vae.stride != self.config.vae_stride:
            self.problems.append(f"{self.vae[1].path}: has stride {vae.stride}, --task {self.task} needs another VAE")
            return
        mask = self.config.mask_channels
        given = vae.z_dim + (mask + vae.z_dim if mask else 0)
        for _, store in self.experts.values():
            folder, shapes = store.files[0].parent, store.shapes
            channels, width = shapes["patch_embedding.weight"][1], shapes["text_embedding.0.weight"][1]
            if channels != given:
                task = f"--task {self.task} gives {given}: a checkpoint of another task?"
                self.problems.append(f"{folder}: takes {channels} channels, {task}")
            if width != text_dim:
                self.problems.append(f"{folder}: reads text of width {width}, the encoder has {text_dim}")

    def _open_pickle(
        self, path: Path, build: Callable[[Mapping[str, tuple[int, ...]]], Module]
    ) -> tuple[Module, PickleStore]:
        path.open("rb").close()  # a file that may not be read is not one that is damaged
        try:
            store = PickleStore(path)
            if odd := next(
                (name for name in store.shapes if not isinstance(name, str) or not name.isprintable()), None
            ):
                raise ValueError(f"a tensor is named {odd!r:.60}")
            _count_blocks(store.shapes)
            with torch.device("meta"):
                module = build(store.shapes)
        except InputError:
            raise
        except Exception as e:  # whatever PyTorch trips over in a file is the file's fault
            raise InputError(f"{path}: {_line(e)}") from e
        self._match(module, store, str(path))
        return module, store

    def _match(self, module: nn.Module, store: Store, where: str) -> None:
        """Names and shapes must be exactly the module's, and the tensors floating-point numbers."""
        expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
        found = store.shapes
        if odd := [name for name in expected if name in store and store[name].dtype not in FLOATS]:
            self.problems.append(
                f"{where}: {len(odd)} tensors are stored in a form that is not read here "
                f"(first: {odd[0]} is {store[odd[0]].dtype}); weights are float32, float16 or bfloat16, "
                "and a quantised expert goes to --expert"
            )
        if missing := sorted(expected.keys() - found.keys()):
            self.problems.append(f"{where}: {len(missing)} tensors are missing: {_some(missing)}")
        if unexpected := sorted(found.keys() - expected.keys()):
            self.problems.append(f"{where}: {len(unexpected)} tensors are unexpected: {_some(unexpected)}")
        for name in sorted(expected.keys() & found.keys()):
            if expected[name] != found[name]:
                self.problems.append(f"{where}: {name} has shape {list(found[name])}, expected {list(expected[name])}")


def transformer_sizes(
    config: Path, shapes: Mapping[str, tuple[int, ...]], where: str, most_text: int
) -> dict[str, int | float | str]:
    """config.json, held against the tensors of the weights before anything of those sizes is built.

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
    try:
        given = parse_json(config.read_bytes())
        sizes: dict[str, Any] = {key: given[key] for key in (*told, "num_heads", "text_len", "eps")}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{config}: not the configuration of a Wan transformer ({_line(e)})") from e
    whole = [key for key in sizes if key != "eps"]
    wrong = [f"{key} is {sizes[key]!r:.40}" for key in whole if type(sizes[key]) is not int or sizes[key] < 1]
    if not (isinstance(sizes["eps"], float) and 0 < sizes["eps"] < 1):
        wrong.append(f"eps is {sizes['eps']!r:.40}")
    if wrong:
        raise InputError(f"{config}: not the configuration of a Wan transformer: {', '.join(wrong)}")
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


def _count_blocks(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many blocks the names tell of. ValueError where they leave one out: a name alone makes no million blocks."""
    found = {match[1] for name in shapes if (match := re.match(r"blocks\.([^.]*)", name))}
    if found != {str(number) for number in range(len(found))}:
        odd = next(
            name for name in sorted(found) if not name.isdecimal() or int(name[:9]) >= len(found) or len(name) > 9
        )
        raise ValueError(f"a tensor is of block {odd!r:.40}, but there are {len(found)} blocks")
    return len(found)


def weights_file(folder: Path) -> Path | None:
    """The index of the shards, or the single file, of one network."""
    for path in (folder / WEIGHTS_INDEX, folder / WEIGHTS):
        if path.is_file():
            return path
    return None


def fetch(ckpt_dir: Path, config: EasyDict, download: bool = True) -> Path:
    """A local folder as it is; any other name is a hub id, such as `Wan-AI/Wan2.2-T2V-A14B`: its local copy.

    Only the files the task needs are fetched, none without `download`. InputError if they cannot be had.
    """
    try:
        if ckpt_dir.is_dir():
            return ckpt_dir
        is_file = ckpt_dir.exists()
    except PermissionError:
        raise InputError(f"--ckpt_dir {ckpt_dir}: there is no permission to reach it") from None
    except OSError as e:
        raise InputError(f"--ckpt_dir {ckpt_dir}: no such folder ({e.strerror})") from None
    if is_file or not re.fullmatch(HUB_ID, ckpt_dir.as_posix()):
        what = "is a file, not a folder" if is_file else "no such folder"
        raise InputError(f"--ckpt_dir {ckpt_dir}: {what}; get the checkpoint with: {download_command(config)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [config.t5_checkpoint, f"{config.t5_tokenizer}/*", config.vae_checkpoint]
    for where in config.experts.values():
        wanted += ["config.json", "diffusion_pytorch_model*"] if where == "." else [f"{where}/*"]
    try:
        return Path(snapshot_download(ckpt_dir.as_posix(), allow_patterns=wanted, local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0] if download else "it is fetched when a run starts, not for --dry_run"
        raise InputError(f"--ckpt_dir {ckpt_dir} is not on this machine and was not fetched: {reason}") from e


def _line(error: Exception) -> str:
    """An error as part of a line."""
    text = " ".join(str(error).split()) if not isinstance(error, KeyError) else f"{error} is missing"
    return (text or type(error).__name__)[:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
