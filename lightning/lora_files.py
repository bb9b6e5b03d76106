"""Which LoRA files are meant: by the flags of `generate.py` and `bake` alike, by a folder, by the words of a name.

--lora PATH[:S]           a file or PEFT folder, for every expert or the one that its name says;
                          a release folder: each expert gets its file
--lora EXPERT=PATH[:S]    for one expert: high, low, or model where a task has only one
--lora_dir DIR            a release folder, with --lora_strength HIGH[,LOW]

S is a strength. PATH and DIR may be on the hub: owner/name[@revision]/folder/file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning.releases import recognise
from wan.checkpoints.hub import exists, located
from wan.checkpoints.layout import WEIGHTS
from wan.checkpoints.weights import WEIGHT_SUFFIXES
from wan.configs import download_command
from wan.utils.argument_parser import outside, pair, real
from wan.utils.errors import InputError, LoraError

RANGE = -10.0, 10.0  # of strengths
PEFT_CONFIG, PEFT_STEM = "adapter_config.json", "adapter_model"
RELEASED_FILES = {"high": "high_noise_model.safetensors", "low": "low_noise_model.safetensors", "model": WEIGHTS}
SIDES = {"high": "low", "hn": "ln", "h": "l"}  # words that name an expert: those of the high-noise one, of the other
OTHERS = SIDES | {low: high for high, low in SIDES.items()}
_WORD = re.compile(r"(?i:noise)|(?i:high|low)(?=(?i:noise))|[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_WAN = re.compile(r"wan|noise|14b|[ti]2v", re.IGNORECASE)  # near these, high and low are most likely experts
FOLLOWS = {"", "noise", "lora", "model", "expert", "rank", "fp", "bf", "v", "e", "epoch", "step", "steps", "and", "or"}
DESCRIBES = {  # words that high and low describe
    *("angle", "contrast", "def", "definition", "detail", "detailed", "end", "exposure", "fantasy", "fi", "fidelity"),
    *("fps", "frequency", "key", "light", "motion", "poly", "quality", "res", "resolution", "saturation", "speed"),
    *("school", "tech", "vram"),
}


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

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Context manager: an InputError inside ends it, and its problems are noted."""
        try:
            yield
        except InputError as e:
            self.problems += [problem for problem in e.problems if problem not in self.problems]


def choose_loras(
    experts: Collection[str], lora_dir: str | None = None, lora_strength: str | None = None, loras: Sequence[str] = ()
) -> Choices:
    """The LoRAs in the order of the flags, those of `lora_dir` first. Checks that files exist; opens none."""
    out = Choices()
    if lora_dir is None and lora_strength is not None:
        out.problems.append("--lora_strength scales --lora_dir, which is not given; for --lora write PATH:STRENGTH")
    elif lora_dir is not None:
        high = low = 1.0
        with out.noting():
            high, low = pair("--lora_strength", lora_strength or "1")
        if len(experts) == 1 and high != low:
            out.problems.append(f"--lora_strength {lora_strength}: one model takes one number, not HIGH,LOW")
        out.problems += filter(None, (outside("--lora_strength", n, *RANGE) for n in dict.fromkeys((high, low))))
        with out.noting():
            files = files_of(_located("--lora_dir", lora_dir), experts)
            out.loras += [LoraChoice(expert, file, low if expert == "low" else high) for expert, file in files.items()]
    for text in loras:
        with out.noting():
            out.loras += _choose(text, experts, out)
    return out


def _choose(text: str, experts: Collection[str], out: Choices) -> list[LoraChoice]:
    """The LoRAs of one --lora; warnings, and a strength out of range, go to `out`. InputError."""
    match = re.fullmatch(r"(?:(high|low|model)=)?(.+)", text, re.DOTALL)
    if not match:
        raise LoraError("--lora is empty; it takes PATH[:STRENGTH], high=PATH[:STRENGTH] or low=PATH[:STRENGTH]")
    expert, (name, strength) = match[1], split_strength(match[2])
    out.problems += filter(None, [outside(f"--lora {text}: strength", strength, *RANGE)])
    if expert and expert not in experts:
        raise LoraError(f"--lora {text}: this task has no expert {expert!r}; it has {' and '.join(experts)}")
    path = _located("--lora", name)
    if path.is_dir() and not (path / PEFT_CONFIG).is_file():
        files = files_of(path, [expert] if expert else experts, "--lora")
        return [LoraChoice(one, file, strength) for one, file in files.items()]
    if not expert and (named := named_expert(path)) in experts:
        expert = named
        out.warnings.append(f"--lora {path} goes to the {named}-noise expert only, as its name says")
    return [LoraChoice(one, path, strength) for one in experts if expert in (None, one)]


