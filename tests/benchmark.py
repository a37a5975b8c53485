"""Ratios of speed and memory, measured side by side in one run; no test, nothing here can fail.

  python tests/benchmark.py clustering 12936 32621      search, Jaccard distance, DBSCAN of N images
  python tests/benchmark.py evaluation 3368x15913       ranking of Q queries in a gallery of G
  python tests/benchmark.py rerank 3368x15913 --ours    the same with k-reciprocal re-ranking
  python tests/benchmark.py step toy paper resnet18     a training step: speed, parts, what may help
  python tests/benchmark.py memory market1501 msmt17    a run's main memory at 256 x 128

Features are synthetic: 2,048 dimensions, people of 17 images, 6 cameras; the references are on the
CPU, ours on --device. Every measurement runs in a process of its own, three times; medians, and
peak memory above that of the features (Linux; of a step on CUDA, that of the GPU).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import slow
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import ccsd  # noqa: E402
import common  # noqa: E402
import eval as scoring  # noqa: E402


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
    n, search = len(features), common.exact_search(features)
    rank = torch.cat([search(rows, k1) for rows in torch.arange(n).split(1024)]).tolist()
    yield "search"

    def weigh(i, members):
        return np.exp(2 * (features[members] @ features[i]).numpy() - 2)
    vectors = slow.vectors(rank, weigh, k1, k2, np.float32)
    holders = [np.flatnonzero(vectors[:, column]) for column in range(n)]
    distance = np.empty((n, n), np.float32)
    for i in range(n):  # slow.jaccard without the pairs that have nothing in common
        shared = np.zeros(n, np.float32)
        for column in np.flatnonzero(vectors[i]):
            mine = holders[column]
            shared[mine] += np.minimum(vectors[i, column], vectors[mine, column])
        distance[i] = 1 - shared / (2 - shared)
    yield "distance"
    labels = slow.dbscan(distance, eps)
    yield "DBSCAN"
    yield labels


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
    similar = ((gallery_features @ f).numpy() for f in query_features)
    return slow.evaluate(similar, query, gallery)


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


def measure_clustering(kind, n, device):
    features = draw(n)[0].to(device if kind == "ours" else "cpu")
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


def measure_ranking(what, kind, q, g, device):
    (features, who, where), (others, whose, wheres) = draw(q, 1), draw(g, 2)
    if kind == "ours":
        features, others = features.to(device), others.to(device)
    query, gallery = (common.Split([""] * len(p), p % 750, c) for p, c in
                      ((who, where), (whose, wheres)))
    before, start = reset_peak(), time.perf_counter()
    if what == "rerank":
        rank = dict(dense=slow.rerank, ours=scoring.rerank)[kind]
        similar = rank(features, others, 20, 6, .3)
        if kind == "dense":
            similar = (-torch.from_numpy(similar)).split(256)
        scores = common.score_ranking(similar, query, gallery)
    else:
        rank = dict(loop=loop_evaluation, ours=common.evaluate)[kind]
        scores = rank(features, others, query, gallery)
    return dict(all=time.perf_counter() - start, MiB=memory() - before,
                digest=round(scores["mAP"], 6))


STEPS = {  # network, height, width, batch, chunks for batch norm
    "toy": ("small", 96, 48, 64, 1), "paper": ("resnet50", 256, 128, 256, 4),
    "resnet18": ("resnet18", 256, 128, 256, 4)}
VARIANTS = {  # what to try on a step: flags of the pages, cudnn.benchmark, mode of torch.compile;
    # fp32 may use TF32 in convolutions, but not in the product that it is compared with
    "as the pages do": {}, "--precision fp32": dict(precision="fp32"),
    "--precision bf16": dict(precision="bf16"), "--precision fp16": dict(precision="fp16"),
    "--recompute": dict(recompute=True), "cudnn.benchmark": dict(cudnn=True),
    "torch.compile": dict(mode="default"), "compiled, CUDA graphs": dict(mode="reduce-overhead")}
PARTS = ("augment", "forward", "loss", "backward", "optimiser", "memory")


def measure_step(kind, device, mode=None, cudnn=False, **flags):
    """The step of ccsd.py without groups, again and again, on images that lie on the device."""
    arch, height, width, b, splits = STEPS[kind]
    device, generator = torch.device(device), common.seed_everything(0)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn, not cudnn
    images = torch.randint(256, (b, 3, height, width), dtype=torch.uint8).to(device)
    flags = dict(dict(precision="auto", recompute=False, size=(height, width)), **flags)
    flags["precision"] = common.precision(device, flags["precision"])
    model = common.Encoder(arch, "none").on(device, argparse.Namespace(**flags))
    if mode:
        model.backbone.compile(mode=mode)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == "fp16")
    means = F.normalize(torch.randn(700, model.width)).to(device)
    y = torch.arange(b, device=device) // 16
    before = reset_peak() if device.type != "cuda" else 0

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(lap=lambda part: None):
        batch = common.augment(images, generator)
        lap("augment")
        f = torch.cat([model(chunk) for chunk in batch.chunk(splits)])
        lap("forward")
        loss = F.cross_entropy(f @ means.T / .05, y)
        lap("loss")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        lap("backward")
        scaler.step(optimizer)
        scaler.update()
        lap("optimiser")
        common.update_memory(means, f.detach(), y, .1, 16)
        lap("memory")

    def time_of(do, times):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            do()
        wait()
        return (time.perf_counter() - start) / times
    with FlopCounterMode(display=False) as counter:
        if not mode:
            step()
    warm = min(time_of(step, 1) for _ in range(3))
    times = max(1, min(50, int(1 / warm)))
    seconds = float(np.median([time_of(step, times) for _ in range(3)]))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else memory() - before
    parts = dict.fromkeys(PARTS, 0.)

    def lap(part):
        wait()
        now = time.perf_counter()
        parts[part] += now - lap.start
        lap.start = now
    for _ in range(times):
        lap.start = time.perf_counter()
        step(lap)
    some = images.repeat(4, 1, 1, 1).cpu()
    common.extract_features(model, some)
    seen = time_of(lambda: common.extract_features(model, some), 1)
    side = 8192 if device.type == "cuda" else 2048
    kind = dict(bf16=torch.bfloat16, fp16=torch.float16).get(model.precision)
    square = torch.randn(side, side, device=device, dtype=kind)
    square @ square
    rate = 2 * side ** 3 / min(time_of(lambda: square @ square, 3) for _ in range(3))
    return dict(steps=b / seconds, flop=counter.get_total_flops() / b, rate=rate, MiB=peak,
                extracted=4 * b / seen,
                parts={part: value / sum(parts.values()) for part, value in parts.items()})


def report_step(kind, device):
    """A table of variants, and what 50 epochs of 200 batches of Market-1501 would take."""
    skip = {"cpu": ("--precision fp32", "--precision fp16", "cudnn.benchmark",
                    "compiled, CUDA graphs")}
    row(f"{kind}, {device}", "images a second", "ratio", "TFLOP/s", "of the product of matrices",
        "peak MiB", "extraction, images a second")
    row(*["---"] * 7)
    for variant in VARIANTS:
        if variant in skip.get(device, ()):
            continue
        try:
            run = child("step", variant, kind, device)
        except subprocess.CalledProcessError as error:  # a variant may not work everywhere
            row(variant, "failed: " + (error.stderr.splitlines() or [""])[-1])
            if variant == "as the pages do":
                return
            continue
        if variant == "as the pages do":
            plain = run
        speed = run["steps"] * plain["flop"]
        row(variant, run["steps"], run["steps"] / plain["steps"], speed / 1e12,
            f"{speed / run['rate']:.1%}", run["MiB"], run["extracted"])
    print(", ".join(f"{part} {value:.1%}" for part, value in plain["parts"].items()))
    _, _, _, b, _ = STEPS[kind]
    if kind == "toy":
        return
    print(f"50 x 200 steps {50 * 200 * b / plain['steps'] / 60:,.1f} minutes, 50 extractions of "
          f"12,936 images and 5 of 19,281 {(50 * 12936 + 5 * 19281) / plain['extracted'] / 60:,.1f}"
          " minutes; clustering and ranking: measure them here, too")


def measure_memory(name):
    """Peak main memory of a process that trains two steps of ccsd.py on as many JPEGs as a data set
    has, links to 100 drawn ones, and evaluates twice. The network computes next to nothing, but its
    features have the 2,048 dimensions of ResNet-50's. Not in it: the search for clusters."""
    def backbone(arch, weights):
        return torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(3, 2048, 1))
    import resource  # not on Windows
    common.ARCHS["nothing"] = 2048, backbone
    rng, (_, counts) = np.random.default_rng(0), common.DATASETS[name]
    with tempfile.TemporaryDirectory() as folder:
        drawn = [os.path.join(folder, f"{i}.jpg") for i in range(100)]
        for path in drawn:
            noise = Image.fromarray(rng.integers(256, size=(16, 8, 3), dtype=np.uint8))
            noise.resize((128, 256), Image.BICUBIC).save(path)
        for part, count in zip(common.TRIPLES[0], counts):
            os.mkdir(os.path.join(folder, part))
            for i in range(count):
                link = f"{i // 17 + 1:04d}_c{i % 6 + 1}_{i:06d}.jpg"
                os.link(drawn[i % 100], os.path.join(folder, part, link))
        start = time.perf_counter()
        ccsd.main(["--data", folder, "--out", os.path.join(folder, "run"), "--arch", "nothing",
                   "--true-ids", "--epochs", "1", "--iters", "2", "--bn-splits", "1",
                   "--batch-size", "64", "--num-instances", "4", "--device", "cpu"])
    return dict(GB=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                seconds=time.perf_counter() - start)


