"""Videos on disk: frames stream to an H.264 encoder while later ones are decoded; a file is whole or absent.

The encoder is the ffmpeg that imageio-ffmpeg brings. A first pass encodes, a second copies the packets and adds what
is known only at the end (the record, in the comment tag) and the index in front, so that browsers start at once.

Shapes: t frames of one chunk, H height, W width.
"""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from wan.utils.errors import InputError, JobError
from wan.utils.files import Beside, make_part, replacing
from wan.utils.strict_json import parse_json

if TYPE_CHECKING:
    import numpy
    import torch

CRF = 10  # x264's constant quality: what the original asks of imageio with quality 8
# Frames x264 looks ahead. Its own 40 would leave half of an 81-frame video to be encoded after the last one has come;
# at this quality looking further changes neither size nor error.
LOOKAHEAD = 8
THREADS = 8  # the frames that x264 writes depend on it: the same on every machine
CHUNKS_WAITING = 8  # how far decoding may run ahead of the encoder
RECORDS = "a record is the .json or the .mp4 that an earlier run wrote"
STALL_SECONDS = 600.0  # an encoder that takes nothing for so long is given up
SHEET_COLUMNS = 3  # of a contact sheet, and rows
SHEET_WIDTH = 320  # pixels of one picture at most
# Players read an untagged file as BT.709, while ffmpeg would convert by BT.601: do the one, and say so in the file.
TO_YUV = "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"


