"""Which file of weights is meant: the one of a PEFT folder, those of a release folder, the expert in a name."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from wan.checkpoints.layout import STEM
from wan.utils.errors import LoraError

PEFT_CONFIG, PEFT_STEM = "adapter_config.json", "adapter_model"
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
RELEASED_FILES = {
    "high": "high_noise_model.safetensors",
    "low": "low_noise_model.safetensors",
    "model": f"{STEM}.safetensors",
}
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


def exists(path: Path) -> bool:
    """Whether the path exists, here or on the hub; False for one that cannot be reached."""
    try:
        return path.exists()
    except OSError:  # no permission, or a name too long
        return False


def weights_in(folder: Path) -> list[Path]:
    """The files of weights right in a folder, here or on the hub."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def weight_file(path: Path) -> Path:
    """The file of weights that `path` means: itself, or the one of a PEFT folder. LoraError if several may be meant."""
    if not path.is_dir():
        return path
    files = weights_in(path)
    names = ", ".join(file.name for file in files) or "no file of weights"
    if not (path / PEFT_CONFIG).is_file():
        raise LoraError(f"LoRA {path} is a folder without {PEFT_CONFIG}; name one file (it holds {names})")
    files = [file for file in files if file.stem == PEFT_STEM] or files
    if len(files) != 1:
        raise LoraError(f"LoRA {path}: which of its files is meant? Name one (it holds {names})")
    return files[0]


def files_of(lora_dir: Path, experts: Collection[str], flag: str = "--lora_dir") -> dict[str, Path]:
    """The LoRA file of each expert in a release folder; raises LoraError naming what is missing, and the flag.

    A released folder has one file of a fixed name per expert. In other folders exactly one file must be named after
    the expert (`..._high_noise_...`, `..._LOW_...`).
    """
    if not lora_dir.is_dir():
        raise LoraError(f"{flag} {lora_dir}: no such folder")
    here = weights_in(lora_dir)
    files: dict[str, Path] = {}
    for expert in experts:
        named = [file for file in here if expert_of(file) == expert]
        if (lora_dir / RELEASED_FILES[expert]) in here:
            files[expert] = lora_dir / RELEASED_FILES[expert]
        elif len(named) == 1:
            files[expert] = named[0]
    if missing := [RELEASED_FILES[expert] for expert in experts if expert not in files]:
        found = ", ".join(file.name for file in here) or "no file of weights"
        raise LoraError(f"{flag} {lora_dir}: {' and '.join(missing)} missing; the folder holds {found}")
    return files


def expert_of(path: Path | str) -> str | None:
    """The expert, "high" or "low", that a file or folder is named after; None if the name says neither or both.

    `low_poly`, `high-quality` and the like name no expert, unless a file beside it differs in that word alone.
    """
    path = Path(path)
    name = path.stem if path.suffix.lower() in SUFFIXES else path.name
    words = list(_WORD.finditer(name))
    named = set()
    for word, follower in zip(words, [*(each[0].lower() for each in words[1:]), ""], strict=True):
        side, near_wan = word[0].lower(), _WAN.search(name)
        if len(side) == 1:
            sure = near_wan and not follower
        else:
            sure = side[1:] == "n" or follower in FOLLOWS or (near_wan and follower not in DESCRIBES)
        if side in OTHERS and (sure or _has_partner(path, word)):
            named.add("high" if side in SIDES else "low")
    return named.pop() if len(named) == 1 else None


def named_expert(path: Path) -> str | None:
    """The expert that a LoRA is named after; PEFT's own file is named by its folder."""
    return expert_of(path.absolute().parent if path.stem == PEFT_STEM else path)


def _has_partner(path: Path, word: re.Match[str]) -> bool:
    """Whether another file beside it differs in this word alone: low for high, in the same capitals."""
    other = OTHERS[word[0].lower()]
    other = other.upper() if word[0].isupper() else other.capitalize() if word[0].istitle() else other
    return exists(path.with_name(path.name[: word.start()] + other + path.name[word.end() :]))
