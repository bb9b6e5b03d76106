"""Which weights a run uses, and the sampling settings that belong to them.

A distilled weight changes every sampling default: few Euler steps without guidance in place of 40 to 50 with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from easydict import EasyDict

from lightning.distilled import distilled_with
from lightning.errors import LoraError
from lightning.lora import expert_of, files_of
from lightning.releases import Release, preset, recognise
from wan.request.checks import Check, real
from wan.request.options import Request
from wan.request.settings import LoraChoice, Sampling, Weights

SOLVERS = ("euler", "unipc", "dpm++")
FEW_STEPS = 15  # fewer steps than this need a distilled weight
STRENGTHS = (-10.0, 10.0)
GUIDANCES = (0.0, 100.0)


def choose_weights(request: Request, config: EasyDict, ckpt_dir: Path, check: Check) -> Weights:
    """LoRAs in the order given, --lora_dir's first; full expert files; and the release they are."""
    task, experts = config.name, tuple(config.experts)
    loras = [*_lora_dir(request, experts, check)]
    for text in request.lora or ():
        loras += _lora(text, experts, check)
    expert_files: dict[str, Path] = {}
    for text in request.expert or ():
        expert, _, name = text.partition("=")
        if expert not in experts or not name:
            allowed = " or ".join(f"{known}=FILE" for known in experts)
            check.problem(f"--expert {text}: {task} takes {allowed}")
        elif expert in expert_files:
            check.problem(f"--expert {expert}= is given twice")
        elif not Path(name).expanduser().is_file():
            check.problem(f"--expert {text}: no such file")
        else:
            expert_files[expert] = Path(name).expanduser()
    release = _release(request, task, loras, expert_files, check)
    if request.lora_dir is not None and expert_files:
        check.warn(
            "--lora_dir applies to the experts that --expert replaces too; a distilled weight must not be distilled "
            "again: give the LoRA of the other expert alone with --lora high=FILE or low=FILE"
        )
    distilled = bool(request.lora_dir or request.preset or expert_files or (release and release.kind != "recipe"))
    return Weights(ckpt_dir, tuple(loras), tuple(expert_files.items()), release=release, distilled=distilled)


def choose_sampling(request: Request, config: EasyDict, weights: Weights, check: Check) -> Sampling:
    """Solver, steps, shift and guidance: as given, else the release's, else by task and distilled or not."""
    single = len(config.experts) == 1
    # Without a recognised release a distilled weight runs as the Lightning ones do, which are Release's defaults.
    release = weights.release or Release("", (), "lora", "")
    made_for = (release.solver, release.steps, release.shift, release.guidance)
    base = (config.sample_solver, config.sample_steps, config.sample_shift, _pair(config.sample_guide_scale))
    defaults = made_for if weights.distilled else base
    timesteps = check.timesteps(request.timesteps) if request.timesteps is not None else None
    given = (request.timesteps, request.sample_solver, request.sample_steps, request.sample_shift)
    if weights.distilled and given == (None, None, None, None):
        timesteps = release.timesteps
    solver = check.choice("--sample_solver", request.sample_solver or ("euler" if timesteps else defaults[0]), SOLVERS)
    steps = request.sample_steps or len(timesteps or ()) or defaults[1]
    shift = request.sample_shift or defaults[2]
    guidance = check.pair("--sample_guide_scale", request.sample_guide_scale, defaults[3], *GUIDANCES)
    if single and guidance[0] != guidance[1]:
        check.problem(f"--sample_guide_scale {request.sample_guide_scale}: one model takes one number, not LOW,HIGH")
    if request.timesteps is not None and timesteps is not None:
        _check_explicit(request, timesteps, check)
    high_steps = None
    if request.high_steps is not None and single:
        check.problem("--high_steps: this task has one model; it applies to the two experts of the A14B tasks")
    elif request.high_steps is not None:
        high_steps = check.whole("--high_steps", request.high_steps, 0, 0, steps)
    by_step = weights.release if request.timesteps is None else None
    lora_steps = by_step.lora_steps if by_step else None
    guidance_steps = by_step.guidance_steps if by_step and request.sample_guide_scale is None else None
    if lora_steps and len(lora_steps) != steps:
        check.problem(
            f"--preset {release.name} says what each of its {len(lora_steps)} steps does; leave --sample_steps out"
        )
    recipe = Sampling(solver, steps, shift, guidance, timesteps, high_steps, lora_steps, guidance_steps)
    _warn_of_recipe(recipe, weights, release, check)
    return recipe


def _pair(guidance: float | tuple[float, float]) -> tuple[float, float]:
    low, high = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    return float(low), float(high)


def _lora_dir(request: Request, experts: Sequence[str], check: Check) -> list[LoraChoice]:
    if request.lora_dir is None:
        if request.lora_strength is not None:
            check.problem("--lora_strength scales --lora_dir, which is not given; for --lora write PATH:STRENGTH")
        return []
    high, low = check.pair("--lora_strength", request.lora_strength, (1.0, 1.0), *STRENGTHS)
    if len(experts) == 1 and high != low:
        check.problem(f"--lora_strength {request.lora_strength}: one model takes one number, not HIGH,LOW")
    try:
        files = files_of(Path(request.lora_dir).expanduser(), experts)
    except LoraError as e:
        check.problem(str(e))
        return []
    return [LoraChoice(expert, file, low if expert == "low" else high) for expert, file in files.items()]


