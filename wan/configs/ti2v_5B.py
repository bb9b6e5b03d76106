"""Wan2.2 text+image-to-video: one 5B model, the Wan2.2 VAE, the image pinned as the first latent frame."""

from easydict import EasyDict

from wan.configs.shared_config import shared_config

ti2v_5B = EasyDict(
    shared_config,
    name="ti2v-5B",
    hub_id="Wan-AI/Wan2.2-TI2V-5B",
    experts={"model": "."},
    vae_checkpoint="Wan2.2_VAE.pth",
    vae_stride=(4, 16, 16),
    latent_channels=48,
    size_step=32,  # VAE stride 16 x patch 2
    image_fit="crop",
    boundary=None,
    sizes=("1280*704", "704*1280"),
    frame_num=121,
    sample_fps=24,
    sample_solver="unipc",
    sample_steps=50,
    sample_shift=5.0,
    sample_guide_scale=5.0,
    example_prompt="A small wooden boat drifts across a misty lake at dawn, ripples spreading slowly in its wake.",
)
