"""LoRA files: open any published family, account for every tensor against the model's names, or refuse with the reason.

Everything here works on headers (names, shapes, dtypes) and the few bytes of the alphas; no torch is imported.

    W' = W + strength * (alpha / rank) * up @ down          pairs: up [out, rank], down [rank, in]
    p' = p + strength * diff                                whole differences of weights, biases, modulation
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import lora_keys
from lightning.lora_matching import Delta, Resolved, resolve
from lightning.peft_settings import PEFT_CONFIG, PEFT_WEIGHTS, AdapterSettings, settings_of
from lightning.releases import Release, recognise
from wan.checkpoints.layout import STEM
from wan.checkpoints.safetensors_file import TensorStore
from wan.configs import task_of
from wan.utils.errors import LoraError, TensorFileError

if TYPE_CHECKING:
    from torch import Tensor

RELEASED_FILES = {
    "high": "high_noise_model.safetensors",
    "low": "low_noise_model.safetensors",
    "model": f"{STEM}.safetensors",
}


@dataclass(frozen=True)
class Lora:
    """One LoRA file for one expert, at a strength. `open` reads its header and its alphas.

    expert: "high", "low" or "model" where it is known; needed for diffusers files that hold both experts.
    default_alpha: what to assume for modules without an alpha; None means alpha = rank, or what the release needs.
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
        """`path` is a safetensors file or a PEFT folder. Raises LoraError if it cannot be one."""
        if not math.isfinite(strength):
            raise LoraError(f"LoRA {path}: the strength must be a finite number, not {strength}")
        if default_alpha is not None and not (math.isfinite(default_alpha) and default_alpha > 0):
            raise LoraError(f"LoRA {path}: alpha must be a number above 0, not {default_alpha}")
        if path.is_dir() and not (path / PEFT_CONFIG).is_file():
            held = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "no safetensors file"
            raise LoraError(f"LoRA {path} is a folder without {PEFT_CONFIG}; name one file (it holds {held})")
        file = path / PEFT_WEIGHTS if path.is_dir() else path
        if not file.is_file():
            raise LoraError(f"LoRA {file}: no such file")
        try:
            store = TensorStore.open(file)
            keys = {name: key for name in store if (key := lora_keys.parse(name))}
            alphas = store.scalars(name for name, key in keys.items() if key.kind == "alpha")
        except (TensorFileError, OSError) as e:
            raise LoraError(f"LoRA {e}") from e
        if bad := [name for name, alpha in alphas.items() if not math.isfinite(alpha) or alpha == 0]:
            raise LoraError(f"LoRA {file}: {bad[0]} is {alphas[bad[0]]}, which is no usable alpha")
        settings = settings_of(file, store.metadata, expert)
        return cls(path, strength, store, keys, alphas, settings, default_alpha, recognise(path), expert)

    @property
    def assumed_alpha(self) -> float | None:
        """The alpha of modules that store none, None for alpha = rank."""
        if self.default_alpha is not None:
            return self.default_alpha
        return self.release.default_alpha if self.release else None

    def scale(self, stem: str, alpha_name: str | None, rank: int) -> float:
        """alpha / rank of one module: alpha from the file, else from PEFT's settings, else the default, else rank."""
        if alpha_name is not None:
            return self.alphas[alpha_name] / rank
        if self.settings is not None:
            return self.settings.scale(stem, rank)
        return 1.0 if self.assumed_alpha is None else self.assumed_alpha / rank

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> Resolved:
        """Where every tensor goes in a model with these parameters."""
        return resolve(self.store, self.keys, self.scale, shapes, self.expert)

    def deltas(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Delta]:
        """What it adds to a model with these parameters; LoraError if something in it does not fit."""
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
    """What one LoRA does to one model, tensor by tensor; `summary` is the line for the user."""

    path: str
    release: str | None
    strength: float
    tensors: int
    pairs: tuple[int, int]  # applied, brought
    differences: tuple[int, int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]  # alpha / rank, rising
    ignored: list[str]
    skipped: list[str]
    unmatched: list[str]
    warnings: list[str]

    def summary(self) -> str:
        parts = [f"{self.pairs[0]}/{self.pairs[1]} pairs"] if self.pairs[1] else []
        if self.differences[1]:
            parts.append(f"{self.differences[0]}/{self.differences[1]} differences")
        if self.scales:
            ends = dict.fromkeys((self.scales[0], self.scales[-1]))
            parts.append("alpha/rank " + " to ".join(f"{scale:g}" for scale in ends))
        if self.strength != 1.0:
            parts.append(f"strength {self.strength:g}")
        if self.ignored:
            parts.append(f"{len(self.ignored)} ignored (Wan2.1 image branch or the other expert)")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped (patch embedding for another number of channels)")
        return ", ".join([*parts, f"{len(self.unmatched)} unmatched"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(
    lora: Lora, shapes: Mapping[str, tuple[int, ...]], *, expert: str | None = None, allow_partial: bool = False
) -> Coverage:
    """What `lora` does to the model whose parameters are `shapes`; from headers, in milliseconds.

    expert: what the file is used for, to warn if its name says another. allow_partial: names that nothing explains
    are a warning. Raises LoraError for a file that matches nothing, does not fit, or holds what is not understood.
    """
    found = lora.resolve(shapes)
    pairs = [d for d in found.deltas if d.rank]
    if problems := _problems(lora, found, allow_partial):
        raise LoraError(f"LoRA {lora.path}: " + "; ".join(problems))
    stray = [lora.keys[name].kind for name in found.unmatched if name in lora.keys]
    warnings = _warnings(lora, found, shapes, expert or lora.expert)
    differences = len(found.deltas) - len(pairs)
    return Coverage(
        path=str(lora.path),
        release=lora.release.name if lora.release else None,
        strength=lora.strength,
        tensors=len(lora.store),
        pairs=(len(pairs), len(pairs) + stray.count("down")),
        differences=(differences, differences + sum(kind.startswith("diff") for kind in stray)),
        ranks=tuple(sorted({d.rank for d in pairs})),
        scales=tuple(sorted({d.scale for d in pairs})),
        ignored=found.ignored,
        skipped=found.skipped,
        unmatched=found.unmatched,
        warnings=warnings,
    )


def files_of(lora_dir: Path, experts: Collection[str], flag: str = "--lora_dir") -> dict[str, Path]:
    """The LoRA file of each expert in a release folder; raises LoraError naming what is missing, and the flag.

    A released folder has one file of a fixed name for each expert. Other folders serve as well if exactly one of
    their files is named after the expert (`..._high_noise_...`, `..._LOW_...`).
    """
    if not lora_dir.is_dir():
        raise LoraError(f"{flag} {lora_dir}: no such folder")
    here = sorted(lora_dir.glob("*.safetensors"))
    files: dict[str, Path] = {}
    for expert in experts:
        named = [file for file in here if expert_of(file.name) == expert]
        if (lora_dir / RELEASED_FILES[expert]) in here:
            files[expert] = lora_dir / RELEASED_FILES[expert]
        elif len(named) == 1:
            files[expert] = named[0]
    if missing := [RELEASED_FILES[expert] for expert in experts if expert not in files]:
        found = ", ".join(file.name for file in here) or "no safetensors file"
        raise LoraError(f"{flag} {lora_dir}: {' and '.join(missing)} missing; the folder holds {found}")
    return files


def expert_of(name: str) -> str | None:
    """ "high" or "low" where a file or folder name says so, and only one of them."""
    said = set(re.findall(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)", name.lower()))
    return said.pop() if len(said) == 1 else None


def _problems(lora: Lora, found: Resolved, allow_partial: bool) -> list[str]:
    """Why this file is refused: one clause for each reason, with counts and the first names."""
    total, problems = len(lora.store), []
    if found.unsupported:
        kinds = sorted({m[1] for name in found.unsupported if (m := lora_keys.UNSUPPORTED.search(name))})
        problems.append(f"holds {_some(found.unsupported, total)} of a kind not supported: {', '.join(kinds)}")
    if found.conflicts:
        first, reason = next(iter(found.conflicts.items()))
        problems.append(f"{len(found.conflicts)} of {total} tensors do not fit the model (first: {first} {reason})")
    if not found.deltas and not problems:
        what = "is a full weight file, not a LoRA (see --expert)" if found.is_full_weights else "nothing in it matches"
        problems.append(f"{what}: 0 of {total} tensors belong to this model" + _first(found.unmatched or found.ignored))
    elif found.unmatched and not allow_partial:
        rest = "" if problems else "; --lora_allow_partial applies the rest"  # which does not help against the others
        problems.append(f"{_some(found.unmatched, total)} match no part of the model{rest}")
    return problems


def _warnings(lora: Lora, found: Resolved, shapes: Mapping[str, tuple[int, ...]], expert: str | None) -> list[str]:
    warnings = []
    halves = {key.expert for key in lora.keys.values()}
    named = expert_of(lora.path.name) or expert_of(lora.path.absolute().parent.name)
    named = "low" if halves == {"low"} else named
    if {named, expert} == {"high", "low"}:
        warnings.append(f"LoRA {lora.path} is named after the {named}-noise expert but used for the {expert}-noise one")
    task = task_of(shapes)
    if lora.release and task and task not in lora.release.tasks:
        warnings.append(f"LoRA {lora.path} was published for {' and '.join(lora.release.tasks)}, this is {task}")
    layers = {name for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2}
    reached = layers & {d.target for d in found.deltas}
    if lora.release and lora.release.kind == "lora" and len(reached) < len(layers):
        warnings.append(f"LoRA {lora.path} changes {len(reached)} of the {len(layers)} layers that its release changes")
    if found.unmatched:
        warnings.append(f"LoRA {lora.path}: {_some(found.unmatched, len(lora.store))} match no part of the model")
    if not lora.alphas and lora.settings is None and lora.default_alpha is None:
        warnings += _warnings_without_alpha(lora, {d.rank for d in found.deltas if d.rank})
    return warnings


def _warnings_without_alpha(lora: Lora, ranks: set[int]) -> list[str]:
    """The first Lightning upload is the only published file that lacks the alpha it needs."""
    if lora.assumed_alpha is not None:
        return [
            f"LoRA {lora.path} stores no alpha; {lora.assumed_alpha:g}/rank is applied, which this release needs "
            "(--lora_alpha overrides)"
        ]
    looks_like_it = ranks == {64} and all(
        entry.dtype == "F32" and name.startswith("blocks.") and ".lora_" in name for name, entry in lora.store.items()
    )
    if not looks_like_it:
        return []
    return [
        f"LoRA {lora.path} stores no alpha and looks like the first Lightning upload, which needs --lora_alpha 8; "
        "alpha/rank 1 is applied"
    ]


def _some(tensors: Sequence[str], total: int) -> str:
    return f"{len(tensors)} of {total} tensors" + _first(tensors)


def _first(tensors: Sequence[str]) -> str:
    more = ", ..." if len(tensors) > 3 else ""
    return f" (first: {', '.join(tensors[:3])}{more})" if tensors else ""
