"""The command line: its flags, its errors with their exit codes, and real runs on the small checkpoints."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import generate
from tests.checkpoints.test_forms import wide_folder
from tests.forked import python
from tests.prompt_extension.fake_services import FakeService
from wan import __version__
from wan.cli.options import DECODE, OPTIONS, Request, Scope, numbers, path, paths, real, text, truth, whole, wholes
from wan.cli.parser import parse, program, to_decode, words_of
from wan.media.video import VideoWriter

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
T2V = ["--ckpt_dir", str(TINY / "Wan2.2-T2V-A14B"), "--lora_dir", str(TINY / "lora-t2v")]
I2V = ["--task", "i2v-A14B", "--ckpt_dir", str(TINY / "Wan2.2-I2V-A14B"), "--lora_dir", str(TINY / "lora-i2v")]
SMALL = ["--size", "64*48", "--frame_num", "5", "--device", "cpu", "--dtype", "fp32"]
HEAVY = ("torch", "numpy", "PIL", "transformers", "diffusers", "safetensors", "huggingface_hub", "imageio_ffmpeg")

# The flags are a promise to everybody's scripts: a change here is a change of the product.
FLAGS = """
    attention base_seed cache chain ckpt_dir convert_model_dtype debug decode_latents device dit_fsdp dry_run dtype
    expert extend_only frame_num gallery grid high_steps ignore_disk image image_path_file json last_image lora
    lora_allow_partial lora_alpha lora_dir lora_mode lora_strength nag negative_prompt no_extend_cache noise_device
    num_videos offload_model on_error overwrite preset preview preview_steps prompt prompt_extend_method
    prompt_extend_model prompt_extend_on_error prompt_extend_options prompt_extend_target_lang prompt_file quality
    quantize record replay resume ring_size sample_guide_scale sample_shift sample_solver sample_steps save_dir
    save_file save_latents seconds shard size strength sweep t5_cpu t5_fsdp task text_encoder timesteps tokenizer
    ulysses_size use_prompt_extend vae vae_dtype vae_tiling video vram window
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "DASH_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def main(capsys, *words: str) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of stderr)."""
    code = generate.main(words)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


# --- flags


def test_flags_are_frozen():
    assert sorted(OPTIONS) == FLAGS.split()
    assert {item.name for item in fields(Request)} == set(OPTIONS)


