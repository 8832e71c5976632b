# `hrm serve` in a container; docs/operating.md says how to run it.
#   docker build -t hrm .                                   with pip's own PyTorch: for NVIDIA GPUs, several GB
#   docker build -t hrm --build-arg TORCH_INDEX=URL .       with another: pytorch.org/get-started shows the URL for CPUs
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY config config
COPY hrm hrm
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton compiles a little C to start its kernels; without GPUs there is none.
# hadolint ignore=DL3008
RUN if [[ "$TORCH_INDEX" != */cpu ]]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.9,<2.14'
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir "$(echo /wheel/*.whl)[serve,s3]"

# What is written lies in /data: answers, copies of packs and models, compiled kernels.
RUN useradd --uid 10001 --create-home --home-dir /data hrm
USER 10001
WORKDIR /data
VOLUME /data
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# No shell in between: SIGTERM reaches the service, which answers what is at hand and ends.
ENTRYPOINT ["hrm", "serve", "host=0.0.0.0", "port=8000"]
CMD ["checkpoint=sudoku"]
