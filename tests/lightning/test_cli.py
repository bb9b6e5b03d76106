"""`python -m lightning`: what it prints, its exit codes, and that inspecting needs no torch."""

import json
import shlex
import shutil
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import generate
from benchmarks.sparse import sparse
from lightning import __main__ as program
from lightning.__main__ import main
from lightning.releases import record_of
from tests.forked import python
from tests.lightning.support import AB, STORED, diffusers_module, family, small_pairs, spelled, write
from tests.support import checkpoint, lora_dir, manifest
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.modules.model import released_shapes
from wan.planning.build import make_plan
from wan.utils.errors import InputError

FOLDER = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _shapes_are_made_once() -> Iterator[None]:
    """Make the shapes of the three released networks once: each takes longer than inspecting a small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "released_shapes", cache(released_shapes))
        yield


def release(tmp_path: Path) -> Path:
    """A release folder of full-size files without content."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    tensors = {name: ("F32" if shape else "I64", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<q", 8) for name, shape in manifest("lightning_lora").items() if not shape}
    for expert in ("high", "low"):
        sparse(folder / f"{expert}_noise_model.safetensors", tensors, alphas)
    return folder


def test_inspect_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = release(tmp_path)
    assert main(["inspect", str(folder)]) == 0
    first, second, use = capsys.readouterr().out.split("\n\n")
    assert use == f"{folder} is a release: python generate.py --task t2v-A14B --lora_dir {folder}\n"
    assert second.startswith(str(tmp_path / FOLDER / "low_noise_model.safetensors"))
    for line in (
        "kind      LoRA, F32/I64, 1.23 GB",
        "release   t2v-seko-v1.1 (lightx2v/Wan2.2-Lightning)",
        "fits      t2v-A14B, i2v-A14B",
        "coverage  400/400 pairs, alpha/rank 0.125, 0 unmatched",
        "rank      64",
        "alpha     8",
        "settings  steps 4, solver euler, shift 5, guidance 1/1",
        "sizes     1280*720, 720*1280, 832*480, 480*832",
    ):
        assert f"\n  {line}" in first
    assert "warning" not in first


