"""generate.py on a CUDA runtime whose kernels do nothing: what each stage takes of the device, beside what was planned.

`python -m tests.rehearsal FLAGS` takes generate.py's flags; each process ends with a line of JSON. Files of weights
are opened but their data is not read (nothing depends on it there), unless REHEARSE_READS is set; everything else is
the program's own path.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import generate

if TYPE_CHECKING:
    from wan.offload.budget import Budget
    from wan.planning.plan import Plan, VideoPlan
    from wan.utils.progress import Progress


def rehearse(words: list[str]) -> dict[str, Any]:
    """{"code": exit code, "planned", "allocated", "reserved": the most bytes of this process's device, by stage}."""
    import torch

    import wan.pipeline
    import wan.planning.build
    from benchmarks.full_run import unread
    from wan.offload.reader import Source
    from wan.utils.progress import Progress

    plans: list[Plan] = []
    budgets: list[Budget | None] = []
    allocated: dict[str, int] = {}
    reserved: dict[str, int] = {}
    make_plan, plan_video, real_stage = wan.planning.build.make_plan, wan.pipeline.plan_video, Progress.stage

    def kept_plan(*given: Any) -> "Plan":
        plans.append(make_plan(*given))
        budgets.append(plans[-1].largest().budget if plans[-1].videos else None)
        return plans[-1]

    def kept_video(*given: Any) -> "VideoPlan":
        video = plan_video(*given)
        budgets.append(video.budget)
        return video

    @contextmanager
    def stage(progress: "Progress", name: str, *extent: Any, **more: Any) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        with real_stage(progress, name, *extent, **more):
            yield
        allocated[name] = max(allocated.get(name, 0), torch.cuda.max_memory_allocated())
        reserved[name] = max(reserved.get(name, 0), torch.cuda.max_memory_reserved())

    wan.planning.build.make_plan, wan.pipeline.plan_video = kept_plan, kept_video
    Progress.stage = stage  # type: ignore[method-assign, assignment]
    if not os.environ.get("REHEARSE_READS"):
        Source.read = unread  # type: ignore[method-assign]
    code = generate.main(words)
    assert len(plans) == 1
    budget = budgets[-1]  # made anew for the memory that is free when the video begins
    return {
        "code": code, "planned": budget.peaks if budget else {}, "tiles": budget.tiles if budget else None,
        "allocated": allocated, "reserved": reserved,
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(rehearse(sys.argv[1:]))}\n")  # at once: other processes write, too
