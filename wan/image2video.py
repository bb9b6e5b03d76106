"""Image to video with Wan2.2-I2V-A14B: the image's latent and a mask are channels beside the noise.

Shapes: h, w rows and columns of the latent, f its frames.
"""

import torch
from PIL import Image
from torch import Tensor

from wan.task import Start, VideoTask
from wan.utils.images import i2v_size, i2v_tensor

MASK_CHANNELS = 4  # one for each of the video frames that a latent frame covers


class WanI2V(VideoTask):
    """Wan2.2-I2V-A14B."""

    name = "i2v-A14B"

    @staticmethod
    def video_size(image: Image.Image | None, size: tuple[int, int]) -> tuple[int, int]:
        """The image's ratio and about `size`'s area."""
        assert image is not None, "image-to-video needs an image"
        return i2v_size(image.width, image.height, size[0] * size[1])

    def start(self, image: Image.Image | None, size: tuple[int, int], frames: int) -> Start:
        assert image is not None, "image-to-video needs an image"
        size = self.video_size(image, size)
        shape = self.latent_shape(size, frames)
        with self.progress.stage("image"), torch.no_grad():
            latent = self.vae.encode_first_frame(i2v_tensor(image, size).to(self.device), frames)
        mask = torch.zeros(MASK_CHANNELS, *shape[1:], device=self.device)
        mask[:, 0] = 1  # the first frame is known
        return Start(shape, channels=torch.cat([mask, latent]))

    def generate(
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:
        """The original's call: float32 [3, F, H, W] in [-1, 1]; guide_scale (low, high noise)."""
        return self._generate(
            input_prompt, img, (max_area, 1), frame_num, shift, sample_solver, sampling_steps, guide_scale, n_prompt,
            seed, offload_model,
        )  # fmt: skip
