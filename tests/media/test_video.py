"""mp4s: what comes back from them; and that they are whole or absent, whatever happens to encoder, disk or process."""

import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from tests.forked import python
from wan.media import video as module
from wan.media.images import open_image, save_contact_sheet
from wan.media.video import (
    CONTAINERS,
    LONGEST_RECORD,
    Container,
    VideoWriter,
    check_encoder,
    count_frames,
    ffmpeg_command,
    read_record,
    to_bytes,
)
from wan.utils.errors import InputError, JobError
from wan.utils.files import remove_parts

ROOT = Path(__file__).parents[2]
EXACT = ["-vf", "scale=flags=bicubic+accurate_rnd+full_chroma_int"]  # ffmpeg's quick conversion to RGB is 1 too dark
AWKWARD = {"prompt": '一只猫 said: "it\'s; =#\\ \\n ok"\n\r\tend 😀 \u2028', "n": 1.5, "none": None}


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    """[3, t, H, W] in [-1, 1]: a slow gradient that moves and goes through all colours."""
    t, y, x = (torch.linspace(0, 1, n) for n in (frames, height, width))
    base = t[:, None, None] * 0.3 + y[None, :, None] * 0.5 + x[None, None, :]
    return torch.stack([torch.sin(2 * base + phase) for phase in (0.0, 2.0, 4.0)])


def read(path: Path) -> tuple[dict, np.ndarray]:
    """(what the file says of itself, frames uint8 [T, H, W, 3])"""
    reader = imageio_ffmpeg.read_frames(os.fspath(path), output_params=EXACT)
    says = next(reader)
    width, height = says["size"]
    return says, np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader])


def save(path: Path, frames: torch.Tensor, fps: float = 16, record: dict | None = None) -> None:
    with VideoWriter(path, fps) as video:
        for chunk in frames.split(4, dim=1):
            video.write(chunk)
        video.finish(record or {})


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("height", "width"), [(128, 192), (129, 192), (128, 193), (65, 97)])
def test_frames_come_back(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth(13, height, width)
    save(tmp_path / "a.mp4", frames, fps=24)
    says, back = read(tmp_path / "a.mp4")
    assert back.shape == (13, height, width, 3)
    assert says["fps"] == 24
    assert says["codec"] == "h264"
    error = np.abs(back.astype(int) - to_bytes(frames).astype(int))
    assert error.mean() < 1.0
    assert np.percentile(error, 99) <= 4
    assert count_frames(tmp_path / "a.mp4") == 13
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its processors")
def test_the_same_frames_are_written_on_one_processor_and_on_all(tmp_path: Path) -> None:
    """x264 decides otherwise with other numbers of threads, and a clip of a chain starts from what it wrote."""
    processors = os.sched_getaffinity(0)
    if len(processors) == 1:
        pytest.skip("there is one processor")
    still = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    still = torch.nn.functional.interpolate(still, scale_factor=8, mode="bicubic")[0] * 0.4
    moving = torch.stack([still.roll((3 * i, 5 * i), (1, 2)) for i in range(33)], dim=1)  # threads limit its vectors
    try:
        os.sched_setaffinity(0, {min(processors)})
        save(tmp_path / "one.mp4", moving)
    finally:
        os.sched_setaffinity(0, processors)
    save(tmp_path / "all.mp4", moving)
    assert np.array_equal(*(read(tmp_path / name)[1] for name in ("one.mp4", "all.mp4")))


def test_colours_are_said_and_meant(tmp_path: Path) -> None:
    """Saturated colours come back only if the matrix used is the one the file names."""
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1.0]])
    for number, colour in enumerate(colours):
        save(tmp_path / f"{number}.mp4", colour[:, None, None, None].expand(3, 5, 64, 64))
        _, back = read(tmp_path / f"{number}.mp4")
        assert np.abs(back.astype(float).mean((0, 1, 2)) - (colour.numpy() + 1) * 127.5).max() < 3
    says = subprocess.run([ffmpeg_command()[0], "-i", tmp_path / "0.mp4"], capture_output=True, text=True, check=False)
    assert "yuv420p(tv, bt709, progressive)" in says.stderr  # matrix, primaries and transfer alike


