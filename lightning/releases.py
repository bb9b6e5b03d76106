"""The published releases for Wan2.2: one row per release, with the settings it was trained for.

`recognise` knows a release by its folder or file name, `preset` finds one by its own name, `release_in` finds the one
that a checkpoint is, by its name or the record that `bake` wrote. Guidance pairs read (low noise, high noise).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from wan.checkpoints.hub import exists
from wan.checkpoints.safetensors_file import fingerprint
from wan.checkpoints.weights import SPARSE
from wan.configs import SIZE_CONFIGS, TASKS
from wan.utils.errors import LoraError, first_line
from wan.utils.files import parse_json

RECORD = "bake.json"  # inside a baked checkpoint: sources, settings, sha256 of every shard
SETTINGS = ("name", "steps", "solver", "shift", "guidance", "timesteps", "licence")  # of the release, in the record
T2V, I2V, TI2V = TASKS
SIZES = {task: tuple(SIZE_CONFIGS[size] for size in config.sizes) for task, config in TASKS.items()}
LIGHTNING = "lightx2v/Wan2.2-Lightning"
DISTILL_LORAS = "lightx2v/Wan2.2-Distill-Loras"
DISTILL_MODELS = "lightx2v/Wan2.2-Distill-Models"
MOE_DISTILL = "lightx2v/Wan2.2-I2V-A14B-Moe-Distill-Lightx2v"
KIJAI = "Kijai/WanVideo_comfy"
CAUTIONS = {
    r"svi-v?2.*pro": "is SVI 2 Pro, which needs the anchor image's and the last clip's latents; they are not given",
    r"shot-?plan": "is ShotPlan, which needs tokens at the cuts of its shots; they are not given",
    r"longlive-plug": "is LongLive, whose card names no number of steps; --sample_steps sets them",
}
BLOCKS = "wileewang/longlive-stepdistill-blocksize-loras"


@dataclass(frozen=True)
class Release:
    """One published distillation, or one recipe, as data.

    kind: "lora", "full" (whole expert weights) or "recipe" (settings only, for any LoRA of its tasks).
    patterns: regular expressions on the last parts of a path, lower case, `_` read as `-`.
    default_alpha: for a file that stores none. timesteps: final ones, where steps and shift do not give them.
    lora_steps, guidance_steps: LoRA scale and guidance by step, where they differ from step to step.
    licence: where it does not allow every use. refused: why this toolkit cannot run it.
    """

    name: str
    tasks: tuple[str, ...]
    kind: str
    source: str
    patterns: tuple[str, ...] = ()
    default_alpha: float | None = None
    steps: int = 4
    shift: float = 5.0
    timesteps: tuple[float, ...] | None = None
    guidance: tuple[float, float] = (1.0, 1.0)
    solver: str = "euler"
    sizes: tuple[tuple[int, int], ...] = SIZES[T2V]
    lora_steps: tuple[float, ...] | None = None
    guidance_steps: tuple[float, ...] | None = None
    note: str = ""
    licence: str = ""
    refused: str = ""
    text_only: bool = False  # trained without images

    def check_supported(self, what: str) -> None:
        """LoraError with the reason if this release cannot be run; `what` names it."""
        if self.refused:
            raise LoraError(f"{what} is {self.name} ({self.source}), which this toolkit cannot run: {self.refused}")


def recognise(path: Path) -> Release | None:
    """The release that a file or folder belongs to by its name and its folders' names, None if it says nothing.
    The nearest name is asked first: a file of one release may lie in a folder named after another."""
    parts = [part.lower().replace("_", "-") for part in path.absolute().parts[-4:]]
    texts = ["/".join(parts[first:]) for first in reversed(range(len(parts)))]
    found = (each for text in texts for each in RELEASES if any(re.search(p, text) for p in each.patterns))
    return next(found, None)


def caution(path: Path) -> str | None:
    """The end of a sentence on a LoRA that does less here than in its own pipeline; None if its name says nothing."""
    name = path.name.lower().replace("_", "-")
    return next((reason for pattern, reason in CAUTIONS.items() if re.search(pattern, name)), None)


def preset(name: str) -> Release:
    """The release or recipe called `name`. LoraError with the names that run, and the nearest one, if there is none."""
    named = {release.name: release for release in RELEASES}
    if found := named.get(name.lower()):
        return found
    near = "".join(f"; did you mean {each}?" for each in get_close_matches(name.lower(), named, 1))
    usable = ", ".join(release.name for release in RELEASES if not release.refused)
    raise LoraError(f"no preset {name!r}; there are {usable}{near}")


def release_in(base: Path) -> Release | None:
    """The distillation that a full expert's file or a checkpoint folder is, with its settings; None if nothing says so.

    A baked folder keeps them in its record, others may be named after a release (`FastVideo/FastWan2.2-TI2V-5B-...`).
    """
    if record := record_of(base):
        return _recorded_release(record)
    release = recognise(base if exists(base) and base.is_file() else Path(base.absolute().name))
    return release if release and release.kind == "full" else None


def record_of(ckpt_dir: Path) -> dict[str, Any] | None:
    """The record that `bake` wrote into a checkpoint folder, None for any other folder. LoraError if it is damaged."""
    file = ckpt_dir / RECORD
    if not (exists(file) and file.is_file()):
        return None
    try:
        record: dict[str, Any] = parse_json(file.read_bytes())
        experts = record["loras"].items()
        record["loras"] = {expert: [{**lora, "path": str(lora["path"])} for lora in loras] for expert, loras in experts}
        record["shards"] = dict(record["shards"])
        _recorded_release(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise LoraError(f"{file} cannot be used ({first_line(e)}); bake again, or remove it") from e
    return record


def _recorded_release(record: Mapping[str, Any]) -> Release | None:
    """The settings in a bake's record. ValueError, TypeError or KeyError for those that are unusable."""
    if record["release"] is None:
        return None
    values = {name: record["release"][name] for name in SETTINGS}
    low, high = map(float, values["guidance"])
    steps, shift, times = int(values["steps"]), float(values["shift"]), tuple(map(float, values["timesteps"] or ()))
    if steps < 1 or shift <= 0 or min(low, high, *times) < 0:
        raise ValueError("a setting is out of range")
    values |= {"steps": steps, "shift": shift, "guidance": (low, high), "timesteps": times or None}
    return Release(tasks=(record["task"],), kind="full", source="bake", **values)


