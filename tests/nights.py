"""Two nights of a video maker, played through: `python -m tests.nights` (five minutes, as root on Linux).

1. A spreadsheet export of 20 rows with pictures from a phone; one picture is missing until the user mends it.
2. 200 rows over 4 processes: two are killed, the disk fills up, the user frees some and starts the same command again.

In the end every video is there once, and every fault was one line. Exit code 1 otherwise.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from tests.support import TESTS, checkpoint, lora_dir

ROOT = TESTS.parent
SMALL = ["--size", "32*32", "--frame_num", "5", "--device", "cpu", "--base_seed", "1", "--resume"]
FULL, ROOMY = "700k", "8m"  # of 200 videos the first holds some 80


def start(task: str, *words: str) -> subprocess.Popen[str]:
    weights = ["--task", task, "--ckpt_dir", str(checkpoint(task)), "--lora_dir", str(lora_dir(task))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "generate.py"), *weights, *SMALL, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """(exit code, lines) of a process."""
    text, _ = process.communicate(timeout=900)
    return process.returncode, text.splitlines()


def check(*, holds: bool, what: object) -> None:
    if not holds:
        raise SystemExit(f"FINDING {what}")


def videos(folder: Path) -> Counter[tuple[str, int]]:
    """How often each prompt and seed was made."""
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    whole = [record for record in records if (folder / record["output"]["file"]).stat().st_size]
    return Counter((record["job"]["original_prompt"], record["job"]["seed"]) for record in whole)


def first_night(folder: Path) -> None:
    for number in range(20):
        picture = Image.radial_gradient("L").resize((120, 80)).convert("RGB")
        orientation = Image.Exif()
        orientation[0x0112] = 1 + number % 8
        picture.save(folder / f"IMG_{number:04d}.jpg", exif=orientation)
    rows = [f"a cat turns {number};IMG_{number:04d}.jpg;{number}.0;first try;" for number in range(20)]
    table = folder / "export.csv"
    table.write_bytes("\r\n".join(["sep=;", "Prompt;Image;Seed;Notes;", *rows, ";;;;"]).encode("utf-16"))
    missing = folder / "IMG_0006.jpg"
    missing.rename(folder / "moved.jpg")
    words = ["--prompt_file", str(table), "--save_dir", str(folder / "out")]
    code, lines = finish(start("i2v-A14B", *words))
    errors = [line for line in lines if line.startswith("error:")]
    check(holds=code == 2 and len(errors) == 1 and "export.csv line 9" in errors[0], what=lines)
    (folder / "moved.jpg").rename(missing)
    code, lines = finish(start("i2v-A14B", *words))
    check(holds=code == 0 and any("20 saved" in line for line in lines), what=lines[-5:])
    check(holds=any("notes" in line for line in lines), what="the column of notes is not named")
    made = videos(folder / "out")
    check(holds=len(made) == 20 and set(made.values()) == {1}, what=made)
    print("night 1: one line for the missing picture, then 20 videos")


def second_night(folder: Path) -> None:
    disk, chance = folder / "disk", random.Random(1)
    disk.mkdir()
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat number {number}\n" for number in range(200)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL}", "tmpfs", str(disk)], check=True)
    try:
        words = ["--prompt_file", str(prompts), "--save_dir", str(disk / "out"), "--ignore_disk"]
        running = [start("t2v-A14B", *words) for _ in range(4)]
        for victim in chance.sample(running, 2):
            time.sleep(chance.uniform(8, 14))
            victim.send_signal(signal.SIGKILL)
        ended = [finish(process) for process in running]
        check(holds=sorted(code for code, _ in ended) == [-9, -9, 1, 1], what=[code for code, _ in ended])
        for code, lines in ended:
            faults = [line for line in lines if "Traceback" in line]
            failed = [line for line in lines if line.startswith("failed:")]
            check(holds=not faults and all("No space" in line for line in failed), what=[*faults, *failed[:3]])
            if code == 1:
                check(holds=bool(failed) and any("to go on from here" in line for line in lines), what=lines[-5:])
        kept = len(videos(disk / "out"))
        check(holds=0 < kept < 200, what=f"{kept} videos on the small disk")
        subprocess.run(["mount", "-o", f"remount,size={ROOMY}", str(disk)], check=True)
        for code, lines in [finish(process) for process in [start("t2v-A14B", *words) for _ in range(4)]]:
            check(holds=code == 0, what=lines[-5:])
        made = videos(disk / "out")
        left = [file.name for file in (disk / "out").iterdir() if file.suffix not in (".mp4", ".json")]
        check(holds=len(made) == 200 and set(made.values()) == {1} and not left, what=(len(made), left[:5]))
        print(f"night 2: {kept} videos before the disk was full, two processes killed; then 200, each once")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def main() -> int:
    for night in (first_night, second_night):
        with tempfile.TemporaryDirectory() as folder:
            night(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
