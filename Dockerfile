# The router, or a whole demo cluster. For GPU hosts give a base image that has SGLang:
#   docker build --build-arg BASE=lmsysorg/sglang:latest -t disagg-gpu .
ARG BASE=python:3.13-slim
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY disagg disagg
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE}
COPY scripts/locks/runtime.txt /tmp/runtime.txt
COPY --from=build /dist /dist
# An environment of its own: on a GPU image the versions of the engine's packages stay untouched.
RUN python3 -m venv /opt/disagg \
    && /opt/disagg/bin/pip install --no-cache-dir --require-hashes -r /tmp/runtime.txt \
    && /opt/disagg/bin/pip install --no-cache-dir --no-deps /dist/disagg-*.whl \
    && ln -s /opt/disagg/bin/disagg /usr/local/bin/disagg \
    && rm -rf /dist /tmp/runtime.txt \
    && useradd --system --create-home disagg
USER disagg
WORKDIR /home/disagg
EXPOSE 7400 8000 8001
STOPSIGNAL SIGTERM
ENTRYPOINT ["disagg"]
CMD ["up", "--http", "0.0.0.0:8000"]
