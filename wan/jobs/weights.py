"""The weights of a run, and the sampling settings that belong to them.
A distilled weight changes every sampling default: few Euler steps without guidance instead of 40 to 50 with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.lora_files import choose_loras
from lightning.releases import Release, caution, preset, recognise, release_in
from wan.checkpoints.hub import located, place
from wan.cli.checks import Check
from wan.cli.options import EXPLICIT, QUALITIES, SOLVERS, STRENGTH, Request
from wan.configs import TaskConfig
from wan.jobs.job import Sampling, Weights
from wan.jobs.prompt_files import expanded
from wan.utils.argument_parser import pair, short

PARTS = ("vae", "text_encoder", "tokenizer")  # of a checkpoint, besides its experts; each a flag too
LEAST_CACHED = 12  # steps: of fewer, the first 7 and those around the boundary leave nothing to leave out


def choose_weights(request: Request, config: TaskConfig, ckpt_dir: Path | None, check: Check) -> Weights:
    """LoRAs in the order given, --lora_dir's first; full expert files; and the release that they are."""
    chosen = choose_loras(tuple(config.experts), request.lora_dir, request.lora_strength, request.lora or ())
    check.problems.extend(chosen.problems)
    check.warnings.extend(chosen.warnings)
    files = part_files(request, config, check)
    experts = {part: file for part, file in files.items() if part in config.experts}
    paths = [*experts.values(), *(lora.path for lora in chosen.loras)]
    release = _release(request, config.name, paths, check)
    for each in {each.name: each for each in (release, *map(recognise, paths)) if each}.values():
        if each.refused:
            check.problem(f"{each.name} ({each.source}) cannot be run: {each.refused}")
    check.warnings += [f"{path} {reason}" for path in paths if (reason := caution(path))]
    if release and release.licence:
        check.warn(f"{release.name} ({release.source}) has the licence {release.licence}")
    if request.lora_dir is not None and experts:
        check.warn("--lora_dir applies to the experts of --expert too, which must not be distilled twice")
    known = bool(release and release.kind != "recipe")
    # a file that is named after the model, and is no known release, is not distilled
    others = [file for file in experts.values() if not re.search(r"wan[-_]?2[-_.]2", file.name.lower())]
    distilled = bool(request.lora_dir or request.preset or known or others)
    return Weights(ckpt_dir, tuple(chosen.loras), files, release=release, distilled=distilled)


def part_files(request: Request, config: TaskConfig, check: Check) -> dict[str, Path]:
    """Files by part, an expert or one of PARTS, that replace the checkpoint's."""
    found: dict[str, Path] = {}
    given = [("--expert", text, *text.partition("=")[::2]) for text in request.expert or ()]
    given += [(f"--{part}", name, part, name) for part in PARTS if (name := getattr(request, part)) is not None]
    for flag, text, part, name in given:
        if flag == "--expert" and (part not in config.experts or not name):
            allowed = " or ".join(f"{known}=FILE" for known in config.experts)
            check.problem(f"--expert {text}: {config.name} takes {allowed}")
        elif part in found:
            check.problem(f"--expert {part}= is given twice")
        elif file := check.attempt(partial(located, flag, name)):
            file = file / "tokenizer.json" if part == "tokenizer" else file
            if file.is_file():
                found[part] = file
            else:
                check.problem(
                    f"{flag} {text}: no such {'folder with a tokenizer.json' if part == PARTS[2] else 'file'}"
                )
    return found


def choose_sampling(request: Request, config: TaskConfig, weights: Weights, check: Check) -> Sampling:
    """Solver, steps, shift and guidance: as given, else the release's, else the task's."""
    single, free = len(config.experts) == 1, request.timesteps is None
    # Without a recognised release a distilled weight runs as the Lightning ones do, which are Release's defaults.
    release = weights.release or Release("", (), "lora", "")
    base = Sampling(config.sample_solver, config.sample_steps, config.sample_shift, both(config.sample_guide_scale))
    usual: Release | Sampling = release if weights.distilled else base
    as_made = request.sample_solver in (None, release.solver) and request.sample_steps is None
    timesteps = release.timesteps if weights.distilled and request.sample_shift is None and as_made else None
    if request.timesteps is not None:
        timesteps = check.timesteps(request.timesteps)
    fitting = "euler" if timesteps and usual.solver not in EXPLICIT else usual.solver
    solver = check.choice("--sample_solver", request.sample_solver or fitting, SOLVERS)
    steps = request.sample_steps or len(timesteps or ()) or usual.steps
    flag, scale = "--sample_guide_scale", request.sample_guide_scale
    given = check.attempt(partial(pair, flag, scale)) if scale is not None else None
    low, high = (check.number(flag, number, usual.guidance[0], 0.0, 100.0) for number in given or usual.guidance)
    if single and low != high:
        check.problem(f"{flag} {scale}: one model takes one number, not LOW,HIGH")
    if timesteps is not None and not free:  # which excludes other flags
        if request.sample_solver not in (None, *EXPLICIT):
            solvers = " or ".join(EXPLICIT)
            check.problem(f"--timesteps works with --sample_solver {solvers}, not {request.sample_solver}")
        if request.sample_steps not in (None, len(timesteps)):
            check.problem(f"--timesteps names {len(timesteps)} steps, but --sample_steps is {request.sample_steps}")
        if request.sample_shift is not None:
            check.problem("--timesteps are final, after the shift; leave --sample_shift out")
    high_steps = request.high_steps
    if high_steps is not None and single:
        check.problem("--high_steps: this task has one model; it applies to the two experts of the A14B tasks")
    elif high_steps is not None:
        check.number("--high_steps", high_steps, 0, 0, steps)
    lora_steps = release.lora_steps if free else None
    guidance_steps = release.guidance_steps if free and scale is None else None
    if lora_steps and len(lora_steps) != steps:
        check.problem(f"--preset {release.name} names {len(lora_steps)} steps; leave --sample_steps out")
    shift = request.sample_shift or usual.shift
    strength = request.strength or STRENGTH
    recipe = Sampling(solver, steps, shift, (low, high), timesteps, high_steps, lora_steps, guidance_steps, strength)
    check_choices(request, recipe, check, distilled=weights.distilled)
    _warn_of_mismatch(recipe, weights, release, check)
    return recipe


