"""Prompt extension by a language model on this machine: loaded once, asked for every prompt, then freed."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from wan.media.images import open_image
from wan.prompt_extension.answers import REASONING_CLOSES, REASONING_OPENS, AnswerError, Question
from wan.utils.errors import first_line

MAX_ANSWER_TOKENS = 512  # the original's limit; the video model's text encoder reads no more either
REASONING_TOKENS = 4096  # before the answer, of a model that reasons
# Area limits of the image as the vision model sees it, in pixels: 256 to 1280 patches of 28x28, as in the original.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1280 * 28 * 28


class LocalQwen:
    """A text or vision-language chat model from a folder or the hub; answers `Question`s within a `with` block.
    bfloat16 on an accelerator (device "auto": spread over what fits), float32 on a CPU."""

    def __init__(self, model: str, seed: int, device: str) -> None:
        self.name, self.seed, self.device = model, seed, device
        self.model: Any = None
        self.tokenizer: Any = None
        self.image_processor: Any = None  # None: a model that reads text only

    def __enter__(self) -> Self:
        try:
            self._load()
        except Exception as error:  # of a damaged or unknown model the libraries raise whatever they trip over
            self.__exit__()
            raise AnswerError(f"{self.name} cannot be loaded: {first_line(error)}", ends_all=True) from error
        return self

    def __exit__(self, *error: object) -> None:
        from wan.utils.accelerator import free_memory

        self.model = self.tokenizer = self.image_processor = None
        free_memory()

    def __call__(self, question: Question) -> str:
        """The answer, after the tag with which the model's template opens its reasoning. AnswerError."""
        import torch

        if question.image is not None and self.image_processor is None:
            raise AnswerError(f"{self.name} reads no images; name a vision model with --prompt_extend_model")
        try:
            text = self._templated(question)
            opens = [match.end() for match in REASONING_OPENS.finditer(text)]
            opened = bool(opens) and not REASONING_CLOSES.search(text, opens[-1])
            reasons = REASONING_OPENS.search(str(self.tokenizer.chat_template)) and (opened or not opens)
            limit = MAX_ANSWER_TOKENS + (REASONING_TOKENS if reasons else 0)
            inputs = self._inputs(text, question).to(self.model.device)
            # The same seed for every prompt: an answer does not depend on what was asked before it.
            with torch.inference_mode(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(self.seed)
                tokens = self.model.generate(**inputs, max_new_tokens=limit)[0, inputs["input_ids"].shape[1] :]
            answer: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        except Exception as error:  # out of memory, a refused image, a broken template, parts that do not fit
            raise AnswerError(f"{self.name} failed: {first_line(error)}") from error
        ends = self.model.generation_config.eos_token_id
        if len(tokens) >= limit and tokens[-1].item() not in (ends if isinstance(ends, list) else [ends]):
            raise AnswerError(f"the answer was cut off at {limit} tokens")
        return f"<think>{answer}" if opened else answer

    def _load(self) -> None:
        import torch
        import transformers
        from transformers.utils.hub import cached_file

        own_code: dict[str, Any] = {"trust_remote_code": False}  # never run, and no question on the terminal
        options: dict[str, Any] = {"dtype": torch.float32}
        if self.device != "cpu" and (self.device != "auto" or torch.accelerator.is_available()):
            options = {"dtype": torch.bfloat16, "device_map": "auto" if self.device == "auto" else {"": self.device}}
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # without a network each attempt would be a line
        try:
            sees = hasattr(transformers.AutoConfig.from_pretrained(self.name, **own_code), "vision_config")
            auto_class = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            loaded: Any = auto_class.from_pretrained(self.name, output_loading_info=True, **options, **own_code)
            self.model = loaded[0].eval()
            if missing := loaded[1]["missing_keys"]:
                raise ValueError(f"{len(missing)} weights are missing, first {min(missing)}")
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, **own_code)
            if sees:
                self.image_processor = transformers.AutoImageProcessor.from_pretrained(
                    self.name, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, **own_code
                )
            if self.tokenizer.chat_template is None:  # some releases keep it in a file of its own
                template = Path(str(cached_file(self.name, "chat_template.json"))).read_text("utf-8")
                self.tokenizer.chat_template = json.loads(template)["chat_template"]
        finally:
            logging.disable(disabled)

    def _templated(self, question: Question) -> str:
        """The chat as the model reads it; a template that refuses instructions gets them in the user's turn."""
        text: Any = question.text
        merged: Any = f"{question.system}\n\n{text}"
        if question.image is not None:
            text = [{"type": "image"}, {"type": "text", "text": question.text}]
            merged = [{"type": "text", "text": f"{question.system}\n\n"}, *text]
        system = {"role": "system", "content": question.system}
        for chat in ([system, {"role": "user", "content": text}], [{"role": "user", "content": merged}]):
            try:  # enable_thinking is read by templates of models that reason on demand
                settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
                return str(self.tokenizer.apply_chat_template(chat, **settings))
            except Exception as error:  # noqa: BLE001 - a template may raise anything
                failure = error
        raise ValueError(f"its chat template cannot be used: {first_line(failure)}") from failure

    def _inputs(self, text: str, question: Question) -> Any:
        """The model's arguments. The image token is repeated once per merged patch, and its positions are marked. Not
        by transformers' AutoProcessor, which for these models cannot be built without torchvision."""
        if question.image is None:
            return self.tokenizer([text], return_tensors="pt", add_special_tokens=False)
        pixels = self.image_processor(images=[open_image(question.image)], return_tensors="pt")
        if "image_grid_thw" not in pixels:
            raise ValueError("its image processor is not of the Qwen family; name another with --prompt_extend_model")
        token_id = self.model.config.image_token_id
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        patches = int(pixels["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        inputs = self.tokenizer([text.replace(token, token * patches)], return_tensors="pt", add_special_tokens=False)
        inputs.update(pixels)
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from transformers 5 on
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == token_id).long()
        return inputs


def local_problems(model: str | None) -> Iterator[str]:
    """Problems known before anything is loaded, a sentence each; a hub id is only tried when it is opened."""
    for package in ("torch", "transformers", "accelerate"):
        if find_spec(package) is None:
            yield f"--prompt_extend_method local_qwen needs the package {package}: pip install {package}"
    folder = Path(model or "").expanduser()
    if model is not None and (folder.is_absolute() or model.startswith(".")) and not folder.exists():
        yield f"--prompt_extend_model {model}: there is no such folder"
    elif model is not None and folder.exists() and not (folder / "config.json").is_file():
        yield f"--prompt_extend_model {model}: the folder holds no model (config.json is missing)"
