"""The transformer against diffusers' WanTransformer3DModel on other sizes than the golden ones, and its own rules."""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.counters import CostCounter
from tests.support import manifest, relative_error
from wan.checkpoints.key_mapping import diffusers_name
from wan.doctor.numerics import IN_8_BITS
from wan.modules import attention as backends
from wan.modules.attention import BACKENDS, QUANTISED, Attend, Choice, available, choose
from wan.modules.fused import EAGER, FP8, SHAPES, STRIP, Passes, choose_passes, compiled, rotate
from wan.modules.model import Prompt, WanModel, rotary_table, sinusoid, spans_of
from wan.modules.t5 import T5Norm
from wan.utils.errors import InputError

CPU = torch.device("cpu")


def random_model(in_dim: int = 16, out_dim: int = 16, heads: int = 2, width: int = 128, layers: int = 3) -> WanModel:
    torch.manual_seed(7)
    dim = heads * width
    model = WanModel(
        dim=dim, ffn_dim=2 * dim, in_dim=in_dim, out_dim=out_dim, num_heads=heads, num_layers=layers, text_dim=48
    )
    for name, parameter in model.named_parameters():
        spread = 0.2 if parameter.ndim < 2 or "modulation" in name else 1 / math.sqrt(parameter[0].numel())
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    return model.eval().requires_grad_(False)


def diffusers_twin(model: WanModel, in_dim: int, out_dim: int) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    twin = WanTransformer3DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_width,
        in_channels=in_dim,
        out_channels=out_dim,
        text_dim=48,
        ffn_dim=2 * model.num_heads * model.head_width,
        num_layers=len(model.blocks),
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        added_kv_proj_dim=None,
        image_dim=None,
    )
    twin.load_state_dict({diffusers_name(name): p for name, p in model.state_dict().items()}, strict=True)
    # its sinusoid is float32, the original's and ours float64: the only functional difference (1e-5 of the output)
    twin.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t.tolist(), model.freq_dim)
    return twin.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "heads", "width", "grid"),
    [(16, 16, 2, 128, (3, 6, 10)), (36, 16, 3, 64, (2, 8, 4)), (48, 48, 4, 24, (1, 4, 6))],
)
@pytest.mark.parametrize("timestep", [1000.0, 937.5, 833.3333, 3.0])
def test_equal_to_diffusers(
    in_dim: int, out_dim: int, heads: int, width: int, grid: tuple[int, int, int], timestep: float
) -> None:
    model = random_model(in_dim, out_dim, heads, width)
    latent, text = torch.randn(in_dim, *grid), torch.randn(20, 48)
    padded = torch.cat([text, torch.zeros(492, 48)])
    expected = diffusers_twin(model, in_dim, out_dim)(latent[None], torch.tensor([timestep]), padded[None]).sample[0]
    assert relative_error(model(latent, timestep, Prompt(text)), expected) < 1e-5


def test_pinned_frame_equals_diffusers_timestep_per_token() -> None:
    model = random_model(48, 48)
    latent, text = torch.randn(48, 3, 4, 6), torch.randn(20, 48)
    tokens = torch.full((1, 3 * 2 * 3), 625.0)
    tokens[:, : 2 * 3] = 0.0
    padded = torch.cat([text, torch.zeros(492, 48)])
    expected = diffusers_twin(model, 48, 48)(latent[None], tokens, padded[None]).sample[0]
    assert relative_error(model(latent, 625.0, Prompt(text), pinned_frames=1), expected) < 1e-5


@pytest.mark.parametrize("task", ["t2v_a14b", "i2v_a14b", "ti2v_5b"])
def test_names_and_shapes_of_the_released_networks(task: str) -> None:
    expected = manifest(f"dit_{task}")
    width, channels = expected["patch_embedding.weight"][:2]
    with torch.device("meta"):
        model = WanModel(
            dim=width,
            ffn_dim=expected["blocks.0.ffn.0.bias"][0],
            in_dim=channels,
            out_dim=expected["head.head.weight"][0] // 4,
            num_heads=width // 128,
            num_layers=1 + max(int(n.split(".")[1]) for n in expected if n.startswith("blocks.")),
            text_dim=expected["text_embedding.0.weight"][1],
        )
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected
    assert not list(model.buffers())


