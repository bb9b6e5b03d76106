"""Pictures: the size rules row by row as measured on the original pipelines, the tensors, and what is refused."""

import os
import struct
import subprocess
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unprivileged import run_unprivileged
from wan.configs import TASKS
from wan.media.images import i2v_tensor, open_image, ti2v_tensor, video_size
from wan.media.video import VideoWriter, count_frames, ffmpeg_command
from wan.utils.errors import InputError

I2V, TI2V = TASKS["i2v-A14B"], TASKS["ti2v-5B"]
TINY = Path(__file__).parents[2] / "examples" / "tiny"
AREA_720, AREA_480, AREA_5B = (1280, 720), (832, 480), (1280, 704)

I2V_ROWS = [  # image -> video at 720p area, at 480p area
    ((1280, 720), (1280, 720), (832, 464)),
    ((1920, 1080), (1280, 720), (832, 464)),
    ((720, 1280), (720, 1280), (464, 832)),
    ((1080, 1920), (720, 1280), (464, 832)),
    ((1024, 1024), (960, 960), (624, 624)),
    ((1600, 1200), (1104, 816), (720, 544)),
    ((4032, 3024), (1104, 816), (720, 544)),
    ((1200, 1600), (816, 1104), (544, 720)),
    ((1500, 1000), (1168, 768), (768, 512)),
    ((1000, 1500), (768, 1168), (512, 768)),
    ((2560, 1080), (1472, 608), (960, 400)),
    ((3000, 1000), (1648, 544), (1088, 352)),
    ((1000, 562), (1280, 704), (832, 464)),
    ((832, 480), (1248, 720), (832, 464)),  # a landscape 832x480 loses 16 rows by rounding in binary64...
    ((480, 832), (720, 1248), (480, 832)),  # ...the portrait one does not
]
TI2V_ROWS = [  # image -> video, size it is resized to, crop offset
    ((1280, 720), (1248, 704), (1252, 704), (2, 0)),
    ((1920, 1080), (1248, 704), (1252, 704), (2, 0)),
    ((720, 1280), (704, 1248), (704, 1252), (0, 2)),
    ((1080, 1920), (704, 1248), (704, 1252), (0, 2)),
    ((1024, 1024), (960, 928), (960, 960), (0, 16)),  # a tie
    ((1600, 1200), (1088, 800), (1088, 816), (0, 8)),
    ((1200, 1600), (800, 1088), (816, 1088), (8, 0)),
    ((1500, 1000), (1152, 768), (1152, 768), (0, 0)),
    ((2560, 1080), (1440, 608), (1441, 608), (0, 0)),
    ((832, 480), (1248, 704), (1248, 720), (0, 8)),
]


@pytest.mark.parametrize(("image", "at_720p", "at_480p"), I2V_ROWS)
def test_i2v_size(image, at_720p, at_480p):
    assert video_size(I2V, image, AREA_720) == at_720p
    assert video_size(I2V, image, AREA_480) == at_480p


@pytest.mark.parametrize(("image", "video", "resized", "offset"), TI2V_ROWS)
def test_ti2v_size_and_crop(image, video, resized, offset):
    assert video_size(TI2V, image, AREA_5B) == video
    gradient = np.linspace(0, 255, image[0] * image[1] * 3).reshape(image[1], image[0], 3).astype(np.uint8)
    picture = Image.fromarray(gradient)
    covering = picture.resize(resized, Image.Resampling.LANCZOS)
    cropped = covering.crop((*offset, offset[0] + video[0], offset[1] + video[1]))
    expected = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).to(torch.float32).div(255).sub(0.5).div(0.5)
    assert torch.equal(ti2v_tensor(picture, video), expected)


def test_golden_sizes():
    """The sizes at which the golden videos were made from the 70x50 picture."""
    image = open_image(TINY / "input.png")
    assert image.size == (70, 50)
    assert video_size(I2V, image.size, (3072, 1)) == (64, 32)
    assert video_size(I2V, image.size, (4096, 1)) == (64, 48)
    assert video_size(TI2V, image.size, (6144, 1)) == (96, 64)


