"""Checkpoints: what is refused before a weight is read, what is refused while reading, and what loading costs."""

import gc
import json
import os
import pickle
import random
import shutil
import struct
import time
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.loading import fresh, write_text_encoder, write_transformer
from tests.checkpoints.support import problems
from tests.support import checkpoint, config_of
from tests.unprivileged import run_unprivileged
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.hub import located
from wan.checkpoints.pth_file import open_pickle
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import open_file
from wan.offload.reader import PIECE_BYTES, Source, load, parameter_dtypes, read_ahead
from wan.utils.errors import InputError, TensorFileError

TASK = "t2v-A14B"
SHARD = "high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "high_noise_model/diffusion_pytorch_model.safetensors.index.json"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(checkpoint(TASK), tmp_path / "ckpt")
    return tmp_path / "ckpt"


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


def test_a_diffusers_folder_names_its_missing_files(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (text,) = problems(folder)
    for part in ("transformer/config.json", "transformer_2/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer",
                 "text_encoder/model.safetensors", "hf download Wan-AI/Wan2.2-T2V-A14B-Diffusers"):  # fmt: skip
        assert part in text


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


NESTED, DIGITS = '{"dim": ' + "[" * 100_000, '{"dim": ' + "7" * 5000 + "}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 0}, "not the configuration of a Wan transformer: num_heads is 0"),
        ({"num_heads": -4}, "num_heads is -4"),
        ({"num_heads": 64}, "num_heads 64 does not divide dim 64 into an even width"),
        ({"num_heads": 3}, "num_heads 3 does not divide dim 64"),
        ({"num_heads": 10**300}, "num_heads 1000"),
        ({"num_heads": 4.0}, "num_heads is 4.0"),
        ({"num_heads": "4"}, "num_heads is '4'"),
        ({"num_heads": True}, "num_heads is True"),
        ({"dim": 2**40}, "dim is 1099511627776, but the weights have 64"),
        ({"dim": 10**400, "num_heads": 1}, "dim is 1000"),
        ({"ffn_dim": 2**40}, "ffn_dim is 1099511627776, but the weights have 80"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, but the weights have 2"),
        ({"num_layers": 1}, "num_layers is 1, but the weights have 2"),
        ({"in_dim": 36}, "in_dim is 36, but the weights have 16"),
        ({"out_dim": 17}, "out_dim is 17, but the weights have 16"),
        ({"freq_dim": 2**40}, "freq_dim is 1099511627776, but the weights have 256"),
        ({"text_len": 10**12}, "text_len is 1000000000000, at most 512"),
        ({"text_len": None}, "text_len is None"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": "1e-6"}, "eps is '1e-6'"),
        ({"eps": 5.0}, "eps is 5.0"),
        (NESTED, "(nested too deeply)"),
        (DIGITS, "(Exceeds the limit"),
        ('{"dim": NaN}', "(NaN is not a number of JSON)"),
        (b"\xff\xfe\0", "not the configuration"),
        ("", "not the configuration"),
        ("null", "not the configuration"),
    ],
)
def test_a_hostile_config_json_builds_nothing(folder: Path, changes: dict | str | bytes, sentence: str) -> None:
    """A thousand million layers took minutes and gigabytes. The time is that of the whole checkpoint."""
    file = folder / "high_noise_model" / "config.json"
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(file.read_text()) | changes)
    file.write_bytes(changes.encode() if isinstance(changes, str) else changes)
    started = time.process_time()
    (text,) = problems(folder)
    assert time.process_time() - started < 5
    assert text.startswith(str(file))
    assert sentence in text
    assert len(text) < 400


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_are_refused(folder: Path, dtype: torch.dtype) -> None:
    """They ran to the end and gave wrong latents."""
    file = "low_noise_model/diffusion_pytorch_model-00001-of-00003.safetensors"
    rewrite(folder / file, lambda state: state.update({name: tensor.to(dtype) for name, tensor in state.items()}))
    (text,) = problems(folder)
    assert "low_noise_model: " in text
    assert "tensors are stored in a form that is not read here (first: " in text


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_pickled_weights_that_are_no_floats_are_refused(folder: Path, name: str, dtype: torch.dtype) -> None:
    state = torch.load(folder / name)
    torch.save({key: tensor.to(dtype) for key, tensor in state.items()}, folder / name)
    (text,) = problems(folder)
    assert text.startswith(f"{folder / name}: ")
    assert "stored in a form that is not read here" in text or f"has the unsupported dtype {dtype}" in text