def child(*words):
    """Run one measurement in a process of its own -> its dict."""
    env = dict(os.environ, PYTHONHASHSEED="0")
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], text=True,
                          capture_output=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(*cells):
    print("| " + " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell)
                            for cell in cells) + " |", flush=True)


def compare(what, size, kinds, repeats, device):
    """Interleaved runs of both kinds; medians, and the ratio of their times."""
    runs = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            runs[kind].append(child(what, kind, *size, device))
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
    parser = common.Parser(__doc__)
    parser.add_argument("what", choices=("clustering", "evaluation", "rerank", "step", "memory"))
    parser.add_argument("sizes", nargs="*", help="N, or QxG, or toy, paper, resnet18, a data set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="no reference, for sizes beyond it")
    parser.add_argument("--device", default="auto", choices=common.DEVICES)
    args = parser.parse_args()
    device = common.pick_device(args.device).type
    shape, size = dict(clustering=(r"\d+", "12936"), evaluation=(r"\d+x\d+", "3368x15913"),
                       rerank=(r"\d+x\d+", "200x1000"), step=("|".join(STEPS), "toy"),
                       memory=("market1501|msmt17", "market1501"))[args.what]
    for size in args.sizes or [size]:
        if not re.fullmatch(shape, size):
            raise common.Problem(f"{args.what} has no size {size!r} (see --help)")
        if args.what == "step":
            report_step(size, device)
        elif args.what == "memory":
            print(size, child("memory", size))
        elif args.ours:
            print(size, child(args.what, "ours", *size.split("x"), device))
        else:
            reference = "loop" if args.what == "evaluation" else "dense"
            compare(args.what, size.split("x"), (reference, "ours"), args.repeats, device)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, kind, *sizes = sys.argv[2:]
        if what == "step":
            print(json.dumps(measure_step(*sizes, **VARIANTS[kind])))
        elif what == "memory":
            print(json.dumps(measure_memory(kind)))
        elif what == "clustering":
            print(json.dumps(measure_clustering(kind, int(sizes[0]), sizes[-1])))
        else:
            print(json.dumps(measure_ranking(what, kind, *map(int, sizes[:-1]), sizes[-1])))
    else:
        common.run(main, resume=None)
