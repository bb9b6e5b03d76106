"""Prompt extension by a service: DashScope through its SDK, or any endpoint that speaks OpenAI's chat protocol.

Both are callables `service(question) -> answer` inside a `with` block and share one way of trying again. Keys and
addresses are read from the environment and given with each call; nothing is written into a package's globals.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL.Image import Resampling

from wan.media.images import open_image
from wan.prompt_extension.answers import AnswerError, Question

DASHSCOPE_URL = "https://dashscope.aliyuncs.com/api/v1"
VARIABLES = {"dashscope": ("DASH_API_KEY", "DASH_API_URL"), "openai": ("OPENAI_API_KEY", "OPENAI_BASE_URL")}
LARGEST_SEED = 2**31  # what the services document; larger seeds are reduced
IMAGE_AREA = 512 * 512  # pixels; the original sends no more either


@dataclass(frozen=True)
class Patience:
    """How long one question is tried. Times in seconds."""

    attempts: int = 6
    first_wait: float = 1.0  # doubles with every attempt
    longest_wait: float = 20.0
    request: float = 60.0
    total: float = 180.0


PATIENCE = Patience()


class DashScope:
    """Alibaba's own service; answers `Question`s within a `with` block."""

    def __init__(self, model: str, seed: int) -> None:
        self.model = model
        self.seed = seed % LARGEST_SEED
        self.key = service_key("DASH_API_KEY")
        self.url = os.environ.get("DASH_API_URL") or DASHSCOPE_URL
        self.silence = logging.NullHandler()

    def __enter__(self) -> Self:
        # Without any handler the SDK's log of a failed request reaches stderr with a traceback.
        logging.getLogger("dashscope").addHandler(self.silence)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        logging.getLogger("dashscope").removeHandler(self.silence)

    def __call__(self, question: Question) -> str:
        return patiently(lambda seconds: self._request(question, seconds), secret=self.key)

    def _request(self, question: Question, seconds: float) -> str:
        import dashscope
        import requests  # a dependency of dashscope, which lets its exceptions through

        call = dashscope.Generation.call if question.image is None else dashscope.MultiModalConversation.call
        try:
            response: Any = call(
                model=self.model,
                messages=_dashscope_messages(question),
                seed=self.seed,
                result_format="message",
                api_key=self.key,
                base_address=self.url,
                request_timeout=seconds,
            )
        except requests.Timeout as error:
            raise no_answer_within(seconds) from error
        except requests.ConnectionError as error:
            raise no_connection(self.url) from error
        except (requests.RequestException, ValueError, TypeError) as error:  # TypeError: JSON of another shape
            raise AnswerError(f"the service's answer cannot be read ({type(error).__name__})") from error
        if response.status_code != 200:
            details = f"{response.code or 'no code'}: {response.message}, request id {response.request_id or 'none'}"
            raise refused(int(response.status_code), details, response.get("headers") or {})
        return text_of(response.output)


class OpenAICompatible:
    """Any server of the chat-completions protocol (OpenAI, vLLM, SGLang, ...); answers within a `with` block."""

    def __init__(self, model: str, seed: int) -> None:
        import openai

        self.model = model
        self.seed = seed % LARGEST_SEED
        self.key = service_key("OPENAI_API_KEY")
        self.client = openai.OpenAI(
            api_key=self.key or "none",  # a server of one's own may take any key, but the client insists on one
            base_url=os.environ.get("OPENAI_BASE_URL") or None,
            max_retries=0,  # `patiently` counts the attempts
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.client.close()

    def __call__(self, question: Question) -> str:
        return patiently(lambda seconds: self._request(question, seconds), secret=self.key)

    def _request(self, question: Question, seconds: float) -> str:
        import openai

        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=_openai_messages(question), seed=self.seed, timeout=seconds
            )
        except openai.APITimeoutError as error:
            raise no_answer_within(seconds) from error
        except openai.APIConnectionError as error:
            raise no_connection(str(self.client.base_url).rstrip("/")) from error
        except openai.APIStatusError as error:
            told = error.body.get("message") if isinstance(error.body, dict) else None
            raise refused(error.status_code, str(told or error.message), error.response.headers) from error
        except (openai.APIError, ValueError) as error:
            raise AnswerError(f"the service's answer cannot be read ({type(error).__name__})") from error
        return text_of(answer)


