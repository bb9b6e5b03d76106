"""Names beside a video, and writing whole or not at all by several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TESTS
from wan.utils.files import Beside, latents_elsewhere, make_part, remove_parts, replacing, write_file


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=TESTS.parent, stdout=subprocess.PIPE, text=True
    )


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with replacing(tmp_path / "a") as part:
            part.write_text("half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run()
    assert list(tmp_path.iterdir()) == []
    with replacing(tmp_path / "a") as part:
        part.write_text("whole")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer under the writer records the calls that reach the file system."""
    calls: list[str] = []
    flush, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 5
        calls.append("fsync")
        flush(descriptor)

    def replace(part: Path, target: Path) -> Path:
        assert part.parent == target.parent
        calls.append("rename")
        return rename(part, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_file(tmp_path / "a", "whole")
    write_file(tmp_path / "a", b"bytes")
    assert calls == ["fsync", "rename"] * 2
    assert (tmp_path / "a").read_bytes() == b"bytes"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_two_processes_do_not_write_into_one_part(tmp_path: Path) -> None:
    """One name for both would give one process the other's bytes, or take the file from under it."""
    code = """
import sys, time
from pathlib import Path
from wan.utils.files import replacing
with replacing(Path(sys.argv[1])) as part:
    part.write_text(sys.argv[2] * 1000)
    print(part.name, flush=True)
    time.sleep(0.5)
    assert part.read_text() == sys.argv[2] * 1000
"""
    started = [run_python(code, tmp_path / "a", letter) for letter in "xy"]
    names = {process.communicate(timeout=300)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(names) == 2
    assert (tmp_path / "a").read_text() in ("x" * 1000, "y" * 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_at_the_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "a").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "keep"
    assert not (tmp_path / "a").is_symlink()


def test_names_beside_a_video() -> None:
    assert [p.name for p in Beside.of(Path("out/a.b.mp4"))] == ["a.b.mp4", "a.b.json", "a.b.latents.safetensors",
                                                               "a.b.png", "a.b.steps.png"]  # fmt: skip


def test_latents_in_the_temporary_folder_are_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that others can enter or that belongs to another user, and a link, are no place for them."""
    monkeypatch.setattr("wan.utils.files.tempfile.tempdir", str(tmp_path))
    (tmp_path / "wan-lightning-0").mkdir(mode=0o755)
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "wan-lightning-1").symlink_to(tmp_path / "private")
    (tmp_path / "wan-lightning-2").write_text("no folder")
    video = tmp_path / "x.mp4"
    assert not latents_elsewhere(video).parent.exists()
    made = latents_elsewhere(video, make=True)
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert made.parent.name not in ("wan-lightning-0", "wan-lightning-1", "wan-lightning-2")
    assert latents_elsewhere(video) == latents_elsewhere(video, make=True) == made
    if os.geteuid() == 0:
        os.chown(made.parent, 12345, 12345)
        assert not latents_elsewhere(video).parent.exists()


def test_kept_latents_of_equal_names_do_not_meet() -> None:
    first, second = (latents_elsewhere(Path(folder) / "x.mp4") for folder in ("one", "two"))
    assert first != second
    assert first == latents_elsewhere(Path("one").absolute() / "x.mp4")
    assert first.name.startswith("x-")
    assert first.name.endswith(".latents.safetensors")
    assert len(os.fsencode(latents_elsewhere(Path("猫" * 80 + ".mp4")).name)) < 200


def test_only_the_parts_of_this_video_are_removed(tmp_path: Path) -> None:
    for file in (*Beside.of(tmp_path / "a.mp4"), tmp_path / "b.mp4"):
        make_part(file)
    users = ["a.mp4", "notes.part", ".hidden.part", ".a.mp4.part", ".a.mp4.notes.part", "a.mp4.00000000.part"]
    for name in users:
        (tmp_path / name).write_text("keep")
    (tmp_path / ".a.mp4.00000000.part").mkdir()
    assert remove_parts(tmp_path / "a.mp4") == 5
    left = {path.name for path in tmp_path.iterdir()} - {*users, ".a.mp4.00000000.part"}
    assert len(left) == 1
    assert left.pop().startswith(".b.mp4.")
