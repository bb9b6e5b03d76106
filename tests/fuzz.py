"""Damaged and hostile files, made by a seed: `python -m tests.fuzz [--cases 2000] [--seed 0] [--kind lora ...]`.

Each case takes a good file, damages it, and gives it to what reads it. Allowed are: InputError with lines that a
terminal can show, or acceptance of what an independent reader accepts too and what then loads. Anything else (another
exception, more than SECONDS, something accepted that is not meant) is a finding and exit code 1. tests/test_fuzz.py
runs a hundred of them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning.lora import Lora, check
from lightning.merge import Merge
from tests.support import checkpoint, config_of, lora_dir
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.safetensors_file import TensorStore
from wan.jobs.prompt_files import KEYS, read_rows, text_problem
from wan.media.video import read_record
from wan.offload.reader import Source, load
from wan.utils.errors import InputError

SECONDS = 120.0  # for one case; a tenth of a second is usual, but machines do other work
TASK = "t2v-A14B"
CPU = torch.device("cpu")
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 64, 2**31, 2**40, 2**63, -(2**63), 10**300, 10**4000, 10**5000, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", " ", "a", "\0", "\ud800", "\udce9", "\n", "\x1b[31m", "../x.mp4", "/etc/passwd",
    "9" * 5000, "猫" * 200, "x" * 5000, [], {}, [1], ["a"], [[]], {"a": 1}, [-1, 2], [2.5], "F32", "I8", "BOOL",
    "F8_E4M3", "1e999", "NaN",
]  # fmt: skip


class Hang(Exception):
    """A case took too long."""


class Unmeant(Exception):
    """Something was accepted that should not be."""


Case = Callable[[random.Random, Path], None]


# --- damage


def damaged_bytes(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """A few bytes changed, cut out, doubled or cut off. first: where the damage may begin."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if len(changed) <= first:
            break
        where = rng.randrange(first, len(changed))
        kind = rng.randrange(6)
        if kind < 3:
            changed[where] = rng.choice([0, 255, 10, 13, 34, 44, 123, 91, changed[where] ^ (1 << rng.randrange(8))])
        elif kind == 3:
            del changed[where : where + rng.choice([1, 2, 30])]
        elif kind == 4:
            changed[where:where] = rng.choice(
                [b"\0", b"\xff\xfe", b'"', b"\n", b"{", b"[" * 50_000, b"9" * 5000, b"\xe9"]
            )
        else:
            del changed[where:]
    return bytes(changed)


def damaged_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three places changed: replaced, left out, renamed, nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_containers(value))
        if not places:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        holder = rng.choice(places)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = rng.randrange(8)
        if kind < 4:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 4:
            del holder[key]
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice(["", "\0", "a\nb", "prompt", "seed", "blocks.9999999.x", "k" * 3000, "\ud800"])] = (
                holder.pop(key)
            )
        elif kind == 6:
            holder[key] = [holder[key]]
        elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice([holder[key] + 1, -holder[key], holder[key] * 2, holder[key] * 10**9])
    return value


def _containers(value: Any) -> Iterator[Any]:
    """Every dict and list in `value` that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def spelled(value: Any, rng: random.Random) -> bytes:
    """JSON in one of its spellings, with numbers of any length and half characters as they are."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1]))
    finally:
        sys.set_int_max_str_digits(limit)
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, or the file as bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(data, rng)
    if kind == 1:
        return damaged_bytes(data[: 8 + length], rng) + rest
    text = spelled(damaged_json(header, rng), rng).replace(b"\n", b" ")
    return struct.pack("<Q", len(text)) + text + (rest if kind == 2 else rest[: rng.randrange(len(rest))])


# --- what reads them


