# The trainers and tools of this repository, installed as a package. docs/install.md has the commands.
#
#   docker build -t lora-trainers .                                                   PyTorch for NVIDIA GPUs
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t lora-trainers .           for CPUs
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/work" lora-trainers dreambooth-sdxl --help
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/work/.cache/huggingface

WORKDIR /src
# The packages, in a layer that a change of our code does not make anew. torch first, as in scripts/install.sh.
COPY requirements.txt constraints.txt ./
ARG TORCH_INDEX=""
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install -c constraints.txt -r requirements.txt

COPY pyproject.toml README.md LICENSE freq_loss.py train_dreambooth_lora_sdxl_advanced.py train_text_to_image_lora.py ./
COPY trainkit ./trainkit
# The user most likely to own a mounted folder: the first one of a Linux desktop.
RUN pip install --no-deps . && useradd --create-home --uid 1000 trainer

USER 1000
WORKDIR /work
ENTRYPOINT ["lora-train"]
CMD ["--help"]
