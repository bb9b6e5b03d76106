"""Every term of the plan's memory formulas by a difference, and memory that does not grow with a batch."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import TINY, open_task
from tests.test_one_device import META, AllIsWell, OneDevice, open_on_meta
from wan.distributed.mesh import Layout
from wan.doctor.forecast import released_plan
from wan.doctor.machine import Machine
from wan.jobs.job import Sampling
from wan.modules.model import WanModel
from wan.offload.budget import Budget
from wan.original_api import Original
from wan.planning import memory
from wan.planning.memory import decode_tiles, plan_video, plan_videos
from wan.planning.plan import Plan
from wan.planning.time_estimate import ATTENTION, DISK, MATMUL, VAE, seconds
from wan.sampling import Video

HERE = Machine(torch.device("cpu"), Path(), Path())
TOKENS, WIDTH, LAYERS, TEXT, HEAD = 75_600, 5120, 40, 512, 128  # of T2V-A14B at 1280x720x81
SAMPLING = Sampling("euler", 2, 5.0, (1.0, 1.0))
CLIP = (1280, 720), 81
RATES = {MATMUL: 1e12, ATTENTION: 1e12, VAE: 1e12, DISK: 1e12}


@pytest.fixture(scope="module")
def t2v() -> Plan:
    plan = released_plan("t2v-A14B", True, 10**12, HERE)
    return replace(plan, dtype=torch.bfloat16, text_dtype=torch.bfloat16)


def budget_of(plan: Plan, image: bool = False) -> Budget:
    budget = plan_video(plan, *CLIP, image).budget
    assert budget is not None
    return budget


def work(plan: Plan, stage: str = "denoise") -> int:
    return budget_of(plan).stages[stage]["work"]


def guided(plan: Plan) -> Plan:
    return replace(plan, steps=tuple(replace(step, guidance=5.0) for step in plan.steps))


def test_a_second_prompt_takes_keys_and_values_of_every_block(t2v: Plan) -> None:
    assert work(guided(t2v)) - work(t2v) == 2 * LAYERS * TEXT * WIDTH * 2


def test_both_passes_together_take_a_second_residual_stream(t2v: Plan) -> None:
    """Where blocks stream and the stream fits; the float32 stream of all tokens."""
    one, two = (budget_of(replace(each, room=24 * 10**9)) for each in (t2v, guided(t2v)))
    assert two.batch_guidance
    more = two.stages["denoise"]["work"] - one.stages["denoise"]["work"]
    assert more == 4 * TOKENS * WIDTH + 2 * LAYERS * TEXT * WIDTH * 2


def test_the_step_cache_keeps_four_latents(t2v: Plan) -> None:
    """A computed step's input and both passes, and the input before; of a video without a stream in slots."""
    cached = replace(t2v, request=replace(t2v.request, cache=0.05))
    latent = math.prod(plan_video(t2v, *CLIP).latent)
    assert work(cached) - work(t2v) == 4 * 4 * latent
    assert work(cached, "decode") - work(t2v, "decode") == 4 * 4 * latent


def test_nag_takes_a_second_prompt_and_two_shares_of_rows(t2v: Plan) -> None:
    """In float32, of a picture's 3,600 tokens more than the self-attention's values took, of a clip's less; and the
    negative prompt's keys and values."""
    led, texts = replace(t2v, request=replace(t2v.request, nag="11")), 2 * LAYERS * TEXT * WIDTH * 2
    assert work(led) - work(t2v) == texts
    one, two = (plan_video(plan, (1280, 720), 1).budget.stages["denoise"]["work"] for plan in (t2v, led))
    assert two - one == texts + (8 - 2) * 3600 * WIDTH


def test_adapters_take_a_result_and_its_sum(t2v: Plan) -> None:
    assert work(replace(t2v, lora_mode="adapter", loras={"other": []})) - work(t2v) == 2 * TOKENS * WIDTH * 2


def test_lora_adapters_stay_beside_the_weights() -> None:
    """Both matrices of every pair; merged they take nothing."""
    merged, kept = (open_task("t2v-A14B", lora=True, lora_mode=mode).plan for mode in ("merge", "adapter"))
    sizes = [plan_video(plan, (64, 64), 5).budget.experts["high"].resident for plan in (merged, kept)]
    (lora,) = kept.loras["high"]
    shapes = kept.checkpoint.experts["high"].weights.shapes
    pairs = [name for delta in lora.deltas(shapes) for name in delta.tensors]
    assert sizes[1] - sizes[0] == 4 * sum(torch.Size(lora.store[name].shape).numel() for name in pairs)