def _lora(text: str, experts: Sequence[str], check: Check) -> list[LoraChoice]:
    """`PATH[:STRENGTH]` for every expert (or the one its name says), `EXPERT=PATH[:STRENGTH]` for one."""
    match = re.fullmatch(r"(?:(high|low|model)=)?(.+)", text, re.DOTALL)
    if not match:
        check.problem("--lora is empty; it takes PATH[:STRENGTH], high=PATH[:STRENGTH] or low=PATH[:STRENGTH]")
        return []
    expert, path, strength = match[1], *_strength_of(match[2])
    strength = check.number(f"--lora {text}: strength", strength, 1.0, *STRENGTHS)
    if expert and expert not in experts:
        check.problem(f"--lora {text}: this task has no expert {expert!r}; it has {' and '.join(experts)}")
    elif not path.exists():
        check.problem(f"--lora {path}: no such file")
    elif expert:
        return [LoraChoice(expert, path, strength)]
    elif path.is_dir() and not (path / "adapter_config.json").is_file():
        try:
            return [LoraChoice(name, file, strength) for name, file in files_of(path, experts).items()]
        except LoraError as e:
            check.problem(str(e).replace("--lora_dir", "--lora", 1))
    else:
        named = expert_of(path.name)
        if named in experts:
            check.warn(
                f"--lora {path} goes to the {named}-noise expert only, as its name says; "
                "write high=PATH and low=PATH to choose yourself"
            )
        return [LoraChoice(name, path, strength) for name in experts if named not in experts or name == named]
    return []


def _strength_of(text: str) -> tuple[Path, float]:
    """Cuts off `:STRENGTH`; a drive letter's colon, or one that is part of an existing name, stays."""
    path, colon, tail = text.rpartition(":")
    strength = real(tail)
    if not colon or strength is None or len(path) <= 1 or Path(text).exists():
        return Path(text).expanduser(), 1.0
    return Path(path).expanduser(), strength


def _release(
    request: Request, task: str, loras: Sequence[LoraChoice], expert_files: dict[str, Path], check: Check
) -> Release | None:
    """--preset's, else the first that a folder or file name tells, else the one baked into the checkpoint."""
    if request.preset is not None:
        try:
            release = preset(request.preset)
        except LoraError as e:
            check.problem(f"--preset: {e}")
            return None
        if task not in release.tasks:
            check.problem(f"--preset {release.name} is for {' and '.join(release.tasks)}, not for {task}")
        if release.kind == "recipe" and not (loras or expert_files):
            check.problem(f"--preset {release.name} is a recipe for a distilled LoRA; give --lora_dir or --lora too")
        return release
    paths = [Path(request.lora_dir).expanduser()] if request.lora_dir else []
    for path in [*paths, *expert_files.values(), *(lora.path for lora in loras)]:
        if found := recognise(path):
            if task not in found.tasks:
                check.warn(f"{path} looks like {found.name}, which is for {' and '.join(found.tasks)}, not for {task}")
            return found
    baked = distilled_with(Path(request.ckpt_dir).expanduser()) if request.ckpt_dir else []
    return preset(baked[0]) if baked else None


def _check_explicit(request: Request, timesteps: tuple[float, ...], check: Check) -> None:
    """What cannot stand beside --timesteps."""
    if request.sample_solver not in (None, "euler"):
        check.problem(f"--timesteps works with --sample_solver euler only, not {request.sample_solver}")
    if request.sample_steps not in (None, len(timesteps)):
        check.problem(f"--timesteps names {len(timesteps)} steps, but --sample_steps is {request.sample_steps}")
    if request.sample_shift is not None:
        check.problem("--timesteps are final, after the shift; leave --sample_shift out")


def _warn_of_recipe(recipe: Sampling, weights: Weights, release: Release, check: Check) -> None:
    """Warns of settings that the weights in use were not made for."""
    if not weights.distilled:
        if recipe.steps < FEW_STEPS:
            check.warn(f"{recipe.steps} steps without a distilled weight (--lora_dir) give a poor video")
        return
    name = release.name or "a distilled weight"
    for flag, given, made_for in (
        ("--sample_solver", recipe.solver, release.solver),
        ("--sample_steps", recipe.steps, release.steps),
        ("--sample_shift", recipe.shift, release.shift),
    ):
        if given != made_for and not (flag == "--sample_shift" and recipe.timesteps):
            check.warn(f"{flag} {given}: {name} was made for {made_for}")
    if recipe.guidance != release.guidance:
        low, high = recipe.guidance
        check.warn(
            f"--sample_guide_scale {low:g},{high:g}: {name} was made for guidance 1; "
            "other values double the work and usually spoil the picture"
        )
