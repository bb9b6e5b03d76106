"""The README against the program: its flags, its files, its tests, and its commands, run on the small checkpoints."""

import re
import shlex
import struct
from pathlib import Path

import pytest

import generate
from benchmarks.sparse import sparse
from lightning.__main__ import main as lightning
from tests.support import TESTS, TINY, checkpoint, lora_dir, manifest
from wan.cli.options import OPTIONS

ROOT = TESTS.parent
README = (ROOT / "README.md").read_text()
RELEASES = {"T2V": "t2v-A14B", "I2V": "i2v-A14B", "TI2V": "ti2v-5B"}


def commands(start: str) -> list[list[str]]:
    """The words of every command in the README's shell blocks that starts so; continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in blocks.splitlines()]
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def test_the_flag_table_is_the_parser() -> None:
    table = dict(re.findall(r"^\| `--(\w+)` \| .*? \| (.*) \|$", README, re.MULTILINE))
    flags = {name: row.help.replace("|", "\\|") for name, row in OPTIONS.items()}
    assert table == flags


def test_every_error_that_is_explained_is_one_of_ours() -> None:
    rows = README.split("## Troubleshooting")[1].split("\n## ")[0].split("\n|---|---|\n")[1].splitlines()
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row.partition(" | ")[0])]
    ours = [text.removesuffix("torch") for text in quoted if not text.startswith(("pip install ", "zsh: "))]
    sources = "".join(path.read_text() for part in ("wan", "lightning") for path in (ROOT / part).rglob("*.py"))
    assert len(ours) > 5
    assert [text for text in ours if not all(piece.strip() in sources for piece in text.split("..."))] == []


def test_every_test_that_is_named_exists() -> None:
    table = README.split("## Where we differ")[1].split("\n## ")[0]
    sources = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", table):
        assert file in sources, file
        assert not test or f"def {test}(" in sources[file], f"{file}::{test}"


def on_small_checkpoints(words: list[str], folder: Path) -> list[str]:
    """The same command with folders, picture and prompt file that are here, and a size that takes a second."""
    task = words[words.index("--task") + 1]
    replaced = {
        "--ckpt_dir": str(checkpoint(task)), "--lora_dir": str(lora_dir(task)), "--size": "64*64",
        "--image": str(TINY / "input.png"), "--last_image": str(TINY / "input.png"),
        "--prompt_file": str(ROOT / "examples" / "prompts.txt"),
    }  # fmt: skip
    small = [replaced.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    extra = ["--frame_num", "5", "--save_dir", str(folder), *([] if "--size" in words else ["--size", "64*64"])]
    return small + extra + ([] if "--lora_dir" in words else ["--sample_steps", "2"])


SINGLE = [c for c in commands("python generate.py ") if "..." not in c and "--nproc" not in " ".join(c)]


@pytest.mark.parametrize("words", SINGLE, ids=lambda words: "-".join(words[1:2] + words[2:3]))
def test_its_commands_run(words: list[str], tmp_path: Path) -> None:
    assert generate.main(on_small_checkpoints(words, tmp_path)) == 0
    assert bool(list(tmp_path.glob("*.mp4"))) == ("--dry_run" not in words)


@pytest.mark.parametrize("words", [c for c in commands("python generate.py ") if "..." in c], ids=lambda w: w[1])
def test_its_fragments_are_flags_of_the_program(words: list[str]) -> None:
    generate.parse([word for word in words if word != "..."])


def test_its_lightning_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (inspect, bake) = commands("python -m lightning ")
    tensors = {name: ("F64" if not shape else "F32", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<d", 8.0) for name, (_, shape) in tensors.items() if not shape}
    release = tmp_path / inspect[1]
    release.mkdir(parents=True)
    for expert in ("high", "low"):
        sparse(release / f"{expert}_noise_model.safetensors", tensors, alphas)
    assert lightning([inspect[0], str(release)]) == 0
    shown = capsys.readouterr().out
    assert "400/400 pairs" in shown
    assert "t2v-seko-v1.1" in shown
    bake[bake.index("--ckpt_dir") + 1] = str(checkpoint("t2v-A14B"))
    bake[bake.index("--lora_dir") + 1] = str(lora_dir("t2v-A14B"))
    bake[bake.index("--out") + 1] = str(tmp_path / "baked")
    assert lightning(bake) == 0
    assert (tmp_path / "baked" / "high_noise_model").is_dir()
