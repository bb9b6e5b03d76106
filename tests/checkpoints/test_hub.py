"""Weights by their place on the hub, `owner/name[@revision][/path]`: here from a small hub on 127.0.0.1."""

import hashlib
import json
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
import torch

from benchmarks.sparse import sparse
from generate import main
from lightning.__main__ import main as lightning
from tests.forked import python
from tests.support import TESTS, checkpoint, lora_dir, manifest, read_frames
from wan.checkpoints.hub import WEIGHT_SUFFIXES
from wan.checkpoints.safetensors_file import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes that it is compared with

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXTRA = {
    "assets/large_video.mp4": b"not needed",
    "README.md": b"nor this",
    "google/umt5-xxl/tokenizer_config.json": b"{}",
}
SEKO = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
SMALL = ("--size", "64*64", "--frame_num", "5", "--prompt", "a cat", "--device", "cpu")
TI2V = ("--task", "ti2v-5B", "--ckpt_dir", "owner/name", "--sample_steps", "1")
T2V = ("--task", "t2v-A14B", "--ckpt_dir", "owner/a14b@v1", "--sample_steps", "2")
HERE = ("--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")))


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories the way the hub's interface does: facts, listings, files or parts of them."""

    def __init__(self, **folders: Path) -> None:
        self.repositories = {
            f"owner/{name}": {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
            for name, folder in folders.items()
        }
        self.served: dict[str, int] = {}  # bytes by file
        self.asked: dict[str, int] = {}  # requests by method and path
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def bytes(self) -> int:
        return sum(self.served.values())


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        repository = self.repository()
        if repository:
            self.send_json([entry for entry in self.tree(repository) if entry["path"] in asked["paths"]])

    def repository(self) -> str | None:
        parts = unquote(self.path.partition("?")[0]).removeprefix("/api/models").strip("/").split("/")
        name, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        if name in self.server.repositories and revision in ("main", "v1", COMMIT):
            return name
        self.send_error(404)
        return None

    def answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        repository = self.repository()
        if repository is None:
            return
        fault, is_file = repository.removeprefix("owner/"), "/resolve/" in path
        request = f"{self.command} {path}"
        asked = self.server.asked[request] = self.server.asked.get(request, 0) + 1
        if fault == "page":
            self.send(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        elif fault == "busy" and asked == 1:
            self.send(503 if is_file else 429, {"Retry-After": "0"})
        elif fault == "gated" and is_file:
            self.send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif fault == "commit" and path.startswith("/api/") and "/tree/" not in path:
            self.send_json({"id": repository, "sha": "../../../../outside", "siblings": []})
        elif fault == "names" and "/tree/" in path:
            self.send_json([{"type": "file", "path": "../../../outside.json", "size": 2, "oid": "0" * 40}])
        elif fault == "sizes" and "/tree/" in path:
            self.send_json([entry | {"size": None} for entry in self.tree(repository)])
        elif path.startswith(f"/api/models/{repository}/tree/"):
            inside = path.split("/tree/")[1].partition("/")[2]
            self.send_json([entry for entry in self.tree(repository) if entry["path"].startswith(inside)])
        elif path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in self.server.repositories[repository]]
            self.send_json({"id": repository, "sha": COMMIT, "siblings": names})
        else:
            self.send_file(path.split("/resolve/")[1].partition("/")[2], repository, body)

    def tree(self, repository: str) -> list[dict[str, object]]:
        files = self.server.repositories[repository].items()
        return [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files]

    def send_file(self, name: str, repository: str, body: bool) -> None:
        file = self.server.repositories[repository][name]
        size = file.stat().st_size
        etag = hashlib.sha256(f"{name} {size}".encode()).hexdigest()
        if repository == "owner/etag":
            etag = "../../../../outside"
        if repository == "owner/pointer":
            size = 100
        if not body:
            self.send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(size)})
            return
        part = None if repository == "owner/whole" else self.headers["Range"]
        first, last = part.removeprefix("bytes=").split("-") if part else ("0", "")
        start, end = int(first), min(size, int(last) + 1) if last else size
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(max(0, end - start))
        self.server.served[name] = self.server.served.get(name, 0) + len(data)
        self.send(206 if part else 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, data)

    def send_json(self, content: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def send(self, code: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    base = shutil.copytree(checkpoint("ti2v-5B"), tmp_path / "base")
    for name, content in EXTRA.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    loras = tmp_path / "loras"
    shutil.copytree(lora_dir("t2v-A14B"), loras / SEKO)
    server = Hub(name=base, loras=loras, a14b=shutil.copytree(checkpoint("t2v-A14B"), tmp_path / "a14b"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home), "NO_PROXY": "127.0.0.1", "PATH": "/usr/bin:/bin",
    }  # fmt: skip


def started(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: the library reads the hub's address when it is imported."""
    return python(*words, cwd=TESTS.parent, environment=environment(hub, home))


def generate(hub: Hub, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return started(hub, home, "generate.py", *TI2V, *SMALL, "--save_dir", str(home / "out"), *flags)


def in_one_process(hub: Hub, home: Path, module: str, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Several commands one after the other, which import the libraries once; stdout ends in their exit codes."""
    script = f"import json, sys, {module} as it; print([it.main(words) for words in json.loads(sys.argv[1])])"
    return started(hub, home, "-c", script, json.dumps(commands))


def test_only_what_the_task_needs_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    first = generate(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
    assert set(hub.served) == set(hub.repositories["owner/name"]) - set(EXTRA)
    hub.served.clear()
    again = generate(hub, tmp_path, "--dry_run", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert hub.served == {}
    hub.shutdown()
    hub.server_close()
    places = ("owner/name", f"owner/name@{COMMIT}")  # what was fetched serves without the hub
    commands = [[*TI2V, *SMALL, "--ckpt_dir", place, "--dry_run", "--overwrite"] for place in places]
    alone = in_one_process(hub, tmp_path, "generate", *commands)
    assert alone.stdout.endswith("[0, 0]\n"), alone.stderr


def test_a_dry_run_needs_the_headers_alone(hub: Hub, tmp_path: Path) -> None:
    run = generate(hub, tmp_path, *T2V, "--lora_dir", f"owner/loras@v1/{SEKO}", "--dry_run")
    assert run.returncode == 0, run.stderr
    of_vae = [count for request, count in hub.asked.items() if request.endswith("Wan2.1_VAE.pth")]
    assert 0 < sum(of_vae) < 10, "the directory says where its 194 tensors begin"
    assert "settings of t2v-seko-v1.1" in run.stdout
    assert "20/20 pairs, alpha/rank 0.5" in run.stdout, run.stdout
    assert not [file for file in (tmp_path / "hub").rglob("*") if file.suffix in WEIGHT_SUFFIXES]  # the library's cache
    assert not (tmp_path / "out").exists()


def test_hub_and_folder_make_one_video(hub: Hub, tmp_path: Path) -> None:
    there = generate(hub, tmp_path, *T2V, "--lora_dir", f"owner/loras/{SEKO}", "--save_file", str(tmp_path / "a.mp4"))
    assert there.returncode == 0, there.stderr
    own = [*HERE, *SMALL, "--sample_steps", "2", "--lora_dir", str(tmp_path / "loras" / SEKO)]
    assert main([*own, "--save_file", str(tmp_path / "b.mp4"), "--base_seed", seed(there.stdout)]) == 0
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert (read_frames(tmp_path / "a.mp4") == read_frames(tmp_path / "b.mp4")).all()
    assert records[0]["request"]["lora_dir"] == f"owner/loras/{SEKO}"
    assert sorted(records[0]["plan"]["fingerprints"].values()) == sorted(records[1]["plan"]["fingerprints"].values())


def test_diffusers_layout_and_single_files_from_the_hub(tmp_path: Path) -> None:
    assert lightning(["bake", *HERE, "--layout=diffusers", "--dtype=fp32", "--out", str(tmp_path / "pipeline")]) == 0
    there = Hub(pipeline=tmp_path / "pipeline", a14b=checkpoint("t2v-A14B"))
    threading.Thread(target=there.serve_forever, daemon=True).start()
    parts = ("--vae", "owner/a14b/Wan2.1_VAE.pth", "--tokenizer", "owner/a14b/google/umt5-xxl")
    one_step = ("--sample_steps", "1", "--base_seed", "1")
    run = generate(there, tmp_path, *T2V, *one_step, *parts, "--ckpt_dir", "owner/pipeline",
                   "--save_file", str(tmp_path / "a.mp4"))  # fmt: skip
    there.shutdown()
    there.server_close()
    assert run.returncode == 0, run.stderr
    assert "Wan2.1_VAE.pth" in there.served
    assert not [name for name in there.served if name.startswith("vae/")]
    assert main([*HERE, *SMALL, *one_step, "--save_file", str(tmp_path / "b.mp4")]) == 0
    assert (read_frames(tmp_path / "a.mp4") == read_frames(tmp_path / "b.mp4")).all()


def test_inspect_and_bake_take_places_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    there = f"owner/loras/{SEKO}"
    bake = ["bake", *HERE, "--lora_dir", there, "--out", str(tmp_path / "there")]
    run = in_one_process(hub, tmp_path, "lightning.__main__", ["inspect", there, *HERE], bake)
    assert run.stdout.endswith("[0, 0]\n"), run.stderr
    assert "t2v-seko-v1.1" in run.stdout
    assert (
        lightning(["bake", *HERE, "--lora_dir", str(tmp_path / "loras" / SEKO), "--out", str(tmp_path / "here")]) == 0
    )
    file = "high_noise_model/diffusion_pytorch_model-00001-of-00001.safetensors"
    assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def seed(plan: str) -> str:
    return plan.split("seed ")[1].split()[0]


def test_little_of_large_files_is_fetched(tmp_path: Path) -> None:
    """A LoRA of full size, without content but for its alphas, and a large .pth: they open as they do here."""
    folder = tmp_path / "there"
    folder.mkdir()
    tensors = {name: ("F32" if shape else "I64", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<q", 8) for name, shape in manifest("lightning_lora").items() if not shape}
    sparse(folder / "high_noise_model.safetensors", tensors, alphas)
    torch.save({f"{n}": torch.full((1 << 18,), float(n)) for n in range(20)}, folder / "large.PTH")
    (folder / "small").mkdir()
    torch.save({"a": torch.zeros(1)}, folder / "small" / "a.BIN")
    server = Hub(large=folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
import sys
from pathlib import Path
from wan.checkpoints.hub import fetch, located
from lightning.lora import Lora
from wan.checkpoints.safetensors_file import fingerprint
from wan.checkpoints.weights import open_file
lora = Lora.open(located("--lora", "owner/large/high_noise_model.safetensors"), 1.0, None, "high")
print(set(lora.alphas.values()))
pickled = located("--vae", "owner/large/large.PTH")
theirs, ours = open_file(Path(sys.argv[1], "large.PTH")), open_file(pickled)
print([(e.shape, e.offset) for e in theirs.values()] == [(e.shape, e.offset) for e in ours.values()])
print(fingerprint(pickled), list(fetch(pickled.parent / "small").iterdir())[0].name, end=" ")
print(float(open_file(fetch(pickled)).read("7")[-1]))
"""
    run = started(server, tmp_path, "-c", script, str(folder))
    server.shutdown()
    server.server_close()
    assert run.returncode == 0, run.stderr
    alphas_found, same, rest = run.stdout.strip().splitlines()
    assert alphas_found == "{8.0}", run.stdout
    assert same == "True"
    assert rest == f"{fingerprint(folder / 'large.PTH')} a.BIN 7.0"
    assert (
        server.served["high_noise_model.safetensors"] < 3e6 < (folder / "high_noise_model.safetensors").stat().st_size
    )


def test_files_absent_on_the_hub_are_one_line(hub: Hub, tmp_path: Path) -> None:
    asked = {
        "--ckpt_dir owner/other": "owner/other",
        "--ckpt_dir owner/name@v9": "owner/name@v9",
        "--vae owner/name/none.pth": "none.pth",
        "--lora owner/loras/none:0.5": "none",
        "--tokenizer owner/loras": "tokenizer.json",
        "--ckpt_dir owner/loras": "config.json",
        "--ckpt_dir example/tiny.safetensors": "no such folder",
    }
    run = in_one_process(hub, tmp_path, "generate", *([*TI2V, *SMALL, *flags.split()] for flags in asked))
    assert run.stdout == f"{[2] * len(asked)}\n"
    for (flags, named), line in zip(asked.items(), run.stderr.strip().splitlines(), strict=True):
        assert line.startswith(f"error: {flags.removesuffix(':0.5')}"), line
        assert named in line, line
    assert not hub.served.keys() - {"config.json", "tokenizer.json"}


FAULTS = {  # by the name of the repository, see `Answer`; the words that the message holds besides it and the address
    "page": ("http://127.0.0.1",),
    "pointer": ("pointer", "bytes"),
    "whole": ("part", "HF_ENDPOINT"),
    "gated": ("licence", "hf auth login"),
    "commit": ("commit",),
    "names": ("outside.json",),
    "sizes": ("127.0.0.1",),
    "etag": ("ETag",),
}


def test_a_faulty_hub_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    folder = checkpoint("ti2v-5B")
    there = Hub(**dict.fromkeys((*FAULTS, "busy"), folder))
    threading.Thread(target=there.serve_forever, daemon=True).start()
    commands = [[*TI2V[:3], f"owner/{fault}", *SMALL, "--dry_run"] for fault in (*FAULTS, "busy")]
    run = in_one_process(there, tmp_path / "home", "generate", *commands)
    assert run.stdout.endswith(f"{[2] * len(FAULTS) + [0]}\n"), run.stdout + run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    for fault, words in FAULTS.items():
        printed = [line for line in lines if f"owner/{fault}" in line]
        assert printed, run.stderr
        assert all(word in line for word in words for line in printed), printed
    assert not list(tmp_path.rglob("outside*"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".tmp", ".incomplete")]
    assert not [path for path in files if "models--owner--pointer/" in str(path) and ".locks" not in str(path)]


def test_a_dead_mirror_is_named(tmp_path: Path) -> None:
    there = Hub(name=checkpoint("ti2v-5B"))
    there.server_close()
    run = generate(there, tmp_path, "--dry_run")
    assert run.returncode == 2
    assert f"http://127.0.0.1:{there.server_port}" in run.stderr
    assert "owner/name" in run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
