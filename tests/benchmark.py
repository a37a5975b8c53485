"""Ratios of speed and memory, measured side by side in one run; no test, nothing here can fail.

  python tests/benchmark.py clustering 12936 32621      search, Jaccard distance, DBSCAN of N images
  python tests/benchmark.py evaluation 3368x15913       ranking of Q queries in a gallery of G
  python tests/benchmark.py step                        where a training step spends its time

Features are synthetic: 2,048 dimensions, people of 17 images, 6 cameras. Every measurement runs in
a process of its own, three times; medians, and peak memory above that of the features (Linux).
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402


def draw(n, seed=0, d=2048):
    """-> (N, D) unit features, (N,) people, (N,) cameras; people and cameras are the same for all
    seeds."""
    fixed, g = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    people = torch.randn(n // 17 + 1, d, generator=fixed)
    cameras = torch.randn(6, d, generator=fixed)
    who = torch.randint(len(people), (n,), generator=g)
    where = torch.randint(6, (n,), generator=g)
    features = people[who] + .5 * cameras[where] + .9 * torch.randn(n, d, generator=g)
    return F.normalize(features), who.numpy(), where.numpy()


# ------------------------------------------------------------------- references, dense and obvious

def dense_clustering(features, k1=30, k2=6, eps=.6):
    """k-reciprocal Jaccard distance as an N x N array, an image at a time, and DBSCAN on that."""
    n = len(features)
    rank = torch.cat([common._nearest_exact(features, rows, k1)
                      for rows in torch.arange(n).split(1024)]).numpy()
    yield "search"

    def mutual(i, k):
        forward = rank[i, :k]
        return forward[(rank[forward, :k] == i).any(1)]
    vectors = np.zeros((n, n), np.float32)
    for i in range(n):
        near = mutual(i, k1 + 1)
        grown = [near]
        for c in near:
            close = mutual(c, round(k1 / 2) + 1)
            if len(np.intersect1d(close, near)) > 2 / 3 * len(close):
                grown.append(close)
        members = np.unique(np.concatenate(grown))
        weight = np.exp(2 * (features[members] @ features[i]).numpy() - 2)
        vectors[i, members] = weight / weight.sum()
    vectors = np.stack([vectors[rank[i, :k2]].mean(0) for i in range(n)])
    holders = [np.flatnonzero(vectors[:, column]) for column in range(n)]
    distance = np.empty((n, n), np.float32)
    for i in range(n):
        shared = np.zeros(n, np.float32)
        for column in np.flatnonzero(vectors[i]):
            mine = holders[column]
            shared[mine] += np.minimum(vectors[i, column], vectors[mine, column])
        distance[i] = 1 - shared / (2 - shared)
    yield "distance"
    labels = DBSCAN(eps=eps + 1e-5, min_samples=4, metric="precomputed").fit(distance.clip(0))
    yield "DBSCAN"
    yield labels.labels_


def clustering(features, k1=30, eps=.6):
    nearest, seconds = common.nearest, []

    def timed(*args):
        start = time.perf_counter()
        rank = nearest(*args)
        seconds.append(time.perf_counter() - start)
        return rank
    common.nearest = timed
    distance = common.jaccard_distance(features, k1, max_distance=eps)
    common.nearest = nearest
    yield "search and distance"
    labels = common.dbscan(distance, eps)
    yield "DBSCAN"
    yield labels, seconds[0]


def loop_evaluation(query_features, gallery_features, query, gallery):
    """A query at a time, all of its similarities sorted."""
    precision, first = [], []
    for q in range(len(query_features)):
        similar = (gallery_features @ query_features[q]).numpy()
        same = gallery.pids == query.pids[q]
        keep = ~(same & (gallery.cams == query.cams[q]))
        hits = same[keep][np.argsort(-similar[keep], kind="stable")]
        if hits.any():
            precision.append(common.average_precision(hits))
            first.append(hits.argmax())
    return dict(mAP=np.mean(precision), rank1=np.mean(np.array(first) == 0))


# ------------------------------------------------------------------------------------- measurements

def memory(which="VmHWM"):
    """-> MiB of this process: VmHWM, the peak since its reset, or VmRSS, now. Linux only."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(next(line for line in file if line.startswith(which)).split()[1]) / 1024


def reset_peak():
    """-> memory now, in MiB, from where on peaks count."""
    list(clustering(draw(600)[0]))  # libraries that load on first use are not counted
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    return memory("VmRSS")


