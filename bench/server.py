#!/usr/bin/env python3
"""What serving costs: the server against calling the same decoder and tail directly in a loop, and what it adds to an answer at low load.

usage: server.py [--rounds N]        run from the repository's root after `make build`; needs two cores

Alternates, N times (default 5), for batches of 1 and 8:
* one core each: the bare loop on core 0 with one thread of libtorch; then the server on core 0 with one thread and that largest batch, under a closed loop
  with twice as many requests under way from a generator on core 1 (gRPC on loopback, real containers). Everything that the server does beside the network
  is on the network's core: the ratio is what serving costs.
* both cores for both, generator included, as many requests under way as the batch: what a user sees who does all on one machine.
Last, one request every 200 ms: latency less the network's own time.
"""
import argparse
import json
import os
import statistics
import subprocess
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
PHOTO = ROOT / "third_party" / "foolbox" / "foolbox" / "data" / "imagenet_00_243.jpg"
BOTH = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
ONE, OTHER = BOTH.split(",")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # for both, as the server sets it for itself


def on(cores, *command):
    return ["taskset", "-c", cores, *map(str, command)]


def run(cores, *command):
    return json.loads(subprocess.run(on(cores, *command), cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout)


@contextmanager
def serving(cores, threads, batch):
    command = on(cores, BIN / "offload-server", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--threads", threads, "--max-batch", batch)
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
    try:
        yield "http://" + server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.wait(timeout=30)


def load(cores, url, *more):
    point = run(cores, BIN / "bench-harness", "load", PHOTO, "--server", url, "--json", *more)["points"][0]
    assert not point["failed"] and not point["unsent"], point
    return point


def direct(cores, threads, batch):
    return run(cores, BIN / "trainer", "direct", "--threads", threads, "--batch", batch, "--rounds", 60 if batch == 1 else 20)["photos_per_second"]


def spread(values):
    return f"{statistics.median(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = {}
    # a batch more or less is to be little of a window
    closed = lambda batch: ("--warm-up", "1s", "--window", f"{4 if batch == 1 else 12}s", "--most-windows", 1)  # noqa: E731
    for _ in range(args.rounds):
        for batch in (1, 8):
            for name, server_cores, load_cores, threads, under_way in (
                    ("one core each", ONE, OTHER, 1, 2 * batch), ("both cores shared", BOTH, BOTH, 2, batch)):
                bare = direct(server_cores, threads, batch)
                with serving(server_cores, threads, batch) as url:
                    served = load(load_cores, url, "--concurrency", under_way, *closed(batch))
                r = results.setdefault((name, batch), ([], [], []))
                for values, value in zip(r, (bare, served["per_second"], served["batch_size"])):
                    values.append(value)
    print(f"| {args.rounds} alternating rounds, median [least, most] | batch | bare loop, photos/s | served | ratio of medians | mean batch |\n|---|---:|---:|---:|---:|---:|")
    for (name, batch), (bare, served, sizes) in results.items():
        ratio = statistics.median(served) / statistics.median(bare)
        print(f"| {name} | {batch} | {spread(bare)} | {spread(served)} | {ratio:.3f} | {statistics.median(sizes):.1f} |")
    quiet = []
    with serving(BOTH, 2, 16) as url:
        for _ in range(args.rounds):
            quiet.append(load(BOTH, url, "--rate", 5, "--even", "--warm-up", "1s", "--window", "8s", "--most-windows", 3, "--stability", 1000))
    n = sum(p["n"] for p in quiet)
    print(f"\nbeside the network at 5 requests a second ({len(quiet)} runs, {n} answers), ms:")
    names = (("serving", "serving alone"), ("server_overhead", "the server's, with entropy decoding"), ("overhead", "with gRPC on both sides too"))
    for what, name in names:
        of = lambda which: spread([p[f"{what}_ms"][which] for p in quiet])  # noqa: E731, B023
        print(f"  {name}: median {of('p50')}, 99th percentile {of('p99')}")


main()
