"""The events of `--json` against their description, in runs of every kind."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import generate
from benchmarks.documents import EVENT_PARTS, EVENTS
from tests.prompt_extension.fake_services import FakeService
from tests.support import checkpoint, lora_dir
from wan.planning.time_estimate import ATTENTION, DISK, MATMUL, VAE, keep_rates

T2V = ["--ckpt_dir", str(checkpoint("t2v-A14B")), "--lora_dir", str(lora_dir("t2v-A14B")), "--size", "64*64",
       "--frame_num", "5", "--device", "cpu", "--json"]  # fmt: skip
TYPES: dict[str, Any] = {"text": str, "number": (int, float), "truth": bool, "list": list, "object": dict}


def described(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The events of a run, each with the fields of its kind and no others."""
    events = [json.loads(line) for line in lines]
    for event in events:
        kind = event["event"]
        fields = EVENTS[kind][1]
        assert event.keys() - {"event", "index"} == fields.keys() - {"index"}, kind
        assert "index" in event or "index" not in fields, kind
        typed(event, {"event": "text", "index": "number", **fields}, kind)
        for name in EVENT_PARTS.keys() & event.keys() if kind == "plan" else ():
            entries = event[name] if isinstance(event[name], list) else [event[name]]
            for entry in filter(None, entries):
                assert entry.keys() == EVENT_PARTS[name][1].keys(), name
                typed(entry, EVENT_PARTS[name][1], name)
    return events


def typed(values: dict[str, Any], fields: dict[str, str], what: str) -> None:
    for name, value in values.items():
        wanted = fields[name]
        allowed = TYPES[wanted.rstrip("?")]
        assert isinstance(value, allowed) or (value is None and wanted.endswith("?")), (what, name, value)
        assert isinstance(value, bool) == (wanted == "truth"), (what, name, value)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(*words: str) -> tuple[int, list[dict[str, Any]]]:
        code = generate.main([*T2V, *words])
        return code, described(capsys.readouterr().out.splitlines())

    return started


def of(kind: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def test_a_run_a_second_one_and_its_latents(run: Any) -> None:
    words = ("--prompt", "a cat", "--base_seed", "3", "--num_videos", "2", "--save_latents", "--resume")
    code, events = run(*words)
    assert (code, events[0]["event"], events[-1]["event"]) == (0, "plan", "message")
    assert [event["index"] for event in of("saved", events)] == [0, 1]
    assert {event.get("index") for event in of("end", events) if event["stage"] == "denoise"} == {0, 1}
    assert {event.get("index") for event in of("end", events) if event["stage"] == "load"} == {None}
    assert (of("plan", events)[0]["task"], of("plan", events)[0]["solver"]) == ("t2v-A14B", "euler")
    assert [job["prompt"] for job in of("plan", events)[0]["jobs"]] == ["a cat", "a cat"]
    (plan,) = of("plan", events)
    assert ([job["done"] for job in plan["jobs"]], plan["expected"]) == ([False, False], None)
    keep_rates(torch.device("cpu"), dict.fromkeys((MATMUL, ATTENTION, VAE, DISK), 1e9))
    code, events = run(*words, "--num_videos", "3")
    (plan,) = of("plan", events)
    assert [job["done"] for job in plan["jobs"]] == [True, True, False]
    assert plan["expected"]["whole"] == sum(plan["expected"]["stages"].values())
    assert plan["host"]["needed"] == max(plan["peak_bytes"].values())
    code, events = run(*words)
    assert (code, of("summary", events)[0]["there already"]) == (0, 2)
    latents = next(Path("outputs").glob("*.latents.safetensors"))
    code, events = run("--decode_latents", str(latents), "--save_file", "again.mp4")
    assert (code, Path("again.mp4").exists()) == (0, True)


def test_a_dry_run(run: Any) -> None:
    code, events = run("--prompt", "a cat", "--dry_run")
    assert (code, [event["event"] for event in events]) == (0, ["plan", "checked"])


def test_prompts_written_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeService(answer="A long prompt about it.") as service:
        monkeypatch.setenv("OPENAI_BASE_URL", service.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
        words = ["--prompt", "a cat", "--prompt_extend_method", "openai", "--prompt_extend_model", "m"]
        code, events = run(*words, "--extend_only", "out.txt", "--dry_run")
        assert (code, {event["event"] for event in events[:-1]}) == (0, {"message"})
        assert events[-1]["event"] == "checked"
        code, events = run(*words, "--extend_only", "out.txt")
        assert (code, events[-1]) == (0, {"event": "extended", "file": "out.txt"})
        code, (error,) = run(*words, "--extend_only", "out.txt")
        assert (code, error["code"]) == (2, 2)
        service.plan = [(400, {"error": {"message": "no"}})]
        words += ["--prompt_extend_on_error", "fail", "--no_extend_cache"]
        code, events = run(*words, "--extend_only", "other.txt")
        assert (code, events[-1]["event"], events[-1]["code"]) == (2, "error", 2)


def test_events_that_end_a_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, (error,) = run("--prompt", "a cat", "--frame_num", "6")
    assert (code, error["event"], error["code"]) == (2, "error", 2)
    assert error["problems"][0].startswith("--frame_num 6 is not of the form")
    code, (error,) = run("--promt", "a cat")
    assert (code, error["code"]) == (2, 2)
    full = OSError(28, "No space left")
    monkeypatch.setattr("wan.runner.batch.make_video", lambda *_, **__: (_ for _ in ()).throw(full))
    code, events = run("--prompt", "a cat")
    assert code == 1
    assert of("failed", events)[0]["index"] == 0
    assert of("summary", events)[0]["failed"] == 1
    monkeypatch.setattr("wan.runner.batch.make_video", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    code, events = run("--prompt", "a cat")
    assert (code, events[-1]["event"], events[-1]["code"]) == (130, "error", 130)
