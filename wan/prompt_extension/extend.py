"""Prompt extension: a language model lengthens short prompts before any video weight is loaded.

`check_extension` finds problems without asking anyone; `extend` asks, and its model is gone when it returns. Answers
are kept between runs: one small JSON file each, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wan.configs import TASKS
from wan.media.images import open_image
from wan.prompt_extension.answers import AnswerError, Question, clean, neutralise
from wan.prompt_extension.local_qwen import LocalQwen, local_problems
from wan.prompt_extension.services import OWN_FIELDS, ChatService, service_problems
from wan.utils.errors import InputError
from wan.utils.files import cache_folder, write_file

DEFAULT_MODELS = {  # (method, with an image)
    ("dashscope", False): "qwen-plus",
    ("dashscope", True): "qwen-vl-max",
    ("local_qwen", False): "Qwen/Qwen2.5-14B-Instruct",
    ("local_qwen", True): "Qwen/Qwen2.5-VL-7B-Instruct",
}
SHORT_NAMES = {f"Qwen2.5_{size}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "7B", "14B")} | {
    f"QwenVL2.5_{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")
}
# The instructions given to the model: three kinds, in Chinese and in English.
INSTRUCTIONS = tomllib.loads(Path(__file__).with_name("instructions.toml").read_text("utf-8"))
# (fewest, most) of the answer: characters in Chinese, words in English
TEXT_LENGTH, MOTION_LENGTH = (60, 200), (20, 100)
# Replaces the user's text when there is only an image: chat models want some text in the turn.
NO_WORDS = {language: texts["no_words"] for language, texts in INSTRUCTIONS.items()}


class ExtendItem(NamedTuple):
    """The user's input for one video. With an image the prompt may be empty."""

    prompt: str
    image: Path | None = None


@dataclass(frozen=True)
class ExtendSettings:
    """Settings for all items of a run. Task: see `TASKS`; method, language, on_error: `wan.prompt_extension`."""

    task: str
    method: str = "local_qwen"
    model: str | None = None  # None: by method and whether there is an image
    language: str = "zh"  # of the extended prompt
    seed: int = 0
    on_error: str = "raw"
    use_cache: bool = True
    device: str = "auto"  # of a local model: "auto" | "cuda" | "cuda:1" | "cpu" | "mps"
    options: Mapping[str, Any] | None = None  # further fields of a service's requests


class Extended(NamedTuple):
    """The outcome for one item."""

    prompt: str
    original: str
    image: Path | None
    model: str
    cached: bool
    error: str | None  # why the user's own prompt was kept


Answered = tuple[str | None, str | None]  # an extended prompt, or the reason why there is none
Ask = tuple[Question, str, str]  # a question, the model that gets it, and the cache's name for the pair


def extend(settings: ExtendSettings, items: Sequence[ExtendItem], report: Callable[[str], None]) -> list[Extended]:
    """The extended prompts, in order; `report` gets a line for each item, with both prompts, once it is settled. Equal
    questions are asked once. Raises InputError: what `check_extension` finds, and with on_error "fail" the first item
    that gets no answer."""
    check_extension(settings, items)
    if settings.language == "zh" and not all(re.search(r"[\u4e00-\u9fff]", item.prompt) for item in items):
        report("the extended prompts are in Chinese; --prompt_extend_target_lang en has them in English")
    asks = [_ask_for(settings, item) for item in items]
    kept = {key: read_cached(key) for _, _, key in asks} if settings.use_cache else {}
    outcomes: dict[str, Answered] = {key: (prompt, None) for key, prompt in kept.items() if prompt is not None}
    cached = set(outcomes)
    results: dict[int, Extended] = {}
    for model in dict.fromkeys(model for _, model, _ in asks):  # one model at a time in memory
        missing = {ask[2]: ask for ask in asks if ask[1] == model and ask[2] not in outcomes}
        with closing(_answers(settings, model, list(missing.values()), report)) as answers:
            for number, (item, (_, asked, key)) in enumerate(zip(items, asks, strict=True), 1):
                if asked != model:
                    continue
                if key not in outcomes:
                    outcomes[key] = next(answers)
                answer, error = outcomes[key]
                prompt = item.prompt if answer is None else answer
                results[number] = Extended(prompt, item.prompt, item.image, model, key in cached, error)
                original, title = " ".join(item.prompt.split()), f"prompt {number} of {len(items)}"
                if error is None:
                    source = f"{model}, cached" if key in cached else model
                    report(f'{title} ({source}): "{original}" -> "{prompt}"')
                elif settings.on_error == "fail":
                    short = f"{original[:60]}..." if len(original) > 60 else original
                    raise InputError(f'{title}, "{short}", was not extended: {error}')
                else:
                    report(f'warning: {title} is kept as written, "{original}", because it was not extended: {error}')
    return [result for _, result in sorted(results.items())]


