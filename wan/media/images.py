"""Pictures that condition a video: their files, the size of its frames, their tensors. Pictures that show a video: a
contact sheet of the finished one, and a strip that grows with each denoising step.

Shapes: H, W rows and columns. Sizes are (width, height).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
import warnings
from io import BytesIO
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from wan.configs import TaskConfig
from wan.media.video import EXACT, file_argument, is_video, last_frame, messages, run_ffmpeg, to_bytes, video_input
from wan.utils.errors import InputError, JobError
from wan.utils.files import Beside, replacing, stand_in

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS, MAX_SIDE = 100_000_000, 50_000
# Pillow's formats that are read; others may start programs (EPS) or are no pictures.
PICTURE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000")
HEIC = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
DIGESTS: dict[tuple[Path, int, int, bool], str] = {}  # by path, time, size and what of it
# what Pillow's decoders raise for damaged files
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, OverflowError, RuntimeError)
COLUMNS = 3  # of a contact sheet, and rows
WIDTH = 320  # pixels of one picture at most
GAP, LINE = 4, 14  # pixels between pictures, and of a line of text


def video_size(config: TaskConfig, picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the task's video for a picture of this size; `size` counts as an area.

    Sides are multiples of the task's step. "squeeze": the picture's ratio, about the area. "crop": at most the area; of
    the size found width first and the one found height first the one nearer the picture's ratio, the latter on a tie.
    Both are the original pipelines' rules in binary64 and in its order: another one rounds to another multiple for some
    pictures. InputError if a side would vanish.
    """
    (width, height), area, step = picture, size[0] * size[1], config.size_step
    if config.image_fit == "crop":
        ideal = math.sqrt(area * (width / height))
        lengths = ideal, area / ideal
    else:
        lengths = math.sqrt(area / (height / width)), math.sqrt(area * (height / width))
    columns, rows = (math.floor(length / step) * step for length in lengths)
    if not (columns and rows):
        raise InputError(f"an image of {width}x{height} is too long and thin for this --size, which is used as an area")
    if config.image_fit != "crop":
        return columns, rows
    ways = (math.floor(area / rows / step) * step, rows), (columns, math.floor(area / columns / step) * step)
    ratio = width / height
    return min(ways, key=lambda found: max(ratio / (found[0] / found[1]), found[0] / found[1] / ratio))


