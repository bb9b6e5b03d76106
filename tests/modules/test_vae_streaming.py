"""Pieces of a clip, in time and in space, against the whole; and the rules by which time and pixels are counted.

Float64 weights, so that what differs is a wrong number and not the order of a sum; results are float32 by contract.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.modules.test_vae import KINDS, random_clip, random_vae, whole
from wan.media.video import rounded
from wan.modules.vae import WanVAE
from wan.modules.vae_layers import (
    DECODER_RIM,
    ENCODER_RIM,
    ClipState,
    CoderStage,
    Region,
    add_average,
    add_repeated,
    reuse_constant_tail,
)

ROUNDING = 1e-6  # of the largest value: the last bit of float32 and a little more


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest) -> WanVAE:
    return random_vae(request.param, torch.float64)


def random_latent(vae: WanVAE, frames: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(vae.z_dim, frames, rows, columns, generator=generator, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


# Time


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_any_chunks_decode_to_the_whole(vae: WanVAE, chunk: int) -> None:
    latent = random_latent(vae, 6, 2, 3)
    parts = list(vae.decode(latent, chunk))
    sizes = [min(chunk, 6 - start) for start in range(0, 6, chunk)]
    assert [part.shape[1] for part in parts] == [4 * sizes[0] - 3, *(4 * size for size in sizes[1:])]
    assert all(part.dtype == torch.float32 and part.abs().max() <= 1 for part in parts)
    assert_same(torch.cat(parts, dim=1), whole(vae, latent, chunk=6))


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_any_chunks_encode_to_the_whole(vae: WanVAE, chunk: int) -> None:
    clip = random_clip(25, 16, 32, torch.float64)
    assert_same(vae.encode(clip, chunk), vae.encode(clip, 7))


def test_frames_past_the_last_whole_latent_are_left_out(vae: WanVAE) -> None:
    clip = random_clip(12, 16, 16, torch.float64)
    assert torch.equal(vae.encode(clip), vae.encode(clip[:, :9]))


def test_the_past_does_not_see_the_future(vae: WanVAE) -> None:
    latent, clip = random_latent(vae, 5, 2, 2), random_clip(21, 16, 16, torch.float64)
    later_latent, later_clip = latent.clone(), clip.clone()
    later_latent[:, 3:] += 1
    later_clip[:, 13:] *= -1
    video, code = whole(vae, latent, chunk=5), vae.encode(clip, 6)
    changed_video, changed_code = whole(vae, later_latent, chunk=5), vae.encode(later_clip, 6)
    assert torch.equal(changed_video[:, :9], video[:, :9])
    assert not torch.equal(changed_video[:, 9], video[:, 9])
    assert torch.equal(changed_code[:, :4], code[:, :4])
    assert not torch.equal(changed_code[:, 4], code[:, 4])


def test_no_clip_sees_another(vae: WanVAE) -> None:
    latent, clip = random_latent(vae, 3, 2, 2), random_clip(9, 16, 16, torch.float64)
    video, code = whole(vae, latent), vae.encode(clip)
    next(iter(vae.decode(-latent)))  # left half way
    assert torch.equal(whole(vae, latent), video)
    assert torch.equal(vae.encode(clip), code)


def test_frame_0_is_neither_doubled_nor_halved_in_time(vae: WanVAE) -> None:
    latent, clip = random_latent(vae, 3, 2, 2), random_clip(9, 16, 16, torch.float64)
    video, code = whole(vae, latent, chunk=3), vae.encode(clip, 3)
    assert_same(whole(vae, latent[:, :1]), video[:, :1])
    assert_same(vae.encode(clip[:, :1]), code[:, :1])
    for name, parameter in vae.named_parameters():
        if "time_conv" in name:
            parameter.data += 0.1
    changed_video, changed_code = whole(vae, latent, chunk=3), vae.encode(clip, 3)
    assert torch.equal(changed_video[:, 0], video[:, 0])
    assert torch.equal(changed_code[:, 0], code[:, 0])
    assert (changed_video - video)[:, 1:].abs().amax(dim=(0, 2, 3)).min() > 0
    assert (changed_code - code)[:, 1:].abs().amax(dim=(0, 2, 3)).min() > 0


# An image and a grey tail


@pytest.mark.parametrize(("frames", "chunk"), [(1, 1), (5, 1), (81, 1), (81, 2), (85, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_first_frame_equals_the_whole_clip(kind: str, frames: int, chunk: int) -> None:
    vae, image = random_vae(kind), random_clip(1, 32, 16)[:, 0]
    clip = torch.zeros(3, frames, 32, 16)
    clip[:, 0] = image
    assert torch.equal(vae.encode(image[:, None], chunk, frames=frames), vae.encode(clip, chunk))


@pytest.mark.parametrize("kind", KINDS)
def test_the_grey_tail_is_not_computed(kind: str) -> None:
    vae = random_vae(kind)
    calls = [0] * 4
    for index, level in enumerate(vae.encoder.levels):
        level.layers[0].register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    vae.encode(random_clip(1, 16, 16), frames=81)
    assert calls == [5, 7, 12, 20]  # of 21 each


def test_constant_tail_is_counted_from_the_layers() -> None:
    frame = 1  # an image, then constant
    for stage, expected in zip(random_vae("2.1").encoder.stages(None), (3, 11, 11, 11, 19), strict=True):
        assert isinstance(stage, CoderStage)
        frame = stage.constant_after(frame)
        assert frame == expected
    chunks = [torch.full((2,), float(i)) for i in range(5)]
    found = list(reuse_constant_tail(lambda x: x, chunks, constant=3))
    assert [int(x[0]) for x in found] == [0, 1, 2, 2, 2]


# Space


@pytest.mark.parametrize(
    ("grid", "tiles"),
    [
        ((1, 31), (1, 2)),
        ((31, 1), (2, 1)),
        ((5, 4), (3, 2)),
        pytest.param((31, 29), (2, 3), marks=pytest.mark.slow),
        pytest.param((29, 31), (3, 2), marks=pytest.mark.slow),
    ],
)
def test_tiles_decode_to_the_whole(vae: WanVAE, grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    latent = random_latent(vae, 2, *grid)
    parts = list(vae.decode(latent, 1, tiles))
    assert [part.shape[1] for part in parts] == [1, 4]
    assert_same(torch.cat(parts, dim=1), whole(vae, latent))


def test_tiles_wait_as_they_are_converted(vae: WanVAE) -> None:
    """A quarter of the memory as bytes, and the same bytes as of the whole."""
    latent = random_latent(vae, 2, 4, 3)
    parts = list(vae.decode(latent, 1, (2, 1), convert=rounded))
    assert {part.untyped_storage().nbytes() for part in parts} == {3 * 5 * 4 * 3 * vae.stride[1] * vae.stride[2]}
    assert_same(torch.cat(parts, dim=1), rounded(whole(vae, latent)))


@pytest.mark.parametrize(("grid", "tiles"), [((1, 20), (1, 2)), ((4, 3), (3, 2))])
def test_tiles_encode_to_the_whole(vae: WanVAE, grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    size = grid[0] * vae.stride[1], grid[1] * vae.stride[2]
    clip = torch.zeros(3, 5, *size, dtype=torch.float64)
    clip[:, ::4] = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_same(vae.encode(clip[:, :1], tiles=tiles, frames=5), vae.encode(clip[:, :1], frames=5))
    assert_same(vae.encode(clip, tiles=tiles), vae.encode(clip))


@pytest.mark.parametrize("level", range(4))
def test_decoder_rim_is_how_far_a_level_reaches(vae: WanVAE, level: int) -> None:
    """NaN spreads exactly as far as the convolutions read."""
    channels = vae.decoder.levels[level].layers[0].steps[0][1].in_channels
    x = torch.ones(2, 1, 40, channels, dtype=torch.float64)
    x[:, :, 0] = torch.nan
    state = ClipState(40)
    with torch.no_grad():
        for each in vae.decoder.levels[level:]:
            x = each(x, state)
        x = vae.decoder.run_head(x, state)
    reached = x.isnan().any(dim=0).any(dim=0).any(dim=-1).nonzero().max().item()
    assert reached // (x.shape[2] // 40) == DECODER_RIM[level]


def test_encoder_rim_is_how_far_it_reaches(vae: WanVAE) -> None:
    before, after = ENCODER_RIM
    for broken, reached in ((0, range(before + 1)), (24, range(24 - after, 25))):
        clip = random_clip(5, vae.stride[1], 25 * vae.stride[2], torch.float64)
        clip[..., broken * vae.stride[2] : (broken + 1) * vae.stride[2]] = torch.nan
        features = vae.encode_region(clip)
        assert features.isnan().any(dim=0).any(dim=0).any(dim=-1).nonzero().flatten().tolist() == list(reached)


def test_regions_of_the_decoder_give_their_part(vae: WanVAE) -> None:
    latent = random_latent(vae, 2, 3, 40)
    features = vae.decode_features(latent)
    region = Region(1, 2, 17, 19)
    place = region.scaled(vae.stride[1])
    found = torch.cat(list(vae.decode_region(features, region)), dim=1)
    expected = whole(vae, latent)[:, :, place.top : place.bottom, place.left : place.right]
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("grid", "tiles"),
    [
        ((1, 25), (1, 3)),
        ((25, 1), (3, 1)),
        ((3, 4), (2, 3)),
        pytest.param((23, 25), (3, 2), marks=pytest.mark.slow),
    ],
)
def test_regions_of_the_encoder_join_to_the_whole(vae: WanVAE, grid: tuple[int, int], tiles: tuple[int, int]) -> None:
    rows, columns = grid
    clip = random_clip(5, rows * vae.stride[1], columns * vae.stride[2], torch.float64)
    expected = vae.encode_region(clip)
    found = torch.full_like(expected, torch.nan)
    for region in Region(0, rows, 0, columns).divided(*tiles):
        found[:, region.top : region.bottom, region.left : region.right] = vae.encode_region(clip, region)
    assert_same(found, expected)
    assert torch.equal(vae.encode_features(expected), vae.encode(clip))


def test_tiles_cover_the_grid_once() -> None:
    cells = torch.zeros(1, 7, 11)
    frame = Region(0, 7, 0, 11)
    regions = Region(0, 7, 0, 11).divided(3, 4)
    for region in regions:
        region.cut(cells, frame).add_(1)
    assert len(regions) == 12
    assert cells.eq(1).all()
    assert {region.bottom - region.top for region in regions} == {2, 3}


# Order of pixels, channels and frames


def test_patches_are_channels_with_columns_before_rows() -> None:
    vae = random_vae("2.2")
    seen: list[Tensor] = []
    run_first = vae.encoder.run_first
    vae.encoder.run_first = lambda x, state: seen.append(x) or run_first(x, state)
    clip = torch.zeros(3, 1, 16, 16)
    clip[:, 0, 2:4, 6:8] = torch.arange(12.0).reshape(3, 2, 2)  # blocks [[a, b], [c, d]]
    vae.encode(clip)
    assert seen[0][0, 1, 3].tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]  # a, c, b, d
    head = vae.decoder.head["2"]
    head.weight.data.zero_()
    head.bias.data = torch.arange(12.0) / 12
    blocks = whole(vae, torch.randn(48, 1, 1, 1))[:, 0, 2:4, 6:8] * 12
    assert blocks.round().tolist() == [[[0, 2], [1, 3]], [[4, 6], [5, 7]], [[8, 10], [9, 11]]]


def test_average_shortcut_puts_frames_into_channels() -> None:
    x = torch.randn(5, 4, 6, 3)
    first = add_average(torch.zeros(3, 2, 3, 6), x, True, frames=2, space=2)
    later = add_average(torch.zeros(2, 2, 3, 6), x[:4], False, frames=2, space=2)
    extended = torch.cat([torch.zeros(1, 4, 6, 3), x])
    for j, c, dt in torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2)).tolist():
        assert torch.allclose(first[j, 1, 2, 2 * c + dt], extended[2 * j + dt, 2:4, 4:6, c].mean(), atol=1e-6)
        if j < 2:
            assert torch.allclose(later[j, 0, 1, 2 * c + dt], x[2 * j + dt, 0:2, 2:4, c].mean(), atol=1e-6)
    pooled = add_average(torch.zeros(5, 2, 3, 3), x, True, frames=1, space=2)
    assert torch.allclose(pooled[4, 1, 0], x[4, 2:4, 0:2].mean(dim=(0, 1)), atol=1e-6)
    assert torch.equal(add_average(torch.zeros_like(x), x, True, frames=1, space=1), x)


def test_repeat_shortcut_repeats_or_deals_channels_to_rows() -> None:
    x = torch.randn(3, 2, 3, 4)
    nearest = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
    later = add_repeated(torch.zeros(6, 4, 6, 4), x, False, frames=2)
    assert torch.equal(later, nearest.repeat_interleave(2, 0))
    first = add_repeated(torch.zeros(5, 4, 6, 4), x, True, frames=2)
    assert torch.equal(first, later[1:])
    halved = add_repeated(torch.zeros(3, 4, 6, 2), x, True, frames=1)
    for row, parity in ((0, 0), (1, 1), (2, 0), (3, 1)):
        for o in range(2):
            expected = x[:, row // 2, :, 2 * o + parity].repeat_interleave(2, 1)
            assert torch.equal(halved[:, row, :, o], expected)


def test_released_names_follow_the_levels() -> None:
    flat, nested = random_vae("2.1"), random_vae("2.2")
    widths = [layer.steps[1][1].out_channels for level in nested.decoder.levels for layer in level.layers[:3]]
    assert widths == [48] * 6 + [24] * 3 + [12] * 3
    assert [len(level.layers) for level in flat.decoder.levels] == [4, 4, 4, 3]
    assert all(wide >= narrow for wide, narrow in pairwise(widths))


def test_encoded_tiles_do_not_keep_their_rims(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of a tile would hold the memory of its rim, too, until the last tile is done."""
    seen: list[StorageWeakRef] = []
    alive: list[int] = []
    cut = Region.cut

    def watched(region: Region, x: Tensor, window: Region) -> Tensor:
        alive.append(sum(not each.expired() for each in seen))
        seen.append(StorageWeakRef(x.untyped_storage()))
        return cut(region, x, window)

    monkeypatch.setattr(Region, "cut", watched)
    vae.encode_region(random_clip(1, 64, 64), tiles=(2, 2))
    assert alive[:4] == [0] * 4