@pytest.mark.parametrize("pinned", [0, 1])
def test_time_layers_and_head_multiply_in_float32_whatever_their_weights(pinned: int) -> None:
    """As under the original's float32 autocast: rounded weights, no rounded product (`--convert_model_dtype`)."""
    torch.manual_seed(0)
    converted = random_model().to(torch.bfloat16)
    twin = copy.deepcopy(converted)
    for part in (twin.time_embedding, twin.time_projection, twin.head):
        part.float()
    latent, prompt = torch.randn(16, 2, 4, 4), Prompt(torch.randn(5, 48).bfloat16())
    found, want = (model(latent, 833.33, Prompt(prompt.rows), pinned) for model in (converted, twin))
    assert torch.equal(found, want)


def test_rotation_follows_the_three_axes() -> None:
    """Each pair turns by position x frequency of its axis: c - 2 (c // 3) pairs for time, c // 3 for each other."""
    grid, width = (3, 4, 5), 20
    table = rotary_table(grid, width, 0, 60, CPU)
    token = (2 * 4 + 3) * 5 + 1  # frame 2, row 3, column 1
    pairs = [4, 3, 3]
    expected = [p * 10000.0 ** (-j / n) for p, n in zip((2, 3, 1), pairs, strict=True) for j in range(n)]
    torch.testing.assert_close(table[token, :, 0], torch.tensor(expected).cos())
    torch.testing.assert_close(table[token, :, 1], torch.tensor(expected).sin())
    x = torch.randn(60, 2, width)
    turned = rotate(x.clone(), table)
    first = x[token, 1, 0] * math.cos(expected[0]) - x[token, 1, 1] * math.sin(expected[0])
    assert turned[token, 1, 0].item() == pytest.approx(first.item(), abs=1e-5)


def test_rotary_table_of_a_share_and_of_padding() -> None:
    whole = rotary_table((2, 3, 4), 24, 0, 24, CPU)
    assert torch.equal(rotary_table((2, 3, 4), 24, 10, 17, CPU), whole[10:17])
    assert torch.equal(rotary_table((2, 3, 4), 24, 20, 26, CPU)[4:], torch.tensor([1.0, 0.0]).expand(2, 12, 2))


def test_rms_norm_is_over_the_whole_width_and_rounds_before_the_weight() -> None:
    weight, x = torch.randn(64), torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    EAGER.rms_norm(x, weight, 1e-6)
    assert torch.equal(x, (exact.to(torch.bfloat16) * weight).to(torch.bfloat16))


def test_heads_are_normed_together_and_turned_each() -> None:
    weight, x, table = torch.randn(48), torch.randn(7, 48), rotary_table((1, 1, 7), 24, 0, 7, CPU)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    EAGER.rms_norm_rotate(x, weight, table, 1e-6)
    torch.testing.assert_close(x, rotate(normed.reshape(7, 2, 24), table).flatten(1))


def test_modulation_rows_apply_to_their_tokens() -> None:
    block = random_model().blocks[0]
    x, shift, scale, gate = torch.randn(7, 8), torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8)
    spans = [(0, slice(0, 3)), (1, slice(3, 5)), (1, slice(5, 7))]
    token = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-6) * scale[token] + shift[token]
    torch.testing.assert_close(block.normed(x, scale, shift, spans, torch.float32), expected)
    y, total = torch.randn(7, 8), x.clone()
    expected = x + y * gate[token]
    for row, span in spans:
        EAGER.add_norm(total[span], y[span], gate[row], scale[row], shift[row], 1e-6)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(y, block.normed(expected, scale, shift, spans, torch.float32))


@pytest.mark.parametrize(
    ("pinned", "start", "stop", "most", "sizes"),
    [
        (0, 0, 75600, 16384, [(0, 15120)] * 5),
        (880, 0, 27280, 16384, [(0, 880), (1, 13200), (1, 13200)]),
        (880, 13640, 27280, 16384, [(1, 13640)]),
        (0, 0, 13, 5, [(0, 5), (0, 5), (0, 3)]),
        (4, 2, 4, 5, [(0, 2)]),
    ],
)
def test_tokens_are_shared_out_evenly(pinned: int, start: int, stop: int, most: int, sizes: list) -> None:
    spans = spans_of(pinned, start, stop, most)
    assert [(row, span.stop - span.start) for row, span in spans] == sizes
    edges = [0, *(span.stop for _, span in spans)]
    assert [span.start for _, span in spans] == edges[:-1]
    assert edges[-1] == stop - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pinned", [0, 1])
