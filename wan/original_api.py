"""The original's public call, on top of a pipeline: its constructor's and its `generate`'s arguments make a plan."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from wan.cli.checks import Check
from wan.cli.options import SOLVERS, Request, read_all
from wan.configs import TASKS, TaskConfig
from wan.distributed.launch import Runtime
from wan.jobs.job import Sampling
from wan.jobs.resolve import DRAWN_SEEDS
from wan.jobs.weights import both, check_choices, choose_weights, with_quality
from wan.media.images import video_size
from wan.offload.reader import as_dtype
from wan.pipeline import FINER, Pipeline, retry_smaller
from wan.planning.build import open_plan
from wan.planning.memory import plan_videos
from wan.sampling import Video
from wan.utils.accelerator import Accelerator, gpu_kind, gpus
from wan.utils.progress import Progress


class Original(Pipeline):
    """Base of the three public classes; each names its task and gives `generate` the original's arguments."""

    task: ClassVar[str]

    def __init__(
        self, config: TaskConfig | Mapping[str, Any], checkpoint_dir: str | Path, lora_dir: str | Path | None = None,
        device_id: int = 0, rank: int = 0, t5_fsdp: bool = False, dit_fsdp: bool = False, use_sp: bool = False,
        t5_cpu: bool = False, init_on_cpu: bool = True, convert_model_dtype: bool = False, *,
        device: torch.device | str | None = None, runtime: Runtime | None = None, progress: Progress | None = None,
        **more: object,
    ) -> None:  # fmt: skip
        """The original's arguments, then ours. InputError with all problems of arguments and files.
        config: one of WAN_CONFIGS, perhaps changed, or of TASKS. init_on_cpu: as `--offload_model`. use_sp: all
        processes make one video, of `runtime` or torch.distributed. more: options of the command line by name."""
        if not isinstance(config, TaskConfig):  # an entry of WAN_CONFIGS
            own = vars(TASKS[self.task])
            config = replace(TASKS[self.task], **{name: value for name, value in config.items() if name in own})
        runtime = runtime or (Runtime.joined() if use_sp or dit_fsdp or t5_fsdp else Runtime())
        check = Check()
        values = {
            "task": self.task, "ckpt_dir": str(checkpoint_dir), "lora_dir": lora_dir and str(lora_dir),
            "t5_fsdp": t5_fsdp, "dit_fsdp": dit_fsdp, "t5_cpu": t5_cpu, "offload_model": init_on_cpu,
            "convert_model_dtype": convert_model_dtype,
            "device": str(device or (f"{gpu_kind()}:{device_id}" if gpus() else "cpu")),
            "ulysses_size": runtime.team.size if use_sp else 1,
        }  # fmt: skip
        request = with_quality(Request(**read_all({**values, **more}, check.problems)), more)
        weights = choose_weights(request, config, Path(checkpoint_dir), check)
        mode = check.choice("lora_mode", request.lora_mode, ("merge", "adapter"))
        check.stop()
        weights = replace(weights, lora_mode=mode)
        dtypes = as_dtype(config.param_dtype), as_dtype(config.t5_dtype)
        plan = open_plan(request, config, weights, runtime, check, dtypes=dtypes)
        check.stop()
        super().__init__(plan, progress or Progress(quiet=True), runtime)

    def _generate(
        self, video: Video, solver: str, steps: int, shift: float, guidance: float | tuple[float, float], offload: bool
    ) -> Tensor | None:
        """The whole video, float32 [3, F, H, W] in [-1, 1]; with an image `video.size` counts as an area. None on all
        but the first of the processes that make it together. InputError for what the command line refuses."""
        config, check, team, (width, height) = self.plan.config, Check(), self.mesh.team, video.size
        if video.image is None:
            size = check.size("size", f"{width}*{height}", config.size_step)
        else:
            size = video_size(config, video.image.size, video.size)
        frame_num = check.frames("frame_num", video.frame_num)
        if video.last_image is not None:
            check.several("frame_num: a first and a last frame need", frame_num)
        solver = check.choice("sample_solver", solver, SOLVERS)
        count = int(check.number("sampling_steps", steps, 1, 1, 1000))
        sampling = Sampling(solver, count, check.number("shift", shift, 1.0, 0.01, 100), both(guidance))
        check_choices(self.plan.request, sampling, check)
        check.stop()
        seed = video.seed if video.seed >= 0 else team.broadcast(lambda: secrets.randbelow(DRAWN_SEEDS))
        negative = video.negative_prompt or config.sample_neg_prompt
        video = replace(video, negative_prompt=negative, size=size, frame_num=frame_num, seed=seed)
        self.offload = offload
        with Accelerator(self.plan.device).current():  # the caller's thread may be another one than made this object
            self.plan = plan_videos(self.plan, sampling, [video])
            latent = self.sample_or_retry(video)
            if offload:
                self.release_text_encoder()
            chunks = retry_smaller(
                self.progress, FINER, lambda finer: team.all_or_none(lambda: list(self.decode(latent, finer=finer)))
            )
            return torch.cat(chunks, dim=1) if chunks else None

    def sample_with(self, sampling: Sampling, video: Video, *, again: bool = False) -> Tensor:
        """Plan `video` with the steps of `sampling`; its final latent as from `sample`."""
        self.plan = plan_videos(self.plan, sampling, [video])
        return self.sample(video, again=again)
