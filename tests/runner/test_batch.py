"""A batch from jobs to files, with a small network in the place of the models: what is saved, kept, skipped, said."""

import dataclasses
import io
import json
import math
import os
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wan.runner.video_job
from tests.distributed.ranks import launched
from tests.support import checkpoint, lora_dir
from wan.checkpoints.safetensors_file import TensorStore
from wan.cli.parser import parse
from wan.configs import TASKS
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Mesh
from wan.jobs.job import Generate, Job
from wan.jobs.resolve import resolve
from wan.media.video import VideoWriter, count_frames, read_record
from wan.planning.build import make_plan
from wan.planning.memory import plan_videos
from wan.planning.plan import Plan
from wan.planning.report import as_dict
from wan.runner.batch import decode_only, run_jobs
from wan.runner.record import plain, read_latents
from wan.utils.accelerator import Accelerator
from wan.utils.errors import InputError, JobError
from wan.utils.files import Beside, latents_elsewhere, make_part
from wan.utils.progress import STAGE, Progress

CHANNELS = TASKS["t2v-A14B"].out_dim  # of a latent


@cache
def planned(**flags: Any) -> Plan:
    """A real plan for the small checkpoint with a LoRA."""
    given = {
        "ckpt_dir": str(checkpoint("t2v-A14B")), "lora_dir": str(lora_dir("t2v-A14B")), "prompt": "one",
        "size": "64*48", "frame_num": 13, "base_seed": 7, "save_dir": "absent", "device": "cpu",
    }  # fmt: skip
    given = {name: value for name, value in {**given, **flags}.items() if value is not None}
    outcome = resolve(given)
    assert isinstance(outcome, Generate)
    return make_plan(outcome, Runtime())


