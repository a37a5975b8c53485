"""The report's first chapter: what the next epoch of a run does, step by step, to its own images.

First come the numbers, from the functions and constants of the run's page, its network and its
images; then the figures, one a step. Nothing is trained. Images are not augmented, but for the
batch, which is the one that the run would train on next. `before` is the network before training
began: it judges the labels of now, so that its candidates are those of the trained network.

e, an epoch: page, args, train and images of the run; every, features, centred and views of step 1;
distance and eps of step 2; found and labels (N,), before and after refinement; person (C,), whom
most images of a cluster show; known: are there true ids?
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
VIEWS = "Whole body", "Upper half", "Lower half"
PARTS = (0, 1), (0, .5), (.5, 1)  # the rows of an image that a view sees
WHOLE = PARTS[0]

# ================================================================================ steps 1, 2 and 3


def start_epoch(page, args, networks, images, train):
    """Step 1 of the page -> e: features (N, D) and their centred copies; for MSKD those of the
    views, every (3, N, D), for SSKD those of the slow copies (n, N, D)."""
    e = argparse.Namespace(page=page, args=args, train=train, images=images)
    e.known = bool((train.pids >= 0).any())
    each = [common.extract_features(net, images) for net in networks]
    e.every = torch.stack(each) if page is sskd else each[0]
    e.views = e.every
    if args.centre:
        e.views = common.centre_cameras(e.every, train.cams)
    e.features, e.centred = e.every, e.views
    if page is mskd:  # the whole body
        e.features, e.centred = e.every[0], e.views[0]
    if page is sskd:
        e.features, e.centred = (F.normalize(x.sum(0)) for x in (e.every, e.views))
    return e


def find_labels(e, saved):
    """Steps 2 and 3 -> e with the labels; saved: those of the run's last epoch."""
    args, cams, pids = e.args, e.train.cams, e.train.pids
    if e.page is mskd:
        e.distance = mskd.mixed_distance(e.views, args.k1, args.l1)
    else:
        e.distance = common.jaccard_distance(e.centred, args.k1)
    e.eps = args.radius if e.page is sskd else args.eps
    if args.true_ids:
        e.found = common.renumber(pids)
    else:
        P = args.batch_size // args.num_instances
        e.found = common.dbscan(e.distance, e.eps, at_least=P, instead=saved)
    e.labels, refine = e.found, getattr(args, "refine", "")
    if refine == "reassign":
        e.labels = ccsd.reassign(e.labels, cams, e.centred)
    if refine == "recluster":
        eps = ccsd.RECLUSTER_EPS * e.eps
        e.labels = ccsd.recluster(e.labels, cams, e.distance, eps)
    clusters = range(e.labels.max() + 1)
    e.person = np.array([most(pids[e.labels == k]) for k in clusters])
    return e


def most(values):
    """-> the most frequent of the values, of those that are not negative."""
    return np.bincount(values[values >= 0], minlength=1).argmax()


def inside(e):
    return np.flatnonzero(e.labels >= 0)


def groups_of(e):
    """CCSD's step 3, split: groups (N,), and parent, camera, table as tensors."""
    groups, *rest = ccsd.split_by_camera(e.labels, e.train.cams)
    return groups, [torch.from_numpy(x).to(e.features.device) for x in rest]


# ============================================================================== teacher and student
# A choice is the first candidate of a teacher or a student for an image, seen from the camera
# `other` in CCSD. look() returns all that is drawn of one image.


