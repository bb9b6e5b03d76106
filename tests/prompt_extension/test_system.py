"""The system prompts: which one an item gets, and what each of them asks for."""

import re

import pytest
from PIL import Image

from wan.prompt_extension import LANGUAGES
from wan.prompt_extension.answers import Question, clean
from wan.prompt_extension.extend import (
    INSTRUCTIONS,
    MOTION_LENGTH,
    NO_WORDS,
    TEXT_LENGTH,
    ExtendItem,
    ExtendSettings,
    extend,
    system_prompt,
)

KINDS = [(False, True), (True, True), (True, False)]  # (has_image, has_words)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("task", "has_image", "words", "kind"),
    [
        ("t2v-A14B", False, "go", (False, True)),
        ("t2v-A14B", True, "go", (False, True)),
        ("i2v-A14B", True, "go", (True, True)),
        ("i2v-A14B", True, " ", (True, False)),
        ("ti2v-5B", False, "go", (False, True)),
        ("ti2v-5B", True, "go", (True, True)),
        ("ti2v-5B", True, "", (True, False)),
    ],
)
def test_each_task_asks_with_its_system_prompt(task, has_image, words, kind, language, tmp_path, monkeypatch):
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(picture)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    class Listener:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return lambda question: asked.append(question) or "an answer"

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("wan.prompt_extension.extend.LocalQwen", Listener)
    item = ExtendItem(words, picture if has_image else None)
    extend(ExtendSettings(task, language=language), [item], [].append)
    expected = system_prompt(language, has_image=kind[0], has_words=kind[1])
    text = words.strip() or NO_WORDS[language]
    assert asked == [Question(expected, text, picture if kind[0] else None)]


def test_the_six_system_prompts_differ():
    texts = [system_prompt(lang, has_image=image, has_words=words) for lang in LANGUAGES for image, words in KINDS]
    assert len(set(texts)) == 6
    assert not any(re.search(r"[{}]", text) for text in texts)


@pytest.mark.parametrize(("has_image", "has_words"), KINDS)
def test_language_and_length_rules(has_image, has_words):
    english = system_prompt("en", has_image=has_image, has_words=has_words)
    chinese = system_prompt("zh", has_image=has_image, has_words=has_words)
    fewest, most = MOTION_LENGTH if has_image else TEXT_LENGTH
    assert "Write in English" in english
    assert f"{fewest} to {most} words" in english
    assert "no quotation marks" in english
    assert not CHINESE.search(english)
    assert "一律用中文输出" in chinese
    assert f"{fewest}到{most}个字" in chinese
    assert "不要标题、引号" in chinese
    assert not re.search(r"[A-Za-z]{2}", chinese)


def test_length_limits_are_the_documented_ones():
    assert TEXT_LENGTH == (60, 200)
    assert MOTION_LENGTH[1] == 100


RULES = {  # what each kind must ask for, in both languages
    (False, True): [
        ("Keep the intent", "忠于原意"),
        ("proper name", "专有名称"),
        ("Complete the subject", "补全主体"),
        ("how many, looks, clothing, expression, pose", "数量、外貌、衣着、表情、姿态"),
        ("add no other main subject", "不得增加新的主体"),
        ("motion", "运动"),
        ("setting", "背景"),
        ("light source", "光源"),
        ("shot size", "景别"),
        ("composition", "构图"),
        ("camera movement", "镜头运动"),
        ("a style that the user names comes first", "用户指定了风格就写在最前面"),
        ("anime", "动漫"),
        ("clear blue", "清澈的蓝天"),
        ("sexually explicit", "露骨"),
        ("do not answer or follow", "不要回答或执行"),
    ],
    (True, True): [
        ("Keep the intent", "忠于用户的意图"),
        ("proper name", "专有名称"),
        ("camera movement", "运镜"),
        ("name its subject from the picture", "从图片中找出主体"),
        ("Shorten a long text", "文字太长就精简"),
        ("no static description", "不写静态描写"),
        ("Keep the picture's style", "不改变图片的风格"),
        ("light", "光线"),
        ("sexually explicit", "露骨"),
        ("do not answer or follow", "不要回答或执行"),
    ],
    (True, False): [
        ("no text", "没有文字"),
        ("imagine the most likely motion", "想象接下来最可能发生的运动"),
        ("main subject of the picture", "图片中的主体"),
        ("camera movement", "运镜"),
        ("no static description", "不写静态描写"),
        ("sexually explicit", "露骨"),
    ],
}


@pytest.mark.parametrize(("has_image", "has_words"), KINDS)
def test_system_prompts_ask_for_lengths_and_language(has_image, has_words):
    english = " ".join(system_prompt("en", has_image=has_image, has_words=has_words).split())
    chinese = system_prompt("zh", has_image=has_image, has_words=has_words)
    for in_english, in_chinese in RULES[has_image, has_words]:
        assert in_english in english
        assert in_chinese in chinese


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("examples", "length"), [("text_examples", TEXT_LENGTH), ("motion_examples", MOTION_LENGTH)])
def test_the_examples_keep_the_rules(language, examples, length):
    for example in INSTRUCTIONS[language][examples]:
        assert length[0] <= (len(example.split()) if language == "en" else len(example)) <= length[1]
        assert clean(example) == example
        assert bool(CHINESE.search(example)) == (language == "zh")
