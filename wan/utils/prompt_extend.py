"""Prompt extension: a short prompt is lengthened by a language model before any video weight is loaded.

`check` finds what can be wrong without asking anyone; `extend` asks, and its model is gone when it returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from wan.configs import WAN_CONFIGS
from wan.utils.errors import InputError
from wan.utils.extend_cache import cache_key, read_cached, write_cached
from wan.utils.extend_text import AnswerError, Question, clean, neutralise
from wan.utils.system_prompts import LANGUAGES, NO_WORDS, system_prompt

METHODS = ("dashscope", "local_qwen", "openai")
ON_ERROR = ("raw", "fail")
DEFAULT_MODELS = {  # (method, with an image)
    ("dashscope", False): "qwen-plus",
    ("dashscope", True): "qwen-vl-max",
    ("local_qwen", False): "Qwen/Qwen2.5-14B-Instruct",
    ("local_qwen", True): "Qwen/Qwen2.5-VL-7B-Instruct",
}
SHORT_NAMES = {
    "Qwen2.5_3B": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5_7B": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5_14B": "Qwen/Qwen2.5-14B-Instruct",
    "QwenVL2.5_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "QwenVL2.5_7B": "Qwen/Qwen2.5-VL-7B-Instruct",
}
PACKAGES = {"dashscope": ("dashscope",), "local_qwen": ("torch", "transformers", "accelerate"), "openai": ("openai",)}


@dataclass(frozen=True)
class ExtendItem:
    """What the user gave for one video. With an image the prompt may be empty."""

    prompt: str
    image: Path | None = None


@dataclass(frozen=True)
class ExtendSettings:
    """How to extend, for all items of a run."""

    task: str
    method: str = "local_qwen"  # one of METHODS
    model: str | None = None  # None: by method and whether there is an image
    language: str = "zh"  # of the extended prompt: "zh" | "en"
    seed: int = 0
    on_error: str = "raw"  # "raw": keep the user's prompt, with a warning; "fail": raise
    use_cache: bool = True
    device: str = "auto"  # of a local model: "auto" | "cuda" | "cuda:1" | "cpu" | "mps"


@dataclass(frozen=True)
class Extended:
    """The outcome for one item."""

    prompt: str
    original: str
    image: Path | None
    model: str
    cached: bool
    error: str | None  # why the user's own prompt was kept


def extend(
    settings: ExtendSettings, items: Sequence[ExtendItem], report: Callable[[str], None]
) -> list[Extended]:
    """The extended prompts, in order; `report` gets one line an item, with both prompts, when it is settled.

    Equal questions are asked once; items without an image are all asked before the model for images is opened.
    Raises InputError from `check`, and with on_error "fail" at the first item that gets no answer.
    """
    check(settings, items)
    questions = [_question(settings, item) for item in items]
    models = [_model(settings, question.image is not None) for question in questions]
    keys = [
        cache_key(question, settings.method, model, settings.language, settings.seed)
        for question, model in zip(questions, models, strict=True)
    ]
    kept = {key: read_cached(key) for key in keys} if settings.use_cache else {}
    answers = {key: (prompt, None) for key, prompt in kept.items() if prompt is not None}
    ...
