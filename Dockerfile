# The image of every step, in two kinds:
#   docker build --target cpu  --tag ultrathink:cpu .
#   docker build --target cuda --tag ultrathink:cuda .
# scripts/check_dockerfile.py runs these steps in a clean folder where there is no Docker.
FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DS_BUILD_OPS=0 \
    ZENML_ANALYTICS_OPT_IN=false \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH
WORKDIR /app

# Packages first: they change less often than the code, and their layer is the big one.
FROM base AS packages
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv \
 && pip install "uv==0.13.9"
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY ultrathink_model/__init__.py ultrathink_model/__init__.py

FROM packages AS packages-cpu
ARG EXTRAS=deepspeed,cleaning
ARG INDEX=https://download.pytorch.org/whl/cpu
RUN uv pip install --constraint constraints.txt --index "torch=${INDEX}" --index-strategy unsafe-best-match ".[${EXTRAS}]" \
 && uv pip uninstall ultrathink-model uv

FROM packages AS packages-cuda
ARG EXTRAS=deepspeed,cleaning
RUN uv pip install --constraint constraints.txt ".[${EXTRAS}]" \
 && uv pip uninstall ultrathink-model uv

FROM base AS code
RUN groupadd --gid 1000 ultrathink \
 && useradd --uid 1000 --gid 1000 --create-home ultrathink \
 && chown ultrathink:ultrathink /app
COPY --chown=ultrathink:ultrathink run.py train_advanced.py train_ultrathink.py prototype_pipeline.py production_pipeline.py multi_gpu_pipeline.py ./
COPY --chown=ultrathink:ultrathink configs configs
COPY --chown=ultrathink:ultrathink stack_configs stack_configs
COPY --chown=ultrathink:ultrathink pipelines pipelines
COPY --chown=ultrathink:ultrathink steps steps
COPY --chown=ultrathink:ultrathink ultrathink_model ultrathink_model
ENV PYTHONPATH=/app
USER 1000:1000
HEALTHCHECK NONE
CMD ["python", "train_advanced.py", "--help"]

FROM code AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv

FROM code AS cuda
COPY --from=packages-cuda /opt/venv /opt/venv
