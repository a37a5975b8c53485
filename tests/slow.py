"""The textbook versions, slow and obvious, which tests and benchmark share.

Each follows a definition and not the code it is compared with: an image, a pair or a query at a
time, dense arrays, in the precision of what comes in. Nothing here is imported from the pages.
"""

import numpy as np
import torch

# ----------------------------------------------- k-reciprocal encoding (Zhong et al., CVPR 2017)
# Equation numbers are theirs. As in their code, R(i, k) holds i and is cut from the first k + 1 of
# the ranking; a set joins at more than 2/3, not at 2/3; weights are scaled to sum 1 in each row.


def ranking(similar, k):
    """N(i, k), eq. 2: image i itself, then the most similar; equal ones by index. -> N lists."""
    n = len(similar)
    return [sorted(range(n), key=lambda j: (j != i, -similar[i, j], j))[:k] for i in range(n)]


def reciprocal(rank, i, k):
    """R(i, k), eq. 3: the neighbours of i that have i among their own neighbours. -> set"""
    return {j for j in rank[i][:k + 1] if i in rank[j][:k + 1]}


def expanded(rank, i, k):
    """R*(i, k), eq. 4: R(i, k) and each R(c, k/2) of a member c that lies in it by more than 2/3.
    """
    wide = reciprocal(rank, i, k)
    grown = set(wide)
    for c in wide:
        close = reciprocal(rank, c, round(k / 2))
        if 3 * len(close & wide) > 2 * len(close):
            grown |= close
    return sorted(grown)


def vectors(rank, weigh, k1, k2, dtype=np.float64):
    """V (N, N), eq. 7: weigh(i, members) on R*(i, k1), else 0; then eq. 11, the mean of V over the
    first k2 in the ranking of i."""
    v = np.zeros((len(rank), len(rank)), dtype)
    for i in range(len(rank)):
        members = expanded(rank, i, k1)
        weight = weigh(i, members)
        v[i, members] = weight / weight.sum()
    return np.stack([v[first[:k2]].mean(0) for first in rank])


def jaccard(v, w):
    """Eq. 10: 1 - sum of minima / sum of maxima, of every row of v with every row of w."""
    return np.array([[1 - np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in w] for a in v])


def jaccard_distance(features, k1, k2=6):
    """(N, D) unit features -> (N, N): eq. 10 as ClusterContrast uses it (Dai et al., ACCV 2022): a
    ranking of k1 columns, the image itself among them, and weights exp(-squared distance)."""
    f = features.double().numpy()
    similar = f @ f.T
    v = vectors(ranking(similar, k1), lambda i, members: np.exp(2 * similar[i, members] - 2), k1,
                k2)
    return jaccard(v, v)


def rerank(query, gallery, k1, k2, lam):
    """(Q, D), (G, D) unit features -> (Q, G), eq. 12: (1 - lam) Jaccard + lam d. d: the squared
    Euclidean distance over the largest of its row, as in the authors' code."""
    f = torch.cat([query, gallery]).double().numpy()
    distance = 2 - 2 * f @ f.T
    rank = ranking(-distance, len(f))
    distance = distance / distance.max(1, keepdims=True)
    v = vectors(rank, lambda i, members: np.exp(-distance[i, members]), k1, k2)
    q = len(query)
    return (1 - lam) * jaccard(v[:q], v[q:]) + lam * distance[:q, q:]


def dense(sparse):
    """CSR distance -> array: what is not stored is at distance 1."""
    out = np.ones(sparse.shape)
    for i in range(len(out)):
        stored = slice(sparse.indptr[i], sparse.indptr[i + 1])
        out[i, sparse.indices[stored]] = sparse.data[stored]
    return out


# ---------------------------------------------------------------------------- clusters and memory


def dbscan(distance, eps, min_samples=4):
    """DBSCAN (Ester et al., KDD 1996, ExpandCluster), an image counts itself. -> (N,), -1 = noise.

    A border point belongs to the first cluster that reaches it. eps is widened by 1e-5, which
    common.dbscan explains.
    """
    near = distance <= eps + 1e-5
    core = near.sum(1) >= min_samples
    labels = np.full(len(near), -1)
    for start in np.flatnonzero(core):
        if labels[start] < 0:
            label, reached = labels.max() + 1, [start]
            while reached:
                i = reached.pop()
                if labels[i] < 0:
                    labels[i] = label
                    reached += np.flatnonzero(near[i]).tolist() if core[i] else []
    return labels


