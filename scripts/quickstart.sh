#!/usr/bin/env bash
# Train the tiny SDXL model in this repository on 22 real 3-D icons. Then show what it learned, on nouns that are not in
# the training images.
#
#   bash scripts/quickstart.sh [OUTPUT_DIR]          default: runs/quickstart
#
# You need Python 3.11 or newer and about 2 GB of disk. The first run installs everything into .venv. A GPU is used if there
# is one. After the installation, it takes less than 10 minutes on 2 CPU cores. This is a shorter trial:
#
#   STEPS=20 DENOISING_STEPS=2 bash scripts/quickstart.sh
#
# Pivotal tuning: TOK stands for two new tokens, which are trained in the first half of the steps. TOKENS=0 leaves them out.
# The output folder has evaluation/grid.png (each row is a noun; the columns are the base model, the LoRA at strengths 0.5
# and 1, and a real icon), evaluation/evaluation.json, the LoRA for Diffusers and for WebUIs, the embeddings of the new
# tokens, README.md (the model card) and report.html. If you run the script again after a stop, it continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

out=${1:-runs/quickstart}
steps=${STEPS:-400}
denoising_steps=${DENOISING_STEPS:-20}
tokens=() embeddings=()
if [ "${TOKENS:-1}" != 0 ]; then
  tokens=(--train_text_encoder_ti --token_abstraction=TOK --train_text_encoder_ti_frac=0.5)
  embeddings=(--embeddings "$out/$(basename "$out")_emb.safetensors")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on a busy CPU two threads are slower than one

# This is the command line of the trainer. Copy it, and write your own model, images and words.
train=(
  .venv/bin/python train_dreambooth_lora_sdxl_advanced.py
  --pretrained_model_name_or_path=assets/tiny-sdxl-icons
  --dataset_name=assets/icons-3d --caption_column=text --instance_prompt="3d icon in the style of TOK"
  --output_dir="$out" --resolution=64 --train_batch_size=3 --cache_latents --random_flip
  --rank=8 --lora_layers=all-linear
  --optimizer=prodigy --learning_rate=1.0 --lr_scheduler=constant --lr_warmup_steps=0
  --adam_beta1=0.9 --adam_beta2=0.99 --adam_weight_decay=0.01
  --prodigy_safeguard_warmup=True --prodigy_use_bias_correction=True
  "${tokens[@]}" --snr_gamma=5.0 --max_train_steps="$steps" --checkpointing_steps=100 --resume_from_checkpoint=latest
  --validation_prompt="3d icon in the style of TOK, a ladybug" --validation_steps=100 --seed=0
)
printf '\nTraining (about 2 minutes):\n\n'
for word in "${train[@]}"; do [[ $word == *" "* ]] && word="${word%%=*}=\"${word#*=}\""; printf '%s ' "$word"; done
printf '\n\n'
"${train[@]}"

printf '\nGenerating 120 nouns that are not in the training images, at three strengths (about 3 minutes):\n\n'
.venv/bin/python scripts/evaluate.py --base assets/tiny-sdxl-icons --lora "$out/pytorch_lora_weights.safetensors" "${embeddings[@]}" \
  --strengths 0,0.5,1 --steps "$denoising_steps" --out "$out/evaluation"
printf '\nLook at %s and open %s in a browser.\n' "$out/evaluation/grid.png" "$out/report.html"