def shown_by(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as raised:
        generate.main(words)
    assert raised.value.code == 0
    return capsys.readouterr().out


def test_help_all_names_every_flag(capsys):
    text = shown_by(capsys, "--help", "all")
    assert re.findall(r"^  --(\w+)", text, re.MULTILINE) == ["version", *OPTIONS]
    assert all(f"\n{title}:\n" in text for title in {row.group for row in OPTIONS.values()})


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_flags_that_matter_with_an_example_each(capsys, flag):
    text = " ".join(shown_by(capsys, flag).split())
    rows = {name: row for name, row in OPTIONS.items() if row.example is not None}
    assert 15 <= len(rows) <= 25
    assert set(re.findall(r" --(\w+) (?=[A-Z])", text)) <= set(rows)
    for name, row in rows.items():
        assert f" --{name} " in text
        assert bool(row.example) == (f"example: --{name} {row.example}" in text)
    assert not parse([word for n, row in rows.items() for word in shlex.split(f"--{n} {row.example}")])[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as raised:
        generate.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"wan-lightning {__version__}\n"


ASK = """
import sys, generate
try:
    code = generate.main(sys.argv[1:])
except SystemExit as e:
    code = e.code
print("LOADED", code, *[name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("words", "code", "allowed"),
    [
        (["--help"], 0, set()),
        (["--version"], 0, set()),
        (["--lora-dir", "x"], 2, set()),
        (["--frame_num"], 2, set()),
        ([*T2V, "--frame_num", "80"], 2, {"PIL"}),
        ([*T2V, "--prompt_file", "absent.txt", "--size", "3"], 2, {"PIL"}),
        ([*I2V, "--image", str(TINY / "Wan2.2-I2V-A14B" / "Wan2.1_VAE.pth")], 2, {"PIL"}),
        (["--extend_only", "a.doc"], 2, {"PIL"}),
        ([*T2V, "--ckpt_dir", str(TINY)], 2, {"PIL"}),  # a folder that lacks files
    ],
)
def test_answers_come_without_slow_imports(words, code, allowed):
    asked = [sys.executable, "-c", ASK.format(heavy=HEAVY), *words]
    done = subprocess.run(asked, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    _, found, *loaded = done.stdout.splitlines()[-1].split()
    assert (int(found), set(loaded) - allowed) == (code, set())


def test_a_plan_imports_neither_diffusers_nor_transformers():
    done = python(
        "-c", ASK.format(heavy=("diffusers", "transformers")), *T2V, *SMALL, "--sample_solver=unipc", "--dry_run"
    )
    assert done.stdout.splitlines()[-1] == "LOADED 0"


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["--lora-dir", "x"], ["there is no flag --lora-dir; did you mean --lora_dir?"]),
        (["--sampel_steps=4"], ["there is no flag --sampel_steps; did you mean --sample_steps?"]),
        (["--prompt_fil", "x", "--zzz"], ["--prompt_fil; did you mean --prompt_file?", "there is no flag --zzz"]),
        (["--frame", "81"], ["there is no flag --frame"]),  # no abbreviations
        (["--prompt", "a", "cat"], ["'cat': --prompt "]),
        (["--prompt", "“a", "big", "cat”"], ["'big cat”': --prompt "]),
        (["a cat"], ["'a cat'"]),
        (["--t5_cpu", "True"], ["'True': --t5_cpu "]),
        (["--t5_cpu=True"], ["--t5_cpu"]),
        (["--size"], ["--size "]),
        (["--lora_strength", "-0.5,1"], ["--lora_strength=VALUE"]),
        (["-height", "5"], ["-height; did you mean --size?"]),
        (["—size", "832*480"], ["—size; did you mean --size?"]),
        (["-o", "x.mp4"], ["there is no flag -o; did you mean --save_dir or --save_file?"]),
        (["-prompt", "a cat"], ["there is no flag -prompt; did you mean --prompt?"]),
        (["--output=x.mp4"], ["there is no flag --output; did you mean --save_dir or --save_file?"]),
        (["--steps", "4"], ["there is no flag --steps; did you mean --sample_steps?"]),
        (["--width", "832", "--height", "480"], ["--width; did you mean --size?", "--height; did you mean --size?"]),
        (["--seed", "1"], ["there is no flag --seed; did you mean --base_seed?"]),
        (["--negative", "x"], ["there is no flag --negative; did you mean --negative_prompt?"]),
        (["--guidance-scale", "1"], ["there is no flag --guidance-scale; did you mean --sample_guide_scale?"]),
        (["--model", "x"], ["there is no flag --model; did you mean --ckpt_dir?"]),
        (["--fps", "24"], ["--fps: each model has one frame rate; --seconds"]),
        (["--audio", "a.wav"], ["--audio: this toolkit does not make videos by S2V"]),
        (["--src_root_path", "x"], ["--src_root_path: this toolkit does not make"]),
    ],
)
def test_mistyped_flags(capsys, words, sentences):
    code, out, err = main(capsys, *words)
    assert (code, out, len(err)) == (2, "", len(sentences))
    for line, sentence in zip(err, sentences, strict=True):
        assert line.startswith("error: ")
        assert sentence in line


@pytest.mark.parametrize(
    ("words", "value"),
    [([], None), (["--offload_model"], True), (["--offload_model", "False"], False), (["--offload_model=True"], True)],
)
def test_offload_model_spellings(words, value):
    assert generate.parse(words)[0].get("offload_model") is value


def test_values_that_look_like_flags():
    words = ["--base_seed", "-1", "--lora", "a:-0.5", "--lora", "high=b", "--lora_strength=-0.5,1"]
    request = Request(**generate.parse(words)[0])
    assert (request.base_seed, request.lora, request.lora_strength) == (-1, ("a:-0.5", "high=b"), "-0.5,1")


# --- a request as a command line, and the one that finishes a video from its latents

SET = {
    text: "it's a «cat»\n-x", path: "-a b.mp4", paths: ("high=a b:0.5", "-c"), whole: -7, real: 2.5e-7, truth: True,
    numbers: "-2,1e-07", wholes: "-9,4",
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_printed_option_is_read_as_it_was(name):
    value = OPTIONS[name].choices[-1] if OPTIONS[name].choices else SET[OPTIONS[name].read]
    request = Request(**{name: value})
    values, problems = parse(shlex.split(shlex.join(words_of(request))))
    assert (Request(**values), problems) == (request, [])


def test_all_options_at_once_are_read_as_they_were():
    request = Request(**{n: row.choices[-1] if row.choices else SET[row.read] for n, row in OPTIONS.items()})
    assert Request(**parse(words_of(request))[0]) == request
    decode = to_decode(request, Path("l.safetensors"), Path("v.mp4"))
    assert Request(**parse(words_of(decode))[0]) == decode
    kept = {name for name in OPTIONS if getattr(decode, name) == getattr(request, name)}
    assert kept == {"overwrite"} | {
        name for name, row in OPTIONS.items() if row.scope is not Scope.START and set(DECODE) <= set(row.counts_with)
    }


# --- errors: input, exit code, sentence


def put(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


ERRORS = {
    "no checkpoint": ([], "--ckpt_dir is missing"),
    "checkpoint absent": (["--ckpt_dir", "./absent"], "hf download Wan-AI/Wan2.2-T2V-A14B"),
    "checkpoint empty": (["--ckpt_dir", "."], "models_t5_umt5-xxl-enc-bf16.pth"),
    "lora folder absent": ([*T2V, "--lora_dir", "absent"], "--lora_dir absent: no such folder"),
    "lora for no expert": ([*T2V, "--lora_dir", "."], "high_noise_model.safetensors and low_noise_model.safetensors"),
    "lora is no lora": ([*T2V, "--lora", "text.txt"], "--lora text.txt: not a safetensors file"),
    "lora cut off": ([*T2V, "--lora", "cut.safetensors"], "--lora cut.safetensors"),
    "prompt file absent": ([*T2V, "--prompt_file", "absent.txt"], "--prompt_file absent.txt: no such file"),
    "prompt file empty": ([*T2V, "--prompt_file", "empty.txt"], "empty.txt: the prompt file holds no prompt"),
    "prompt file not UTF-8": ([*T2V, "--prompt_file", "latin.txt"], "latin.txt line 2: is not UTF-8"),
    "row malformed": ([*T2V, "--prompt_file", "bad.jsonl"], "bad.jsonl line 2: not valid JSON"),
    "row with unknown key": ([*T2V, "--prompt_file", "bad.csv"], "bad.csv line 1: unknown column 'promt'"),
    "image absent": ([*I2V, "--image", "absent.png"], "--image absent.png: no such image file"),
    "image corrupt": ([*I2V, "--image", "text.txt"], "--image text.txt: not an image"),
    "last image absent": ([*I2V, "--last_image", "absent.png"], "--last_image absent.png: no such image file"),
    "size absurd": ([*T2V, "--size", "100000*100000"], "--size 100000*100000 is too large; a side has at most 16384"),
    "frame_num absurd": ([*T2V, "--frame_num", "100001"], "--frame_num 100001 is too long; a video has at most 4093"),
    "large number": ([*T2V, "--vram", "2e6"], "--vram 2000000 is out of range"),
    "vae corrupt": ([*T2V, "--vae", "text.txt"], "--vae text.txt: not a safetensors file"),
    "image in a row": ([*I2V, "--prompt_file", "image.jsonl"], "image.jsonl line 1: absent.png: no such image file"),
    "counts differ": (
        [*I2V, "--prompt_file", "two.txt", "--image_path_file", "three.txt"],
        "--image_path_file: 2 prompts but 3 images in three.txt",
    ),
    "frame_num": ([*T2V, "--frame_num", "80"], "the nearest valid values are 77 or 81"),
    "frame_num is no number": ([*T2V, "--frame_num", "many"], "--frame_num takes a whole number, not 'many'"),
    "size": ([*T2V, "--size", "830*480"], "the nearest is 832*480"),
    "steps": ([*T2V, "--sample_steps", "0"], "--sample_steps 0 is out of range"),
    "shift": ([*T2V, "--sample_shift", "nan"], "--sample_shift nan is out of range"),
    "scale": ([*T2V, "--sample_guide_scale", "inf"], "--sample_guide_scale inf is out of range"),
    "strength": ([*T2V, "--lora_strength", "99"], "--lora_strength 99 is out of range"),
    "timesteps": ([*T2V, "--timesteps", "1000,900,900"], "--timesteps 1000,900,900: each must be below"),
    "ulysses without torchrun": ([*T2V, "--ulysses_size", "4"], "torchrun --nproc-per-node 4 generate.py"),
    "fsdp without torchrun": ([*T2V, "--dit_fsdp"], "--dit_fsdp needs several processes"),
    "folder is a file": ([*T2V, "--save_dir", "text.txt"], "text.txt is a file"),
    "unsupported extension": ([*T2V, "--save_file", "a.gif"], "videos are written as .mp4"),
    "save_file for several": ([*T2V, "--save_file", "a.mp4", "--num_videos", "2"], "--save_file names one video"),
    "same output twice": ([*T2V, "--prompt_file", "same.jsonl"], "videos 0000 and 0001 would both be written to"),
    "output exists": ([*T2V, "--save_file", "there.mp4"], "there.mp4 already exists"),
    "no such device": ([*T2V, "--device", "cuda:99"], "--device cuda:99"),
    "preset": ([*T2V, "--preset", "fast"], "t2v-seko-v1.1"),
    "latents absent": ([*T2V, "--decode_latents", "absent.safetensors"], "--decode_latents absent.safetensors"),
    "latents are none": ([*T2V, "--decode_latents", "text.txt"], "--decode_latents text.txt"),
    "record absent": (["--replay", "absent.json"], "--replay absent.json: no such file"),
    "no key": ([*T2V, "--use_prompt_extend", "--prompt_extend_method", "dashscope"], "DASH_API_KEY"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_before_anything_is_started(tmp_path, capsys, name):
    words, sentence = ERRORS[name]
    put(tmp_path / "text.txt", "text")
    put(tmp_path / "cut.safetensors", (TINY / "lora-t2v" / "low_noise_model.safetensors").read_bytes()[:9000])
    put(tmp_path / "empty.txt", "\n")
    put(tmp_path / "latin.txt", b"fine\ncaf\xe9\n")
    put(tmp_path / "bad.jsonl", '{"prompt": "a"}\n{"prompt"\n')
    put(tmp_path / "bad.csv", "promt\na\n")
    put(tmp_path / "image.jsonl", '{"prompt": "a", "image": "absent.png"}')
    put(tmp_path / "two.txt", "a\nb\n")
    put(tmp_path / "three.txt", f"{TINY / 'input.png'}\n" * 3)
    put(tmp_path / "same.jsonl", '{"prompt": "a", "save_file": "s.mp4"}\n' * 2)
    put(tmp_path / "there.mp4", "")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = main(capsys, *SMALL, *words)
    assert (code, out) == (2, "")
    assert any(sentence in line for line in err), err
    assert all(line.startswith("error: ") for line in err)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_encoder(capsys, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "absent-ffmpeg")
    code, out, err = main(capsys, *T2V, *SMALL)
    assert (code, out, len(err)) == (2, "", 1)
    assert "ffmpeg" in err[0]


def test_a_limit_of_threads_is_one_line(tmp_path, capsys, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    code, _, lines = main(capsys, *T2V, *SMALL, "--prompt", "cat", "--save_dir", str(tmp_path))
    errors = [line for line in lines if not line.startswith("warning: ")]
    assert (code, len(errors)) == (1, 1), lines
    assert "ulimit -u" in errors[0]


def test_all_problems_at_once(capsys):
    words = ["--frame_num", "x", "--sample_steps", "0", "--size", "1*1", "--prompt_file", "absent.txt"]
    code, _, err = main(capsys, *words)
    assert (code, len(err)) == (2, 5)


def test_all_missing_files_at_once(capsys):
    flags = ("prompt_file", "image", "last_image", "vae", "text_encoder", "lora", "ckpt_dir")
    words = [word for flag in flags for word in (f"--{flag}", f"./no_{flag}.txt")]
    code, _, err = main(capsys, "--task", "i2v-A14B", *words)
    assert (code, len(err)) == (2, len(flags))
    for flag in flags:
        assert any(line.startswith(f"error: --{flag} ") and f"no_{flag}.txt: no such" in line for line in err), flag


def test_debug_shows_where(capsys):
    _, _, err = main(capsys, "--frame_num", "80", "--debug")
    assert any("Traceback" in line for line in err)
    assert any(line.startswith("error: ") for line in err)


# --- warnings of what has no effect, and of what is cut off


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--prompt_extend_model", "q"], "--prompt_extend_model has no effect without --use_prompt_extend or"),
        (["--save_dir", "a", "--save_file", "c/b.mp4"], "--save_dir has no effect beside --save_file"),
        (["--negative_prompt", "x"], "a negative prompt has no effect here: no step is guided"),
        (["--prompt", "cat " * 700], "--prompt: the model reads 512 tokens of a prompt; the last "),
        (["--sample_guide_scale", "3", "--negative_prompt", "cat " * 700], "--negative_prompt: the model reads 512"),
    ],
)
def test_warnings_about_flags_without_effect(capsys, words, warning):
    code, out, err = main(capsys, *T2V, *SMALL, "--prompt", "a cat", *words, "--dry_run")
    assert (code, err) == (0, [])
    assert [line.startswith(f"warning: {warning}") for line in out.splitlines()].count(True) == 1, out


def test_effective_flags_give_no_warning(capsys):
    words = ["--vram", "1", "--offload_model", "True", "--sample_guide_scale", "3", "--negative_prompt", "x"]
    code, out, _ = main(capsys, *T2V, *SMALL, "--prompt", "a cat", *words, "--dry_run")
    assert (code, "no effect" in out, "cut off" in out) == (0, False, False)


def test_prompts_that_are_cut_have_one_warning(tmp_path, capsys):
    put(tmp_path / "p.txt", f"{'cat ' * 600}\na\n{'cat ' * 700}\n")
    _, out, _ = main(capsys, *T2V, *SMALL, "--prompt_file", "p.txt", "--dry_run")
    (line,) = [line for line in out.splitlines() if "cut off" in line]
    assert re.fullmatch(r"warning: p.txt line 3: .* the last \d+ tokens are cut off, and of 1 other prompt some", line)


def test_decoding_looks_at_few_flags(capsys):
    assert main(capsys, *T2V, *SMALL, "--save_file", "a.mp4", "--save_latents")[0] == 0
    words = ["--decode_latents", "a.latents.safetensors", "--save_file", "b.mp4", "--steps_are", "4"]
    assert main(capsys, *T2V, *SMALL, *words)[0] == 2
    _, _, err = main(capsys, *T2V, *SMALL, *words[:4], "--sample_steps", "4", "--dry_run")
    ignored = ("lora_dir", "size", "frame_num", "sample_steps")
    assert err == [f"warning: --{name} has no effect beside --decode_latents" for name in ignored]


@pytest.mark.parametrize(
    ("script", "command", "launched"),
    [
        ("/usr/bin/wan-generate", "wan-generate", "-m generate"),
        ("../generate.py", "python ../generate.py", "../generate.py"),
        ("elsewhere.py", "python generate.py", "generate.py"),
    ],
)
def test_commands_in_messages_are_those_of_the_user(capsys, monkeypatch, script, command, launched):
    monkeypatch.setattr(sys, "argv", [script])
    assert program() == command
    _, _, err = main(capsys, *T2V, *SMALL, "--ulysses_size", "2")
    assert f"torchrun --nproc-per-node 2 {launched} ..." in err[0]


# --- plans and runs


def test_dry_run(tmp_path, capsys):
    code, out, err = main(capsys, *T2V, *SMALL, "--prompt", "a cat", "--base_seed", "3", "--dry_run")
    assert (code, err) == (0, [])
    assert "step 1 t=1000.0 high cfg 1 | step 2 t=937.5 high cfg 1 | step 3 t=833.3 low cfg 1" in out
    assert str(Path("outputs") / "t2v-A14B_0000_seed3_a_cat.mp4") in out
    assert "warning: size 64*48 is none of those" in out
    assert list(tmp_path.iterdir()) == []
    code, out, err = main(capsys, *T2V, *SMALL, "--dry_run", "--json")
    plan = json.loads(out.splitlines()[0])
    assert (code, err, plan["event"], len(plan["steps"])) == (0, [], "plan", 4)


@pytest.mark.parametrize(
    ("form", "how"), [("fp8", "unpacked for each product (no CUDA GPU)"), ("int8", "multiplied in int8")]
)
def test_8_bits_in_plan_record_and_replay(form, how, capsys):
    """A network of four blocks, two of which are in 8 bits."""
    shapes = ROOT / "examples" / "shapes"
    four = ["--ckpt_dir", str(shapes / "Wan2.2-T2V-A14B"), "--lora_dir", str(shapes / "lora-t2v"), *SMALL]
    _, plain, _ = main(capsys, *four, "--dry_run", "--json")
    code, out, err = main(capsys, *four, "--prompt", "a red circle", "--quantize", form, "--save_file", "a.mp4")
    assert code == 0, err
    line = f"cpu, float32, attention sdpa, weights of inner blocks in {form}, {how}\n"
    assert line in out
    assert line not in plain
    record = json.loads(Path("a.json").read_text())
    assert record["request"]["quantize"] == record["meaning"]["quantize"] == form
    rows = 2 * (9 * 192 + 768)  # of two blocks
    matrices = 2 * (8 * 192**2 + 2 * 192 * 768)
    saved = (
        json.loads(plain.splitlines()[0])["weight_bytes"]["high expert"] - record["plan"]["weight_bytes"]["high expert"]
    )
    assert saved == 3 * matrices - 4 * rows, "a byte instead of four, and a scale per row"
    code, out, err = main(capsys, "--replay", "a.json", "--dry_run")
    assert (code, line in out) == (0, True), err


def test_a_run_and_its_replay(tmp_path, capsys):
    code, _, err = main(capsys, *I2V, *SMALL, "--image", str(TINY / "input.png"), "--prompt", "猫", "--preview")
    assert code == 0, err
    (video,) = Path("outputs").glob("*.mp4")
    record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["request"]["base_seed"] == record["job"]["seed"]
    assert (record["job"]["prompt"], len(record["plan"]["steps"])) == ("猫", 4)
    for source in (video, video.with_suffix(".json")):
        target = tmp_path / f"again{source.suffix[1:]}.mp4"
        assert main(capsys, "--replay", str(source), "--save_file", str(target))[0] == 0
        assert target.with_suffix(".png").read_bytes() == video.with_suffix(".png").read_bytes()
    other = main(capsys, "--replay", str(video), "--save_file", "other.mp4", "--base_seed", "1")
    assert other[0] == 0
    assert Path("other.png").read_bytes() != video.with_suffix(".png").read_bytes()
    assert main(capsys, "--replay", str(video))[0] == 0  # beside it, under a name that says so
    assert video.with_name(f"{video.stem}_replay.mp4").is_file()
    assert main(capsys, "--replay", str(video))[0] == 2  # it would write the same file again


def test_latents_are_kept_and_decoded(capsys):
    code, _, err = main(capsys, *T2V, *SMALL, "--save_file", "a.mp4", "--save_latents", "--preview")
    assert code == 0, err
    words = [*T2V, *SMALL, "--decode_latents", "a.latents.safetensors", "--save_file", "b.mp4", "--preview"]
    assert main(capsys, *words, "--dry_run")[0] == 0
    assert not Path("b.mp4").exists()
    assert main(capsys, *words)[0] == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    vae = Path("alone", "Wan2.1_VAE.pth")  # nothing else is needed, and no other file is read
    vae.parent.mkdir()
    vae.write_bytes((TINY / "Wan2.2-T2V-A14B" / vae.name).read_bytes())
    for weights in (["--ckpt_dir", str(vae.parent)], ["--vae", str(vae)]):
        words = ["--task", "t2v-A14B", *weights, "--decode_latents", "a.latents.safetensors", "--save_file", "c.mp4"]
        code, _, err = main(capsys, *words, "--preview", "--overwrite")
        assert code == 0, err
        assert Path("c.png").read_bytes() == Path("a.png").read_bytes()
    vae.unlink()
    code, _, err = main(capsys, *words[:2], "--ckpt_dir", "alone", *words[4:], "--overwrite")
    assert (code, vae.name in "".join(err)) == (2, True)


@pytest.mark.parametrize("alone", [False, True], ids=["other_vae", "files_alone"])
def test_the_printed_command_makes_the_same_video(tmp_path, capsys, monkeypatch, alone):
    source = wide_folder(tmp_path / "a folder")
    torch.save({k: tensor * 1.5 for k, tensor in torch.load(source / "Wan2.1_VAE.pth").items()}, "my vae.pth")
    weights = [f"{name}={source}/{name}_noise_model/diffusion_pytorch_model.safetensors" for name in ("high", "low")]
    words = [*SMALL, "--vae", "my vae.pth", "--vae_dtype", "bf16", "--preview", "--prompt", "a cat", "--base_seed", "1"]
    if alone:
        words += ["--expert", weights[0], "--expert", weights[1], "--tokenizer", str(source / "google" / "umt5-xxl")]
        words += ["--text_encoder", str(source / "models_t5_umt5-xxl-enc-bf16.pth")]
    else:
        words += [*T2V, "--vae_tiling"]
    code, _, err = main(capsys, *words, "--save_file", "whole.mp4")
    assert code == 0, err

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", full)
        code, _, err = main(capsys, *words, "--save_file", "it's.mp4")
    assert (code, Path("it's.mp4").exists()) == (1, False)
    command = next(line for line in err if "--decode_latents" in line).partition(f"{program()} ")[2]
    assert "None" not in command
    code, _, err = main(capsys, *shlex.split(command))
    assert (code, [line for line in err if "no effect" in line]) == (0, [])
    assert Path("it's.png").read_bytes() == Path("whole.png").read_bytes()


def test_extend_only_then_use(tmp_path, capsys, monkeypatch):
    put(tmp_path / "p.jsonl", '{"prompt": "cat", "seed": 5}\n{"prompt": "dog", "negative_prompt": "no"}\n')
    asked = ["--prompt_extend_method", "openai", "--prompt_extend_model", "m", "--prompt_extend_target_lang", "en"]
    with FakeService(answer="A long prompt about it.") as service:
        monkeypatch.setenv("OPENAI_BASE_URL", service.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
        words = ["--prompt_file", "p.jsonl", "--extend_only", "out.jsonl", *asked]
        assert main(capsys, *words, "--dry_run")[0] == 0
        assert (service.requests, Path("out.jsonl").exists()) == ([], False)
        code, out, err = main(capsys, *words)
        assert (code, out) == (0, "out.jsonl\n")
        assert "secret-key" not in out + "\n".join(err)
        assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == [
            {"prompt": "A long prompt about it.", "seed": 5, "original_prompt": "cat"},
            {"prompt": "A long prompt about it.", "negative_prompt": "no", "original_prompt": "dog"},
        ]
        assert len(service.requests) == 2
        options = ["--prompt_extend_options", '{"enable_thinking": false}', "--overwrite"]
        assert main(capsys, *words, *options)[0] == 0
        assert service.requests.pop().json["enable_thinking"] is service.requests.pop().json["enable_thinking"] is False
        # bad input is found before anything is asked
        (tmp_path / "folder.jsonl").mkdir()
        for file in ("p.jsonl/out.jsonl", "folder.jsonl"):  # a folder that is a file, a file that is a folder
            code, _, err = main(capsys, *words[:3], file, *asked, "--overwrite", "--dry_run")
            assert (code, "--extend_only" in err[-1] or "p.jsonl" in err[-1]) == (2, True)
        for options in ("[1]", "{", '{"model": "x"}'):
            code, _, err = main(capsys, *words, "--overwrite", "--prompt_extend_options", options)
            assert (code, "--prompt_extend_options" in err[-1]) == (2, True)
        service.plan = [(400, {"error": "no"})] * 2
        code, out, err = main(capsys, *words[:3], "failed.txt", *asked, "--no_extend_cache")
        assert (code, out, "--extend_only" in err[-1], Path("failed.txt").exists()) == (1, "", True, False)
        service.requests = service.requests[:2]
        assert main(capsys, *T2V, *SMALL, "--use_prompt_extend", *asked, "--lora", "absent")[0] == 2
        assert main(capsys, *T2V, *SMALL, "--use_prompt_extend", *asked, "--device", "cuda:99")[0] == 2
        assert len(service.requests) == 2
        words = [*T2V, *SMALL, "--prompt", "fox", "--base_seed", "1", "--use_prompt_extend", *asked]
        code, out, _ = main(capsys, *words)
        assert code == 0
        assert "prompt extension: openai writes the prompts out first\n" in out
    (record,) = Path("outputs").glob("t2v-A14B_0000_seed1_fox.json")
    job = json.loads(record.read_text())["job"]
    assert (job["prompt"], job["original_prompt"]) == ("A long prompt about it.", "fox")
    code, out, _ = main(capsys, *T2V, *SMALL, "--prompt_file", "out.jsonl", "--dry_run")
    assert code == 0
    assert "_dog.mp4" in out


def test_examples(capsys):
    words = [*SMALL, "--dry_run"]
    assert main(capsys, *T2V, *words, "--prompt_file", str(ROOT / "examples" / "prompt_list.txt"))[0] == 0
    code, out, err = main(capsys, *I2V, *words, "--prompt_file", str(ROOT / "examples" / "prompts.jsonl"))
    assert code == 0, err
    assert out.count("832x480, the area of") == 3
    code, out, _ = main(capsys, *I2V, *words)
    assert code == 0
    assert "i2v_input.png is used" in out


# --- real processes


def test_process_that_succeeds_and_resumes():
    words = [ROOT / "generate.py", *T2V, *SMALL, "--prompt", "a cat", "--base_seed", "1", "--json"]
    done = python(*words)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert (events[0], events.count("saved")) == ("plan", 1)
    assert Path("outputs/t2v-A14B_0000_seed1_a_cat.mp4").stat().st_size > 0
    assert python(*words).returncode == 2
    again = python(*words, "--resume")
    assert again.returncode == 0
    assert '"event": "saved"' not in again.stdout


def test_process_with_a_bad_flag():
    done = python(ROOT / "generate.py", "--frames", "81")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no flag --frames; did you mean --frame_num?\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource limits")
def test_process_whose_job_fails():
    """No file may grow beyond a few bytes, so the finished video cannot be written."""
    import resource

    words = [ROOT / "generate.py", *T2V, *SMALL, "--prompt", "a cat"]
    done = python(*words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)))
    assert done.returncode == 1, done.stderr
    assert not list(Path("outputs").glob("*.mp4"))
    assert "failed" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX named pipes")
def test_process_that_is_interrupted():
    """It waits for a prompt file that never comes to an end."""
    os.mkfifo("prompts.txt")
    words = [sys.executable, str(ROOT / "generate.py"), *T2V, "--prompt_file", "prompts.txt"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open("prompts.txt", "wb"):  # opens when the program does
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminated_process_cleans_up(number, code):
    """As Ctrl-C: finished steps are kept, the command that finishes the video is printed, no half file is left."""
    script = f"""
import os, sys
import generate
from wan.pipeline import Pipeline

def decode(self, latent, finer=False, convert=None):
    os.kill(os.getpid(), {int(number)})
    yield latent

Pipeline.decode = decode
sys.exit(generate.main(sys.argv[1:]))
"""
    done = python("-c", script, *T2V, *SMALL, "--prompt", "a cat", "--base_seed", "1")
    assert done.returncode == code, done.stderr
    assert "--decode_latents" in done.stderr
    assert "1 not tried" in done.stderr, "the summary"
    assert done.stderr.endswith("interrupted\n")
    assert [path.name for path in Path("outputs").iterdir()] == ["t2v-A14B_0000_seed1_a_cat.latents.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_log_that_nobody_reads_does_not_end_the_work():
    words = [sys.executable, str(ROOT / "generate.py"), *T2V, *SMALL, "--prompt", "a cat", "--base_seed", "1", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=300) == 0
    assert Path("outputs/t2v-A14B_0000_seed1_a_cat.mp4").is_file()


def test_a_prompt_that_the_terminal_cannot_show():
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", *T2V, *SMALL, "--prompt", "一只猫", "--dry_run"], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u4e00" in done.stdout


@pytest.mark.slow
def test_processes_that_agree():
    """Two processes: one plan, with one seed that the first one drew; one error line for bad input."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "generate.py", *T2V, *SMALL]
    done = python(*start, "--dry_run", "--ulysses_size", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("job 0000:") == 1
    done = python(*start, "--dry_run", "--lora", "absent")
    assert done.returncode != 0
    assert done.stdout == ""
    sentence = "error: --lora absent: no such file"
    assert done.stderr.splitlines().count(sentence) == 1
    assert sentence in done.stderr.splitlines()[-2], "torchrun's report, which stands last, says why"


def test_command_line_of_the_makefile():
    """The demo's flags are flags of this program."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    lines = re.findall(r"(?:generate\.py|-m generate) (--.*)", text)
    assert len(lines) == 2
    for line in lines:
        assert generate.parse(shlex.split(line))[1] == []
