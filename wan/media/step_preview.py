"""A growing PNG strip of pictures, one after each step, to see early what a long run comes to.

Shapes: H, W rows and columns of a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from wan.media.video import to_bytes
from wan.utils.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 320  # pixels of one picture at most
GAP = 4


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
