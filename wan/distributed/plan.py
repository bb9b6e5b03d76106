"""What a layout costs, before anything starts: who makes what, bytes in memory and bytes sent. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan.distributed.mesh import Layout, divisors

# What one GPU does on a machine with such links: bytes sent and floating-point operations a second. Round figures for
# H100-class GPUs on NVLink and for consumer cards on PCIe 4; good for a warning, not for a forecast.
MACHINES = {"NVLink": (300e9, 600e12), "PCIe": (20e9, 150e12)}


@dataclass(frozen=True)
class Network:
    """The sizes of a transformer that decide its cost."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int

    def operations(self, tokens: int) -> float:
        """Floating-point operations of one forward; a multiplication and an addition are two."""
        linear = 6 * self.dim**2 + 2 * self.dim * self.ffn_dim  # q, k, v, o; the text's q, o; feed-forward
        return self.num_layers * (2.0 * tokens * linear + 4.0 * tokens**2 * self.dim)


def sent_bytes(
    layout: Layout, network: Network, tokens: int, element_bytes: int, sharded_bytes: int = 0
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
    network: Network,
    tokens: int,
    jobs: int,
    element_bytes: int,
    weights: Mapping[str, int],
    sharded: Mapping[str, int],
) -> list[str]:
    """What `--dry_run` says of many processes. tokens: of the largest job.

    weights: bytes by network as one process alone would hold them; sharded: those of them that are sharded, of which
    the experts are `weights`' entries that a step runs.
    """
    each = {name: size / layout.sequence if name in sharded else size for name, size in weights.items()}
    expert = max((size for name, size in sharded.items() if name.endswith("expert")), default=0)
    sent = sent_bytes(layout, network, tokens, element_bytes, expert)
    lines = [
        f"{layout}: {layout.data} video{'s' if layout.data > 1 else ''} at a time, each by {layout.sequence}",
        "weights of each process, GB: " + " + ".join(f"{name} {size / 1e9:.2f}" for name, size in each.items()),
    ]
    if any(sent.values()):
        parts = ", ".join(f"{purpose} {size / 1e9:.3g}" for purpose, size in sent.items() if size)
        seconds = {link: (sum(sent.values()) / rate, network.operations(tokens) / layout.sequence / speed)
                   for link, (rate, speed) in MACHINES.items()}  # fmt: skip
        shares = ", ".join(f"{there / (there + work):.0%} over {link}" for link, (there, work) in seconds.items())
        lines.append(
            f"each process sends in a forward, GB: {parts}; an estimated {shares} of its time if not overlapped"
        )
    if jobs < layout.data:
        larger = [n for n in divisors(layout.world // layout.ring) if network.num_heads % n == 0 and n > layout.ulysses]
        hint = f"; --ulysses_size {larger[-1]} would put more of them on one video" if larger else ""
        lines.append(f"warning: {jobs} videos for {layout.data} groups of processes: some have nothing to do{hint}")
    return lines
