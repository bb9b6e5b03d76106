"""Facts of the published releases, and how their files are recognised."""

import shutil
from pathlib import Path

import pytest

from lightning.releases import RELEASES, SIZES, preset, recognise
from tests.support import TINY, checkpoint, lora_dir
from wan.jobs.job import Generate
from wan.jobs.resolve import resolve
from wan.sampling import EulerSchedule, RenoisingSchedule, levels_at, spaced
from wan.utils.errors import InputError, LoraError

LIGHTNING = "Wan2.2-Lightning"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-V1/high_noise_model.safetensors", "t2v-v1"),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors", "t2v-seko-v1"),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors", "t2v-seko-v1.1"),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V2.0", "t2v-seko-v2.0"),
        (f"{LIGHTNING}/Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/high_noise_model.safetensors", "i2v-seko-v1"),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-250928", "t2v-250928"),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-250928-dyno/high_noise_model.safetensors", "t2v-250928-dyno"),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", "t2v-250928"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors", "t2v-seko-v1"),
        ("Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16.safetensors", "t2v-seko-v1.1"),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16.safetensors", "i2v-seko-v1"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "t2v-seko-v1.1"),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "i2v-seko-v1"),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", "i2v-distill-1022"),
        ("wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1030.safetensors", "i2v-distill-1030"),
        ("wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors", "t2v-distill-1217"),
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", "i2v-distill-model"),
        ("wan2.2_i2v_A14b_low_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors", "i2v-distill-model"),
        ("wan2.2_i2v_A14b_high_noise_int8_lightx2v_4step_1030.safetensors", "i2v-distill-model-1030"),
        ("wan2.2_i2v_A14b_low_noise_lightx2v_4step_720p_260412.safetensors", "i2v-distill-model-260412"),
        ("Wan2.2-I2V-A14B-Moe-Distill-Lightx2v/loras/high_noise_model.safetensors", "i2v-moe-distill-lora"),
        (
            "Wan2.2-I2V-A14B-Moe-Distill-Lightx2v/distill_models/high_noise_model/distill_model.safetensors",
            "i2v-moe-distill",
        ),
        ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "wan2.1-t2v-lightx2v"),
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors", "wan2.1-i2v-lightx2v"),
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors", "ti2v-fastwan-lora"),
        ("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "ti2v-fastwan"),
        ("TurboWan2.2-I2V-A14B-720P/TurboWan2.2-I2V-A14B-high-720P-quant.pth", "turbowan-i2v"),
        ("LoRAs/rCM/Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors", "rcm-lora"),
        ("lightx2v/LightWan2.2-A14B/t2v/high_noise_model.safetensors", "lightwan"),
        ("Wan2.2-NVFP4-Sparse/wan2.2_i2v_A14b_high_noise_nvfp4.safetensors", "nvfp4-sparse"),
        ("FastVideo/SFWan2.2-T2V-A14B-Preview-Diffusers", "sfwan"),
        ("FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers", "causalwan-i2v"),
        ("wan2.2_t2v_A14b_high_noise_lightx2v_4step.safetensors", "t2v-distill-model"),
        ("wan2.2_t2v_A14b_low_noise_scaled_fp8_e4m3_lightx2v_4step_1217.safetensors", "t2v-distill-model-1217"),
        ("wan2.2_t2v_A14b_low_noise_int8_lightx2v_4step.safetensors", "t2v-distill-model"),
        ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors", "wan2.1-t2v-distill"),
        ("wan2.1_i2v_14b_lora_rank64_lightx2v_4step.safetensors", "wan2.1-i2v-distill"),
        ("Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors", "ti2v-turbo-lora"),
        ("Wan2.2-TI2V-5B-Turbo/model.safetensors", "ti2v-turbo"),
        (
            f"{LIGHTNING}/Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/wan2.2_i2v_A14b_high_noise_lora_1022.safetensors",
            "i2v-distill-1022",
        ),
        (f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.2/high_noise_model.safetensors", None),
        ("my_style.safetensors", None),
        ("Wan2.2-T2V-A14B/high_noise_model", None),
        ("Wan2.2-TI2V-5B", None),
    ],
)
def test_recognise(path: str, name: str | None) -> None:
    found = recognise(Path("models") / path)
    assert (found.name if found else None) == name


def test_a_folder_reached_as_the_current_one_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert recognise(Path("."))
    assert recognise(Path("high_noise_model.safetensors"))


