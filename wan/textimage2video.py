"""Text and image to video with Wan2.2-TI2V-5B: an image is pinned, clean, as the first latent frame."""

import torch
from PIL import Image
from torch import Tensor

from wan.media.images import ti2v_tensor
from wan.original_api import Original
from wan.pipeline import Start
from wan.sampling import Video


class WanTI2V(Original):
    """Wan2.2-TI2V-5B, with the original's signatures."""

    task = "ti2v-5B"

    def start(self, video: Video) -> Start:
        if video.image is None:
            return Start(video=self.encode_video(video))
        with self.progress.stage("image"), torch.no_grad():
            frame = ti2v_tensor(video.image, video.size)[:, None].to(self.plan.device)
            tiles = self.plan.video(video).encode_tiles
            return Start(first_frame=self.load_vae().encode(frame, tiles=tiles))

    def generate(
        self, input_prompt: str, img: Image.Image | None = None, size: tuple[int, int] = (1280, 704),
        max_area: int = 704 * 1280, frame_num: int = 81, shift: float = 5.0, sample_solver: str = "unipc",
        sampling_steps: int = 50, guide_scale: float = 5.0, n_prompt: str = "", seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """The original's call: float32 [3, F, H, W] in [-1, 1]; size without, max_area with an image."""
        video = Video(input_prompt, n_prompt, (max_area, 1) if img else size, frame_num, seed, img)
        return self._generate(video, sample_solver, sampling_steps, shift, guide_scale, offload_model)
