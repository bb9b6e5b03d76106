"""Videos longer than a clip, sampled in windows: where these are, how they are blended, and what hangs on the flag."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import generate
from tests.distributed.ranks import run_ranks
from tests.support import TINY, checkpoint, command, lora_dir, open_task, relative_error
from wan.cli.options import Request
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate, Sampling, prompts_by_window, windows_of
from wan.jobs.resolve import resolve
from wan.modules.model import Prompt
from wan.original_api import Original
from wan.planning.build import make_plan
from wan.planning.memory import plan_video, plan_videos
from wan.planning.report import Outlook
from wan.planning.time_estimate import work_of
from wan.sampling import Step, Video, Windows
from wan.utils.errors import InputError

FOUR = Sampling("euler", 4, 5.0, (1.0, 1.0))
GUIDED = Sampling("euler", 4, 5.0, (3.0, 3.0))


@pytest.mark.parametrize(
    ("frames", "window", "found"),
    [
        (81, 81, []),
        (49, 81, []),
        (85, 81, [(0, 21), (1, 22)]),
        (145, 81, [(0, 21), (16, 37)]),
        (161, 81, [(0, 21), (10, 31), (20, 41)]),
        (273, 81, [(0, 21), (16, 37), (32, 53), (48, 69)]),
        (13, 9, [(0, 3), (1, 4)]),
        (161, "81,4", [(0, 21), (20, 41)]),
        (161, "81,40", [(0, 21), (10, 31), (20, 41)]),
        (161, "81,48", [(0, 21), (7, 28), (13, 34), (20, 41)]),
    ],
)
def test_where_windows_are(frames: int, window: int | str, found: list[tuple[int, int]]) -> None:
    assert windows_of(frames, Request(window=str(window)).windows) == found
    assert windows_of(frames, None) == []


def test_every_frame_is_in_a_window_and_neighbours_share_a_quarter() -> None:
    for window in (5, 9, 49, 81, 121):
        size = window // 4 + 1
        for frames in range(window + 4, 8 * window, 4):
            found = windows_of(frames, Request(window=str(window)).windows)
            assert (found[0][0], found[-1][1]) == (0, frames // 4 + 1)
            assert all(end - first == size for first, end in found)
            assert all(one[1] - two[0] >= max(1, size // 4) for one, two in pairwise(found))


def test_prompts_are_shared_out_evenly() -> None:
    assert prompts_by_window("a | b", 0) == ["a | b"]
    assert prompts_by_window("a | b", 4) == ["a", "a", "b", "b"]
    assert prompts_by_window("a|b|c", 3) == ["a", "b", "c"]
    assert prompts_by_window("a", 3) == ["a", "a", "a"]


def test_windows_are_blended_by_weights_that_fall_linearly() -> None:
    """A model that answers each window with its number: the blend shows the weights."""
    texts = [Prompt(torch.full((1, 1), float(n))) for n in range(2)]
    windows = [(0, 6, texts[0]), (3, 9, texts[1])]

    class Numbers:
        def ready(self, *_: object) -> Any:
            return lambda latent, _, prompts, __: torch.stack([latent * 0 + prompt.rows for prompt in prompts])

    latent = torch.randn(2, 9, 2, 2)
    found = Windows(Numbers(), windows).ready("high", 1.0)(latent, 500.0, texts[0], 0)
    assert found.shape == latent.shape
    want = torch.tensor([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert torch.allclose(found, want[None, :, None, None].expand_as(found))


def test_keys_and_values_are_kept_between_windows_of_one_prompt() -> None:
    layer, texts = nn.Identity(), [Prompt(torch.full((1, 1), float(n))) for n in range(2)]
    made: list[float] = []

    def network(latent: Tensor, _: float, prompts: list[Prompt], __: int) -> Tensor:
        for prompt in prompts:
            prompt.once(layer, lambda prompt=prompt: made.append(prompt.rows.item()))
        assert sum(len(text._made) for text in texts) == 1
        return latent[None]

    class Same:
        def ready(self, *_: object) -> Any:
            return network

    for order, expected in (((0, 0, 1), [0, 1] * 2), ((0, 0, 0), [0])):
        windows = Windows(Same(), [(n, n + 2, texts[text]) for n, text in enumerate(order)])
        for _ in range(2):
            windows.ready("high", 1.0)(torch.ones(2, 4, 2, 2), 500.0, texts[0], 0)
        assert made == expected
        made.clear()


def task(window: int | None, runtime: Runtime | None = None, **options: Any) -> Original:
    runtime = runtime or Runtime()
    more = {"runtime": runtime, "ulysses_size": runtime.team.size, "window": window, **options}
    return open_task("t2v-A14B", lora=True, **{name: value for name, value in more.items() if value is not None})


def video(prompt: str, frames: int) -> Video:
    return Video(prompt, "bad", (32, 48), frames, 5)


def test_a_video_of_one_window_is_that_of_a_run_without() -> None:
    for sampling in (FOUR, GUIDED):
        want = task(None).sample_with(sampling, video("a | b", 9))
        assert torch.equal(task(9).sample_with(sampling, video("a | b", 9)), want)


def test_the_loop_is_the_sum_of_its_windows() -> None:
    """The first step's velocity, against the model's own for each window."""
    made, seen = task(9), list[tuple[Step, Tensor, Tensor]]()
    made.plan = plan_videos(made.plan, GUIDED, [video("a red ball | a cat", 17)])
    made.sample(video("a red ball | a cat", 17), lambda *each: seen.append(each))
    step, sample, velocity = seen[0]
    model = made.load_experts().models["high"]
    negative, *texts = (Prompt(made._contexts[text]) for text in ("bad", "a red ball", "a cat"))
    with torch.no_grad():
        parts = [
            model(sample[:, n : n + 3], step.timestep, (text, negative)) for n, text in ((0, texts[0]), (2, texts[1]))
        ]
    first, second = (free + 3.0 * (own - free) for own, free in parts)
    want = torch.cat([first[:, :2], (first[:, 2:] + second[:, :1]) / 2, second[:, 1:]], dim=1)
    assert relative_error(velocity, want) < 1e-5


def test_nag_leads_away_in_every_window() -> None:
    """One negative prompt for all of them, at guidance 1; where blocks stream too."""
    made, seen = task(9, nag=11.0), list[tuple[Step, Tensor, Tensor]]()
    clip = video("a red ball | a cat", 17)
    made.plan = plan_videos(made.plan, FOUR, [clip])
    found = made.sample(clip, lambda *each: seen.append(each))
    step, sample, velocity = seen[0]
    model = made.load_experts().models["high"]
    negative = Prompt(made._contexts["bad"])
    texts = [Prompt(made._contexts[text], negative, (11.0, 2.5, 0.25)) for text in ("a red ball", "a cat")]
    with torch.no_grad():
        first, second = (
            model(sample[:, n : n + 3], step.timestep, text) for n, text in zip((0, 2), texts, strict=True)
        )
    want = torch.cat([first[:, :2], (first[:, 2:] + second[:, :1]) / 2, second[:, 1:]], dim=1)
    assert relative_error(velocity, want) < 1e-5
    assert torch.equal(task(9, nag=11.0, vram=0.005).sample_with(FOUR, clip), found)
    assert relative_error(task(9).sample_with(FOUR, clip), found) > 1e-2


def test_streamed_blocks_and_prompts_by_window_change_no_number() -> None:
    for sampling in (FOUR, GUIDED):
        want = task(9).sample_with(sampling, video("a red ball | a cat", 17))
        assert torch.equal(task(9, vram=0.005).sample_with(sampling, video("a red ball | a cat", 17)), want)


def sample(runtime: Runtime) -> Tensor:
    return task(9, runtime).sample_with(FOUR, video("a red ball | a cat", 17))


def test_two_processes_give_what_one_does() -> None:
    want = sample(Runtime())
    for found in run_ranks(sample, 2):
        assert relative_error(found, want) < 1e-5


def outcome(**flags: Any) -> Generate:
    given = {"task": "t2v-A14B", "ckpt_dir": str(checkpoint("t2v-A14B")), "lora_dir": str(lora_dir("t2v-A14B"))}
    made = resolve({**given, "prompt": "a | b", "size": "32*32", "frame_num": 17, "window": "9", **flags})
    assert isinstance(made, Generate)
    return made


def test_the_plan_is_of_one_window_and_counts_them_all() -> None:
    plan = make_plan(outcome(), Runtime())
    facts, clip = plan.video(plan.jobs[0]), plan_video(plan, (32, 32), 9)
    assert (facts.tokens, len(facts.windows)) == (clip.tokens, 2)
    assert facts.budget is not None
    assert clip.budget is not None
    whole = plan_video(replace(plan, request=replace(plan.request, window=None)), (32, 32), 17)
    assert whole.budget is not None
    assert clip.budget.peaks["denoise"] <= facts.budget.peaks["denoise"] < whole.budget.peaks["denoise"]
    assert any(f", 2 windows of {clip.tokens} tokens, " in line for line in Outlook(plan).lines())
    assert plan.meaning(plan.jobs[0])["window"] == "9"
    short = make_plan(outcome(frame_num=9, prompt="a"), Runtime())
    assert short.meaning(short.jobs[0])["window"] is None
    # what weighs the time left: both windows, and both passes of a guided step
    once = work_of(short, short.jobs[0])
    assert work_of(plan, plan.jobs[0]) == 2 * once
    guided = make_plan(outcome(sample_guide_scale="3"), Runtime())
    assert work_of(guided, guided.jobs[0]) == 4 * once


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"window": "10"}, "--window 10 is not of the form 4n"),
        ({"window": "1"}, "--window 1 is out of range: must be between 5 and 4093"),
        ({"window": "9,8"}, "--window: OVERLAP 8 is out of range: must be between 0 and 4"),
        ({"prompt": "a | b | c"}, "3 parts of the prompt, and fewer --window in 17 frames"),
        ({"frame_num": 9}, "2 parts of the prompt, and fewer --window in 9 frames"),
        ({"use_prompt_extend": True}, "leave it out with images and --use_prompt_extend"),
        (
            {"task": "i2v-A14B", "image": str(TINY / "input.png")},
            "--window is of t2v-A14B and ti2v-5B; leave it out with images",
        ),
        (
            {"task": "ti2v-5B", "image": str(TINY / "input.png")},
            "--window is of t2v-A14B and ti2v-5B; leave it out with images",
        ),
    ],
)
def test_invalid_combinations_are_refused(flags: dict[str, Any], sentence: str) -> None:
    if name := flags.get("task"):
        flags = {**flags, "ckpt_dir": str(checkpoint(name)), "lora_dir": str(lora_dir(name))}
    with pytest.raises(InputError, match=sentence):
        outcome(**flags)


def test_it_is_made_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*command("t2v-A14B"), "--size", "32*32", "--frame_num", "17", "--window", "9", "--prompt", "a | b"]
    assert generate.main([*words, "--save_file", "a.mp4", "--save_latents"]) == 0
    assert generate.main(["--replay", "a.mp4", "--save_file", "b.mp4"]) == 0
    assert torch.equal(*(load_file(f"{name}.latents.safetensors")["latent"] for name in "ab"))
