"""SSKD: Self-supervised knowledge distillation for cross domain adaptive person re-identification
Yin, Qiu, Zhang, Ma, Guo; arXiv 2009.05972, 2020

A network trained on a labelled source is worth little on an unlabelled target: the domain gap. SSKD
adapts it in two ways. Identity learning takes clusters of the target for people: exact labels for
images that are confidently distinguished, but noisy, and blind to fine detail. Soft label learning
takes labels for distributions: an image belongs to several related clusters, as a slowly evolving
network tells its peer about augmented views.

An epoch on the target ([paper]: abstract or introduction; [code]: the authors' released code)
  0 networks M_1..M_n, trained on the source, and slow copies E_1..E_n [code]   train_source
  1 extract features of all target images: unit(mean of E_1..E_n) [code]   common.extract_features
  2 pseudo labels: Jaccard distance, DBSCAN [code]; outliers are the images that are not confidently
    distinguished                                        common.jaccard_distance, adaptive_eps
  3 (no refinement in this paper)
  4 classifiers: their rows are the clusters' unit means; a new Adam [code]   common.cluster_means
  5 for every batch of P clusters x K images
    5a n augmented views of every image [paper], the i-th for M_i and E_i [code]   common.augment
    5b L_id: identity learning, hard labels [paper]      cross-entropy, smoothed [code]
    5c L_soft: soft labels, from the peer's slow copy [paper]   soft_labels, soft_label_loss
    5d L_ms: similarities within the batch [code]        multi_similarity_loss N1
    5e L_nuc: predictions sure and varied [code]         nuclear_norm_loss N1
    5f L = id L_id + soft L_soft + ms L_ms + nuc L_nuc [code], optimiser step
    5g E <- alpha_t E + (1 - alpha_t) M, alpha_t = min(1 - 1/(t+1), alpha) [code]   follow
  6 report, evaluate, save                               common.label_quality, test, Log.epoch
Symbols: B(x) output of the batch-norm neck, of length near sqrt(D); z = W B(x) / tau, W classifier,
  tau --temp; k = y(i) cluster; n --nets; t steps so far; the others are flags
Differences from the code, and choices where it does not speak
  D1 classifiers are made new for each epoch's clusters; of the code's wider ones C rows are used
  D2 backward runs network by network: same gradients, a third of the activations
  D3 last source epoch, then E_1 of the last epoch; the code takes the best source epoch, then the
     best of three networks x 20 epochs, by the scores on both test sets
  D4 toy domains: tau 2 (code 1), alpha .9 (.999), both chosen by scores (tests/RESULTS.md); rho
     .015 (1.6e-3), lr on a cosine (constant)
  D5 a ReLU after the first batch norm (none); Jaccard distance of 20 columns (21), weights exp(-d)
     (d over its column's largest); seeds from --seed (1, 2, 3)
  N1 whether L_ms and L_nuc are the paper's too we do not know: --ms 0 --nuc 0
  W  --weights none adds what no paper claims: colour jitter on the target, IBN-a blocks, and
     --centre: each network's features less their camera's mean, before clustering and in soft
     labels, whose classifiers stay for the epoch: centred rows must not be averaged with others
Run
  python sskd.py                                     toy domains, 2 CPU cores: 199 s, 76 mAP
  python sskd.py --source msmt17 --data market1501   one GPU of 16 GB: not measured
"""

import copy
import math
import os

import common  # before torch: Ctrl-C during the imports is quiet
import numpy as np
import torch
import torch.nn.functional as F

SETTINGS = {  # defaults of the flags; D4
    "toy": dict(source="toy-source", arch="small", weights="none", size=(96, 48), k1=20, rho=.015,
                alpha=.9, temp=2, source_epochs=15, source_iters=24, epochs=10, iters=24,
                batch_size=64, num_instances=4, lr=1e-3, lr_drop=0, bn_splits=1, eval_every=5),
    "market1501": dict(source="msmt17", arch="resnet50", weights="imagenet", size=(256, 128), k1=20,
                       rho=1.6e-3, alpha=.999, temp=1, source_epochs=80, source_iters=100,
                       epochs=20, iters=400, batch_size=64, num_instances=4, lr=3.5e-4,
                       lr_drop=1000, bn_splits=4, eval_every=5)}
