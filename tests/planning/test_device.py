"""`--device` explains in a line why a GPU cannot be used; `--vram` limits the memory of one."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from tests.cli.test_command_line import SMALL, T2V
from tests.support import checkpoint
from wan.distributed.launch import Runtime
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.planning import build
from wan.planning.build import compute_device, limit_memory, precision_problems
from wan.planning.report import Outlook
from wan.utils.accelerator import Accelerator
from wan.utils.errors import InputError

NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"
NO_GPU = "No CUDA GPUs are available"
CPU_BUILD = "Torch not compiled with CUDA enabled"
UNKNOWN = "CUDA unknown error - this may be due to an incorrectly set up environment"
GPU = torch.device("cuda", 0)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch refuses CUDA with these words; whether there is NVIDIA's file of a driver."""

    def refuse(words: str, driver: bool = False) -> None:
        def raising() -> NoReturn:
            raise AssertionError(words) if words == CPU_BUILD else RuntimeError(words)

        def available() -> bool:
            warnings.warn(f"CUDA initialization: {words}", stacklevel=2)
            return False

        monkeypatch.setattr(torch.cuda, "is_available", available)
        monkeypatch.setattr(torch.cuda, "init", raising)
        monkeypatch.setattr(Path, "exists", lambda path: driver and str(path) == "/proc/driver/nvidia/version")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return refuse


def refusal(name: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's warning beside the sentence would say it twice
        with pytest.raises(InputError) as error:
            compute_device(name)
    return str(error.value)


@pytest.mark.parametrize("words", [NO_DRIVER, NO_GPU, CPU_BUILD])
def test_where_nothing_is_there_auto_is_the_cpu(words: str, refusing: Any) -> None:
    refusing(words)
    assert compute_device("auto") == torch.device("cpu")
    assert refusal("cuda") == f"--device cuda: there is no such device here ({words}); usable: auto, cpu"


@pytest.mark.parametrize(("words", "driver"), [(TOO_OLD, False), (UNKNOWN, False), (CPU_BUILD, True), (NO_GPU, True)])
def test_a_gpu_that_pytorch_cannot_use_is_not_passed_over(words: str, driver: bool, refusing: Any) -> None:
    """Not even where there is no file of the driver (WSL) and only PyTorch's words tell of it."""
    refusing(words, driver)
    said = refusal("auto")
    assert said.startswith("this machine has an NVIDIA driver, but PyTorch cannot use a GPU: ")
    assert said.endswith("or give --device cpu (slow)")
    assert compute_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: all CUDA-capable devices are busy"])
def test_a_gpu_too_full_for_a_context_is_one_line(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise RuntimeError(f"{words}\nCUDA kernel errors might be asynchronously reported")

    for name, answer in (("is_available", True), ("device_count", 1), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", full)
    assert refusal("cuda").startswith(f"--device cuda: the GPU cannot be used: {words}; ")


class FakeGpu:
    """A GPU as PyTorch's functions describe it. settings: what the allocator was set to, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 9)) -> None:
        self.settings: list[str] = []
        self.empty, self.zeros = torch.empty, torch.zeros
        self.patch = monkeypatch
        answers: dict[str, Any] = {
            "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
            "mem_get_info": (int(8e9), int(8e9)), "get_device_capability": capability, "get_device_name": "Card 7",
            "get_arch_list": ["sm_80", "sm_90"],
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", self.settings.append, raising=False)
        self.refuse({})
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)

    def refuse(self, words: dict[str, str]) -> None:
        """Let torch.empty or torch.zeros on the GPU fail with these words."""
        for name, make in (("empty", self.empty), ("zeros", self.zeros)):

            def made(*size: int, device: Any = None, name: str = name, make: Any = make, **more: Any) -> torch.Tensor:
                if torch.device(device or "cpu").type == "cuda" and name in words:
                    raise RuntimeError(words[name])
                return make(*size, **more)

            self.patch.setattr(torch, name, made)


def test_segments_grow_where_a_first_allocation_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual GPUs refuse them, WSL is never asked, and a setting of the user stays."""
    gpu, grow = FakeGpu(monkeypatch), "expandable_segments:True"
    compute_device("cuda")
    assert gpu.settings == [grow]
    gpu.refuse({"empty": "CUDA driver error: operation not supported"})
    compute_device("cuda")
    assert gpu.settings[1:] == [grow, "expandable_segments:False"]
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p: "6.6-microsoft-WSL2" if p.name == "osrelease" else read(p))
    compute_device("cuda")
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    compute_device("cuda")
    assert len(gpu.settings) == 3


def test_an_error_of_the_allocator_names_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    gpu.refuse({"zeros": "CUDA driver error: operation not supported\nmore"})
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in refusal("cuda")


def test_a_gpu_on_which_nothing_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, capability=(7, 0))
    gpu.refuse({"zeros": "CUDA error: no kernel image is available for execution on the device\nSearch for it"})
    said = refusal("cuda")
    for part in ("--device cuda", "Card 7", "7.0", torch.__version__, "sm_80, sm_90"):
        assert part in said
    gpu.refuse({"zeros": "CUDA error: an illegal memory access was encountered\nmore"})
    assert "--device cuda: the GPU cannot be used: CUDA error: an illegal memory access" in refusal("auto")


def test_bf16_below_capability_8_is_refused_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, capability=(7, 5))
    (problem,) = precision_problems(GPU, torch.bfloat16, "fp32")
    assert "--dtype fp32" in problem
    for device, dtype in ((GPU, torch.float32), (torch.device("cpu"), torch.bfloat16)):
        assert precision_problems(device, dtype, "fp32") == []
    FakeGpu(monkeypatch, capability=(8, 0))
    assert precision_problems(GPU, torch.bfloat16, "fp32") == []


