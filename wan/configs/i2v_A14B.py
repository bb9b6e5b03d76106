"""Wan2.2 image-to-video: two 14B experts, the Wan2.1 VAE, the image given as extra channels."""

from pathlib import Path

from easydict import EasyDict

from wan.configs.shared_config import a14b_config

i2v_A14B = EasyDict(
    a14b_config,
    name="i2v-A14B",
    hub_id="Wan-AI/Wan2.2-I2V-A14B",
    boundary=0.900,
    sample_shift=5.0,
    sample_guide_scale=(3.5, 3.5),  # (low noise, high noise)
    example_prompt="The scene comes alive: soft wind moves through it while the camera slowly pushes in.",
    image_fit="squeeze",
    mask_channels=4,  # one for each of the video frames that a latent frame covers
    example_image=str(Path(__file__).with_name("i2v_input.png")),
)
