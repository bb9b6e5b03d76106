"""Wan2.2 text+image-to-video: one 5B model, the Wan2.2 VAE, the image pinned as the first latent frame."""

from wan.configs.task import TaskConfig

ti2v_5B = TaskConfig(
    name="ti2v-5B",
    hub_id="Wan-AI/Wan2.2-TI2V-5B",
    public_class="wan.textimage2video:WanTI2V",
    pipeline="WanPipeline",
    experts={"model": "."},
    boundary=None,
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48,
    vae_checkpoint="Wan2.2_VAE.pth", vae_stride=(4, 16, 16),
    sizes=("1280*704", "704*1280"),
    frame_num=121, sample_fps=24, sample_steps=50, sample_shift=5.0, sample_guide_scale=5.0,
    image_fit="crop",
    example_prompt="A small wooden boat drifts across a misty lake at dawn, ripples spreading slowly in its wake.",
)  # fmt: skip