def test_numbers_of_no_known_kind_in_a_pth(folder: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1, dtype=torch.complex64)}, folder / "Wan2.1_VAE.pth")
    (problem,) = problems(folder)
    assert problem.startswith(f"{folder / 'Wan2.1_VAE.pth'}: tensor conv1.weight has the unsupported dtype")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "not a safetensors index"),
        ("null", "not a safetensors index"),
        ('{"weight_map": null}', "not a safetensors index"),
        ('{"weight_map": {}}', "the index names no tensor"),
        ('{"weight_map": {"a": 3}}', "not a safetensors index"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "'../../x.safetensors' names no shard beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names no shard beside it"),
        ('{"weight_map": {"a": "x\\u0000"}}', "names no shard beside it"),
        ('{"weight_map": {"a": "\\udce9"}}', "'\\udce9' names no shard beside it"),
        ('{"weight_map": {"a\\n": "x"}}', "a tensor is named 'a\\n'"),
        ("[" * 100_000, "not a safetensors index"),
        ('{"n": ' + "1" * 5000 + "}", "not a safetensors index"),
    ],
)
def test_an_index_of_nothing(folder: Path, content: str, sentence: str) -> None:
    (folder / INDEX).write_text(content)
    (text,) = problems(folder)
    assert text.startswith(str(folder / INDEX))
    assert sentence in text


def test_a_missing_index_is_asked_for_where_shards_are(folder: Path) -> None:
    (folder / INDEX).unlink()
    (text,) = problems(folder)
    assert f"lacks {INDEX};" in text


@pytest.mark.parametrize("content", ["", "{}", "null", "[" * 100_000, '{"model": {}}', '{"version": "1.0"}', "\0"])
def test_a_tokenizer_that_is_none(folder: Path, content: str) -> None:
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    file.write_text(content)
    (text,) = problems(folder)
    assert text.startswith(f"{file}: not a tokenizer (")
    assert "\n" not in text


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    """Its larger ids would be outside the encoder's table: an error in a kernel, long after loading."""
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] += [[f"more{n}", -9.0] for n in range(100_000)]
    file.write_text(json.dumps(content))
    (text,) = problems(folder)
    assert "not of one model" in text


def test_block_numbers_with_gaps_build_nothing(folder: Path) -> None:
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(file)
    state["blocks.1000000000.norm1.weight"] = torch.zeros(1)
    torch.save(state, file)
    (text,) = problems(folder)
    assert "a tensor is of block '1000000000', but there are 3 blocks" in text
    rewrite(folder / SHARD, lambda state: state.update({"blocks.999999999.ffn.0.bias": torch.zeros(1)}))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["blocks.999999999.ffn.0.bias"] = Path(SHARD).name
    (folder / INDEX).write_text(json.dumps(index))
    assert "a tensor is of block '999999999'" in problems(folder)[0]


def test_odd_names_and_shapes_in_a_pth(folder: Path) -> None:
    file = folder / "Wan2.1_VAE.pth"
    for state in ({3: torch.zeros(1)}, {"a\nb": torch.zeros(1)}, {"conv2.weight": torch.zeros(())}, {}):
        torch.save(state, file)
        (text,) = problems(folder)
        assert text.startswith(f"{file}: ")
        assert "\n" not in text