def test_exchanges_of_a_ring_and_of_ulysses(t2v: Plan) -> None:
    """A rank's tokens; Ulysses two buffers of queries, keys and values, a ring four of them and four in float32."""
    share = TOKENS // 2 * WIDTH * 2
    tables = {"ulysses": Layout(2, 2, 1), "ring": Layout(2, 1, 2), "apart": Layout(2, 1, 1)}
    found = {name: work(replace(t2v, layout=layout)) for name, layout in tables.items()}
    assert found["apart"] == work(t2v)
    assert found["ring"] - found["ulysses"] == 4 * share + 4 * 2 * share - 5 * share


def test_the_first_rank_gathers_the_frames_of_a_chunk(t2v: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(t2v, layout=Layout(2, 2, 1))
    before = work(two, "decode")
    monkeypatch.setattr("wan.modules.vae.WanVAE.decode_peak", lambda *_: 0)
    latents = memory.LATENTS * 16 * 21 * 90 * 160 * 4
    assert work(two, "decode") == latents + 2 * 3 * 8 * 1280 * 720 * 4
    assert work(t2v, "decode") == latents < before


def test_tiles_have_rims(t2v: Plan) -> None:
    """A quarter of the frame takes more than a quarter of what the frame takes, and less than half."""
    tiled = replace(t2v, request=replace(t2v.request, vae_tiling=True))
    assert plan_video(tiled, *CLIP).tiles == (2, 2)
    assert 0.25 < work(tiled, "decode") / work(t2v, "decode") < 0.5


def test_a_preview_keeps_the_vae(t2v: Plan) -> None:
    """Where blocks stream, its weights leave while denoising, but for previews."""
    previewed = replace(t2v, request=replace(t2v.request, preview_steps=True))
    gone, kept = (budget_of(replace(plan, room=12 * 10**9)) for plan in (t2v, previewed))
    assert (gone.vae_leaves, kept.vae_leaves) == (True, False)
    more = kept.stages["denoise"]["other weights"] - gone.stages["denoise"]["other weights"]
    assert more == t2v.weight_bytes["VAE"]


def test_a_second_try_decodes_in_finer_tiles(t2v: Plan) -> None:
    latent = plan_video(t2v, *CLIP).latent
    assert decode_tiles(t2v, latent, finer=True) == (2, 2)


def test_an_image_of_ti2v_is_counted() -> None:
    """Its encoding is a stage of its own in peaks and time, in tiles where memory is short."""
    plan = released_plan("ti2v-5B", True, 10**12, HERE)
    without, image = (plan_video(plan, (1280, 704), 121, image=given) for given in (False, True))
    assert without.encoded is None
    assert image.encoded == (48, 1, 44, 80)
    assert without.budget is not None
    assert image.budget is not None
    assert image.budget.peaks.keys() - without.budget.peaks.keys() == {"image"}
    found = [seconds(plan, each, RATES) for each in (without, image)]
    assert found[0].image == 0 < found[1].image < found[1].decode
    assert plan_video(replace(plan, room=10**9), (1280, 704), 121, image=True).encode_tiles > (1, 1)


def test_an_image_of_ti2v_may_be_encoded_in_tiles() -> None:
    image = Image.open(TINY / "input.png").convert("RGB")
    video = Video("a cat", "", (64, 64), 5, 1, image)
    frames = []
    for task in (open_task("ti2v-5B"), open_task("ti2v-5B", vram=0.001)):
        task.plan = plan_videos(task.plan, SAMPLING, [video])
        frames.append(task.start(video).first_frame)
    assert task.plan.video(video).encode_tiles > (1, 1)
    assert frames[0] is not None
    torch.testing.assert_close(frames[0], frames[1], rtol=0, atol=1e-4)


def test_texts_take_what_their_tokens_ask(t2v: Plan) -> None:
    """All states of the texts that are encoded together, and the longest one's scores."""
    one, many, short = (replace(t2v, text_lengths=lengths) for lengths in ((512,), (512,) * 64, (10,)))
    assert work(t2v, "text") == work(one, "text")
    assert work(many, "text") - work(one, "text") == 63 * 512 * 4096 * 2
    assert work(one, "text") - work(short, "text") > 64 * (512**2 - 10**2) * (4 + 4 + 2)
    budgets = [budget_of(plan) for plan in (one, many)]
    assert budgets[1].peaks["text"] - budgets[0].peaks["text"] == 63 * 512 * 4096 * 2


def test_texts_are_counted_once_by_their_tokens() -> None:
    plan = open_task("t2v-A14B").plan

    def lengths(*prompts: str, guidance: float = 1.0, **options: object) -> tuple[int, ...]:
        asked = replace(plan, request=replace(plan.request, **options))
        sampling = replace(SAMPLING, guidance=(guidance, guidance))
        return plan_videos(asked, sampling, [Video(each, "a", (64, 64), 9, 1) for each in prompts]).text_lengths

    (cat,), (letter,), long = lengths("a cat"), lengths("a"), "cat " * 600
    assert letter < cat < 10
    assert lengths("a cat", "a cat", long) == (512, cat)
    assert lengths("a cat", guidance=4.0) == lengths("a cat", nag="5") == (cat, letter)
    assert lengths("a cat | a", window="5") == (cat, letter)
    assert lengths("a cat", use_prompt_extend=True) == (512,)
    assert len(lengths(*(f"number {n}" for n in range(70)))) == memory.TEXTS


# -- memory over a batch


def on_device() -> int:
    """Count live tensors on the meta device, used here as the GPU."""
    gc.collect()
    return sum(isinstance(each, torch.Tensor) and each.device == META for each in gc.get_objects())


def test_encoded_prompts_wait_on_the_host() -> None:
    """Encoding leaves the same bytes on the device for any number of prompts."""
    pipe, counts = open_on_meta("t2v-A14B", torch.float32, None, True, None), []
    with OneDevice(), AllIsWell():
        for prompts in (["one"], [f"prompt {number}" for number in range(70)]):
            pipe.encode(prompts)
            counts.append(on_device())
    assert counts[0] == counts[1]
    assert {rows.device.type for rows in pipe._contexts.values()} == {"cpu"}


def test_texts_are_encoded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the encoder's own memory has a limit; the numbers are those of all at once."""
    whole, grouped = open_task("t2v-A14B"), open_task("t2v-A14B")
    prompts = ["one", "two words", "a cat that sits"]
    whole.encode(prompts)
    monkeypatch.setattr("wan.pipeline.TEXTS", 2)
    grouped.encode(prompts)
    assert all(torch.equal(whole._contexts[each], grouped._contexts[each]) for each in prompts)


@pytest.fixture
def task() -> Original:
    """With room for all blocks."""
    return open_task("t2v-A14B", vram=64.0)


def video_of(task: Original) -> Video:
    video = Video("a cat", "", (64, 64), 5, 1)
    task.plan = plan_videos(task.plan, SAMPLING, [video])
    return video


def test_out_of_memory_in_denoise_is_tried_again_with_fewer_slots(
    task: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = task.sample(video_of(task))
    rooms, forward = [], WanModel.forward

    def full(model: WanModel, *given: object) -> torch.Tensor:
        rooms.append(task.plan.room)
        if len(rooms) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(WanModel, "forward", full)
    assert torch.equal(task.sample_or_retry(video_of(task)), want)
    assert rooms[1] < rooms[0]
    rooms.clear()
    monkeypatch.setattr(WanModel, "forward", lambda *_: full(WanModel, *(rooms.clear() or ())))
    with pytest.raises(torch.OutOfMemoryError):
        task.sample_or_retry(video_of(task))


def test_free_memory_is_looked_at_for_each_video(task: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    want = task.sample_or_retry(video_of(task))
    video = task.plan.video(video_of(task))
    assert video.budget is not None
    assert video.budget.resident
    least = replace(task.plan, room=1)
    tight = plan_video(least, (64, 64), 5).budget
    assert tight is not None
    monkeypatch.setattr("wan.pipeline.memory_now", lambda _: tight.peak + 10**6)
    assert torch.equal(task.sample_or_retry(video_of(task)), want)
    now = task.plan.video(Video("", "", (64, 64), 5, 1)).budget
    assert now is not None
    assert now.free == tight.peak + 10**6
