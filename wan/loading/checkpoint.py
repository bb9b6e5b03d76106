"""Checkpoints in the released layout: what must be there, read off the headers before any weight is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from easydict import EasyDict
from torch import nn

from lightning.distilled import open_expert
from lightning.errors import LoraError, TensorFileError
from lightning.tensorfile import INDEX_SUFFIX, TensorStore
from wan.configs import download_command
from wan.loading.stream import Module, PickleStore, Store
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Checkpoint:
    """A checkpoint folder, known from its headers.

    `problems` lists, as sentences, everything that keeps it from being loaded; `experts`, `text_encoder` and `vae` are
    (module on meta, store) pairs, present for what could be opened.
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
        if self._complete(self.expert_files):
            for name, where in config.experts.items():
                self._try(self._open_expert, name, folder / where, self.expert_files.get(name))
            self._try(self._open_text_encoder)
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

    def _try(self, opener: Callable[..., None], *arguments: object) -> None:
        """Open one part; what is wrong with it joins the list."""
        try:
            opener(*arguments)
        except (TensorFileError, LoraError, InputError, OSError) as e:
            self.problems.append(str(e))

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
                missing.append(str(part / WEIGHTS))
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
        if "text_embedding.0.weight" not in store:
            raise InputError(f"{store.files[0]}: not a Wan transformer: tensor text_embedding.0.weight is missing")
        try:
            sizes = json.loads((folder / "config.json").read_text())
            with torch.device("meta"):
                module = WanModel.from_config(sizes, text_dim=store["text_embedding.0.weight"].shape[1])
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{folder / 'config.json'}: not the configuration of a Wan transformer ({e!r})") from e
        self._match(module, store, str(replacement or folder))
        self.experts[name] = module, store

    def _open_text_encoder(self) -> None:
        path = self.folder / self.config.t5_checkpoint
        self.text_encoder = self._open_pickle(path, UMT5Encoder.from_shapes)

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
        store = PickleStore(path)
        try:
            with torch.device("meta"):
                module = build(store.shapes)
        except ValueError as e:
            raise InputError(f"{path}: {e}") from e
        self._match(module, store, str(path))
        return module, store

    def _match(self, module: nn.Module, store: Store, where: str) -> None:
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


def weights_file(folder: Path) -> Path | None:
    """The index of the shards, or the single file, of one network."""
    for path in (folder / (WEIGHTS.removesuffix(".safetensors") + INDEX_SUFFIX), folder / WEIGHTS):
        if path.is_file():
            return path
    return None


def fetch(ckpt_dir: Path, config: EasyDict, download: bool = True) -> Path:
    """A local folder as it is; any other name is a hub id, such as `Wan-AI/Wan2.2-T2V-A14B`: its local copy.

    Only the files the task needs are fetched, none without `download`. InputError if they cannot be had.
    """
    if ckpt_dir.is_dir():
        return ckpt_dir
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [config.t5_checkpoint, f"{config.t5_tokenizer}/*", config.vae_checkpoint]
    for where in config.experts.values():
        wanted += ["config.json", "diffusion_pytorch_model*"] if where == "." else [f"{where}/*"]
    try:
        return Path(snapshot_download(ckpt_dir.as_posix(), allow_patterns=wanted, local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if download else "it is fetched when a run starts, not for --dry_run"
        raise InputError(f"--ckpt_dir {ckpt_dir} is not on this machine and was not fetched: {reason}") from e


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
