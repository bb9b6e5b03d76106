"""LoRA files: open one of any kind and spelling, account for every tensor against the model's names, or refuse it.

Everything here works on headers (names, shapes, dtypes) and the few bytes of the alphas; no torch is imported.

    W' = W + strength * scale * change        scale: alpha / rank; change: of a kind in `lora_kinds`
    W' = W + strength * (m C / |C| - W)       DoRA: C = W + scale * change, m the norm of each row
    p' = p + strength * diff                  whole differences of weights, biases, modulation
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import lora_keys
from lightning.lora_files import PEFT_CONFIG, PEFT_STEM, expert_of, weight_file
from lightning.lora_kinds import KINDS, PAIR
from lightning.lora_matching import Delta, Resolved, resolve_names
from lightning.peft_settings import METADATA, AdapterSettings, settings_of
from lightning.releases import Release, recognise
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import kind_of, open_file
from wan.configs import task_of
from wan.utils.errors import LoraError, TensorFileError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """One LoRA file for one expert, at a strength. `open` reads its header and its alphas.

    expert: "high", "low" or "model" where it is known; needed for diffusers files that hold both experts.
    default_alpha: of modules that store no alpha; None means alpha = rank, or the release's.
    """

    path: Path
    strength: float
    store: TensorStore
    keys: Mapping[str, lora_keys.Key]  # by tensor name, where a LoRA family explains the name
    alphas: Mapping[str, float]  # by tensor name
    settings: AdapterSettings | None  # PEFT's, where the file comes with them
    default_alpha: float | None
    release: Release | None
    expert: str | None

    @classmethod
    def open(
        cls, path: Path, strength: float = 1.0, default_alpha: float | None = None, expert: str | None = None
    ) -> Lora:
        """`path` is a file of weights or a PEFT folder. Raises LoraError if it cannot be one."""
        if not math.isfinite(strength):
            raise LoraError(f"LoRA {path}: the strength must be a finite number, not {strength}")
        if default_alpha is not None and not (math.isfinite(default_alpha) and default_alpha > 0):
            raise LoraError(f"LoRA {path}: alpha must be a number above 0, not {default_alpha}")
        file = weight_file(path)
        if not file.is_file():
            raise LoraError(f"LoRA {file}: no such file")
        try:
            store = open_file(file)
            keys = {name: key for name in store if (key := lora_keys.parse_key(name))}
            alphas = store.scalars(name for name, key in keys.items() if key.role == "alpha")
        except (TensorFileError, OSError) as e:
            raise LoraError(f"LoRA {e}") from e
        settings = settings_of(file, store.metadata, expert, has_alphas=bool(alphas))
        return cls(path, strength, store, keys, alphas, settings, default_alpha, recognise(path), expert)

    @property
    def file(self) -> Path:
        return self.store.files[0]

    @property
    def assumed_alpha(self) -> float | None:
        """The alpha of modules that store none, None for alpha = rank."""
        if self.default_alpha is not None:
            return self.default_alpha
        return self.release.default_alpha if self.release else None

    def scale(self, stem: str, alpha_name: str | None, rank: int) -> float:
        """alpha / rank of one module: alpha from the file, else from PEFT's settings, else the default, else rank.

        A module without a rank, of whole matrices, has 1 unless PEFT's settings say otherwise. ValueError for an alpha
        that is 0 or not finite.
        """
        if alpha_name is not None and rank:
            alpha = self.alphas[alpha_name]
            if not math.isfinite(alpha) or alpha == 0:
                raise ValueError(f"is {alpha}, which is no usable alpha")
            return alpha / rank
        if self.settings is not None and alpha_name is None:
            return self.settings.scale(stem, rank)
        return 1.0 if self.assumed_alpha is None or not rank else self.assumed_alpha / rank

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> Resolved:
        """The place of every tensor in a model with these parameters."""
        return resolve_names(self.store, self.keys, self.scale, shapes, self.expert)

    def deltas(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Delta]:
        """The changes of a model with these parameters; LoraError if something in the file does not fit."""
        found = self.resolve(shapes)
        if found.conflicts:
            name, reason = next(iter(found.conflicts.items()))
            raise LoraError(f"LoRA {self.path}: {name} {reason}")
        return found.deltas

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """One tensor, or these rows of it, in a dtype that can be calculated with. LoraError if it holds NaN or Inf.

        buffer: where to read to, as for `TensorStore.read`.
        """
        tensor = self.store.read(name, rows, buffer)
        if tensor.dtype.itemsize == 1:  # float8, whose numbers float32 has too
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise LoraError(f"LoRA {self.path}: tensor {name} holds NaN or Inf")
        return tensor


@dataclass(frozen=True)
class Coverage:
    """The effect of one LoRA on one model, tensor by tensor; `summary` is the line for the user."""

    path: str
    release: str | None
    strength: float
    tensors: int
    pairs: tuple[int, int]  # applied, in the file; of other kinds too
    differences: tuple[int, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]  # alpha / rank, rising
    ignored: list[str]
    skipped: list[str]
    unmatched: list[str]
    warnings: list[str]
    kinds: tuple[str, ...] = ("pair",)  # of the pairs

    def summary(self) -> str:
        kinds = " and ".join(kind for kind in self.kinds if kind != "pair") or "pairs"
        parts = [f"{self.pairs[0]}/{self.pairs[1]} {kinds}"] if self.pairs[1] else []
        if self.differences[1]:
            parts.append(f"{self.differences[0]}/{self.differences[1]} differences")
        if self.scales:
            ends = dict.fromkeys((self.scales[0], self.scales[-1]))
            parts.append("alpha/rank " + " to ".join(f"{scale:g}" for scale in ends))
        if self.strength != 1.0:
            parts.append(f"strength {self.strength:g}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} ignored (Wan2.1 image branch, the other expert, or of rank 0)")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped (patch embedding for another number of channels)")
        return ", ".join([*parts, f"{len(self.unmatched)} unmatched"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(
    lora: Lora,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    expert: str | None = None,
    allow_partial: bool = False,
    as_adapter: bool = False,
) -> Coverage:
    """The effect of `lora` on the model whose parameters are `shapes`; from headers, in milliseconds.

    expert: that the file is used for, to warn if its name says another. allow_partial: names that nothing explains
    are a warning. as_adapter: the pairs stay beside the weights.
    Raises LoraError for a file that matches nothing, does not fit, or holds something that is not read.
    """
    found = lora.resolve(shapes)
    if problems := _problems(lora, found, allow_partial, as_adapter):
        raise LoraError(f"LoRA {lora.path}: " + "; ".join(problems))
    changes = [delta for delta in found.deltas if delta.kind]
    differences = len(found.deltas) - len(changes)
    unmatched = [lora.keys[name] for name in found.unmatched if name in lora.keys]
    last = {role for kind in KINDS for role in (kind.factors[-1].b, kind.factors[-1].whole)}  # one per change
    names = {delta.kind.name for delta in changes if delta.kind} | {"DoRA" for delta in changes if delta.magnitude}
    return Coverage(
        path=str(lora.path),
        release=lora.release.name if lora.release else None,
        strength=lora.strength,
        tensors=len(lora.store),
        pairs=(len(changes), len(changes) + sum(key.role in last for key in unmatched)),
        differences=(differences, differences + sum(key.role.startswith("diff") for key in unmatched)),
        ranks=tuple(sorted({delta.rank for delta in changes if delta.rank})),
        scales=tuple(sorted({delta.scale for delta in changes})),
        ignored=found.ignored,
        skipped=found.skipped,
        unmatched=found.unmatched,
        warnings=_warnings(lora, found, shapes, expert or lora.expert, as_adapter),
        kinds=tuple(sorted(names)),
    )


def _problems(lora: Lora, found: Resolved, allow_partial: bool, as_adapter: bool) -> list[str]:
    """Why this file is refused: one clause per reason, with counts and the first names."""
    total, problems = len(lora.store), []
    if found.unsupported:
        kinds = sorted({m[1] for name in found.unsupported if (m := lora_keys.UNSUPPORTED.search(name))})
        problems.append(f"holds {_some(found.unsupported, total)} of a kind not supported: {', '.join(kinds)}")
    if as_adapter and any(delta.magnitude for delta in found.deltas):
        problems.append("is a DoRA, whose change needs the weights themselves; use --lora_mode merge")
    if found.conflicts:
        first, reason = next(iter(found.conflicts.items()))
        problems.append(f"{len(found.conflicts)} of {total} tensors do not fit the model (first: {first} {reason})")
    if not found.deltas and not problems:
        kind = kind_of(lora.store) or ("expert" if found.is_full_weights else None)
        reason = f"is a full weight file, not a LoRA (see --{kind})" if kind else "nothing in it matches"
        names = _first(found.unmatched or found.ignored)
        problems.append(f"{reason}: 0 of {total} tensors belong to this model{names}")
    elif found.unmatched and not allow_partial:
        rest = "" if problems else "; --lora_allow_partial applies the rest"  # which does not help against the others
        problems.append(f"{_some(found.unmatched, total)} match no part of the model{rest}")
    return problems


def _warnings(
    lora: Lora, found: Resolved, shapes: Mapping[str, tuple[int, ...]], expert: str | None, as_adapter: bool
) -> list[str]:
    warnings, name = [], f"LoRA {lora.path}"
    halves = {key.expert for key in lora.keys.values()}
    named = "low" if halves == {"low"} else expert_of(lora.path) or expert_of(lora.path.absolute().parent)
    if {named, expert} == {"high", "low"}:
        warnings.append(f"{name} is named after the {named}-noise expert but used for the {expert}-noise one")
    task = task_of(shapes)
    if lora.release and task and task not in lora.release.tasks:
        warnings.append(f"{name} was published for {' and '.join(lora.release.tasks)}, this is {task}")
    layers = {parameter for parameter, shape in shapes.items() if parameter.startswith("blocks.") and len(shape) == 2}
    reached = layers & {delta.target for delta in found.deltas}
    if lora.release and lora.release.kind == "lora" and len(reached) < len(layers):
        warnings.append(f"{name} changes {len(reached)} of the {len(layers)} layers that its release changes")
    if found.unmatched:
        warnings.append(f"{name}: {_some(found.unmatched, len(lora.store))} match no part of the model")
    kinds = {delta.kind.name for delta in found.deltas if delta.kind and delta.kind is not PAIR}
    if as_adapter and kinds:
        warnings.append(f"{name}: --lora_mode adapter keeps pairs only; its {' and '.join(kinds)} changes are merged")
    if lora.settings and lora.file.stem != PEFT_STEM and METADATA not in lora.store.metadata:
        warnings.append(f"{name} is scaled by the alpha in {PEFT_CONFIG} beside it")
    if not lora.alphas and lora.settings is None and lora.default_alpha is None:
        warnings += _warnings_without_alpha(lora, {delta.rank for delta in found.deltas if delta.rank})
    return warnings


def _warnings_without_alpha(lora: Lora, ranks: set[int]) -> list[str]:
    """The first Lightning upload is the only published file that lacks the alpha it needs."""
    start = f"LoRA {lora.path} stores no alpha"
    if lora.assumed_alpha is not None:
        return [f"{start}; {lora.assumed_alpha:g}/rank is applied, as this release needs (--lora_alpha overrides)"]
    looks_like_it = ranks == {64} and all(
        entry.dtype == "F32" and name.startswith("blocks.") and ".lora_" in name for name, entry in lora.store.items()
    )
    first = f"{start} and looks like the first Lightning upload, which needs --lora_alpha 8; alpha/rank 1 is applied"
    return [first] if looks_like_it else []


def _some(tensors: Sequence[str], total: int) -> str:
    return f"{len(tensors)} of {total} tensors" + _first(tensors)


def _first(tensors: Sequence[str]) -> str:
    more = ", ..." if len(tensors) > 3 else ""
    return f" (first: {', '.join(tensors[:3])}{more})" if tensors else ""
