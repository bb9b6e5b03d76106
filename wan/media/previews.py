"""Pictures that show a video: a contact sheet of the finished one, and a strip that grows with each denoising step.

Shapes: H, W rows and columns of a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from wan.media.ffmpeg import file_argument, how_it_ended, messages, run_ffmpeg
from wan.media.video import to_bytes
from wan.utils.errors import JobError
from wan.utils.files import Beside, replacing

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 3  # of a contact sheet, and rows
WIDTH = 320  # pixels of one picture at most
GAP = 4


def save_contact_sheet(video: Path, frames: int) -> Path:
    """A PNG beside `video` with up to nine of its `frames`, evenly spaced, first and last among them."""
    count = min(COLUMNS**2, frames)
    wanted = sorted({round(i * (frames - 1) / max(1, count - 1)) for i in range(count)})
    columns = min(COLUMNS, count)
    select = "+".join(f"eq(n,{n})" for n in wanted)
    grid = f"tile={columns}x{-(-count // columns)}:nb_frames={count}:padding={GAP}:margin={GAP}"
    filters = f"select='{select}',scale='min({WIDTH},iw)':-1,{grid}"
    sheet = Beside.of(video).sheet
    with replacing(sheet) as part:
        picture = ["-frames:v", "1", "-c:v", "png", "-f", "image2", "-update", "1", file_argument(part)]
        done = run_ffmpeg("-i", file_argument(video), "-vf", filters, *picture)
        if done.returncode != 0 or not part.stat().st_size:
            reason = how_it_ended(done.returncode) + messages(done.stderr)
            raise JobError(f"{sheet}: the contact sheet of the saved video could not be made: {reason}")
    return sheet


class Strip:
    """The pictures so far, left to right; the file is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures: list[Image.Image] = []

    def add(self, frame: Tensor) -> None:
        """frame: [3, H, W] in [-1, 1]."""
        picture = Image.fromarray(to_bytes(frame[:, None])[0])
        picture.thumbnail((WIDTH, picture.height))
        self.pictures.append(picture)
        width, height = picture.size
        sheet = Image.new("RGB", (len(self.pictures) * (width + GAP) - GAP, height))
        for index, earlier in enumerate(self.pictures):
            sheet.paste(earlier, (index * (width + GAP), 0))
        with replacing(self.path) as part:
            sheet.save(part, "PNG")
