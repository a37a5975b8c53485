"""SSKD: Self-supervised knowledge distillation for cross domain adaptive person re-identification
Yin, Qiu, Zhang, Ma, Guo; arXiv 2009.05972, 2020

A labelled source domain, an unlabelled target domain. Networks that were trained on the source
adapt to the target with two modules: identity learning, whose one-hot labels come from clustering,
and soft label learning, whose labels are distributions over the clusters, given by a slowly
evolving network to its peer, over several augmented views of an image.

Source training, then an epoch on the target ([paper]: abstract or introduction; [code]: the
authors' released code)
  0 data; networks M_1..M_n, each trained on the source, and slow copies E_1..E_n [code; in the
    paper a slowly evolving network and a peer]          train_source, common.load_encoder
  1 extract features of all target images: unit(mean of E_1..E_n) [code]   common.extract_features
  2 pseudo labels: Jaccard distance, DBSCAN, its radius taken from the data in the first epoch
    [code]                                               common.jaccard_distance, adaptive_eps
  3 (no refinement in this paper)
  4 classifiers: rows are cluster means; a new Adam [code]   common.cluster_means D1
  5 for every batch of P clusters x K images
    5a n augmented views of every image [paper], the i-th for M_i and E_i [code]   common.augment
    5b L_id: identity learning, hard labels [paper]      cross-entropy, smoothed [code]
    5c L_soft: soft label learning, from the peer's slow copy [paper]   soft_label_loss N2
    5d L_ms: similarities within the batch [code]        multi_similarity_loss N1
    5e L_nuc: predictions sure and varied [code]         nuclear_norm_loss N1
    5f L = id L_id + soft L_soft + ms L_ms + nuc L_nuc [code], optimiser step
    5g slow copies and their classifiers follow: E <- alpha_t E + (1 - alpha_t) M,
       alpha_t = min(1 - 1/(t+1), alpha) [code]          follow
  6 report, evaluate, save                       common.label_quality, evaluate, Log.epoch
Symbols: z = <unit feature, row of the classifier> / tau, tau --temp; k = y(i) cluster; n --nets;
  alpha --alpha; rho --rho; t steps since the start, from 0; id, soft, ms, nuc: their flags
Differences from the code
  D1 classifiers are made new for each epoch's clusters; there wider ones use their first C outputs
  D2 backward runs network by network: same gradients, a third of the activations
  D3 E_1 of the last epoch is the result, a single network
  D4 on the toy domains tau .1 (there none, 1), rho .015 (1.6e-3), lr along a cosine (constant),
     alpha .9 (.999); only alpha was chosen by scores (README)
Not said in paper or code, chosen here
  N1 whether L_ms and L_nuc are the paper's too we do not know: --ms 0 --nuc 0
  N2 --weights none adds what no paper claims: colour jitter on the target, and features centred
     per camera before clustering and before soft labels, by classifiers whose rows are centred
     too and stay for the epoch; any other --weights has none of them
Run
  python sskd.py                                     toy domains, 2 CPU cores: 199 s, 76 mAP
  python sskd.py --source msmt17 --data market1501   one GPU of 16 GB: not measured
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common

SETTINGS = {  # the flags' defaults per data set
    "toy": dict(source="toy-source", arch="small", weights="none", size=(96, 48), k1=20, rho=.015,
                alpha=.9, temp=1, source_epochs=15, source_iters=24, epochs=10, iters=24,
                batch_size=64, num_instances=4, lr=1e-3, lr_drop=0, bn_splits=1,  # D4
                eval_every=5),
    "market1501": dict(source="msmt17", arch="resnet50", weights="imagenet", size=(256, 128),
                       k1=20, rho=1.6e-3, alpha=.999, temp=1, source_epochs=80, source_iters=100,
                       epochs=20, iters=400, batch_size=64, num_instances=4, lr=3.5e-4,
                       lr_drop=1000, bn_splits=4, eval_every=5)}
SETTINGS["toy-source"] = dict(SETTINGS["toy"], source="toy")
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], source="market1501")
WEIGHT_DECAY = 5e-4
SMOOTHING = .1  # this share of a hard label, of L_id and on the source, is spread over all classes
SOURCE_FLAGS = ("source", "data", "arch", "weights", "size", "source_epochs", "source_iters",
                "batch_size", "num_instances", "lr", "bn_splits", "temp", "seed", "fp32",
                "bf16")


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    add = parser.add_argument_group("paper; weight 0: no such term; (default here / published)"
                                    ).add_argument
    add("--source", help="the labelled data set: a folder or a name, as --data (%(default)s)")
    add("--sources", help="folder of source networks, of any --seed, that are not trained again "
        "(OUT/source)")
    add("--nets", type=number(int, 1, 9), default=3, help="n, networks and slow copies; with 1 the "
        "peer is the network's own copy (%(default)s / 3)")
    add("--id", type=number(float, 0), default=.5, help="weight of L_id (%(default)s / 0.5)")
    add("--soft", type=number(float, 0), default=.5, help="weight of L_soft (%(default)s / 0.5)")
    add("--ms", type=number(float, 0), default=3, help="weight of L_ms (%(default)s / 3)")
    add("--nuc", type=number(float, 0), default=1.5, help="weight of L_nuc (%(default)s / 1.5)")
    add("--alpha", type=number(float, 0, 1), help="what stays of a slow copy at a step "
        "(%(default)s / 0.999)")
    add("--shared-view", action="store_true", help="one view for all networks")
    add("--temp", type=number(float, 1e-3), help="tau of hard and soft labels, on the source too "
        "(%(default)s / 1)")
    add("--rho", type=number(float, 1e-9, 1), help="share of all pairs that is taken for pairs of "
        "one person: DBSCAN's radius is their mean distance (%(default)s / 1.6e-3)")
    add("--eps", type=number(float, 0, 1), default=0, help="DBSCAN's radius; 0: from --rho "
        "(%(default)s)")
    add("--k1", type=number(int, 1), help="neighbours of the Jaccard distance (%(default)s / 20); "
        "about the images of a person")
    add = parser.add_argument_group("schedule").add_argument
    add("--source-epochs", type=number(int, 1), help="epochs on the source; lr rises for 1/8, and "
        "falls to a tenth after 1/2 and 7/8 of them (%(default)s / 80)")
    add("--source-iters", type=number(int, 1), help="batches per epoch of them (%(default)s / 100)")
    add("--epochs", type=number(int, 1), help="how often to cluster (%(default)s / 20)")
    add("--iters", type=number(int, 1), help="batches per epoch (%(default)s / 400)")
    add("--batch-size", type=number(int, 2), help="P x K images (%(default)s / 64)")
    add("--num-instances", type=number(int, 1), help="K, images of a cluster (%(default)s / 4)")
    add("--lr", type=number(float, 0), help="step size of Adam (%(default)s / 3.5e-4)")
    add("--lr-drop", type=number(int, 0), help="epochs after which lr falls to a tenth, again and "
        "again; 0: along a cosine to 0 (%(default)s / never)")
    add("--bn-splits", type=number(int, 1), help="chunks of a batch with batch-norm statistics of "
        "their own (%(default)s / 4, the number of GPUs)")
    add("--eval-every", type=number(int, 1), help="epochs between evaluations (%(default)s)")
    common.add_run_flags(parser)
    args = common.parse(parser, argv, "sskd", SETTINGS)
    if args.source == args.data:
        raise common.Problem(f"--source and --data are both {args.data} (name two data sets)")
    if not (args.id or args.soft or args.ms):
        raise common.Problem("--id 0 --soft 0 --ms 0: nothing is learnt from the clusters (raise "
                             "one of them)")
    return args


# ======================================================= the paper's steps, as the loop meets them


def adaptive_eps(distance, rho):
    """Step 2: mean of the smallest share `rho` of the non-zero distances between two images.

    distance: sparse (N, N). All N (N - 1) / 2 pairs count; what is not stored is at distance 1.
    Duplicates, at distance 0 but for rounding (1e-6), do not.
    """
    n, row = distance.shape[0], common.per_entry(np.arange(distance.shape[0]), distance)
    stored = distance.data[row < distance.indices]
    near = np.sort(stored[stored > 1e-6])
    take = max(1, round(rho * (n * (n - 1) // 2 - (len(stored) - len(near)))))
    return float((near[:take].sum(dtype=np.float64) + max(0, take - len(near))) / take)


def soft_label_loss(z, soft):
    """L_soft: -sum_j soft_j log softmax(z)_j, batch mean. z, soft (B, C); soft sums to 1."""
    return -(soft * z.log_softmax(1)).sum(1).mean()


def multi_similarity_loss(pooled, labels, threshold=.5, margin=.1, low=2., high=40.):
    """L_ms (Wang et al., CVPR 2019): pairs of a batch that are hard for their anchor.

    Cosine similarities S of pooled (B, D); a positive at cosine 1 is the anchor itself or its
    duplicate, and left out. Of an anchor, positives below its hardest negative +
    margin and negatives above its hardest positive - margin are kept; with both kinds left,
    log(1 + sum_pos exp(-low (S - threshold))) / low + log(1 + sum_neg exp(high (S - threshold))) /
    high. Sum over anchors / B.
    """
    unit = F.normalize(pooled.float())
    similar = unit @ unit.T                                                       # (B, B)
    same = labels[:, None] == labels
    positive, negative = same & (similar < 1 - 1e-5), ~same
    hardest_positive = similar.masked_fill(~positive, math.inf).min(1, keepdim=True).values
    hardest_negative = similar.masked_fill(~negative, -math.inf).max(1, keepdim=True).values
    positive &= similar - margin < hardest_negative
    negative &= similar + margin > hardest_positive

    def term(scale, pairs):
        logits = (scale * (similar - threshold)).masked_fill(~pairs, -math.inf)
        return F.pad(logits, (1, 0)).logsumexp(1) / abs(scale)                    # log(1 + ...)
    both = positive.any(1) & negative.any(1)
    return torch.where(both, term(-low, positive) + term(high, negative), 0).mean()


def nuclear_norm_loss(z):
    """L_nuc (batch nuclear norm, Cui et al., CVPR 2020): -||softmax(z)||_* / B; z (B, C)."""
    p = z.float().softmax(1).nan_to_num()  # svdvals refuses NaN; the other terms report it
    return -torch.linalg.svdvals(p).sum() / len(z)


@torch.no_grad()
def follow(slow, fast, alpha):
    """Step 5g: E <- alpha E + (1 - alpha) M for two lists of tensors, the parameters. Batch-norm
    statistics stay E's own, from the views that pass through it in train mode."""
    for mine, its in zip(slow, fast):
        mine.lerp_(its, 1 - alpha)