def test_no_permission_is_not_damage(folder: Path) -> None:
    code = """
import contextlib, os, sys
from pathlib import Path
from generate import main
from tests.checkpoints.support import problems
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    mode = (folder / name).stat().st_mode
    (folder / name).chmod(0)
    print(*problems(folder), sep=" AND ")
    (folder / name).chmod(mode)
for locked in (folder, folder.parent):
    locked.chmod(0)
    with contextlib.redirect_stderr(sys.stdout):
        main(["--ckpt_dir", str(folder), "--prompt", "a cat", "--dry_run"])
    locked.chmod(0o755)
"""
    names = [SHARD, INDEX, "low_noise_model/config.json", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json",
             "low_noise_model"]  # fmt: skip
    *found, program_inside, program_above = run_unprivileged(code, folder, *names)
    for name, text in zip(names[:-1], found, strict=False):
        assert text == f"{folder / name}: there is no permission to read it"
    assert found[-1] == f"{folder}/low_noise_model/config.json: there is no permission to read it"
    assert program_inside == f"error: --ckpt_dir {folder}/model_index.json: there is no permission to read it"
    assert program_above.startswith(f"error: --ckpt_dir {folder}: ")
    assert "ermission" in program_above


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


def test_a_pth_whose_directory_points_past_its_end(folder: Path) -> None:
    file = folder / "Wan2.1_VAE.pth"
    data = bytearray(file.read_bytes())
    where = data.index(b"/data/0", data.index(b"PK\x01\x02"))
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02", 0, where) + 42, len(data) - 28)
    file.write_bytes(data)
    (text,) = problems(folder)
    assert text.startswith(f"{file}: truncated or damaged")


