"""Which file is meant, and LoRAs in every form of file: pickles, GGUF, fp8 as a whole, PEFT's under other names."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning.__main__ import main
from lightning.lora import Lora, check
from lightning.lora_files import expert_of, weight_file
from tests.checkpoints.gguf_support import write_gguf
from tests.lightning.support import AB, ALPHA, STORED, base, merged, plain, small_pairs, spelled, write
from tests.support import checkpoint
from wan.utils.errors import LoraError

SHAPES = base().shapes


def assert_is_the_small_lora(lora: Lora, factor: float = ALPHA / 4) -> None:
    assert check(lora, SHAPES).pairs == (20, 20)
    found = merged(lora)
    for module, (up, down) in small_pairs().items():
        expected = plain(base().read(f"{module}.weight"), up, down, factor)
        torch.testing.assert_close(found[f"{module}.weight"], expected, rtol=0, atol=1e-6)


def tensors(alpha: Tensor | None = STORED) -> dict[str, Tensor]:
    return spelled(small_pairs(), "diffusion_model.{}.", alpha=alpha)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("generator_lora",), ("model", "generator")])
def test_pickled_loras(suffix: str, nest: tuple[str, ...], tmp_path: Path) -> None:
    content: dict = tensors()
    for name in reversed(nest):
        content = {name: content, "step": 100, "critic_lora": {"a": torch.ones(1)}}
    torch.save(content, tmp_path / f"lora{suffix}")
    assert_is_the_small_lora(Lora.open(tmp_path / f"lora{suffix}"))


def test_a_pickle_of_two_networks_is_asked_which(tmp_path: Path) -> None:
    torch.save({"generator": tensors(), "generator_ema": tensors()}, tmp_path / "lora.pt")
    with pytest.raises(LoraError, match="generator, generator_ema"):
        Lora.open(tmp_path / "lora.pt")


@pytest.mark.parametrize("name", ["lora.gguf", "lora.GGUF"])
def test_gguf_loras(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / name, {key: tensor.reshape(-1, 1) if tensor.dim() == 0 else tensor
                                        for key, tensor in tensors().items()})  # fmt: skip
    assert_is_the_small_lora(Lora.open(path))


@pytest.mark.parametrize("module", ["blk.0.attn_q", "blocks.0.self_attn.q"])
def test_gguf_loras_in_llama_cpps_spelling_are_refused_by_name(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their alpha is a setting of the file, and no model of Wan has names there."""
    halves = {f"{module}.weight.lora_a": torch.ones(4, 64), f"{module}.weight.lora_b": torch.ones(64, 4)}
    file = write_gguf(tmp_path / "lora.gguf", halves)
    with pytest.raises(LoraError, match=r"not supported: lora_a, lora_b$"):
        check(Lora.open(file), base().shapes)
    assert main(["inspect", str(file)]) == 2
    assert "not supported: lora_a, lora_b" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_loras_in_fp8_with_their_alphas(kind: torch.dtype, tmp_path: Path) -> None:
    low = {name: t.to(kind if name.endswith("alpha") else torch.float8_e4m3fn) for name, t in tensors().items()}
    found = merged(Lora.open(write(tmp_path / "low.safetensors", low)))
    exact = {name: tensor.float() for name, tensor in low.items()}
    expected = merged(Lora.open(write(tmp_path / "exact.safetensors", exact)))
    assert len(found) == 20
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


# -- PEFT's folders


