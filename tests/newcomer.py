"""Thirteen tasks of newcomers with the README and docs: `python -m tests.newcomer [N ...] [--columns 80] [--install]`.

Each is carried out in a fresh clone of the last commit, with an empty environment, in a terminal: what that shows
is printed with the exit codes. A step that ends otherwise than it should is a finding, and exit code 1. It takes some
five minutes; the packages are those of the Python that runs it, or with --install what `make demo` fetches.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm.utils import disp_len

from benchmarks.full_run import write_headers
from benchmarks.sparse import sparse
from tests.support import FOLDERS, TESTS, manifest

ROOT = TESTS.parent
CLEAR = "\x1b[K"
PATIENCE = 300  # seconds of one command
RELEASE = "Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
T2V = "--task t2v-A14B --ckpt_dir examples/shapes/Wan2.2-T2V-A14B --lora_dir examples/shapes/lora-t2v"
I2V = "--task i2v-A14B --ckpt_dir examples/shapes/Wan2.2-I2V-A14B --lora_dir examples/shapes/lora-i2v"
SMALL = "--size 64x64 --frame_num 9"
PROMPT = "--prompt 'a red square moves left on a white background'"
BATCH = f"{T2V} --size 128x128 --frame_num 17 --prompt_file five.jsonl --save_dir batch"
LONG = "--size 256x256 --frame_num 33 --sample_steps 200"
SHAPES = ("red square", "white triangle", "green circle", "yellow square", "blue circle")


class Step(NamedTuple):
    """A command, and how it should end."""

    command: str
    code: int = 0
    says: tuple[str, ...] = ()  # what the terminal shows at the end
    files: tuple[str, ...] = ()  # patterns of files that are there then
    before: Callable[[Path], None] | None = None  # in the clone
    at: str = ""  # once the terminal shows this...
    do: Callable[[int, int], None] | None = None  # ...to the process, and its terminal
    foreign: bool = False  # torchrun has a traceback of its own


# --- what the newcomer has and does beside typing commands


def write_weights(clone: Path) -> None:
    """Folders in the released layout and full size, once for all tasks; the files are sparse."""
    if (clone / RELEASE).exists():
        return
    for task, name in FOLDERS.items():
        (clone / name).mkdir()
        write_headers(clone / name, task, None, None)
    tensors = {name: ("F32" if shape else "F64", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<d", 8.0) for name, (_, shape) in tensors.items() if not shape}
    (clone / RELEASE).mkdir(parents=True)
    for expert in ("high", "low"):
        sparse(clone / RELEASE / f"{expert}_noise_model.safetensors", tensors, alphas)


def draw_pictures(clone: Path) -> None:
    mine = Image.open(clone / "examples/shapes/first_frame.png").convert("RGB")
    mine.save(clone / "mine.jpg")
    mine.save(clone / "jpeg.png", "JPEG")
    Image.new("RGBA", (300, 200), (255, 0, 0, 0)).save(clone / "clear.png")
    Image.new("L", (12_000, 9_000)).save(clone / "huge.png")
    (clone / "text.png").write_text("no picture")


def write_bad_prompts(clone: Path) -> None:
    rows = [{"prompt": f"a {shape} moves up on a black background"} for shape in SHAPES]
    rows[2]["size"] = "100*64"
    (clone / "five.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def mend_prompts(clone: Path) -> None:
    file = clone / "five.jsonl"
    file.write_text(file.read_text().replace(', "size": "100*64"', ""))


def write_sheet(clone: Path) -> None:
    rows = [f"a {shape} moves up on a black background;{number}.0;" for number, shape in enumerate(SHAPES)]
    (clone / "sheet.csv").write_bytes("\r\n".join(["sep=;", "Prompt;Seed;Notes", *rows]).encode("utf-16"))


def write_script(clone: Path) -> None:
    """As the original's examples call it."""
    shapes = "examples/shapes/Wan2.2-T2V-A14B"
    (clone / "script.py").write_text(
        "import wan\nfrom wan.configs import SIZE_CONFIGS, WAN_CONFIGS\n"
        "from wan.utils.utils import merge_video_audio, save_video, str2bool\n"
        f"pipe = wan.WanT2V(config=WAN_CONFIGS['t2v-A14B'], checkpoint_dir={shapes!r}, device_id=0, rank=0)\n"
        "video = pipe.generate('a red square moves left on a white background', size=(64, 64), frame_num=9, "
        "sampling_steps=4, seed=1)\nsave_video(tensor=video[None], save_file='script.mp4', fps=16, nrow=1, "
        "normalize=True, value_range=(-1, 1))\n"
    )


