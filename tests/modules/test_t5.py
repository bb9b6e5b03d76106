"""The text encoder against transformers' UMT5EncoderModel, the bucket table, cleaning and the tokenizer."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.counters import CostCounter
from benchmarks.measure import rms_error
from tests.support import checkpoint, manifest
from wan.modules.t5 import UMT5_XXL, UMT5Encoder, UMT5Tokenizer, clean_text, position_buckets

NAMES = {
    "attn": ".0.SelfAttention.",
    "pos_embedding": ".0.SelfAttention.relative_attention_bias.weight",
    "norm1": ".0.layer_norm.weight",
    "norm2": ".1.layer_norm.weight",
    "ffn.gate.0": ".1.DenseReluDense.wi_0.weight",
    "ffn.fc1": ".1.DenseReluDense.wi_1.weight",
    "ffn.fc2": ".1.DenseReluDense.wo.weight",
}


def transformers_name(name: str) -> str:
    if not name.startswith("blocks."):
        return {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}[name]
    _, index, rest = name.split(".", 2)
    part = next(part for part in NAMES if rest.startswith(part))
    suffix = rest.removeprefix("attn.") if part == "attn" else ""
    return f"encoder.block.{index}.layer{NAMES[part]}{suffix}"


def pair(dtype: torch.dtype, vocab: int, dim: int, attention: int, ffn: int, heads: int, layers: int):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(3)
    ours = UMT5Encoder(vocab=vocab, dim=dim, dim_attn=attention, dim_ffn=ffn, num_heads=heads, num_layers=layers)
    for name, parameter in ours.named_parameters():
        spread = 0.2 if parameter.ndim < 2 else dim**-0.5
        if name.endswith("attn.q.weight"):  # T5 has no 1/sqrt(d): the query weights have that scale
            spread *= (attention // heads) ** -0.5
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, spread)
    config = UMT5Config(
        vocab_size=vocab, d_model=dim, d_kv=attention // heads, d_ff=ffn, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, dropout_rate=0.0,
        layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = UMT5EncoderModel(config).eval()
    state = {transformers_name(name): p for name, p in ours.state_dict().items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    theirs.load_state_dict(state, strict=True)
    return ours.eval().to(dtype), theirs.to(dtype)


SIZES = [(101, 48, 64, 80, 4, 3), (501, 256, 512, 640, 8, 4)]


def padded_to_512(theirs, ids: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(1, 512, dtype=torch.int64)
    padded[0, : len(ids)] = ids
    mask = (torch.arange(512) < len(ids)).long()[None]
    return theirs(padded, attention_mask=mask).last_hidden_state[0, : len(ids)]


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_trimmed_equals_the_oracle_padded(sizes: tuple[int, ...]) -> None:
    """Encoding only the real tokens equals encoding them padded to 512 under a mask."""
    ours, theirs = pair(torch.float32, *sizes)
    for length in (1, 7, 130, 300, 512):
        ids = torch.randint(4, sizes[0], (length,))
        expected = padded_to_512(theirs, ids)
        assert (ours([ids])[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_bf16_is_the_oracles(sizes: tuple[int, ...]) -> None:
    """To the bit where both multiply the same number of rows: each operation rounds where the oracle's does.

    A product of fewer rows is summed in another order on some processors (AMX's tiles are chosen by the number of
    rows), so trimmed against padded is judged by the distance of both to float32: within 1 % of each other, 5 % asked.
    """
    ours, theirs = pair(torch.bfloat16, *sizes)
    full = torch.randint(4, sizes[0], (512,))
    assert torch.equal(ours([full])[0], padded_to_512(theirs, full))
    exact = copy.deepcopy(ours).float()
    prompts = [torch.randint(4, sizes[0], (length,)) for length in (1, 7, 130, 300)]
    reference = torch.cat([*exact(prompts)])
    error = rms_error(torch.cat(ours(prompts)), reference)
    assert error < 1.05 * rms_error(torch.cat([padded_to_512(theirs, ids) for ids in prompts]), reference) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[10], [120], [512], [10] * 64, [512] * 64, [*range(16, 80)], [500, 40, 512]])
def test_peak_of_the_encoding_is_predicted(lengths: list[int], dtype: torch.dtype) -> None:
    """Counted at the released widths: 64 texts take more than one, 512 tokens more than 10."""
    with torch.device("meta"), torch.no_grad():
        model = UMT5Encoder(**UMT5_XXL | {"num_layers": 2}).to(dtype)
        ids = [torch.empty(length, dtype=torch.int64) for length in lengths]
        with CostCounter() as counter:
            model(ids)
    assert 1 <= model.activation_bytes(lengths, dtype.itemsize) / counter.peak < 1.1


def test_buckets_follow_the_formula() -> None:
    table = position_buckets(200)
    for n in range(200):
        far = 8 + math.trunc(8 * math.log(n / 8) / math.log(16) + 1e-9) if n >= 8 else n
        assert table[n, 0] == min(15, far)
        assert n == 0 or table[0, n] == 16 + min(15, far)


def test_names_and_shapes_of_umt5_xxl() -> None:
    expected = manifest("umt5_xxl")
    with torch.device("meta"):
        model = UMT5Encoder.from_shapes(expected)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected


def test_a_checkpoint_of_something_else_is_named() -> None:
    with pytest.raises(ValueError, match=r"not a UMT5 encoder: tensor blocks\.0\.attn\.q\.weight is missing"):
        UMT5Encoder.from_shapes({"token_embedding.weight": (10, 8)})


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("“curly” ‘q’ don’t", "\"curly\" 'q' don't"),
        ("ＡＢＣ１２３！", "ABC123!"),
        ("&amp;amp; &lt;b&gt;", "& <b>"),
        ("schÃ¶n", "schön"),
        ("a\u00a0b\u3000c\n\n e", "a b c e"),
        ("l&#39;eau &nbsp; x", "l'eau x"),
        ("①② …—– 「」。、", "①② …—– 「」。、"),
        ("zero\u200bwidth", "zero\u200bwidth"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
    ],
)
def test_cleaning(text: str, clean: str) -> None:
    assert clean_text(text) == clean


@pytest.fixture(scope="module")
def tokenizer() -> UMT5Tokenizer:
    return UMT5Tokenizer(checkpoint("t2v-A14B") / "google" / "umt5-xxl", 512)


def test_tokenizer_rules(tokenizer: UMT5Tokenizer) -> None:
    assert tokenizer("") == [1]
    assert tokenizer("the cat")[-1] == 1
    assert 3 in tokenizer("a \U0001f9ff cat"), "an unknown character is <unk> = 3, not <s> = 2"
    assert 2 not in tokenizer("a \U0001f9ff cat")


def test_truncation_keeps_the_end_token(tokenizer: UMT5Tokenizer) -> None:
    ids = tokenizer("the cat " * 600)
    assert len(ids) == 512
    assert ids[-1] == 1


def test_a_folder_without_tokenizer_json_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        UMT5Tokenizer(tmp_path, 512)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 40},
        {"type": "Prepend", "prepend": "x" * 100},
    ],
)
def test_a_tokenizer_that_explodes_is_refused(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    settings = json.loads((checkpoint("t2v-A14B") / "google/umt5-xxl/tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"normalizer": normalizer}))
    with pytest.raises(ValueError, match="characters"):
        UMT5Tokenizer(tmp_path, 512)


def test_a_tokenizer_of_impossible_size_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="bytes"):
        UMT5Tokenizer(tmp_path, 512)
