"""Pictures that condition a video: opening them, the size of the video they lead to, and their tensors.

Shapes: H, W rows and columns. Sizes are (width, height). The two size rules are the original pipelines' and are
evaluated in binary64 in the original's order: another order rounds to another multiple for some pictures.
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

from wan.media.video import last_frame
from wan.utils.errors import InputError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image
    from torch import Tensor

MAX_PIXELS = 100_000_000
I2V_STEP = 16  # patch 2 x VAE stride 8
TI2V_STEP = 32  # patch 2 x VAE stride 16
EXIF_ORIENTATION = 0x0112
TURNS = range(2, 9)  # its values that are not upright
DONE = "what was done"
# what Pillow's decoders raise for damaged files
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, OverflowError, RuntimeError)


def video_size(fit: str | None, picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the video for a picture of this size; `size` counts as an area.

    fit: a configuration's `image_fit`. InputError if a side would vanish.
    """
    rule = {"squeeze": i2v_size, "crop": ti2v_size}[fit or "squeeze"]
    return rule(*picture, size[0] * size[1])


def open_image(path: Path) -> Image:
    """The whole picture, decoded, as RGB, 8 bits; of an mp4 its last frame. What was done to it: `what_was_done`.

    EXIF orientation is applied (the original ignores it), deeper greys are scaled to 8 bits, alpha is dropped as by
    convert("RGB"). Raises InputError with one sentence for a file that is absent, no picture, damaged, or over 100
    megapixels, and at once for what is no regular file.
    """
    from PIL import Image, UnidentifiedImageError

    too_large = f"{path}: the image is too large, at most {MAX_PIXELS // 1_000_000} megapixels are read"
    done: list[str] = []
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: the image cannot be read, it is no regular file")
        source: Path | BytesIO = path
        if path.suffix.lower() == ".mp4":
            source = BytesIO(last_frame(path))
            done.append("the last frame of the video")
        with warnings.catch_warnings():  # Pillow warns from 89 megapixels on; the limit here is our own
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{too_large}, this one is {image.width}x{image.height}: make it smaller")
                picture = _as_rgb(image, done)
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
    picture.info = {DONE: done}
    return picture


def digest(path: Path) -> str:
    """Tells pictures apart: SHA-256 of the file, of an mp4 that of its last frame alone. OSError, InputError.

    So a video that is made again, with other times in its record, is the same picture.
    """
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _digest(path: Path, _written: int, _size: int) -> str:
    held = last_frame(path) if path.suffix.lower() == ".mp4" else path.read_bytes()
    return hashlib.sha256(held).hexdigest()


def what_was_done(image: Image) -> list[str]:
    """What `open_image` changed, in words for the plan; empty for a picture that is as it was."""
    return list(image.info.get(DONE, ()))


def _as_rgb(image: Image, done: list[str]) -> Image:
    """8-bit RGB, upright; `done` gets what that took."""
    from PIL import Image, ImageOps

    turned = _orientation(image)
    image.load()
    if _orientation(image) in TURNS:  # some readers have turned it by now
        image = ImageOps.exif_transpose(image)
    if turned in TURNS:
        done.append("turned as its EXIF orientation says")
    if image.mode[0] in "IF":
        image = Image.fromarray(_to_8_bits(image, done))
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        done.append("its transparency was dropped")
    return image.convert("RGB")


def _orientation(image: Image) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (*DAMAGED, KeyError, TypeError):  # the picture may be whole although this is not
        return 1


def _to_8_bits(image: Image, done: list[str]) -> numpy.ndarray:
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
        done.append(f"its range {low:g} to {high:g} was scaled to 0 to 255")
        values = (values - low) * (255 / (high - low or 1))
    elif top != 255:
        done.append(f"its range 0 to {top} was scaled to 0 to 255")
        values *= 255 / top
    return values.round().astype(numpy.uint8)


def i2v_size(width: int, height: int, max_area: int) -> tuple[int, int]:
    """(width, height) of the I2V-A14B video for a picture: its ratio, about `max_area` pixels, multiples of 16.

    The picture is squeezed to this size, not cropped. Raises InputError if a side would vanish.
    """
    ratio = height / width
    rows = math.floor(math.sqrt(max_area * ratio) / I2V_STEP) * I2V_STEP
    columns = math.floor(math.sqrt(max_area / ratio) / I2V_STEP) * I2V_STEP
    return _present(columns, rows, width, height)


def ti2v_size(width: int, height: int, max_area: int) -> tuple[int, int]:
    """(width, height) of the TI2V-5B video for a picture: at most `max_area` pixels, multiples of 32.

    Of the size found width first and the one found height first, the one nearer the picture's ratio; a tie goes to
    the latter. Raises InputError if a side would vanish.
    """
    ratio = width / height
    ideal_width = math.sqrt(max_area * ratio)
    ideal_height = max_area / ideal_width

    def whole(length: float) -> int:
        return math.floor(length / TI2V_STEP) * TI2V_STEP

    wide, high = whole(ideal_width), whole(ideal_height)
    _present(wide, high, width, height)
    first, second = (wide, whole(max_area / wide)), (whole(max_area / high), high)

    def ratio_error(size: tuple[int, int]) -> float:
        found = size[0] / size[1]
        return max(ratio / found, found / ratio)

    return first if ratio_error(first) < ratio_error(second) else second


def _present(columns: int, rows: int, width: int, height: int) -> tuple[int, int]:
    if not (columns and rows):
        raise InputError(f"an image of {width}x{height} is too long and thin for this --size, which is used as an area")
    return columns, rows


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
