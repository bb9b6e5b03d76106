"""LoRA files for the tests: every published family, made from a small LoRA; and header-only full-size files."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning.lora import Lora
from lightning.merge import Merge
from tests.support import checkpoint, lora_dir
from wan.checkpoints.key_mapping import diffusers_name
from wan.checkpoints.safetensors_file import TensorStore

INDEX = "diffusion_pytorch_model.safetensors.index.json"
Pairs = dict[str, tuple[Tensor, Tensor]]  # module -> up, down
ALPHA = 2.0  # of the small LoRAs, whose rank is 4


def base(task: str = "t2v-A14B", expert: str = "high_noise_model") -> TensorStore:
    return TensorStore.open(checkpoint(task) / expert / INDEX)


@cache
def small_pairs(expert: str = "high_noise_model") -> Pairs:
    """One half of the small T2V LoRA, without its alphas."""
    tensors = load_file(lora_dir("t2v-A14B") / f"{expert}.safetensors")
    modules = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    return {
        module.removeprefix("diffusion_model."): (
            tensors[f"{module}.lora_up.weight"],
            tensors[f"{module}.lora_down.weight"],
        )
        for module in modules
    }


def plain(weight: Tensor, up: Tensor, down: Tensor, factor: float) -> Tensor:
    """The merge as the formula says it, with fresh float32 tensors."""
    return weight.float() + factor * (up.float() @ down.float())


def merged(lora: Lora | list[Lora], store: TensorStore | None = None) -> dict[str, Tensor]:
    """Every parameter that the LoRAs touch, merged."""
    store = store or base()
    merge = Merge(lora if isinstance(lora, list) else [lora], store.shapes)
    return {name: merge(name, store.read(name)).clone() for name in store if merge.touches(name)}


def diffusers_module(module: str) -> str:
    return diffusers_name(f"{module}.weight").removesuffix(".weight")


def spelled(
    pairs: Pairs,
    form: str,
    *,
    halves: tuple[str, str] = ("lora_up.weight", "lora_down.weight"),
    alpha: Tensor | None = None,
    module: Callable[[str], str] = lambda name: name,
) -> dict[str, Tensor]:
    """LoRA tensors under other names. form: `{}` is the module; without alpha it is folded into up."""
    tensors = {}
    for name, (up, down) in pairs.items():
        stem = form.format(module(name))
        factor = 1.0 if alpha is not None else ALPHA / down.shape[0]
        tensors[f"{stem}{halves[0]}"] = up if factor == 1.0 else up * factor
        tensors[f"{stem}{halves[1]}"] = down.clone()
        if alpha is not None:
            tensors[f"{stem.rstrip('.')}.alpha"] = alpha.clone()
    return tensors


def kohya(module: str) -> str:
    return module.replace(".", "_")


AB = ("lora_B.weight", "lora_A.weight")
NAMED_AB = ("lora_B.default.weight", "lora_A.default.weight")
STORED = torch.tensor(ALPHA)
# family -> (form, other arguments of `spelled`)
FAMILIES: dict[str, tuple[str, dict]] = {
    "lightning": ("diffusion_model.{}.", {"alpha": torch.tensor(2, dtype=torch.int64)}),
    "lightning float64 alpha": ("diffusion_model.{}.", {"alpha": torch.tensor(2.0, dtype=torch.float64)}),
    "lightning bf16 alpha": ("diffusion_model.{}.", {"alpha": torch.tensor([2.0], dtype=torch.bfloat16)}),
    "lightning unprefixed": ("{}.", {"alpha": torch.tensor(2.0, dtype=torch.float16)}),
    "comfy": ("model.diffusion_model.{}.", {"alpha": STORED}),
    "x2v, alpha folded": ("diffusion_model.{}.", {}),
    "kohya": ("lora_unet_{}.", {"alpha": STORED, "module": kohya}),
    "kohya, two underscores": ("lora_unet__{}.", {"alpha": STORED, "module": kohya}),
    "kohya, diffusers names": ("lora_unet_{}.", {"alpha": STORED, "module": lambda m: kohya(diffusers_module(m))}),
    "diffusers": ("transformer.{}.", {"halves": AB, "module": diffusers_module}),
    "diffusers, low half only": ("transformer_2.{}.", {"halves": AB, "module": diffusers_module}),
    "peft": ("base_model.model.{}.", {"halves": AB}),
    "peft, adapter name, diffusers names": ("base_model.model.{}.", {"halves": NAMED_AB, "module": diffusers_module}),
    "diffsynth": ("{}.", {"halves": NAMED_AB}),
    "_lora.up": ("diffusion_model.{}", {"halves": ("_lora.up.weight", "_lora.down.weight"), "alpha": STORED}),
    ".lora.up": ("unet.{}", {"halves": (".lora.up.weight", ".lora.down.weight")}),
    "lora_linear_layer": ("{}.", {"halves": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight")}),
    "bare A and B": ("diffusion_model.{}.", {"halves": ("lora_B", "lora_A")}),
}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def family(name: str, folder: Path, expert: str = "high_noise_model") -> Path:
    """The small LoRA as a file of this family."""
    form, arguments = FAMILIES[name]
    return write(folder / "lora.safetensors", spelled(small_pairs(expert), form, **arguments))


def lora_of(folder: Path, tensors: dict[str, Tensor], strength: float = 1.0) -> Lora:
    return Lora.open(write(folder / "lora.safetensors", tensors), strength)


def module_tree(store: TensorStore) -> nn.Module:
    """A model with the parameters of `store` and no forward: linear layers where weights have two axes."""
    root = nn.Module()
    for name in store:
        *path, leaf = name.split(".")
        here = root
        for part in path:
            if not hasattr(here, part):
                here.add_module(part, nn.Module())
            here = getattr(here, part)
        here.register_parameter(leaf, nn.Parameter(store.read(name), requires_grad=False))
    for name, module in list(root.named_modules()):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2:
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = weight, module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, linear)
    return root
