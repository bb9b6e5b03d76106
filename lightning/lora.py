"""LoRA files: open one of any kind and spelling, account for every tensor against the model's names, or refuse it.

    W' = W + strength * scale * change        scale: alpha / rank; change: of a kind in `lora_matching`
    W' = W + strength * (m C / |C| - W)       DoRA: C = W + scale * change, m the norm of each row
    p' = p + strength * diff                  whole differences of weights, biases, modulation

Everything here works on headers and the few bytes of the alphas; no torch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.lora_files import PEFT_CONFIG, PEFT_STEM, expert_of, weight_file, weights_in
from lightning.lora_matching import KINDS, PAIR, UNSUPPORTED, Delta, Key, Resolved, Shapes, find, parse_key, spellings
from lightning.releases import Release, recognise
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import kinds_in, open_file
from wan.configs import task_of
from wan.utils.errors import LoraError, TensorFileError
from wan.utils.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

AdapterScale = Callable[[str, int], float]  # module, rank of its matrices or 0 for that of the settings -> alpha / rank
PEFT_KINDS = {"LORA": "lora_alpha", "LOKR": "alpha", "LOHA": "alpha"}  # kinds read -> the setting of their alpha
ALTERED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations whose LoRA belongs to a changed base
NOT_PLAIN = {  # settings that make something else of a LoRA, and its name
    "use_bdlora": "BD-LoRA", "use_qalora": "QA-LoRA", "alora_invocation_tokens": "aLoRA", "kasa_config": "KaSA",
    "layer_replication": "layer replication",
}  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """One LoRA file for one expert, at a strength. `open` reads its header and its alphas.
    expert: "high", "low" or "model" where it is known; needed for diffusers files that hold both experts.
    default_alpha: of modules that store no alpha; None means alpha = rank, or the release's."""

    path: Path
    strength: float
    store: TensorStore
    keys: Mapping[str, Key]  # by tensor name, where a LoRA family explains the name
    alphas: Mapping[str, float]  # by tensor name
    settings: AdapterScale | None  # by PEFT's settings, where the file comes with them
    default_alpha: float | None
    release: Release | None
    expert: str | None

    @classmethod
    def open(
        cls, path: Path, strength: float = 1.0, default_alpha: float | None = None, expert: str | None = None
    ) -> Lora:
        """`path` is a file of weights or a PEFT folder. Raises LoraError if it cannot be one."""
        if default_alpha is not None and not 0 < default_alpha < math.inf:
            raise LoraError(f"--lora_alpha must be a number above 0, not {default_alpha:g}")
        file = weight_file(path)
        if not file.is_file():
            raise LoraError(f"LoRA {file}: no such file")
        try:
            store = open_file(file)
            keys = {name: key for name in store if (key := parse_key(name))}
            alphas = store.scalars(name for name, key in keys.items() if key.role == "alpha")
        except (TensorFileError, OSError) as e:
            raise LoraError(f"LoRA {e}") from e
        settings = settings_of(file, store.metadata, expert, has_alphas=bool(alphas))
        return cls(path, strength, store, keys, alphas, settings, default_alpha, recognise(path), expert)

    @property
    def assumed_alpha(self) -> float | None:
        """The alpha of modules that store none, None for alpha = rank."""
        of_release = self.release.default_alpha if self.release else None
        return of_release if self.default_alpha is None else self.default_alpha

    def scale(self, stem: str, alpha_name: str | None, rank: int) -> float:
        """alpha / rank of one module: alpha from the file, else from PEFT's settings, else the default, else rank.
        A module without a rank, of whole matrices, has 1 unless PEFT's settings say otherwise. ValueError for an alpha
        that is 0 or not finite."""
        if alpha_name is not None and rank:
            alpha = self.alphas[alpha_name]
            if not math.isfinite(alpha) or alpha == 0:
                raise ValueError(f"is {alpha}, which is no usable alpha")
            return alpha / rank
        if self.settings is not None and alpha_name is None:
            return self.settings(stem, rank)
        return 1.0 if self.assumed_alpha is None or not rank else self.assumed_alpha / rank

    def resolve(self, shapes: Shapes) -> Resolved:
        """The place of every tensor in a model with these parameters."""
        out, table = Resolved(self.store, shapes, self.scale), spellings(shapes)
        halves = {key.expert for key in self.keys.values()}
        modules: dict[str, dict[str, str]] = {}  # stem -> role -> tensor
        spelled: dict[str, Key] = {}  # parameter -> the first tensor that names it
        for name in self.store:
            key = self.keys.get(name)
            if UNSUPPORTED.search(name):
                out.unsupported.append(name)
            elif key is None:
                out.set_aside(name)
            elif len(halves) > 1 and self.expert in ("high", "low") and (key.expert or "high") != self.expert:
                out.ignored.append(name)
            elif (first := modules.setdefault(key.stem, {}).setdefault(key.role, name)) != name:
                out.conflicts[name] = f"says the same as {first}"
            elif (target := find(table, key.stem, key.role)) and spelled.setdefault(target, key).stem != key.stem:
                out.conflicts[name] = f"is for the same weight as {spelled[target].raw}, in another spelling"
        for stem, names in modules.items():
            targets = {role: target for role in names if (target := find(table, stem, role))}
            for role, name in names.items():
                if role not in targets:
                    out.set_aside(name)
            out.place(stem, {role: names[role] for role in targets}, targets)
        return out

    def deltas(self, shapes: Shapes) -> list[Delta]:
        """The changes of a model with these parameters; LoraError if something in the file does not fit."""
        found = self.resolve(shapes)
        for name, reason in found.conflicts.items():
            raise LoraError(f"LoRA {self.path}: {name} {reason}")
        return found.deltas

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        """One tensor, or these rows of it, in a dtype that can be calculated with. LoraError if it holds NaN or Inf.
        buffer: where to read to, as for `TensorStore.read`."""
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
        scales = " to ".join(f"{scale:g}" for scale in dict.fromkeys(self.scales[:1] + self.scales[-1:]))
        parts = (
            (self.pairs[1], f"{self.pairs[0]}/{self.pairs[1]} {kinds}"),
            (self.differences[1], f"{self.differences[0]}/{self.differences[1]} differences"),
            (self.scales, f"alpha/rank {scales}"),
            (self.strength != 1.0, f"strength {self.strength:g}"),
            (self.ignored, f"{len(self.ignored)} ignored (Wan2.1 image branch, the other expert, or of rank 0)"),
            (self.skipped, f"{len(self.skipped)} skipped (patch embedding for another number of channels)"),
            (True, f"{len(self.unmatched)} unmatched"),
        )
        return ", ".join(text for shown, text in parts if shown)

    as_dict = asdict