def interrupt(_: int, terminal: int) -> None:
    os.write(terminal, b"\x03")


def kill_one(launcher: int, _: int) -> None:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


TASKS: dict[str, list[Step]] = {
    "1 the two commands": [
        Step("make demo", says=("1 saved",), files=("demo/t2v*.mp4", "demo/i2v*.mp4", "demo/t2v*.png")),
    ],
    "2 what can my machine do": [Step("python -m wan.doctor", says=("nothing wrong", "t2v-A14B"))],
    "3 a plan for a machine that is not here": [
        Step(f"python generate.py --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B --lora_dir {RELEASE} --vram 24 --dry_run",
             2, ("hf download Wan-AI/Wan2.2-T2V-A14B", "hf download lightx2v/Wan2.2-Lightning")),
        Step(f"python generate.py --task t2v-A14B --size 1280*720 --ckpt_dir Wan2.2-T2V-A14B --lora_dir {RELEASE} "
             "--vram 24 --dtype bf16 --dry_run", says=("21 of 41 blocks stay", "dry run: nothing was made"),
             before=write_weights),
        Step("python generate.py --task i2v-A14B --ckpt_dir Wan2.2-I2V-A14B --image examples/shapes/first_frame.png "
             "--prompt 'a cat' --vram 24 --dtype bf16 --dry_run", says=("steps 1 to 15", "blocks stay")),
        Step("python generate.py --task ti2v-5B --ckpt_dir Wan2.2-TI2V-5B --prompt 'a cat' --vram 24 --dtype bf16 "
             "--dry_run", says=("50 steps", "1280x704, 121 frames")),
        Step("python generate.py --ckpt_dir Wan2.2-T2V-A14B --prompt 'a cat' --vram 3 --dry_run", 2,
             ("needs at least",)),
    ],
    "4 a prompt of my own": [
        Step(f"python generate.py {T2V} --size 96x64 --frame_num 17 {PROMPT} --save_file my/red.mp4 --preview",
             says=("none of those that 'shapes' was trained for", "saved my/red.mp4"),
             files=("my/red.mp4", "my/red.png")),
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --save_file my/red.mp4", 2,
             ("my/red.mp4 and my/red.json already exist",)),
        Step(f"python generate.py {T2V} --size 100x64 --frame_num 16 --prompt a red square", 2,
             ("needs straight quotes",)),
    ],
    "5 from a picture of my own": [
        Step(f"python generate.py {I2V} {SMALL} {PROMPT} --image mine.jpg --save_file my/a.mp4", files=("my/a.mp4",),
             before=draw_pictures),
        Step(f"python generate.py {I2V} {SMALL} {PROMPT} --image jpeg.png --save_file my/b.mp4", files=("my/b.mp4",)),
        Step(f"python generate.py {I2V} {SMALL} {PROMPT} --image clear.png --dry_run",
             says=("transparency was dropped",)),
        Step(f"python generate.py {I2V} {SMALL} {PROMPT} --image huge.png", 2,
             ("too large", "at most 100 megapixels")),
        Step(f"python generate.py {I2V} {SMALL} {PROMPT} --image text.png", 2, ("text.png: not an image",)),
    ],
    "6 a batch, interrupted": [
        Step(f"python generate.py {BATCH}", 2, ("five.jsonl line 3: size 100*64",), before=write_bad_prompts),
        Step(f"python generate.py {BATCH}", 130, ("1 saved, 4 not tried", "--resume"),
             ("batch/*_0000_*.mp4",), mend_prompts, at="video 0001 (2 of 5)", do=interrupt),
        Step(f"python generate.py {BATCH} --resume", says=("4 saved, 1 there already", "video 0004 (5 of 5)"),
             files=("batch/*_0000_*.mp4", "batch/*_0004_*.mp4")),
    ],
    "7 once more, with another seed": [
        Step("python generate.py --replay demo/t2v*.json --base_seed 7 --save_dir again", says=("seed 7",),
             files=("again/*_seed7_*_replay.mp4",)),
        Step("python generate.py --replay Makefile", 2, ("--replay Makefile: ",)),
    ],
    "8 LoRAs": [
        Step("python -m lightning inspect examples/shapes/lora-t2v --ckpt_dir examples/shapes/Wan2.2-T2V-A14B",
             says=("40/40 pairs", "--lora_dir examples/shapes/lora-t2v")),
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --lora_strength 0.8 --dry_run", says=("strength 0.8",)),
        Step("python generate.py --task t2v-A14B --ckpt_dir examples/shapes/Wan2.2-T2V-A14B --lora_dir "
             f"examples/tiny/lora-t2v {SMALL} {PROMPT} --dry_run", 2, ("20 of 60 tensors do not fit the model",)),
        Step("python -m lightning inspect README.md", 2, ("error: README.md: not a safetensors file",)),
    ],
    "9 prompt extension": [
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --use_prompt_extend --prompt_extend_method dashscope", 2,
             ("DASH_API_KEY",)),
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --use_prompt_extend --prompt_extend_method qwen", 2,
             ("not one of local_qwen, dashscope, openai",)),
        Step(f"python generate.py --task t2v-A14B {PROMPT} --prompt_extend_method openai --extend_only out.txt", 2,
             ("--prompt_extend_model", "OPENAI_API_KEY")),
    ],
    "10 two processes": [
        Step(f"torchrun --nproc-per-node 2 generate.py {T2V} {SMALL} --dit_fsdp --t5_fsdp --ulysses_size 2 "
             "--prompt_file examples/prompt_list.txt --save_dir two", says=("3 saved",), files=("two/*_0002_*.mp4",)),
        Step(f"torchrun --nproc-per-node 2 generate.py {T2V} {LONG} {PROMPT} --ulysses_size 2 --save_dir three", 1,
             ("error: ", "SIGKILL"), at="| 2/200 ", do=kill_one, foreign=True),
    ],
    "11 a 12 GB card and a spreadsheet": [
        Step(f"python generate.py --task t2v-A14B --size 720p --ckpt_dir Wan2.2-T2V-A14B --lora_dir {RELEASE} "
             "--prompt 'a cat' --vram 12 --dry_run", says=("of 41 blocks stay", "81 frames"), before=write_weights),
        Step(f"python generate.py {T2V} {SMALL} --prompt_file sheet.csv --save_dir sheet --gallery --resume",
             says=("5 saved", "'notes'", "sheet/index.html"), files=("sheet/*_0004_seed4_*.mp4",), before=write_sheet),
        Step(f"python generate.py {T2V} {SMALL} --prompt_file sheet.csv --save_dir sheet --resume",
             says=("5 there already",)),
    ],
    "12 the original's scripts and a folder of LoRAs": [
        Step("python script.py", files=("script.mp4",), before=write_script),
        Step(f"python generate.py {T2V.replace('--lora_dir', '--lora')}/high_noise_model.safetensors:0.8 {SMALL} "
             f"{PROMPT} --dry_run", says=("strength 0.8",)),
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --sweep lora_strength=0.5,1 --sweep base_seed=1,2 "
             "--save_dir sweep", says=("4 saved", "read again 1 time"), files=("sweep/*_0003_*lora_strength1*.mp4",)),
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --task s2v-14B", 2, ("S2V",)),
    ],
    "13 eight GPUs and Slurm": [
        Step(f"python generate.py {T2V} {SMALL} {PROMPT} --dit_fsdp --ulysses_size 8", 2, ("torchrun",)),
        Step("env SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_COUNT=2 SLURM_ARRAY_TASK_MIN=0 "
             f"python generate.py {T2V} {SMALL} --prompt_file examples/prompt_list.txt "
             "--shard slurm --base_seed 1 --save_dir array", says=("1 saved",)),
        Step(f"python generate.py {T2V} {SMALL} --prompt_file examples/prompt_list.txt --shard 1/2 --base_seed 1 "
             "--save_dir array --resume", says=("2 saved",), files=("array/*_0002_*.mp4",)),
    ],
}  # fmt: skip


