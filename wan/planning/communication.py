"""What a layout costs, before anything starts: who makes what, bytes in memory and bytes sent. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan.distributed.mesh import Layout, divisors
from wan.utils.progress import quantity

# What one GPU does on a machine with such links: bytes sent and floating-point operations a second. Round figures for
# H100-class GPUs on NVLink and for consumer cards on PCIe 4; good for a warning, not for a forecast.
MACHINES = {"NVLink": (300e9, 600e12), "PCIe": (20e9, 150e12)}


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of a transformer that decide its cost."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int

    def operations(self, tokens: int) -> float:
        """Floating-point operations of one forward; a multiplication and an addition are two."""
        return self.linear(tokens) + self.attention(tokens)

    def linear(self, tokens: int) -> float:
        """Of `operations`, those of products with weights."""
        weights = 6 * self.dim**2 + 2 * self.dim * self.ffn_dim  # q, k, v, o; the text's q, o; feed-forward
        return self.num_layers * 2.0 * tokens * weights

    def attention(self, tokens: int) -> float:
        """Of `operations`, those of tokens with tokens."""
        return self.num_layers * 4.0 * tokens**2 * self.dim


def sent_bytes(
    layout: Layout, network: NetworkSizes, tokens: int, element_bytes: int, sharded_bytes: int = 0
) -> dict[str, float]:
    """Bytes that one rank sends in one forward, by purpose.

    sharded_bytes: size of the whole network if its weights are sharded over the sequence group.
    """
    ulysses, ring, ranks = layout.ulysses, layout.ring, layout.sequence
    share = -(-tokens // ranks) * network.dim * element_bytes  # one rank's part of a token tensor
    return {
        "ulysses": network.num_layers * 4 * share * (ulysses - 1) / ulysses,  # q, k, v there, the result back
        "ring": network.num_layers * 2 * share * (ring - 1),  # k and v to each of the others
        "weights": sharded_bytes / ranks * (ranks - 1),
    }


def plan_lines(
    layout: Layout,
    network: NetworkSizes,
    *,
    tokens: int,
    jobs: int,
    element_bytes: int,
    weights: Mapping[str, int],
    sharded_bytes: int,
) -> list[str]:
    """What `--dry_run` says of many processes. tokens: of the largest job. weights: bytes in each process, by network.

    sharded_bytes: see `sent_bytes`.
    """
    groups, each = layout.data, layout.sequence
    at_once = f"{groups} videos at a time" if groups > 1 else "one video at a time"
    held = " + ".join(f"{name} {quantity(size, 'B')}" for name, size in weights.items())
    lines = [f"{layout}: {at_once}, {each} process{'es' if each > 1 else ''} each; weights in each: {held}"]
    sent = sent_bytes(layout, network, tokens, element_bytes, sharded_bytes)
    if any(sent.values()):
        parts = " + ".join(f"{purpose} {quantity(size, 'B')}" for purpose, size in sent.items() if size)
        shares = []
        for link, (rate, speed) in MACHINES.items():
            sending, computing = sum(sent.values()) / rate, network.operations(tokens) / each / speed
            shares.append(f"{sending / (sending + computing):.0%} over {link}")
        lines.append(f"a forward sends from each: {parts}; estimated share of its time at most {', '.join(shares)}")
    if jobs < groups:
        legal = [n for n in divisors(layout.world // layout.ring) if network.num_heads % n == 0]
        hint = f"; --ulysses_size {legal[-1]} puts more of them on one video" if legal[-1] > layout.ulysses else ""
        lines.append(
            f"warning: {jobs} video{'s' if jobs > 1 else ''} for {groups} groups: some have nothing to do{hint}"
        )
    return lines