def test_passes_through_the_blocks_together_are_those_one_after_the_other(pinned: int, dtype: torch.dtype) -> None:
    """To the bit, and each block is called once for all of them."""
    model, latent = random_model().to(dtype), torch.randn(16, 3, 6, 8)
    rows, called = [torch.randn(count, 48, dtype=dtype) for count in (20, 7)], []
    expected = [model(latent, 625.0, Prompt(each), pinned) for each in rows]
    for block in model.blocks:
        block.register_forward_hook(lambda *_: called.append(1))
    for model.residency.batch_guidance, calls in ((False, 2), (True, 1)):
        called.clear()
        found = model(latent, 625.0, [Prompt(each) for each in rows], pinned)
        assert all(map(torch.equal, found, expected))
        assert len(called) == calls * len(model.blocks)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_shares_of_rows_give_the_numbers_of_the_whole(rows: int) -> None:
    """But for the order of sums in products of few rows, 1e-6; a wrong row is off by its own size."""
    model = random_model()
    latent, prompt = torch.randn(16, 3, 6, 8), Prompt(torch.randn(20, 48))
    expected = model(latent, 625.0, prompt, 1)
    model.rows = rows
    assert relative_error(model(latent, 625.0, prompt, 1), expected) < 3e-6


def test_passes_take_each_row_by_itself() -> None:
    """Everything but products is equal to the bit, whatever the shares."""
    x, rows, table = torch.randn(24, 64), torch.randn(3, 64), rotary_table((2, 3, 4), 32, 0, 24, CPU)
    results = []
    for shares in ([slice(0, 24)], [slice(0, 5), slice(5, 24)]):
        y, out = x.clone(), x.to(torch.bfloat16)
        for share in shares:
            EAGER.rms_norm_rotate(out[share], rows[0], table[share], 1e-6)
            EAGER.add_norm(y[share], out[share], rows[0], rows[1], rows[2], 1e-6)
        results.append((y, out))
    assert all(map(torch.equal, *results))


def test_a_cpu_takes_strips_of_rows_and_changes_no_bit() -> None:
    """Two whole strips and a part of one, in bf16: a pass takes the memory of a strip at most."""
    width = 1024
    length = 5 * STRIP * torch.get_num_threads() // (2 * width)
    torch.manual_seed(0)
    x, table = torch.randn(length, width), torch.randn(length, 32, 2)
    y, row, scale = x.flip(0).bfloat16(), torch.randn(width), torch.empty(length, 1)
    sums = torch.randint(-99, 99, (length, width), dtype=torch.int32)
    given = Passes(
        norm=(x, row, row, 1e-6, y),
        add=(x, y, row),
        add_norm=(x, y, row, row, row, 1e-6),
        rms_norm=(y, row.bfloat16(), 1e-6),
        rms_norm_rotate=(y, row.bfloat16(), table, 1e-6),
        guide=(y, x.bfloat16(), 11.0, 2.5, 0.25),
        quantise=(y, y.to(FP8), scale),
        scale_sums=(sums, scale.fill_(0.1), row, row, y),
    )
    for name, strips, plain, operands in zip(Passes._fields, EAGER, Passes(), given, strict=True):
        results, peaks = [], []
        for each in (strips, plain):
            own = [o.clone() if isinstance(o, Tensor) else o for o in operands]
            with CostCounter() as counter:
                each(*own)
            results.append([o for o in own if isinstance(o, Tensor)])
            peaks.append(counter.peak)
        assert all(map(torch.equal, *results)), name
        assert peaks[0] <= peaks[1] / 2, name