SETTINGS["toy-source"] = dict(SETTINGS["toy"], source="toy")
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], source="market1501")
WEIGHT_DECAY, SMOOTHING = 5e-4, .1  # SMOOTHING: share of a hard label that is spread over all
TARGET_FLAGS = ("sources", "nets", "id", "soft", "ms", "nuc", "alpha", "shared_view", "rho", "eps",
                "k1", "epochs", "iters", "lr_drop", "centre", "true_ids")  # not of the source


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    weight = number(float, 0)
    add = parser.add_argument_group("paper (default / published); weight 0: off").add_argument
    add("--source", help="the labelled data set: a folder or a name, as --data (%(default)s)")
    add("--sources", help="folder of finished source networks, of any --seed (OUT/source)")
    add("--nets", type=number(int, 1, 9), default=3, help="n, networks; the peer of 1 is its own "
        "copy (%(default)s / 3)")
    add("--id", type=weight, default=.5, help="weight of L_id (%(default)s / 0.5)")
    add("--soft", type=weight, default=.5, help="weight of L_soft (%(default)s / 0.5)")
    add("--ms", type=weight, default=3, help="weight of L_ms (%(default)s / 3)")
    add("--nuc", type=weight, default=1.5, help="weight of L_nuc (%(default)s / 1.5)")
    add("--alpha", type=number(float, 0, 1), help="decay of slow copies (%(default)s / 0.999)")
    add("--shared-view", action="store_true", help="one view for all networks")
    add("--temp", type=number(float, 1e-3), help="tau; higher, softer labels (%(default)s / 1)")
    add("--rho", type=number(float, 1e-9, 1), help="share of all pairs taken for one person's: "
        "DBSCAN's radius is their mean distance (%(default)s / 1.6e-3)")
    add("--eps", type=number(float, 0, 1), default=0, help="DBSCAN's radius; 0: by --rho (0)")
    add("--k1", type=number(int, 1), help="neighbours in the Jaccard distance, about the images of "
        "a person (%(default)s / 20)")
    add("--source-epochs", type=number(int, 1), help="epochs on the source (%(default)s / 80)")
    add("--source-iters", type=number(int, 1), help="batches per source epoch (%(default)s / 100)")
    common.add_schedule_flags(parser, SETTINGS["market1501"])
    common.add_run_flags(parser, warm_up=False)
    args = common.parse(parser, argv, "sskd", SETTINGS, TARGET_FLAGS)
    if args.source == args.data:
        raise common.Problem(f"--source and --data are both {args.data} (name two data sets)")
    if not (args.id or args.soft or args.ms):
        raise common.Problem("--id 0 --soft 0 --ms 0: clusters teach nothing (raise one of them)")
    return args


# ======================================================= the paper's steps, as the loop meets them