def prompts_case(rng: random.Random, folder: Path) -> None:
    rows = [{"prompt": f"prompt {n}", "seed": n, "negative_prompt": "no", "size": "832*480"} for n in range(3)]
    rows += [{"prompt": "猫", "image": "a.png", "save_file": "sub/x.mp4", "frame_num": 5}]
    kind = rng.choice([".jsonl", ".jsonl", ".csv", ".txt", rng.choice([".tsv", ".yaml", ""])])
    if kind == ".jsonl":
        lines = [
            spelled(damaged_json(row, rng) if rng.random() < 0.4 else row, rng).replace(b"\n", b" ") for row in rows
        ]
        data = b"\n".join(lines)
    elif kind in (".csv", ".tsv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, KEYS, delimiter=rng.choice(",;\t"))
        writer.writeheader()
        writer.writerows([{key: str(value) for key, value in row.items()} for row in rows])
        data = table.getvalue().encode()
    else:
        data = "\n".join(str(row["prompt"]) for row in rows).encode()
    path = folder / f"p{kind}"
    path.write_bytes(damaged_bytes(data, rng) if rng.random() < 0.6 else data)
    problems: list[str] = []
    found = read_rows(path, problems, [])
    if problems:
        raise InputError(problems)
    for row in found:
        values = asdict(row)
        bad = [key for key, value in values.items() if isinstance(value, str) and text_problem(value)]
        odd = [key for key in ("seed", "frame_num") if type(values[key]) not in (int, type(None))]
        if bad or odd or kind == ".yaml":
            raise Unmeant(f"{row}")
    if kind == ".jsonl":
        given = [json.loads(line) for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
        if [row["prompt"].strip() for row in given] != [row.prompt for row in found]:
            raise Unmeant("the prompts are not those of the file")


def record_case(rng: random.Random, folder: Path) -> None:
    record = {
        "schema": 1,
        "request": {"prompt": "a"},
        "job": {"size": [64, 64], "seed": 1},
        "output": {"file": "x.mp4"},
    }
    data = spelled(damaged_json(record, rng), rng)
    path = folder / rng.choice(["r.json", "r.json", "r.json", "r.mp4"])
    path.write_bytes(damaged_bytes(data, rng) if rng.random() < 0.5 else data)
    if not isinstance(read_record(path), dict) or path.suffix == ".mp4":
        raise Unmeant("a record that is no record")


def lora_case(rng: random.Random, folder: Path) -> None:
    path = folder / "lora.safetensors"
    path.write_bytes(damaged_safetensors((lora_dir(TASK) / "high_noise_model.safetensors").read_bytes(), rng))
    use_lora(path, path, rng)


def peft_case(rng: random.Random, folder: Path) -> None:
    """A folder as PEFT leaves it, its settings damaged."""
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 4}, "rank_pattern": {"q": 4},
                "use_rslora": False, "use_dora": False, "init_lora_weights": True, "bias": "none"}  # fmt: skip
    text = spelled(damaged_json(settings, rng), rng)
    (folder / "peft").mkdir(exist_ok=True)
    (folder / "peft" / "adapter_config.json").write_bytes(damaged_bytes(text, rng) if rng.random() < 0.3 else text)
    weights = folder / "peft" / "adapter_model.safetensors"
    if not weights.exists():
        state = load_file(lora_dir(TASK) / "high_noise_model.safetensors")
        kinds = {"lora_down": "lora_A", "lora_up": "lora_B"}
        renamed = {}
        for name, tensor in state.items():
            kind = next((kind for kind in kinds if kind in name), None)
            if kind:
                renamed[name.replace("diffusion_model.", "base_model.model.").replace(kind, kinds[kind])] = tensor
        save_file(renamed, weights)
    use_lora(folder / "peft", weights, rng)


def use_lora(path: Path, weights: Path, rng: random.Random) -> None:
    """Open, check and merge a LoRA file or folder."""
    base = TensorStore.open(checkpoint(TASK) / "high_noise_model" / "diffusion_pytorch_model.safetensors.index.json")
    lora = Lora.open(path, expert="high")
    check(lora, base.shapes, allow_partial=rng.random() < 0.3)
    with safe_open(weights, "pt") as oracle:  # raises what is a finding: we accepted the file
        for name in oracle.keys():  # noqa: SIM118 - not a dict
            oracle.get_tensor(name)
    merge = Merge([lora], base.shapes)
    for name in base:
        if merge.touches(name):
            merge(name, base.read(name))


