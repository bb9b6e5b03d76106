"""The original's `save_video`, `merge_video_audio` and `str2bool`, for scripts written for it."""

from wan.cli.options import truth as str2bool
from wan.media.video import merge_video_audio, save_video

__all__ = ["merge_video_audio", "save_video", "str2bool"]
