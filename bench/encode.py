#!/usr/bin/env python3
"""Encode time on this machine: rten (the client's engine) next to ONNX Runtime on the same graphs.

usage: encode.py [--rounds N]        run from the repository's root after `make build`

Both engines get one thread; runs alternate, N times (default 7); printed are medians over runs and the
spread. The default bundle's encoder is the trained one; the FrankenSplit shape is timed on fresh weights (time does
not depend on them). ONNX Runtime comes from PyPI into a private folder; without it just rten is timed.
"""
import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
PHOTOS = ROOT / "third_party" / "foolbox" / "foolbox" / "data"
BUNDLE = ROOT / "bundles" / "lite0-patch-stem"
FOLDER = ROOT / "target" / "bench-photos"  # the ImageNet photos alone
PRIVATE = ROOT / "target" / "bench-python"
ONNXRUNTIME = "onnxruntime==1.23.2"


def onnxruntime():
    sys.path.insert(0, str(PRIVATE))
    try:
        import onnxruntime as ort
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", PRIVATE, ONNXRUNTIME]
        if subprocess.run(command, check=False).returncode:
            print("bench: onnxruntime could not be installed; timing rten alone", file=sys.stderr)
            return None
        importlib.invalidate_caches()  # the folder did not exist when the first import looked
        import onnxruntime as ort
    return ort


def ort_session(ort, graph):
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def ort_us(session, calls=60):
    import numpy as np
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 224, 224)).astype(np.float32)
    name = session.get_inputs()[0].name
    times = []
    for i in range(calls + 10):
        start = time.perf_counter()
        session.run(None, {name: x})
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[10:])


def rten_us(graph):
    command = [BIN / "bench-harness", "encode", FOLDER, "--bundle", BUNDLE, "--rounds", "60", *(["--graph", graph] if graph else [])]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def spread(values):
    return f"{statistics.median(values) / 1e3:6.2f} ms [{min(values) / 1e3:.2f}, {max(values) / 1e3:.2f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    reference = ROOT / "target" / "frankensplit.onnx"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for photo in PHOTOS.glob("imagenet_*.jpg"):
        (FOLDER / photo.name).write_bytes(photo.read_bytes())
    subprocess.run([BIN / "trainer", "graph", "--encoder", "frankensplit", "--out", reference], cwd=ROOT, check=True)
    ort = onnxruntime()
    for name, graph in (("patch-stem (default)", None), ("frankensplit shape", reference)):
        session = ort_session(ort, graph or BUNDLE / "encoder.onnx") if ort else None
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(rten_us(graph))
            if session:
                theirs.append(ort_us(session))
        network = [r["network_us"] for r in ours]
        print(f"{name}: 1 thread, {args.rounds} alternating runs of 60 calls, median [min, max] of the runs' medians")
        print(f"  preprocess   {spread([r['preprocess_us'] for r in ours])}")
        print(f"  network rten {spread(network)}")
        if theirs:
            ratio = statistics.median(network) / statistics.median(theirs)
            print(f"  network ONNX Runtime {ort.__version__} {spread(theirs)}   rten / ORT = {ratio:.2f}")
        print(f"  entropy      {spread([r['entropy_us'] for r in ours])}" if not graph else "")


main()
