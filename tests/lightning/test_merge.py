"""The streamed merge equals the plain formula bit for bit, on any slice, in any order, for any file."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning import merge as merge_module
from lightning.lora import Lora, check
from lightning.merge import Merge
from tests.lightning.support import STORED, base, diffusers_module, lora_of, merged, plain, small_pairs, spelled
from tests.support import checkpoint, config_of, lora_dir
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.safetensors_file import TensorStore
from wan.offload.reader import Source, load
from wan.utils.errors import LoraError

SHAPES = base().shapes
Q = "blocks.0.self_attn.q"


def small_lora(strength: float = 1.0) -> Lora:
    return Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors", strength)


def large_pair(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_blocks_are_bit_equal_to_the_formula(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, up, down = large_pair(1000, 512, 16)
    weight = weight.to(dtype)
    tensors = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down, f"{Q}.alpha": torch.tensor(3.0)}
    merge = Merge([lora_of(tmp_path, tensors, strength=0.7)], {f"{Q}.weight": (1000, 512)})
    monkeypatch.setattr(merge_module, "BLOCK_BYTES", 111 * 512 * 4 // torch.get_num_threads())
    assert merge._rows_at_once(1000, 512) == 100  # not nine blocks of 111 rows and one of a single row
    expected = plain(weight, up, down, 3 / 16 * 0.7)
    assert torch.equal(merge(f"{Q}.weight", weight), expected)
    for start, stop in [(0, 500), (500, 1000), (250, 251), (999, 1000), (7, 7)]:
        found = merge(f"{Q}.weight", weight[start:stop], slice(start, stop))
        torch.testing.assert_close(found, expected[start:stop], rtol=1e-6, atol=1e-5)
    quarters = [merge(f"{Q}.weight", weight[i : i + 250], slice(i, i + 250)).clone() for i in range(0, 1000, 250)]
    assert torch.equal(torch.cat(quarters), expected)


def test_a_weight_in_shares_reads_each_row_of_its_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, up, down = large_pair(1000, 512, 16)
    tensors = {f"{Q}.lora_up.weight": up, f"{Q}.lora_down.weight": down}
    merge, read, bytes_read = Merge([lora_of(tmp_path, tensors)], {f"{Q}.weight": (1000, 512)}), TensorStore.read, []

    def counted(*arguments: Any) -> Tensor:
        tensor = read(*arguments)
        bytes_read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorStore, "read", counted)
    for start in range(0, 1000, 250):
        merge(f"{Q}.weight", weight[start : start + 250], slice(start, start + 250))
    assert sum(bytes_read) == up.nbytes + down.nbytes


def test_a_load_merges_in_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip by strip, to the bit what one merge of the whole weight gives."""
    part = open_checkpoint(checkpoint("t2v-A14B"), config_of("t2v-A14B")).experts["high"]
    merge = Merge([small_lora()], part.weights.shapes)
    expected = {name: merge(name, part.weights.read(name)).clone() for name in part.weights}
    call, two, shares = Merge.__call__, threading.Barrier(2), itertools.count()

    def together(self: Merge, name: str, weight: Tensor, rows: slice | None = None) -> Tensor:
        found = call(self, name, weight, rows)
        if next(shares) < 2:
            two.wait(10)  # for another thread, which must not write into what this one has made
        return found

    monkeypatch.setattr(Merge, "__call__", together)
    monkeypatch.setattr("wan.offload.reader.STRIP_BYTES", 16 * 64 * 4)
    model = load(part.module, Source(part.weights, lambda _: torch.float32, merge), torch.device("cpu"))
    assert next(shares) > 2 * len(merge.deltas)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_untouched_weights_come_back_as_they_are() -> None:
    merge, weight = Merge([small_lora()], SHAPES), torch.ones(3)
    assert not merge.touches("head.modulation")
    assert merge("head.modulation", weight) is weight
    assert not Merge([small_lora(strength=0.0)], SHAPES).deltas
    assert not Merge([], SHAPES).deltas


def test_the_base_weight_is_left_alone_and_memory_is_reused() -> None:
    merge, store = Merge([small_lora()], SHAPES), base()
    weight = store.read(f"{Q}.weight")
    first = merge(f"{Q}.weight", weight)
    assert torch.equal(weight, store.read(f"{Q}.weight"))
    again = merge(f"{Q}.weight", weight)
    assert again.data_ptr() == first.data_ptr()


