"""CCSD: Cross-camera self-distillation for unsupervised person re-identification
Chen, Gao, Sun, Sang; Visual Intelligence 1:27, 2023; doi 10.1007/s44267-023-00029-4

Clusters of unlabelled pedestrian images are noisy, because an image changes more with the camera
than with the person. CCSD splits every cluster by camera, refines the parts, and compares each
image with the parts of its own camera and of other cameras. Similarities within a camera are more
reliable, so their distribution teaches the one across cameras: the network is its own teacher.

One epoch ([paper]: stated in the abstract or introduction; the rest is the usual baseline,
ClusterContrast (Dai et al., ACCV 2022), and the choices N1-N5)
  0 data, network; a warm-up W if from random weights    common.read_data, Encoder, warm_up
  1 extract features of all training images              common.extract_features
  2 pseudo labels: Jaccard distance, DBSCAN              common.jaccard_distance, dbscan
  3 camera-aware cluster refinement [paper]: split       split_by_camera
    every cluster by camera, then refine the parts N1    reassign, recluster
  4 memories: a mean per cluster and per group           common.cluster_means
  5 for every batch of P clusters x K images
    5a features of augmented images                      common.augment, the network
    5b L_base: similarity to clusters                    cross-entropy
    5c L_intra: to groups of the same camera [paper]     intra_camera_loss N2
    5d L_cross: to groups of other cameras [paper]       cross_camera_loss N3
    5e L_kd: similarities of 5c teach those of 5d [paper]   distillation_loss N4
    5f L = L_base + L_intra + a L_cross + b L_kd, optimiser step
    5g momentum update of the memories                   common.update_memory N5
  6 report, evaluate, save                       common.label_quality, test, Log.epoch
Symbols: f_i unit feature of image i, v = c(i) its camera, k = y(i) its cluster; group (k, v): the
  images of cluster k in camera v, the paper's refined cluster; m_k, m_(k,v) unit memories of both;
  tau: --temp in L_base, GROUP_TEMP in the other losses; a --cross, b --kd; mu --momentum
Differences from the paper are unknown: we had only its abstract and introduction. Our choices:
  N1 the refinement rule (--refine): two interpretations; neither beat the plain split, the default
  N2 L_intra: cross-entropy over the groups of the image's camera, as in CAP (Wang, AAAI 2021)
  N3 L_cross: the cluster's groups in other cameras against the 50 hardest groups of other clusters,
     as in CAP, after GROUP_START epochs, like N4; --cross 0: distillation alone aligns the cameras
  N4 L_kd: KL(teacher || student) over the clusters seen by both cameras, the image's own included
  N5 group memories are updated like cluster memories, with the momentum GROUP_MOMENTUM
  W  --weights none adds what no paper claims: a warm-up without labels, colour jitter, IBN-a blocks
     in the small network, and --centre: subtract each camera's mean feature before clustering
Run
  python ccsd.py                                     toy set, 2 CPU cores: about 90 s, 78 mAP
  python ccsd.py --data market1501 --root data       one GPU of 24 GB, estimated: not measured
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import common

SETTINGS = {  # defaults of the flags; tests/RESULTS.md says how the toy set's were chosen
    "toy": dict(
        arch="small", weights="none", size=(96, 48), eps=.45, k1=20,
        epochs=20, iters=24, batch_size=64, num_instances=4, lr=1e-3, lr_drop=0,
        bn_splits=1, eval_every=5),
    "market1501": dict(
        arch="resnet50", weights="imagenet", size=(256, 128), eps=.6, k1=30,
        epochs=50, iters=200, batch_size=256, num_instances=16, lr=3.5e-4, lr_drop=20,
        bn_splits=4, eval_every=10)}
SETTINGS["toy-source"] = SETTINGS["toy"]
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], iters=400)
WEIGHT_DECAY = 5e-4
GROUP_TEMP, GROUP_MOMENTUM, NEGATIVES = .07, .2, 50  # N2-N4, N5, N3
GROUP_START = 5     # epochs without L_cross and L_kd; a quarter of a run shorter than 20 epochs
RECLUSTER_EPS = .8  # N1: eps within a group, as a fraction of --eps; no other value was tried


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    weight = number(float, 0)
    title = "paper (default / ClusterContrast's value); weight 0: off"
    add = parser.add_argument_group(title).add_argument
    add("--refine", choices=("none", "split", "reassign", "recluster"), default="split",
        help="none: ClusterContrast, L_base only; split: by camera; reassign: images "
        "then move to the nearest group of their camera; recluster: loose images are "
        "dropped (%(default)s)")
    add("--base", type=weight, default=1, help="weight of L_base (%(default)s)")
    add("--intra", type=weight, default=1, help="weight of L_intra (%(default)s)")
    add("--cross", type=weight, default=.5, help="a, weight of L_cross (%(default)s)")
    add("--kd", type=weight, default=1, help="b, weight of L_kd (%(default)s)")
    add("--temp", type=number(float, 1e-3), default=.05, help="tau (%(default)s / 0.05)")
    add("--momentum", type=number(float, 0, 1), default=.1,
        help="mu in m <- mu m + (1 - mu) f (%(default)s / 0.1)")
    add("--eps", type=number(float, 0, 1),
        help="DBSCAN's radius; lower it when clusters mix people, raise it when most "
        "images are outliers (%(default)s / 0.6)")
    add("--k1", type=number(int, 1),
        help="neighbours in the Jaccard distance, about as many as a person has images "
        "(%(default)s / 30)")
    common.add_schedule_flags(parser, SETTINGS["market1501"])
    common.add_run_flags(parser)
    args = common.parse(parser, argv, "ccsd", SETTINGS)
    if args.true_ids and args.refine in ("reassign", "recluster"):
        raise common.Problem(f"--true-ids: {args.refine} has nothing to refine "
                             "(use split or none)")
    if args.base == 0 and (args.intra == 0 or args.refine == "none"):
        raise common.Problem("--base 0 leaves the first epochs without a loss (raise it, "
                             "or raise --intra and use --refine split)")
    return args


# ========================================================= the paper's steps, in the loop's order


def split_by_camera(labels, cams):
    """Step 3, split: turn labels and cameras, (N,) each, into groups (k, v).

    groups (N,): group of each image, 0..G-1, or -1 for an outlier. parent (G,), camera (G,):
    cluster k and camera v of each group. table (C, V): group of (k, v), or -1 if v does not see k.
    """
    valid = labels >= 0
    pairs = np.stack([labels[valid], cams[valid]])                                # (2, n)
    (parent, camera), index = np.unique(pairs, axis=1, return_inverse=True)
    groups = np.full_like(labels, -1)
    groups[valid] = index.ravel()
    table = np.full((labels.max() + 1, cams.max() + 1), -1)
    table[parent, camera] = np.arange(len(parent))
    return groups, parent, camera, table


def reassign(labels, cams, features, rounds=20):
    """Step 3, refine, first interpretation (N1): spherical k-means within each camera.

    Starting from the groups, every image of camera v moves to the nearest m_(k,v), because within a
    camera little but the person varies. Then the means are computed again, until no image moves, at
    most `rounds` times. Outliers stay outliers. features: (N, D). -> (N,) labels.
    """
    for _ in range(rounds):
        groups, parent, camera, _ = split_by_camera(labels, cams)
        means = common.cluster_means(features, groups)                            # (G, D)
        moved = labels.copy()
        for v in np.unique(camera):
            images = np.flatnonzero((cams == v) & (labels >= 0))
            groups_of_v = np.flatnonzero(camera == v)
            similarity = features[images] @ means[groups_of_v].T
            nearest = similarity.argmax(1).cpu().numpy()
            moved[images] = parent[groups_of_v[nearest]]
        if (moved == labels).all():
            break
        labels = moved
    return common.renumber(labels)


def recluster(labels, cams, distance, eps, min_samples=2):
    """Step 3, refine, second interpretation (N1): DBSCAN within each group, with a smaller eps,
    turns loose images into outliers. distance: sparse (N, N). -> (N,) labels."""
    groups, *_ = split_by_camera(labels, cams)
    row, column = common.per_entry(groups, distance), groups[distance.indices]
    same_group = (row >= 0) & (row == column)
    within_group = distance.copy()
    within_group.data = np.where(same_group, distance.data, 1)
    subclusters = common.dbscan(within_group, eps, min_samples, at_least=0)
    return common.renumber(np.where(subclusters >= 0, labels, -1))


def intra_camera_loss(similarity, group, camera, temp):
    """L_intra (N2): cross-entropy over the groups of the image's own camera, batch mean. similarity
    (B, G): <f_i, m_g>; group (B,): group of each image; camera (G,): camera of each group."""
    logits = similarity / temp                                                    # (B, G)
    other_camera = camera[group][:, None] != camera                               # (B, G)
    return F.cross_entropy(logits.masked_fill(other_camera, -math.inf), group)


def cross_camera_loss(similarity, group, parent, temp, negatives=NEGATIVES):
    """L_cross (N3): positives: the cluster's groups in other cameras; negatives: the hardest groups
    of other clusters.

    Mean over the positives h of -log(exp s_h / (sum of exp s over positives and negatives)), with
    s = similarity / temp; then mean over the images that have a positive. Shapes as above; parent
    (G,): cluster of each group.
    """
    logits = similarity / temp                                                    # (B, G)
    same_cluster = parent[group][:, None] == parent                               # (B, G)
    positive = same_cluster.scatter(1, group[:, None], False)  # but not its own group
    positives = logits.masked_fill(~positive, -math.inf)
    others = logits.masked_fill(same_cluster, -math.inf)
    hardest = others.topk(min(negatives, len(parent))).values
    candidates = torch.cat([positives, hardest], 1)
    total = candidates.logsumexp(1, keepdim=True)                                 # (B, 1)
    loss = torch.where(positive, total - logits, 0).sum(1)                        # (B,)
    loss = loss / positive.sum(1).clamp(min=1)
    return loss.sum() / positive.any(1).sum().clamp(min=1)


def teacher_and_student(similarity, group, parent, camera, table, temp):
    """Both sides of L_kd (N4): similarities to clusters in the image's own camera v = c(i), and to
    the same clusters in other cameras.

    For each other camera w that also sees the image's cluster: softmax over the clusters j that
    both v and w see (at least 2), so that p and q have the same support. Teacher p: softmax(<f_i,
    m_(j,v)> / temp); student q: softmax(<f_i, m_(j,w)> / temp). table (C, V): group of (k, v), or
    -1. -> log p and log q (B, C, V), the last axis: w; valid (B, V): is w such a camera?
    """
    seen = table >= 0                                                             # (C, V)
    logits = similarity / temp                                                    # (B, G)
    logits = logits[:, table.clamp(min=0)]  # not seen: group 0, masked below     # (B, C, V)
    v = camera[group]                                                             # (B,)
    shared = seen & seen[:, v].T[:, :, None]                                      # (B, C, V)
    teacher = logits.gather(2, v[:, None, None].expand(-1, len(table), 1))        # (B, C, 1)
    never = -1e4  # e^-1e4 is 0; -inf would give NaN
    log_p = teacher.masked_fill(~shared, never).log_softmax(1)                    # (B, C, V)
    log_q = logits.masked_fill(~shared, never).log_softmax(1)                     # (B, C, V)
    valid = seen[parent[group]] & (shared.sum(1) >= 2)                            # (B, V)
    valid = valid.scatter(1, v[:, None], False)  # v itself is the teacher
    return log_p, log_q, valid


def distillation_loss(similarity, group, parent, camera, table, temp):
    """L_kd (N4): KL(p || q), without gradient to the teacher p; mean over the cameras w, then over
    the images that have one. Shapes as above."""
    log_p, log_q, valid = teacher_and_student(similarity, group, parent, camera, table, temp)
    log_p = log_p.detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(1)                                   # (B, V)
    loss = torch.where(valid, kl, 0).sum(1)                                       # (B,)
    loss = loss / valid.sum(1).clamp(min=1)
    return loss.sum() / valid.any(1).sum().clamp(min=1)


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    args.precision = common.precision(device, args.precision)
    log = common.Log(args.out, device, args)
    if log.finished:
        return log.finished["scores"]
    generator = common.seed_everything(args.seed)

    # ---- 0 data, network, optimiser
    train, images, test_set = common.read_data(args, device)
    cams, from_scratch = train.cams, args.weights == "none"
    jitter = .5 if from_scratch else 0  # W: not in the paper
    K = args.num_instances  # images of each of P clusters
    P = args.batch_size // K
    model = common.Encoder(args.arch, args.weights, parts=0, pooling="gem").on(device, args)
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam(
        model.parameters(), args.lr, weight_decay=WEIGHT_DECAY, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    state = dict(generator=generator, model=model, optimizer=optimizer, scaler=scaler)
    resumed = log.restore(train, **state)
    labels = resumed.get("labels")
    if not resumed:  # a new run
        log.epoch("start", scores={} if args.quick else common.test(model, test_set))
        if from_scratch:  # W: not in the paper
            common.warm_up(model, images, cams, generator, args.warm_up)
            log.epoch("warmed up", scores=common.test(model, test_set))

    for epoch in range(resumed.get("epoch", 0), args.epochs):
        # ---- 1 features of the current network, without augmentation
        features = common.extract_features(model, images)                         # (N, D)

        fallback = labels if args.on_collapse == "skip" else None

        # ---- 2 pseudo labels: dense groups of images that share neighbours
        to_cluster = features                                                     # (N, D)
        if args.centre:  # W: not in the paper
            to_cluster = common.centre_cameras(features, cams)
        if args.true_ids:
            labels = common.renumber(train.pids)                                  # (N,)
        else:
            distance = common.jaccard_distance(to_cluster, args.k1, max_distance=args.eps)
            labels = common.dbscan(distance, args.eps, at_least=P, instead=fallback)
        unrefined = common.label_quality(labels, train.pids)

        # ---- 3 camera-aware cluster refinement: --refine may change labels, then the final split
        refined = labels is fallback  # those of the epoch before were
        if args.refine == "reassign" and not refined:
            labels = common.from_rank_0(reassign, labels, cams, to_cluster)
        if args.refine == "recluster" and not refined:
            labels = recluster(labels, cams, distance, RECLUSTER_EPS * args.eps)
        groups, *arrays = split_by_camera(labels, cams)
        parent, camera, table = (torch.from_numpy(array).to(device) for array in arrays)

        # ---- 4 memories: what an image is compared with, from step 1 (not centred, like a batch's)
        cluster_memory = common.cluster_means(features, labels)                   # (C, D)
        group_memory = common.cluster_means(features, groups)                     # (G, D)
        cluster_of = torch.from_numpy(labels).to(device)                          # (N,)
        group_of = torch.from_numpy(groups).to(device)                            # (N,)
        del features, to_cluster  # N x D values, whose memory the steps need

        # ---- 5 batches of P clusters x K images
        model.train()
        loss_means = common.Means()
        cross_started = epoch >= min(GROUP_START, args.epochs // 4)  # N3: not at once
        batches = common.pk_batches(labels, cams, P, K, args.iters, generator)
        for step, index in log.steps(batches, f"epoch {epoch + 1}", args.iters):
            # 5a features of augmented images, in --bn-splits chunks as if on that many GPUs
            batch = common.take(images, index, device)                            # (B, 3, H, W)
            batch = common.augment(batch, generator, jitter=jitter)
            f = common.forward(model, batch, args.bn_splits)                      # (B, D)
            index = common.send(index, device)
            k, group = cluster_of[index], group_of[index]                         # (B,), (B,)
            L_base = L_intra = L_cross = L_kd = 0

            # 5b similarity to clusters of all cameras, whose labels are noisy
            if args.base:
                L_base = F.cross_entropy(f @ cluster_memory.T / args.temp, k)

            # 5c-5e tell people apart within each camera, then align the cameras
            if args.refine != "none":
                similarity = f @ group_memory.T                                   # (B, G)
                if args.intra:
                    L_intra = intra_camera_loss(similarity, group, camera, GROUP_TEMP)
                if cross_started and args.cross:
                    L_cross = cross_camera_loss(similarity, group, parent, GROUP_TEMP)
                if cross_started and args.kd:
                    L_kd = distillation_loss(similarity, group, parent, camera, table,
                                             GROUP_TEMP)

            # 5f total loss, step
            loss = args.base * L_base + args.intra * L_intra
            loss = loss + args.cross * L_cross + args.kd * L_kd
            lr = common.learning_rate(args, epoch + step / args.iters, args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average_gradients(optimizer)  # of several GPUs; does nothing on one
            scaler.step(optimizer)  # in fp16, a step whose gradients overflow is skipped
            scaler.update()

            # 5g momentum update of the memories, so that they keep up with the network
            common.update_memory(cluster_memory, f, k, args.momentum, K)
            if args.refine != "none":
                common.update_memory(group_memory, f, group, GROUP_MOMENTUM, K)
            loss_means.add(base=L_base, intra=L_intra, cross=L_cross, kd=L_kd)

        # ---- 6 report, evaluate, save; the last epoch is the result
        losses = loss_means.values(epoch + 1)
        quality = common.label_quality(labels, train.pids)
        due = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
        scores = common.test(model, test_set) if due else {}
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", quality, losses, scores, epoch=epoch + 1,
                  unrefined_ARI=unrefined.get("ARI"), keep=dict(state, labels=labels))
    return log.finish(scores, train, labels)


if __name__ == "__main__":
    common.run(main)
