"""Score a trained network on any data set, and draw a report of its run to look at.

  python eval.py runs/ccsd-toy-s0                          the data set it was trained on
  python eval.py runs/ccsd-toy-s0 --data toy-source        any other
  python eval.py runs/ccsd-market1501-s0 --rerank --json   k-reciprocal re-ranking; one line of JSON
  python eval.py runs/ccsd-toy-s0 --report                 writes runs/ccsd-toy-s0/report.html
  python eval.py runs/a runs/b --report ab.html            curves of several runs in one plot
  python eval.py runs/ccsd-toy-s0 --pairs A.jpg B.jpg      how similar, and what that means
  python eval.py runs/ccsd-toy-s0 --save-features F.npz    features, paths, pids, cams, split

Market-1501's rule: gallery images of the query's person and camera are ignored. mAP is not
interpolated. Re-ranking uses the gallery's own structure: compare it with re-ranked figures only.
A report shows images of its data set, whose terms hold for it too.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import sys

import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

import common

# ========================================================================================= rankings


def rerank(query_features, gallery_features, k1=20, k2=6, lam=.3, block=256):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): yield similarities, (block, G) at a time.

    Unit features (Q, D) and (G, D) on any device. A similarity is minus the paper's final distance
    (eq. 12), (1 - lam) Jaccard + lam d, with d the squared Euclidean distance over the largest of
    its row. Memory grows with Q + G, never with its square.
    """
    features = torch.cat([query_features, gallery_features])
    common.check_finite(features)
    farthest = torch.cat([2 - 2 * (rows @ features.T).min(1).values for rows in
                          features.split(block)])
    farthest = farthest.clamp(min=1e-12).cpu().numpy()                            # (Q + G,)

    def weigh(cosine, vectors):
        return np.exp(-(2 - 2 * cosine) / common.per_entry(farthest, vectors))

    vectors = common.reciprocal_vectors(features, common.nearest(features, k1 + 1), k1, k2, weigh)
    q = len(query_features)
    shared = common.overlaps(vectors[:q], vectors[q:], block)
    for start, overlap in zip(range(0, q, block), shared):
        overlap = overlap.toarray()                                               # (block, G)
        jaccard = 1 - overlap / (2 - overlap)
        rows = query_features[start:start + block]
        euclid = (2 - 2 * (rows @ gallery_features.T)).cpu().numpy()
        euclid /= farthest[start:start + len(rows), None]
        yield torch.from_numpy(-(1 - lam) * jaccard - lam * euclid)


def rank_queries(features, query, gallery, top=8, block=256):
    """-> for every query i with a right answer a dict of what the scores are means of.

    precision (R,): at the rank of each right answer, the best first; its mean is AP, and the first
    right answer has rank 1 / precision[0]. cams (R,): their cameras. shown, similar: the first
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
            answers = np.flatnonzero(~(same_id & same_cam))
            shown = answers[np.lexsort((same_id[answers], -row[answers]))[:top]]
            ranked.append(dict(i=i, precision=n / (n + ahead), cams=gallery.cams[right],
                               shown=shown, similar=row[shown]))
    return ranked


def by_camera_pair(ranked, query, cameras):
    """-> precision and weight, (V, V): camera of the query, camera of the right answer.

    A query's AP is the mean over its R right answers, so each weighs 1 / R. Entries are means of
    the precision under these weights (NaN without any); their mean under `weight` is mAP.
    """
    total, weight = np.zeros((2, cameras, cameras))
    for r in ranked:
        row, share = query.cams[r["i"]], 1 / len(r["cams"])
        np.add.at(total[row], r["cams"], share * r["precision"])
        np.add.at(weight[row], r["cams"], share)
    return np.where(weight > 0, total / weight.clip(1e-12), np.nan), weight


PAIRS = ("other person, other camera", "other person, same camera",
         "same person, other camera", "same person, same camera")


def pair_counts(features, query, gallery, edges, block=256):
    """Count the similarities of a query and a gallery image, over all pairs -> (4, E + 1) int64.

    A row for each of PAIRS; column j: at least edges[j - 1] and less than edges[j]. edges (E,).
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


# ========================================================================================== drawing
# Colours are Okabe and Ito's, for colour-blind eyes; dash and shape say the same a second time.