def test_a_limit_ends_with_the_plan_that_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit is the process's: a second pipeline without `vram` must not fail by the first one's."""
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: limits.append(fraction))
    monkeypatch.setattr(Accelerator, "free_bytes", int(70e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(80e9)))
    assert (limit_memory(GPU, 8.0), limits[-1]) == (int(8e9), 0.1)
    assert (limit_memory(GPU, None), limits[-1]) == (int(70e9), 1.0)
    assert (limit_memory(GPU, 75.0), limits[-1]) == (int(70e9), 1.0)


def test_auto_says_that_it_leaves_mps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = [word.removeprefix("--") for word in (*T2V, *SMALL)]
    request = dict(zip(words[::2], words[1::2], strict=True)) | {"frame_num": 5, "dry_run": True, "device": "auto"}
    plan = build.make_plan(resolve(request), Runtime())
    assert plan.device.type == "cpu"
    assert [warning for warning in plan.warnings if "--device mps" in warning]
    asked = build.make_plan(resolve(request | {"device": "cpu"}), Runtime())
    assert not [warning for warning in asked.warnings if "mps" in warning]


def test_mps_computes_in_the_memory_of_the_host() -> None:
    """The whole run counts there, not only what a GPU's run holds on the host."""
    words = [word.removeprefix("--") for word in (*T2V, *SMALL)]
    request = dict(zip(words[::2], words[1::2], strict=True)) | {"frame_num": 5, "dry_run": True}
    needed = []
    for device in ("cpu", "mps"):
        plan = replace(build.make_plan(resolve(request), Runtime()), device=torch.device(device), dtype=torch.float32)
        needed.append(Outlook(plan).host_needed)
    assert needed[0] == needed[1] is not None
    assert Accelerator(torch.device("mps")).free_bytes > 0


def test_bf16_decoding_without_cudnn_is_refused_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    (problem,) = precision_problems(GPU, torch.bfloat16, "bf16")
    assert "--vae_dtype bf16" in problem
    for device, vae_dtype in ((GPU, "fp32"), (torch.device("cpu"), "bf16")):
        assert precision_problems(device, torch.bfloat16, vae_dtype) == []
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert precision_problems(GPU, torch.bfloat16, "bf16") == []


@pytest.mark.parametrize(
    ("flags", "text", "noise"),
    [
        ({}, "meta", "meta"),
        ({"t5_cpu": True}, "cpu", "meta"),
        ({"noise_device": "cpu"}, "meta", "cpu"),
    ],
)
def test_prompts_and_noise_are_made_where_it_is_asked(
    flags: dict[str, Any], text: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compute_device", lambda _: torch.device("meta"))
    given = {"task": "t2v-A14B", "ckpt_dir": str(checkpoint("t2v-A14B")), "prompt": "a cat", "size": "64*64"}
    outcome = resolve({**given, "frame_num": 5, **flags})
    assert isinstance(outcome, Generate)
    plan = build.make_plan(outcome, Runtime())
    assert (plan.device.type, plan.text_device.type, plan.noise_device.type) == ("meta", text, noise)
