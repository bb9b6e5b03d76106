"""The transformer against diffusers' WanTransformer3DModel on other sizes than the golden ones, and its own rules."""

import math

import pytest
import torch
from torch import Tensor

from lightning.names import diffusers_name
from tests.support import manifest, relative_error
from wan.modules.attention import BACKENDS, available, choose
from wan.modules.model import Prompt, RMSNorm, WanModel, add_gated, modulated_norm, sinusoid
from wan.modules.rope import rotary_table, rotate

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


def test_rotation_follows_the_three_axes() -> None:
    """Each pair turns by position x frequency of its axis: c - 2 (c // 3) pairs for time, c // 3 for each other."""
    grid, width = (3, 4, 5), 20
    table = rotary_table(grid, width, 0, 60, CPU)
    token = (2 * 4 + 3) * 5 + 1  # frame 2, row 3, column 1
    angles = torch.polar(torch.ones(10), table[token].angle())
    pairs = [4, 3, 3]
    expected = [p * 10000.0 ** (-j / n) for p, n in zip((2, 3, 1), pairs, strict=True) for j in range(n)]
    torch.testing.assert_close(angles, torch.polar(torch.ones(10), torch.tensor(expected)))
    x = torch.randn(60, 2, width)
    turned = rotate(x.clone(), table)
    first = x[token, 1, 0] * math.cos(expected[0]) - x[token, 1, 1] * math.sin(expected[0])
    assert turned[token, 1, 0].item() == pytest.approx(first.item(), abs=1e-5)


def test_rotary_table_of_a_share_and_of_padding() -> None:
    whole = rotary_table((2, 3, 4), 24, 0, 24, CPU)
    assert torch.equal(rotary_table((2, 3, 4), 24, 10, 17, CPU), whole[10:17])
    assert torch.equal(rotary_table((2, 3, 4), 24, 20, 26, CPU)[4:], torch.ones(2, 12, dtype=torch.complex64))


def test_rms_norm_is_over_the_whole_width_and_rounds_before_the_weight() -> None:
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), exact.to(torch.bfloat16) * norm.weight, rtol=1e-6, atol=0)
        assert norm(x).dtype == torch.float32
        assert norm(x, torch.bfloat16).dtype == torch.bfloat16


def test_modulation_rows_apply_to_their_tokens() -> None:
    x, shift, scale, gate = torch.randn(7, 8), torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8)
    spans = [(0, slice(0, 3)), (1, slice(3, 7))]
    token = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    norm = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    expected = norm * (1 + scale[token]) + shift[token]
    torch.testing.assert_close(modulated_norm(x, shift, scale, spans, 1e-6, torch.float32), expected)
    y = torch.randn(7, 8)
    torch.testing.assert_close(add_gated(x.clone(), y, gate, spans), x + y * gate[token])


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
        with pytest.raises(ValueError, match="cannot run here: on this machine choose auto, sdpa"):
            choose(name, CPU, torch.float32, 2, 16)
        return
    q, k, v = torch.randn(5, 2, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    weights = torch.einsum("qnd,knd->nqk", q, k).div(4).softmax(-1)
    torch.testing.assert_close(BACKENDS[name](q, k, v), torch.einsum("nqk,knd->qnd", weights, v))


def test_auto_takes_the_back_end_there_is() -> None:
    assert choose("auto", CPU, torch.float32, 2, 16) == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_each_back_end_equals_the_formula_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    if name not in available(device, torch.bfloat16):
        pytest.skip(f"{name} is not installed here")
    q, k, v = (torch.randn(n, 4, 128, device=device, dtype=torch.bfloat16) for n in (300, 500, 500))
    weights = torch.einsum("qnd,knd->nqk", q.float(), k.float()).div(math.sqrt(128)).softmax(-1)
    expected = torch.einsum("nqk,knd->qnd", weights, v.float())
    assert relative_error(BACKENDS[name](q, k, v).float(), expected) < 1e-2
