"""A baked checkpoint equals merging on the fly, tensor for tensor, and survives being killed at any point."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightning import bake as bake_module
from lightning.__main__ import main
from lightning.bake import RECORD, Bake
from lightning.lora import Lora
from lightning.lora_files import files_of
from lightning.merge import Merge
from lightning.releases import Release, preset, record_of, refuse_distilled_twice, release_in
from tests.lightning.support import INDEX, base, write
from tests.support import checkpoint, lora_dir
from wan.checkpoints import writer
from wan.checkpoints.quantised_formats import int8_rotations
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, as_ours
from wan.configs import TASKS
from wan.configs.precision import keeps_float32
from wan.jobs.resolve import resolve
from wan.modules.model import WanModel
from wan.modules.quantised_linear import KERNELS
from wan.offload.reader import Source, load, parameter_dtypes
from wan.utils.errors import InputError, LoraError, TensorFileError

SHARD = 100_000
CPU = torch.device("cpu")


def loras_of(task: str, folder: Path | None = None, strength: float = 1.0) -> dict[str, list[Lora]]:
    files = files_of(folder or lora_dir(task), list(TASKS[task].experts))
    return {expert: [Lora.open(file, strength)] for expert, file in files.items()}


def run(out: Path, task: str = "t2v-A14B", **arguments) -> None:
    ckpt_dir = arguments.pop("ckpt_dir", checkpoint(task))
    loras = arguments.pop("loras", loras_of(task))
    Bake(task=task, ckpt_dir=ckpt_dir, loras=loras, out=out, shard_bytes=SHARD, report=[].append, **arguments).write()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != RECORD}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_merging_on_the_fly(task: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run(tmp_path / "out", task, dtype=dtype)
    loras = loras_of(task)
    for expert, where in TASKS[task].experts.items():
        before = TensorStore.open(checkpoint(task) / where / INDEX)
        after = TensorStore.open(tmp_path / "out" / where / INDEX)
        merge = Merge(loras[expert], before.shapes)
        assert after.shapes == before.shapes
        assert len(after.files) > 1
        for name in before:
            expected = merge(name, before.read(name)).to(torch.float32 if keeps_float32(name) else dtype)
            found = after.read(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("form", KERNELS)
def test_in_8_bits_it_is_what_a_run_in_8_bits_makes(form: str, with_lora: bool, tmp_path: Path) -> None:
    """Loaded as they are, and to the bit what reading, merging and quantising give. With four blocks, two in 8 bits."""
    ckpt_dir = tmp_path / "base"
    where, in_8_bits = TASKS["t2v-A14B"].experts, KERNELS[form].dtype
    blueprints = {expert: four_blocks(ckpt_dir / folder, form) for expert, folder in where.items()}
    stores = {expert: TensorStore.open(ckpt_dir / folder / INDEX) for expert, folder in where.items()}
    loras = loras_of("t2v-A14B") if with_lora else {}
    run(tmp_path / "out", ckpt_dir=ckpt_dir, loras=loras, dtype=in_8_bits)
    for expert, model in blueprints.items():
        file = tmp_path / "out" / where[expert] / INDEX
        dtype = parameter_dtypes(torch.bfloat16, False, model)
        merge = Merge(loras.get(expert, ()), stores[expert].shapes)
        merged = load(model, Source(stores[expert], dtype, merge), CPU)
        store = as_ours(TensorStore.open(file), EXPERT, str(file))
        assert set(int8_rotations(store).values()) == ({16, 64} if form == "int8" else set())
        baked = load(model, Source(store, dtype), CPU)
        expected = dict(merged.named_parameters())
        assert {p.dtype for p in expected.values()} == {torch.bfloat16, torch.float32, in_8_bits}
        for name, found in baked.named_parameters():
            assert torch.equal(found.view(torch.uint8), expected[name].view(torch.uint8)), name


def four_blocks(folder: Path, form: str) -> WanModel:
    """Write an expert of the small checkpoint's sizes with four blocks; the network on the meta device, in 8 bits."""
    weights = {name: base().read(name) for name in base()}
    for name in [name for name in weights if name.startswith("blocks.")]:
        weights[name.replace("blocks.0", "blocks.2").replace("blocks.1", "blocks.3")] = weights[name] * 0.9
    write(folder / "diffusion_pytorch_model-00001-of-00001.safetensors", weights)
    index = {"weight_map": dict.fromkeys(weights, "diffusion_pytorch_model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    sizes = json.loads((checkpoint("t2v-A14B") / "high_noise_model" / "config.json").read_text())
    with torch.device("meta"):
        model = WanModel.from_config({**sizes, "num_layers": 4}, weights["text_embedding.0.weight"].shape[1])
    model.quantise(form)
    return model


@pytest.mark.parametrize("form", KERNELS)
def test_8_bits_have_no_place_in_diffusers_layout(form: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="--dtype"):
        run(tmp_path / "out", dtype=KERNELS[form].dtype, layout="diffusers")


def test_layout_and_other_files(tmp_path: Path) -> None:
    run(tmp_path / "out")
    source = checkpoint("t2v-A14B")
    others = {name for name in contents(source) if "diffusion_pytorch_model" not in name}
    found = contents(tmp_path / "out")
    assert {name for name in found if "diffusion_pytorch_model" not in name} == others
    assert all(found[name] == (source / name).read_bytes() for name in others)
    assert (tmp_path / "out" / "Wan2.1_VAE.pth").samefile(source / "Wan2.1_VAE.pth")
    index = json.loads(found[f"high_noise_model/{INDEX}"])
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    sizes = 0
    for shard in files:
        with safe_open(tmp_path / "out" / "high_noise_model" / shard, "pt") as file:  # the format's own reader
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        assert {name for name, where in index["weight_map"].items() if where == shard} == set(tensors)
        sizes += sum(tensor.nbytes for tensor in tensors.values())
        assert sum(tensor.nbytes for tensor in tensors.values()) <= SHARD
    assert index["metadata"]["total_size"] == sizes


def test_hidden_files_stay_behind(tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(checkpoint("ti2v-5B"), source)
    (source / ".cache").mkdir()
    (source / ".cache" / "download.lock").touch()
    run(tmp_path / "out", "ti2v-5B", ckpt_dir=source)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / ".cache").exists()


def test_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path / "out")
    copy = tmp_path / "out" / "Wan2.1_VAE.pth"
    assert copy.read_bytes() == (checkpoint("t2v-A14B") / "Wan2.1_VAE.pth").read_bytes()
    assert not copy.samefile(checkpoint("t2v-A14B") / "Wan2.1_VAE.pth")


def test_record(tmp_path: Path) -> None:
    run(tmp_path / "out", loras=loras_of("t2v-A14B", strength=0.5))
    record = record_of(tmp_path / "out")
    assert record is not None
    assert (record["task"], record["dtype"]) == ("t2v-A14B", "bfloat16")
    entry = record["loras"]["high"][0]
    file = lora_dir("t2v-A14B") / "high_noise_model.safetensors"
    assert entry["sha256"] == {file.name: sha256(file.read_bytes()).hexdigest()}
    assert (entry["strength"], entry["pairs"]) == (0.5, [20, 20])
    assert len(record["base"]["low"]) == 3
    for name, digest in record["shards"].items():
        assert sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert record_of(checkpoint("t2v-A14B")) is None


class Killed(BaseException):
    """Raised as a signal would be: nothing catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    module = writer if function == "_converted" else bake_module
    original, calls = getattr(module, function), []

    def counted(*arguments):
        calls.append(function)
        if len(calls) == call:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(module, function, counted)


@pytest.mark.parametrize(
    ("function", "call"),
    [("_prepare", 1), ("_converted", 1), ("_converted", 30), ("_converted", 100), ("write_shard", 3),
     ("write_index", 1), ("write_index", 2), ("_bring_others", 1), ("write_json", 1), ("write_json", 2)],
)  # fmt: skip
def test_killed_and_resumed(function: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, function, call)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    written = {file: file.stat().st_mtime_ns for file in partial.rglob("*-of-*.safetensors")}
    merged: list[str] = []
    original = writer._converted

    def count(target: writer.Target, *arguments):
        merged.append(target.source)
        return original(target, *arguments)

    monkeypatch.setattr(writer, "_converted", count)
    run(tmp_path / "out")
    assert not partial.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    done = sum(len(TensorStore.open(tmp_path / "out" / file.relative_to(partial))) for file in written)
    assert len(merged) == 2 * len(base()) - done
    for file, modified in written.items():
        assert (tmp_path / "out" / file.relative_to(partial)).stat().st_mtime_ns == modified
    record, whole = record_of(tmp_path / "out"), record_of(tmp_path / "whole")
    assert record == whole


def test_killed_before_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace

    def kill(source: Path, target: Path) -> None:
        if Path(source).suffix == ".partial":
            raise Killed
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer, "_converted", None)  # everything is there: nothing may be merged again
    run(tmp_path / "out")
    assert record_of(tmp_path / "out")


def test_a_damaged_shard_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, "_bring_others", 1)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    shard = next(iter((tmp_path / "out.partial").rglob("*00002-of-*.safetensors")))
    shard.write_bytes(shard.read_bytes()[:-1])
    shard.with_name(f".{shard.name}.another-1f-99.part").write_bytes(b"half of it")
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_partial_of_another_bake_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "_bring_others", 1)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    with pytest.raises(LoraError, match=r"out\.partial is not from this command"):
        run(tmp_path / "out", loras=loras_of("t2v-A14B", strength=0.5))
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("keep")
    with pytest.raises(LoraError, match=r"other\.partial is not from this command"):
        run(tmp_path / "other")


def refusal(tmp_path: Path, sentence: str, **arguments) -> None:
    with pytest.raises((LoraError, TensorFileError), match=sentence):
        run(arguments.pop("out", tmp_path / "out"), **arguments)
    assert not (tmp_path / "out.partial").exists()


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    refusal(tmp_path, "--ckpt_dir .*: no such folder", ckpt_dir=tmp_path / "absent")
    refusal(tmp_path, "--ckpt_dir .* lacks .*diffusion_pytorch_model", ckpt_dir=lora_dir("t2v-A14B"))
    refusal(tmp_path, "nothing to bake", loras={"high": [], "low": []})
    refusal(tmp_path, "already exists", out=tmp_path)
    refusal(tmp_path, "--out .* is inside --ckpt_dir", out=checkpoint("t2v-A14B") / "merged")
    refusal(
        tmp_path,
        "--task i2v-A14B: the checkpoint in .* is one of t2v-A14B",
        task="i2v-A14B",
        ckpt_dir=checkpoint("t2v-A14B"),
    )
    wrong = write(tmp_path / "style.safetensors", {"blocks.9.ffn.0.diff_b": torch.ones(80)})
    refusal(tmp_path, "nothing in it matches", loras={"high": [Lora.open(wrong)], "low": []})


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bake_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(LoraError, match=r"--out needs 0\.0 GB, the disk of .* has 0\.0 GB free"):
        run(tmp_path / "out")


def renamed(folder: Path, change: float = 0.0) -> Path:
    """The small LoRA's release folder under another name; with other content if `change` is not 0."""
    folder.mkdir()
    for file in lora_dir("t2v-A14B").iterdir():
        write(folder / file.name, {name: tensor + change for name, tensor in load_file(file).items()})
    return folder


def test_a_baked_checkpoint_is_not_distilled_again(tmp_path: Path) -> None:
    folder = renamed(tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1")
    once, other = tmp_path / "once", renamed(tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1", 0.1)
    run(once, loras=loras_of("t2v-A14B", folder), release=preset("t2v-seko-v1.1"))
    with pytest.raises(LoraError, match=r"once is distilled already \(t2v-seko-v1\.1\); the LoRA .* would do it again"):
        run(tmp_path / "twice", ckpt_dir=once, loras=loras_of("t2v-A14B", other))
    run(tmp_path / "forced", ckpt_dir=once, loras=loras_of("t2v-A14B", other), allow_partial=True)
    run(tmp_path / "style", ckpt_dir=once, loras=loras_of("t2v-A14B", renamed(tmp_path / "style-lora", 0.2)))
    record = record_of(tmp_path / "style")
    assert record is not None
    assert [lora["release"] for lora in record["loras"]["high"]] == ["t2v-seko-v1.1", None]
    assert release_in(tmp_path / "style") == release_in(once)


def test_the_same_lora_under_another_name_is_not_merged_twice(tmp_path: Path) -> None:
    first, second = renamed(tmp_path / "mine"), renamed(tmp_path / "copy")
    once = tmp_path / "once"
    run(once, loras={"high": loras_of("t2v-A14B", first)["high"], "low": []})
    with pytest.raises(LoraError, match=r"once has the LoRA \S*copy\S* merged in already, as \S*mine.*allow_partial"):
        run(tmp_path / "twice", ckpt_dir=once, loras=loras_of("t2v-A14B", second))
    run(tmp_path / "low", ckpt_dir=once, loras={"high": [], "low": loras_of("t2v-A14B", second)["low"]})
    record = record_of(tmp_path / "low")
    assert record is not None
    assert [len(record["loras"][expert]) for expert in ("high", "low")] == [1, 1]


def test_settings_of_the_result_are_kept(tmp_path: Path) -> None:
    release = Release("mine", ("t2v-A14B",), "lora", "", steps=6, shift=7.0, guidance=(1.5, 2.0), solver="dmd")
    run(tmp_path / "out", release=release)
    found = release_in(tmp_path / "out")
    assert found is not None
    assert (found.name, found.steps, found.shift, found.guidance) == ("mine", 6, 7.0, (1.5, 2.0))
    run(tmp_path / "style")
    assert release_in(tmp_path / "style") is None


def test_all_misfits_are_reported_at_once(tmp_path: Path) -> None:
    wrong = write(tmp_path / "style.safetensors", {"blocks.9.ffn.0.diff_b": torch.ones(80)})
    bad = write(tmp_path / "bad.safetensors", {"blocks.0.ffn.0.diff_b": torch.ones(81)})
    with pytest.raises(LoraError) as caught:
        run(tmp_path / "out", loras={"high": [Lora.open(wrong), Lora.open(bad)], "low": []})
    assert len(caught.value.problems) == 2


def test_a_broken_base_is_named(tmp_path: Path) -> None:
    task = "t2v-A14B"
    folder = tmp_path / "base"
    for expert in TASKS[task].experts.values():
        tensors = {name: base().read(name) for name in base()}
        tensors["head.head.bias"][0] = torch.nan
        write(folder / expert / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(TensorFileError, match=r"tensor head\.head\.bias holds NaN or Inf"):
        run(tmp_path / "out", ckpt_dir=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda record: record | {"loras": []}, "loras"),
        (lambda record: record | {"loras": {"high": [{"release": "x"}]}}, "path"),
        (lambda record: record | {"loras": {"high": "x"}}, "high"),
        (lambda record: record | {"release": "t2v-v1"}, "release"),
        (lambda record: record | {"release": {"steps": 4}}, "name"),
        (lambda record: record | {"release": {"name": "x", "guidance": [1]}}, "guidance"),
        (lambda record: record | {"release": {"name": "x", "shift": "wide"}}, "shift"),
        (lambda record: record | {"release": {"name": "x", "steps": "4"}}, "steps"),
        (lambda record: record | {"release": {"name": "x", "timesteps": 4}}, "timesteps"),
        (lambda record: {name: value for name, value in record.items() if name != "shards"}, "shards"),
        (lambda record: {name: value for name, value in record.items() if name != "loras"}, "loras"),
        (lambda record: [record], "list"),
        (lambda _: "{", "not JSON"),
    ],
)
def test_a_damaged_record_is_one_sentence_everywhere(change, fault: str, tmp_path: Path, capsys) -> None:
    once = tmp_path / "once"
    run(once)
    changed = change(json.loads((once / RECORD).read_text()))
    (once / RECORD).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    for read in (
        lambda: record_of(once),
        lambda: release_in(once),
        lambda: refuse_distilled_twice(once, lora_dir("t2v-A14B") / "high_noise_model.safetensors"),
        lambda: run(tmp_path / "again", ckpt_dir=once),
        lambda: resolve({"task": "t2v-A14B", "ckpt_dir": str(once), "prompt": "a cat"}),
    ):
        with pytest.raises(InputError, match=r"once/bake\.json cannot be used"):
            read()
    assert main(["inspect", str(once), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 2
    error = capsys.readouterr().err
    assert "bake.json" in error, fault
    assert error.count("\n") == 1
    (once / RECORD).unlink()
    assert record_of(once) is None


def test_a_second_bake_into_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one writes; afterwards the folder is whole, and a third bake finds it."""
    original = writer._converted
    refused: list[str] = []

    def meanwhile(*arguments):
        if not refused:
            with pytest.raises(LoraError, match=r"--out \S+out: another bake is writing it") as caught:
                run(tmp_path / "out")
            refused.append(str(caught.value))
        return original(*arguments)

    monkeypatch.setattr(writer, "_converted", meanwhile)
    run(tmp_path / "out")
    assert refused
    assert record_of(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(LoraError, match=r"--out .* already exists"):
        run(tmp_path / "out")
