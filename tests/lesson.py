"""The report's first chapter: what the next epoch of a run does, step by step, to its own images.

First come the numbers, from the functions and constants of the run's page, its network and its
images; then the figures, one a step. Nothing is trained. Images are not augmented, but for the
batch, which is the one that the run would train on next. `before` is the network before training
began: it judges the labels of now, so that its candidates are those of the trained network.
"""

import argparse
import copy
import html

import numpy as np
import report
import torch
import torch.nn.functional as F
from PIL import Image

import ccsd
import common
import mskd
import sskd

PAGES = {"ccsd.py": ccsd, "mskd.py": mskd, "sskd.py": sskd}
VIEWS = "whole body", "upper half", "lower half"
PARTS = (0, 1), (0, .5), (.5, 1)  # the rows of an image that a view sees

# ================================================================================ steps 1, 2 and 3


def start_epoch(page, args, networks, images, train):
    """Steps 1 to 3 of the page -> e: features (N, D) and their centred copies; for MSKD those of
    the views, every (3, N, D), for SSKD those of the slow copies (n, N, D); distance, sparse
    (N, N); eps; found, labels (N,): before and after refinement."""
    cams, e = train.cams, argparse.Namespace(page=page, args=args, train=train, images=images)
    e.every = torch.stack([common.extract_features(net, images) for net in networks])
    e.every = e.every if page is sskd else e.every[0]
    centred = common.centre_cameras(e.every, cams) if args.centre else e.every
    join = {ccsd: lambda x: x, mskd: lambda x: x[0], sskd: lambda x: F.normalize(x.sum(0))}[page]
    e.features, e.centred, e.views = join(e.every), join(centred), centred
    return e


