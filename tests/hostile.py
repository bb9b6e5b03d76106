"""Hostile inputs of every kind: `python -m tests.hostile [--cases 3000] [--seed 0] [--kind hub ...]`, ten minutes.

`tests.fuzz` damages weights, indexes, prompt files and records; here come pickles, GGUF, pictures, clips, latents,
gallery folders, a service's answers and a hub's. A process may take MEMORY beyond what it starts with, and a case
SECONDS: more of either, or any exception that is not one of ours, is a finding and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import numpy as np
import torch
from PIL import Image

from tests import fuzz
from tests.checkpoints.gguf_support import write_gguf
from tests.fuzz import CASES as FILE_CASES
from tests.fuzz import TASK, Unmeant, damaged_bytes, damaged_json, damaged_safetensors, spelled
from tests.support import checkpoint, config_of
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import open_expert, open_file
from wan.gallery import write_page
from wan.media.images import open_image
from wan.media.video import VideoWriter
from wan.prompt_extension.answers import AnswerError, clean
from wan.runner.record import read_latents, save_latents
from wan.utils.errors import InputError
from wan.utils.files import parse_json

MEMORY = 1_000_000_000  # bytes beside what the libraries take
SECONDS = 30.0  # of a case
BATCH = 50  # cases of a process
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP", "ppm": "PPM"}
PIECES = [
    "```", "json", "{", "}", "[", "]", '"prompt"', ":", "<think>", "</think>", "\\n", "\n", "\0", "\x1b[31m", "\ud800",
    "‮", "a red fox", "猫", "Sure! Here is", "**", "#", '"', "'", "\u2028", "9" * 400, "[" * 3000,
]  # fmt: skip


@cache
def expert_tensors() -> dict[str, torch.Tensor]:
    store = TensorStore.open(checkpoint(TASK) / "high_noise_model" / "diffusion_pytorch_model.safetensors.index.json")
    return {name: store.read(name) for name in store}


def once(path: Path, make: Callable[[Path], object]) -> bytes:
    """The bytes of a good file, made in the first case."""
    if not path.exists():
        make(path)
    return path.read_bytes()


def read_all(store: TensorStore) -> None:
    for name in store:
        store.read(name)


def gguf_case(rng: random.Random, folder: Path) -> None:
    good = once(folder / "good.gguf", lambda path: write_gguf(path, expert_tensors()))
    bad = folder / "bad.gguf"
    bad.write_bytes(damaged_bytes(good[: 1 << 16], rng) + good[1 << 16 :])
    read_all(open_expert(bad))


def pickle_case(rng: random.Random, folder: Path) -> None:
    good = once(folder / "good.pth", partial(torch.save, expert_tensors()))
    bad = folder / rng.choice(["bad.pth", "bad.pt", "bad.bin", "bad.ckpt"])
    bad.write_bytes(damaged_bytes(good, rng, first=rng.choice([0, max(0, len(good) - 20_000)])))
    try:
        read_all(open_file(bad))
    except OSError as e:  # as `open_checkpoint` has it
        raise InputError(f"{bad}: not read ({e.strerror})") from e


def picture_case(rng: random.Random, folder: Path) -> None:
    kind = rng.choice(list(FORMATS))
    pixels = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    good = once(folder / f"good.{kind}", lambda path: Image.fromarray(pixels).save(path, FORMATS[kind]))
    bad = folder / f"bad.{rng.choice([kind, kind, 'png', 'eps', 'svg', 'jpg'])}"
    bad.write_bytes(damaged_bytes(good, rng))
    image = open_image(bad)
    if image.mode != "RGB" or image.width * image.height > 10**8:
        raise Unmeant(f"{image}")


def _clip(path: Path) -> None:
    with VideoWriter(path, 8) as video:
        video.write(torch.linspace(-1, 1, 3 * 5 * 32 * 32).view(3, 5, 32, 32))
        video.finish(None)


def clip_case(rng: random.Random, folder: Path) -> None:
    good = once(folder / "good.mp4", _clip)
    bad = folder / f"bad.{rng.choice(['mp4', 'mp4', 'mov', 'mkv', 'webm'])}"
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    bad.write_bytes(concat if rng.random() < 0.05 else damaged_bytes(good, rng))
    if open_image(bad).mode != "RGB":
        raise Unmeant("a frame that is not RGB")


def latents_case(rng: random.Random, folder: Path) -> None:
    record = {"schema": 2, "request": {}, "job": {"seed": 1}, "meaning": {"task": TASK}, "output": {}}
    good = once(folder / "good.safetensors", lambda path: save_latents(path, torch.zeros(16, 2, 4, 4), record))
    bad = folder / "bad.latents.safetensors"
    bad.write_bytes(damaged_safetensors(good, rng))
    latent, _ = read_latents(bad, config_of(TASK))
    if latent.ndim != 4:
        raise Unmeant(f"{latent.shape}")


def gallery_case(rng: random.Random, folder: Path) -> None:
    place = folder / "gallery"
    place.mkdir(exist_ok=True)
    (place / "a.mp4").write_bytes(b"x")
    record = {
        "schema": 2, "request": {"ckpt_dir": "c"}, "versions": {}, "seconds": {"denoise": 1.0}, "finished": "2026",
        "job": {"prompt": "a", "original_prompt": "a", "negative_prompt": "", "seed": 1, "image": None, "index": 0},
        "meaning": {"task": TASK, "sample_solver": "euler", "dtype": "float32",
                    "sample_steps": [{"timestep": 1000.0, "expert": "high", "guidance": 1.0, "lora": 1.0}]},
        "plan": {"loras": {}, "shift": 5.0, "preset": None}, "pipeline": {"device": "cpu"},
        "output": {"file": "a.mp4", "frames": 5, "width": 32, "height": 32, "fps": 16},
    }  # fmt: skip
    (place / "a.json").write_bytes(spelled(damaged_json(record, rng), rng))
    text = write_page(place).read_text(encoding="utf-8")
    data = text.partition('id="entries">')[2].partition("</script>")[0]
    if not isinstance(parse_json(data), list):
        raise Unmeant("a page without data")


def answer_case(rng: random.Random, _: Path) -> None:
    text = "".join(rng.choices(PIECES, k=rng.choice([1, 5, 20, 400])))
    try:
        prompt = clean(text * rng.choice([1, 1, 1, 50]))
    except AnswerError:
        return
    if not prompt.strip() or not prompt.replace("\n", " ").isprintable():
        raise Unmeant(f"{prompt[:200]!r}")


def hub_case(rng: random.Random, folder: Path) -> None:
    """A mirror's facts, listings and headers, damaged; nothing may be written outside the cache."""
    from wan.checkpoints import hub

    before = set(folder.iterdir())
    _mirror().damage = rng
    path = hub.fetch(hub.located("--lora_dir", f"owner/name/{rng.randrange(10**9)}"))
    if set(folder.iterdir()) != before:
        raise Unmeant(f"files beside the cache: {path}")


