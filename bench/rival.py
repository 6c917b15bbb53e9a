#!/usr/bin/env python3
"""offload-server beside a Python server (mosec with ONNX Runtime), same photos as files, same weights, same cores, one after the other in turns.

usage: rival.py [--rounds N] [--seconds S]       run from the repository's root after `make build`; needs wrk (Debian) and pip

Each round starts each server anew, in alternating order: time to the first answer, then closed loops with 1 and 16 requests under way. Loads come from native
generators that cost little (wrk for HTTP, bench-harness for gRPC); generator and server share the machine's cores. Memory is the proportional share (PSS) of all
of a server's processes under load.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
PHOTOS = ROOT / "third_party/foolbox/foolbox/data"
HOME = ROOT / "third_party/rival"
HERE = Path(__file__).resolve().parent / "rival"
PORT = 18_431


def install():
    if not (HOME / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        subprocess.run([HOME / "bin/pip", "install", "-q", "-r", HERE / "requirements.txt", "msgspec"], check=True)
        (HOME / ".complete").touch()


def prepared(folder):
    """The crops as JPEG files, a script for wrk that sends them, and the model with a free batch dimension."""
    code = f"""
import glob, onnx, os
from PIL import Image
os.makedirs({str(folder / 'photos')!r})
for path in sorted(glob.glob({str(PHOTOS / 'imagenet_*')!r})):
    photo = Image.open(path).convert("RGB")
    side = 224 / 256 * min(photo.size)
    left, top = (photo.width - side) / 2, (photo.height - side) / 2
    crop = photo.resize((224, 224), Image.BICUBIC, box=(left, top, left + side, top + side))
    crop.save(os.path.join({str(folder / 'photos')!r}, os.path.basename(path)[:-4] + ".jpg"), quality=90)
model = onnx.load({str(ROOT / 'data/backbones/efficientnet-lite0.onnx')!r})
for value in (model.graph.input[0], model.graph.output[0]):
    value.type.tensor_type.shape.dim[0].dim_param = "n"
onnx.save(model, {str(folder / 'model.onnx')!r})
"""
    subprocess.run([HOME / "bin/python", "-c", code], check=True)
    (folder / "send.lua").write_text(
        "local bodies, n = {}, 0\n"
        f"for name in io.popen('ls {folder}/photos'):lines() do\n"
        f"  local f = io.open('{folder}/photos/' .. name, 'rb'); bodies[#bodies + 1] = f:read('*a'); f:close()\n"
        "end\n"
        "request = function() n = n % #bodies + 1; return wrk.format('POST', '/inference', nil, bodies[n]) end\n")


def pss(root):
    """Proportional memory of a process and all below it, in MB."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    family = {root}
    while True:
        more = {p for p, parent in parents.items() if parent in family} - family
        if not more:
            break
        family |= more
    total = 0
    for p in family:
        try:
            total += int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text(), re.M).group(1))
        except (OSError, AttributeError):
            pass
    return total / 1024


def ours(folder, seconds):
    began = time.monotonic()
    server = subprocess.Popen([BIN / "offload-server", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
    try:
        url = "http://" + server.stdout.readline().split()[-1]
        load = [BIN / "bench-harness", "load", folder / "photos", "--server", url, "--image", "file", "--json", "--most-windows", "1"]
        result = {"start": time.monotonic() - began}
        for n in (1, 16):
            out = subprocess.run([*load, "--concurrency", str(n), "--warm-up", "1s", "--window", f"{seconds}s"], cwd=ROOT, check=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
            point = json.loads(out)["points"][0]
            assert not point["failed"], point
            result[n] = (point["per_second"], point["latency_ms"]["p50"], point["latency_ms"]["p99"])
            result["memory"] = pss(server.pid)
        return result
    finally:
        server.terminate()
        server.wait(timeout=30)


def milliseconds(text):
    value, unit = re.match(r"([\d.]+)(us|ms|s|m)$", text).groups()
    return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}[unit]


def theirs(folder, seconds):
    began = time.monotonic()
    env = {**os.environ, "MODEL": str(folder / "model.onnx"), "LABELS": str(ROOT / "data/backbones/labels.json"), "THREADS": str(os.cpu_count())}
    server = subprocess.Popen([HOME / "bin/python", HERE / "mosec_server.py", "--port", str(PORT), "--address", "127.0.0.1", "--timeout", "30000",
                               "--log-level", "error"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{PORT}/inference"
    try:
        photo = next((folder / "photos").iterdir()).read_bytes()
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(url, photo), timeout=5) as answer:
                    assert len(json.load(answer)) == 5
                    break
            except OSError:
                if time.monotonic() - began > 60:
                    raise
                time.sleep(0.005)
        result = {"start": time.monotonic() - began}
        for n in (1, 16):
            for duration in (1, seconds):  # the first one warms up
                out = subprocess.run(["wrk", "-t1", f"-c{n}", f"-d{duration}s", "--timeout", "30s", "--latency", "-s", folder / "send.lua", url],
                                     check=True, stdout=subprocess.PIPE, text=True).stdout
            assert "Non-2xx" not in out, out
            at = lambda p: milliseconds(re.search(rf"^ *{p}% +(\S+)", out, re.M).group(1))  # noqa: E731
            result[n] = (float(re.search(r"Requests/sec: +([\d.]+)", out).group(1)), at(50), at(99))
            result["memory"] = pss(server.pid)
        return result
    finally:
        server.terminate()
        server.wait(timeout=30)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    args = parser.parse_args()
    install()
    results = {"offload-server": [], "mosec": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        for i in range(args.rounds):
            turns = [("offload-server", ours), ("mosec", theirs)]
            for who, run in turns if i % 2 == 0 else reversed(turns):
                results[who].append(run(folder, args.seconds))
                print(f"round {i + 1}: {who} {results[who][-1]}", file=sys.stderr, flush=True)
    rows = [("start, s", lambda r: r["start"]), ("memory (PSS) under load, MB", lambda r: r["memory"])]
    for n in (1, 16):
        rows += [(f"{what}, {n} under way", lambda r, n=n, k=k: r[n][k]) for k, what in enumerate(("answers/s", "p50 ms", "p99 ms"))]
    print(f"| {args.rounds} rounds, median [least, most] | offload-server | mosec, ONNX Runtime | ratio |\n|---|---:|---:|---:|")
    for what, of in rows:
        both = [[of(r) for r in results[who]] for who in results]
        shown = [f"{statistics.median(v):.1f} [{min(v):.1f}, {max(v):.1f}]" for v in both]
        print(f"| {what} | {shown[0]} | {shown[1]} | {statistics.median(both[0]) / statistics.median(both[1]):.2f} |")


main()
