"""generate.py makes one video of one set of weights, whatever form they come in: folders of both layouts, files, GGUF.

Quantised forms are held to the video of the numbers that they encode, bit for bit, and to the unquantised one in dB.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import generate
from tests.checkpoints.gguf_support import SCALES_AT, drawn_blocks, write_gguf
from tests.checkpoints.test_files import SOURCE, T5_FILE, TASK, VAE_FILE, comfy_files, expert, saved
from tests.checkpoints.test_layouts import bake
from tests.support import TESTS, lora_dir, read_frames
from wan.checkpoints.key_mapping import diffusers_name, text_name

EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}
SHAPES = TESTS.parent / "examples" / "shapes"
CLOSE = {"Q8_0": 42, "Q4_0": 30}  # dB; measured 45.0 and 33.0 (Q5_1 40.4, Q5_0 39.3, Q4_1 30.7)


def command(*flags: str) -> list[str]:
    return ["--task", TASK, "--prompt", "a cat", "--size", "64*64", "--frame_num", "5", "--base_seed", "3",
            "--sample_solver", "unipc", "--sample_steps", "2", "--sample_shift", "5", "--sample_guide_scale", "3",
            "--save_latents", *flags]  # fmt: skip


def made(out: Path, *flags: str) -> tuple[Tensor, np.ndarray]:
    """(latent, frames of the mp4)."""
    assert generate.main([*command(*flags), "--save_dir", str(out)]) == 0
    (latents,) = out.glob("*.latents.safetensors")
    return load_file(latents)["latent"], read_frames(next(out.glob("*.mp4")))


def equal(found: tuple[Tensor, np.ndarray], expected: tuple[Tensor, np.ndarray]) -> bool:
    return torch.equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def llama_name(name: str) -> str:
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24).get_name(text_name(name), (".weight",))
    assert found is not None
    return found


def gguf_files(folder: Path, kind: Callable[[str, Tensor], str], source: Path = SOURCE) -> list[str]:
    """A small checkpoint's experts and text encoder as GGUF files."""
    flags = []
    for name, where in EXPERTS.items():
        file = write_gguf(folder / f"wan2.2_{name}.gguf", expert(where, source), kind)
        flags += ["--expert", f"{name}={file}"]
    text = {llama_name(name): tensor for name, tensor in torch.load(source / T5_FILE.name).items()}
    return [*flags, "--text_encoder", str(write_gguf(folder / "t5.gguf", text, kind, "t5encoder"))]


def test_one_video_in_every_form(tmp_path: Path) -> None:
    folder = ["--ckpt_dir", str(SOURCE)]
    (tmp_path / "one").mkdir()
    forms = {
        "released": folder,
        "diffusers": ["--ckpt_dir", str(bake(TASK, tmp_path / "hf", "--dtype", "fp32"))],
        "one-file": [*folder, *comfy_files(tmp_path / "one")],
        "gguf": [*folder, *gguf_files(tmp_path, lambda *_: "F32")],
    }
    videos = {name: made(tmp_path / name, *flags) for name, flags in forms.items()}
    assert all(equal(video, videos["released"]) for video in videos.values())


def drawn(where: str, spelling: Callable[[str], str]) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """(bytes by "TYPE NAME", numbers by name) of an expert whose linear weights are drawn blocks of all types."""
    blocks, exact = {}, expert(where)
    linear = [n for n, t in exact.items() if n.startswith("blocks.") and t.dim() == 2 and t.numel() % 256 == 0]
    for number, name in enumerate(linear):
        kind, shape = list(SCALES_AT)[number % len(SCALES_AT)], exact[name].shape
        raw = drawn_blocks(kind, (shape.numel() // 256, 256), number, scale=0.002)
        blocks[f"{kind} {spelling(name)}"] = raw
        exact[name] = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])).reshape(shape)
    return blocks, exact


@pytest.mark.parametrize(
    ("spelling", "piece_bytes"), [(str, 16 << 20), (diffusers_name, 1000)], ids=["whole", "diffusers-in-pieces"]
)
def test_quantised_experts_with_a_lora_decode_to_their_weights(
    spelling: Callable[[str], str], piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.offload.reader.PIECE_BYTES", piece_bytes)
    quantised, plain = [], []
    for expert_name, where in EXPERTS.items():
        blocks, exact = drawn(where, spelling)
        writer = gguf.GGUFWriter(tmp_path / f"{where}.gguf", "wan")
        for key, raw in blocks.items():
            kind, name = key.split(" ")
            ours = next(own for own in exact if spelling(own) == name)
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(exact[ours].shape))
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        assert {key.split(" ")[0] for key in blocks} == set(SCALES_AT)
        for name, tensor in exact.items():
            if not any(key.endswith(f" {spelling(name)}") for key in blocks):
                writer.add_tensor(spelling(name), tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        quantised += ["--expert", f"{expert_name}={tmp_path / where}.gguf"]
        plain += ["--expert", f"{expert_name}={saved(exact, tmp_path / f'{where}.safetensors')}"]
    rest = ["--ckpt_dir", str(SOURCE), "--lora_dir", str(lora_dir(TASK))]
    assert equal(made(tmp_path / "q", *rest, *quantised), made(tmp_path / "p", *rest, *plain))


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - expected.astype(float)).mean()))


def linear(kind: str, otherwise: str) -> Callable[[str, Tensor], str]:
    """All matrices in one type, as far as its blocks of 32 divide their rows."""
    return lambda _, tensor: kind if tensor.dim() == 2 and tensor.shape[1] % 32 == 0 else otherwise


