"""The package as pip installs it: its command, and the files that must come with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TESTS, checkpoint, lora_dir
from wan import __version__

ROOT = TESTS.parent


@pytest.mark.parametrize("words", [["generate.py", "--help"], ["-m", "wan.doctor"], ["-m", "wan.gallery"]])
def test_a_python_without_the_packages_gets_one_line(words: list[str]) -> None:
    run = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert "has no package torch and no easydict; after make demo: source .venv/bin/activate" in line


@pytest.mark.slow
def test_the_installed_command_works_from_anywhere(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77: pip install '.[dev]'")
    assert setuptools
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "wan", source / "wan", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "lightning", source / "lightning", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("generate.py", "pyproject.toml", "README.md", "LICENSE.txt"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(pip, check=True, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def command(*words: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(target)}
        script = [sys.executable, str(target / "bin" / "wan-generate"), *words]
        done = subprocess.run(script, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("--version") == f"wan-lightning {__version__}\n"
    assert command("--help").startswith("usage: wan-generate")
    weights = ["--ckpt_dir", str(checkpoint("i2v-A14B")), "--lora_dir", str(lora_dir("i2v-A14B"))]
    plan = command("--task", "i2v-A14B", *weights, "--size", "64*64", "--frame_num", "5", "--dry_run")
    assert f"the example picture {target / 'wan' / 'configs' / 'i2v_input.png'} is used" in plan
    assert "from 832x480" in plan

    shutil.copytree(ROOT / "tests" / "golden", elsewhere / "videos")  # JSON files that are no records
    page = [sys.executable, "-m", "wan.gallery", "videos"]
    subprocess.run(page, check=True, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)})
    assert "entries" in (elsewhere / "videos" / "index.html").read_text()
