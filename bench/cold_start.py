#!/usr/bin/env python3
"""Cold start of the client: from starting the process to its first byte on a socket, and to a finished container.

usage: cold_start.py [--rounds N]        run from the repository's root after `make build`
"""
import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release" / "edge-client"
PHOTO = ROOT / "third_party" / "foolbox" / "foolbox" / "data" / "imagenet_00_243.jpg"


def first_byte():
    """Milliseconds until `classify` has loaded its bundle and engine and sent its first byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.perf_counter()
        client = subprocess.Popen([CLIENT, "classify", PHOTO, "--server", url], cwd=ROOT, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL)
        connection, _ = listener.accept()
        connection.settimeout(10)
        connection.recv(1)
        took = time.perf_counter() - start
        client.kill()
        client.wait()
        connection.close()
    return 1e3 * took


def container():
    """Milliseconds until `encode` has started, encoded one photo, written the container and ended."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([CLIENT, "encode", PHOTO, "-o", f"{folder}/a.isth"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for name, measure in (("first byte sent", first_byte), ("first photo encoded", container)):
        times = [measure() for _ in range(rounds)]
        print(f"{name}: median {statistics.median(times):.0f} ms [{min(times):.0f}, {max(times):.0f}], n = {rounds}")
    print(f"binary: {CLIENT.stat().st_size / 1e6:.1f} MB")


main()
