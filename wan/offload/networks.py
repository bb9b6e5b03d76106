"""Networks whose weights are on the device when a forward needs them: all of them always, or a few blocks at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from wan.modules.hooks import Residency
from wan.modules.model import WanModel
from wan.modules.t5 import UMT5Encoder
from wan.offload.budget import Sizes
from wan.offload.copy_stream import Lane
from wan.offload.prefetcher import Unit, Walker, aligned
from wan.offload.reader import Source, fill
from wan.utils.accelerator import free_memory

Network = TypeVar("Network", WanModel, UMT5Encoder)
SPARE = 0.02  # of a slot: for the scales of blocks in fp8, which make two of them a little more than one in bf16


class Streamed(Residency):
    """The seam's other case: a network whose units a walker brings."""

    def __init__(self, walker: Walker, numbers: Sequence[int]) -> None:
        """numbers: the walker's, for each of the network's units."""
        self.walker, self.numbers = walker, numbers

    def use(self, unit: int) -> AbstractContextManager[None]:
        return self.walker.use(self.numbers[unit])


class Networks(Generic[Network]):
    """Networks by name, on `device`, their units in slots that all of them share.

    parts: (module on the meta device, its weights); the module stays as it is, `models` are copies. What is in no unit
    is loaded at once and stays. There are no slots before `resize`.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Network, Source]],
        device: torch.device,
        report: Callable[[int], None] = lambda _: None,
        lane: Lane | None = None,
    ) -> None:
        self.models: dict[str, Network] = {}
        self._numbers: dict[str, list[int]] = {}
        units: list[Unit] = []
        for name, (blueprint, source) in parts.items():
            model = self.models[name] = copy.deepcopy(blueprint).eval().requires_grad_(False)
            if isinstance(model, UMT5Encoder):
                model.token_embedding = FileTable(source, "token_embedding.weight", device)
            found = parts_of(model, source.dtype)
            fill(model, source, found.fixed, device, report)
            self._numbers[name] = [len(units) + part for part in found.of_unit]
            units += [Unit(model, source, names) for names in found.parts]
        self.walker = Walker(units, device, lane)
        for name, model in self.models.items():
            model.residency = Streamed(self.walker, self._numbers[name])

    def job(self, forwards: Sequence[str], again: bool = False) -> AbstractContextManager[None]:
        """Inside this, forwards of the networks named, in this order. again: a job with the same ones follows."""
        return self.walker.job(self._uses(forwards), again)

    def ahead(self, forwards: Sequence[str]) -> AbstractContextManager[None]:
        """Beside what is done inside this, what such a job begins with is brought, as much as there are slots for."""
        return self.walker.ahead(self._uses(forwards))

    def _uses(self, forwards: Sequence[str]) -> list[int]:
        return [unit for name in forwards for unit in self._numbers[name]]

    def preload(self, report: Callable[[int], None] = lambda _: None) -> None:
        """Bring all of them, to stay."""
        self.walker.resize(len(self.walker.units))
        self.walker.preload(report)

    def leave(self, slots: int = 0) -> None:
        """Give back the memory of all but so many slots."""
        self.walker.resize(min(slots, len(self.walker.slots)))
        free_memory()


class Parts(NamedTuple):
    """Names of a network's parameters by when they are on the device.

    fixed: always. parts: each in one slot, in the order of use. of_unit: the number of the part that a unit is in.
    """

    fixed: list[str]
    parts: list[list[str]]
    of_unit: list[int]


def parts_of(model: WanModel | UMT5Encoder, dtype: Callable[[str], torch.dtype]) -> Parts:
    """A part is a unit, or neighbours that are no larger together than the largest unit: blocks in fp8 go in pairs,
    where the first and the last are in bf16."""
    size = _sizes(model, dtype)
    units: dict[int | None, list[str]] = {}
    for name in size:
        units.setdefault(model.unit_of(name), []).append(name)
    found = Parts(units.pop(None, []), [], [])
    need = {number: sum(size[name] for name in names) for number, names in units.items()}
    room = taken = max(need.values()) * (1 + SPARE)
    for number in range(len(units)):
        if taken + need[number] > room:
            found.parts.append([])
            taken = 0
        found.parts[-1].extend(units[number])
        found.of_unit.append(len(found.parts) - 1)
        taken += need[number]
    return found


def sizes_of(model: WanModel | UMT5Encoder, dtype: Callable[[str], torch.dtype]) -> Sizes:
    """What a network built on the meta device will take as one of `Networks`."""
    size = _sizes(model, dtype)
    fixed, parts, _ = parts_of(model, dtype)
    gathered = {"token_embedding.weight"} if isinstance(model, UMT5Encoder) else set()
    largest = max(sum(size[name] for name in names) for names in parts)
    return Sizes(len(parts), largest, sum(size[name] for name in fixed if name not in gathered))


def _sizes(model: nn.Module, dtype: Callable[[str], torch.dtype]) -> dict[str, int]:
    """Bytes of each parameter in a slot."""
    return {name: aligned(p.numel() * dtype(name).itemsize) for name, p in model.named_parameters()}


class FileTable(nn.Module):
    """A row for each id, gathered from the file: of a table of gigabytes a text needs a few hundred rows."""

    def __init__(self, source: Source, name: str, device: torch.device) -> None:
        super().__init__()
        self.source, self.name, self.device = source, name, device

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [n] -> [n, D]."""
        rows, places = ids.cpu().unique(return_inverse=True)
        shape = (len(rows), *self.source.store[self.name].shape[1:])
        found = torch.empty(shape, dtype=self.source.dtype(self.name), device=self.device)
        buffer = torch.empty(self.source.store.buffer_bytes(self.name, slice(0, 1)), dtype=torch.uint8)
        for number, row in enumerate(rows.tolist()):
            (piece,) = self.source.pieces([self.name], lambda _, row=row: slice(row, row + 1))  # type: ignore[misc]
            target = {self.name: found[number : number + 1]}
            self.source.place(piece, self.source.read(piece, buffer), target, row)
        return found[places.to(self.device)]


