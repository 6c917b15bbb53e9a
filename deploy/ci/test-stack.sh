#!/usr/bin/env bash
# Brings docker-compose.yml up as a user would, from images built here, and checks that it does what it says: photos are classified through Envoy,
# a server that is killed costs no request, a federated round ends, Prometheus sees everybody.
#
# usage: deploy/ci/test-stack.sh        as root; starts dockerd if none runs, and leaves nothing running that it started
set -euo pipefail
cd "$(dirname "$0")/../.."
export COMPOSE_PROJECT_NAME=isthmus-stack-test DOCKER_BUILDKIT=0 COMPOSE_DOCKER_CLI_BUILD=0
say() { printf -- '--- stack: %s (%s s)\n' "$1" "$SECONDS"; }
if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
compose+=(-f docker-compose.yml -f deploy/ci/docker-compose.yml)

daemon=
work=$(mktemp -d)
up=
finish() {
  status=$?
  set +e
  [ $status -eq 0 ] || [ -z "$up" ] || "${compose[@]}" logs --tail 30 2>&1 | tail -n 150
  [ -z "$up" ] || "${compose[@]}" --profile tools down --volumes --remove-orphans --timeout 5 >/dev/null 2>&1 || true
  [ -z "$daemon" ] || { kill "$daemon"; wait "$daemon" 2>/dev/null || true; }
  rm -rf "$work"
  exit $status
}
trap finish EXIT

if ! docker info >/dev/null 2>&1; then
  say "starting dockerd"
  dockerd > "$work/dockerd.log" 2>&1 &
  daemon=$!
  for _ in $(seq 60); do docker info >/dev/null 2>&1 && break; sleep 1; done
  docker info >/dev/null 2>&1 || { tail -n 20 "$work/dockerd.log"; exit 1; }
fi

say "base images"
deploy/ci/base-images.sh 2> "$work/base.log" || { tail -n 20 "$work/base.log"; exit 1; }
say "images"
"${compose[@]}" config --quiet
for target in offload-server aggregator edge-client fleet setup; do
  docker build --network host -f deploy/Dockerfile --target "$target" -t "isthmus/$target" . > "$work/build.log" 2>&1 || { tail -n 40 "$work/build.log"; exit 1; }
done
"${compose[@]}" build envoy prometheus > "$work/build.log" 2>&1 || { tail -n 40 "$work/build.log"; exit 1; }
docker images --format '{{.Repository}} {{.Size}}' | grep -E '^(isthmus|isthmus-ci)/' | sort

say "up"
up=1
"${compose[@]}" up -d --no-build
healthy() { # SERVICE
  id=$("${compose[@]}" ps -q "$1")
  [ -n "$id" ] && [ "$(docker inspect -f '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' "$id")" = "${2:-healthy}" ]
}
until_true() { # WHAT COMMAND...
  what=$1; shift
  for _ in $(seq 120); do "$@" && return; sleep 1; done
  echo "stack: $what: not within two minutes"; exit 1
}
for service in offload-server-1 offload-server-2 aggregator-0 aggregator-1 aggregator-2 envoy prometheus; do until_true "$service is healthy" healthy "$service"; done
until_true "camera runs" healthy camera running

say "nobody is root, and roots are read-only"
for service in offload-server-1 envoy camera aggregator-0 prometheus; do
  id=$("${compose[@]}" ps -q "$service")
  pid=$(docker inspect -f '{{.State.Pid}}' "$id")
  [ "$(awk '/^Uid:/ {print $2}' "/proc/$pid/status")" != 0 ] || { echo "$service runs as root"; exit 1; }
  [ "$(docker inspect -f '{{.HostConfig.ReadonlyRootfs}}' "$id")" = true ] || { echo "$service can write its root"; exit 1; }
done

say "classify"
until_true "photos are answered" sh -c '"$@" > "$0" 2>&1' "$work/classify" "${compose[@]}" run --rm -T classify --json
[ "$(grep -c '"labels"' "$work/classify")" = 20 ] || { cat "$work/classify"; exit 1; }

say "one server is killed while photos are asked for"
"${compose[@]}" run --rm -T --entrypoint sh classify -c 'i=0; while [ $i -lt 8 ]; do
  edge-client classify /usr/share/isthmus/photos/*.jpg --ca /etc/isthmus/clients/ca.pem --json || exit 1; i=$((i + 1)); done' > "$work/killed" 2>&1 &
asking=$!
sleep 3
docker kill "$("${compose[@]}" ps -q offload-server-1)" >/dev/null
wait "$asking" || { echo "stack: a request failed when a server was killed"; grep -v '"labels"' "$work/killed"; exit 1; }
[ "$(grep -c '"labels"' "$work/killed")" = 160 ]
[ "$(grep -c '"error":"' "$work/killed" || true)" = 0 ]
echo "160 of 160 answered"
if docker logs "$("${compose[@]}" ps -q camera)" 2>&1 | grep '"error":"'; then echo "stack: the camera saw an error"; exit 1; fi
"${compose[@]}" up -d --no-build offload-server-1 >/dev/null 2>&1
until_true "the killed server is back" healthy offload-server-1

say "one federated round"
"${compose[@]}" run --rm -T round | tee "$work/round"
grep -q '^round *1 ' "$work/round"

say "Prometheus sees everybody"
targets() { curl -fsS 'http://127.0.0.1:9090/api/v1/query?query=sum(up)' 2>/dev/null | grep -q '"6"\]'; }
until_true "six targets are up" targets
curl -fsS 'http://127.0.0.1:9090/api/v1/rules' | grep -q IsthmusOverloaded
curl -fsS http://127.0.0.1:9464/healthz >/dev/null

say "drained in order"
"${compose[@]}" stop --timeout 20 offload-server-2 >/dev/null 2>&1
code=$(docker inspect -f '{{.State.ExitCode}}' "$("${compose[@]}" ps -a -q offload-server-2)")
[ "$code" = 0 ] || { echo "stack: offload-server-2 ended with $code"; exit 1; }
say "done"
