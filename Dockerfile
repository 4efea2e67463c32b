# Lorasmith's server: docs/install.md says how to run it. For NVIDIA cards, two arguments differ:
#   docker build --build-arg BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --tag lorasmith .
ARG BASE=docker.io/library/debian:trixie-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# An image that is passed on is without `heic` and `video`: their wheels bring x264 and x265 (GPL-2.0).
ARG EXTRAS=models,gguf,likeness
ARG HOME_URL=
LABEL org.opencontainers.image.source=${HOME_URL}

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
    # Triton compiles what starts its kernels.
    $([ "${TORCH_INDEX##*/}" = cpu ] || echo gcc libc6-dev python3-dev) \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/lorasmith
# In a layer of its own, which a change of the source leaves as it is. What torch needs, its index has in versions of its own.
RUN --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    /opt/lorasmith/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch>' /tmp/constraints.txt)"
RUN --mount=type=bind,source=.,target=/tmp/source,rw \
    cd /tmp/source \
 && /opt/lorasmith/bin/pip install --no-cache-dir --constraint constraints.txt \
    ".[${EXTRAS}]" ./lorasmith-tiny ./lorasmith-editor

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data lorasmith \
 && install --directory --owner lorasmith --group lorasmith /data /data/models /data/runs
USER lorasmith
WORKDIR /data
# The root file system may be read-only: what is written goes to the volumes and to /tmp. Nothing in /tmp may be executed,
# so that compiled code is kept in a volume.
ENV PATH=/opt/lorasmith/bin:$PATH \
    LORASMITH_BASE_DIR=/data \
    LORASMITH_CACHE_DIR=/data/user/cache \
    HF_HOME=/data/models/huggingface \
    TRITON_CACHE_DIR=/data/user/compiled/triton \
    TORCHINDUCTOR_CACHE_DIR=/data/user/compiled/inductor \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib
VOLUME ["/data", "/data/models", "/data/runs"]
EXPOSE 8188
# Any answer will do: without the token it is 401.
HEALTHCHECK --start-period=30s CMD ["python", "-c", "from http.client import HTTPConnection; c = HTTPConnection('127.0.0.1', 8188, timeout=10); c.request('GET', '/'); c.getresponse()"]
ENTRYPOINT ["lorasmith"]
CMD ["serve", "--listen", "0.0.0.0"]