@pytest.mark.parametrize("config", [I2V, TI2V])
@pytest.mark.parametrize("image", [(1, 10_000), (10_000, 1)])
def test_a_ratio_that_leaves_no_side(config, image):
    with pytest.raises(InputError, match="too long and thin"):
        video_size(config, image, AREA_480)


def test_i2v_tensor_is_squeezed_and_overshoots():
    """Bicubic with a = -0.75 at half-pixel centres, no antialiasing, no clamp: one axis in closed form."""
    edge = np.zeros((4, 8, 3), np.uint8)
    edge[:, 4:] = 255
    tensor = i2v_tensor(Image.fromarray(edge), (16, 4))
    assert tensor.shape == (3, 4, 16)
    assert tensor.dtype == torch.float32

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

    line = [-1.0] * 4 + [1.0] * 4
    for column in range(16):
        centre = (column + 0.5) / 2 - 0.5
        taps = range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
        value = sum(kernel(centre - tap) * line[min(max(tap, 0), 7)] for tap in taps)
        assert tensor[0, 0, column].item() == pytest.approx(value, abs=1e-6)
    assert tensor.max() > 1
    assert tensor.min() < -1


def test_i2v_tensor_has_no_antialiasing():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    # at an exact quarter the taps are fixed, so stripes alias to one grey instead of fading to the mean
    tensor = i2v_tensor(Image.fromarray(stripes), (8, 8))
    centre = torch.nn.functional.interpolate(
        torch.from_numpy(stripes).permute(2, 0, 1)[None].float() / 127.5 - 1, size=(8, 8), mode="bicubic"
    )[0]
    assert torch.allclose(tensor, centre, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    Image.new("RGB", (12, 9), (200, 100, 50)).convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (12, 9))


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_listed(tmp_path, kind, orientation):
    """A phone held upright: the original makes a video that lies on its side. A deviation on purpose."""
    upright = Image.fromarray(np.kron([[255, 0, 0], [0, 0, 128]], np.ones((16, 16))).astype(np.uint8)).convert("RGB")
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what takes the upright picture to what the sensor saw
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif, quality=95)
    image = open_image(tmp_path / f"a.{kind}")
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 3
    assert image.info["changes"] == (["turned as its EXIF orientation says"] if orientation > 1 else [])