def open_image(path: Path) -> Image.Image:
    """The whole picture, decoded, as 8-bit RGB; of a video the last frame. `info["changes"]` lists what was changed.

    Colour profiles become sRGB and EXIF orientation is applied (the original ignores both), deeper greys are scaled to
    8 bits, alpha is dropped as by convert("RGB"). InputError for a file that is absent, no regular file, of another
    kind than `PICTURE_FORMATS`, damaged, or too large.
    """
    changes: list[str] = []
    try:
        if re.match(r"\w+:/", str(path)) and not path.exists():
            raise InputError(f"{path}: an address, not a file; download the picture and give its file")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: the image cannot be read, it is no regular file")
        source = BytesIO(last_frame(path, changes)) if is_video(path) else path
        formats = PICTURE_FORMATS + (() if is_video(path) else _check_kind(path))
        with warnings.catch_warnings():  # Pillow warns from 89 megapixels on; the limit here is our own
            warnings.simplefilter("ignore")
            with Image.open(source, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                    raise Image.DecompressionBombError
                picture = _as_rgb(image, changes)
    except (*DAMAGED, Image.DecompressionBombError) as e:
        most = f"{MAX_PIXELS // 1_000_000} megapixels and {MAX_SIDE} pixels a side"
        reasons = {
            FileNotFoundError: "no such image file",
            PermissionError: "there is no permission to read the image",
            Image.DecompressionBombError: f"the image is too large; at most {most} are read",
            UnidentifiedImageError: stand_in(path)
            or f"not an image, or of a kind that is not read ({', '.join(PICTURE_FORMATS)} are)",
        }
        raise InputError(f"{path}: {reasons.get(type(e), f'the image cannot be read ({e})')}") from e
    picture.info = {"changes": changes}
    return picture


def _check_kind(path: Path) -> tuple[str, ...]:
    """Pillow's format for HEIC if the file is one and can be read, which needs a package."""
    with path.open("rb") as file:
        if not HEIC.match(file.read(12)):
            return ()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise InputError(f"{path}: a HEIC picture; pip install pillow-heif, or save it as JPEG") from None
    register_heif_opener()
    return ("HEIF",)


def digest(path: Path, *, clip: bool = False) -> str:
    """SHA-256 of the picture's file; of a video, unless it is a `clip`, of its last frame alone: a clip that was made
    again, with other times in its record, still gives the same picture. OSError, InputError."""
    key = path, path.stat().st_mtime_ns, path.stat().st_size, clip
    if key not in DIGESTS:
        with BytesIO(last_frame(path)) if is_video(path) and not clip else path.open("rb") as file:
            DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return DIGESTS[key]


def _as_rgb(image: Image.Image, changes: list[str]) -> Image.Image:
    """8-bit RGB, upright; adds to `changes`."""
    turned, profile, dpi = _is_turned(image), image.info.get("icc_profile"), image.info.get("dpi", (1, 1))
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # of a phone's JPEG with a depth map
        changes.append(f"the first of {frames} frames")
    image.load()
    if _is_turned(image):  # some readers have turned it by now
        image = ImageOps.exif_transpose(image)
    if turned:
        changes.append("turned as its EXIF orientation says")
    if min(dpi) > 0 and not 0.98 < dpi[0] / dpi[1] < 1.02:
        changes.append(f"its pixels are not square ({dpi[0]:g}x{dpi[1]:g} dpi) and were taken as square")
    if image.mode[0] in "IF":
        image = _to_8_bits(image, changes)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        changes.append("its transparency was dropped")
    return _as_srgb(image, profile, changes) if profile else image.convert("RGB")


def _as_srgb(image: Image.Image, profile: bytes, changes: list[str]) -> Image.Image:
    """8-bit RGB by the picture's ICC profile; a profile that means sRGB leaves the pixels as they are."""
    import numpy

    image = image if image.mode in ("L", "CMYK", "LAB") else image.convert("RGB")
    probe = Image.frombytes("RGB", (27, 1), bytes(chain(*product((0, 128, 255), repeat=3)))).convert(image.mode)
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        shown, converted = (ImageCms.applyTransform(picture, to_srgb) for picture in (probe, image))
        name = ImageCms.getProfileName(source).strip()[:40]
    except (ImageCms.PyCMSError, OSError):
        changes.append("its colour profile cannot be used and was ignored")
        return image.convert("RGB")
    assert converted is not None, "not in place"
    if numpy.abs(numpy.asarray(shown).astype(int) - numpy.asarray(probe.convert("RGB"))).max() <= 2:
        return image.convert("RGB")
    changes.append(f"converted from its colour profile ({name}) to sRGB")
    return converted


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except (*DAMAGED, KeyError, TypeError):  # the picture may be whole although this is not
        return False


def _to_8_bits(image: Image.Image, changes: list[str]) -> Image.Image:
    """Greys of 16 or 32 bits or floats in 8 bits, by the first of the usual ranges that holds them all; convert("RGB")
    would clip them at 255. ValueError for NaN or Inf."""
    import numpy

    values = numpy.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds NaN or Inf")
    ranges = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    start, factor = (0.0, 255 / top) if top else (low, 255 / (high - low or 1))
    if top != 255:
        changes.append(f"its range {start:g} to {top or high:g} was scaled to 0 to 255")
    scaled = numpy.empty(values.shape, numpy.uint8)
    for row in range(0, len(values), 64):  # a few rows at a time: float64 takes eight times the memory
        scaled[row : row + 64] = ((values[row : row + 64].astype(numpy.float64) - start) * factor).round()
    return Image.fromarray(scaled)


def i2v_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The picture squeezed to `size`: float32 [3, H, W], nominally in [-1, 1]. Bicubic without antialiasing and not
    clamped, on the CPU, as in the original: it overshoots at edges."""
    from torch.nn.functional import interpolate

    return interpolate(_normalised(image)[None], size=size[::-1], mode="bicubic")[0]


def ti2v_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The picture scaled to cover `size` (Lanczos, 8 bits) and cropped at its centre: float32 [3, H, W] in [-1, 1]."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    covering = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    return _normalised(covering.crop((left, top, left + width, top + height)))


def _normalised(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [-1, 1]."""
    import numpy
    import torch

    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
    return (pixels.contiguous().float() / 255 - 0.5) / 0.5


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
                write_text(pictures, f"{n / float(fps[1]):.2f} s", left, top)
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
            write_text(sheet, f"step {index + 1}", index * (width + GAP), height)
        with replacing(self.path) as part:
            sheet.save(part, "PNG")


def write_text(picture: Image.Image, text: str, left: int, top: int) -> None:
    """White letters with a black edge, readable on any picture."""
    font = ImageFont.load_default(10)
    ImageDraw.Draw(picture).text((left + 2, top), text, "white", font, stroke_width=1, stroke_fill="black")