def service_problems(method: str, model: str | None) -> Iterator[str]:
    """What is wrong with a service's settings, a sentence each; nobody is asked, and the key is never shown."""
    try:
        import_module(method)  # both packages are called like their methods
    except ModuleNotFoundError as error:
        yield f"--prompt_extend_method {method} needs the package {error.name}: pip install '.[{method}]' or {method}"
    except ImportError as error:
        yield f"--prompt_extend_method {method}: the package cannot be imported: {error}"
    key_name, url_name = VARIABLES[method]
    key, url = service_key(key_name), os.environ.get(url_name, "")
    if method == "openai" and model is None:
        yield "--prompt_extend_method openai needs a model name: give one with --prompt_extend_model"
    if not key and (method == "dashscope" or not url):
        own = f", or the address of a server of your own in {url_name}" if method == "openai" else ""
        yield f"--prompt_extend_method {method} needs a key in the environment variable {key_name}{own}"
    if not (key.isascii() and key.isprintable()) or " " in key:
        yield f"the key in {key_name} holds characters that a key cannot have"
    if url and not url.startswith(("http://", "https://")):
        yield f"{url_name} must be an address that starts with http:// or https://, not {url!r}"


def service_key(variable: str) -> str:
    """The key in that environment variable, without the line end that a file may have left; "" if there is none."""
    return os.environ.get(variable, "").strip()


def patiently(ask: Callable[[float], str], secret: str) -> str:
    """The answer of `ask(seconds)`, tried again with growing waits while the failure may pass.

    Raises AnswerError, with the number of attempts and without the secret in its text.
    """
    end = time.monotonic() + PATIENCE.total
    for attempt in count(1):
        try:
            return _within(min(PATIENCE.request, end - time.monotonic()), ask)
        except AnswerError as error:
            wait = min(PATIENCE.first_wait * 2 ** (attempt - 1), PATIENCE.longest_wait) * random.uniform(0.75, 1.25)
            wait = max(wait, error.wait)
            if not error.passing or attempt == PATIENCE.attempts or time.monotonic() + wait >= end:
                reason = " ".join(str(error).split()) + (f" ({attempt} attempts)" if attempt > 1 else "")
                reason = reason.replace(secret, "***") if secret else reason
                raise AnswerError(reason, passing=error.passing, ends_all=error.ends_all) from None
        time.sleep(wait)
    raise AssertionError("count never ends")


def _within(seconds: float, ask: Callable[[float], str]) -> str:
    """`ask(seconds)`, given up after that time: the clients' own limits count from byte to byte, so that a server
    which sends one now and then would hold the run for ever. The abandoned thread ends with the process.
    """
    outcome: Future[str] = Future()

    def work() -> None:
        try:
            outcome.set_result(ask(seconds))
        except Exception as error:  # noqa: BLE001 - carried over to the waiting thread, which raises it
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return outcome.result(timeout=seconds + 0.5)  # the client's own message first, where it has one
    except TimeoutError as error:
        raise no_answer_within(seconds) from error


def no_answer_within(seconds: float) -> AnswerError:
    return AnswerError(f"no answer within {seconds:.3g} s", passing=True)


def no_connection(url: str) -> AnswerError:
    return AnswerError(f"no connection to {url}", passing=True)


def refused(status: int, details: str, headers: Mapping[str, str]) -> AnswerError:
    """What an HTTP status means: 408, 409, 429 and 5xx may pass; 401, 403, 404 (key, model) hold for every question."""
    seconds = headers.get("Retry-After", headers.get("retry-after", ""))
    return AnswerError(
        f"the service answered {status} ({details})",
        passing=status in (408, 409, 429) or status >= 500,
        ends_all=status in (401, 403, 404),
        wait=float(seconds) if seconds.isdecimal() else 0.0,
    )


def text_of(answer: Any) -> str:
    """The text of the first choice; a multimodal one comes in parts.

    Neither package holds what a broken server sent against its own types, so every step may fail: AnswerError.
    """
    try:
        content = answer.choices[0].message.content
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise AnswerError("the service's answer holds no text") from error
    if not isinstance(text, str):
        raise AnswerError("the service's answer holds no text")
    return text


def _dashscope_messages(question: Question) -> list[Any]:
    if question.image is None:
        return [{"role": "system", "content": question.system}, {"role": "user", "content": question.text}]
    parts = [{"text": never_a_file(question.text)}, {"image": data_uri(question.image)}]
    return [{"role": "system", "content": [{"text": question.system}]}, {"role": "user", "content": parts}]


def _openai_messages(question: Question) -> list[Any]:
    content: Any = question.text
    if question.image is not None:
        picture = {"type": "image_url", "image_url": {"url": data_uri(question.image)}}
        content = [picture, {"type": "text", "text": question.text}]
    return [{"role": "system", "content": question.system}, {"role": "user", "content": content}]


def never_a_file(text: str) -> str:
    """The text, spelt so that the SDK does not take it for a file: it would upload any local file that a prompt
    names (a path, `~` or `file://`).
    """
    while text.startswith(("file://", "oss://", "~")) or os.path.isfile(text):
        text = " " + text
    return text


def data_uri(path: Path) -> str:
    """The image as a PNG within the request: RGB, at most `IMAGE_AREA` pixels, aspect kept."""
    image = open_image(path)
    scale = (IMAGE_AREA / (image.width * image.height)) ** 0.5
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