def test_settings_are_complete_and_sane() -> None:
    assert len({release.name for release in RELEASES}) == len(RELEASES)
    for release in RELEASES:
        assert release.name == release.name.lower()
        assert release.solver in ("euler", "dmd")
        assert release.kind in ("lora", "full", "recipe")
        assert not (release.refused and release.kind != "full")
        assert set(release.tasks) <= {"t2v-A14B", "i2v-A14B", "ti2v-5B"}
        if not release.source.startswith("examples/"):
            assert release.sizes == SIZES[release.tasks[0]]
        for by_step in (release.lora_steps, release.guidance_steps, release.timesteps):
            assert by_step is None or len(by_step) == release.steps


def test_lightning_is_trained_at_the_schedules_timesteps() -> None:
    release = preset("t2v-seko-v1.1")
    assert (release.steps, release.shift, release.guidance) == (4, 5.0, (1.0, 1.0))
    trained = EulerSchedule(spaced(release.steps, release.shift)).timesteps
    assert trained == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "timesteps"),
    [
        ("ti2v-fastwan", "full", (1000.0, 757.0, 522.0)),
        ("ti2v-fastwan-lora", "lora", (1000.0, 757.0, 522.0)),
        ("ti2v-turbo", "full", (1000.0, 750.0, 500.0, 250.0)),
        ("ti2v-turbo-lora", "lora", (1000.0, 750.0, 500.0, 250.0)),
        ("rcm-lora", "lora", (987.654, 933.784, 852.895, 608.98)),
    ],
)
def test_releases_that_are_sampled_with_fresh_noise(name: str, kind: str, timesteps: tuple[float, ...]) -> None:
    release = preset(name)
    levels = levels_at(release.timesteps) if release.timesteps else spaced(release.steps, release.shift)
    assert (release.solver, release.kind, release.guidance) == ("dmd", kind, (1.0, 1.0))
    assert RenoisingSchedule(levels, None).timesteps == pytest.approx(timesteps, abs=1e-2)
    assert ("NC" in release.licence) == ("turbo" in name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TurboWan2.2-I2V-A14B-high-720P.pth", "sparse linear attention"),
        ("Wan2.2-NVFP4-Sparse/high_noise.safetensors", "packed 4-bit"),
        ("LightWan2.2-A14B/high_noise.safetensors", "packed 4-bit"),
        ("CausalWan2.2-I2V-A14B-Preview-Diffusers/high_noise.safetensors", "causal variant"),
        ("SFWan2.2-T2V-A14B/high_noise.safetensors", "causal variant"),
    ],
)
def test_unsupported_releases_are_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    found = recognise(path)
    assert found is not None
    assert reason in found.refused
    task = "i2v-A14B" if "I2V" in name else "t2v-A14B"
    folder = path.parent if path.parent != tmp_path else path
    folder.mkdir()
    given = {"task": task, "ckpt_dir": str(folder), "prompt": "x", "image": str(TINY / "input.png")}
    with pytest.raises(InputError, match=reason):
        resolve(given)


def resolved(folder: Path, **flags: str) -> Generate:
    outcome = resolve({"task": "ti2v-5B", "ckpt_dir": str(folder), "prompt": "x", **flags})
    assert isinstance(outcome, Generate)
    return outcome


def test_settings_of_a_checkpoint_named_after_a_release(tmp_path: Path) -> None:
    folder, turbo = tmp_path / "FastWan2.2-TI2V-5B-FullAttn-Diffusers", tmp_path / "Wan2.2-TI2V-5B-Turbo"
    for link in (folder, turbo):
        link.symlink_to(checkpoint("ti2v-5B"))
    made = resolved(folder)
    assert made.weights.release is not None
    found = made.weights.release.name, made.sampling.solver, made.sampling.timesteps
    assert found == (
        "ti2v-fastwan",
        "dmd",
        (1000.0, 757.0, 522.0),
    )
    made = resolved(turbo)
    assert (made.sampling.solver, made.sampling.steps, made.sampling.shift) == ("dmd", 4, 1.0)
    assert any("CC BY-NC-SA 4.0, not for commercial use" in warning for warning in made.warnings)
    euler = resolved(folder, sample_solver="euler").sampling
    assert (euler.solver, euler.steps, euler.timesteps) == ("euler", 3, None)
    explicit = resolved(folder, timesteps="1000,500").sampling
    assert (explicit.solver, explicit.timesteps) == ("dmd", (1000.0, 500.0))