@cache
def _mirror():  # type: ignore[no-untyped-def]  # of a class that test_hub defines
    from tests.checkpoints.test_hub import Answer, Hub

    class Damaged(Answer):
        def send_json(self, content: object) -> None:
            rng = self.server.damage  # type: ignore[attr-defined]
            data = spelled(damaged_json(content, rng), rng) if rng.random() < 0.7 else spelled(content, rng)
            self.send(
                200, {"Content-Type": "application/json"}, damaged_bytes(data, rng) if rng.random() < 0.2 else data
            )

    server = Hub(name=checkpoint(TASK).parent / "lora-t2v")
    server.RequestHandlerClass = Damaged
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


CASES: dict[str, fuzz.Case] = {
    **FILE_CASES,
    "gguf": gguf_case, "pickle": pickle_case, "picture": picture_case, "clip": clip_case, "latents": latents_case,
    "gallery": gallery_case, "answer": answer_case, "hub": hub_case,
}  # fmt: skip


def batch(kind: str, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Some cases of one kind, in a process whose memory is limited."""
    if kind == "hub":
        _mirror()
        os.environ["HF_HOME"] = tempfile.mkdtemp()
    fuzz.SECONDS, fuzz.CASES = SECONDS, CASES
    torch.set_num_threads(1)
    if kind not in ("clip", "hub"):  # those start a program or threads, whose address space is not ours
        size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (size + MEMORY, size + MEMORY))
    return fuzz.run([kind], count, first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=CASES, action="append")
    given = parser.parse_args()
    kinds = given.kind or list(CASES)
    each = -(-given.cases // len(kinds))
    tasks = [(kind, given.seed + start, min(BATCH, each - start)) for kind in kinds for start in range(0, each, BATCH)]
    counts: Counter[str] = Counter()
    findings: list[str] = []
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for some, found in pool.starmap(batch, tasks, chunksize=1):
            counts.update(some)
            findings += found
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    print(*(f"FINDING {finding}" for finding in findings), sep="\n")
    print(f"{sum(counts.values())} cases, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
