"""The UMT5 text encoder (arXiv 2304.09151; T5 with gated GELU and a relative-position table in every layer), and its
tokenizer.

Shapes: n text tokens, D width, N heads, d head width. There is no batch and no padding: a padded key gets softmax
weight exactly 0, so encoding only the real tokens gives the same numbers for a fraction of the work.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from wan.configs.task import TEXT_WIDTH
from wan.modules.model import Residency

UMT5_XXL = {"vocab": 256384, "dim": TEXT_WIDTH, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24}

BUCKETS = 32
MAX_DISTANCE = 128
LARGEST_TOKENIZER = 100_000_000  # bytes of tokenizer.json; the published one has 17 MB
MOST_GROWTH = 64  # characters made of one, and tokens around a text; published tokenizers have 1


class UMT5Encoder(nn.Module):
    """Token ids -> one row a token. Parameter names are those of `models_t5_umt5-xxl-enc-bf16.pth`."""

    def __init__(self, *, vocab: int, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.residency: Residency = Residency()
        self.widths = dim, dim_attn, dim_ffn, num_heads
        self.token_embedding: nn.Module = table(vocab, dim)
        self.blocks = nn.ModuleList(T5Block(dim, dim_attn, dim_ffn, num_heads) for _ in range(num_layers))
        self.norm = T5Norm(dim)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> UMT5Encoder:
        """Build from the checkpoint's tensor shapes. ValueError naming the tensor that is missing."""
        try:
            vocab, dim = shapes["token_embedding.weight"]
            dim_attn, dim_ffn = shapes["blocks.0.attn.q.weight"][0], shapes["blocks.0.ffn.fc1.weight"][0]
            heads = shapes["blocks.0.pos_embedding.embedding.weight"][1]
        except KeyError as e:
            raise ValueError(f"not a UMT5 encoder: tensor {e.args[0]} is missing") from e
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        return cls(vocab=vocab, dim=dim, dim_attn=dim_attn, dim_ffn=dim_ffn, num_heads=heads, num_layers=layers)

    def forward(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """int64 [n] of each text -> [n, D] in the weights' dtype. A block does all texts before the next one begins."""
        states = [self.token_embedding(ids) for ids in texts]
        buckets = position_buckets(max(map(len, texts))).to(states[0].device)
        for unit, block in enumerate(self.blocks):
            with self.residency.use(unit):
                states = [block(states.pop(0), buckets[: len(ids), : len(ids)]) for ids in texts]  # old ones go at once
        return [self.norm(states.pop(0)) for _ in texts]

    def activation_bytes(self, lengths: Sequence[int], itemsize: int) -> int:
        """The peak beside the weights while texts of these `lengths` are encoded together."""
        (dim, dim_attn, dim_ffn, heads), n = self.widths, max(lengths, default=0)
        states = (sum(lengths) + 2 * n) * dim * itemsize  # of all texts; one's next state, and its norm
        attention = n * n * heads * 8 + 3 * n * dim_attn * itemsize  # scores in float32, their softmax; q, k, v
        gelu, bias = 4 * n * dim_ffn * itemsize, n * n * (heads * itemsize + 8)  # and the int64 buckets
        return states + bias + max(attention, gelu)

    @staticmethod
    def unit_of(name: str) -> int | None:
        """The unit of a parameter: its block; None for the others."""
        return int(name.split(".")[1]) if name.startswith("blocks.") else None


def released_text_encoder() -> UMT5Encoder:
    """On the meta device."""
    with torch.device("meta"):
        return UMT5Encoder(**UMT5_XXL)


class T5Block(nn.Module):
    def __init__(self, dim: int, dim_attn: int, dim_ffn: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = T5Norm(dim)
        self.attn = T5Attention(dim, dim_attn, num_heads)
        self.norm2 = T5Norm(dim)
        self.ffn = T5FeedForward(dim, dim_ffn)
        self.pos_embedding = nn.ModuleDict({"embedding": table(BUCKETS, num_heads)})

    def forward(self, x: Tensor, bucket: Tensor) -> Tensor:
        """x [n, D], bucket int64 [n, n] -> [n, D]."""
        bias = self.pos_embedding["embedding"](bucket).permute(2, 0, 1)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class T5Attention(nn.Module):
    def __init__(self, dim: int, dim_attn: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [n, D], bias [N, n, n] -> [n, D]. No 1/sqrt(d): T5 folds it into the weights. Softmax in float32."""
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(1, 2) + bias).float().softmax(-1).to(x.dtype)
        return self.o((weights @ v).transpose(0, 1).flatten(1))


class T5FeedForward(nn.Module):
    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # GELU, tanh form (arXiv 1606.08415, eq. 2), one operation at a time: in bf16 each rounds, as in training
        gate = self.gate(x)
        gate = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
        return self.fc2(self.fc1(x) * gate)


def table(rows: int, width: int) -> nn.Embedding:
    """A row for each id. Drawing random ones would take a second of imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class T5Norm(nn.Module):
    """RMS norm with float32 statistics, rounded to the weight's dtype before the scaling."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return x.to(self.weight.dtype) * self.weight


def position_buckets(length: int) -> Tensor:
    """Bucket of every (query, key) pair: int64 [length, length].
    Each side of the query has 16 buckets: exact distances below 8, then logarithmic ones up to 128 (arXiv 1910.10683,
    section 2.1). An integer table, because the logarithm's rounding at 16, 32 and 64 depends on the device."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    table = list(range(exact)) + [
        # trunc(exact * ln(n / exact) / ln(MAX_DISTANCE / exact)) as the number of bucket edges that n has reached
        exact + sum((n / exact) ** exact >= (MAX_DISTANCE / exact) ** edge for edge in range(1, exact))
        for n in range(exact, MAX_DISTANCE)
    ]
    position = torch.arange(length)
    relative = position[None, :] - position[:, None]
    distance = torch.tensor(table)[relative.abs().clamp(max=MAX_DISTANCE - 1)]
    return distance + half * (relative > 0)


def clean_text(text: str) -> str:
    """Mend the encoding (which also turns full-width forms into half-width), unescape HTML, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5Tokenizer:
    """Text -> token ids, ending in `</s>`, at most `text_len` of them.
    The tokenizer file is read as it is: transformers 5 would rebuild it from its vocabulary with another unknown id."""

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
        self.count = cache(self._count)  # text -> its tokens, those beyond `text_len` too

    def __len__(self) -> int:
        """Ids that may come out are below this number."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(clean_text(text)).ids

    def _count(self, text: str) -> int:
        encoded, ends = self._tokenizer.encode(clean_text(text)), self._tokenizer.num_special_tokens_to_add(False)
        return len(encoded.ids) + sum(len(part.ids) - ends for part in encoded.overflowing)


def _growth(component: Any) -> int:
    """The most characters that a component of a tokenizer, or its settings, make of one."""
    if not isinstance(component, dict):
        component = json.loads(component.__getstate__()) if component else {}
    own = max(1, *(len(str(component.get(name, ""))) for name in ("content", "prepend")))
    inner = component.get("normalizers") or component.get("pretokenizers") or ()
    return own * math.prod(map(_growth, inner))
