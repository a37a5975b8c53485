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

# ========================================================================================= rankings


def rerank(query_features, gallery_features, k1=20, k2=6, lam=.3, block=256):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): yield similarities, (block, G) at a time.

    Unit features (Q, D) and (G, D) on any device. The similarity is minus the paper's final
    distance, (1 - lam) Jaccard + lam d (eq. 12), where d is the squared Euclidean distance divided
    by the largest of its row. Memory grows linearly with Q + G.
    """
    features = torch.cat([query_features, gallery_features])
    common.check_features(features)
    smallest = features.new_ones(len(features))  # cosine of each image with the least similar one
    for start in range(0, len(features), block):  # a pair's cosine serves both of its images
        cosine = features[start:start + block] @ features[start:].T
        smallest[start:start + block].clamp_(max=cosine.min(1).values)
        smallest[start:].clamp_(max=cosine.min(0).values)
    farthest = (2 - 2 * smallest).clamp(min=1e-12).cpu().numpy()                  # (Q + G,)
    rank = common.nearest(features, k1 + 1)
    vectors = common.reciprocal_neighbours(rank, k1)
    euclid = 2 - 2 * common.cosines(features, vectors)
    vectors.data = np.exp(-euclid / common.per_entry(farthest, vectors))
    vectors = common.spread(vectors, rank, k2)
    q = len(query_features)
    shared = common.overlaps(vectors[:q], vectors[q:], block)
    for start, overlap in zip(range(0, q, block), shared):
        overlap = overlap.toarray()                                               # (block, G)
        jaccard = 1 - overlap / (2 - overlap)
        rows = query_features[start:start + block]
        euclid = (2 - 2 * (rows @ gallery_features.T)).cpu().numpy()
        euclid /= farthest[start:start + len(rows), None]
        yield torch.from_numpy(-(1 - lam) * jaccard - lam * euclid)


def rank_queries(features, query, gallery, top=7, block=256):
    """-> for every query i with a right answer, a dict with the details behind the scores.

    precision (R,): at the rank of each of its R right answers, best first; the mean is AP, and the
    first right answer has rank 1 / precision[0]. cams (R,): their cameras. shown, similar: first
    `top` gallery images. Ignored images are left out; of equals, the wrong one ranks first.
    """
    ranked = []
    for start in range(0, len(query.pids), block):
        rows = (features[0][start:start + block] @ features[1].T).cpu().numpy()   # (block, G)
        for i, row in enumerate(rows, start):
            same_id, same_cam = gallery.pids == query.pids[i], gallery.cams == query.cams[i]
            right = np.flatnonzero(same_id & ~same_cam)
            if len(right) == 0:
                continue
            right = right[np.argsort(-row[right], kind="stable")]
            wrong = np.sort(row[~same_id])
            ahead = len(wrong) - np.searchsorted(wrong, row[right])               # (R,)
            n = np.arange(1, len(right) + 1)
            row[same_id & same_cam] = -math.inf                                   # ignored
            last = np.partition(row, -top)[-top] if len(row) > top else -math.inf
            shown = np.flatnonzero((row >= last) & (row > -math.inf))
            shown = shown[np.lexsort((same_id[shown], -row[shown]))[:top]]
            ranked.append(dict(i=i, precision=n / (n + ahead), cams=gallery.cams[right],
                               shown=shown, similar=row[shown]))
    return ranked


def by_camera_pair(ranked, query, cameras):
    """-> precision and weight, (V, V) each: camera of the query x camera of the right answer.

    A query's AP is the mean over its R right answers, so each has the weight 1 / R. Entries are
    weighted means of precision (NaN if there are none); their mean, weighted by `weight`, is mAP.
    """
    total, weight = np.zeros((2, cameras, cameras))
    for r in ranked:
        row, share = query.cams[r["i"]], 1 / len(r["cams"])
        np.add.at(total[row], r["cams"], share * r["precision"])
        np.add.at(weight[row], r["cams"], share)
    return np.where(weight > 0, total / weight.clip(1e-12), np.nan), weight


def pair_counts(features, query, gallery, edges, block=256):
    """Count the similarities of a query and a gallery image, over all pairs -> (4, E + 1) int64.

    Rows: report.PAIRS. Column j: similarities from edges[j - 1] to below edges[j]. edges (E,).
    """
    edges = torch.as_tensor(edges, dtype=torch.float32)
    columns, counts = len(edges) + 1, 0
    for start in range(0, len(query.pids), block):
        rows = slice(start, start + block)
        similar = (features[0][rows] @ features[1].T).cpu()                       # (block, G)
        kind = torch.from_numpy(2 * (query.pids[rows, None] == gallery.pids)
                                + (query.cams[rows, None] == gallery.cams))       # (block, G)
        cell = kind * columns + torch.bucketize(similar, edges, right=True)
        counts = counts + torch.bincount(cell.flatten(), minlength=4 * columns)
    return counts.view(4, columns).numpy()


# ============================================================================================ a run


def open_run(path):
    """-> the content of a run's folder or its last.pt. home: the folder where the run was started,
    if the path of the run ends with its --out, else ""; planned: the epochs it should have."""
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    model, state = common.load_encoder(path)
    folder, home = os.path.dirname(path) or ".", ""
    place, out = os.path.abspath(folder), os.sep + os.path.normpath(str(state.get("out")))
    for _ in range(3):  # a teacher or a source network lies one or two folders below --out
        home = place.removesuffix(out) if place.endswith(out) else home
        place = os.path.dirname(place)
    planned = state["source_epochs" if "classifier" in state else "epochs"]
    return argparse.Namespace(path=path, folder=folder, home=home, model=model, state=state,
                              planned=planned, stand=f"epoch {state['epoch']} of {planned}")


def locate(path, home):
    """A path of a run -> the same below the run's home if that exists, else as it is."""
    return next((p for p in (os.path.join(home, path), path) if os.path.exists(p)), path)


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
    draw = not args.root and run.state["root"] == "data" and os.path.isdir(root)
    run.train, run.query, run.gallery = common.load(run.data, root, draw=draw)
    run.tested = bool((run.query.pids >= 0).any() and len(run.gallery.pids))


