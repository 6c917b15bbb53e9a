"""What the public Python client of the Open Inference Protocol (`tritonclient[grpc]`) expects of a server, point by point.

usage: tritonclient_list.py HOST:PORT CONTAINER PHOTO     (a bitstream of the default bundle, and the photo that it was made of)

Prints a line for each point; ends with 1 at the first that fails. The server runs with model_control = true.
"""
import queue
import sys
import threading
import time

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL, OTHER = "efficientnet-lite0", "efficientnet-lite2"
ADDRESS, CONTAINER, PHOTO = sys.argv[1], open(sys.argv[2], "rb").read(), open(sys.argv[3], "rb").read()
client = triton.InferenceServerClient(ADDRESS)
points = []


def point(check):
    points.append(check)
    return check


def refused(status, call, text=""):
    try:
        call()
    except InferenceServerException as e:
        assert e.status() == f"StatusCode.{status}", f"{e.status()}: {e.message()}"
        assert text in e.message(), e.message()
        return
    raise AssertionError("it was not refused")


def blob(name, *payloads, shape=None):
    values = triton.InferInput(name, shape or [len(payloads), 1], "BYTES")
    array = np.array(payloads, dtype=np.object_).reshape(shape or [len(payloads), 1])
    return values.set_data_from_numpy(array)


def numbers(array, datatype, name="pixels"):
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def top(result):
    return [int(row.argmax()) for row in result.as_numpy("logits")]


@point
def health():
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(MODEL) and client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready(MODEL, "7") and not client.is_model_ready("vgg")


@point
def server_metadata():
    found = client.get_server_metadata(as_json=True)
    assert found["name"] == "isthmus" and {"statistics", "model_repository", "classification"} <= set(found["extensions"])


@point
def model_metadata():
    found = client.get_model_metadata(MODEL, as_json=True)
    assert found["versions"] == ["1"] and [i["name"] for i in found["inputs"]] == ["bitstream", "image", "pixels"]
    assert [(o["name"], o["datatype"]) for o in found["outputs"]] == [("logits", "FP32"), ("labels", "BYTES")]
    refused("NOT_FOUND", lambda: client.get_model_metadata("vgg"), "vgg")
    refused("NOT_FOUND", lambda: client.get_model_metadata(MODEL, "7"), "7")


@point
def model_config():
    found = client.get_model_config(MODEL).config
    assert found.max_batch_size > 1 and found.name == MODEL and found.HasField("dynamic_batching")
    assert found.output[0].dims == [1000] and found.instance_group[0].count == 1


@point
def infer_a_bitstream():
    result = client.infer(MODEL, [blob("bitstream", CONTAINER)], request_id="photo 1")
    assert result.as_numpy("logits").shape == (1, 1000) and result.as_numpy("logits").dtype == np.float32
    value, index, name = result.as_numpy("labels")[0][0].decode().split(":")
    assert int(index) == top(result)[0] and 0 < float(value) <= 1 and name
    response = result.get_response()
    assert response.id == "photo 1" and response.model_name == MODEL and response.model_version == "1"


@point
def infer_an_image_and_its_pixels():
    image = client.infer(MODEL, [blob("image", PHOTO, shape=[1])])
    assert top(image) == top(client.infer("", [blob("image", PHOTO)])), "the default model"
    grey = np.full((2, 64, 80, 3), 128, dtype=np.uint8)
    both = client.infer(MODEL, [numbers(grey, "UINT8")]).as_numpy("logits")
    one = client.infer(MODEL, [numbers(grey[0], "UINT8")]).as_numpy("logits")
    assert both.shape == (2, 1000) and np.abs(both[0] - one[0]).max() < 1e-3
    flat = np.full((1, 3, 224, 224), 0.25, dtype=np.float32)
    floats = client.infer(MODEL, [numbers(flat, "FP32")]).as_numpy("logits")
    for wide, datatype in [(np.float64, "FP64"), (np.float16, "FP16")]:
        other = client.infer(MODEL, [numbers(flat.astype(wide), datatype)]).as_numpy("logits")
        assert np.abs(other - floats).max() < 1e-3, datatype


