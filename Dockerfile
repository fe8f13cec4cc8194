# One file for every host.
#
#   The router, or a whole demo cluster:
#     docker build -t disagg .
#     docker run --rm --init -p 8000:8000 disagg
#
#   A GPU host: the base image brings SGLang, Mooncake and the libraries that they need. Name a release that was tried (docs/gpu.md).
#     docker build --build-arg BASE=lmsysorg/sglang:v0.5.23 -t disagg-gpu .
#     docker run --detach --init --network host --gpus all --device /dev/infiniband --ulimit memlock=-1 --shm-size 32g \
#       --stop-timeout 60 --volume disagg:/var/lib/disagg --volume disagg-cache:/home/disagg/.cache --volume /models:/models:ro \
#       --env DISAGG_TOKEN disagg-gpu serve --role prefill --join ROUTER:7400 --engine sglang --model /models/MODEL
#
# The base needs Python 3.11 or newer with its venv module.
ARG BASE=python:3.13-slim
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY disagg disagg
# In an environment of its own, as below: nothing of the base's packages takes part.
RUN python3 -m venv /build \
    && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE}
COPY scripts/locks/runtime.txt /tmp/disagg/
COPY --from=build /dist /tmp/disagg/
# An environment of its own: on a GPU image the versions of the engine's packages stay untouched.
# A number that is not the base's first user's: who mounts a folder in place of the volume gives it to 7400.
RUN python3 -m venv /opt/disagg \
    && /opt/disagg/bin/pip install --no-cache-dir --require-hashes -r /tmp/disagg/runtime.txt \
    && /opt/disagg/bin/pip install --no-cache-dir --no-deps /tmp/disagg/disagg-*.whl \
    && ln -s /opt/disagg/bin/disagg /usr/local/bin/disagg \
    && rm -r /tmp/disagg \
    && groupadd --gid 7400 disagg \
    && useradd --uid 7400 --gid 7400 --create-home --shell /usr/sbin/nologin disagg \
    && install -d -o disagg -g disagg -m 0700 /var/lib/disagg /home/disagg/.cache

# The Python that has SGLang is the one that the base calls python3: engine.sglang_python need not be set.
ENV DISAGG_SGLANG_PYTHON=python3 \
    DISAGG_STATE_DIR=/var/lib/disagg
# Keys and registrations: who loses them must let every host join anew.
VOLUME /var/lib/disagg
USER disagg
WORKDIR /home/disagg
# Hosts join at 7400, clients come to 8000. The admin listener stays on loopback: docker exec NAME disagg status.
EXPOSE 7400 8000
# SIGTERM drains: run it with --stop-timeout 60, above drain_timeout_s and stop_timeout_s.
STOPSIGNAL SIGTERM
ENTRYPOINT ["disagg"]
CMD ["up", "--http", "0.0.0.0:8000"]