def text_encoder(
    blueprint: UMT5Encoder, source: Source, device: torch.device, slots: int | None
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Ids of texts -> rows of each, block by block over all texts. slots: as for `Experts.job`.

    Blocks that have a slot stay for the next call, until the function is dropped.
    """
    networks = Networks({"text": (blueprint, source)}, device)
    networks.walker.resize(len(networks.walker.units) if slots is None else slots)

    def encode(texts: Sequence[Tensor]) -> list[Tensor]:
        with networks.job(["text"], again=True):
            return networks.models["text"](texts)

    return encode


class Experts:
    """The denoising networks by name, with what they are set to for a step.

    models: on their device, or those of `networks`, which brings them there.
    """

    def __init__(
        self,
        models: Mapping[str, WanModel],
        networks: Networks[WanModel] | None = None,
        set_lora: Callable[[WanModel, float], None] | None = None,
    ) -> None:
        """set_lora: changes the scale of a model's LoRA adapters; None if they are merged into the weights."""
        self.models, self.networks = dict(models), networks
        self._set_lora = set_lora
        self._lora_scale = dict.fromkeys(models, 1.0)
        self._forwards: list[str] = []  # of the last job

    @contextmanager
    def job(
        self,
        steps: Sequence[tuple[str, int]],
        slots: int | None = None,
        batch_guidance: bool = False,
        again: bool = False,
    ) -> Iterator[None]:
        """Inside this, for each step so many passes of the network named. slots: for the blocks; default: for all.

        batch_guidance: the passes of a step go through the blocks together. again: a job with the same steps follows.
        """
        for model in self.models.values():
            model.residency.batch_guidance = batch_guidance
        self._forwards = [name for name, passes in steps for _ in range(1 if batch_guidance else passes)]
        if self.networks is None:
            yield
            return
        self.networks.walker.resize(len(self.networks.walker.units) if slots is None else slots)
        with self.networks.job(self._forwards, again=again):
            yield

    def ahead(self) -> AbstractContextManager[None]:
        """Beside what is done inside this, what another job like the last one begins with comes into the slots left."""
        return self.networks.ahead(self._forwards) if self.networks else nullcontext()

    def ready(self, name: str, lora: float) -> WanModel:
        """The network, its LoRAs at scale `lora`."""
        model = self.models[name]
        if lora != self._lora_scale[name]:
            assert self._set_lora is not None, "a LoRA merged into the weights has one strength"
            self._set_lora(model, lora)
            self._lora_scale[name] = lora
        return model

    def leave(self, slots: int = 0) -> None:
        """Free the device of what can be brought again, but for so many slots. On a CPU nothing else asks for the
        memory: it stays."""
        if self.networks is not None and self.networks.walker.device.type != "cpu":
            self.networks.leave(slots)

    @property
    def waited(self) -> float:
        """Seconds in which computation waited for weights, so far."""
        return 0.0 if self.networks is None else self.networks.walker.waited

    @property
    def brought(self) -> int:
        """Bytes of weights read into slots, so far."""
        return 0 if self.networks is None else self.networks.walker.brought
