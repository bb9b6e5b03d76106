"""Two users in one sticky folder (mode 1777): each makes its videos, and what is the other's stays as it is."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TESTS, checkpoint
from wan.utils.files import latents_elsewhere

pytestmark = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0 or any(not folder.stat().st_mode & 1 for folder in TESTS.parents),
    reason="needs root, and a place that other users can enter",
)
ANN, BOB = 65_533, 65_534
# Root has imported all before it becomes the user, whom the interpreter's own folder may be closed to.
PROGRAM = """
import os, sys, traceback
import generate

shared, warm, ckpt, *users = sys.argv[1:]
SMALL = ["--task", "t2v-A14B", "--ckpt_dir", ckpt, "--device", "cpu", "--size", "48*48", "--frame_num", "5",
         "--base_seed", "5", "--sample_steps", "1", "--sample_guide_scale", "1"]

def runs(folder, who):
    named = [*SMALL, "--prompt", f"a ball of {who}", "--save_file", f"{folder}/{who}.mp4"]
    every = [*SMALL, "--prompt", "a ball", "--save_dir", folder]
    return {
        "dry run": [*every, "--resume", "--dry_run"], "named": named, "again": [*named, "--resume", "--preview"],
        "numbered": [*every, "--resume"], "gallery": [*every, "--resume", "--gallery"],
        "in the way": [*SMALL, "--prompt", "b", "--save_file", f"{folder}/private.mp4"],
        "taken": [*SMALL, "--prompt", "b", "--save_file", f"{folder}/private.mp4", "--overwrite"],
    }

for words in runs(warm, "root").values():
    generate.main(words)
print("=====", flush=True)
for user in map(int, users):
    for name, words in runs(shared, user).items():
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                os.environ["HOME"] = "/nonexistent"
                code = generate.main(words)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(f"{user} {name}:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def leave(folder: Path, user: int, other: int) -> None:
    """Leave files of `user` in a folder and in the temporary one, under the names that the other user needs."""
    for mode in (0o700, 0o777):
        kept = folder / "tmp" / f"wan-lightning-{user}-{mode}"
        kept.mkdir()
        (kept / latents_elsewhere(folder / f"{other}.mp4").name).write_bytes(b"not yours")
        kept.chmod(mode)
        os.chown(kept, user, user)
    for name, mode in {
        f".{other}.mp4.0123abcd.part": 0o600, f".{other}.json.0123abcd.part": 0o644,
        "private.mp4": 0o600, "private.json": 0o600, "index.html": 0o600,
        f"note of {user}.json": 0o600, f".private.mp4.{user % 10}123abcd.part": 0o600, ".private.mp4.lock": 0o600,
    }.items():  # fmt: skip
        if not (folder / name).exists():
            (folder / name).write_text(f"{user}'s")
            (folder / name).chmod(mode)
            os.chown(folder / name, user, user)


def state(folder: Path, user: int) -> dict[Path, tuple[object, ...]]:
    own = [path for path in folder.rglob("*") if path.lstat().st_uid == user]
    contents = {path: path.read_bytes() if path.is_file() else b"" for path in own}
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns, contents[path]) for path in own}


@pytest.mark.parametrize("order", [(ANN, BOB), (BOB, ANN)], ids=["Ann first", "Bob first"])
def test_files_of_others_stay(order: tuple[int, int], shared: Path, tmp_path: Path) -> None:
    first, second = order
    (shared / "tmp").mkdir()
    (shared / "tmp").chmod(0o1777)
    ckpt = shutil.copytree(checkpoint("t2v-A14B"), shared / "ckpt")
    leave(shared, first, second)
    before = state(shared, first)
    words = [sys.executable, "-c", PROGRAM, shared, tmp_path, ckpt, second]
    # one thread: the fork of a process that has used several hangs in OpenMP
    variables = {**os.environ, "TMPDIR": str(shared / "tmp"), "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, words)], env=variables, capture_output=True, text=True, check=False, cwd=TESTS.parent
    )
    shown = done.stdout.partition("=====")[2] + done.stderr
    assert "Traceback" not in shown, shown
    assert state(shared, first) == before
    codes = dict(line.rsplit(": ", 1) for line in shown.splitlines() if line.startswith(f"{second} "))
    expected = {"dry run": 0, "named": 0, "again": 0, "numbered": 0, "gallery": 2, "in the way": 2, "taken": 2}
    assert f"error: --save_file {shared}/private.mp4 and {shared}/private.json belong to another user" in shown
    assert codes == {f"{second} {name}": str(code) for name, code in expected.items()}, shown
    made = {path.name for path in shared.glob("*.mp4") if path.stat().st_uid == second}
    assert made == {f"{second}.mp4", "t2v-A14B_0000_seed5_a_ball.mp4"}
    assert (shared / f"{second}.png").is_file()
