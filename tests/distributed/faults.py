"""Faults in the processes of a run, and a table of what comes of them: python -m tests.distributed.faults [--seed N]

Three videos by two processes that share each (ulysses 2, sharded weights). The fault strikes while an expert is loaded,
or in the second video: in a step, in decoding or in writing. Then the same command with `--resume`. The faults are put
into the functions below by the child processes of the test; the program has no switch for them.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import generate
from tests.distributed.ranks import launched
from tests.support import checkpoint, lora_dir, read_frames
from wan.distributed import vae_parallel
from wan.distributed.ulysses import SequenceAttention
from wan.media import video
from wan.offload.reader import Source
from wan.utils.progress import Progress

WHATS = ("kill", "raise", "freeze", "memory", "interrupt")
# place -> (what is called there, how often a video of the table calls it at least)
PLACES: dict[str, tuple[Any, str, int]] = {
    "load": (Source, "place", 20),
    "step": (SequenceAttention, "__call__", 8),
    "decode": (vae_parallel, "padded", 2),
    "write": (video, "publish", 1),
}
VIDEOS, FRAMES = 3, 9
PATIENCE = "0.2"  # minutes, where a process hangs


@dataclass(frozen=True)
class Fault:
    """what happens where: in the `call`-th call there (from 0), in these processes."""

    what: str
    where: str
    processes: tuple[int, ...]
    call: int = 0

    def strike(self) -> None:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.what == "interrupt":
            signal.raise_signal(signal.SIGINT)
        raise ValueError("a bug") if self.what == "raise" else torch.OutOfMemoryError("CUDA out of memory")


def run_with_fault(fault: Fault, words: list[str], first_video: int = 2) -> int:
    """generate.py in a child process, with the fault in it; from the `first_video`-th video on, one strike."""
    owner, name, _ = PLACES[fault.where]
    original: Callable[..., Any] = getattr(owner, name)
    say, videos, calls = Progress.say, 0, 0

    def counting(self: Progress, text: str) -> None:
        nonlocal videos
        videos += text.startswith("video ")
        say(self, text)

    def faulty(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        if fault.where == "load" or videos >= first_video:
            calls += 1
            if calls == fault.call + 1 and int(os.environ["RANK"]) in fault.processes:
                fault.strike()
        return original(*arguments, **more)

    setattr(owner, name, faulty)
    Progress.say = counting  # type: ignore[method-assign]  # in this child process only
    return generate.main(words)


def batch(folder: Path, *more: str) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(f"a cat, number {index}" for index in range(VIDEOS)))
    return [
        "--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")),
        "--size", "80*48", "--frame_num", str(FRAMES), "--prompt_file", str(folder / "prompts.txt"), "--base_seed", "3",
        "--save_dir", str(folder / "out"), "--ulysses_size", "2", "--dit_fsdp", "--device", "cpu", *more,
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """codes: by process, None for one that had to be stopped. last: the last line of stderr."""

    seconds: float
    codes: list[int | None]
    printed: str
    left: list[str]  # files that are neither a whole video nor its record
    whole: int

    @property
    def last(self) -> str:
        return (self.printed.strip().splitlines() or [""])[-1]


def look(folder: Path) -> tuple[int, list[str]]:
    """(whole videos, names of the other files)."""
    files = sorted((folder / "out").glob("*")) if (folder / "out").exists() else []
    whole = [file for file in files if file.suffix == ".mp4" and len(read_frames(file)) == FRAMES]
    known = {*whole, *(file.with_suffix(".json") for file in whole)}
    return len(whole), [file.name for file in files if file not in known]


def observe(work: Callable[[], int], folder: Path) -> Outcome:
    began = time.monotonic()
    codes, printed = launched(work, 2, folder, until_others_end=True)
    spent = time.monotonic() - began
    whole, left = look(folder)
    return Outcome(spent, codes, "".join(printed), left, whole)


def try_out(fault: Fault, folder: Path) -> tuple[Outcome, Outcome]:
    """The outcome of the fault, and of `--resume` after it."""
    if fault.what == "freeze":
        os.environ["WAN_PATIENCE"] = PATIENCE
    hurt = observe(partial(run_with_fault, fault, batch(folder)), folder)
    os.environ.pop("WAN_PATIENCE", None)
    return hurt, observe(partial(generate.main, batch(folder, "--resume")), folder)


def faults(seed: int) -> list[Fault]:
    """Every kind of fault at every place, in the second process (in writing the first: it alone writes) and in all."""
    chance, found = random.Random(seed), []
    for where, (_, _, calls) in PLACES.items():
        for what in WHATS:
            call = chance.randrange(calls)
            one = Fault(what, where, (0,) if where == "write" else (1,), call)
            both = [] if where == "write" or what == "freeze" else [Fault(what, where, (0, 1), call)]
            found += [one, *both]  # were all frozen, nobody would be left to notice
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    print("| fault | where | in | s | exit codes | whole | left | last line | --resume |\n|" + "---|" * 9)
    for fault in faults(seed):
        folder = Path(tempfile.mkdtemp())
        hurt, resumed = try_out(fault, folder)
        left = ", ".join(name.split("_", 2)[-1].partition(".")[2] for name in hurt.left) or "nothing"
        again = f"{resumed.codes}, {resumed.whole} whole, {len(resumed.left)} others"
        who = "all" if len(fault.processes) == 2 else f"process {fault.processes[0]}"
        row = (fault.what, fault.where, who, f"{hurt.seconds:.1f}", hurt.codes, hurt.whole, left, hurt.last, again)
        print(f"| {' | '.join(map(str, row))} |".replace(str(folder), "."), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