STYLE = """:root {color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --soft: #5a5a60;
--rule: #d5d5da; --c0: #0072b2; --c1: #d55e00; --c2: #008060; --c3: #a8487e; --c4: #2a8fc9;
--c5: #b27700; --c6: #1c1c1e; --c7: #7a7a80}
@media (prefers-color-scheme: dark) {:root {--paper: #17181a; --ink: #eceef0; --soft: #aeb2b8;
--rule: #3c3f44; --c0: #4ba6e0; --c1: #ff8a3d; --c2: #2ec49a; --c3: #e08fbf; --c4: #9ad4f5;
--c5: #efb73e; --c6: #eceef0; --c7: #9a9ea4}}
body {margin: 0 auto; padding: 16px; max-width: 1080px; background: var(--paper);
color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere}
h1 {font-size: 1.5em} h2 {margin: 2em 0 .6em; padding-top: .8em; font-size: 1.25em;
border-top: 1px solid var(--rule)} h3 {margin: 1em 0 .3em; font-size: 1em}
.grid {display: grid; gap: 8px 28px; align-items: start;
grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr))}
figure {margin: 0 0 1em; min-width: 0} figcaption p {margin: .3em 0; max-width: 75ch}
svg {display: block; max-width: 540px; font: 12px system-ui, sans-serif; fill: var(--ink)}
.axis {stroke: var(--rule)} .curve {fill: none; stroke-width: 2} .wide {overflow-x: auto}
table {border-collapse: collapse; margin: .5em 0} th, td {padding: 3px 9px; text-align: right}
th:first-child, .words td {text-align: left; vertical-align: top} .heat td {text-align: center}
.strip {display: flex; flex-wrap: wrap; gap: 6px} .shot {width: 70px; font-size: 13px;
line-height: 1.25} img {box-sizing: border-box; width: 70px; height: 132px; object-fit: contain;
border: 4px solid var(--rule); border-radius: 3px} .asked img {border-color: var(--ink)}
.right img {border-color: var(--c0)} .wrong img {border: 4px dashed var(--c1)}
""" + "".join(f".s{i} {{stroke: var(--c{i})}} .f{i} {{fill: var(--c{i})}} " for i in range(8))


def figure(body, see, look):
    """A figure and its two sentences: what one sees, what to look for. All text here is HTML."""
    return (f"<figure>{body}<figcaption><p>{see}</p><p><b>Look for</b> {look}</p></figcaption>"
            "</figure>")


