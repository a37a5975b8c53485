"""SSKD: Self-supervised knowledge distillation for cross domain adaptive person re-identification
Yin, Qiu, Zhang, Ma, Guo; arXiv 2009.05972, 2020

A network trained on a labelled source set works badly on an unlabelled target set, because of the
domain gap. SSKD adapts it in two ways. Identity learning treats clusters of the target as people:
exact labels for images that are confidently distinguished, but noisy and blind to fine detail. Soft
label learning treats labels as distributions: an image belongs to several related clusters, to the
degrees that a slowly evolving network predicts for its peer from augmented views.

One epoch on the target ([paper]: abstract or introduction; [code]: the authors' released code)
  0 networks M_1..M_n, trained on the source, and slow copies E_1..E_n [code]   train_source
  1 extract features of all target images: unit(mean of E_1..E_n) [code]   common.extract_features
  2 pseudo labels: Jaccard distance, DBSCAN [code], its radius found in the first epoch and kept;
    images that are not confidently distinguished: outliers   common.jaccard_distance, adaptive_eps
  3 (no refinement in this paper)
  4 classifiers, with the clusters' unit means as rows; a new Adam [code]   common.cluster_means
  5 for every batch of P clusters x K images
    5a n augmented views of every image [paper], the i-th for M_i and E_i [code]   common.augment
    5b L_id: identity learning, hard labels [paper]      cross-entropy, smoothed [code]
    5c L_soft: soft labels, from the peer's slow copy [paper]   soft_labels, soft_label_loss
    5d L_ms: similarities within the batch [code]        multi_similarity_loss N1
    5e L_nuc: confident and diverse predictions [code]   nuclear_norm_loss N1
    5f L = id L_id + soft L_soft + ms L_ms + nuc L_nuc [code], optimiser step
    5g E <- alpha_t E + (1 - alpha_t) M, alpha_t = min(1 - 1/(t+1), alpha) [code]   follow
  6 report, evaluate, save                               common.label_quality, test, Log.epoch
Symbols: b(x) output of the batch-norm neck, of length near sqrt(D); z = A b(x) / tau, A classifier,
  tau --temp; k = y(i) cluster; n --nets; t steps so far; id, soft, ms, nuc, alpha: flags
Differences from the code (its choice in brackets), and our choices where it says nothing
  D1 each epoch has new classifiers of C rows, one a cluster (wider ones, of which C rows are used)
  D2 the backward pass runs network by network: same gradients, a third of the activations
  D3 last source epoch, then E_1 of the last epoch (best source epoch, then the best of three
     networks x 20 epochs, both by scores on the test sets)
  D4 toy domains: tau 2 (1), alpha .9 (.999), both chosen by scores (tests/RESULTS.md); rho .015
     (1.6e-3), lr on a cosine (constant)
  D5 a ReLU after the first batch norm (none); Jaccard distance of 20 columns (21), weights exp(-d),
     d the squared distance (divided by its column's largest); seeds from --seed (1, 2, 3)
  N1 we do not know whether the paper has L_ms and L_nuc too; --ms 0 --nuc 0 leaves them out
  W  --weights none adds what no paper claims: colour jitter on the target, IBN-a blocks, and
     --centre: each camera's mean feature is subtracted before clustering and in soft labels; slow
     classifiers are then fixed for an epoch, as centred rows must not be averaged with others
Run
  python sskd.py                                     toy domains, 2 CPU cores: 287 s, 78 mAP
  python sskd.py --source msmt17 --data market1501   one GPU of 16 GB, estimated: not measured
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

import common

SETTINGS = {  # defaults of the flags; D4
    "toy": dict(
        source="toy-source", arch="small", weights="none", size=(96, 48), k1=20, rho=.015,
        alpha=.9, temp=2, source_epochs=15, source_iters=24,
        epochs=10, iters=24, batch_size=64, num_instances=4, lr=1e-3, lr_drop=0,
        bn_splits=1, eval_every=5),
    "market1501": dict(
        source="msmt17", arch="resnet50", weights="imagenet", size=(256, 128), k1=20, rho=1.6e-3,
        alpha=.999, temp=1, source_epochs=80, source_iters=100,
        epochs=20, iters=400, batch_size=64, num_instances=4, lr=3.5e-4, lr_drop=1000,
        bn_splits=4, eval_every=5)}
SETTINGS["toy-source"] = dict(SETTINGS["toy"], source="toy")
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], source="market1501")
WEIGHT_DECAY, SMOOTHING = 5e-4, .1  # SMOOTHING: share of a hard label spread over all classes
SAVE_EVERY = 5  # epochs on the source; ResNet-50's checkpoint has 300 MB
TARGET_FLAGS = ("sources", "nets", "id", "soft", "ms", "nuc", "alpha", "shared_view", "rho", "eps",
                "k1", "epochs", "iters", "lr_drop", "centre", "true_ids")  # not the source's


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    weight = number(float, 0)
    title = "paper (default / published); weight 0: off"
    add = parser.add_argument_group(title).add_argument
    add("--source",
        help="the labelled data set, a folder or a name as in --data (%(default)s)")
    add("--sources",
        help="folder of finished source networks, of any --seed (OUT/source, or that of a "
        "run with the same flags of the source)")
    add("--nets", type=number(int, 1, 9), default=3,
        help="n, number of networks; with 1, its own copy is its peer (%(default)s / 3)")
    add("--id", type=weight, default=.5, help="weight of L_id (%(default)s / 0.5)")
    add("--soft", type=weight, default=.5, help="weight of L_soft (%(default)s / 0.5)")
    add("--ms", type=weight, default=3, help="weight of L_ms (%(default)s / 3)")
    add("--nuc", type=weight, default=1.5, help="weight of L_nuc (%(default)s / 1.5)")
    add("--alpha", type=number(float, 0, 1),
        help="decay of slow copies (%(default)s / 0.999)")
    add("--shared-view", action="store_true", help="the same view for all networks")
    add("--temp", type=number(float, 1e-3),
        help="tau; higher: softer labels (%(default)s / 1)")
    add("--rho", type=number(float, 1e-9, 1),
        help="share of all pairs, the closest ones, whose mean distance is DBSCAN's radius; "
        "try images per person / all (%(default)s / 1.6e-3)")
    add("--eps", type=number(float, 0, 1), default=0,
        help="DBSCAN's radius; 0: from --rho (0)")
    add("--k1", type=number(int, 1),
        help="neighbours in the Jaccard distance, about as many as a person has images "
        "(%(default)s / 20)")
    add("--source-epochs", type=number(int, 1),
        help="epochs on the source (%(default)s / 80)")
    add("--source-iters", type=number(int, 1),
        help="batches per source epoch (%(default)s / 100)")
    common.add_schedule_flags(parser, SETTINGS["market1501"])
    common.add_run_flags(parser, warm_up=False)
    args = common.parse(parser, argv, "sskd", SETTINGS, TARGET_FLAGS)
    if args.source == args.data:
        raise common.Problem(f"--source and --data are both {args.data} (name two data sets)")
    if not (args.id or args.soft or args.ms):
        raise common.Problem("--id 0 --soft 0 --ms 0: no loss uses the labels "
                             "(raise one of them)")
    return args


# ========================================================= the paper's steps, in the loop's order


def adaptive_eps(distance, rho):
    """Step 2: mean of the smallest share `rho` of all distances between two images. Sparse (N, N):
    a pair that is not stored has distance 1. Duplicates do not count."""
    n = distance.shape[0]
    row = common.per_entry(np.arange(n), distance)
    stored = distance.data[row < distance.indices]  # each pair once
    distinct = np.sort(stored[stored > common.DUPLICATE])
    duplicates = len(stored) - len(distinct)
    count = max(1, round(rho * (n * (n - 1) // 2 - duplicates)))
    closest = distinct[:count].sum(dtype=np.float64)
    not_stored = max(0, count - len(distinct))  # each at distance 1
    return float((closest + not_stored) / count)


def soft_label_loss(z, soft):
    """L_soft: -sum_j soft_j log softmax(z)_j, batch mean. z, soft (B, C); soft sums to 1."""
    return -(soft * z.log_softmax(1)).sum(1).mean()


def multi_similarity_loss(pooled, labels, threshold=.5, margin=.1, low=2., high=40.):
    """L_ms (Wang et al., CVPR 2019), from the cosines S of pooled (B, D). A positive at S = 1, the
    anchor or its duplicate, is left out. For each anchor, keep the positives below its hardest
    negative + margin and the negatives above its hardest positive - margin. Anchors with both give
    log(1 + sum_pos exp(-low (S - threshold))) / low + log(1 + sum_neg exp(high (S - threshold))) /
    high, the others 0. Mean over anchors."""
    unit = F.normalize(pooled.float())
    similarity = unit @ unit.T                                                    # (B, B)
    same = labels[:, None] == labels
    positive, negative = same & (similarity < 1 - 1e-5), ~same
    hardest_positive = similarity.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    hardest_negative = similarity.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    positive &= similarity - margin < hardest_negative
    negative &= similarity + margin > hardest_positive

    def term(scale, pairs):
        logits = (scale * (similarity - threshold)).masked_fill(~pairs, -math.inf)
        return F.pad(logits, (1, 0)).logsumexp(1) / abs(scale)                    # log(1 + ...)
    has_both = positive.any(1) & negative.any(1)
    loss = term(-low, positive) + term(high, negative)                            # (B,)
    return torch.where(has_both, loss, 0).mean()


def nuclear_norm_loss(z):
    """L_nuc (batch nuclear norm, Cui et al., CVPR 2020): -||softmax(z)||_* / B. z (B, C)."""
    p = z.float().softmax(1).nan_to_num()  # svdvals refuses NaN; the other terms report it
    return -torch.linalg.svdvals(p).sum() / len(z)


@torch.no_grad()
def follow(slow, fast, alpha):
    """Step 5g: E <- alpha E + (1 - alpha) M for parameters; E keeps its batch-norm statistics."""
    for parameter, source in zip(slow, fast):
        parameter.lerp_(source, 1 - alpha)


@torch.no_grad()
def soft_labels(slow, classifiers, views, camera_means, v, args):
    """Step 5c: the prediction of each slow copy for its view -> distributions (n, B, C). W: if
    camera_means (n, V, D) are given, that of the image's camera, v (B,), is subtracted from the
    direction of b(x)."""
    soft = []
    for i, net in enumerate(slow):
        _, neck = common.forward(net, views[i], args.bn_splits, inside=True)      # (B, D)
        if camera_means is not None:
            length = neck.norm(dim=1, keepdim=True)
            neck = F.normalize(neck) - camera_means[i, v]
            neck = F.normalize(neck) * length
        z = neck @ classifiers[i].T / args.temp                                   # (B, C)
        soft.append(z.softmax(1))
    return torch.stack(soft)


def train_source(args, i, device, images):
    """Step 0: train network M_i on the people of the source, unless done before -> path of last.pt.
    The target's `images` are forwarded without gradient, so that batch norm sees them [code]."""
    folder = args.sources or os.path.join(args.first_stage, "source")
    folder = os.path.join(folder, str(i))
    path = os.path.join(folder, "last.pt")
    if args.sources and not os.path.exists(path):
        remedy = "lower --nets, or " * (i > 1) + "name an OUT/source"
        raise common.Problem(f"no source network in {folder} ({remedy})")
    free = TARGET_FLAGS
    if args.sources:
        free = (*free, "seed", "code", "precision")
    log = common.Log(folder, device, args, "source_epochs", free)
    if log.finished:
        return path
    generator = common.seed_everything((9 * args.seed + i) % 2**32)
    source, *_ = common.load(args.source, args.root, args.batch_size, True, args.quick)
    source_images = common.place(common.read_images(source, *args.size), device)
    labels = common.renumber(source.pids)
    if labels.min() < 0 or np.bincount(labels).max() < 2:
        raise common.Problem(f"--source {args.source}: no person has two images "
                             "(has it labels?)")
    person_of = torch.from_numpy(labels).to(device)                               # (N,)
    model = common.Encoder(args.arch, args.weights, parts=0, pooling="avg").on(device, args)
    classifier = torch.nn.Linear(model.width, labels.max() + 1, bias=False).to(device)
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], args.lr,
                                 weight_decay=WEIGHT_DECAY, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    state = dict(generator=generator, model=model, classifier=classifier,
                 optimizer=optimizer, scaler=scaler)
    resumed = log.restore(source, **state)
    K = args.num_instances  # images of each of P people
    P = args.batch_size // K
    model.train()
    for epoch in range(resumed.get("epoch", 0), args.source_epochs):
        done = (epoch + 1) / args.source_epochs
        rise = min(1, .01 + .99 * 8 * done)  # over the first eighth; [code], like the rest
        drops = (1 if done >= 1 / 2 else 0) + (1 if done >= 7 / 8 else 0)
        optimizer.param_groups[0]["lr"] = args.lr * rise * .1 ** drops
        loss_means, title = common.Means(), f"source {i}, {epoch + 1}"
        batches = common.pk_batches(labels, source.cams, P, K, args.source_iters, generator)
        for _, index in log.steps(batches, title, args.source_iters):
            target = torch.randperm(len(images), generator=generator)[:len(index)]
            batch = common.take(images, target, device)
            batch = common.augment(batch, generator, erase=0)
            with torch.no_grad():
                common.forward(model, batch, args.bn_splits)

            batch = common.take(source_images, index, device)
            batch = common.augment(batch, generator, erase=0)
            pooled, neck = common.forward(model, batch, args.bn_splits, inside=True)
            z = classifier(neck) / args.temp                                      # (B, C)
            k = person_of[common.send(index, device)]                             # (B,)
            loss = F.cross_entropy(z, k, label_smoothing=SMOOTHING)  # its terms: [code]
            loss = loss + multi_similarity_loss(pooled, k) + 2 * nuclear_norm_loss(z)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average_gradients(optimizer)  # of several GPUs; does nothing on one
            scaler.step(optimizer)  # in fp16, a step whose gradients overflow is skipped
            scaler.update()
            loss_means.add(source=loss)
        losses = loss_means.values(epoch + 1)
        due = (epoch + 1) % SAVE_EVERY == 0 or epoch + 1 == args.source_epochs
        keep = dict(state, labels=labels) if due else None
        log.epoch(title, losses=losses, epoch=epoch + 1, keep=keep)
    return path


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    args.precision = common.precision(device, args.precision)
    log = common.Log(args.out, device, args)
    if log.finished:
        return log.finished["scores"]

    # ---- 0 data, source networks M, slow copies E
    train, images, test_set = common.read_data(args, device)
    cams, from_scratch = train.cams, args.weights == "none"
    jitter = .5 if from_scratch else 0  # W: not in the paper
    K = args.num_instances  # images of each of P clusters
    P = args.batch_size // K
    paths = [train_source(args, i + 1, device, images) for i in range(args.nets)]
    generator = common.seed_everything(args.seed)  # gives the same run with sources trained earlier
    networks = [common.load_encoder(path)[0].on(device, args) for path in paths]
    students = torch.nn.ModuleList(networks)  # M_1..M_n
    slow = copy.deepcopy(students).requires_grad_(False)  # E_1..E_n
    fused = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    state = dict(generator=generator, students=students, slow=slow, scaler=scaler)
    resumed = log.restore(train, **state)
    labels, radius = resumed.get("labels"), resumed.get("radius")
    if not resumed:  # a new run
        log.epoch("source only", scores={} if args.quick else common.test(slow[0], test_set))

    for epoch in range(resumed.get("epoch", 0), args.epochs):
        # ---- 1 features: the mean of the slow copies
        by_network = [common.extract_features(net, images) for net in slow]
        by_network = torch.stack(by_network)                                      # (n, N, D)
        features = F.normalize(by_network.sum(0))                                 # (N, D)

        fallback = labels if args.on_collapse == "skip" else None

        # ---- 2 pseudo labels: dense groups of images that share neighbours
        to_cluster = features                                                     # (N, D)
        if args.centre:  # W: not in the paper
            to_cluster = F.normalize(common.centre_cameras(by_network, cams).sum(0))
        if args.true_ids:
            labels, radius = common.renumber(train.pids), 0                       # (N,)
        else:
            distance = common.jaccard_distance(to_cluster, args.k1)
            if epoch == 0:
                radius = args.eps or adaptive_eps(distance, args.rho)
            labels = common.dbscan(distance, radius, at_least=P, instead=fallback,
                                   flag="--eps" if args.eps else "--rho")

        # ---- 4 classifiers of every network and every copy: the clusters' unit means
        centroids = common.cluster_means(features, labels)                        # (C, D)
        classifiers = [centroids.clone().requires_grad_() for _ in students]  # D1: C rows
        slow_classifiers = [common.cluster_means(to_cluster, labels) for _ in slow]
        camera_means = None
        if args.centre:
            camera_means = common.camera_means(by_network, cams)                  # (n, V, D)
        optimizer = torch.optim.Adam([*classifiers, *students.parameters()], args.lr,
                                     weight_decay=WEIGHT_DECAY, fused=fused)
        cluster_of = torch.from_numpy(labels).to(device)                          # (N,)
        camera_of = torch.from_numpy(cams).to(device)                             # (N,)
        del by_network, features, to_cluster  # N x D values, whose memory the steps need

        # ---- 5 batches of P clusters x K images
        students.train()
        slow.train()  # they normalise by the batch, as the networks do [code]
        loss_means = common.Means()
        batches = common.pk_batches(labels, cams, P, K, args.iters, generator)
        for step, index in log.steps(batches, f"epoch {epoch + 1}", args.iters):
            # 5a augmented views of the same images, one for each network and its copy
            batch = common.take(images, index, device)                            # (B, 3, H, W)
            views = [common.augment(batch, generator, jitter=jitter)
                     for _ in range(1 if args.shared_view else args.nets)]
            views *= args.nets // len(views)
            index = common.send(index, device)
            k, v = cluster_of[index], camera_of[index]                            # (B,), (B,)

            # 5c soft labels: related clusters, predicted by the slow copies without gradient
            soft = soft_labels(slow, slow_classifiers, views, camera_means, v, args)
            own_weight = soft.gather(2, k.expand(args.nets, -1)[:, :, None])      # only logged
            entropy = torch.special.entr(soft).sum(2)
            loss_means.add(entropy=entropy.mean(), own=own_weight.mean())
            optimizer.zero_grad()
            for i in range(args.nets):
                pooled, neck = common.forward(students[i], views[i], args.bn_splits, inside=True)
                z = neck @ classifiers[i].T / args.temp                           # (B, C)
                L_id = L_soft = L_ms = L_nuc = 0

                # 5b-5e hard labels, the peer copy's soft labels, pairs, diverse predictions
                if args.id:
                    L_id = F.cross_entropy(z, k, label_smoothing=SMOOTHING)
                if args.soft:
                    L_soft = soft_label_loss(z, soft[(i + 1) % args.nets])
                if args.ms:
                    L_ms = multi_similarity_loss(pooled, k)
                if args.nuc:
                    L_nuc = nuclear_norm_loss(z)

                # 5f total loss of each network, then one step of all
                loss = args.id * L_id + args.soft * L_soft
                loss = loss + args.ms * L_ms + args.nuc * L_nuc
                scaler.scale(loss).backward()  # D2: network by network
                loss_means.add(id=L_id, soft=L_soft, ms=L_ms, nuc=L_nuc)
            lr = common.learning_rate(args, epoch + step / args.iters, args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            common.average_gradients(optimizer)  # of several GPUs; does nothing on one
            scaler.step(optimizer)  # in fp16, a step whose gradients overflow is skipped
            scaler.update()

            # 5g the slow copies follow, which averages out the noise of single steps
            alpha_t = min(1 - 1 / (epoch * args.iters + step + 1), args.alpha)
            follow(slow.parameters(), students.parameters(), alpha_t)
            if not args.centre:  # W: centred rows stay as they are
                follow(slow_classifiers, classifiers, alpha_t)

        # ---- 6 report, evaluate, save; the first slow copy of the last epoch is the result D3
        losses = loss_means.values(epoch + 1)
        quality = common.label_quality(labels, train.pids)
        losses["soft_clusters"] = math.exp(losses.pop("entropy"))
        losses["soft_own"] = losses.pop("own")
        due = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
        scores = common.test(slow[0], test_set) if due else {}
        keep = dict(state, model=slow[0], labels=labels, radius=radius)
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", quality, losses, scores,
                  epoch=epoch + 1, eps=radius, keep=keep)
    return log.finish(scores, train, labels)


if __name__ == "__main__":
    common.run(main)
