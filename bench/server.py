#!/usr/bin/env python3
"""Server throughput against calling the same decoder and tail directly in a loop.

usage: server.py [--rounds N]        run from the repository's root after `make build`

Alternates, N times (default 5): the bare loop at batch 1 and 8, and the server under closed-loop load with 1
and 8 requests under way (gRPC on loopback, real containers). The share outside the network is that of the wall time in
which libtorch was not computing.
"""
import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
PHOTO = ROOT / "third_party" / "foolbox" / "foolbox" / "data" / "imagenet_00_243.jpg"


def run(*command):
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def spread(values, unit=""):
    return f"{statistics.median(values):8.1f}{unit} [{min(values):.1f}, {max(values):.1f}]"


os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # for both, as the server sets it for itself


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    server = subprocess.Popen([BIN / "offload-server", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"],
                              cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
    try:
        url = "http://" + server.stdout.readline().split()[-1]
        results = {}
        for _ in range(args.rounds):
            for batch in (1, 8):
                direct = run(BIN / "trainer", "direct", "--batch", str(batch), "--rounds", "60" if batch == 1 else "20")
                load = run(BIN / "bench-harness", "load", PHOTO, "--server", url, "--concurrency", str(batch), "--json",
                           "--warm-up", "500ms", "--window", "1s")["points"][0]
                r = results.setdefault(batch, {"direct": [], "server": [], "outside": [], "batch": []})
                r["direct"].append(direct["photos_per_second"])
                r["server"].append(load["per_second"])
                r["outside"].append(100 * load["outside_network"])
                r["batch"].append(load["batch_size"])
    finally:
        server.terminate()
        server.wait(timeout=30)
    print(f"{args.rounds} alternating runs, median [min, max]; photos per second")
    for batch, r in results.items():
        ratio = statistics.median(r["server"]) / statistics.median(r["direct"])
        print(f"batch {batch}: direct loop {spread(r['direct'])}   server, {batch} under way {spread(r['server'])}   ratio {ratio:.2f}   "
              f"outside libtorch {spread(r['outside'], ' %')}   mean batch {statistics.median(r['batch']):.1f}")


main()
