"""The kinds of LoRA: how their tensors are named, and the change of a weight that they give.

    pair   up @ down                         up [O, R], down [R, I]
    LoKr   kron(w1, w2)                      w1 [O/P, I/Q], w2 [P, Q]     (LyCORIS, arXiv 2309.14859)
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b)     w_a [O, R], w_b [R, I]       (FedPara, arXiv 2108.06098)

Shapes: O rows of the weight, I columns (all further axes of a convolution flattened), R rank. A factor is one tensor or
a product a @ b; in convolutions a core [R, R, k...] may join the two (Tucker), and then a is [R, O] and b [R, I / k].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Rows = Callable[[slice], "Tensor"]  # rows of a weight -> its change there, float32 [rows, I]


@dataclass(frozen=True)
class Factor:
    """One matrix of a change, by the roles of its tensors: `a` @ `b`, perhaps through `core`, or `whole`."""

    a: str
    b: str
    core: str = ""
    whole: str = ""

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.whole, self.a, self.b, self.core)))

    def lacks(self, shapes: Mapping[str, Shape]) -> str | None:
        """The role of a tensor that is missing beside the others."""
        return None if self.whole in shapes else next((role for role in (self.a, self.b) if role not in shapes), None)

    def sizes(self, shapes: Mapping[str, Shape]) -> tuple[int, int, int] | None:
        """Rows, columns and rank (0 for a whole matrix); None if the tensors do not fit together."""
        if self.whole in shapes:
            shape, alone = shapes[self.whole], shapes.keys().isdisjoint((self.a, self.b, self.core))
            return (shape[0], math.prod(shape[1:]), 0) if len(shape) > 1 and alone else None
        a, b, core = shapes[self.a], shapes[self.b], shapes.get(self.core, ())
        if min(len(a), len(b)) < 2:
            return None
        if core:
            fits = len(core) > 2 and core[:2] == (a[0], b[0]) and len(a) == len(b) == 2
            return (a[1], b[1] * math.prod(core[2:]), b[0]) if fits else None
        return (a[0], math.prod(b[1:]), b[0]) if math.prod(a[1:]) == b[0] else None

    def rows(self, tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """These rows of the matrix, [rows, columns], from float32 tensors."""
        if self.whole in tensors:
            return tensors[self.whole].flatten(1)[rows]
        a, b = tensors[self.a], tensors[self.b]
        if self.core not in tensors:
            return a.flatten(1)[rows] @ b.flatten(1)
        import torch

        return torch.einsum("ij...,ip,jr->pr...", tensors[self.core], a[:, rows], b).flatten(1)


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA.

    size: rows or columns of the change, from those of its factors; 0 where they do not fit.
    change: takes the factors and their tensors; the result makes any rows of the change.
    """

    name: str
    factors: tuple[Factor, ...]
    size: Callable[..., int]
    change: Callable[[tuple[Factor, ...], Mapping[str, Tensor]], Rows]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for factor in self.factors for role in factor.roles)

    def lacks(self, shapes: Mapping[str, Shape]) -> str | None:
        """The role of a tensor that is missing beside the others."""
        return next((role for factor in self.factors if (role := factor.lacks(shapes))), None)

    def sizes(self, shapes: Mapping[str, Shape]) -> tuple[int, int, int] | None:
        """Rows, columns and rank of the change (rank 0: no factor is a product); None if the tensors do not fit."""
        sizes = [size for factor in self.factors if (size := factor.sizes(shapes))]
        if len(sizes) < len(self.factors):
            return None
        rows, columns, ranks = zip(*sizes, strict=True)
        return self.size(*rows), self.size(*columns), max(ranks)


def _product(factors: tuple[Factor, ...], tensors: Mapping[str, Tensor]) -> Rows:
    return lambda rows: factors[0].rows(tensors, rows)


def _kronecker(factors: tuple[Factor, ...], tensors: Mapping[str, Tensor]) -> Rows:
    w1, w2 = (factor.rows(tensors) for factor in factors)

    def change(rows: slice) -> Tensor:
        import torch

        top = rows.start // len(w2)
        found = torch.kron(w1[top : -(-rows.stop // len(w2))].contiguous(), w2)
        return found[rows.start - top * len(w2) : rows.stop - top * len(w2)]

    return change


def _hadamard(factors: tuple[Factor, ...], tensors: Mapping[str, Tensor]) -> Rows:
    return lambda rows: factors[0].rows(tensors, rows) * factors[1].rows(tensors, rows)


PAIR = Kind("pair", (Factor("up", "down"),), lambda n: n, _product)
LOKR = Kind(
    "LoKr",
    (Factor("lokr_w1_a", "lokr_w1_b", whole="lokr_w1"), Factor("lokr_w2_a", "lokr_w2_b", "lokr_t2", "lokr_w2")),
    lambda n, m: n * m,
    _kronecker,
)
LOHA = Kind(
    "LoHa",
    (Factor("hada_w1_a", "hada_w1_b", "hada_t1"), Factor("hada_w2_a", "hada_w2_b", "hada_t2")),
    lambda n, m: n if n == m else 0,
    _hadamard,
)
KINDS = (PAIR, LOKR, LOHA)
MAGNITUDE = "magnitude"  # of DoRA: the norm that each row of the changed weight has in the end
_ADAPTER = r"(?:\.[^.]+)?"  # PEFT may put the adapter's name here
# role -> the end of a tensor's name. All other roles are spelled `.role`.
TENSOR_SUFFIXES = {
    "down": rf"(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down|\.lora_A{_ADAPTER})\.weight|\.lora_A",
    "up": rf"(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up|\.lora_B{_ADAPTER})\.weight|\.lora_B",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias",
    "alpha": r"\.alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
    MAGNITUDE: rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}",
} | {role: rf"\.{role}{_ADAPTER}" for kind in (LOKR, LOHA) for role in kind.roles}
