"""The grammar of --lora and --lora_dir, and that `generate.py` and `bake` share it."""

import shutil
from pathlib import Path

import pytest

from lightning.__main__ import main
from lightning.lora_files import Choices, LoraChoice, choose_loras, split_strength
from lightning.releases import record_of
from tests.lightning.support import family
from tests.support import checkpoint, lora_dir
from wan.jobs.resolve import resolve
from wan.utils.errors import InputError
from wan.utils.progress import visible

TWO = ("high", "low")
RELEASE = lora_dir("t2v-A14B")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(*texts: str, experts: tuple[str, ...] = TWO) -> Choices:
    return choose_loras(experts, loras=texts)


def lora_file(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(RELEASE / "high_noise_model.safetensors", path)
    return path


def test_a_file_goes_to_every_expert_or_to_the_one_it_is_named_after() -> None:
    style, high = lora_file("style.safetensors"), lora_file("style_HIGH.safetensors")
    assert chosen(f"{style}:0.5").loras == [LoraChoice("high", style, 0.5), LoraChoice("low", style, 0.5)]
    found = chosen(str(high))
    assert found.loras == [LoraChoice("high", high)]
    assert "goes to the high-noise expert only, as its name says" in found.warnings[0]
    assert chosen(f"low={high}:-2").loras == [LoraChoice("low", high, -2.0)]
    assert chosen(str(high), experts=("model",)).loras == [LoraChoice("model", high)]
    assert not chosen(f"low={high}").warnings


def test_release_folders_give_each_expert_its_file() -> None:
    high, low = (RELEASE / f"{name}_noise_model.safetensors" for name in TWO)
    assert chosen(f"{RELEASE}:0.3").loras == [LoraChoice("high", high, 0.3), LoraChoice("low", low, 0.3)]
    assert chosen(f"low={RELEASE}").loras == [LoraChoice("low", low)]
    (problem,) = chosen(str(lora_dir("ti2v-5B"))).problems
    assert problem.startswith("--lora ")
    assert "high_noise_model.safetensors and low_noise_model.safetensors missing" in problem


def test_peft_folders() -> None:
    file = lora_file("style_low/adapter_model.safetensors")
    Path("style_low/adapter_config.json").write_text("{}")
    assert chosen("style_low").loras == [LoraChoice("low", Path("style_low"))]
    assert chosen(str(file)).loras == [LoraChoice("low", file)]


def test_colons_in_paths() -> None:
    assert split_strength(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)
    assert split_strength(r"C:\loras\a.safetensors:0.7") == (r"C:\loras\a.safetensors", 0.7)
    assert split_strength("C:5") == ("C:5", 1.0)
    lora_file("odd:0.5")
    assert split_strength("odd:0.5") == ("odd:0.5", 1.0)


def test_strengths_of_a_release() -> None:
    found = choose_loras(TWO, str(RELEASE), "0.8,0.6").loras
    assert [(choice.expert, choice.strength) for choice in found] == [("high", 0.8), ("low", 0.6)]
    for slip in ("1,2,3", "1_0"):
        assert "takes one number or two" in choose_loras(TWO, str(RELEASE), slip).problems[0]
    assert "which is not given" in choose_loras(TWO, None, "1").problems[0]
    assert "one model takes one number" in choose_loras(["model"], str(lora_dir("ti2v-5B")), "1,2").problems[0]


BAD = [
    (f"{RELEASE}:nan", "strength nan is out of range: must be between -10 and 10"),
    (f"{RELEASE}:inf", "strength inf is out of range: must be between -10 and 10"),
    (f"{RELEASE}:99", "strength 99 is out of range: must be between -10 and 10"),
    ("absent.safetensors:0.5", "--lora absent.safetensors: no such file"),
    ("absent\0", "no such file"),
    ("a" * 1000, "no such file"),
    ("~nobody-of-this-name/a", "no such file"),
    (f"model={RELEASE}", "this task has no expert 'model'; it has high and low"),
    ("", "--lora is empty"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD)
def test_generate_and_bake_refuse_the_same_with_the_same_words(
    text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = chosen(text).problems
    assert sentence in problem
    ckpt_dir = str(checkpoint("t2v-A14B"))
    assert main(["bake", "--task", "t2v-A14B", "--ckpt_dir", ckpt_dir, "--out", "baked", "--lora", text]) == 2
    assert capsys.readouterr().err == f"error: {visible(problem)}\n"
    with pytest.raises(InputError) as raised:
        resolve({"task": "t2v-A14B", "ckpt_dir": ckpt_dir, "prompt": "a cat", "lora": (text,)})
    assert raised.value.problems == ["--lora holds a NUL character; remove it" if "\0" in text else problem]


@pytest.mark.parametrize("folder_there", [True, False])
def test_an_absent_release_is_named_with_the_command_that_gets_it(folder_there: bool) -> None:
    """Its folder as that command makes it, which is spelled like a place on the hub, is not asked for there."""
    if folder_there:
        Path("Wan2.2-Lightning").mkdir()
    folder = "Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    for chosen_by in ({"lora_dir": folder}, {"loras": [f"high={folder}/high_noise_model.safetensors:0.5"]}):
        (problem,) = choose_loras(TWO, **chosen_by).problems
        assert problem.endswith("get it with: hf download lightx2v/Wan2.2-Lightning --local-dir Wan2.2-Lightning")


def test_bake_reports_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut.safetensors").write_bytes(b"\0" * 7)
    loras = ["--lora", "absent", "--lora", f"{RELEASE}:99", "--lora", "cut.safetensors"]
    assert main(["bake", "--task", "t2v-A14B", "--ckpt_dir", ".", "--out", "baked", *loras]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_bake_takes_a_release_folder(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint("t2v-A14B")), "--out", "baked"]
    style = family("kohya", Path("style"))
    assert main(["bake", *arguments, "--lora", f"{RELEASE}:0.3", "--lora", f"high={style}"]) == 0, capsys.readouterr()
    record = record_of(Path("baked"))
    assert record is not None
    assert [lora["strength"] for lora in record["loras"]["high"]] == [0.3, 1.0]
    assert [lora["strength"] for lora in record["loras"]["low"]] == [0.3]
