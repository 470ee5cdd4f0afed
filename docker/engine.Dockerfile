# An engine on a slice: vLLM's own image, with sliceway and Ray beside it in an environment of their own.
#   docker build -f docker/engine.Dockerfile -t sliceway-engine:0.1.0 .
# The tag is the version that sliceway sizes models for (placement/engines.py).
FROM vllm/vllm-openai:v0.33.0
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY model_registry model_registry
COPY placement placement
COPY gateway gateway
COPY loadtests loadtests
RUN python3 -m venv /opt/sliceway \
    && /opt/sliceway/bin/pip install --no-cache-dir --constraint requirements.lock '.[ray]' \
    && /opt/sliceway/bin/python -c 'from pathlib import Path; from placement.plugin import install_plugin; Path("/opt/vllm-plugin").symlink_to(install_plugin(Path("/opt/vllm-plugins")))' \
    && chmod -R a+rX /opt/vllm-plugins \
    && groupadd --gid 10001 sliceway \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin sliceway
COPY --chmod=0755 docker/engine-entrypoint /usr/local/bin/engine-entrypoint
# Behind the rest of the path: `python3` stays the one that has vLLM.
ENV PATH=$PATH:/opt/sliceway/bin PYTHONUNBUFFERED=1
WORKDIR /
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["/usr/local/bin/engine-entrypoint"]
CMD ["vllm", "serve", "--help"]
