"""Extended prompts kept between runs: one small JSON file an answer, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from wan.prompt_extension.answers import Question
from wan.utils.files import cache_folder, replacing


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
    """Keep an answer, whole or not at all. OSError, or RuntimeError if the user has no home folder."""
    folder = prompts_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what one writes is nobody else's to read
    kept = {"prompt": prompt, "original": question.text, "model": model}
    with replacing(folder / f"{key}.json") as part:
        part.write_text(json.dumps(kept, ensure_ascii=False), "utf-8")
