"""Every task and mode on a device that computes nothing, `meta`: what would fail on a GPU for being on two devices.

An operation on tensors of both devices is refused, but for copies; so is one that needs a number off the device where
the program does not fetch it. The host side (files, threads, random numbers) is real.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from itertools import product
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import FOLDERS, TINY, checkpoint, config_of, lora_dir
from tests.test_golden import CLASSES
from wan.distributed.launch import Runtime
from wan.jobs.job import Sampling
from wan.modules import quantised_linear
from wan.modules.model import WanModel
from wan.modules.quantised_linear import KERNELS, QuantisedLinear
from wan.offload.prefetcher import CopyStream, Slot
from wan.original_api import Original
from wan.sampling import Video
from wan.utils.progress import Progress

META = torch.device("meta")
COPIES = {"aten::copy_", "aten::_to_copy"}
SIZE, FRAMES = (64, 32), 5
RUNS = (  # with steps of both experts, guided and not
    (torch.bfloat16, [Sampling("euler", 2, 5.0, (1.0, 1.0)), Sampling("unipc", 3, 5.0, (2.0, 3.0))], (2, 2)),
    (torch.float32, [Sampling("dmd", 2, 5.0, (1.0, 1.0)), Sampling("dpm++", 3, 5.0, (2.0, 1.0))], (1, 1)),
)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU would. Copies to the host are zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}  # a GPU's kernels take a number from the host
        devices |= {t.device.type for t in tensors if t.device == META}
        if len(devices) > 1 and name not in COPIES:
            raise AssertionError(f"{func} on {sorted(devices)} at once")
        if name == "aten::_to_copy" and args[0].device == META and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "aten::copy_" and args[0].device.type == "cpu" and args[1].device == META:
            return args[0].zero_()
        return func(*args, **kwargs)


class AllIsWell(TorchFunctionMode):
    """The one question the denoise loop asks the device, whether all numbers are finite, is answered yes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].device == META:
            return True
        return func(*args, **(kwargs or {}))


class WatchedStream(CopyStream):
    """Modes belong to a thread: the prefetcher's, which brings weights and merges, is watched from its stream."""

    @contextmanager
    def write(self, slot: Slot) -> Iterator[None]:
        with OneDevice():
            yield


def open_on_meta(
    task: str, dtype: torch.dtype, lora_mode: str | None, offload: bool, room: int | None, quantize: str = "none"
) -> Original:
    """The pipeline as planned for a CPU, but for the device."""
    lora = {"lora_dir": lora_dir(task), "lora_mode": lora_mode} if lora_mode else {}
    plan = CLASSES[task](config_of(task, dtype), checkpoint(task), device="cpu", quantize=quantize, **lora).plan
    assert plan.lora_mode == (lora_mode or "merge")
    plan = replace(plan, device=META, text_device=META, offload=offload, room=room)
    return CLASSES[task].of_plan(plan, Progress(quiet=True), Runtime())


LORA_MODES = (None, "merge", "adapter")
ROOMS = {"kept": (False, None), "offloaded": (True, None), "few slots": (True, 1)}


def cases() -> Iterator[Any]:
    """Every LoRA mode with every memory mode, in either run by turns; of the tasks with an image one of each mode."""
    modes = product(enumerate(FOLDERS), enumerate(LORA_MODES), enumerate(ROOMS), range(len(RUNS)))
    for (i, task), (j, lora_mode), (k, room), run in modes:
        often = run == (i + j + k) % 2 and (i == 0 or j == (k + i) % 3)
        marks = () if often else pytest.mark.slow
        yield pytest.param(task, lora_mode, *ROOMS[room], run, id=f"{task}-{lora_mode}-{room}-{run}", marks=marks)


@pytest.mark.parametrize(("task", "lora_mode", "offload", "room", "run"), [*cases()])
def test_nothing_is_on_two_devices(
    task: str, lora_mode: str | None, offload: bool, room: int | None, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan.offload.prefetcher.CopyStream", WatchedStream)
    image = None if task == "t2v-A14B" else Image.open(TINY / "input.png").convert("RGB")
    dtype, samplings, tiles = RUNS[run]
    pipe = open_on_meta(task, dtype, lora_mode, offload, room)
    with OneDevice(), AllIsWell():
        video = Video("a cat", "bad", SIZE, FRAMES, 1, image)
        latents = [pipe.sample_with(sampling, video) for sampling in samplings]
        chunks = list(pipe.load_vae().decode(latents[0], tiles=tiles))
    assert {each.device for each in (*latents, *chunks)} == {META}
    assert sum(chunk.shape[1] for chunk in chunks) == FRAMES
    networks = pipe.load_experts().networks
    assert networks is not None
    if room:
        assert networks.prefetcher.copies > len(samplings) * len(networks.prefetcher.blocks), (
            "blocks pass through the slots"
        )


def test_a_second_decode_has_the_memory_of_the_experts() -> None:
    """Slots that the next video would have used are freed where a decode is tried again."""
    pipe = open_on_meta("t2v-A14B", torch.float32, None, True, None)
    networks = pipe.load_experts().networks
    assert networks is not None
    for finer, kept in ((False, 2), (True, 0)):
        networks.prefetcher.resize(2)
        with OneDevice():
            list(pipe.decode(torch.empty(16, 1, 4, 8, device=META), finer=finer))
        assert len(networks.prefetcher.slots) == kept


@pytest.mark.parametrize("form", KERNELS)
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("lora_mode", ["merge", "adapter"])
def test_nor_with_weights_in_8_bits(
    lora_mode: str, multiplied: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks."""
    monkeypatch.setattr("wan.offload.prefetcher.CopyStream", WatchedStream)
    monkeypatch.setattr(quantised_linear, "multiplies", lambda *_: multiplied)
    monkeypatch.setattr(WanModel, "quantise", partialmethod(WanModel.quantise, kept=0))
    pipe = open_on_meta("t2v-A14B", torch.bfloat16, lora_mode, True, 1, form)
    with OneDevice(), AllIsWell():
        latent = pipe.sample_with(RUNS[0][1][0], Video("a cat", "bad", SIZE, FRAMES, 1))
    assert latent.device == META
    models = pipe.load_experts().models.values()
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, QuantisedLinear)]
    assert len(layers) == 2 * 2 * 10


def test_a_gpus_limits_are_refused() -> None:
    host, device = torch.ones(2, 2), torch.ones(2, 2, device=META)
    with OneDevice():
        device.copy_(host)
        assert torch.equal(device.cpu(), torch.zeros(2, 2))
        with pytest.raises(AssertionError, match="at once"):
            torch.where(device > 0, host, device)
        with pytest.raises(AssertionError, match="at once"):
            device + host
