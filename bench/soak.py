#!/usr/bin/env python3
"""A long run of mixed load: bitstreams and image files at a steady rate, requests that are cancelled, models that are loaded and unloaded, clients that send
nonsense, stop in the middle, say nothing, read no answers, or send what is small on the wire and large or slow to decode. Counts what became of every request, and watches the server's memory and descriptors.

usage: soak.py [--minutes M] [--rate R] [--out FILE]     run from the repository's root after `make build python-clients`

No request that was not cancelled may fail; memory must be flat, that which the server holds and that of the process (slope of the least of every three
minutes after the first fifth, with a 95 % interval), and descriptors must come back. Exit status 1 otherwise.
"""
import argparse
import collections
import json
import math
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
sys.path.insert(0, str(ROOT / "third_party/python-clients"))

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import tritonclient.grpc as triton  # noqa: E402
from tritonclient.grpc import service_pb2  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

PHOTOS = sorted((ROOT / "third_party/foolbox/foolbox/data").glob("imagenet_*"))
MODELS = ["efficientnet-lite0", "efficientnet-lite2"]
SCANS = ROOT / "fuzz/corpus/image/scans"
METHOD = "/inference.GRPCInferenceService/ModelInfer"
LIMIT_US = 20_000_000


class Counts:
    """What became of requests."""

    def __init__(self):
        self.lock = threading.Lock()
        self.of = collections.Counter()
        self.errors = []

    def add(self, what, error=None):
        with self.lock:
            self.of[what] += 1
            if error is not None and len(self.errors) < 50:
                self.errors.append(f"{what}: {error}")


def tensor(name, data):
    return triton.InferInput(name, [1, 1], "BYTES").set_data_from_numpy(np.array([[data]], dtype=np.object_))


def every(period, stop, work):
    """Calls `work` about every `period` seconds until `stop` is set."""
    while not stop.wait(period * random.uniform(0.7, 1.3)):
        work()


def steady(client, inputs, model, counts, rate, stop):
    """Requests that must all be answered; Lite2 may be away while it is swapped."""

    def ask():
        answered = threading.Event()

        def done(result, error):
            if error is None:
                counts.add("answered")
            elif model != MODELS[0] and "is not loaded" in str(error):
                counts.add("model away")
            else:
                counts.add("failed", error)
            answered.set()

        client.async_infer(model, [random.choice(inputs)], done, timeout=LIMIT_US, client_timeout=30)
        if len(waiting) > 2000:
            waiting.popleft()
        waiting.append(answered)

    waiting = collections.deque()
    every(1 / rate, stop, ask)
    for answered in waiting:
        if not answered.wait(30):
            counts.add("lost", "no answer and no error within 30 s")


def cancels(client, inputs, counts, stop):
    def ask():
        done = threading.Event()
        context = client.async_infer(MODELS[0], [random.choice(inputs)], lambda result, error: done.set(), client_timeout=30)
        time.sleep(random.uniform(0, 0.02))
        context.cancel()
        counts.add("cancelled" if done.wait(30) else "lost", None)

    every(0.5, stop, ask)


def swaps(client, counts, stop):
    """Lite0 is loaded anew (never away), Lite2 comes and goes."""

    def swap():
        try:
            client.load_model(MODELS[0])
            client.load_model(MODELS[1]) if random.random() < 0.7 else client.unload_model(MODELS[1])
            counts.add("swapped")
        except InferenceServerException as error:
            if "is not loaded" not in str(error):
                counts.add("swap failed", error)

    every(20, stop, swap)
    client.load_model(MODELS[1])