def check_choices(request: Request, sampling: Sampling, check: Check, *, distilled: bool = False) -> None:
    """Options that do not go together with these steps."""
    for name, value, low, high in zip(("S", "TAU", "ALPHA"), request.guide, (1, 0.01, 0), (100, 100, 1), strict=True):
        check.number(f"--nag {request.nag}: {name}", value, value, low, high)
    if request.guide[0] != 1 and any(scale != 1 for scale in sampling.guidance_steps or sampling.guidance):
        check.problem(f"--nag {request.nag} takes the place of guidance: give --sample_guide_scale 1 with it")
    if request.cache and request.window:
        check.problem(f"--cache {request.cache:g} skips whole steps, --window divides them; leave one of them out")
    if request.cache and not takes_cache(sampling, distilled):
        check.problem(f"--cache {request.cache:g} takes base weights, {LEAST_CACHED} steps or more, and not dmd")


def takes_cache(sampling: Sampling, distilled: bool) -> bool:
    """Whether steps may be left out: not of a few, nor where each draws fresh noise."""
    return not distilled and sampling.steps >= LEAST_CACHED and sampling.solver != "dmd"


def with_quality(request: Request, given: Collection[str], *, cached: bool = False) -> Request:
    """`request` with the options that `--quality` sets, but those `given`; the step cache only if `cached`."""
    chosen = {name: value for name, value in QUALITIES[request.quality].items() if name not in given}
    return replace(request, **{name: value for name, value in chosen.items() if name != "cache" or cached})


def both(guidance: float | Sequence[float]) -> tuple[float, float]:
    """(low, high noise) of one guidance for both, or of the two."""
    low, high = guidance if isinstance(guidance, tuple | list) else (guidance, guidance)
    return float(low), float(high)


def _release(request: Request, task: str, paths: Sequence[Path], check: Check) -> Release | None:
    """--preset's, else the first recognised by a folder's or file's name, else the one baked into the checkpoint."""
    if request.preset is not None:
        release = check.attempt(partial(preset, request.preset), begin="--preset: ")
        if release is None:
            return None
        if task not in release.tasks:
            check.problem(f"--preset {release.name} is for {' and '.join(release.tasks)}, not for {task}")
        if release.kind == "recipe" and not paths:
            check.problem(f"--preset {release.name} is a recipe for a distilled LoRA; give --lora_dir or --lora too")
        return release
    for path in [expanded(request.lora_dir), *paths] if request.lora_dir else paths:
        if found := recognise(path):
            if task not in found.tasks:
                check.warn(f"{path} looks like {found.name}, which is for {' and '.join(found.tasks)}, not for {task}")
            return found
    if request.ckpt_dir is None:
        return None
    there = place(request.ckpt_dir)
    folder = Path(there.repository, there.inside) if there else expanded(request.ckpt_dir)
    return check.attempt(partial(release_in, folder))


def _warn_of_mismatch(recipe: Sampling, weights: Weights, release: Release, check: Check) -> None:
    if not weights.distilled:
        if recipe.steps < 15:
            check.warn(f"{recipe.steps} steps without a distilled weight (--lora_dir) give a poor video")
        return
    name = release.name or "a distilled weight"
    for flag, given, made_for in (
        ("--sample_solver", recipe.solver, release.solver),
        ("--sample_steps", recipe.steps, release.steps),
        ("--sample_shift", release.shift if recipe.timesteps else recipe.shift, release.shift),
        ("--sample_guide_scale", "{:g},{:g}".format(*recipe.guidance), "{:g},{:g}".format(*release.guidance)),
    ):
        if given != made_for:
            check.warn(f"{flag} {short(given)}: {name} was made for {short(made_for)}")
