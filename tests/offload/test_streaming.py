"""Weights brought when they are used: the same numbers whatever the slots, and a clear end of what goes wrong.

Real files and real threads; the "device" is host memory.
"""

import inspect
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wan
from benchmarks.loading import fresh, write_transformer
from tests.support import TINY, checkpoint, config_of, lora_dir
from wan.checkpoints.checkpoint import open_checkpoint
from wan.checkpoints.safetensors_file import TensorStore
from wan.jobs.job import Sampling
from wan.modules.model import Prompt, WanModel
from wan.modules.t5 import UMT5Encoder
from wan.offload.networks import Networks, text_encoder
from wan.offload.prefetcher import CopyStream, GpuCopyStream, Slot
from wan.offload.reader import PIECE_BYTES, READERS, ReadError, Source, allocate, load
from wan.original_api import Original
from wan.planning import memory as planned_memory
from wan.sampling import Video
from wan.utils.errors import InputError, JobError

CPU = torch.device("cpu")
TASK = "t2v-A14B"
CLASSES = {"t2v-A14B": wan.WanT2V, "i2v-A14B": wan.WanI2V, "ti2v-5B": wan.WanTI2V}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# -- whole tasks on the golden checkpoints


def open_task(task: str, lora_mode: str | None) -> Original:
    config = config_of(task)
    lora = lora_dir(task) if lora_mode else None
    return CLASSES[task](config, checkpoint(task), lora, lora_mode=lora_mode or "merge", device=CPU)


def use_slots(count: int, monkeypatch: pytest.MonkeyPatch, batch_guidance: bool = False) -> None:
    """As if this number fitted on the device."""
    budget = SimpleNamespace(
        slots=count, resident=False, tiles=(1, 1), batch_guidance=batch_guidance, vae_leaves=True, between=1
    )
    monkeypatch.setattr(planned_memory, "_budget", lambda *_: budget)


