"""The pictures of the README, made by the program itself: `python -m benchmarks.pictures`.

docs/demo.webp: the trained demo's answers to six prompts, as they move. docs/gallery.png: the gallery page of a few
of its videos in a browser (needs playwright and a Chromium).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import imageio.v3 as iio
from PIL import Image, ImageDraw, ImageFont

import generate
from benchmarks.measure import ROOT
from wan.gallery import write_page

DOCS = ROOT / "docs"
PROMPTS = (
    "a yellow circle moves right on a blue background",
    "a white triangle moves up on a purple background",
    "a red square moves down on a white background",
    "a green circle moves left on a white background",
    "a blue square moves up on a yellow background",
    "a purple triangle moves right on a green background",
)
COLUMNS, SIDE, CAPTION = 3, 192, 34
FPS = 16
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def make_videos(folder: Path, *flags: str) -> list[Path]:
    """One video a prompt of the trained demo, in four steps each."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    shapes = ROOT / "examples" / "shapes"
    words = ["--task", "t2v-A14B", "--ckpt_dir", str(shapes / "Wan2.2-T2V-A14B"), "--size", "64*64"]
    words += ["--lora_dir", str(shapes / "lora-t2v"), "--frame_num", "9", "--base_seed", "1", "--preview"]
    if generate.main([*words, "--prompt_file", str(prompts), "--save_dir", str(folder), "--resume", *flags]):
        raise SystemExit("the demo's videos could not be made")
    return sorted(folder.glob("*.mp4"))


def animate(videos: list[Path], target: Path) -> None:
    """All videos side by side, each above its prompt, as one animated WebP."""
    clips = [iio.imread(video, plugin="FFMPEG") for video in videos]
    font: Any = ImageFont.load_default(11)
    frames = []
    for moment in range(len(clips[0])):
        rows = -(-len(clips) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
            left, top = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + CAPTION)
            sheet.paste(
                Image.fromarray(clip[moment]).resize((SIDE - 8, SIDE - 8), Image.Resampling.BICUBIC),
                (left + 4, top + 4),
            )
            words = prompt.split()
            draw.text(
                (left + 6, top + SIDE), " ".join(words[:5]) + "\n" + " ".join(words[5:]), "black", font, spacing=1
            )
        frames.append(sheet)
    frames += [frames[-1]] * 8  # rest on the last one before it begins again
    frames[0].save(
        target, save_all=True, append_images=frames[1:], duration=1000 // FPS * 2, loop=0, quality=60, method=6
    )


def photograph(page: Path, target: Path) -> None:
    """The gallery page as a browser shows it."""
    from playwright.sync_api import sync_playwright

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("the screenshot needs a Chromium, such as Debian's package chromium")
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        view = chromium.new_page(viewport={"width": 1000, "height": 640})
        view.goto(page.as_uri())
        view.wait_for_selector("article video[src]", state="attached")
        view.wait_for_timeout(1500)
        view.screenshot(path=target)
        chromium.close()
    with Image.open(target) as shot:
        shot.convert("RGB").quantize(128).save(target, optimize=True)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        animate(make_videos(Path(folder)), DOCS / "demo.webp")
        photograph(write_page(Path(folder)), DOCS / "gallery.png")
    for made in (DOCS / "demo.webp", DOCS / "gallery.png"):
        print(f"{made.relative_to(ROOT)}: {made.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
