"""Output files: inside the right folder, replacing nothing, under names that can be written; checked quickly."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unprivileged import run_unprivileged
from wan.cli.checks import Check
from wan.jobs.job import Request
from wan.jobs.output_paths import check_outputs, row_file
from wan.utils.files import longest_name


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(*files: str, inputs: tuple[str, ...] = (), **flags) -> list[str]:
    check = Check()
    check_outputs(Request(**flags), [Path(file) for file in files], check, [Path(i) for i in inputs])
    return list(check.problems)


def problem(*files: str, **flags) -> str:
    (found,) = problems(*files, **flags)
    return found


def row(name: str, save_dir: str = "out") -> tuple[Path, list[str]]:
    check = Check()
    return row_file(Path(save_dir), name, "p.jsonl line 3", check), list(check.problems)


OUTSIDE = ["/abs.mp4", "../x.mp4", "a/../../x.mp4", "a/../x.mp4"]
OUTSIDE_ON_WINDOWS = ["C:x.mp4", "C:\\x.mp4", "..\\x.mp4", "\\\\host\\share\\x.mp4"]


@pytest.mark.parametrize("name", OUTSIDE + OUTSIDE_ON_WINDOWS)
def test_a_row_names_nothing_outside_the_folder(name: str) -> None:
    file, (found,) = row(name)
    assert found.startswith("p.jsonl line 3: save_file ")
    assert "must name a file inside --save_dir" in found
    assert file.parent == Path("out")


def test_a_row_leads_nowhere_by_links(here: Path) -> None:
    (here / "out" / "sub").mkdir(parents=True)
    (here / "away").mkdir()
    (here / "out" / "link").symlink_to(here / "away")
    (here / "out" / "inner").symlink_to(here / "out" / "sub")
    (here / "out" / "x.mp4").symlink_to(here / "y.mp4")
    for name in ("link/x.mp4", "link/deep/x.mp4", "x.mp4"):
        assert "leads out of --save_dir out by a symbolic link" in row(name)[1][0]
    assert row("inner/x.mp4") == (Path("out/inner/x.mp4"), [])


def test_a_row_may_name_what_is_inside() -> None:
    for name in ("x.mp4", "a/b/猫.mp4", "~/x.mp4", "..x.mp4"):
        assert row(name) == (Path("out") / name, [])
    assert row("~/x.mp4", ".") == (Path("~/x.mp4"), [])  # a folder named ~: nobody's home


@pytest.mark.parametrize(
    "name",
    ["CON", "con.mp4", "a/NUL.x.mp4", "Lpt1 .mp4", "a?.mp4", "a:b/c.mp4", "a*.mp4", 'a".mp4', "<a>.mp4", "a|b.mp4",
     "trailing.mp4 ", "trailing.mp4.", "folder /x.mp4", "folder./x.mp4", "back\\slash.mp4", "a\x1b[31m.mp4", "a\n.mp4",
     "a\t.mp4", "a\x7f.mp4"],
)  # fmt: skip
def test_a_row_has_a_name_for_every_platform(name: str) -> None:
    _, (found,) = row(name)
    assert found.startswith(f"p.jsonl line 3: save_file {name!r} ")
    assert found.isprintable()


@pytest.mark.parametrize("target", ["/not/mounted/videos", "gone", "../gone/deeper"])
def test_a_folder_behind_a_dangling_link(here: Path, target: str) -> None:
    (here / "out").symlink_to(target)
    for file in ("out/x.mp4", "out/sub/x.mp4"):
        found = problem(file)
        assert found.startswith(f"{(here / file).parent}: ")
        assert target in found
    (here / "gone").mkdir()
    assert problems("out/x.mp4") == [] or target != "gone"


def test_a_share_that_does_not_answer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: str | Path, **more: Any) -> os.stat_result:
        if str(path).startswith(str(here / "share")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, **more)

    real = os.stat
    monkeypatch.setattr(os, "stat", stat)
    assert problem("share/videos/x.mp4").startswith(f"{here / 'share/videos'}: ")


@pytest.mark.parametrize(("name", "sentence"), [("a\0.mp4", "holds a NUL"), ("a\udce9.mp4", "not valid Unicode")])
def test_a_row_with_an_impossible_name(name: str, sentence: str) -> None:
    assert sentence in row(name)[1][0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.mp4", "x.mp4"),
        ("x.mp4", "sub/../x.mp4"),
        ("x.mp4", "x.MP4"),  # two videos, one record
        ("x.mp4", "./x.mp4"),
        ("sub/x.mp4", "link/x.mp4"),
        ("caf\u00e9.mp4", "cafe\u0301.mp4"),
    ],
)
def test_two_spellings_of_one_file(here: Path, one: str, other: str) -> None:
    (here / "sub").mkdir()
    (here / "link").symlink_to(here / "sub")
    assert problem(one, other).startswith("videos 0000 and 0001 would both be written to ")
    assert problem("y.mp4", one, "z.mp4", other).startswith("videos 0001 and 0003 ")


def test_names_that_differ_do_not_meet() -> None:
    assert problems("x.mp4", "y.mp4", "sub/x.mp4", "x.y.mp4") == []


def test_a_hundred_thousand_rows_of_one_name_are_one_line() -> None:
    """91 s and 99,999 lines before; the limit is far above the 2 s measured."""
    started = time.process_time()
    found = problem(*["x.mp4"] * 100_000)
    assert found == "videos 0000 and 0001 would both be written to x.mp4; 99,998 more meet likewise"
    assert time.process_time() - started < 30


def test_refusals_take_time_in_proportion(here: Path) -> None:
    """20,000 files with a wrong ending, and inputs that are in the way: squares would take minutes."""
    started = time.process_time()
    assert "and 19,999 more: videos are written" in problem(*[f"{n}.avi" for n in range(20_000)])
    names = [f"{n}.mp4" for n in range(2_000)]
    for name in names:
        (here / name).touch()
    assert "is read by this run" in problem(*names, inputs=tuple(names))
    assert time.process_time() - started < 15


@pytest.mark.parametrize("name", ["x.json", "x.latents.safetensors", "x.png", "x.mp4"])
def test_nothing_that_is_there_is_replaced(here: Path, name: str) -> None:
    (here / name).write_text("mine")
    assert problem("x.mp4", preview=True).startswith(f"{name} already exists; --overwrite replaces it")
    assert problems("x.mp4", preview=True, overwrite=True) == []
    if name == "x.png":
        assert problems("x.mp4") == []
    if "latents" in name:
        assert problems("x.mp4", decode_latents="l.safetensors") == []


def test_a_dangling_link_is_there(here: Path) -> None:
    (here / "x.mp4").symlink_to("nowhere")
    assert "already exists" in problem("x.mp4")


def test_an_input_is_never_replaced(here: Path) -> None:
    for name in ("cat.png", "cat.json"):
        (here / name).write_text("mine")
    (here / "link").symlink_to(here)
    for inputs in (("cat.png",), (str(here / "cat.png"),), ("link/cat.png",)):
        found = problem("cat.mp4", preview=True, overwrite=True, inputs=inputs)
        assert found == "cat.png: is read by this run and would be replaced by it; choose another name"
    assert problems("cat.mp4", overwrite=True, inputs=("cat.png",)) == []
    read, exists = problems("cat.mp4", preview=True, inputs=("cat.png",))
    assert "cat.png: is read" in read
    assert "cat.json already exists" in exists


def test_a_name_that_is_not_taken_has_no_other_fault(here: Path) -> None:
    (here / "x.json").write_text("the user's")
    assert "give it that extension" in problem("x")


def test_resume_takes_its_own_and_nobody_elses(here: Path) -> None:
    (here / "x.png").write_text("the user's")
    (here / "x.json").write_text('{"notes": 1}')
    found = problem("x.mp4", preview=True, resume=True)
    assert found.startswith("x.json and x.png already exist;")
    (here / "x.json").write_text(json.dumps({"output": {"file": "x.mp4"}}))  # its video was removed to be made again
    assert problems("x.mp4", preview=True, resume=True) == []
    (here / "x.json").unlink()
    (here / "x.png").unlink()
    save_file({"latent": torch.zeros(1)}, here / "x.latents.safetensors", {"record": "{}"})
    assert problems("x.mp4", resume=True) == []
    (here / "x.latents.safetensors").write_text("the user's")
    assert "x.latents.safetensors already exists" in problem("x.mp4", resume=True)
    (here / "x.mp4").write_text("what it is, the run will tell")
    assert problems("x.mp4", resume=True) == []


def test_a_folder_at_the_output_path_is_refused(here: Path) -> None:
    (here / "x.json").mkdir()
    assert problem("x.mp4", overwrite=True).startswith("x.json: is a folder")


def test_long_names(here: Path) -> None:
    room = 255 - len(longest_name(Path("x.mp4"))) + 1
    assert problems("n" * room + ".mp4") == []
    (here / longest_name(Path("n" * room + ".mp4"))).write_text("the file system agrees")
    assert "is too long: with what is added while it is written at most 255" in problem("n" * (room + 1) + ".mp4")
    assert "is too long" in problem("猫" * 80 + ".mp4")
    assert "is too long" in problem("d" * 256 + "/x.mp4")
    assert "is too long: a path has at most" in problem("/".join(["d" * 200] * 30) + "/x.mp4")


@pytest.mark.parametrize(("name", "sentence"), [("a\0.mp4", "holds a NUL"), ("a\udce9.mp4", "not valid Unicode")])
def test_impossible_names(name: str, sentence: str) -> None:
    assert sentence in problem(name)


def test_missing_permissions_are_named(here: Path) -> None:
    code = """
import sys
from pathlib import Path
from wan.cli.checks import Check
from wan.jobs.output_paths import check_outputs
from wan.jobs.job import Request
root = Path(sys.argv[1])
(root / "locked").mkdir(mode=0o500)
(root / "hidden" / "below").mkdir(parents=True)
(root / "hidden").chmod(0)
check = Check()
check_outputs(Request(), [root / "locked" / "x.mp4", root / "hidden" / "below" / "x.mp4"], check)
print("\\n".join(check.problems))
(root / "hidden").chmod(0o700)
"""
    hidden, locked = run_unprivileged(code, here)
    assert locked == f"{here}/locked: the folder is not writable (Permission denied); choose another --save_dir"
    assert hidden.startswith(f"{here}/hidden/below: the folder is not writable, no file can be made in")