def prepare(model, state, device):
    """-> the network on the device, with the precision of the run, if the device has that; fp16
    on a CPU is for tests, fp32 is faster there."""
    wanted = "fp32" if device.type == "cpu" and state["precision"] == "fp16" else state["precision"]
    return model.on(device, argparse.Namespace(
        precision=common.precision(device, wanted), recompute=False, size=state["size"]))


def first_stage(run, flag, name):
    """-> the folder of a run's first stage: that of its flag, or `name` below its own."""
    first = run.folder if run.state["first_stage"] == run.state["out"] else run.state["first_stage"]
    return locate(run.state[flag] or os.path.join(first, name), run.home)


def initial_network(run, number=1):
    """-> the network before training and its description; or None and the reason. number: of
    SSKD's networks."""
    state = run.state
    try:
        if "classifier" in state:
            return None, "a source network does not keep its first weights"
        if "nets" in state:
            path = os.path.join(first_stage(run, "sources", "source"), str(number), "last.pt")
            return common.load_encoder(path)[0], f"source network {number}"
        weights = state["weights"]
        weights = weights if weights in ("none", "imagenet") else locate(weights, run.home)
        common.seed_everything(state["seed"])  # as the page did before it built the network
        network = common.Encoder(state["arch"], weights, state["parts"], state["pooling"])
        return network, "random weights" if weights == "none" else os.path.basename(weights)
    except (common.Problem, KeyError, TypeError, ValueError) as problem:
        return None, str(problem)


def first_chapter(run, device):
    """-> the chapter of the report that redoes an epoch; or why it is left out."""
    state, others = run.state, []
    networks, what = zip(*(initial_network(run, i + 1) for i in range(state.get("nets", 1))))
    networks = [prepare(net, state, device) for net in networks if net]
    try:
        if "nets" in state:
            for name in ("students", "slow"):
                module = torch.nn.ModuleList(copy.deepcopy(run.model) for _ in networks)
                common.load_into(module, state[name], f"{run.path} holds no fitting networks")
                others.append(module.eval())
        if state.get("stage") == "student":
            args = argparse.Namespace(**state)
            teacher = lesson.mskd.load_teacher(first_stage(run, "teacher", "teacher"), args)
            others = [prepare(teacher, state, device)]
        images = common.read_images(run.train, *state["size"])
        before = networks if len(networks) == len(what) else None
        return lesson.chapter(run, images, (before, what[-1]), others)
    except common.Problem as problem:
        return f"<p>Left out: {html.escape(str(problem))}.</p>"


