#!/usr/bin/env python3
"""What one client uploads with Flower's SecAgg+: its own client code, run for a neighbourhood of five clients.

usage: python3 bench/flower_upload.py [COORDINATES]       (needs `pip install flwr==1.41.0`)

The parameters are those of Flower's workflow (clipping 8.0, 2^22 levels, modulus 2^32, threshold 3 of 5 shares). Prints JSON.
"""
import importlib
import json
import sys
import time

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key

# the package exports a function of the same name
secagg = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
NODES = range(1, 6)


def main():
    coordinates = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    states = {n: secagg.SecAggPlusState() for n in NODES}
    setup = {Key.SAMPLE_NUMBER: 5, Key.SHARE_NUMBER: 5, Key.THRESHOLD: 3, Key.CLIPPING_RANGE: 8.0, Key.TARGET_RANGE: 1 << 22,
             Key.MOD_RANGE: 1 << 32, Key.MAX_WEIGHT: 1000.0}
    keys = {}
    for n, state in states.items():
        state.nid = n
        sent = secagg._setup(state, setup)
        keys[str(n)] = (sent[Key.PUBLIC_KEY_1], sent[Key.PUBLIC_KEY_2])
    mail = {n: ([], []) for n in NODES}
    shares = 0
    for n, state in states.items():
        sent = secagg._share_keys(state, keys)
        for to, text in zip(sent[Key.DESTINATION_LIST], sent[Key.CIPHERTEXT_LIST]):
            mail[to][0].append(n)
            mail[to][1].append(text)
            shares += len(text) if n == 1 else 0
    update = np.random.default_rng(1).normal(size=coordinates).astype(np.float32)
    began = time.perf_counter()
    sources, texts = mail[1]
    masked = secagg._collect_masked_vectors(states[1], {Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: texts}, 10,
                                            ndarrays_to_parameters([update]))[Key.MASKED_PARAMETERS]
    print(json.dumps({"coordinates": coordinates, "masked_vector_bytes": sum(len(m) for m in masked), "key_share_bytes": shares,
                      "client_s": round(time.perf_counter() - began, 3), "neighbours": len(NODES) - 1}))


if __name__ == "__main__":
    main()