def test_inspect_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = release(tmp_path) / "high_noise_model.safetensors"
    assert main(["inspect", str(file), "--task", "i2v-A14B", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["fits"] == ["i2v-A14B"]
    assert report["settings"]["guidance"] == [1.0, 1.0]
    assert "was published for t2v-A14B, this is i2v-A14B" in report["coverage"]["warnings"][0]


def test_inspect_imports_no_network_library(tmp_path: Path) -> None:
    folder = release(tmp_path)
    program = (
        "import sys; from lightning.__main__ import main; code = main(sys.argv[1:])\n"
        "heavy = {'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = python("-c", program, "inspect", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("400/400 pairs") == 2


def test_inspect_full_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors"
    sparse(file, {f"model.diffusion_model.{n}": ("BF16", s) for n, s in released_shapes("i2v-A14B").items()})
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "kind      full expert, BF16, 28.58 GB" in out
    assert "fits      i2v-A14B" in out
    assert "release   i2v-distill-model (lightx2v/Wan2.2-Distill-Models)" in out
    assert main(["inspect", str(file), "--task", "ti2v-5B"]) == 2
    assert "names or shapes are not those of ti2v-5B" in capsys.readouterr().err


def test_inspect_a_sharded_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = released_shapes("t2v-A14B")
    for number, half in enumerate((list(shapes)[:500], list(shapes)[500:])):
        sparse(tmp_path / f"{number}.safetensors", {name: ("F32", shapes[name]) for name in half})
    weight_map = {name: f"{int(number >= 500)}.safetensors" for number, name in enumerate(shapes)}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "kind      full expert, F32, 57.15 GB" in out
    assert "fits      t2v-A14B" in out


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_inspect_by_a_checkpoint_of_other_sizes(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    lora, ckpt_dir = str(lora_dir(task)), str(checkpoint(task))
    assert main(["inspect", lora, "--ckpt_dir", ckpt_dir]) == 0
    shown = capsys.readouterr().out
    files = 1 if task == "ti2v-5B" else 2
    assert shown.count("20/20 pairs, alpha/rank 0.5, 0 unmatched") == files
    assert shown.count(f"fits      {task}") == files
    assert f"{lora} is a release: python generate.py --task {task} --ckpt_dir {ckpt_dir} --lora_dir {lora}" in shown


def test_inspect_says_what_a_whole_folder_is_good_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, lora = str(checkpoint("t2v-A14B")), str(lora_dir("t2v-A14B"))
    for layout in ("released", "diffusers"):
        arguments = ["--task", "t2v-A14B", "--ckpt_dir", source, "--lora_dir", lora, "--layout", layout]
        assert main(["bake", *arguments, "--out", str(tmp_path / layout)]) == 0
    assert main(["inspect", source, "--ckpt_dir", source]) == 0
    assert (
        f"{source} is a checkpoint: python generate.py --task t2v-A14B --ckpt_dir {source}" in capsys.readouterr().out
    )
    assert main(["inspect", str(tmp_path / "released"), "--ckpt_dir", source]) == 0
    shown = capsys.readouterr().out
    assert "it is sampled as lora-t2v: steps 4, solver euler, shift 5, guidance 1/1" in shown
    assert main(["inspect", str(tmp_path / "diffusers")]) == 0
    assert "is a checkpoint in diffusers' layout" in capsys.readouterr().out


def test_inspect_names_why_a_release_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "TurboWan2.2-I2V-A14B-high-720P.safetensors"
    sparse(file, {"blocks.0.self_attn.q.weight": ("BF16", (4, 4))})
    assert main(["inspect", str(file)]) == 2
    assert "sparse linear attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "absent"], "error: absent: no such file or folder"),
        (["inspect", ".", "--ckpt_dir", "."], "error: --ckpt_dir . holds no expert"),
        (["inspect", "."], "error: .: no safetensors or GGUF file in this folder"),
        (["inspect", "cut.safetensors"], "error: cut.safetensors: not a safetensors file, or cut off"),
        (["inspect", "small.safetensors"], "20 of 60 tensors do not fit the model"),
        (
            ["bake", "--task", "t2v-A14B", "--ckpt_dir", ".", "--out", "../x"],
            "error: nothing to bake: give --lora_dir or --lora",
        ),
        (
            ["bake", "--lora", "a:b", "--task", "t2v-A14B", "--ckpt_dir", ".", "--out", "../x"],
            "error: --lora a:b: no such file",
        ),
        (
            ["bake", "--lora", "model=a", "--task", "t2v-A14B", "--ckpt_dir", ".", "--out", "../x"],
            "it has high and low",
        ),
        (
            ["bake", "--lora", "a", "--task", "t2v-A14B", "--ckpt_dir", ".", "--out", "../x"],
            "error: --lora a: no such file",
        ),
        (["bake", "--lora_dir", "a", "--task", "ti2v-5B", "--ckpt_dir", ".", "--out", "../x"], "--lora_dir a: no such"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "downloads" / "of today"  # no other test's checkpoint is near
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    if arguments[1].endswith(".safetensors"):
        Path("cut.safetensors").write_bytes(b"\0" * 7)
        family("lightning", folder).rename("small.safetensors")
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert sentence in error
    assert error.count("\n") == 1
    assert bool(out) == ("small.safetensors" in arguments), "no report of a file that is none"


def test_bake_with_stacked_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style = write(tmp_path / "style.safetensors", spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED))
    arguments = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--out", str(tmp_path / "out")]
    loras = ["--lora_dir", str(lora_dir("t2v-A14B")), "--lora_strength", "1,0.5"]
    assert main(["bake", *arguments, *loras, "--lora", f"low={style}:0.25", "--lora", str(style)]) == 0
    assert "baked: " in capsys.readouterr().err
    record = record_of(tmp_path / "out")
    assert record is not None
    assert [lora["strength"] for lora in record["loras"]["high"]] == [1.0, 1.0]
    assert [lora["strength"] for lora in record["loras"]["low"]] == [0.5, 0.25, 1.0]
    assert main(["bake", *arguments, *loras]) == 2
    assert "already exists" in capsys.readouterr().err


def test_an_unrecognised_lora_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lora = tmp_path / "out", str(lora_dir("t2v-A14B"))
    arguments = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--out", str(out)]
    assert main(["bake", *arguments, "--lora_dir", lora, "--sample_steps", "6", "--sample_guide_scale", "1,1.5"]) == 0
    given = {"task": "t2v-A14B", "ckpt_dir": str(out), "prompt": "a cat", "size": "64*64", "frame_num": 5}
    made = resolve(given)
    assert isinstance(made, Generate)
    settings = made.sampling
    assert (made.weights.release.name, settings.steps, settings.solver, settings.shift) == ("lora-t2v", 6, "euler", 5.0)
    assert settings.guidance == (1.0, 1.5)
    with pytest.raises(InputError, match=r"has the LoRA \S+ merged in already.*; --lora_allow_partial does it all"):
        make_plan(resolve({**given, "lora_dir": lora}), Runtime())
    again = ["--task", "t2v-A14B", "--ckpt_dir", str(out), "--out", str(tmp_path / "again"), "--lora_dir", lora]
    assert main(["bake", *again]) == 2
    assert capsys.readouterr().err.count("merged in already") == 2


def test_a_style_leaves_the_checkpoint_what_it_is(tmp_path: Path) -> None:
    style = write(tmp_path / "style.safetensors", spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED))
    arguments = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--out", str(tmp_path / "out")]
    assert main(["bake", *arguments, "--lora", str(style)]) == 0
    settings = resolve({"task": "t2v-A14B", "ckpt_dir": str(tmp_path / "out"), "prompt": "a cat"}).sampling
    assert (settings.steps, settings.solver, settings.guidance) == (40, "unipc", (3.0, 4.0))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sample_steps", "0"], "--sample_steps 0 is out of range"),
        (["--sample_shift", "nan"], "--sample_shift nan is out of range: must be between 0.01 and 100"),
        (["--sample_guide_scale", "1,2,3"], "takes one number or two with a comma between, not '1,2,3'"),
        (["--sample_guide_scale", "x"], "takes one number or two"),
        (["--preset", "seko"], "no preset 'seko'"),
        (["--preset", "ti2v-turbo"], "--preset ti2v-turbo is not a distillation of t2v-A14B"),
        (["--preset", "motion-8"], "--preset motion-8 is not a distillation of t2v-A14B"),
        (["--preset", "lightwan"], "packed 4-bit"),
        (["--lora_alpha", "nan"], "--lora_alpha must be a number above 0, not nan"),
    ],
)
def test_bad_settings_of_a_bake(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--out", str(tmp_path / "out")]
    assert main(["bake", *arguments, "--lora_dir", str(lora_dir("t2v-A14B")), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning.bake._bring_others", interrupt)
    arguments = ["--task", "ti2v-5B", "--ckpt_dir", str(checkpoint("ti2v-5B")), "--out", str(tmp_path / "out")]
    assert main(["bake", *arguments, "--lora_dir", str(lora_dir("ti2v-5B")), "--dtype", "fp32"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(["bake", *arguments, "--lora_dir", str(lora_dir("ti2v-5B")), "--dtype", "fp32"]) == 0
    record = record_of(tmp_path / "out")
    assert record is not None
    assert record["dtype"] == str(torch.float32).removeprefix("torch.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "x", "--tasks", "t2v-A14B"], "there is no flag --tasks; did you mean --task?"),
        (["inspect", "x", "y"], "unexpected 'y'"),
        (["inspekt", "x"], "inspect|bake: "),
        (["inspect", "x", "--task", "t2v"], "--task: "),
        (["inspect", "x", "--lora_alpha", "one"], "--lora_alpha: "),
        (["inspect", "x", "--task"], "--task "),
        (["bake", "--task", "t2v-A14B"], "the following arguments are required: --ckpt_dir, --out"),
        (["bake", "--output", "x"], "there is no flag --output; did you mean --out?"),
        ([], "the following arguments are required: inspect|bake"),
    ],
)
def test_a_mistyped_line_is_answered_in_one(words, sentence, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {sentence}"), err


# -- inspect says what a run says


def test_a_two_expert_file_of_diffusers_is_judged_expert_by_expert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halves: dict[str, torch.Tensor] = {}
    for component, expert in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        halves |= spelled(small_pairs(expert), f"{component}.{{}}.", halves=AB, module=diffusers_module)
    file = write(tmp_path / "pytorch_lora_weights.safetensors", halves)
    assert main(["inspect", str(file), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 0
    out = capsys.readouterr().out
    assert "20/20 pairs" in out
    assert "40 ignored" in out
    assert f"use       --lora {file}" in out


def test_incomplete_networks_are_refused_as_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("t2v-A14B")
    vae, text = torch.load(source / "Wan2.1_VAE.pth"), torch.load(source / "models_t5_umt5-xxl-enc-bf16.pth")
    decoder = {name: tensor for name, tensor in vae.items() if not name.startswith(("encoder.", "conv1."))}
    hole = {name: tensor for name, tensor in text.items() if name != "blocks.1.ffn.fc2.weight"}
    for name, tensors, missing in (("vae", decoder, "encoder.conv1.weight"), ("t5", hole, "blocks.1.ffn.fc2.weight")):
        file = write(tmp_path / f"{name}.safetensors", tensors)
        assert main(["inspect", str(file), "--ckpt_dir", str(source)]) == 2
        out, error = capsys.readouterr()
        assert missing in error
        assert "use " not in out


@pytest.mark.parametrize("suffix", ["", "odd name (1)"])
def test_commands_are_quoted_for_a_shell(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"my files{suffix}"
    file = write(folder / "a 'style'.safetensors", spelled(small_pairs(), "diffusion_model.{}.", alpha=STORED))
    assert main(["inspect", str(file), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 0
    use = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  use "))
    assert shlex.split(use)[1:] == ["--lora", str(file)]
    shutil.copytree(lora_dir("t2v-A14B"), folder / "release")
    assert main(["inspect", str(folder / "release"), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 0
    command = capsys.readouterr().out.splitlines()[-1].partition("is a release: ")[2]
    assert shlex.split(command)[-2:] == ["--lora_dir", str(folder / "release")]


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_a_checkpoint_is_judged_by_its_own_sizes(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped examples end without an error."""
    source = checkpoint(task)
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert f"{source} is a checkpoint: python generate.py --task {task} --ckpt_dir {source}" in out


SHIPPED = [
    path
    for path in sorted((ROOT / "examples").glob("*/**/*"))
    if path.name.endswith((".index.json", ".pth", "_model.safetensors")) or path.name.startswith("lora-")
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_shipped_file_is_judged_by_the_checkpoint_beside_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(path)]) == 0
    out, error = capsys.readouterr()
    assert not error
    assert out.count("  fits ") == len(list(path.glob("*.safetensors")) if path.is_dir() else [path])
    if path.is_dir():
        last = shlex.split(out.splitlines()[-1].partition(": ")[2])
        assert last[:2] == ["python", "generate.py"]
        assert generate.main([*last[2:], "--dry_run"]) == 0


def test_networks_in_other_folders_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "downloads" / "of today"
    folder.mkdir(parents=True)
    for file in (lora_dir("t2v-A14B") / "high_noise_model.safetensors", checkpoint("ti2v-5B") / "Wan2.2_VAE.pth"):
        shutil.copy(file, folder)
    assert main(["inspect", str(folder / "Wan2.2_VAE.pth"), "--ckpt_dir", str(checkpoint("ti2v-5B"))]) == 0
    assert "fits      ti2v-5B\n" in capsys.readouterr().out
    assert main(["inspect", str(folder / "high_noise_model.safetensors")]) == 2
    assert "(--ckpt_dir judges by a checkpoint of other sizes)" in capsys.readouterr().err


def test_an_expert_in_a_folder_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "examples" / "shapes" / "Wan2.2-I2V-A14B" / "low_noise_model"
    assert main(["inspect", str(folder)]) == 0
    assert "--expert low=" in capsys.readouterr().out