def test_bytes_are_rounded_and_the_chunk_is_left_alone() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 1 / 255, 0.9999, 1.0, 1.5])
    chunk = values.repeat(3, 1, 1, 1)
    before = chunk.clone()
    assert to_bytes(chunk)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255, 255]
    assert torch.equal(chunk, before)


def test_another_container_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding, record, frames, last frame and contact sheet of a WebM."""
    monkeypatch.setitem(CONTAINERS, ".webm", Container("webm", ("-c:v", "libvpx-vp9", "-crf", "20", "-b:v", "0")))
    path = tmp_path / "a.webm"
    save(path, smooth(5, 32, 32), record=AWKWARD)
    assert read_record(path) == AWKWARD
    assert count_frames(path) == 5
    assert path.read_bytes()[:4] == b"\x1a\x45\xdf\xa3"
    assert open_image(path).size == (32, 32)
    assert save_contact_sheet(path, 5).is_file()


@pytest.mark.parametrize("record", [AWKWARD, {"long": "长=" * 150_000}])
def test_record_in_the_comment_and_beside(tmp_path: Path, record: dict) -> None:
    save(tmp_path / "猫 'a'.mp4", smooth(5, 32, 32), record=record)
    assert read_record(tmp_path / "猫 'a'.mp4") == record
    assert read_record(tmp_path / "猫 'a'.json") == record


def test_any_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "12:30 %03d*.mp4", "[a] 'b' \"c\" #1 & $HOME.mp4", "猫" * 50 + ".mp4"):
        path = Path(name)
        save(path, smooth(5, 32, 32), record=AWKWARD)
        save_contact_sheet(path, 5)
        assert read_record(path) == AWKWARD
        assert count_frames(path) == 5
        assert path.with_suffix(".png").is_file()


def test_no_record_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "half.json").write_text('{"a": ')
    (tmp_path / "noise.mp4").write_bytes(b"no video")
    save(tmp_path / "foreign.mp4", smooth(5, 32, 32))
    stripped = ["-map_metadata", "-1", "-c", "copy", tmp_path / "stripped.mp4"]
    subprocess.run([*ffmpeg_command(), "-i", tmp_path / "foreign.mp4", *stripped], check=True)
    for name in ("list.json", "half.json", "noise.mp4", "stripped.mp4"):
        with pytest.raises(InputError, match=f"{name}: holds no record"):
            read_record(tmp_path / name)
    for name in ("absent.json", "absent.mp4"):
        with pytest.raises(InputError, match="no such file"):
            read_record(tmp_path / name)


def test_a_huge_comment_is_no_record(tmp_path: Path) -> None:
    """A comment tag within the limit takes little memory, a larger one is not read."""
    code = """