class VideoWriter:
    """Writes one mp4: `write` chunks, then `finish`. Leaving the block without `finish` leaves no file.

    Errors: JobError with one sentence if the encoder fails, dies or stalls, OSError from the file system.
    """

    def __init__(self, path: Path, fps: float, follows: bool = False) -> None:
        """follows: another video, so that the two may be joined: decoding can start at its second frame."""
        self.path = path
        self.fps = fps
        self.follows = follows
        self.frames = 0
        self.size: tuple[int, int] | None = None  # width, height; known from the first chunk
        self._encoded: Path | None = None
        self._encoder: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__ closes it
        self._waiting: queue.Queue[numpy.ndarray | None] = queue.Queue(CHUNKS_WAITING)
        self._feeder = threading.Thread(target=self._feed, name="video encoder", daemon=True)
        self._broken = threading.Event()

    def write(self, chunk: torch.Tensor) -> None:
        """chunk: float32 [3, t, H, W] in [-1, 1]; returns once the frames are queued."""
        frames = to_bytes(chunk)
        count, height, width, _ = frames.shape
        if self._encoder is None:
            self.size = (width, height)
            self._encoder = self._start(width, height)
            self._feeder.start()
        if self.size != (width, height):
            raise ValueError(f"frames of {width}x{height} in a video of {self.size}")
        self._put(frames)
        self.frames += count

    def finish(self, record: dict[str, Any] | None) -> None:
        """Complete the video and put `record`, if there is one, into its comment tag and, as .json, beside it. Then
        both appear."""
        if self._encoder is None:
            raise JobError(f"{self.path}: no frames were decoded, so there is no video to save")
        self._put(None)
        self._feeder.join(STALL_SECONDS)
        if self._feeder.is_alive() or self._broken.is_set():
            raise self._failure()
        with suppress(subprocess.TimeoutExpired):  # its input has ended: what is left is what it had buffered
            self._encoder.wait(STALL_SECONDS)
        if self._encoder.returncode != 0:
            raise self._failure()
        self._complete(record)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if self._encoder is not None:
                self._encoder.kill()
                self._encoder.wait()
                if self._feeder.is_alive():
                    self._waiting.put(None)
                    self._feeder.join()
            self._messages.close()
        finally:
            if self._encoded is not None:
                self._encoded.unlink(missing_ok=True)

    def _start(self, width: int, height: int) -> subprocess.Popen[bytes]:
        pixels = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"  # 4:2:0 cannot hold odd sizes
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "pipe:0"]
        h264 = ["-vf", TO_YUV, "-c:v", "libx264", "-crf", str(CRF), "-rc-lookahead", str(LOOKAHEAD)]
        h264 += ["-pix_fmt", pixels, "-threads", str(THREADS)]
        h264 += ["-force_key_frames", "expr:eq(n,1)"] if self.follows else []
        self._encoded = make_part(self.path)
        return subprocess.Popen(
            [*ffmpeg(), *raw, *h264, "-f", "mp4", local(self._encoded)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            start_new_session=True,  # Ctrl-C is ours to handle: it must not stop the encoder first
        )

    def _feed(self) -> None:
        """The background thread: queue -> encoder. Goes on emptying the queue after a failure, so that nobody waits."""
        assert self._encoder is not None
        pipe = self._encoder.stdin
        assert pipe is not None
        try:
            while (frames := self._waiting.get()) is not None:
                pipe.write(frames.data)
            pipe.close()
        except OSError:
            self._broken.set()
            with suppress(OSError):
                pipe.close()
            while frames is not None:
                frames = self._waiting.get()

    def _put(self, frames: numpy.ndarray | None) -> None:
        try:
            self._waiting.put(frames, timeout=STALL_SECONDS)
        except queue.Full:
            raise self._failure() from None
        if self._broken.is_set():
            raise self._failure()

    def _failure(self) -> JobError:
        """Why the encoder did not do its work. It has a second to end and leave its last words."""
        assert self._encoder is not None
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._encoder.wait(1.0)
        self._messages.seek(0)
        reason = f"it took no frames for {STALL_SECONDS:.0f} s" if code is None else how_it_ended(code)
        return JobError(f"{self.path}: the video encoder failed: {reason}{last_words(self._messages.read())}")

    def _complete(self, record: dict[str, Any] | None) -> None:
        assert self._encoded is not None
        publish(self.path, ["-i", local(self._encoded)], self.frames, record)


def publish(path: Path, source: Sequence[str], frames: int, record: dict[str, Any] | None) -> None:
    """The second pass: the packets of `source` (ffmpeg's words for an input) become the video `path`, all of it on the
    disk: with the index in front and `record`, if there is one, in its comment tag and, as .json, beside it.

    frames: how many there must be. JobError, OSError; then there is no file.
    """
    with ExitStack() as files:
        beside = None if record is None else files.enter_context(replacing(Beside.of(path).record))
        whole = files.enter_context(replacing(path))  # the first to be left: no record is without its video
        comment = "" if record is None else json.dumps(record, ensure_ascii=False)
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
        tags = f";FFMETADATA1\ncomment={escaped}\n".encode()
        inputs = [*source, "-f", "ffmetadata", "-i", "pipe:0"]
        target = ["-map_metadata", "1", "-c", "copy", "-movflags", "+faststart", "-f", "mp4", local(whole)]
        done = subprocess.run(
            [*ffmpeg(), "-xerror", *inputs, "-map", "0:v", *target, "-progress", "pipe:1"],
            input=tags,
            capture_output=True,
            check=False,
            start_new_session=True,
        )
        if done.returncode != 0:
            reason = how_it_ended(done.returncode) + last_words(done.stderr)
            raise JobError(f"{path}: the video could not be completed: {reason}")
        if (found := frames_reported(done.stdout)) != frames:
            raise JobError(f"{path}: the encoder kept {found} of {frames} frames")
        if beside is not None:
            beside.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def to_bytes(chunk: torch.Tensor) -> numpy.ndarray:
    """[3, t, H, W] in [-1, 1] -> uint8 [t, H, W, 3], rounded; done where the chunk lies, a quarter of it is copied."""
    import torch

    scaled = chunk.float().mul(127.5).add_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run, from its .json or from the comment tag of its .mp4. InputError if there is none."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; {RECORDS}")
        with path.open("rb") as file:
            record = parse_json(_read_comment(path) if path.suffix.lower() == ".mp4" else file.read())
    except PermissionError:
        raise InputError(f"{path}: there is no permission to read it") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: holds no record of a run; {RECORDS}") from e
    if not isinstance(record, dict):
        raise InputError(f"{path}: holds no record of a run; {RECORDS}")
    return record


