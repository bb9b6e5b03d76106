"""README and docs against the program: links, tables, tests that are named, and every command, which is run."""

import json
import re
import shlex
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import generate
from benchmarks import documents, pictures
from benchmarks.full_run import write_headers
from benchmarks.sparse import sparse
from lightning.__main__ import main as lightning
from tests.media.test_video import save, smooth
from tests.support import FOLDERS, TESTS, TINY, checkpoint, lora_dir, manifest
from wan import gallery
from wan.doctor.__main__ import main as doctor

ROOT = TESTS.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(page: Path, start: str) -> list[list[str]]:
    """The words after `start` of every command in the page's shell blocks; continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    found = re.findall(rf"^\s*(?:CUDA_VISIBLE_DEVICES=\S+ )?{re.escape(start)} (.*)$", blocks, re.MULTILINE)
    return [shlex.split(re.split(r"  +#| > ", line)[0].replace("$i", "1")) for line in found]


def everywhere(start: str) -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for words in commands(page, start)]


def test_the_readme_fits_one_sitting() -> None:
    assert len(README) <= 9_000
    assert max(map(len, README.splitlines())) <= 200
    for heading in ("Installation", "Quick start", "Memory", "Recipes", "Documentation"):
        assert re.search(rf"^## {heading}", README, re.MULTILINE), heading


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(README)}
    assert {page for page in PAGES if page != PAGES[0]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_program_are_todays(page: Path) -> None:
    text = page.read_text()
    assert text == documents.filled(text), "python -m benchmarks.documents writes them"


def test_every_error_that_is_explained_is_one_of_ours() -> None:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().split("## Messages")[1].split("\n## ")[0].splitlines()
    quoted = [text for row in rows[4:] for text in re.findall(r"`([^`]+)`", row.partition(" | ")[0])]
    ours = [text.removesuffix("torch") for text in quoted if not text.startswith("zsh: ")]
    sources = "".join(path.read_text() for part in ("wan", "lightning") for path in (ROOT / part).rglob("*.py"))
    assert len(ours) > 3
    assert [text for text in ours if text.strip() not in sources] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_exists(page: Path) -> None:
    sources = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        assert file in sources, file
        assert not test or f"def {test}(" in sources[file], f"{file}::{test}"


def test_the_pictures_are_small() -> None:
    assert (pictures.DOCS / "demo.webp").stat().st_size < 300_000
    assert (pictures.DOCS / "gallery.png").stat().st_size < 300_000


# --- commands


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the commands name, as far as they are not weights, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "prompts.csv", "extended.jsonl"):
        (tmp_path / name).write_text("prompt\na cat\na dog\n" if name.endswith("csv") else "a cat\na dog\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save(tmp_path / "clip.mp4", smooth(5, 64, 64))
    (tmp_path / "clip.mp4").rename(tmp_path / "clip.mov")
    return tmp_path


def on_small_checkpoints(words: list[str], folder: Path) -> list[str]:
    """The same command with weights and pictures that are here, and a size that takes a second."""
    task = words[words.index("--task") + 1] if "--task" in words else "t2v-A14B"
    lora = lora_dir(task)
    parts = checkpoint(task)
    if "--expert" in words:  # each network in one file, of heads 128 wide
        parts = folder / "parts"
        write_headers(parts, task, 1, 128)
    replaced = {
        "--ckpt_dir": str(parts), "--lora_dir": str(lora), "--size": "64*64", "--vae": str(parts / "Wan2.1_VAE.pth"),
        "--image": str(TINY / "input.png"), "--last_image": str(TINY / "input.png"),
        "--video": str(folder / "clip.mov"),
        "--tokenizer": str(parts / "google" / "umt5-xxl"),
        "--text_encoder": str(parts / "models_t5_umt5-xxl-enc-bf16.pth"), "--out": str(folder / "baked"),
    }  # fmt: skip
    small = [replaced.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    for number, word in enumerate(small):
        expert, _, rest = word.partition("=")
        file = f"{expert}_noise_model"
        if small[number - 1] == "--lora":
            small[number] = f"{expert}={lora / file}.safetensors:{rest.rpartition(':')[2]}"
        if small[number - 1] == "--expert":
            small[number] = f"{expert}={parts / file / 'diffusion_pytorch_model.safetensors'}"
    return small


def of_a_second(words: list[str], folder: Path) -> list[str]:
    small = on_small_checkpoints(words, folder)
    extra = [] if "--size" in words else ["--size", "64*64"]
    extra += [] if "--frame_num" in words else ["--frame_num", "5"]
    return [*small, *extra, *([] if "--lora_dir" in words else ["--sample_steps", "2"])]


def runs(words: list[str]) -> bool:
    """Whether this test can start the command: it is whole, of one process, and reads no earlier video."""
    return not {"...", "--replay", "--extend_only", "--use_prompt_extend"} & {*words}


GENERATE = everywhere("python generate.py")
LAUNCHED = [(page, words[words.index("generate.py") + 1 :]) for page, words in everywhere("torchrun")]


@pytest.mark.parametrize(("page", "words"), [(p, w) for p, w in GENERATE if runs(w)])
def test_its_commands_run(page: str, words: list[str], desk: Path) -> None:
    """The README's make their videos on the small checkpoints; the same and others in docs are checked to the plan."""
    plan = page != "README.md"
    assert generate.main([*of_a_second(words, desk), *(["--dry_run"] if plan else [])]) == 0
    assert bool(list(desk.rglob("*.mp4"))) == (not plan and "--dry_run" not in words)


