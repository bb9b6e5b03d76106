"""Pictures that condition a video: opening them, the size of the video they lead to, and their tensors.

Shapes: H, W rows and columns. Sizes are (width, height). The two size rules are the original pipelines' and are
evaluated in binary64 in the original's order: another order rounds to another multiple for some pictures.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from wan.utils.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_PIXELS = 100_000_000
I2V_STEP = 16  # patch 2 x VAE stride 8
TI2V_STEP = 32  # patch 2 x VAE stride 16


def video_size(fit: str, picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the video for a picture of this size; `size` counts as an area.

    fit: a configuration's `image_fit`. InputError if a side would vanish.
    """
    rule = {"squeeze": i2v_size, "crop": ti2v_size}[fit]
    return rule(*picture, size[0] * size[1])


def open_image(path: Path) -> Image:
    """The whole picture, decoded, as RGB; an EXIF rotation is not applied, as in the original.

    Raises InputError with one sentence for a file that is absent, no picture, damaged, or over 100 megapixels.
    """
    from PIL import Image, UnidentifiedImageError

    too_large = f"{path}: the image is too large, at most {MAX_PIXELS // 1_000_000} megapixels are read"
    try:
        with warnings.catch_warnings():  # Pillow warns from 89 megapixels on; the limit here is our own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"{too_large}, this one is {image.width}x{image.height}")
                return image.convert("RGB")
    except FileNotFoundError as e:
        raise InputError(f"{path}: no such image file") from e
    except Image.DecompressionBombError as e:
        raise InputError(too_large) from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: not an image, or of a kind that cannot be read") from e
    except (OSError, SyntaxError, ValueError, EOFError) as e:  # what Pillow's decoders raise for damaged files
        raise InputError(f"{path}: the image cannot be read ({e})") from e


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
