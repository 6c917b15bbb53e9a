"""What a Python user would write: EfficientNet-Lite0 on ONNX Runtime behind mosec, image files in, five labels out.

Decoding has a process of its own, like the decode pool of offload-server; batches form up to 16 without waiting.
"""
import io
import json
import os

import msgspec
import numpy as np
import onnxruntime
from mosec import Server, Worker
from PIL import Image

MODEL = os.environ["MODEL"]
LABELS = json.load(open(os.environ["LABELS"]))
THREADS = int(os.environ.get("THREADS", "2"))


class Preprocess(Worker):
    def deserialize(self, data):
        return data

    def forward(self, data):
        photo = Image.open(io.BytesIO(data)).convert("RGB")
        if photo.size != (224, 224):
            side = 224 / (224 + 32) * min(photo.size)
            left, top = (photo.width - side) / 2, (photo.height - side) / 2
            photo = photo.resize((224, 224), Image.BICUBIC, box=(left, top, left + side, top + side))
        return ((np.asarray(photo, dtype=np.float32) - 127) / 128).transpose(2, 0, 1)


class Inference(Worker):
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
        self.session.run(None, {"pixels": np.zeros((1, 3, 224, 224), np.float32)})

    def forward(self, data):
        logits = self.session.run(None, {"pixels": np.stack(data)})[0]
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = exp / exp.sum(-1, keepdims=True)
        best = np.argsort(-logits, -1)[:, :5]
        return [[(LABELS[i], float(p[i])) for i in b] for b, p in zip(best, probabilities)]

    def serialize(self, data):
        return msgspec.json.encode(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=2)
    server.append_worker(Inference, max_batch_size=16, max_wait_time=0)
    server.run()
