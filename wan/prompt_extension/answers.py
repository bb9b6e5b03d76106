"""Questions to a language model, and the bare prompt in its answers."""

from __future__ import annotations

import html
import json
import re
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

# About twice the longest text the system prompts ask for (200 English words); the video model's text encoder
# reads 512 tokens and would cut the rest off silently.
LONGEST_ANSWER = 2400  # characters
MOST_TEXT = 10_000  # characters that are cleaned; a longer text is no prompt

_TAG = r"(?:\w{1,12}:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
REASONING_OPENS = re.compile(
    rf"(?i)<{_TAG}>|◁think▷|\[THINK\]|<\|channel>|<\|channel\|>|<\|begin_of_thought\|>|\A(?-i:analysis(?=[A-Z]))",
)
REASONING_CLOSES = re.compile(
    rf"(?i)</{_TAG}>|◁/think▷|\[/THINK\]|<channel\|>|<\|channel\|>final[^<]{{0,40}}<\|message\|>|<\|end_of_thought\|>",
)
_WRAPPER_TAGS = re.compile(
    r"(?i)</?(?:answer|output|prompt|start_of_turn|end_of_turn|s)>|\[/?INST\]|<\|?/?[\w-]{1,40}\|>|<\|[\w-]{1,40}>",
)
_REFUSAL = re.compile(
    r"""(?:unfortunately,\s+|i\s+apologi[sz]e\b[^.\n]{0,60}\bi\s)?
    (?: i(?:['’]?|\s+a)m\s+(?:(?:really\s+|very\s+|so\s+)?sorry\b|(?:unable|not\s+able)\s+to) | sorry, | as\s+an\s+ai\b
      | (?:i\s+)?(?:can['’]?t|cannot|can\snot|won['’]?t)\s+(?:assist|help|create|write|provide|fulfil|comply|be\s|do\s)
      | (?:很|非常)?(?:抱歉|对不起) | 我(?:无法|不能|没有办法) | 作为(?:一个|一名)?(?:AI|人工智能)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_NAMED = r"(?:prompt|description|version|caption|rewrite)"
_LEAD_IN = re.compile(
    rf"""(?:\#+\s*|\*+\s*)?
    (?: (?:(?:sure|certainly|of\s+course|okay|ok)\b[^:\n]{{0,40}}?[,.!]\s*)?
        (?:here(?:'s|’s|\s+is|\s+are)|below\s+is)\b[^:\n]{{0,80}}?\b{_NAMED}\b[^:\n]{{0,40}}:
      | (?:sure|certainly|of\s+course|okay)\s*[!:.]
      | (?:the\s+)?(?:(?:rewritten|extended|expanded|enhanced|improved|revised|final|video)\s+){{0,2}}
        (?:{_NAMED}|output|answer)\s*\**\s*:
      | 好的\s*[,，。!！:：]
      | (?:以下|下面|这)是[^:：。\n]{{0,20}}(?:提示词|描述|文本|结果|版本)[^:：。\n]{{0,10}}[:：]
      | (?:改写|扩写|优化|润色|完善)?后?的?(?:视频)?(?:提示词|描述|文本|输出)(?:如下)?\s*\**\s*[:：]
    )\s*\**\s*""",
    re.VERBOSE | re.IGNORECASE,
)
_OPTION = r"[#*\s]{0,8}(?:option|version|variant|选项|方案|版本)\s{0,2}"
# What models write around the prompt, cut line by line.
_CUTS = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        rf"\n{_OPTION}(?:2|two|b|二)\b[\s\S]*",  # further versions: the first one is taken
        rf"\A{_OPTION}(?:1|one|a|一)\b ?(?:\([^)\n]{{0,40}}\))?[ *]{{0,4}}[:：.–-][\s*]{{0,4}}",
        r"\A(?:#{1,6} [^\n]{1,100}|\*\*[^*\n]{1,80}\*\*)\n",  # a heading above the prompt
        # notes below it
        r"\n[*_(（\[]{0,3}(?:notes? ?[*_]{0,2}[:：]|word count|let me know|feel free|i hope|would you like|"
        r"key (?:changes|elements)|this (?:prompt|version|rewrite)|explanation|[注说]明?[:：]|字数|如需)[\s\S]*",
        r"^(?:-{3,}|\*{3,}|_{3,}|={3,})$",  # rules
        r"^(?:\d{1,2}[.)]|[-*•]|#{1,6})\s+",  # numbers, bullets and signs of headings
        r"\*\*",
    )
)
_LAYERS = 6  # of markup, at most
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»"}
_JSON_NAMES = ("prompt", "description", "caption", "text", "output", "answer", "result", "提示词", "描述")


class Question(NamedTuple):
    """One request to the model: its instructions, the user's text, the image it must look at."""

    system: str
    text: str
    image: Path | None


class AnswerError(Exception):
    """The model gave no usable answer; the message is the reason, without any secret.
    passing: another attempt may succeed, after `wait` seconds. ends_all: no other question can succeed either."""

    def __init__(self, reason: str, *, passing: bool = False, ends_all: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing, self.ends_all, self.wait = passing, ends_all, wait


def neutralise(text: str) -> str:
    """The text without chat control tokens: `<|im_end|>` in a prompt must not end the user's turn."""
    return text.replace("<|", "< |")


def printable(text: str) -> str:
    """The text without control, direction and zero-width characters and lone surrogates; white space stays."""
    return "".join(sign for sign in text if sign.isprintable() or sign.isspace())


def clean(answer: str) -> str:
    """The bare prompt in one line: no reasoning, wrappers, fences, quotes, lead-ins, notes or line breaks. Takes time
    linear in the length. AnswerError for a refusal, reasoning without an end, nothing or too much text."""
    text = without_reasoning(answer).strip()
    if len(text) <= MOST_TEXT:
        text = _WRAPPER_TAGS.sub("", text).strip()
        before, fence, rest = text.partition("```")
        inside, closed, _ = rest.partition("```")
        if fence and (closed or not before.strip()):  # the inside of the first fence
            text = re.sub(r"\A[\w+-]{0,20}\n", "", inside).strip()
        text = _from_json(text)
        for _ in range(2):  # in lines, and as the one line they become
            for _ in range(_LAYERS):
                text = _peeled(text)
            text = " ".join(text.split())
    if len(text) > LONGEST_ANSWER:
        raise AnswerError(f"the answer is {len(text)} characters long; at most {LONGEST_ANSWER} are of use")
    if not any(sign.isalnum() for sign in text):
        raise AnswerError("the answer is empty")
    if _REFUSAL.match(text):
        raise AnswerError(f'the model refused: "{text[:100]}"')
    return text


def _peeled(text: str) -> str:
    """The text without one layer of what is around the prompt: a lead-in may be inside quotes, or above them."""
    with suppress(ValueError):  # a number of too many digits
        text = html.unescape(text)
    lines = printable(_WRAPPER_TAGS.sub("", text)).replace("\\n", "\n").splitlines()
    text = "\n".join(filter(None, map(str.strip, lines)))
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :]
    inner = text[1:-1]  # of quotes around the whole text; those that belong to its parts stay
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in inner and text[-1] not in inner:
        text = inner.strip()
    for cut in _CUTS:
        text = cut.sub("", text)
    return text.strip()


def without_reasoning(answer: str) -> str:
    """The answer after its last reasoning. AnswerError for reasoning without an end."""
    ends = [match.end() for match in REASONING_CLOSES.finditer(answer)]
    if ends:
        return answer[ends[-1] :]
    if not REASONING_OPENS.search(answer):
        return answer
    _, end, prompt = answer.rpartition("assistantfinal")  # channels whose tokens a server has removed
    if not (end and answer.startswith("analysis")):
        raise AnswerError("the answer is reasoning without an end")
    return prompt


def _from_json(text: str) -> str:
    """The prompt inside a JSON object; any other text as it is. AnswerError for JSON without one."""
    if not text.startswith(("{", "[")):
        return text
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        if re.match(r'[{\[]\s*["{\[]', text):
            raise AnswerError("the answer is damaged JSON") from None
        return text
    while isinstance(values, (dict, list)):  # a text before what holds some, one with a fitting name before others
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        ranked = [
            (not isinstance(value, str), not any(name in str(key).lower() for name in _JSON_NAMES), value)
            for key, value in pairs if isinstance(value, (str, dict, list))
        ]  # fmt: skip
        values = min(ranked, key=itemgetter(0, 1), default=(None,))[-1]
    if not isinstance(values, str):
        raise AnswerError("the answer is JSON without a prompt")
    return values
