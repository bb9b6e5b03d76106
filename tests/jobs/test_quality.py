"""`--quality`: names for sets of options; what is given wins, and the record holds what was set."""

from pathlib import Path
from typing import Any

import pytest
import torch

import generate
from tests.support import checkpoint, command, lora_dir, open_task
from wan.cli.options import QUALITIES, Request
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.planning import build
from wan.planning.build import make_plan

USUAL = {
    "ckpt_dir": str(checkpoint("t2v-A14B")), "prompt": "a cat", "size": "32*32", "frame_num": 1, "base_seed": 3,
    "device": "cpu", "sample_steps": 14,
}  # fmt: skip


def request_of(**values: Any) -> Request:
    outcome = resolve({**USUAL, **values})
    assert isinstance(outcome, Generate)
    return make_plan(outcome, Runtime()).request


def chosen(**values: Any) -> tuple[str, str, float]:
    request = request_of(**values)
    return request.vae_dtype, request.quantize, request.cache


def test_each_sets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == chosen(quality="exact") == ("fp32", "none", 0.0)
    assert chosen(quality="high") == ("bf16", "none", 0.0)
    assert chosen(quality="fast") == ("bf16", "none", 0.05), "no GPU"
    for can in ({"fp8", "int8"}, {"int8"}, set()):
        monkeypatch.setattr(build, "multiplies", lambda form, *_, can=can: form in can)
        assert build.fast_format(torch.device("cuda", 0), torch.bfloat16) == min(can, default="none")
        assert build.fast_format(torch.device("cpu"), torch.bfloat16) == "none"
    monkeypatch.setattr(build, "fast_format", lambda *_: "fp8")
    assert chosen(quality="fast") == ("bf16", "fp8", 0.05)
    assert chosen(quality="fast", quantize="none") == ("bf16", "none", 0.05)


@pytest.mark.parametrize(
    "values",
    [{"sample_steps": 8}, {"sample_solver": "dmd"}, {"lora_dir": str(lora_dir("t2v-A14B")), "sample_steps": 4}],
)
def test_where_no_step_may_be_left_out_nothing_is_refused(values: dict[str, Any]) -> None:
    assert chosen(quality="fast", **values) == ("bf16", "none", 0.0)


def test_given_flags_win() -> None:
    assert chosen(quality="fast", vae_dtype="fp32", cache=0.0) == ("fp32", "none", 0.0)
    assert chosen(quality="high", cache=0.2) == ("bf16", "none", 0.2)


def test_in_a_sweep_each_video_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--quality",
        "fast",
        "--sample_guide_scale",
        "1",
        "--sample_steps",
        "14",
        "--sweep",
        "nag=1,11",
        "--dry_run",
    ]
    assert generate.main(command("t2v-A14B", *words, lora=False)) == 0
    out = capsys.readouterr().out
    assert "--quantize none, --cache 0.05" in out
    assert "unpacked" not in out
    assert "_nag11_" in out
    swept = resolve({**USUAL, "quality": "fast", "sweep": ("cache=0,0.2",)})
    assert isinstance(swept, Generate)
    assert [variant.request.cache for variant in swept.variants.values()] == [0.0, 0.2], "what is swept wins"


def test_the_record_holds_what_was_set() -> None:
    """A replay needs no name of a set, whose meaning may change."""
    recorded = request_of(quality="fast", vae_dtype="fp32").recorded()
    assert recorded["cache"] == QUALITIES["fast"]["cache"]
    assert "vae_dtype" not in recorded


def test_the_python_class_takes_it() -> None:
    assert open_task("t2v-A14B", quality="high").plan.request.vae_dtype == "bf16"


def test_a_replay_makes_the_same_unless_another_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "32*32", "--frame_num", "1", "--dtype", "fp32"]
    words = command("t2v-A14B", *small, "--quality", "high", "--save_file", str(tmp_path / "a.mp4"))
    assert generate.main(words) == 0
    said = capsys.readouterr()
    assert "quality high: --vae_dtype bf16" in said.out + said.err
    replay = ["--replay", str(tmp_path / "a.mp4"), "--save_dir", str(tmp_path), "--dry_run"]
    for more, decode in (([], True), (["--quality", "exact"], False)):
        assert generate.main([*replay, *more]) == 0
        assert ("decode in bf16" in capsys.readouterr().out) is decode
