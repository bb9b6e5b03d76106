"""Wan2.2 text-to-video: two 14B experts, the Wan2.1 VAE."""

from easydict import EasyDict

from wan.configs.shared_config import a14b_config

t2v_A14B = EasyDict(
    a14b_config,
    name="t2v-A14B",
    hub_id="Wan-AI/Wan2.2-T2V-A14B",
    boundary=0.875,
    sample_shift=12.0,
    sample_guide_scale=(3.0, 4.0),  # (low noise, high noise)
    example_prompt="A red fox trots along a snowy ridge at sunrise, its breath steaming, the camera gliding beside it.",
)
