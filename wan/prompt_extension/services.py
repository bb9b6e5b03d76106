"""Prompt extension by a service: DashScope, OpenAI, or a server of one's own that speaks OpenAI's chat protocol.

DashScope's own protocol is used where DASH_API_URL ends with /api/v1, as in the original. One POST per question,
without the services' own packages: those read an answer of any size, and follow a file's name in a prompt. Keys and
addresses come from the environment."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from PIL.Image import Resampling

from wan.media.images import open_image
from wan.prompt_extension.answers import AnswerError, Question, printable
from wan.utils.errors import first_line

if TYPE_CHECKING:
    import httpx

SEEDS_OF_SERVICES = 2**31  # what the services document; larger seeds are reduced
IMAGE_AREA = 512 * 512  # pixels; the original sends no more either
MOST_BYTES = 1 << 20  # of an answer, unpacked
OWN_FIELDS = ("model", "messages", "stream", "n")  # of a request; options may set any other
NO_TEXT = "the service's answer holds no text"
BROKEN_OFF = ("length", "content_filter", "error", "tool_calls", "function_call")  # as a finish_reason


class Service(NamedTuple):
    """Environment variables with its key and its address; the address where that variable is not set."""

    keys: tuple[str, ...]
    address: str
    url: str

    @property
    def key(self) -> str:
        """Without the line end that a file may have left; "" if there is none."""
        return next(filter(None, (os.environ.get(variable, "").strip() for variable in self.keys)), "")


SERVICES = {
    "dashscope": Service(("DASH_API_KEY", "DASHSCOPE_API_KEY"), "DASH_API_URL",
                         "https://dashscope.aliyuncs.com/compatible-mode/v1"),
    "openai": Service(("OPENAI_API_KEY",), "OPENAI_BASE_URL", "https://api.openai.com/v1"),
}  # fmt: skip


class Patience(NamedTuple):
    """Limits for one question. Times in seconds."""

    attempts: int = 6
    first_wait: float = 1.0  # doubles with every attempt
    longest_wait: float = 20.0
    request: float = 60.0
    total: float = 180.0


PATIENCE = Patience()


class ChatService:
    """Answers `Question`s by a request each."""

    def __init__(self, method: str, model: str, seed: int, options: Mapping[str, Any] | None = None) -> None:
        """options: further fields of the request, or others instead of the seed; None leaves a field out."""
        service = SERVICES[method]
        self.model, self.seed, self.options = model, seed % SEEDS_OF_SERVICES, dict(options or {})
        self.key = service.key
        url = (os.environ.get(service.address) or service.url).rstrip("/")
        self.native = method == "dashscope" and url.endswith("/api/v1")
        parts = urlsplit(url)
        self.url = shown(url)
        self.auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None

    def __call__(self, question: Question) -> str:
        """The answer, asked for again with growing waits while the failure may pass. Neither the answer nor the reason
        in an AnswerError holds a secret."""
        end, attempt = time.monotonic() + PATIENCE.total, 0
        while True:
            attempt += 1
            try:
                return self._hide_secrets(self._request(question, min(PATIENCE.request, end - time.monotonic())))
            except AnswerError as error:
                usual = min(PATIENCE.first_wait * 2 ** (attempt - 1), PATIENCE.longest_wait)
                wait = max(usual * random.uniform(0.75, 1.25), error.wait)
                if not error.passing or attempt == PATIENCE.attempts or time.monotonic() + wait >= end:
                    reason = self._hide_secrets(" ".join(str(error).split()))
                    reason += f" ({attempt} attempts)" if attempt > 1 else ""
                    raise AnswerError(reason, passing=error.passing, ends_all=error.ends_all) from None
            time.sleep(wait)

    def _hide_secrets(self, text: str) -> str:
        for secret in filter(None, (self.key, self.auth and self.auth[1])):
            text = text.replace(secret, "***")
        return text

    def _request(self, question: Question, seconds: float) -> str:
        import httpx

        try:
            client = httpx.Client(auth=self.auth, timeout=seconds, follow_redirects=True)
        except Exception as error:  # a proxy variable that the client cannot use raises whatever it trips over
            kind = type(error).__name__  # its text may hold a password
            raise AnswerError(f"a proxy variable of the environment cannot be used ({kind})", ends_all=True) from error
        body, end = bytearray(), time.monotonic() + seconds
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        alarm = threading.Timer(seconds, client.close)  # the client's own limit counts from byte to byte
        alarm.daemon = True
        alarm.start()
        try:
            path, content = self._path_and_content(question)
            data = json.dumps(content).encode()
            with client, client.stream("POST", self.url + path, content=data, headers=headers) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        break
        except Exception as error:  # the client raises many kinds on a malformed answer
            if time.monotonic() >= end or isinstance(error, httpx.TimeoutException):
                raise AnswerError(f"no answer within {seconds:.3g} s", passing=True) from error
            if isinstance(error, httpx.TransportError):
                raise AnswerError(f"no connection to {self.url}", passing=True) from error
            raise AnswerError(f"the service's answer cannot be read ({first_line(error)})") from error
        finally:
            alarm.cancel()
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            values = None
        if response.status_code != 200:
            raise refused(response, _error_in(values) or response.reason_phrase)
        if len(body) > MOST_BYTES:
            raise AnswerError("the service's answer is larger than 1 MB")
        if values is None:
            raise AnswerError(f"the service's answer cannot be read: it is not JSON; is {self.url} its address?")
        return text_of(values.get("output") or values if self.native and isinstance(values, dict) else values)

    def _path_and_content(self, question: Question) -> tuple[str, dict[str, Any]]:
        fields = {name: value for name, value in ({"seed": self.seed} | self.options).items() if value is not None}
        kind, system, user = "text-generation", cast(Any, question.system), cast(Any, question.text)
        if question.image is not None:
            picture = data_uri(question.image)
            if self.native:
                kind, system, user = "multimodal-generation", [{"text": system}], [{"image": picture}, {"text": user}]
            else:
                user = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": user}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if not self.native:
            return "/chat/completions", {"model": self.model, "messages": messages} | fields
        asked = {"input": {"messages": messages}, "parameters": {"result_format": "message"} | fields}
        return f"/services/aigc/{kind}/generation", {"model": self.model, **asked}


def service_problems(method: str, model: str | None) -> Iterator[str]:
    """Problems known before anything is asked, a sentence each."""
    service = SERVICES[method]
    key, url = service.key, os.environ.get(service.address, "")
    if method == "openai" and model is None:
        yield "--prompt_extend_method openai needs a model name: give one with --prompt_extend_model"
    if not key and (method == "dashscope" or not url):
        own = f", or the address of a server of your own in {service.address}" if method == "openai" else ""
        variables = " or ".join(service.keys)
        yield f"--prompt_extend_method {method} needs a key in the environment variable {variables}{own}"
    if not (key.isascii() and key.isprintable()) or " " in key:
        yield f"the key in {service.keys[0]} holds characters that a key cannot have"
    if url and not url.startswith(("http://", "https://")):
        yield f"{service.address} must be an address that starts with http:// or https://, not {shown(url)!r}"


def shown(url: str) -> str:
    """An address without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def refused(response: httpx.Response, details: str) -> AnswerError:
    """The meaning of an HTTP status: 408, 409, 429 and 5xx may pass; key, credit and model hold for every question."""
    status, retry_after, wait = response.status_code, response.headers.get("Retry-After", ""), 0.0
    no_credit = status == 402 or "quota" in details
    with suppress(ValueError, TypeError):  # a date, seconds or nothing
        wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
    with suppress(ValueError):
        wait = float(retry_after)
    return AnswerError(
        f"the service answered {status} ({details})",
        passing=(status in (408, 409, 429) or status >= 500) and not no_credit,
        ends_all=status in (401, 403, 404) or no_credit,
        wait=wait,
    )


