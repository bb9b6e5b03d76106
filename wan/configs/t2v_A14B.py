"""Wan2.2 text-to-video: two 14B experts, the Wan2.1 VAE."""

from wan.configs.task import TaskConfig

t2v_A14B = TaskConfig(
    name="t2v-A14B",
    hub_id="Wan-AI/Wan2.2-T2V-A14B",
    public_class="wan.text2video:WanT2V",
    pipeline="WanPipeline",
    experts={"high": "high_noise_model", "low": "low_noise_model"},
    boundary=0.875,
    dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16,
    vae_checkpoint="Wan2.1_VAE.pth", vae_stride=(4, 8, 8),
    sizes=("1280*720", "720*1280", "832*480", "480*832"),
    frame_num=81, sample_fps=16, sample_steps=40, sample_shift=12.0,
    sample_guide_scale=(3.0, 4.0),  # (low noise, high noise)
    example_prompt="A red fox trots along a snowy ridge at sunrise, its breath steaming, the camera gliding beside it.",
)  # fmt: skip