def two_videos(task: Original, guided: bool) -> list[Tensor]:
    sampling = Sampling("euler", 3, 5.0, (3.0, 2.0) if guided else (1.0, 1.0))
    return [task.sample_with(sampling, Video("a cat", "bad", (32, 32), 1, seed)) for seed in (1, 2)]


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize("lora_mode", [None, "merge", "adapter"])
@pytest.mark.parametrize("guided", [False, True])
def test_latents_do_not_depend_on_the_slots(
    task: str, lora_mode: str | None, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One expert and two, with LoRA and without, one pass and two, two videos one after the other."""
    opened = open_task(task, lora_mode)
    want = two_videos(opened, guided)
    networks = opened.load_experts().networks
    assert networks is not None
    assert networks.prefetcher.copies == len(networks.prefetcher.blocks), "with room for all, each is read once"
    for slots, batch_guidance in product(range(1, len(networks.prefetcher.blocks)), {False, guided}):
        networks.shrink()
        use_slots(slots, monkeypatch, batch_guidance)
        opened.offload = slots % 2 == 0  # whether it reckons with another video
        assert all(map(torch.equal, two_videos(opened, guided), want)), (
            f"{slots} slots, batch_guidance {batch_guidance}"
        )
        assert len(networks.prefetcher.slots) == slots


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_each_block_comes_once_per_guided_step(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two videos of three guided steps through two slots: each part comes once a step, and not once a pass."""
    brought = {}
    for batch_guidance in (False, True):
        opened = open_task(task, None)
        use_slots(2, monkeypatch, batch_guidance)
        prefetcher = opened.load_experts().networks.prefetcher  # type: ignore[union-attr]
        before = prefetcher.copies
        two_videos(opened, guided=True)
        brought[batch_guidance] = prefetcher.copies - before
    uses = 2 * 3 * len(prefetcher.blocks) // len(opened.load_experts().models)
    assert brought[True] <= uses
    assert brought[False] >= 2 * uses - 2 * 4, "at the begin of a video or pass two may be there still"


def test_bf16_and_image_to_video_do_not_depend_on_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    task = wan.WanI2V(config_of("i2v-A14B", torch.bfloat16), checkpoint("i2v-A14B"), lora_dir("i2v-A14B"), device=CPU)
    image = Image.open(TINY / "input.png").convert("RGB")
    sampling = Sampling("unipc", 4, 5.0, (1.0, 1.0))
    want = task.sample_with(sampling, Video("a cat", "", (64, 64), 5, 1, image))
    assert task.load_experts().networks is not None
    task.load_experts().networks.shrink()
    use_slots(2, monkeypatch)
    assert torch.equal(task.sample_with(sampling, Video("a cat", "", (64, 64), 5, 1, image)), want)


def test_while_a_video_is_decoded_the_next_ones_first_weights_come(monkeypatch: pytest.MonkeyPatch) -> None:
    task, sampling = open_task(TASK, None), Sampling("euler", 3, 5.0, (1.0, 1.0))
    want = [task.sample_with(sampling, Video("a cat", "bad", (32, 32), 1, seed)) for seed in (1, 2)]
    networks = task.load_experts().networks
    assert networks is not None
    networks.shrink()
    use_slots(2, monkeypatch)
    latent = task.sample_with(sampling, Video("a cat", "bad", (32, 32), 1, 1), again=True)
    assert not {0, 1} <= networks.prefetcher._slot_of.keys()
    chunks = task.decode(latent)
    next(chunks)
    deadline = time.monotonic() + 60
    while not {0, 1} <= networks.prefetcher._slot_of.keys():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chunks.close()
    before = networks.prefetcher.copies
    assert torch.equal(latent, want[0])
    assert torch.equal(task.sample_with(sampling, Video("a cat", "bad", (32, 32), 1, 2)), want[1])
    assert networks.prefetcher.copies - before == 3 * len(task.load_experts().models["high"].blocks) + 3 - 2


def test_the_vae_makes_room_for_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task(TASK, None)
    latent = two_videos(task, guided=False)[0]
    want = torch.cat(list(task.decode(latent)), dim=1)
    gone = weakref.ref(task.load_vae().conv1.weight)  # type: ignore[union-attr]
    use_slots(2, monkeypatch)
    assert torch.equal(two_videos(task, guided=False)[0], latent)
    assert gone() is None
    assert torch.equal(torch.cat(list(task.decode(latent)), dim=1), want)


def test_after_a_job_the_device_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task(TASK, None)
    use_slots(3, monkeypatch)
    two_videos(task, guided=False)
    networks = task.load_experts().networks
    assert networks is not None
    slots = [weakref.ref(slot.memory) for slot in networks.prefetcher.slots]
    assert len(slots) == 3
    networks.shrink()
    assert not [slot for slot in slots if slot() is not None]
    blocks = [p for model in networks.models.values() for n, p in model.named_parameters() if n.startswith("blocks")]
    assert {p.device.type for p in blocks} == {"meta"}


# -- one network in the open


SIZES = {"dim": 32, "ffn_dim": 48, "in_dim": 4, "out_dim": 4, "num_heads": 2, "num_layers": 5, "text_dim": 8}


def blueprint() -> WanModel:
    with torch.device("meta"):
        return WanModel(**SIZES, freq_dim=16)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(p.shape) / 4 for name, p in blueprint().named_parameters()}, path)
    return path