def _error_in(values: Any) -> str:  # of any layout, in one line; "" if there is none
    while isinstance(values, (dict, list)) and values:
        names = ("error", "detail", "message", "msg")
        inner = [values.get(name) for name in names] if isinstance(values, dict) else values
        values = next(filter(None, inner), None)
    return " ".join(printable(values).split())[:300] if isinstance(values, str) else ""


def text_of(values: Any) -> str:
    """The text of the first choice. AnswerError for one that is cut, refused, filtered or not there."""
    try:
        choice = values["choices"][0]
        refusal, content = choice["message"].get("refusal"), choice["message"].get("content")
        finish, error = choice.get("finish_reason"), _error_in(choice.get("error"))
    except (TypeError, LookupError, AttributeError):  # of another layout
        reason = _error_in(values)
        raise AnswerError(f"the service answered with an error ({reason})" if reason else NO_TEXT) from None
    if refusal:
        raise AnswerError(f"the model refused ({_error_in(refusal)})")
    if finish in BROKEN_OFF:
        raise AnswerError(f"the answer was broken off ({finish}{': ' if error else ''}{error})")
    if isinstance(content, list):  # a multimodal one comes in parts
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) or not content.strip():
        raise AnswerError(NO_TEXT)
    return content


def data_uri(path: Path) -> str:
    """The image as a PNG within the request: RGB, at most `IMAGE_AREA` pixels, aspect kept."""
    image = open_image(path)
    if (scale := (IMAGE_AREA / (image.width * image.height)) ** 0.5) < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
