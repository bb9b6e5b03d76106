"""Text to video with Wan2.2-T2V-A14B: the video starts from noise, or from a clip with noise added."""

from torch import Tensor

from wan.original_api import Original
from wan.pipeline import Start
from wan.sampling import Video


class WanT2V(Original):
    """Wan2.2-T2V-A14B, with the original's signatures."""

    task = "t2v-A14B"

    def start(self, video: Video) -> Start:
        return Start(video=self.encode_video(video))

    def generate(
        self, input_prompt: str, size: tuple[int, int] = (1280, 720), frame_num: int = 81, shift: float = 5.0,
        sample_solver: str = "unipc", sampling_steps: int = 50, guide_scale: float | tuple[float, float] = 5.0,
        n_prompt: str = "", seed: int = -1, offload_model: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """The original's call: float32 [3, F, H, W] in [-1, 1]; size (width, height), guide_scale (low, high noise)."""
        video = Video(input_prompt, n_prompt, size, frame_num, seed)
        return self._generate(video, sample_solver, sampling_steps, shift, guide_scale, offload_model)