def refuse_distilled_twice(base: Path, lora_file: Path, expert: str | None = None) -> None:
    """LoraError if this LoRA must not go onto `base`: it is merged already, or both are distillations.
    base: a full expert file, or a checkpoint folder, which may have LoRAs baked in. expert: whose weights it is for."""
    record, advice = record_of(base), "--lora_allow_partial does it all the same"
    for name, loras in record["loras"].items() if record else ():
        for merged in loras if expert in (None, name) else ():
            if merged.get("fingerprint") == fingerprint(lora_file):
                raise LoraError(f"{base} has the LoRA {lora_file} merged in already, as {merged['path']}; {advice}")
    before, lora = release_in(base), recognise(lora_file)
    if before and lora:
        what = f"the LoRA {lora_file} ({lora.name}) would do it again"
        raise LoraError(f"{base} is distilled already ({before.name}); {what}; {advice}")


_END = r"(?!\.?\d)"  # so that v1 is not found in v1.1


def _release(kind: str, task: str, name: str, *patterns: str, source: str, **more: Any) -> Release:
    return Release(name, (task,), kind, source, patterns, sizes=SIZES[task], **more)


_lora = partial(_release, "lora", source=LIGHTNING)
_full = partial(_release, "full", source=DISTILL_MODELS)


def _refused(name: str, tasks: tuple[str, ...], source: str, pattern: str, reason: str) -> Release:
    return Release(name, tasks, "full", source, (pattern,), sizes=SIZES[tasks[0]], refused=reason)


_PACKED = "its weights are packed 4-bit numbers"
_CAUSAL = "it is a causal variant, which makes a video piece by piece with another attention than Wan2.2's"
_BOTH = "made for Wan2.1; one file serves both experts"
_TURBO: dict[str, Any] = {"solver": "dmd", "shift": 1.0, "licence": "CC BY-NC-SA 4.0, not for commercial use"}
_FASTWAN: dict[str, Any] = {
    "solver": "dmd", "steps": 3, "timesteps": (1000.0, 757.0, 522.0), "text_only": True,
    "note": "trained at these three timesteps, with fresh noise after each",
}  # fmt: skip

