"""Flags of other trainers, mostly kohya's sd-scripts: what each is called here, or what to do instead.

docs/from-kohya.md tells the same in a table; a test compares the two. No advice is to drop a value that matters.
"""

from __future__ import annotations

SAME_VALUE = {  # their name: ours
    "network_dim": "rank", "network_rank": "rank", "lora_rank": "rank", "lora_r": "rank", "dim": "rank",
    "network_alpha": "lora_alpha", "alpha": "lora_alpha", "network_dropout": "lora_dropout",
    "unet_lr": "learning_rate", "lr": "learning_rate", "text_encoder_lr1": "text_encoder_lr",
    "text_encoder_lr2": "text_encoder_2_lr", "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power", "lr_warmup": "lr_warmup_steps", "warmup_steps": "lr_warmup_steps",
    "optimizer_type": "optimizer", "weight_decay": "adam_weight_decay",
    "max_train_epochs": "num_train_epochs", "epochs": "num_train_epochs", "epoch": "num_train_epochs",
    "steps": "max_train_steps", "train_steps": "max_train_steps", "batch_size": "train_batch_size",
    "min_snr_gamma": "snr_gamma", "ip_noise_gamma": "input_perturbation", "vae": "pretrained_vae_model_name_or_path",
    "model": "pretrained_model_name_or_path", "base_model": "pretrained_model_name_or_path",
    "save_every_n_steps": "checkpointing_steps", "save_steps": "checkpointing_steps",
    "flip_aug": "random_flip", "max_data_loader_n_workers": "dataloader_num_workers",
    "huggingface_repo_id": "hub_model_id", "log_with": "report_to", "reg_data_dir": "class_data_dir",
    "sample_every_n_steps": "validation_steps", "sample_every_n_epochs": "validation_epochs",
    "zero_terminal_snr": "rescale_betas_zero_snr", "dataset_repeats": "repeats", "config_file": "config",
    "num_repeats": "repeats", "num_epochs": "num_train_epochs", "grad_clip": "max_grad_norm",
    "output": "output_dir", "r": "rank", "prompt": "instance_prompt", "tokenizer_cache_dir": "cache_dir",
    "caption_extention": "caption_extension", "masked_training": "masked_loss", "mask_path": "conditioning_data_dir",
}
INSTEAD = {  # their name: what to do here
    # Model and files
    "output_name": "the last part of --output_dir names the LoRA file: --output_dir runs/{value}",
    "network_module": "write --lora_type lora, loha or lokr; lora is the default",
    "network_args": "write its parts as flags: conv_dim as --lora_layers all-linear+conv and "
                    "--lora_rank_pattern, algo as --lora_type, dora_wd as --use_dora, loraplus_lr_ratio as "
                    "--loraplus_lr_ratio",
    "conv_dim": "--lora_layers all-linear+conv --lora_rank_pattern resnets={value} for the convolutions",
    "conv_alpha": "--lora_layers all-linear+conv --lora_alpha_pattern resnets={value} for the convolutions",
    "base_weights": "merge the LoRA into the base with scripts/merge_loras.py --into_base, and name that model",
    "save_model_as": "files are always safetensors: leave it out",
    "save_precision": "NAME.safetensors is always fp16, pytorch_lora_weights.safetensors fp32: leave it out",
    "save_every_n_epochs": "--checkpointing_steps counts optimizer steps: images / batch x {value}",
    "save_last_n_steps": "--checkpoints_total_limit counts checkpoints, not steps",
    "save_last_n_epochs": "--checkpoints_total_limit counts checkpoints, not epochs",
    "save_state": "every checkpoint holds the whole state; --resume_from_checkpoint latest goes on from the newest",
    "resume": "--resume_from_checkpoint {value} goes on from a checkpoint of this suite; latest is the newest",
    "huggingface_token": "set HF_TOKEN in the environment",
    "wandb_api_key": "run `wandb login` once, or set WANDB_API_KEY in the environment, and write --report_to wandb",
    "no_half_vae": "the VAE always runs in fp32: leave it out",
    "v2": "the model folder says that itself: leave it out",
    "training_comment": "the model card tells what a file was trained with: leave it out",
    "wandb_run_name": "the last part of --output_dir names the run: --output_dir runs/{value}",
    "log_prefix": "the last part of --output_dir names the run: --output_dir runs/{value}",
    # Images and captions
    "in_json": "name the file in --dataset_config: metadata_file = 'meta_cap.json', with image_dir beside it",
    "random_crop": "crops are random unless you write --center_crop",
    "color_aug": "colours are never changed here: make the variants as images of their own",
    "face_crop_aug_range": "crops around faces are not made: crop the images yourself",
    "token_warmup_min": "texts are encoded before the training, and a number of tags that grows with the steps would "
                        "need others in each step; --caption_tag_dropout_rate drops tags at random",
    "token_warmup_step": "texts are encoded before the training, and a number of tags that grows with the steps would "
                         "need others in each step; --caption_tag_dropout_rate drops tags at random",
    "weighted_captions": "captions are plain text, in which (word:1.2) has no weight: repeat the image, or write "
                         "loss_weight for its source in --dataset_config",
    "masked_prior_preservation_weight": "outside of masks the base model is not kept by a loss of its own yet; "
                                        "--with_prior_preservation keeps it with images of the class",
    "unmasked_probability": "masks are used at each visit; --unmasked_weight 0.1 lets the rest count a little",
    "cache_latents_to_disk": "--cache_latents --latent_cache_dir FOLDER",
    "cache_text_encoder_outputs": "done always where text encoders are frozen; --latent_cache_dir FOLDER keeps them",
    "cache_text_encoder_outputs_to_disk": "--latent_cache_dir FOLDER keeps them on disk",
    # Network
    "rank_dropout": "--lora_dropout drops inputs of the LoRA; ranks are not dropped yet",
    "module_dropout": "--lora_dropout drops inputs of the LoRA; modules are not dropped yet",
    "scale_weight_norms": "--max_grad_norm limits each update; the LoRA's norm is not limited yet",
    "block_dims": "--lora_rank_pattern names blocks and their ranks: IN04=8 MID=16",
    "block_alphas": "--lora_alpha_pattern names blocks and their alphas: IN04=8 MID=16",
    "block_lr": "--lora_lr_pattern names blocks and what their rates are multiplied by: IN04=0.5 MID=1",
    "down_lr_weight": "--lora_lr_pattern names blocks and what their rates are multiplied by: IN04=0.5 MID=1",
    "mid_lr_weight": "--lora_lr_pattern names blocks and what their rates are multiplied by: IN04=0.5 MID=1",
    "up_lr_weight": "--lora_lr_pattern names blocks and what their rates are multiplied by: IN04=0.5 MID=1",
    "network_train_unet_only": "text encoders are frozen unless you write --train_text_encoder: leave it out",
    "network_train_text_encoder_only": "--train_text_encoder --train_unet_frac 0",
    # Optimizer and loss
    "debiased_estimation_loss": "--loss_weighting debiased",
    "v_parameterization": "--prediction_type v_prediction",
    "scale_v_pred_loss_like_noise_pred": "--loss_weighting snr",
    "adaptive_noise_scale": "--noise_offset is the same for every image; it does not adapt yet",
    "huber_scale": "--huber_c sets where the loss turns linear; it cannot be scaled yet",
    "fused_backward_pass": "the LoRA's gradients are small: leave it out",
    "noise_offset_type": "--noise_offset adds noise to each channel's mean; --multires_noise_iterations adds that of "
                         "several resolutions",
    # Memory and previews
    "fp16": "write --mixed_precision fp16", "bf16": "write --mixed_precision bf16",
    "use_8bit": "write --use_8bit_adam",
    "train_unet_only": "text encoders are frozen unless you write --train_text_encoder: leave it out",
    "persistent_data_loader_workers": "the processes of --dataloader_num_workers last as long as the run: leave it out",
    "full_fp16": "the LoRA is always trained in fp32; --mixed_precision fp16 makes the base model fp16",
    "full_bf16": "the LoRA is always trained in fp32; --mixed_precision bf16 makes the base model bf16",
    "fp8_base": "write --base_precision fp8; int8 is as small and nearer to the weights",
    "do_fp8_training": "write --base_precision fp8; int8 is as small and nearer to the weights",
    "bnb_quantization_config_path": "write --base_precision nf4 for 4 bits, int8 for 8",
    "blocks_to_swap": "swapping is not there yet; --mixed_precision bf16 --gradient_checkpointing saves memory",
    "torch_compile": "compiling is not there yet: leave it out",
    "sdpa": "PyTorch's own attention is always used: leave it out",
    "xformers": "PyTorch's own attention is always used, which is as small: leave it out",
    "mem_eff_attn": "PyTorch's own attention is always used, which is as small: leave it out",
    "lowram": "--mixed_precision bf16 --gradient_checkpointing saves memory",
    "sample_prompts": "write the prompt itself: --validation_prompt 'a photo of TOK'; one prompt is used",
    "sample_sampler": "previews are generated with DPM-Solver++: leave it out",
    "sample_at_first": "there is always a preview before the first step: leave it out",
    "validation_split": "a loss on images kept aside is not there yet; --validation_prompt gives previews",
}


def advice(name: str, value: str | None) -> tuple[str | None, str] | None:
    """(our flag for another trainer's, where there is one; what to do), or None for a name that we do not know."""
    if name in SAME_VALUE:
        flag = SAME_VALUE[name]
        return flag, f"write --{flag}{f' {value}' if value else ''}"
    if name in INSTEAD:
        return None, INSTEAD[name].replace("{value}", value or "VALUE")
    return None
