"""Checkpoints: what is refused before a weight is read, what is refused while reading, and what loading costs."""

import gc
import json
import os
import pickle
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.loading import peak_over_final, write_text_encoder, write_transformer
from lightning.errors import TensorFileError
from lightning.tensorfile import TensorStore
from tests.support import checkpoint, config_of
from wan.loading.checkpoint import Checkpoint, fetch
from wan.loading.stream import PIECE_BYTES, PickleStore, Source, load, parameter_dtypes, read_ahead
from wan.utils.errors import InputError

TASK = "t2v-A14B"
SHARD = "high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(checkpoint(TASK), tmp_path / "ckpt")
    return tmp_path / "ckpt"


def problems(folder: Path, task: str = TASK) -> list[str]:
    return Checkpoint(folder, task, config_of(task)).problems


def rewrite(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_the_small_checkpoints_have_no_problems() -> None:
    for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"):
        assert problems(checkpoint(task), task) == []


def test_all_missing_files_are_listed_with_the_download_command(folder: Path) -> None:
    (folder / "Wan2.1_VAE.pth").unlink()
    (folder / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    shutil.rmtree(folder / "low_noise_model")
    (text,) = problems(folder)
    for part in ("Wan2.1_VAE.pth", "tokenizer.json", "low_noise_model/config.json", "low_noise_model/diffusion_pytorch",
                 "hf download Wan-AI/Wan2.2-T2V-A14B --local-dir Wan2.2-T2V-A14B"):  # fmt: skip
        assert part in text


def test_diffusers_layout_is_recognised(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (text,) = problems(folder)
    assert "in diffusers' layout" in text
    assert "hf download" in text


def test_truncated_shard_names_file_and_tensor(folder: Path) -> None:
    os.truncate(folder / SHARD, os.path.getsize(folder / SHARD) - 100)
    (text,) = problems(folder)
    assert SHARD in text
    assert "truncated" in text
    assert "tensor head.modulation is cut off" in text


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{not json......}" * 4])
def test_corrupt_shard_names_the_file(folder: Path, content: bytes) -> None:
    (folder / SHARD).write_bytes(content)
    (text,) = problems(folder)
    assert SHARD in text


def test_index_naming_an_absent_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    (text,) = problems(folder)
    assert "shards that are not there: diffusion_pytorch_model-00002-of-00003.safetensors" in text


def test_index_putting_a_tensor_into_the_wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(n for n, s in index["weight_map"].items() if s == shards[0])
    index["weight_map"][name] = shards[1]
    (folder / INDEX).write_text(json.dumps(index))
    (text,) = problems(folder)
    assert f"tensor {name} is not in {shards[1]}" in text


def test_every_wrong_name_and_shape_is_listed(folder: Path) -> None:
    def change(state):
        state["blocks.1.ffn.2.strange"] = state.pop("blocks.1.ffn.2.bias")
        state["head.head.bias"] = torch.zeros(7)

    merged = {}
    for shard in sorted((folder / "high_noise_model").glob("*.safetensors")):
        merged |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    change(merged)
    save_file(merged, folder / "high_noise_model" / "diffusion_pytorch_model.safetensors")
    text = "\n".join(problems(folder))
    assert "1 tensors are missing: blocks.1.ffn.2.bias" in text
    assert "1 tensors are unexpected: blocks.1.ffn.2.strange" in text
    assert "head.head.bias has shape [7], expected [64]" in text


@pytest.mark.parametrize("content", ["{", "{}", '{"dim": "wide"}', "[1]"])
def test_a_bad_config_json_is_named(folder: Path, content: str) -> None:
    (folder / "low_noise_model" / "config.json").write_text(content)
    (text,) = problems(folder)
    assert "low_noise_model/config.json: not the configuration of a Wan transformer" in text


class Malicious:
    def __reduce__(self):
        return (Path("ran").write_text, ("x",))


def test_a_pickle_that_runs_code_is_refused_and_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.save({"conv1.weight": Malicious()}, folder / "Wan2.1_VAE.pth")
    (text,) = problems(folder)
    assert "Wan2.1_VAE.pth: holds more than plain tensors" in text
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", pickle.dumps({"a": 1})])
def test_a_damaged_pth_is_named(folder: Path, content: bytes) -> None:
    (folder / "Wan2.1_VAE.pth").write_bytes(content)
    (text,) = problems(folder)
    assert "Wan2.1_VAE.pth" in text


def test_a_truncated_pth_is_named(folder: Path) -> None:
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    os.truncate(file, os.path.getsize(file) // 2)
    (text,) = problems(folder)
    assert file.name in text


def test_a_pth_of_other_things_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(TensorFileError, match="not a flat dictionary of tensors"):
        PickleStore(tmp_path / "x.pth")


def test_the_other_vae_is_refused(folder: Path) -> None:
    shutil.copy(checkpoint("ti2v-5B") / "Wan2.2_VAE.pth", folder / "Wan2.1_VAE.pth")
    text = "\n".join(problems(folder))
    assert "Wan2.1_VAE.pth: has stride (4, 16, 16), --task t2v-A14B needs another VAE" in text


def test_a_checkpoint_of_another_task_is_refused() -> None:
    text = "\n".join(problems(checkpoint("i2v-A14B"), "t2v-A14B"))
    assert "high_noise_model: takes 36 channels, --task t2v-A14B gives 16: a checkpoint of another task?" in text


def test_nan_is_found_while_reading_and_named(folder: Path) -> None:
    def change(state):
        name = next(n for n in state if n.endswith("k.weight") and state[n].ndim == 2)
        state[name][3, 5] = float("nan")
        change.name = name

    rewrite(folder / SHARD, change)
    opened = Checkpoint(folder, TASK, config_of(TASK))
    opened.raise_problems()
    module, store = opened.experts["high"]
    with pytest.raises(InputError, match=f"{SHARD}: tensor {change.name} holds NaN or Inf".replace(".", r"\.")):
        load(module, store, home=CPU, dtype=lambda _: torch.float32)


def test_large_finite_values_are_not_taken_for_inf(tmp_path: Path) -> None:
    big = torch.full((64,), 3e38)
    save_file({"x": big}, tmp_path / "big.safetensors")
    source = Source(TensorStore.open(tmp_path / "big.safetensors"), lambda _: torch.float32)
    ((_, tensor),) = read_ahead(source.pieces(["x"]))
    assert torch.equal(tensor, big)


def test_loading_casts_each_parameter_to_its_dtype() -> None:
    opened = Checkpoint(checkpoint(TASK), TASK, config_of(TASK))
    module, store = opened.experts["low"]
    model = load(module, store, home=CPU, dtype=parameter_dtypes(torch.bfloat16, False))
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.norm3.weight" in kept
    assert "head.modulation" in kept
    assert "time_projection.1.bias" in kept
    assert "blocks.1.cross_attn.norm_k.weight" in kept
    assert not {n for n in kept if ".modulation" in n and n.startswith("blocks")}
    assert not {n for n in kept if n.startswith(("patch", "text")) or ".ffn." in n or n.endswith(".q.weight")}
    assert torch.equal(model.blocks[0].ffn[0].weight, store.read("blocks.0.ffn.0.weight").bfloat16())


def test_convert_model_dtype_casts_everything() -> None:
    opened = Checkpoint(checkpoint(TASK), TASK, config_of(TASK))
    model = load(*opened.experts["low"], home=CPU, dtype=parameter_dtypes(torch.bfloat16, True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 4000, 1])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)])
def test_read_ahead_gives_every_row_once(piece_bytes: int, rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces."""
    monkeypatch.setattr("wan.loading.stream.PIECE_BYTES", piece_bytes)
    store = TensorStore.open(checkpoint(TASK) / INDEX)
    found: dict[str, list[torch.Tensor]] = {}
    for piece, tensor in read_ahead(Source(store, lambda _: torch.float32).pieces(store, lambda _: rows)):
        found.setdefault(piece.name, []).append(tensor.clone())
    assert found.keys() == {name for name, shape in store.shapes.items() if range(shape[0])[rows]}
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), store.read(name)[rows])


@pytest.mark.parametrize("piece_bytes", [4000, 1])
def test_weights_do_not_depend_on_the_pieces(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Checkpoint(checkpoint(TASK), TASK, config_of(TASK))
    dtype = parameter_dtypes(torch.bfloat16, False)
    want = load(*opened.experts["high"], home=CPU, dtype=dtype).state_dict()
    monkeypatch.setattr("wan.loading.stream.PIECE_BYTES", piece_bytes)
    found = load(*opened.experts["high"], home=CPU, dtype=dtype).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_a_pth_is_read_from_where_its_tensors_lie(tmp_path: Path) -> None:
    """Views, strides, one storage for two tensors, an empty one, a single number: rows of each, and the whole."""
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = {
        "whole": base, "view": base[2:5], "turned": base.t(), "bf16": torch.randn(300, 7).bfloat16(),
        "empty": torch.empty(0, 3), "number": torch.tensor(4.0), "step": base[:, ::3],
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pth")
    store = PickleStore(tmp_path / "x.pth")
    assert list(store) == list(state)
    for name, tensor in state.items():
        assert store.shapes[name] == tuple(tensor.shape)
        buffer = torch.empty(store.buffer_bytes(name), dtype=torch.uint8)
        assert torch.equal(store.read(name, buffer=buffer), tensor)
        if tensor.dim():
            assert torch.equal(store.read(name, slice(1, 3)), tensor[1:3])


def test_a_pth_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is read from it."""
    opened = Checkpoint(folder, TASK, config_of(TASK))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened again"))
    assert opened.text_encoder is not None
    for _ in range(2):
        load(*opened.text_encoder, home=CPU, dtype=lambda _: torch.float32)


def test_the_checkpoint_keeps_no_weights(folder: Path) -> None:
    """Each load builds a module of its own; when that is dropped, its memory is free."""
    opened = Checkpoint(folder, TASK, config_of(TASK))
    assert opened.text_encoder is not None
    assert opened.vae is not None
    for blueprint, store in (opened.text_encoder, opened.vae, opened.experts["high"]):
        module = load(blueprint, store, home=CPU, dtype=lambda _: torch.float32)
        weights = [weakref.ref(parameter) for parameter in module.parameters()]
        assert {p.device.type for p in blueprint.parameters()} == {"meta"}
        del module
        gc.collect()
        assert not [weight for weight in weights if weight() is not None]


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^--ckpt_dir Wan-AI/Nothing is not on this machine and was not fetched"):
        fetch(Path("Wan-AI/Nothing"), config_of(TASK))


def test_loading_a_gigabyte_peaks_at_the_final_bytes(tmp_path: Path) -> None:
    """1.35 GB of float32 on disk becomes 0.7 GB of bf16; measured 1.06 of the final bytes, at most 1.25 allowed."""
    write_transformer(tmp_path / "model.safetensors", layers=20)
    assert (tmp_path / "model.safetensors").stat().st_size > 1.3e9
    ratio, final = peak_over_final("transformer", tmp_path / "model.safetensors")
    assert final > 6.5e8
    assert ratio < 1.25


def test_loading_a_text_encoder_peaks_at_the_final_bytes(tmp_path: Path) -> None:
    """0.55 GB of bf16 in a .pth becomes 1.1 GB of float32; mapped pages must not stay resident."""
    write_text_encoder(tmp_path / "t5.pth", layers=20)
    ratio, final = peak_over_final("text_encoder", tmp_path / "t5.pth")
    assert final > 1e9
    assert ratio < 1.25
