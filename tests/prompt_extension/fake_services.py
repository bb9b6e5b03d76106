"""Small HTTP servers on 127.0.0.1 that answer as DashScope and as an OpenAI-compatible server do.

with FakeService() as service:
    service.plan = [(429, {"code": "Throttling"}), None]    # first a refusal, then the usual answer
    ...
    service.requests[-1].json                               # what the client sent
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from PIL import Image

DASHSCOPE_CHAT = "/compatible-mode/v1/chat/completions"
OPENAI_CHAT = "/api/v1/chat/completions"
DASHSCOPE_TEXT = "/api/v1/services/aigc/text-generation/generation"
DASHSCOPE_IMAGE = "/api/v1/services/aigc/multimodal-generation/generation"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    json: Any


@dataclass
class FakeService:
    """`answer` is the usual text, or a function of the request's body.

    `plan` holds what the next requests get: (status, body) or (status, body, headers); None is the usual answer,
    a number a delay in seconds before it, "drip" a byte every tenth of a second, "drip headers" those too, "drop" a
    closed connection.
    """

    answer: str | Callable[[Any], str] = "An extended prompt."
    plan: list[Any] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v1"
        self.chat_url = f"http://127.0.0.1:{self.server.server_port}/compatible-mode/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def usual(self, request: Request) -> dict[str, Any]:
        text = self.answer if isinstance(self.answer, str) else self.answer(request.json)
        if request.path in (DASHSCOPE_TEXT, DASHSCOPE_IMAGE):
            content = [{"text": text}] if request.path == DASHSCOPE_IMAGE else text
            choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}
            return {"request_id": "r-1", "usage": {}, "output": {"choices": [choice]}}
        choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
        return {"id": "c-1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.record(b"")
            self.reply(404, {"code": "NotFound", "message": self.path})

        def do_POST(self) -> None:
            request = self.record(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            step = service.plan.pop(0) if service.plan else None
            if step in ("drip", "drip headers"):
                return self.drip(headers=step == "drip headers")
            if step == "drop":
                self.close_connection = True
                return None
            if isinstance(step, float):
                time.sleep(step)
            if isinstance(step, tuple):
                return self.reply(*step)
            if request.path not in (DASHSCOPE_CHAT, OPENAI_CHAT, DASHSCOPE_TEXT, DASHSCOPE_IMAGE):
                return self.reply(404, {"code": "NotFound", "message": self.path})
            return self.reply(200, service.usual(request))

        def record(self, body: bytes) -> Request:
            headers = {name.lower(): value for name, value in self.headers.items()}
            is_json = headers.get("content-type", "").startswith("application/json")
            request = Request(self.command, self.path.split("?")[0], headers, json.loads(body) if is_json else None)
            service.requests.append(request)
            return request

        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
                self.send_header("Content-Length", str(len(raw)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)
            except ConnectionError:
                self.close_connection = True  # the client gave up, as the tests of timeouts want

        def drip(self, *, headers: bool) -> None:
            self.close_connection = True
            if headers:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            else:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "1000")
                self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x" if headers else b" ")
                    self.wfile.flush()
                    time.sleep(0.1)
            except ConnectionError:
                return

    return Handler


def sent_image(request: Request) -> Image.Image:
    """The picture inside a request's data URI."""
    for part in request.json["messages"][1]["content"]:
        if uri := part.get("image_url", {}).get("url"):
            kind, data = uri.split(",", 1)
            assert kind == "data:image/png;base64"
            return Image.open(io.BytesIO(base64.b64decode(data)))
    raise AssertionError("the request carries no image")
