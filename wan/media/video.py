"""Video files, by the ffmpeg of imageio-ffmpeg: whole or absent, and encoded while later frames are decoded.

One pass encodes. A second one copies the packets, adds the record (in the comment tag), which is complete only at the
end, and puts the index in front, so that browsers start at once.

Shapes: t frames of one chunk, H height, W width, B videos side by side.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from wan.media import boxes
from wan.utils.errors import InputError, JobError
from wan.utils.files import Beside, make_part, parse_json, replacing

if TYPE_CHECKING:
    import numpy
    import torch

CHUNKS_WAITING = 8  # how far decoding may run ahead of the encoder
LONGEST_RECORD = 20_000_000  # bytes of a .json; a longer file is refused as a record
STALL_SECONDS = 600.0  # an encoder that takes no frame for this long has failed
# Players read an untagged file as BT.709, while ffmpeg would convert by BT.601: convert by BT.709 and tag the file.
TO_YUV = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"
EXACT = "bicubic+accurate_rnd+full_chroma_int"  # ffmpeg's quick conversion to RGB is up to 3 of 255 too dark
TO_RGB = f"scale=w=iw*sar:h=ih:flags={EXACT}"  # with square pixels
HDR = {b"arib-std-b67": "HLG", b"smpte2084": "PQ"}

Tag = Callable[[dict[str, Any]], dict[str, Any] | None]  # what the video file holds of a record


class Container(NamedTuple):
    """A kind of video file that is written."""

    muxer: str  # ffmpeg's name
    encode: tuple[str, ...]  # options of the pass that encodes
    complete: tuple[str, ...] = ()  # options of the pass that copies packets


# crf: x264's constant quality that the original reaches with imageio's quality 8. rc-lookahead: x264's own 40 frames
# would leave half of an 81-frame video to be encoded after the last frame; at this quality a longer look changes
# neither size nor error. threads: the output depends on it, so it is the same on every machine.
X264 = ("-c:v", "libx264", "-crf", "10", "-rc-lookahead", "8", "-threads", "8")
CONTAINERS = {".mp4": Container("mp4", X264, ("-movflags", "+faststart"))}
READ = (".mp4", ".mov", ".m4v", ".mkv", ".webm")
# Only these demuxers and protocols: a playlist under a video's name could open other files and addresses.
# A tag of any size would be held whole: at most this many bytes in one piece.
SAFE = ("-format_whitelist", "mov,matroska,webm", "-protocol_whitelist", "file,pipe", "-max_alloc", str(1 << 28))


def is_video(path: Path) -> bool:
    """True if the file name ends like that of a video that is read."""
    return path.suffix.lower() in (*READ, *CONTAINERS)


class VideoWriter:
    """Writes one video file: `write` chunks, then `finish`. Leaving the block without `finish` leaves no file. JobError
    if the encoder fails, dies or stalls, OSError from the file system."""

    def __init__(self, path: Path, fps: float, *, follows: bool = False) -> None:
        """follows: this clip continues another one, so decoding must be able to start at its second frame."""
        self.path, self.fps, self.follows = path, fps, follows
        self.frames = 0
        self.size: tuple[int, int] | None = None  # width, height; known from the first chunk
        self._encoded: Path | None = None
        self._encoder: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        self._feeder = ThreadPoolExecutor(1, "video encoder")
        self._waiting: deque[Future[Any]] = deque()  # chunks that the feeder has not written yet

    def write(self, chunk: torch.Tensor) -> None:
        """chunk: [3, t, H, W], as `rounded` takes it; returns once the frames are queued. JobError for NaN or Inf."""
        frames = to_bytes(chunk)
        count, height, width, _ = frames.shape
        if self._encoder is None:
            self._start(width, height)
        assert self._pipe is not None
        if self.size != (width, height):
            raise ValueError(f"frames of {width}x{height} in a video of {self.size}")
        self._wait_for(CHUNKS_WAITING - 1)
        self._waiting.append(self._feeder.submit(self._pipe.write, frames.data))
        self.frames += count

    def finish(self, record: dict[str, Any] | None, tag: Tag = dict) -> None:
        """Complete the video, with `tag(record)` in its comment tag and `record` beside it; then both files appear."""
        if self._encoder is None or self._pipe is None or self._encoded is None:
            raise JobError(f"{self.path}: no frames were decoded, so there is no video to save")
        self._waiting.append(self._feeder.submit(self._pipe.close))
        self._wait_for(0)
        with suppress(subprocess.TimeoutExpired):  # its input has ended; it still encodes the frames that it holds
            self._encoder.wait(STALL_SECONDS)
        if self._encoder.returncode != 0:
            raise self._failure()
        publish(self.path, ["-i", file_argument(self._encoded)], self.frames, record, tag)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._encoder is not None and self._pipe is not None:
                self._encoder.kill()
                self._encoder.wait()
                self._feeder.shutdown(cancel_futures=True)
                with suppress(OSError):  # the encoder was killed; its pipe may be broken
                    self._pipe.close()
            self._messages.close()
        finally:
            if self._encoded is not None:
                self._encoded.unlink(missing_ok=True)

    def _start(self, width: int, height: int) -> None:
        self.size = (width, height)
        container = CONTAINERS[self.path.suffix.lower()]
        pixels = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"  # 4:2:0 cannot hold odd sizes
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "pipe:0"]
        words = ["-vf", TO_YUV, *container.encode, "-pix_fmt", pixels]
        words += ["-force_key_frames", "expr:eq(n,1)"] if self.follows else []
        self._encoded = make_part(self.path)
        self._encoder = subprocess.Popen(
            [*ffmpeg_command(), *raw, *words, "-f", container.muxer, file_argument(self._encoded)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._messages,
            start_new_session=True,  # Ctrl-C is ours to handle: it must not stop the encoder first
        )  # fmt: skip
        self._pipe = self._encoder.stdin

    def _wait_for(self, most: int) -> None:
        """Wait until at most this many chunks are still to be written. JobError if the encoder takes them no more."""
        while len(self._waiting) > most:
            try:
                self._waiting.popleft().result(STALL_SECONDS)
            except (OSError, TimeoutError):
                raise self._failure() from None

    def _failure(self) -> JobError:
        """Why the encoder failed. It gets a second to end, so that its messages are complete."""
        assert self._encoder is not None
        reason = f"it took no frames for {STALL_SECONDS:.0f} s"
        with suppress(subprocess.TimeoutExpired):  # it still runs: the reason above holds
            reason = _how_it_ended(self._encoder.wait(1.0))
        self._messages.seek(0)
        return JobError(f"{self.path}: the video encoder failed: {reason}{messages(self._messages.read())}")


def publish(path: Path, source: Sequence[str], frames: int, record: dict[str, Any] | None, tag: Tag = dict) -> None:
    """The second pass: the packets of `source` (an input in ffmpeg's words), `frames` of them, become the video `path`,
    flushed to disk; `record` goes beside it as .json, and `tag(record)` into its comment tag. JobError, OSError; then
    neither file appears."""
    container = CONTAINERS[path.suffix.lower()]
    with ExitStack() as files:
        beside = None if record is None else files.enter_context(replacing(Beside.of(path).record))
        whole = files.enter_context(replacing(path))  # appears first: no record is without its video
        inside = None if record is None else tag(record)
        comment = "" if inside is None else json.dumps(inside, ensure_ascii=False)
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
        tags = ["-f", "ffmetadata", "-i", "pipe:0", "-map", "0:v", "-map_metadata", "1", "-c", "copy"]
        target = [*container.complete, "-f", container.muxer, file_argument(whole), "-progress", "pipe:1"]
        done = run_ffmpeg("-xerror", *source, *tags, *target, stdin=f";FFMETADATA1\ncomment={escaped}\n".encode())
        if done.returncode != 0:
            reason = _how_it_ended(done.returncode) + messages(done.stderr)
            raise JobError(f"{path}: the video could not be completed: {reason}")
        if (found := _frames_reported(done.stdout)) != frames:
            raise JobError(f"{path}: the encoder kept {found} of {frames} frames")
        if beside is not None:
            beside.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def rounded(pixels: torch.Tensor, source: object = "a video") -> torch.Tensor:
    """[-1, 1] -> uint8 of the same shape on the same device; uint8 comes back. JobError for NaN or Inf."""
    if not pixels.is_floating_point():
        return pixels
    if not pixels.isfinite().all():
        raise JobError(f"{source}: NaN or Inf in the decoded frames")
    return pixels.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).byte()


def to_bytes(chunk: torch.Tensor) -> numpy.ndarray:
    """[3, t, H, W], as `rounded` takes it -> uint8 [t, H, W, 3]. JobError for NaN or Inf."""
    return rounded(chunk).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run, from its .json or from the comment tag of its video. InputError if there is none."""
    is_record = f"a record is the .json or the {'/'.join(CONTAINERS)} that an earlier run wrote"
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; {is_record}")
        with path.open("rb") as file:
            record = parse_json(_read_comment(path) if is_video(path) else file.read(LONGEST_RECORD))
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except PermissionError:
        raise InputError(f"{path}: there is no permission to read it") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: holds no record of a run; {is_record}") from e
    return record


def _read_comment(path: Path) -> str:
    """JSON text of the comment tag. ValueError if there is none, or a longer one than any record's."""
    with suppress(ValueError):  # no MP4, or none that is whole
        return boxes.comment(path, LONGEST_RECORD)
    words = [*ffmpeg_command(), *video_input(path), "-f", "ffmetadata", "pipe:1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as reader:
        assert reader.stdout is not None
        text = reader.stdout.read(LONGEST_RECORD)
        if len(text) == LONGEST_RECORD:
            reader.kill()
    # a value runs to the first line end that no backslash precedes; possessive, as the rest takes no memory then
    comment = re.search(r"^comment=((?:[^\\\n]++|\\.)*+)", text.decode("utf-8"), re.M | re.S | re.I)
    if reader.returncode != 0 or comment is None:
        raise ValueError("no comment tag")
    return re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL)


def count_frames(path: Path) -> int:
    """Frames of a whole video; 0 if it cannot be read to its end. Packets are read, not decoded."""
    if not os.path.isfile(path):
        return 0
    with suppress(OSError, ValueError):  # no MP4, or none that is whole
        return boxes.count_frames(path)
    target = ["-map", "0:v", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-"]
    done = run_ffmpeg("-xerror", *video_input(path), *target)
    return _frames_reported(done.stdout) if done.returncode == 0 else 0


@cache
def describe_clip(path: Path, frames: int, fps: int) -> str:
    """The part of a clip that `read_clip` takes, for the plan. InputError for any other file, or too few frames."""
    words = ["-f", "null", "-loglevel", "info", "-progress", "pipe:1"]
    counted = run_ffmpeg(*_clip_words(path, frames + 1, f"fps={fps}", *words))
    if counted.returncode != 0 or not (found := _frames_reported(counted.stdout)):
        raise InputError(f"{path}: not a video that can be read ({', '.join(READ)} are)")
    if found < frames:
        fitting = f"--frame_num {(found - 1) // 4 * 4 + 1}"
        raise InputError(f"{path}: it has {found} frames at {fps} a second, and {frames} are needed; {fitting} fits")
    hdr = next((f", {name} colours unconverted" for tag, name in HDR.items() if tag in counted.stderr), "")
    return (f"the first {frames} frames of " if found > frames else "") + path.name + hdr


def read_clip(path: Path, frames: int, fps: int, size: tuple[int, int]) -> torch.Tensor:
    """All that `clip_frames` gives: float32 [3, F, H, W] in [-1, 1]."""
    import torch

    clip = torch.empty(3, frames, size[1], size[0])
    for number, frame in enumerate(clip_frames(path, frames, fps, size)):
        clip[:, number] = frame
    return clip


def clip_frames(path: Path, frames: int, fps: int, size: tuple[int, int]) -> Generator[torch.Tensor]:
    """The first `frames` frames at `fps`, scaled to cover `size` (width, height) and cropped at the centre, one by one.
    float32 [3, H, W] in [-1, 1]. InputError if they cannot be read."""
    import torch

    width, height = size
    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags={EXACT},crop={width}:{height}"
    words = _clip_words(path, frames, f"fps={fps},{TO_RGB},format=rgb24,{cover}", "-f", "rawvideo")
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [*ffmpeg_command(), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        ) as decoder,
    ):  # fmt: skip
        assert decoder.stdout is not None
        for _ in range(frames):
            if len(pixels := decoder.stdout.read(height * width * 3)) != height * width * 3:
                errors.seek(0)
                raise InputError(f"{path}: the video cannot be read{messages(errors.read())}")
            frame = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width, 3)
            yield frame.permute(2, 0, 1).float() / 127.5 - 1


