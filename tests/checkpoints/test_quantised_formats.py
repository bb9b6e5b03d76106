"""Every row of the table of formats against an independent reading with numpy: the numbers are equal, or refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wan.checkpoints.key_mapping import diffusers_name, text_name, vae_name
from wan.checkpoints.quantised_formats import FORMATS, Quantised, int8_marker
from wan.checkpoints.safetensors_file import TensorStore
from wan.checkpoints.weights import EXPERT, TEXT_ENCODER, VAE, as_ours, open_file
from wan.utils.errors import InputError

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    EXPERT: {
        "patch_embedding.weight": (16, 4, 1, 2, 2), "patch_embedding.bias": (16,), "text_embedding.0.weight": (16, 24),
        "blocks.0.self_attn.q.weight": (16, 64), "blocks.0.self_attn.q.bias": (16,),
        "blocks.0.ffn.0.weight": (48, 256), "blocks.0.modulation": (1, 6, 16), "head.head.weight": (8, 16),
    },
    TEXT_ENCODER: {
        "token_embedding.weight": (40, 16), "blocks.0.norm1.weight": (16,), "blocks.0.attn.q.weight": (16, 16),
        "blocks.0.pos_embedding.embedding.weight": (32, 4), "blocks.0.ffn.fc1.weight": (32, 64), "norm.weight": (16,),
    },
    VAE: {"conv1.weight": (8, 8, 1, 1, 1), "decoder.conv1.weight": (16, 4, 3, 3, 3), "decoder.conv1.bias": (16,)},
}  # fmt: skip
THEIRS = {EXPERT: diffusers_name, TEXT_ENCODER: text_name, VAE: vae_name}
PREFIX = {EXPERT: "model.diffusion_model.", TEXT_ENCODER: "text_encoders.umt5xxl.transformer.", VAE: "vae."}
ONE_FILE = {"model.diffusion_model.": EXPERT, "text_encoders.": TEXT_ENCODER, "vae.": VAE, "first_stage_model.": VAE}
PREFIXES = ["", "model.", "module.", "_orig_mod.", "generator.", "generator_ema.", "pipe.dit.", "transformer_2."]
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64) / 2
FP8 = {"float8_e4m3fn": (torch.float8_e4m3fn, 4, 7), "float8_e5m2": (torch.float8_e5m2, 5, 15)}


def fp8_numbers(data: np.ndarray, exponents: int, bias: int) -> np.ndarray:
    """Decode 8-bit floats with the given number of exponent bits to float32."""
    mantissas = 7 - exponents
    exponent = (data >> mantissas & (1 << exponents) - 1).astype(int)
    mantissa = (data & (1 << mantissas) - 1) / (1 << mantissas)
    size = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    return (np.where(data >> 7, -size, size)).astype(np.float32)


def rotated(weight: np.ndarray, group: int) -> np.ndarray:
    h = H4
    while len(h) < group:
        h = np.kron(h, H4)
    return (weight.reshape(len(weight), -1, group).astype(np.float64) @ h).reshape(weight.shape).astype(np.float32)


class Case:
    """One file in the making: tensors by name in the file, and what each of our parameters truly is."""

    def __init__(self, seed: object, kind: str = EXPERT, theirs: bool = False, prefix: str = "") -> None:
        self.chance, self.random = random.Random(str(seed)), np.random.default_rng(abs(hash(str(seed))) % 2**32)
        self.kind, self.prefix = kind, prefix
        self.name: Callable[[str], str] = THEIRS[kind] if theirs else str
        self.tensors: dict[str, torch.Tensor] = {}
        self.truth: dict[str, np.ndarray] = {}
        self.layers: dict[str, dict[str, Any]] = {}

    def plain(self, name: str, dtype: torch.dtype) -> None:
        value = torch.from_numpy(self.random.standard_normal(SHAPES[self.kind][name])).to(dtype)
        self.tensors[self.prefix + self.name(name)] = value
        self.truth[name] = value.double().numpy().astype(np.float32)

    def quantised(
        self, name: str, form: str, scales: str = "row", spelling: str = ".weight_scale", group: int = 0,
        marked: str = "", flags: dict[str, Any] | None = None, scale_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        shape = SHAPES[self.kind][name]
        theirs = self.prefix + self.name(name)
        layer = theirs.removesuffix(".weight")
        if form.startswith("float8"):
            dtype, exponents, bias = FP8["float8_e5m2" if "e5m2" in form else "float8_e4m3fn"]
            data = self.random.integers(0, 256, shape).astype(np.uint8)
            data[(data & 0x7F) >= 0x78] = 0x31  # neither NaN nor Inf
            numbers, stored = fp8_numbers(data, exponents, bias), torch.from_numpy(data).view(dtype)
        else:
            numbers = self.random.integers(-127, 128, shape).astype(np.float32)
            stored = torch.from_numpy(numbers).to(torch.int8)
        count = {"tensor": (), "row": (shape[0], *[1] * (len(shape) - 1)), "none": (),
                 "block": (shape[0] // 8, shape[-1] // 4), "group": (shape[0], shape[-1] // 4)}[scales]  # fmt: skip
        scale = torch.from_numpy(self.random.uniform(0.01, 0.1, count).astype(np.float32)).to(scale_dtype)
        factor = scale.float().numpy()
        if scales in ("block", "group"):
            factor = np.repeat(np.repeat(factor, shape[0] // count[0], 0), 4, 1)
        truth = numbers if scales == "none" else numbers * factor
        self.truth[name] = rotated(truth, group) if group else truth
        self.tensors[theirs + ("._data" if spelling == ".weight._scale" else "")] = stored
        if scales != "none":
            self.tensors[layer + spelling] = scale
        marker = {"format": form, **({"convrot": True, "convrot_groupsize": group} if group else {}), **(flags or {})}
        if marked == "tensor":
            text = json.dumps(marker).encode()
            self.tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        elif marked:
            self.layers[layer if marked == "metadata" else layer.removeprefix(self.prefix)] = marker

    def rest(self, dtype: torch.dtype = torch.float32) -> None:
        for name in SHAPES[self.kind].keys() - self.truth.keys():
            self.plain(name, dtype)

    def save(self, path: Path) -> TensorStore:
        content = json.dumps({"format_version": "1.0", "layers": self.layers})
        save_file(self.tensors, path, {"_quantization_metadata": content} if self.layers else None)
        return as_ours(open_file(path), self.kind, str(path))

    def assert_equal(self, store: TensorStore) -> None:
        """Whole, and by rows into a buffer, in float32."""
        assert store.shapes == {name: SHAPES[self.kind][name] for name in store}
        assert store.keys() == self.truth.keys()
        for name, truth in self.truth.items():
            first = self.chance.randrange(truth.shape[0])
            rows = slice(first, self.chance.randint(first, truth.shape[0]))
            found = store.read(name, rows, torch.empty(store[name].rows(rows).bytes, dtype=torch.uint8))
            np.testing.assert_allclose(store.read(name).float().numpy(), truth, 1e-6, 1e-6 * np.abs(truth).max())
            assert torch.equal(found, store.read(name)[rows]) or "convrot" in str(self.layers) + str(self.tensors)
            np.testing.assert_allclose(found.float().numpy(), truth[rows], 1e-6, 1e-6 * np.abs(truth).max())
            entry = store[name]
            if isinstance(entry, Quantised) and entry.by_row and not entry.rotation and truth.ndim == 2:
                stored = entry.read_as_stored(name, rows)
                np.testing.assert_allclose((stored[0].float() * stored[1]).numpy(), truth[rows], 1e-6)


ROWS: dict[str, dict[str, Any]] = {
    "float8_e4m3fn": {"scales": "tensor"},
    "float8_e5m2": {"scales": "row"},
    "float8_e4m3fn_rowwise": {"scales": "row", "marked": "tensor", "flags": {"per_row": True}},
    "float8_e4m3fn_blockwise": {"scales": "block", "marked": "metadata"},
    "int8_tensorwise": {"scales": "row", "marked": "metadata", "group": 64, "flags": {"orig_dtype": "torch.bfloat16"}},
}


def test_every_format_that_is_read_has_a_case() -> None:
    assert ROWS.keys() == {row.name for row in FORMATS.values() if not row.runs and row.name != "float64"}


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("group", [0, 4, 16, 256])
def test_a_format_is_read(form: str, group: int, tmp_path: Path) -> None:
    case = Case((form, group))
    settings = dict(ROWS[form])
    if "group" in settings:
        settings["group"] = group
    case.quantised("blocks.0.ffn.0.weight", form, **settings)
    case.rest()
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("form", "scales", "flags"),
    [
        ("float8_e4m3fn", "tensor", {"full_precision_matrix_mult": True}),
        ("float8_e5m2", "row", {"orig_shape": [48, 256]}),
        ("float8_e4m3fn_blockwise", "group", {"group_size": 4}),
        ("int8_tensorwise", "tensor", {"per_row": False}),
        ("int8_tensorwise", "row", int8_marker(0)),
    ],
)
def test_flags_that_say_what_the_tensors_say(form: str, scales: str, flags: dict[str, Any], tmp_path: Path) -> None:
    case = Case((form, scales))
    case.quantised("blocks.0.ffn.0.weight", form, scales, flags=flags, marked="tensor")
    case.rest()
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


WRITTEN = {"format": "int8_tensorwise", "per_row": True, "convrot": True, "convrot_groupsize": 64}


@pytest.mark.parametrize(("group", "marker"), [(256, {"format": "int8_tensorwise", "convrot": True}), (64, WRITTEN)])
def test_rotations_by_default_and_as_they_are_written(group: int, marker: dict[str, Any], tmp_path: Path) -> None:
    """ComfyUI rotates 256 inputs together where a marker says nothing else."""
    assert int8_marker(64) == WRITTEN
    case = Case(group)
    case.quantised("blocks.0.ffn.0.weight", "int8_tensorwise", group=group, marked="metadata")
    case.layers["blocks.0.ffn.0"] = marker
    case.rest()
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("int8_tensorwise", {"flags": {"convrot_v2": True}, "marked": "tensor"}),
        ("int8_tensorwise", {"flags": {"convrot": 1}, "marked": "tensor"}),
        ("int8_tensorwise", {"flags": {"convrot": True, "convrot_groupsize": 32}, "marked": "metadata"}),
        ("int8_tensorwise", {"flags": {"convrot": True, "convrot_groupsize": 1024}, "marked": "metadata"}),
        ("int8_tensorwise", {"flags": {"convrot_groupsize": 64}, "marked": "metadata"}),
        ("int8_tensorwise", {"scales": "none"}),
        ("int8_tensorwise", {"scales": "block"}),
        ("float8_e4m3fn", {"scales": "none", "marked": "tensor"}),
        ("float8_e4m3fn", {"flags": {"convrot": True}, "marked": "tensor"}),
        ("float8_e4m3fn", {"flags": {"orig_shape": [48, 255]}, "marked": "tensor"}),
        ("float8_e4m3fn_blockwise", {"scales": "block", "flags": {"group_size": 16}, "marked": "tensor"}),
        ("float8_e5m2", {"flags": {"more": 0}, "marked": "tensor"}),
        ("float8_e4m3fn_rowwise", {"scales": "tensor", "marked": "tensor"}),
        ("float8_e4m3fn_rowwise", {"scales": "block", "marked": "metadata"}),
        ("float8_e4m3fn_blockwise", {"scales": "tensor", "marked": "tensor"}),
        ("float8_e4m3fn_blockwise", {"scales": "row", "marked": "metadata"}),
    ],
)
def test_unknown_names_are_refused(form: str, change: dict[str, Any], tmp_path: Path) -> None:
    case = Case(form)
    case.quantised("blocks.0.ffn.0.weight", form, **change)
    case.rest()
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.weight "):
        case.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("form", "marker"), [("int8_tensorwise", "float8_e4m3fn"), ("float8_e5m2", "float8_e4m3fn"),
                                              ("float8_e4m3fn", "int8_tensorwise")])  # fmt: skip
def test_a_marker_of_another_type_is_refused(form: str, marker: str, tmp_path: Path) -> None:
    case = Case(form)
    case.quantised("blocks.0.ffn.0.weight", form, flags={"format": marker}, marked="tensor")
    case.rest()
    with pytest.raises(InputError, match=f"is marked {marker} but stored as"):
        case.save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "hybrid_mxfp8", "int8_blockwise", "a format of 2027"])
def test_formats_that_are_not_read_are_refused_by_name(form: str, tmp_path: Path) -> None:
    """With a program that runs them, where one is known."""
    case = Case(form)
    case.quantised("blocks.0.ffn.0.weight", form, marked="metadata")
    case.rest()
    with pytest.raises(InputError, match=form) as caught:
        case.save(tmp_path / "a.safetensors")
    assert ("ComfyUI" in str(caught.value)) == ("2027" not in form)


def refused(tmp_path: Path, change: Callable[[Case], object]) -> str:
    """Return the error for a plain int8 file after the change."""
    case = Case("x")
    case.quantised("blocks.0.ffn.0.weight", "int8_tensorwise")
    case.rest()
    change(case)
    with pytest.raises(InputError) as caught:
        case.save(tmp_path / "a.safetensors")
    return str(caught.value)


def test_markers_and_companions_are_never_ignored(tmp_path: Path) -> None:
    layer, number = "blocks.0.ffn.0", torch.ones(1)
    assert "pre_quant_scale" in refused(tmp_path, lambda c: c.tensors.update({f"{layer}.pre_quant_scale": number}))
    assert "nvfp4" in refused(tmp_path, lambda c: c.tensors.update({f"{layer}.weight_scale_2": number}))
    assert "missing" in refused(tmp_path, lambda c: c.layers.update({"blocks.7.q": {"format": "int8_tensorwise"}}))
    assert "names no format" in refused(tmp_path, lambda c: c.layers.update({layer: {"convrot": True}}))
    for text in (b"{", b"3", b"\xff", b"[" * 1000, b'{"format": "int8_tensorwise"}' + b" " * 65_536):
        marker = torch.tensor(list(text), dtype=torch.uint8)
        assert refused(tmp_path, lambda c, marker=marker: c.tensors.update({f"{layer}.comfy_quant": marker}))

    def contradict(case: Case) -> None:
        case.layers[layer] = {"format": "int8_tensorwise"}
        marker = json.dumps({"format": "int8_tensorwise", "convrot": True}).encode()
        case.tensors[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)

    assert "contradict" in refused(tmp_path, contradict)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [("qweight", "SVDQuant"), ("wscales", "SVDQuant"), ("smooth_factor", "SVDQuant"), ("Qidxs", "QuIP"), ("SU", "QuIP"),
     ("SV", "QuIP"), ("weight.absmax", "bitsandbytes"), ("weight.quant_map", "bitsandbytes"), ("SCB", "bitsandbytes")],
)  # fmt: skip
def test_formats_that_a_tensor_gives_away_are_refused_by_name(tensor: str, name: str, tmp_path: Path) -> None:
    layer = "blocks.0.ffn.0"
    found = refused(tmp_path, lambda case: case.tensors.update({f"{layer}.{tensor}": torch.ones(4)}))
    assert f"is in the format {name}" in found


@pytest.mark.parametrize("unused", ["input_scale", "scale_input", "output_scale"])
def test_scales_of_activations_change_no_weight(unused: str, tmp_path: Path) -> None:
    case = Case(unused)
    case.quantised("blocks.0.ffn.0.weight", "float8_e4m3fn")
    case.tensors[f"blocks.0.ffn.0.{unused}"] = torch.full((1,), 3.0)
    case.rest()
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


def test_a_file_named_convrot_that_says_nothing_is_refused(tmp_path: Path) -> None:
    case = Case("x")
    case.quantised("blocks.0.ffn.0.weight", "int8_tensorwise")
    case.rest()
    with pytest.raises(InputError, match="convrot"):
        case.save(tmp_path / "wan_int8_ConvRot.safetensors")


def test_markers_in_the_headers_of_shards(tmp_path: Path) -> None:
    case = Case("shards")
    case.quantised("blocks.0.ffn.0.weight", "int8_tensorwise", group=16, marked="metadata")
    case.quantised("blocks.0.self_attn.q.weight", "int8_tensorwise", group=64, marked="metadata")
    case.rest()
    weight_map = {}
    for number, layer in enumerate(("blocks.0.ffn.0", "blocks.0.self_attn.q"), 1):
        names = [name for name in case.tensors if name.startswith("blocks.0.ffn.0") == (number == 1)]
        metadata = json.dumps({"layers": {layer: case.layers[layer]}})
        save_file({n: case.tensors[n] for n in names}, tmp_path / f"{number}.safetensors",
                  {"_quantization_metadata": metadata})  # fmt: skip
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    case.assert_equal(as_ours(open_file(index), EXPERT, "a"))


def test_blocks_that_are_no_power_of_two_are_refused(tmp_path: Path) -> None:
    """Blocks of 3 rows: 16 scales could as well be those of another height, rounded up."""
    case = Case("x")
    case.quantised("blocks.0.ffn.0.weight", "float8_e4m3fn", "block")
    case.rest()
    case.tensors["blocks.0.ffn.0.weight_scale"] = torch.ones(16, 64)
    with pytest.raises(InputError, match=r"\[16, 64\]"):
        case.save(tmp_path / "a.safetensors")


def test_metadata_of_another_version_is_refused(tmp_path: Path) -> None:
    content = json.dumps({"format_version": "2.0", "layers": {}})
    save_file({"a.weight": torch.ones(1)}, tmp_path / "a.safetensors", {"_quantization_metadata": content})
    with pytest.raises(InputError, match="another version"):
        as_ours(open_file(tmp_path / "a.safetensors"), EXPERT, "a")


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        *((EXPERT, f"{prefix}.") for prefix in (
            "model.diffusion_model", "diffusion_model", "model", "module", "pipe.dit", "dit", "generator",
            "generator_ema", "transformer", "transformer_2", "_orig_mod", "model._fsdp_wrapped_module",
        )),
        (TEXT_ENCODER, "text_encoders.umt5xxl.transformer."), (TEXT_ENCODER, "text_encoders.umt5xxl."),
        (VAE, "vae."), (VAE, "first_stage_model."), (VAE, "model."),
    ],
)  # fmt: skip
def test_names_behind_a_prefix(kind: str, prefix: str, tmp_path: Path) -> None:
    """What other programs put there; of a checkpoint in one file, the other parts and what is in none are left out."""
    case = Case(prefix, kind, theirs=kind == TEXT_ENCODER, prefix=prefix)
    case.rest()
    if prefix.startswith(tuple(ONE_FILE)):
        others = [other for other, part in ONE_FILE.items() if part != kind]
        case.tensors |= {f"{other}x.weight": torch.zeros(2) for other in [*others, "cond_stage_model."]}
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("marker", ["scaled_fp8", "spiece_model"])
def test_tensors_that_are_no_weights_are_left_out(marker: str, tmp_path: Path) -> None:
    case = Case(marker, TEXT_ENCODER)
    case.rest()
    case.tensors[marker] = torch.zeros(2, dtype=torch.uint8)
    case.assert_equal(case.save(tmp_path / "a.safetensors"))


def test_a_pickle_by_any_name(tmp_path: Path) -> None:
    """Its first bytes tell, where the suffix does not; where it does, what is cut off is a cut pickle."""
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".model"):
        file = tmp_path / f"a{suffix}"
        torch.save({"a": torch.arange(3.0)}, file)
        assert open_file(file).read("a").tolist() == [0, 1, 2]
        file.write_bytes(file.read_bytes()[2:200])
        with pytest.raises(InputError, match="safetensors" if suffix == ".model" else "pth file"):
            open_file(file)


def random_case(seed: int) -> tuple[Case, bool]:
    """A file of a random mix, and whether it must be refused."""
    chance = random.Random(seed)
    kind = chance.choice([EXPERT, EXPERT, TEXT_ENCODER, VAE])
    prefix = chance.choice([*PREFIXES, PREFIX[kind]])
    case, wrong = Case(seed, kind, chance.random() < 0.5, prefix), chance.random() < 0.2
    names = [n for n, shape in SHAPES[kind].items() if n.endswith(".weight") and len(shape) > 1]
    for name in chance.sample(names, chance.randint(1, len(names))):
        form = chance.choice([*FP8, "int8_tensorwise", "quanto"])
        matrix, marked = len(SHAPES[kind][name]) == 2, chance.choice(["", "tensor", "metadata", "bare metadata"])
        scale_dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
        if form == "quanto":
            case.quantised(name, "int8_tensorwise", "row", ".weight._scale", scale_dtype=scale_dtype)
        elif form == "int8_tensorwise":
            sizes = [size for size in (4, 16, 64, 256) if matrix and SHAPES[kind][name][1] % size == 0]
            group = chance.choice([0, *sizes]) if marked else 0
            case.quantised(name, form, chance.choice(["tensor", "row"]), group=group, marked=marked)
        else:
            scales = chance.choice(["tensor", "row", *(["none"] if not marked else []), *(["block"] if matrix else [])])
            spelling = chance.choice([".weight_scale", ".scale_weight", ".weight_scale_inv"])
            case.quantised(name, form, scales, spelling, marked=marked, scale_dtype=scale_dtype)
            case.tensors[case.prefix + case.name(name).removesuffix(".weight") + ".input_scale"] = torch.ones(1)
    case.rest(chance.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    if prefix == PREFIX[kind]:
        case.tensors |= {f"{other}x.weight": torch.zeros(2) for other in PREFIX.values() if other != prefix}
    if wrong:
        name = chance.choice([n for n, t in case.tensors.items() if t.dtype in (torch.int8, torch.float8_e5m2)] or [""])
        wrong = bool(name)
        stem = name.removesuffix("._data").removesuffix(".weight")
        harm = chance.choice([{"format": "int7"}, {"format": "int8_tensorwise", "turned": True}])
        text = torch.tensor(list(json.dumps(harm).encode()), dtype=torch.uint8)
        if wrong:
            case.tensors[f"{stem}.comfy_quant"] = text
    return case, wrong


def test_random_mixes_are_read_right_or_refused(tmp_path: Path) -> None:
    outcomes = {"read": 0, "refused": 0}
    for seed in range(200):
        case, wrong = random_case(seed)
        if wrong:
            with pytest.raises(InputError):
                case.save(tmp_path / "a.safetensors")
        else:
            case.assert_equal(case.save(tmp_path / "a.safetensors"))
        outcomes["refused" if wrong else "read"] += 1
    assert outcomes["read"] > 120
    assert outcomes["refused"] > 10
