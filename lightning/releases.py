"""What was published for Wan2.2: one row a release, with the settings it was trained for.

`recognise(path)` knows a release by its folder or file name; `preset(name)` finds one by its own name.
Guidance pairs read (low noise, high noise). The high-noise expert has the timesteps t >= boundary * 1000.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning.errors import LoraError

T2V, I2V, TI2V = "t2v-A14B", "i2v-A14B", "ti2v-5B"
A14B_SIZES = ((832, 480), (480, 832), (1280, 720), (720, 1280))
TI2V_SIZES = ((1280, 704), (704, 1280))
LIGHTNING = "lightx2v/Wan2.2-Lightning"
DISTILL_LORAS = "lightx2v/Wan2.2-Distill-Loras"
DISTILL_MODELS = "lightx2v/Wan2.2-Distill-Models"
MOE_DISTILL = "lightx2v/Wan2.2-I2V-A14B-Moe-Distill-Lightx2v"


@dataclass(frozen=True)
class Release:
    """One published distillation, or one recipe, as data.

    kind: "lora", "full" (whole expert weights) or "recipe" (settings only, for any LoRA of its tasks).
    patterns: regular expressions on the last parts of a path, lower case, `_` read as `-`.
    ranks: by expert where they are known. default_alpha: what the loader must assume where the file stores none.
    timesteps: the final timesteps, where steps and shift do not give them.
    lora_steps, guidance_steps: LoRA scale and guidance by step, where they are not the same at every step.
    """

    name: str
    tasks: tuple[str, ...]
    kind: str
    source: str
    patterns: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    default_alpha: float | None = None
    steps: int = 4
    shift: float = 5.0
    boundary: float | None = None
    timesteps: tuple[float, ...] | None = None
    guidance: tuple[float, float] = (1.0, 1.0)
    solver: str = "euler"
    sizes: tuple[tuple[int, int], ...] = A14B_SIZES
    lora_steps: tuple[float, ...] | None = None
    guidance_steps: tuple[float, ...] | None = None
    note: str = ""


def recognise(path: Path) -> Release | None:
    """The release that a file or folder belongs to by its name and its folders' names, None if it says nothing.

    The nearest name is asked first: a file of one release may lie in a folder named after another.
    """
    parts = [part.lower().replace("_", "-") for part in path.absolute().parts[-4:]]
    for first in reversed(range(len(parts))):
        text = "/".join(parts[first:])
        for release in RELEASES:
            if any(re.search(pattern, text) for pattern in release.patterns):
                return release
    return None


def preset(name: str) -> Release:
    """The release or recipe called `name`. Raises LoraError with the names there are."""
    for release in RELEASES:
        if release.name == name.lower():
            return release
    raise LoraError(f"no preset {name!r}; there are {', '.join(release.name for release in RELEASES)}")


_END = r"(?!\.?\d)"  # so that v1 is not found in v1.1
_RANK64 = {"high": 64, "low": 64}


def _t2v(name: str, *patterns: str, source: str = LIGHTNING, **ranks: int) -> Release:
    return Release(name, (T2V,), "lora", source, patterns, ranks or _RANK64, boundary=0.875)


def _i2v(name: str, *patterns: str, source: str = LIGHTNING, **ranks: int) -> Release:
    return Release(name, (I2V,), "lora", source, patterns, ranks or _RANK64, boundary=0.900)


def _i2v_full(name: str, *patterns: str, source: str = DISTILL_MODELS, note: str = "") -> Release:
    return Release(name, (I2V,), "full", source, patterns, boundary=0.900, note=note)


# The first row that matches is the one: the more particular name stands before the more general.
RELEASES: tuple[Release, ...] = (
    _t2v("t2v-seko-v2.0", r"t2v[^/]*seko-v2\.0"),
    Release(
        "t2v-250928-dyno",
        (T2V,),
        "full",
        LIGHTNING,
        (r"t2v[^/]*250928-dyno",),
        boundary=0.875,
        note="a whole high-noise expert; the low-noise one is t2v-250928's LoRA",
    ),
    _t2v("t2v-250928", r"t2v[^/]*250928", high=128, low=64),
    _t2v("t2v-seko-v1.1", r"t2v[^/]*seko-v1\.1", r"lightning-t2v-v1\.1-a14b-4steps", r"t2v-lightx2v-4steps-lora-v1\.1"),
    _t2v("t2v-seko-v1", rf"t2v[^/]*seko-v1{_END}", r"lightning-t2v-a14b-4steps"),
    Release(
        "t2v-v1",
        (T2V,),
        "lora",
        LIGHTNING,
        (rf"t2v-a14b-4steps-lora-rank64-v1{_END}",),
        _RANK64,
        default_alpha=8.0,
        boundary=0.875,
        note="the first upload, without alpha in the file although 8/rank belongs to it",
    ),
    _t2v("t2v-distill-1217", r"t2v[^/]*lora[^/]*lightx2v-4step-1217", source=DISTILL_LORAS),
    _i2v("i2v-seko-v1", rf"i2v[^/]*seko-v1{_END}", r"lightning-i2v-a14b-4steps", rf"i2v-lightx2v-4steps-lora-v1{_END}"),
    _i2v("i2v-distill-1022", r"i2v[^/]*lora[^/]*1022", source=DISTILL_LORAS),
    _i2v("i2v-distill-1030", r"i2v[^/]*lora[^/]*1030", source=DISTILL_LORAS),
    _i2v("i2v-distill-260412", r"i2v[^/]*lora[^/]*260412", source="Kijai/WanVideo_comfy"),
    _i2v("i2v-moe-distill-lora", r"moe-distill[^/]*/loras(/|$)", r"moe-distill[^/]*lora", source=MOE_DISTILL),
    _i2v_full("i2v-moe-distill", r"moe-distill", source=MOE_DISTILL),
    _i2v_full("i2v-distill-model-260412", r"i2v[^/]*lightx2v[^/]*260412"),
    _i2v_full("i2v-distill-model-1030", r"i2v[^/]*lightx2v-4step[^/]*1030"),
    _i2v_full("i2v-distill-model", r"i2v-a14b-(high|low)-noise[^/]*lightx2v-4step"),
    Release(
        "nvfp4-sparse",
        (T2V, I2V),
        "full",
        "lightx2v/Wan2.2-NVFP4-Sparse",
        (r"nvfp4-sparse",),
        note="packed 4-bit weights, which this toolkit refuses",
    ),
    Release(
        "wan2.1-t2v-lightx2v",
        (T2V,),
        "lora",
        "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v",
        (r"t2v[^/]*cfg-step-distill", r"2\.1-t2v-14b-stepdistill-cfgdistill"),
        boundary=0.875,
        note="made for Wan2.1; one file serves both experts",
    ),
    Release(
        "wan2.1-i2v-lightx2v",
        (I2V,),
        "lora",
        "lightx2v/Wan2.1-I2V-14B-StepDistill-CfgDistill-Lightx2v",
        (r"i2v[^/]*cfg-step-distill", r"2\.1-i2v-14b[^/]*stepdistill-cfgdistill"),
        boundary=0.900,
        note="made for Wan2.1; one file serves both experts, its image branch is ignored",
    ),
    Release(
        "ti2v-fastwan",
        (TI2V,),
        "lora",
        "Kijai/WanVideo_comfy",
        (r"5b-fastwan", r"fastwan2\.2[^/]*5b"),
        {"model": 128},
        steps=3,
        timesteps=(1000.0, 757.0, 522.0),
        sizes=TI2V_SIZES,
        note="trained at these three timesteps; some front ends run it with shift 3 instead",
    ),
    Release(
        "ti2v-turbo-lora",
        (TI2V,),
        "lora",
        "Kijai/WanVideo_comfy",
        (r"ti2v-5b-turbo-lora",),
        {"model": 64},
        sizes=TI2V_SIZES,
    ),
    Release("ti2v-turbo", (TI2V,), "full", "quanhaol/Wan2.2-TI2V-5B-Turbo", (r"ti2v-5b-turbo",), sizes=TI2V_SIZES),
    Release(
        "motion-8",
        (T2V, I2V),
        "recipe",
        "community recipe",
        steps=8,
        lora_steps=(0.0, *[1.0] * 7),
        guidance_steps=(3.5, *[1.0] * 7),
        note="more motion: the first step without the LoRA and with guidance, the rest as usual",
    ),
)
