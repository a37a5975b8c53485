"""Draw the report of a run: numbers in, one file of HTML out. `python eval.py RUN --report`.

The file opens anywhere, offline: charts are SVG, thumbnails JPEG, without scripts or addresses.
Every figure has two sentences: what one sees, what to look for. eval.py computes the numbers.
"""

import base64
import functools
import html
import io
import math

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

import common

PAIRS = ("other person, other camera", "other person, same camera",
         "same person, other camera", "same person, same camera")

# ========================================================================================== drawing
# Colours are Okabe and Ito's, for colour-blind eyes; dash and shape say the same a second time.

STYLE = """:root {color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --rule: #d5d5da;
--c0: #0072b2; --c1: #d55e00; --c2: #008060; --c3: #a8487e; --c4: #2a8fc9; --c5: #b27700;
--c6: #1c1c1e; --c7: #7a7a80} @media (prefers-color-scheme: dark) {:root {--paper: #17181a;
--ink: #eceef0; --rule: #3c3f44; --c0: #4ba6e0; --c1: #ff8a3d; --c2: #2ec49a; --c3: #e08fbf;
--c4: #9ad4f5; --c5: #efb73e; --c6: #eceef0; --c7: #9a9ea4}}
body {margin: auto; padding: 16px; max-width: 1080px; background: var(--paper); color: var(--ink);
font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere}
h3 {margin: 1.2em 0 .3em; font-size: 1.1em}
h2 {margin: 2em 0 .6em; padding-top: .8em; font-size: 1.3em; border-top: 1px solid var(--rule)}
.grid {display: grid; gap: 8px 32px; align-items: start; grid-template-columns:
repeat(auto-fit, minmax(min(100%, 420px), 1fr))} figure {margin: 0 0 1em; min-width: 0}
p {margin: .3em 0; max-width: 75ch} span {display: inline-block}
svg {display: block; max-width: 540px; fill: var(--ink); font: 12px system-ui, sans-serif}
 .axis {stroke: var(--rule)} .curve {fill: none; stroke-width: 2}
.bar {height: 17px; position: relative; font-size: 11px; isolation: isolate}
.bar i {position: absolute; z-index: -1; height: 15px; opacity: .45; border-radius: 2px}
.upright {stroke: var(--ink); stroke-dasharray: 3 3}
.wide {overflow-x: auto} th, td {padding: 3px 9px; text-align: center; white-space: nowrap}
.strip, .batch {display: flex; flex-wrap: wrap; gap: 6px} h4, h5 {margin: .8em 0 .2em;
font-size: 1em}
.lesson .grid {gap: 8px 16px;
grid-template-columns: repeat(auto-fit, minmax(min(100%, 334px), 1fr))}
.lesson .strip > div {display: flex; flex-direction: column; width: 62px; font-size: 11px}
.lesson img + .bar {margin-top: auto} .lesson .strip img {width: 62px; height: 116px;
border-width: 3px} .half .strip img, .lesson .half .strip img {height: 64px}
.batch {gap: 10px 18px} .batch div {max-width: 100%; font: 13px/1.25 system-ui, sans-serif}
.batch img {display: block; width: auto; max-width: 100%; height: auto; border: 0}
.strip > div {width: 78px; font: 13px/1.25 system-ui, sans-serif}
img {box-sizing: border-box; width: 78px; height: 148px; object-fit: contain; border-radius: 3px;
border: 4px solid var(--rule)} .query img, .this img {border-color: var(--ink)}
.right img {border-color: var(--c0)} .wrong img {border: 4px dashed var(--c1)}
""" + "".join(f".s{i} {{stroke: var(--c{i})}} .f{i} {{fill: var(--c{i})}} "
                 f".b{i} {{background: var(--c{i})}} " for i in range(8))

DASHES = ("", "7 3", "2 3", "9 3 2 3")