def choices(e, sides):
    """sides(images (b,)) -> images and cameras (r,), p and q (r, candidates); called for all images
    with a label. -> c: image, other, teacher's and student's choice, p and q of these; gap: how
    much likelier the teacher finds its own choice; label, t, s: which are right; (R,) each."""
    parts, images = [], inside(e)
    for some in np.array_split(images, len(images) // 256 + 1):
        image, other, p, q = sides(some)
        t, s = p.argmax(1), q.argmax(1)
        gap = (p - q).gather(1, t[:, None])[:, 0]
        values = image, other, t, s, gap, p.amax(1), q.amax(1)
        parts.append([torch.as_tensor(x).cpu().numpy() for x in values])
    names = "image", "other", "teacher", "student", "gap", "p", "q"
    columns = map(np.concatenate, zip(*parts))
    c = argparse.Namespace(**dict(zip(names, columns)))
    who = e.train.pids[c.image]
    of = e.train.pids if e.page is mskd else e.person
    c.label = e.person[e.labels[c.image]] == who
    c.t, c.s = of[c.teacher] == who, of[c.student] == who
    c.same = c.teacher == c.student
    return c


def ccsd_sides(e, features, index, only=None):
    """What distillation_loss gets for the images `index` -> its first arguments; only: a camera
    w, the others are left out of the table."""
    groups, (parent, camera, table) = groups_of(e)
    if only is not None:
        keep = torch.arange(table.shape[1], device=table.device)
        own = int(e.train.cams[index[0]])
        table = table.masked_fill((keep != only) & (keep != own), -1)
    memory = common.cluster_means(features, groups)
    group = torch.from_numpy(groups[index]).to(features.device)
    similarity = features[index] @ memory.T
    return similarity, group, parent, camera, table, ccsd.GROUP_TEMP


def ccsd_choices(e, features):
    def sides(index):
        p, q, valid = ccsd.teacher_and_student(*ccsd_sides(e, features, index))
        row, w = valid.nonzero().T
        return index[row.cpu()], w, p[row, :, w].exp(), q[row, :, w].exp()
    return choices(e, sides)


def ccsd_look(e, features, i, w):
    """-> p and q (C,), and KL(p || q)."""
    sides = ccsd_sides(e, features, np.array([i]), w)
    p, q, _ = ccsd.teacher_and_student(*sides)
    p, q = (x[0, :, w].exp().cpu().numpy() for x in (p, q))
    return p, q, float(ccsd.distillation_loss(*sides))


def no_candidates(e, index):
    """-> (b, N) bool: the images in the camera of images `index`, or if there is no other camera,
    only the images themselves."""
    cams = e.train.cams
    which = cams if len(np.unique(cams)) > 1 else np.arange(len(cams))
    return torch.from_numpy(which[index][:, None] == which).to(e.features.device)


def mskd_choices(e, f, t):
    """f, t (3, N, D): features of student and teacher of all images."""
    def sides(index):
        same = no_candidates(e, index)
        near = [(x[0][index] @ x[0].T).masked_fill(same, -1) for x in (t, f)]
        return index, np.zeros_like(index), *near
    return choices(e, sides)


def mskd_look(e, f, t, i):
    """-> for each view, the similarities of all images to image i in t and in f, -1 in its own
    camera, (3, N) each; and the losses D_v of image i (3,)."""
    same, near = no_candidates(e, [i])[0], []
    for x in (t, f):
        similar = torch.einsum("vnd,vd->vn", x, x[:, i])
        near.append(similar.masked_fill(same, -1).cpu().numpy())
    D = mskd.distillation_losses(f[:, i:i + 1], t[:, i:i + 1])
    return *near, D.tolist()


def sskd_classifiers(e, every):
    """Step 4, from the slow copies' features (n, N, D) -> rows of the networks' classifiers and of
    their copies', (C, D) each, and the camera means (n, N, D) that are subtracted, or None."""
    cams, means, centred = e.train.cams, None, every
    if e.args.centre:
        means = common.camera_means(every, cams)
        centred = common.centre_cameras(every, cams)
    rows, slow_rows = (common.cluster_means(F.normalize(x.sum(0)), e.labels)
                       for x in (every, centred))
    return rows, slow_rows, means


def sskd_look(e, classifiers, student, slow, index):
    """-> the soft labels of the peer's slow copy for images `index` and the predictions of network
    1, (b, C) each."""
    rows, slow_rows, means = classifiers
    peer = slice(1 % e.args.nets, 1 % e.args.nets + 1)
    means = None if means is None else means[peer]
    taken = common.take(e.images, torch.from_numpy(index), rows.device)
    batch = [common.normalise(taken)]
    p, = sskd.soft_labels(slow[peer], [slow_rows], batch, means, index, e.args)
    q, = sskd.soft_labels([student], [rows], batch, None, index, e.args)
    return p, q


def sskd_choices(e, look):
    return choices(e, lambda index: (index, np.zeros_like(index), *look(index)))


AGREE, DIFFER = "They agree", "They differ"
TEACHER = "They differ: the teacher is right"


def cases(e, c, many=6):
    """-> [(title, row of c)]: six images that differ in who is right or, if ids are not known, in
    whether teacher and student agree; the clearest first, a person only once. And the titles of
    which there is no image."""
    differ = ~c.same
    kinds = [(AGREE, c.same, 2), (DIFFER, differ, 4), (AGREE, c.same, many)]
    if e.known:
        right = differ & c.t & ~c.s & c.label
        kinds = [
            ("Teacher and student agree and are right", c.same & c.t & c.label, 1),
            (TEACHER, right, 2),
            ("They differ: the teacher is wrong", differ & ~c.t & c.s & c.label, 1),
            ("The label is wrong, the teacher right", ~c.label & c.t, 1),
            ("The label is wrong, and so is the teacher", ~c.label & ~c.t, 1),
            (TEACHER, right, many), (AGREE, c.same, many), (DIFFER, differ, many)]
    rows, used, taken = [], set(), set()
    absent = [title for title, which, wanted in kinds if not which.any() and wanted < many]
    for title, which, wanted in kinds:
        for row in sorted(np.flatnonzero(which), key=lambda row: -c.gap[row]):
            i = c.image[row]
            who = e.train.pids[i] if e.known else e.labels[i]
            if wanted and len(rows) < many and i not in taken and who not in used:
                rows.append((title, int(row)))
                used.add(who)
                taken.add(i)
                wanted -= 1
    return rows, absent


@torch.no_grad()
def first_batch(e, model, others, generator):
    """Steps 4 and 5a to 5e for the first batch -> index (B,), the augmented views, and the values
    of the page's losses. model: CCSD's and MSKD's; others: MSKD's teacher, or SSKD's networks and
    slow copies."""
    args, page, device = e.args, e.page, e.features.device
    P, K = args.batch_size // args.num_instances, args.num_instances
    batches = common.pk_batches(e.labels, e.train.cams, P, K, args.iters, generator)
    index = next(batches)
    taken, jitter = common.take(e.images, index, device), .5 * (args.weights == "none")
    count = 1 if page is not sskd or args.shared_view else args.nets
    views = [common.augment(taken, generator, jitter=jitter) for _ in range(count)]
    if page is not sskd:
        f = common.forward(copy.deepcopy(model).train(), views[0], args.bn_splits)
    if page is ccsd:
        groups, (parent, camera, table) = groups_of(e)
        group = torch.from_numpy(groups)[index].to(device)
        s, temp = f @ common.cluster_means(e.features, groups).T, ccsd.GROUP_TEMP
        terms = dict(
            L_intra=ccsd.intra_camera_loss(s, group, camera, temp),
            L_cross=ccsd.cross_camera_loss(s, group, parent, temp),
            L_kd=ccsd.distillation_loss(s, group, parent, camera, table, temp))
    elif page is mskd:
        y = torch.from_numpy(e.labels)[index].to(device)
        memory = common.cluster_means(e.every, e.labels)
        losses = mskd.view_losses(f, memory, y, args.temp)
        terms = dict(zip(("L_g", "L_u", "L_d"), losses))
        if others:
            t = common.forward(copy.deepcopy(others), views[0], args.bn_splits)
            terms.update(zip(("D_g", "D_u", "D_d"), mskd.distillation_losses(f, t)))
    else:
        students, slow = (copy.deepcopy(networks).train() for networks in others)
        rows, slow_rows, means = sskd_classifiers(e, e.every)
        all_views, slow_rows = views * (args.nets // len(views)), [slow_rows] * args.nets
        soft = sskd.soft_labels(slow, slow_rows, all_views, means, index, args)
        q, = sskd.soft_labels(students[:1], [rows], all_views, None, index, args)
        terms = dict(L_soft=sskd.soft_label_loss(q.log(), soft[1 % args.nets]))
    return index, views, {name: float(value) for name, value in terms.items()}


# ======================================================================================== figures
# Captions stand above: one knows what to look for before one looks.


def figure(title, body, see, look):
    return report.figure(title, body, see, look, above=True)


def kind(e, i, person):
    """The frame of image i beside images of a person."""
    if not e.known:
        return ""
    return "right" if e.train.pids[i] == person else "wrong"


def name(e, i):
    """Image i in words."""
    who = f"person {e.train.pids[i]}, " * e.known
    cluster = f"cluster {e.labels[i]}" if e.labels[i] >= 0 else "no cluster"
    return f"{who}camera {camera(e, i)}, {cluster}"


def camera(e, i):
    return report.camera(e.train, e.train.cams[i])


def this(e, i, words="", part=WHOLE):
    """The image in question, as report.shot() takes it."""
    return e.train.paths[i], words + camera(e, i), "this", "", part


def beside(e, i, j, words="", below="", part=WHOLE):
    """Image j beside image i: of the same person?"""
    same = kind(e, j, e.train.pids[i])
    return e.train.paths[j], words + camera(e, j), same, below, part


def frames(e, solid="the same person", dashed="another one"):
    """What frames mean, if they mean anything."""
    return f"; solid frame and tick: {solid}, dashed frame and cross: {dashed}" * e.known


def draw_features(e, before):
    """Step 1: three people under all their cameras, and how similar their images are."""
    cams, who = e.train.cams, e.train.pids if e.known else e.labels
    what, many = ("person", "people") if e.known else ("cluster", "clusters")
    found = [k for k in np.unique(who[who >= 0]) if (who == k).sum() > 1]
    seen = [len(np.unique(cams[who == k])) for k in found]
    best = [k for k, n in zip(found, seen) if n == max(seen)]
    people = sorted(np.random.default_rng(0).permutation(best)[:3].tolist())
    people += [k for k in found if k not in people][:3 - len(people)]
    each, rows, body = 2 if max(seen) < 7 else 1, [], ""
    for k in people:
        mine = np.flatnonzero(who == k)
        some = [mine[cams[mine] == v][:each] for v in np.unique(cams[mine])]
        rows += some
        shots = [(e.train.paths[i], camera(e, i)) for i in np.concatenate(some)]
        body += f"<h4>{what.capitalize()} {k}</h4>{report.strip(shots)}"
    rows, charts, means = np.concatenate(rows), [], []
    by_camera = rows[np.lexsort((who[rows], cams[rows]))]
    states = [("before training", before), ("now", e.features)]
    for title, x in states if before is not None else states[1:]:
        for by, index, group in ((what, rows, who), ("camera", by_camera, cams)):
            values = (x[index] @ x[index].T).cpu().numpy()
            groups = list(dict.fromkeys(group[index]))
            names = [f"{what} {g}" for g in groups]
            if by == "camera":
                names = [report.camera(e.train, v) for v in groups]
            sizes = [(group[index] == g).sum() for g in groups]
            label = f"Similarities {title}, sorted by {by}"
            chart = report.matrix(label, values, sizes, names)
            charts.append(f"<div><h4>{label}</h4>{chart}</div>")
        one, here = (x[index][:, None] == x[index] for x in (who, cams))
        for words, part in ((f"one {what}, two cameras", one & ~here),
                            (f"two {many}, one camera", ~one & here)):
            if part.any():
                means.append(f"{title}, {words} {values[part].mean():.2f}")
    return figure(
        f"1 Features: three {many} under all their cameras", body + report.grid(charts),
        "Below the images: each row and column of a square is one of them, and strong blue means "
        f"that two images have similar features (mean similarity: {'; '.join(means)}).",
        "blue blocks along the diagonal: sorted by camera, they are the camera gap; sorted by "
        f"{what}, they are what training is for.")


def find_examples(e, mutual):
    """-> [(title, image)]: the clustered images with the most and the fewest mutual neighbours in
    their own cluster (and of their person), and an outlier with a middling number. mutual: sparse
    (N, N)."""
    row, column = common.per_entry(np.arange(len(e.labels)), mutual), mutual.indices
    friend = e.labels[row] == e.labels[column]
    if e.known:
        friend &= e.train.pids[row] == e.train.pids[column]
    friends = np.bincount(row[friend], minlength=len(e.labels))

    def ordered(images):
        return images[np.argsort(friends[images], kind="stable")]
    clustered, outliers = ordered(inside(e)), ordered(np.flatnonzero(e.labels < 0))
    examples = [("Easy", clustered[-1]), ("Hard", clustered[0])]
    if len(outliers):
        examples.append(("Outlier", outliers[len(outliers) // 2]))
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


def row_of(matrix, i):
    """Row i of a sparse distance -> columns and values, the nearest first."""
    row = slice(matrix.indptr[i], matrix.indptr[i + 1])
    order = np.argsort(matrix.data[row], kind="stable")
    return matrix.indices[row][order], matrix.data[row][order]


def entry(matrix, i, j):
    """Entry (i, j) of a sparse distance; not stored: 1."""
    columns, values = row_of(matrix, i)
    return float(np.append(values[columns == j], 1)[0])


def draw_neighbours(e):
    """Step 2: whose neighbours count, and what that makes of a pair's distance."""
    k1, cams, pids = e.args.k1, e.train.cams, e.train.pids
    rank = common.nearest(e.centred, k1)
    nearest = common.first_columns(rank, rank.shape[1])
    mutual = nearest.multiply(nearest.T).tocsr()
    wide = common.reciprocal_vectors(e.centred, rank, k1, 1, lambda cosine, _: np.ones_like(cosine))
    vectors = common.neighbour_vectors(e.centred, k1)
    distance = common.jaccard_distance(e.centred, k1) if e.page is mskd else e.distance
    body = ""
    for title, i in find_examples(e, mutual):
        order, both_ways, added = neighbourhood(rank, wide, i)
        body += (f"<h4>{title}: {name(e, i)}; {both_ways.sum()} of its {len(order)} nearest are "
                 "mutual</h4>")
        ways = ["<div><b>mutual</b></div>" if x else "<div>one way</div>" for x in both_ways]
        body += report.strip([this(e, i)] + [
            beside(e, i, j, f"{n + 1}, ", ways[n]) for n, j in enumerate(order[:11])])
        if len(added):
            body += (f"<p>Images that the expansion adds, as close neighbours of its neighbours: "
                     f"{len(added)}.</p>")
            body += report.strip([beside(e, i, j) for j in added[:6]])
        near, _ = row_of(distance, i)
        elsewhere = cams[near] != cams[i]
        near = near[elsewhere] if elsewhere.any() else near[near != i]
        near = near[pids[near] == pids[i]] if e.known else near
        if len(near):
            body += draw_pair(e, i, near[0], distance, vectors)
        else:
            of = "the same person in another camera" if e.known else "another camera"
            body += f"<p>It shares no neighbour with an image of {of}.</p>"
    right = (f", which are the same person in {of_one_person(e, nearest - mutual)}, mutual ones in "
             f"{of_one_person(e, mutual)}") * e.known
    return figure(
        "2 Neighbours, and how far apart two images are", body,
        f"Two images are <b>mutual</b> neighbours if each is among the {rank.shape[1] - 1} most "
        "similar to the other. Neighbours count if they are mutual, or if many mutual neighbours "
        "have them. Each has a weight, the more similar the greater, together 1; of two images "
        "that share neighbours of weight w, the Jaccard distance is 1 - w / (2 - w): 0 if all are "
        f"shared, 1 if none{frames(e)}.",
        f"one-way neighbours{right}: to leave them out is what the Jaccard distance gains."
        ) + draw_distances(e)


def of_one_person(e, graph):
    """-> in %, how many neighbours of a sparse (N, N) are the same person, in words."""
    row, column = common.per_entry(np.arange(len(e.labels)), graph), graph.indices
    same = e.train.pids[row] == e.train.pids[column]
    return share(same[row != column])


def draw_pair(e, i, j, distance, vectors):
    """Why images i and j are as far apart as they are."""
    both, weight = shared_weight(vectors, i, j)
    _, values = row_of(e.distance, i)
    linked = (values <= e.eps).sum() - 1
    of = "the same person's " * e.known
    halves = f", with the halves {entry(e.distance, i, j):.3f}" * (e.page is mskd)
    shots = [this(e, i, "image, "), beside(e, i, j, "other, ")]
    for k, w in zip(both[:8], weight):
        share_of = f"<div>{100 * w:.1f} %</div>"
        shots.append((e.train.paths[k], f"shared, {camera(e, k)}", "", share_of))
    return (f"<p>Its Jaccard distance to {of}nearest image of another camera is "
            f"{entry(distance, i, j):.3f}{halves}: they share {len(both)} neighbours, of weight "
            f"{weight.sum():.2f}. Images within eps of it: {linked}.</p>{report.strip(shots)}")


def draw_distances(e):
    """The histogram of stored distances, with eps."""
    row, column = common.per_entry(np.arange(len(e.labels)), e.distance), e.distance.indices
    pairs, lines, below = row < column, [], []
    one, here = (x[row] == x[column] for x in (e.train.pids, e.train.cams))
    parts = [("all pairs", pairs)]
    if e.known:
        parts = [("same person, same camera", one & here),
                 ("same person, other camera", one & ~here), ("other people", ~one)]
    edges = np.linspace(0, 1, 41)
    for title, part in parts:
        values = e.distance.data[pairs & part]
        if len(values):
            counts = np.histogram(values, edges)[0]
            label = f"{title}: {len(values):,} pairs"
            middle = (edges[1:] + edges[:-1]) / 2
            lines.append((label, middle, 100 * counts / len(values)))
            below.append(f"{share(values <= e.eps)} ({title})")
    n = len(e.labels)
    chart = report.line_chart(
        "Stored Jaccard distances", lines, "Jaccard distance", "% of the stored pairs of a kind",
        marks=False, uprights=[(f"eps {e.eps:.3g}", e.eps)])
    return figure(
        "2 Distances, and eps", chart,
        f"{100 * pairs.sum() / (n * (n - 1) / 2):.1f} % of all pairs share a neighbour and are "
        f"stored; the others are at distance 1. Within eps: {', '.join(below)}.",
        "what lies left of eps, where DBSCAN links two images: a good eps leaves there most pairs "
        "of one person, and few of different people.")


def by_camera(e, images, words, person):
    """A strip of up to 7 images for each camera."""
    body, cams = "", e.train.cams
    for v in np.unique(cams[images]):
        row = images[cams[images] == v]
        shots = [(e.train.paths[i], words(i), kind(e, i, person))
                 for i in report.spread(row, 7)]
        title = f"Camera {report.camera(e.train, v)} (images: {len(row)})"
        body += f"<h4>{title}</h4>{report.strip(shots)}"
    return body


def draw_cluster(e):
    """Step 3: one cluster as DBSCAN found it and, for CCSD, as a table camera x images."""
    cams, pids = e.train.cams, e.train.pids
    clusters = range(e.found.max() + 1)
    members = [np.flatnonzero(e.found == k) for k in clusters]

    def interest(k):  # moved by the refinement, then in many cameras, then of several people
        mine = members[k]
        moved = (e.labels[mine] != most(e.labels[mine] + 1) - 1).sum()
        return moved, len(np.unique(cams[mine])), len(np.unique(pids[mine])), len(mine)
    k = max(clusters, key=interest)
    mine = members[k]
    new, person = most(e.labels[mine]), most(pids[mine])

    def words(i):
        text = f"id {pids[i]}" if e.known else camera(e, i)
        if e.labels[i] < 0:
            return f"{text}, dropped"
        if e.labels[i] != new:
            return f"{text}, moved away"
        return text + ", moved in" * bool(e.found[i] != k)
    order = mine[np.argsort(cams[mine], kind="stable")]
    shots = [(e.train.paths[i], f"{camera(e, i)}, {words(i)}", kind(e, i, person))
             for i in report.spread(order, 12)]
    body = f"<p>Cluster {k}, as DBSCAN found it: {len(mine)} images.</p>"
    body += report.strip(shots)
    see = ", and its mean is what images are compared with"
    look = "what its wrong images share with the others" if e.known else "images that do not fit"
    if e.page is ccsd and e.args.refine != "none":
        body += f"<p>After <code>--refine {e.args.refine}</code>: a group for each camera.</p>"
        body += by_camera(e, np.flatnonzero(e.labels == new), words, person)
        see = ("; CCSD splits it by camera, and each row, the paper's refined cluster, gets a "
               "mean of its own, the memory with which images are compared")
        look = ("how alike a row is, and how different two rows are: people are easier told apart "
                "within a row")
    return figure(
        "3 A cluster" + " and its groups" * (e.page is ccsd), body, "A cluster is treated as one "
        f"person{see}{frames(e, 'the person of most images', 'others')}.", f"{look}.")


def draw_views(e):
    """MSKD's step 1: what the three views of two images find."""
    near = [common.nearest(view, 7)[:, 1:] for view in e.views]
    clustered, pids, body = inside(e), e.train.pids, ""
    if e.known:
        g, u, d = ((pids[x] == pids[:, None]).sum(1)[clustered] for x in near)
        better, misled = np.maximum(u, d) - g, g - np.minimum(u, d)
        some = [("A half sees better than the whole body", clustered[better.argmax()]),
                ("A half is misled", clustered[misled.argmax()])]
    else:
        alike = [len(set(near[1][i]) & set(near[2][i])) for i in clustered]
        some = [("The halves find the most different images", clustered[np.argmin(alike)])]
    for title, i in some:
        body += f"<h4>{title}: {name(e, i)}</h4>"
        for view, part, found in zip(VIEWS, PARTS, near):
            body += titled(view, part, [this(e, i, part=part)] + [
                beside(e, i, j, f"{n + 1}, ", part=part) for n, j in enumerate(found[i])])
    return figure(
        "1 and 2 Three views of an image", body,
        "The nearest images by the feature of the whole body, of the upper and of the lower half; "
        "the distance that is clustered is a weighted mean of those of the three views"
        f"{frames(e)}.",
        "neighbours that only one view finds: what misleads one view, such as legs behind a bag, "
        "rarely misleads all.")


def titled(title, part, shots):
    """A strip with a line above it; halves of images are half as tall."""
    half = ' class="half"' * (part != WHOLE)
    return f"<p>{title}</p><div{half}>{report.strip(shots)}</div>"


def picture_of(batch, columns):
    """Normalised images (n, 3, H, W) side by side -> a PIL image, as the network sees them."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (common.MEAN, common.STD))
    pixels = ((batch.cpu() * std + mean) * 255).clamp(0, 255).byte()
    whole = Image.fromarray(torch.cat(list(pixels), 2).permute(1, 2, 0).numpy())
    width = 42 * columns  # two clusters of four beside each other on a phone
    if whole.width <= width:
        return whole
    return whole.resize((width, round(width * whole.height / whole.width)))


def draw_batch(e, index, views, terms):
    """Step 5a: the batch as the network gets it."""
    K, body = e.args.num_instances, ""
    for start in range(0, len(index), K):
        mine = index[start:start + K].numpy()
        k, names = e.labels[mine[0]], ", ".join(camera(e, i) for i in mine)
        body += f"<div><b>{k}</b>"
        for n, view in enumerate(views[:2]):
            alt = f"cluster {k}: {names}" + f", view {n + 1}" * (len(views) > 1)
            row = report.jpeg(picture_of(view[start:start + K], len(mine)))
            body += f'<img alt="{alt}" src="{row}">'
        body += names * (K < 9) + "</div>"
    values = ", ".join(f"{term} {value:.4f}" for term, value in terms.items())
    rows = "; the upper row is for one network, the lower for its peer" * (len(views) > 1)
    return figure(
        f"5a The next batch: {len(index) // K} clusters x {K} images",
        f'<div class="batch">{body}</div>',
        "Each picture is a cluster, its images from several cameras if there are any, mirrored, "
        f"shifted, with changed colours or an erased rectangle{rows}. Losses of this batch, by the "
        f"page's functions: {values}.",
        "what an image has left to tell who it is, once colours, place and parts of it change.")


# ==================================================================================== the lesson


def share(mask):
    return f"{100 * mask.mean():.1f} %" if len(mask) else "-"


def tally(e, c, before):
    """One line: how often label, teacher and student are right."""
    what = "pairs of an image and another camera" if e.page is ccsd else "images in clusters"
    differ = ~c.same
    text = f"<b>All {len(c.image):,} {what}:</b> teacher and student differ in {share(differ)}"
    if e.known:
        text += (f"; right are the label in {share(c.label)}, the teacher in {share(c.t)}, the "
                 f"student in {share(c.s)}; where they differ, the teacher in {share(c.t[differ])}"
                 f" and the student in {share(c.s[differ])}; where the label is wrong, the "
                 f"teacher in {share(c.t[~c.label])}")
    if e.known and before:
        text += (f"; before training the teacher was right in {share(before.t)}, the student in "
                 f"{share(before.s)}")
    if e.page is not mskd:
        text += f"; the first candidate has {share(c.p)} of p and {share(c.q)} of q, in the mean"
    return f"<p>{text}.</p>"


def draw_sides(e, sides, names="pq", decimals=None):
    """[(title, [(image, words, frame, p, q)], part)] -> strips, two bars a candidate."""
    body = ""
    for title, candidates, part in sides:
        shots = []
        for j, words, frame, *values in candidates:
            bars = [report.bar(*x, decimals) for x in zip(names, values, (2, 3))]
            shots.append((e.train.paths[j], words, frame, "".join(bars), part))
        body += titled(title, part, shots)
    return body


def top(values, n=5):
    """The indices of the n greatest of the values that are above 0, greatest first."""
    order = np.argsort(-values, kind="stable")[:n]
    return order[values[order] > 0]


def candidates_of(e, i, values, p, q, groups, group_of, features):
    """The clusters with the greatest values as candidates; each shows its image nearest to the mean
    of the group group_of[cluster], and never image i unless there is no other."""
    shown = []
    for k in top(values):
        members = np.flatnonzero(groups == group_of[k])
        members = members[members != i] if len(members) > 1 else members
        mean = features[members].mean(0)
        j = members[int((features[members] @ mean).argmax())]
        words = f"cluster {k}" + ", its label" * bool(k == e.labels[i])
        shown.append((j, words, kind(e, i, e.person[k]), p[k], q[k]))
    return shown


def ccsd_candidates(e, features, i, w):
    """-> the two sides of image i for the camera w, as draw_sides() takes them, and their KL."""
    groups, (_, _, table) = groups_of(e)
    table, v = table.cpu().numpy(), e.train.cams[i]
    p, q, kl = ccsd_look(e, features, i, w)
    sides = []
    own, other = camera(e, i), report.camera(e.train, w)
    for title, values, u in (
            (f"Teacher p: clusters in camera {own}, its own", p, v),
            (f"Student q: the same clusters in camera {other}", q, w)):
        some = candidates_of(e, i, values, p, q, groups, table[:, u], features)
        sides.append((title, some, WHOLE))
    return sides, kl


BEFORE, NOW = "Before training began", "Now"


def ccsd_lesson(e, e0):
    """-> c now and before, and [(when, look(i, w) -> HTML)]; e0: before, or None."""
    def shown(state):
        def look(i, w):
            sides, kl = ccsd_candidates(e, state.features, i, w)
            return draw_sides(e, sides) + f"<p>KL(p || q) = {kl:.3f}</p>"
        return look
    looks = [(BEFORE, shown(e0))] if e0 else []
    before = ccsd_choices(e, e0.features) if e0 else None
    return ccsd_choices(e, e.features), before, [*looks, (NOW, shown(e))]


def mskd_lesson(e, e0, teacher):
    """The same; teacher: the network."""
    t = common.extract_features(teacher, e.images)

    def shown(state, student):
        def look(i, _):
            p, q, D = mskd_look(e, state.every, t, i)
            sides = []
            for v, (view, part) in enumerate(zip(VIEWS, PARTS)):
                title = view + f": D = {D[v]:.3f}" * student
                near = top((q if student else p)[v], 5 if v == 0 else 3)
                who = e.train.pids[i]
                some = [(j, camera(e, j), kind(e, j, who), p[v][j], q[v][j]) for j in near]
                sides.append((title, some, part))
            return draw_sides(e, sides, "tf", 2)
        return look
    looks = [("The teacher, t", shown(e, False))]
    looks += [("The student before it trained, f", shown(e0, True))] if e0 else []
    looks += [("The student now, f", shown(e, True))]
    before = mskd_choices(e, e0.every, t) if e0 else None
    return mskd_choices(e, e.every, t), before, looks


def sskd_lesson(e, e0, before, students, slow):
    """The same; before: the networks before training, which were their slow copies too."""
    def shown(state, student, copies):
        classifiers = sskd_classifiers(e, state.every)

        def numbers(index):
            return sskd_look(e, classifiers, student, copies, index)

        def look(i, _):
            p, q = (x[0].cpu() for x in numbers(np.array([i])))
            hard = F.one_hot(torch.tensor(e.labels[i]), len(p)).float()
            soft, alone = (sskd.soft_label_loss(q[None].log(), x[None]) for x in (p, hard))
            p, q, groups = p.numpy(), q.numpy(), np.arange(len(p))
            sides = []
            for title, values in (("Soft label p: the peer's slow copy", p),
                                  ("Prediction q: the network", q)):
                some = candidates_of(e, i, values, p, q, e.labels, groups, state.features)
                sides.append((title, some, WHOLE))
            return draw_sides(e, sides) + (f"<p>L_soft = {soft:.3f}; with the hard label, cluster "
                                           f"{e.labels[i]} alone: {alone:.3f}</p>")
        return look, numbers
    look, numbers = shown(e, students[0], slow)
    looks = [(BEFORE, shown(e0, before[0], before)[0])] if e0 else []
    return sskd_choices(e, numbers), None, [*looks, (NOW, look)]


def draw_lesson(e, c, before, looks):
    """Step 5, the heart."""
    found, absent = cases(e, c)
    body = "" if found else "<p>No cluster is seen by two cameras: none can teach another.</p>"
    for title in absent:
        body += f"<p>In this run there is no image of the kind &ldquo;{title}&rdquo;.</p>"
    for title, row in found:
        i, w = int(c.image[row]), int(c.other[row])
        mates = np.flatnonzero(e.labels == e.labels[i])
        mates = mates[mates != i]
        mates = report.spread(mates[np.argsort(e.train.cams[mates], kind="stable")], 4)
        shots = [this(e, i)] + [beside(e, i, j) for j in mates]
        body += (f"<h4>{title}: {name(e, i)}</h4><p>The image, and others of its cluster, the hard "
                 f"label:</p>{report.strip(shots)}")
        columns = [f"<div><h5>{when}</h5>{look(i, w)}</div>" for when, look in looks]
        body += report.grid(columns)
    see, look = LESSONS[e.page]
    return figure(LESSON.format(STEPS[e.page]),
                  f'<div class="lesson">{body}{tally(e, c, before)}</div>',
                  f"{see}{frames(e, 'right', 'wrong')}.", f"{look}.")


LESSON = "{} The lesson: what the teacher says, and what the student"
STEPS = {ccsd: "5e", mskd: "5c", sskd: "5c"}
LESSONS = {
    ccsd: ("Teacher p: how much the image resembles the clusters as its own camera sees them; "
           "student q: the same clusters as another camera sees them; L_kd, the KL of the two, "
           "pulls q towards p",
           "a student whose candidates share a camera's light or background, beside a teacher who, "
           "within one camera, compares clothes; and a teacher who repeats a wrong label, because "
           "the image is part of its own group's mean"),
    mskd: ("The nearest images of other cameras, by the teacher's features t and by the student's "
           "f, with their similarities in both; D, the squared distance of f_v and t_v, pulls the "
           "student's features to the teacher's",
           "a student that starts far from its teacher, comes near, and then finds people that "
           "the teacher missed"),
    sskd: ("Soft label p: the clusters that the peer's slow copy predicts; q: the prediction of "
           "the network itself, which L_soft pulls towards p, while L_id pulls it towards the hard "
           "label alone",
           "soft labels that name several clusters of similar people, and those that contradict a "
           "wrong hard label")}


# ==================================================================================== the chapter


def both_epochs(run, images, before, others):
    """-> the run's next epoch up to its labels, and features of the networks before training."""
    args = argparse.Namespace(**run.state)
    page = PAGES[next(name for name in args.code if name in PAGES)]
    networks = others[1] if page is sskd else [run.model]
    e = start_epoch(page, args, networks, images, run.train)
    find_labels(e, args.labels.numpy())
    return e, start_epoch(page, args, before, images, run.train) if before else None


def chapter(run, images, first, others):
    """-> HTML. run: as eval.py opens it; images: its training images; first: networks before
    training, or None and why; others: MSKD's teacher; SSKD's networks and slow copies."""
    before, why = first
    e, e0 = both_epochs(run, images, before, others)
    generator = torch.Generator()
    generator.set_state(e.args.generator)
    for_batch = others if e.page is sskd else others and others[0]
    batch = first_batch(e, run.model, for_batch, generator)
    figures = [draw_features(e, e0.features if e0 else None)]
    figures += [draw_views(e)] if e.page is mskd else []
    figures += [draw_neighbours(e), draw_cluster(e), draw_batch(e, *batch)]
    if e.page is ccsd:
        figures.append(draw_lesson(e, *ccsd_lesson(e, e0)))
    elif e.page is sskd:
        figures.append(draw_lesson(e, *sskd_lesson(e, e0, before, *others)))
    elif others:
        figures.append(draw_lesson(e, *mskd_lesson(e, e0, others[0])))
    else:
        figures.append(figure(
            LESSON.format("5c"), "", "This network is a teacher: it learned from labels alone.",
            "the lesson in the report of its student, in the folder above."))
    note = "" if before else f"<p>Before training: not shown, {html.escape(why)}.</p>"
    return (f"<p>What the next epoch of <code>{e.page.__name__}.py</code> would do, in the steps "
            "of its docstring, with this network and its images, which are not augmented but for "
            f"the batch. Nothing is trained.</p>{note}{''.join(figures)}")
