"""Networks whose weights are on the device when a forward needs them: all of them always, or a few blocks at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lightning.merge import Merge
from wan.modules.model import Prompt, Residency, WanModel
from wan.modules.t5 import UMT5Encoder
from wan.offload.budget import Sizes
from wan.offload.prefetcher import BlockWeights, CopyStream, Prefetcher, aligned
from wan.offload.reader import Piece, Source, fill
from wan.utils.accelerator import free_memory

Network = TypeVar("Network", WanModel, UMT5Encoder)
EMBEDDING = "token_embedding.weight"  # of the text encoder, read by row
SPARE = 0.02  # of a slot: for the scales of blocks in 8 bits, which make two of them a little more than one in bf16


class Streamed(Residency):
    """A network whose units come in blocks. block_of: the prefetcher's block number of each unit."""

    def __init__(self, prefetcher: Prefetcher, block_of: Sequence[int]) -> None:
        self.prefetcher, self.block_of = prefetcher, block_of

    def use(self, unit: int) -> AbstractContextManager[None]:
        return self.prefetcher.use(self.block_of[unit])


class Networks(Generic[Network]):
    """Networks by name, on `device`, their blocks in slots that all of them share; no slots before `resize`.
    modules: (module on the meta device, its weights); `models` are copies. Weights in no block are loaded at once."""

    def __init__(
        self,
        modules: Mapping[str, tuple[Network, Source]],
        device: torch.device,
        report: Callable[[int], None] = lambda _: None,
        stream: CopyStream | None = None,
    ) -> None:
        self.models: dict[str, Network] = {}
        self._sources = {name: source for name, (_, source) in modules.items()}
        self._resident: dict[str, list[str]] = {}
        self._block_of: dict[str, list[int]] = {}
        blocks: list[BlockWeights] = []
        for name, (blueprint, source) in modules.items():
            model = self.models[name] = copy.deepcopy(blueprint).eval().requires_grad_(False)
            if isinstance(model, UMT5Encoder):
                model.token_embedding = FileTable(source, device)
            self._resident[name], grouped, block_of, _ = group(model, source.dtype)
            fill(model, source, self._resident[name], device, report)
            self._block_of[name] = [len(blocks) + block for block in block_of]
            blocks += [BlockWeights(model, source, names) for names in grouped]
        self.prefetcher = Prefetcher(blocks, device, stream)
        for name, model in self.models.items():
            model.residency = Streamed(self.prefetcher, self._block_of[name])

    def job(self, forwards: Sequence[str], again: bool = False) -> AbstractContextManager[None]:
        """Runs forwards of the networks named, in this order. again: the same ones follow after it."""
        return self.prefetcher.job(self.uses(forwards), again)

    def uses(self, forwards: Sequence[str]) -> list[int]:
        """The blocks that these forwards use, in turn."""
        return [block for name in forwards for block in self._block_of[name]]

    def change_loras(self, merges: Mapping[str, Merge]) -> None:
        """Merge other LoRAs from now on, and none into a network without an entry."""
        for name, model in self.models.items():
            source, merge = self._sources[name], merges.get(name)
            both, source.merge = [each for each in (source.merge, merge) if each], merge
            touched = [p for p in self._resident[name] if any(each.touches(p) for each in both)]
            fill(model, source, touched, self.prefetcher.device, lambda _: None)
        for slot in self.prefetcher.slots:
            self.prefetcher.empty(slot)

    def shrink(self, slots: int = 0) -> None:
        """Free the memory of all but `slots` slots."""
        self.prefetcher.resize(min(slots, len(self.prefetcher.slots)))
        for source in self._sources.values():
            if source.merge:
                source.merge.free_buffers()
        free_memory()


def group(
    model: WanModel | UMT5Encoder, dtype: Callable[[str], torch.dtype]
) -> tuple[list[str], list[list[str]], list[int], dict[str, int]]:
    """(parameters that stay, those of each block in the order of use, each unit's block, bytes of each in a slot).
    A block is a unit, or neighbours no larger together than the largest: in 8 bits two are as wide as one in bf16."""
    size = {name: aligned(p.numel() * dtype(name).itemsize) for name, p in model.named_parameters()}
    units: dict[int | None, list[str]] = {}
    for name in size:
        units.setdefault(model.unit_of(name), []).append(name)
    resident, blocks, block_of = units.pop(None, []), list[list[str]](), list[int]()
    need = {number: sum(size[name] for name in names) for number, names in units.items()}
    limit = taken = max(need.values()) * (1 + SPARE)
    for number in range(len(units)):
        if taken + need[number] > limit:
            blocks.append([])
            taken = 0
        blocks[-1].extend(units[number])
        block_of.append(len(blocks) - 1)
        taken += need[number]
    return resident, blocks, block_of, size


