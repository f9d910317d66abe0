#!/usr/bin/env bash
# Frequency-aware distribution matching, the recipe: a LoRA of rank 4 on captioned images, batch 4, Min-SNR gamma 5, the
# sum form of Real-Fake with lambda 0.003 on low (0.7) and high (0.3) bands of a db3 wavelet, and the CLIP guidance token.
#
#   bash train_freq_aware.sh                                        the shipped SD 1.x model and 22 shipped icons
#   MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 CLIP=openai/clip-vit-large-patch14 \
#     DATA=my_images PROMPT="a fox in the snow" OUTPUT=runs/mine LEARNING_RATE=1e-4 STEPS=1000 bash train_freq_aware.sh
#
# Hardware   as it is: any CPU, 1 GB of memory. SD 1.5 at its 512 px: a GPU, and MIXED_PRECISION=fp16 or bf16
# Time       as it is: about 6 minutes on one CPU core; each step has two forward passes (the second is the term's own)
# Outputs    in OUTPUT (runs/freq-aware): pytorch_lora_weights.safetensors (Diffusers), <name>.safetensors (ComfyUI, A1111,
#            Forge), README.md (model card), report.html, samples/ (with a prompt), metrics.jsonl (dist_match/* in every row),
#            run.json; clip_features-<CLIP>.safetensors. Run it again after a stop and it goes on.
# Overrides  MODEL CLIP DATA OUTPUT STEPS BATCH LEARNING_RATE MIXED_PRECISION; RESOLUTION, else what the model was made for;
#            PROMPT of the previews, of which DATA without PROMPT has none. Further flags may follow, the last one counts:
#            OUTPUT=runs/swap bash train_freq_aware.sh --dist_match_mode=swap. Paths count from this script's folder
#
# This is the recipe as it was first written. What it does and what it does not, measured: docs/frequency.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/install.sh

model=${MODEL:-assets/tiny-sd-icons}
clip=${CLIP:-assets/tiny-clip-icons} # its image features must be as wide as the model's text states: 768 for SD 1.x
data=${DATA:-assets/icons-3d}
out=${OUTPUT:-runs/freq-aware}
features=$out/clip_features-$(basename "$clip").safetensors
prompt=${PROMPT:-}
[ -n "${DATA:-}" ] || prompt=${PROMPT:-3d icon in the style of TOK, a ladybug} # of the shipped icons
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on a busy CPU two threads are slower than one
resolution=${RESOLUTION:-$(.venv/bin/python -c 'import sys
from trainkit.errors import exit_with_message
from trainkit.families.checks import native_resolution
exit_with_message(lambda: print(native_resolution(sys.argv[1])))' "$model")}

printf '\nCLIP features of the images:\n\n'
mkdir -p "$out"
.venv/bin/python scripts/extract_clip_features.py --images "$data" --clip "$clip" --out "$features"

printf '\nTraining:\n\n'
.venv/bin/python train_text_to_image_lora.py --mixed_precision="${MIXED_PRECISION:-no}" \
  --pretrained_model_name_or_path="$model" --train_data_dir="$data" --output_dir="$out" \
  --resolution="$resolution" --train_batch_size="${BATCH:-4}" --cache_latents --random_flip \
  --rank=4 --learning_rate="${LEARNING_RATE:-1e-3}" --lr_scheduler=constant --snr_gamma=5.0 \
  --dist_match=0.003 --dist_match_statistic=sum --dist_match_mode=extra \
  --dist_match_method=wavelet --dist_match_wavelet=db3 --dist_match_levels=2 --dist_match_boundary=zero \
  --dist_match_weights=0.7,0.3 \
  --guidance_token=8.0 --guidance_features="$features" \
  --max_train_steps="${STEPS:-300}" --checkpointing_steps=100 --resume_from_checkpoint=latest \
  ${prompt:+--validation_prompt="$prompt" --validation_steps=100} --seed=0 "$@"

printf '\nOpen %s in a browser. Images with the token of an image of yours:\n\n' "$out/report.html"
printf '.venv/bin/python scripts/generate.py --base %q --lora %q --clip %q \\\n' "$model" "$out" "$clip"
printf '  --guidance_image IMAGE.png --prompt "what it shows" --out %q\n' "$out/images"
