"""The picture at the top of the README, from prompts to PNG: `python -m examples.shapes.gallery`.

A strip a video, in the order of time: four made from a prompt alone, two from a prompt and their first frame, each in
four steps by `generate.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import generate
from examples.shapes.world import FRAMES, SIDE, Scene, render

HERE = Path(__file__).parent
PICTURE = HERE / "gallery.png"
PROMPTS = {
    "t2v": [
        "a white triangle moves up on a purple background",
        "a yellow circle moves right on a blue background",
        "a red square moves left on a white background",
        "a green circle stays still on a yellow background",
    ],
    "i2v": ["a blue square moves down on a yellow background", "a purple triangle moves right on a green background"],
}
SCALE, GAP, LINE, EDGE = 2, 2, 26, 12  # pixels: of a pixel, between frames, of a caption's line, around all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        picture(videos(Path(folder))).save(out, optimize=True)
    print(out)


def videos(folder: Path) -> dict[str, np.ndarray]:
    """Caption -> frames [T, H, W, 3], in the picture's order. The prompts' places are the seeds."""
    made = {}
    for task, prompts in PROMPTS.items():
        rows: list[dict[str, object]] = []
        for seed, prompt in enumerate(prompts):
            rows.append({"prompt": prompt, "seed": seed, "save_file": f"{task}-{seed}.mp4"})
            if task == "i2v":
                rows[-1]["image"] = str(first_frame(prompt, folder / f"{seed}.png"))
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["--task", f"{task}-A14B", "--ckpt_dir", str(HERE / f"Wan2.2-{task.upper()}-A14B")]
        command += ["--lora_dir", str(HERE / f"lora-{task}"), "--size", f"{SIDE}*{SIDE}", "--frame_num", str(FRAMES)]
        command += ["--device", "cpu"]  # the picture is the same everywhere
        if generate.main([*command, "--prompt_file", str(folder / f"{task}.jsonl"), "--save_dir", str(folder)]):
            raise SystemExit(1)
        for row in rows:
            caption = f"{row['prompt']}" + (", from its first frame" if task == "i2v" else "")
            made[caption] = iio.imread(folder / str(row["save_file"]), plugin="FFMPEG")
    return made


def first_frame(prompt: str, file: Path) -> Path:
    """Draw what the prompt says, before it moves."""
    _, colour, shape, *motion, _, _, ground, _ = prompt.split()
    frame = render([Scene(colour, shape, " ".join(motion), ground)], torch.Generator().manual_seed(1))[0, :, 0]
    Image.fromarray(((frame.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(file)
    return file


def picture(strips: dict[str, np.ndarray]) -> Image.Image:
    cell = SCALE * SIDE + GAP
    height = len(strips) * (LINE + cell) + EDGE
    sheet = Image.new("RGB", (2 * EDGE + FRAMES * cell - GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (caption, frames) in enumerate(strips.items()):
        draw.text((EDGE, row * (LINE + cell) + 6), caption, fill=(40, 40, 40), font=font)
        for column, frame in enumerate(frames):
            large = Image.fromarray(frame).resize((SCALE * SIDE, SCALE * SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, corner(row, column))
    return sheet


def corner(row: int, column: int) -> tuple[int, int]:
    """Place of a frame in the picture."""
    cell = SCALE * SIDE + GAP
    return EDGE + column * cell, row * (LINE + cell) + LINE


def frames_of(file: Path) -> list[np.ndarray]:
    """The strips of a picture that this made, [T, H, W, 3] each."""
    sheet = np.asarray(Image.open(file).convert("RGB"))
    rows = (sheet.shape[0] - EDGE) // (LINE + SCALE * SIDE + GAP)
    strips = []
    for row in range(rows):
        corners = [corner(row, column) for column in range(FRAMES)]
        strips.append(np.stack([sheet[y : y + SCALE * SIDE : SCALE, x : x + SCALE * SIDE : SCALE] for x, y in corners]))
    return strips


if __name__ == "__main__":
    main()
