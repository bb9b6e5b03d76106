"""Sharded weights: each rank reads and keeps its share, and the networks give the numbers of whole ones."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.communication import SentBytes
from lightning.lora import Lora
from lightning.merge import Merge
from tests.distributed.ranks import mesh_of, run_ranks, sharded
from tests.support import checkpoint, config_of, lora_dir, relative_error
from wan.checkpoints.checkpoint import OpenCheckpoint, open_checkpoint
from wan.checkpoints.safetensors_file import TensorStore
from wan.distributed.fsdp import load_sharded, shard_rows
from wan.distributed.launch import Runtime
from wan.distributed.mesh import Mesh
from wan.distributed.ulysses import split_tokens
from wan.modules.model import Prompt, WanModel
from wan.offload.reader import Source, load, parameter_dtypes
from wan.utils.errors import InputError

CPU = torch.device("cpu")


def open_tiny(task: str) -> OpenCheckpoint:
    return open_checkpoint(checkpoint(task), config_of(task))


def load_share(
    module: torch.nn.Module,
    store: TensorStore,
    mesh: Mesh,
    dtype: Callable[[str], torch.dtype],
    merge: Merge | None = None,
) -> Any:
    """This rank's part of the weights; all of them in a process alone."""
    if mesh.shards is None:
        return load(module, Source(store, dtype, merge), CPU)
    return load_sharded(module, Source(store, dtype, merge), mesh, CPU)


def load_expert(dtype: torch.dtype, mesh: Mesh, split: bool) -> WanModel:
    """The high-noise expert with its LoRA; sharded if there are several ranks. split: its tokens are divided, too."""
    part = open_tiny("t2v-A14B").experts["high"]
    merge = Merge([Lora.open(lora_dir("t2v-A14B") / "high_noise_model.safetensors")], part.weights.shapes)
    dtypes = parameter_dtypes(dtype, convert_all=False)
    model = load_share(part.module, part.weights, mesh, dtypes, merge)
    if split:
        split_tokens(model, mesh)
    return model


def tiny_forwards(model: WanModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    prompt = Prompt(torch.randn(7, 32, generator=generator))
    found = []
    for rows in (6, 10):
        latent = torch.randn(16, 3, rows, 6, generator=generator)
        with torch.no_grad():
            found += [model(latent, t, prompt) for t in (937.5, 500.0)]
    return found


def guided_of_a_rank(runtime: Runtime) -> tuple[list[Tensor], list[int]]:
    """Velocities of two prompts, in a forward each and together in one, and the bytes of weights sent for them."""
    mesh = mesh_of(runtime, runtime.team.size)
    model = load_expert(torch.float32, mesh, split=True)
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(16, 3, 6, 6, generator=generator)
    prompts = [Prompt(torch.randn(count, 32, generator=generator)) for count in (7, 3)]
    model.residency.batch_guidance = True
    with torch.no_grad():
        model(latent, 500.0, prompts)  # what is gathered once, is
        with SentBytes(mesh.layout) as sent:
            alone = torch.stack([model(latent, 500.0, prompt) for prompt in prompts])
        with SentBytes(mesh.layout) as sent_together:
            both = model(latent, 500.0, prompts)
    return [alone, both], [sent.counts["weights"], sent_together.counts["weights"]]


@sharded
def test_a_guided_step_gathers_each_block_once() -> None:
    (whole, _), _ = guided_of_a_rank(Runtime())
    for (alone, both), (twice, once) in run_ranks(guided_of_a_rank, 2):
        assert torch.equal(alone, both)
        assert relative_error(alone, whole) < 1e-5
        assert twice == 2 * once > 0


def held(module: torch.nn.Module) -> float:
    """Share of the parameters' values that are in this rank's memory."""
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum(x.numel() for x in locals_) / sum(p.numel() for p in module.parameters())


def expert_of_a_rank(runtime: Runtime, dtype: torch.dtype, split: bool) -> tuple[list[Tensor], float, float, dict]:
    model = load_expert(dtype, mesh_of(runtime, runtime.team.size), split)
    before = held(model)
    return tiny_forwards(model), before, held(model), {name: p.dtype for name, p in model.named_parameters()}


@sharded
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("dtype", "split", "tolerance"), [(torch.float32, True, 1e-5), (torch.bfloat16, False, 0.0)])
def test_sharded_expert_with_lora(ranks: int, dtype: torch.dtype, split: bool, tolerance: float) -> None:
    whole = load_expert(dtype, Mesh(), split)
    want = tiny_forwards(whole)
    for found, before, after, dtypes in run_ranks(expert_of_a_rank, ranks, dtype, split):
        assert before < 1 / ranks + 0.05
        assert before <= after < before + 0.005, (
            "of the other ranks' shards only the scales of norms stay after a forward"
        )
        assert dtypes == {name: p.dtype for name, p in whole.named_parameters()}
        for x, y in zip(found, want, strict=True):
            assert relative_error(x, y) <= tolerance