def sizes_of(model: WanModel | UMT5Encoder, dtype: Callable[[str], torch.dtype]) -> Sizes:
    """The bytes that a network built on the meta device takes as one of `Networks`."""
    resident, blocks, _, size = group(model, dtype)
    largest = max(sum(size[name] for name in names) for names in blocks)
    return Sizes(len(blocks), largest, sum(size[name] for name in resident if name != EMBEDDING))


class FileTable(nn.Module):
    """A row for each id, read from the file: a text needs a few hundred of gigabytes of rows."""

    def __init__(self, source: Source, device: torch.device) -> None:
        super().__init__()
        self.source, self.entry, self.device = source, source.store[EMBEDDING], device

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [n] -> [n, D]."""
        rows, row_of = ids.cpu().unique(return_inverse=True)
        found = torch.empty(len(rows), *self.entry.shape[1:], dtype=self.source.dtype(EMBEDDING), device=self.device)
        buffer = torch.empty(self.entry.rows(slice(0, 1)).bytes, dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            piece = Piece(self.source, EMBEDDING, slice(row, row + 1))
            self.source.place(piece, self.source.read(piece, buffer), {EMBEDDING: found[number : number + 1]}, row)
        return found[row_of.to(self.device)]


def text_encoder(
    blueprint: UMT5Encoder, source: Source, device: torch.device, slots: int | None
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Ids of texts -> rows of each, block by block over all texts. Blocks that have a slot stay for the next call."""
    networks = Networks({"text": (blueprint, source)}, device)
    networks.prefetcher.resize(slots)

    def encode(texts: Sequence[Tensor]) -> list[Tensor]:
        with networks.job(["text"], again=True):
            return networks.models["text"](texts)

    return encode


class Experts:
    """The denoising networks by name, set up for a step: on their device, or those of `networks`.
    set_lora: changes the scale of a model's LoRA adapters; None if they are merged into the weights."""

    def __init__(
        self,
        models: Mapping[str, WanModel],
        networks: Networks[WanModel] | None = None,
        set_lora: Callable[[str, float], None] | None = None,
    ) -> None:
        self.models, self.networks, self._set_lora = dict(models), networks, set_lora
        self._lora_scale: dict[str, float] = dict.fromkeys(models, 1.0)
        self._forwards: list[str] = []  # of the last job
        self._known = True  # whether all of them run

    @contextmanager
    def job(
        self,
        steps: Sequence[tuple[str, int]],
        slots: int | None = None,
        batch_guidance: bool = False,
        again: bool = False,
        known: bool = True,
    ) -> Iterator[None]:
        """Runs the passes of each step, given as (network's name, passes). slots: None: one for each block.
        batch_guidance: the passes of a step go through the blocks together. again: a job with the same steps follows.
        known: False if some of the steps may be left out."""
        self._known = known
        for model in self.models.values():
            model.residency.batch_guidance = batch_guidance
        self._forwards = [name for name, passes in steps for _ in range(1 if batch_guidance else passes)]
        if self.networks is None:
            yield
            return
        self.networks.prefetcher.resize(slots)
        with self.networks.job(self._forwards, again) if known else nullcontext():
            yield

    def ahead(self) -> AbstractContextManager[None]:
        """Meanwhile the first blocks of another job like the last one come into the slots left."""
        networks = self.networks
        return networks.prefetcher.ahead(networks.uses(self._forwards)) if networks else nullcontext()

    def ready(self, name: str, lora: float) -> Callable[..., Tensor]:
        """The network, its LoRAs at scale `lora`."""
        model = self.models[name]
        if lora != self._lora_scale[name]:
            assert self._set_lora is not None, "a LoRA merged into the weights has one strength"
            self._set_lora(name, lora)
            self._lora_scale[name] = lora
        if self._known or (networks := self.networks) is None:
            return model

        def forward(latent: Tensor, timestep: float, prompts: Prompt | Sequence[Prompt], *pinned: int) -> Tensor:
            passes = 1 if isinstance(prompts, Prompt) or model.residency.batch_guidance else len(prompts)
            with networks.job([name] * passes, again=True):  # its own: nothing is read for steps that are left out
                return model(latent, timestep, prompts, *pinned)

        return forward

    def forget_scales(self) -> None:
        """Set every adapter's scale at the next step: strengths have changed."""
        self._lora_scale = dict.fromkeys(self.models, math.nan)

    def leave(self, slots: int = 0) -> None:
        """Free the device but for `slots` slots. On a CPU no stage needs it."""
        if self.networks is not None and self.networks.prefetcher.device.type != "cpu":
            self.networks.shrink(slots)

    @property
    def waited(self) -> float:
        """Seconds in which computation waited for weights, so far."""
        return 0.0 if self.networks is None else self.networks.prefetcher.stream.waited

    @property
    def brought(self) -> int:
        """Bytes of weights read into slots, so far."""
        return 0 if self.networks is None else self.networks.prefetcher.brought
