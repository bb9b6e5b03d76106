"""Wan2.2 text-to-video: two 14B experts, the Wan2.1 VAE."""

from easydict import EasyDict

from wan.configs.shared_config import shared_config

t2v_A14B = EasyDict(
    shared_config,
    experts={"high": "high_noise_model", "low": "low_noise_model"},
    vae_checkpoint="Wan2.1_VAE.pth",
    vae_stride=(4, 8, 8),
    boundary=0.875,
    sizes=("1280*720", "720*1280", "832*480", "480*832"),
    frame_num=81,
    sample_fps=16,
    # base model; guidance is (low noise, high noise)
    sample_solver="unipc",
    sample_steps=40,
    sample_shift=12.0,
    sample_guide_scale=(3.0, 4.0),
    example_prompt="A red fox trots along a snowy ridge at sunrise, its breath steaming, the camera gliding beside it.",
)
