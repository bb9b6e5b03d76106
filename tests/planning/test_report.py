"""A plan's lines about memory, time and jobs, on the command line's dry run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import generate
from tests.support import checkpoint, lora_dir
from wan.distributed.launch import Runtime
from wan.jobs.resolve import resolve
from wan.planning import report, time_estimate
from wan.planning.build import make_plan
from wan.planning.memory import plan_video
from wan.planning.time_estimate import ATTENTION, DISK, MATMUL, VAE, keep_rates, kept_rates
from wan.utils.files import cache_folder

CPU = torch.device("cpu")
RATES = {MATMUL: 1e9, ATTENTION: 1e9, VAE: 1e9, DISK: 1e9}
PROMPT = f"a  cat\nthat {'sits ' * 30}"
T2V = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")), "--size", "64*64",
       "--frame_num", "5", "--device", "cpu", "--base_seed", "1", "--prompt", PROMPT]  # fmt: skip


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert generate.main([*T2V, *words, "--dry_run"]) == 0
    return capsys.readouterr().out.splitlines()


def line(lines: list[str], begin: str) -> str:
    (found,) = [each for each in lines if each.startswith(begin)]
    return found


def test_the_time_is_known_once_rates_were_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert line(plan(capsys), "expected time") == "expected time: unknown (python -m wan.doctor measures it)"
    keep_rates(CPU, RATES)
    assert line(plan(capsys), "expected time").startswith("expected time: seconds")
    slow = {name: rate / 3_000 for name, rate in RATES.items()}
    keep_rates(CPU, slow)
    one = line(plan(capsys), "expected time, by the rates that wan.doctor measured here: ")
    assert [part.split()[0] for part in one.split(": ")[1].split(", ")] == ["text", "denoise", "decode"]
    assert "3 videos" in line(plan(capsys, "--num_videos", "3"), "expected time, by")
    keep_rates(CPU, slow | {VAE: slow[VAE] / 3})

    def seconds(of: str) -> float:
        return float(of.split("decode ")[1].split()[0])

    assert seconds(line(plan(capsys), "expected time, by")) == pytest.approx(3 * seconds(one), rel=0.2)


def test_rates_of_another_machine_or_in_pieces_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_rates(CPU, RATES)
    assert kept_rates(CPU) == RATES
    with monkeypatch.context() as patched:
        patched.setattr(time_estimate.platform, "node", lambda: "another")
        assert kept_rates(CPU) is None
        keep_rates(CPU, {MATMUL: 1.0})
        assert kept_rates(CPU) is None
    assert kept_rates(CPU) == RATES
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(json.loads(_kept()), 5))):
        (cache_folder() / "rates.json").write_text(damaged)
        assert kept_rates(CPU) is None


def _kept() -> str:
    return (cache_folder() / "rates.json").read_text()


def test_jobs_have_a_line_each_and_many_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan(capsys)
    assert line(lines, "job 0000: ").startswith("job 0000: a cat that sits sits")
    assert "...: 64x64, 5 frames" in line(lines, "job 0000: ")
    assert lines[-1] == "dry run: nothing was made"
    lines = plan(capsys, "--num_videos", "40")
    assert sum(each.startswith("job ") for each in lines) == report.MOST_LISTED
    assert line(lines, "... and 28 more, the last one ")


def test_finished_jobs_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(T2V) == 0
    capsys.readouterr()
    lines = plan(capsys, "--num_videos", "2", "--resume")
    assert line(lines, "job 0000 (done): ")
    assert line(lines, "job 0001: ")
    assert line(lines, "1 of 2 videos done already")
    assert "1 of 1 video done already" in plan(capsys, "--resume")


def test_memory_of_the_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = plan(capsys)
    assert re.search(r"available; peaks: denoise \d+ MB, decode [\d.]+ MB, text ", line(lines, "host memory "))
    assert not [each for each in lines if "--vram" in each]
    assert line(lines, "disk: about ")
    monkeypatch.setattr(report, "host_bytes", lambda: 1000)
    assert "--vram GB" in line(plan(capsys), "warning: not enough memory")


def test_a_plan_for_a_card_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16, by its limit, without this machine's rates; a real run on the CPU stays in float32."""
    keep_rates(CPU, RATES)
    lines = plan(capsys, "--vram", "0.3")
    assert line(lines, "GPU 0.3 GB limit: ")
    assert "bfloat16" in line(lines, "cpu, ")
    assert not [each for each in lines if each.startswith("expected time")]
    assert "float32" in line(plan(capsys), "cpu, ")


@pytest.mark.parametrize(
    ("flags", "helps"),
    [(["--dtype", "fp32"], "--dtype bf16"), (["--dtype", "bf16", "--lora_mode", "adapter"], "--lora_mode merge")],
)
def test_a_card_too_small_gets_the_option_that_fits(
    flags: list[str], helps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*T2V[:-1], "a cat", *flags]  # so that the text stage takes less than denoising

    def needed(*more: str) -> int:
        """Bytes at the least: with two slots, as a limit of next to nothing would have it."""
        words = [word.removeprefix("--") for word in (*asked, *more)]
        values = dict(zip(words[::2], words[1::2], strict=True)) | {"frame_num": 5, "base_seed": 1}
        planned = make_plan(resolve(values), Runtime())
        budget = plan_video(replace(planned, room=1), (64, 64), 5).budget
        assert budget is not None
        return budget.peak

    least, eased = needed(), needed(*helps.split())
    assert eased < least
    limit = str((least + eased) / 2e9)
    assert generate.main([*asked, "--vram", limit, "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert f"{helps} fits" in said
    assert "float32" in said or "bfloat16" in said
    assert generate.main([*asked, *helps.split(), "--vram", limit, "--dry_run"]) == 0