def adaptive_eps(distance, rho):
    """Step 2: mean of the smallest share `rho` of the distances between two images. Sparse (N, N):
    what is not stored is at distance 1. Duplicates, at 0 but for rounding (1e-6), do not count."""
    n, row = distance.shape[0], common.per_entry(np.arange(distance.shape[0]), distance)
    stored = distance.data[row < distance.indices]
    near = np.sort(stored[stored > 1e-6])
    take = max(1, round(rho * (n * (n - 1) // 2 - (len(stored) - len(near)))))
    return float((near[:take].sum(dtype=np.float64) + max(0, take - len(near))) / take)


def soft_label_loss(z, soft):
    """L_soft: -sum_j soft_j log softmax(z)_j, batch mean. z, soft (B, C); soft sums to 1."""
    return -(soft * z.log_softmax(1)).sum(1).mean()


def multi_similarity_loss(pooled, labels, threshold=.5, margin=.1, low=2., high=40.):
    """L_ms (Wang et al., CVPR 2019): pairs that are hard for their anchor, by cosines S of pooled
    (B, D); a positive at 1, the anchor or its duplicate, is left out. Kept are positives below the
    hardest negative + margin and negatives above the hardest positive - margin; if there are both,
    log(1 + sum_pos exp(-low (S - threshold))) / low + log(1 + sum_neg exp(high (S - threshold))) /
    high. Sum over anchors / B."""
    unit = F.normalize(pooled.float())
    similarity = unit @ unit.T                                                    # (B, B)
    same = labels[:, None] == labels
    positive, negative = same & (similarity < 1 - 1e-5), ~same
    hardest_positive = similarity.masked_fill(~positive, math.inf).min(1, keepdim=True).values
    hardest_negative = similarity.masked_fill(~negative, -math.inf).max(1, keepdim=True).values
    positive &= similarity - margin < hardest_negative
    negative &= similarity + margin > hardest_positive

    def term(scale, pairs):
        logits = (scale * (similarity - threshold)).masked_fill(~pairs, -math.inf)
        return F.pad(logits, (1, 0)).logsumexp(1) / abs(scale)                    # log(1 + ...)
    both = positive.any(1) & negative.any(1)
    return torch.where(both, term(-low, positive) + term(high, negative), 0).mean()


def nuclear_norm_loss(z):
    """L_nuc (batch nuclear norm, Cui et al., CVPR 2020): -||softmax(z)||_* / B; z (B, C)."""
    p = z.float().softmax(1).nan_to_num()  # svdvals refuses NaN; the other terms report it
    return -torch.linalg.svdvals(p).sum() / len(z)


@torch.no_grad()
def follow(slow, fast, alpha):
    """Step 5g: E <- alpha E + (1 - alpha) M, parameters; batch-norm statistics stay E's own."""
    for parameter, source in zip(slow, fast):
        parameter.lerp_(source, 1 - alpha)


@torch.no_grad()
def soft_labels(slow, classifiers, views, camera_means, index, args):
    """Step 5c: what each slow copy says of its view -> distributions (n, B, C). W: with the copy's
    camera_means (n, N, D), that of the image's camera is taken out of the direction of B(x)."""
    soft = []
    for i, net in enumerate(slow):
        _, neck = common.forward(net, views[i], args.bn_splits, inside=True)      # (B, D)
        if camera_means is not None:
            length = neck.norm(dim=1, keepdim=True)
            neck = F.normalize(F.normalize(neck) - camera_means[i, index]) * length
        soft.append((neck @ classifiers[i].T / args.temp).softmax(1))             # (B, C)
    return torch.stack(soft)


def train_source(args, i, device, images):
    """Step 0: network M_i learns the people of the source, unless it has -> last.pt. `images` of
    the target only pass, without gradient, so that the batch norms have seen them [code]."""
    folder = os.path.join(args.sources or os.path.join(args.first_stage, "source"), str(i))
    path = os.path.join(folder, "last.pt")
    if args.sources and not os.path.exists(path):
        raise common.Problem(f"no source network in {folder} (lower --nets, or name an OUT/source)")
    free = (*TARGET_FLAGS, "seed") if args.sources else TARGET_FLAGS
    log = common.Log(folder, device, args, "source_epochs", free)
    if log.finished:
        return path
    generator = common.seed_everything((9 * args.seed + i) % 2**32)
    source, _, _ = common.load(args.source, args.root, args.batch_size)
    source_images = common.place(common.read_images(source, *args.size), device)
    labels = common.renumber(source.pids)
    if labels.min() < 0 or np.bincount(labels).max() < 2:
        raise common.Problem(f"--source {args.source}: no person has two images (has it labels?)")
    y = torch.from_numpy(labels).to(device)
    model = common.Encoder(args.arch, args.weights, parts=0, pooling="avg").on(device, args)
    classifier = torch.nn.Linear(model.width, labels.max() + 1, bias=False).to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], args.lr,
                                 weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
    state = dict(generator=generator, model=model, classifier=classifier, optimizer=optimizer)
    kept = log.restore(len(labels), **state)
    P, K = args.batch_size // args.num_instances, args.num_instances  # people, images of each
    model.train()
    for epoch in range(kept.get("epoch", 0), args.source_epochs):
        done = (epoch + 1) / args.source_epochs
        rise, drops = min(1, .01 + .99 * 8 * done), (done >= 1 / 2) + (done >= 7 / 8)
        optimizer.param_groups[0]["lr"] = args.lr * rise * .1 ** drops
        means, title = common.Means(), f"source {i}, {epoch + 1}"
        batches = common.pk_batches(labels, source.cams, P, K, args.source_iters, generator)
        for _, index in log.steps(batches, title, args.source_iters):
            passing = torch.randperm(len(images), generator=generator)[:len(index)]
            batch = common.augment(common.take(images, passing, device), generator, erase=0)
            with torch.no_grad():
                common.forward(model, batch, args.bn_splits)
            batch = common.augment(common.take(source_images, index, device), generator, erase=0)
            pooled, neck = common.forward(model, batch, args.bn_splits, inside=True)  # (B, D) each
            z, k = classifier(neck) / args.temp, y[common.send(index, device)]    # (B, C), (B,)
            loss = (F.cross_entropy(z, k, label_smoothing=SMOOTHING)
                    + multi_similarity_loss(pooled, k) + 2 * nuclear_norm_loss(z))  # [code]
            optimizer.zero_grad()
            loss.backward()
            common.average_gradients(optimizer)
            optimizer.step()
            means.add(source=loss)
        losses = means.values(epoch + 1)
        log.epoch(title, losses=losses, epoch=epoch + 1, keep=dict(state, labels=labels))
    return path


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    log = common.Log(args.out, device, args)
    if log.finished:
        return log.finished["scores"]

    # ---- 0 data, source networks M, slow copies E
    train, images, test_set = common.read_data(args, device)
    cams, from_scratch = train.cams, args.weights == "none"
    P, K = args.batch_size // args.num_instances, args.num_instances  # clusters, images of each
    paths = [train_source(args, i + 1, device, images) for i in range(args.nets)]
    generator = common.seed_everything(args.seed)  # so trained and found sources give the same run
    students = torch.nn.ModuleList(common.load_encoder(path)[0].on(device, args) for path in paths)
    slow = copy.deepcopy(students).requires_grad_(False)  # students M_1..M_n, slow E_1..E_n
    state = dict(generator=generator, students=students, slow=slow)
    kept = log.restore(len(images), **state)
    labels, radius = kept.get("labels"), kept.get("radius")
    if not kept:  # a new run, not one that --resume goes on with
        log.epoch("source only", scores=common.test(slow[0], test_set))

    for epoch in range(kept.get("epoch", 0), args.epochs):
        # ---- 1 features: the mean of the slow copies
        each = torch.stack([common.extract_features(net, images) for net in slow])  # (n, N, D)
        features = F.normalize(each.sum(0))                                       # (N, D)

        # ---- 2 pseudo labels: dense groups of images that share neighbours
        centred = common.centre_cameras(each, cams) if args.centre else each  # W
        centred = F.normalize(centred.sum(0))                                     # (N, D)
        if args.true_ids:
            labels, radius = common.renumber(train.pids), 0                       # (N,)
        else:
            distance = common.jaccard_distance(centred, args.k1)
            radius = args.eps or (adaptive_eps(distance, args.rho) if epoch == 0 else radius)
            labels = common.dbscan(distance, radius, at_least=P,
                                   instead=labels if args.on_collapse == "skip" else None,
                                   flag="--eps" if args.eps else "--rho")

        # ---- 4 classifiers of every network and every copy: unit means, of unit features
        rows = common.cluster_means(features, labels)                             # (C, D)
        classifiers = [rows.clone().requires_grad_() for _ in students]  # D1
        slow_classifiers = [common.cluster_means(centred, labels) for _ in slow]
        camera_means = common.camera_means(each, cams) if args.centre else None  # (n, N, D)
        optimizer = torch.optim.Adam([*classifiers, *students.parameters()], args.lr,
                                     weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
        y = torch.from_numpy(labels).to(device)

        # ---- 5 batches of P clusters x K images
        students.train()
        slow.train()
        means = common.Means()
        batches = common.pk_batches(labels, cams, P, K, args.iters, generator)
        for step, index in log.steps(batches, f"epoch {epoch + 1}", args.iters):
            # 5a augmented views: what differs between them is not who the person is
            views = [common.augment(common.take(images, index, device), generator,
                                    jitter=.5 if from_scratch else 0)
                     for _ in range(1 if args.shared_view else args.nets)]
            views *= args.nets // len(views)
            index = common.send(index, device)
            k = y[index]                                                          # (B,)

            # 5c what the slow copies say of the views: related clusters, without gradient
            soft = soft_labels(slow, slow_classifiers, views, camera_means, index, args)
            own = soft.gather(2, k.expand(args.nets, -1)[:, :, None])
            means.add(entropy=torch.special.entr(soft).sum(2).mean(), own=own.mean())
            optimizer.zero_grad()
            for i in range(args.nets):
                pooled, neck = common.forward(students[i], views[i], args.bn_splits, inside=True)
                z = neck @ classifiers[i].T / args.temp                           # (B, C)
                L_id = L_soft = L_ms = L_nuc = 0

                # 5b-5e hard labels, soft labels of the peer's copy, pairs, predictions
                if args.id:
                    L_id = F.cross_entropy(z, k, label_smoothing=SMOOTHING)
                if args.soft:
                    L_soft = soft_label_loss(z, soft[(i + 1) % args.nets])
                if args.ms:
                    L_ms = multi_similarity_loss(pooled, k)
                if args.nuc:
                    L_nuc = nuclear_norm_loss(z)

                # 5f total loss of a network, step of all
                loss = args.id * L_id + args.soft * L_soft + args.ms * L_ms + args.nuc * L_nuc
                loss.backward()  # D2
                means.add(id=L_id, soft=L_soft, ms=L_ms, nuc=L_nuc)
            cosine = .5 + .5 * math.cos(math.pi * (epoch + step / args.iters) / args.epochs)
            factor = .1 ** (epoch // args.lr_drop) if args.lr_drop else cosine
            optimizer.param_groups[0]["lr"] = args.lr * factor
            common.average_gradients(optimizer)
            optimizer.step()

            # 5g slow copies follow, and so forget the noise of single steps
            alpha_t = min(1 - 1 / (epoch * args.iters + step + 1), args.alpha)
            follow(slow.parameters(), students.parameters(), alpha_t)
            if not args.centre:  # W
                follow(slow_classifiers, classifiers, alpha_t)

        # ---- 6 report, evaluate, save; the first slow copy of the last epoch is the result D3
        losses, quality = means.values(epoch + 1), common.label_quality(labels, train.pids)
        losses.update(soft_clusters=math.exp(losses.pop("entropy")), soft_own=losses.pop("own"))
        due = (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs
        scores = common.test(slow[0], test_set) if due else {}
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", quality, losses, scores, epoch=epoch + 1,
                  eps=radius, keep=dict(state, model=slow[0], labels=labels, radius=radius))
    return log.finish(scores, train, labels)


if __name__ == "__main__":
    common.run(main)