def test_the_columns_of_a_feed_forward_are_there_once() -> None:
    with torch.device("meta"), torch.no_grad():
        model = WanModel(dim=64, ffn_dim=1024, in_dim=4, out_dim=4, num_heads=1, num_layers=1, text_dim=8)
        x = torch.empty(100, 64)
        with CostCounter() as counter:
            model.blocks[0].ffn(x)
    assert counter.peak == 4 * 100 * (1024 + 64)


def test_the_residual_stream_is_contiguous() -> None:
    """Column-major, as the patch embedding leaves it, every pass over it strides, and each norm copies it."""
    model, seen = random_model(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].stride()))
    model(torch.randn(16, 3, 6, 8), 1000.0, Prompt(torch.randn(20, 48)))
    assert seen == [(256, 1)] * 3


def test_passes_are_compiled_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, size = torch.device("cuda"), (75_600, 5120, 40)
    monkeypatch.setattr("wan.modules.fused.find_spec", lambda _: object())
    assert choose_passes(CPU, *size, forwards=80) == (EAGER, "")
    assert choose_passes(gpu, *size, forwards=4) == (EAGER, "")
    passes, reason = choose_passes(gpu, *size, forwards=80)
    if not torch.cuda.is_available():  # the compiler's first call fails, and says why
        assert passes is EAGER
        assert "not compiled (" in reason
    monkeypatch.setattr("wan.modules.fused.find_spec", lambda _: None)
    assert choose_passes(gpu, *size, forwards=80) == (EAGER, "")


@pytest.mark.slow
def test_a_batch_of_many_sizes_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the compiler gives a function up after eight shapes and dtypes."""
    from torch._dynamo.testing import CompileCounter  # takes seconds to import

    seen = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=seen))
    passes, row = compiled.__wrapped__(), torch.ones(16)
    for length in range(20, 32):
        y = torch.zeros(length, 16)
        passes.add_norm(torch.zeros(length, 16), y, row, row, row, 1e-6)
    assert seen.frame_count == 12


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_compiled_passes_equal_the_plain_ones(dtype: torch.dtype, tolerance: float, device: str) -> None:
    """The plain ones in float32: 2e-7 from them in float32, and in bf16 the rounding of what each writes."""
    torch.manual_seed(0)
    rows = [torch.randn(256, device=device) for _ in range(5)]
    x, y, q = (torch.randn(24, 256, device=device).to(kind) for kind in (torch.float32, dtype, dtype))
    table = rotary_table((2, 3, 4), 64, 0, 24, torch.device(device))
    results = []
    for passes, kind in ((EAGER, torch.float32), (compiled(), dtype)):
        a, (b, c, d, e, f) = x.clone(), (each.to(kind, copy=True) for each in (y, q, q, q, q))
        with torch.no_grad():
            passes.norm(a, rows[0], rows[1], 1e-6, e)
            passes.add_norm(a, b, rows[2], rows[0], rows[1], 1e-6)
            passes.add(a, b, rows[3])
            passes.rms_norm(c, rows[4], 1e-6)
            passes.rms_norm_rotate(d, rows[4], table, 1e-6)
            passes.guide(f, y.to(kind), 11.0, 2.5, 0.25)
        results.append((a, b, c, d, e, f))
    for plain, fused in zip(*results, strict=True):
        assert relative_error(fused.float(), plain.float()) < tolerance


def test_a_share_of_padding_keys_is_cut_off() -> None:
    """The seam's contract: keys from `total` on do not count. Attending them must show."""
    attention = random_model().blocks[0].self_attn
    q, k, v = (torch.randn(9, 2, 128) for _ in range(3))
    expected = attention.attend(q, k[:7], v[:7], 7)
    assert torch.equal(attention.attend(q, k, v, 7), expected)
    assert (attention.attend(q, k, v, 9) - expected).abs().max() > 1e-3


def test_the_prompt_is_made_once_per_layer_and_forgotten_on_demand() -> None:
    model, prompt, latent = random_model(), Prompt(torch.randn(20, 48)), torch.randn(16, 1, 4, 4)
    calls: list[Tensor] = []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(_[2]))
    model(latent, 1000.0, prompt)
    model(latent, 937.5, prompt)
    assert len(calls) == 3
    prompt.forget()
    model(latent, 937.5, prompt)
    assert len(calls) == 6


