"""Where each tensor of a LoRA goes: every one ends in exactly one list of `Resolved`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning import lora_keys
from lightning.lora_kinds import KINDS, MAGNITUDE, PAIR, Kind, Shape
from wan.checkpoints.safetensors_file import Entry

LORA_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PATCH_EMBEDDING = "patch_embedding.weight"
Scale = Callable[[str, str | None, int], float]  # module, alpha tensor, rank -> alpha / rank


@dataclass(frozen=True)
class Delta:
    """One change of parameter `target`: scale * the change of `kind`, or scale * one tensor where kind is None.

    roles: of `tensors`, in their order. scale: alpha / rank, without the strength. rank: 0 for a whole difference.
    magnitude: the tensor of row norms that DoRA gives the changed weight.
    """

    target: str
    kind: Kind | None
    roles: tuple[str, ...]
    tensors: tuple[str, ...]
    scale: float
    rank: int
    magnitude: str | None = None
    on_linear: bool = False

    @property
    def is_adapter(self) -> bool:
        """Whether it can stay beside the weight: a pair on a linear layer."""
        return self.kind is PAIR and self.on_linear and self.magnitude is None


@dataclass
class Resolved:
    deltas: list[Delta] = field(default_factory=list)
    alphas: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # Wan2.1's image branch, the other expert's half, empty pairs
    skipped: list[str] = field(default_factory=list)  # a patch embedding for another number of channels
    unmatched: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    conflicts: dict[str, str] = field(default_factory=dict)  # tensor -> why it does not fit
    is_full_weights: bool = False


def resolve_names(
    entries: Mapping[str, Entry],
    keys: Mapping[str, lora_keys.Key],
    scale: Scale,
    shapes: Mapping[str, Shape],
    expert: str | None,
) -> Resolved:
    """Match tensors (`entries`, with their names taken apart in `keys`) with the parameters in `shapes`.

    expert picks the half of a file that holds both experts. scale raises ValueError for an alpha that is unusable.
    """
    table = lora_keys.spellings(shapes)
    out = Resolved()
    halves = {key.expert for key in keys.values()}
    modules: dict[str, dict[str, str]] = {}  # stem -> role -> tensor
    spelled: dict[str, lora_keys.Key] = {}  # parameter -> the first tensor that names it
    for name in entries:
        key = keys.get(name)
        if lora_keys.UNSUPPORTED.search(name):
            out.unsupported.append(name)
        elif key is None:
            (out.ignored if lora_keys.IMAGE_BRANCH.search(name) else out.unmatched).append(name)
        elif len(halves) > 1 and expert in ("high", "low") and (key.expert or "high") != expert:
            out.ignored.append(name)
        elif (first := modules.setdefault(key.stem, {}).setdefault(key.role, name)) != name:
            out.conflicts[name] = f"says the same as {first}"
        elif (target := lora_keys.find(table, key.stem, key.role)) and spelled.setdefault(target, key).stem != key.stem:
            out.conflicts[name] = f"is for the same weight as {spelled[target].raw}, in another spelling"
    for stem, names in modules.items():
        _Module(out, entries, shapes, stem, scale).place(names, table)
    bare = (name.removeprefix("model.").removeprefix("diffusion_model.") for name in entries)
    out.is_full_weights = any(lora_keys.flat(name) in table for name in bare)
    return out


@dataclass(frozen=True)
class _Module:
    """All tensors of one module: a change with its alpha and bias, differences, or unknown ones."""

    out: Resolved
    entries: Mapping[str, Entry]
    shapes: Mapping[str, Shape]
    stem: str
    scale: Scale

    def place(self, names: Mapping[str, str], table: dict[str, str]) -> None:
        """names: by role."""
        out = self.out
        targets = {role: target for role in names if (target := lora_keys.find(table, self.stem, role))}
        placed = {role: name for role, name in names.items() if role in targets}
        for role, name in names.items():
            if role not in targets:
                (out.ignored if lora_keys.IMAGE_BRANCH.search(name) else out.unmatched).append(name)
        if PATCH_EMBEDDING in targets.values() and self._other_channels(placed):
            out.skipped.extend(placed.values())
            return
        scale = 1.0
        for kind in KINDS:
            if not placed.keys().isdisjoint(kind.roles):
                scale = self._add_change(kind, placed, targets)
        if MAGNITUDE in placed and not any(role in placed for kind in KINDS for role in kind.roles):
            out.conflicts[placed[MAGNITUDE]] = "has no LoRA beside it"
        for role in ("diff", "diff_b", "diff_m", "up_bias"):
            if role in placed:
                fits = self.entries[placed[role]].shape == self.shapes[targets[role]]
                factor = scale if role == "up_bias" else 1.0
                self._add(Delta(targets[role], None, (role,), (placed[role],), factor, 0), fits)
        if "alpha" in placed:  # beside a difference alone it means nothing; alone it explains nothing
            (out.alphas if len(placed) > 1 else out.unmatched).append(placed["alpha"])

    def _add_change(self, kind: Kind, placed: Mapping[str, str], targets: Mapping[str, str]) -> float:
        """Add the module's change of this kind; the scale that it has."""
        roles = tuple(role for role in kind.roles if role in placed)
        names = tuple(placed[role] for role in roles)
        own = {role: self.entries[placed[role]].shape for role in roles}
        if missing := kind.lacks(own):
            self.out.conflicts[names[0]] = f"has no {missing} matrix beside it"
            return 1.0
        if any(0 in shape for shape in own.values()):
            self.out.ignored += names  # a rank of 0 changes nothing
            return 1.0
        target = targets[roles[0]]
        shape = self.shapes[target]
        rows, columns, rank = kind.sizes(own) or (0, 0, 0)
        fits = len(shape) > 1 and (rows, columns) == (shape[0], math.prod(shape[1:]))
        scale = 1.0
        try:
            scale = self.scale(self.stem, placed.get("alpha"), rank) if fits else 1.0
        except ValueError as e:
            self.out.conflicts[placed["alpha"]] = str(e)
        magnitude = placed.get(MAGNITUDE)
        norms = self.entries[magnitude].shape if magnitude else ()
        by_column = len(shape) == len(norms) == 2 and norms[0] == 1
        if magnitude and (math.prod(norms) != shape[0] or by_column):
            found = f"is {list(norms)}, not one norm for each of the {shape[0]} rows of {target}"
            self.out.conflicts[magnitude] = found
        self._add(Delta(target, kind, roles, names, scale, rank, magnitude, len(shape) == 2), fits)
        return scale

    def _add(self, delta: Delta, fits: bool) -> None:
        """Take a delta whose shapes and dtypes fit its parameter; note it as a conflict otherwise."""
        names = [*delta.tensors, *filter(None, [delta.magnitude])]
        if odd := [name for name in names if self.entries[name].dtype not in LORA_FLOATS]:
            self.out.conflicts[odd[0]] = f"is stored as {self.entries[odd[0]].dtype}, not as floating point"
        elif not fits:
            found = " x ".join(str(list(self.entries[name].shape)) for name in delta.tensors)
            wanted = list(self.shapes[delta.target])
            self.out.conflicts[names[0]] = f"is {found} where the model's {delta.target} is {wanted}"
        else:
            self.out.deltas.append(delta)

    def _other_channels(self, placed: Mapping[str, str]) -> bool:
        """Whether a change of the patch embedding is for a model with another number of input channels."""
        name, shape = placed.get("diff") or placed.get("down"), self.shapes[PATCH_EMBEDDING]
        found = self.entries[name].shape if name else ()
        return len(found) == len(shape) and found[1] != shape[1] and found[2:] == shape[2:]
