"""The instructions given to the model that lengthens prompts: three kinds, in Chinese and in English."""

from __future__ import annotations

import tomllib
from pathlib import Path

INSTRUCTIONS = tomllib.loads(Path(__file__).with_name("instructions.toml").read_text("utf-8"))
# (fewest, most) of the answer: characters in Chinese, words in English
TEXT_LENGTH, MOTION_LENGTH = (60, 200), (20, 100)
TEXT_EXAMPLES = {language: texts["text_examples"] for language, texts in INSTRUCTIONS.items()}
MOTION_EXAMPLES = {language: texts["motion_examples"] for language, texts in INSTRUCTIONS.items()}
# In place of the user's text when there is only an image: chat models want some text in the turn.
NO_WORDS = {language: texts["no_words"] for language, texts in INSTRUCTIONS.items()}


def system_prompt(language: str, *, has_image: bool, has_words: bool) -> str:
    """The instructions for one item; with an image its motion is asked for, without one the whole scene."""
    texts = INSTRUCTIONS[language]
    if has_image:
        (fewest, most), examples = MOTION_LENGTH, MOTION_EXAMPLES[language]
        text = texts["image" if has_words else "image_only"] + texts["motion_rules"]
    else:
        (fewest, most), examples, text = TEXT_LENGTH, TEXT_EXAMPLES[language], texts["text"]
    filled: str = text.format(fewest=fewest, most=most, examples="\n".join(examples))
    return filled
