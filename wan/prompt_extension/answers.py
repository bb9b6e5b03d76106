"""What goes to a prompt-extending model and what comes back, whichever service or model it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# About twice the longest text the system prompts ask for (200 English words); the video model's text encoder
# reads 512 tokens and would cut the rest off silently.
LONGEST_ANSWER = 2400  # characters

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```[\w+-]*\n?(.*?)```", re.DOTALL)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "**": "**"}
_NAMED = r"(?:prompt|description|version|caption|rewrite)"
_LEAD_IN = re.compile(
    rf"""(?:\#+\s*|\*+\s*)?
    (?: (?:(?:sure|certainly|of\s+course|okay|ok)\b[^:\n]{{0,40}}?[,.!]\s*)?
        here(?:'s|’s|\s+is|\s+are)\b[^:\n]{{0,80}}?\b{_NAMED}\b[^:\n]{{0,40}}:
      | (?:sure|certainly|of\s+course|okay)\s*[!:.]
      | (?:the\s+)?(?:(?:rewritten|extended|expanded|enhanced|improved|revised|final|video)\s+){{0,2}}
        (?:{_NAMED}|output|answer)\s*\**\s*:
      | 好的\s*[,，。!！:：]
      | (?:以下|下面|这)是[^:：。\n]{{0,20}}(?:提示词|描述|文本|结果|版本)[^:：。\n]{{0,10}}[:：]
      | (?:改写|扩写|优化|润色|完善)?后?的?(?:视频)?(?:提示词|描述|文本|输出)(?:如下)?\s*\**\s*[:：]
    )\s*\**\s*""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """One request to the model: its instructions, the user's text, the image it must look at."""

    system: str
    text: str
    image: Path | None


class AnswerError(Exception):
    """The model gave no usable answer; the message is the reason, without any secret.

    passing: another attempt may succeed, after `wait` seconds. ends_all: no other question can succeed either.
    """

    def __init__(self, reason: str, *, passing: bool = False, ends_all: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.ends_all = ends_all
        self.wait = wait


def neutralise(text: str) -> str:
    """The text without chat control tokens: `<|im_end|>` in a prompt must not end the user's turn."""
    return text.replace("<|", "< |")


def clean(answer: str) -> str:
    """The bare prompt in one line: no fences, quotes, lead-ins or line breaks.

    Raises AnswerError when nothing or far too much is left.
    """
    text = _THINKING.sub("", answer).strip()
    if fenced := _FENCED.search(text):
        text = fenced.group(1).strip()
    before = None
    while text != before:  # a lead-in may stand inside quotes, and quotes after a lead-in
        before = text
        text = _unquote(_LEAD_IN.sub("", text, count=1) if _LEAD_IN.match(text) else text)
    text = " ".join(text.split())
    if not any(character.isalnum() for character in text):
        raise AnswerError("the answer is empty")
    if len(text) > LONGEST_ANSWER:
        raise AnswerError(f"the answer is {len(text)} characters long; at most {LONGEST_ANSWER} are of use")
    return text


def _unquote(text: str) -> str:
    """Without the pair of quotes around the whole text; quotes that belong to its parts stay."""
    for opening, closing in _QUOTES.items():
        inner = text[len(opening) : -len(closing)]
        enclosed = len(text) >= len(opening + closing) and text.startswith(opening) and text.endswith(closing)
        if enclosed and opening not in inner and closing not in inner:
            return inner.strip()
    return text
