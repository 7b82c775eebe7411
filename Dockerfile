# syntax=docker/dockerfile:1
# cellbench in a container.
#
#   docker build --tag cellbench .                                            for a CPU
#   docker build --tag cellbench:cuda --build-arg TORCH_BACKEND=cu130 .       for NVIDIA GPUs; then `docker run --gpus all …`
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD":/work cellbench grid --data MY_FOLDER
#
# Versions are those of requirements.lock. Its hashes are checked for all packages but torch, torchvision and triton: those of the other builds are not in it.
FROM python:3.11-slim AS build
ARG TORCH_BACKEND=cpu
ARG EXTRAS=onnx,postgresql
RUN pip install --no-cache-dir 'uv>=0.9,<1' && uv venv --quiet --no-cache /opt/cellbench
WORKDIR /source
COPY pyproject.toml requirements.lock README.md LICENSE ./
RUN awk '/^[a-z0-9]/ { torch = /^(torch|torchvision|triton)==/; if (torch) sub(/ *\\$/, "") } !torch || /^[a-z]/' requirements.lock > constraints.txt
COPY registry registry
COPY experiments experiments
COPY cellbench cellbench
RUN --mount=type=cache,target=/root/.cache/uv \
    UV_LINK_MODE=copy uv pip install --python /opt/cellbench/bin/python --torch-backend "$TORCH_BACKEND" --constraint constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim
LABEL org.opencontainers.image.title="cellbench" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/cellbench /opt/cellbench
ENV PATH=/opt/cellbench/bin:$PATH HOME=/home/cellbench PYTHONUNBUFFERED=1 GIT_PYTHON_REFRESH=quiet
# Any user may write to the home folder, so that `--user` of the host's user works; results then belong to that user.
RUN useradd --create-home --uid 1000 cellbench && chmod 1777 /home/cellbench && mkdir --mode 1777 /work
USER cellbench
WORKDIR /work
ENTRYPOINT ["cellbench"]
CMD ["--help"]