def test_a_truncated_pth_is_named(folder: Path) -> None:
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    os.truncate(file, os.path.getsize(file) // 2)
    (text,) = problems(folder)
    assert file.name in text


def test_tensors_of_a_pickle_may_be_under_the_usual_keys(tmp_path: Path) -> None:
    tensors, file = {"a": torch.randn(3)}, tmp_path / "x.CKPT"
    for content in (tensors, {"state_dict": tensors, "epoch": 3}, {"state_dict": {"model": tensors}},
                    {"generator_ema": tensors, "lr": 0.1}, {"generator_lora": tensors}):  # fmt: skip
        torch.save(content, file)
        assert torch.equal(open_file(file).read("a"), tensors["a"])


@pytest.mark.parametrize(
    "content", [3, [], {"a": {"b": torch.zeros(1)}}, {"model": {"a": 1}}, {"a": torch.zeros(1), "b": 1},
                {"generator": {"a": torch.zeros(1)}, "generator_ema": {"a": torch.zeros(1)}}]
)  # fmt: skip
def test_a_pickle_of_other_things_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(TensorFileError, match=r"x\.pth: holds "):
        open_pickle(tmp_path / "x.pth")


def test_malformed_pickles_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """IndexError, KeyError, TypeError, AttributeError, NotImplementedError and others came through."""
    whole, file, chance = tmp_path / "x.pth", tmp_path / "y.pth", random.Random(3)
    torch.save({"model": {"a": torch.ones(4, 4), "b": torch.randn(8)[2:].bfloat16()}}, whole)
    with zipfile.ZipFile(whole) as source:
        records = {info.filename: source.read(info) for info in source.infolist()}
    refused = 0
    for _ in range(200):
        with zipfile.ZipFile(file, "w") as target:
            for name, content in records.items():
                data = bytearray(content)
                for _ in range(chance.randint(1, 4) if name.endswith("/data.pkl") else 0):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                target.writestr(name, bytes(data))
        try:
            store = open_pickle(file)
            tensors = [store.read(name) for name in store]
        except InputError as e:
            refused += 1
            assert "\n" not in str(e)  # noqa: PT017 - some of the files are read, so `raises` does not fit
        else:
            assert len(tensors) == 2
    assert refused > 100


def test_a_record_shorter_than_its_storage_is_refused(tmp_path: Path) -> None:
    """It opened, and gave what came after it in the file."""
    whole, cut = tmp_path / "x.pth", tmp_path / "y.pth"
    torch.save({"a": torch.ones(64), "b": torch.randn(64)[:4]}, whole)
    for short in ("0", "1"):
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(cut, "w") as target:
            for info in source.infolist():
                data = source.read(info)
                target.writestr(info.filename, data[:100] if info.filename.endswith(f"/data/{short}") else data)
        with pytest.raises(TensorFileError, match=rf"y\.pth: .*tensor {'ab'[int(short)]} has 100 of 256 bytes"):
            open_pickle(cut)


def test_the_other_vae_is_refused(folder: Path) -> None:
    shutil.copy(checkpoint("ti2v-5B") / "Wan2.2_VAE.pth", folder / "Wan2.1_VAE.pth")
    text = "\n".join(problems(folder))
    assert "Wan2.1_VAE.pth: has stride (4, 16, 16), --task t2v-A14B needs another VAE" in text


def test_a_checkpoint_of_another_task_is_refused() -> None:
    text = "\n".join(problems(checkpoint("i2v-A14B"), "t2v-A14B"))
    assert "high_noise_model has 36 input channels: it belongs to i2v-A14B" in text


def test_nan_is_found_while_reading_and_named(folder: Path) -> None:
    def change(state):
        name = next(n for n in state if n.endswith("k.weight") and state[n].ndim == 2)
        state[name][3, 5] = float("nan")
        change.name = name

    rewrite(folder / SHARD, change)
    part = open_checkpoint(folder, config_of(TASK)).experts["high"]
    with pytest.raises(InputError, match=f"{SHARD}: tensor {change.name} holds NaN or Inf".replace(".", r"\.")):
        load(part.module, Source(part.weights, lambda _: torch.float32), CPU)


def test_large_finite_values_are_not_taken_for_inf(tmp_path: Path) -> None:
    big = torch.full((64,), 3e38)
    save_file({"x": big}, tmp_path / "big.safetensors")
    source = Source(TensorStore.open(tmp_path / "big.safetensors"), lambda _: torch.float32)
    ((_, tensor),) = read_ahead(list(source.pieces(["x"])))
    assert torch.equal(tensor, big)


def test_loading_casts_each_parameter_to_its_dtype() -> None:
    part = open_checkpoint(checkpoint(TASK), config_of(TASK)).experts["low"]
    model = load(part.module, Source(part.weights, parameter_dtypes(torch.bfloat16, False)), CPU)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.norm3.weight" in kept
    assert "head.modulation" in kept
    assert "time_projection.1.bias" in kept
    assert "blocks.1.cross_attn.norm_k.weight" in kept
    assert not {n for n in kept if ".modulation" in n and n.startswith("blocks")}
    assert not {n for n in kept if n.startswith(("patch", "text")) or ".ffn." in n or n.endswith(".q.weight")}
    assert torch.equal(model.blocks[0].ffn[0].weight, part.weights.read("blocks.0.ffn.0.weight").bfloat16())


def test_convert_model_dtype_casts_everything() -> None:
    part = open_checkpoint(checkpoint(TASK), config_of(TASK)).experts["low"]
    model = load(part.module, Source(part.weights, parameter_dtypes(torch.bfloat16, True)), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("piece_bytes", [PIECE_BYTES, 4000, 1])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)])