@pytest.mark.parametrize("name", BACKENDS)
def test_each_back_end_equals_the_formula(name: str) -> None:
    if name not in available(CPU, torch.float32):
        with pytest.raises(InputError, match="cannot run here: on this machine choose auto, sdpa"):
            choose(name, CPU, torch.float32, 2, 16)
        return
    q, k, v = torch.randn(5, 2, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    weights = torch.einsum("qnd,knd->nqk", q, k).div(4).softmax(-1)
    torch.testing.assert_close(BACKENDS[name](q, k, v), torch.einsum("nqk,knd->qnd", weights, v))


def test_auto_takes_the_back_end_there_is() -> None:
    assert choose("auto", CPU, torch.float32, 2, 16) == Choice("sdpa")


def test_a_back_end_that_fails_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn is found but cannot be imported, cuDNN has no kernel: neither stops the others."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    def milliseconds(attend: Attend, *_: object) -> float:
        if attend is BACKENDS["flash"]:  # PyTorch's own, which a CPU has not
            return 1.0
        q = torch.randn(3, 2, 16, dtype=torch.bfloat16)
        attend(q, q, q)
        return 2.0

    monkeypatch.setattr(backends, "_milliseconds", milliseconds)
    arguments = torch.device("cuda", 7), torch.bfloat16, 2, 16
    name, warnings = choose("auto", *arguments)
    assert name == "flash"
    assert warnings[0].startswith("attention cudnn is left out: ")
    assert warnings[1:] == ("attention flash2 is left out: ImportError: flash_attn_2_cuda.so: undefined symbol",)
    assert choose("sdpa", *arguments) == Choice("sdpa")
    with pytest.raises(InputError, match=r"--attention flash2 fails here \(ImportError: .*undefined symbol\): choose"):
        choose("flash2", *arguments)


def test_auto_needs_a_back_end_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of all are refused; wrong results of all are warned of, `sdpa` last (a rehearsal computes no numbers)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)

    def fail(error: Exception) -> object:
        def milliseconds(*_: object) -> float:
            raise error

        return milliseconds

    monkeypatch.setattr(backends, "_milliseconds", fail(RuntimeError("CUDA error: no kernel image")))
    with pytest.raises(InputError, match=r"--attention auto: .*sdpa.*no kernel image.*flash"):
        choose("auto", torch.device("cuda", 8), torch.bfloat16, 2, 16)
    monkeypatch.setattr(backends, "_milliseconds", fail(ValueError(backends.WRONG_RESULT)))
    name, warnings = choose("auto", torch.device("cuda", 9), torch.bfloat16, 2, 16)
    assert name == "sdpa"
    assert "wan.doctor" in warnings[-1]


def test_a_back_end_with_a_wrong_result_is_named() -> None:
    q = torch.randn(40, 2, 16, dtype=torch.bfloat16)
    right = BACKENDS["sdpa"](q, q[:30], q[:30])
    backends._check(right, q, q[:30])
    for wrong in (torch.zeros_like(right), right.clone().index_fill_(0, torch.tensor(39), torch.nan), right.flip(1)):
        with pytest.raises(ValueError, match="its result is wrong on this GPU"):
            backends._check(wrong, q, q[:30])