def table(head, rows, kind=""):
    """Rows of cells; the first of each is its head."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(f'<tr><th scope="row">{first}</th>' + "".join(
        cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows)
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")


def svg(label, height, parts):
    return (f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 360 {height}">'
            f'{"".join(parts)}</svg>')


def mark(i, x, y, r=3.5):
    """The mark of style i around (x, y): 8 colours and 5 shapes make 40 styles."""
    shape = (f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",   # circle
             f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",                       # square
             f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",               # triangle
             f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
             f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}")     # cross
    return f'<path class="f{i % 8} s{i % 8}" d="{shape[i % 5]}"/>'


def ticks(low, high, whole):
    """-> at most six round numbers from low to high; whole: without a fraction."""
    step = 10. ** math.floor(math.log10((high - low) / 5))
    step = next(step * k for k in (1, 2, 5, 10) if step * k * 5.001 >= high - low)
    step = max(step, 1) if whole else step
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def line_chart(label, lines, x_name, y_name="", marks=True):
    """Lines (name, x, y) above 0 or the least value; names lie above the plot, one a row. The
    aria-label says where each line starts and ends."""
    xs, ys = (np.concatenate([line[k] for line in lines]) for k in (1, 2))
    x0, x1, y0, y1 = xs.min(), xs.max(), min(0, ys.min()), max(0, ys.max())
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    top, left, right = 18 * len(lines) + 28, 50, 348
    bottom = top + 170

    def at(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    parts = [f'<text x="{left}" y="{top - 10}">{y_name}</text>'
             f'<text x="{right}" y="{bottom + 34}" text-anchor="end">{x_name}</text>']
    for tick in ticks(y0, y1, y1 > 5 and (ys == ys.round()).all()):
        y = at(x0, tick)[1]
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{right}"/><text x="{left - 6}" '
                     f'y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in ticks(x0, x1, (xs == xs.round()).all()):
        parts.append(f'<text x="{at(tick, y0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">'
                     f"{tick:,.6g}</text>")
    for i, (name, x, y) in enumerate(lines):
        points, row = [at(*point) for point in zip(x, y)], 18 * i + 10
        for d in ("L".join(f"{x:.1f} {y:.1f}" for x, y in points), f"{left} {row}h34"):
            parts.append(f'<path class="curve s{i % 8}" stroke-dasharray="'
                         f'{("", "7 3", "2 3", "9 3 2 3")[i % 4]}" d="M{d}"/>')
        parts.append(f'<text x="{left + 42}" y="{row + 4}">{html.escape(name)}</text>')
        for x, y in [*points[::len(points) // 25 + 1], (left + 17, row)] * marks:
            parts.append(mark(i, x, y))
    says = "; ".join(f"{name}, from {y[0]:.3g} to {y[-1]:.3g}" for name, _, y in lines)
    return svg(f"{label}: {says}", bottom + 42, parts)


def scatter(label, points, groups, names=()):
    """Points (M, 2), each with the mark of its group; names: of the groups, for a legend."""
    low, high = points.min(0), points.max(0)
    places = 12 + (points - low) / np.maximum(high - low, 1e-9) * 336
    parts = [mark(g, x, y, 3) for g, (x, y) in zip(groups, places)]
    for g, name in enumerate(names):
        x, y = 16 + g % 6 * 58, 376 + g // 6 * 20
        parts.append(f'{mark(g, x, y)}<text x="{x + 10}" y="{y + 4}">{name}</text>')
    return svg(label, 364 + 20 * math.ceil(len(names) / 6), parts)


def strip(shots):
    """A row of thumbnails (path, words, kind); kind: right (solid frame, tick), wrong (dashed
    frame, cross), asked (the query) or nothing."""
    cells = []
    for path, words, kind in shots:
        picture, file = common.open_image(path), io.BytesIO()
        picture.thumbnail((62, 124))
        picture.save(file, "JPEG", quality=75)
        data = base64.b64encode(file.getvalue()).decode()
        sign = {"right": "&#10003; ", "wrong": "&#10007; "}.get(kind, "")
        cells.append(f'<div class="shot {kind}"><img alt="{words}, {kind or "image"}" '
                     f'src="data:image/jpeg;base64,{data}">{sign}{words}</div>')
    return f'<div class="strip">{"".join(cells)}</div>'


# ========================================================================== the parts of the report

CHARTS = (  # title, keys of a line of the log, what one sees, what to look for
    ("Score on the test set", ("mAP", "rank1"), "mAP and rank-1 whenever the test set was ranked; "
     "of two points at epoch 0, the first is before the warm-up.",
     "a curve that still rises at the end (train longer) or falls (the labels went wrong)."),
    ("Clusters", ("clusters", "true ids"), "How many clusters DBSCAN found, and how many people "
     "there are, which nobody told it.",
     "far more clusters than people, who are then split, or far fewer, which are then mixed."),
    ("Outliers", ("outliers",), "How many training images are in no cluster and do not train.",
     "a fall as features improve; below, under Clusters, see who stays outside."),
    ("Label quality", ("ARI", "unrefined_ARI", "NMI", "purity"), "How well pseudo labels agree "
     "with the true ids, on which nothing trains; 1 is perfect.",
     "high purity beside a low ARI: clusters are clean, but people are in several."),
    ("Loss terms", (), "The mean of each loss term over an epoch.",
     "terms that fall together, and a jump where one is switched on."),
    ("Soft labels: clusters meant", ("soft_clusters",), "Over how many clusters a soft label "
     "spreads (the exponential of its entropy).",
     "a number well between 1, a hard label, and all clusters, no information."),
    ("Soft labels: own cluster", ("soft_own",), "The share of a soft label that its image's own "
     "cluster has.", "a share near 1: soft labels then say no more than hard ones."))


def curves(runs):
    """Charts by epoch of runs (name, lines of the log, loss terms): the keys of a single run share
    a chart, several runs share one for each key."""
    figures, alone = [], len(runs) == 1
    for title, keys, see, look in CHARTS:
        keys = keys or sorted({term for *_, terms in runs for term in terms})
        for some in [keys] if alone else [[key] for key in keys if key != "true ids"]:
            lines = []
            for name, log, _ in runs:
                for key in some:
                    points = [(line["epoch"], line[key]) for line in log if key in line]
                    if points:
                        name = key if alone else name
                        lines.append((f"{name}: {points[-1][1]:.4g}", *map(np.array, zip(*points))))
            label = title if alone else f"{title}: {some[0]}"
            if lines:
                chart = line_chart(label, lines, "epoch")
                figures.append(figure(f"<h3>{label}</h3>{chart}", see, look))
    return f'<div class="grid">{"".join(figures)}</div>'


def similarity(networks, query, gallery):
    """Histograms of similarities; networks: name -> features of query and gallery."""
    edges, centres, body = np.linspace(-.98, .98, 99), np.linspace(-.99, .99, 100), ""
    counts = {name: pair_counts(both, query, gallery, edges) for name, both in networks.items()}
    used = np.flatnonzero(sum(counts.values()).any(0))
    used = slice(used[0], used[-1] + 1)
    for name, count in counts.items():
        share = 100 * count / count.sum(1, keepdims=True).clip(1)                 # (4, 100)
        mean = share @ centres / 100
        lines = [(f"{kind}: mean {m:.2f}", centres[used], row[used])
                 for kind, m, row in zip(PAIRS, mean, share) if row.any()][::-1]
        chart = line_chart(f"Similarities {name}", lines, "similarity", "% of pairs, in steps of "
                           "0.02", marks=False)
        reach = share[1, np.searchsorted(edges, mean[2]):].sum()
        body += figure(
            f"<h3>{name}</h3>{chart}", "Across cameras, two images of one person have a mean "
            f"similarity of {mean[2]:.2f}, which {reach:.1f} % of the pairs of different people in "
            "the same camera reach or exceed.",
            "a gap between the curves of the same person, the camera gap, which training should "
            "close; rankings fail where curves of different people overlap with them.")
    return f'<div class="grid">{body}</div>'


def heat_table(value, weight):
    """mAP by camera of the query (rows) and of the right answers (columns)."""
    def cell(v):
        if np.isnan(v):
            return "<td>&ndash;</td>"
        shade = tuple(round(a + v * (b - a)) for a, b in ((232, 8), (242, 62), (250, 120)))
        return (f'<td style="background: rgb{shade}; color: {"#fff" if v > .5 else "#111"}">'
                f"{100 * v:.0f}</td>")
    names = [f"c{v + 1}" for v in range(len(value))]
    worst, best = (np.unravel_index(f(value), value.shape) for f in (np.nanargmin, np.nanargmax))
    return figure(
        table(["query in", *names], [(name, *map(cell, row)) for name, row in zip(names, value)],
              "heat"),
        "Mean precision in % at the right answers of each camera (columns), best from query camera "
        f"c{best[0] + 1} to c{best[1] + 1}, worst from c{worst[0] + 1} to c{worst[1] + 1}; weighted "
        f"by answers, the mean is the mAP of {100 * np.nansum(value * weight) / weight.sum():.1f}.",
        "a pale row or column: a camera that looks like no other.")


def cmc(ranked):
    """ranked: name -> rank_queries()."""
    lines = []
    for name, queries in ranked.items():
        rank, k = np.array([1 / r["precision"][0] for r in queries]), np.arange(1, 21)
        lines.append((name, k, 100 * (rank[:, None] < k + .5).mean(0)))
    return figure(line_chart("CMC", lines, "k", "% of queries"), "The share of queries that have a "
                  "right answer among the first k; at k = 1 it is rank-1.",
                  "a steep start: what is found at all is found at once; a low end: who is never.")


def ranking_lists(ranked, query, gallery):
    """What two of the best, the median and the worst queries find first."""
    order = sorted(ranked, key=lambda r: (r["precision"].mean(), len(r["precision"])))
    middle, body = order[len(order) // 2:], ""
    for title, some in (("Best", order[::-1]), ("Median", middle), ("Worst", order)):
        second = next((r for r in some if query.pids[r["i"]] != query.pids[some[0]["i"]]), some[0])
        for r in [some[0], second]:
            i = r["i"]
            answers = [(gallery.paths[j], f"c{gallery.cams[j] + 1} {similar:.2f}",
                        "right" if gallery.pids[j] == query.pids[i] else "wrong")
                       for j, similar in zip(r["shown"], r["similar"])]
            body += (f"<h3>{title}: person {query.pids[i]}, AP {100 * r['precision'].mean():.0f} %"
                     "</h3>" + strip([(query.paths[i], f"query c{query.cams[i] + 1}", "asked"),
                                      *answers]))
    return figure(body, "A query and the gallery images most similar to it, with camera and "
                  "similarity; solid frame and tick: right, dashed frame and cross: wrong.",
                  "what wrong answers share with the query: clothes, or only camera and light.")


def spread(indices, most):
    """-> at most that many of the indices, evenly spaced."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(int)]