def test_motion_recipe() -> None:
    recipe = preset("Motion-8")
    assert recipe.lora_steps == (0, 1, 1, 1, 1, 1, 1, 1)
    assert recipe.guidance_steps == (3.5, 1, 1, 1, 1, 1, 1, 1)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(LoraError, match=r"no preset 'fast'; there are .*t2v-seko-v2\.0, .*motion-8"):
        preset("fast")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("LongLive-Plug-Wan2.2-TI2V-5B-few-step/adapter_model.safetensors", "ti2v-longlive-few-step"),
        ("LongLive-Plug-Wan2.2-TI2V-5B-cfg/adapter_model.safetensors", "ti2v-longlive-cfg"),
        ("longlive-stepdistill-blocksize-loras/block8_single.pt", "ti2v-longlive-block8"),
        ("longlive-stepdistill-blocksize-loras/block3_causal.pt", "longlive-blocks"),
        ("LongLive-2.0-5B/model.safetensors", "longlive-2"),
        ("LongLive2.0-Robot-Arm/model.safetensors", "longlive-2"),
        ("FastMetal-5B-QAD/weights.safetensors", "fastmetal"),
        ("AAD-1-self-forcing-loras/lora.safetensors", "aad-1"),
        ("Wan2_2-T2V-A14B-HIGH_nvfp4.safetensors", "nvfp4-sparse"),
        ("Wan2.2_I2V_LightX2V_2Step/wan_high_noise.safetensors", "i2v-lightx2v-2step"),
        ("wan22EnhancedLightning_v2I2VHIGHfp8.safetensors", "i2v-enhanced-lightning"),
        ("wan2.2-rapid-mega-aio-v12.safetensors", "rapid-aio"),
        ("WAN2.2-14B-Rapid-AllInOne/v10/wan2.2-i2v-rapid-aio-v10.safetensors", "rapid-aio"),
        ("Wan2.2_Remix_i2v_14b_high_lighting_v2.0.safetensors", "remix"),
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", "i2v-distill-model"),
    ],
)
def test_later_releases(path: str, name: str, tmp_path: Path) -> None:
    release = recognise(tmp_path / path)
    assert release is not None
    assert release.name == name
    causal = name in ("longlive-blocks", "longlive-2", "aad-1")
    assert bool(release.refused) == (causal or name in ("fastmetal", "nvfp4-sparse"))
    assert (release.steps, release.guidance) == (4, (1.0, 1.0))


def outcome_of(name: str, tmp_path: Path, **more: object) -> Generate:
    folder = tmp_path / name
    shutil.copytree(lora_dir("ti2v-5B"), folder)
    file = (folder / "diffusion_pytorch_model.safetensors").rename(folder / f"{name}.safetensors")
    asked = {"task": "ti2v-5B", "ckpt_dir": str(checkpoint("ti2v-5B")), "prompt": "a cat", "lora": (str(file),)}
    made = resolve({**asked, **more})
    assert isinstance(made, Generate)
    return made


@pytest.mark.parametrize(
    ("name", "flags", "part"),
    [
        ("SVI_v2_PRO_Wan2.2-I2V-A14B_lora", {}, "SVI 2 Pro"),
        ("ShotPlan_T2V", {}, "ShotPlan"),
        ("LongLive-Plug-Wan2.2-TI2V-5B-few-step", {}, "--sample_steps"),
        ("FastWan2.2-TI2V-5B-lora", {"image": str(TINY / "input.png")}, "without images"),
    ],
)
def test_warnings_by_name(name: str, flags: dict, part: str, tmp_path: Path) -> None:
    assert any(part in warning for warning in outcome_of(name, tmp_path, **flags).warnings)


def test_fastwan_without_an_image_warns_of_none(tmp_path: Path) -> None:
    warnings = outcome_of("FastWan2.2-TI2V-5B-lora", tmp_path).warnings
    assert not any("trained without images" in warning for warning in warnings)


def test_a_causal_lora_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aad-1 .*causal variant"):
        outcome_of("AAD-1-self-forcing-lora", tmp_path)


def test_the_preset_for_first_and_last_images() -> None:
    release = preset("FLF2V-16")
    assert (release.kind, release.steps, release.shift, release.tasks) == ("recipe", 4, 16.0, ("i2v-A14B",))


@pytest.mark.parametrize(
    ("name", "near"), [("t2v-seko", "t2v-seko-v"), ("motion8", "motion-8"), ("ti2v-fastwam", "ti2v-fastwan")]
)
def test_a_mistyped_preset_gets_the_nearest_suggested(name: str, near: str) -> None:
    with pytest.raises(LoraError, match=f"did you mean {near}"):
        preset(name)
