"""Spoiled LoRA and checkpoint headers, seeded: each is understood or refused in one sentence, none is a bug.

`pytest -m "slow or not slow" tests/checkpoints/test_hostile_files.py` tries more than 2,000.
"""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning.lora import Lora, check
from lightning.merge import Merge
from tests.lightning.support import base, family
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import open_expert
from wan.utils.errors import InputError, TensorFileError

SHAPES = base().shapes
JUNK: list[Any] = [None, True, -1, 0, 1.5, 2**70, "", "F32", "F8_E4M3", "I8", "\ud800", [], [[]], [4, 4], [0, 64], {}]
JUNK += [{"lora_adapter_metadata": text} for text in ("{}", "[", '{"r": 8, "lora_alpha": 0}', '{"alpha_pattern": 1}')]
NAMES = ["x.lora_up.weight", "blocks.0.self_attn.q.alpha", "lora_unet_blocks_0_ffn_0.alpha", "__metadata__", "a.diff"]


def spoiled(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One to three entries replaced, renamed, dropped, or changed inside."""
    header = json.loads(json.dumps(header))
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(header))
        match chance.randrange(5):
            case 0:
                header[name] = chance.choice(JUNK)
            case 1:
                header[chance.choice(NAMES)] = header.pop(name)
            case 2:
                header.pop(name)
            case _ if isinstance(header[name], dict) and header[name]:
                header[name][chance.choice([*header[name], "more"])] = chance.choice(JUNK)
        if not header:
            break
    return header


def use(path: Path, chance: random.Random) -> None:
    """Everything that is done with a file before and while a model is loaded."""
    if chance.random() < 0.3:
        store = open_expert(path)
        for name in store:
            store.read(name)
        return
    lora = Lora.open(path, expert=chance.choice([None, "high", "low"]))
    check(lora, SHAPES, allow_partial=chance.random() < 0.5)
    merge = Merge([lora], SHAPES)
    for name in list(merge.deltas)[:3]:
        merge(name, torch.zeros(SHAPES[name]))


@pytest.mark.parametrize("kind", ["lightning", "kohya", "diffusers"])
@pytest.mark.parametrize("count", [60, pytest.param(700, marks=pytest.mark.slow)])
def test_spoiled_headers(kind: str, count: int, tmp_path: Path) -> None:
    content = family(kind, tmp_path).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data, chance = json.loads(content[8 : 8 + length]), content[8 + length :], random.Random(kind)
    path, refused = tmp_path / "spoiled.safetensors", 0
    for _ in range(count):
        text = json.dumps(spoiled(header, chance)).encode()
        if chance.random() < 0.2:
            text = (
                text[: chance.randrange(len(text))]
                + bytes([chance.randrange(256)])
                + text[chance.randrange(len(text)) :]
            )
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        problems: list[str] = []
        try:
            use(path, chance)
        except InputError as e:
            problems = e.problems
        refused += bool(problems)
        assert all("\n" not in problem for problem in problems)
    assert refused > count / 2


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"__metadata__": 3}', b'{"__metadata__": {"a": 1}}', b"null",
     b'{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}'],
)  # fmt: skip
def test_hostile_headers(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(TensorFileError, match="the safetensors header is corrupt"):
        TensorStore.open(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "{}", '{"weight_map": null}', '{"weight_map": {}}', "\xff"])
def test_hostile_indexes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TensorFileError, match=r"not a safetensors index|the index names no tensor"):
        TensorStore.open(path)