import resource, sys, time
from wan.media.video import read_record
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(read_record(__import__("pathlib").Path(sys.argv[1]))["a"]))
except Exception as e:
    print(type(e).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""
    for length, expected in ((LONGEST_RECORD * 2 // 5, str(LONGEST_RECORD * 2 // 5)), (LONGEST_RECORD, "InputError")):
        save(tmp_path / "a.mp4", smooth(5, 32, 32), record={"a": "=" + "x" * (length - 1)})
        words = [sys.executable, "-c", code, tmp_path / "a.mp4"]
        found, megabytes = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert found == expected
        assert int(megabytes) < 200


def test_a_tag_of_a_gigabyte_is_not_held(tmp_path: Path) -> None:
    def box(kind: bytes, size: int) -> bytes:
        return struct.pack(">I4s", size, kind)

    data = (1 << 30) + 16
    head = box(b"ftyp", 16) + b"isom\0\0\2\0"
    for kind, size in ((b"moov", 85), (b"udta", 77), (b"meta", 69)):
        head += box(kind, data + size)
    head += bytes(4) + box(b"hdlr", 33) + bytes(8) + b"mdirappl" + bytes(9)
    head += box(b"ilst", data + 16) + box(b"\xa9cmt", data + 8) + box(b"data", data) + struct.pack(">II", 1, 0)
    file = tmp_path / "a.mp4"
    with file.open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(len(head) + (1 << 30))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(InputError, match="holds no record"):
        read_record(file)
    assert count_frames(file) == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert after == before or after < 1_000_000  # KB, of the largest child


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with VideoWriter(tmp_path / "a.mp4", 16) as video:
            video.write(smooth(5, 64, 64))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        video.write(smooth(5, 64, 64))
    with VideoWriter(tmp_path / "b.mp4", 16) as video, pytest.raises(JobError, match="no frames"):
        video.finish({})
    assert list(tmp_path.iterdir()) == []


def test_existing_files_stay_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("before")
    with VideoWriter(path, 16) as video:
        video.write(smooth(5, 64, 64))
        assert path.read_text() == "before"
    assert path.read_text() == "before"
    save(path, smooth(5, 64, 64))
    assert count_frames(path) == 5


def test_killed_in_the_middle_leaves_no_final_name(tmp_path: Path) -> None:
    script = f"""
import sys, time, torch
from wan.media.video import VideoWriter
from pathlib import Path
video = VideoWriter(Path({os.fspath(tmp_path)!r}) / "a.mp4", 16)
for _ in range(40):
    video.write(torch.rand(3, 4, 64, 64))
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    time.sleep(1.0)  # the encoder sees its input end and closes its own file
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.mp4.")
    assert left.suffix == ".part"
    save(tmp_path / "a.mp4", smooth(5, 64, 64))  # and what it left is in nobody's way
    assert remove_parts(tmp_path / "a.mp4") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4"]


@pytest.mark.parametrize("moment", ["while writing", "before finish"])
def test_a_dead_encoder_is_an_error(tmp_path: Path, moment: str) -> None:
    def run() -> None:
        with VideoWriter(tmp_path / "a.mp4", 16) as video:
            video.write(smooth(4, 64, 64))
            assert video._encoder is not None
            os.kill(video._encoder.pid, signal.SIGKILL)
            if moment == "while writing":
                for _ in range(200):
                    video.write(torch.rand(3, 4, 64, 64))
                pytest.fail("nobody noticed until the end")
            video.finish({})

    with pytest.raises(JobError, match=r"a\.mp4: the video encoder failed: signal 9"):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_stuck_encoder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_SECONDS", 0.5)
    pids = []

    def run(chunks: int) -> None:
        with VideoWriter(tmp_path / "a.mp4", 16) as video:
            video.write(smooth(4, 64, 64))
            assert video._encoder is not None
            pids.append(video._encoder.pid)
            os.kill(video._encoder.pid, signal.SIGSTOP)
            for _ in range(chunks):
                video.write(torch.rand(3, 4, 64, 64))
            video.finish({})

    for chunks in (0, 200):  # stuck at the end, stuck in the middle
        with pytest.raises(JobError, match="took no frames for"):
            run(chunks)
    assert not any(map(alive, pids))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """A limit on the size of files acts as a full disk: it stops the first pass, then the second."""
    script = f"""
import resource, torch
from pathlib import Path
from wan.utils.errors import JobError
from wan.media.video import VideoWriter
for room in (10_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        with VideoWriter(Path({os.fspath(tmp_path)!r}) / "a.mp4", 16) as video:
            for _ in range(10):
                video.write(torch.rand(3, 4, 64, 64))
            video.finish({{"long": "x" * 2_000_000}})
    except JobError as error:
        print(error)
"""
    done = python("-c", script)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/a.mp4: the video encoder failed: ")
    assert second.startswith(f"{tmp_path}/a.mp4: the video could not be completed: ")
    assert all("signal 25" in line or "File too large" in line for line in (first, second))
    assert list(tmp_path.iterdir()) == []


def test_encoder_words_are_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"failed: exit code \d+ \(.*framerate"):
        save(tmp_path / "a.mp4", smooth(40, 64, 64), fps=-1)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "no folder" / "a.mp4", smooth(40, 64, 64))


def test_decoding_goes_on_while_encoding(tmp_path: Path) -> None:
    """`write` returns before the encoder has taken the frames: a stopped encoder holds up nobody at once."""
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        video.write(torch.rand(3, 4, 256, 256))
        assert video._encoder is not None
        os.kill(video._encoder.pid, signal.SIGSTOP)
        for _ in range(module.CHUNKS_WAITING - 1):
            video.write(torch.rand(3, 4, 256, 256))
        os.kill(video._encoder.pid, signal.SIGCONT)
        video.finish({})
    assert count_frames(tmp_path / "a.mp4") == 4 * module.CHUNKS_WAITING


def test_frames_are_encoded_before_the_last_ones_come(tmp_path: Path) -> None:
    """With x264's usual lookahead of 40 frames nothing would leave it yet."""
    with VideoWriter(tmp_path / "a.mp4", 16) as video:
        for _ in range(10):
            video.write(torch.rand(3, 4, 256, 256))
        until = time.monotonic() + 60
        (encoded,) = tmp_path.iterdir()
        while encoded.stat().st_size < 100_000:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("cut", [1, 100, 0.5, 0.99])
def test_a_cut_video_has_no_frames(tmp_path: Path, cut: float) -> None:
    save(tmp_path / "a.mp4", torch.rand(3, 9, 64, 64))
    data = (tmp_path / "a.mp4").read_bytes()
    gone = cut if cut >= 1 else int(cut * len(data))
    (tmp_path / "a.mp4").write_bytes(data[:-gone])
    assert count_frames(tmp_path / "a.mp4") == 0
    assert count_frames(tmp_path / "absent.mp4") == 0


def test_a_video_cut_where_its_data_begins_has_no_frames(tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", smooth(5, 32, 32))
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: data.index(b"mdat") - 4])  # all boxes that are left are whole
    assert count_frames(tmp_path / "a.mp4") == 0


@pytest.mark.parametrize("frames", [1, 5])  # the sizes of equal frames are one number
def test_no_process_is_started_for_what_an_mp4_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    save(tmp_path / "a.mp4", smooth(frames, 32, 32), record=AWKWARD)
    monkeypatch.setattr("wan.media.video.run_ffmpeg", lambda *_, **__: pytest.fail("ffmpeg was started"))
    assert count_frames(tmp_path / "a.mp4") == frames
    assert read_record(tmp_path / "a.mp4") == AWKWARD


@pytest.mark.parametrize(("frames", "columns", "rows"), [(1, 1, 1), (5, 3, 2), (17, 3, 3), (9, 3, 3)])
def test_contact_sheet(tmp_path: Path, frames: int, columns: int, rows: int) -> None:
    grey = torch.linspace(-1, 1, frames + 2)[1:-1]  # frame i is a flat grey of its own
    save(tmp_path / "a.mp4", grey[None, :, None, None].expand(3, frames, 48, 64))
    sheet = save_contact_sheet(tmp_path / "a.mp4", frames)
    assert sheet == tmp_path / "a.png"
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (rows * 48 + (rows + 1) * 4, columns * 64 + (columns + 1) * 4, 3)
    count = min(9, frames)
    for place in range(count):
        row, column = divmod(place, columns)
        middle = pixels[4 + row * 52 + 24, 4 + column * 68 + 32]
        shown = grey[round(place * (frames - 1) / max(1, count - 1))]
        assert np.abs(middle - (float(shown) + 1) * 127.5).max() < 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]


def test_the_sheet_is_as_bright_as_the_video(tmp_path: Path) -> None:
    colours = [(200, 120, 90), (30, 144, 255), (255, 255, 255), (64, 64, 64), (255, 165, 0), (0, 0, 0)]
    frame = torch.tensor(colours, dtype=torch.float32).T.repeat_interleave(32, 1) / 127.5 - 1
    save(tmp_path / "a.mp4", frame[:, None, None].expand(3, 5, 64, len(colours) * 32))
    last = np.asarray(open_image(tmp_path / "a.mp4")).astype(int)
    with Image.open(save_contact_sheet(tmp_path / "a.mp4", 5)) as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    for place in range(len(colours)):
        shown = sheet[4 + 20, 4 + place * 32 + 16]
        assert np.abs(shown - last[20, place * 32 + 16]).max() <= 1
        assert np.abs(shown - colours[place]).max() <= 2


def test_wide_videos_shrink_on_the_sheet(tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", smooth(5, 360, 640))
    with Image.open(save_contact_sheet(tmp_path / "a.mp4", 5)) as image:
        assert image.size == (3 * 320 + 16, 2 * 180 + 12)


def test_check_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder()
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho 'Unknown encoder libx264' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.fspath(broken))
    with pytest.raises(InputError, match=r"cannot encode H\.264 \(Unknown encoder libx264\); install imageio-ffmpeg"):
        check_encoder()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.fspath(tmp_path / "absent"))
    with pytest.raises(InputError, match="ffmpeg cannot be run"):
        check_encoder()
