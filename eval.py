"""Score a trained network on any data set, and draw a report of its run.

  python eval.py runs/ccsd-toy-s0                          on the data set of the run
  python eval.py runs/ccsd-toy-s0 --data toy-source        on any other
  python eval.py runs/ccsd-market1501-s0 --rerank --json   k-reciprocal re-ranking; one line of JSON
  python eval.py runs/ccsd-toy-s0 --report                 an epoch in pictures, curves, rankings
  python eval.py runs/a runs/b --report ab.html            curves of several runs in one plot
  python eval.py runs/ccsd-toy-s0 --pairs A.jpg B.jpg      similarity of two images
  python eval.py runs/ccsd-toy-s0 --save-features F.npz    features, paths, pids, cams, split

Market-1501's rule: gallery images of the query's person and camera are ignored. mAP is not
interpolated. Re-ranking uses the gallery's own structure: compare only with re-ranked results.
A report shows images of its data set, whose terms of use apply to it too.
"""

import argparse
import copy
import html
import io
import json
import math
import os
import sys

import numpy as np
import torch

import common

sys.path.insert(0, os.path.join(common.HERE, "tests"))
import lesson  # noqa: E402  the report's first chapter, tests/lesson.py
import report  # noqa: E402  the figures, tests/report.py

# ====================================================================================== the program

SCORES = ("mAP", "rank1", "rank5", "rank10")


def get_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="a run's folder or its last.pt; several for --report FILE")
    add("--data", help="name or folder of the data set (default: the run's)")
    add("--root", help="where data sets are (default: as in the run)")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking, for the scores only")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    add("--report", nargs="?", const="", metavar="FILE.html",
        help="draw a report of the run, or the curves of several runs (report.html in the run's "
        "folder)")
    add("--pairs", nargs=2, metavar=("A", "B"), help="print how similar two image files are")
    add("--save-features", metavar="FILE.npz",
        help="save features, paths, pids, cams and split of all images of the data set")
    add("--device", default="auto", choices=common.DEVICES, help="(%(default)s)")
    args = parser.parse_args(argv)
    if len(args.checkpoint) > 1 and not args.report:
        raise common.Problem("several runs can only be compared (say --report FILE.html)")
    for name, end in ((args.report, ".html"), (args.save_features, ".npz")):
        if name and not name.endswith(end):
            raise common.Problem(f"{name} does not end with {end} (call it {name}{end})")
    return args


def main(argv=None):
    args = get_args(argv)
    runs = [open_run(path) for path in args.checkpoint]
    if args.report is not None:
        for run in runs:
            read_log(run)
    if len(runs) > 1:
        return write(args.report, compare(runs).encode("utf-8", "replace"))

    run = runs[0]
    device = common.pick_device(args.device)
    load_data(run, args)
    prepare(run.model, run.state, device)
    features = [common.global_features(run.model, split) for split in run.test]
    if args.save_features:
        save_features(run, args.save_features)
    if args.report is not None:
        page = draw_run(run, features, device)
        path = args.report or os.path.join(run.folder, "report.html")
        write(path, page.encode("utf-8", "replace"))
    if args.pairs:
        result = pair(run, features, args.pairs)
        return show(result, in_words(result), args)
    if features:
        scores = score(run, features, args.rerank)
        return show(scores, as_table(run, scores), args)
    if args.report is None and not args.save_features:
        raise common.Problem(f"{run.data}: there is no test set with ids, so no score (say "
                             "--report, --pairs or --save-features)")
    return {}


def save_features(run, path):
    """Write the features of all images of the data set, with their paths and ids, and their cameras
    as files and folders call them."""
    parts = []
    for kind, split in zip(common.KINDS, (run.train, run.query, run.gallery)):
        if split.paths:
            features = common.global_features(run.model, split).cpu().numpy()
            cams = np.array(split.camera_names)[split.cams]
            kinds = [kind] * len(features)
            parts.append((features, split.paths, split.pids, cams, kinds))
    names = ("features", "paths", "pids", "cams", "split")
    columns = [np.concatenate(column) for column in zip(*parts)]
    file = io.BytesIO()
    np.savez(file, **dict(zip(names, columns)))
    write(path, file.getvalue())


