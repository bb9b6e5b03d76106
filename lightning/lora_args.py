"""The flags that choose LoRAs, for `generate.py` and `bake` alike: a file and a strength for each expert.

--lora PATH[:S]           a file or PEFT folder, for every expert or the one that its name says;
                          a release folder: each expert gets its file
--lora EXPERT=PATH[:S]    for one expert: high, low, or model where a task has only one
--lora_dir DIR            a release folder, with --lora_strength HIGH[,LOW]

PATH and DIR may be on the hub: owner/name[@revision]/folder/file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning.lora_files import PEFT_CONFIG, exists, files_of, named_expert
from lightning.releases import recognise
from wan.checkpoints.hub import located
from wan.configs import download_command
from wan.utils.argument_parser import outside, pair, real
from wan.utils.errors import InputError

RANGE = -10.0, 10.0  # of strengths


@dataclass(frozen=True)
class LoraChoice:
    """One LoRA file for one expert ("high", "low" or "model"), at a strength."""

    expert: str
    path: Path
    strength: float = 1.0


@dataclass
class Choices:
    """The LoRAs that the flags choose; problems and warnings are sentences about the flags."""

    loras: list[LoraChoice] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose_loras(
    experts: Collection[str], lora_dir: str | None = None, lora_strength: str | None = None, loras: Sequence[str] = ()
) -> Choices:
    """The LoRAs in the order of the flags, those of `lora_dir` first. Checks that files exist; opens none."""
    out = Choices()
    if lora_dir is not None:
        high, low = _strengths(lora_strength or "1", experts, out.problems)
        files = _files_of(lora_dir, experts, "--lora_dir", out.problems)
        out.loras += [LoraChoice(expert, file, low if expert == "low" else high) for expert, file in files.items()]
    elif lora_strength is not None:
        out.problems.append("--lora_strength scales --lora_dir, which is not given; for --lora write PATH:STRENGTH")
    for text in loras:
        _add_lora(out, text, experts)
    return out


def _add_lora(out: Choices, text: str, experts: Collection[str]) -> None:
    match = re.fullmatch(r"(?:(high|low|model)=)?(.+)", text, re.DOTALL)
    if not match:
        out.problems.append("--lora is empty; it takes PATH[:STRENGTH], high=PATH[:STRENGTH] or low=PATH[:STRENGTH]")
        return
    expert, (name, strength) = match[1], split_strength(match[2])
    if problem := outside(f"--lora {text}: strength", strength, *RANGE):
        out.problems.append(problem)
        strength = 1.0
    if expert and expert not in experts:
        out.problems.append(f"--lora {text}: this task has no expert {expert!r}; it has {' and '.join(experts)}")
        return
    try:
        path = located("--lora", name)
    except InputError as e:
        out.problems += e.problems
        return
    if not exists(path):
        among = f"; an expert goes before =, {' or '.join(experts)}" if "=" in name else ""
        out.problems.append(f"--lora {path}: no such file{among}")
        return
    if path.is_dir() and not (path / PEFT_CONFIG).is_file():
        files = _files_of(str(path), [expert] if expert else experts, "--lora", out.problems)
        out.loras += [LoraChoice(one, file, strength) for one, file in files.items()]
        return
    named = named_expert(path)
    if not expert and named in experts:
        out.warnings.append(
            f"--lora {path} goes to the {named}-noise expert only, as its name says; "
            "write high=PATH and low=PATH to choose yourself"
        )
    chosen = expert or (named if named in experts else None)
    out.loras += [LoraChoice(one, path, strength) for one in experts if chosen in (None, one)]


def split_strength(text: str) -> tuple[str, float]:
    """Cut off `:STRENGTH`; a drive letter's colon, or one in an existing name, stays."""
    path, colon, tail = text.rpartition(":")
    strength = real(tail)
    if not colon or strength is None or len(path) <= 1 or os.path.exists(os.path.expanduser(text)):
        path, strength = text, 1.0
    return os.path.expanduser(path), strength


def _strengths(text: str, experts: Collection[str], problems: list[str]) -> tuple[float, float]:
    """(high, low) of `HIGH[,LOW]`."""
    try:
        numbers = pair("--lora_strength", text)
    except InputError as e:
        problems += e.problems
        return 1.0, 1.0
    if len(experts) == 1 and numbers[0] != numbers[1]:
        problems.append(f"--lora_strength {text}: one model takes one number, not HIGH,LOW")
    if faults := list(dict.fromkeys(filter(None, (outside("--lora_strength", n, *RANGE) for n in numbers)))):
        problems += faults
        return 1.0, 1.0
    return numbers


def _files_of(folder: str, experts: Collection[str], flag: str, problems: list[str]) -> dict[str, Path]:
    try:
        return files_of(located(flag, folder), experts, flag)
    except InputError as e:
        problems += [f"{problem}{_where_to_get(folder)}" for problem in e.problems]
        return {}


def _where_to_get(folder: str) -> str:
    """The command that downloads a release whose folder is missing, for a path as the download creates it."""
    release = None if os.path.exists(folder) else recognise(Path(folder))
    if release is None or not folder.startswith(f"{release.source.rpartition('/')[2]}/"):
        return ""
    return f"; get it with: {download_command(release.source)}"
