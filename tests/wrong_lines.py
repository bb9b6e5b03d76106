"""Wrong command lines, made by a seed: `python -m tests.wrong_lines [--count 500] [--seed 0] [--show]`.

Each is a good line with one fault. The answer must be exit code 2 and one line on stderr, which names the flag, row or
file at fault. Anything else is a finding and exit code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import generate
from tests.support import TINY, checkpoint, lora_dir
from wan.cli.options import OPTIONS, real, whole
from wan.cli.parser import OTHER_NAMES, REASONS

LONGEST = 700  # characters of a line; paths and the names that are allowed take room
Named = tuple[str, ...]


class Wrong(NamedTuple):
    """Words to add to a good line for `task`, and what the answer must hold."""

    words: list[str]
    names: Named
    task: str = "t2v-A14B"
    prompt: bool = True  # whether the good line has one
    lines: int = 1  # of the answer


def base(task: str, prompt: bool) -> list[str]:
    words = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--lora_dir", str(lora_dir(task)), "--device", "cpu"]
    words += ["--size", "64*64", "--frame_num", "5", "--dry_run"]
    words += ["--prompt", "a cat"] if prompt else []
    return words + (["--image", str(TINY / "input.png")] if task == "i2v-A14B" and prompt else [])


def make_files(folder: Path) -> None:
    """The files that the lines below name."""
    texts = {
        "text.txt": "text", "empty.txt": "\n", "two.txt": "a\nb\n",
        "rows.txt": '{"prompt": "a"}\n', "list.txt": '[\n{"prompt": "a"}\n]\n',
        "one.txt": f"{TINY / 'input.png'}\n", "there.mp4": "",
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "folder").mkdir()
    lora = (lora_dir("t2v-A14B") / "high_noise_model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(lora[:9000])


# --- what may be wrong


def mistyped(rng: random.Random) -> Wrong:
    """A letter lost, doubled or swapped, a dash in the place of the line, or one dash too few."""
    name = rng.choice([name for name in OPTIONS if len(name) > 5])
    place = rng.randrange(1, len(name) - 1)
    typos = [
        name[:place] + name[place + 1 :], name[:place] + name[place] + name[place:], name.replace("_", "-"),
        name[:place] + name[place + 1] + name[place] + name[place + 2 :], name.upper(),
    ]  # fmt: skip
    typo = rng.choice([typo for typo in typos if typo not in OPTIONS] or [f"{name}s"])
    word = rng.choice([f"--{typo}", f"--{typo}", f"-{name}"])
    value = ["x"] if OPTIONS[name].takes else []
    words = [f"{word}={value[0]}"] if value and rng.random() < 0.3 else [word, *value]
    return Wrong(words, (f"{word};", f"--{name}?"))


def named_as_elsewhere(rng: random.Random) -> Wrong:
    flag, names = rng.choice([*OTHER_NAMES.items(), *((reason, name) for name, reason in REASONS.items())])
    other = rng.choice(names.split())
    dashes = "-" if len(other) == 1 else "--"
    return Wrong([f"{dashes}{other}", "1"], (f"{dashes}{other}", flag))


def without_value(rng: random.Random) -> Wrong:
    name = rng.choice([name for name, row in OPTIONS.items() if row.takes and not row.takes.startswith("[")])
    return Wrong([f"--{name}", *rng.choice([[], ["--json"], ["-x"]])], (f"--{name} ",))


def switch_with_value(rng: random.Random) -> Wrong:
    name = rng.choice([name for name, row in OPTIONS.items() if not row.takes and name != "debug"])
    value = rng.choice(["True", "False", "1", "yes"])
    return Wrong(rng.choice([[f"--{name}", value], [f"--{name}={value}"]]), (f"--{name}", value))


def stray(rng: random.Random) -> Wrong:
    name = rng.choice(
        ["prompt", "negative_prompt", "size", "sample_guide_scale", "lora_strength", "timesteps", "image"]
    )
    rest = rng.choice([["runs"], ["on", "a", "beach"], ["480"], ["beach”"], ["-5"]])
    return Wrong([f"--{name}", "a", *rest], (f"'{' '.join(rest)}'", f"--{name} "))


def long_dash(rng: random.Random) -> Wrong:
    name = rng.choice(list(OPTIONS))
    word = rng.choice("–—−") + rng.choice(["", "-"]) + name
    return Wrong([word, "1"], (f"{word};", f"--{name}?"))


def wrong_type(rng: random.Random) -> Wrong:
    name = rng.choice([name for name, row in OPTIONS.items() if row.read in (whole, real)])
    values = ["x", "", "4,5", "1_0", "four", "0x10", "5s"] + (["4.0", "1e3"] if OPTIONS[name].read is whole else [])
    value = rng.choice(values)
    return Wrong([f"--{name}", value], (f"--{name} takes {OPTIONS[name].read.__doc__}", repr(value)))


def out_of_range(rng: random.Random) -> Wrong:
    name = rng.choice([name for name, row in OPTIONS.items() if row.limits])
    low, high = OPTIONS[name].limits or (0, 0)
    if OPTIONS[name].read is whole:
        value = rng.choice([str(int(low) - 1), str(int(high) + 1), str(10 ** rng.randrange(20, 60))])
    else:
        value = rng.choice([f"{low / 2 or -0.5}", f"{high * 2}", "-1", "nan", "inf", "1e6"])
    return Wrong([f"--{name}={value}"], (f"--{name} ",))


def no_choice(rng: random.Random) -> Wrong:
    name = rng.choice([name for name, row in OPTIONS.items() if row.choices])
    value = rng.choice(["x", OPTIONS[name].choices[0][:-1], "", OPTIONS[name].choices[-1] + "0", "cuda:1234"])
    return Wrong([f"--{name}", value], (f"--{name} {value!r} is not one of",))


def size(rng: random.Random) -> Wrong:
    values = ["832", "832*", "832,480", "830*480", "832*479", "1e3*480", "-64*64", "0*64", "HD", "100000*100000"]
    values += ["16400*16", "999999999999*16", "832*480*81", "8*8", "6 4*64", f"{rng.randrange(16, 999) * 16 + 3}*64"]
    value = rng.choice(values)
    return Wrong([f"--size={value}"], ("--size ", value.partition("*")[0].lstrip("-")))


def frames(rng: random.Random) -> Wrong:
    value = rng.choice([80, 4, 0, -3, 4097, 100_001, 10**30, rng.randrange(1000) * 4 + 3])
    if rng.random() < 0.2:
        return Wrong(["--seconds", "500"], ("--seconds and --frame_num exclude each other",))
    return Wrong([f"--frame_num={value}"], ("--frame_num ", "4n+1" if value < 4097 else "is too long"))


FILES = {  # option -> what it is given as, and the tasks that take it
    "prompt_file": "{}", "image_path_file": "{}", "replay": "{}", "lora": "{}", "vae": "{}", "text_encoder": "{}",
    "tokenizer": "{}", "decode_latents": "{}", "lora_dir": "{}", "ckpt_dir": "./{}", "expert": "high={}", "image": "{}",
    "last_image": "{}",
}  # fmt: skip


def absent_file(rng: random.Random) -> Wrong:
    option = rng.choice(list(FILES))
    file = rng.choice(["gone.txt.not", "not here/猫.safetensors", "absent.mp4", "a" * 100])
    task = "i2v-A14B" if "image" in option else "t2v-A14B"
    word = FILES[option].format(file)
    return Wrong([f"--{option}", word], (f"--{option}", file), task, prompt=not option.endswith("_file"))


def all_files_absent(rng: random.Random) -> Wrong:
    """Several at once: the answer has a line for each."""
    chosen = rng.sample(["image", "last_image", "vae", "text_encoder", "lora"], 3)
    words = [word for option in chosen for word in (f"--{option}", f"no {option}.file")]
    return Wrong(words, tuple(f"--{option} no {option}.file: no such" for option in chosen), "i2v-A14B", lines=3)


def bad_file(rng: random.Random) -> Wrong:
    """A file that is there and is something else."""
    option = rng.choice([option for option in FILES if option not in ("ckpt_dir", "lora_dir", "tokenizer")])
    file = rng.choice(["empty.txt", "latin.txt", "folder"] if option.endswith("_file") else ["text.txt", "folder"])
    if option in ("lora", "vae") and rng.random() < 0.4:
        file = "cut.safetensors"
    task = "i2v-A14B" if "image" in option else "t2v-A14B"
    if option == "image_path_file":
        return Wrong(["--prompt", "a", "--image_path_file", file], (f"--{option}", file), task, prompt=False)
    word = FILES[option].format(file)
    return Wrong([f"--{option}", word], (f"--{option}", file), task, prompt=not option.endswith("_file"))


def data_in_text(rng: random.Random) -> Wrong:
    file = rng.choice(["rows.txt", "list.txt"])
    return Wrong(["--prompt_file", file], (f"--prompt_file {file}", "jsonl"), prompt=False)


def bad_row(rng: random.Random) -> Wrong:
    key, value, *printed = rng.choice(
        [
            ("seed", "x"), ("seed", 1.5), ("frame_num", 80), ("frame_num", 100_001), ("size", "63*64"), ("size", ""),
            ("size", "64"), ("promt", "a"), ("image", 5), ("save_file", "../x.mp4"), ("save_file", "/x.mp4"),
            ("prompt", ""), ("prompt", None), ("negative_prompt", 3), ("size", "99999*99999"), ("seed", 2**63),
        ]
    )  # fmt: skip
    number, row = rng.randrange(1, 5), {"prompt": "a", key: value}
    lines = [json.dumps({"prompt": f"cat {n}"}) for n in range(1, number)] + [json.dumps(row)]
    Path("bad.jsonl").write_text("\n".join(lines))
    return Wrong(["--prompt_file", "bad.jsonl"], (f"bad.jsonl line {number}: ", *printed), prompt=False)


def bad_picture_in_row(rng: random.Random) -> Wrong:
    file = rng.choice(["gone.png", "text.txt", "folder"])
    key = rng.choice(["image", "last_image"])
    row = {"prompt": "a", "image": str(TINY / "input.png"), key: file}
    Path("picture.jsonl").write_text(json.dumps(row))
    return Wrong(["--prompt_file", "picture.jsonl"], ("picture.jsonl line 1: ", file), "i2v-A14B", prompt=False)


def contradiction(rng: random.Random) -> Wrong:
    picture = str(TINY / "input.png")
    cases = [
        Wrong(["--prompt_file", "two.txt"], ("--prompt and --prompt_file",)),
        Wrong(["--image_path_file", "one.txt"], ("--image and --image_path_file",), "i2v-A14B"),
        Wrong(["--prompt_file", "two.txt", "--image_path_file", "one.txt"],
              ("--image_path_file", "2 prompts but 1 image"), "i2v-A14B", False),
        Wrong(["--seconds", "2"], ("--seconds and --frame_num",)),
        Wrong(["--timesteps", "1000,500", "--sample_steps", "3"], ("--timesteps", "--sample_steps")),
        Wrong(["--timesteps", "1000,500", "--sample_shift", "5"], ("--timesteps", "--sample_shift")),
        Wrong(["--timesteps", "1000,500", "--sample_solver", "unipc"], ("--timesteps", "--sample_solver")),
        Wrong(["--save_file", "x.mp4", "--num_videos", "2"], ("--save_file",)),
        Wrong(["--save_file", "x.gif"], ("--save_file", "x.gif")),
        Wrong(["--save_file", "there.mp4"], ("--save_file there.mp4", "--overwrite")),
        Wrong(["--save_file", "folder"], ("--save_file folder", "--save_dir")),
        Wrong(["--save_dir", "text.txt"], ("text.txt is a file",)),
        Wrong(["--ulysses_size", "4"], ("--ulysses_size 4", "torchrun --nproc-per-node 4 generate.py")),
        Wrong(["--ring_size", "2"], ("--ring_size 2", "torchrun")),
        Wrong(["--dit_fsdp"], ("--dit_fsdp", "torchrun")),
        Wrong(["--t5_fsdp"], ("--t5_fsdp", "torchrun")),
        Wrong(["--shard", "3/2"], ("--shard", "'3/2'")),
        Wrong(["--shard", "2"], ("--shard", "'2'")),
        Wrong(["--shard", "1/2"], ("--shard", "--base_seed")),
        Wrong(["--high_steps", "2"], ("--high_steps",), "ti2v-5B"),
        Wrong(["--high_steps", "9"], ("--high_steps 9",)),
        Wrong(["--sample_guide_scale", "3,4"], ("--sample_guide_scale",), "ti2v-5B"),
        Wrong(["--sample_guide_scale", "3,4,5"], ("--sample_guide_scale", "'3,4,5'")),
        Wrong(["--sample_guide_scale", "200"], ("--sample_guide_scale 200",)),
        Wrong(["--last_image", picture], ("--last_image",)),
        Wrong(["--last_image", picture, "--frame_num", "1"], ("--frame_num", "not 1"), "i2v-A14B"),
        Wrong(["--lora_strength", "one"], ("--lora_strength", "'one'")),
        Wrong(["--lora_strength", "1e6"], ("--lora_strength 1000000",)),
        Wrong(["--lora", "high=text.txt:99"], ("--lora", "99")),
        Wrong(["--lora", "middle=text.txt"], ("--lora middle=text.txt",)),
        Wrong(["--expert", "model=text.txt"], ("--expert model=text.txt",)),
        Wrong(["--expert", "text.txt"], ("--expert text.txt",)),
        Wrong(["--timesteps", "1000,900,950"], ("--timesteps 1000,900,950",)),
        Wrong(["--timesteps", "1000,,900"], ("--timesteps", "'1000,,900'")),
        Wrong(["--timesteps", "1001,900"], ("--timesteps", "1001")),
        Wrong(["--sample_solver", "ddim"], ("--sample_solver 'ddim'",)),
        Wrong(["--lora_mode", "fuse"], ("--lora_mode 'fuse'",)),
        Wrong(["--preset", "fast"], ("--preset", "fast")),
        Wrong(["--preset", "t2v-seko-v1.1"], ("--preset t2v-seko-v1.1",), "ti2v-5B"),
        Wrong(["--device", "cuda:9"], ("--device cuda:9",)),
        Wrong(["--attention", "flash3"], ("flash3",)),
        Wrong(["--base_seed", str(2**63 - 1), "--num_videos", "3"], ("--base_seed", "--num_videos 3")),
        Wrong(["--extend_only", "a.doc"], ("--extend_only a.doc",)),
        Wrong(["--extend_only", "text.txt"], ("--extend_only text.txt", "--overwrite")),
        Wrong(["--prompt", ""], ("--prompt: the prompt is empty",)),
        Wrong(["--prompt", "a\0b"], ("--prompt", "NUL")),
        Wrong(["--decode_latents", "text.txt"], ("--decode_latents text.txt",)),
        Wrong(["--offload_model", "maybe"], ("--offload_model", "'maybe'")),
    ]  # fmt: skip
    return rng.choice(cases)


KINDS: list[Callable[[random.Random], Wrong]] = [
    mistyped, named_as_elsewhere, without_value, switch_with_value, stray, long_dash, wrong_type, out_of_range,
    no_choice, size, frames, all_files_absent, absent_file, bad_file, data_in_text, bad_row, bad_picture_in_row,
    contradiction, contradiction, contradiction,
]  # fmt: skip


# --- how it is answered


def answer(wrong: Wrong) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = generate.main([*base(wrong.task, wrong.prompt), *wrong.words])
    return code, out.getvalue(), err.getvalue().splitlines()


def finding(wrong: Wrong, code: int, out: str, lines: list[str]) -> str | None:
    """The fault of an answer; None without one."""
    event = {"event": "error", "code": 2, "problems": [line.removeprefix("error: ") for line in lines]}
    printed = json.dumps(event, ensure_ascii=False) + "\n" if "--json" in wrong.words else ""
    if (code, out, len(lines)) != (2, printed, wrong.lines):
        return f"exit code {code}, {len(lines)} lines"
    if not all(line.startswith("error: ") and line.isprintable() and len(line) <= LONGEST for line in lines):
        return "no line for a terminal"
    lacking = [name for name in wrong.names if not any(name in line for line in lines)]
    return f"does not say {' or '.join(map(repr, lacking))}" if lacking else None


def run(count: int, seed: int, show: bool = False) -> list[str]:
    """The faults of the answers to `count` lines."""
    findings = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        make_files(Path(folder))
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            kind = KINDS[number % len(KINDS)]
            wrong = kind(rng)
            code, out, lines = answer(wrong)
            printed = f"{kind.__name__}: {' '.join(map(repr, wrong.words))}\n    " + "\n    ".join(lines)
            if show:
                print(printed)
            if found := finding(wrong, code, out, lines):
                findings.append(f"{found}: {printed}")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.wrong_lines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=500, metavar="N", help="how many lines (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which ones (default 0)")
    parser.add_argument("--show", action="store_true", help="every line and its answer")
    args = parser.parse_args()
    findings = run(args.count, args.seed, args.show)
    print("\n".join(findings))
    print(f"{args.count} wrong lines, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
