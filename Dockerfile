# syntax=docker/dockerfile:1
# imex-persist with the packages that drive a GPU; the driver itself comes from the host (NVIDIA Container Toolkit).
#
#   docker build -t imex-persist .                               EXTRAS=cuda12,demo for a CUDA 12 driver
#   docker run --rm --gpus all --ipc=host imex-persist doctor    (docker-compose.yml has the settings of a longer life)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY imex_persist imex_persist
COPY cuda_src cuda_src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
# demo: GGUF models, and a compiler so that `doctor --device sim` runs here too
ARG EXTRAS=cuda13,demo
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"
RUN useradd --create-home --uid 1000 imex && install -d -o imex -g imex /cache
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    IMEX_CACHE=/cache/imex \
    HF_HOME=/cache/huggingface
USER imex
WORKDIR /home/imex
VOLUME /cache
# NVML only: a check that made a CUDA context would take memory and time from the resident kernel
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 CMD ["imex-persist", "topology", "--require", "1"]
ENTRYPOINT ["imex-persist"]
CMD ["doctor"]