def figure(title, body, see, look, above=False):
    """A figure and its two sentences, below or above it: what one sees, what to look for. All of it
    is HTML."""
    title = f"<h3>{title}</h3>" * bool(title)
    caption = f"<figcaption><p>{see}</p><p><b>Look for</b> {look}</p></figcaption>"
    return f"<figure>{title}{caption + body if above else body + caption}</figure>"


def grid(figures):
    return f'<div class="grid">{"".join(figures)}</div>'


def mark(i, x, y, r=3.5):
    """The mark of style i around (x, y): 8 colours and 5 shapes make 40 styles."""
    shape = (f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",   # circle
             f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",                       # square
             f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r + 1}h{-2 * r - 2}z",               # triangle
             f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
             f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}")     # cross
    return f'<path class="f{i % 8} s{i % 8}" d="{shape[i % 5]}"/>'


def ticks(values):
    """-> round numbers, 3 to 6, between the least and the greatest; whole if all values are."""
    low, high = values.min(), values.max()
    step = 10. ** math.floor(math.log10(max(high - low, 1e-9) / 5))
    step = next(step * k for k in (1, 2, 5, 10) if step * k * 5.001 >= high - low)
    step = max(step, 1) if (values == values.round()).all() else step
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def svg(label, height, parts):
    return (f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 360 {height:.0f}">'
            f'{"".join(parts)}</svg>')


def line_chart(label, lines, x_name, y_name="", marks=True, uprights=()):
    """Lines (name, x, y), from 0 up. Names lie above the plot, one a row; the aria-label says where
    each line starts and ends. uprights (name, x): vertical lines."""
    xs, ys = (np.concatenate([np.asarray(line[k], float) for line in lines]) for k in (1, 2))
    ys = np.append(ys, 0)
    xs = np.append(xs, [x for _, x in uprights])
    top, left, right = 18 * len(lines) + 28 + 16 * len(uprights), 50, 348
    bottom = top + 170

    def at(x, y):
        return (left + (x - xs.min()) / max(np.ptp(xs), 1e-9) * (right - left),
                bottom - (y - ys.min()) / max(np.ptp(ys), 1e-9) * (bottom - top))
    parts = [f'<text x="{left}" y="{18 * len(lines) + 18}">{y_name}</text>'
             f'<text x="{right}" y="{bottom + 34}" text-anchor="end">{x_name}</text>']
    for tick in ticks(ys):
        y = at(0, tick)[1]
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{right}"/><text x="{left - 6}" '
                     f'y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')
    for tick in ticks(xs):
        parts.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">'
                     f"{tick:,.6g}</text>")
    for i, (name, x, y) in enumerate(lines):
        points, row = [at(*point) for point in zip(x, y)], 18 * i + 10
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="curve s{i % 8}" stroke-dasharray="{DASHES[i % 4]}" '
                     f'd="M{left} {row}h34{path and "M" + path}"/>')
        if marks:
            every = len(points) // 25 + 1
            parts += [mark(i, *point) for point in [*points[::every], (left + 17, row)]]
        parts.append(f'<text x="{left + 42}" y="{row + 4}">{html.escape(name)}</text>')
    for i, (name, x) in enumerate(uprights):
        x, y = at(x, 0)[0], top - 16 * (len(uprights) - i) + 2
        end = ' text-anchor="end"' if x > 200 else ""
        parts.append(f'<path class="upright" d="M{x:.1f} {y - 8}V{bottom}"/><text x="'
                     f'{x + (-4 if end else 4):.1f}" y="{y}"{end}>{html.escape(name)}</text>')
    says = "; ".join(f"{name}, from {y[0]:.3g} to {y[-1]:.3g}" for name, _, y in lines if len(y))
    return svg(f"{label}: {says}", bottom + 42, parts)