@pytest.mark.slow
def test_within_its_quantisation_it_is_the_trained_demos_video(tmp_path: Path) -> None:
    """Experts and text encoder quantised, LoRA merged on top, four steps; the mp4s compared."""
    source = SHAPES / "Wan2.2-T2V-A14B"
    flags = ["--task", TASK, "--ckpt_dir", str(source), "--lora_dir", str(SHAPES / "lora-t2v"), "--base_seed", "1",
             "--prompt", "a yellow circle moves right on a blue background", "--size", "64*64",
             "--frame_num", "9"]  # fmt: skip
    frames = {}
    for kind in ("plain", *CLOSE):
        files = gguf_files(tmp_path, linear(kind, "F32"), source) if kind in CLOSE else []
        assert generate.main([*flags, *files, "--save_file", str(tmp_path / f"{kind}.mp4")]) == 0
        frames[kind] = read_frames(tmp_path / f"{kind}.mp4")
    assert all(decibels(frames[kind], frames["plain"]) > least for kind, least in CLOSE.items())


def wide_folder(folder: Path) -> Path:
    """A released folder with one head of 128, the width that every published model's heads have, as the files tell."""
    for number, where in enumerate(EXPERTS.values()):
        torch.manual_seed(number)
        tensors = {}
        for name, tensor in expert(where).items():
            shape = [128 if n == 64 and name != "head.head.weight" else 768 if n == 384 else n for n in tensor.shape]
            tensors[name] = torch.randn(shape) * (0.3 / shape[-1] ** 0.5) + (1.0 if ".norm" in name else 0.0)
        tensors["head.head.weight"], tensors["head.head.bias"] = torch.randn(64, 128) * 0.1, torch.zeros(64)
        tensors["text_embedding.0.weight"] = torch.randn(128, expert(where)["text_embedding.0.weight"].shape[1]) * 0.1
        (folder / where).mkdir(parents=True)
        saved(tensors, folder / where / "diffusion_pytorch_model.safetensors")
        config = json.loads((SOURCE / where / "config.json").read_text()) | {"dim": 128, "num_heads": 1}
        (folder / where / "config.json").write_text(json.dumps(config))
    for name in (VAE_FILE.name, T5_FILE.name, "google"):
        (folder / name).symlink_to(SOURCE / name)
    return folder


def test_a_video_from_files_alone(tmp_path: Path) -> None:
    folder = wide_folder(tmp_path / "wide")
    expected = made(tmp_path / "folder", "--ckpt_dir", str(folder))
    rest = ["--vae", str(VAE_FILE), "--tokenizer", str(SOURCE / "google" / "umt5-xxl")]
    plain = [f"{name}={folder / where / 'diffusion_pytorch_model.safetensors'}" for name, where in EXPERTS.items()]
    alone = [*rest, "--text_encoder", str(T5_FILE), "--expert", plain[0], "--expert", plain[1]]
    assert equal(made(tmp_path / "files", *alone), expected)
    quantised = gguf_files(tmp_path / "q", linear("Q8_0", "F16"), folder)
    latent, frames = made(tmp_path / "gguf", *rest, *quantised)
    assert decibels(frames, expected[1]) > 30
    assert not torch.equal(latent, expected[0])
    record = json.loads(next((tmp_path / "gguf").glob("*.json")).read_text())
    assert "wan2.2_high.gguf" in json.dumps(record)


def test_every_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, dry = gguf_files(tmp_path, linear("Q8_0", "F32")), command("--ckpt_dir", str(SOURCE), "--dry_run")
    high, text = Path(flags[1].removeprefix("high=")), Path(flags[5])
    content = high.read_bytes()
    cut, damaged = tmp_path / "cut.gguf", tmp_path / "damaged.gguf"
    cut.write_bytes(content[: len(content) // 2])
    damaged.write_bytes(content.replace(b"blocks.1.ffn.2.bias", b"blocks.7.ffn.2.bias"))
    other = write_gguf(tmp_path / "other.gguf", {"blk.0.attn_q.weight": torch.zeros(4, 4)}, architecture="llama")
    (tmp_path / "text.gguf").write_text('{"no": "GGUF"}')
    for wrong, sentence in (
        (["--expert", f"high={cut}"], "cut.gguf: truncated, "),
        (["--expert", f"high={damaged}"], "a tensor is of block '7', but there are 3 blocks"),
        (["--expert", f"high={text}"], "t5.gguf: not a full expert"),
        (["--expert", f"high={other}"], "other.gguf: not a full expert"),
        (["--expert", f"high={tmp_path / 'text.gguf'}"], "text.gguf: not a GGUF file"),
        (["--text_encoder", str(high)], "wan2.2_high.gguf: "),
        (["--text_encoder", str(cut)], "cut.gguf: truncated, "),
        (["--vae", str(other)], "other.gguf: "),
        (["--lora", f"high={high}"], "wan2.2_high.gguf: "),
    ):
        assert generate.main([*dry, *wrong]) == 2, wrong
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert sentence in line
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert generate.main([*dry, "--text_encoder", str(text)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "t5.gguf: GGUF files need the package gguf: pip install gguf" in line


def test_blocks_that_are_no_numbers_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = gguf_files(tmp_path, linear("Q8_0", "F32"))
    file = Path(flags[3].removeprefix("low="))
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blocks.1.ffn.0.weight")
    tensor.data[3, 34:36] = (0, 0x7E)  # the scale of a block: a float16 NaN
    reader.data.flush()
    assert generate.main([*command("--ckpt_dir", str(SOURCE), *flags), "--save_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "tensor blocks.1.ffn.0.weight holds NaN or Inf: the file is corrupt" in line