def test_sage_is_called_as_its_package_says_and_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that takes `sageattn`'s documented arguments, and refuses what the real one does."""
    (tmp_path / "sageattention.py").write_text(
        """
import torch
import torch.nn.functional as F

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert not kwargs and not is_causal and sm_scale is None and not return_lse
    assert {x.dtype for x in (q, k, v)} <= {torch.float16, torch.bfloat16}, "16 bits only"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last axis must be contiguous"
    assert tensor_layout == "NHD" and q.dim() == 4 and k.shape == v.shape and k.shape[2:] == q.shape[2:]
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""
    )
    metadata = tmp_path / "sageattention-1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    q, k, v = (torch.randn(length, 2, 16, dtype=torch.bfloat16) for length in (5, 9, 9))
    metadata.write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 1.0.6\n")
    with pytest.raises(ImportError, match=r"sageattention 1\.0\.6 attends to keys .* not there; build version 2"):
        BACKENDS["sage"](q, k, v)
    metadata.write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 2.2.0+cu128\n")
    assert torch.equal(BACKENDS["sage"](q, k, v), BACKENDS["sdpa"](q, k, v))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_milliseconds", lambda attend, *_: 1.0 if attend is BACKENDS["sage"] else 2.0)
    arguments = torch.device("cuda", 6), torch.bfloat16, 2, 16
    assert "sage" in available(*arguments[:2])
    assert choose("auto", *arguments).name != "sage", "though it is the fastest"
    assert choose("sage", *arguments) == Choice("sage")
    assert "sage" not in available(arguments[0], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_each_back_end_equals_the_formula_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    if name not in available(device, torch.bfloat16):
        pytest.skip(f"{name} is not installed here")
    q, k, v = (torch.randn(n, 4, 128, device=device, dtype=torch.bfloat16) for n in (300, 500, 500))
    weights = torch.einsum("qnd,knd->nqk", q.float(), k.float()).div(math.sqrt(128)).softmax(-1)
    expected = torch.einsum("nqk,knd->qnd", weights, v.float())
    limit = IN_8_BITS if name in QUANTISED else 1e-2
    assert relative_error(BACKENDS[name](q, k, v).float(), expected) < limit


# -- float64 where it counts, and the smallest numbers


def test_rotary_angles_are_exact_at_released_positions() -> None:
    """The last tokens of 1280x720x121, whose rows and columns reach 44 and 79: float32 angles are off by 5e-6."""
    grid, width = (31, 45, 80), 128
    total = math.prod(grid)
    table = rotary_table(grid, width, total - 3, total, CPU).double()
    pairs = [width // 2 - 2 * (width // 6), width // 6, width // 6]
    for token in range(3):
        position = (30, 44, 77 + token)
        angles = [p * 10000.0 ** (-j / n) for p, n in zip(position, pairs, strict=True) for j in range(n)]
        expected = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
        assert (table[token] - expected).abs().max() < 1e-7


def test_the_time_embedding_is_exact_between_whole_steps() -> None:
    found = sinusoid([833.33, 0.0], 256)[0].double()
    angles = [833.33 * 10000.0 ** (-j / 128) for j in range(128)]
    expected = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-7


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_norms_of_the_transformer_keep_their_epsilon(size: float) -> None:
    """eps 1e-6 under the root: rows of zeros stay zeros, and values of 1e-7 become 1e-4, not 1."""
    x = size * torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y, turned, normed = x.clone(), x.clone(), torch.empty_like(x)
    EAGER.rms_norm(y, torch.ones(4), 1e-6)
    EAGER.rms_norm_rotate(turned, torch.ones(4), torch.tensor([[[1.0, 0.0]] * 2] * 2), 1e-6)
    EAGER.norm(x, torch.ones(4), torch.zeros(4), 1e-6, normed)
    t5 = T5Norm(4)
    t5.weight.data.fill_(1)
    for found in (y, turned, normed, t5(x)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)


def test_patches_are_embedded_as_by_a_convolution() -> None:
    model, latent = random_model(), torch.randn(16, 3, 4, 6)
    layer = model.patch_embedding
    exact = torch.nn.functional.conv3d(
        latent[None].double(), layer.weight.double(), layer.bias.double(), stride=(1, 2, 2)
    )
    assert relative_error(layer(latent).double(), exact[0].flatten(1).t()) < 1e-6
    assert layer.bfloat16()(latent).dtype == torch.bfloat16


def test_passes_are_compiled_for_many_shapes_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit is 8 in threads other than the main one, unless it comes with the call."""
    limits: list[int | None] = []

    def compile_it(work: object, *, dynamic: bool, recompile_limit: int | None = None) -> object:
        limits.append(recompile_limit)
        return work if not dynamic else None

    monkeypatch.setattr(torch, "compile", compile_it)
    compiled.__wrapped__()
    assert limits == [SHAPES] * len(EAGER)


def test_one_rotary_table_is_kept() -> None:
    """Plans count one; a batch may have many sizes."""
    for rows in (1, 2, 3):
        rotary_table((1, rows, 2), 16, 0, 2 * rows, CPU)
    assert rotary_table.cache_info().currsize == 1
