# This project in NVIDIA's PyTorch image, whose torch, Transformer Engine, apex and flash-attn stay as they are.
#     docker build --tag tgdpo . && docker run --gpus all --ipc=host --rm -it tgdpo
# It has not been built yet. docs/containers.md says which images there are, and what each carries.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${IMAGE}
WORKDIR /opt/tgdpo
COPY . .

# What is built together stays together; the image has no megatron-core, so that it comes from the package index.
RUN python -m pip list --format=freeze \
    | grep -iE '^(torch|triton|transformer.engine|megatron|flash|apex|nvidia|numpy)' > kept.txt
RUN PIP_CONSTRAINT=kept.txt python -m pip install --no-cache-dir .

# Nothing of that changed, the packages are accepted as at a program's start, and a program starts.
RUN python -m pip list --format=freeze > now.txt && ! grep -vxFf now.txt kept.txt
RUN python -P -c "from tgdpo_megatron.platform.checks import check_packages; check_packages()" \
    && tgdpo-train --help > help.txt
WORKDIR /workspace
