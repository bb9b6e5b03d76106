"""Text cleaning and the UMT5 tokenizer.

The tokenizer file is read as it is: transformers 5 would rebuild it from its vocabulary with another unknown id.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import ftfy
from tokenizers import Tokenizer

LARGEST_TOKENIZER = 100_000_000  # bytes of tokenizer.json; the published one has 17 MB
MOST_GROWTH = 64  # characters made of one, and tokens around a text; published tokenizers have 1


def clean_text(text: str) -> str:
    """Mend the encoding (which also turns full-width forms into half-width), unescape HTML, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5Tokenizer:
    """Text -> token ids, ending in `</s>`, at most `text_len` of them."""

    def __init__(self, folder: Path, text_len: int) -> None:
        """folder holds `tokenizer.json`; FileNotFoundError without it."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; a sentencepiece model alone (spiece.model) is not read")
        if file.stat().st_size > LARGEST_TOKENIZER:
            raise ValueError(f"{file.stat().st_size:,} bytes, at most {LARGEST_TOKENIZER:,} are read")
        self.text_len = text_len
        self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
        growth = _growth(self._tokenizer.normalizer) * _growth(self._tokenizer.pre_tokenizer)
        if max(growth, self._tokenizer.num_special_tokens_to_add(False)) > MOST_GROWTH:
            raise ValueError(f"it makes {growth:,} characters of one; at most {MOST_GROWTH} are possible")
        self._tokenizer.enable_truncation(text_len)
        self._tokenizer.no_padding()

    def __len__(self) -> int:
        """Ids that may come out are below this number."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(clean_text(text)).ids

    def lost(self, text: str) -> int:
        """How many tokens of `text` are beyond those that it gives."""
        if 4 * len(text) + 2 < self.text_len:  # a sign has at most four bytes, each a token
            return 0
        ends = self._tokenizer.num_special_tokens_to_add(False)
        return sum(len(part.ids) - ends for part in self._tokenizer.encode(clean_text(text)).overflowing)


def _growth(component: Any) -> int:
    """The most characters that a component of a tokenizer, or its settings, make of one."""
    if not isinstance(component, dict):
        component = json.loads(component.__getstate__()) if component else {}
    own = max(1, *(len(str(component.get(name, ""))) for name in ("content", "prepend")))
    inner = component.get("normalizers") or component.get("pretokenizers") or ()
    return own * math.prod(map(_growth, inner))