def clusters(train, labels, known):
    """Clusters to look at: pure, mixed, split by camera, left out. known: there are true ids."""
    pids, cams = train.pids, train.cams
    members = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
    groups = []  # title, images, the person of most of them
    if known:
        people = [np.unique(pids[m], return_counts=True) for m in members]
        purity = [counts.max() / counts.sum() for _, counts in people]
        order = sorted(range(len(members)), key=lambda k: (
            purity[k], len(np.unique(cams[members[k]])), len(members[k])))
        for title, some in (("Pure", order[:-3:-1]), ("Mixed", order[:2])):
            groups += [(f"{title}: cluster {k}, {len(members[k])} images, {100 * purity[k]:.0f} % "
                        "of one person", members[k], people[k][0][people[k][1].argmax()])
                       for k in some]
        images_of = {p: np.flatnonzero((pids == p) & (labels >= 0)) for p in np.unique(pids)}
        by_camera = {p: normalized_mutual_info_score(labels[m], cams[m])
                     for p, m in images_of.items() if len(np.unique(labels[m])) > 1}
        groups += [(f"Split by camera: person {p} is in {len(np.unique(labels[images_of[p]]))} "
                    "clusters", images_of[p], None)
                   for p in sorted(by_camera, key=by_camera.get)[:-3:-1]]
    else:
        order = sorted(range(len(members)), key=lambda k: len(members[k]))
        groups = [(f"{title}: cluster {k}, {len(members[k])} images", members[k], None)
                  for title, k in (("Largest", order[-1]), ("Median", order[len(order) // 2]),
                                   ("Smallest", order[0]))]
    left_out, body = np.flatnonzero(labels < 0), ""
    groups.append((f"Left out: {len(left_out)} images in no cluster", left_out, None))
    for title, images, person in groups:
        images = spread(images[np.lexsort((pids[images], cams[images], labels[images]))], 12)
        body += f"<h3>{title}</h3>" + strip([
            (train.paths[i], f"c{cams[i] + 1} in {labels[i]}" + f" id {pids[i]}" * known, "" if
             person is None else "right" if pids[i] == person else "wrong") for i in images])
    return figure(body, "Training images with camera, cluster (-1: none)" + " and true id; solid "
                  "frame and tick: the person of most images, dashed frame and cross: others."
                  * known + "." * (not known),
                  "what holds a wrong cluster together: the same clothes, or the same background.")


def t_sne(features, groups, cams, what):
    """Maps of (M, D) features, coloured by person or cluster and, beside it, by camera."""
    points = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=0
                  ).fit_transform(features)
    near = (features @ features.T - 2 * np.eye(len(features))).argmax(1)
    same = [100 * (some[near] == some).mean() for some in (groups, cams)]
    groups, names = common.renumber(groups), [f"c{v + 1}" for v in range(cams.max() + 1)]
    return figure(
        f'<div class="grid"><div><h3>By {what}</h3>{scatter(f"t-SNE by {what}", points, groups)}'
        f'</div><div><h3>By camera</h3>{scatter("t-SNE by camera", points, cams, names)}</div></div>',
        f"{len(features)} images of {groups.max() + 1} {what}s: the most similar other image is of "
        f"the same {what} for {same[0]:.0f} % and of the same camera for {same[1]:.0f} % of them.",
        f"islands of one {what} that hold all cameras; islands of one camera are the camera gap.")


def choose(groups, cams, most=40, images=15):
    """-> indices of images of some people (or clusters) that two cameras see; -1 is nobody."""
    names = np.unique(groups[groups >= 0])
    across = [g for g in names if len(np.unique(cams[groups == g])) > 1]
    some = np.random.default_rng(0).permutation(across or names)[:most]
    return np.concatenate([spread(np.flatnonzero(groups == g), images) for g in some])


def about(run, scores):
    """What was run, with which flags, and the score."""
    log, state, keys = run.header, run.state, ("mAP", "rank1", "rank5", "rank10")
    facts = [("data", f"{run.data}, {len(run.train.paths):,} training images"),
             ("network", f"{state['arch']}, images of {state['size'][0]} x {state['size'][1]}"),
             ("epochs", f"{run.stand}, {state['seconds']:,.0f} s on {log.get('device')}"),
             ("versions", f"code {log.get('commit')}, torch {log.get('torch')}"),
             ("flags", " ".join(flag(*item) for item in log["args"].items()))]
    text = table(("run", ""), [(name, html.escape(fact)) for name, fact in facts], "words")
    if scores:
        text = table(("score in %", *keys, "queries"), [("", *(
            f"{100 * scores[key]:.1f}" for key in keys), f"{scores['queries']:,}")]) + text
    return figure(text, "What the network of the last finished epoch scores, and all that led to "
                  "it.", "flags that differ from those of another run before you compare scores.")


SECTIONS = ("Run and score", "Curves by epoch", "Similarity within and across cameras",
            "mAP by pair of cameras", "CMC", "Ranking lists", "Clusters", "t-SNE")


def report(run, features, images):
    """-> the page of a run. features, images: of query and gallery; () without ids there."""
    labels, test = run.state.get("labels"), (run.query, run.gallery)
    fits = torch.is_tensor(labels) and len(labels) == len(run.train.paths)
    labels = labels.numpy() if fits and "classifier" not in run.state else None
    known = bool((run.train.pids >= 0).any())
    for line in run.log:
        if known and "clusters" in line:
            line["true ids"] = len(np.unique(run.train.pids))
    parts = dict.fromkeys(SECTIONS, "<p>Left out: it needs test images with ids.</p>")
    parts["Run and score"] = about(run, features and common.evaluate(*features, *test))
    parts["Curves by epoch"] = curves([("", run.log, run.terms)])
    if features:
        network, what = initial_network(run)
        networks, note = {}, f"<p>Before training: cannot be shown, {html.escape(what)}.</p>"
        if network:
            network.on(features[0].device, run.precision)
            networks, note = {f"before training ({what})": [embed(network, x) for x in images]}, ""
        networks["after training"] = features
        ranked = {name: rank_queries(both, *test) for name, both in networks.items()}
        last, cameras = ranked["after training"], max(split.cams.max() for split in test) + 1
        parts.update(zip(SECTIONS[2:6], (
            note + similarity(networks, *test),
            heat_table(*by_camera_pair(last, run.query, cameras)), cmc(ranked),
            ranking_lists(last, *test))))
    parts["Clusters"] = parts["t-SNE"] = "<p>Left out: no pseudo labels of these images.</p>"
    if labels is not None:
        parts["Clusters"] = clusters(run.train, labels, known)
        index = choose(labels, run.train.cams)
        some = common.Split([run.train.paths[i] for i in index], *(x[index] for x in run.train[1:]))
    if features:
        pids, cams = (np.concatenate(pair) for pair in zip(run.query[1:], run.gallery[1:]))
        index = choose(np.where(pids > 0, pids, -1), cams)  # distractors are many people
        parts["t-SNE"] = t_sne(torch.cat(features)[index].cpu().numpy(), pids[index], cams[index],
                               "person")
    elif labels is not None:
        seen = embed(run.model, common.read_images(some, *run.state["size"])).cpu().numpy()
        parts["t-SNE"] = t_sne(seen, labels[index], some.cams, "cluster")
    return page(f"Report of {run.folder}", parts)


def compare(runs):
    """-> the page of several runs; the legend is the flags in which they differ."""
    for run in runs:
        run.flags = {key: flag(key, value) for key, value in run.header["args"].items()
                     if key not in ("out", "root", "device", "resume")}
    common_keys = [key for key in runs[0].flags if all(key in run.flags for run in runs)]
    differ = [key for key in common_keys if len({run.flags[key] for run in runs}) > 1]
    rows = []
    for run in runs:
        run.name = " ".join([os.path.basename(run.folder)] * (len(common_keys) < len(run.flags) or not differ)
                            + [run.flags[key] for key in differ])
        scores = [f"{100 * run.state['scores'].get(key, math.nan):.1f}" for key in ("mAP", "rank1")]
        rows.append([html.escape(x) for x in (run.name, run.folder, run.stand, *scores)])
    return page("Runs compared", {
        "Runs": figure(table(("differs in", "run", "epochs", "mAP", "rank1"), rows),
                       "Each run with the flags in which it differs, and its last score.",
                       "differences larger than those between seeds."),
        "Curves by epoch": curves([(run.name, run.log, run.terms) for run in runs])})


def page(title, parts):
    """-> the file, from sections title -> HTML. Its policy lets a browser load nothing at all."""
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in parts.items())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{html.escape(title)}</h1>{body}</body></html>\n")


