"""`--ckpt_dir owner/name`: fetched with huggingface_hub, here from a small hub on 127.0.0.1."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import TESTS, checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXTRA = {"assets/large_video.mp4": b"not needed", "README.md": b"nor this"}


class Hub(ThreadingHTTPServer):
    """Serves one repository the way the hub's interface does: a listing, then files with their hash."""

    def __init__(self, folder: Path) -> None:
        self.contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.contents |= EXTRA
        self.served: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/owner/name/tree/{COMMIT}"):
            sizes = {name: len(content) for name, content in self.server.contents.items()}
            tree = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
            self.send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith("/api/models/owner/name"):
            listing = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.server.contents]}
            self.send(json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            content = self.server.contents[name]
            if body:
                self.server.served.append(name)
            etag = hashlib.sha256(content).hexdigest()
            self.send(content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(checkpoint("ti2v-5B"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def generate(hub: Hub, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the library reads the hub's address when it is imported."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home), "NO_PROXY": "127.0.0.1", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    command = [
        sys.executable, "generate.py", "--task", "ti2v-5B", "--ckpt_dir", "owner/name", "--size", "64*64",
        "--frame_num", "5", "--sample_steps", "1", "--prompt", "a cat", "--save_dir", str(home / "out"),
    ]  # fmt: skip
    return subprocess.run(
        [*command, *flags], capture_output=True, text=True, cwd=TESTS.parent, env=environment, check=False
    )


def test_only_what_the_task_needs_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    first = generate(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
    assert set(hub.served) == set(hub.contents) - set(EXTRA)
    hub.served.clear()
    again = generate(hub, tmp_path, "--dry_run", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert hub.served == []


def test_a_dry_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    run = generate(hub, tmp_path, "--dry_run")
    assert run.returncode == 2
    assert run.stderr.strip() == (
        "error: --ckpt_dir owner/name is not on this machine and was not fetched: "
        "it is fetched when a run starts, not for --dry_run"
    )
    assert hub.served == []


def test_an_unknown_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    run = generate(hub, tmp_path, "--ckpt_dir", "owner/other")
    assert run.returncode == 2
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("error: --ckpt_dir owner/other is not on this machine and was not fetched: ")
