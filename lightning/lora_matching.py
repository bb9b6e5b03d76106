"""The tensors of a LoRA: the kinds of change that they form, their names taken apart, and their places in the model.

    pair   up @ down                         up [O, R], down [R, I]
    LoKr   kron(w1, w2)                      w1 [O/P, I/Q], w2 [P, Q]     (LyCORIS, arXiv 2309.14859)
    LoHa   (w1_a @ w1_b) * (w2_a @ w2_b)     w_a [O, R], w_b [R, I]       (FedPara, arXiv 2108.06098)

Shapes: O rows of the weight, I columns (all further axes of a convolution flattened), R rank. A factor is one tensor or
a product a @ b; in convolutions a core [R, R, k...] may join the two (Tucker), and then a is [R, O] and b [R, I / k].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import mul
from typing import TYPE_CHECKING

from wan.checkpoints.key_mapping import diffusers_name
from wan.checkpoints.safetensors_file import Entry

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Rows = Callable[[slice], "Tensor"]  # rows of a weight -> its change there, float32 [rows, I]
Scale = Callable[[str, str | None, int], float]  # module, alpha tensor, rank -> alpha / rank
LORA_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PATCH_EMBEDDING = "patch_embedding.weight"


@dataclass(frozen=True)
class Factor:
    """One matrix of a change, by the roles of its tensors: `a` @ `b`, perhaps through `core`, or `whole`."""

    a: str
    b: str
    core: str = ""
    whole: str = ""

    def sizes(self, shapes: Shapes) -> tuple[int, int, int] | None:
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
    """A kind of LoRA: its change is the product of its factors, element by element, or their Kronecker product."""

    name: str
    factors: tuple[Factor, ...]
    kronecker: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for f in self.factors for role in (f.whole, f.a, f.b, f.core) if role)

    def sizes(self, shapes: Shapes) -> tuple[int, int, int] | None:
        """Rows, columns and rank of the change (rank 0: no factor is a product); None if the tensors do not fit."""
        sizes = [size for factor in self.factors if (size := factor.sizes(shapes))]
        if len(sizes) < len(self.factors):
            return None
        rows, columns, ranks = zip(*sizes, strict=True)
        if self.kronecker:
            return math.prod(rows), math.prod(columns), max(ranks)
        return (rows[0], columns[0], max(ranks)) if len(set(rows)) == len(set(columns)) == 1 else None

    def change(self, tensors: Mapping[str, Tensor]) -> Rows:
        """The function that makes any rows of the change from the tensors, which are given by role."""
        if not self.kronecker:
            return lambda rows: reduce(mul, (factor.rows(tensors, rows) for factor in self.factors))
        w1, w2 = (factor.rows(tensors) for factor in self.factors)

        def rows_of_kronecker(rows: slice) -> Tensor:
            top, bottom = rows.start // len(w2), -(-rows.stop // len(w2))
            found = w1[top:bottom].contiguous().kron(w2)
            return found[rows.start - top * len(w2) : rows.stop - top * len(w2)]

        return rows_of_kronecker


PAIR = Kind("pair", (Factor("up", "down"),))
LOKR = Kind(
    "LoKr",
    (Factor("lokr_w1_a", "lokr_w1_b", whole="lokr_w1"), Factor("lokr_w2_a", "lokr_w2_b", "lokr_t2", "lokr_w2")),
    kronecker=True,
)
LOHA = Kind("LoHa", (Factor("hada_w1_a", "hada_w1_b", "hada_t1"), Factor("hada_w2_a", "hada_w2_b", "hada_t2")))
KINDS = (PAIR, LOKR, LOHA)
MAGNITUDE = "magnitude"  # of DoRA: the norm that each row of the changed weight has in the end
_ADAPTER = r"(?:\.[^.]+)?"  # PEFT may put the adapter's name here
# role -> the end of a tensor's name
TENSOR_SUFFIXES = {
    "down": rf"(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down|\.lora_A{_ADAPTER})\.weight|\.lora_A",
    "up": rf"(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up|\.lora_B{_ADAPTER})\.weight|\.lora_B",
    "up_bias": rf"\.lora_B{_ADAPTER}\.bias",
    **{role: rf"\.{role}" for role in ("alpha", "diff", "diff_b", "diff_m")},
    MAGNITUDE: rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    **{role: rf"\.{role}{_ADAPTER}" for kind in (LOKR, LOHA) for role in kind.roles},
}
# Parts of Wan2.1's image branch, which Wan2.2 does not have: original and diffusers names, dotted or flattened.
IMAGE_BRANCH = re.compile(
    r"(?:^|[._])(?:img_emb|k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k|image_embedder)(?:[._]|$)"
)
UNSUPPORTED = re.compile(
    r"\.(lora_mid|lora_[ab]|lora_embedding_[AB]|w_norm|b_norm|set_weight|reshape_weight|oft_\w+|boft_\w+|ia3_\w+)(?=\.|$)"
)
_PREFIX = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer_2|transformer|model|unet|module"
    r"|pipe\.dit|dit|generator|generator_ema)\.)+"
)
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FLAT = re.compile(r"(?:lora_unet_{1,2}|lycoris_)")
_KEY = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<{role}>{end})" for role, end in TENSOR_SUFFIXES.items()) + ")")


@dataclass(frozen=True)
class Key:
    """A LoRA tensor's name, taken apart: `stem` names a module or a parameter in whatever spelling the file uses.
    role: of the tensor in its module, as in TENSOR_SUFFIXES. expert: "low" where the name itself says so, else None."""

    raw: str
    stem: str
    role: str
    expert: str | None


def parse_key(raw: str) -> Key | None:
    """The parts of a LoRA tensor's name; None for a name that no LoRA family uses."""
    name = _WRAPPERS.sub("", raw)
    prefix = _PREFIX.match(name)
    found = _KEY.fullmatch(name, prefix.end() if prefix else 0)
    if not found or not found.lastgroup:
        return None
    expert = "low" if prefix and "transformer_2." in prefix.group() else None
    return Key(raw, _FLAT.sub("", found["stem"], count=1), found.lastgroup, expert)


