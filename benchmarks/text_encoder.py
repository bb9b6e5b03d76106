"""The text encoder (C8): one 40-token prompt as a guidance-free run encodes it, beside what the original does: prompt
and negative prompt, both padded to 512 tokens, here in transformers' UMT5 with the same sizes.

    python -m benchmarks.text_encoder [--repeats 5]
"""

from __future__ import annotations

import torch

from benchmarks.loading import text_encoder
from benchmarks.measure import Row, command_parser, interleaved, randomise, report

LAYERS = 6


@torch.no_grad()
def rows(repeats: int = 5) -> list[Row]:
    from transformers import UMT5Config, UMT5EncoderModel

    ours = text_encoder(LAYERS).to_empty(device="cpu").eval()
    randomise(ours)
    config = UMT5Config(vocab_size=8192, d_model=1024, d_kv=64, d_ff=2816, num_layers=LAYERS, num_heads=16,
                        feed_forward_proj="gated-gelu")  # fmt: skip
    theirs = UMT5EncoderModel(config).eval()
    ids = torch.randint(4, 8192, (40,))
    padded, mask = torch.zeros(1, 512, dtype=torch.int64), torch.zeros(1, 512, dtype=torch.int64)
    padded[0, :40], mask[0, :40] = ids, 1

    def original() -> None:
        for _ in range(2):
            theirs(padded, attention_mask=mask)

    seconds, peer = interleaved([lambda: ours([ids]), original], repeats)
    what = f"C8 a 40-token prompt, {LAYERS} layers of width 1024, float32"
    figure, limit = f"{seconds:.3f} s ({peer / seconds:.0f} x)", "must 8, good 12, best 18 x"
    return [Row(what, figure, limit, f"transformers, two prompts padded to 512: {peer:.2f} s")]


def main() -> None:
    report(rows(command_parser(__doc__, repeats=5).parse_args().repeats))


if __name__ == "__main__":
    main()