def test_several_loras_add_up_in_any_order(tmp_path: Path) -> None:
    pairs = small_pairs()
    loras = [small_lora(0.8)]
    for number, factor in enumerate((0.3, -1.7), 1):
        changed = {m: (torch.roll(up, number, 0), down * factor) for m, (up, down) in pairs.items()}
        loras.append(lora_of(tmp_path / str(number), spelled(changed, "{}.", alpha=torch.tensor(3.0)), 1 / number))
    first = merged(loras)
    assert all(torch.equal(weight, first[name]) for name, weight in merged(loras[::-1]).items())
    assert all(torch.equal(weight, first[name]) for name, weight in merged(loras[1:] + loras[:1]).items())
    store = base()
    for module, (up, down) in pairs.items():
        exact = store.read(f"{module}.weight").double() + 0.5 * 0.8 * up.double() @ down.double()
        for number, factor in enumerate((0.3, -1.7), 1):
            exact += 0.75 / number * torch.roll(up, number, 0).double() @ (down * factor).double()
        torch.testing.assert_close(first[f"{module}.weight"].double(), exact, rtol=1e-6, atol=1e-6)


def test_opposite_strengths_cancel() -> None:
    found = merged([small_lora(0.5), small_lora(-0.5)])
    assert all(torch.equal(weight, base().read(name)) for name, weight in found.items())


@pytest.mark.parametrize("name", ["blocks.0.modulation", "blocks.0.norm3.weight", "patch_embedding.weight"])
def test_rows_of_differences(name: str, tmp_path: Path) -> None:
    store = base()
    change = torch.randn(SHAPES[name])
    merge = Merge([lora_of(tmp_path, {f"{name}.diff": change}, strength=2.0)], SHAPES)
    expected = store.read(name) + 2 * change
    assert torch.equal(merge(name, store.read(name)), expected)
    half = slice(0, (SHAPES[name][0] + 1) // 2)
    assert torch.equal(merge(name, store.read(name, half), half), expected[half])


def test_refusals(tmp_path: Path) -> None:
    merge = Merge([small_lora()], SHAPES)
    with pytest.raises(ValueError, match=r"rows 0:8 of \[64, 64\] given as \[64, 64\]"):
        merge(f"{Q}.weight", torch.ones(64, 64), slice(0, 8))
    with pytest.raises(LoraError, match="where the model's"):
        Merge([small_lora()], {name: (9, *shape[1:]) for name, shape in SHAPES.items()})
    up, down = small_pairs()[Q]
    broken = up.clone()
    broken[3, 1] = torch.nan
    lora = lora_of(tmp_path, spelled({Q: (broken, down)}, "{}."))
    with pytest.raises(LoraError, match=r"q.lora_up.weight holds NaN or Inf"):
        merged(lora)


SPELLINGS = {
    "lightning": ("diffusion_model.{}.", {}),
    "kohya": ("lora_unet_{}.", {"module": lambda m: m.replace(".", "_")}),
    "diffusers": ("transformer.{}.", {"halves": ("lora_B.weight", "lora_A.weight"), "module": diffusers_module}),
    "diffsynth": ("{}.", {"halves": ("lora_B.default.weight", "lora_A.default.weight")}),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_subset_of_any_family_is_the_formula(data: st.DataObject, tmp_path: Path) -> None:
    matrices = sorted(name for name, shape in SHAPES.items() if len(shape) == 2)
    vectors = sorted(name for name, shape in SHAPES.items() if name.endswith((".bias", "norm_q.weight")))
    form, how = SPELLINGS[data.draw(st.sampled_from(sorted(SPELLINGS)))]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    strength = data.draw(st.floats(-2, 2).filter(bool))
    store, tensors, expected = base(), {}, {}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    for name in data.draw(st.sets(st.sampled_from(matrices), min_size=1, max_size=8)):
        rank, alpha = data.draw(st.integers(1, 9)), data.draw(st.floats(0.125, 64, width=16))
        rows, columns = SHAPES[name]
        up = torch.randn(rows, rank, generator=generator).to(dtype)
        down = torch.randn(rank, columns, generator=generator).to(dtype)
        module = name.removesuffix(".weight")
        tensors |= spelled({module: (up, down)}, form, alpha=torch.tensor(alpha), **how)
        expected[name] = plain(store.read(name), up, down, alpha / rank * strength)
    if form == "diffusion_model.{}.":
        for name in data.draw(st.sets(st.sampled_from(vectors), max_size=4)):
            change = torch.randn(SHAPES[name], generator=generator).to(dtype)
            leaf = "diff_b" if name.endswith(".bias") else "diff"
            tensors[f"diffusion_model.{name.rpartition('.')[0]}.{leaf}"] = change
            expected[name] = store.read(name) + strength * change.float()
    lora = lora_of(tmp_path, tensors, strength)
    coverage = check(lora, SHAPES)
    assert coverage.pairs[0] + coverage.differences[0] == len(expected)
    found = merged(lora)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_the_stored_alpha_wins(tmp_path: Path) -> None:
    path = lora_of(tmp_path, spelled(small_pairs(), "{}.", alpha=STORED)).path
    assert check(Lora.open(path, default_alpha=64.0), SHAPES).scales == (0.5,)