class Models(nn.Module):
    """Follows wan.pipeline.Pipeline: text -> embedding, noise -> latent, latent -> frames in causal chunks."""

    mesh = Mesh()
    experts = None

    def __init__(self, plan: Plan, progress: Progress, runtime: Runtime) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plan, self.progress = plan, progress
        self.text = nn.Embedding(256, CHANNELS)
        self.net = nn.Conv3d(CHANNELS, CHANNELS, 1)
        self.pixels = nn.ConvTranspose3d(CHANNELS, 3, (1, 8, 8), stride=(1, 8, 8))
        self.contexts: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.broken_steps: set[int] = set()  # jobs whose sampling fails
        self.decode_errors: list[BaseException] = []  # one for each coming decode
        self.poison = False

    def encode(self, texts: Iterable[str]) -> None:
        with self.progress.stage("text"), torch.no_grad():
            self.contexts = {t: self.text(torch.tensor(list(t.encode()))).mean(0) for t in texts}
        self.calls.append("encode")

    def load_text_encoder(self) -> None:
        assert self.text is not None

    def release_text_encoder(self) -> None:
        del self.text
        self.calls.append("release")

    def load_networks(self) -> None:
        self.calls.append("load")

    def load_vae(self) -> None:
        self.calls.append("load VAE")

    def sample_job(self, job: Job, *, again: bool = False) -> Tensor:
        self.calls.append(f"sample {job.index}")
        if job.index in self.broken_steps:
            raise JobError("step 2 (t=937.5, high noise): NaN in the latent")
        width, height = job.size
        shape = (CHANNELS, (job.frame_num - 1) // 4 + 1, height // 8, width // 8)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
        with self.progress.stage("denoise", total=2), torch.no_grad():
            for _ in range(2):
                latent = self.net(latent) + self.contexts[job.prompt][:, None, None, None]
                self.progress.advance(1)
        return latent

    def computed(self) -> dict[str, list[int]]:
        return {}

    @torch.no_grad()
    def decode(
        self, latent: Tensor, *, finer: bool = False, convert: Callable[[Tensor], Tensor] = lambda pixels: pixels
    ) -> Iterator[Tensor]:
        self.calls.append("decode tiled" if finer else "decode")
        for i, frame in enumerate(latent.split(1, dim=1)):
            chunk = self.pixels(frame).repeat(1, 1 if i == 0 else 4, 1, 1).tanh()
            if i == 2 and self.decode_errors:
                raise self.decode_errors.pop(0)
            if i == 1 and self.poison:
                chunk[0, 1, 2, 3] = float("nan")
            yield convert(chunk)

    def info(self) -> dict[str, str]:
        return {"device": "cpu", "dtype": "float32", "attention": "sdpa"}


def make_run(folder: Path, prompts: Iterable[str] = ("one", "二", "three"), **changes: Any) -> Plan:
    """The usual plan, its request with `changes`; a job for each prompt."""
    plan = planned()
    jobs = [
        dataclasses.replace(
            plan.jobs[0], index=i, prompt=prompt, original_prompt=prompt, negative_prompt="bad",
            save_file=folder / f"{i}.mp4", source=f"prompts.txt line {i + 1}",
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return dataclasses.replace(plan, jobs=tuple(jobs), request=dataclasses.replace(plan.request, **changes))


class Outcome:
    """One call of run_jobs: what it gave back, said, and asked of the models."""

    def __init__(self, plan: Plan, **attributes: Any) -> None:
        self.models: Models | None = None

        def load(plan: Plan, progress: Progress, runtime: Runtime) -> Models:
            self.models = Models(plan, progress, runtime)
            for name, value in attributes.items():
                setattr(self.models, name, value)
            return self.models

        assert plan.sampling is not None
        plan = plan_videos(plan, plan.sampling, plan.jobs)  # tests change jobs
        stream = io.StringIO()
        try:
            self.failed = run_jobs(plan, Progress(stream=stream), load=load)
        finally:
            self.said = stream.getvalue()

    @property
    def calls(self) -> list[str]:
        return self.models.calls if self.models else []


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_three_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    outcome = Outcome(make_run(folder, preview=True, save_latents=True))
    assert outcome.failed == 0
    assert outcome.calls[:3] == ["encode", "release", "load"]
    assert outcome.calls[3:] == [w for i in range(3) for w in (f"sample {i}", "decode")]
    kinds = (".json", ".latents.safetensors", ".mp4", ".png")
    assert names(folder) == [f"{i}{kind}" for i in range(3) for kind in kinds]
    assert [count_frames(folder / f"{i}.mp4") for i in range(3)] == [13, 13, 13]
    for stage in ("text", "denoise", "decode", "save", "other", "total", "peak memory: RAM"):
        assert f"\n{stage}" in outcome.said
    assert "3 saved" in outcome.said.splitlines()[-1]


def test_the_record(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    Outcome(run)
    run = plan_videos(run, run.sampling, run.jobs)  # as `Outcome` does
    record = read_record(tmp_path / "1.mp4")
    assert read_record(tmp_path / "1.json") == record
    assert record["schema"] == 2
    assert record["request"] == run.request.recorded()
    assert record["request"]["lora_dir"] == str(lora_dir("t2v-A14B").absolute())
    assert record["meaning"] == json.loads(json.dumps(plain(run.meaning(run.jobs[1]))))
    assert record["job"]["prompt"] == record["job"]["original_prompt"] == "二"
    assert (record["job"]["seed"], record["job"]["negative_prompt"], record["meaning"]["image"]) == (7, "bad", None)
    assert record["plan"] == json.loads(json.dumps({**as_dict(run), "jobs": as_dict(run)["jobs"][1:2]}))
    assert record["pipeline"]["attention"] == "sdpa"
    assert {"python", "torch", "diffusers", "wan-lightning", "imageio-ffmpeg"} <= set(record["versions"])
    assert record["output"] == {"file": "1.mp4", "frames": 13, "width": 64, "height": 48, "fps": 16}
    assert set(record["seconds"]) == {"text", "denoise", "decode"}
    assert record["peak_memory_bytes"]["RAM"] > 1e6


def test_seconds_count_this_video_and_shared_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of the clock is one second later: equal jobs have equal times, however many went before."""
    now = iter(range(10**6))
    monkeypatch.setattr("wan.utils.progress.time.perf_counter", lambda: float(next(now)))
    Outcome(make_run(tmp_path))
    first, _, third = (read_record(tmp_path / f"{i}.mp4")["seconds"] for i in range(3))
    assert first == third
    assert first["text"] > 0


def test_nothing_of_the_environment_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_API_KEY", "sk-secret-word")
    Outcome(make_run(tmp_path, ["one"], save_latents=True))
    for path in tmp_path.iterdir():
        assert b"sk-secret-word" not in path.read_bytes()


def test_a_failed_job_among_three(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path), broken_steps={1})
    assert outcome.failed == 1
    assert names(tmp_path) == ["0.json", "0.mp4", "2.json", "2.mp4"]
    sentence = "prompts.txt line 2: step 2 (t=937.5, high noise): NaN in the latent"
    assert outcome.said.count(sentence) == 2  # when it happens, and at the end
    assert "2 saved, 1 failed" in outcome.said
    assert "Traceback" not in outcome.said


def test_on_error_stop(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path, on_error="stop"), broken_steps={1})
    assert outcome.failed == 1
    assert names(tmp_path) == ["0.json", "0.mp4"]
    assert "1 saved, 1 failed, 1 not tried" in outcome.said


def test_a_bug_keeps_its_traceback_and_the_latents(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path), decode_errors=[TypeError("a bug")])
    assert outcome.failed == 1
    assert "Traceback" in outcome.said
    assert "failed: prompts.txt line 1: TypeError: a bug; the finished latents are kept" in outcome.said
    assert names(tmp_path) == ["0.latents.safetensors", "1.json", "1.mp4", "2.json", "2.mp4"]


def test_a_device_that_has_failed_ends_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After such an error every later call fails: the other videos are not tried, and --resume makes them."""
    failure = "CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(Accelerator, "failure", property(lambda _: failure))
    error = RuntimeError(f"{failure}\nCUDA kernel errors might be asynchronously reported\nlong")
    outcome = Outcome(make_run(tmp_path), decode_errors=[error])
    assert outcome.failed == 1
    assert [call for call in outcome.models.calls if call.startswith("sample")] == ["sample 0"]
    assert len([line for line in outcome.said.splitlines() if "--resume" in line and failure in line]) == 1
    assert "2 not tried" in outcome.said
    monkeypatch.undo()
    error = RuntimeError("an error of this video alone")
    assert "2 saved" in Outcome(make_run(tmp_path / "other"), decode_errors=[error]).said


def test_nan_in_a_decoded_chunk(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path, ["one"]), poison=True)
    assert outcome.failed == 1
    assert "NaN or Inf in the decoded frames" in outcome.said
    assert names(tmp_path) == ["0.latents.safetensors"]


def test_out_of_memory_says_where_and_what_needs_less(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.\nlong")
    setattr(error, STAGE, "denoise")
    printed = wan.runner.video_job.reason(error, make_run(tmp_path, ["one"]).jobs[0])
    assert printed.startswith("out of memory on the device (CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "in denoise of 64x48, 13 frames; a smaller --size" in printed
    with pytest.raises(RuntimeError) as of_the_host:
        torch.empty(10**15)
    assert "out of memory" in wan.runner.video_job.reason(of_the_host.value)


def test_an_error_of_the_allocator_names_its_variable() -> None:
    assert "PYTORCH_ALLOC_CONF" in wan.runner.video_job.reason(
        RuntimeError("CUDA driver error: operation not supported")
    )
    assert "PYTORCH_ALLOC_CONF" not in wan.runner.video_job.reason(
        RuntimeError("CUDA error: unspecified launch failure")
    )


def test_decode_counts_the_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_jobs(make_run(tmp_path, ["one"]), Progress(json=True), load=Models) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["total"] for event in events if event["event"] == "begin" and event["stage"] == "decode"] == [13]


def test_a_batch_shows_the_time_left(tmp_path: Path) -> None:
    said = Outcome(make_run(tmp_path)).said.splitlines()
    videos = [line for line in said if line.startswith("video ")]
    assert [line.endswith(" left for all)") for line in videos] == [False, True, True]


def test_out_of_memory_is_retried_in_tiles(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path, ["one"]), decode_errors=[torch.OutOfMemoryError("CUDA out of memory\nlong")])
    assert outcome.failed == 0
    assert outcome.calls[-2:] == ["decode", "decode tiled"]
    assert "out of memory in decode: once more, in tiles" in outcome.said
    assert names(tmp_path) == ["0.json", "0.mp4"]
    assert count_frames(tmp_path / "0.mp4") == 13


@pytest.mark.parametrize("tiling", [False, True])
def test_out_of_memory_in_tiles_too(tmp_path: Path, tiling: bool) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory\nlong") for _ in range(2)]
    outcome = Outcome(make_run(tmp_path, ["one"], vae_tiling=tiling), decode_errors=errors)
    assert outcome.failed == 1
    assert outcome.calls[3:] == ["sample 0", "decode", "decode tiled"]
    assert "out of memory on the device (CUDA out of memory) in decode of 64x48, 13 frames; " in outcome.said
    assert "; the finished latents are kept" in outcome.said
    assert "--device cpu" in outcome.said
    assert names(tmp_path) == ["0.latents.safetensors"]


def test_interrupted_in_decode(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        Outcome(make_run(tmp_path), decode_errors=[KeyboardInterrupt()])
    assert "the finished latents are kept" in caught.value.__notes__[0]
    assert names(tmp_path) == ["0.latents.safetensors"]


def test_the_command_finishes_the_job(tmp_path: Path) -> None:
    """The latents of a failed job, decoded later, are the video the job would have made."""
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    Outcome(make_run(whole, ["one"]))
    run = make_run(broken, ["one"], dtype="fp32", overwrite=True)
    said = Outcome(run, decode_errors=[OSError(28, "No space left on device")]).said
    command = shlex.split(next(line for line in said.splitlines() if line.startswith("failed: ")).split("of them: ")[1])
    latents = broken / "0.latents.safetensors"
    assert command[:2] == ["python", "generate.py"]
    values, problems = parse(command[2:])
    assert not problems
    assert values.pop("ckpt_dir") == str(checkpoint("t2v-A14B"))
    assert values == {
        "decode_latents": str(latents), "save_file": str(broken / "0.mp4"), "device": "cpu", "dtype": "fp32",
        "overwrite": True,
    }  # fmt: skip
    decode_only(run, latents, broken / "0.mp4", Progress(quiet=True), load=Models)
    assert read_record(broken / "0.mp4")["meaning"] == read_record(whole / "0.mp4")["meaning"]
    frames = [b"".join(raw_frames(folder / "0.mp4")) for folder in (whole, broken)]
    assert frames[0] == frames[1]


def test_decoding_kept_latents_removes_leftovers(tmp_path: Path) -> None:
    """Leftovers of a process killed in decode are removed when the video is made after all."""
    run = make_run(tmp_path, ["one"], save_latents=True)
    Outcome(run)
    dead = make_part(tmp_path / "x.mp4")
    stream = io.StringIO()
    decode_only(run, tmp_path / "0.latents.safetensors", tmp_path / "x.mp4", Progress(stream=stream), load=Models)
    assert not dead.exists()
    assert f"{tmp_path / 'x.mp4'}: removed 1 " in stream.getvalue()


def raw_frames(path: Path) -> Iterator[bytes]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(os.fspath(path))
    next(reader)
    return reader


def test_decode_only_refuses_bad_input(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"], save_latents=True))
    latents, target = tmp_path / "0.latents.safetensors", tmp_path / "x.mp4"
    plan, quiet = planned(), Progress(quiet=True)

    def refused(message: str, plan: Plan = plan, file: Path = latents, save_file: Path = target) -> None:
        with pytest.raises(InputError, match=message):
            decode_only(plan, file, save_file, quiet, load=Models)

    refused("no such file", file=tmp_path / "absent.safetensors")
    refused("not latents that a run kept", file=tmp_path / "0.mp4")
    refused("made with --task t2v-A14B, not ti2v-5B", dataclasses.replace(planned(), config=TASKS["ti2v-5B"]))
    refused("0.mp4 .*--overwrite", save_file=tmp_path / "0.mp4")
    store = TensorStore.open(latents)
    kept, text = store.read("latent"), store.metadata["record"]
    record = json.loads(text)
    shapes = [kept[:8], kept.repeat(3, 1, 1, 1), kept[:, :0], kept[..., :0], kept[0], kept.new_zeros(())]
    others = [kept.to(kind) for kind in (torch.float64, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool)]
    for tensor in (*shapes, *others):
        save_file({"latent": tensor.contiguous()}, latents, {"record": text})
        refused("not latents that a run kept")
    meanings = [{"meaning": wrong} for wrong in ([], None, {}, {"task": []}, {"task": "t3v"})]
    for change in ({"job": True}, {"job": []}, {"job": None}, {"schema": "x"}, {"seconds": math.inf}, *meanings):
        save_file({"latent": kept}, latents, {"record": json.dumps(record | change)})
        refused("not latents that a run kept")
    for spelling in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}", "", "null", "[]", "3"):
        save_file({"latent": kept}, latents, {"record": spelling})
        refused("not latents that a run kept")
    save_file({"latent": kept}, latents, {"record": text})
    latents.write_bytes(latents.read_bytes()[:-8])
    refused("not latents that a run kept")


def test_decode_only_fails_in_one_sentence(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path, ["one"], save_latents=True))
    latents = tmp_path / "0.latents.safetensors"
    for error in (torch.OutOfMemoryError("CUDA out of memory\nlong"), OSError(28, "No space left on device")):

        def load(plan: Plan, progress: Progress, runtime: Runtime, error: BaseException = error) -> Models:
            models = Models(plan, progress, runtime)
            models.decode_errors = [error, error]
            return models

        with pytest.raises(JobError, match=rf"x\.mp4: .*(out of memory|No space).*; {latents} is as it was") as caught:
            decode_only(planned(), latents, tmp_path / "x.mp4", Progress(quiet=True), load=load)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["0.json", "0.latents.safetensors", "0.mp4"]


def test_kept_latents_are_exact(tmp_path: Path) -> None:
    outcome = Outcome(make_run(tmp_path, ["one"], save_latents=True))
    latent, record = read_latents(tmp_path / "0.latents.safetensors", TASKS["t2v-A14B"])
    assert outcome.models is not None
    assert torch.equal(latent, outcome.models.sample_job(make_run(tmp_path, ["one"]).jobs[0]))
    assert record["job"]["prompt"] == "one"


def test_no_room_for_the_latents_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the folder of the video, then the one for temporary files; then it is said."""
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("wan.utils.files.tempfile.tempdir", str(spare))
    real, full = wan.runner.video_job.save_latents, [tmp_path / "out"]

    def save(path: Path, latent: Tensor, record: dict) -> None:
        if path.parent in full or path.parent.parent in full:
            raise OSError(28, "No space left on device")
        real(path, latent, record)

    monkeypatch.setattr("wan.runner.video_job.save_latents", save)
    said = Outcome(make_run(tmp_path / "out", ["one"]), poison=True).said
    assert f"--decode_latents {latents_elsewhere(tmp_path / 'out' / '0.mp4')}" in said
    full.append(spare)
    said = Outcome(make_run(tmp_path / "out", ["one"]), poison=True).said
    assert "and the finished latents could not be kept" in said
    video = tmp_path / "out" / "0.mp4"
    for path in (Beside.of(video).latents, latents_elsewhere(video)):
        assert f"warning: the latents cannot be kept as {path} (No space left on device)" in said


def test_latents_that_were_asked_for_and_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video is there; that the other file is not is a failure, and said."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan.runner.video_job.save_latents", full)
    outcome = Outcome(make_run(tmp_path, ["one"], save_latents=True))
    assert outcome.failed == 1
    assert "0.mp4: saved, but not its latents" in outcome.said
    assert count_frames(tmp_path / "0.mp4") == 13


def killed_in_decode(folder: Path) -> int:
    def decode(*_: Any, **__: Any) -> Iterator[Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield from ()

    return Outcome(make_run(folder, ["one"]), decode=decode).failed


def test_killed_in_decode(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not even a process that is killed loses the finished steps."""
    codes, _ = launched(partial(killed_in_decode, tmp_path), 1, tmp_path_factory.mktemp("logs"))
    assert codes == [-signal.SIGKILL]
    assert names(tmp_path) == [".0.mp4.lock", "0.latents.safetensors"]
    decode_only(planned(), tmp_path / "0.latents.safetensors", tmp_path / "0.mp4", Progress(quiet=True), load=Models)
    assert count_frames(tmp_path / "0.mp4") == 13


def test_the_encoder_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = VideoWriter._start

    def start_and_die(writer: VideoWriter, width: int, height: int) -> None:
        start(writer, width, height)
        if writer.path.stem == "1":
            assert writer._encoder is not None
            writer._encoder.kill()

    monkeypatch.setattr(VideoWriter, "_start", start_and_die)
    outcome = Outcome(make_run(tmp_path))
    assert outcome.failed == 1
    assert "the video encoder failed: signal 9, Killed; the finished latents are kept" in outcome.said
    assert names(tmp_path) == ["0.json", "0.mp4", "1.latents.safetensors", "2.json", "2.mp4"]


def with_a_narrow_second_job(folder: Path, log: Path) -> int:
    """Files may not grow beyond 3 kB in the second job."""
    import resource

    sample = Models.sample_job

    def sample_job(self: Models, job: Job, *, again: bool) -> Tensor:
        room = 3000 if job.index == 1 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return sample(self, job, again=again)

    Models.sample_job = sample_job  # type: ignore[method-assign]  # in this child process only
    outcome = Outcome(make_run(folder))
    log.write_text(outcome.said)
    return outcome.failed


def test_a_full_disk(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It fails alone and the process lives."""
    logs = tmp_path_factory.mktemp("logs")
    codes, errors = launched(partial(with_a_narrow_second_job, tmp_path, logs / "said.txt"), 1, logs)
    assert codes == [1], errors
    said = (logs / "said.txt").read_text()
    assert "2 saved, 1 failed" in said
    assert "failed: prompts.txt line 2: " in said
    assert names(tmp_path)[:2] == ["0.json", "0.mp4"]
    assert [n for n in names(tmp_path) if n.startswith("1")] == []
    assert "the finished latents could not be kept" in said
    assert "File too large" in said


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    run = make_run(tmp_path)
    jobs = (dataclasses.replace(run.jobs[0], save_file=tmp_path / "file" / "0.mp4"), *run.jobs[1:])
    outcome = Outcome(dataclasses.replace(run, jobs=jobs))
    assert outcome.failed == 1
    assert f"{tmp_path / 'file'}: no file can be written there" in outcome.said
    assert "sample 0" not in outcome.calls  # before the long work
    assert names(tmp_path) == ["1.json", "1.mp4", "2.json", "2.mp4", "file"]


def test_a_file_at_the_output_path_is_refused(tmp_path: Path) -> None:
    for i in (0, 2):
        (tmp_path / f"{i}.mp4").write_text("mine")
    with pytest.raises(InputError) as caught:
        Outcome(make_run(tmp_path))
    assert [p.split()[0] for p in caught.value.problems] == [str(tmp_path / f"{i}.mp4") for i in (0, 2)]
    with pytest.raises(InputError, match="other settings"):
        Outcome(make_run(tmp_path, resume=True))
    assert (tmp_path / "0.mp4").read_text() == "mine"
    assert Outcome(make_run(tmp_path, overwrite=True)).failed == 0
    assert count_frames(tmp_path / "0.mp4") == 13


def test_resume_skips_what_is_whole(tmp_path: Path) -> None:
    Outcome(make_run(tmp_path), broken_steps={1})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    outcome = Outcome(make_run(tmp_path, resume=True, preview=True, save_latents=True, on_error="stop"))
    assert outcome.failed == 0
    assert [c for c in outcome.calls if c.startswith("sample")] == ["sample 1"]
    assert outcome.models is not None
    assert list(outcome.models.contexts) == ["二"]
    assert "1 saved, 2 there already" in outcome.said
    assert {p: p.stat().st_mtime_ns for p in before} == before
    again = Outcome(make_run(tmp_path, resume=True))
    assert (again.failed, again.models) == (0, None)  # nothing to do: nothing is loaded


@pytest.mark.parametrize("damage", ["cut", "cut in the index", "no index and no record beside"])
def test_resume_makes_a_damaged_video_again(tmp_path: Path, damage: str) -> None:
    Outcome(make_run(tmp_path, ["one"]))
    path = tmp_path / "0.mp4"
    data = path.read_bytes()
    path.write_bytes(data[: -10 if damage == "cut" else 100])
    if damage.startswith("no index"):
        (tmp_path / "0.json").unlink()
        with pytest.raises(InputError, match="other settings"):  # it could be anyone's
            Outcome(make_run(tmp_path, ["one"], resume=True))
        return
    assert Outcome(make_run(tmp_path, ["one"], resume=True)).calls[3:] == ["sample 0", "decode"]
    assert count_frames(path) == 13


JOB_CHANGES = [
    {"seed": 8}, {"prompt": "two"}, {"negative_prompt": "worse"}, {"frame_num": 17}, {"size": (64, 64)},
    {"image": b"other"},
]  # fmt: skip


@pytest.mark.parametrize("change", JOB_CHANGES, ids=lambda c: next(iter(c)))
def test_resume_does_not_skip_what_differs(tmp_path: Path, change: dict) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"an image")
    run = make_run(tmp_path / "out", ["one"], resume=True)
    run = dataclasses.replace(run, jobs=(dataclasses.replace(run.jobs[0], image=image),))
    assert Outcome(run).calls != []
    assert Outcome(run).calls == []
    if "image" in change:
        image.write_bytes(change["image"])
    else:
        run = dataclasses.replace(run, jobs=(dataclasses.replace(run.jobs[0], **change),))
    name = "base_seed" if "seed" in change else next(iter(change))
    with pytest.raises(InputError, match=rf"made with other settings \(--{name}\); --overwrite replaces it"):
        Outcome(run)
    run = dataclasses.replace(run, request=dataclasses.replace(run.request, overwrite=True))
    assert Outcome(run).calls[-1] == "decode"
    assert Outcome(run).calls == []


def test_json_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def load(plan: Plan, progress: Progress, runtime: Runtime) -> Models:
        models = Models(plan, progress, runtime)
        models.broken_steps = {0}
        return models

    run_jobs(make_run(tmp_path, ["one", "two"]), Progress(json=True), load=load)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (failed,) = [e for e in events if e["event"] == "failed"]
    assert (failed["index"], failed["reason"].startswith("prompts.txt line 1: step 2")) == (0, True)
    (saved,) = [e for e in events if e["event"] == "saved"]
    assert saved == {"event": "saved", "index": 1, "file": str(tmp_path / "1.mp4"), "frames": 13}


def test_the_end_of_a_run_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    """The command goes on with the drawn seed; a run that was resumed needs no other command."""
    run = make_run(tmp_path, base_seed=7)
    lines = Outcome(run, broken_steps={1}).said.splitlines()
    assert f"2 saved, 1 failed in {tmp_path}" in lines
    assert any(line.startswith("start-up ") for line in lines)
    assert lines[-2].startswith("  prompts.txt line 2: step 2")
    values, problems = parse(shlex.split(lines[-1].partition(": ")[2])[2:])
    assert (values["resume"], values["base_seed"], problems) == (True, 7, [])
    lines = Outcome(make_run(tmp_path, resume=True), broken_steps={1}).said.splitlines()
    assert "generate.py" not in lines[-1]
    assert "to go on" not in Outcome(make_run(tmp_path, resume=True)).said


@pytest.mark.parametrize("how", ["portable", "none"])
def test_a_video_that_is_handed_on_holds_no_path_of_this_machine(tmp_path: Path, how: str) -> None:
    """The record beside it is whole, and `--resume` knows the video, also without that one where the video has it."""
    Outcome(make_run(tmp_path, ["/one/prompt"], record=how))
    data, beside = (tmp_path / "0.mp4").read_bytes(), Beside.of(tmp_path / "0.mp4").record
    for path in (tmp_path, checkpoint("t2v-A14B").parent, lora_dir("t2v-A14B").parent, Path.home()):
        assert str(path).encode() not in data
    record = json.loads(beside.read_text())
    assert record["request"]["ckpt_dir"] == str(checkpoint("t2v-A14B"))
    assert Outcome(make_run(tmp_path, ["/one/prompt"], resume=True)).models is None
    if how == "none":
        with pytest.raises(InputError):
            read_record(tmp_path / "0.mp4")
        return
    inside = read_record(tmp_path / "0.mp4")
    assert inside["meaning"] == record["meaning"]
    assert inside["job"]["prompt"] == "/one/prompt"
    assert inside["request"]["ckpt_dir"] == checkpoint("t2v-A14B").name
    assert sorted(inside["plan"]["fingerprints"].values()) == sorted(record["plan"]["fingerprints"].values())
    beside.unlink()
    assert Outcome(make_run(tmp_path, ["/one/prompt"], resume=True)).models is None


def test_a_record_is_never_without_its_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever dies between the two names leaves the video, of which `--resume` writes the record again."""
    rename = Path.replace

    def die(part: Path, target: Path) -> Path:
        if target.name == "0.json":
            raise KeyboardInterrupt
        return rename(part, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            Outcome(make_run(tmp_path, ["one"]))
    assert "0.mp4" in names(tmp_path)
    assert "0.json" not in names(tmp_path)
    assert Outcome(make_run(tmp_path, ["one"], resume=True)).models is None
    assert names(tmp_path) == ["0.json", "0.mp4"]
