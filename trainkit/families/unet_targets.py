"""Which modules of a UNet and of a text encoder get an adapter, by the value of --lora_layers."""

from __future__ import annotations

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
LINEAR: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention+ff": (*ATTENTION, *FEED_FORWARD),
    # every linear map of the transformer blocks; proj_in and proj_out are 1×1 convolutions in SD 1.x
    "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out"),
}
LORA_TARGETS = LINEAR | {  # --lora_layers -> ends of the module paths that get an adapter
    f"{name}+conv": (*ends, *CONVOLUTIONS) for name, ends in LINEAR.items()}
TEXT_LORA_TARGETS = dict.fromkeys(LORA_TARGETS, ("q_proj", "k_proj", "v_proj", "out_proj"))  # of each text encoder