class Slow(TensorStore):
    """A disk that takes `seconds` for each unit, wherever it is read from; `on_read` may do worse."""

    def __init__(self, path: Path, seconds: float = 0.0, on_read: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(TensorStore.open(path))
        self.seconds, self.on_read = seconds, on_read

    def read(self, name: str, rows: slice | None = None, buffer: Tensor | None = None) -> Tensor:
        self.on_read(name)
        if name.endswith(("self_attn.q.weight", "time_projection.1.weight")):
            time.sleep(self.seconds)
        return super().read(name, rows, buffer)


def networks_of(
    store: TensorStore, slots: int, stream: CopyStream | None = None, device: torch.device = CPU
) -> Networks:
    source = Source(store, lambda _: torch.float32)
    networks = Networks({"model": (blueprint(), source)}, device, stream=stream)
    networks.prefetcher.resize(slots)
    return networks


def forwards(networks: Networks, count: int, each: Callable[[int], None] = lambda _: None) -> list[Tensor]:
    device = networks.prefetcher.device
    x = torch.linspace(-1, 1, 4 * 2 * 4 * 4, device=device).reshape(4, 2, 4, 4)
    found = []
    with torch.no_grad(), networks.job(["model"] * count):
        for index in range(count):
            each(index)
            x = networks.models["model"](x, 500.0, Prompt(torch.ones(3, 8, device=device)))
            found.append(x)
    return found


def wanted(file: Path, count: int) -> list[Tensor]:
    return forwards(networks_of(TensorStore.open(file), 6), count)


def test_streaming_equals_a_plain_load(file: Path) -> None:
    model = load(blueprint(), Source(TensorStore.open(file), lambda _: torch.float32), CPU)
    x = torch.linspace(-1, 1, 4 * 2 * 4 * 4).reshape(4, 2, 4, 4)
    with torch.no_grad():
        want = model(x, 500.0, Prompt(torch.ones(3, 8)))
    assert torch.equal(wanted(file, 1)[0], want)


def test_blocks_lie_in_the_slots_and_nowhere_else(file: Path) -> None:
    networks = networks_of(TensorStore.open(file), 3)
    model, slots = networks.models["model"], [slot.memory for slot in networks.prefetcher.slots]
    spans = [(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in slots]
    seen = []

    def look(*_: object) -> None:
        here = {n: p for n, p in model.named_parameters() if model.unit_of(n) is not None and p.device.type != "meta"}
        assert len({model.unit_of(name) for name in here}) <= 3
        assert all(any(start <= p.data_ptr() < end for start, end in spans) for p in here.values())
        seen.append(len(here))

    for block in model.blocks:
        block.register_forward_pre_hook(look)
    forwards(networks, 3)
    assert len(seen) == 15
    assert [slot.memory.data_ptr() for slot in networks.prefetcher.slots] == [start for start, _ in spans], (
        "never moved"
    )


# -- what goes wrong


class Behind(CopyStream):
    """Copies that are under way after `write`, until they are waited for."""

    under_way = False

    @contextmanager
    def write(self, slot: Slot) -> Iterator[None]:
        self.under_way = True
        yield

    def drain(self) -> None:
        self.under_way = False


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    change(state)
    save_file(state, file)


def spoil(state: dict[str, Tensor]) -> None:
    state["blocks.3.ffn.2.weight"][3, 5] = float("nan")


def fault(kind: str, file: Path) -> None:
    if kind == "shorter":
        os.truncate(file, file.stat().st_size - 100)
    elif kind == "written again":
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shorter", "has changed since this run opened it; start again"),
        ("written again", "has changed since this run opened it; start again"),
        ("gone", r"tensor \S+ cannot be read \(No such file or directory\)"),
    ],
)
def test_a_file_that_changes_fails_the_job_and_not_the_next(kind: str, says: str, slots: int, file: Path) -> None:
    want, networks = wanted(file, 4), networks_of(TensorStore.open(file), slots)
    kept = shutil.copy2(file, file.with_suffix(".kept"))
    with pytest.raises(ReadError, match=says) as caught:
        forwards(networks, 4, each=lambda index: fault(kind, file) if index == 2 else None)
    assert str(file) in str(caught.value)
    shutil.copy2(kept, file)
    assert all(map(torch.equal, forwards(networks, 4), want))


def test_a_read_that_fails_in_the_middle(file: Path) -> None:
    want, reads = wanted(file, 3), [0]

    def fail(_: str) -> None:
        reads[0] += 1
        if reads[0] == 200:
            raise OSError(5, "Input/output error")

    networks = networks_of(Slow(file, on_read=fail), 2)
    with pytest.raises(ReadError, match=r"model.safetensors: tensor \S+ cannot be read \(Input/output error\)"):
        forwards(networks, 3)
    assert all(map(torch.equal, forwards(networks, 3), want))


