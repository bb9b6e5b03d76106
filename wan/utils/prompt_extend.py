"""The original's prompt expanders, for scripts written for it."""

from __future__ import annotations

import json
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wan.prompt_extension import LANGUAGES
from wan.prompt_extension.answers import AnswerError, Question, clean, neutralise
from wan.prompt_extension.extend import NO_WORDS, model_for
from wan.prompt_extension.extend import system_prompt as system_prompt_for
from wan.prompt_extension.local_qwen import LocalQwen, local_problems
from wan.prompt_extension.services import SEEDS_OF_SERVICES, ChatService, service_problems
from wan.utils.errors import InputError


@dataclass
class PromptOutput:
    """The outcome for a prompt. status False: `prompt` is the user's own, and `message` says why."""

    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str


class _Expander:
    answer: ChatService | LocalQwen
    is_vl: bool

    def __call__(
        self, prompt: str, system_prompt: str | None = None, tar_lang: str = "zh",
        image: Image.Image | str | Path | None = None, seed: int = -1, **unused: object,
    ) -> PromptOutput:  # fmt: skip
        """The extended prompt in `tar_lang`. image: looked at by an expander made with `is_vl`, else ignored.
        system_prompt: None takes the one for the language, words and image. seed: a negative one is drawn."""
        if tar_lang not in LANGUAGES:
            raise InputError(f"tar_lang {tar_lang!r} is unknown; use one of {', '.join(LANGUAGES)}")
        seed = secrets.randbelow(SEEDS_OF_SERVICES) if seed < 0 else seed
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(image) if self.is_vl and isinstance(image, (str, Path)) and image else None
            if self.is_vl and isinstance(image, Image.Image):
                picture = Path(folder, "image.png")  # the models read a file
                image.save(picture)
            words, has_image = prompt.strip(), picture is not None
            system = system_prompt or system_prompt_for(tar_lang, has_image=has_image, has_words=bool(words))
            self.answer.seed = seed % SEEDS_OF_SERVICES
            try:
                extended = clean(self.ask(Question(system, neutralise(words) or NO_WORDS[tar_lang], picture)))
            except AnswerError as error:
                return PromptOutput(False, prompt, seed, system, str(error))
        return PromptOutput(True, extended, seed, system, json.dumps({"content": extended}, ensure_ascii=False))

    def ask(self, question: Question) -> str:
        return self.answer(question)


class DashScopePromptExpander(_Expander):
    """Asks Alibaba's service; the key is `api_key` or the environment's DASH_API_KEY."""

    def __init__(
        self, api_key: str | None = None, model_name: str | None = None, task: str = "t2v-A14B", is_vl: bool = False,
        **unused: object,
    ) -> None:  # fmt: skip
        """is_vl: a model that looks at images. task, unused: arguments of the original without effect. InputError."""
        if problems := [] if api_key else list(service_problems("dashscope", model_name)):
            raise InputError(problems)
        self.is_vl = is_vl
        self.answer = ChatService("dashscope", model_for("dashscope", model_name, has_image=is_vl), seed=0)
        self.answer.key = api_key or self.answer.key


class QwenPromptExpander(_Expander):
    """Asks a Qwen model on this machine. It is loaded once and waits in host memory between two calls."""

    answer: LocalQwen

    def __init__(
        self, model_name: str | None = None, task: str = "t2v-A14B", device: int | str | torch.device = 0,
        is_vl: bool = False, **unused: object,
    ) -> None:  # fmt: skip
        """As above. device: a number is that of a GPU; without one the CPU serves. InputError."""
        if problems := list(local_problems(model_name)):
            raise InputError(problems)
        numbered = f"cuda:{device}" if torch.cuda.is_available() else "cpu"
        self.device = numbered if isinstance(device, int) else str(device)
        self.is_vl = is_vl
        self.answer = LocalQwen(model_for("local_qwen", model_name, has_image=is_vl), 0, self.device)
        try:
            self.answer.__enter__().model.to("cpu")
        except AnswerError as error:
            raise InputError(str(error)) from error

    def ask(self, question: Question) -> str:
        model: Any = self.answer.model
        model.to(self.device)
        try:
            return self.answer(question)
        finally:
            model.to("cpu")