def frame(kind, flags, stream, payload):
    """A frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def unread_request(container):
    """A whole request on a connection that has no room for answers."""
    literal = lambda name, value: b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value  # noqa: E731
    head = b"\x83\x86" + literal(b":path", METHOD.encode()) + literal(b":authority", b"localhost")
    head += literal(b"content-type", b"application/grpc") + literal(b"te", b"trailers")
    request = service_pb2.ModelInferRequest(model_name=MODELS[0])
    request.inputs.add(name="bitstream", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(len(container).to_bytes(4, "little") + container)
    message = request.SerializeToString()
    no_room = b"\0\x04" + (0).to_bytes(4, "big")
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, no_room)
    return greeting + frame(1, 4, 1, head) + frame(0, 1, 1, b"\0" + len(message).to_bytes(4, "big") + message)


def hostile(address, client, container, counts, stop):
    host, port = address
    channel = grpc.insecure_channel(f"{host}:{port}")
    as_it_is = channel.unary_unary(METHOD, request_serializer=lambda b: b, response_deserializer=lambda b: b)

    def garbage():
        with socket.create_connection((host, port), timeout=5) as s:
            s.sendall(os.urandom(random.randrange(1, 2000)))

    def half_a_request():
        with socket.create_connection((host, port), timeout=5) as s:
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + b"\x00\x10\x00\x00\x00\x00\x00\x00\x01partial")
            time.sleep(0.2)

    def silence():
        s = socket.create_connection((host, port), timeout=5)
        silent.append(s)
        if len(silent) > 20:
            silent.popleft().close()

    def wrong():
        data = bytearray(container)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        name = random.choice(["bitstream", "image"])
        try:
            client.infer(MODELS[0], [tensor(name, bytes(data))], client_timeout=30)
            counts.add("damaged input was answered", name)
        except InferenceServerException as error:
            counts.add("refused") if "INVALID_ARGUMENT" in str(error) else counts.add("wrong refusal", error)

    def fields():
        try:
            as_it_is(b"\x2a\0" * 1_000_000, timeout=30)
            counts.add("damaged input was answered", "fields")
        except grpc.RpcError as error:
            counts.add("refused") if error.code() == grpc.StatusCode.INVALID_ARGUMENT else counts.add("wrong refusal", error)

    def scans():
        try:
            client.infer(MODELS[0], [tensor("image", SCANS.read_bytes())], client_timeout=30)
            counts.add("damaged input was answered", "scans")
        except InferenceServerException as error:
            counts.add("refused") if "INVALID_ARGUMENT" in str(error) else counts.add("wrong refusal", error)

    def unread():
        s = socket.create_connection((host, port), timeout=5)
        s.sendall(unread_request(container))
        silent.append(s)
        if len(silent) > 20:
            silent.popleft().close()

    silent = collections.deque()

    def attack():
        try:
            random.choice([garbage, half_a_request, silence, unread, fields, scans, wrong, wrong])()
            counts.add("attacks")
        except OSError:
            counts.add("attacks")  # the server may close first

    every(0.5, stop, attack)
    for s in silent:
        s.close()


def allocated(admin):
    """MB that the server holds, as its metrics say."""
    page = urllib.request.urlopen(f"http://{admin}/metrics", timeout=10).read().decode()
    return float(re.search(r"^isthmus_memory_allocated_bytes (\S+)", page, re.M).group(1)) / 2**20


def watch(pid, admin, samples, stop):
    """Seconds, MB of the process, MB that the server holds, descriptors."""
    began = time.monotonic()

    def sample():
        memory = int(re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M).group(1)) / 1024
        samples.append((time.monotonic() - began, memory, allocated(admin), len(os.listdir(f"/proc/{pid}/fd"))))

    every(2, stop, sample)


def slope(samples, minutes, column):
    """MB an hour of the least of every three minutes after the first fifth, with the half width of its 95 % interval (ordinary least squares)."""
    least = {}
    for sample in samples:
        if sample[0] >= 60 * minutes / 5:
            least[int(sample[0] // 180)] = min(sample[column], least.get(int(sample[0] // 180), math.inf))
    if len(least) < 4:
        return None
    x, y = [m / 20 for m in least], list(least.values())
    mx, my = statistics.mean(x), statistics.mean(y)
    sxx = sum((a - mx) ** 2 for a in x)
    b = sum((a - mx) * (v - my) for a, v in zip(x, y)) / sxx
    residual = sum((v - my - b * (a - mx)) ** 2 for a, v in zip(x, y)) / (len(x) - 2)
    return {"slope": b, "half_width_95": 2.15 * math.sqrt(residual / sxx), "mean_mb": my}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=12, help="requests a second that must all be answered")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    random.seed(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        containers = []
        for photo in PHOTOS[:8]:
            out = folder / (photo.stem + ".isth")
            subprocess.run([BIN / "edge-client", "encode", photo, "-o", out], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            containers.append(out.read_bytes())
        config = folder / "server.toml"
        config.write_text('model_control = true\nmodels = ["efficientnet-lite0", "efficientnet-lite2"]\nmax_connection_age = "1m"\n'
                          'keepalive_interval = "5s"\nkeepalive_timeout = "5s"\n')
        admin = f"127.0.0.1:{free_port()}"
        server = subprocess.Popen([BIN / "offload-server", "--config", config, "--listen", "127.0.0.1:0", "--admin-listen", admin],
                                  cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
        counts, samples, stop, threads = Counts(), [], threading.Event(), []
        try:
            address = server.stdout.readline().split()[-1]
            host, port = address.rsplit(":", 1)
            connect = lambda: triton.InferenceServerClient(address)  # noqa: E731
            bitstreams = [tensor("bitstream", c) for c in containers]
            images = [tensor("image", p.read_bytes()) for p in PHOTOS[:8]]
            work = [
                (steady, connect(), bitstreams, MODELS[0], counts, 0.7 * args.rate),
                (steady, connect(), images, MODELS[0], counts, 0.15 * args.rate),
                (steady, connect(), images, MODELS[1], counts, 0.15 * args.rate),
                (cancels, connect(), bitstreams, counts),
                (swaps, connect(), counts),
                (hostile, (host, int(port)), connect(), containers[0], counts),
                (watch, server.pid, admin, samples),
            ]
            for function, *rest in work:
                threads.append(threading.Thread(target=function, args=(*rest, stop)))
                threads[-1].start()
            began = time.monotonic()
            while time.monotonic() - began < 60 * args.minutes and server.poll() is None:
                time.sleep(min(30, 60 * args.minutes))
                at, memory, held, files = samples[-1]
                print(f"{at / 60:5.1f} min: {dict(counts.of)}, {memory:.0f} MB ({held:.0f} held), {files} descriptors", file=sys.stderr, flush=True)
            stop.set()
            for thread in threads:
                thread.join(60)
            time.sleep(15)  # silent connections are given up
            files = len(os.listdir(f"/proc/{server.pid}/fd"))
        finally:
            stop.set()
            server.terminate()
            ended = server.wait(timeout=60)
    first = [s[3] for s in samples if s[0] < 60]
    fits = {"process": slope(samples, args.minutes, 1), "held": slope(samples, args.minutes, 2)}
    bad = {k: v for k, v in counts.of.items() if k in ("failed", "lost", "swap failed", "wrong refusal", "damaged input was answered")}
    result = {"minutes": args.minutes, "rate": args.rate, "counts": dict(counts.of), "errors": counts.errors, "exit_status": ended,
              "memory_mb": {"first": samples[0][1], "last": samples[-1][1], "most": max(s[1] for s in samples)},
              "memory_slope_mb_per_hour": fits,
              "descriptors": {"first": first[0], "most": max(s[3] for s in samples), "after": files}, "samples": samples[:: max(1, len(samples) // 400)]}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))
    flat = all(fit is None or fit["slope"] - fit["half_width_95"] < 10 for fit in fits.values())
    ok = not bad and ended == 0 and files <= first[0] + 10 and flat
    print("passed" if ok else f"FAILED: {bad or ''} {'' if flat else 'memory grows'} {'' if files <= first[0] + 10 else 'descriptors stay'}")
    sys.exit(not ok)


main()
