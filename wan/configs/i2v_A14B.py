"""Wan2.2 image-to-video: T2V's networks with the image as 20 more input channels."""

from dataclasses import replace
from pathlib import Path

from wan.configs.t2v_A14B import t2v_A14B

i2v_A14B = replace(
    t2v_A14B,
    name="i2v-A14B",
    hub_id="Wan-AI/Wan2.2-I2V-A14B",
    public_class="wan.image2video:WanI2V",
    pipeline="WanImageToVideoPipeline",
    boundary=0.900,
    in_dim=36,
    sample_shift=5.0,
    sample_guide_scale=(3.5, 3.5),  # (low noise, high noise)
    image_fit="squeeze",
    mask_channels=4,  # one for each of the video frames that a latent frame covers
    example_prompt="The scene comes alive: soft wind moves through it while the camera slowly pushes in.",
    example_image=str(Path(__file__).with_name("i2v_input.png")),
)