def scatter(label, points, groups, names=()):
    """Points (M, 2), each with the mark of its group 0, 1, ...; below, what the marks mean."""
    low, high = points.min(0), points.max(0)
    places = 10 + (points - low) / np.maximum(high - low, 1e-9) * 340
    parts = [mark(g, x, y, 3) for g, (x, y) in zip(groups, places)]
    columns = min(6, 348 // (22 + 7 * max(map(len, names), default=1)) or 1)
    for g, name in enumerate(names):
        x, y = 12 + g % columns * 348 // columns, 378 + g // columns * 20
        parts.append(f'{mark(g, x, y)}<text x="{x + 10}" y="{y + 4}">{name}</text>')
    return svg(label, 366 + 20 * math.ceil(len(names) / columns), parts)


def jpeg(picture):
    """A PIL image -> the address of an image that the file itself holds."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def thumbnail(path, part=(0, 1)):
    """The address of a small picture of a file; part: its rows from and to, as fractions."""
    picture = common.open_image(path)
    width, height = picture.size
    picture = picture.crop((0, round(part[0] * height), width, round(part[1] * height)))
    picture.thumbnail((70, 140))
    return jpeg(picture)


def shot(path, words, kind="", below="", part=(0, 1)):
    """A thumbnail, words and, below, HTML. kind: right (solid frame, tick), wrong (dashed frame,
    cross), query, or nothing."""
    sign = {"right": "&#10003; ", "wrong": "&#10007; ", "query": "query "}.get(kind, "")
    return (f'<div class="{kind}"><img alt="{kind or "image"}, {words}" '
            f'src="{thumbnail(path, part)}">{sign}{words}{below}</div>')


def camera(split, v):
    """Camera v of a Split, as its files and folders call it: c7, cam_left."""
    name = split.camera_names[v]
    return html.escape(name) if isinstance(name, str) else f"c{name}"


def strip(shots):
    """A row of thumbnails: the arguments of shot()."""
    return f'<div class="strip">{"".join(shot(*words) for words in shots)}</div>'


def bar(name, share, style, decimals=None):
    """A share as a bar of the style's colour, in %; with `decimals`, as the number that it is."""
    text = f"{100 * share:.0f} %" if decimals is None else f"{share:.{decimals}f}"
    return (f'<div class="bar"><i class="b{style}" style="width: {100 * max(share, 0):.0f}%"></i>'
            f"{name} {text}</div>")


def matrix(label, values, sizes, names):
    """Values (n, n) from low, faint, to high, strong blue, in 9 steps; lines separate groups of
    rows of these sizes, whose names stand above."""
    n = len(values)
    others = values[~np.eye(n, dtype=bool)]  # the diagonal says nothing
    low, high = others.min(), others.max()
    level = np.round(8 * (values - low) / max(high - low, 1e-9)).clip(0, 8).astype(int)
    scale, ends = 330 / n, np.cumsum(sizes)
    parts = [f'<text x="{20 + (end - size / 2) * scale:.1f}" y="14" text-anchor="middle">{name}'
             "</text>" for end, size, name in zip(ends, sizes, names)]
    parts.append('<g shape-rendering="crispEdges" transform="translate(20 20) '
                 f'scale({scale:.3f})">')
    for k in range(1, 9):
        path = ""
        for y, row in enumerate(level == k):
            edge = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
            path += "".join(f"M{x} {y}h{end - x}v1h{x - end}z" for x, end in edge.reshape(-1, 2))
        parts.append(f'<path class="f0" fill-opacity="{k / 8}" d="{path}"/>' * bool(path))
    parts.append("</g>")
    for end in (0, *ends):
        at = 20 + end * scale
        parts.append(f'<path class="axis" d="M{at:.1f} 20V350M20 {at:.1f}H350"/>')
    parts.append(f'<text x="20" y="370">faint {low:.2f}, strong {high:.2f}</text>')
    return svg(label, 376, parts)


def table(head, rows):
    """Rows of cells, text or whole <td>; the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(f'<tr><th scope="row">{first}</th>' + "".join(
        cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows)
    return (f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
            "</div>")


def page(title, sections):
    """The file, of sections title -> HTML. Its policy lets a browser load nothing at all."""
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections.items())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{html.escape(title)}</h1>{body}<p>The images belong to the data set: its terms "
            "hold for this file too.</p></body></html>\n")


# ===================================================================== figures, in a report's order

CHARTS = (  # title, keys of a line of the log, what one sees, what to look for
    ("Score on the test set in %", ("mAP", "rank1"), "mAP and rank-1 whenever the test set was "
     "ranked; where epoch 0 has two points, the first is before the warm-up.",
     "a curve that still rises at the end (train longer) or falls (the labels went wrong)."),
    ("Clusters", ("clusters", "true ids"), "How many clusters DBSCAN found, and how many people "
     "there are, which nobody told it.",
     "far more clusters than people, who are then split, or far fewer, which are then mixed."),
    ("Outliers", ("outliers",), "How many training images are in no cluster and do not train.",
     "a fall as features improve; below, under Clusters, see who stays outside."),
    ("Label quality", ("ARI", "unrefined_ARI", "NMI", "purity"), "How well pseudo labels agree "
     "with the true ids, on which nothing trains; 1 is perfect.",
     "high purity beside a low ARI: clusters are clean, but people are in several."),
    ("Loss terms", (), "The mean of each loss term over an epoch; a vertical line marks the epoch "
     "in which a term starts.", "terms that fall together, and what others do where one starts."),
    ("Soft labels: clusters meant", ("soft_clusters",), "Over how many clusters a soft label "
     "spreads (the exponential of its entropy).",
     "a number well between 1, a hard label, and all clusters, no information."),
    ("Soft labels: own cluster", ("soft_own",), "The share of a soft label that its image's own "
     "cluster has.", "a share near 1: soft labels then say no more than hard ones."))


def starts(lines):
    """-> [(names, epoch)] of those lines (name: ..., x, y) that begin later than others."""
    begin = {name.split(":")[0]: x[0] for name, x, _ in lines}
    return [(", ".join(name for name in begin if begin[name] == epoch) + " from here on", epoch)
            for epoch in sorted(set(begin.values()))[1:]]


def curves(runs):
    """Charts by epoch of runs (name, lines of the log, loss terms): the keys of a single run share
    a chart, several runs share one for each key."""
    figures, alone = [], len(runs) == 1
    for title, keys, see, look in CHARTS:
        keys = keys or sorted({term for *_, terms in runs for term in terms})
        for some in [keys] if alone else [[key] for key in keys if key != "true ids"]:
            lines = []
            for run, log, _ in runs:
                for key in some:
                    points = [(line["epoch"], line[key]) for line in log
                              if key in line and math.isfinite(line[key])]
                    name = key if alone else run if len(run) < 32 else run[:30] + "..."
                    if points:
                        lines.append((f"{name}: {points[-1][1]:.4g}", *zip(*points)))
                    elif not alone:  # a run keeps its colour in all charts
                        lines.append((f"{name}: none", (), ()))
            label = title if alone else f"{title}: {some[0]}"
            if any(x for _, x, _ in lines):
                chart = line_chart(label, lines, "epoch", uprights=starts(lines) if alone else ())
                figures.append(figure(html.escape(label), chart, see, look))
    return grid(figures)


EDGES = np.linspace(-1, 1, 401)[1:-1]  # of the histogram, finer than it is drawn


def similarity(counts):
    """Histograms of similarities; counts: name of a network -> eval.pair_counts() at EDGES."""
    figures, centres = [], np.linspace(-.9975, .9975, 400)
    for name, count in counts.items():
        share = 100 * count / count.sum(1, keepdims=True).clip(1)                 # (4, 400)
        mean = share @ centres / 100
        used = np.flatnonzero(share.any(0))
        step = (used[-1] - used[0]) // 40 + 1
        first = np.arange(used[0], used[-1] + 1, step)  # of about 40 columns
        x, y = centres[first] + (step - 1) / 400, np.add.reduceat(share, first, 1)
        lines = [(f"{kind}: mean {m:.2f}", x, row) for kind, m, row in zip(PAIRS, mean, y)][::-1]
        reach = share[1, np.searchsorted(EDGES, mean[2]):].sum()
        figures.append(figure(
            name, line_chart(f"Similarities {name}", lines, "similarity",
                             f"% of pairs, in steps of {step / 200:.3g}", marks=False),
            f"Images of one person have a mean similarity of {mean[3]:.2f} in one camera and "
            f"{mean[2]:.2f} across cameras, which {reach:.1f} % of the pairs of different people "
            "in one camera reach.",
            "the camera gap, between the curves of the same person, which training should close; "
            "rankings fail where curves of different people overlap with them."))
    return grid(figures)


def heat_table(value, weight, names):
    """mAP by camera of the query (rows) and of the right answers (columns), (V, V) each; names of
    the V cameras."""
    def cell(v):
        if np.isnan(v):
            return "<td>&ndash;</td>"
        shade = tuple(round(a + v * (b - a)) for a, b in ((232, 8), (242, 62), (250, 120)))
        return (f'<td style="background: rgb{shade}; color: {"#fff" if v > .5 else "#111"}">'
                f"{100 * v:.0f}</td>")
    worst, best = ([names[v] for v in np.unravel_index(f(value), value.shape)]
                   for f in (np.nanargmin, np.nanargmax))
    mean = 100 * np.nansum(value * weight) / weight.sum()
    return figure(
        "mAP in %, query camera by answer camera",
        table(["query in", *names], [(name, *map(cell, row)) for name, row in zip(names, value)]),
        "Mean precision at the right answers in the camera of a column, best from query camera "
        f"{' to '.join(best)}, worst from {' to '.join(worst)}; the mean over all answers is the "
        f"mAP, {mean:.1f}.",
        "a pale row or column: a camera that looks like no other.")


def match_curve(ranks):
    """CMC; ranks: name of a network -> (Q,) rank of each query's first right answer."""
    k = np.arange(1, 21)
    lines = [(f"{name}: rank-1 {100 * (rank == 1).mean():.1f}", k,
              100 * (rank[:, None] <= k).mean(0)) for name, rank in ranks.items()]
    return figure("Cumulative match", line_chart("CMC", lines, "k", "% of queries"), "The share of "
                  "queries with a right answer among the first k.", "a steep start: what is found "
                  "at all is found at once; a low end: who is not found at all.")


def ranking_lists(ranked, query, gallery):
    """What two of the best, the median and the worst queries find; ranked: rank_queries()."""
    order, figures = sorted(ranked, key=lambda r: (r["precision"].mean(), len(r["cams"]))), ""
    for title, some in (("Best", order[::-1]), ("Median", order[len(order) // 2:]),
                        ("Worst", order)):
        person = query.pids[some[0]["i"]]
        another = next((r for r in some if query.pids[r["i"]] != person), some[-1])
        for r in (some[0], another):
            i = r["i"]
            answers = [(gallery.paths[j], f"{camera(gallery, gallery.cams[j])} {similar:.2f}",
                        "right" if gallery.pids[j] == query.pids[i] else "wrong")
                       for j, similar in zip(r["shown"], r["similar"])]
            asked = (query.paths[i], camera(query, query.cams[i]), "query")
            figures += (f"<h3>{title}: person {query.pids[i]}, AP "
                        f"{100 * r['precision'].mean():.0f} %</h3>{strip([asked, *answers])}")
    return figure("", figures, "A query and the gallery images most similar to it, with camera and "
                  "similarity; solid frame and tick: right, dashed frame and cross: wrong.",
                  "what wrong answers share with the query: clothes, or only camera and light.")


def spread(indices, most):
    """-> at most that many of the indices, evenly spaced."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(int)]


def known_clusters(labels, pids, cams):
    """-> pure and mixed clusters and people split by camera: title, images, person of most."""
    members = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
    people = [np.unique(pids[m], return_counts=True) for m in members]
    purity = [counts.max() / counts.sum() for _, counts in people]
    order = sorted(range(len(members)), key=lambda k: (purity[k], len(np.unique(cams[members[k]])),
                                                       len(members[k])))
    groups = [(f"{title}: cluster {k}, {len(members[k])} images, {100 * purity[k]:.0f} % of one "
               "person", members[k], people[k][0][people[k][1].argmax()])
              for title, some in (("Pure", order[:-3:-1]), ("Mixed", order[:2])) for k in some]
    split = []
    for person in np.unique(pids):
        images = np.flatnonzero((pids == person) & (labels >= 0))
        found, counts = np.unique(labels[images], return_counts=True)
        if (counts > 1).sum() > 1:  # how well the camera tells in which cluster an image is
            score = normalized_mutual_info_score(labels[images], cams[images])
            split.append((score, len(images), person, len(found), images))
    return groups + [(f"Split by camera: person {person} in {n} clusters", images, None)
                     for _, _, person, n, images in sorted(split, key=lambda s: s[:3])[:-3:-1]]


def clusters(train, labels, known):
    """Clusters to look at and what none of them holds; labels (N,); known: are there true ids?"""
    pids, cams = train.pids, train.cams
    if known:
        groups = known_clusters(labels, pids, cams)
    else:
        size = np.bincount(labels[labels >= 0])
        order = size.argsort(kind="stable")
        groups = [(f"{title}: cluster {k}, {size[k]} images", np.flatnonzero(labels == k), None)
                  for title, k in (("Largest", order[-1]), ("Median", order[len(order) // 2]),
                                   ("Smallest", order[0]))]
    left_out, body = np.flatnonzero(labels < 0), ""
    groups.append((f"Left out: {len(left_out)} images in no cluster", left_out, None))
    for title, images, person in groups:
        images, shots = spread(images[np.lexsort((cams[images], labels[images]))], 12), []
        for i in images:
            where = f", in {labels[i]}" if title.startswith("Split") else ""
            words = camera(train, cams[i]) + (where or f", id {pids[i]}" * known)
            right = "right" if pids[i] == person else "wrong"
            shots.append((train.paths[i], words, "" if person is None else right))
        body += f"<h3>{title}</h3>{strip(shots)}"
    return figure("", body, "Training images with their camera" + (" and true id; solid frame and "
                  "tick: the person of most images of a cluster, dashed frame and cross: others."
                  if known else "."), "what holds a wrong cluster together: the same clothes, or "
                  "only the same background.")


def choose(groups, cams, most=24, images=20):
    """-> indices of images of some people (or clusters), seen by two cameras if any are; -1 is
    nobody."""
    names = np.unique(groups[groups >= 0])
    across = [g for g in names if len(np.unique(cams[groups == g])) > 1]
    some = np.random.default_rng(0).permutation(across or names)[:most]
    return np.concatenate([spread(np.flatnonzero(groups == g), images) for g in some])


def t_sne(features, groups, cams, what, cameras):
    """Maps of (M, D) features, by person or cluster (`what`) and, beside it, by camera; cameras:
    their names."""
    points = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=0
                  ).fit_transform(features)
    near = (features @ features.T - 2 * np.eye(len(features))).argmax(1)
    figures, same = [], []
    for title, values in ((what, groups), ("camera", cams)):
        found, index = np.unique(values, return_inverse=True)
        names = [cameras[v] for v in found] if title == "camera" else ()
        figures.append(f"<div><h3>By {title}</h3>"
                       + scatter(f"t-SNE, marks by {title}", points, index, names) + "</div>")
        same.append(f"{100 * (values[near] == values).mean():.0f} %")
    return figure("", grid(figures), f"{len(features)} images of {len(np.unique(groups))} {what}s: "
                  f"the most similar other image is of the same {what} for {same[0]} and of the "
                  f"same camera for {same[1]} of them.", f"islands of one {what} on the left that "
                  "hold all cameras on the right; islands of one camera are the camera gap.")
