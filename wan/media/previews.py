"""Pictures that show a video: a contact sheet of the finished one, and a strip that grows with each denoising step.

Shapes: H, W rows and columns of a picture.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from wan.media.ffmpeg import file_argument, messages, run_ffmpeg, video_input
from wan.media.video import EXACT, to_bytes
from wan.utils.errors import JobError
from wan.utils.files import Beside, replacing

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 3  # of a contact sheet, and rows
WIDTH = 320  # pixels of one picture at most
GAP, LINE = 4, 14  # pixels between pictures, and of a line of text


def save_contact_sheet(video: Path, frames: int) -> Path:
    """A PNG beside `video` with up to nine of its `frames` and their times, first and last among them."""
    count = min(COLUMNS**2, frames)
    wanted = [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]
    columns = min(COLUMNS, count)
    select = "+".join(f"eq(n,{n})" for n in wanted)
    grid = f"tile={columns}x{-(-count // columns)}:nb_frames={count}:padding={GAP}:margin={GAP}"
    filters = f"select='{select}',scale='min({WIDTH},iw)':-1:flags={EXACT},format=rgb24,{grid}"
    sheet = Beside.of(video).sheet
    with replacing(sheet) as part:
        picture = ["-frames:v", "1", "-c:v", "png", "-f", "image2", "-update", "1", file_argument(part)]
        done = run_ffmpeg("-loglevel", "info", *video_input(video), "-vf", filters, *picture)
        fps = re.search(rb" ([\d.]+) fps", done.stderr)
        if done.returncode != 0 or not part.stat().st_size or fps is None:
            raise JobError(f"{sheet}: the contact sheet could not be made{messages(done.stderr)}")
        with Image.open(part) as pictures:
            width, height = (pictures.width - GAP) // columns, (pictures.height - GAP) // -(-count // columns)
            for place, n in enumerate(wanted):
                left, top = GAP + place % columns * width, (place // columns + 1) * height - LINE
                _write_sheet(pictures, f"{n / float(fps[1]):.2f} s", left, top)
            pictures.save(part, "PNG")
    return sheet


class Strip:
    """The pictures so far, left to right, each above the number of its step; the file is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures: list[Image.Image] = []

    def add(self, frame: Tensor) -> None:
        """frame: [3, H, W] in [-1, 1]."""
        picture = Image.fromarray(to_bytes(frame[:, None])[0])
        picture.thumbnail((WIDTH, picture.height))
        self.pictures.append(picture)
        width, height = picture.size
        sheet = Image.new("RGB", (len(self.pictures) * (width + GAP) - GAP, height + LINE))
        for index, earlier in enumerate(self.pictures):
            sheet.paste(earlier, (index * (width + GAP), 0))
            _write_sheet(sheet, f"step {index + 1}", index * (width + GAP), height)
        with replacing(self.path) as part:
            sheet.save(part, "PNG")


def _write_sheet(picture: Image.Image, text: str, left: int, top: int) -> None:
    """White letters with a black edge, readable on any picture."""
    ImageDraw.Draw(picture).text(
        (left + 2, top), text, "white", ImageFont.load_default(10), stroke_width=1, stroke_fill="black"
    )