def spellings(parameters: Iterable[str]) -> dict[str, str]:
    """The original and diffusers' name of every parameter, with underscores as kohya's trainers spell it -> its name.
    A table and not a rule, because such a name cannot be taken apart: module names contain underscores."""
    return {each.replace(".", "_"): name for name in parameters for each in (name, diffusers_name(name))}


def find(table: Mapping[str, str], stem: str, role: str) -> str | None:
    """The parameter that a tensor of this role changes, looked up in the table of `spellings`."""
    leaf = {"up_bias": "bias", "diff_b": "bias", "diff_m": "modulation"}.get(role, "weight")
    flat = stem.replace(".", "_")
    return table.get(f"{flat}_{leaf}") or (table.get(flat) if role == "diff" else None)  # the whole name before `.diff`


@dataclass(frozen=True)
class Delta:
    """One change of parameter `target`: scale * the change of `kind`, or scale * one tensor where kind is None.

    roles: of `tensors`, in their order. scale: alpha / rank, without the strength. rank: 0 for a whole difference.
    magnitude: the tensor of row norms that DoRA gives the changed weight. is_adapter: a pair on a linear layer, which
    can stay beside the weight.
    """

    target: str
    kind: Kind | None
    roles: tuple[str, ...]
    tensors: tuple[str, ...]
    scale: float
    rank: int = 0
    magnitude: str | None = None
    is_adapter: bool = False


