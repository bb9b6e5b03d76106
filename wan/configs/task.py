"""Every fact of a task: a frozen dataclass, filled in once per task, with the original's attribute names.

Dtypes are torch dtypes or their names: this package imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCH = (1, 2, 2)  # frames, rows and columns of the latent in one token
TEXT_WIDTH, TIME_WIDTH = 4096, 256
TRAIN_TIMESTEPS = 1000
# Used for the unconditional pass when no negative prompt is given; part of the models.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One published task.

    experts: name -> folder in the released layout. vae_stride: (frames, rows, columns) of the video per latent element.
    boundary: the high-noise expert has the timesteps >= boundary * 1000; None for a single network.
    sizes: trained sizes, "width*height". sample_guide_scale: one number, or (low noise, high noise).
    image_fit: how an image becomes the first frame: "squeeze" to the video's size, scale and "crop", None: no image.
    mask_channels: channels beside an image's latent that say which frames are known.
    pipeline: diffusers' class for this task. public_class: ours, `module:name`.
    """

    name: str
    hub_id: str
    public_class: str
    pipeline: str
    # networks
    experts: Mapping[str, str]
    boundary: float | None
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    freq_dim: int = TIME_WIDTH
    text_dim: int = TEXT_WIDTH
    text_len: int = 512
    patch_size: tuple[int, int, int] = PATCH
    window_size: tuple[int, int] = (-1, -1)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    num_train_timesteps: int = TRAIN_TIMESTEPS
    param_dtype: Any = "bfloat16"
    t5_model: str = "umt5_xxl"
    t5_dtype: Any = "bfloat16"
    t5_checkpoint: str = "models_t5_umt5-xxl-enc-bf16.pth"
    t5_tokenizer: str = "google/umt5-xxl"
    vae_checkpoint: str
    vae_stride: tuple[int, int, int]
    # videos
    sizes: tuple[str, ...]
    frame_num: int
    sample_fps: int
    sample_solver: str = "unipc"
    sample_steps: int
    sample_shift: float
    sample_guide_scale: float | tuple[float, float]
    sample_neg_prompt: str = NEGATIVE_PROMPT
    image_fit: str | None = None
    mask_channels: int = 0
    example_prompt: str
    example_image: str | None = None

    @property
    def size_step(self) -> int:
        """A video's sides are multiples of this: the VAE's stride times the patch."""
        return self.vae_stride[1] * self.patch_size[1]

    def latent_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        """[C, f, h, w] of the latent of a video of `size` (width, height) and 4n + 1 frames."""
        time, rows, columns = self.vae_stride
        return self.out_dim, (frames - 1) // time + 1, size[1] // rows, size[0] // columns

    def sizes_by_name(self) -> dict[str, str]:
        """The trained sizes as `720p`, and upright `720p-portrait`."""
        names = {}
        for size in self.sizes:
            width, height = map(int, size.split("*"))
            name = f"{480 if min(width, height) == 480 else 720}p"  # the 5B model's 704 rows are sold as 720p
            names[name if width > height else f"{name}-portrait"] = size
        return names