# ========================================================================================== a run


def open_run(path, data):
    """-> what a folder or its last.pt says. home: where the run was started, if the end of its
    folder's name is its --out; stand: how far it is."""
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    model, state = common.load_encoder(path)
    folder, home = os.path.dirname(path) or ".", ""
    out, here = os.path.normpath(str(state.get("out"))), os.path.abspath(folder)
    for place in (here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))):  # stages
        home = place[:-len(out)] if place.endswith(os.sep + out) else home
    planned = state["source_epochs" if "classifier" in state else "epochs"]
    if not data:
        data = state["data"] if state["data"] in common.DATASETS else locate(state["data"], home)
    return argparse.Namespace(
        path=path, folder=folder, home=home, data=data, model=model, state=state, planned=planned,
        stand=f"after epoch {state['epoch']} of {planned}",
        precision=argparse.Namespace(bf16=state["bf16"], fp32=state["fp32"], recompute=False))


def read_log(run):
    """Give the run its log's header, its lines as flat dicts, and the names of its loss terms."""
    try:
        header, *lines = map(json.loads, run.state["lines"])
        groups = [[line.pop(group, {}) for group in ("quality", "losses", "scores")]
                  for line in lines]
        run.header, run.log = dict(header, args=dict(header["args"])), [
            dict(line, **{k: v for group in some for k, v in group.items()})
            for line, some in zip(lines, groups)]
        run.terms = {term for _, losses, _ in groups for term in losses if "soft_" not in term}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise common.Problem(f"{run.path} holds no log of these pages (name another)") from error