@dataclass
class Resolved:
    """The place of every tensor (`entries`) in a model (`shapes`): in a delta, as its alpha, or in one of the lists."""

    entries: Mapping[str, Entry]
    shapes: Shapes
    scale: Scale  # ValueError for an alpha that is unusable
    deltas: list[Delta] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # Wan2.1's image branch, the other expert's half, empty pairs
    skipped: list[str] = field(default_factory=list)  # a patch embedding for another number of channels
    unmatched: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    conflicts: dict[str, str] = field(default_factory=dict)  # tensor -> why it does not fit

    def set_aside(self, name: str) -> None:
        """Take a tensor that changes nothing in the model."""
        (self.ignored if IMAGE_BRANCH.search(name) else self.unmatched).append(name)

    def place(self, stem: str, names: Mapping[str, str], targets: Mapping[str, str]) -> None:
        """Place a module's tensors (`names`), which change these parameters; both by role."""
        if PATCH_EMBEDDING in targets.values():
            name, shape = names.get("diff") or names.get("down"), self.shapes[PATCH_EMBEDDING]
            found = self.entries[name].shape if name else ()
            if len(found) == len(shape) and found[1] != shape[1] and found[2:] == shape[2:]:
                self.skipped += names.values()
                return
        kinds = [kind for kind in KINDS if not names.keys().isdisjoint(kind.roles)]
        scale = 1.0
        for kind in kinds:
            scale = self._add_change(kind, stem, names, targets)
        if MAGNITUDE in names and not kinds:
            self.conflicts[names[MAGNITUDE]] = "has no LoRA beside it"
        for role in ("diff", "diff_b", "diff_m", "up_bias"):
            if role in names:
                delta = Delta(targets[role], None, (role,), (names[role],), scale if role == "up_bias" else 1.0)
                self._add(delta, self.entries[names[role]].shape == self.shapes[targets[role]])
        if names.keys() == {"alpha"}:  # beside a difference alone it means nothing; alone it explains nothing
            self.unmatched.append(names["alpha"])

    def _add_change(self, kind: Kind, stem: str, names: Mapping[str, str], targets: Mapping[str, str]) -> float:
        """Add the module's change of this kind; the scale that it has."""
        roles = tuple(role for role in kind.roles if role in names)
        tensors = tuple(names[role] for role in roles)
        own = {role: self.entries[names[role]].shape for role in roles}
        products = [factor for factor in kind.factors if factor.whole not in own]
        if missing := [role for factor in products for role in (factor.a, factor.b) if role not in own]:
            self.conflicts[tensors[0]] = f"has no {missing[0]} matrix beside it"
            return 1.0
        if any(0 in shape for shape in own.values()):
            self.ignored += tensors  # a rank of 0 changes nothing
            return 1.0
        target = targets[roles[0]]
        shape, scale = self.shapes[target], 1.0
        rows, columns, rank = kind.sizes(own) or (0, 0, 0)
        fits = len(shape) > 1 and (rows, columns) == (shape[0], math.prod(shape[1:]))
        try:
            scale = self.scale(stem, names.get("alpha"), rank) if fits else 1.0
        except ValueError as e:
            self.conflicts[names["alpha"]] = str(e)
        if magnitude := names.get(MAGNITUDE):
            norms = self.entries[magnitude].shape
            by_column = len(shape) == len(norms) == 2 and norms[0] == 1
            if math.prod(norms) != shape[0] or by_column:
                fault = f"is {list(norms)}, not one norm for each of the {shape[0]} rows of {target}"
                self.conflicts[magnitude] = fault
        is_adapter = kind is PAIR and len(shape) == 2 and magnitude is None
        self._add(Delta(target, kind, roles, tensors, scale, rank, magnitude, is_adapter), fits)
        return scale

    def _add(self, delta: Delta, fits: bool) -> None:
        """Take a delta whose shapes and dtypes fit its parameter; note it as a conflict otherwise."""
        names = [*delta.tensors, *filter(None, [delta.magnitude])]
        if odd := [name for name in names if self.entries[name].dtype not in LORA_FLOATS]:
            self.conflicts[odd[0]] = f"is stored as {self.entries[odd[0]].dtype}, not as floating point"
        elif not fits:
            found = " x ".join(str(list(self.entries[name].shape)) for name in delta.tensors)
            wanted = list(self.shapes[delta.target])
            self.conflicts[names[0]] = f"is {found} where the model's {delta.target} is {wanted}"
        else:
            self.deltas.append(delta)