def _located(flag: str, name: str) -> Path:
    """`located`, but a release's folder as `download_command` makes it is here or nowhere. LoraError if absent."""
    release = recognise(Path(name))
    fetched = release and name.startswith(f"{release.source.partition('/')[2]}/")
    path = Path(name) if fetched else located(flag, name)
    if not exists(path):
        advice = f"; get it with: {download_command(release.source)}" if release else ""
        raise LoraError(f"{flag} {path}: no such {'folder' if flag == '--lora_dir' else 'file'}{advice}")
    return path


def split_strength(text: str) -> tuple[str, float]:
    """Cut off `:STRENGTH`; a drive letter's colon, or one in an existing name, stays."""
    path, colon, tail = text.rpartition(":")
    strength = real(tail)
    if not colon or strength is None or len(path) <= 1 or os.path.exists(os.path.expanduser(text)):
        path, strength = text, 1.0
    return os.path.expanduser(path), strength


def weights_in(folder: Path) -> list[Path]:
    """The files of weights right in a folder, here or on the hub."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in WEIGHT_SUFFIXES and file.is_file())


def weight_file(path: Path) -> Path:
    """The file of weights that `path` means: itself, or the one of a PEFT folder. LoraError if several may be meant."""
    if not path.is_dir():
        return path
    files, is_peft = weights_in(path), (path / PEFT_CONFIG).is_file()
    own = [file for file in files if file.stem == PEFT_STEM] or files
    if not is_peft or len(own) != 1:
        fault = ": which of its files is meant?" if is_peft else f" is a folder without {PEFT_CONFIG};"
        raise LoraError(f"LoRA {path}{fault} name one file ({', '.join(file.name for file in files) or 'it has none'})")
    return own[0]


def files_of(lora_dir: Path, experts: Collection[str], flag: str = "--lora_dir") -> dict[str, Path]:
    """The LoRA file of each expert in a release folder. LoraError naming what is missing, and the flag.
    It has the released name, or is the only file named after the expert (`..._high_noise_...`, `..._LOW_...`)."""
    if not lora_dir.is_dir():
        raise LoraError(f"{flag} {lora_dir}: {'not a' if exists(lora_dir) else 'no such'} folder")
    here = weights_in(lora_dir)
    files: dict[str, Path] = {}
    for expert in experts:
        released = lora_dir / RELEASED_FILES[expert]
        named = [released] if released in here else [file for file in here if expert_of(file) == expert]
        if len(named) == 1:
            files[expert] = named[0]
    if missing := [RELEASED_FILES[expert] for expert in experts if expert not in files]:
        folders = [f"{each.name}/" for each in sorted(lora_dir.glob("*")) if each.is_dir()]
        found = ", ".join([file.name for file in here] or folders) or "no file of weights"
        raise LoraError(f"{flag} {lora_dir}: {' and '.join(missing)} missing; the folder holds {found}")
    return files


def expert_of(path: Path | str) -> str | None:
    """The expert, "high" or "low", that a file or folder is named after; None if the name says neither or both.
    `low_poly`, `high-quality` and the like name no expert, unless a file beside it differs in that word alone."""
    path = Path(path)
    name = path.stem if path.suffix.lower() in WEIGHT_SUFFIXES else path.name
    words = list(_WORD.finditer(name))
    near_wan, named = _WAN.search(name), set()
    for word, follower in zip(words, [*(each[0].lower() for each in words[1:]), ""], strict=True):
        side = word[0].lower()
        if side not in OTHERS:
            continue
        if len(side) == 1:
            sure = near_wan and not follower
        else:
            sure = side[1:] == "n" or follower in FOLLOWS or (near_wan and follower not in DESCRIBES)
        other = OTHERS[side]  # in the same capitals as the word
        other = other.upper() if word[0].isupper() else other.capitalize() if word[0].istitle() else other
        if sure or exists(path.with_name(path.name[: word.start()] + other + path.name[word.end() :])):
            named.add("high" if side in SIDES else "low")
    return named.pop() if len(named) == 1 else None


def named_expert(path: Path) -> str | None:
    """The expert that a LoRA is named after; PEFT's own file is named by its folder."""
    return expert_of(path.absolute().parent if path.stem == PEFT_STEM else path)