def locate(path, home):
    """A relative path of a run -> where it is from the run's home or, failing that, from here."""
    return next((p for p in (os.path.join(home, path), path) if os.path.exists(p)), path)


def flag(name, value):
    """-> a flag as one types it; nothing for a switch that is off."""
    if value is None or value is False:
        return ""
    value = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join(["--" + name.replace("_", "-"), *map(str, value)])


def initial_network(run):
    """-> the network before training and what it is; or None and why there is none."""
    state = run.state
    try:
        if "classifier" in state:
            return None, "a source network's first weights are not kept"
        if "nets" in state:
            folder = locate(state["sources"] or os.path.join(run.folder, "source"), run.home)
            return common.load_encoder(os.path.join(folder, "1", "last.pt"))[0], "source network"
        weights = state["weights"]
        weights = weights if weights in ("none", "imagenet") else locate(weights, run.home)
        common.seed_everything(state["seed"])  # as the page did before it made its network
        return common.Encoder(state["arch"], weights, state["parts"], state["pooling"]), (
            "random weights" if weights == "none" else os.path.basename(weights))
    except (common.Problem, KeyError, TypeError, ValueError) as problem:
        return None, str(problem)


def embed(model, images):
    """(N, 3, H, W) uint8 -> (N, D) features; of a network with parts the global ones."""
    features = common.extract_features(model, images)
    return features[0] if model.parts else features


