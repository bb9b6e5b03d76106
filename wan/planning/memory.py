"""Memory of a plan's videos: what each stage needs, and how the networks share the device. Bytes.

A plan is given its videos once, by `plan_videos`; later stages look them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from wan.configs.task import PATCH
from wan.distributed.ulysses import exchange_bytes
from wan.distributed.vae_parallel import decode_peak, encode_peak
from wan.jobs.job import Job, Sampling
from wan.modules.attention import QUANTISED
from wan.offload.budget import Budget, fit, usable_bytes
from wan.planning.plan import Plan, Size, VideoKind, VideoPlan, video_kind
from wan.sampling import Video, make_schedule, plan_steps
from wan.utils.accelerator import Accelerator

Tiles = tuple[int, int]  # rows and columns in which a frame is coded

TILES: tuple[Tiles, ...] = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
LATENTS = 4  # of a video's size are alive: the noise, the sample, an image's, a forward's input or result
CACHED = 4  # more with the step cache: a computed step's input and both passes, and the input before
DECODING = 1.1  # times the predicted peak: allocations of many sizes leave gaps
TEXTS = 64  # prompts that the text encoder reads together: their states take 0.3 GB at most
UNLIMITED = 1 << 60


def plan_videos(plan: Plan, sampling: Sampling, videos: Collection[Job | Video]) -> Plan:
    """`plan` with the steps of `sampling` and the memory of each kind of video among `videos`."""
    steps = plan_steps(make_schedule(sampling).timesteps, sampling, plan.config.boundary)
    plan = replace(plan, sampling=sampling, steps=tuple(steps))
    tokenizer, most = plan.checkpoint.tokenizer, plan.config.text_len
    texts = {text for video in videos for text in plan.texts(video)}
    lengths = [most if plan.request.use_prompt_extend else min(most, tokenizer.count(text)) for text in texts]
    plan = replace(plan, text_lengths=tuple(sorted(lengths, reverse=True)[:TEXTS]) or (most,))
    return replace(plan, videos={kind: plan_video(plan, *kind) for kind in dict.fromkeys(map(video_kind, videos))})


def memory_now(plan: Plan) -> int:
    """Bytes that the run may use now: on a GPU what is free, and what this process has allocated already."""
    assert plan.room is not None, "without a limit nothing is counted"
    accelerator, vram = Accelerator(plan.device), plan.request.vram
    if not accelerator.has_memory:
        return plan.room if vram is None else int(vram * 1e9)
    free = accelerator.free_bytes + int(accelerator.api.memory_allocated(plan.device))
    return free if vram is None else min(free, int(vram * 1e9))


def plan_video(plan: Plan, size: Size, frames: int, image: bool = False, video: bool = False) -> VideoPlan:
    """Memory of a video of `size` (width, height). image, video: whether one is encoded before the first step."""
    channels, length, rows, columns = latent = plan.config.latent_shape(size, frames)
    encoded, encode_tiles = None, TILES[0]
    if plan.config.mask_channels or image or video:  # only a first frame that stays is encoded alone
        vae, ranks = plan.checkpoint.vae.module, plan.layout.sequence
        clip = length if plan.config.mask_channels or video else 1
        encoded = channels, clip, rows, columns
        encode_tiles = _fewest_tiles(plan, latent, lambda tiles: encode_peak(vae, (clip, rows, columns), ranks, tiles))
    windows = plan.windows(frames, image=image)
    tokens = (windows[0][1] if windows else length) * (rows // PATCH[1]) * (columns // PATCH[2])
    first_step = plan.sampling.first_step if video and plan.sampling else 0
    found = VideoPlan(latent, tokens, encoded, decode_tiles(plan, latent), encode_tiles, first_step, windows)
    return found if plan.request.dit_fsdp else replace(found, budget=_budget(plan, found))


def what_fits(plan: Plan, kind: VideoKind) -> str:
    """The option with which a video of this kind fits after all; "" if none does alone."""
    size, frames, *given = kind
    ways = [("--lora_mode merge", replace(plan, lora_mode="merge"), frames)] if plan.lora_mode != "merge" else []
    if plan.dtype == torch.float32:
        ways.append(("--dtype bf16", replace(plan, dtype=torch.bfloat16, text_dtype=torch.bfloat16), frames))
    ways.append(("--offload_model True", replace(plan, offload=True), frames))
    step = plan.config.vae_stride[0]
    ways += [(f"--frame_num {number}", plan, number) for number in range(frames - step, 0, -step)]
    budgets = ((option, plan_video(way, size, number, *given).budget) for option, way, number in ways)
    return next((option for option, budget in budgets if budget and not budget.problem), "")


def decode_tiles(plan: Plan, latent: Sequence[int], *, finer: bool = False) -> Tiles:
    """Tiles in which the frames of a `latent` [C, f, h, w] are decoded, or each process's share of them.
    As few as memory allows. finer: the next more, after the device ran out of memory."""
    vae, ranks, (c, f, h, w) = plan.checkpoint.vae.module, plan.layout.sequence, latent
    return _fewest_tiles(
        plan,
        latent,
        lambda tiles: decode_peak(vae, (c, f, h, w), ranks, tiles=tiles),
        int(plan.request.vae_tiling),
        finer,
    )


def _fewest_tiles(
    plan: Plan, latent: Sequence[int], peak: Callable[[Tiles], int], first: int = 0, finer: bool = False
) -> Tiles:
    ways = [tiles for tiles in TILES[first:] if tiles[0] <= latent[2] and tiles[1] <= latent[3]] or [TILES[0]]
    chosen = 0
    if plan.room is not None and not plan.request.dit_fsdp:
        experts = sum(
            sizes.resident + (0 if plan.offload else sizes.blocks * sizes.block_bytes)
            for sizes in (plan.expert_sizes.values() if plan.sampling else ())
        )
        limit = usable_bytes(plan.room) - plan.weight_bytes["VAE"] - experts
        chosen = next((n for n, tiles in enumerate(ways) if DECODING * peak(tiles) <= limit), len(ways) - 1)
    return ways[min(chosen + finer, len(ways) - 1)]


def _budget(plan: Plan, video: VideoPlan) -> Budget:
    """How the networks share the device; without a limit all of them stay there."""
    vae, model = plan.checkpoint.vae.module, plan.transformer
    ranks, itemsize = plan.layout.sequence, plan.dtype.itemsize
    latents = (LATENTS + (CACHED if plan.request.cache else 0)) * math.prod(video.latent) * torch.float32.itemsize
    tokens, width = -(-video.tokens // ranks), model.num_heads * model.head_width
    work = sum([  # activations of one forward on a rank with `tokens`
        tokens * width * (4 + 4 * itemsize),  # the residual stream in float32; queries, keys, values, their result
        tokens * width * QUANTISED.get(plan.attention, 0),
        4 * tokens * model.head_width,  # the table of rotations
        2 * tokens * width * itemsize if plan.lora_mode == "adapter" and plan.loras else 0,  # a result and its sum
        # NAG's second result is no more than self-attention's values; then come two shares of rows in float32
        max(0, 8 * min(model.rows, tokens) - itemsize * tokens) * width if plan.request.guide[0] != 1 else 0,
        (1 + plan.uses_negative) * 2 * len(model.blocks) * model.text_len * width * itemsize,  # texts' keys, values
        exchange_bytes(plan.layout, tokens, width, itemsize),
        plan.fp8_bytes,
    ])  # fmt: skip
    if plan.request.preview_steps:  # one frame is decoded between two steps, when a forward's activations are gone
        frame = video.latent[0], 1, *video.latent[2:]
        work = max(work, decode_peak(vae, frame, ranks, tiles=video.tiles))
    image = latents + encode_peak(vae, video.encoded[1:], ranks, video.encode_tiles) if video.encoded else 0
    budget = fit(
        UNLIMITED if plan.room is None else plan.room, plan.expert_sizes, plan.text_sizes,
        activations=work + latents,
        decode=latents + decode_peak(vae, video.latent, ranks, tiles=video.tiles),
        text_work=plan.checkpoint.text_encoder.module.activation_bytes(plan.text_lengths, plan.text_dtype.itemsize),
        tiles=video.tiles,
        keep=not plan.offload or plan.room is None,
        image=image,
        second_pass=4 * tokens * width if plan.guided else 0,
        vae=plan.weight_bytes["VAE"],
        vae_stays=plan.request.preview_steps,
    )  # fmt: skip
    return budget if plan.request.vram is None else replace(budget, source="limit")