@pytest.mark.parametrize(("page", "words"), [(p, w) for p, w in [*GENERATE, *LAUNCHED] if not runs(w)] + LAUNCHED)
def test_its_fragments_are_flags_of_the_program(page: str, words: list[str]) -> None:
    assert generate.parse([word for word in words if word != "..."])[1] == [], page


@pytest.fixture
def release(desk: Path) -> Path:
    """A Lightning LoRA of the released shapes, without its numbers."""
    tensors = {name: ("F64" if not shape else "F32", shape) for name, shape in manifest("lightning_lora").items()}
    alphas = {name: struct.pack("<d", 8.0) for name, (_, shape) in tensors.items() if not shape}
    folder = desk / "Wan2.2-Lightning" / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    folder.mkdir(parents=True)
    for expert in ("high", "low"):
        sparse(folder / f"{expert}_noise_model.safetensors", tensors, alphas)
    return folder


def test_its_lightning_commands_run(release: Path, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _, words in everywhere("python -m lightning"):
        if words[0] == "bake" and not (desk / "baked").exists():
            assert lightning(on_small_checkpoints(words, desk)) == 0
        elif words[0] == "inspect":
            assert lightning(["inspect", str(release)]) == 0
    assert (desk / "baked" / "high_noise_model").is_dir()
    assert "400/400 pairs" in capsys.readouterr().out


def test_its_other_commands_run(desk: Path) -> None:
    (desk / "outputs").mkdir()
    for _, words in everywhere("python -m wan.gallery"):
        assert gallery.main(words) == 0
    for _, words in everywhere("python -m wan.doctor"):
        with pytest.raises(SystemExit, match="0"):
            doctor([*words, "--help"])


@pytest.mark.usefixtures("desk")
def test_the_python_of_the_docs_runs() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL))
    small = {
        '"Wan2.2-T2V-A14B"': repr(str(checkpoint("t2v-A14B"))), '"LORA"': repr(str(lora_dir("t2v-A14B"))),
        "(1280, 720)": "(64, 64)", "frame_num=81": "frame_num=5", 'size="480p"': 'size="64*64", frame_num=5',
        "16, 21, 60, 104": "16, 2, 8, 8",
    }  # fmt: skip
    for word, value in small.items():
        assert word in code
        code = code.replace(word, value)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["frames"].shape == names["video"].shape == (3, 5, 64, 64)
    assert Path("video.mp4").is_file()


# --- the table of cards, by the plan of a checkpoint of full size


@cache
def full_size(folder: Path) -> Path:
    for task, name in FOLDERS.items():
        (folder / name).mkdir(parents=True)
        write_headers(folder / name, task, None, None)
    return folder


CARDS = re.findall(r"^\| (\d+) GB \| needs ([\d.]+) GB.*?\| (?:needs ([\d.]+) GB|as for 24 GB)", README, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("card", "a14b", "ti2v"), CARDS)
def test_the_table_of_cards_is_the_plan(
    card: str, a14b: str, ti2v: str, tmp_path_factory: pytest.TempPathFactory, release: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = full_size(tmp_path_factory.getbasetemp() / "full")
    for task, peak in (("t2v-A14B", a14b), ("ti2v-5B", ti2v)):
        words = ["--task", task, "--size", "720p", "--ckpt_dir", str(folder / FOLDERS[task]), "--prompt", "a cat"]
        words += ["--lora_dir", str(release)] if task == "t2v-A14B" else []
        words += ["--vram", str(float(card) - 0.5), "--dry_run", "--json"]
        assert generate.main(words) == 0
        plan = json.loads(capsys.readouterr().out.splitlines()[0])
        if peak:
            assert max(plan["peak_bytes"].values()) / 1e9 == pytest.approx(float(peak), abs=0.15)
