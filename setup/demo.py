#!/usr/bin/env python3
"""The demonstration: starts the server, classifies 20 ImageNet photos through the real client, and compares
the bundle's quality levels with WebP and JPEG sent to the same server.

usage: demo.py [--bundle DIR] [--quality N]

Exit status 0 only if every answer came over gRPC from the server it started. Python's standard library only.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
PHOTOS = ROOT / "third_party" / "foolbox" / "foolbox" / "data"
EVAL = ROOT / "data" / "eval"


def fail(message):
    sys.exit(f"demo: {message}")


def start_server(bundle):
    server = subprocess.Popen(
        [BIN / "offload-server", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--bundle", bundle],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
    line = server.stdout.readline()
    if not line.startswith("listening on "):
        server.wait(timeout=10)
        fail("the server did not start; its message is above")
    return server, "http://" + line.split()[-1]


def label_of(photo):
    return int(photo.stem.rsplit("_", 1)[1])


def classify(url, bundle, quality, photos):
    command = [BIN / "edge-client", "classify", *photos, "--server", url, "--bundle", bundle, "--json", "--top-k", "5"]
    if quality:
        command += ["--quality", str(quality)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode != 0 or len(answers) != len(photos) or any("error" in a for a in answers):
        fail(f"the client failed (exit status {done.returncode}): {[a.get('error') for a in answers]}")
    return answers


def show(photos, answers):
    print(f"{'photo':24} {'answer':28} {'right':6} {'bytes':>6} {'encode':>8} {'wire':>8} {'server':>8}")
    right = 0
    for photo, a in zip(photos, answers):
        best = a["labels"][0]
        ok = best["index"] == label_of(photo)
        in_five = any(l["index"] == label_of(photo) for l in a["labels"])
        right += ok
        mark = "yes" if ok else ("top-5" if in_five else "no")
        print(f"{photo.stem:24} {best['name'][:22]:22} {100 * best['score']:3.0f} % {mark:6} {a['bytes']:6} "
              f"{a['encode_ms']:5.1f} ms {a['wire_ms']:5.1f} ms {a['server_ms']:5.1f} ms")
    mean = sum(a["bytes"] for a in answers) / len(answers)
    print(f"\n{right} of {len(answers)} right (n is small), {mean:.0f} bytes a photo at quality {answers[0]['quality']}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="bundles/lite0-patch-stem")
    parser.add_argument("--quality", type=int)
    args = parser.parse_args()
    photos = sorted(PHOTOS.glob("imagenet_*.jpg"))
    if len(photos) != 20:
        fail(f"{PHOTOS} holds {len(photos)} ImageNet photos instead of 20; run `make setup`")
    # whoever stops it stops the server too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server, url = start_server(args.bundle)
    try:
        answers = classify(url, args.bundle, args.quality, photos)
        # the server's own clock and batch size are in every answer: they did not come from here
        if not all(a["server"]["network_us"] > 0 and a["server"]["batch_size"] >= 1 for a in answers):
            fail("an answer carries no server time")
        show(photos, answers)
        sets = [s for s in (EVAL / "demo", EVAL / "held-out") if s.is_dir()]
        if EVAL / "held-out" not in sets:
            print("demo: the held-out photos are missing (they come from Debian packages; `make photos` fetches them where "
                  "apt-get exists); comparing on the demo photos only\n")
        sys.stdout.flush()
        compared = subprocess.run(
            [BIN / "bench-harness", "compare", *sets, "--server", url, "--bundle", args.bundle, "--short", "--crops", "5"],
            cwd=ROOT, timeout=1800, check=False)
        if compared.returncode != 0:
            fail("the comparison failed; its message is above")
    finally:
        server.terminate()
        try:
            code = server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            fail("the server did not stop")
    if code != 0:
        fail(f"the server ended with status {code}")
    print("demo: every answer above came over gRPC from the server that was started here, which has stopped")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
