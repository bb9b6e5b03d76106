"""Layouts, their limits and costs: legal sizes by name, and the formulas of the plan against counted bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.communication import count, model_of
from tests.distributed.ranks import mesh_of, run_ranks, sharded
from wan.cli.options import Request
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Layout, device_problems, layout_problems
from wan.doctor.forecast import released_plan
from wan.doctor.machine import Machine
from wan.jobs.job import Job
from wan.planning.build import flag_conflicts
from wan.planning.memory import plan_video
from wan.planning.plan import video_kind
from wan.planning.report import process_lines
from wan.planning.time_estimate import NetworkSizes, sent_bytes

A14B = NetworkSizes(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
SMALL = NetworkSizes(dim=64, ffn_dim=96, num_heads=8, num_layers=3)


@pytest.mark.parametrize(
    ("layout", "heads", "sharded", "expected"),
    [
        (Layout(8, 8), 40, True, ""),
        (Layout(8, 4), 40, False, ""),
        (Layout(8, 1), 40, False, ""),
        (Layout(16, 8, 2), 40, True, ""),
        (Layout(6, 3), 24, True, ""),
        (Layout(8, 3), 40, False, "--ulysses_size 3: must divide the 8 processes and the model's 40 heads; "
            "legal: 1, 2, 4, 8"),
        (Layout(6, 6), 40, False, "--ulysses_size 6: must divide the 6 processes and the model's 40 heads; "
            "legal: 1, 2"),
        (Layout(16, 16), 40, False, "--ulysses_size 16: must divide the 16 processes and the model's 40 heads; "
            "legal: 1, 2, 4, 8"),
        (Layout(8, 8, 2), 40, False, "--ulysses_size 8: must divide the 8 processes / --ring_size 2 and the model's "
            "40 heads; legal: 1, 2, 4"),
        (Layout(8, 1, 3), 40, False, "--ring_size 3: must divide the 8 processes; legal here: 1, 2, 4, 8"),
        (Layout(8, 1), 40, True, "--dit_fsdp and --t5_fsdp shard over the processes that share a video; here each "
            "works alone: --ulysses_size 8"),
        (Layout(7, 1), 40, True, "--dit_fsdp and --t5_fsdp shard over the processes that share a video; here each "
            "works alone: --ring_size 7"),
    ],
)  # fmt: skip
def test_legal_layouts(layout: Layout, heads: int, sharded: bool, expected: str) -> None:
    assert "; ".join(layout_problems(layout, heads, sharded)) == expected


def test_every_divisor_of_the_heads_is_legal() -> None:
    for heads, sizes in ((40, [1, 2, 4, 5, 8, 10, 20, 40]), (24, [1, 2, 3, 4, 6, 8, 12, 24])):
        assert [n for n in range(1, 121) if not layout_problems(Layout(120, n), heads, False)] == sizes


@pytest.mark.parametrize(
    ("device", "processes", "uses_gpus", "expected"),
    [
        ("cpu", 4, False, ""),
        ("mps", 1, False, ""),
        ("cuda", 4, True, ""),
        ("mps", 4, False, "--device mps: serves one process, not 4; use --device cpu"),
        ("cuda", 4, False, "more processes than GPUs on this machine: use --nproc-per-node"),
    ],
)
def test_devices_of_several_processes(device: str, processes: int, uses_gpus: bool, expected: str) -> None:
    found = device_problems(Layout(processes), torch.device(device), uses_gpus)
    assert len(found) == bool(expected)
    assert expected in "".join(found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ""),
        ({"ring_size": 2, "attention": "sdpa", "t5_fsdp": True, "dit_fsdp": True}, ""),
        ({"ring_size": 2, "attention": "flash3"}, "--attention flash3: a ring"),
        ({"t5_fsdp": True, "t5_cpu": True}, "--t5_fsdp and --t5_cpu exclude each other"),
        ({"dit_fsdp": True, "quantize": "fp8"}, "--quantize fp8: FSDP"),
        ({"dit_fsdp": True, "quantize": "int8"}, "--quantize int8: FSDP"),
        ({"ring_size": 2, "attention": "sage"}, "--attention sage: a ring"),
        ({"ring_size": 2, "quantize": "fp8"}, ""),
        ({"dit_fsdp": True, "lora_mode": "adapter"}, "with --dit_fsdp use --lora_mode merge"),
    ],
)
def test_settings_that_exclude_each_other(given: dict, expected: str) -> None:
    found = flag_conflicts(Request(**given), given.get("lora_mode", "merge"))
    assert len(found) == bool(expected)
    assert expected in "".join(found)


def places(runtime: Runtime) -> tuple[int, int, int, list[int]]:
    mesh = mesh_of(runtime, ulysses=1, ring=2)
    return mesh.data_rank, mesh.ring_rank, mesh.team.rank, list(range(5))[mesh.data_rank :: mesh.layout.data]


def test_neighbouring_ranks_share_a_video_and_jobs_are_dealt_out() -> None:
    assert run_ranks(places, 4) == [(0, 0, 0, [0, 2, 4]), (0, 1, 1, [0, 2, 4]), (1, 0, 0, [1, 3]), (1, 1, 1, [1, 3])]


def counts_of_a_rank(runtime: Runtime, layout: Layout, file: Path | None) -> list[dict[str, int]]:
    return [count(layout, runtime.team.rank, SMALL, tokens, file) for tokens in TOKENS]


TOKENS = [64, 61]


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(4, 2), Layout(4, 2, 2)])
def test_bytes_sent_are_the_formulas(layout: Layout) -> None:
    counts = run_ranks(counts_of_a_rank, layout.world, layout, None)
    for index, tokens in enumerate(TOKENS):
        for purpose, size in sent_bytes(layout, SMALL, tokens, element_bytes=2).items():
            counted = max(rank[index][purpose] for rank in counts)
            assert size * (0.9 if purpose == "ring" else 1) <= counted <= size  # no padding goes round a ring


@sharded
def test_bytes_of_sharded_weights(tmp_path: Path) -> None:
    file, model = tmp_path / "model.safetensors", model_of(SMALL).to(torch.bfloat16)
    save_file({name: torch.zeros_like(p) for name, p in model.named_parameters()}, file)
    size = sum(p.nbytes for p in model.parameters())
    counts = run_ranks(counts_of_a_rank, 4, Layout(4, 4), file)
    formula = sent_bytes(Layout(4, 4), SMALL, 64, 2, size)["weights"]
    assert formula <= max(rank[0]["weights"] for rank in counts) < 1.1 * formula  # more: shares are rounded up


def test_plan_of_the_released_model() -> None:
    plan = released_plan("t2v-A14B", True, 10**12, Machine(torch.device("cpu"), Path(), Path()))
    size = (1280, 720)
    jobs = tuple(Job(n, "a", "a", "", None, size, size, 81, n, Path(f"{n}.mp4"), "p") for n in range(5))
    plan = replace(plan, jobs=jobs, dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    plan = replace(plan, videos={video_kind(jobs[0]): plan_video(plan, size, 81)})
    request = replace(plan.request, dit_fsdp=True, convert_model_dtype=True)
    held, sent = process_lines(replace(plan, layout=Layout(8, 8), request=request))
    assert held == (
        "8 processes = data 1 x ulysses 8: one video at a time, 8 processes each; weights in each: high expert 3.57 GB "
        "+ low expert 3.57 GB + text encoder 11.4 GB + VAE 508 MB"
    )
    assert sent == "a forward sends from each: ulysses 13.5 GB + weights 25 GB"
    assert A14B.operations(75_600) == pytest.approx(6.5e15, rel=0.01)
    first, warning = process_lines(replace(plan, layout=Layout(8)))
    assert first.startswith("8 processes = data 8 x ulysses 1: 8 videos at a time, 1 process each; weights in each: ")
    assert warning == (
        "warning: 5 videos for 8 groups: some have nothing to do; --ulysses_size 8 puts more of them on one video"
    )
