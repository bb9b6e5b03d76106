"""Text cleaning and the UMT5 tokenizer.

The tokenizer file is read as it is: transformers 5 would rebuild it from its vocabulary with another unknown id.
"""

import html
import re
from pathlib import Path

import ftfy
from tokenizers import Tokenizer


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
        self.text_len = text_len
        self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
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
