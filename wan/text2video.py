"""Text to video with Wan2.2-T2V-A14B: the video starts from noise of the size asked for."""

from PIL import Image
from torch import Tensor

from wan.original_api import Original
from wan.pipeline import Pipeline, Start


class TextToVideo(Pipeline):
    """Wan2.2-T2V-A14B."""

    def start(
        self, image: Image.Image | None, size: tuple[int, int], frames: int, last_image: Image.Image | None = None
    ) -> Start:
        return Start(self.plan.config.latent_shape(size, frames))


class WanT2V(Original, TextToVideo):
    """The original's class."""

    task = "t2v-A14B"

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool = True,
    ) -> Tensor | None:
        """The original's call: float32 [3, F, H, W] in [-1, 1]; size (width, height), guide_scale (low, high noise)."""
        return self._generate(
            input_prompt, None, size, frame_num, shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed,
            offload_model,
        )  # fmt: skip
