"""The settings of a LoRA that PEFT or diffusers trained: they give the alpha of its modules, which no tensor stores.

They are in `adapter_config.json` beside the weights (PEFT), or JSON in the file's metadata (diffusers): under their
plain names (a model's `save_lora_adapter`) or each behind the name of its component (a pipeline's `save_lora_weights`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.lora_files import PEFT_CONFIG, PEFT_STEM, weights_in
from wan.utils.errors import LoraError
from wan.utils.files import parse_json

METADATA = "lora_adapter_metadata"
PEFT_KINDS = {
    "LORA": "lora_alpha",
    "LOKR": "alpha",
    "LOHA": "alpha",
}  # kinds that are read -> the setting of their alpha
ALTERED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations whose LoRA belongs to a changed base
NOT_PLAIN = {  # settings that make something else of a LoRA, and its name
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
}


@dataclass(frozen=True)
class AdapterSettings:
    """alpha and rank of each module: the first of the patterns that fits its name, else the common one."""

    alpha: float = 8.0  # PEFT's own default, as the rank
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank)
    rank: float = 8.0
    ranks: Mapping[str, float] = field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's change. rank: of its matrices; 0 takes the rank of the settings."""
        rank_used = rank or _first_fitting(self.ranks, module, self.rank)
        alpha = _first_fitting(self.patterns, module, self.alpha)
        return alpha / (math.sqrt(rank_used) if self.rslora else rank_used)


def _first_fitting(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """A pattern fits as in PEFT: the whole name, or its last parts."""
    return next((n for pattern, n in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)), otherwise)


def settings_of(
    file: Path, metadata: Mapping[str, str], expert: str | None, *, has_alphas: bool = False
) -> AdapterSettings | None:
    """The settings that belong to a file of weights, None if there are none. LoraError for a kind that is not read.

    `adapter_config.json` belongs to `adapter_model.*`, else to the only file of weights beside it; of several it must
    be known which, except for a file that stores its own alphas. expert: "low" reads the settings of `transformer_2`.
    """
    beside = file.parent / PEFT_CONFIG
    if beside.is_file():
        weights = weights_in(file.parent)
        own = [each for each in weights if each.stem == PEFT_STEM] or weights
        if own == [file]:
            return _read(beside, _json(beside, beside.read_bytes()))
        if file in own and METADATA not in metadata and not has_alphas:
            raise LoraError(
                f"LoRA {file}: {PEFT_CONFIG} beside it may belong to any of {len(own)} files; give the file a folder "
                "of its own, with the settings if they are its own"
            )
    if METADATA not in metadata:
        return None
    return _read(file, _component(file, _json(file, metadata[METADATA]), expert))


def _json(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError as e:
        raise LoraError(f"LoRA {file}: the adapter settings are not JSON") from e
    if not isinstance(content, dict):
        raise LoraError(f"LoRA {file}: the adapter settings are not a JSON object")
    return content


def _component(file: Path, content: dict[str, Any], expert: str | None) -> dict[str, Any]:
    """The transformer's settings out of a pipeline's; a model's own have no component before their names."""
    components = {name.partition(".")[0] for name in content if "." in name}
    if not components:
        return content
    for component in sorted(components & {"transformer", "transformer_2"}, reverse=expert == "low"):
        start = f"{component}."
        return {name.removeprefix(start): value for name, value in content.items() if name.startswith(start)}
    found = ", ".join(sorted(components))
    raise LoraError(f"LoRA {file}: the adapter settings are those of {found}, not a transformer")


def _read(file: Path, settings: Mapping[str, Any]) -> AdapterSettings:
    kind = str(settings.get("peft_type") or "LORA")
    kind = next((kind for name, kind in NOT_PLAIN.items() if settings.get(name)), kind)
    if kind not in PEFT_KINDS:
        raise LoraError(f"LoRA {file}: adapters of kind {kind} are not supported, only {', '.join(PEFT_KINDS)}")
    if str(settings.get("init_lora_weights")).lower().startswith(ALTERED_BASE):
        raise LoraError(f"LoRA {file}: its base is not the released one ({settings['init_lora_weights']} changes it)")
    name = PEFT_KINDS[kind]
    try:
        found = [
            {"": float(settings.get(common, 8.0))} | {key: float(n) for key, n in (settings.get(pattern) or {}).items()}
            for common, pattern in ((name, "alpha_pattern"), ("r", "rank_pattern"))
        ]
        for pattern, value in (item for numbers in found for item in numbers.items()):
            re.compile(pattern)
            if not math.isfinite(value) or value == 0:
                raise ValueError(value)
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as e:
        raise LoraError(f"LoRA {file}: {name}, r or their patterns in the adapter settings are unusable ({e})") from e
    alphas, ranks = found
    return AdapterSettings(alphas.pop(""), alphas, bool(settings.get("use_rslora")), ranks.pop(""), ranks)