def check(lora: Lora, shapes: Shapes, *, allow_partial: bool = False, as_adapter: bool = False) -> Coverage:
    """The effect of `lora` on the model whose parameters are `shapes`; from headers, in milliseconds.
    allow_partial: names that nothing explains are a warning. as_adapter: the pairs stay beside the weights.
    Raises LoraError for a file that matches nothing, does not fit, or holds something that is not read."""
    found = lora.resolve(shapes)
    if problems := _problems(lora, found, allow_partial, as_adapter):
        raise LoraError(f"LoRA {lora.path}: " + "; ".join(problems))
    changes = [delta for delta in found.deltas if delta.kind]
    differences = len(found.deltas) - len(changes)
    unmatched = [lora.keys[name] for name in found.unmatched if name in lora.keys]
    last = {role for kind in KINDS for role in (kind.factors[-1].b, kind.factors[-1].whole)}  # one per change
    names = {delta.kind.name for delta in changes if delta.kind} | {"DoRA" for delta in changes if delta.magnitude}
    return Coverage(
        path=str(lora.path), release=lora.release.name if lora.release else None, strength=lora.strength,
        tensors=len(lora.store),
        pairs=(len(changes), len(changes) + sum(key.role in last for key in unmatched)),
        differences=(differences, differences + sum(key.role.startswith("diff") for key in unmatched)),
        ranks=tuple(sorted({delta.rank for delta in changes if delta.rank})),
        scales=tuple(sorted({delta.scale for delta in changes})),
        ignored=found.ignored, skipped=found.skipped, unmatched=found.unmatched,
        warnings=list(_warnings(lora, found, shapes, as_adapter)),
        kinds=tuple(sorted(names)),
    )  # fmt: skip


def _problems(lora: Lora, found: Resolved, allow_partial: bool, as_adapter: bool) -> list[str]:
    total, problems = len(lora.store), []
    if found.unsupported:
        kinds = sorted({m[1] for name in found.unsupported if (m := UNSUPPORTED.search(name))})
        problems.append(f"holds {_some(found.unsupported, total)} of a kind not supported: {', '.join(kinds)}")
    if as_adapter and any(delta.magnitude for delta in found.deltas):
        problems.append("is a DoRA, whose change needs the weights themselves; use --lora_mode merge")
    if found.conflicts:
        first, reason = next(iter(found.conflicts.items()))
        problems.append(f"{len(found.conflicts)} of {total} tensors do not fit the model (first: {first} {reason})")
    if not found.deltas and not problems:
        kinds = kinds_in(lora.store)
        reason = f"is a full weight file, not a LoRA (see --{kinds[0]})" if kinds else "nothing in it matches"
        problems.append(f"{reason}: 0 of {total} tensors belong to this model (first: {next(iter(lora.store), None)})")
    elif found.unmatched and not allow_partial:
        rest = "" if problems else "; --lora_allow_partial applies the rest"  # which does not help against the others
        problems.append(f"{_some(found.unmatched, total)} match no part of the model{rest}")
    return problems


