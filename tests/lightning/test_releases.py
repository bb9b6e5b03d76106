"""What is known of the published releases, and how their files are recognised."""

from pathlib import Path

import pytest

from lightning.errors import LoraError
from lightning.releases import A14B_SIZES, RELEASES, TI2V_SIZES, preset, recognise
from lightning.schedule import EulerSchedule

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
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors", "ti2v-fastwan"),
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
        assert release.solver == "euler"
        assert set(release.tasks) <= {"t2v-A14B", "i2v-A14B", "ti2v-5B"}
        assert release.boundary in {("t2v-A14B",): (0.875,), ("i2v-A14B",): (0.9,)}.get(release.tasks, (None,))
        assert release.sizes == (TI2V_SIZES if release.tasks == ("ti2v-5B",) else A14B_SIZES)
        for by_step in (release.lora_steps, release.guidance_steps, release.timesteps):
            assert by_step is None or len(by_step) == release.steps


def test_lightning_is_trained_at_the_schedules_timesteps() -> None:
    release = preset("t2v-seko-v1.1")
    assert (release.steps, release.shift, release.guidance) == (4, 5.0, (1.0, 1.0))
    trained = EulerSchedule.spaced(release.steps, release.shift).timesteps
    assert trained == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)


def test_motion_recipe() -> None:
    recipe = preset("Motion-8")
    assert recipe.lora_steps == (0, 1, 1, 1, 1, 1, 1, 1)
    assert recipe.guidance_steps == (3.5, 1, 1, 1, 1, 1, 1, 1)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(LoraError, match=r"no preset 'fast'; there are t2v-seko-v2\.0, .*motion-8"):
        preset("fast")
