"""The step cache: which steps are left out, by what rule, and that nothing is read for them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import generate
import wan
from tests.distributed.ranks import run_ranks
from tests.offload.test_streaming import use_slots
from tests.support import checkpoint, command, config_of, open_task, relative_error
from wan.distributed.launch import Runtime
from wan.jobs.job import Sampling
from wan.sampling import Step, Video
from wan.step_cache import StepCache, always_computed

BASE = Sampling("unipc", 16, 5.0, (3.0, 4.0))
VIDEO = Video("a cat", "bad", (32, 32), 1, 3)


def steps_of(experts: str, guidance: float = 3.0) -> list[Step]:
    return [Step(1000.0 - n, {"h": "high", "l": "low"}[each], guidance, 1.0) for n, each in enumerate(experts)]


class Field:
    """A velocity that depends on the sample, twice: the conditional pass and the other."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def ready(self, name: str, lora: float):
        def network(latent: Tensor, timestep: float, *_: object) -> Tensor:
            self.asked.append(timestep)
            return torch.stack([latent.sin(), latent.cos()])

        return network


def walk(cache: StepCache, count: int, stride: float = 0.01) -> list[tuple[Tensor, Tensor]]:
    """(x, v of both passes) of each step along a path of our own."""
    base = torch.linspace(-1, 1, 24).view(2, 1, 3, 4)
    return [
        (x, cache.ready("high", 1.0)(x, float(number)))
        for number in range(1, 1 + count)
        for x in [base + stride * number]
    ]


def test_always_computed() -> None:
    assert always_computed(steps_of("h" * 10 + "l" * 10)) == {*range(1, 8), 11, 12, 20}
    changed = steps_of("h" * 10) + steps_of("h" * 10, guidance=1.0)
    assert always_computed(changed) == {*range(1, 8), 11, 12, 20}, "another pass is another network"


def test_the_rule() -> None:
    """Against the sheet's formula, written out step by step in float64."""
    threshold, field = 0.02, Field()
    path = walk(StepCache(field, steps_of("h" * 30), threshold, lambda x: x), 30)
    change, slope, last, before, computed = 0.0, 0.0, None, torch.zeros(1), []
    for number, (x, found) in enumerate(path, 1):
        x, found = x.double(), found.double()
        if last is not None and 7 < number < 30:
            change += slope * float((x - before).abs().mean() / last[1][0].abs().mean())
            if change < threshold:
                torch.testing.assert_close(found, x + (last[1] - last[0]), rtol=0, atol=1e-6)
                before = x
                continue
        v = torch.stack([x.sin(), x.cos()])
        torch.testing.assert_close(found, v, rtol=0, atol=1e-6)
        if last is not None:
            slope = float((v[0] - last[1][0]).abs().mean() / (x - last[0]).abs().mean())
        change, last, before = 0.0, (x, v), x
        computed.append(float(number))
    assert field.asked == computed
    assert 10 < len(computed) < 25


@pytest.mark.parametrize(("threshold", "computed"), [(0.0, 20), (1e9, 8)])
def test_the_limits(threshold: float, computed: int) -> None:
    """Nothing is left out at 0; of all that may be, everything at a large threshold."""
    field = Field()
    cache = StepCache(field, steps_of("h" * 20), threshold, lambda x: x)
    walk(cache, 20)
    assert len(field.asked) == sum(cache.made) == computed


def test_a_step_may_change_its_sample_afterwards() -> None:
    """As `OnStep` may; also the one that later steps are measured from."""
    steps, found = steps_of("h" * 20), list[Tensor]()
    want = walk(StepCache(Field(), steps, 1e9, lambda x: x), 20)
    cache = StepCache(Field(), steps, 1e9, lambda x: x)
    for number, (x, _) in enumerate(want, 1):
        given = x.clone()
        found.append(cache.ready("high", 1.0)(given, float(number)))
        given.zero_()
    assert not all(cache.made)
    assert all(torch.equal(ours, theirs) for ours, (_, theirs) in zip(found, want, strict=True))


def test_a_run_at_a_tiny_threshold_is_the_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, also where every step is a job of its own and weights pass through two slots."""
    want = open_task("t2v-A14B").sample_with(BASE, VIDEO)
    task = open_task("t2v-A14B", cache=1e-9)
    assert torch.equal(task.sample_with(BASE, VIDEO), want)
    for batch_guidance in (False, True):
        task.load_experts().networks.shrink()
        use_slots(2, monkeypatch, batch_guidance)
        assert torch.equal(task.sample_with(BASE, VIDEO), want)
    assert task.computed() == {"computed_steps": list(range(1, 17))}


@pytest.mark.parametrize("batch_guidance", [False, True])
def test_nothing_is_read_for_a_step_that_is_left_out(batch_guidance: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, latents = [], []
    for cache in (1e-9, 1.0):
        task = open_task("ti2v-5B", cache=cache)
        use_slots(2, monkeypatch, batch_guidance)
        prefetcher = task.load_experts().networks.prefetcher
        latents.append(task.sample_with(BASE, VIDEO))
        copies.append(prefetcher.copies)
    computed = task.computed()["computed_steps"]
    assert len(computed) < 14
    assert copies[1] <= copies[0] * len(computed) / 16 + 2
    assert not torch.equal(*latents)


def latent_of_a_rank(runtime: Runtime) -> tuple[Tensor, list[int]]:
    folder, config = checkpoint("ti2v-5B"), config_of("ti2v-5B")
    task = wan.WanTI2V(config, folder, device="cpu", runtime=runtime, ulysses_size=runtime.team.size, cache=1.0)
    return task.sample_with(BASE, VIDEO), task.computed()["computed_steps"]


def test_ranks_leave_out_the_same_steps() -> None:
    want, computed = latent_of_a_rank(Runtime())
    assert 8 < len(computed) < 16
    for latent, steps in run_ranks(latent_of_a_rank, 2):
        assert relative_error(latent, want) < 1e-5
        assert steps == computed


def test_rank_0_decides() -> None:
    cache = StepCache(Field(), steps_of("h" * 20), 1e-3, torch.zeros_like)
    walk(cache, 20)
    assert sum(cache.made) == 8, "its sum is small"


@pytest.mark.parametrize(
    "words",
    [
        ["--sample_steps", "11"],
        ["--sample_steps", "20", "--sample_solver", "dmd"],
        ["--lora_dir"],
        ["--sample_steps", "20", "--window", "5"],
    ],
)
def test_where_it_makes_no_sense_it_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lora, rest = words == ["--lora_dir"], [word for word in words if word != "--lora_dir"]
    assert generate.main(command("t2v-A14B", "--cache", "0.05", *rest, "--dry_run", lora=lora)) == 2
    assert "--cache 0.05" in capsys.readouterr().err


def test_plan_and_record_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.mp4"
    words = ["--cache", "1", "--sample_steps", "14", "--save_file", str(file), "--size", "32*32", "--frame_num", "1"]
    assert generate.main(command("t2v-A14B", *words, lora=False)) == 0
    said = capsys.readouterr()
    assert "step cache 1 " in said.out + said.err
    computed = json.loads(file.with_suffix(".json").read_text())["computed_steps"]
    assert {*range(1, 8), 14} <= set(computed)
    assert len(computed) < 14
