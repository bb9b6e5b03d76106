"""`python -m wan.doctor` on a CPU at small sizes: what it finds, that it finds what is broken, and its estimates."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.forked import python
from tests.support import TESTS, checkpoint, config_of
from wan import WanT2V
from wan.distributed.mesh import Layout
from wan.doctor import __main__ as doctor
from wan.doctor import machine as things
from wan.doctor import numerics, rates
from wan.doctor.forecast import forecast, notes, released_plan, rows_of
from wan.doctor.machine import GOOD, SKIPPED, WRONG, DoctorCheck, Finding, Machine, examine
from wan.jobs.job import Job
from wan.modules.attention import sdpa
from wan.modules.quantised_linear import in_8_bits
from wan.modules.t5 import UMT5Tokenizer
from wan.modules.vae import WanVAE, released_vae
from wan.modules.vae_layers import Region
from wan.planning.memory import plan_video, plan_videos
from wan.planning.time_estimate import (
    DISK,
    EXCHANGE,
    PINNED,
    decode_operations,
    encode_operations,
    expect,
    keep_rates,
    network_of,
    seconds,
    sent_bytes,
)
from wan.utils.progress import CLEAR

ROOT = TESTS.parent
CPU = torch.device("cpu")
COLUMNS = 80  # of a terminal that does not say
SPEED = {rates.MATMUL: 700e12, rates.ATTENTION: 500e12, rates.VAE: 50e12, rates.DISK: 3e9, rates.PINNED: 50e9}


def machine(root: Path = ROOT, disk: Path = ROOT) -> Machine:
    return Machine(CPU, root, disk, small=True)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """Findings of a whole examination."""
    return list(doctor.findings_of("cpu", ROOT, tmp_path_factory.mktemp("disk"), small=True))


def run(checks: list[DoctorCheck], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(doctor, "checks_of", lambda _: checks)
    return doctor.main(["--device", "cpu", "--root", str(ROOT), *words])


def test_nothing_is_wrong_here(findings: list[Finding]) -> None:
    assert [finding.line() for finding in findings if finding.verdict == WRONG] == []
    good = {finding.name for finding in findings if finding.verdict == GOOD}
    assert good >= {
        "versions", "packages", "ffmpeg", "devices", "attention sdpa float32", "attention sdpa bfloat16", "LoRA merge",
        "VAE decode in bf16", "golden t2v_lightning float32", "golden t2v_lightning bfloat16", "memory modes",
        "VAE decode", "VAE decode in tiles", "rate: matmul", "rate: attention", "rate: VAE", "rate: device copy",
        "rate: disk read",
    }  # fmt: skip
    assert all(finding.seconds > 0 and finding.sentence for finding in findings)


def test_every_golden_case_is_examined_in_both_precisions() -> None:
    names = [check.name for check in numerics.golden_checks(Machine(CPU, ROOT, ROOT))]
    cases = json.loads((TESTS / "golden" / "cases.json").read_text())
    assert {f"golden {case['name']} {dtype}" for case in cases for dtype in ("float32", "bfloat16")} < set(names)


def test_without_the_repository_golden_cases_are_skipped_by_name(tmp_path: Path) -> None:
    found = [examine(check, machine(tmp_path)) for check in numerics.golden_checks(machine(tmp_path))]
    assert {finding.verdict for finding in found} == {SKIPPED}
    assert "golden cases" in {finding.name for finding in found}
    assert all("--root CLONE" in finding.sentence for finding in found)


def test_a_wrong_back_end_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(numerics.BACKENDS, "sdpa", lambda q, *_: q)
    assert run(numerics.attention_checks(machine()), monkeypatch) == 1
    said = capsys.readouterr().out
    assert "WRONG    attention sdpa float32 (" in said
    assert "use --attention" in said


def test_a_back_end_that_gives_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numerics.BACKENDS, "sdpa", lambda q, *_: q * float("nan"))
    assert numerics.attention("sdpa", torch.float32, machine()).verdict == WRONG


@pytest.mark.parametrize(("form", "how"), [("fp8", "no fp8 product here: unpacked"), ("int8", "multiplied in int8")])
def test_a_layer_in_8_bits_is_judged(form: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = numerics.quantised_layer(form, machine())
    assert (outcome.verdict, outcome.sentence.partition(",")[0]) == (GOOD, how)
    monkeypatch.setattr(numerics, "in_8_bits", lambda form, weight, bias: in_8_bits(form, weight.roll(1), bias))
    assert numerics.quantised_layer(form, machine()).verdict == WRONG
    monkeypatch.setattr(numerics, "in_8_bits", lambda _, weight, __: lambda x: x @ weight.t())
    assert numerics.quantised_layer(form, machine()).verdict == WRONG, "better than 8 bits can be"


def test_decoding_in_bf16_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numerics.vae_in_bf16(machine()).verdict == GOOD
    cast = WanVAE.decode_in
    monkeypatch.setattr(
        WanVAE, "decode_in", lambda vae, dtype: (cast(vae, dtype), vae.decoder.conv1.weight.data.mul_(2))
    )
    assert numerics.vae_in_bf16(machine()).verdict == WRONG
    monkeypatch.setattr(WanVAE, "decode_in", lambda *_: None)
    assert numerics.vae_in_bf16(machine()).verdict == WRONG, "better than bf16 can be"


def test_attention_in_8_bits_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, factor, verdict in (("sage", 1.04, GOOD), ("sdpa", 1.04, WRONG), ("sage", 1.1, WRONG)):
        monkeypatch.setitem(numerics.BACKENDS, name, lambda *qkv, factor=factor: sdpa(*qkv) * factor)
        assert numerics.attention(name, torch.bfloat16, machine()).verdict == verdict


def test_a_check_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: Machine) -> Finding:
        raise RuntimeError("no kernel image is available")

    fine = DoctorCheck("another", lambda _: Finding(GOOD, "is fine"))
    assert run([DoctorCheck("a kernel", broken), fine], monkeypatch) == 1
    said = re.sub(r"\(\d+ ms\)", "(soon)", capsys.readouterr().out)
    assert "WRONG    a kernel (soon): fails with RuntimeError: no kernel image is available; put this report" in said
    assert "good     another (soon): is fine" in said
    assert "1 wrong" in said


def test_a_mistyped_line_is_answered_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--devise", "cpu"]) == 2
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert "--device?" in said


def test_a_wrong_golden_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = json.loads((TESTS / "golden" / "cases.json").read_text())[0]
    key = f"{case['name']}.latent"
    expected = numerics.expectation(machine())
    expected[key] = expected[key] + 1e-3 * expected[key].abs().max()
    monkeypatch.setattr(numerics, "expectation", lambda _: expected)
    outcome = numerics.golden_case(case, torch.float32, machine())
    assert outcome.verdict == WRONG
    assert "allowed at most 0.0001" in outcome.sentence


def test_streaming_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = json.loads((TESTS / "golden" / "cases.json").read_text())[0]
    monkeypatch.setattr(numerics, "sample", lambda task, *_: torch.ones(2) + (1e-6 if task.plan.room else 0.0))
    outcome = numerics.memory_modes(case, machine())
    assert outcome.verdict == WRONG
    assert "blocks through two slots by" in outcome.sentence


def test_memory_modes_leave_no_limit_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vram` holds PyTorch to it for the whole process: so little would fail this check and every one after it."""
    case, given, open_task = json.loads((TESTS / "golden" / "cases.json").read_text())[0], [], numerics.open_task
    monkeypatch.setattr(numerics, "open_task", lambda *args, **how: given.append(how) or open_task(*args, **how))
    assert numerics.memory_modes(case, machine()).verdict == GOOD
    assert given
    assert not [how for how in given if "vram" in how]


