"""Text and image to video with Wan2.2-TI2V-5B: an image is pinned, clean, as the first latent frame."""

import torch
from PIL import Image
from torch import Tensor

from wan.media.images import ti2v_tensor
from wan.original_api import Original
from wan.pipeline import Pipeline, Start


class TextImageToVideo(Pipeline):
    """Wan2.2-TI2V-5B."""

    def start(
        self, image: Image.Image | None, size: tuple[int, int], frames: int, last_image: Image.Image | None = None
    ) -> Start:
        shape = self.plan.config.latent_shape(size, frames)
        if image is None:
            return Start(shape)
        with self.progress.stage("image"), torch.no_grad():
            first_frame = self.load_vae().encode(ti2v_tensor(image, size)[:, None].to(self.plan.device))
        return Start(shape, first_frame=first_frame)


class WanTI2V(Original, TextImageToVideo):
    """The original's class."""

    task = "ti2v-5B"

    def generate(
        self,
        input_prompt: str,
        img: Image.Image | None = None,
        size: tuple[int, int] = (1280, 704),
        max_area: int = 704 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:
        """The original's call: float32 [3, F, H, W] in [-1, 1]; size without, max_area with an image."""
        return self._generate(
            input_prompt, img, (max_area, 1) if img else size, frame_num, shift, sample_solver, sampling_steps,
            guide_scale, n_prompt, seed, offload_model,
        )  # fmt: skip
