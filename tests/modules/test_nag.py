"""NAG: attention led away from a negative prompt, in the same pass, against the published formula."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import generate
from benchmarks.counters import CostCounter
from benchmarks.transformer import A14B, attention, bf16
from tests.modules.test_model import random_model
from tests.support import command, open_task, relative_error
from wan.jobs.job import Sampling
from wan.modules.fused import EAGER
from wan.modules.model import CrossAttention, Prompt, WanModel
from wan.sampling import Video
from wan.utils.errors import InputError

HEADS, WIDTH = 3, 8
GUIDE = 11.0, 2.5, 0.25  # as published


def attended(layer: CrossAttention, x: Tensor, text: Tensor) -> Tensor:
    """Softmax attention, with norms over the whole width: [L, D]."""

    def normed(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + layer.eps).sqrt() * weight

    q = normed(x @ layer.q.weight.T + layer.q.bias, layer.norm_q.weight).unflatten(-1, (HEADS, WIDTH))
    k = normed(text @ layer.k.weight.T + layer.k.bias, layer.norm_k.weight).unflatten(-1, (HEADS, WIDTH))
    v = (text @ layer.v.weight.T + layer.v.bias).unflatten(-1, (HEADS, WIDTH))
    weights = torch.einsum("qnd,knd->nqk", q, k).div(WIDTH**0.5).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(1.5, 2.5, 0.25), (11.0, 2.5, 0.25), (5.0, 3.0, 0.5)])
def test_the_formula(scale: float, tau: float, alpha: float) -> None:
    """Z = a G' + (1 - a) Z+ with G = s Z+ - (s - 1) Z-, G' = G min(r, tau) / r, r = |G|_1 / |Z+|_1 per token."""
    torch.manual_seed(3)
    layer, dim = CrossAttention(HEADS * WIDTH, HEADS, 1e-6), HEADS * WIDTH
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, text, other = torch.randn(9, dim), torch.randn(7, dim), torch.randn(5, dim)
    with torch.no_grad():
        positive, negative = attended(layer, x, text), attended(layer, x, other)
        away = scale * positive - (scale - 1) * negative
        ratio = away.abs().sum(1, keepdim=True) / positive.abs().sum(1, keepdim=True)
        expected = alpha * away * ratio.clamp(max=tau) / ratio + (1 - alpha) * positive
        expected = expected @ layer.o.weight.T + layer.o.bias
        minus = Prompt(other)
        plus = Prompt(text, minus, (scale, tau, alpha))
        found = layer(x, [(plus, text), (minus, other)], [(0, slice(0, 4)), (0, slice(4, 9))])
    assert (ratio > tau).any() if scale > 2 else (ratio < tau).any(), "tokens on both sides of the limit"
    assert relative_error(found, expected) < 1e-5


def test_rows_of_zeros_stay_finite() -> None:
    x = torch.zeros(2, 4)
    EAGER.guide(x, torch.zeros(2, 4), 11.0, 2.5, 0.25)
    assert torch.equal(x, torch.zeros(2, 4))


def test_a_prompt_leads_away_from_another_and_not_from_itself() -> None:
    model, latent, rows, other = random_model(), torch.randn(16, 2, 4, 4), torch.randn(20, 48), torch.randn(9, 48)
    plain = model(latent, 500.0, Prompt(rows))
    assert relative_error(model(latent, 500.0, Prompt(rows, Prompt(rows), GUIDE)), plain) < 1e-5
    assert relative_error(model(latent, 500.0, Prompt(rows, Prompt(other), GUIDE)), plain) > 1e-2


def test_keys_and_values_are_made_once_for_each_prompt() -> None:
    model, latent, calls = random_model(), torch.randn(16, 1, 4, 4), list[Tensor]()
    prompt = Prompt(torch.randn(20, 48), Prompt(torch.randn(20, 48)), GUIDE)
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(_[2]))
    for timestep in (1000.0, 500.0):
        model(latent, timestep, prompt)
    assert len(calls) == 2 * len(model.blocks)


@pytest.mark.parametrize("tokens", [pytest.param(75_600, marks=pytest.mark.slow), 3_600])
def test_memory_of_the_second_result(tokens: int) -> None:
    """As the plan counts it: two shares of rows in float32 below 32,768 tokens, beside keys and values."""
    peaks = []
    with torch.device("meta"), torch.no_grad():
        model = bf16(WanModel(**A14B, num_layers=2))
        model.use_attention(attention)
        latent, rows = torch.empty(16, tokens // 3600, 90, 160), torch.empty(100, 4096).bfloat16()
        for prompt in (Prompt(rows), Prompt(rows, Prompt(rows), GUIDE)):
            model(latent, 1000.0, prompt)
            with CostCounter() as counter:
                model(latent, 1000.0, prompt)
            peaks.append(counter.peak)
    counted = max(0, 8 * min(model.rows, tokens) - 2 * tokens) * A14B["dim"]
    assert 0 <= peaks[1] - peaks[0] <= counted


def latent_of(scale: float, guidance: float = 1.0) -> Tensor:
    task = open_task("t2v-A14B", lora=True, nag=scale)
    sampling = Sampling("euler", 2, 5.0, (guidance, guidance))
    latent = task.sample_with(sampling, Video("a red ball", "a cat", (32, 32), 1, 3))
    assert len(task._contexts) == (1 if scale == guidance == 1 else 2), "the negative prompt is encoded if it counts"
    return latent


def test_scale_1_is_the_run_without_it() -> None:
    plain = open_task("t2v-A14B", lora=True)
    sampling, video = Sampling("euler", 2, 5.0, (1.0, 1.0)), Video("a red ball", "a cat", (32, 32), 1, 3)
    assert torch.equal(latent_of(1.0), plain.sample_with(sampling, video))
    assert not torch.equal(latent_of(11.0), latent_of(1.0))


def test_the_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nag", "11", "--negative_prompt", "a cat", "--dry_run"]
    assert generate.main(command("t2v-A14B", *words)) == 0
    out = capsys.readouterr().out
    assert "NAG 11" in out
    assert "no effect" not in out, "the negative prompt counts"


def test_beside_guidance_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(command("t2v-A14B", "--nag", "11", "--sample_guide_scale", "1,3", "--dry_run")) == 2
    assert capsys.readouterr().err.startswith("error: --nag 11 ")
    with pytest.raises(InputError, match="--nag 11 "):
        open_task("t2v-A14B", nag=11).generate("a cat", (32, 32), 1, guide_scale=3.0)


def test_tau_and_alpha_are_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    published, others = (open_task("t2v-A14B", nag=nag).plan.request for nag in (11, (11, 3, 0.5)))
    assert (published.nag, published.guide) == ("11", (11.0, 2.5, 0.25))
    assert (others.nag, others.guide) == ("11,3,0.5", (11.0, 3.0, 0.5))
    for wrong in ("0.5", "11,0", "11,2.5,2", "11,2,0.5,1", "nan", "strong"):
        assert generate.main(command("t2v-A14B", "--nag", wrong, "--dry_run")) == 2
        assert capsys.readouterr().err.startswith("error: --nag ")


def test_a_replay_leads_away_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command("t2v-A14B", "--nag", "5", "--negative_prompt", "blue", "--save_file", str(tmp_path / "a.mp4"))
    assert generate.main([*words, "--size", "32*32", "--frame_num", "1"]) == 0
    assert generate.main(["--replay", str(tmp_path / "a.mp4"), "--save_dir", str(tmp_path), "--dry_run"]) == 0
    assert "NAG 5" in capsys.readouterr().out
