"""Checkpoints in the released layout: what must be there, read off the headers, and loading tensor by tensor.

Modules are built on the meta device. Each tensor is read, merged, cast and placed before the next one is kept, so the
peak is the finished module and two tensors in flight (one is read ahead while the other is worked on).
"""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from easydict import EasyDict
from torch import Tensor, nn

from lightning.distilled import open_expert
from lightning.lora import LoraError
from lightning.merge import Merge
from lightning.names import keeps_float32
from lightning.tensorfile import INDEX_SUFFIX, TensorFileError, TensorStore
from wan.configs import download_command
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE_CHANNELS = 4  # I2V's mask; the image's latent comes on top
REOPEN_BYTES = 1 << 26
Module = TypeVar("Module", bound=nn.Module)


class Store(Protocol):
    """Named tensors on disk: shapes for free, data one tensor at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def file(self, name: str) -> Path: ...
    def in_file_order(self, names: Iterable[str]) -> list[str]: ...
    def buffer_bytes(self, name: str, rows: slice | None = None) -> int: ...
    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor: ...


class PickleStore:
    """The tensors of a `.pth` file. Only plain tensors are accepted (`weights_only`): nothing in it is ever run."""

    def __init__(self, path: Path) -> None:
        """TensorFileError if the file is damaged, or holds anything but a flat dictionary of tensors."""
        self.path = path
        self._state, self._served = self._open(), 0
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(t.shape) for n, t in self._state.items()}

    def _open(self) -> dict[str, Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            raise TensorFileError(f"{self.path}: holds more than plain tensors, or is damaged; not opened") from e
        except (RuntimeError, OSError, EOFError, ValueError) as e:
            raise TensorFileError(f"{self.path}: truncated or damaged, or not a zipped .pth file") from e
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise TensorFileError(f"{self.path}: not a flat dictionary of tensors")
        return state

    def file(self, name: str) -> Path:
        return self.path

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=list(self.shapes).index)

    def buffer_bytes(self, name: str, rows: slice | None = None) -> int:
        return 0  # views of the map need none

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """A view of the mapped file. The map is made anew every 64 MiB: its pages count as resident until then."""
        if self._served > REOPEN_BYTES:
            self._state, self._served = self._open(), 0
        tensor = self._state[name]
        self._served += tensor.nbytes
        return tensor if rows is None else tensor[rows]


class Checkpoint:
    """A checkpoint folder, known from its headers.

    `problems` lists, as sentences, everything that keeps it from being loaded; `experts`, `text_encoder` and `vae` are
    (module on meta, store) pairs, present for what could be opened.
    """

    def __init__(
        self, folder: Path, task: str, config: EasyDict, expert_files: Mapping[str, Path] | None = None
    ) -> None:
        self.folder, self.task, self.config = folder, task, config
        self.problems: list[str] = []
        self.experts: dict[str, tuple[WanModel, TensorStore]] = {}
        self.text_encoder: tuple[UMT5Encoder, PickleStore] | None = None
        self.vae: tuple[WanVAE, PickleStore] | None = None
        if self._complete(expert_files or {}):
            for name, where in config.experts.items():
                self._try(self._open_expert, name, folder / where, (expert_files or {}).get(name))
            self._try(self._open_text_encoder)
            self._try(self._open_vae)
            self._check_fit()

    def raise_problems(self) -> None:
        if self.problems:
            raise InputError(self.problems)

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
        given = vae.z_dim + (IMAGE_CHANNELS + vae.z_dim if self.task == "i2v-A14B" else 0)
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


def load(
    module: Module,
    store: Store,
    *,
    home: torch.device,
    dtype: Callable[[str], torch.dtype],
    merge: Merge | None = None,
    report: Callable[[int], None] = lambda _: None,
) -> Module:
    """Give a meta-built module its weights on `home`: read, merge, cast, place, one tensor after the other.

    `dtype` tells a parameter's dtype by name; `report` gets the bytes read. InputError as from `read_ahead`.
    """
    names = [name for name, _ in module.named_parameters()]
    state = {}
    for name, tensor in read_ahead(store, names, pin=home.type == "cuda"):
        report(tensor.nbytes)
        state[name] = finished(name, tensor, home, dtype(name), merge)
        del tensor
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def finished(
    name: str, tensor: Tensor, home: torch.device, dtype: torch.dtype, merge: Merge | None, rows: slice | None = None
) -> Tensor:
    """One tensor (or `rows` of it) as the module keeps it: merged in float32, cast once; never a view."""
    if merge is not None and merge.touches(name):
        tensor = merge(name, tensor, rows)
    caster = home if tensor.device.type == "cpu" else tensor.device  # an accelerator casts faster, wherever it goes
    return tensor.to(caster).to(dtype, copy=True).to(home)


def read_ahead(
    store: Store, names: Iterable[str], rows: Callable[[str], slice | None] = lambda _: None, pin: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor or its `rows`) in the order of the file, the next one being read while the caller works on this.

    A tensor is valid until the next is asked for: two buffers are used in turn. InputError for one with NaN or Inf.
    """
    order = store.in_file_order(names)
    largest = max((store.buffer_bytes(name, rows(name)) for name in order), default=0)
    buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        reads = (pool.submit(_read_finite, store, n, rows(n), buffers[i % 2]) for i, n in enumerate(order))
        pending = next(reads, None)
        for name in order:
            assert pending is not None
            tensor = pending.result()
            pending = next(reads, None)  # into the buffer that the caller has just done with
            yield name, tensor


def _read_finite(store: Store, name: str, rows: slice | None, buffer: Tensor) -> Tensor:
    """The tensor, or InputError if it holds NaN or Inf."""
    tensor = store.read(name, rows, buffer)
    # the sum of finite numbers may overflow: then look at each
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise InputError(f"{store.file(name)}: tensor {name} holds NaN or Inf: the file is corrupt")
    return tensor


def parameter_dtypes(dtype: torch.dtype, convert_all: bool) -> Callable[[str], torch.dtype]:
    """The transformer's precision: `dtype`, but float32 for the parameters that the original keeps in float32.

    convert_all (`--convert_model_dtype`): `dtype` for every parameter.
    """
    return lambda name: torch.float32 if not convert_all and keeps_float32(name) else dtype


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Configurations hold dtypes or their names."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def free_memory() -> None:
    """Hand freed memory back, after something large was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