def find_labels(e, saved):
    """Steps 2 and 3 -> e with the labels; saved: those of the run's last epoch."""
    page, args, cams = e.page, e.args, e.train.cams
    e.distance = (mskd.mixed_distance(e.views, args.k1, args.l1) if page is mskd
                  else common.jaccard_distance(e.centred, args.k1))
    e.eps = args.radius if page is sskd else args.eps
    if args.true_ids:
        e.found = common.renumber(e.train.pids)
    else:
        e.found = common.dbscan(e.distance, e.eps, instead=saved,
                                at_least=args.batch_size // args.num_instances)
    e.labels, refine = e.found, getattr(args, "refine", "")
    if refine == "reassign":
        e.labels = ccsd.reassign(e.labels, cams, e.centred)
    if refine == "recluster":
        e.labels = ccsd.recluster(e.labels, cams, e.distance, ccsd.RECLUSTER_EPS * e.eps)
    e.known = bool((e.train.pids >= 0).any())
    pids = e.train.pids if e.known else np.zeros_like(e.labels)
    e.person = np.array([np.bincount(pids[e.labels == k].clip(0)).argmax()
                         for k in range(e.labels.max() + 1)])  # of most of its images
    return e


def groups_of(e):
    """CCSD's step 3, split: groups (N,), and parent, camera, table as tensors."""
    groups, *rest = ccsd.split_by_camera(e.labels, e.train.cams)
    return groups, [torch.from_numpy(x).to(e.features.device) for x in rest]


# ============================================================================== teacher and student
# A choice is the first candidate of a teacher or a student for an image, seen from the camera
# `other` in CCSD. look() returns all that is drawn of one image.


def ccsd_sides(e, features, index, only=None):
    """What distillation_loss gets for the images `index` -> its first arguments; only: a camera
    w, the others are left out of the table."""
    groups, (parent, camera, table) = groups_of(e)
    if only is not None:
        keep = torch.arange(table.shape[1], device=table.device)
        keep = (keep == only) | (keep == int(e.train.cams[index[0]]))
        table = table.masked_fill(~keep, -1)
    memory = common.cluster_means(features, groups)
    group = torch.from_numpy(groups[index]).to(features.device)
    return features[index] @ memory.T, group, parent, camera, table, ccsd.GROUP_TEMP


def ccsd_choices(e, features):
    found = []
    for index in np.array_split(inside(e), len(inside(e)) // 256 + 1):
        log_p, log_q, valid = ccsd.teacher_and_student(*ccsd_sides(e, features, index))
        row, w = valid.nonzero().T
        found.append((index[row.cpu()], w, log_p[row, :, w].exp(), log_q[row, :, w].exp()))
    return choices(found)


def ccsd_look(e, features, i, w):
    """-> p and q (C,), and KL(p || q)."""
    sides = ccsd_sides(e, features, np.array([i]), w)
    log_p, log_q, _ = ccsd.teacher_and_student(*sides)
    return (*(x[0, :, w].exp().cpu().numpy() for x in (log_p, log_q)),
            float(ccsd.distillation_loss(*sides)))


def no_candidates(e, index):
    """-> (b, N) bool: the images in the camera of images `index`, or if there is no other camera,
    only the images themselves."""
    cams = e.train.cams
    which = cams if len(np.unique(cams)) > 1 else np.arange(len(cams))
    return which[index][:, None] == which


def mskd_choices(e, f, t):
    """f, t (3, N, D): features of student and teacher of all images."""
    found = []
    for index in np.array_split(inside(e), len(inside(e)) // 256 + 1):
        same = torch.from_numpy(no_candidates(e, index)).to(f.device)
        found.append((index, np.zeros_like(index), *(
            (x[0][index] @ x[0].T).masked_fill(same, -1) for x in (t, f))))
    return choices(found)


def mskd_look(e, f, t, i):
    """-> for each view, the similarities of all images to image i in t and in f, -1 in its own
    camera, (3, N) each; and the losses D_v of image i (3,)."""
    same = torch.from_numpy(no_candidates(e, [i])[0]).to(f.device)
    near = [torch.einsum("vnd,vd->vn", x, x[:, i]).masked_fill(same, -1).cpu().numpy()
            for x in (t, f)]
    return (*near, mskd.distillation_losses(f[:, i:i + 1], t[:, i:i + 1]).tolist())


def sskd_classifiers(e, every):
    """Step 4, from the slow copies' features (n, N, D) -> rows of the networks' classifiers and of
    their copies', (C, D) each, and the camera means (n, N, D) that are subtracted, or None."""
    cams, centre = e.train.cams, e.args.centre
    centred = common.centre_cameras(every, cams) if centre else every
    return (*(common.cluster_means(F.normalize(x.sum(0)), e.labels) for x in (every, centred)),
            common.camera_means(every, cams) if centre else None)


def sskd_look(e, classifiers, student, slow, index):
    """-> the soft labels of the peer's slow copy for images `index` and the predictions of network
    1, (b, C) each."""
    rows, slow_rows, means = classifiers
    peer = slice(1 % e.args.nets, 1 % e.args.nets + 1)
    means = None if means is None else means[peer]
    batch = [common.normalise(common.take(e.images, torch.from_numpy(index), rows.device))]
    soft = sskd.soft_labels(slow[peer], [slow_rows], batch, means, index, e.args)
    return soft[0], sskd.soft_labels([student], [rows], batch, None, index, e.args)[0]


def sskd_choices(e, look):
    found = []
    for index in np.array_split(inside(e), len(inside(e)) // 256 + 1):
        found.append((index, np.zeros_like(index), *look(index)))
    return choices(found)


def inside(e):
    return np.flatnonzero(e.labels >= 0)


def choices(found):
    """[images (b,), cameras (b,), p and q (b, candidates)] -> image, other, teacher's and student's
    choice, p and q of these; gap: how much likelier the teacher finds its own choice; (R,) each."""
    c, parts = argparse.Namespace(), []
    for image, other, p, q in found:
        t, s = p.argmax(1), q.argmax(1)
        gap = (p - q).gather(1, t[:, None])[:, 0]
        parts.append([np.asarray(x.cpu() if torch.is_tensor(x) else x)
                      for x in (image, other, t, s, gap, p.amax(1), q.amax(1))])
    c.image, c.other, c.teacher, c.student, c.gap, c.p, c.q = map(np.concatenate, zip(*parts))
    return c


def judge(e, c):
    """Which choices are right: c.label, c.t, c.s (R,) bool."""
    who = e.train.pids[c.image]
    of = e.train.pids if e.page is mskd else e.person
    c.label = e.person[e.labels[c.image]] == who
    c.t, c.s, c.same = of[c.teacher] == who, of[c.student] == who, c.teacher == c.student
    return c


def cases(e, c, most=6):
    """-> [(title, row of c)]: six images that differ in who is right or, if ids are not known, in
    whether teacher and student agree; the clearest first, a person only once. And the titles of
    which there is no image."""
    if e.known:
        kinds = (("Teacher and student agree and are right", c.same & c.t & c.label, 1),
                 ("They differ: the teacher is right", ~c.same & c.t & ~c.s & c.label, 2),
                 ("They differ: the teacher is wrong", ~c.same & ~c.t & c.s & c.label, 1),
                 ("The label is wrong, the teacher right", ~c.label & c.t, 1),
                 ("The label is wrong, and so is the teacher", ~c.label & ~c.t, 1),
                 ("They differ: the teacher is right", ~c.same & c.t & ~c.s & c.label, most),
                 ("They agree", c.same, most), ("They differ", ~c.same, most))
    else:
        kinds = (("They agree", c.same, 2), ("They differ", ~c.same, 4),
                 ("They agree", c.same, most))
    rows, used, taken = [], set(), set()
    absent = [title for title, which, wanted in kinds if not which.any() and wanted < most]
    for title, which, wanted in kinds:
        for row in sorted(np.flatnonzero(which), key=lambda r: -c.gap[r]):
            who = e.train.pids[c.image[row]] if e.known else e.labels[c.image[row]]
            if wanted and len(rows) < most and c.image[row] not in taken and who not in used:
                rows.append((title, int(row)))
                used.add(who)
                taken.add(c.image[row])
                wanted -= 1
    return rows, absent


@torch.no_grad()
def first_batch(e, model, others, generator):
    """Steps 4 and 5a to 5e for the first batch -> index (B,), the augmented views, and the values
    of the page's losses. model: CCSD's and MSKD's; others: MSKD's teacher, or SSKD's networks and
    slow copies."""
    args, page, device = e.args, e.page, e.features.device
    P, K = args.batch_size // args.num_instances, args.num_instances
    index = next(common.pk_batches(e.labels, e.train.cams, P, K, args.iters, generator))
    taken, jitter = common.take(e.images, index, device), .5 * (args.weights == "none")
    count = 1 if page is not sskd or args.shared_view else args.nets
    views = [common.augment(taken, generator, jitter=jitter) for _ in range(count)]
    y = torch.from_numpy(e.labels)[index].to(device)
    if page is ccsd:
        f = common.forward(copy.deepcopy(model).train(), views[0], args.bn_splits)
        groups, (parent, camera, table) = groups_of(e)
        group = torch.from_numpy(groups)[index].to(device)
        similarity = f @ common.cluster_means(e.features, groups).T
        temp = ccsd.GROUP_TEMP
        terms = dict(L_intra=ccsd.intra_camera_loss(similarity, group, camera, temp),
                     L_cross=ccsd.cross_camera_loss(similarity, group, parent, temp),
                     L_kd=ccsd.distillation_loss(similarity, group, parent, camera, table, temp))
    elif page is mskd:
        f = common.forward(copy.deepcopy(model).train(), views[0], args.bn_splits)
        memory = common.cluster_means(e.every, e.labels)
        terms = dict(zip(("L_g", "L_u", "L_d"), mskd.view_losses(f, memory, y, args.temp)))
        if others:
            t = common.forward(copy.deepcopy(others), views[0], args.bn_splits)
            terms.update(zip(("D_g", "D_u", "D_d"), mskd.distillation_losses(f, t)))
    else:
        students, slow = (copy.deepcopy(networks).train() for networks in others)
        rows, slow_rows, means = sskd_classifiers(e, e.every)
        both = views * (args.nets // len(views))
        soft = sskd.soft_labels(slow, [slow_rows] * args.nets, both, means, index, args)
        q, = sskd.soft_labels(students[:1], [rows], both, None, index, args)
        terms = dict(L_soft=sskd.soft_label_loss(q.log(), soft[1 % args.nets]))
    return index, views, {name: float(value) for name, value in terms.items()}


# ======================================================================================== figures


def kind(e, a, b):
    """The frame of image b beside image a."""
    return ("right" if e.train.pids[a] == e.train.pids[b] else "wrong") if e.known else ""


def name(e, i):
    """Image i in words."""
    cluster = f"cluster {e.labels[i]}" if e.labels[i] >= 0 else "no cluster"
    return f"person {e.train.pids[i]}, " * e.known + f"camera {e.train.cams[i] + 1}, {cluster}"


def camera(e, i):
    return f"c{e.train.cams[i] + 1}"


def draw_features(e, before):
    """Step 1: three people under all their cameras, and how similar their images are."""
    cams, who = e.train.cams, e.train.pids if e.known else e.labels
    found = [k for k in np.unique(who[who >= 0]) if (who == k).sum() > 1]
    views = [len(np.unique(cams[who == k])) for k in found]
    best = [k for k, n in zip(found, views) if n == max(views)]
    people = sorted(np.random.default_rng(0).permutation(best)[:3].tolist())
    people = people + [k for k in found if k not in people][:3 - len(people)]
    each, rows = 2 if max(views) < 7 else 1, []
    what, many = ("person", "people") if e.known else ("cluster", "clusters")
    for k in people:
        rows.append(np.concatenate([np.flatnonzero((who == k) & (cams == v))[:each]
                                    for v in np.unique(cams[who == k])]))
    body = "".join(f"<h4>{what.capitalize()} {k}</h4>" + report.strip([
        (e.train.paths[i], camera(e, i)) for i in row]) for k, row in zip(people, rows))
    shown = np.concatenate(rows)
    order = shown[np.lexsort((who[shown], cams[shown]))]
    charts, means = [], []
    for title, features in (("before training", before), ("now", e.features)):
        if features is None:
            continue
        for by, index, group in (("person", shown, who), ("camera", order, cams)):
            values = (features[index] @ features[index].T).cpu().numpy()
            groups = list(dict.fromkeys(group[index]))
            names = [f"c{g + 1}" if by == "camera" else f"{what} {g}" for g in groups]
            label = f"Similarities {title}, sorted by {by if e.known or by == 'camera' else what}"
            charts.append(f"<div><h4>{label}</h4>" + report.matrix(
                label, values, [(group[index] == g).sum() for g in groups], names) + "</div>")
        one, here = (x[order][:, None] == x[order] for x in (who, cams))
        for words, part in ((f"one {what}, two cameras", one & ~here),
                            (f"two {many}, one camera", ~one & here)):
            if part.any():
                means.append(f"{title}, {words} {values[part].mean():.2f}")
    return report.figure(
        f"1 Features: three {many} under all their cameras", body + report.grid(charts),
        "Each row and column is an image, and a dark square means that two images have similar "
        f"features (mean similarity: {'; '.join(means)}).",
        "dark blocks along the diagonal: sorted by camera, they are the camera gap; sorted by "
        f"{what}, they are what training is for.")


def find_examples(e, rank):
    """-> [(title, image)]: the clustered images with the most and the fewest mutual neighbours in
    their own cluster (and of their person), and an outlier with a middling number."""
    graph = common.first_columns(rank, rank.shape[1])
    mutual = graph.multiply(graph.T).tocsr()
    row = common.per_entry(np.arange(len(rank)), mutual)
    friend = e.labels[row] == e.labels[mutual.indices]
    if e.known:
        friend &= e.train.pids[row] == e.train.pids[mutual.indices]
    friends = np.bincount(row[friend], minlength=len(rank))
    clustered, outliers = inside(e), np.flatnonzero(e.labels < 0)
    order = clustered[np.argsort(friends[clustered], kind="stable")]
    examples = [("Easy", order[-1]), ("Hard", order[0])]
    if len(outliers):
        middle = outliers[np.argsort(friends[outliers], kind="stable")[len(outliers) // 2]]
        examples.append(("Outlier", middle))
    return examples


def neighbourhood(rank, wide, i):
    """-> the first neighbours of image i in order; which of them are mutual, bool; and the images
    that the expansion adds. wide: sparse (N, N), reciprocal_vectors() before the mean over k2."""
    order = rank[i][1:]
    mutual = (rank[order] == i).any(1)
    members = wide.indices[wide.indptr[i]:wide.indptr[i + 1]]
    return order, mutual, np.setdiff1d(members, [i, *order[mutual]])


def shared_weight(vectors, i, j):
    """-> the images that i and j both count as neighbours, and the lesser of both weights, the
    greatest first."""
    a, b = (vectors[[k]].toarray()[0] for k in (i, j))
    both = np.minimum(a, b)
    order = np.argsort(-both, kind="stable")[:(both > 0).sum()]
    return order, both[order]


def entry(matrix, i, j):
    """Entry (i, j) of a sparse distance; not stored: 1."""
    row = slice(matrix.indptr[i], matrix.indptr[i + 1])
    at = np.flatnonzero(matrix.indices[row] == j)
    return float(matrix.data[row][at[0]]) if len(at) else 1.


def draw_neighbours(e):
    """Step 2: whose neighbours count, and what that makes of a pair's distance."""
    k1, cams = e.args.k1, e.train.cams
    rank = common.nearest(e.centred, k1)
    wide = common.reciprocal_vectors(e.centred, rank, k1, 1, lambda cosine, _: np.ones_like(cosine))
    vectors = common.neighbour_vectors(e.centred, k1)
    distance = common.jaccard_distance(e.centred, k1) if e.page is mskd else e.distance
    body = (f"<p>Two images are <b>mutual</b> neighbours if each is among the {rank.shape[1] - 1} "
            "most similar to the other; at Jaccard distance 0 they share all neighbours, at 1 "
            "none.</p>")
    for title, i in find_examples(e, rank):
        order, mutual, added = neighbourhood(rank, wide, i)
        shots = [(e.train.paths[i], camera(e, i), "this")]
        shots += [(e.train.paths[j], f"{n + 1}, {camera(e, j)}", kind(e, i, j),
                   f"<div>{'<b>mutual</b>' if both else 'one way'}</div>")
                  for n, (j, both) in enumerate(zip(order[:11], mutual))]
        body += (f"<h4>{title}: {name(e, i)}; {mutual.sum()} of its {len(order)} nearest are mutual"
                 f"</h4>{report.strip(shots)}")
        if len(added):
            body += (f"<p>Added by the expansion, as close neighbours of its neighbours: "
                     f"{len(added)} images.</p>" + report.strip([
                         (e.train.paths[j], camera(e, j), kind(e, i, j)) for j in added[:6]]))
        row = slice(distance.indptr[i], distance.indptr[i + 1])
        near = distance.indices[row][np.argsort(distance.data[row], kind="stable")]
        near = near[cams[near] != cams[i]] if (cams[near] != cams[i]).any() else near[near != i]
        near = near[e.train.pids[near] == e.train.pids[i]] if e.known else near
        linked = (e.distance.data[e.distance.indptr[i]:e.distance.indptr[i + 1]] <= e.eps).sum() - 1
        if len(near) == 0:
            body += "<p>It shares no neighbour with an image of another camera.</p>"
            continue
        j = near[0]
        both, weight = shared_weight(vectors, i, j)
        of = "the same person's " * e.known
        body += (f"<p>Its Jaccard distance to {of}nearest image of another camera is "
                 f"{entry(distance, i, j):.3f}"
                 + f", with the halves {entry(e.distance, i, j):.3f}" * (e.page is mskd)
                 + f": they share {len(both)} neighbours, which have {100 * weight.sum():.0f} % of "
                 f"their weight in common. Within eps: {linked} of all images.</p>"
                 + report.strip([(e.train.paths[i], f"image, {camera(e, i)}", "this"),
                                 (e.train.paths[j], f"other, {camera(e, j)}", kind(e, i, j))]
                                + [(e.train.paths[k], f"shared, {camera(e, k)}", "",
                                    f"<div>{100 * w:.1f} %</div>")
                                   for k, w in zip(both[:8], weight)]))
    return report.figure(
        "2 Neighbours, and how far apart two images are", body,
        "Neighbours count if they are mutual, or if many mutual neighbours have them; two images "
        "are close if they share neighbours, weighed by similarity" + (
            "; solid frame and tick: the same person, dashed frame and cross: another one."
            if e.known else "."),
        "one-way neighbours: they are often other people, and leaving them out is what the "
        "Jaccard distance gains.") + draw_distances(e)


def draw_distances(e):
    """The histogram of stored distances, with eps."""
    row = common.per_entry(np.arange(e.distance.shape[0]), e.distance)
    column, who, cams = e.distance.indices, e.train.pids, e.train.cams
    pairs, lines = row < column, []
    one, here = who[row] == who[column], cams[row] == cams[column]
    edges = np.linspace(0, 1, 41)
    parts = (("same person, same camera", one & here), ("same person, other camera", one & ~here),
             ("other people", ~one)) if e.known else (("all pairs", pairs),)
    below = []
    for title, part in parts:
        values = e.distance.data[pairs & part]
        if len(values):
            share = np.histogram(values, edges)[0] / len(values)
            lines.append((f"{title}: {len(values):,} pairs", (edges[1:] + edges[:-1]) / 2,
                          100 * share))
            below.append(f"{100 * (values <= e.eps).mean():.1f} % ({title})")
    n = len(who)
    stored = 100 * pairs.sum() / (n * (n - 1) / 2)
    return report.figure(
        "2 Distances, and eps", report.line_chart(
            "Stored Jaccard distances", lines, "Jaccard distance",
            "% of the stored pairs of a kind", marks=False, uprights=[(f"eps {e.eps:.3g}", e.eps)]),
        f"{stored:.1f} % of all pairs share a neighbour and are stored; the others are at distance "
        f"1. Within eps: {', '.join(below)}.",
        "a valley: left of eps DBSCAN links two images, so a good eps leaves few pairs of "
        "different people there and most of one person.")


def by_camera(e, images, words, person):
    """A strip of up to 7 images for each camera."""
    body = ""
    for v in np.unique(e.train.cams[images]):
        row = images[e.train.cams[images] == v]
        shots = [(e.train.paths[i], words(i), ("right" if e.train.pids[i] == person else "wrong")
                  if e.known else "") for i in report.spread(row, 7)]
        body += f"<h4>Camera {v + 1} (images: {len(row)})</h4>{report.strip(shots)}"
    return body


def draw_cluster(e):
    """Step 3: one cluster as DBSCAN found it and, for CCSD, as a table camera x images."""
    cams, pids = e.train.cams, e.train.pids
    clusters = range(e.found.max() + 1)
    members = [np.flatnonzero(e.found == k) for k in clusters]

    def interest(k):  # moved by the refinement, then in many cameras, then of several people
        mine = members[k]
        moved = (e.labels[mine] != np.bincount(e.labels[mine] + 1).argmax() - 1).sum()
        return (moved, len(np.unique(cams[mine])), len(np.unique(pids[mine])), len(mine))
    k = max(clusters, key=interest)
    mine = members[k]
    new = np.bincount(e.labels[mine][e.labels[mine] >= 0], minlength=1).argmax()
    person = np.bincount(pids[mine]).argmax() if e.known else -1

    def words(i):
        text = f"id {pids[i]}" if e.known else camera(e, i)
        if e.labels[i] != new:
            return f"{text}, {'dropped' if e.labels[i] < 0 else 'moved away'}"
        return text + (", moved in" if e.found[i] != k else "")
    order = mine[np.argsort(cams[mine], kind="stable")]
    shots = [(e.train.paths[i], f"{camera(e, i)}, {words(i)}",
              ("right" if pids[i] == person else "wrong") if e.known else "")
             for i in report.spread(order, 12)]
    body = f"<p>Cluster {k}, as DBSCAN found it: {len(mine)} images.</p>{report.strip(shots)}"
    see = "A cluster is treated as one person"
    look = "what its wrong images share with the others" if e.known else "images that do not fit"
    if e.page is ccsd and e.args.refine != "none":
        groups = np.flatnonzero(e.labels == new)
        body += (f"<p>After <code>--refine {e.args.refine}</code>: a group for each camera.</p>"
                 + by_camera(e, groups, words, person))
        see += ("; CCSD splits it by camera, and each row, the paper's refined cluster, gets a "
                "mean of its own, the memory with which images are compared")
        look = "how alike a row is, and how different two rows are: people are easier told apart " \
               "within a row"
    else:
        see += ", and its mean is what images are compared with"
    if e.known:
        see += "; solid frame and tick: the person of most images, dashed frame and cross: others"
    return report.figure("3 A cluster" + " and its groups" * (e.page is ccsd), body, f"{see}.",
                         f"{look}.")


def draw_views(e):
    """MSKD's step 1: what the three views of two images find."""
    near = [common.nearest(view, 7)[:, 1:] for view in e.views]
    clustered = inside(e)
    if e.known:
        hits = np.stack([(e.train.pids[x] == e.train.pids[:, None]).sum(1) for x in near])
        gain = hits[1:].max(0) - hits[0]
        loss = hits[0] - hits[1:].min(0)
        some = [("A half sees better than the whole body", clustered[gain[clustered].argmax()]),
                ("A half is misled", clustered[loss[clustered].argmax()])]
    else:
        alike = np.array([len(set(near[1][i]) & set(near[2][i])) for i in clustered])
        some = [("The halves find the most different images", clustered[alike.argmin()])]
    body = ""
    for title, i in some:
        body += f"<h4>{title}: {name(e, i)}</h4>"
        for view, part, found in zip(VIEWS, PARTS, near):
            shots = [(e.train.paths[i], camera(e, i), "this", "", part)]
            shots += [(e.train.paths[j], f"{n + 1}, {camera(e, j)}", kind(e, i, j), "", part)
                      for n, j in enumerate(found[i])]
            half = "" if view == VIEWS[0] else ' class="half"'
            body += f"<p>{view.capitalize()}</p><div{half}>{report.strip(shots)}</div>"
    return report.figure(
        "1 and 2 Three views of an image", body,
        "The nearest images by the feature of the whole body, of the upper and of the lower half; "
        "the distance that is clustered is a weighted mean of those of the three views.",
        "neighbours that only one view finds: what misleads one view, such as legs behind a bag, "
        "rarely misleads all.")


def picture_of(batch, columns):
    """Normalised images (n, 3, H, W) side by side -> a PIL image, as the network sees them."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (common.MEAN, common.STD))
    pixels = ((batch.cpu() * std + mean) * 255).clamp(0, 255).byte()
    whole = Image.fromarray(torch.cat(list(pixels), 2).permute(1, 2, 0).numpy())
    width = 42 * columns  # two clusters of four beside each other on a phone
    return whole.resize((width, round(width * whole.height / whole.width))) \
        if whole.width > width else whole


def draw_batch(e, index, views, terms):
    """Step 5a: the batch as the network gets it."""
    K, body = e.args.num_instances, ""
    for start in range(0, len(index), K):
        mine = index[start:start + K].numpy()
        alt = f"cluster {e.labels[mine[0]]}: " + ", ".join(camera(e, i) for i in mine)
        body += f'<div><b>{e.labels[mine[0]]}</b>'
        for n, view in enumerate(views[:2]):
            words = alt + f", view {n + 1}" * (len(views) > 1)
            body += (f'<img alt="{words}" src="'
                     f'{report.jpeg(picture_of(view[start:start + K], len(mine)))}">')
        body += f'{alt.split(": ")[1] if K < 9 else ""}</div>'
    values = ", ".join(f"{term} {value:.4f}" for term, value in terms.items())
    P = len(index) // K
    return report.figure(
        f"5a The next batch: {P} clusters x {K} images", f'<div class="batch">{body}</div>',
        "Each picture is a cluster, its images from several cameras if there are any, mirrored, "
        "shifted, with changed colours or an erased rectangle" + (
            "; the upper row is for one network, the lower for its peer" if len(views) > 1 else "")
        + f". Losses of this batch, by the page's functions: {values}.",
        "what an image has left to tell who it is, once colours, place and parts of it change.")


def share(mask):
    return f"{100 * mask.mean():.1f} %" if len(mask) else "-"


def tally(e, c, before):
    """One line: how often label, teacher and student are right."""
    what = "pairs of an image and another camera" if e.page is ccsd else "images in clusters"
    text = f"<b>All {len(c.image):,} {what}:</b> teacher and student differ in {share(~c.same)}"
    if e.known:
        text += (f"; right are the label in {share(c.label)}, the teacher in {share(c.t)}, the "
                 f"student in {share(c.s)}; where they differ, the teacher in {share(c.t[~c.same])}"
                 f" and the student in {share(c.s[~c.same])}; where the label is wrong, the "
                 f"teacher in {share(c.t[~c.label])}")
        if before:
            text += (f"; before training the teacher was right in {share(before.t)}, the student "
                     f"in {share(before.s)}")
    if e.page is not mskd:
        text += f"; the first candidate has {share(c.p)} of p and {share(c.q)} of q, in the mean"
    return f"<p>{text}.</p>"


def draw_sides(e, sides, names="pq", decimals=None):
    """[(title, [(image, words, frame, p, q, note)], part)] -> strips, two bars a candidate."""
    body = ""
    for title, candidates, part in sides:
        shots = [(e.train.paths[j], words, frame, report.bar(names[0], p, 2, decimals)
                  + report.bar(names[1], q, 3, decimals) + note, part)
                 for j, words, frame, p, q, note in candidates]
        half = ' class="half"' if part != PARTS[0] else ""
        body += f"<p>{title}</p><div{half}>{report.strip(shots)}</div>"
    return body


def candidates_of(e, i, order, p, q, groups, wanted, features):
    """The clusters `order` as candidates; each shows its image nearest to its mean, from the group
    wanted(k), and never image i unless there is no other."""
    shown = []
    for k in order:
        members = np.flatnonzero(groups == wanted(k))
        members = members[members != i] if len(members) > 1 else members
        mean = features[members].mean(0)
        j = members[int((features[members] @ mean).argmax())]
        frame = ("right" if e.person[k] == e.train.pids[i] else "wrong") if e.known else ""
        note = "<div>its label</div>" if k == e.labels[i] else ""
        shown.append((j, f"cluster {k}", frame, p[k], q[k], note))
    return shown


def top(values, n=5):
    """The indices of the n greatest of the values that are above 0, greatest first."""
    order = np.argsort(-values, kind="stable")[:n]
    return order[values[order] > 0]


def draw_lesson(e, c, looks, before):
    """Step 5, the heart: looks: [(when, function (i, w) -> HTML of an image)]."""
    found, absent = cases(e, c)
    body = "" if found else "<p>No cluster is seen by two cameras: none can teach another.</p>"
    body += "".join(f"<p>In this run there is no image of the kind &ldquo;{title}&rdquo;.</p>"
                   for title in absent)
    for title, row in found:
        i, w = c.image[row], c.other[row]
        mates = np.flatnonzero(e.labels == e.labels[i])
        mates = report.spread(mates[mates != i][np.argsort(e.train.cams[mates[mates != i]])], 4)
        shots = [(e.train.paths[i], camera(e, i), "this")]
        shots += [(e.train.paths[j], camera(e, j), kind(e, i, j)) for j in mates]
        body += (f"<h4>{title}: {name(e, i)}</h4><p>The image, and others of its cluster, the hard "
                 f"label:</p>{report.strip(shots)}" + report.grid(
                     [f"<div><h5>{when}</h5>{look(i, w)}</div>" for when, look in looks]))
    see, look = LESSONS[e.page]
    return report.figure(f"{STEPS[e.page]} The lesson: what the teacher says, and what the student",
                         f'<div class="lesson">{body}{tally(e, c, before)}</div>', see, look)


STEPS = {ccsd: "5e", mskd: "5c", sskd: "5c"}
LESSONS = {
    ccsd: ("Teacher p: how much the image resembles the clusters as its own camera sees them; "
           "student q: the same clusters as another camera sees them; L_kd, the KL of the two, "
           "pulls q towards p.",
           "a student whose candidates share a camera's light or background, beside a teacher who, "
           "within one camera, compares clothes; and a teacher who repeats a wrong label, because "
           "the image is part of its own group's mean."),
    mskd: ("The nearest images of other cameras, by the teacher's features t and by the student's "
           "f, with their similarities in both; D, the squared distance of f_v and t_v, pulls the "
           "student's features to the teacher's.",
           "a student that starts far from its teacher, comes near, and then finds people that "
           "the teacher missed."),
    sskd: ("Soft label p: the clusters that the peer's slow copy predicts; q: the prediction of "
           "the network itself, which L_soft pulls towards p, while L_id pulls it towards the hard "
           "label alone.",
           "soft labels that name several clusters of similar people, and those that contradict a "
           "wrong hard label.")}


def chapter(run, images, first, others):
    """-> HTML. run: as eval.py opens it; images: its training images; first: networks before
    training, or None and why; others: MSKD's teacher; SSKD's networks and slow copies."""
    args = argparse.Namespace(**run.state)
    page = PAGES[next(name for name in args.code if name in PAGES)]
    before, why = first
    slow = others[1] if page is sskd else [run.model]
    e = start_epoch(page, args, slow, images, run.train)
    find_labels(e, args.labels.numpy())
    e0 = start_epoch(page, args, before, images, run.train) if before else None
    if e0:
        e0.labels, e0.person, e0.known = e.labels, e.person, e.known
    generator = torch.Generator()
    generator.set_state(args.generator)
    model_of_batch = others if page is sskd else others and others[0]
    figures = [draw_features(e, e0 and e0.features)]
    figures += [draw_views(e)] if page is mskd else []
    figures.append(draw_neighbours(e))
    figures.append(draw_cluster(e))
    figures.append(draw_batch(e, *first_batch(e, run.model, model_of_batch, generator)))
    figures.append(teach(e, e0, others, before))
    note = "" if before else f"<p>Before training: not shown, {html.escape(why)}.</p>"
    return (f"<p>What the next epoch of <code>{page.__name__}.py</code> would do, in the steps of "
            "its docstring, with this network and its images, which are not augmented but for the "
            f"batch. Nothing is trained.</p>{note}{''.join(figures)}")


def teach(e, e0, others, before):
    """The lesson of the page."""
    cams, looks, c0 = e.train.cams, [], None
    both = [("Before training began", e0), ("Now", e)] if e0 else [("Now", e)]
    if e.page is ccsd:
        groups, (_, _, table) = groups_of(e)
        table = table.cpu().numpy()

        def shown(state):
            def look(i, w):
                p, q, kl = ccsd_look(e, state.features, i, int(w))
                sides = []
                for title, values, v in ((f"Teacher p: clusters in camera {cams[i] + 1}, its own",
                                          p, cams[i]),
                                         (f"Student q: the same clusters in camera {w + 1}", q, w)):
                    sides.append((title, candidates_of(e, i, top(values), p, q, groups,
                                                       lambda k: table[k, v], state.features),
                                  PARTS[0]))
                return draw_sides(e, sides) + f"<p>KL(p || q) = {kl:.3f}</p>"
            return look
        looks = [(when, shown(state)) for when, state in both]
        c = judge(e, ccsd_choices(e, e.features))
        c0 = e0 and judge(e, ccsd_choices(e, e0.features))
    elif e.page is mskd:
        if not others:
            return report.figure(f"{STEPS[mskd]} The lesson", "<p>This network is a teacher: it "
                                 "learned from labels alone.</p>", "There is no lesson here.",
                                 "the report of the student, in the folder above.")
        t = common.extract_features(others[0], e.images)

        def shown(state, who):
            def look(i, _):
                p, q, D = mskd_look(e, state.every, t, i)
                near = p if who == "t" else q
                sides = [(view.capitalize() + (f": D = {D[v]:.3f}" if who == "f" else ""),
                          [(j, camera(e, j), kind(e, i, j), p[v][j], q[v][j], "")
                           for j in top(near[v], 5 if v == 0 else 3)], part)
                         for v, (view, part) in enumerate(zip(VIEWS, PARTS))]
                return draw_sides(e, sides, "tf", 2)
            return look
        looks = [("The teacher, t", shown(e, "t"))]
        looks += [("The student before it trained, f", shown(e0, "f"))] if e0 else []
        looks.append(("The student now, f", shown(e, "f")))
        c = judge(e, mskd_choices(e, e.every, t))
        c0 = e0 and judge(e, mskd_choices(e, e0.every, t))
    else:
        def shown(state, student, slow):
            classifiers = sskd_classifiers(e, state.every)

            def numbers(index):
                return sskd_look(e, classifiers, student, slow, index)

            def look(i, _):
                p, q = (x[0].cpu().numpy() for x in numbers(np.array([i])))
                sides = [(title, candidates_of(e, i, top(values), p, q, e.labels, lambda k: k,
                                               state.features), PARTS[0])
                         for title, values in (("Soft label p: the peer's slow copy", p),
                                               ("Prediction q: the network", q))]
                hard = np.eye(len(p), dtype=np.float32)[e.labels[i]]
                values = [float(sskd.soft_label_loss(torch.from_numpy(q[None]).log(),
                                                     torch.from_numpy(x[None]))) for x in (p, hard)]
                return draw_sides(e, sides) + (f"<p>L_soft = {values[0]:.3f}; with the hard label, "
                                               f"cluster {e.labels[i]} alone: {values[1]:.3f}</p>")
            return look, numbers
        students, slow = others
        now, numbers = shown(e, students[0], slow)
        looks = [("Now", now)]
        if e0:
            looks = [("Before training began", shown(e0, before[0], before)[0]), *looks]
        c = judge(e, sskd_choices(e, numbers))
    return draw_lesson(e, c, looks, c0)
