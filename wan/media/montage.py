"""A table of videos as one video and one picture, and PSNR and SSIM between two videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from PIL import Image

from wan.media.images import write_text
from wan.media.video import VideoWriter, clip_frames, run_ffmpeg, to_bytes, video_input
from wan.utils.files import replacing

CELL = 320  # pixels across
BAND = 16  # above each video, for its label
METRICS = "[0:v]split[a][b];[1:v]split[c][d];[a][c]psnr;[b][d]ssim"


def compare(video: Path, reference: Path) -> str:
    """PSNR and SSIM of the frames by ffmpeg, in words; "" if the two cannot be compared."""
    inputs = [*video_input(video), *video_input(reference)]
    done = run_ffmpeg("-loglevel", "info", *inputs, "-lavfi", METRICS, "-f", "null", "-")
    psnr = re.search(rb"PSNR.* average:(inf|[\d.]+)", done.stderr)
    ssim = re.search(rb"SSIM.* All:([\d.]+)", done.stderr)
    if not psnr or not ssim:
        return ""
    return "equal" if psnr[1] == b"inf" else f"{float(psnr[1]):.1f} dB, SSIM {float(ssim[1]):.3f}"


def save_montage(
    cells: Sequence[Sequence[tuple[str, Path | None]]], size: tuple[int, int], frames: int, fps: float, target: Path
) -> None:
    """Write `cells` (rows of labels and whole videos) as the video `target`, and its middle frame as a PNG beside it.
    size: (width, height) of the videos. frames: of the shortest. InputError for one that cannot be read, JobError."""
    import torch
    from numpy import asarray

    width, height = CELL, max(2, round(CELL * size[1] / size[0] / 2) * 2)
    canvas = torch.full((3, 1, len(cells) * (height + BAND), len(cells[0]) * width), -1.0)  # of one frame
    with ExitStack() as opened:
        clips = []
        for down, row in enumerate(cells):
            for across, (label, path) in enumerate(row):
                band, top, left = Image.new("RGB", (width, BAND)), down * (height + BAND), across * width
                write_text(band, label, 0, 1)
                letters = torch.from_numpy(asarray(band).copy()).permute(2, 0, 1)
                canvas[:, 0, top : top + BAND, left : left + width] = letters / 127.5 - 1
                if path:
                    place = canvas[:, 0, top + BAND : top + BAND + height, left : left + width]
                    clip = clip_frames(path, frames, round(fps), (width, height))
                    clips.append((place, opened.enter_context(closing(clip))))
        video = opened.enter_context(VideoWriter(target, fps))
        for number in range(frames):
            for place, clip in clips:
                place.copy_(next(clip))
            video.write(canvas)
            if number == frames // 2:
                middle = to_bytes(canvas)[0]
        video.finish(None)
    with replacing(target.with_suffix(".png")) as part:
        Image.fromarray(middle).save(part, "PNG")
