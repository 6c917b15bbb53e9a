#!/usr/bin/env python3
"""What each part of the recipe is worth: short trainings at equal crops seen, several seeds each.

usage: ablation.py [--out FOLDER] [--steps N] [--seeds N] [--only NAME ...] [--jobs N] [--device auto] [--threads N] [--table]

Run from the repository's root after `make build training-photos`. Every run starts from fresh weights, sees `steps` x 36 crops, and is scored on the centre
crops of the held-out photos (bytes from the densities). Runs that are done are not done again: stop it and start it again as you like; --table prints what
there is. Two groups: parts added to a plain recipe (squared error by channel), and parts taken from the whole one. A variant is compared with its group's
first, seed by seed, in KL at equal bytes and in bytes at equal KL: mean over the range that both curves cover (log-linear between the levels), then mean and
95 % interval (t) over the seeds.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute() / "release"
BATCH = 36
WHOLE = {
    "name": "ablation", "encoder": "patch-stem", "backbone": "efficientnet-lite0", "split_block": 0, "measure_block": 4, "rebuild_weight": 0.1,
    "decoder_width": 128, "decoder_hidden": 64, "decoder_blocks": 4, "lambdas": [1.1, 0.3, 0.08], "target_bytes": [900.0, 1900.0, 3600.0],
    "batch": BATCH, "muon": True, "learning_rate": 0.002, "max_norm": 5000.0, "lambda_ramp": 0.25, "kl_from": 0.27, "kl_weight": 10000.0,
    "kl_sharpness": 1.5, "fisher": 0.5, "level_balance": 0.35, "prior_init_scale": 0.8, "ema": 0.98,
}
AUGMENT = {"colour": 0.15, "blend": 0.1}
PLAIN = {"fisher": 0.0, "kl_from": 1.0, "kl_weight": 0.0}
KL = {"kl_from": WHOLE["kl_from"], "kl_weight": WHOLE["kl_weight"]}
# the first of each group is what the others are compared with
GROUPS = {
    "objective: added to squared error by channel": {
        "plain": {},
        "saliency": {"saliency": 0.5},
        "fisher": {"fisher": 0.5},
        "fisher-positions": {"fisher_positions": 0.5},
        "hooks": {"hooks": [10, 15]},
        "kl": KL,
        "fisher+kl": {"fisher": 0.5, **KL},
        "together": {"saliency": 0.5, "fisher": 0.5, "fisher_positions": 0.5, "hooks": [10, 15], **KL},
    },
    "efficiency: taken from the whole recipe": {
        "whole": {},
        "no-channel-statistics": {"by_channel": False},
        "wide-prior": {"prior_init_scale": 10.0},
        "no-ramp": {"lambda_ramp": 0.0},
        "no-frozen-blocks": {"split_block": 4, "rebuild_weight": 0.0},
        "no-average": {"ema": 0.0},
        "adam": {"muon": False},
        "no-augmentation": {"augment": None},
    },
}
# two-sided 95 % points of Student's t, by degrees of freedom
T95 = [math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


def recipe(group, changes, steps, seed):
    keys = {**WHOLE, "steps": steps, "warmup": max(1, steps // 12), "seed": seed, **(PLAIN if group.startswith("objective") else {}), **changes}
    augment = keys.pop("augment", AUGMENT)
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    if augment:
        lines += ["[augment]"] + [f"{key} = {value}" for key, value in augment.items()]
    return "\n".join(lines) + "\n"


def scored(folder, steps):
    """The last point of a run's curve if it is done."""
    curve = folder / "curve.jsonl"
    lines = curve.read_text().splitlines() if curve.is_file() else []
    point = json.loads(lines[-1]) if lines else None
    return point if point and point["crops"] >= steps * BATCH else None


def train(args, folder, text):
    path = folder.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    command = [BIN / "trainer", "distill", "--recipe", path, "--run", folder, "--every", args.steps, "--device", args.device, "--threads", args.threads]
    if (folder / "checkpoint.safetensors").is_file():
        command.append("--resume")
    done = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")


def curve(point, by):
    """(log of `by`, log of the other one of bytes and KL), rising."""
    other = "kl" if by == "bytes" else "bytes"
    return sorted((math.log(max(level[by], 1e-6)), math.log(max(level[other], 1e-6))) for level in point["levels"])


def at(points, x):
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    raise ValueError(x)


def change(point, base, by):
    """Mean of the log of bytes or KL less the base's at equal `by`; none if the curves do not overlap."""
    ours, theirs = curve(point, by), curve(base, by)
    low, high = max(ours[0][0], theirs[0][0]), min(ours[-1][0], theirs[-1][0])
    if low >= high:
        return None
    xs = [min(low + (high - low) * i / 50, high) for i in range(51)]
    return statistics.fmean(at(ours, x) - at(theirs, x) for x in xs)


def with_interval(values):
    mean = statistics.fmean(values)
    half = T95[min(len(values), len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


def compared(points, others, by):
    """One cell: the change over the seeds that both have."""
    paired = [change(point, others[seed], by) for seed, point in points.items() if seed in others]
    if not paired:
        return "-"
    if None in paired:
        return "no overlap"
    mean, low, high = (100 * (math.exp(v) - 1) for v in with_interval(paired))
    return f"{mean:+.0f} % [{low:+.0f}, {high:+.0f}]" if len(paired) > 1 else f"{mean:+.0f} % (one seed)"


def table(args, results):
    for group, variants in GROUPS.items():
        base = next(iter(variants))
        print(f"\n**{group}** ({args.steps * BATCH:,} crops each)\n")
        print("| variant | seeds | bytes, KL and agreement of the levels (mean) | KL at equal bytes [95 %] | bytes at equal KL [95 %] |\n|---|---:|---|---|---|")
        for name in variants:
            points = results.get((group, name), {})
            if not points:
                continue
            levels = range(len(next(iter(points.values()))["levels"]))
            mean = lambda level, key: statistics.fmean(p["levels"][level][key] for p in points.values())  # noqa: E731, B023
            shown = ", ".join(f"{mean(i, 'bytes'):.0f} B {mean(i, 'kl'):.2f} {100 * mean(i, 'agreement'):.0f} %" for i in levels)
            others = results.get((group, base), {}) if name != base else {}
            print(f"| {name} | {len(points)} | {shown} | {compared(points, others, 'bytes')} | {compared(points, others, 'kl')} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="these variants alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, where a GPU has room for them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what is there; train nothing")
    args = parser.parse_args()
    wanted = [(g, n, c) for g, variants in GROUPS.items() for n, c in variants.items() if not args.only or n in args.only]
    results = {}

    def one(seed, group, name, changes):
        folder = args.out / str(args.steps) / group.split(":")[0] / f"{name}-{seed}"
        if not args.table and not scored(folder, args.steps):
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            train(args, folder, recipe(group, changes, args.steps, seed))
        if point := scored(folder, args.steps):
            results.setdefault((group, name), {})[seed] = point

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(one, seed, *variant) for seed in range(1, args.seeds + 1) for variant in wanted]
        try:
            for run in runs:
                run.result()
        except BaseException:
            # what is queued would take hours
            pool.shutdown(cancel_futures=True)
            raise
    table(args, results)


main()
