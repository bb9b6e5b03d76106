"""The text encoder: transformers' UMT5, two layers and 64 wide, over a vocabulary of words.

It is trained to tell four learned queries, which see its rows without their order, what a caption says: the transformer
sees them in the same way, and untrained rows hardly tell which of two colours is the shape's. Then it stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from examples.shapes.world import COLOURS, MOTIONS, SHAPES, Scene, draw

WIDTH, TEXT_LENGTH = 64, 512
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]  # their places are UMT5's
WORDS = ["a", *COLOURS, *SHAPES, "moves", "stays", "left", "right", "up", "down", "still", "on", "background"]
SLOTS = 11  # the ten tokens of a caption, and one row for the padding


def tokenizer() -> Tokenizer:
    """Words in lower case without punctuation. All of the model's Chinese negative prompt is one unknown word."""
    words = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\s]+"), "")])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(SPECIAL)
    return made


def build() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=WIDTH, d_kv=16, num_heads=4, d_ff=128, num_layers=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return UMT5EncoderModel(config)


class Probe(nn.Module):
    """Reads colour, shape, motion and ground off the rows of a caption, blind to their order."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build()
        self.queries = nn.Parameter(torch.randn(4, WIDTH))
        self.keys, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.answers = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in (COLOURS, SHAPES, MOTIONS, COLOURS))
        self.words = tokenizer()

    def forward(self, scenes: list[Scene]) -> list[Tensor]:
        """Logits for each of the four questions, [B, answers]."""
        ids = torch.tensor([self.words.encode(scene.caption).ids for scene in scenes])
        rows = self.encoder(ids).last_hidden_state
        attention = (self.queries @ self.keys(rows).mT / WIDTH**0.5).softmax(-1)
        read = attention @ self.values(rows)  # [B, 4, WIDTH]
        return [answer(read[:, i]) for i, answer in enumerate(self.answers)]

    def loss(self, progress: float, generator: torch.Generator) -> Tensor:
        scenes = draw(64, generator)
        return sum(F.cross_entropy(x, y) for x, y in zip(self(scenes), answers(scenes), strict=True))

    @torch.no_grad()
    def accuracy(self, scenes: list[Scene]) -> list[float]:
        return [(x.argmax(1) == y).float().mean().item() for x, y in zip(self(scenes), answers(scenes), strict=True)]


def answers(scenes: list[Scene]) -> list[Tensor]:
    colours, motions = list(COLOURS), list(MOTIONS)
    numbers = [
        (colours.index(s.colour), SHAPES.index(s.shape), motions.index(s.motion), colours.index(s.ground))
        for s in scenes
    ]
    return list(torch.tensor(numbers).unbind(1))


@torch.no_grad()
def encode(encoder: UMT5EncoderModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Rows [B, SLOTS, WIDTH] and what is added to their attention scores [B, SLOTS].

    Wan attends to 512 rows, all behind the text's own zeros and equal. One of them with the logarithm of their number
    added to its score counts for them all.
    """
    words = tokenizer()
    rows, scores = torch.zeros(len(texts), SLOTS, WIDTH), torch.full((len(texts), SLOTS), -torch.inf)
    for i, text in enumerate(texts):
        found = encoder(torch.tensor([words.encode(text).ids])).last_hidden_state[0]
        count = len(found)
        rows[i, :count] = found
        scores[i, :count] = 0
        scores[i, count] = torch.tensor(float(TEXT_LENGTH - count)).log()
    return rows, scores
