"""Every door through which a file from outside comes in: whatever is there, one line names it; a bug stays a bug."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from lightning.lora import Lora, settings_of
from lightning.releases import record_of
from tests.support import TESTS, checkpoint, config_of
from wan.checkpoints.checkpoint import open_checkpoint, open_single
from wan.checkpoints.weights import open_expert, open_file
from wan.jobs.prompt_files import read_paths, read_rows
from wan.jobs.resolve import resolve
from wan.media.images import open_image
from wan.media.video import describe_clip, last_frame, read_clip, read_record
from wan.runner.record import read_latents
from wan.utils.errors import InputError

T2V = config_of("t2v-A14B")


def rows(path: Path) -> None:
    problems: list[str] = []
    read_rows(path, problems, [])
    read_paths(path, problems)
    if problems:
        raise InputError(problems)


DOORS: dict[str, tuple[str, Callable[[Path], object]]] = {  # name of the file, its reader
    "expert": ("x.safetensors", open_expert), "pickled expert": ("x.pth", open_expert),
    "GGUF expert": ("x.gguf", open_expert), "a file of no known kind": ("x.weights", open_file),
    "index": ("x.safetensors.index.json", open_file), "VAE": ("x.pt", lambda path: open_single("vae", path, T2V)),
    "text encoder": ("x.bin", lambda path: open_single("text_encoder", path, T2V)),
    "tokenizer": ("tokenizer.json", lambda path: open_checkpoint(checkpoint(T2V.name), T2V, {"tokenizer": path})),
    "LoRA": ("x.ckpt", Lora.open), "PEFT's settings": ("adapter_config.json", lambda path: settings_of(
        path.with_name("adapter_model.safetensors"), {}, None) or [][0]),
    "bake's record": ("bake.json", lambda path: record_of(path.parent)),
    "latents": ("x.latents.safetensors", lambda path: read_latents(path, T2V)),
    "record": ("x.json", read_record), "record in a video": ("x.mp4", read_record),
    "replay": ("x.json", lambda path: resolve({"replay": str(path)})),
    "rows": ("x.jsonl", rows), "table": ("x.csv", rows), "text": ("x.txt", rows),
    "picture": ("x.png", open_image), "photograph": ("x.jpg", open_image), "last frame": ("x.webm", last_frame),
    "clip": ("x.mp4", lambda path: describe_clip(path, 5, 16)),
    "frames of a clip": ("x.mov", lambda path: read_clip(path, 5, 16, (16, 16))),
}  # fmt: skip
CONTENTS: dict[str, bytes] = {
    "nothing": b"", "zeros": bytes(5000), "every byte": bytes(range(256)) * 20, "null": b"null", "a list": b"[]",
    "an object": b"{}", "a number": b"3", "half an object": b'{"a": ', "text": b"a cat\n\xff", "depth": b"[" * 100_000,
    "digits": b'{"job": ' + b"9" * 4301 + b"}", "a long name": json.dumps({"x" * 300: "\x1b[31m"}).encode(),
    "true": b'{"job": true, "request": true, "meaning": true, "weight_map": true, "schema": true, "versions": [1]}',
    "infinity": b'{"job": {"seed": Infinity}, "request": {"seed": NaN}, "schema": 2}', "twice": b'{"a": 1, "a": 2}',
    "a page": b"<!DOCTYPE html><title>Sign in</title>", "a zip": b"PK\x03\x04" + bytes(60), "GGUF": b"GGUF\3\0\0\0" * 9,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "PNG": b"\x89PNG\r\n\x1a\n" * 9,
    "a list of files": b"ffconcat version 1.0\nfile /etc/hostname\n", "script": b"%!PS-Adobe-3.0\n",
    "a large header": struct.pack("<Q", 1 << 62) + b"{}", "a header": struct.pack("<Q", 2) + b"{}",
}  # fmt: skip
MEANT = {  # that is read, and means nothing or nothing wrong there
    ("a header", "a file of no known kind"), ("a header", "LoRA"), ("an object", "PEFT's settings"),
    ("a long name", "PEFT's settings"), ("true", "PEFT's settings"), ("an object", "record"), ("a long name", "record"),
    ("true", "record"), *((content, "text") for content in CONTENTS), *((content, "table") for content in CONTENTS),
}  # fmt: skip


def refusal(read: Callable[[Path], object], path: Path) -> list[str]:
    """The lines of the refusal; none for what is read. Any other exception is a bug."""
    try:
        read(path)
    except InputError as e:
        return e.problems
    return []


@pytest.mark.parametrize("door", DOORS)
def test_whatever_a_file_holds_it_is_read_or_named(door: str, tmp_path: Path) -> None:
    name, read = DOORS[door]
    path = tmp_path / name
    for content, data in CONTENTS.items():
        path.write_bytes(data)
        if door == "PEFT's settings":
            (tmp_path / "adapter_model.safetensors").write_bytes(CONTENTS["a header"])
        lines = refusal(read, path)
        assert lines or (content, door) in MEANT, content
        assert all(line.isprintable() and len(line) < 2000 for line in lines), lines


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("bake's record", "PEFT's settings")])
@pytest.mark.parametrize("place", ["absent", "folder", "dangling", "pipe", "long"])
def test_whatever_is_in_the_place_of_a_file_it_is_named(door: str, place: str, tmp_path: Path) -> None:
    name, read = DOORS[door]
    path = tmp_path / ("x" * 300 + name if place == "long" else name)
    if place == "folder":
        path.mkdir()
    elif place == "dangling":
        path.symlink_to("nowhere")
    elif place == "pipe" and door not in ("rows", "table", "text"):  # `<(command)` is one of prompts
        os.mkfifo(path)
    with pytest.raises((InputError, OSError)) as caught:  # OSError: `open_checkpoint` and `main` make a line of it
        read(path)
    assert not isinstance(caught.value, OSError) or caught.value.errno is not None


def test_no_memory_for_a_header_is_a_line(tmp_path: Path) -> None:
    table = {f"blocks.{n}.x": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n in range(99_999)}
    text = json.dumps(table).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(table)))
    code = """
import resource, sys
from pathlib import Path
from lightning.__main__ import main
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 20_000_000,) * 2)
sys.exit(main(["inspect", sys.argv[1]]))
"""
    variables = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    words = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert "memory" in line


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--task", T2V.name, "--ckpt_dir", str(checkpoint(T2V.name)), "--device", "cpu", "--dry_run"]
    for target in ("wan.checkpoints.checkpoint._matched", "wan.planning.build.open_checkpoint"):
        with monkeypatch.context() as changed:
            changed.setattr(target, lambda *_, **__: {}["a bug"])
            with pytest.raises(KeyError, match="a bug"):
                generate.main(words)
