"""CCSD: Cross-camera self-distillation for unsupervised person re-identification
Chen, Gao, Sun, Sang; Visual Intelligence 1:27, 2023; doi 10.1007/s44267-023-00029-4

Clusters of unlabelled pedestrians are noisy, because another camera changes a picture more than
another person does. CCSD splits every cluster by camera and refines the parts into more compact
ones, then compares each image with the parts of its own camera and of the others. Within a camera
that comparison is reliable: its distribution is the teacher of the comparison across cameras, so
one network teaches itself.

An epoch ([paper]: stated in abstract or introduction; the rest is ClusterContrast by Dai et al.,
ACCV 2022, the usual base, and the choices N1-N6)
  0 data, network; random weights only: warm-up N6       common.load, read_images, Encoder, warm_up
  1 extract features of all training images              common.extract_features
  2 pseudo labels: Jaccard distance, DBSCAN              common.jaccard_distance, dbscan
  3 camera-aware cluster refinement [paper]: split every cluster by camera, split_by_camera, then
    refine the parts N1: --refine reassign or recluster; by default they stay as split
  4 memories: a mean per cluster and per group           common.cluster_means
  5 for every batch of P clusters x K images
    5a features of augmented images                      common.augment, the network
    5b L_base: similarity to clusters                    cross-entropy
    5c L_intra: to groups of the same camera [paper]     intra_camera_loss N2
    5d L_cross: to groups of different cameras [paper]   cross_camera_loss N3
    5e L_kd: the intra-camera distribution is            distillation_loss N4
       transferred to cross-camera [paper]
    5f L = L_base + L_intra + a L_cross + b L_kd, optimiser step
    5g memories follow the batch                         common.update_memory
  6 report, evaluate, save                       common.label_quality, evaluate, Log.epoch
Symbols: f_i unit feature, v = c(i) its camera, k = y(i) its cluster; group (k, v): the images of
  cluster k in camera v, the paper's refined cluster; m_k, m_(k,v) their unit memories; tau --temp
  in L_base, GROUP_TEMP in the others; a --cross, b --kd; mu --momentum; K --num-instances
Differences from the paper: unknown, for only its abstract and introduction were at hand.
Not said there, chosen here
  N1 the refinement rule: two readings; neither scored above the bare split, the default (README)
  N2 L_intra: cross-entropy over the groups of the image's camera, GROUP_TEMP: CAP (AAAI 2021)
  N3 L_cross: the cluster's groups in other cameras against the 50 hardest, as in CAP, after the
     first GROUP_START epochs, as is N4; --cross 0 leaves aligning cameras to distillation alone
  N4 KL(teacher || student) over the clusters that both cameras see, the image's own among them
  N5 group memories move like those of clusters, with a momentum GROUP_MOMENTUM of our own
  N6 --weights none adds what no paper claims: a warm-up without labels, colour jitter, and features
     centred per camera before clustering; any other --weights has none of them
Run
  python ccsd.py                                     toy set, 2 CPU cores: 87 s, 78 mAP
  python ccsd.py --data market1501 --root data       one GPU of 24 GB, estimated: not measured
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common

SETTINGS = {  # the flags' defaults per data set; toy's eps and schedule chosen by scores (README)
    "toy": dict(arch="small", weights="none", size=(96, 48), eps=.45, k1=20, epochs=20, iters=24,
                batch_size=64, num_instances=4, lr=1e-3, lr_drop=0, bn_splits=1, eval_every=5),
    "market1501": dict(arch="resnet50", weights="imagenet", size=(256, 128), eps=.6, k1=30,
                       epochs=50, iters=200, batch_size=256, num_instances=16, lr=3.5e-4,
                       lr_drop=20, bn_splits=4, eval_every=10)}
SETTINGS["toy-source"] = SETTINGS["toy"]
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], iters=400)
GROUP_TEMP, GROUP_MOMENTUM, NEGATIVES = .07, .2, 50  # N2-N5
GROUP_START = 5       # epochs before L_cross and L_kd; a quarter of a run of less than 20 epochs
RECLUSTER_EPS = .8    # N1: eps inside a group, in parts of --eps; not varied
WEIGHT_DECAY = 5e-4


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    add = parser.add_argument_group("paper; weight 0: no such term; (default here / published, of "
                                    "ClusterContrast)").add_argument
    add("--refine", choices=("none", "split", "reassign", "recluster"), default="split",
        help="none: ClusterContrast, no groups, L_base only; split: by camera; reassign: split, "
        "then images move to the nearest group of their camera; recluster: split, then loose "
        "images are dropped (%(default)s)")
    add("--base", type=number(float, 0), default=1, help="weight of L_base (%(default)s)")
    add("--intra", type=number(float, 0), default=1, help="weight of L_intra (%(default)s)")
    add("--cross", type=number(float, 0), default=.5, help="a, weight of L_cross (%(default)s)")
    add("--kd", type=number(float, 0), default=1, help="b, weight of L_kd (%(default)s)")
    add("--temp", type=number(float, 1e-3), default=.05, help="tau of L_base (%(default)s / 0.05)")
    add("--momentum", type=number(float, 0, 1), default=.1,
        help="mu, share of a cluster's memory that stays when an image comes (%(default)s / 0.1)")
    add("--eps", type=number(float, 0, 1), help="DBSCAN's radius (%(default)s / 0.6); lower "
        "it when clusters mix people, raise it when most images are outliers")
    add("--k1", type=number(int, 1), help="neighbours of the Jaccard distance (%(default)s / 30); "
        "about the images of a person")
    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=number(int, 1), help="how often to cluster (%(default)s / 50)")
    add("--iters", type=number(int, 1), help="batches per epoch (%(default)s / 200, MSMT17 400)")
    add("--batch-size", type=number(int, 2), help="P x K images (%(default)s / 256)")
    add("--num-instances", type=number(int, 1), help="K, images of a cluster (%(default)s / 16)")
    add("--lr", type=number(float, 0), help="step size of Adam (%(default)s / 3.5e-4)")
    add("--lr-drop", type=number(int, 0), help="epochs after which lr falls to a tenth, again and "
        "again; 0: along a cosine to 0 (%(default)s / 20)")
    add("--bn-splits", type=number(int, 1), help="chunks of a batch with batch-norm statistics of "
        "their own (%(default)s / 4, the number of GPUs)")
    add("--eval-every", type=number(int, 1), help="epochs between evaluations (%(default)s)")
    common.add_run_flags(parser)
    args = common.parse(parser, argv, "ccsd", SETTINGS)
    if args.true_ids and args.refine in ("reassign", "recluster"):
        raise common.Problem(f"--true-ids: nothing to --refine {args.refine} (say split or none)")
    if args.base == 0 and (args.intra == 0 or args.refine == "none"):
        raise common.Problem("--base 0 leaves the first epochs no loss (raise it, or --intra with "
                             "--refine split)")
    return args


# ======================================================= the paper's steps, as the loop meets them


def split_by_camera(labels, cams):
    """Step 3, split: (N,) labels and cameras -> the groups (k, v), and what each group is.

    groups (N,): 0..G-1, or -1 where the label is. parent (G,), camera (G,): cluster k and camera v
    of each group. table (C, V): group of (k, v), or -1 where camera v does not see k.
    """
    inside = labels >= 0
    pairs, found = np.unique(np.stack([labels[inside], cams[inside]]), axis=1, return_inverse=True)
    groups = np.full_like(labels, -1)
    groups[inside] = found.ravel()
    parent, camera = pairs
    table = np.full((labels.max() + 1, cams.max() + 1), -1)
    table[parent, camera] = np.arange(len(parent))
    return groups, parent, camera, table


def reassign(labels, cams, features, rounds=20):
    """Step 3, refine, first reading (N1): spherical k-means of each camera, from its groups on.

    Every image of camera v goes to the nearest m_(k,v) of its own camera, then the means are
    computed again, until nothing moves or for `rounds`. In a camera little varies but the person,
    so the nearest mean is to be trusted, and each round makes the groups more compact. Outliers
    stay outliers. features: (N, D). -> (N,) labels.
    """
    for _ in range(rounds):
        groups, parent, camera, _ = split_by_camera(labels, cams)
        means = common.cluster_means(features, groups)                            # (G, D)
        moved = labels.copy()
        for v in np.unique(camera):
            images, here = np.flatnonzero((cams == v) & (labels >= 0)), np.flatnonzero(camera == v)
            nearest = (features[images] @ means[here].T).argmax(1).cpu().numpy()
            moved[images] = parent[here[nearest]]
        if (moved == labels).all():
            break
        labels = moved
    return common.renumber(labels)


def recluster(labels, cams, distance, eps, min_samples=2):
    """Step 3, refine, second reading (N1): DBSCAN inside each group, at a tighter eps.

    Images in no dense part of their group become outliers, and so does a camera's only image of a
    cluster; dense parts keep their cluster's label, so they stay one group. distance: sparse
    (N, N). -> (N,) labels.
    """
    groups, *_ = split_by_camera(labels, cams)
    row = common.per_entry(groups, distance)
    inside = distance.copy()
    inside.data = np.where((row >= 0) & (row == groups[distance.indices]), distance.data, 1)
    parts = common.dbscan(inside, eps, min_samples, at_least=0)
    return common.renumber(np.where(parts >= 0, labels, -1))


def intra_camera_loss(similar, group, camera, temp):
    """L_intra (N2): -log softmax over the groups of the image's own camera, at its own group.

    similar (B, G): <f_i, m_g>; group (B,): the image's; camera (G,): of each group. Batch mean.
    """
    elsewhere = camera[group][:, None] != camera                                  # (B, G)
    return F.cross_entropy((similar / temp).masked_fill(elsewhere, -math.inf), group)


def cross_camera_loss(similar, group, parent, temp, negatives=NEGATIVES):
    """L_cross (N3): the cluster's groups in other cameras against the hardest of other clusters.

    Mean over positive groups h of -log(exp s_h / (sum of exp s over positives and negatives)), with
    s = similar / temp; then over the images whose cluster another camera sees too. Shapes as above;
    parent (G,): cluster of each group.
    """
    logits = similar / temp                                                       # (B, G)
    same = parent[group][:, None] == parent
    right = same & (torch.arange(len(parent), device=same.device) != group[:, None])
    wrong = logits.masked_fill(same, -math.inf).topk(min(negatives, len(parent))).values
    total = torch.cat([logits.masked_fill(~right, -math.inf), wrong], 1).logsumexp(1, keepdim=True)
    loss = torch.where(right, total - logits, 0).sum(1) / right.sum(1).clamp(min=1)
    return loss.sum() / right.any(1).sum().clamp(min=1)


def distillation_loss(similar, group, parent, camera, table, temp):
    """L_kd (N4): how like the clusters an image is in its own camera teaches how like in others.

    For each camera w other than v = c(i) that sees the image's cluster too, over the clusters k
    that v and w both see (a KL needs one support; 2 at least): teacher p = softmax(<f_i, m_(k,v)> /
    temp), no gradient; student q = softmax(<f_i, m_(k,w)> / temp). KL(p || q), mean over those w,
    then over the images that have any. table (C, V): group of (k, v), or -1. Last axis below: w.
    """
    seen = table >= 0                                                             # (C, V)
    logits = (similar / temp)[:, table.clamp(min=0)]                              # (B, C, V)
    v = camera[group]                                                             # (B,)
    shared = seen & seen[:, v].T[:, :, None]                                      # (B, C, V)
    teacher = logits.gather(2, v[:, None, None].expand(-1, len(table), 1)).detach()  # (B, C, 1)
    log_p = teacher.masked_fill(~shared, -1e4).log_softmax(1)                     # (B, C, V)
    log_q = logits.masked_fill(~shared, -1e4).log_softmax(1)  # e^-1e4 = 0, and -inf would give NaN
    kl = (log_p.exp() * (log_p - log_q)).sum(1)                                   # (B, V)
    valid = seen[parent[group]] & (shared.sum(1) >= 2)                            # (B, V)
    valid = valid.scatter(1, v[:, None], False)               # w = v is the teacher
    loss = torch.where(valid, kl, 0).sum(1) / valid.sum(1).clamp(min=1)           # (B,)
    return loss.sum() / valid.any(1).sum().clamp(min=1)


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    log = common.Log(args.out, device, args)
    if log.finished:
        return log.finished["scores"]
    generator = common.seed_everything(args.seed)

    # ---- 0 data, network, optimiser
    train, query, gallery = common.load(args.data, args.root, args.batch_size)
    cams, from_scratch = train.cams, args.weights == "none"
    P, K = args.batch_size // args.num_instances, args.num_instances  # clusters, images of each
    if args.refine != "none" and cams.max() == cams.min():
        raise common.Problem(f"{args.data}: all training images are of one camera, and CCSD "
                             "compares cameras (--refine none trains plain ClusterContrast)")
    model = common.Encoder(args.arch, args.weights, parts=0, pooling="gem").on(device, args)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=WEIGHT_DECAY,
                                 fused=device.type == "cuda")
    images, query_images, gallery_images = (
        common.read_images(split, *args.size) for split in (train, query, gallery))
    images = common.place(images, device)

    def test():
        return common.evaluate(common.extract_features(model, query_images),
                               common.extract_features(model, gallery_images), query, gallery)

    kept = log.restore(len(images), generator=generator, model=model, optimizer=optimizer)
    labels = kept.get("labels")
    if not kept:  # a new run, not one that --resume goes on with
        log.epoch("start", scores=test())
        if from_scratch:  # N6
            common.warm_up(model, images, cams, generator)
            log.epoch("warmed up", scores=test())

    for epoch in range(kept.get("epoch", 0), args.epochs):
        # ---- 1 features
        features = common.extract_features(model, images)                         # (N, D)

        # ---- 2 pseudo labels
        centred = common.centre_cameras(features, cams) if from_scratch else features  # N6
        if args.true_ids:
            labels = common.renumber(train.pids)                                  # (N,)
        else:
            distance = common.jaccard_distance(centred, args.k1, max_distance=args.eps)
            labels = common.dbscan(distance, args.eps, at_least=P,
                                   instead=labels if args.on_collapse == "skip" else None)
        unrefined = common.label_quality(labels, train.pids)

        # ---- 3 camera-aware cluster refinement: labels change, then they are split for good
        if args.refine in ("reassign", "recluster"):
            labels = (reassign(labels, cams, centred) if args.refine == "reassign" else
                      recluster(labels, cams, distance, RECLUSTER_EPS * args.eps))
            if labels.max() + 1 < P:
                raise common.Problem(f"--refine {args.refine} leaves {labels.max() + 1} clusters, "
                                     f"and a batch needs {P} (raise --eps, or --refine split)")
        groups, parent, camera, table = split_by_camera(labels, cams)

        # ---- 4 memories
        cluster_memory = common.cluster_means(features, labels)                   # (C, D)
        group_memory = common.cluster_means(features, groups)                     # (G, D)
        y, g, parent, camera, table = (
            torch.from_numpy(array).to(device) for array in (labels, groups, parent, camera, table))

        # ---- 5 batches of P clusters x K images
        model.train()
        means, use_groups = common.Means(), args.refine != "none"
        across = epoch >= min(GROUP_START, args.epochs // 4)  # N3, N4
        batches = common.pk_batches(labels, cams, P, K, args.iters, generator)
        for step, index in enumerate(tqdm(batches, f"epoch {epoch + 1}", args.iters, leave=False)):
            # 5a features of augmented images
            batch = common.augment(common.take(images, index, device), generator,
                                   jitter=.5 if from_scratch else 0)
            f = torch.cat([model(chunk) for chunk in batch.chunk(args.bn_splits)])  # (B, D)
            index = common.send(index, device)
            k, group = y[index], g[index]                                         # (B,), (B,)
            L_base = L_intra = L_cross = L_kd = 0

            # 5b similarity to clusters
            if args.base:
                L_base = F.cross_entropy(f @ cluster_memory.T / args.temp, k)

            # 5c-5e similarity to groups of the same camera, of different cameras, distillation
            if use_groups:
                similar = f @ group_memory.T                                      # (B, G)
                if args.intra:
                    L_intra = intra_camera_loss(similar, group, camera, GROUP_TEMP)
                if across and args.cross:
                    L_cross = cross_camera_loss(similar, group, parent, GROUP_TEMP)
                if across and args.kd:
                    L_kd = distillation_loss(similar, group, parent, camera, table, GROUP_TEMP)

            # 5f total loss, step
            loss = args.base * L_base + args.intra * L_intra + args.cross * L_cross + args.kd * L_kd
            lr = args.lr * (.1 ** (epoch // args.lr_drop) if args.lr_drop else
                            .5 + .5 * math.cos(math.pi * (epoch + step / args.iters) / args.epochs))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 5g memories follow the batch
            common.update_memory(cluster_memory, f.detach(), k, args.momentum, K)
            if use_groups:
                common.update_memory(group_memory, f.detach(), group, GROUP_MOMENTUM, K)
            means.add(base=L_base, intra=L_intra, cross=L_cross, kd=L_kd)

        # ---- 6 report, evaluate, save
        losses, last = means.values(epoch + 1), epoch + 1 == args.epochs
        scores = test() if last or (epoch + 1) % args.eval_every == 0 else {}
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", common.label_quality(labels, train.pids),
                  losses, scores, epoch=epoch + 1, unrefined_ARI=unrefined["ARI"], keep=dict(
                      generator=generator, model=model, optimizer=optimizer, labels=labels))
    return scores


if __name__ == "__main__":
    common.run(main)