def write(path, content):
    """Write bytes to a file and print its size. Raises Problem."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise common.Problem(f"{path} cannot be written: {error.strerror} (free some space, or "
                             "name another file)") from error
    print(f"{path}: {len(content) / 1e6:.1f} MB", file=sys.stderr)


def pair(run, features, files):
    """-> the similarity of two image files, and for each kind of test pairs the share that is at
    least as similar."""
    a, b = common.embed(run.model, files)
    result = dict(similarity=float(a @ b))
    if features:
        counts = pair_counts(features, *run.test, [result["similarity"]])         # (4, 2)
        kinds = {"same person": counts[2:].sum(0), "other person": counts[:2].sum(0)}
        kinds.update(zip(report.PAIRS[::-1], counts[::-1]))
        for kind, (less, at_least) in kinds.items():
            total = max(less + at_least, 1)
            result[kind] = float(at_least / total)
    return result


def in_words(result):
    """-> the lines that tell what pair() found."""
    (_, similarity), *kinds = result.items()
    line = f"similarity {similarity:.3f}"
    if kinds:
        line += "; share of all pairs of a query and a gallery image that are at least as similar:"
    return [line, *(f"{kind:28} {100 * share:6.2f} %" for kind, share in kinds)]


def score(run, features, reranked):
    """-> the scores of a run, with what they are of."""
    if reranked:
        scores = common.score_ranking(rerank(*features), *run.test)
    else:
        scores = common.evaluate(*features, *run.test)
    return dict(data=run.data, rerank=reranked, epoch=run.state["epoch"], epochs=run.planned,
                **scores)


def as_table(run, scores):
    """-> the lines of a table of the scores, and the progress of an unfinished run."""
    in_percent = [f"{100 * scores[key]:6.1f}" for key in SCORES]
    reranked = "yes" if scores["rerank"] else "no"
    lines = [f"{'data':20} re-ranked    mAP     R1     R5    R10  queries",
             f"{run.data:20} {reranked:>9} {' '.join(in_percent)} {scores['queries']:8,}"]
    if scores["epoch"] < run.planned:
        lines.append(f"not finished: after {run.stand}")
    return lines


def show(result, lines, args):
    """Print a result as lines of text or as one line of JSON -> the result."""
    say(json.dumps(result) if args.json else "\n".join(lines))
    return result


def say(text):
    """Print, with ? for letters that the terminal cannot show. If a closed pipe or full disk takes
    nothing, it goes to stderr, so that no score is lost."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = text.encode(encoding, "replace").decode(encoding)
    try:
        print(shown, flush=True)
    except OSError as error:
        print(text, file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # or Python would try again at exit
        raise common.Problem(f"standard output: {error.strerror} (the lines above were meant for "
                             "it)") from error


# ============================================================================================ a run


def open_run(path):
    """-> the content of a run's folder or its last.pt. home: the folder where the run was started;
    planned: the epochs it should have."""
    if os.path.isdir(path):
        path = os.path.join(path, "last.pt")
    model, state = common.load_encoder(path)
    folder = os.path.dirname(path) or "."
    planned = state["source_epochs" if "classifier" in state else "epochs"]
    stand = f"epoch {state['epoch']} of {planned}"
    return argparse.Namespace(path=path, folder=folder, home=home_of(folder, str(state.get("out"))),
                              model=model, state=state, planned=planned, stand=stand)


def home_of(folder, out):
    """-> the folder where a run was started, if the path of its folder ends with its --out; or ""
    """
    home = ""
    place = os.path.abspath(folder)
    end = os.sep + os.path.normpath(out)
    for _ in range(3):  # a teacher or a source network lies one or two folders below --out
        if place.endswith(end):
            home = place.removesuffix(end)
        place = os.path.dirname(place)
    return home


def locate(path, home):
    """A path of a run -> the same below the run's home if that exists, else as it is."""
    below = os.path.join(home, path)
    return below if os.path.exists(below) else path


def load_data(run, args):
    """Load the Splits of the run's own data set or of --data into `run`.

    A missing toy set is drawn only into data/, the pages' default, if that exists; never into a
    --root that the user typed (it may be mistyped) or that a checkpoint names.
    """
    run.data = args.data or run.state["data"]
    run.trained_here = run.data == run.state["data"]
    if not args.data and run.data not in common.DATASETS:
        run.data = locate(run.data, run.home)
    root = args.root or locate(run.state["root"], run.home)
    default = not args.root and run.state["root"] == "data"
    draw = default and os.path.isdir(root)
    run.train, run.query, run.gallery = common.load(run.data, root, draw=draw)
    known = (run.query.pids >= 0).any()
    run.test = (run.query, run.gallery) if known and run.gallery.paths else ()


def prepare(model, state, device):
    """-> the network on the device, with the precision of the run, if the device has that; fp16
    on a CPU is for tests, fp32 is faster there."""
    wanted = state["precision"]
    if device.type == "cpu" and wanted == "fp16":
        wanted = "fp32"
    precision = common.precision(device, wanted)
    flags = argparse.Namespace(precision=precision, recompute=False, size=state["size"])
    return model.on(device, flags)


def first_stage(run, flag, name):
    """-> the folder of a run's first stage: that of its flag, or `name` below its own."""
    state = run.state
    first = state["first_stage"]
    if first == state["out"]:
        first = run.folder  # wherever that is now
    folder = state[flag] or os.path.join(first, name)
    return locate(folder, run.home)


def initial_network(run, number=1):
    """-> the network before training and its description; or None and the reason. number: of
    SSKD's networks."""
    state = run.state
    try:
        if "classifier" in state:
            return None, "a source network does not keep its first weights"
        if "nets" in state:
            folder = first_stage(run, "sources", "source")
            path = os.path.join(folder, str(number), "last.pt")
            network, _ = common.load_encoder(path)
            return network, f"source network {number}"
        weights, name = state["weights"], "random weights"
        if weights != "none":
            name = os.path.basename(weights)
        if weights not in ("none", "imagenet"):
            weights = locate(weights, run.home)
        common.seed_everything(state["seed"])  # as the page did before it built the network
        network = common.Encoder(state["arch"], weights, state["parts"], state["pooling"])
        return network, name
    except (common.Problem, KeyError, TypeError, ValueError) as problem:
        return None, str(problem)


def read_log(run):
    """Load the log into `run`: header, lines as flat dicts, names of the loss terms, flags."""
    try:
        run.header, *lines = [json.loads(line) for line in run.state["lines"]]
        run.log, terms = [], set()
        for line in lines:
            float(line["epoch"])  # anything else is no log
            quality = line.pop("quality", {})
            losses = line.pop("losses", {})
            scores = line.pop("scores", {})
            in_percent = {name: 100 * score for name, score in scores.items()}
            run.log.append({**line, **quality, **losses, **in_percent})
            terms.update(losses)
        run.terms = sorted(term for term in terms if not term.startswith("soft_"))
        run.flags = {}
        for name, value in run.header["args"].items():
            if name not in ("code", "first_stage"):  # added by the page, not flags
                run.flags[name] = spelled(name, value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise common.Problem(f"{run.path} holds no log of these pages (name another)") from error


def spelled(name, value):
    """-> a flag and its value as one types them."""
    values = value if isinstance(value, list) else [value]
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    flag = f"--{name.replace('_', '-')}"
    return " ".join([flag, *words])


# ========================================================================================= rankings


def rerank(query_features, gallery_features, k1=20, k2=6, lam=.3, block=256):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): yield similarities, (block, G) at a time.

    Unit features (Q, D) and (G, D) on any device. The similarity is minus the paper's final
    distance, (1 - lam) Jaccard + lam d (eq. 12), where d is the squared Euclidean distance divided
    by the largest of its row. Memory grows linearly with Q + G.
    """
    features = torch.cat([query_features, gallery_features])
    common.check_features(features)
    largest = largest_distances(features, block)
    rank = common.nearest(features, k1 + 1)
    vectors = common.reciprocal_neighbours(rank, k1)
    distance = 2 - 2 * common.cosines(features, vectors)
    distance /= common.per_entry(largest, vectors)
    vectors.data = np.exp(-distance)
    vectors = common.spread(vectors, rank, k2)

    q = len(query_features)
    start = 0
    for shared in common.overlaps(vectors[:q], vectors[q:], block):
        shared = shared.toarray()                                                 # (block, G)
        jaccard = 1 - shared / (2 - shared)
        rows = slice(start, start + len(shared))
        cosine = query_features[rows] @ gallery_features.T
        distance = (2 - 2 * cosine).cpu().numpy()
        distance /= largest[rows, None]
        yield torch.from_numpy(-(1 - lam) * jaccard - lam * distance)
        start += block


def largest_distances(features, block):
    """(N, D) unit features -> (N,), each image's squared distance to the least similar one."""
    smallest = features.new_ones(len(features))  # the cosines of these pairs
    for start in range(0, len(features), block):
        rows = slice(start, start + block)
        onwards = slice(start, None)
        # A pair's cosine serves both of its images, so half of the matrix is enough.
        cosine = features[rows] @ features[onwards].T
        smallest[rows].clamp_(max=cosine.min(1).values)
        smallest[onwards].clamp_(max=cosine.min(0).values)
    distances = 2 - 2 * smallest
    distances[distances < 1e-5] = 1  # a divisor; if all images are alike, they are rounding errors
    return distances.cpu().numpy()


def rank_queries(features, query, gallery, top=7, block=256):
    """-> for every query i with a right answer, a dict with the details behind the scores.

    precision (R,): at the rank of each of its R right answers, best first; the mean is AP, and the
    first right answer has rank 1 / precision[0]. cams (R,): their cameras. shown, similar: first
    `top` gallery images. Ignored images are left out; of equals, the wrong one ranks first.
    """
    ranked = []
    for start in range(0, len(query.pids), block):
        rows = features[0][start:start + block] @ features[1].T                   # (block, G)
        for i, row in enumerate(rows.cpu().numpy(), start):
            same_id = gallery.pids == query.pids[i]
            same_cam = gallery.cams == query.cams[i]
            right = np.flatnonzero(same_id & ~same_cam)
            if len(right) == 0:
                continue
            right = right[np.argsort(-row[right], kind="stable")]
            wrong = np.sort(row[~same_id])
            ahead = len(wrong) - np.searchsorted(wrong, row[right])               # (R,)
            n = np.arange(1, len(right) + 1)
            precision = n / (n + ahead)

            row[same_id & same_cam] = -math.inf                                   # ignored
            last = -math.inf
            if len(row) > top:  # sort only what can be among the first
                last = np.partition(row, -top)[-top]
            shown = np.flatnonzero((row >= last) & (row > -math.inf))
            order = np.lexsort((same_id[shown], -row[shown]))
            shown = shown[order[:top]]
            ranked.append(dict(i=i, precision=precision, cams=gallery.cams[right],
                               shown=shown, similar=row[shown]))
    return ranked


def by_camera_pair(ranked, query, cameras):
    """-> precision and weight, (V, V) each: camera of the query x camera of the right answer.

    A query's AP is the mean over its R right answers, so each has the weight 1 / R. Entries are
    weighted means of precision (NaN if there are none); their mean, weighted by `weight`, is mAP.
    """
    total = np.zeros((cameras, cameras))
    weight = np.zeros((cameras, cameras))
    for found in ranked:
        row = query.cams[found["i"]]
        share = 1 / len(found["cams"])
        np.add.at(total[row], found["cams"], share * found["precision"])
        np.add.at(weight[row], found["cams"], share)
    mean = np.full_like(total, np.nan)
    np.divide(total, weight, out=mean, where=weight > 0)
    return mean, weight


def pair_counts(features, query, gallery, edges, block=256):
    """Count the similarities of a query and a gallery image, over all pairs -> (4, E + 1) int64.

    Rows: report.PAIRS. Column j: similarities from edges[j - 1] to below edges[j]. edges (E,).
    """
    edges = torch.as_tensor(edges, dtype=torch.float32)
    columns = len(edges) + 1
    counts = 0
    for start in range(0, len(query.pids), block):
        rows = slice(start, start + block)
        similar = features[0][rows] @ features[1].T                               # (block, G)
        column = torch.bucketize(similar.cpu(), edges, right=True)
        same_id = query.pids[rows, None] == gallery.pids
        same_cam = query.cams[rows, None] == gallery.cams
        kind = torch.from_numpy(2 * same_id + same_cam)
        cell = kind * columns + column
        counts = counts + torch.bincount(cell.flatten(), minlength=4 * columns)
    return counts.view(4, columns).numpy()


# ======================================================================================= the report

CHAPTER = "One epoch, step by step"
TEST_FIGURES = ("Similarity within and across cameras", "mAP by pair of cameras", "CMC",
                "Ranking lists")
NO_LABELS = "<p>Left out: no pseudo labels of these images.</p>"
NO_TEST_SET = "<p>Left out: the test set has no ids.</p>"


def draw_run(run, features, device):
    """-> the report page of a run. features: of query and gallery; [] without ids."""
    labels = labels_of(run)
    known = bool((run.train.pids >= 0).any())
    if known:
        people = len(np.unique(run.train.pids))
        for line in run.log:
            if "clusters" in line:
                line["true ids"] = people

    scores = common.evaluate(*features, *run.test) if features else {}
    parts = {"Run and score": about(run, scores)}
    parts[CHAPTER] = first_chapter(run, device) if labels is not None else NO_LABELS
    parts["Curves by epoch"] = report.curves([("", run.log, run.terms)])
    if features:
        parts.update(zip(TEST_FIGURES, test_figures(run, features)))
    else:
        parts.update(dict.fromkeys(TEST_FIGURES, NO_TEST_SET))
    parts["Clusters"] = parts["t-SNE"] = NO_LABELS
    if labels is not None:
        parts["Clusters"] = report.clusters(run.train, labels, known)
    if features:
        parts["t-SNE"] = map_of_people(run, features)
    elif labels is not None:
        parts["t-SNE"] = map_of_clusters(run, labels)
    return report.page(f"Report of {run.folder}", parts)


def labels_of(run):
    """-> pseudo labels (N,) of the training images; None if the run keeps none of these images."""
    if not run.trained_here or "classifier" in run.state:  # a source network has true ids
        return None
    labels = run.state.get("labels")
    if run.state["files"] != common.names_of(run.train) or not torch.is_tensor(labels):
        return None
    if labels.shape != (len(run.train.paths),) or labels.max() < 0:
        return None
    return labels.numpy()


def about(run, scores):
    """-> the figure of what was run, with which flags, and its scores."""
    state, header = run.state, run.header
    text = ""
    if scores:
        row = [f"{100 * scores[key]:.1f}" for key in SCORES]
        row = ("in %", *row, f"{scores['queries']:,}")
        text = report.table(("", *SCORES, "queries"), [row])
    height, width = state["size"]
    facts = {
        "Data": f"{run.data}, {len(run.train.paths):,} training images",
        "Network": f"{state['arch']}, images of {height} x {width}",
        "Training": f"{run.stand}, {state['seconds']:,.0f} s on {header.get('device')} "
                    f"in {state['precision']}",
        "Versions": f"code {header.get('commit')}, torch {header.get('torch')}"}
    for name, fact in facts.items():
        text += f"<p><b>{name}</b> {html.escape(fact)}</p>"
    flags = [f"<span>{html.escape(words)}</span> " for words in run.flags.values()]
    text += f"<p><b>Flags</b> {''.join(flags)}</p>"
    return report.figure(
        "", text,
        "The scores of the last finished epoch, and everything that led to them.",
        "flags that differ, before you compare two runs.")


def first_chapter(run, device):
    """-> the chapter of the report that redoes an epoch; or why it is left out."""
    state = run.state
    before, others, why = [], [], ""
    nets = state.get("nets", 1)
    for number in range(1, nets + 1):
        network, what = initial_network(run, number)
        if network:
            before.append(prepare(network, state, device))
        else:
            why = what
    try:
        if "nets" in state:
            for name in ("students", "slow"):
                copies = [copy.deepcopy(run.model) for _ in range(nets)]
                module = torch.nn.ModuleList(copies)
                common.load_into(module, state[name], f"{run.path} holds no fitting networks")
                others.append(module.eval())
        if state.get("stage") == "student":
            folder = first_stage(run, "teacher", "teacher")
            teacher = lesson.mskd.load_teacher(folder, argparse.Namespace(**state))
            others = [prepare(teacher, state, device)]
        images = common.read_images(run.train, *state["size"])
        return lesson.chapter(run, images, (None if why else before, why), others)
    except common.Problem as problem:
        return f"<p>Left out: {html.escape(str(problem))}.</p>"


def test_figures(run, features):
    """-> the figures that need a test set with ids, in the order of TEST_FIGURES."""
    note = ""
    networks = {"after training": features}
    network, what = initial_network(run)
    if network:
        prepare(network, run.state, features[0].device)
        before = [common.global_features(network, split) for split in run.test]
        networks = {f"before training ({what})": before, **networks}
    else:
        note = f"<p>Before training: not shown, {html.escape(what)}.</p>"

    counts, ranks = {}, {}
    for name, both in networks.items():  # after training comes last
        counts[name] = pair_counts(both, *run.test, report.EDGES)
        ranked = rank_queries(both, *run.test)
        ranks[name] = np.array([round(1 / found["precision"][0]) for found in ranked])
    cameras = names_of_cameras(run)[:1 + max(split.cams.max() for split in run.test)]
    by_camera = by_camera_pair(ranked, run.query, len(cameras))
    return (note + report.similarity(counts),
            report.heat_table(*by_camera, cameras),
            report.match_curve(ranks),
            report.ranking_lists(ranked, *run.test))


def map_of_people(run, features):
    """-> t-SNE of images of the test set."""
    pids = np.concatenate([split.pids for split in run.test])
    cams = np.concatenate([split.cams for split in run.test])
    people = np.where(pids > 0, pids, -1)  # distractors are nobody
    index = report.choose(people, cams)
    chosen = torch.cat(features)[index].cpu().numpy()
    return report.t_sne(chosen, pids[index], cams[index], "person", names_of_cameras(run))


def map_of_clusters(run, labels):
    """-> t-SNE of training images."""
    train = run.train
    index = report.choose(labels, train.cams)
    files = [train.paths[i] for i in index]
    chosen = common.embed(run.model, files).cpu().numpy()
    return report.t_sne(chosen, labels[index], train.cams[index], "cluster", names_of_cameras(run))


def names_of_cameras(run):
    """-> the cameras of the data set, as a report calls them."""
    return [report.camera(run.train, v) for v in range(len(run.train.camera_names))]


def compare(runs):
    """-> the report page of several runs; the legend shows the flags in which they differ or, for
    runs of different pages, their folders."""
    first = runs[0].flags
    same_page = all(run.flags.keys() == first.keys() for run in runs)
    differ = []
    for name in first if same_page else ():
        values = {run.flags[name] for run in runs}
        if len(values) > 1 and name not in ("out", "root", "device", "resume"):
            differ.append(name)
    rows, lines = [], []
    for run in runs:
        name = " ".join(run.flags[name] for name in differ) or run.folder
        scores = run.state["scores"]
        shown = [f"{100 * scores[key]:.1f}" if key in scores else "-" for key in ("mAP", "rank1")]
        cells = (name, *shown, run.stand, run.folder)
        rows.append([html.escape(cell) for cell in cells])
        lines.append((name, run.log, run.terms))
    table = report.table(("flags", "mAP", "rank1", "", "run"), rows)
    overview = report.figure(
        "", table,
        "Each run by the flags in which it differs, and its last score in %.",
        "differences that are larger than those between seeds.")
    return report.page("Runs compared", {
        "Runs": overview, "Curves by epoch": report.curves(lines)})


if __name__ == "__main__":
    common.run(main, resume=None)
