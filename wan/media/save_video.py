"""`save_video` and `merge_video_audio` under the original's signatures.

Shapes: B videos side by side, T frames, H, W rows and columns of one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from wan.media.ffmpeg import CONTAINERS, file_argument, messages, run_ffmpeg
from wan.media.video import VideoWriter
from wan.utils.errors import JobError
from wan.utils.files import replacing

BORDER = 2  # pixels around each of several videos


def save_video(
    tensor: Tensor,
    save_file: str | Path | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
) -> str:
    """Write `tensor` [B, 3, T, H, W] as one file with `nrow` videos in a row; return its path.

    normalize: `value_range` becomes black to white; otherwise 0 to 1 does. save_file: None makes a temporary file with
    that suffix. Unlike the original's, it raises: JobError if the encoder fails, OSError from the file system.
    """
    if save_file is None:
        handle, save_file = tempfile.mkstemp(suffix)
        os.close(handle)
    low, high = value_range
    videos = tensor.float().clamp(low, high)
    if not normalize:
        low, high = 0.0, 1.0
    # this form leaves values of [-1, 1] as they are, to the bit
    videos = videos * (2 / (high - low)) - (high + low) / (high - low)
    path = Path(save_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps) as writer:
        writer.write(_grid(videos, nrow) if len(videos) > 1 else videos[0])
        writer.finish(None)
    return str(path)


def merge_video_audio(video_path: str | Path, audio_path: str | Path) -> None:
    """Add the sound of `audio_path` to the video, which is replaced; the shorter one ends both. JobError, OSError."""
    video = Path(video_path)
    with replacing(video) as part:
        sources = ["-i", file_argument(video), "-i", file_argument(Path(audio_path)), "-map", "0:v:0", "-map", "1:a:0"]
        target = ["-c:v", "copy", "-c:a", "aac", "-shortest", "-f", CONTAINERS[video.suffix.lower()].muxer]
        done = run_ffmpeg(*sources, *target, file_argument(part))
        if done.returncode != 0:
            raise JobError(f"{video}: the sound of {audio_path} could not be added{messages(done.stderr)}")


def _grid(videos: Tensor, columns: int) -> Tensor:
    """[B, 3, T, H, W] -> [3, T, rows, columns]: a grid with black borders."""
    columns = min(columns, len(videos))
    framed = pad(videos, (BORDER, 0, BORDER, 0), value=-1.0)
    blanks = framed.new_full((-len(videos) % columns, *framed.shape[1:]), -1.0)
    grid = rearrange(torch.cat([framed, blanks]), "(r c) k t h w -> k t (r h) (c w)", c=columns)
    return pad(grid, (0, BORDER, 0, BORDER), value=-1.0)