def update_memory(memory, features, labels, momentum):
    """ClusterContrast's momentum update (Dai et al., ACCV 2022) in the order of the batch: m_y <-
    unit(momentum m_y + (1 - momentum) f). -> a new memory"""
    memory = memory.clone()
    for f, y in zip(features, labels):
        memory[y] = momentum * memory[y] + (1 - momentum) * f
        memory[y] /= memory[y].norm()
    return memory


def cross_entropy(logits, target):
    """-sum_j t_j log(exp z_j / sum_l exp z_l), mean over rows z of logits (B, C) and their targets
    t, distributions (B, C) or classes (B,)."""
    total = 0
    for z, t in zip(logits, target):
        p = z.exp() / z.exp().sum()
        total = total - (p[t].log() if t.ndim == 0 else (t * p.log()).sum())
    return total / len(logits)


# ------------------------------------------------------------------- a network and its optimiser


def encode(net, images, splits=1):
    """An Encoder's weights in float64, one chunk and one view at a time. images: normalised
    -> pooled, necks, unit features, each (1 + parts, B, D)."""
    chunks = []
    for chunk in images.double().chunk(splits):
        last = net.backbone(chunk)
        rows, views = last.shape[2], [last]
        for part in range(net.parts):
            views.append(last[:, :, part * rows // net.parts:(part + 1) * rows // net.parts])
        pooled, necks = [], []
        for view, pool, neck in zip(views, net.pools, net.necks):
            x = view.mean((2, 3))
            if net.pooling == "gem":
                x = (view.clamp(min=1e-6) ** pool.p).mean((2, 3)) ** (1 / pool.p)
            mean, variance = neck.running_mean, neck.running_var
            if net.training:
                mean, variance = x.mean(0), x.var(0, unbiased=False)
            pooled.append(x)
            necks.append((x - mean) / (variance + neck.eps).sqrt() * neck.weight)
        chunks.append((torch.stack(pooled), torch.stack(necks)))
    pooled, necks = (torch.cat(parts, 1) for parts in zip(*chunks))
    return pooled, necks, necks / necks.norm(dim=2, keepdim=True)


def adam(moments, value, gradient, lr, decay):
    """Adam (Kingma, Ba, ICLR 2015) with L2 decay; beta .9, .999, epsilon 1e-8. moments: a dict, {}
    before the first step. -> the parameter after the step."""
    gradient = gradient + decay * value
    t = moments["t"] = moments.get("t", 0) + 1
    m = moments["m"] = .9 * moments.get("m", 0) + .1 * gradient
    v = moments["v"] = .999 * moments.get("v", 0) + .001 * gradient ** 2
    return value - lr * (m / (1 - .9 ** t)) / ((v / (1 - .999 ** t)).sqrt() + 1e-8)


def centre(features, cams):
    """(N, D) -> (N, D): every image without the mean of its camera, of unit length again."""
    free = torch.stack([f - features[cams == v].mean(0) for f, v in zip(features, cams)])
    return free / free.norm(dim=1, keepdim=True)


def means(features, labels):
    """(N, D), labels (N,) -> (C, D): the unit mean of every cluster; -1 is in none."""
    rows = torch.stack([features[labels == c].sum(0) for c in range(labels.max() + 1)])
    return rows / rows.norm(dim=1, keepdim=True)


# ------------------------------------------------------- evaluation (Zheng et al., Market-1501)


def average_precision(hits):
    """Boolean array, best-ranked first -> mean over the hits of the precision at their rank. Not
    interpolated."""
    ranks = np.flatnonzero(hits) + 1
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def evaluate(similar, query, gallery, topk=(1, 5, 10)):
    """Rows of similarities, one a query -> dict: Zheng et al. (ICCV 2015). Gallery images of the
    query's person in its own camera are ignored; a query without other right answers does not
    count; of equally similar answers the wrong ones come first."""
    precision, first = [], []
    for row, person, camera in zip(similar, query.pids, query.cams):
        right = (gallery.pids == person) & (gallery.cams != camera)
        wrong = gallery.pids != person
        if right.any():
            answers = np.concatenate([row[wrong], row[right]])  # a stable sort keeps this order
            hits = np.argsort(-answers, kind="stable") >= wrong.sum()
            precision.append(average_precision(hits))
            first.append(hits.argmax())
    return dict(mAP=np.mean(precision), queries=len(precision),
                **{f"rank{k}": np.mean(np.array(first) < k) for k in topk})
