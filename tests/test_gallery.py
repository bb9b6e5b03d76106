"""The gallery page: what it takes from records, that none of it becomes markup, and how it behaves in a browser."""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import generate
from tests.forked import python
from tests.support import TINY, command, read_frames
from wan import gallery
from wan.gallery import check_page, write_page
from wan.media import montage
from wan.media.images import save_contact_sheet
from wan.media.video import VideoWriter
from wan.utils.errors import InputError

T2V = ["--ckpt_dir", str(TINY / "Wan2.2-T2V-A14B"), "--lora_dir", str(TINY / "lora-t2v")]
SMALL = ["--size", "64*48", "--frame_num", "5", "--base_seed", "7", "--device", "cpu"]
HOSTILE = [
    '</script><script>document.title="taken"</script>',
    "<img src=x onerror=\"document.title='taken'\">'\"&amp;<!--<script>",
    "قطة \u202egnp.exe\u202c تلعب",
    "two\nlines\u2028and\u2029more\0\ud800",
    '{"__proto__": 1}',
]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(number: int, prompt: str, name: str) -> dict[str, Any]:
    """As a run writes it, with what the page reads."""
    step = {"timestep": 1000.0, "expert": "high", "guidance": 1.0, "lora": 1.0}
    return {
        "schema": 2,
        "request": {"ckpt_dir": "/weights/Wan2.2-T2V-A14B"},
        "job": {"prompt": prompt, "original_prompt": prompt, "negative_prompt": "bad", "image": None, "seed": number},
        "meaning": {"task": "t2v-A14B", "sample_steps": [step] * 4, "sample_solver": "euler", "dtype": "bfloat16"},
        "plan": {"loras": {"high": [{"path": "/loras/Seko/high_noise_model.safetensors"}]}},
        "pipeline": {"device": "cpu"},
        "output": {"file": f"{name}.mp4", "frames": 9, "width": 64, "height": 48, "fps": 16},
        "seconds": {"denoise": 1.5, "decode": 0.5 + number % 7},
        "finished": (datetime(2026, 11, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat(timespec="seconds"),
    }


def put(folder: Path, number: int, prompt: str, name: str = "", video: bytes = b"") -> dict[str, Any]:
    name = name or f"video {number} #?%"
    made = record(number, prompt, name)
    (folder / f"{name}.json").write_text(json.dumps(made))  # escapes lone surrogates, as nothing else can hold them
    (folder / f"{name}.mp4").write_bytes(video)
    return made


def entries(page: Path) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="entries">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(data)


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*T2V, *SMALL, "--save_dir", str(tmp_path), "--preview", "--gallery", "--resume"]
    assert generate.main([*flags, "--prompt", "a <b>cat</b>"]) == 0
    assert f"gallery: {tmp_path / 'index.html'}" in capsys.readouterr().err
    (entry,) = entries(tmp_path / "index.html")
    assert entry["prompt"] == "a <b>cat</b>"
    assert (entry["seed"], entry["width"], entry["height"]) == ("7", 64, 48)
    assert entry["settings"]["steps"] == "4 euler"
    settings = entry["settings"]
    assert settings["LoRA"] == "high: lora-t2v at 1\nlow: lora-t2v at 1"
    assert (settings["shift"], settings["number"], settings["length"]) == ("5.0", "0", "5 frames, 0.3 s")
    assert settings["timesteps"] == "1000.0 high, 937.5 high, 833.3 low, 625.0 low"
    assert settings["replay"].startswith("python generate.py --replay ")
    again = shlex.split(settings["replay"])[2:]
    assert generate.main([*again, "--dry_run"]) == 0
    assert "negative prompt" not in entry["settings"]  # it is the model's own
    assert all((tmp_path / entry[kind]).is_file() for kind in ("video", "record", "sheet"))
    assert generate.main([*flags, "--prompt", "a dog"]) == 0  # the page is written again
    assert {entry["prompt"] for entry in entries(tmp_path / "index.html")} == {"a <b>cat</b>", "a dog"}


def test_a_page_of_somebody_else_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match="no gallery page"):
        check_page(tmp_path)
    assert generate.main([*T2V, *SMALL, "--prompt", "a", "--save_dir", str(tmp_path), "--gallery"]) == 2
    assert gallery.main([str(tmp_path)]) == 2
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>"
    assert not list(tmp_path.glob("*.mp4"))
    assert gallery.main([str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert gallery.main(["--folder"]) == 2
    assert capsys.readouterr().err == "error: there is no flag --folder\n"


def test_nothing_in_a_record_is_markup(tmp_path: Path) -> None:
    empty = write_page(tmp_path).read_text()
    made = [put(tmp_path, n, prompt) for n, prompt in enumerate(HOSTILE)]
    for values in made:  # not in the other fields either
        values["meaning"]["dtype"] = values["pipeline"]["device"] = values["finished"] = HOSTILE[0]
        values["plan"]["loras"]["high"][0]["path"] = HOSTILE[1]
        (tmp_path / f"{Path(values['output']['file']).stem}.json").write_text(json.dumps(values))
    page = write_page(tmp_path)
    text = page.read_text()
    assert text.count("<") == empty.count("<")
    assert text.count(">") == empty.count(">")
    assert text.count("\u2028") == text.count("\u2029") == 0
    printed = [prompt.replace("\ud800", "?") for prompt in HOSTILE]
    assert sorted(entry["prompt"] for entry in entries(page)) == sorted(printed)


def test_it_names_nothing_outside_and_asks_no_network(tmp_path: Path) -> None:
    put(tmp_path, 1, "a cat", name="12:30 #1")
    page = write_page(tmp_path)
    (entry,) = entries(page)
    assert entry["video"] == "./12%3A30%20%231.mp4"
    assert not re.search(r"https?:|//[a-z]", page.read_text().replace("// ", ""))
    assert "default-src 'none'" in page.read_text()


def damaged() -> Iterator[Any]:
    whole = record(1, "a", "b")
    yield from ([], "text", 3, None, {}, {"output": {"file": "b.mp4"}})
    for path, value in (
        (("output", "file"), "../outside.mp4"), (("output", "file"), "/etc/hosts"), (("output", "file"), None),
        (("output", "file"), "a\0b"), (("output", "width"), "64"), (("output", "fps"), 0),
        (("output", "fps"), float("nan")), (("seconds",), [1]), (("meaning", "task"), "other"),
        (("meaning", "sample_steps"), {"a": 1}), (("plan", "loras"), 1), (("job", "image"), 3),
    ):  # fmt: skip
        broken = copy.deepcopy(whole)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        yield broken


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    (folder / "noise.json").write_bytes(b"\xff\xfe{")
    (folder / "deep.json").write_text("[" * 100_000)
    put(folder, 1, "no video any more", name="gone")
    (folder / "gone.mp4").unlink()
    put(folder / "sub", 2, "below", name="c")
    (entry,) = entries(write_page(folder))
    assert (entry["video"], entry["file"]) == ("./sub/c.mp4", "sub/c.mp4")


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    (tmp_path.parent / "outside.mp4").write_bytes(b"")
    for broken in damaged():
        (tmp_path / "b.json").write_text(json.dumps(broken))
        (tmp_path / "b.mp4").write_bytes(b"")
        assert entries(write_page(tmp_path)) == [], broken
    put(tmp_path, 1, "a", name="b")
    assert len(entries(write_page(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "name", "shown"),
    [
        (lambda r: r["plan"]["loras"]["high"][0].update(strength=0.6), "LoRA", "high: Seko at 0.6"),
        (lambda r: r["plan"].update(shift=3.0, preset="motion-8"), "preset", "motion-8"),
        (lambda r: r["request"].update(expert=["high=/weights/own.safetensors"]), "experts", "high=own.safetensors"),
        (lambda r: r["meaning"].update(quantize="fp8"), "quantize", "fp8"),
        (lambda r: r["job"].update(source="prompts.csv line 3"), "row", "prompts.csv line 3"),
    ],
)
def test_differences_are_shown(change: Callable, name: str, shown: str, tmp_path: Path) -> None:
    made = put(tmp_path, 1, "a", name="b")
    (plain,) = entries(write_page(tmp_path))
    change(made)
    (tmp_path / "b.json").write_text(json.dumps(made))
    (changed,) = entries(write_page(tmp_path))
    assert changed["settings"][name] == shown != plain["settings"].get(name)


@pytest.mark.parametrize("spelled", ["1e999", "Infinity", "NaN"])
def test_a_number_that_is_none_does_not_blank_the_page(spelled: str, tmp_path: Path) -> None:
    put(tmp_path, 1, "a", name="whole")
    for number, field in enumerate(('"fps": 16', '"denoise": 1.5', '"timestep": 1000.0')):
        put(tmp_path, 2, "b", name=f"bad{number}")
        record = tmp_path / f"bad{number}.json"
        record.write_text(record.read_text().replace(field, f"{field.partition(':')[0]}: {spelled}"))
    page = write_page(tmp_path)
    assert [entry["file"] for entry in entries(page)] == ["whole.mp4"]
    assert json.loads(re.findall(r'id="unreadable">(.*?)<', page.read_text())[0]) == [f"bad{n}.json" for n in range(3)]


def test_a_huge_file_costs_little(tmp_path: Path) -> None:
    """400 MB under a record's name: neither the time nor the memory to read it."""
    put(tmp_path, 1, "a", name="whole")
    with (tmp_path / "huge.json").open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(400_000_000)
    (tmp_path / "huge.mp4").write_bytes(b"")
    code = f"""
import resource
from pathlib import Path
from wan.gallery import write_page
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_page(Path({str(tmp_path)!r}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = python("-c", code)
    assert int(done.stdout) < 150_000, done.stderr  # kB
    assert len(entries(tmp_path / "index.html")) == 1


# --- in a browser


def clip(folder: Path) -> tuple[bytes, bytes]:
    """A small video and its contact sheet."""
    with VideoWriter(folder / "clip.mp4", 16) as writer:
        writer.write(torch.linspace(-1, 1, 9).view(1, 9, 1, 1).expand(3, 9, 48, 64))
        writer.finish(None)
    sheet = save_contact_sheet(folder / "clip.mp4", 9)
    return (folder / "clip.mp4").read_bytes(), sheet.read_bytes()


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    if BROWSER is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=[*flags, "--disable-quic", "--disable-sync"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_thousand_videos_in_a_browser(browser: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    made = tmp_path / "made"
    made.mkdir()
    video, sheet = clip(made)
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(1000):
        prompt = HOSTILE[number] if number < len(HOSTILE) else f"cat number {number}"
        put(folder, number, prompt, name=f"v{number}", video=video)
        if number % 2:
            (folder / f"v{number}.png").write_bytes(sheet)
    view = browser.new_page(viewport={"width": size[0], "height": size[1]})
    trouble: list[str] = []
    asked: list[str] = []
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("console", lambda message: trouble.append(message.text))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(write_page(folder).as_uri())

    def attached() -> int:
        return view.locator("article video[src]").count()

    def prompts() -> list[str]:
        return list(view.locator(".prompt").all_text_contents()[:3])

    assert view.locator("article").count() == 1000
    view.wait_for_selector("article video[src]", state="attached")
    view.wait_for_timeout(500)
    assert 0 < attached() < 60  # what is near the window, of a thousand
    first = view.locator("article video").first
    view.wait_for_function("() => document.querySelector('article video').readyState >= 2")
    assert first.evaluate("video => video.currentTime") == pytest.approx(9 / 16 / 2, abs=0.07)  # its middle frame
    view.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    view.wait_for_timeout(1000)
    assert 0 < attached() < 60
    assert view.evaluate("document.documentElement.scrollWidth") <= size[0]
    view.evaluate("window.scrollTo(0, 0)")

    assert prompts()[0] == "cat number 999"
    view.select_option("#sort", "oldest")
    assert prompts()[0] == HOSTILE[0]  # as text
    view.select_option("#sort", "seed")
    assert prompts()[:3] == HOSTILE[:3]
    view.fill("#filter", "cat SEED 77")
    assert view.locator("#count").text_content() == "19 of 1000 videos"  # 77, 177, ..., 770, 771, ...
    view.fill("#filter", "no such thing")
    assert view.locator("#empty").is_visible()
    view.fill("#filter", "number 12")

    view.locator(".start").first.click()
    view.wait_for_function("() => document.querySelector('article video').currentTime > 0")
    view.locator("article label input").nth(0).check()
    view.locator("article label input").nth(1).check()
    view.locator("article label input").nth(2).check()  # the first one gives way
    assert view.locator("article label input:checked").count() == 2
    view.click("#compare")
    view.wait_for_function(
        "() => { const both = [...document.querySelectorAll('dialog video')];"
        " return both.length === 2 && both.every((video) => video.readyState >= 2 && !video.error); }"
    )
    boxes = [view.locator("dialog video").nth(n).bounding_box() for n in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert boxes[1]["x"] + boxes[1]["width"] <= size[0]
    assert view.locator("dialog .differs").count() >= 4  # prompt and seed of both
    view.click("#close")
    assert view.locator("dialog video").count() == 0

    assert view.title() == "Videos"
    assert trouble == []
    assert {url.split(":")[0] for url in asked} == {"file"}


def test_a_grid_of_two_options_with_its_montage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--sweep", "lora_strength=0.5,1", "--sweep", "base_seed=1,2", "--grid"]
    assert generate.main(command("t2v-A14B", "--save_dir", str(tmp_path), *sweep)) == 0
    page = (tmp_path / "index.html").read_text()
    table = json.loads(re.search(r'id="table">(.*?)</script>', page)[1])
    assert (table["columns"], table["rows"]) == (["0.5", "1"], ["1", "2"])
    assert [[cell["options"]["lora_strength"] for cell in row] for row in table["cells"]] == [["0.5", "1"]] * 2
    assert table["cells"][0][0]["metrics"] == "equal"
    assert "dB" in table["cells"][1][1]["metrics"]
    frames = read_frames(tmp_path / "grid.mp4")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (frames.shape[2], frames.shape[1])
    assert gallery.main(["--grid", "x=base_seed", "y=lora_strength", str(tmp_path)]) == 0
    assert json.loads(re.search(r'id="table">(.*?)</script>', (tmp_path / "index.html").read_text())[1])["columns"] == [
        "1", "2",
    ]  # fmt: skip
    capsys.readouterr()
    assert gallery.main(["--grid", "x=seed", "y=lora_strength", str(tmp_path)]) == 2
    assert "--grid" in capsys.readouterr().err


def test_a_montage_holds_one_frame_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: a frame of each cell is read, then one is written."""
    colours = [-1.0, 1.0]
    for number, colour in enumerate(colours):
        with VideoWriter(tmp_path / f"{number}.mp4", 16) as video:
            video.write(torch.full((3, 9, 48, 64), colour))
            video.finish(None)
    done: list[str] = []
    read, write = montage.clip_frames, VideoWriter.write

    def reads(*given: Any) -> Generator[torch.Tensor]:
        for frame in read(*given):
            done.append("read")
            yield frame

    def writes(writer: VideoWriter, chunk: torch.Tensor) -> None:
        done.append(f"write {chunk.shape[1]}")
        write(writer, chunk)

    monkeypatch.setattr(montage, "clip_frames", reads)
    monkeypatch.setattr(VideoWriter, "write", writes)
    cells = [[("dark", tmp_path / "0.mp4"), ("light", tmp_path / "1.mp4"), ("none", None)]]
    montage.save_montage(cells, (64, 48), 9, 16, tmp_path / "grid.mp4")
    assert done == ["read", "read", "write 1"] * 9
    frames = read_frames(tmp_path / "grid.mp4")
    assert frames.shape == (9, montage.BAND + 240, 3 * montage.CELL, 3)
    middle = frames[4, montage.BAND + 120]
    assert [middle[int((n + 0.5) * montage.CELL), 0] > 128 for n in range(3)] == [False, True, False]
    with pytest.raises(InputError, match=r"0\.mp4: the video cannot be read"):
        montage.save_montage(cells, (64, 48), 10, 16, tmp_path / "longer.mp4")
    assert not (tmp_path / "longer.mp4").exists()
