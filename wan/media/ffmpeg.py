"""The ffmpeg that imageio-ffmpeg brings: the kinds of files it writes and reads for us, and why a call failed."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from wan.utils.errors import InputError

CRF = 10  # x264's constant quality: the value that the original reaches with imageio's quality 8
# Frames x264 looks ahead. Its own 40 would leave half of an 81-frame video to be encoded after the last frame;
# at this quality a longer look changes neither size nor error.
LOOKAHEAD = 8
THREADS = 8  # x264's output depends on it: the same on every machine


class Container(NamedTuple):
    """A kind of video file that is written.

    muxer: ffmpeg's name for it. encode: options of the pass that encodes; complete: of the pass that copies packets.
    """

    muxer: str
    encode: tuple[str, ...]
    complete: tuple[str, ...] = ()


X264 = ("-c:v", "libx264", "-crf", str(CRF), "-rc-lookahead", str(LOOKAHEAD), "-threads", str(THREADS))
CONTAINERS = {".mp4": Container("mp4", X264, ("-movflags", "+faststart"))}
READ = (".mp4", ".mov", ".m4v", ".mkv", ".webm")
# Only these demuxers and protocols: a playlist under a video's name could open other files and addresses.
SAFE = ("-format_whitelist", "mov,matroska,webm", "-protocol_whitelist", "file,pipe")


def is_video(path: Path) -> bool:
    """True if the file name ends like that of a video that is read."""
    return path.suffix.lower() in (*READ, *CONTAINERS)


def video_input(path: Path) -> list[str]:
    """The words that make a file of unknown origin an input."""
    return [*SAFE, "-i", file_argument(path)]


def ffmpeg_command() -> list[str]:
    """First words of every command: quiet but for errors, overwriting (our output names are temporary)."""
    from imageio_ffmpeg import get_ffmpeg_exe

    return [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostats", "-y"]


def run_ffmpeg(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run one command in a session of its own, so that Ctrl-C does not reach it."""
    return subprocess.run(
        [*ffmpeg_command(), *arguments], input=stdin, capture_output=True, check=False, start_new_session=True
    )


def file_argument(path: Path) -> str:
    """The path in the form that ffmpeg takes: bare, `-1.mp4` would be an option and `12:30.mp4` a network address."""
    return f"file:{path}"


def frames_reported(progress: bytes) -> int:
    """The last frame count in the output of `-progress`."""
    return int((re.findall(rb"^frame=\s*(\d+)", progress, re.MULTILINE) or [b"0"])[-1])


def how_it_ended(code: int) -> str:
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
