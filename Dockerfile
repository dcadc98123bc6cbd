# Serves QAM-W checkpoints on NVIDIA GPUs, see docs/serving.md. Nobody has built or run it yet.
FROM vllm/vllm-openai:v0.31.0

COPY pyproject.toml README.md LICENSE /opt/qamw/
COPY kernels /opt/qamw/kernels
COPY offline_quantize /opt/qamw/offline_quantize
COPY qamw_vllm /opt/qamw/qamw_vllm

# Without dependencies: a resolver would replace newer libraries of the image by the versions that
# torch's metadata pins. Packages that pyproject.toml requires and the image may lack are named.
RUN uv pip install --system --no-cache --no-deps /opt/qamw \
    && uv pip install --system --no-cache 'matplotlib>=3.8,<4' 'filelock>=4.3,<5' \
    && qamw env \
    && useradd --uid 10001 --create-home qamw

ENV HOME=/home/qamw
WORKDIR /home/qamw
USER 10001
ENTRYPOINT ["vllm", "serve"]
