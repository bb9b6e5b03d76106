"""generate.py on a CUDA runtime whose kernels do nothing: what each stage takes of the device, beside what was planned.

`python -m tests.rehearsal FLAGS` takes generate.py's flags; each process ends with a line of JSON. Files of weights
are opened but their data is not read (nothing depends on it there); everything else is the program's own path.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import generate

if TYPE_CHECKING:
    from wan.planning.plan import Plan
    from wan.utils.progress import Progress


def rehearse(words: list[str]) -> dict[str, Any]:
    """{"code": exit code, "planned", "allocated", "reserved": the most bytes of this process's device, by stage}."""
    import torch

    import wan.planning.build
    from benchmarks.full_run import unread
    from wan.offload.reader import Source
    from wan.utils.progress import Progress

    plans: list[Plan] = []
    allocated: dict[str, int] = {}
    reserved: dict[str, int] = {}
    make_plan, real_stage = wan.planning.build.make_plan, Progress.stage

    def kept_plan(*given: Any) -> "Plan":
        plans.append(make_plan(*given))
        return plans[-1]

    @contextmanager
    def stage(progress: "Progress", name: str, *extent: Any, **more: Any) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        with real_stage(progress, name, *extent, **more):
            yield
        allocated[name] = max(allocated.get(name, 0), torch.cuda.max_memory_allocated())
        reserved[name] = max(reserved.get(name, 0), torch.cuda.max_memory_reserved())

    wan.planning.build.make_plan, Source.read, Progress.stage = kept_plan, unread, stage  # type: ignore[method-assign, assignment]
    code = generate.main(words)
    (plan,) = plans
    budget = plan.largest().budget
    return {
        "code": code, "planned": budget.peaks if budget else {}, "tiles": budget.tiles if budget else None,
        "allocated": allocated, "reserved": reserved,
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps(rehearse(sys.argv[1:]))}\n")  # at once: other processes write, too