# ===================================================================================== the program


def get_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="+", help="a run's folder or its last.pt; several for --report FILE")
    add("--data", help="key or folder of the data set (the one of the run)")
    add("--root", help="where data sets live (the one of the run)")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking, of the score only")
    add("--json", action="store_true", help="print one line of JSON, no table")
    add("--report", nargs="?", const="", metavar="FILE.html", help="draw the run, or the curves of "
        "several, to look at (report.html in the run's folder)")
    add("--pairs", nargs=2, metavar=("A", "B"), help="how similar two images are")
    add("--save-features", metavar="FILE.npz", help="features, paths, pids, cams and split of all "
        "images of the data set")
    add("--device", default="auto", choices=common.DEVICES, help="(%(default)s)")
    args = parser.parse_args(argv)
    if len(args.checkpoint) > 1 and not args.report:
        raise common.Problem("several runs can only be compared (say --report FILE.html)")
    for name, end in ((args.report, ".html"), (args.save_features, ".npz")):
        if name and not name.endswith(end):
            raise common.Problem(f"{name} does not end with {end} (call it {name}{end})")
    return args


def say(text):
    """Print, with ? for letters that the terminal lacks. What a closed pipe or a full disk does not
    take goes to stderr, so that no score is lost."""
    try:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except (OSError, ValueError, AttributeError) as error:
        print(text, file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # the old one would try again at the end
        raise common.Problem(f"the output cannot be written: {error} (it is above)") from error


def write(path, content):
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise common.Problem(f"{path} cannot be written: {error.strerror} (free some space, or name "
                             "another file)") from error
    print(f"{path}: {len(content) / 1e6:.1f} MB", file=sys.stderr)


def save_features(run, path):
    """Features of all images of the data set, with paths, pids, cams and split -> FILE.npz."""
    kept, file = [], io.BytesIO()
    for kind, split in zip(common.KINDS, (run.train, run.query, run.gallery)):
        if split.paths:
            images = common.read_images(split, *run.state["size"])
            kept.append((embed(run.model, images).cpu().numpy(), *split, [kind] * len(images)))
    names = ("features", "paths", "pids", "cams", "split")
    np.savez(file, **{name: np.concatenate(x) for name, x in zip(names, zip(*kept))})
    write(path, file.getvalue())


def pair(run, features, files):
    """How similar two image files are, and which share of each of PAIRS is at least as similar."""
    a, b = embed(run.model, common.read_images(common.Split(files, None, None), *run.state["size"]))
    found = dict(similarity=float(a @ b))
    if features:
        counts = pair_counts(features, run.query, run.gallery, [found["similarity"]])     # (4, 2)
        both = {"different people": counts[0] + counts[1], "the same person": counts[2] + counts[3],
                **dict(zip(PAIRS, counts))}
        found.update({kind: float(n[1] / n.sum().clip(1)) for kind, n in both.items()})
    return found


def main(argv=None):
    args = get_args(argv)
    runs = [open_run(path, args.data) for path in args.checkpoint]
    for run in runs if args.report is not None else []:
        read_log(run)
    if len(runs) > 1:
        return write(args.report, compare(runs).encode())
    run, device = runs[0], common.pick_device(args.device)
    # Nothing is drawn where somebody typed, perhaps wrongly, or where a checkpoint says; a toy set
    # that is missing is drawn only into data/, the pages' own place, and only if that is there.
    root = args.root or locate(run.state["root"], run.home)
    draw = not args.root and run.state["root"] == "data" and os.path.isdir(root)
    run.train, run.query, run.gallery = common.load(run.data, root, draw=draw)
    run.model.on(device, run.precision)
    images = [common.read_images(split, *run.state["size"]) for split in (run.query, run.gallery)
              if len(split.paths) and (run.query.pids >= 0).any()]
    features = [embed(run.model, part) for part in images]
    if args.save_features:
        save_features(run, args.save_features)
    if args.report is not None:
        write(args.report or os.path.join(run.folder, "report.html"),
              report(run, features, images).encode("utf-8", "replace"))
    if args.pairs:
        found = pair(run, features, args.pairs)
        say(json.dumps(found) if args.json else "\n".join(
            f"{kind:28} {value:6.3f}" if kind == "similarity" else
            f"{kind:28} {100 * value:6.2f} % of the test set's pairs are at least as similar"
            for kind, value in found.items()))
        return found
    if not features and (args.report is not None or args.save_features):
        return {}
    if not features:
        raise common.Problem(f"{run.data} has no test images with ids, so there is no score (say "
                             "--report, --pairs or --save-features)")
    similar = rerank(*features) if args.rerank else None
    scores = common.score_ranking(similar, run.query, run.gallery) if args.rerank else (
        common.evaluate(*features, run.query, run.gallery))
    scores = dict(data=run.data, rerank=args.rerank, epoch=run.state["epoch"], epochs=run.planned,
                  **scores)
    if args.json:
        say(json.dumps(scores))
    else:
        say(f"{'data':20} re-ranked    mAP     R1     R5    R10  queries\n"
            f"{run.data:20} {'yes' if args.rerank else 'no':>9} " + " ".join(
                f"{100 * scores[key]:6.1f}" for key in ("mAP", "rank1", "rank5", "rank10"))
            + f" {scores['queries']:8,}" + (f"\nunfinished: {run.stand}" if run.state["epoch"] <
                                            run.planned else ""))
    return scores


if __name__ == "__main__":
    common.run(main, resume=None)
