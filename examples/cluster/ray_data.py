"""A prompt file over a Ray cluster, an actor a GPU: each loads the models once and makes one video after the other.

    pip install "wan-lightning[cluster]"
    python examples/cluster/ray_data.py --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B --prompt_file FILE --save_dir DIR

The flags are generate.py's; code, weights and --save_dir lie where all machines see them. Started again it makes what
is missing. An actor that dies costs the video that it was making: Ray gives it to another one.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
import ray.data

from wan.cli.parser import parse
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.planning.build import make_plan
from wan.planning.plan import Plan
from wan.runner.batch import jobs_to_do, open_pipeline
from wan.runner.video_job import make_video, reason
from wan.utils.progress import Progress


class Maker:
    """The models on one GPU, and the videos that are made with them."""

    def __init__(self, words: list[str]) -> None:
        plan = plan_of(words)
        self.pipe = open_pipeline(plan, Progress(quiet=True), Runtime())
        self.pipe.encode(text for job in plan.jobs for text in self.pipe.texts(job))
        self.pipe.release_text_encoder()
        self.pipe.load_networks()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = self.pipe.plan.jobs[row["job"]]
        try:
            make_video(self.pipe, job, {}, again=True)
        except Exception as error:  # noqa: BLE001 - the others go on
            return {"file": str(job.save_file), "failed": reason(error)}
        return {"file": str(job.save_file), "failed": ""}


def plan_of(words: list[str]) -> Plan:
    given, problems = parse(words)
    outcome = resolve({**given, "resume": True, "shard": "1/1"}, problems)
    if not isinstance(outcome, Generate) or outcome.extend or outcome.request.chain:
        raise SystemExit("this example makes videos of a prompt file; extend prompts and chain them with generate.py")
    return make_plan(outcome, Runtime())


def main(words: list[str]) -> int:
    plan = plan_of(words)
    rows = [{"job": job.index} for job in jobs_to_do(plan, Progress())[0]]
    if not rows:
        return 0
    ray.init(ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = min(len(rows), gpus or int(ray.cluster_resources()["CPU"]))
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Maker,
        fn_constructor_args=([*words, "--base_seed", str(plan.request.base_seed)],),  # one that was drawn holds for all
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
        max_restarts=3,
        max_task_retries=3,
    )
    failed = 0
    for row in made.iter_rows():
        print(f"failed: {row['file']}: {row['failed']}" if row["failed"] else f"saved {row['file']}", flush=True)
        failed += bool(row["failed"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