# The first row that matches is the one: a longer name comes before a shorter one that it contains.
RELEASES: tuple[Release, ...] = (
    _refused("nvfp4-sparse", (T2V, I2V), "lightx2v/Wan2.2-NVFP4-Sparse", r"nvfp4-sparse|wan[^/]*nvfp4", _PACKED),
    _refused("lightwan", (T2V, I2V), "lightx2v/LightWan2.2-A14B", r"lightwan2\.2", _PACKED),
    _refused("turbowan-i2v", (I2V,), "TurboDiffusion/TurboWan2.2-I2V-A14B-720P", r"turbowan2\.2", SPARSE),
    _refused("sfwan", (T2V,), "FastVideo/SFWan2.2", r"sfwan2\.2", _CAUSAL),
    _refused("causalwan-i2v", (I2V,), "FastVideo/CausalWan2.2-I2V", r"causalwan2\.2", _CAUSAL),
    _refused("longlive-2", (TI2V,), "Efficient-Large-Model/LongLive-2.0-5B", r"longlive-?2\.0", _CAUSAL),
    _refused("fastmetal", (TI2V,), "FastVideo/FastMetal-5B-QAD", r"fastmetal", "its weights are MLX's 8-bit numbers"),
    _refused("aad-1", (T2V, I2V), "bahae98/AAD-1-self-forcing-loras", r"aad-1", _CAUSAL),
    _lora(TI2V, "ti2v-longlive-block8", r"block8-single", source=BLOCKS),
    _refused("longlive-blocks", (TI2V,), BLOCKS, r"longlive-stepdistill", _CAUSAL),
    *(
        _lora(TI2V, f"ti2v-longlive-{name}", rf"longlive-plug-[^/]*{name}", note=note,
              source=f"Efficient-Large-Model/LongLive-Plug-Wan2.2-TI2V-5B-{name}")
        for name, note in (("few-step", "with ti2v-longlive-cfg at a strength of 0.5"), ("cfg", "at a strength of 0.5"))
    ),
    _lora(T2V, "t2v-seko-v2.0", r"t2v[^/]*seko-v2\.0"),
    _full(T2V, "t2v-250928-dyno", r"t2v[^/]*250928-dyno", source=LIGHTNING,
          note="a whole high-noise expert; the low-noise one is t2v-250928's LoRA"),
    _lora(T2V, "t2v-250928", r"t2v[^/]*250928"),
    _lora(T2V, "t2v-seko-v1.1", r"t2v[^/]*seko-v1\.1", r"lightning-t2v-v1\.1-a14b-4steps",
          r"t2v-lightx2v-4steps-lora-v1\.1"),
    _lora(T2V, "t2v-seko-v1", rf"t2v[^/]*seko-v1{_END}", r"lightning-t2v-a14b-4steps"),
    _lora(T2V, "t2v-v1", rf"t2v-a14b-4steps-lora-rank64-v1{_END}", default_alpha=8.0,
          note="the first upload, without alpha in the file although 8/rank belongs to it"),
    _lora(T2V, "t2v-distill-1217", r"t2v[^/]*lora[^/]*lightx2v-4step-1217", source=DISTILL_LORAS),
    _full(T2V, "t2v-distill-model-1217", r"t2v-a14b-(high|low)-noise(?![^/]*lora)[^/]*lightx2v-4step-1217"),
    _full(T2V, "t2v-distill-model", r"t2v-a14b-(high|low)-noise(?![^/]*lora)[^/]*lightx2v-4step"),
    _lora(I2V, "i2v-seko-v1", rf"i2v[^/]*seko-v1{_END}", r"lightning-i2v-a14b-4steps",
          rf"i2v-lightx2v-4steps-lora-v1{_END}"),
    _lora(I2V, "i2v-distill-1022", r"i2v[^/]*lora[^/]*1022", source=DISTILL_LORAS),
    _lora(I2V, "i2v-distill-1030", r"i2v[^/]*lora[^/]*1030", source=DISTILL_LORAS),
    _lora(I2V, "i2v-distill-260412", r"i2v[^/]*lora[^/]*260412", source=KIJAI),
    _lora(I2V, "i2v-moe-distill-lora", r"moe-distill[^/]*/loras(/|$)", r"moe-distill[^/]*lora", source=MOE_DISTILL),
    _full(I2V, "i2v-moe-distill", r"moe-distill", source=MOE_DISTILL),
    _lora(I2V, "i2v-lightx2v-2step", r"i2v[^/]*lightx2v-2step", source="Leon1000/Wan2.2_I2V_LightX2V_2Step"),
    _full(I2V, "i2v-enhanced-lightning", r"wan22enhancedlightning", source="wan22EnhancedLightning_v2"),
    _full(I2V, "i2v-distill-model-260412", r"i2v[^/]*lightx2v[^/]*260412"),
    _full(I2V, "i2v-distill-model-1030", r"i2v[^/]*lightx2v-4step[^/]*1030"),
    _full(I2V, "i2v-distill-model", r"i2v-a14b-(high|low)-noise[^/]*lightx2v-4step"),
    _lora(T2V, "rcm-lora", r"loras/rcm(/|$)", r"t2v[^/]*rcm-lora", r"rcm[^/]*t2v[^/]*lora", source=KIJAI, solver="dmd",
          # angles between data (0) and noise (pi/2), as rCM counts them
          timesteps=tuple(1000 * math.sin(a) / (math.sin(a) + math.cos(a)) for a in (math.atan(80), 1.5, 1.4, 1.0)),
          note="made for Wan2.1; its users take strength 6 for the high-noise expert and 1 for the low-noise one"),
    _lora(T2V, "wan2.1-t2v-lightx2v", r"t2v[^/]*cfg-step-distill", r"2\.1-t2v-14b-stepdistill-cfgdistill",
          source="lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v", note=_BOTH),
    _lora(I2V, "wan2.1-i2v-lightx2v", r"i2v[^/]*cfg-step-distill", r"2\.1-i2v-14b[^/]*stepdistill-cfgdistill",
          source="lightx2v/Wan2.1-I2V-14B-StepDistill-CfgDistill-Lightx2v",
          note=f"{_BOTH}, its image branch is ignored"),
    *(
        _lora(task, f"wan2.1-{short}-distill", rf"2\.1-{short}[^/]*lora-rank\d+-lightx2v-4step",
              source="lightx2v/Wan2.1-Distill-Loras", note=f"{_BOTH}, the high-noise one at a strength of about 3")
        for short, task in (("t2v", T2V), ("i2v", I2V))
    ),
    _lora(TI2V, "ti2v-fastwan-lora", r"5b-fastwan[^/]*lora", r"fastwan[^/]*5b[^/]*lora", source=KIJAI, **_FASTWAN),
    _full(TI2V, "ti2v-fastwan", r"fastwan2\.2[^/]*5b", source="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
          **_FASTWAN),
    _lora(TI2V, "ti2v-turbo-lora", r"ti2v-5b-turbo[^/]*lora", source=KIJAI, **_TURBO),
    _full(TI2V, "ti2v-turbo", r"ti2v-5b-turbo", source="quanhaol/Wan2.2-TI2V-5B-Turbo", **_TURBO),
    Release("rapid-aio", (T2V, I2V), "full", "Phr00t/WAN2.2-14B-Rapid-AllInOne", (r"rapid-(mega-)?a(ll-?)?i",)),
    Release("remix", (T2V, I2V), "full", "FX-FeiHou/wan2.2-Remix", (r"wan2\.?2-remix",)),
    Release("shapes", (T2V, I2V), "lora", "examples/shapes", (r"shapes/lora-(t2v|i2v)",), sizes=((64, 64),)),
    Release("flf2v-16", (I2V,), "recipe", "LightX2V's samples", shift=16.0, note="for a first and a last image"),
    Release("motion-8", (T2V, I2V), "recipe", "community recipe", steps=8, lora_steps=(0.0, *[1.0] * 7),
            guidance_steps=(3.5, *[1.0] * 7),
            note="more motion: the first step without the LoRA and with guidance, the rest as usual"),
)  # fmt: skip
