"""The original's `save_video`, `merge_video_audio` and `str2bool`, for scripts written for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from wan.cli.options import truth as str2bool
from wan.media.video import CONTAINERS, VideoWriter, file_argument, messages, run_ffmpeg
from wan.utils.errors import JobError
from wan.utils.files import replacing

__all__ = ["merge_video_audio", "save_video", "str2bool"]
BORDER = 2  # pixels around each of several videos


def save_video(
    tensor: torch.Tensor,
    save_file: str | Path | None = None,
    fps: float = 30,
    suffix: str = ".mp4",
    nrow: int = 8,
    normalize: bool = True,
    value_range: tuple[float, float] = (-1, 1),
) -> str:
    """Write `tensor` [B, 3, T, H, W] as one file with `nrow` videos in a row; return its path. JobError, OSError.
    normalize: `value_range` becomes black to white; otherwise 0 to 1 does. save_file: None makes a temporary file."""
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


def _grid(videos: torch.Tensor, columns: int) -> torch.Tensor:
    """[B, 3, T, H, W] -> [3, T, rows, columns]: a grid with black borders."""
    (count, channels, frames, height, width), columns = videos.shape, min(columns, len(videos))
    down, right = height + BORDER, width + BORDER
    grid = videos.new_full((channels, frames, -(-count // columns) * down + BORDER, columns * right + BORDER), -1.0)
    for index, video in enumerate(videos):
        top, left = BORDER + index // columns * down, BORDER + index % columns * right
        grid[:, :, top : top + height, left : left + width] = video
    return grid


def merge_video_audio(video_path: str | Path, audio_path: str | Path) -> None:
    """Add the sound of `audio_path` to the video, which is replaced; the shorter one ends both. JobError, OSError."""
    video = Path(video_path)
    with replacing(video) as part:
        sources = ["-i", file_argument(video), "-i", file_argument(Path(audio_path)), "-map", "0:v:0", "-map", "1:a:0"]
        target = ["-c:v", "copy", "-c:a", "aac", "-shortest", "-f", CONTAINERS[video.suffix.lower()].muxer]
        done = run_ffmpeg(*sources, *target, file_argument(part))
        if done.returncode != 0:
            raise JobError(f"{video}: the sound of {audio_path} could not be added{messages(done.stderr)}")
