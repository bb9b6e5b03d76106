"""Extended prompts kept between runs: one small JSON file an answer, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from wan.extend.text import Question
from wan.utils.files import cache_folder


def prompts_folder() -> Path:
    """RuntimeError if the user has no home folder."""
    return cache_folder() / "prompts"


def cache_key(question: Question, method: str, model: str, language: str, seed: int) -> str:
    """One name for everything that decides the answer: texts, image content, method, model, language, seed."""
    image = hashlib.sha256(question.image.read_bytes()).hexdigest() if question.image else None
    parts = [question.system, question.text, image, method, model, language, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_cached(key: str) -> str | None:
    """The kept answer; None if there is none or its file is damaged."""
    try:
        kept = json.loads((prompts_folder() / f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return None
    prompt = kept.get("prompt") if isinstance(kept, dict) else None
    return prompt if isinstance(prompt, str) and prompt else None


def write_cached(key: str, prompt: str, question: Question, model: str) -> None:
    """Keep an answer: written beside its place, then renamed, so that a reader never sees half of it.

    Raises OSError, or RuntimeError if the user has no home folder.
    """
    folder = prompts_folder()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"prompt": prompt, "original": question.text, "model": model}
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(kept, file, ensure_ascii=False)
        os.replace(temporary, folder / f"{key}.json")
    except BaseException:
        os.unlink(temporary)
        raise
