"""Write a checkpoint with its LoRAs merged in, in the released layout or in diffusers'.

Every tensor is stored as a run keeps it (bf16, float32 for a few, 8 bits as with `--quantize`), so that running the
baked folder equals merging on the fly, tensor for tensor. `OUT.partial` becomes `OUT` by one rename at the end: a
stopped run leaves nothing under that name, and the next one finishes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning.lora import Lora, check
from lightning.merge import Merge
from lightning.releases import RECORD, SETTINGS, Release, record_of, refuse_distilled_twice, release_in
from wan.checkpoints import layout as layouts
from wan.checkpoints.checkpoint import transformer_sizes
from wan.checkpoints.key_mapping import diffusers_name, text_name, vae_name
from wan.checkpoints.quantised_formats import FLOATS
from wan.checkpoints.safetensors_file import DTYPES, TensorStore, fingerprint
from wan.checkpoints.weights import TEXT_ENCODER, VAE, open_parts
from wan.checkpoints.writer import NetworkToWrite, plan_shards, sha256, write_index, write_json, write_shard
from wan.configs import TASKS, TaskConfig, task_of
from wan.configs.precision import keeps_float32, takes_8_bits
from wan.configs.vae_statistics import LATENT_MEAN, LATENT_STD
from wan.modules.quantised_linear import EIGHT_BITS
from wan.modules.t5 import UMT5Encoder
from wan.modules.vae import WanVAE
from wan.utils.errors import InputError, LoraError
from wan.utils.files import LockedElsewhere, locked, parse_json

NAMED_BY = {VAE: vae_name, TEXT_ENCODER: text_name}  # diffusers' names of the networks beside the experts


@dataclass(frozen=True, kw_only=True)
class Bake:
    """A checkpoint to write: that of `task` in `ckpt_dir` with `loras` (by expert) merged in, as the folder `out`.
    release: the settings that the result is sampled with, kept in its record; by default those of `ckpt_dir`'s own.
    layout: "released", or "diffusers", which is also written without LoRAs."""

    task: str
    ckpt_dir: Path
    loras: Mapping[str, Sequence[Lora]]
    out: Path
    dtype: torch.dtype = torch.bfloat16
    allow_partial: bool = False
    release: Release | None = None
    layout: str = "released"
    shard_bytes: int = 10_000_000_000
    report: Callable[[str], None] = print

    def write(self) -> None:
        """Write the folder. Everything is checked before: one InputError with all faults."""
        self._check_request()
        out, config, ckpt_dir, to_diffusers = self.out, TASKS[self.task], self.ckpt_dir, self.layout == "diffusers"
        places, parts = layouts.places_in(ckpt_dir, config), list(config.experts)
        if to_diffusers:
            layouts.check_complete(ckpt_dir, config)
            parts += [TEXT_ENCODER, VAE]
        stores = open_parts(ckpt_dir, config, parts)
        if lacking := [places[part] for part in parts if part not in stores]:
            raise LoraError(f"--ckpt_dir {ckpt_dir} lacks {', '.join(lacking)}")
        sources = self._sources({name: stores[name] for name in config.experts})
        release = self.release or release_in(ckpt_dir)
        sources["release"] = release and {name: getattr(release, name) for name in SETTINGS}
        settings = _diffusers_settings(stores, ckpt_dir, config, release) if to_diffusers else {}
        if to_diffusers and release and release.solver == "dmd":
            why = "is made for re-noising (dmd); generate.py does it, diffusers does not"
            self.report(f"warning: {release.name} {why}")
        networks = [self._network(part, store) for part, store in stores.items()]
        try:
            with locked(out, self.report):
                self._check_request()  # another bake may have written it meanwhile
                partial = _prepare(out, sources)
                digests = self._write_weights(networks, partial)
                if to_diffusers:
                    tokenizer = (ckpt_dir / places["tokenizer"]).parent
                    shutil.copytree(tokenizer, partial / "tokenizer", dirs_exist_ok=True)
                else:
                    _bring_others(ckpt_dir, partial, config)
                for place, content in settings.items():
                    write_json(partial / place, content)
                write_json(partial / RECORD, {**sources, "shards": digests})
                os.replace(partial, out)
        except LockedElsewhere:
            raise LoraError(f"--out {out}: another bake is writing it; wait, or give another name") from None
        self.report(f"baked: {out}")

    def _check_request(self) -> None:
        """LoraError for a request that cannot be met, whatever the files hold."""
        ckpt_dir, out, to_diffusers = self.ckpt_dir, self.out, self.layout == "diffusers"
        in_8_bits = self.dtype in EIGHT_BITS
        if not ckpt_dir.is_dir():
            raise LoraError(f"--ckpt_dir {ckpt_dir}: no such folder")
        if out.exists():
            raise LoraError(f"--out {out} already exists; give another name or remove it")
        if ckpt_dir.resolve() in out.resolve().parents:
            raise LoraError(f"--out {out} is inside --ckpt_dir {ckpt_dir}; give a folder outside")
        if to_diffusers and in_8_bits:
            raise LoraError("--dtype: diffusers reads no 8 bits with a scale per row; use --layout released, or bf16")
        if not to_diffusers and layouts.is_diffusers(ckpt_dir):
            raise LoraError(f"--ckpt_dir {ckpt_dir} is in diffusers' layout: add --layout diffusers")
        if not (to_diffusers or in_8_bits or any(self.loras.values())):
            raise LoraError("nothing to bake: give --lora_dir or --lora")

    def _sources(self, experts: Mapping[str, TensorStore]) -> dict[str, Any]:
        """The sources of the result, for its record. LoraError with everything that does not fit."""
        problems: list[str] = []
        before, dtype = record_of(self.ckpt_dir) or {"loras": {}}, str(self.dtype).removeprefix("torch.")
        sources: dict[str, Any] = {"task": self.task, "dtype": dtype, "base": {}, "loras": {}, "layout": self.layout}
        for expert, store in experts.items():
            if (found := task_of(store.shapes)) not in (None, self.task):
                raise LoraError(f"--task {self.task}: the checkpoint in {self.ckpt_dir} is one of {found}")
            if odd := next((name for name in store if store[name].dtype not in FLOATS), None):
                problems.append(f"--ckpt_dir: {store[odd].file}: tensor {odd} is {store[odd].dtype}, not a float")
            sources["base"][expert] = {file.name: fingerprint(file) for file in store.files}
            sources["loras"][expert] = merged = list(before["loras"].get(expert, ()))
            for lora in self.loras.get(expert, ()):
                file = lora.store.files[0]
                try:
                    if not self.allow_partial:
                        refuse_distilled_twice(self.ckpt_dir, file, expert)
                    coverage = check(lora, store.shapes, allow_partial=self.allow_partial)
                except LoraError as e:
                    problems += [problem for problem in e.problems if problem not in problems]
                    continue
                for line in (
                    f"{expert}: {lora.path}: {coverage.summary()}",
                    *(f"warning: {each}" for each in coverage.warnings),
                ):
                    self.report(line)
                identity = {"fingerprint": fingerprint(file), "sha256": {file.name: sha256(file)}}
                merged.append(asdict(coverage) | identity)
        if problems:
            raise LoraError(problems)
        return sources

    def _network(self, part: str, store: TensorStore) -> NetworkToWrite:
        to_diffusers = self.layout == "diffusers"
        place = Path((layouts.diffusers if to_diffusers else layouts.released)(TASKS[self.task])[part])
        blocks = len({name.split(".")[1] for name in store if name.startswith("blocks.")})

        def stored(name: str) -> torch.dtype:
            if part in NAMED_BY:
                return getattr(torch, DTYPES[store[name].dtype][0])
            if keeps_float32(name):
                return torch.float32
            return self.dtype if self.dtype not in EIGHT_BITS or takes_8_bits(name, blocks) else torch.bfloat16

        rename = NAMED_BY.get(part) or (diffusers_name if to_diffusers else str)
        merge = Merge(self.loras.get(part, ()), store.shapes)  # of another part: changes nothing
        return NetworkToWrite(part, store, place.parent, stored, place.stem, rename, merge)

    def _write_weights(self, networks: Sequence[NetworkToWrite], partial: Path) -> dict[str, str]:
        """Write all weights into `partial`; the sha256 by place. LoraError if the disk is too full."""
        plans = [(network, plan_shards(network, self.shard_bytes)) for network in networks]
        needed = sum(shard.bytes for _, plan in plans for shard in plan if not (partial / shard.file).exists())
        if needed > (free := shutil.disk_usage(partial).free):
            has = f"the disk of {partial.parent} has {free / 1e9:.1f} GB free"
            raise LoraError(f"--out needs {needed / 1e9:.1f} GB, {has}")
        digests = {}
        for network, plan in plans:
            for shard in plan:
                self.report(f"{network.name}: {shard.file} ({shard.bytes / 1e9:.2f} GB)")
                digests[str(shard.file)] = write_shard(partial / shard.file, shard, network)
            write_index(partial, network, plan)
        return digests


def _prepare(out: Path, sources: dict[str, Any]) -> Path:
    """`OUT.partial`, empty or left by an earlier run of the same command; LoraError for another one's."""
    partial = out.with_name(out.name + ".partial")
    record = json.loads(json.dumps(sources))
    if partial.exists() and any(partial.iterdir()):
        before = None
        with suppress(OSError, ValueError, TypeError):  # no file, not JSON, or no object
            before = {**parse_json((partial / RECORD).read_bytes())}
            before.pop("shards", None)  # of a run that was stopped before the last rename
        if before != record:
            raise LoraError(f"{partial} is not from this command; remove it and run again")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / RECORD, sources)
    for rest in partial.rglob(".*.part"):
        rest.unlink()
    return partial