def _clip_words(path: Path, frames: int, filters: str, *target: str) -> list[str]:
    return [*video_input(path), "-map", "0:v:0", "-vf", filters, "-frames:v", str(frames), *target, "-"]


def last_frame(path: Path, changes: list[str] | None = None) -> bytes:
    """The last frame of a whole video, as a PNG; notes for the plan go into `changes`. InputError for any other file.
    The video is decoded: one that was cut without encoding it again holds packets before its first frame."""
    decode = [*video_input(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    counted = run_ffmpeg("-loglevel", "info", "-xerror", *decode, "-f", "null", "-progress", "pipe:1", "-")
    if counted.returncode != 0 or not (frames := _frames_reported(counted.stdout)):
        raise InputError(f"{path}: not a whole video, so it has no last frame")
    picked = ["-vf", f"select='eq(n,{frames - 1})',{TO_RGB}", "-frames:v", "1", "-c:v", "png", "-f", "image2pipe", "-"]
    done = run_ffmpeg(*decode, *picked)
    if done.returncode != 0 or not done.stdout:
        raise InputError(f"{path}: its last frame cannot be read{messages(done.stderr)}")
    if changes is not None:
        hdr = next((f", {name} colours unconverted" for tag, name in HDR.items() if tag in counted.stderr), "")
        changes.append(f"the last frame of the video{hdr}")
    return done.stdout


# ffmpeg's command line and messages


def ffmpeg_command() -> list[str]:
    """First words of every command: quiet but for errors, overwriting (our output names are temporary)."""
    from imageio_ffmpeg import get_ffmpeg_exe

    return [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostats", "-y"]


def run_ffmpeg(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run one command in a session of its own, so that Ctrl-C does not reach it."""
    words = [*ffmpeg_command(), *arguments]
    return subprocess.run(words, input=stdin, capture_output=True, check=False, start_new_session=True)


def file_argument(path: Path) -> str:
    """The path for ffmpeg: bare, `-1.mp4` would be an option and `12:30.mp4` a network address."""
    return f"file:{path}"


def video_input(path: Path) -> list[str]:
    """A file of unknown origin as an input. InputError where there is none: a pipe would block."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such video file")
    return [*SAFE, "-i", file_argument(path)]


def _frames_reported(progress: bytes) -> int:
    return int((re.findall(rb"^frame=\s*(\d+)", progress, re.MULTILINE) or [b"0"])[-1])


def _how_it_ended(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"


def messages(stderr: bytes) -> str:
    """` (LINE; LINE)` with the different lines of ffmpeg's messages; empty if there are none."""
    text = re.sub(r"\[[^\]]* @ 0x\w+\]", "", stderr.decode("utf-8", "replace"))
    lines = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    return f" ({'; '.join(lines)[:300]})" if lines else ""


def check_encoder() -> None:
    """Encode one small frame and drop it. InputError if there is no ffmpeg, or one without H.264."""
    advice = "install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    frame = ["-f", "lavfi", "-i", "color=size=16x16", "-frames:v", "1"]
    try:
        done = run_ffmpeg(*frame, *X264, "-f", "null", "-")
    except (ImportError, RuntimeError, OSError) as e:
        raise InputError(f"no video encoder: ffmpeg cannot be run ({e}); {advice}") from e
    if done.returncode != 0:
        raise InputError(f"no video encoder: ffmpeg cannot encode H.264{messages(done.stderr)}; {advice}")