def test_read_ahead_gives_every_row_once(piece_bytes: int, rows: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces."""
    monkeypatch.setattr("wan.offload.reader.PIECE_BYTES", piece_bytes)
    store = TensorStore.open(checkpoint(TASK) / INDEX)
    found: dict[str, list[torch.Tensor]] = {}
    for piece, tensor in read_ahead(list(Source(store, lambda _: torch.float32).pieces(store, lambda _: rows))):
        found.setdefault(piece.name, []).append(tensor.clone())
    assert found.keys() == {name for name, shape in store.shapes.items() if range(shape[0])[rows]}
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), store.read(name)[rows])


@pytest.mark.parametrize("piece_bytes", [4000, 1])
def test_weights_do_not_depend_on_the_pieces(piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part = open_checkpoint(checkpoint(TASK), config_of(TASK)).experts["high"]
    dtype = parameter_dtypes(torch.bfloat16, False)
    want = load(part.module, Source(part.weights, dtype), CPU).state_dict()
    monkeypatch.setattr("wan.offload.reader.STRIP_BYTES", piece_bytes)
    strips = load(part.module, Source(part.weights, dtype), CPU).state_dict()
    assert all(torch.equal(strips[name], tensor) for name, tensor in want.items())
    monkeypatch.setattr("wan.offload.reader.PIECE_BYTES", piece_bytes)
    found = load(part.module, Source(part.weights, dtype), CPU).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


def test_a_pth_is_read_from_where_its_tensors_lie(tmp_path: Path) -> None:
    """Views, strides, one storage for two tensors, an empty one, a single number: rows of each, and the whole."""
    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = {
        "whole": base, "view": base[2:5], "turned": base.t(), "bf16": torch.randn(300, 7).bfloat16(),
        "empty": torch.empty(0, 3), "number": torch.tensor(4.0), "step": base[:, ::3],
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pth")
    store = open_pickle(tmp_path / "x.pth")
    assert list(store) == list(state)
    for name, tensor in state.items():
        assert store.shapes[name] == tuple(tensor.shape)
        buffer = torch.empty(store[name].bytes, dtype=torch.uint8)
        assert torch.equal(store.read(name, buffer=buffer), tensor)
        if tensor.dim():
            assert torch.equal(store.read(name, slice(1, 3)), tensor[1:3])


def test_a_pth_is_parsed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is read from it."""
    part = open_checkpoint(folder, config_of(TASK)).text_encoder
    monkeypatch.setattr("zipfile.ZipFile", lambda *_, **__: pytest.fail("opened again"))
    for _ in range(2):
        load(part.module, Source(part.weights, lambda _: torch.float32), CPU)


def test_the_checkpoint_keeps_no_weights(folder: Path) -> None:
    """Each load builds a module of its own; when that is dropped, its memory is free."""
    opened = open_checkpoint(folder, config_of(TASK))
    for part in (opened.text_encoder, opened.vae, opened.experts["high"]):
        module = load(part.module, Source(part.weights, lambda _: torch.float32), CPU)
        weights = [weakref.ref(parameter) for parameter in module.parameters()]
        assert {p.device.type for p in part.module.parameters()} == {"meta"}
        del module
        gc.collect()
        assert not [weight for weight in weights if weight() is not None]


def test_a_hub_id_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"^--ckpt_dir Wan-AI/Nothing: no such file or folder here, and .* offline",
    ):
        located("--ckpt_dir", "Wan-AI/Nothing")


def test_loading_large_weights_peaks_at_the_final_bytes(tmp_path: Path) -> None:
    """0.7 GB of float32 on disk becomes 0.37 GB of bf16; measured 1.05 of the final bytes, at most 1.12 allowed."""
    write_transformer(tmp_path / "model.safetensors", layers=10)
    assert (tmp_path / "model.safetensors").stat().st_size > 0.7e9
    _, final, peak, _ = fresh("transformer", tmp_path / "model.safetensors")
    assert final > 3.5e8
    assert peak < 1.12


@pytest.mark.slow
def test_loading_a_text_encoder_peaks_at_the_final_bytes(tmp_path: Path) -> None:
    """0.55 GB of bf16 in a .pth becomes 1.1 GB of float32; mapped pages must not stay resident."""
    write_text_encoder(tmp_path / "t5.pth", layers=20)
    _, final, peak, _ = fresh("text_encoder", tmp_path / "t5.pth")
    assert final > 1e9
    assert peak < 1.25
