#!/usr/bin/env bash
# The two base images of deploy/Dockerfile where no registry of images can be reached: debian:bookworm-slim from Debian's packages, and
# rust:1.95-slim-bookworm from that and the toolchain installed here. What was downloaded before comes along as a cache.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! docker image inspect debian:bookworm-slim >/dev/null 2>&1; then
  command -v debootstrap >/dev/null || apt-get install -qy debootstrap
  debootstrap --variant=minbase bookworm "$work/root" http://deb.debian.org/debian > "$work/log" 2>&1 || { tail -n 20 "$work/log"; exit 1; }
  rm -rf "$work/root/var/lib/apt/lists"/* "$work/root/var/cache/apt/archives"/*.deb "$work/root/usr/share/doc" "$work/root/usr/share/man"
  # the authorities that this machine trusts, also where the package ca-certificates is installed later
  install -D -m 644 /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"
  mkdir -p "$work/root/usr/local/share/ca-certificates"
  (cd "$work/root/usr/local/share/ca-certificates" && awk '/BEGIN CERT/ {n++} {print > ("host-" n ".crt")}' /etc/ssl/certs/ca-certificates.crt)
  tar -C "$work/root" -c . | docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' --change 'CMD ["bash"]' - debian:bookworm-slim >/dev/null
  echo "debian:bookworm-slim made"
fi

if ! docker image inspect rust:1.95-slim-bookworm >/dev/null 2>&1; then
  rustc --version | grep -q '^rustc 1\.95\.' || { echo "rustc 1.95 was not found"; exit 1; }
  mkdir "$work/image"
  cp -r "$(rustc --print sysroot)" "$work/image/toolchain"
  rm -rf "$work/image/toolchain/share/doc"
  cache="${ISTHMUS_CACHE:-$HOME/.cache/isthmus}"
  mkdir -p "$work/image/cache/downloads" "$work/image/registry"
  # hard links: the files are not copied until docker reads them
  for file in "$cache"/downloads/*torch* "$cache"/downloads/*nvidia* "$cache"/downloads/*efficientnet* "$cache"/downloads/*imagenet* \
              "$cache"/downloads/*foolbox* "$cache"/downloads/*fashion*; do
    copy="$work/image/cache/downloads/$(basename "$file")"
    [ -f "$file" ] && [ ! -e "$copy" ] || continue
    ln "$file" "$copy" 2>/dev/null || cp "$file" "$copy"
  done
  registry="${CARGO_HOME:-$HOME/.cargo}/registry"
  [ -d "$registry" ] && cp -r "$registry/." "$work/image/registry/"
  cat > "$work/image/Dockerfile" <<'END'
FROM debian:bookworm-slim
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY toolchain /usr/local/rust
COPY registry /usr/local/cargo/registry
COPY cache /root/.cache/isthmus
END
  # this machine's authorities again: the package brings its own list
  cp /etc/ssl/certs/ca-certificates.crt "$work/image/authorities.crt"
  echo 'COPY authorities.crt /etc/ssl/certs/ca-certificates.crt' >> "$work/image/Dockerfile"
  DOCKER_BUILDKIT=0 docker build --quiet --network host -t rust:1.95-slim-bookworm "$work/image" >/dev/null
  echo "rust:1.95-slim-bookworm made"
fi