# --- the terminal


def typed(command: str, clone: Path, env: dict[str, str], columns: int, step: Step) -> tuple[int, str]:
    """(exit code, everything that the terminal received) of a command in a terminal of its own."""
    words = [found for word in shlex.split(command) for found in _expanded(word, clone)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(clone)
        os.execvpe(words[0], words, env)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(PATIENCE)
    received, todo = b"", step.do
    while piece := _read(terminal):
        received += piece
        if todo and step.at.encode() in received:
            todo(pid, terminal)
            todo = None
    signal.alarm(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return code, received.decode(errors="replace")


def _expanded(word: str, clone: Path) -> list[str]:
    """A word with a star as a shell expands it."""
    found = sorted(path.relative_to(clone).as_posix() for path in clone.glob(word)) if "*" in word else []
    return found or [word]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # Linux's way to say that nobody writes any more
        return b""


def shown(received: str, columns: int) -> list[str]:
    """The lines that are left on the terminal, wrapped as it wraps them."""
    lines = []
    for line in received.replace("\r\n", "\n").split("\n"):
        left = ""
        for part in line.split("\r"):  # overwrites the line; CLEAR empties the rest
            left = part.replace(CLEAR, "") + ("" if CLEAR in part else left[len(part) :])
        lines += [left[first : first + columns] for first in range(0, max(1, len(left)), columns)]
    return lines[:-1] if lines[-1] == "" else lines


def findings(step: Step, code: int, received: str, columns: int, clone: Path) -> list[str]:
    """Sentences about everything that is wrong."""
    whole, found = "\n".join(shown(received, 1 << 20)), []
    if code != step.code:
        found.append(f"exit code {code}, not {step.code}")
    found += [f"does not say {text!r}" for text in step.says if text not in whole]
    found += [f"there is no {pattern}" for pattern in step.files if not any(clone.glob(pattern))]
    drawn = [part for part in received.replace("\r\n", "\n").split("\r") if "\n" not in part]
    found += [f"wider than the terminal: {part}" for part in drawn if disp_len(part.replace(CLEAR, "")) >= columns]
    if "Traceback" in whole and not step.foreign:
        found.append("a traceback")
    if shown(received, columns) and not re.search(rf"(\n|\r{re.escape(CLEAR)})$", received):
        found.append("the cursor is not at a line's start")
    if step.code == 2 and any(line.count("error: ") > 1 for line in whole.splitlines()):
        found.append("an error within an error")
    return found


# --- the clone


def prepare(folder: Path, install: bool) -> tuple[Path, dict[str, str]]:
    """(a fresh clone, the environment of its commands). Without `install` its .venv borrows this Python's packages."""
    clone, home = folder / "clone", folder / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    if not install:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clone / ".venv")], check=True)
        (packages,) = (clone / ".venv/lib").glob("python*/site-packages")
        (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        launcher = clone / ".venv/bin/torchrun"
        launcher.write_text(f"#!{clone}/.venv/bin/python\nfrom torch.distributed.run import main\n\nmain()\n")
        launcher.chmod(0o755)
        (clone / ".venv/.installed").touch()
    path = [str(clone / ".venv/bin"), str(Path(sys.executable).resolve().parent), "/usr/local/bin", "/usr/bin", "/bin"]
    env = {"PATH": ":".join(path), "HOME": str(home), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    return clone, env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="of the tasks; default: all (7 needs 1)")
    parser.add_argument("--columns", type=int, default=80, help="of the terminal")
    parser.add_argument("--install", action="store_true", help="let `make demo` install the packages")
    args = parser.parse_args()
    wrong, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        clone, env = prepare(Path(folder), args.install)
        for title, steps in TASKS.items():
            if args.numbers and int(title.split()[0]) not in args.numbers:
                continue
            print(f"\n===== {title}")
            for step in steps:
                if step.before:
                    step.before(clone)
                code, received = typed(step.command, clone, env, args.columns, step)
                print(f"$ {step.command}", *shown(received, args.columns), f"[exit code {code}]", sep="\n", flush=True)
                found = findings(step, code, received, args.columns, clone)
                wrong += [f"{title}: {step.command}: {one}" for one in found]
                count += 1
    print(f"\n{count} commands, {len(wrong)} findings", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