def check_extension(settings: ExtendSettings, items: Sequence[ExtendItem]) -> None:
    """InputError with everything that is wrong before a model is loaded or a service asked."""
    local = settings.method == "local_qwen"
    problems = list(local_problems(settings.model) if local else service_problems(settings.method, settings.model))
    if local and settings.options:
        problems.append("--prompt_extend_options is for dashscope and openai: fields of their requests")
    if own := sorted({*OWN_FIELDS} & {*(settings.options or {})}):
        problems.append(f"--prompt_extend_options cannot set {', '.join(own)}")
    unreadable: dict[Path | None, str] = {}
    for image in filter(None, dict.fromkeys(_image(settings.task, item) for item in items)):
        try:
            open_image(image)
        except InputError as error:
            unreadable[image] = str(error)
    for number, item in enumerate(items, 1):
        title = f"prompt {number} of {len(items)}"
        if not item.prompt.strip() and _image(settings.task, item) is None:
            problems.append(f"{title} is empty, and there is no image to describe instead (--prompt)")
        if TASKS[settings.task].example_image and item.image is None:
            problems.append(f"{title} has no image, which {settings.task} needs (--image)")
        if item.image in unreadable:
            problems.append(f"{title}: {unreadable[item.image]}")
    if problems:
        raise InputError(problems)


def _image(task: str, item: ExtendItem) -> Path | None:
    """The item's image, if the task uses one at all; text-to-video is extended from its text alone."""
    return item.image if TASKS[task].image_fit is not None else None


def model_for(method: str, model: str | None, *, has_image: bool) -> str:
    """The model's full name or folder: the default, or what was asked for (a folder wins over a short name)."""
    if model is None:
        return DEFAULT_MODELS[method, has_image]
    if method != "local_qwen":
        return model
    folder = Path(model).expanduser()
    return str(folder) if folder.exists() else SHORT_NAMES.get(model, model)


def system_prompt(language: str, *, has_image: bool, has_words: bool) -> str:
    """The instructions for one item; with an image its motion is asked for, without one the whole scene."""
    texts = INSTRUCTIONS[language]
    fewest, most = MOTION_LENGTH if has_image else TEXT_LENGTH
    motion = texts["image" if has_words else "image_only"] + texts["motion_rules"]
    examples = "\n".join(texts["motion_examples" if has_image else "text_examples"])
    return str((motion if has_image else texts["text"]).format(fewest=fewest, most=most, examples=examples))


def _ask_for(settings: ExtendSettings, item: ExtendItem) -> Ask:
    image, words = _image(settings.task, item), item.prompt.strip()
    system = system_prompt(settings.language, has_image=image is not None, has_words=bool(words))
    question = Question(system, neutralise(words) or NO_WORDS[settings.language], image)
    model = model_for(settings.method, settings.model, has_image=image is not None)
    key = cache_key(question, settings.method, model, settings.language, settings.seed, settings.options)
    return question, model, key


def _answers(
    settings: ExtendSettings, model: str, asks: Sequence[Ask], report: Callable[[str], None]
) -> Generator[Answered]:
    """One outcome for each question. The model is opened at the first and freed at the end. A failure of all questions
    (a refused key, a model that does not load, a service that failed in all its attempts twice in a row) ends the
    asking; the rest get the same reason."""
    answered, failed_in_row = 0, 0
    opened: AbstractContextManager[Callable[[Question], str]]
    if settings.method == "local_qwen":
        opened = LocalQwen(model, settings.seed, settings.device)
    else:
        opened = nullcontext(ChatService(settings.method, model, settings.seed, settings.options))
    try:
        with opened as answer:
            for question, _, key in asks:
                prompt, reason = None, None
                try:
                    prompt = clean(answer(question))
                    failed_in_row = 0
                except AnswerError as error:
                    failed_in_row = failed_in_row + 1 if error.passing else 0
                    if error.ends_all or failed_in_row == 2:
                        raise
                    reason = str(error)
                if settings.use_cache and prompt is not None:
                    try:
                        write_cached(key, prompt, question, model)
                    except (OSError, RuntimeError) as error:
                        report(f"warning: the extended prompt is not kept for later runs: {error}")
                yield prompt, reason
                answered += 1
    except AnswerError as error:
        yield from [(None, str(error))] * (len(asks) - answered)


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
        prompt = json.loads((prompts_folder() / f"{key}.json").read_text("utf-8"))["prompt"]
        return prompt if clean(prompt) == prompt else None
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, AnswerError):
        return None


def write_cached(key: str, prompt: str, question: Question, model: str) -> None:
    """Keep a prompt, whole or not at all. OSError, or RuntimeError if the user has no home folder."""
    prompts_folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # private to the user
    kept = {"prompt": prompt, "original": question.text, "model": model}
    write_file(prompts_folder() / f"{key}.json", json.dumps(kept))