def test_nan_in_a_weight_is_found_when_it_comes(file: Path) -> None:
    rewrite(file, spoil)
    with pytest.raises(InputError, match=r"tensor blocks\.3\.ffn\.2\.weight holds NaN or Inf: the file is corrupt"):
        forwards(networks_of(TensorStore.open(file), 2), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, JobError("the latent has NaN")])
def test_an_error_of_the_computation_ends_the_threads(error: BaseException, file: Path) -> None:
    stream = Behind()
    want, networks = wanted(file, 2), networks_of(Slow(file, 0.01), 2, stream)

    def stop(index: int) -> None:
        if index == 1:
            raise error

    with pytest.raises(type(error) if isinstance(error, JobError) else KeyboardInterrupt):
        forwards(networks, 2, each=stop)
    assert not stream.under_way, "slots may be freed now"
    assert all(map(torch.equal, forwards(networks, 2), want))


def test_an_interrupt_in_the_middle_of_a_block(file: Path) -> None:
    want, networks = wanted(file, 2), networks_of(Slow(file), 2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = networks.models["model"].blocks[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forwards(networks, 2)
    hook.remove()
    assert all(map(torch.equal, forwards(networks, 2), want))


def test_an_interrupt_while_waiting_for_a_read(file: Path) -> None:
    """The computation waits, the prefetcher waits, a reader reads: Ctrl-C ends all three."""
    want, waiting, slow = wanted(file, 1), threading.Event(), threading.Event()

    def hang(name: str) -> None:
        if name.startswith("blocks.2.") and not slow.is_set():
            waiting.set()
            slow.wait(1.0)

    networks = networks_of(Slow(file, on_read=hang), 2)

    def interrupt() -> None:
        waiting.wait()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        forwards(networks, 1)
    slow.set()
    thread.join()
    assert all(map(torch.equal, forwards(networks, 1), want))


def test_a_full_host_is_one_sentence() -> None:
    with pytest.raises(JobError, match=r"host memory is full: 1152921504607 MB"):
        allocate(1 << 60)


def test_an_unplanned_use_is_a_bug(file: Path) -> None:
    networks = networks_of(TensorStore.open(file), 2)
    with pytest.raises(AssertionError, match="block 0 is used, 1 was planned"), networks.prefetcher.job([1, 2]):  # noqa: SIM117 - the inner `with` must run inside the job
        with networks.prefetcher.use(0):
            pass


# -- the order on a device


class RecordedStream:
    """A stream that only remembers: it has a clock with a hand for each stream; an event is a copy of that clock, and
    waiting for it takes the later of each hand."""

    def __init__(self, _: object = None) -> None:
        self.clock: dict[int, int] = {}

    def issue(self) -> int:
        """Work on this stream; its number."""
        self.clock[id(self)] = self.clock.get(id(self), 0) + 1
        return self.clock[id(self)]

    def record_event(self) -> dict[int, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[int, int]) -> None:
        self.clock = {hand: max(self.clock.get(hand, 0), event.get(hand, 0)) for hand in {*self.clock, *event}}

    def knows(self, other: "RecordedStream", number: int) -> bool:
        return self.clock.get(id(other), 0) >= number

    def synchronize(self) -> None: ...


class Watched(GpuCopyStream):
    """The copy stream of GPUs. A slot must not be written before its last use is over, nor used before it is written:
    only the events of the class under test can tell one stream of the other's work."""

    def __init__(self, compute: RecordedStream) -> None:
        super().__init__(torch.device("cuda", 0))
        self.compute, self.used, self.wrote = compute, dict[int, int](), dict[int, int]()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    @contextmanager
    def write(self, slot: Slot) -> Iterator[None]:
        copies = cast(Any, self.copies)
        with super().write(slot):
            assert copies.knows(self.compute, self.used[slot.index]), "written before its last use was over"
            yield
            self.wrote[slot.index] = copies.issue()

    def enter(self, slot: Slot) -> None:
        super().enter(slot)
        assert self.compute.knows(cast(Any, self.copies), self.wrote[slot.index]), "used before it was written"

    def leave(self, slot: Slot) -> None:
        self.used[slot.index] = self.compute.issue()
        super().leave(slot)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    compute = RecordedStream()
    for name, stand_in in (
        ("Stream", RecordedStream), ("current_stream", lambda _: compute), ("stream", lambda _: nullcontext()),
        ("device", lambda _: nullcontext()),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return Watched(compute)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_every_event_is_waited_for(slots: int, file: Path, watched: Watched) -> None:
    forwards(networks_of(TensorStore.open(file), slots, watched), 3)
    assert len(watched.used) == len(watched.wrote) == slots


def test_copies_that_do_not_wait_are_noticed(file: Path, watched: Watched) -> None:
    watched.copies.wait_event = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="written before its last use was over"):
        forwards(networks_of(TensorStore.open(file), 2, watched), 2)


def test_a_long_batch_keeps_no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second from each event to the next; the device is two waits behind the computing thread."""
    made: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.number = len(made)
            made.append(self)

        def record(self, _: object) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return over or self.number < len(made) - 4

        def elapsed_time(self, other: "Event") -> float:
            return 500.0 * (other.number - self.number)

    for name, stand_in in (("Event", Event), ("Stream", lambda _: None), ("current_stream", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    stream, over = GpuCopyStream(torch.device("cuda", 0)), False
    for _ in range(50):
        with stream.waiting():
            pass
    assert len(stream._waits) == 2
    over = True
    assert (stream.waited, stream.waited) == (25.0, 25.0)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_a_gpu_gives_the_same_numbers_with_any_slots(slots: int, file: Path) -> None:
    """Also where the computation lags behind what its thread has asked for, or the copies do: `_sleep` keeps a stream
    busy for about 10 ms."""
    device = torch.device("cuda", torch.cuda.current_device())
    want = forwards(networks_of(TensorStore.open(file), 6, device=device), 4)

    class SlowCopies(GpuCopyStream):
        @contextmanager
        def write(self, slot: Slot) -> Iterator[None]:
            with super().write(slot):
                torch.cuda._sleep(20_000_000)
                yield

    for stream in (GpuCopyStream(device), SlowCopies(device)):
        networks = networks_of(TensorStore.open(file), slots, stream, device)
        for busy in (0, 20_000_000):
            found = forwards(networks, 4, each=lambda _, busy=busy: torch.cuda._sleep(busy))  # type: ignore[misc]
            assert all(map(torch.equal, found, want))
        assert networks.prefetcher.stream.waited >= 0.0


# -- time


@pytest.mark.slow
@pytest.mark.parametrize(("bring", "compute"), [(0.02, 0.06), (0.06, 0.06), (0.09, 0.03)])
def test_the_computation_waits_for_what_is_slower_only(bring: float, compute: float, file: Path) -> None:
    """At most max(0, bring - compute) a block, plus 2 % and what this machine needs for it without waiting."""
    plain = networks_of(TensorStore.open(file), 2)
    forwards(plain, 1)
    networks = networks_of(Slow(file, bring), 2)
    for block in networks.models["model"].blocks:
        block.register_forward_hook(lambda *_: time.sleep(compute))
    steps = 5
    forwards(networks, steps)
    units = len(networks.prefetcher.blocks) * steps
    overhead = units * (plain.prefetcher.stream.waited / 6 + 0.004)
    unavoidable = bring + max(0.0, bring - compute) * units + steps * min(bring, compute)  # unit 0 computes nothing
    assert networks.prefetcher.stream.waited <= unavoidable + 0.02 * units * max(bring, compute) + overhead
    if bring > compute:
        assert networks.prefetcher.stream.waited > 0.5 * (bring - compute) * units


# -- the text encoder


def texts() -> list[Tensor]:
    return [torch.tensor(ids) for ids in ([5, 6, 7, 1], [9, 1], list(range(3, 40)))]


@pytest.mark.parametrize("slots", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_encoder_streams(slots: int | None, dtype: torch.dtype) -> None:
    part = open_checkpoint(checkpoint(TASK), config_of(TASK)).text_encoder
    whole = load(part.module, Source(part.weights, lambda _: dtype), CPU)
    encode = text_encoder(part.module, Source(part.weights, lambda _: dtype), CPU, slots)
    with torch.no_grad():
        want = [whole([ids])[0] for ids in texts()]
        for _ in range(2):
            assert all(map(torch.equal, encode(texts()), want))


def test_only_the_rows_of_the_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    part = open_checkpoint(checkpoint(TASK), config_of(TASK)).text_encoder
    read, rows = TensorStore.read, []

    def counted(self: TensorStore, name: str, *more: object) -> Tensor:
        tensor = read(self, name, *more)  # type: ignore[arg-type]
        if name == "token_embedding.weight":
            rows.append(len(tensor))
        return tensor

    monkeypatch.setattr(TensorStore, "read", counted)
    text_encoder(part.module, Source(part.weights, lambda _: torch.float32), CPU, 2)([torch.tensor([7, 7, 3, 9, 1])])
    assert sum(rows) == 4


def test_a_released_text_encoder_is_gone() -> None:
    """Also from the checkpoint that it came from."""
    task = open_task(TASK, None)
    task.encode(["a cat"])
    encode = task.load_text_encoder()
    slots = inspect.getclosurevars(encode).nonlocals["networks"].prefetcher.slots
    gone = [weakref.ref(encode), *(weakref.ref(slot.memory) for slot in slots)]
    assert len(gone) > 2
    del encode, slots
    task.release_text_encoder()
    assert not [thing for thing in gone if thing() is not None]
    part = task.plan.checkpoint.text_encoder
    assert {p.device.type for p in part.module.parameters()} == {"meta"}
    assert {file.suffix for file in part.weights.files} == {".pth"}


def test_the_number_of_readers(file: Path) -> None:
    most = [0]

    def count(_: str) -> None:
        most[0] = max(most[0], sum(t.name.startswith("weights") for t in threading.enumerate()))

    forwards(networks_of(Slow(file, on_read=count), 2), 2)
    assert 1 <= most[0] <= READERS


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_host_memory_stays_at_a_few_blocks(tmp_path: Path) -> None:
    """1.35 GB of float32 through two slots, two forwards: three blocks, the buffers of the readers, activations.

    Those are the keys and values of the text; the rest is what libraries take when they first run. Measured: 0.28 GB.
    """
    path = tmp_path / "model.safetensors"
    write_transformer(path, layers=20)
    _, whole, peak, _ = fresh("streamed", path)
    block, texts = whole / 20, 20 * 2 * 2 * 512 * 1024
    assert peak * whole <= 3 * block + (READERS + 1) * PIECE_BYTES + texts + 80e6


def test_a_second_text_call_reads_only_what_has_no_slot(tmp_path: Path) -> None:
    build = partial(UMT5Encoder, vocab=10, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=8)
    save_file({name: torch.ones_like(p) for name, p in build().named_parameters()}, tmp_path / "t5.safetensors")
    with torch.device("meta"):
        blueprint = build()
    source = Source(TensorStore.open(tmp_path / "t5.safetensors"), lambda _: torch.float32)
    encode = text_encoder(blueprint, source, CPU, 4)
    prefetcher = inspect.getclosurevars(encode).nonlocals["networks"].prefetcher
    copies = []
    for _ in range(3):
        encode([torch.tensor([7, 3, 9])])
        copies.append(prefetcher.copies - sum(copies))
    assert copies == [8, 6, 6]