def read_log(run):
    """Load the log into `run`: header, lines as flat dicts, names of the loss terms, flags."""
    try:
        header, *lines = map(json.loads, run.state["lines"])
        [float(line["epoch"]) for line in lines]  # anything else is no log
        groups = [[line.pop(group, {}) for group in ("quality", "losses", "scores")]
                  for line in lines]
        run.log = [dict(line, **quality, **losses, **{k: 100 * v for k, v in scores.items()})
                   for line, (quality, losses, scores) in zip(lines, groups)]   # scores in %
        run.terms = sorted({term for _, losses, _ in groups for term in losses
                            if not term.startswith("soft_")})
        run.header, run.flags = header, {}
        for name, value in header["args"].items():
            values = value if isinstance(value, list) else [value]
            values = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
            if name not in ("code", "first_stage"):  # added by the page, not flags
                run.flags[name] = " ".join([f"--{name.replace('_', '-')}", *values])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise common.Problem(f"{run.path} holds no log of these pages (name another)") from error


# ======================================================================================= the report


def about(run, scores):
    """-> the figure of what was run, with which flags, and its scores."""
    state, header, text = run.state, run.header, ""
    if scores:
        keys = ("mAP", "rank1", "rank5", "rank10")
        text = report.table(("", *keys, "queries"), [("in %", *(
            f"{100 * scores[key]:.1f}" for key in keys), f"{scores['queries']:,}")])
    for name, fact in (
            ("Data", f"{run.data}, {len(run.train.paths):,} training images"),
            ("Network", f"{state['arch']}, images of {state['size'][0]} x {state['size'][1]}"),
            ("Training", f"{run.stand}, {state['seconds']:,.0f} s on {header.get('device')} "
             f"in {state['precision']}"),
            ("Versions", f"code {header.get('commit')}, torch {header.get('torch')}")):
        text += f"<p><b>{name}</b> {html.escape(fact)}</p>"
    flags = (f"<span>{html.escape(words)}</span> " for words in run.flags.values())
    text += f"<p><b>Flags</b> {''.join(flags)}</p>"
    return report.figure("", text, "The scores of the last finished epoch, and everything that "
                         "led to them.", "flags that differ, before you compare two runs.")


def draw_run(run, features, device):
    """-> the report page of a run. features: of query and gallery; [] without ids."""
    test, labels = (run.query, run.gallery), run.state.get("labels")
    ours = run.trained_here and "classifier" not in run.state  # else: other images, or --source's
    ours = ours and run.state["files"] == common.names_of(run.train)
    ours = ours and torch.is_tensor(labels) and labels.shape == (len(run.train.paths),)
    ours = ours and labels.max() >= 0
    cameras = [report.camera(run.train, v) for v in range(len(run.train.camera_names))]
    labels = labels.numpy() if ours else None
    known = bool((run.train.pids >= 0).any())
    for line in run.log:
        if known and "clusters" in line:
            line["true ids"] = len(np.unique(run.train.pids))
    parts = {"Run and score": about(run, features and common.evaluate(*features, *test)),
             CHAPTER: first_chapter(run, device) if ours else NO_LABELS,
             "Curves by epoch": report.curves([("", run.log, run.terms)])}
    parts.update(test_figures(run, features) if features else dict.fromkeys(
        TEST_FIGURES, "<p>Left out: the test set has no ids.</p>"))
    parts["Clusters"] = parts["t-SNE"] = NO_LABELS
    if labels is not None:
        parts["Clusters"] = report.clusters(run.train, labels, known)
    if features:
        pids, cams = (np.concatenate(both) for both in zip(run.query[1:3], run.gallery[1:3]))
        index = report.choose(np.where(pids > 0, pids, -1), cams)  # distractors have no id
        chosen = torch.cat(features)[index].cpu().numpy()
        parts["t-SNE"] = report.t_sne(chosen, pids[index], cams[index], "person", cameras)
    elif labels is not None:
        index = report.choose(labels, run.train.cams)
        chosen = common.Split([run.train.paths[i] for i in index], None, None)
        chosen = common.global_features(run.model, chosen).cpu().numpy()
        parts["t-SNE"] = report.t_sne(chosen, labels[index], run.train.cams[index], "cluster",
                                      cameras)
    return report.page(f"Report of {run.folder}", parts)


