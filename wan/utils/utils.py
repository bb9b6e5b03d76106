"""The original's `save_video` and `str2bool`, for scripts written for it."""

from wan.cli.values import truth as str2bool
from wan.media.save_video import save_video

__all__ = ["save_video", "str2bool"]