def test_a_merge_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = numerics.Merge.__call__
    monkeypatch.setattr(numerics.Merge, "__call__", lambda self, *given: merge(self, *given) * 1.001)
    assert numerics.lora_merge(machine()).verdict == WRONG


def test_a_package_too_old_or_absent_is_found(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=99", "no-such-thing>=1"]')
    outcome = things.packages(machine(tmp_path))
    assert outcome.verdict == WRONG
    assert "at least 99 is needed" in outcome.sentence
    assert outcome.advice == "pip install 'torch>=99' 'no-such-thing>=1'"


def test_a_device_that_is_not_there_is_found() -> None:
    here = machine()
    outcome = things.devices("cuda:77", here)
    if not torch.cuda.is_available():
        assert here.device == CPU
    assert outcome.verdict == WRONG
    assert "--device cuda:77" in outcome.sentence


@pytest.mark.slow
def test_processes_exchange() -> None:
    outcome = rates.exchange(machine(), 2, 1 << 20)
    assert outcome.verdict == GOOD
    assert outcome.values[EXCHANGE] > 0


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [DoctorCheck("x", lambda _: Finding(WRONG, "is off", "mend it", {"error": 1.0}))]
    assert run(checks, monkeypatch, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["wrong"] == 1
    last = report["findings"][-1]
    assert {k: last[k] for k in ("name", "verdict", "sentence", "advice", "values")} == {
        "name": "x", "verdict": WRONG, "sentence": "is off", "advice": "mend it", "values": {"error": 1.0},
    }  # fmt: skip


def test_json_of_a_real_examination(
    findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings_of", lambda *_: iter(findings))
    assert doctor.main(["--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["name"] for finding in found] == [finding.name for finding in findings]
    assert {row["task"] for row in found[-1]["values"]["estimates"]} == {"t2v-A14B", "i2v-A14B", "ti2v-5B"}


def test_estimates_are_counted_work_over_rates() -> None:
    """720p in 4 steps: 6.52 PFLOP a forward. An 80 GB device holds all; in 24 GB blocks pass through."""
    found = {}
    for room in (80, 24):
        here = machine()
        here.device, here.rates = CPU, dict(SPEED)
        plan = released_plan("t2v-A14B", True, int(room * 1e9), here)
        found[room] = plan_video(plan, (1280, 720), 81).budget
    assert not found[24].resident
    sizes = network_of(plan)
    assert sizes.operations(75600) == pytest.approx(6.52e15, rel=0.01)
    assert sizes.linear(75600) + sizes.attention(75600) == sizes.operations(75600)


def test_a_forecast_divides_by_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.utils.accelerator.host_bytes", lambda: int(400e9))
    here = machine()
    assert forecast(here).verdict == SKIPPED
    here.rates = dict(SPEED)
    found = forecast(here)
    assert max(map(len, found.sentence.splitlines())) <= COLUMNS
    rows = found.values["estimates"]
    row = next(r for r in rows if (r["task"], r["size"], r["steps"]) == ("t2v-A14B", "1280x720", 4))
    sizes = network_of(released_plan("t2v-A14B", True, int(400e9), here))
    computing = 4 * (sizes.linear(75600) / 700e12 + sizes.attention(75600) / 500e12)
    assert row["mode"] == "all stay"
    assert row["read"] == pytest.approx(2 * 57.15e9, rel=0.01)  # both experts once, float32
    assert row["denoise"] == pytest.approx(max(computing, row["read"] / 3e9))
    assert row["next"] == pytest.approx(computing + row["decode"])


def test_the_longest_rows_and_notes_fit_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "task": "t2v-A14B", "size": "1280x704", "frames": 121, "steps": 50, "fits": True, "advice": "",
        "mode": "10 of 41 stay", "vram": 11, "tiles": (10, 10), "peak": 131 * 10**8, "first": 863_000.0,
        "next": 863_000.0,
    }  # fmt: skip
    advice = "use --vae_tiling, a smaller --size or fewer frames"
    rows = [row, row | {"mode": "one at a time", "vram": None}, row | {"fits": False, "advice": advice}]
    below = [*rows_of(rows), *notes(rows)]
    long = Finding(WRONG, "\n  ".join([f"with {'many ' * 30}words", *below]), f"take {'other ' * 30}ones")
    assert run([DoctorCheck("forecast", lambda _: long)], monkeypatch) == 1
    piped = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run([DoctorCheck("forecast", lambda _: long)], monkeypatch) == 1
    shown = capsys.readouterr().out.replace(CLEAR, "")
    assert max(map(len, piped.splitlines())) > COLUMNS >= max(map(len, shown.splitlines()))
    for text in (piped, shown):
        assert set(below[: 1 + len(rows)]) <= {line.strip() for line in text.splitlines()}
        assert " ".join(f"with {'many ' * 30}words; take {'other ' * 30}ones".split()) in " ".join(text.split())
        assert f"does not fit: {advice} (t2v-A14B 1280x704)" in " ".join(text.split())


def test_processes_share_the_work() -> None:
    here, rates = machine(), {**SPEED, DISK: 1e18, PINNED: 1e18}
    plan = replace(released_plan("i2v-A14B", False, int(400e9), here), room=None)
    alone, layout = seconds(plan, plan_video(plan, (1280, 720), 81), rates), Layout(8, 4)
    four = replace(plan, layout=layout)
    shared = seconds(four, plan_video(four, (1280, 720), 81), rates)
    assert shared.denoise == pytest.approx(alone.denoise / 4)
    assert (shared.text, shared.read) == (alone.text, alone.read)
    for stage in ("image", "decode"):  # with the rims of their regions
        assert 0.25 < getattr(shared, stage) / getattr(alone, stage) < 0.45
    forwards = sum(1 + step.guided for step in plan.steps)
    sent = forwards * sent_bytes(layout, network_of(plan), 75600, 4)["ulysses"]
    sending = seconds(four, plan_video(four, (1280, 720), 81), rates | {EXCHANGE: 1e9})
    assert sending.denoise - shared.denoise == pytest.approx(sent / 1e9)


def test_groups_make_videos_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_rates(CPU, SPEED)
    plan, size = released_plan("t2v-A14B", True, int(400e9), machine()), (832, 480)
    jobs = [Job(n, "a", "a", "", None, size, size, 81, n, Path(f"{n}.mp4"), "p") for n in range(5)]
    assert plan.sampling is not None
    tokenizer = UMT5Tokenizer(checkpoint("t2v-A14B") / "google" / "umt5-xxl", 512)
    plan = plan_videos(replace(plan, checkpoint=replace(plan.checkpoint, tokenizer=tokenizer)), plan.sampling, jobs)
    alone, groups = expect(plan, jobs), expect(replace(plan, layout=Layout(2, 1)), jobs)
    assert alone is not None
    assert groups is not None
    (one,) = (seconds(plan, video, SPEED) for video in plan.videos.values())
    assert sum(alone["stages"].values()) == pytest.approx(one.first)
    assert alone["whole"] == pytest.approx(one.first + 4 * one.next)
    assert groups["whole"] == pytest.approx(one.first + 2 * one.next)
    assert expect(plan, []) is None


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_operations_are_those_that_are_counted(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan.modules.vae_layers.RMSNorm.activate", lambda *_: None)  # no products, many calls
    vae = released_vae(task)
    _, rows, columns = vae.stride

    def decoded(shape: tuple[int, ...], tiles: tuple[int, int] = (1, 1)) -> int:
        latent = torch.empty(vae.z_dim, *shape, device="meta")
        return counted(lambda: list(vae.decode(latent, tiles=tiles)))

    def encoded(shape: tuple[int, ...], tiles: tuple[int, int] = (1, 1)) -> int:
        image = torch.empty(3, shape[1] * rows, shape[2] * columns, device="meta")
        return counted(lambda: vae.encode(image[:, None], tiles=tiles, frames=4 * shape[0] - 3))

    assert decode_operations(vae, (vae.z_dim, 3, 5, 6)) == decoded((3, 5, 6))
    for length in (1, 7, 21):  # at 21 the last of the encoder's stages has become constant
        assert encode_operations(vae, (vae.z_dim, length, 5, 4)) == encoded((length, 5, 4))
    whole, regions = (2, 40, 36), Region(0, 40, 0, 36).divided(2, 1)
    assert decode_operations(vae, (vae.z_dim, *whole), regions) == decoded(whole, (2, 1))
    assert encode_operations(vae, (vae.z_dim, *whole), regions) == encoded(whole, (2, 1))


def counted(work: Callable[[], object]) -> int:
    """Floating-point operations of `work`, which runs on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()
    return counter.get_total_flops()


def test_a_small_video_has_a_budget() -> None:
    """A grid of 6 x 8 cells cannot be cut into the 8 x 8 tiles that larger ones may need."""
    task = WanT2V(config_of("t2v-A14B"), checkpoint("t2v-A14B"), device="cpu", vram=0.001)
    budget = plan_video(task.plan, (64, 48), 9).budget
    assert budget is not None
    assert budget.tiles == (6, 6)


@pytest.mark.slow
def test_the_command() -> None:
    done = python("-m", "wan.doctor", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrong"] == 0


@pytest.mark.gpu
def test_nothing_is_wrong_on_a_gpu(tmp_path: Path) -> None:
    wrong = [f.line() for f in doctor.findings_of("cuda", ROOT, tmp_path) if f.verdict == WRONG]
    assert not wrong