def _warnings(lora: Lora, found: Resolved, shapes: Shapes, as_adapter: bool) -> Iterator[str]:
    name, release = f"LoRA {lora.path}", lora.release
    halves = {key.expert for key in lora.keys.values()}
    named = "low" if halves == {"low"} else expert_of(lora.path) or expert_of(lora.path.absolute().parent)
    if {named, lora.expert} == {"high", "low"}:
        yield f"{name} is named after the {named}-noise expert but used for the {lora.expert}-noise one"
    task = task_of(shapes)
    if release and task and task not in release.tasks:
        yield f"{name} was published for {' and '.join(release.tasks)}, this is {task}"
    if found.unmatched:
        yield f"{name}: {_some(found.unmatched, len(lora.store))} match no part of the model"
    kinds = {delta.kind.name for delta in found.deltas if delta.kind and delta.kind is not PAIR}
    if as_adapter and kinds:
        yield f"{name}: --lora_mode adapter keeps pairs only; its {' and '.join(kinds)} changes are merged"
    if lora.assumed_alpha is not None and not lora.alphas and lora.settings is None and lora.default_alpha is None:
        what = f"{lora.assumed_alpha:g}/rank is applied, as this release needs (--lora_alpha overrides)"
        yield f"{name} stores no alpha; {what}"


def _some(tensors: Sequence[str], total: int) -> str:
    return f"{len(tensors)} of {total} tensors (first: {tensors[0]})"


def settings_of(
    file: Path, metadata: Mapping[str, str], expert: str | None, *, has_alphas: bool = False
) -> AdapterScale | None:
    """The settings that belong to a file of weights, None if there are none. LoraError for a kind that is not read.
    PEFT's `adapter_config.json` belongs to `adapter_model.*`, else to the only file beside it, unless that stores its
    own alphas. diffusers writes JSON into the metadata, perhaps by component: "low" reads that of `transformer_2`."""
    beside, text = file.parent / PEFT_CONFIG, metadata.get("lora_adapter_metadata")
    if beside.is_file():
        weights = weights_in(file.parent)
        own = [each for each in weights if each.stem == PEFT_STEM] or weights
        if own == [file]:
            return _parse_settings(f"LoRA {beside}", beside.read_bytes(), expert)
        if file in own and text is None and not has_alphas:
            beside_others = f"{PEFT_CONFIG} beside it may belong to any of {len(own)} files"
            raise LoraError(f"LoRA {file}: {beside_others}; give the file a folder of its own")
    return None if text is None else _parse_settings(f"LoRA {file}", text, expert)


def _parse_settings(file: str, text: str | bytes, expert: str | None) -> AdapterScale:
    settings: Any = None
    with suppress(ValueError):
        settings = parse_json(text)
    if not isinstance(settings, dict):
        raise LoraError(f"{file}: the adapter settings are not a JSON object")
    if components := {name.partition(".")[0] for name in settings if "." in name}:  # a pipeline's
        transformers = sorted(components & {"transformer", "transformer_2"}, reverse=expert == "low")
        if not transformers:
            raise LoraError(f"{file}: the adapter settings are of {sorted(components)!r:.100}, not a transformer")
        start = f"{transformers[0]}."
        settings = {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
    kind = next((k for name, k in NOT_PLAIN.items() if settings.get(name)), str(settings.get("peft_type") or "LORA"))
    if kind not in PEFT_KINDS:
        raise LoraError(f"{file}: adapters of kind {kind!r:.40} are not supported, only {', '.join(PEFT_KINDS)}")
    if str(settings.get("init_lora_weights")).lower().startswith(ALTERED_BASE):
        raise LoraError(f"{file}: its base is not the released one ({settings['init_lora_weights']!r:.40} changes it)")
    name = PEFT_KINDS[kind]
    try:
        alphas, ranks = (
            {key: float(n) for key, n in ((settings.get(patterns) or {}) | {"": settings.get(common, 8.0)}).items()}
            for common, patterns in ((name, "alpha_pattern"), ("r", "rank_pattern"))  # 8 as in PEFT
        )
        for pattern, value in (*alphas.items(), *ranks.items()):
            re.compile(pattern)
            if not math.isfinite(value) or value == 0:
                raise ValueError(value)
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as e:
        raise LoraError(f"{file}: {name}, r or their patterns in the adapter settings are unusable ({e})") from e

    def scale(module: str, rank: int) -> float:
        def fitting(numbers: Mapping[str, float]) -> float:  # a pattern is of the whole name or of its last parts
            return next((n for p, n in numbers.items() if re.fullmatch(rf"(?:.*\.)?(?:{p})", module)), numbers[""])

        rank_used = rank or fitting(ranks)
        return fitting(alphas) / (math.sqrt(rank_used) if settings.get("use_rslora") else rank_used)

    return scale