def _read_comment(path: Path) -> str:
    found = _run("-i", local(path), "-f", "ffmetadata", "pipe:1")
    # a value runs to the first line end that no backslash precedes
    comment = re.search(r"^comment=((?:\\.|[^\\\n])*)", found.stdout.decode("utf-8"), re.MULTILINE | re.DOTALL)
    if found.returncode != 0 or comment is None:
        raise ValueError("no comment tag")
    return re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL)


def count_frames(path: Path) -> int:
    """Frames of a whole video; 0 if it cannot be read to its end. Packets are read, not decoded."""
    done = _run("-xerror", "-i", local(path), "-map", "0:v", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-")
    return frames_reported(done.stdout) if done.returncode == 0 else 0


def last_frame(path: Path) -> bytes:
    """The last frame of a whole video, as a PNG. InputError for any other file. The video is decoded to its end."""
    if not (frames := count_frames(path)):
        raise InputError(f"{path}: not a whole video, so it has no last frame")
    # ffmpeg's quick conversion to RGB comes out up to 2 of 255 too dark
    picked = f"select='eq(n,{frames - 1})',scale=flags=bicubic+accurate_rnd+full_chroma_int"
    done = _run(
        "-i", local(path), "-map", "0:v:0", "-vf", picked, "-frames:v", "1", "-c:v", "png", "-f", "image2pipe", "-"
    )
    if done.returncode != 0 or not done.stdout:
        raise InputError(f"{path}: its last frame cannot be read{last_words(done.stderr)}")
    return done.stdout


def save_contact_sheet(video: Path, frames: int) -> Path:
    """A PNG beside `video` with up to nine of its `frames`, evenly spaced, first and last among them."""
    count = min(SHEET_COLUMNS**2, frames)
    wanted = sorted({round(i * (frames - 1) / max(1, count - 1)) for i in range(count)})
    columns = min(SHEET_COLUMNS, count)
    select = "+".join(f"eq(n,{n})" for n in wanted)
    grid = f"tile={columns}x{-(-count // columns)}:nb_frames={count}:padding=4:margin=4"
    sheet = Beside.of(video).sheet
    with replacing(sheet) as part:
        picture = ["-frames:v", "1", "-c:v", "png", "-f", "image2", "-update", "1", local(part)]
        done = _run("-i", local(video), "-vf", f"select='{select}',scale='min({SHEET_WIDTH},iw)':-1,{grid}", *picture)
        if done.returncode != 0 or not part.stat().st_size:
            reason = how_it_ended(done.returncode) + last_words(done.stderr)
            raise JobError(f"{sheet}: the contact sheet of the saved video could not be made: {reason}")
    return sheet


def check_encoder() -> None:
    """Encode one small frame to nowhere. InputError if there is no ffmpeg, or one without H.264."""
    advice = "install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    try:
        frame = ["-f", "lavfi", "-i", "color=size=16x16", "-frames:v", "1"]
        done = _run(*frame, "-c:v", "libx264", "-f", "null", "-")
    except (ImportError, RuntimeError, OSError) as e:
        raise InputError(f"no video encoder: ffmpeg cannot be run ({e}); {advice}") from e
    if done.returncode != 0:
        raise InputError(f"no video encoder: ffmpeg cannot encode H.264{last_words(done.stderr)}; {advice}")


def ffmpeg() -> list[str]:
    """The start of every command: quiet but for errors, overwriting (names are temporary)."""
    from imageio_ffmpeg import get_ffmpeg_exe

    return [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostats", "-y"]


def local(path: Path) -> str:
    """The name as ffmpeg must get it: bare, `-1.mp4` would be an option and `12:30.mp4` an address."""
    return f"file:{path}"


def _run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*ffmpeg(), *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def frames_reported(progress: bytes) -> int:
    """The last frame count of `-progress` output."""
    return int((re.findall(rb"^frame=\s*(\d+)", progress, re.MULTILINE) or [b"0"])[-1])


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed by signal {-code}"


def last_words(stderr: bytes) -> str:
    """What an ffmpeg wrote before it failed, as the end of a sentence, without its tags such as `[mp4 @ 0x55f1]`."""
    text = re.sub(r"\[[^\]]* @ 0x\w+\]", "", stderr.decode("utf-8", "replace"))
    lines = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    return f" ({'; '.join(lines)[:300]})" if lines else ""
