"""--resume: kept latents are used, what a death left is put right, and a video is found wherever its row has gone."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runner.test_batch import Models, Outcome, make_run, names, planned
from wan.configs import TASKS
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.media.video import count_frames
from wan.planning.build import make_plan
from wan.runner.batch import jobs_to_do
from wan.runner.record import differences, read_latents, save_latents
from wan.utils.errors import InputError, out_of_memory
from wan.utils.files import Beside, locked, make_part


def test_kept_latents_are_decoded_and_not_made_again(tmp_path: Path) -> None:
    assert Outcome(make_run(tmp_path, ["one"]), decode_errors=[OSError(28, "full")]).failed == 1
    assert names(tmp_path) == ["0.latents.safetensors"]
    again = Outcome(make_run(tmp_path, ["one"], resume=True))
    assert again.calls[3:] == ["decode"], "no step is made again"
    assert "the latents of an earlier try are used" in again.said
    assert names(tmp_path) == ["0.json", "0.mp4"]
    other = Outcome(make_run(tmp_path / "other", ["one"]))
    assert other.failed == 0
    frames = [json.loads((f / "0.json").read_text())["output"]["frames"] for f in (tmp_path, tmp_path / "other")]
    assert frames == [13, 13]


def test_latents_of_another_video_are_not_used(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"]), decode_errors=[OSError(28, "full")])
    run = make_run(tmp_path, ["one"], resume=True)
    run = dataclasses.replace(run, jobs=(dataclasses.replace(run.jobs[0], seed=8),))
    assert Outcome(run).calls[3:] == ["sample 0", "decode"]


def test_files_beside_a_whole_video_are_repaired(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"], save_latents=True))
    beside = Beside.of(tmp_path / "0.mp4")
    record = json.loads(beside.record.read_text())
    beside.record.unlink()
    outcome = Outcome(make_run(tmp_path, ["one"], resume=True, preview=True, save_latents=True))
    assert outcome.models is None, "nothing is loaded"
    assert json.loads(beside.record.read_text()) == record
    assert beside.sheet.exists()
    assert beside.latents.exists(), "they were asked for"


def test_latents_left_between_saving_and_tidying_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("wan.runner.video_job._tidy", lambda *_: None)  # as if the process died here
        Outcome(make_run(tmp_path, ["one"]))
    assert names(tmp_path) == ["0.json", "0.latents.safetensors", "0.mp4"]
    assert "removed, the video is whole" in Outcome(make_run(tmp_path, ["one"], resume=True)).said
    assert names(tmp_path) == ["0.json", "0.mp4"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Parts of this run's videos go, finished ones included; another run's stay."""
    for _ in range(2):
        for name in ("0.mp4", "0.json", "0.latents.safetensors"):
            make_part(tmp_path / name)
        (tmp_path / ".0.mp4.lock").touch()
        outcome = Outcome(make_run(tmp_path, ["one"], resume=True))
        assert (outcome.failed, names(tmp_path)) == (0, ["0.json", "0.mp4"])
    foreign = make_part(tmp_path / "1.mp4")
    Outcome(make_run(tmp_path, ["one"], resume=True))
    assert names(tmp_path) == [foreign.name, "0.json", "0.mp4"]


def test_a_video_that_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    with locked(tmp_path / "1.mp4", pytest.fail):
        outcome = Outcome(make_run(tmp_path, resume=True))
    assert outcome.failed == 0
    assert "2 saved, 1 being made by other processes" in outcome.said
    assert not (tmp_path / "1.mp4").exists()


def row_plan(folder: Path, prompts: list[str], **flags: Any) -> Any:
    (folder / "p.txt").write_text("\n".join(prompts))
    given = {
        "ckpt_dir": planned().request.ckpt_dir, "lora_dir": planned().request.lora_dir, "size": "64*48",
        "frame_num": 13, "base_seed": 7, "prompt_file": str(folder / "p.txt"), "save_dir": str(folder / "out"),
        "device": "cpu", **flags,
    }  # fmt: skip
    outcome = resolve(given)
    assert isinstance(outcome, Generate)
    return make_plan(outcome, Runtime())