def measure_clustering(kind, n):
    features, people, _ = draw(n)
    before, start, seconds = reset_peak(), time.perf_counter(), {}
    for part in dict(dense=dense_clustering, ours=clustering)[kind](features):
        if isinstance(part, str):
            seconds[part] = time.perf_counter() - start
            start = time.perf_counter()
    if kind == "ours":
        part, seconds["search"] = part
        seconds["distance"] = seconds.pop("search and distance") - seconds["search"]
    return dict(seconds, all=sum(seconds.values()), MiB=memory() - before,
                digest=hash(common.renumber(part).tobytes()))


def measure_evaluation(kind, q, g):
    (features, who, where), (others, whose, wheres) = draw(q, 1), draw(g, 2)
    query, gallery = (common.Split([""] * len(p), p % 750, c) for p, c in
                      ((who, where), (whose, wheres)))
    before, start = reset_peak(), time.perf_counter()
    rank = dict(loop=loop_evaluation, ours=common.evaluate)[kind]
    scores = rank(features, others, query, gallery)
    return dict(all=time.perf_counter() - start, MiB=memory() - before,
                digest=round(scores["mAP"], 6))


def measure_step(kind, device):
    """Seconds of the parts of ccsd.py's step, of the toy set's size and of the paper's."""
    arch, height, width, b = dict(toy=("small", 96, 48, 64),
                                  paper=("resnet50", 256, 128, 256))[kind]
    device = common.pick_device(device)
    images = torch.randint(256, (b, 3, height, width), dtype=torch.uint8, device=device)
    model = common.Encoder(arch, "none").to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    memory = F.normalize(torch.randn(700, model.width, device=device))
    y = torch.arange(b, device=device) // 16
    generator = torch.Generator().manual_seed(0)
    seconds = dict.fromkeys(("augment", "forward", "loss", "backward", "optimiser", "memory"), 0.)

    def lap(part):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[part] += now - lap.start
        lap.start = now
    for step in range(12):
        if step == 2:  # the first two warm up
            seconds = dict.fromkeys(seconds, 0.)
        lap.start = time.perf_counter()
        batch = common.augment(images, generator)
        lap("augment")
        f = model(batch)
        lap("forward")
        loss = F.cross_entropy(f @ memory.T / .05, y)
        lap("loss")
        optimizer.zero_grad()
        loss.backward()
        lap("backward")
        optimizer.step()
        lap("optimiser")
        common.update_memory(memory, f.detach(), y, .1)
        lap("memory")
    total = sum(seconds.values())
    print(f"{arch}, {height} x {width}, batch {b}, {device}: {10 * b / total:,.0f} images a second:"
          , ", ".join(f"{part} {value / total:.1%}" for part, value in seconds.items()))


def child(*words):
    """Run one measurement in a process of its own -> its dict."""
    env = dict(os.environ, PYTHONHASHSEED="0")
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], text=True,
                          stdout=subprocess.PIPE, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(*cells):
    print("| " + " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell)
                            for cell in cells) + " |", flush=True)


def compare(what, size, kinds, repeats):
    """Interleaved runs of both kinds; medians, and the ratio of their times."""
    runs = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            runs[kind].append(child(what, kind, *size))
    median = {kind: {key: float(np.median([run[key] for run in its])) for key in its[0]
                     if key != "digest"} for kind, its in runs.items()}
    row(what, " x ".join(map(str, size)), "seconds of the parts", "all", "extra MiB")
    row("---", "---", "---", "---", "---")
    for kind, its in median.items():
        parts = ", ".join(f"{part} {value:.2f}" for part, value in its.items()
                          if part not in ("all", "MiB"))
        row(kind, "", parts, its["all"], its["MiB"])
    reference, ours = kinds
    same = len({run["digest"] for its in runs.values() for run in its}) == 1
    row("ratio", "", "equal results" if same else "DIFFERENT RESULTS",
        median[reference]["all"] / median[ours]["all"], median[reference]["MiB"]
        / max(1, median[ours]["MiB"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clustering", "evaluation", "step"))
    parser.add_argument("sizes", nargs="*", help="N, or QxG, or toy and paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="no reference, for sizes beyond it")
    parser.add_argument("--device", default="auto", choices=common.DEVICES)
    args = parser.parse_args()
    for size in args.sizes or dict(clustering=["12936"], evaluation=["3368x15913"],
                                   step=["toy"])[args.what]:
        if args.what == "step":
            measure_step(size, args.device)
        elif args.ours:
            print(size, child(args.what, "ours", *size.split("x")))
        else:
            compare(args.what, size.split("x"), dict(clustering=("dense", "ours"),
                                                     evaluation=("loop", "ours"))[args.what],
                    args.repeats)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure = dict(clustering=measure_clustering, evaluation=measure_evaluation)[sys.argv[2]]
        print(json.dumps(measure(sys.argv[3], *map(int, sys.argv[4:]))))
    else:
        main()