@point
def a_batch_in_one_request():
    alone = client.infer(MODEL, [blob("bitstream", CONTAINER)]).as_numpy("logits")
    many = client.infer(MODEL, [blob("bitstream", *[CONTAINER] * 5)]).as_numpy("logits")
    assert many.shape == (5, 1000) and np.abs(many - alone).max() < 1e-3


@point
def typed_contents():
    request = triton.service_pb2.ModelInferRequest(model_name=MODEL, id="typed")
    tensor = request.inputs.add(name="bitstream", datatype="BYTES", shape=[1, 1])
    tensor.contents.bytes_contents.append(CONTAINER)
    response = client._client_stub.ModelInfer(request)
    assert response.id == "typed" and list(response.outputs[0].shape) == [1, 1000]
    request.raw_input_contents.append(CONTAINER)
    try:
        client._client_stub.ModelInfer(request)
        raise AssertionError("typed and raw contents were mixed")
    except Exception as e:
        assert e.code().name == "INVALID_ARGUMENT", e


@point
def classification_extension():
    outputs = [triton.InferRequestedOutput("logits", class_count=3)]
    result = client.infer(MODEL, [blob("bitstream", CONTAINER)], outputs=outputs)
    rows = result.as_numpy("logits")
    assert rows.shape == (1, 3) and all(len(r.decode().split(":")) == 3 for r in rows[0])
    values = [float(r.decode().split(":")[0]) for r in rows[0]]
    assert values == sorted(values, reverse=True)


@point
def requested_outputs():
    only = client.infer(MODEL, [blob("bitstream", CONTAINER)], outputs=[triton.InferRequestedOutput("labels")], parameters={"top_k": 2})
    assert only.as_numpy("logits") is None and only.as_numpy("labels").shape == (1, 2)
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER)], outputs=[triton.InferRequestedOutput("mask")]), "mask")


@point
def wrong_requests():
    refused("NOT_FOUND", lambda: client.infer("vgg", [blob("bitstream", CONTAINER)]))
    refused("NOT_FOUND", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER)], model_version="9"))
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("tokens", CONTAINER)]), "tokens")
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER), blob("image", PHOTO)]), "one input")
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER[:-1])]))
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("image", b"no image")]))
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("image", *[PHOTO] * 65)]), "at most 64")
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [numbers(np.zeros((1, 3, 8, 8), np.float32), "FP32")]), "224")
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [numbers(np.zeros((1, 8, 8, 3), np.int64), "INT64")]))
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER)], sequence_id=3), "state")


@point
def deadlines():
    refused("DEADLINE_EXCEEDED", lambda: client.infer(MODEL, [blob("image", PHOTO)], client_timeout=0.001))
    time.sleep(1)  # nothing of the one before is left: behind it, this one would be refused as late
    # the request's own time limit, in microseconds
    refused("DEADLINE_EXCEEDED", lambda: client.infer(MODEL, [blob("image", PHOTO)], timeout=1000))
    client.infer(MODEL, [blob("image", PHOTO)], timeout=5_000_000)


@point
def async_infer():
    done = queue.Queue()
    for _ in range(8):
        client.async_infer(MODEL, [blob("bitstream", CONTAINER)], callback=lambda result, error: done.put((result, error)))
    for _ in range(8):
        result, error = done.get(timeout=20)
        assert error is None and result.as_numpy("logits").shape == (1, 1000)
    client.async_infer(MODEL, [blob("bitstream", b"x")], callback=lambda result, error: done.put((result, error)))
    assert done.get(timeout=20)[1].status() == "StatusCode.INVALID_ARGUMENT"


@point
def stream_infer():
    answers = queue.Queue()
    with triton.InferenceServerClient(ADDRESS) as streaming:
        streaming.start_stream(callback=lambda result, error: answers.put((result, error)))
        for i in range(6):
            payload = b"broken" if i == 2 else CONTAINER
            streaming.async_stream_infer(MODEL, [blob("bitstream", payload)], request_id=str(i))
        found = [answers.get(timeout=20) for _ in range(6)]
        streaming.stop_stream()
    good = sorted(r.get_response().id for r, e in found if e is None)
    assert good == ["0", "1", "3", "4", "5"], good
    # one answer for each request: clients that ask for empty final responses wait for none
    assert all(r.get_response().parameters["triton_final_response"].bool_param for r, e in found if e is None)


