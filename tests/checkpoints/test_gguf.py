"""GGUF files: every type as the package makes numbers of it, shapes and names of the model, and what is refused."""

import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning.__main__ import main
from lightning.lora import Lora
from lightning.merge import Merge
from tests.checkpoints.gguf_support import SCALES_AT, drawn_blocks, write_gguf
from tests.lightning.support import base, plain, small_pairs, write
from tests.support import checkpoint, lora_dir, manifest
from wan.checkpoints.gguf_file import open_gguf
from wan.checkpoints.key_mapping import diffusers_name, text_name
from wan.checkpoints.weights import TEXT_ENCODER, as_ours, open_expert, open_file
from wan.utils.errors import InputError, TensorFileError

SHAPE = (24, 3, 512)


def weights() -> dict[str, Tensor]:
    store = base()
    return {name: store.read(name) for name in store}


def stored_raw(path: Path, raw: np.ndarray, kind: str, name: str = "a", shape: tuple[int, ...] | None = None) -> Path:
    """One tensor of bytes that are given."""
    writer = gguf.GGUFWriter(path, "wan")
    if shape:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    for write_part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write_part()
    writer.close()
    return path


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """The package's own reader, and its dequantisation of each whole tensor."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", SCALES_AT)
def test_every_quantised_type_is_the_packages_numbers(kind: str, tmp_path: Path) -> None:
    path = stored_raw(tmp_path / "a.gguf", drawn_blocks(kind, SHAPE), kind)
    expected = torch.from_numpy(numbers_of(path)["a"])
    store = open_gguf(path)
    assert (store["a"].shape, store["a"].dtype, store.stored("a")[0]) == (SHAPE, "F32", kind)
    found = store.read("a")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for rows in (slice(5, 21), slice(0, 1), slice(23, 99), slice(7, 7)):
        buffer = torch.full((store["a"].rows(rows).bytes + 8,), 7, dtype=torch.uint8)
        part = store.read("a", rows, buffer)
        assert torch.equal(part, expected[rows])
        assert part.numel() == 0 or part.data_ptr() == buffer.data_ptr()
        assert (buffer[-8:] == 7).all(), "nothing is written beyond what was asked for"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    tensor = torch.randn(SHAPE).to(dtype)
    store = open_gguf(write_gguf(tmp_path / "a.gguf", {"a": tensor}, lambda *_: kind))
    assert store["a"].dtype == kind
    assert torch.equal(store.read("a"), tensor)
    assert torch.equal(store.read("a", slice(3, 9)), tensor[3:9])


@pytest.mark.parametrize("kind", SCALES_AT)
def test_diffusers_formulas_agree(kind: str, tmp_path: Path) -> None:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    raw, stored = drawn_blocks(kind, SHAPE, seed=3), gguf.GGMLQuantizationType[kind]
    values, width = gguf.GGML_QUANT_SIZES[stored]
    theirs = dequantize_functions[stored](torch.from_numpy(raw).reshape(-1, width), values, width, torch.float32)
    ours = open_gguf(stored_raw(tmp_path / "a.gguf", raw, kind)).read("a")
    torch.testing.assert_close(ours, theirs.reshape(SHAPE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_a_tensor_reshaped_to_fit_the_blocks(kind: str, tmp_path: Path) -> None:
    shape = (32, 4, 3, 2)  # a row of 24 values: blocks begin and end inside rows
    raw = drawn_blocks(kind, (3, 256), seed=1)
    store = open_gguf(stored_raw(tmp_path / "a.gguf", raw, kind, shape=shape))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])).reshape(shape)
    assert store["a"].shape == shape
    for start in range(0, 32, 3):
        for stop in range(start, 33, 5):
            assert torch.equal(store.read("a", slice(start, stop)), expected[start:stop])


def test_only_some_blocks_at_a_time_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, most = stored_raw(tmp_path / "a.gguf", drawn_blocks("Q8_0", (4096, 512)), "Q8_0"), []
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr("gguf.quants.dequantize", lambda raw, kind: most.append(raw.nbytes) or dequantize(raw, kind))
    store = open_gguf(path)
    del most[:]
    store.read("a", slice(100, 3000))
    assert len(most) > 5
    assert max(most) <= (1 << 18) * 34 / 32


def test_the_header_says_what_the_packages_reader_says(tmp_path: Path) -> None:
    def settings(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("a", 1)
        writer.add_int64("b", -5)
        writer.add_float64("c", 0.5)
        writer.add_bool("d", True)
        writer.add_array("e", ["one", "", "“three”"] * 50)
        writer.add_array("f", [1.5] * 1000)
        writer.add_custom_alignment(128)

    tensors = {"x": torch.randn(7, 96), "y": torch.randn(3, 2, 2, 1, 64), "z": torch.randn(5)}
    path = write_gguf(tmp_path / "a.gguf", tensors, lambda name, _: "Q4_0" if name == "x" else "F16", "t5", settings)
    store = open_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        assert store[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert store[tensor.name].offset == tensor.data_offset
        assert store.stored(tensor.name) == (tensor.tensor_type.name, tensor.n_bytes)
    assert store.keys() == tensors.keys()
    assert store.metadata == {"general.architecture": "t5"}


@pytest.mark.parametrize(
    "spelling",
    [lambda name: name, lambda name: f"model.diffusion_model.{name}", diffusers_name],
    ids=["released", "ComfyUI", "diffusers"],
)
def test_experts_in_any_spelling(spelling: Callable[[str], str], tmp_path: Path) -> None:
    tensors = {spelling(name): tensor for name, tensor in weights().items()}
    path = write_gguf(tmp_path / "expert.gguf", tensors, lambda _, t: "Q8_0" if t.dim() == 2 else "F16")
    expected, store = numbers_of(path), open_expert(path)
    assert store.shapes == base().shapes
    for name in store:
        assert np.array_equal(store.read(name).float().numpy().ravel(), expected[spelling(name)].ravel())


def test_tables_whose_first_axis_ggml_dropped(tmp_path: Path) -> None:
    tensors = {name: t[0] if name.endswith("modulation") else t for name, t in weights().items()}
    store = open_expert(write_gguf(tmp_path / "expert.gguf", tensors))
    assert store.shapes == base().shapes
    assert all(torch.equal(store.read(name), tensor) for name, tensor in weights().items())


def test_text_encoders_in_llama_cpps_names(tmp_path: Path) -> None:
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    named = {name: theirs.get_name(text_name(name), (".weight",)) for name in manifest("umt5_xxl")}
    state = torch.load(checkpoint("t2v-A14B") / "models_t5_umt5-xxl-enc-bf16.pth")
    assert all(named.values())
    tensors = {str(named[name]): tensor for name, tensor in state.items()}
    store = as_ours(open_file(write_gguf(tmp_path / "t5.gguf", tensors, architecture="t5encoder")), TEXT_ENCODER, "t5")
    assert store.keys() == state.keys()
    assert all(torch.equal(store.read(name), tensor.float()) for name, tensor in state.items())


def test_a_lora_merges_into_the_dequantised_weights(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "expert.gguf", weights(), lambda _, t: "Q4_0" if t.dim() == 2 else "F32")
    store, name = open_expert(path), "blocks.1.self_attn.k.weight"
    merge = Merge([Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors")], store.shapes)
    up, down = small_pairs()[name.removesuffix(".weight")]
    expected = plain(torch.from_numpy(numbers_of(path)[name]), up, down, 0.5)
    assert torch.equal(merge(name, store.read(name)), expected)


def spoiled(content: bytes, chance: random.Random) -> bytes:
    """Bytes of the header replaced, or the file cut somewhere."""
    header = content.rindex(b"head.modulation") + 40
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content))]
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(header)
        junk = chance.choice(
            [b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << chance.randrange(64)), chance.randbytes(4)]
        )
        data[place : place + len(junk)] = junk
    return bytes(data)


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_spoiled_files_are_understood_or_refused_in_a_sentence(count: int, tmp_path: Path) -> None:
    def settings(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"] * 20)
        writer.add_array("tokenizer.ggml.scores", [0.5] * 40)

    tensors = {name: t for name, t in weights().items() if not name.startswith("blocks.1")}
    content = write_gguf(
        tmp_path / "a.gguf", tensors, lambda _, t: "Q8_0" if t.dim() == 2 else "F32", settings=settings
    ).read_bytes()
    path, chance = tmp_path / "spoiled.gguf", random.Random(count)
    problems: list[str] = []
    for _ in range(count):
        path.write_bytes(spoiled(content, chance))
        try:
            store = open_expert(path)
            for name in store:
                store.read(name)
        except InputError as e:
            problems += e.problems
    assert len(problems) > count / 2
    assert all("\n" not in problem and str(path) in problem for problem in problems)


def header(*parts: bytes, tensors: int = 0, settings: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, settings) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, axes: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def array(key: bytes, kind: int, count: int) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the GGUF header is cut off or corrupt"),
        (b"{}" * 40, "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "of version 0x3000000, not of 2 or 3 (little-endian)"),
        (header(tensors=1 << 60), "cut off or corrupt"),
        (header(settings=1 << 63), "cut off or corrupt"),
        (header(array(b"k", 0, 1 << 62), settings=1), "0 are left"),
        (header(array(b"k", 8, 1 << 62), b"\0" * 800, settings=1), "cut off or corrupt"),
        (header(array(b"k", 9, 1 << 62), settings=1), "an array of the unknown kind 9"),
        (header(text(b"k") + struct.pack("<I", 77), settings=1), "of the unknown kind 77"),
        (header(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2, settings=2), "the key 'k' twice"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 0), settings=1), "must be a whole number above 0"),
        (header(text(b"\xff\xfe"), settings=1), "cut off or corrupt"),
        (header(tensor(b"a\nb", (4,), 0), tensors=1), r"a tensor is named 'a\nb'"),
        (header(tensor(b"a", (4,) * 9, 0), tensors=1), "tensor a has 9 axes"),
        (header(tensor(b"a", (4,), 99), tensors=1), "tensor a is of the type 99"),
        (header(tensor(b"a", (4,), 2), b"\0" * 99, tensors=1), "has rows of 4 values, Q4_0 blocks of 32"),
        (header(tensor(b"a", (1 << 40, 1 << 40), 0), tensors=1), "tensor a is cut off"),
        (header(tensor(b"a", (4,), 0, 1 << 63), tensors=1), "tensor a is cut off"),
        (header(*[tensor(b"a", (4,), 0)] * 2, b"\0" * 99, tensors=2), "tensor a twice"),
        (header(*(tensor(n, (4,), 0) for n in (b"a", b"b")), b"\0" * 99, tensors=2), "starts inside the one before it"),
        (header(tensor(b"a", (32,), 9), b"\0" * 99, tensors=1), "stored as Q8_1 (first: a), which the package gguf"),
        (
            header(array(b"comfy.gguf.orig_shape.a", 5, 1) + struct.pack("<i", 7), tensor(b"a", (4,), 0), b"\0" * 99,
                   tensors=1, settings=1),
            "comfy.gguf.orig_shape.a is not a shape of 4 values",
        ),
        *(
            (
                header(array(b"comfy.gguf.orig_shape.a", kind, count) + data, tensor(b"a", (4,), 0), b"\0" * 99,
                       tensors=1, settings=1),
                "comfy.gguf.orig_shape.a is not a shape of 4 values",
            )
            for kind, count, data in ((5, 0, b""), (6, 2, struct.pack("<ff", 2, 2)), (7, 1, b"\1"))
        ),
        (
            header(array(b"comfy.gguf.orig_shape.a", 5, 2) + struct.pack("<ii", -2, -2), tensor(b"a", (4,), 0),
                   b"\0" * 99, tensors=1, settings=1),
            "comfy.gguf.orig_shape.a is not a shape of 4 values",
        ),
    ],
)  # fmt: skip
def test_hostile_files(content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert main(["inspect", str(path), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {path}: ")
    assert sentence in line


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "expert.gguf", weights())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(TensorFileError, match=r"GGUF files need the package gguf: pip install gguf"):
        open_expert(path)


def test_tensors_that_are_no_weights_are_refused_by_the_type(tmp_path: Path) -> None:
    tensors: dict[str, Any] = weights()
    path = write_gguf(tmp_path / "expert.gguf", tensors)
    content = bytearray(path.read_bytes())
    name = b"blocks.0.self_attn.q.weight"
    place = content.index(name) + len(name) + 4 + 16  # axes' count, two axes
    content[place : place + 4] = struct.pack("<I", 26)  # as many bytes as before
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"blocks\.0\.self_attn\.q\.weight .*I32"):
        open_expert(path)


def test_inspect_says_what_a_file_is_and_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("t2v-A14B")
    path = write_gguf(
        tmp_path / "wan2.2_t2v_high_noise_Q8_0.gguf", weights(), lambda _, t: "Q8_0" if t.dim() == 2 else "F16"
    )
    assert main(["inspect", str(path), "--ckpt_dir", str(source)]) == 0
    shown = capsys.readouterr().out
    linear = sum(tensor.dim() == 2 for tensor in weights().values())
    assert "kind      full expert, F16/Q8_0, " in shown
    assert " MB\n" in shown
    assert f"tensors   {len(weights()) - linear} F16, {linear} Q8_0" in shown
    assert "fits      t2v-A14B" in shown
    assert f"use       --expert high={path}" in shown
    assert main(["inspect", str(path)]) == 2
    assert "(--ckpt_dir judges by a checkpoint of other sizes)" in capsys.readouterr().err


def test_inspect_knows_the_other_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("t2v-A14B")
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    state = torch.load(source / "models_t5_umt5-xxl-enc-bf16.pth")
    text = {str(theirs.get_name(text_name(name), (".weight",))): tensor for name, tensor in state.items()}
    vae = write(tmp_path / "vae.safetensors", torch.load(source / "Wan2.1_VAE.pth"))
    for path, kind, flag in (
        (write_gguf(tmp_path / "t5.gguf", text), "text encoder, F32", "--text_encoder"),
        (source / "models_t5_umt5-xxl-enc-bf16.pth", "text encoder, ", "--text_encoder"),
        (vae, "video autoencoder, F32", "--vae"),
        (source / "Wan2.1_VAE.pth", "video autoencoder, F32", "--vae"),
    ):
        assert main(["inspect", str(path), "--ckpt_dir", str(source)]) == 0
        shown = capsys.readouterr().out
        assert f"kind      {kind}" in shown
        assert "fits      t2v-A14B" in shown
        assert f"use       {flag} {path}" in shown
    assert main(["inspect", str(vae)]) == 0
    assert "fits      t2v-A14B, i2v-A14B" in capsys.readouterr().out, "by the latent's channels"
    assert main(["inspect", str(write_gguf(tmp_path / "llama.gguf", {"blk.0.attn_q.weight": torch.zeros(4, 4)}))]) == 2
    assert "holds neither an expert nor a text encoder nor a video autoencoder of Wan" in capsys.readouterr().err
