"""Extended prompts kept between runs: one small JSON file per answer, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.prompt_extension.answers import AnswerError, Question, clean
from wan.utils.files import cache_folder, replacing


def prompts_folder() -> Path:
    """RuntimeError if the user has no home folder."""
    return cache_folder() / "prompts"


def cache_key(
    question: Question, method: str, model: str, language: str, seed: int, options: Mapping[str, Any] | None = None
) -> str:
    """One name for everything that decides the answer."""
    image = hashlib.sha256(question.image.read_bytes()).hexdigest() if question.image else None
    parts = [question.system, question.text, image, method, model, language, seed, *([options] if options else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_cached(key: str) -> str | None:
    """The kept prompt; None if there is none, its file is damaged, or it is no clean prompt."""
    try:
        kept = json.loads((prompts_folder() / f"{key}.json").read_text("utf-8"))
        prompt = kept["prompt"]
        return prompt if clean(prompt) == prompt else None
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AnswerError):
        return None


def write_cached(key: str, prompt: str, question: Question, model: str) -> None:
    """Keep a prompt, whole or not at all. OSError, or RuntimeError if the user has no home folder."""
    folder = prompts_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private to the user
    kept = {"prompt": prompt, "original": question.text, "model": model}
    with replacing(folder / f"{key}.json") as part:
        part.write_text(json.dumps(kept), "utf-8")