def _bring_others(ckpt_dir: Path, partial: Path, config: TaskConfig) -> None:
    """Everything of the checkpoint except the experts' weights: hard links where the disk allows, else copies."""
    experts = {ckpt_dir / where for where in config.experts.values()}
    for file in sorted(ckpt_dir.rglob("*")):
        inside = file.relative_to(ckpt_dir)
        is_weights = file.parent in experts and file.name.startswith(layouts.STEM)
        if is_weights or inside == Path(RECORD) or not file.is_file() or any(p.startswith(".") for p in inside.parts):
            continue
        target = partial / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a stopped run may have copied half of it
        try:
            os.link(file.resolve(), target)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(file, target)


def _diffusers_settings(
    stores: Mapping[str, TensorStore], ckpt_dir: Path, config: TaskConfig, release: Release | None
) -> dict[str, dict[str, Any]]:
    """Every JSON file of diffusers' layout by its place, except the tokenizer's. InputError for unknown sizes.
    stores: the networks by part, under our names. release: gives the scheduler its solver and shift."""
    places, sources = layouts.diffusers(config), layouts.places_in(ckpt_dir, config)
    transformer, none = ["diffusers", "WanTransformer3DModel"], [None, None]
    index: dict[str, Any] = {  # library and class of each folder; the tokenizer's class reads tokenizer.json as it is
        "_class_name": config.pipeline, "boundary_ratio": config.boundary,
        "expand_timesteps": bool(config.image_fit and not config.mask_channels),  # the first frame's own timestep is 0
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": transformer, "transformer_2": transformer if config.boundary else none,
        "vae": ["diffusers", "AutoencoderKLWan"],
        **({"image_encoder": none, "image_processor": none} if config.mask_channels else {}),
    }  # fmt: skip
    # UniPC, as in diffusers' own folders; with one order and no corrector it is the Euler step of distilled models.
    # Its grid of levels ends at 0.001 before the shift where ours ends at 0: the levels differ by 1e-3 at most.
    scheduler: dict[str, Any] = {
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": release.shift if release else config.sample_shift,
        **({"solver_order": 1, "disable_corrector": list(range(release.steps))} if release else {}),
    }  # fmt: skip
    found = {layouts.MODEL_INDEX: index, "scheduler/scheduler_config.json": scheduler}
    for part, store in stores.items():
        file = ckpt_dir / sources[part]
        try:
            if part in NAMED_BY:
                settings = (_vae_config if part == VAE else _text_config)(store.shapes)
            else:
                config_file = ckpt_dir / layouts.config_json(sources[part])
                sizes = transformer_sizes(config_file, store.shapes, str(file.parent), config.text_len)
                settings = _transformer_config(sizes, store.shapes)
        except ValueError as e:
            raise InputError(f"--ckpt_dir: {file}: {e}") from e
        found[layouts.config_json(places[part])] = settings
    return found