CHAPTER, NO_LABELS = ("One epoch, step by step",
                      "<p>Left out: no pseudo labels of these images.</p>")
TEST_FIGURES = ("Similarity within and across cameras", "mAP by pair of cameras", "CMC",
                "Ranking lists")


def test_figures(run, features):
    """-> dict of the figures that need a test set with ids, by title."""
    test, networks = (run.query, run.gallery), {"after training": features}
    network, what = initial_network(run)
    note = "" if network else f"<p>Before training: not shown, {html.escape(what)}.</p>"
    if network:
        prepare(network, run.state, features[0].device)
        before = [common.global_features(network, split) for split in test]
        networks = {f"before training ({what})": before, **networks}
    counts = {name: pair_counts(both, *test, report.EDGES) for name, both in networks.items()}
    ranked = {name: rank_queries(both, *test) for name, both in networks.items()}
    ranks = {name: np.array([round(1 / r["precision"][0]) for r in queries])
             for name, queries in ranked.items()}
    last, count = ranked["after training"], 1 + max(split.cams.max() for split in test)
    cameras = [report.camera(run.query, v) for v in range(count)]
    return dict(zip(TEST_FIGURES, (
        note + report.similarity(counts),
        report.heat_table(*by_camera_pair(last, run.query, count), cameras),
        report.match_curve(ranks), report.ranking_lists(last, *test))))


def compare(runs):
    """-> the report page of several runs; the legend shows the flags in which they differ or, for
    runs of different pages, their folders."""
    shared = [name for name in runs[0].flags if all(name in run.flags for run in runs)
              and name not in ("out", "root", "device", "resume")]
    differ = [name for name in shared if len({run.flags[name] for run in runs}) > 1]
    same_page = all(run.flags.keys() == runs[0].flags.keys() for run in runs)
    rows, lines = [], []
    for run in runs:
        name = " ".join(run.flags[name] for name in differ) if same_page and differ else run.folder
        scores = [f"{100 * run.state['scores'][key]:.1f}" if key in run.state["scores"] else "-"
                  for key in ("mAP", "rank1")]
        rows.append([html.escape(cell) for cell in (name, *scores, run.stand, run.folder)])
        lines.append((name, run.log, run.terms))
    return report.page("Runs compared", {
        "Runs": report.figure("", report.table(("flags", "mAP", "rank1", "", "run"), rows),
                              "Each run by the flags in which it differs, and its last score in %.",
                              "differences that are larger than those between seeds."),
        "Curves by epoch": report.curves(lines)})


# ====================================================================================== the program


def get_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="a run's folder or its last.pt; several for --report FILE")
    add("--data", help="name or folder of the data set (default: the run's)")
    add("--root", help="where data sets are (default: as in the run)")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking, for the scores only")
    add("--json", action="store_true", help="print one line of JSON instead of a table")
    add("--report", nargs="?", const="", metavar="FILE.html", help="draw a report of the run, or "
        "the curves of several runs (report.html in the run's folder)")
    add("--pairs", nargs=2, metavar=("A", "B"), help="print how similar two image files are")
    add("--save-features", metavar="FILE.npz", help="save features, paths, pids, cams and "
        "split of all images of the data set")
    add("--device", default="auto", choices=common.DEVICES, help="(%(default)s)")
    args = parser.parse_args(argv)
    if len(args.checkpoint) > 1 and not args.report:
        raise common.Problem("several runs can only be compared (say --report FILE.html)")
    for name, end in ((args.report, ".html"), (args.save_features, ".npz")):
        if name and not name.endswith(end):
            raise common.Problem(f"{name} does not end with {end} (call it {name}{end})")
    return args