def test_a_broken_exif_block_does_not_cost_the_picture(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12")
    assert open_image(tmp_path / "a.jpg").size == (20, 10)


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.parametrize(
    ("name", "values", "range_said"),
    [
        ("a.png", (RAMP * 1040).astype(np.uint16), "0 to 65535"),
        ("a.tiff", (RAMP * 1040).astype(np.uint16), "0 to 65535"),
        ("a.tiff", (RAMP * 1040).astype(">u2"), "0 to 65535"),
        ("a.pgm", (RAMP * 1040).astype(np.int32), "0 to 65535"),
        ("a.tiff", (RAMP / 63).astype(np.float32), "0 to 1"),
        ("a.tiff", (RAMP * 4.0).astype(np.float32), None),
        ("a.tiff", (RAMP * 4).astype(np.int32), None),
        ("a.tiff", (RAMP * 100 - 2000.0).astype(np.float32), "-2000 to 4300"),
        ("a.tiff", (RAMP * 10**6).astype(np.int32), "0 to 6.3e+07"),
    ],
)
def test_deep_greys_are_scaled_not_clipped(tmp_path, name, values, range_said):
    Image.fromarray(values).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    expected = RAMP * 4 if range_said is None else RAMP * 255 / 63
    if range_said == "0 to 65535":
        expected = RAMP * 1040 / 257
    assert np.abs(np.asarray(image) - expected[..., None]).max() <= 0.5 + 1e-6
    assert image.info["changes"] == ([f"its range {range_said} was scaled to 0 to 255"] if range_said else [])


def test_a_flat_or_endless_float_picture(tmp_path):
    Image.fromarray(np.full((8, 8), 7e8, np.float32)).save(tmp_path / "flat.tiff")
    assert open_image(tmp_path / "flat.tiff").size == (8, 8)
    for value in (np.nan, np.inf):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "a.tiff")
        with pytest.raises(InputError, match="holds NaN or Inf"):
            open_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_as_by_convert(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (200, 100, 50, 0)).convert(mode)
    picture.save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as again:
        assert image.tobytes() == again.convert("RGB").tobytes()
    assert image.info["changes"] == ["its transparency was dropped"]
    Image.new("RGBA", (8, 8), (200, 100, 50, 255)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").info["changes"] == []


def icc(*primaries: tuple[float, float, float], gamma: float = 2.4) -> bytes:
    """A matrix profile with these XYZ primaries (D50) and sRGB's curve, or a power."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = struct.pack(">4x2H", 3, 0) + fixed(gamma, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    name = "Phone".encode("utf-16-be")
    tags = {b"desc": b"mluc" + struct.pack(">4xII", 1, 12) + b"enUS" + struct.pack(">II", len(name), 28) + name,
            b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.82491)}  # fmt: skip
    for channel, primary in zip(b"rgb", primaries, strict=True):
        tags[bytes([channel]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*primary)
        tags[bytes([channel]) + b"TRC"] = b"para" + curve
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI", size, b"lcms", 0x04300000) + b"mntrRGB XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    head += b"acspAPPL" + bytes(24) + fixed(0.9642, 1, 0.82491)
    return head.ljust(128, b"\0") + table + body


P3 = icc((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = icc((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp"])
def test_a_phones_colours_become_srgb(tmp_path, kind):
    """Display P3: the same numbers mean more saturated colours. Expected by the matrices of both spaces."""
    Image.new("RGB", (16, 16), (200, 120, 90)).save(tmp_path / f"a.{kind}", icc_profile=P3, quality=100)
    image = open_image(tmp_path / f"a.{kind}")
    assert image.info["changes"] == ["converted from its colour profile (Phone) to sRGB"]
    assert np.abs(np.asarray(image)[8, 8].astype(int) - (213, 118, 85)).max() <= 3


def test_a_profile_that_means_srgb_leaves_the_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=SRGB)
    Image.fromarray(noise).save(tmp_path / "b.png", icc_profile=b"no profile")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), noise)
    assert open_image(tmp_path / "a.png").info["changes"] == []
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), noise)
    assert open_image(tmp_path / "b.png").info["changes"] == ["its colour profile cannot be used and was ignored"]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_frames_is_listed(tmp_path, kind):
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 255, 0))
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second])
    image = open_image(tmp_path / f"a.{kind}")
    assert image.info["changes"] == ["the first of 2 frames"]
    assert np.asarray(image)[5, 5].tolist()[:2] == pytest.approx([255, 0], abs=3)


def test_pixels_that_are_not_square_are_listed(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", dpi=(72, 96))
    assert "not square" in open_image(tmp_path / "a.png").info["changes"][0]


@pytest.mark.parametrize("name", ["a.heic", "IMG_0001.JPG"])
def test_heic_is_named_with_what_reads_it(tmp_path, name):
    (tmp_path / name).write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 200)
    words = "the image cannot be read" if find_spec("pillow_heif") else "pip install pillow-heif"
    with pytest.raises(InputError, match=words):
        open_image(tmp_path / name)


def test_an_address_is_no_file():
    with pytest.raises(InputError, match="download the picture"):
        open_image(Path("https://example.com/cat.jpg"))


def ffmpeg(*words: object) -> None:
    subprocess.run([*ffmpeg_command(), *map(str, words)], check=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.MOV"])
def test_the_last_decoded_frame_of_a_cut_clip(tmp_path, name):
    """Cut without encoding it again, a clip holds packets before its first frame: counting them finds no last one."""
    source = ["-f", "lavfi", "-i", "testsrc=size=128x96:rate=16:duration=3", "-pix_fmt", "yuv420p"]
    ffmpeg(*source, "-c:v", "libx264", "-g", "24", tmp_path / "whole.mp4")
    ffmpeg("-ss", "1.0", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / name)
    image, whole = open_image(tmp_path / name), open_image(tmp_path / "whole.mp4")
    assert image.info["changes"] == ["the last frame of the video"]
    assert np.array_equal(np.asarray(image), np.asarray(whole))


def test_a_clips_pixel_format_and_rotation(tmp_path):
    source = ["-f", "lavfi", "-i", "testsrc=size=64x96:rate=16:duration=0.5", "-pix_fmt", "yuv420p"]
    wide = ["-vf", "setsar=2/1,setparams=color_primaries=bt2020:color_trc=arib-std-b67:colorspace=bt2020nc"]
    ffmpeg(*source, *wide, "-c:v", "libx264", tmp_path / "a.mp4")
    image = open_image(tmp_path / "a.mp4")
    assert image.size == (128, 96)
    assert image.info["changes"] == ["the last frame of the video, HLG colours unconverted"]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_playlist_under_a_videos_name_is_refused(tmp_path, name):
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x96:duration=0.5", "-c:v", "libx264", tmp_path / "b.mp4")
    (tmp_path / name).write_text("ffconcat version 1.0\nfile b.mp4\n")
    with pytest.raises(InputError, match="not a whole video"):
        open_image(tmp_path / name)
    assert count_frames(tmp_path / name) == 0


def test_nothing_but_files_is_opened(tmp_path):
    """A pipe that nobody writes to would be waited for."""
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            open_image(path)


def test_an_mp4_gives_its_last_frame(tmp_path):
    frames = torch.linspace(-0.9, 0.9, 13)[None, :, None, None] * torch.tensor([1.0, -1.0, 0.3])[:, None, None, None]
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        video.write(frames.expand(3, 13, 64, 96))
        video.finish({})
    image = open_image(tmp_path / "a.mp4")
    assert image.size == (96, 64)
    assert image.info["changes"] == ["the last frame of the video"]
    expected = (frames[:, -1, 0, 0].numpy() + 1) * 127.5
    assert np.abs(np.asarray(image).mean((0, 1)) - expected).max() < 2
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-300])
    with pytest.raises(InputError, match=r"a\.mp4: not a whole video"):
        open_image(tmp_path / "a.mp4")


def test_a_missing_permission_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = """
import sys
from pathlib import Path
from wan.media.images import open_image
from wan.media.video import read_record
root = Path(sys.argv[1])
(root / "a.json").write_text("{}")
(root / "below").mkdir()
(root / "below" / "a.png").write_text("")
for name in ("a.png", "a.json", "below"):
    (root / name).chmod(0)
for opener, name in ((open_image, "a.png"), (open_image, "below/a.png"), (read_record, "a.json")):
    try:
        opener(root / name)
    except Exception as e:
        print(type(e).__name__, e)
(root / "below").chmod(0o700)
"""
    assert run_unprivileged(code, tmp_path) == [
        f"InputError {tmp_path}/a.png: there is no permission to read the image",
        f"InputError {tmp_path}/below/a.png: there is no permission to read the image",
        f"InputError {tmp_path}/a.json: there is no permission to read it",
    ]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such image file"),
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png_header(10_001, 10_000), "too large; at most 100 megapixels"),
        (png_header(60_000, 60_000), "too large; at most 100 megapixels"),  # Pillow's own bomb check
        (png_header(1, 90_000_000), "too large; .* 50000 pixels a side"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "of a kind that is not read"),  # starts Ghostscript
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n", "git lfs pull"),
        (png_header(64, 64), "cannot be read"),  # pixels missing
    ],
)
def test_refused(tmp_path, content, sentence):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as raised:
        open_image(path)
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(f"{path}: ")
    assert "\n" not in raised.value.problems[0]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_truncated(tmp_path, kind):
    path = tmp_path / f"picture.{kind}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"the image cannot be read|not an image"):
        open_image(path)


def test_example_picture():
    path = Path(__file__).parents[2] / "wan" / "configs" / "i2v_input.png"
    assert open_image(path).size == (832, 480)
    assert path.stat().st_size < 400_000