def test_rows_may_be_inserted_above(tmp_path: Path) -> None:
    assert Outcome(row_plan(tmp_path, ["a", "b"])).failed == 0
    before = set(names(tmp_path / "out"))
    outcome = Outcome(row_plan(tmp_path, ["new", "a", "b"], resume=True))
    assert [call for call in outcome.calls if call.startswith("sample")] == ["sample 0"]
    assert "1 saved, 2 there already" in outcome.said
    assert len(set(names(tmp_path / "out")) - before) == 2, "one more video and its record"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nlong"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_in_any_dress_leads_to_tiles(error: Exception, tmp_path: Path) -> None:
    assert out_of_memory(error)
    outcome = Outcome(make_run(tmp_path, ["one"]), decode_errors=[error])
    assert outcome.failed == 0
    assert outcome.calls[3:] == ["sample 0", "decode", "decode tiled"]
    assert count_frames(tmp_path / "0.mp4") == 13
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_no_room_while_loading_is_one_line(tmp_path: Path) -> None:
    class Full(Models):
        def load_networks(self) -> None:
            with self.progress.stage("load"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nlong")

    from wan.runner.batch import run_jobs
    from wan.utils.errors import JobError
    from wan.utils.progress import Progress

    with pytest.raises(JobError, match=r"out of memory on the device \(CUDA out.*GiB\) in load; --offload_model True"):
        run_jobs(make_run(tmp_path, ["one"]), Progress(quiet=True), load=Full)


def test_a_replay_names_the_differences(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"]))
    record = json.loads((tmp_path / "0.json").read_text())
    record["meaning"]["ckpt_dir"]["high expert"] = ["00"]
    record["versions"]["torch"] = "1.0"
    (tmp_path / "0.json").write_text(json.dumps(record))
    outcome = resolve({"replay": str(tmp_path / "0.json"), "save_dir": str(tmp_path / "out")})
    assert isinstance(outcome, Generate)
    assert outcome.replayed is not None
    printed = "\n".join(differences(make_plan(outcome, Runtime()), outcome.replayed))
    assert "--ckpt_dir is not what the record was made with" in printed
    assert "made with torch 1.0, here is" in printed
    assert len(printed.splitlines()) == 2
    record["schema"] = 1
    (tmp_path / "0.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="written by another version of this program"):
        resolve({"replay": str(tmp_path / "0.json")})


def test_a_name_that_was_chosen_is_made_under_that_name(tmp_path: Path) -> None:
    """`--resume` finds the equal video under another name, and copies it with its record and latents."""
    assert Outcome(row_plan(tmp_path, ["a"], save_latents=True)).failed == 0
    (old,) = (tmp_path / "out").glob("*.mp4")
    rows = [{"prompt": "a", "save_file": "shot_01.mp4"}, {"prompt": "b", "save_file": "deep/shot_02.mp4"}]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    named = {"prompt_file": str(tmp_path / "p.jsonl"), "resume": True, "save_latents": True}
    outcome = Outcome(row_plan(tmp_path, [], **named))
    assert [call for call in outcome.calls if call.startswith("sample")] == ["sample 1"]
    new = tmp_path / "out" / "shot_01.mp4"
    assert new.read_bytes() == old.read_bytes()
    assert json.loads(Beside.of(new).record.read_text())["output"]["file"] == "shot_01.mp4"
    assert Beside.of(new).latents.read_bytes() == Beside.of(old).latents.read_bytes()
    assert (tmp_path / "out" / "deep" / "shot_02.mp4").exists()
    assert Outcome(row_plan(tmp_path, [], **named)).models is None, "both are there now"


def test_resume_names_files_it_cannot_restore(tmp_path: Path) -> None:
    """A sheet is made of the video; latents and frames of steps are not, and a run that asks for them says so."""
    Outcome(make_run(tmp_path, ["one"]))
    outcome = Outcome(make_run(tmp_path, ["one"], resume=True, save_latents=True, preview=True, preview_steps=True))
    beside = Beside.of(tmp_path / "0.mp4")
    assert (outcome.failed, outcome.models, beside.sheet.exists()) == (0, None, True)
    for file in (beside.latents, beside.strip):
        (line,) = [line for line in outcome.said.splitlines() if str(file) in line]
        assert "--overwrite" in line


def test_latents_that_an_earlier_run_was_asked_for_stay(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"], save_latents=True))
    Outcome(make_run(tmp_path, ["one"], resume=True))
    assert Beside.of(tmp_path / "0.mp4").latents.exists()


@pytest.mark.parametrize("change", [{"schema": 1}, {"schema": None}, {"meaning": {}}])
def test_latents_of_another_schema_are_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    assert Outcome(make_run(tmp_path, ["one"]), decode_errors=[OSError(28, "full")]).failed == 1
    file = tmp_path / "0.latents.safetensors"
    latent, record = read_latents(file, TASKS["t2v-A14B"])
    save_latents(file, latent, {**record, **change})
    assert Outcome(make_run(tmp_path, ["one"], resume=True)).calls[3:] == ["sample 0", "decode"]


def test_the_newest_drawn_seed_counts(tmp_path: Path) -> None:
    """Two runs without a seed each drew one; `--resume` goes on with the later run."""
    for number, seed in enumerate((11, 12, 13)):
        assert Outcome(row_plan(tmp_path, ["a"], base_seed=seed, save_dir=str(tmp_path / "out"))).failed == 0
        for file in (tmp_path / "out").glob(f"*seed{seed}*"):
            os.utime(file, (1e9 + (number == 1), 1e9 + (number == 1)))
    for name in ("x.json", "x.latents.safetensors"):  # as if it had vanished since the folder was listed
        (tmp_path / "out" / name).symlink_to("nowhere")
    plan = row_plan(tmp_path, ["a"], base_seed=-1, resume=True)
    assert plan.jobs[0].seed == 12


def test_a_video_finished_between_the_look_and_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--resume` or without, it is left as it is."""
    for resume in (True, False):
        folder = tmp_path / str(resume)
        made: list[float] = []

        def look_and_wait(plan: Any, progress: Any, folder: Path = folder, made: list[float] = made) -> Any:
            found = jobs_to_do(plan, progress)
            if not made:
                made.append(0)
                Outcome(make_run(folder, ["one"]))
                made[0] = (folder / "0.mp4").stat().st_mtime_ns
            return found

        monkeypatch.setattr("wan.runner.batch.jobs_to_do", look_and_wait)
        outcome = Outcome(make_run(folder, ["one"], resume=resume))
        assert outcome.failed == 0
        assert "1 being made by other processes" in outcome.said
        assert (folder / "0.mp4").stat().st_mtime_ns == made[0]