def expert_case(rng: random.Random, folder: Path) -> None:
    """A full expert in one file, one layer in int8 with a scale per row; damaged in its header."""
    plain, path = folder / "plain.safetensors", folder / "expert.safetensors"
    if not plain.exists():
        base = TensorStore.open(checkpoint(TASK) / "low_noise_model" / "diffusion_pytorch_model.safetensors.index.json")
        state = {name: base.read(name) for name in base}
        layer = state["blocks.0.ffn.0.weight"]
        state["blocks.0.ffn.0.weight_scale"] = layer.abs().amax(1, keepdim=True) / 127
        state["blocks.0.ffn.0.weight"] = (layer / state["blocks.0.ffn.0.weight_scale"]).round().to(torch.int8)
        save_file(state, plain)
    path.write_bytes(damaged_safetensors(plain.read_bytes(), rng))
    part = open_checkpoint(checkpoint(TASK), config_of(TASK), {"low": path}).experts["low"]
    load(part.module, Source(part.weights, lambda _: torch.float32), CPU)


def checkpoint_case(rng: random.Random, folder: Path) -> None:
    if not (good := folder / "ckpt").exists():
        shutil.copytree(checkpoint(TASK), good)
    expert = "high_noise_model"
    name = rng.choice(
        [f"{expert}/config.json"] * 3
        + [f"{expert}/diffusion_pytorch_model.safetensors.index.json"] * 2
        + [f"{expert}/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        + ["google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"]
    )
    path, data = good / name, (good / name).read_bytes()
    if name.endswith(".safetensors"):
        changed = damaged_safetensors(data, rng)
    elif name.endswith(".pth"):
        changed = damaged_bytes(data, rng, first=rng.choice([0, 0, max(0, len(data) - 3000)]))
    else:
        changed = spelled(damaged_json(json.loads(data), rng), rng)
        changed = damaged_bytes(changed, rng) if rng.random() < 0.4 else changed
    path.write_bytes(changed)
    try:
        opened = open_checkpoint(good, config_of(TASK))
        for part in (*opened.experts.values(), opened.text_encoder, opened.vae):
            load(part.module, Source(part.weights, lambda _: torch.float32), CPU)
        if max(opened.tokenizer("a cat 猫")) >= len(opened.tokenizer):
            raise Unmeant("tokens outside the table")
    finally:
        path.write_bytes(data)


CASES: dict[str, Case] = {
    "prompts": prompts_case,
    "record": record_case,
    "lora": lora_case,
    "peft": peft_case,
    "expert": expert_case,
    "checkpoint": checkpoint_case,
}


# --- running them


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(kind: str, seed: int, folder: Path) -> tuple[str, str | None]:
    """("accepted", "refused" or "finding", what the finding is) of one case."""
    try:
        with limit(SECONDS):
            CASES[kind](random.Random(f"{kind} {seed}"), folder)
    except InputError as e:
        odd = [line for line in e.problems if not line.isprintable() or len(line) > 2000]
        return ("finding", f"a line that cannot be shown: {odd[0][:300]!r}") if odd else ("refused", None)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # noqa: BLE001 - a panic of a library in another language is no Exception
        return "finding", "".join(traceback.format_exception(e)[-4:])
    return "accepted", None


def run(kinds: list[str], cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`cases` cases, divided over `kinds`: how they ended, and the findings."""
    counts: Counter[str] = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            kind = kinds[number % len(kinds)]
            end, finding = run_case(kind, seed + number, Path(folder))
            counts[f"{kind} {end}"] += 1
            if finding:
                findings.append(f"--kind {kind} --seed {seed + number} --cases 1: {finding}")
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=CASES, action="append")
    given = parser.parse_args()
    counts, findings = run(given.kind or list(CASES), given.cases, given.seed)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    for finding in findings:
        print(f"FINDING {finding}")
    print(f"{given.cases} cases, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