def forward(model, batch, splits):
    """-> pooled features and what the batch-norm neck makes of them, B(x), of any length; (B, D)
    each, from `splits` chunks that batch norm sees apart."""
    chunks = [model(chunk, inside=True) for chunk in batch.chunk(splits)]
    return tuple(torch.cat(part) for part in zip(*chunks))


def centre(neck, camera_mean):
    """N2: the camera's mean is taken out of the direction of every B(x), its length stays. (B, D)
    each; camera_mean: the mean unit feature, by the same network, of the image's camera."""
    return F.normalize(F.normalize(neck) - camera_mean) * neck.norm(dim=1, keepdim=True)


def train_source(args, i, log, source, source_images, images):
    """Step 0: network M_i learns the people of the labelled source -> last.pt of the log's folder.

    L = cross-entropy, smoothed + L_ms + 2 L_nuc, no erasing [code]. `images` of the target only
    pass through, without labels and gradient, so that the batch norms have seen them [code].
    """
    generator = common.seed_everything((9 * args.seed + i) % 2**32)
    device = common.pick_device(args.device)
    labels = common.renumber(source.pids)
    y = torch.from_numpy(labels).to(device)
    model = common.Encoder(args.arch, args.weights, parts=0, pooling="avg").on(device, args)
    classifier = torch.nn.Linear(model.width, labels.max() + 1, bias=False).to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], args.lr,
                                 weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
    kept = log.restore(len(labels), generator=generator, model=model, classifier=classifier,
                       optimizer=optimizer)
    P, K = args.batch_size // args.num_instances, args.num_instances  # people, images of each
    model.train()
    for epoch in range(kept.get("epoch", 0), args.source_epochs):
        done, means = (epoch + 1) / args.source_epochs, common.Means()
        optimizer.param_groups[0]["lr"] = (args.lr * min(1, .01 + .99 * 8 * done)
                                           * .1 ** ((done >= 1 / 2) + (done >= 7 / 8)))
        batches = common.pk_batches(labels, source.cams, P, K, args.source_iters, generator)
        for index in tqdm(batches, f"source {i}, epoch {epoch + 1}", args.source_iters,
                          leave=False):
            passing = torch.randperm(len(images), generator=generator)[:len(index)]
            batch = common.augment(common.take(images, passing, device), generator, erase=0)
            with torch.no_grad():
                forward(model, batch, args.bn_splits)
            batch = common.augment(common.take(source_images, index, device), generator, erase=0)
            pooled, neck = forward(model, batch, args.bn_splits)                  # (B, D) each
            z, k = classifier(neck) / args.temp, y[common.send(index, device)]    # (B, C), (B,)
            loss = (F.cross_entropy(z, k, label_smoothing=SMOOTHING)
                    + multi_similarity_loss(pooled, k) + 2 * nuclear_norm_loss(z))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            means.add(source=loss)
        log.epoch(f"source {i}, {epoch + 1}", losses=means.values(epoch + 1), epoch=epoch + 1,
                  keep=dict(generator=generator, model=model, classifier=classifier,
                            optimizer=optimizer, labels=labels))


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    log = common.Log(args.out, device, args)
    if log.finished:
        return log.finished["scores"]

    # ---- 0 data, source networks, slow copies
    train, query, gallery = common.load(args.data, args.root, args.batch_size)
    cams, from_scratch = train.cams, args.weights == "none"
    P, K = args.batch_size // args.num_instances, args.num_instances  # clusters, images of each
    images, query_images, gallery_images = (
        common.read_images(split, *args.size) for split in (train, query, gallery))
    images = common.place(images, device)
    folders = [os.path.join(args.sources or os.path.join(args.out, "source"), str(i + 1))
               for i in range(args.nets)]
    lacking = [folder for folder in folders if not os.path.exists(os.path.join(folder, "last.pt"))]
    free = [flag for flag in vars(args)
            if flag not in SOURCE_FLAGS or (flag == "seed" and args.sources)]
    if args.sources and lacking:
        raise common.Problem(f"no source network in {lacking[0]} (lower --nets, or name a folder "
                             "that has all; that of a run OUT is OUT/source)")
    logs = [common.Log(folder, device, args, "source_epochs", free) for folder in folders]
    if not all(log.finished for log in logs):
        source, _, _ = common.load(args.source, args.root, args.batch_size)
        if np.unique(source.pids, return_counts=True)[1].max() < 2:
            raise common.Problem(f"--source {args.source}: no person has two images (name a set "
                                 "with labels)")
        source_images = common.place(common.read_images(source, *args.size), device)
        for i in range(args.nets):
            if not logs[i].finished:
                train_source(args, i + 1, logs[i], source, source_images, images)
    generator = common.seed_everything(args.seed)  # so trained and found sources give the same run
    students = torch.nn.ModuleList(
        common.load_encoder(os.path.join(folder, "last.pt"))[0].on(device, args)
        for folder in folders)                                                    # M_1..M_n
    slow = copy.deepcopy(students).requires_grad_(False)                          # E_1..E_n

    def test():
        return common.evaluate(common.extract_features(slow[0], query_images),
                               common.extract_features(slow[0], gallery_images), query, gallery)

    kept = log.restore(len(images), generator=generator, students=students, slow=slow)
    labels, radius = kept.get("labels"), kept.get("radius")
    if not kept:  # a new run, not one that --resume goes on with
        log.epoch("source only", scores=test())

    for epoch in range(kept.get("epoch", 0), args.epochs):
        # ---- 1 features: the mean of the slow copies
        each = torch.stack([common.extract_features(net, images) for net in slow])  # (n, N, D)
        features = F.normalize(each.sum(0))                                       # (N, D)

        # ---- 2 pseudo labels
        centred = (F.normalize(common.centre_cameras(each, cams).sum(0)) if from_scratch
                   else features)  # N2
        if args.true_ids:
            labels, radius = common.renumber(train.pids), 0                       # (N,)
        else:
            distance = common.jaccard_distance(centred, args.k1)
            radius = args.eps or (adaptive_eps(distance, args.rho) if epoch == 0 else radius)
            labels = common.dbscan(distance, radius, at_least=P,
                                   instead=labels if args.on_collapse == "skip" else None)

        # ---- 4 classifiers of every network and every copy
        rows = common.cluster_means(features, labels)                             # (C, D)
        classifiers = [rows.clone().requires_grad_() for _ in students]  # D1
        slow_classifiers = [common.cluster_means(centred, labels) for _ in slow]
        camera_mean = common.camera_means(each, cams)                             # (n, N, D)
        optimizer = torch.optim.Adam([*classifiers, *(p for net in students for p in
                                                      net.parameters())], args.lr,
                                     weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")
        y = torch.from_numpy(labels).to(device)

        # ---- 5 batches of P clusters x K images
        for net in (*students, *slow):
            net.train()
        means = common.Means()
        batches = common.pk_batches(labels, cams, P, K, args.iters, generator)
        for step, index in enumerate(tqdm(batches, f"epoch {epoch + 1}", args.iters, leave=False)):
            # 5a augmented views
            views = [common.augment(common.take(images, index, device), generator,
                                    jitter=.5 if from_scratch else 0)
                     for _ in range(1 if args.shared_view else args.nets)]
            views, index = views * (args.nets // len(views)), common.send(index, device)
            k = y[index]                                                          # (B,)

            # 5c what the slow copies say of the views
            soft = []
            for i in range(args.nets):
                with torch.no_grad():
                    _, neck = forward(slow[i], views[i], args.bn_splits)          # (B, D)
                    if from_scratch:
                        neck = centre(neck, camera_mean[i, index])  # N2
                    soft.append((neck @ slow_classifiers[i].T / args.temp).softmax(1))  # (B, C)
            both = torch.cat(soft)
            means.add(entropy=torch.special.entr(both).sum(1).mean(),
                      own=both.gather(1, k.repeat(args.nets)[:, None]).mean())

            optimizer.zero_grad()
            for i in range(args.nets):
                pooled, neck = forward(students[i], views[i], args.bn_splits)     # (B, D) each
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

                # 5f total loss, step
                loss = args.id * L_id + args.soft * L_soft + args.ms * L_ms + args.nuc * L_nuc
                loss.backward()  # D2
                means.add(id=L_id, soft=L_soft, ms=L_ms, nuc=L_nuc)
            lr = args.lr * (.1 ** (epoch // args.lr_drop) if args.lr_drop else
                            .5 + .5 * math.cos(math.pi * (epoch + step / args.iters) / args.epochs))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

            # 5g slow copies follow
            t = epoch * args.iters + step
            alpha_t = min(1 - 1 / (t + 1), args.alpha)
            for i in range(args.nets):
                follow(slow[i].parameters(), students[i].parameters(), alpha_t)
                if not from_scratch:  # N2: what knows no camera must not follow what does
                    follow([slow_classifiers[i]], [classifiers[i]], alpha_t)

        # ---- 6 report, evaluate, save
        losses, last = means.values(epoch + 1), epoch + 1 == args.epochs
        losses["soft_clusters"], losses["soft_own"] = (math.exp(losses.pop("entropy")),
                                                       losses.pop("own"))
        scores = test() if last or (epoch + 1) % args.eval_every == 0 else {}
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", common.label_quality(labels, train.pids),
                  losses, scores, epoch=epoch + 1, eps=radius, keep=dict(
                      generator=generator, model=slow[0], students=students, slow=slow,  # D3
                      labels=labels, radius=radius))
    return scores


if __name__ == "__main__":
    common.run(main)
