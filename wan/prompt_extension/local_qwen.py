"""Prompt extension by a Qwen model on this machine: loaded once, asked for every prompt, then freed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wan.media.images import open_image
from wan.prompt_extension.answers import AnswerError, Question
from wan.utils.errors import first_line

MAX_ANSWER_TOKENS = 512  # the original's limit; the video model's text encoder reads no more either
# Area limits of the image as the vision model sees it, in pixels: 256 to 1280 patches of 28x28, as in the original.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1280 * 28 * 28


class LocalQwen:
    """A text or vision-language chat model from a folder or the hub; answers `Question`s within a `with` block.

    bfloat16 on an accelerator (device "auto": spread over what fits), float32 on a CPU.
    """

    def __init__(self, model: str, seed: int, device: str) -> None:
        self.name = model
        self.seed = seed
        self.device = device
        self.model: Any = None
        self.tokenizer: Any = None
        self.image_processor: Any = None  # None: a model that reads text only

    def __enter__(self) -> Self:
        from huggingface_hub.errors import StrictDataclassError  # a config whose values contradict each other
        from safetensors import SafetensorError  # a damaged weight file

        expected = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
        try:
            self._load()
        except expected as error:
            self._free()
            raise AnswerError(f"{self.name} cannot be loaded: {first_line(error)}", ends_all=True) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._free()

    def __call__(self, question: Question) -> str:
        import torch

        if question.image is not None and self.image_processor is None:
            raise AnswerError(f"{self.name} reads no images; name a vision model with --prompt_extend_model")
        try:
            inputs = self._inputs(question).to(self.model.device)
            # The same seed for every prompt: an answer does not depend on what was asked before it.
            with torch.inference_mode(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(self.seed)
                tokens = self.model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS)
        except (RuntimeError, ValueError) as error:  # out of memory, or an image the processor refuses
            raise AnswerError(f"{self.name} failed: {first_line(error)}") from error
        answer: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    def _load(self) -> None:
        import torch
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
        )

        on_cpu = self.device == "cpu" or (self.device == "auto" and not torch.accelerator.is_available())
        placement: dict[str, Any] = {"dtype": torch.float32}
        if not on_cpu:
            device_map = "auto" if self.device == "auto" else {"": self.device}
            placement = {"dtype": torch.bfloat16, "device_map": device_map}
        sees = hasattr(AutoConfig.from_pretrained(self.name), "vision_config")
        auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        loaded: Any = auto_class.from_pretrained(self.name, output_loading_info=True, **placement)
        self.model, found = loaded
        if found["missing_keys"]:
            raise ValueError(f"{len(found['missing_keys'])} weights are missing, first {min(found['missing_keys'])}")
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        if sees:
            self.image_processor = AutoImageProcessor.from_pretrained(
                self.name, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
            )
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = _template_file(self.name)

    def _inputs(self, question: Question) -> Any:
        """The model's arguments for one question.

        The image half is done here and not by transformers' AutoProcessor, which for these models cannot be built
        without torchvision (its video half needs it): the one image token of the templated text is repeated once per
        merged patch, and its positions are marked where the model asks for that.
        """
        content: Any = question.text
        if question.image is not None:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
        messages = [{"role": "system", "content": question.system}, {"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # read by templates of models that would think longer than they may answer
        )
        if question.image is None:
            return self.tokenizer([text], return_tensors="pt", add_special_tokens=False)

        pixels = self.image_processor(images=[open_image(question.image)], return_tensors="pt")
        token_id = self.model.config.image_token_id
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        patches = int(pixels["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        if text.count(token) != 1:
            raise ValueError(f"its chat template places {text.count(token)} image tokens for one image")
        inputs = self.tokenizer([text.replace(token, token * patches)], return_tensors="pt", add_special_tokens=False)
        inputs.update(pixels)
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from transformers 5 on
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == token_id).long()
        return inputs

    def _free(self) -> None:
        from wan.utils.accelerator import free_memory

        self.model = self.tokenizer = self.image_processor = None
        free_memory()


def local_problems(model: str | None) -> Iterator[str]:
    """What is wrong before anything is loaded, a sentence each; a hub id is only tried when it is opened."""
    for package in ("torch", "transformers", "accelerate"):
        if find_spec(package) is None:
            yield f"--prompt_extend_method local_qwen needs the package {package}: pip install {package}"
    folder = Path(model or "").expanduser()
    if model is not None and (folder.is_absolute() or model.startswith(".")) and not folder.exists():
        yield f"--prompt_extend_model {model}: there is no such folder"
    elif model is not None and folder.exists() and not (folder / "config.json").is_file():
        yield f"--prompt_extend_model {model}: the folder holds no model (config.json is missing)"


def _template_file(model: str) -> str:
    """The chat template that some releases keep in a file of its own. Raises OSError if there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(model, "chat_template.json")
    template: str = json.loads(Path(str(path)).read_text("utf-8"))["chat_template"]
    return template