def _transformer_config(sizes: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(shapes["patch_embedding.weight"][2:]),
        "num_attention_heads": sizes["num_heads"], "attention_head_dim": sizes["dim"] // sizes["num_heads"],
        "in_channels": sizes["in_dim"], "out_channels": sizes["out_dim"],
        "text_dim": shapes["text_embedding.0.weight"][1],
        **{name: sizes[name] for name in ("freq_dim", "ffn_dim", "num_layers")},
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": sizes["eps"],
        "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    with torch.device("meta"):
        vae = WanVAE.from_shapes(shapes)
    channels = 3 * vae.patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": shapes["encoder.conv1.weight"][0], "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": vae.z_dim,
        "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
        "temperal_downsample": [False, True, True], "dropout": 0.0,
        "latents_mean": LATENT_MEAN[vae.z_dim], "latents_std": LATENT_STD[vae.z_dim],
        "is_residual": vae.patch == 2,
        "in_channels": channels, "out_channels": channels,
        "patch_size": vae.patch if vae.patch > 1 else None,
        "scale_factor_temporal": vae.stride[0], "scale_factor_spatial": vae.stride[1],
    }  # fmt: skip


def _text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    with torch.device("meta"):
        encoder = UMT5Encoder.from_shapes(shapes)
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocabulary, width = shapes["token_embedding.weight"]
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5",
        "vocab_size": vocabulary, "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads, "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": len(encoder.blocks), "num_heads": heads,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
        "dropout_rate": 0.0, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False, "use_cache": False, "tie_word_embeddings": False,
        "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