def say(text):
    """Print, with ? for letters that the terminal cannot show. If a closed pipe or full disk takes
    nothing, it goes to stderr, so that no score is lost."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except (OSError, ValueError, AttributeError) as error:
        print(text, file=sys.stderr)
        if sys.stdout:  # or Python would try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        why = getattr(error, "strerror", None) or "it is closed"
        raise common.Problem(f"standard output: {why} (the lines above were meant for it)"
                             ) from error


def write(path, content):
    """Write bytes to a file and print its size. Raises Problem."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise common.Problem(f"{path} cannot be written: {error.strerror} (free some space, or "
                             "name another file)") from error
    print(f"{path}: {len(content) / 1e6:.1f} MB", file=sys.stderr)


def save_features(run, path):
    """Write the features of all images of the data set, with their paths and ids, and their cameras
    as files and folders call them."""
    kept, file = [], io.BytesIO()
    for kind, split in zip(common.KINDS, (run.train, run.query, run.gallery)):
        if split.paths:
            features = common.global_features(run.model, split).cpu().numpy()
            cams = np.array(split.camera_names)[split.cams]
            kept.append((features, split.paths, split.pids, cams, [kind] * len(features)))
    names = ("features", "paths", "pids", "cams", "split")
    np.savez(file, **{name: np.concatenate(part) for name, part in zip(names, zip(*kept))})
    write(path, file.getvalue())


def pair(run, features, files):
    """-> the similarity of two image files, and for each kind of test pairs the share that is at
    least as similar."""
    a, b = common.global_features(run.model, common.Split(files, None, None))
    result = dict(similarity=float(a @ b))
    if features:
        counts = pair_counts(features, run.query, run.gallery, [result["similarity"]])  # (4, 2)
        kinds = {"same person": counts[2:].sum(0), "other person": counts[:2].sum(0),
                 **dict(zip(report.PAIRS[::-1], counts[::-1]))}
        result.update({kind: float(n[1] / n.sum().clip(1)) for kind, n in kinds.items()})
    return result


def main(argv=None):
    args = get_args(argv)
    runs = [open_run(path) for path in args.checkpoint]
    for run in runs if args.report is not None else []:
        read_log(run)
    if len(runs) > 1:
        return write(args.report, compare(runs).encode())
    run, device = runs[0], common.pick_device(args.device)
    load_data(run, args)
    prepare(run.model, run.state, device)
    splits = [run.query, run.gallery] * run.tested
    features = [common.global_features(run.model, split) for split in splits]
    if args.save_features:
        save_features(run, args.save_features)
    if args.report is not None:
        write(args.report or os.path.join(run.folder, "report.html"),
              draw_run(run, features, device).encode("utf-8", "replace"))
    if args.pairs:
        result = pair(run, features, args.pairs)
        _, *kinds = result.items()
        lines = [f"similarity {result['similarity']:.3f}" + "; share of all pairs of a query and a "
                 "gallery image that are at least as similar:" * bool(kinds)]
        lines += [f"{kind:28} {100 * share:6.2f} %" for kind, share in kinds]
        say(json.dumps(result) if args.json else "\n".join(lines))
        return result
    if features:
        test = run.query, run.gallery
        scores = (common.score_ranking(rerank(*features), *test) if args.rerank
                  else common.evaluate(*features, *test))
        return show_scores(run, scores, args)
    if args.report is None and not args.save_features:
        raise common.Problem(f"{run.data}: there is no test set with ids, so no score (say "
                             "--report, --pairs or --save-features)")
    return {}


def show_scores(run, scores, args):
    """Print the scores as a table or as JSON, and the progress of an unfinished run."""
    done, stand = run.state["epoch"], dict(epoch=run.state["epoch"], epochs=run.planned)
    scores = dict(data=run.data, rerank=args.rerank, **stand, **scores)
    if args.json:
        say(json.dumps(scores))
        return scores
    lines = [f"{'data':20} re-ranked    mAP     R1     R5    R10  queries",
             f"{run.data:20} {'yes' if args.rerank else 'no':>9} " + " ".join(
                 f"{100 * scores[key]:6.1f}" for key in ("mAP", "rank1", "rank5", "rank10"))
             + f" {scores['queries']:8,}"]
    if done < run.planned:
        lines.append(f"not finished: after {run.stand}")
    say("\n".join(lines))
    return scores


if __name__ == "__main__":
    common.run(main, resume=None)
