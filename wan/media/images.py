"""Pictures that condition a video: opening them, the size of the video they lead to, and their tensors.

Shapes: H, W rows and columns. Sizes are (width, height).
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
import warnings
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from wan.configs import TaskConfig
from wan.media.ffmpeg import is_video
from wan.media.video import last_frame
from wan.utils.errors import InputError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image
    from torch import Tensor

MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112
TURNS = range(2, 9)  # its values that are not upright
CHANGES = "changes"
# what Pillow's decoders raise for damaged files
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, OverflowError, RuntimeError)


def video_size(config: TaskConfig, picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the task's video for a picture of this size; `size` counts as an area.

    Sides are multiples of the task's step. "squeeze": the picture's ratio, about the area. "crop": at most the area; of
    the size found width first and the one found height first the one nearer the picture's ratio, the latter on a tie.
    Both are the original pipelines' rules, evaluated in binary64 in the original's order: another order rounds to
    another multiple for some pictures. InputError if a side would vanish.
    """
    (width, height), area = picture, size[0] * size[1]

    def whole(length: float) -> int:
        return math.floor(length / config.size_step) * config.size_step

    if config.image_fit == "crop":
        ideal_width = math.sqrt(area * (width / height))
        columns, rows = whole(ideal_width), whole(area / ideal_width)
    else:
        ratio = height / width
        columns, rows = whole(math.sqrt(area / ratio)), whole(math.sqrt(area * ratio))
    if not (columns and rows):
        raise InputError(f"an image of {width}x{height} is too long and thin for this --size, which is used as an area")
    if config.image_fit != "crop":
        return columns, rows
    first, second = (columns, whole(area / columns)), (whole(area / rows), rows)

    def ratio_error(found: tuple[int, int]) -> float:
        ratio, reached = width / height, found[0] / found[1]
        return max(ratio / reached, reached / ratio)

    return first if ratio_error(first) < ratio_error(second) else second


def open_image(path: Path) -> Image:
    """The whole picture, decoded, as 8-bit RGB; of a video the last frame. `list_changes` says what was changed.

    EXIF orientation is applied (the original ignores it), deeper greys are scaled to 8 bits, alpha is dropped as by
    convert("RGB"). InputError for a file that is absent, no regular file, no picture, damaged, or over 100 megapixels.
    """
    from PIL import Image, UnidentifiedImageError

    too_large = f"{path}: the image is too large, at most {MAX_PIXELS // 1_000_000} megapixels are read"
    changes: list[str] = []
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: the image cannot be read, it is no regular file")
        source: Path | BytesIO = path
        if is_video(path):
            source = BytesIO(last_frame(path))
            changes.append("the last frame of the video")
        with warnings.catch_warnings():  # Pillow warns from 89 megapixels on; the limit here is our own
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{too_large}, this one is {image.width}x{image.height}: make it smaller")
                picture = _as_rgb(image, changes)
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such image file") from e
    except PermissionError as e:
        raise InputError(f"{path}: there is no permission to read the image") from e
    except Image.DecompressionBombError as e:
        raise InputError(too_large) from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: not an image, or of a kind that cannot be read") from e
    except DAMAGED as e:
        raise InputError(f"{path}: the image cannot be read ({e})") from e
    picture.info = {CHANGES: changes}
    return picture


def list_changes(image: Image) -> list[str]:
    """How `open_image` changed the picture, in words for the plan; empty if it did not."""
    return list(image.info.get(CHANGES, ()))


def digest(path: Path) -> str:
    """SHA-256 of the picture's file; of a video that of its last frame alone. OSError, InputError.

    So a clip that was made again, with other times in its record, still gives the same picture.
    """
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _digest(path: Path, _written: int, _size: int) -> str:
    return hashlib.sha256(last_frame(path) if is_video(path) else path.read_bytes()).hexdigest()


def _as_rgb(image: Image, changes: list[str]) -> Image:
    """8-bit RGB, upright; adds to `changes`."""
    from PIL import Image, ImageOps

    turned = _orientation(image)
    image.load()
    if _orientation(image) in TURNS:  # some readers have turned it by now
        image = ImageOps.exif_transpose(image)
    if turned in TURNS:
        changes.append("turned as its EXIF orientation says")
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_8_bits(image, changes))
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        changes.append("its transparency was dropped")
    return image.convert("RGB")


def _orientation(image: Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (*DAMAGED, KeyError, TypeError):  # the picture may be whole although this is not
        return 1


def _to_8_bits(image: Image, changes: list[str]) -> numpy.ndarray:
    """Greys of 16 or 32 bits or floats [H, W] as uint8, by the first of the usual ranges that holds them all.

    convert("RGB") would clip them at 255. ValueError for NaN or Inf.
    """
    import numpy

    values = numpy.asarray(image).astype(numpy.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds NaN or Inf")
    ranges = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        changes.append(f"its range {low:g} to {high:g} was scaled to 0 to 255")
        values = (values - low) * (255 / (high - low or 1))
    elif top != 255:
        changes.append(f"its range 0 to {top} was scaled to 0 to 255")
        values *= 255 / top
    return values.round().astype(numpy.uint8)


def i2v_tensor(image: Image, size: tuple[int, int]) -> Tensor:
    """The picture squeezed to `size`: float32 [3, H, W], nominally in [-1, 1].

    Bicubic without antialiasing and not clamped, on the CPU, as in the original: it overshoots at edges.
    """
    from torch.nn.functional import interpolate

    width, height = size
    return interpolate(_normalised(image)[None], size=(height, width), mode="bicubic")[0]


def ti2v_tensor(image: Image, size: tuple[int, int]) -> Tensor:
    """The picture scaled to cover `size` (Lanczos, 8 bits) and cropped at its centre: float32 [3, H, W] in [-1, 1]."""
    from PIL import Image

    width, height = size
    scale = max(width / image.width, height / image.height)
    covering = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return _normalised(covering.crop((left, top, left + width, top + height)))


def _normalised(image: Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    import numpy as np
    import torch
    from einops import rearrange

    pixels = torch.from_numpy(np.array(image))
    return (rearrange(pixels, "h w c -> c h w").contiguous().float() / 255 - 0.5) / 0.5
