"""The original's prompt expanders, for scripts written for it."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from wan.prompt_extension import LANGUAGES
from wan.prompt_extension.answers import AnswerError, Question, clean, neutralise
from wan.prompt_extension.extend import model_for
from wan.prompt_extension.local_qwen import LocalQwen, local_problems
from wan.prompt_extension.services import LARGEST_SEED, DashScope, service_problems
from wan.prompt_extension.system_prompts import NO_WORDS
from wan.prompt_extension.system_prompts import system_prompt as system_prompt_for
from wan.utils.accelerator import gpu_or_cpu
from wan.utils.errors import InputError


@dataclass
class PromptOutput:
    """What became of a prompt. status False: `prompt` is the user's own, and `message` says why."""

    status: bool
    prompt: str
    seed: int
    system_prompt: str
    message: str


class _Expander:
    """What both have in common: one call, one question, one outcome."""

    def __init__(self, answer: DashScope | LocalQwen, is_vl: bool) -> None:
        self.answer = answer
        self.is_vl = is_vl

    def __call__(
        self,
        prompt: str,
        system_prompt: str | None = None,
        tar_lang: str = "zh",
        image: Image.Image | str | Path | None = None,
        seed: int = -1,
        **unused: object,
    ) -> PromptOutput:
        """The extended prompt in `tar_lang`. image: looked at by an expander made with `is_vl`, else ignored.

        system_prompt: None takes that of the language and of what is given. seed: a negative one is drawn.
        """
        if tar_lang not in LANGUAGES:
            raise InputError(f"tar_lang {tar_lang!r} is unknown; use one of {', '.join(LANGUAGES)}")
        seed = secrets.randbelow(LARGEST_SEED) if seed < 0 else seed
        with tempfile.TemporaryDirectory() as folder:
            picture = _as_file(image, Path(folder)) if self.is_vl else None
            words = neutralise(prompt.strip()) or NO_WORDS[tar_lang]
            system = system_prompt or system_prompt_for(
                tar_lang, has_image=picture is not None, has_words=bool(prompt.strip())
            )
            try:
                told = self._ask(Question(system, words, picture), seed)
                return PromptOutput(True, clean(told), seed, system, json.dumps({"content": told}, ensure_ascii=False))
            except AnswerError as error:
                return PromptOutput(False, prompt, seed, system, str(error))

    def _ask(self, question: Question, seed: int) -> str:
        self.answer.seed = seed % LARGEST_SEED
        return self.answer(question)


class DashScopePromptExpander(_Expander):
    """Asks Alibaba's service; the key is `api_key` or the environment's DASH_API_KEY."""

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        task: str = "t2v-A14B",
        is_vl: bool = False,
        **unused: object,
    ) -> None:
        """is_vl: a model that looks at images. task, unused: what else the original takes; the instructions follow from
        `is_vl`, and how long is tried does not depend on the caller. InputError for what is missing."""
        if problems := [] if api_key else list(service_problems("dashscope", model_name)):
            raise InputError(problems)
        service = DashScope(model_for("dashscope", model_name, has_image=is_vl), seed=0)
        service.key = api_key or service.key
        super().__init__(service, is_vl)

    def _ask(self, question: Question, seed: int) -> str:
        with self.answer:
            return super()._ask(question, seed)


class QwenPromptExpander(_Expander):
    """Asks a Qwen model on this machine. It is loaded once and waits in host memory between two calls."""

    def __init__(
        self,
        model_name: str | None = None,
        task: str = "t2v-A14B",
        device: int | str | torch.device = 0,
        is_vl: bool = False,
        **unused: object,
    ) -> None:
        """As above. device: a number is that of a GPU; without one the CPU serves. InputError."""
        if problems := list(local_problems(model_name)):
            raise InputError(problems)
        self.device = gpu_or_cpu(device) if isinstance(device, int) else str(device)
        model = LocalQwen(model_for("local_qwen", model_name, has_image=is_vl), 0, self.device)
        try:
            model.__enter__().model.to("cpu")
        except AnswerError as error:
            raise InputError(str(error)) from error
        super().__init__(model, is_vl)
        self.move: Callable[[str], object] = model.model.to

    def _ask(self, question: Question, seed: int) -> str:
        self.move(self.device)
        try:
            return super()._ask(question, seed)
        finally:
            self.move("cpu")


def _as_file(image: Image.Image | str | Path | None, folder: Path) -> Path | None:
    """The image as a file: the services read one."""
    if not isinstance(image, Image.Image):
        return Path(image) if image else None
    image.save(folder / "image.png")
    return folder / "image.png"
