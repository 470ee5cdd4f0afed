# The gateway and the command line: Python alone, no engine and no GPU library.
#   docker build -f docker/gateway.Dockerfile -t sliceway-gateway:0.1.0 .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/sliceway
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY model_registry model_registry
COPY placement placement
COPY gateway gateway
COPY loadtests loadtests
# The lock's versions, of what the gateway needs alone.
RUN /opt/sliceway/bin/pip install --no-cache-dir --constraint requirements.lock .

FROM python:3.12-slim-bookworm
RUN groupadd --gid 10001 sliceway \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin sliceway
COPY --from=build /opt/sliceway /opt/sliceway
ENV PATH=/opt/sliceway/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["sliceway"]
CMD ["gateway", "/etc/sliceway/sliceway.yaml"]
