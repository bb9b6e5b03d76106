"""What all Wan2.2 models share, and what the two-expert ones share on top.

Dtypes are torch dtypes or their names: this package imports no torch.
"""

from easydict import EasyDict

shared_config = EasyDict(
    # text encoder
    t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
    t5_tokenizer="google/umt5-xxl",
    t5_dtype="bfloat16",
    text_len=512,
    # transformer
    param_dtype="bfloat16",
    # how an image becomes the first frame: "squeeze" to the video's size, scale and "crop", None: no image is taken
    image_fit=None,
    mask_channels=0,  # channels beside an image's latent that say which frames are known
    # used for the unconditional pass when no negative prompt is given; part of the models
    sample_neg_prompt=(
        "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
        "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
        "杂乱的背景，三条腿，背景人很多，倒着走"
    ),
)

a14b_config = EasyDict(
    shared_config,
    experts={"high": "high_noise_model", "low": "low_noise_model"},
    vae_checkpoint="Wan2.1_VAE.pth",
    vae_stride=(4, 8, 8),
    latent_channels=16,
    size_step=16,  # VAE stride 8 x patch 2
    sizes=("1280*720", "720*1280", "832*480", "480*832"),
    frame_num=81,
    sample_fps=16,
    sample_solver="unipc",
    sample_steps=40,
)
