"""Image to video with Wan2.2-I2V-A14B: the latent of the known frames and a mask are channels beside the noise.

Shapes: h, w rows and columns of the latent, f its frames; T, H, W frames, rows, columns of the video.
"""

import torch
from PIL import Image
from torch import Tensor

from wan.media.images import i2v_tensor
from wan.original_api import Original
from wan.pipeline import Start
from wan.sampling import Video


class WanI2V(Original):
    """Wan2.2-I2V-A14B, with the original's signatures."""

    task = "i2v-A14B"

    def start(self, video: Video) -> Start:
        assert video.image is not None, "image-to-video needs an image"
        facts, device = self.plan.video(video), self.plan.device
        with self.progress.stage("image"), torch.no_grad():
            first, vae, tiles = i2v_tensor(video.image, video.size), self.load_vae(), facts.encode_tiles
            if video.last_image is None:
                latent = vae.encode(first[:, None].to(device), tiles=tiles, frames=video.frame_num)
            else:  # stays on the CPU: the encoder takes it piece by piece
                clip = torch.zeros(3, video.frame_num, *first.shape[1:])
                clip[:, 0], clip[:, -1] = first, i2v_tensor(video.last_image, video.size)
                latent = vae.encode(clip, tiles=tiles)
        mask = torch.zeros(self.plan.config.mask_channels, *facts.latent[1:], device=device)
        mask[:, 0] = 1  # the first frame is known, and is a whole latent frame
        if video.last_image is not None:
            mask[-1, -1] = 1  # of the last latent frame's four video frames only the last
        return Start(channels=torch.cat([mask, latent]))

    def generate(
        self, input_prompt: str, img: Image.Image, max_area: int = 720 * 1280, frame_num: int = 81, shift: float = 5.0,
        sample_solver: str = "unipc", sampling_steps: int = 40, guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "", seed: int = -1, offload_model: bool = True, *, last_image: Image.Image | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The original's call: float32 [3, F, H, W] in [-1, 1]; guide_scale (low, high noise). last_image: the end."""
        video = Video(input_prompt, n_prompt, (max_area, 1), frame_num, seed, img, last_image)
        return self._generate(video, sample_solver, sampling_steps, shift, guide_scale, offload_model)
