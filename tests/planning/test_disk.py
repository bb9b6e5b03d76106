"""Disk space: only videos still to be made count; an error only where they cannot fit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import generate
from tests.support import command
from wan.planning import report as module
from wan.planning.report import RECORD_BYTES

GB = 1e9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the free bytes of every disk."""

    def set_free(count: float, total: float = 1e12) -> None:
        usage = SimpleNamespace(total=int(total), free=int(count))
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)

    return set_free


def test_a_batch_on_a_disk_that_holds_all_but_ten(
    tmp_path: Path, free: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--resume` the disk needs to hold the two videos that are missing, not the twelve of the file."""
    (tmp_path / "p.txt").write_text("".join(f"cat {n}\n" for n in range(12)))
    words = command("t2v-A14B", "--prompt_file", str(tmp_path / "p.txt"), "--save_dir", str(tmp_path / "out"))
    words.remove("a red ball")
    words.remove("--prompt")
    assert generate.main(words) == 0
    capsys.readouterr()
    free(6 * RECORD_BYTES)
    assert generate.main([*words, "--resume", "--dry_run"]) == 0, "nothing is left to do"
    assert "disk:" not in capsys.readouterr().out
    for video in sorted((tmp_path / "out").glob("*.mp4"))[3:5]:
        video.unlink()
    assert generate.main([*words, "--resume"]) == 0
    assert "2 saved, 10 there already" in capsys.readouterr().err
    assert generate.main([*words, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "--save_dir" in error
    assert "--ignore_disk" in error
    assert "120 kB free" in error
    assert generate.main([*words, "--overwrite", "--ignore_disk", "--dry_run"]) == 0


def test_a_close_disk_is_a_warning(tmp_path: Path, free: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = command("t2v-A14B", "--save_dir", str(tmp_path), "--dry_run", "--size", "1280*720", "--frame_num", "81")
    free(12 * GB)
    assert generate.main(words) == 0
    assert "warning: " + str(tmp_path) not in capsys.readouterr().out
    free(50e6)
    assert generate.main(words) == 0
    assert f"warning: {tmp_path} may be full" in capsys.readouterr().out
    assert generate.main([*words, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[0])["disk"]
    assert entry["least"] < entry["free"] == 50_000_000 < entry["needed"] < entry["most"]
    free(0, total=0)  # a file system that does not say
    assert generate.main(words) == 0
    assert "free space unknown" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/proc", "/proc/videos", "/sys/videos"])
def test_a_folder_that_takes_no_files_is_named(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no such file system here")
    assert generate.main(command("t2v-A14B", "--save_dir", folder, "--dry_run")) == 2
    error = capsys.readouterr().err
    assert folder in error
    assert "--save_dir" in error
    assert "free" not in error
