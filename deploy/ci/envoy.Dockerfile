# Envoy where no registry of images can be reached: the program of the PyPI package that `make envoy` fetched.
FROM debian:bookworm-slim
COPY envoy/_bin/envoy /usr/local/bin/envoy
CMD ["envoy", "-c", "/etc/envoy/envoy.yaml"]
