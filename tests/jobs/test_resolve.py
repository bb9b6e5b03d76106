"""From flags to a run: defaults, numbers, prompt files, images, LoRAs, outputs, replay. No weight is read."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from wan.cli.options import OPTIONS, Request, numbers, path, paths, read_all, real, text, truth, whole, wholes
from wan.configs import TASKS
from wan.distributed.launch import Runtime, Team
from wan.jobs.job import Decode, Extend, Generate
from wan.jobs.prompt_files import Row, read_rows, slug, write_rows
from wan.jobs.resolve import resolve
from wan.planning.build import make_plan
from wan.utils.errors import InputError

TINY = Path(__file__).parents[2] / "examples" / "tiny"
CHECKPOINTS = {"t2v-A14B": "Wan2.2-T2V-A14B", "i2v-A14B": "Wan2.2-I2V-A14B", "ti2v-5B": "Wan2.2-TI2V-5B"}
LORAS = {"t2v-A14B": "lora-t2v", "i2v-A14B": "lora-i2v", "ti2v-5B": "lora-ti2v"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Relative paths, the default output folder among them, lead into an empty folder; one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def asked(**flags):
    """The outcome for these flags; None: not given."""
    return resolve({name: value for name, value in flags.items() if value is not None})


def run(task: str = "t2v-A14B", distilled: bool = False, **flags):
    flags = {"prompt": "a cat", "image": str(TINY / "input.png") if task == "i2v-A14B" else None} | flags
    lora_dir = str(TINY / LORAS[task]) if distilled else None
    return asked(**{"task": task, "ckpt_dir": str(TINY / CHECKPOINTS[task]), "lora_dir": lora_dir} | flags)


def settled(made: Generate) -> SimpleNamespace:
    """Settings of all jobs, by name."""
    weights = {**vars(made.weights), "preset": made.weights.release and made.weights.release.name}
    return SimpleNamespace(**{**vars(made.request), **weights, **vars(made.sampling)})


def problems(task: str = "t2v-A14B", distilled: bool = False, **flags) -> list[str]:
    with pytest.raises(InputError) as raised:
        run(task, distilled, **flags)
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


def problem(task: str = "t2v-A14B", distilled: bool = False, **flags) -> str:
    (only,) = problems(task, distilled, **flags)
    return only


def lora_file(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((TINY / "lora-t2v" / "high_noise_model.safetensors").read_bytes())
    return str(folder / name)


# --- defaults


@pytest.mark.parametrize(
    ("task", "lora", "solver", "steps", "shift", "guidance"),
    [
        ("t2v-A14B", False, "unipc", 40, 12.0, (3.0, 4.0)),
        ("i2v-A14B", False, "unipc", 40, 5.0, (3.5, 3.5)),
        ("ti2v-5B", False, "unipc", 50, 5.0, (5.0, 5.0)),
        ("t2v-A14B", True, "euler", 4, 5.0, (1.0, 1.0)),
        ("i2v-A14B", True, "euler", 4, 5.0, (1.0, 1.0)),
        ("ti2v-5B", True, "euler", 4, 5.0, (1.0, 1.0)),
    ],
)
def test_sampling_defaults(task, lora, solver, steps, shift, guidance):
    s = settled(run(task, lora))
    assert (s.solver, s.steps, s.shift, s.guidance) == (solver, steps, shift, guidance)
    assert (s.timesteps, s.high_steps, s.lora_steps, s.guidance_steps) == (None, None, None, None)


@pytest.mark.parametrize(
    ("task", "size", "frames"),
    [("t2v-A14B", (1280, 720), 81), ("i2v-A14B", (1280, 720), 81), ("ti2v-5B", (1280, 704), 121)],
)
def test_other_defaults(task, size, frames):
    made = run(task)
    (job,) = made.jobs
    assert (job.area, job.frame_num, job.negative_prompt) == (size, frames, TASKS[task].sample_neg_prompt)
    assert job.save_file.parent == Path("outputs")
    assert not Path("outputs").exists()
    s = settled(made)
    assert (s.device, s.dtype, s.attention, s.noise_device, s.lora_mode, s.on_error) == (
        *["auto"] * 4,
        "merge",
        "continue",
    )
    assert (s.ulysses_size, s.ring_size, s.lora_alpha, s.preset) == (1, 1, None, None)
    off = ["t5_cpu", "convert_model_dtype", "vae_tiling", "t5_fsdp", "dit_fsdp", "save_latents", "preview"]
    assert not any(getattr(s, name) for name in [*off, "overwrite", "resume", "lora_allow_partial"])
    assert made.warnings == ()


def test_task_defaults_to_t2v():
    made = asked(ckpt_dir=str(TINY / CHECKPOINTS["t2v-A14B"]))
    assert settled(made).task == "t2v-A14B"
    assert made.jobs[0].prompt == TASKS["t2v-A14B"].example_prompt


def test_offload_is_off_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    eight = Runtime(Team(0, 8))
    assert make_plan(run(device="cpu"), eight).offload is False
    assert make_plan(run(device="cpu", offload_model=True), eight).offload is True
    monkeypatch.delenv("WORLD_SIZE")
    assert make_plan(run(device="cpu"), Runtime()).offload is True


def test_flags_win_over_defaults():
    made = run(
        distilled=True,
        sample_solver="unipc",
        sample_steps=8,
        sample_shift=3.0,
        sample_guide_scale="1,3.5",
        high_steps=3,
        device="cuda:1",
        offload_model=False,
    )
    s = settled(made)
    assert (s.solver, s.steps, s.shift, s.guidance, s.high_steps) == ("unipc", 8, 3.0, (1.0, 3.5), 3)
    assert (s.device, s.offload_model) == ("cuda:1", False)
    assert settled(run("ti2v-5B", sample_guide_scale="4")).guidance == (4.0, 4.0)


def test_attention_names_are_the_back_ends():
    from wan.modules.attention import BACKENDS

    assert ("auto", *BACKENDS) == OPTIONS["attention"].choices


# --- distilled weights and LoRAs


def test_lora_dir_and_strengths():
    made = settled(run(distilled=True, lora_strength="0.8,0.6")).loras
    assert [(lora.expert, lora.path.name, lora.strength) for lora in made] == [
        ("high", "high_noise_model.safetensors", 0.8),
        ("low", "low_noise_model.safetensors", 0.6),
    ]
    assert {lora.strength for lora in settled(run(distilled=True, lora_strength="0.5")).loras} == {0.5}
    (only,) = settled(run("ti2v-5B", distilled=True)).loras
    assert (only.expert, only.path.name) == ("model", "diffusion_pytorch_model.safetensors")


def test_plain_lora_is_not_distilled_but_a_recognised_one_is(tmp_path):
    style = lora_file(tmp_path, "style.safetensors")
    made = resolve_lora(style)
    assert (settled(made).steps, settled(made).solver, settled(made).preset) == (40, "unipc", None)
    assert [(lora.expert, lora.strength) for lora in settled(made).loras] == [("high", 1.0), ("low", 1.0)]
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    made = resolve_lora(
        f"high={lora_file(folder, 'high_noise_model.safetensors')}",
        f"low={lora_file(folder, 'low_noise_model.safetensors')}:0.9",
    )
    distilled = settled(made)
    assert (distilled.steps, distilled.solver, distilled.preset) == (4, "euler", "t2v-seko-v1.1")
    assert [(lora.expert, lora.strength) for lora in distilled.loras] == [("high", 1.0), ("low", 0.9)]


def resolve_lora(*loras: str, task: str = "t2v-A14B", **flags) -> Generate:
    return asked(task=task, ckpt_dir=str(TINY / CHECKPOINTS[task]), prompt="a cat", lora=loras, **flags)


def test_lora_named_after_an_expert_goes_there_alone(tmp_path):
    made = resolve_lora(lora_file(tmp_path, "style_HIGH_v2.safetensors"))
    assert [lora.expert for lora in settled(made).loras] == ["high"]
    assert any("high-noise expert only" in warning for warning in made.warnings)
    assert len(settled(resolve_lora(lora_file(tmp_path, "slow_highway.safetensors"))).loras) == 2


def test_lora_order_is_kept(tmp_path):
    file = lora_file(tmp_path, "a.safetensors")
    made = settled(resolve_lora(f"{file}:0.5", f"low={file}:-0.25", lora_dir=str(TINY / "lora-t2v"))).loras
    assert [(lora.expert, lora.strength) for lora in made] == [
        ("high", 1.0),
        ("low", 1.0),
        ("high", 0.5),
        ("low", 0.5),
        ("low", -0.25),
    ]


def test_lora_folder(tmp_path):
    made = settled(resolve_lora(f"{TINY / 'lora-t2v'}:0.3")).loras
    assert [(lora.expert, lora.strength) for lora in made] == [("high", 0.3), ("low", 0.3)]
    peft = tmp_path / "peft"
    lora_file(peft, "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text("{}")
    assert [lora.path for lora in settled(resolve_lora(str(peft))).loras] == [peft, peft]


def test_expert_files(tmp_path):
    file = lora_file(tmp_path, "full.safetensors")
    s = settled(run(expert=(f"high={file}",)))
    assert s.files == {"high": Path(file)}
    assert (s.steps, s.solver, s.guidance) == (4, "euler", (1.0, 1.0))
    assert "t2v-A14B takes high=FILE or low=FILE" in problem(expert=(file,))
    assert "ti2v-5B takes model=FILE" in problem("ti2v-5B", expert=(f"high={file}",))
    assert "no such file" in problem(expert=("low=absent",))
    assert "given twice" in problem(expert=(f"low={file}", f"low={file}"))


def test_presets():
    s = settled(run(preset="t2v-seko-v1.1"))
    assert (s.preset, s.steps, s.solver) == ("t2v-seko-v1.1", 4, "euler")
    s = settled(run("ti2v-5B", distilled=True, preset="ti2v-fastwan"))
    assert (s.steps, s.timesteps) == (3, (1000.0, 757.0, 522.0))
    s = settled(run("ti2v-5B", distilled=True, preset="ti2v-fastwan", sample_steps=4))
    assert (s.steps, s.timesteps) == (4, None)
    assert "t2v-seko-v1.1" in problem(preset="seko")
    assert "is for i2v-A14B, not for t2v-A14B" in problem(preset="i2v-seko-v1")


def test_motion_recipe():
    s = settled(run(distilled=True, preset="motion-8"))
    assert (s.steps, s.lora_mode, s.lora_steps, s.guidance_steps) == (
        8,
        "adapter",
        (0.0, *[1.0] * 7),
        (3.5, *[1.0] * 7),
    )
    assert settled(run(distilled=True, preset="motion-8", sample_guide_scale="2")).guidance_steps is None
    assert "recipe for a distilled LoRA" in problem(preset="motion-8")
    assert "takes adapter" in problem(distilled=True, preset="motion-8", lora_mode="merge")
    assert "leave --sample_steps out" in problem(distilled=True, preset="motion-8", sample_steps=4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora_dir": "absent"}, "--lora_dir absent: no such folder"),
        ({"lora": ("absent.safetensors:0.5",)}, "--lora absent.safetensors: no such file"),
        ({"lora": (f"{TINY}/lora-t2v:nan",)}, "nan is out of range"),
        ({"lora": (f"{TINY}/lora-t2v:11",)}, "between -10 and 10"),
        ({"lora": (f"model={TINY}/lora-t2v/low_noise_model.safetensors",)}, "has no expert 'model'"),
        ({"lora": ("",)}, "--lora is empty"),
        ({"lora_strength": "1"}, "--lora_strength scales --lora_dir, which is not given"),
        ({"lora": (str(TINY),)}, "missing"),
    ],
)
def test_bad_loras(flags, sentence):
    assert sentence in problem(**flags)


def test_lora_dir_without_an_expert(tmp_path):
    lora_file(tmp_path / "release", "high_noise_model.safetensors")
    assert "low_noise_model.safetensors missing" in problem(lora_dir=str(tmp_path / "release"))


# --- warnings


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"distilled": True, "sample_solver": "unipc"}, "--sample_solver unipc: a distilled weight was made for euler"),
        ({"distilled": True, "sample_steps": 8}, "--sample_steps 8: a distilled weight was made for 4"),
        ({"distilled": True, "sample_shift": 8.0}, "--sample_shift 8: a distilled weight was made for 5"),
        (
            {"distilled": True, "sample_guide_scale": "3"},
            "--sample_guide_scale 3,3: a distilled weight was made for 1,1",
        ),
        ({"preset": "t2v-seko-v1", "size": "640*480"}, "none of those that 't2v-seko-v1' was trained for"),
        ({"sample_steps": 4}, "4 steps without a distilled weight"),
        ({"size": "640*480"}, "none of those that 't2v-A14B' was trained for"),
        ({"frame_num": 85}, "85 frames are more than the 81"),
        ({"prompt": None}, "no --prompt given"),
        ({"task": "i2v-A14B", "image": None, "prompt": None}, "i2v_input.png is used"),
        ({"distilled": True, "timesteps": "900,800"}, "starts at 900"),
    ],
)
def test_warned_once(flags, sentence):
    made = run(**flags)
    assert [sentence in warning for warning in made.warnings].count(True) == 1


def test_nothing_to_warn_of():
    for flags in (
        {},
        {"distilled": True},
        {"distilled": True, "timesteps": "1000,937.5,833.33,625"},
        {"size": "480x832"},
    ):
        assert run(**flags).warnings == ()


def test_release_for_another_task(tmp_path):
    folder = tmp_path / "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1"
    for name in ("high_noise_model.safetensors", "low_noise_model.safetensors"):
        lora_file(folder, name)
    assert any("which is for i2v-A14B, not for t2v-A14B" in w for w in run(lora_dir=str(folder)).warnings)


# --- numbers


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"frame_num": 80}, "--frame_num 80 is not of the form 4n+1; the nearest valid values are 77 or 81"),
        ({"frame_num": 82}, "81 or 85"),
        ({"frame_num": 0}, "the nearest valid value is 1"),
        ({"frame_num": -7}, "the nearest valid value is 1"),
        ({"frame_num": 81, "seconds": 2.0}, "exclude each other"),
        ({"seconds": float("nan")}, "--seconds nan is out of range"),
        ({"seconds": -1.0}, "out of range"),
        ({"size": "833*480"}, "must be multiples of 16; the nearest is 832*480"),
        ({"size": "3x3"}, "the nearest is 16*16"),
        ({"size": "0*480"}, "the nearest is 16*480"),
        (
            {"size": "1080p"},
            "--size '1080p' is not a size; write width*height, such as 832x480, or one of 720p",
        ),
        ({"size": "-832*480"}, "is not a size"),
        ({"sample_steps": 0}, "--sample_steps 0 is out of range"),
        ({"sample_steps": 1001}, "between 1 and 1000"),
        ({"sample_shift": 0.0}, "--sample_shift 0 is out of range"),
        ({"sample_shift": float("inf")}, "inf is out of range"),
        ({"sample_guide_scale": "-1"}, "--sample_guide_scale -1 is out of range"),
        ({"sample_guide_scale": "nan"}, "nan is out of range"),
        ({"sample_guide_scale": "1,2,3"}, "one number or two"),
        ({"sample_guide_scale": "high"}, "one number or two"),
        ({"lora_strength": "inf", "distilled": True}, "--lora_strength inf is out of range"),
        ({"lora_alpha": 0.0}, "--lora_alpha 0 is out of range"),
        ({"high_steps": 41}, "--high_steps 41 is out of range"),
        ({"num_videos": 0}, "--num_videos 0 is out of range"),
        ({"base_seed": 2**63}, "--base_seed 9223372036854775808 is out of range"),
        ({"timesteps": "1000,900,900"}, "--timesteps 1000,900,900: each must be below the one before"),
        ({"timesteps": "1000,625,833"}, "each must be below the one before"),
        ({"timesteps": "1001,900"}, "1001 is outside (0, 1000]"),
        ({"timesteps": "1000,0"}, "0 is outside (0, 1000]"),
        ({"timesteps": "1000,nan"}, "takes numbers with commas"),
        ({"timesteps": "1000;900"}, "takes numbers with commas"),
        ({"timesteps": "1000,900", "sample_solver": "unipc"}, "--sample_solver euler or dmd"),
        ({"timesteps": "1000,900", "sample_steps": 3}, "names 2 steps, but --sample_steps is 3"),
        ({"timesteps": "1000,900", "sample_shift": 5.0}, "leave --sample_shift out"),
        ({"device": "gpu"}, "--device 'gpu' is not one of auto, cuda, cpu, mps"),
        ({"dtype": "fp16"}, "--dtype 'fp16' is not one of auto, bf16, fp32"),
        ({"sample_solver": "unipcc"}, "did you mean unipc?"),
        ({"attention": "flash4"}, "--attention 'flash4' is not one of"),
        ({"lora_mode": "merged"}, "did you mean merge?"),
        ({"on_error": "go"}, "--on_error 'go'"),
        ({"noise_device": "mps"}, "--noise_device 'mps'"),
        ({"prompt_extend_method": "qwen"}, "--prompt_extend_method 'qwen' is not one of local_qwen, dashscope, openai"),
        ({"prompt_extend_target_lang": "de"}, "--prompt_extend_target_lang 'de'"),
        ({"task": "t2v-a14b"}, "did you mean t2v-A14B?"),
    ],
)
def test_bad_numbers_and_words(flags, sentence):
    task = flags.pop("task", "t2v-A14B")
    if task in CHECKPOINTS:
        assert sentence in problem(task, **flags)
    else:
        with pytest.raises(InputError, match="did you mean t2v-A14B"):
            asked(task=task)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"size": "1280*720"}, "multiples of 32; the nearest is 1280*704"),
        ({"high_steps": 2}, "one model"),
        ({"sample_guide_scale": "3,4"}, "one model takes one number"),
        ({"distilled": True, "lora_strength": "1,0.5"}, "one model takes one number"),
    ],
)
def test_bad_numbers_of_the_5b(flags, sentence):
    assert sentence in problem("ti2v-5B", **flags)


def test_everything_wrong_is_said_at_once():
    found = problems(frame_num=80, size="3*3", sample_steps=0, dtype="int4", lora_dir="absent", ckpt_dir=None)
    assert len(found) == 6


@pytest.mark.parametrize(("text", "size"), [("832*480", (832, 480)), ("480X832", (480, 832)), ("640×480", (640, 480))])
def test_size_spellings(text, size):
    assert run(size=text).jobs[0].size == size


@pytest.mark.parametrize(
    ("task", "seconds", "frames"),
    [("t2v-A14B", 5.0, 81), ("t2v-A14B", 1.0, 17), ("t2v-A14B", 0.07, 1), ("ti2v-5B", 5.0, 121), ("ti2v-5B", 2.0, 49)],
)
def test_seconds(task, seconds, frames):
    assert run(task, seconds=seconds).jobs[0].frame_num == frames


def test_timesteps_are_final():
    s = settled(run(timesteps="1000,937.5,833.33,625"))
    assert (s.solver, s.steps, s.timesteps) == ("euler", 4, (1000.0, 937.5, 833.33, 625.0))


# --- checkpoint and processes


def test_checkpoint_folder(tmp_path):
    missing = problem(ckpt_dir=None)
    assert missing.startswith("--ckpt_dir is missing")
    assert "hf download Wan-AI/Wan2.2-T2V-A14B --local-dir Wan2.2-T2V-A14B" in missing
    assert "hf download Wan-AI/Wan2.2-TI2V-5B" in problem("ti2v-5B", ckpt_dir="./absent")
    (tmp_path / "file").touch()
    assert "not a folder" in problem(ckpt_dir="file")
    (tmp_path / "models").mkdir()
    for name in ("models/Wan2.2-T2V-A14B", "no such folder", "a/b.safetensors", "../x"):
        assert "no such folder" in problem(ckpt_dir=name)
    assert "cannot be reached" in problem(ckpt_dir="n" * 300)
    assert settled(run(ckpt_dir="Wan-AI/Wan2.2-T2V-A14B")).ckpt_dir == Path("Wan-AI/Wan2.2-T2V-A14B")


def test_processes(monkeypatch):
    assert "torchrun --nproc-per-node 8 generate.py" in problem(dit_fsdp=True, t5_fsdp=True)
    assert "torchrun --nproc-per-node 4 generate.py" in problem(ulysses_size=4)
    assert "--ring_size 2 needs several processes" in problem(ring_size=2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    s = settled(run(dit_fsdp=True, t5_fsdp=True, ulysses_size=4, ring_size=2))
    assert (s.dit_fsdp, s.t5_fsdp, s.ulysses_size, s.ring_size) == (True, True, 4, 2)
    assert "--ulysses_size 0 is out of range" in problem(ulysses_size=0)


# --- prompts and images


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def from_file(path: str, task: str = "t2v-A14B", **flags) -> Generate:
    return run(task, prompt=None, prompt_file=path, **flags)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_file(tmp_path, end, mark):
    lines = ["a cat, boxing", "", "  两只猫在拳击\u2028场 ", "", "last"]
    made = from_file(write(tmp_path / "p.txt", mark + end.join(lines).encode()))
    assert [job.prompt for job in made.jobs] == ["a cat, boxing", "两只猫在拳击\u2028场", "last"]
    assert [job.source.rpartition(" ")[2] for job in made.jobs] == ["1", "3", "5"]
    assert [job.index for job in made.jobs] == [0, 1, 2]
    assert len({job.seed for job in made.jobs}) == 1


def test_jsonl_file(tmp_path):
    Image.new("RGB", (70, 50)).save(tmp_path / "in.png")
    rows = [
        {"prompt": "plain"},
        {"prompt": "猫", "negative_prompt": "狗", "seed": 7, "size": "480*832", "frame_num": 5, "save_file": "a/b.mp4"},
        {"prompt": "seen", "image": "in.png", "seed": None},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    made = from_file(write(tmp_path / "p.jsonl", text), "ti2v-5B", size="704*1280", base_seed=3, negative_prompt="no")
    plain, full, seen = made.jobs
    assert (plain.size, plain.seed, plain.negative_prompt, plain.image) == ((704, 1280), 3, "no", None)
    assert (full.size, full.seed, full.negative_prompt, full.frame_num) == ((480, 832), 7, "狗", 5)
    assert full.save_file == Path("outputs/a/b.mp4")
    assert (seen.image, seen.seed) == (tmp_path / "in.png", 3)


def test_csv_file(tmp_path):
    text = '\ufeffprompt,seed,size\r\n"a cat, with ""quotes""",5,\r\n"two\nlines",,832*480\r\n\r\n猫,-1,\r\n'
    made = from_file(write(tmp_path / "p.csv", text), base_seed=9)
    assert [(job.prompt, job.seed) for job in made.jobs] == [('a cat, with "quotes"', 5), ("two\nlines", 9), ("猫", 9)]
    assert made.jobs[1].size == (832, 480)
    assert [job.source.rpartition(" ")[2] for job in made.jobs] == ["2", "3", "6"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", "", "p.txt: the prompt file holds no prompt"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.txt", b"good\nb\xe4d\n", "p.txt line 2: is not UTF-8"),
        ("p.txt", "text".encode("utf-16")[:-1], "p.txt line 1: is not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl line 2: not valid JSON"),
        ("p.jsonl", '["a"]', "p.jsonl entry 1: a prompt with its settings is one JSON object"),
        ("p.jsonl", '{"prompt": "a", "sed": 3}', "p.jsonl line 1: unknown key 'sed'; did you mean seed?"),
        ("p.jsonl", '{"seed": 3}', "p.jsonl line 1: no 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "p.jsonl line 1: 'seed' must be a whole number, not 1.5"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "'seed' must be a whole number"),
        ("p.jsonl", '{"prompt": 3}', "'prompt' must be text, not 3"),
        ("p.jsonl", '{"prompt": "a", "frame_num": 6}', "p.jsonl line 1: frame_num 6 is not of the form 4n+1"),
        ("p.jsonl", '{"prompt": "a", "size": "5*5"}', "p.jsonl line 1: size 5*5: both sides"),
        ("p.jsonl", '{"prompt": ""}', "p.jsonl line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "save_file": "a.avi"}', "written as .mp4"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', "line 1: seed 9223372036854775808 is too large"),
        ("p.csv", "text,seed\na,1\n", "p.csv line 1: the first line must name the columns"),
        ("p.csv", "seed\n1\n", "p.csv line 1: the first line must name the columns"),
        ("p.csv", "prompt,seed\na,1,2\n", "p.csv line 2: 3 cells, but the header names 2 columns"),
        ("p.csv", "prompt,seed\na,x\n", "p.csv line 2: 'seed' must be a whole number, not 'x'"),
        ("p.csv", 'prompt\n"open\n', "p.csv line 2: not valid CSV"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, sentence):
    assert sentence in problem(prompt=None, prompt_file=write(tmp_path / name, content))


def test_absent_prompt_file(tmp_path):
    assert problem(prompt=None, prompt_file="absent.txt") == "--prompt_file absent.txt: no such file"
    assert "cannot be read" in problem(prompt=None, prompt_file=str(tmp_path))
    assert "exclude each other" in problem(prompt="a", prompt_file=write(tmp_path / "p.txt", "b"))


def test_all_bad_rows_are_listed(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"a": 1, "b": 2}\nx\n')
    assert [p.partition(": ")[0].rpartition(" ")[2] for p in problems(prompt=None, prompt_file=path)] == list("2223")


def test_image_paths(tmp_path, monkeypatch):
    """Beside the file that names them if they are there, else from the working folder."""
    lists, here = tmp_path / "lists", tmp_path / "here"
    for folder, name in ((lists, "near.png"), (here, "far.png"), (here, "near.png")):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / name)
    monkeypatch.chdir(here)
    prompts = write(lists / "p.txt", "one\ntwo\nthree\n")
    images = write(lists / "i.txt", f"\ufeffnear.png\r\n\r\nfar.png\r\n{TINY / 'input.png'}\r\n")
    made = from_file(prompts, "i2v-A14B", image=None, image_path_file=images)
    assert [job.image for job in made.jobs] == [lists / "near.png", Path("far.png"), TINY / "input.png"]


def test_one_image_serves_all(tmp_path):
    path = write(tmp_path / "p.txt", "one\ntwo\n")
    assert {job.image for job in from_file(path, "i2v-A14B").jobs} == {TINY / "input.png"}


def test_image_counts(tmp_path):
    prompts, images = write(tmp_path / "p.txt", "1\n2\n3\n"), write(tmp_path / "i.txt", f"{TINY}/input.png\n" * 2)
    found = problem("i2v-A14B", prompt=None, prompt_file=prompts, image=None, image_path_file=images)
    assert found.startswith("--image_path_file: 3 prompts but 2 images")
    assert "exclude each other" in problems("i2v-A14B", prompt=None, prompt_file=prompts, image_path_file=images)[0]
    missing = problem("i2v-A14B", prompt=None, prompt_file=prompts, image=None)
    assert missing.startswith(f"{prompts} line 1: i2v-A14B needs an image")
    assert "--image_path_file absent.txt: no such file" in problem("i2v-A14B", image=None, image_path_file="absent.txt")
    empty = write(tmp_path / "empty.txt", "\n")
    assert "names no image" in problem("i2v-A14B", image=None, image_path_file=empty)


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B", "ti2v-5B"])
def test_a_picture_and_a_prompt_belong_together(tmp_path, task):
    """The example pair serves only when neither was given."""
    picture, takes = str(TINY / "input.png"), task != "t2v-A14B"
    (example,) = run(task, prompt=None, image=None).jobs
    assert example.prompt == TASKS[task].example_prompt
    assert example.image == (TASKS[task].example_image and Path(TASKS[task].example_image))
    images = write(tmp_path / "i.txt", picture)
    row = write(tmp_path / "p.jsonl", json.dumps({"prompt": "a", "image": picture}))
    for flags in ({"image": picture}, {"image": None, "image_path_file": images}):
        assert run(task, **flags).jobs if takes else problem(task, **flags).startswith(f"--{list(flags)[-1]}")
        alone = problems(task, prompt=None, **flags)
        assert any("the prompt is empty" in p if takes else p.startswith("--image") for p in alone)
    from_row = {"prompt": None, "image": None, "prompt_file": row}
    assert run(task, **from_row).jobs if takes else problem(task, **from_row).startswith(f"{row} line 1: ")
    if task == "i2v-A14B":
        assert problem(task, image=None).startswith("--prompt: i2v-A14B needs an image")
    else:
        assert run(task, image=None).jobs[0].image is None


def test_bad_images_with_their_lines(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    rows = [{"prompt": "a", "image": "absent.png"}, {"prompt": "b", "image": "bad.png"}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    absent, bad = problems("i2v-A14B", prompt=None, prompt_file=path, image=None)
    assert absent == f"{path} line 1: absent.png: no such image file"
    assert bad.startswith(f"{path} line 2: {tmp_path / 'bad.png'}: not an image")
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    thin = str(tmp_path / "thin.png")
    assert problem("i2v-A14B", image=thin).startswith(f"--image {thin}: an image of 1x5000 is too long")


def test_images_in_two_places(tmp_path):
    row = json.dumps({"prompt": "a", "image": str(TINY / "input.png")})
    path, images = write(tmp_path / "p.jsonl", row), write(tmp_path / "i.txt", f"{TINY}/input.png\n")
    found = problem("i2v-A14B", prompt=None, prompt_file=path, image=None, image_path_file=images)
    assert "and --image_path_file both name an image" in found


def test_empty_prompts():
    assert "the prompt is empty" in problem(prompt=" ")
    assert "the prompt is empty" in problem("i2v-A14B", prompt="")
    made = run("i2v-A14B", prompt=None, use_prompt_extend=True)
    assert made.jobs[0].prompt == ""  # the model imagines it from the picture


# --- seeds and outputs


def test_seeds(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": 100}')
    made = from_file(path, base_seed=5, num_videos=3)
    assert [job.seed for job in made.jobs] == [5, 6, 7, 100, 101, 102]
    assert [job.index for job in made.jobs] == list(range(6))
    assert run(base_seed=2**63 - 1).jobs[0].seed == 2**63 - 1
    drawn = from_file(path, base_seed=-1)
    assert drawn.request.base_seed == drawn.jobs[0].seed >= 0
    assert run().jobs[0].seed != run().jobs[0].seed  # one in 2**31 that this fails


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat boxing", "a_cat_boxing"),
        ("两只猫 在拳击！", "两只猫_在拳击"),
        ("tab\tand/slash\\and:colon*?", "tab_and_slash_and_colon"),
        ("हिन्दी में बिल्ली", "हिन्दी_में_बिल्ली"),
        ("under_score-dash.", "under_score-dash"),
        ("cafe\u0301", "café"),
        ("...", "video"),
        ("😀😀", "video"),
        ("x" * 80, "x" * 50),
        ("a" * 49 + " b", "a" * 49),
    ],
)
def test_slug(prompt, expected):
    assert slug(prompt) == expected
    assert len(slug(prompt)) <= 50


def test_output_names(tmp_path):
    made = run(prompt="a cat: the film", base_seed=42, save_dir=str(tmp_path / "out"))
    assert made.jobs[0].save_file == tmp_path / "out" / "t2v-A14B_0000_seed42_a_cat_the_film.mp4"
    assert run(save_file="exact.mp4").jobs[0].save_file == Path("exact.mp4")


@pytest.mark.parametrize(
    ("save_file", "expected"),
    [("f.mp4", "D/f.mp4"), ("sub/f.mp4", "sub/f.mp4"), ("./f.mp4", "f.mp4"), ("/tmp/f.mp4", "/tmp/f.mp4")],
)
def test_a_bare_save_file_goes_into_the_save_dir(tmp_path, save_file, expected):
    made = run(save_dir="D", save_file=save_file)
    assert made.jobs[0].save_file == Path(expected)
    assert bool(made.warnings) == (not expected.startswith("D/")), "--save_dir has no effect beside it"
    assert run(save_file="f.mp4").jobs[0].save_file == Path("f.mp4"), "the exact path, as in the original"
    row = write(tmp_path / "p.jsonl", '{"prompt": "a", "save_file": "f.mp4"}')
    assert run(prompt=None, prompt_file=row, save_dir="D").jobs[0].save_file == Path("D/f.mp4")
    write(tmp_path / "v.latents.safetensors", "x")
    assert run(decode_latents="v.latents.safetensors", save_dir="D", save_file="f.mp4").video == Path("D/f.mp4")


def test_bad_outputs(tmp_path):
    assert "written as .mp4" in problem(save_file="a.mkv")
    assert "--save_file names one video, but there are 2" in problems(save_file="a.mp4", num_videos=2)[0]
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "save_file": "x.mp4"}\n{"prompt": "b", "save_file": "x.mp4"}')
    assert "videos 0000 and 0001 would both be written to" in problem(prompt=None, prompt_file=path)
    write(tmp_path / "file", "")
    assert f"{tmp_path / 'file'} is a file" in problem(save_dir=str(tmp_path / "file" / "below"))


def test_existing_outputs(tmp_path):
    write(tmp_path / "there.mp4", "")
    assert problem(save_file="there.mp4").startswith("--save_file there.mp4 already exists; --overwrite replaces it")
    for flags in ({"overwrite": True}, {"resume": True}):
        assert run(save_file="there.mp4", **flags).jobs


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_is_not_writable(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "not writable" in problem(save_dir=str(tmp_path / "locked"))


def test_decode_latents(tmp_path):
    write(tmp_path / "v.latents.safetensors", "x")
    made = run(prompt=None, decode_latents="v.latents.safetensors")
    assert isinstance(made, Decode)
    assert (made.latents, made.video) == (Path("v.latents.safetensors"), Path("v.mp4"))
    made = run(decode_latents="v.latents.safetensors", save_file="w.mp4")
    assert (made.latents, made.video) == (Path("v.latents.safetensors"), Path("w.mp4"))
    assert "no such file" in problem(decode_latents="absent.safetensors")
    write(tmp_path / "v.mp4", "")
    assert "v.mp4 already exists" in problem(decode_latents="v.latents.safetensors")


# --- prompt extension


def test_extension_settings():
    made = run(
        use_prompt_extend=True,
        prompt_extend_method="openai",
        prompt_extend_model="m",
        prompt_extend_target_lang="en",
        prompt_extend_on_error="fail",
        no_extend_cache=True,
        base_seed=4,
        device="cpu",
    ).extend
    assert dataclasses.astuple(made) == ("t2v-A14B", "openai", "m", "en", 4, "fail", False, "cpu", None)
    assert run().extend is None


def test_extend_only(tmp_path):
    made = run(extend_only="out.jsonl", ckpt_dir=None)
    assert isinstance(made, Extend)
    assert made.file == Path("out.jsonl")
    assert ".txt (prompts) or .jsonl" in problem(extend_only="out.csv")
    write(tmp_path / "out.txt", "")
    assert problem(extend_only="out.txt").startswith("--extend_only out.txt already exists; --overwrite")
    assert run(extend_only="out.txt", overwrite=True).file == Path("out.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone").symlink_to("/not/mounted")
    for file in ("out.txt/below/a.txt", "gone/a.txt", "folder.txt", "/proc/a.txt", f"{'n' * 300}.txt", "a\n/b\0.txt"):
        assert problem(extend_only=file, overwrite=True).startswith("--extend_only "), file


def test_written_rows_read_back(tmp_path):
    rows = [
        Row("a long 猫", "", original_prompt="猫", image=tmp_path / "i.png", seed=3, size="832*480", frame_num=5),
        Row("two\nlines", "", negative_prompt="no", save_file="x.mp4"),
    ]
    write_rows(tmp_path / "sub" / "o.jsonl", rows)
    found: list[str] = []
    back = read_rows(tmp_path / "sub" / "o.jsonl", found, found)
    assert [dataclasses.replace(row, source="") for row in back] == rows
    assert found == []
    write_rows(tmp_path / "o.txt", rows)
    assert (tmp_path / "o.txt").read_bytes() == "a long 猫\ntwo lines\n".encode()


# --- requests as data, replay


SAMPLES = {text: "text", path: "x", paths: ("a", "b"), whole: 7, real: 2.5, truth: True} | {
    numbers: "2,0.5", wholes: "9,4",
}  # fmt: skip
FULL = Request(**{name: SAMPLES[row.read] for name, row in OPTIONS.items()})


@pytest.mark.parametrize("request_", [Request(), FULL, Request(lora=("a:0.5",), offload_model=False, base_seed=0)])
def test_request_survives_json(request_):
    found: list[str] = []
    assert Request(**read_all(json.loads(json.dumps(request_.recorded())), found)) == request_
    assert found == []


def test_requests_that_cannot_be_read():
    found: list[str] = []
    given = {"frame_num": "8o", "seconds": [], "offload_model": "maybe", "lora": "a", "task": 3, "colour": 1}
    assert Request(**read_all(given | {"sample_steps": "4"}, found)) == Request(sample_steps=4)
    assert found == [
        "--frame_num takes a whole number, not '8o'",
        "--seconds takes a number, not []",
        "--offload_model takes True or False, not 'maybe'",
        "--lora takes a list of texts, not 'a'",
        "--task takes text, not 3",
        "'colour' is not an option of this program",
    ]


def record_of(made: Generate, index: int, path: Path) -> str:
    from wan.runner.record import plain

    path.write_text(
        json.dumps({"request": made.request.recorded(), "job": plain(made.jobs[index])}, ensure_ascii=False)
    )
    return str(path)


def test_replay_makes_the_same_video(tmp_path):
    rows = [
        {"prompt": "one", "image": str(TINY / "input.png"), "size": "704*1280"},
        {"prompt": "二", "seed": 11, "frame_num": 9, "negative_prompt": "no"},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    made = from_file(
        path, "ti2v-5B", distilled=True, num_videos=2, sample_guide_scale="2", preview=True, use_prompt_extend=True
    )
    for job in made.jobs:
        again = asked(replay=record_of(made, job.index, tmp_path / "r.json"))
        assert (again.weights, again.sampling) == (made.weights, made.sampling)
        assert (again.request.device, again.request.preview) == (made.request.device, True)
        (other,) = again.jobs
        same = {"index": 0, "source": "--prompt", "save_file": other.save_file}
        assert other == dataclasses.replace(job, **same)
        assert again.extend is None  # the record holds the extended prompt


def test_replay_with_other_flags(tmp_path):
    made = run("i2v-A14B", distilled=True, base_seed=3, size="832*480", save_file="a.mp4", timesteps="1000,900")
    record = record_of(made, 0, tmp_path / "r.json")
    partial = record_of(run("i2v-A14B", distilled=True, lora_allow_partial=True), 0, tmp_path / "partial.json")
    assert asked(replay=partial).request.lora_allow_partial
    again = asked(replay=record, base_seed=4, frame_num=5, sample_steps=8, save_dir="there")
    (job,) = again.jobs
    assert (job.seed, job.frame_num, job.area, job.save_file.parent) == (4, 5, (832, 480), Path("there"))
    assert (settled(again).steps, settled(again).timesteps) == (8, None)
    assert asked(replay=record).jobs[0].save_file.name.endswith("_replay.mp4")
    batch = write(tmp_path / "p.txt", "x\ny\n")
    again = asked(replay=record, prompt_file=batch, image=str(TINY / "input.png"), save_dir="there")
    assert [job.prompt for job in again.jobs] == ["x", "y"]


def test_replay_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = run(distilled=True, t5_fsdp=True, dit_fsdp=True, ulysses_size=2, ring_size=1)
    monkeypatch.delenv("WORLD_SIZE")
    s = settled(asked(replay=record_of(made, 0, tmp_path / "r.json")))
    assert (s.t5_fsdp, s.dit_fsdp, s.ulysses_size) == (False, False, 1)


def test_bad_records(tmp_path):
    for name, content, sentence in (
        ("absent.json", None, "no such file"),
        ("a.json", "{", "holds no record"),
        ("b.json", '{"request": {}}', "not the record of a video"),
        ("c.json", '{"request": 3, "job": {"size": [1, 2]}}', "not the record of a video"),
    ):
        if content is not None:
            write(tmp_path / name, content)
        with pytest.raises(InputError, match=sentence):
            asked(replay=str(tmp_path / name))


@pytest.mark.parametrize(
    "change",
    [
        {"job": True}, {"job": []}, {"job": None}, {"request": True}, {"request": [1]}, {"versions": ["a"]},
        {"versions": 3}, {"meaning": [1]}, {"meaning": "a"}, {"job.area": 5}, {"job.area": "ab"},
        {"job.area": [[], {}]},
        {"job.seed": {}}, {"job.seed": 10**4200}, {"job.seed": "7" * 5000}, {"job.frame_num": True},
        {"job.prompt": ["a"]}, {"job.image": 3}, {"request.lora": {"a": 1}}, {"request.sample_steps": []},
        {"request.ckpt_dir": [1]}, {"schema": []}, {"schema": "2"}, {"request.\x1b[2J": 1},
    ],
    ids=str,
)  # fmt: skip
def test_records_of_any_shape_are_refused_in_a_line(tmp_path, change):
    path = tmp_path / "r.json"
    record_of(run(base_seed=3), 0, path)
    record = json.loads(path.read_text())
    ((place, value),) = change.items()
    *parent, name = place.split(".")
    target = record[parent[0]] if parent else record
    target[name] = value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as raised:
        asked(replay=str(path))
    assert all(
        p.startswith((f"--replay {path}", "--")) and len(p) < 400 and "\n" not in p for p in raised.value.problems
    )
