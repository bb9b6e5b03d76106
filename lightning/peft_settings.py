"""The settings of a LoRA that PEFT or diffusers trained: they say the alpha of its modules, which no tensor does.

They lie in `adapter_config.json` beside the weights (PEFT), or as JSON in the file's metadata (diffusers): under their
plain names (a model's `save_lora_adapter`) or each behind the name of its component (a pipeline's `save_lora_weights`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan.utils.errors import LoraError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"
ALTERED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations whose LoRA belongs to a changed base
NOT_PLAIN = {  # settings that make something else of a LoRA, and what that is called
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
}


@dataclass(frozen=True)
class AdapterSettings:
    """alpha of each module: the first of `patterns` that fits its name, else `alpha`. rslora: alpha / sqrt(rank)."""

    alpha: float = 8.0  # PEFT's own default
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """What the product of a pair is multiplied by. A pattern fits as in PEFT: the name, or its last parts."""
        fitting = (a for pattern, a in self.patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
        alpha = next(fitting, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def settings_of(file: Path, metadata: Mapping[str, str], expert: str | None) -> AdapterSettings | None:
    """Those that belong to a file of weights, None if it comes without. LoraError if they are of no plain LoRA.

    expert: "low" reads those of `transformer_2`, where metadata of a pipeline has them.
    """
    beside = file.parent / PEFT_CONFIG
    if file.name == PEFT_WEIGHTS and beside.is_file():
        return _read(beside, _json(beside, beside.read_bytes()))
    if METADATA not in metadata:
        return None
    return _read(file, _component(file, _json(file, metadata[METADATA]), expert))


def _json(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
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
        return {
            name.removeprefix(f"{component}."): v for name, v in content.items() if name.startswith(f"{component}.")
        }
    raise LoraError(
        f"LoRA {file}: the adapter settings are those of {', '.join(sorted(components))}, not a transformer"
    )


def _read(file: Path, settings: Mapping[str, Any]) -> AdapterSettings:
    kind = str(settings.get("peft_type") or "LORA")
    kind = next((kind for name, kind in NOT_PLAIN.items() if settings.get(name)), kind)
    if kind != "LORA":
        raise LoraError(f"LoRA {file}: adapters of kind {kind} are not supported, only plain LoRA")
    if str(settings.get("init_lora_weights")).lower().startswith(ALTERED_BASE):
        raise LoraError(f"LoRA {file}: its base is not the released one ({settings['init_lora_weights']} changes it)")
    try:
        patterns = {pattern: float(alpha) for pattern, alpha in (settings.get("alpha_pattern") or {}).items()}
        alpha = float(settings.get("lora_alpha", AdapterSettings.alpha))
        for pattern, value in {"": alpha, **patterns}.items():
            re.compile(pattern)
            if not math.isfinite(value) or value == 0:
                raise ValueError(value)
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as e:
        raise LoraError(f"LoRA {file}: lora_alpha or alpha_pattern in the adapter settings is unusable ({e})") from e
    return AdapterSettings(alpha, patterns, bool(settings.get("use_rslora")))
