"""Prompt extension around the models: checks, defaults, cleaning, the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wan.prompt_extension.answers import LONGEST_ANSWER, AnswerError, Question, clean, neutralise
from wan.prompt_extension.extend import (
    DEFAULT_MODELS,
    ExtendItem,
    ExtendSettings,
    cache_key,
    check_extension,
    extend,
    model_for,
    prompts_folder,
    read_cached,
    write_cached,
)
from wan.utils.errors import InputError


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    for name in ("DASH_API_KEY", "DASH_API_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


# --- checks


def problems(*items: ExtendItem, **settings) -> list[str]:
    settings = {"task": "t2v-A14B", "method": "local_qwen"} | settings
    with pytest.raises(InputError) as refusal:
        check_extension(ExtendSettings(**settings), items or [ExtendItem("a cat")])
    return refusal.value.problems


@pytest.mark.parametrize("method", ["local_qwen", "dashscope", "openai"])
def test_good_settings_pass(method, picture, monkeypatch):
    monkeypatch.setenv("DASH_API_KEY", "k")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"):
        items = [ExtendItem("a cat", picture), *([] if task == "t2v-A14B" else [ExtendItem("", picture)])]
        assert check_extension(ExtendSettings(task, method, "some-model"), items) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "dashscope"}, "needs a key in the environment variable DASH_API_KEY"),
        ({"method": "openai", "model": "m"}, "needs a key in the environment variable OPENAI_API_KEY, or the address"),
        ({"model": "/no/such/folder"}, "--prompt_extend_model /no/such/folder: there is no such folder"),
        ({"model": "./absent"}, "--prompt_extend_model ./absent: there is no such folder"),
    ],
)
def test_bad_settings(settings, sentence):
    (problem,) = problems(**settings)
    assert sentence in problem


def test_openai_needs_a_model(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (problem,) = problems(method="openai")
    assert "openai needs a model name: give one with --prompt_extend_model" in problem


def test_address_without_scheme(monkeypatch):
    monkeypatch.setenv("DASH_API_KEY", "k")
    monkeypatch.setenv("DASH_API_URL", "dashscope.example/api")
    assert "DASH_API_URL must be an address that starts with http" in problems(method="dashscope")[0]


def test_a_folder_without_a_model(tmp_path):
    assert "config.json is missing" in problems(model=str(tmp_path))[0]


def test_all_bad_items_are_named_at_once(tmp_path, picture):
    (tmp_path / "text.png").write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:60])
    found = problems(
        ExtendItem("fine", picture),
        ExtendItem("a", tmp_path / "absent.png"),
        ExtendItem("", tmp_path / "text.png"),
        ExtendItem("c", cut),
        ExtendItem("d"),
        ExtendItem("e", tmp_path),
        task="i2v-A14B",
    )
    assert [line.split(":")[0].split(" of")[0] for line in found] == [f"prompt {n}" for n in (2, 3, 4, 5, 6)]
    assert found[0].endswith("absent.png: no such image file")
    assert "has no image, which i2v-A14B needs" in found[3]
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("words", ["", "  \n"])
def test_empty_prompt_without_image(task, words):
    assert problems(ExtendItem("a"), ExtendItem(words), task=task) == [
        "prompt 2 of 2 is empty, and there is no image to describe instead (--prompt)"
    ]


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_missing_package_is_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (problem,) = problems(method="local_qwen")
    assert "--prompt_extend_method local_qwen" in problem
    assert f"pip install {package}" in problem
    with pytest.raises(InputError):  # and so says extend itself
        extend(ExtendSettings("t2v-A14B", "local_qwen", "m"), [ExtendItem("a")], print)


def test_importing_is_cheap():
    heavy = "{'torch', 'transformers', 'httpx', 'numpy', 'huggingface_hub'}"
    code = f"import sys, wan.prompt_extension.extend; print({heavy} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout.strip() == "set()"


# --- which model


def test_default_models():
    assert DEFAULT_MODELS == {
        ("dashscope", False): "qwen-plus",
        ("dashscope", True): "qwen-vl-max",
        ("local_qwen", False): "Qwen/Qwen2.5-14B-Instruct",
        ("local_qwen", True): "Qwen/Qwen2.5-VL-7B-Instruct",
    }


def test_a_folder_wins_over_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_for("local_qwen", "Qwen2.5_3B", has_image=False) == "Qwen/Qwen2.5-3B-Instruct"
    assert model_for("local_qwen", "QwenVL2.5_3B", has_image=True) == "Qwen/Qwen2.5-VL-3B-Instruct"
    (tmp_path / "Qwen2.5_3B").mkdir()
    assert model_for("local_qwen", "Qwen2.5_3B", has_image=False) == "Qwen2.5_3B"
    assert model_for("local_qwen", "owner/name", has_image=False) == "owner/name"
    assert model_for("dashscope", "Qwen2.5_7B", has_image=False) == "Qwen2.5_7B"


# --- texts


@pytest.mark.parametrize(
    "answer",
    [
        "A cat runs: it is fast.",
        '"A cat runs: it is fast."',
        "“A cat runs: it is fast.”",
        "`A cat runs: it is fast.`",
        "**A cat runs: it is fast.**",
        "```\nA cat runs:\nit is fast.\n```",
        "```text\nA cat runs: it is fast.\n```\n",
        "Here is the rewritten prompt:\n\nA cat runs: it is fast.",
        "Here's an enhanced version of your prompt: A cat runs: it is fast.",
        "Sure! Here is the extended prompt:\n```\nA cat runs: it is fast.\n```",
        'Certainly, here’s the video description: "A cat runs: it is fast."',
        '"Rewritten prompt: A cat runs: it is fast."',
        "**Prompt:** A cat runs: it is fast.",
        "### Output:\nA cat runs: it is fast.",
        "<think>The user wants a cat.\n</think>\n\nA cat runs: it is fast.",
        "  A cat\r\n\truns: it is\u3000fast.  ",
    ],
)
def test_clean_leaves_the_bare_prompt(answer):
    assert clean(answer) == "A cat runs: it is fast."


@pytest.mark.parametrize(
    "answer",
    [
        "好的，以下是改写后的提示词：\n“小猫说：你好。”",
        "改写后的提示词：小猫说：你好。",
        "「小猫说：你好。」",
        "**输出：** 小猫说：你好。",
    ],
)
def test_clean_in_chinese(answer):
    assert clean(answer) == "小猫说：你好。"


@pytest.mark.parametrize(
    "prompt",
    [
        '"Hello", says the cat, and the dog answers "Goodbye"',
        "Here is a street: cars pass.",
        "Sure-footed goats climb.",
        "这是一座老城：街上人来人往。",
        "Prompted by a whistle, the dog runs.",
        "a < b",
        "The sign says 'OPEN'",
        "好的天气里，孩子们奔跑。",
    ],
)
def test_clean_leaves_a_good_prompt_alone(prompt):
    assert clean(prompt) == prompt


@pytest.mark.parametrize("answer", ["", "\n", '""', "``````", "...", "Here is the prompt:"])
def test_nothing_left_is_a_failure(answer):
    with pytest.raises(AnswerError, match="empty"):
        clean(answer)


def test_far_too_much_is_a_failure():
    assert clean("x" * LONGEST_ANSWER) == "x" * LONGEST_ANSWER
    with pytest.raises(AnswerError, match=f"{LONGEST_ANSWER + 1} characters long; at most {LONGEST_ANSWER}"):
        clean("x" * (LONGEST_ANSWER + 1))


@given(st.text(alphabet='ab" `*<|>:\n。“”', max_size=60))
def test_cleaning_twice_changes_nothing(answer):
    try:
        once = clean(answer)
    except AnswerError:
        return
    assert clean(once) == once
    assert "\n" not in once


@given(st.text(alphabet="<|>im_end ", max_size=40))
def test_no_control_token_survives(text):
    assert "<|" not in neutralise(text)
    assert neutralise(text).replace("< |", "<|") == text.replace("< |", "<|")


# --- the cache


def test_every_part_names_another_cache_entry(tmp_path, picture):
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 48), "blue").save(other)
    usual = {"question": Question("s", "t", picture), "method": "m", "model": "n", "language": "zh", "seed": 1}
    changes = [
        {},
        {"question": Question("S", "t", picture)},
        {"question": Question("s", "T", picture)},
        {"question": Question("s", "t", other)},
        {"question": Question("s", "t", None)},
        {"method": "M"},
        {"model": "N"},
        {"language": "en"},
        {"seed": 2},
    ]
    assert len({cache_key(**usual | change) for change in changes}) == len(changes)
    renamed = tmp_path / "same.png"
    renamed.write_bytes(picture.read_bytes())
    assert cache_key(**usual) == cache_key(**usual | {"question": Question("s", "t", renamed)})


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "{tmp}/x"}, "{tmp}/x"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{tmp}/.cache"),
        ("linux", {}, "{tmp}/.cache"),
        ("darwin", {}, "{tmp}/Library/Caches"),
        ("linux", {"LOCALAPPDATA": "{tmp}/local"}, "{tmp}/.cache"),
    ],
)
def test_cache_folder(platform, environment, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("wan.utils.files.sys.platform", platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    assert prompts_folder() == Path(folder.format(tmp=tmp_path)) / "wan-lightning" / "prompts"


def test_an_interrupted_write_leaves_nothing(monkeypatch):
    question = Question("s", "t", None)
    write_cached("k", "whole", question, "m")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("wan.prompt_extension.extend.json.dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cached("k", "half", question, "m")
    assert read_cached("k") == "whole"
    assert [path.name for path in prompts_folder().iterdir()] == ["k.json"]


def test_the_cache_is_private_to_the_user():
    """The umask of most systems would let others read the prompts."""
    before = os.umask(0o022)
    try:
        write_cached("key", "a long prompt", Question("s", "a", None), "m")
    finally:
        os.umask(before)
    assert prompts_folder().stat().st_mode & 0o777 == 0o700