def encode_text(mesh: Mesh) -> tuple[list[Tensor], float]:
    part = open_tiny("t2v-A14B").text_encoder
    encoder = load_share(part.module, part.weights, mesh, lambda _: torch.float32)
    with torch.no_grad():
        return encoder([torch.arange(3, 3 + length) for length in (1, 9, 40)]), held(encoder)


def encode_text_of_a_rank(runtime: Runtime) -> tuple[list[Tensor], float]:
    return encode_text(mesh_of(runtime, runtime.team.size))


@sharded
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_text_encoder(ranks: int) -> None:
    want, _ = encode_text(Mesh())
    for found, share in run_ranks(encode_text_of_a_rank, ranks):
        assert share < 1 / ranks + 0.05
        assert all(map(torch.equal, found, want))


def test_a_torch_too_old_for_shards_on_a_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0"))
    part = open_tiny("t2v-A14B").experts["high"]
    with pytest.raises(InputError, match=r"on a CPU need PyTorch 2\.7 or newer, this is 2\.6\.0"):
        load_sharded(part.module, Source(part.weights, lambda _: torch.float32), Mesh(), CPU)


@pytest.mark.parametrize(("count", "ranks"), [(1, 4), (3, 4), (8, 4), (9, 4), (6, 4), (5, 2)])
def test_rows_of_a_rank(count: int, ranks: int) -> None:
    chunks = torch.arange(count).chunk(ranks)
    for rank in range(ranks):
        want = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(count))[shard_rows(count, ranks, rank)] == want


SIZES = {"dim": 768, "ffn_dim": 3072, "in_dim": 16, "out_dim": 16, "num_heads": 12, "num_layers": 6, "text_dim": 64}


class PeakMemory(threading.Thread):
    """Highest anonymous memory of this process in bytes, above that at the start. Linux only."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.start_value, self.peak = threading.Event(), self.now(), 0

    @staticmethod
    def now() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now() - self.start_value)


def load_and_count(runtime: Runtime, file: Path) -> tuple[int, int]:
    """(bytes read, peak memory) of a rank that loads its shards."""
    read, count = TensorStore.read, []

    def counted(*arguments: Any) -> Tensor:
        tensor = read(*arguments)
        count.append(tensor.nbytes)
        return tensor

    TensorStore.read = counted  # type: ignore[method-assign]  # in this child process only
    with torch.device("meta"):
        module = WanModel(**SIZES)
    mesh = mesh_of(runtime, runtime.team.size)
    fully_shard(torch.nn.Linear(8, 8), mesh=mesh.shards)  # what its first call takes is code, not weights
    watch = PeakMemory()
    watch.start()
    load_sharded(module, Source(TensorStore.open(file), lambda _: torch.float32), mesh, CPU)
    watch.done.set()
    return sum(count), watch.peak


@sharded
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_rank_reads_and_keeps_its_share(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in WanModel(**SIZES).named_parameters()}
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    whole, largest = file.stat().st_size, 4 * max(shape.numel() for shape in shapes.values())
    found = run_ranks(load_and_count, 4, file)
    assert max(read for read, _ in found) <= 0.26 * whole
    assert sum(read for read, _ in found) == 4 * sum(shape.numel() for shape in shapes.values()), "each row once"
    assert max(peak for _, peak in found) <= 0.30 * whole + largest


def forward_after_a_failed_one(runtime: Runtime, place: str) -> list[Tensor]:
    """A rank fails in one block while the others go on to the next: they hold other blocks' gathered weights."""
    mesh = mesh_of(runtime, runtime.team.size)
    model = load_expert(torch.float32, mesh, split=True)

    def fail(*_: object) -> None:
        raise ValueError("no memory")

    if runtime.team.rank == 1:
        failing = model.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(ValueError, match="no memory"):
        mesh.team.all_or_none(lambda: tiny_forwards(model))
    if runtime.team.rank == 1:
        failing.remove()
    return tiny_forwards(model)


@sharded
@pytest.mark.parametrize("place", ["blocks.0.ffn", "head"])
def test_weights_that_a_failed_forward_left_gathered_are_let_go(place: str) -> None:
    want = tiny_forwards(load_expert(torch.float32, Mesh(), split=True))
    for found in run_ranks(forward_after_a_failed_one, 2, place, seconds=60):
        for x, y in zip(found, want, strict=True):
            assert relative_error(x, y) < 1e-5