def peft_folder(folder: Path, *names: str, alpha: float = 1.0) -> list[Path]:
    """A folder with PEFT's settings, alpha / rank a quarter, and weights of these names."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
    pairs = {module: (up * 4 / ALPHA, down) for module, (up, down) in small_pairs().items()}  # `spelled` folds alpha in
    content = spelled(pairs, "base_model.model.{}.", halves=AB)
    for name in names:
        if name.endswith(".safetensors"):
            write(folder / name, content)
        else:
            torch.save(content, folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize(
    "name", ["my_style_e20.safetensors", "my_style.bin", "adapter_model.bin", "adapter_model.safetensors"]
)
def test_settings_count_for_the_only_file_beside_them(name: str, tmp_path: Path) -> None:
    (file,) = peft_folder(tmp_path / "peft", name)
    for path in (file, file.parent):
        lora = Lora.open(path)
        assert_is_the_small_lora(lora, 0.25)


def test_several_files_raise_the_question_which(tmp_path: Path) -> None:
    first, second = peft_folder(tmp_path / "peft", "epoch1.safetensors", "epoch2.safetensors")
    for path in (first.parent, first, second):
        with pytest.raises(LoraError, match=r"which of its files|adapter_config.json beside it may belong"):
            Lora.open(path)
    own = write(first.parent / "other.safetensors", tensors())  # stores its own alphas: the settings do not matter
    assert_is_the_small_lora(Lora.open(own))
    peft_folder(tmp_path / "peft", "adapter_model.safetensors")
    assert weight_file(first.parent).name == "adapter_model.safetensors"
    assert Lora.open(first).settings is None


# -- names


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model.safetensors", "high"),
        ("wan2.2_i2v_A14b_low_noise_lora_rank64.gguf", "low"),
        ("LowNoise.safetensors", "low"),
        ("StyleHighNoise.safetensors", "high"),
        ("style-highnoise-e20.safetensors", "high"),
        ("style_HN.safetensors", "high"),
        ("StyleLN.safetensors", "low"),
        ("style_hn_v2.safetensors", "high"),
        ("style_HIGH.safetensors", "high"),
        ("style_low", "low"),
        ("myLoraHIGH.safetensors", "high"),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora_LOW_fp16.safetensors", "low"),
        ("wan22-high-myStyle.safetensors", "high"),
        ("wan22_style_H.safetensors", "high"),
        ("WAN22_style-L.safetensors", "low"),
        ("low_poly_style.safetensors", None),
        ("wan22_low_poly_style.safetensors", None),
        ("high-quality-detail.safetensors", None),
        ("wan2.2-t2v-high-quality.safetensors", None),
        ("low-light-cinematic.safetensors", None),
        ("high_heels.safetensors", None),
        ("slow_motion.safetensors", None),
        ("highlights.safetensors", None),
        ("high_and_low.safetensors", None),
        ("style_h.safetensors", None),
        ("lnstyle.safetensors", None),
    ],
)
def test_the_expert_in_a_name(name: str, expert: str | None) -> None:
    assert expert_of(Path(name)) == expert


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("style_high_res.safetensors", "style_low_res.safetensors"),
        ("style_H.safetensors", "style_L.safetensors"),
        ("HIGH-poly.safetensors", "LOW-poly.safetensors"),
        ("StyleHigh.safetensors", "StyleLow.safetensors"),
    ],
)
def test_two_files_that_differ_in_one_word_are_a_pair(first: str, second: str, tmp_path: Path) -> None:
    write(tmp_path / first, tensors())
    alone = expert_of(tmp_path / first)
    assert alone == ("high" if first == "StyleHigh.safetensors" else None)
    write(tmp_path / second, tensors())
    assert (expert_of(tmp_path / first), expert_of(tmp_path / second)) == ("high", "low")


def test_a_low_poly_style_goes_to_both_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import generate

    style = write(tmp_path / "low_poly_style.safetensors", tensors())
    words = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--size", "64*64", "--frame_num", "5",
             "--prompt", "a cat", "--device", "cpu", "--dry_run", "--lora", str(style)]  # fmt: skip
    assert generate.main(words) == 0
    out = capsys.readouterr().out
    assert out.count("20/20 pairs") == 2


def test_inspect_reads_the_same_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator_lora": tensors()}, tmp_path / "lora.pt")
    assert main(["inspect", str(tmp_path / "lora.pt"), "--ckpt_dir", str(checkpoint("t2v-A14B"))]) == 0
    assert "20/20 pairs" in capsys.readouterr().out