@point
def statistics():
    before = client.get_inference_statistics(MODEL).model_stats[0]
    client.infer(MODEL, [blob("bitstream", *[CONTAINER] * 3)])
    after = client.get_inference_statistics(MODEL, "1").model_stats[0]
    assert after.inference_count == before.inference_count + 3
    # requests, whatever they hold
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.execution_count > before.execution_count and after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert sum(b.batch_size * b.compute_infer.count for b in after.batch_stats) == after.inference_count
    refused("INVALID_ARGUMENT", lambda: client.infer(MODEL, [blob("bitstream", CONTAINER, b"broken")]))
    failed = client.get_inference_statistics(MODEL).model_stats[0].inference_stats.fail.count
    assert failed == after.inference_stats.fail.count + 1, failed
    assert len(client.get_inference_statistics().model_stats) == 1
    refused("NOT_FOUND", lambda: client.get_inference_statistics("vgg"))


@point
def repository():
    index = {m.name: m.state for m in client.get_model_repository_index().models}
    assert index == {MODEL: "READY", OTHER: "UNAVAILABLE"}, index
    client.load_model(OTHER)
    assert client.is_model_ready(OTHER)
    assert client.infer(OTHER, [blob("image", PHOTO)]).as_numpy("logits").shape == (1, 1000)
    # the same bitstream for another backbone
    assert client.infer(OTHER, [blob("bitstream", CONTAINER)]).as_numpy("logits").shape == (1, 1000)
    client.unload_model(OTHER)
    assert not client.is_model_ready(OTHER)
    refused("NOT_FOUND", lambda: client.infer(OTHER, [blob("image", PHOTO)]))
    refused("NOT_FOUND", lambda: client.unload_model(OTHER))
    refused("INVALID_ARGUMENT", lambda: client.unload_model(""), "empty")
    refused("INVALID_ARGUMENT", lambda: client.load_model("vgg"), "vgg")
    refused("INVALID_ARGUMENT", lambda: client.load_model(OTHER, config="{}"), "config")


@point
def a_swap_under_load_loses_nothing():
    stop, lost, answered = threading.Event(), [], []

    def ask():
        with triton.InferenceServerClient(ADDRESS) as own:
            while not stop.is_set():
                try:
                    own.infer(MODEL, [blob("bitstream", CONTAINER)])
                    answered.append(1)
                except InferenceServerException as e:
                    lost.append(str(e))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        client.load_model(MODEL)
    stop.set()
    for thread in threads:
        thread.join()
    assert not lost and len(answered) > 10, (len(answered), lost[:3])


@point
def log_settings():
    def now(name):
        return next(iter(client.get_log_settings(as_json=True)["settings"][name].values()))

    assert now("log_info") is True and now("log_filter") == "info"
    client.update_log_settings({"log_verbose_level": 1})
    assert now("log_verbose_level") == 1 and now("log_filter") == "debug"
    # what is not named stays
    client.update_log_settings({"log_warning": True})
    assert now("log_verbose_level") == 1 and now("log_filter") == "debug"
    client.update_log_settings({"log_verbose_level": 0})
    client.update_log_settings({"log_info": False})
    client.update_log_settings({"log_error": True})
    assert now("log_info") is False and now("log_warning") is True
    client.update_log_settings({"log_info": True})
    refused("INVALID_ARGUMENT", lambda: client.update_log_settings({"log_file": "/tmp/x"}))


@point
def what_is_not_offered():
    refused("UNIMPLEMENTED", lambda: client.register_system_shared_memory("a", "/a", 64))
    refused("UNIMPLEMENTED", lambda: client.get_trace_settings())


for check in points:
    try:
        check()
    except BaseException as e:
        print(f"FAILED {check.__name__}: {type(e).__name__}: {e}", flush=True)
        sys.exit(1)
    print(f"ok {check.__name__}", flush=True)
