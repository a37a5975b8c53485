"""MSKD: Multi-scale knowledge distillation for unsupervised person re-identification
Lan, Teng, Zhang, Zhang, Tao; arXiv 2204.09931 v1, 2022 (v2 and IEEE TIP 2023: "Learning to
Purification for Unsupervised Person Re-identification")

Pseudo labels are noisy, and a global feature overlooks details. MSKD adds features of two local
views, the upper and the lower half of the body, to clusters and losses. Then it trains twice: a
teacher learns from the noisy labels of its own clusters, from bad ones to better; a student starts
again, from the same first network, from the labels of the finished teacher and guided by its
features, so it converges fast and meets less of the noise that the teacher went through.

A stage, teacher then student, and an epoch of it ([paper]: abstract or introduction; [code]: the
authors' released code; the rest is ClusterContrast by Dai et al., ACCV 2022, the usual base)
  0 data, network; random weights only: warm-up N2       common.load, read_images, Encoder, warm_up
  1 extract features of three views of all training images [paper]   common.extract_features
  2 pseudo labels: J = (1 - 2 l1) J_g + l1 J_u + l1 J_d [code], DBSCAN   mixed_distance
  3 (no refinement in this paper)
  4 memories: a mean per cluster and view [code]         common.cluster_means
  5 for every batch of P clusters x K images
    5a features of augmented images, three views         common.augment, the network
    5b L_g, L_u, L_d: similarity to clusters             view_losses
    5c D_g, D_u, D_d, student only: the teacher's features of the same images are regressed [code]
                                                         distillation_losses
    5f L = (1 - l2) (L_g + mu D_g) + l2 (L_u + mu D_u) + l2 (L_d + mu D_d) [code], optimiser step
    5g memories follow the batch                         common.update_memory
  6 report, evaluate the global feature [code], save   common.label_quality, evaluate, Log.epoch
Before its epochs the student trains for a round, "epoch 0", on labels and memories that come from
  the teacher's features, with frozen memories and twice the iterations [code].
Symbols: g, u, d the views: global, upper, lower half; f_v unit feature, t_v the teacher's; J_v
  Jaccard distance; k = y(i) cluster, m_v its unit memories; tau --temp; l1 --l1, l2 --l2, mu --mu
Differences from the code
  D1 the last epoch is the result; there the best on the test set
  D2 two checkpoints, in OUT/teacher and OUT; there the student overwrites its teacher
  D3 the distillation terms are on by default; there all weights default to 0, plain baseline
  D4 on the toy set the teacher normalises with its running statistics, there with the batch's;
     chosen by the scores in the README
Not said in paper or code, chosen here
  N1 the student's epoch 0 counts in its schedule: --lr-drop 20 acts after epochs 19 and 39, as in
     the code, and the cosine of --lr-drop 0 spans it too
  N2 --weights none adds what no paper claims: a warm-up without labels, colour jitter, and features
     centred per camera before clustering; any other --weights has none of them
Run
  python mskd.py                                     toy set, 2 CPU cores: 139 s, 85 mAP
  python mskd.py --data market1501 --root data       one GPU of 24 GB, estimated: not measured
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from tqdm import tqdm

import common

SETTINGS = {  # the flags' defaults per data set; toy's eps and schedule chosen by scores (README)
    "toy": dict(arch="small", weights="none", size=(96, 48), eps=.45, k1=20, epochs=20, iters=24,
                batch_size=64, num_instances=4, lr=1e-3, lr_drop=0, bn_splits=1, eval_every=5,
                teacher_bn="running"),  # D4
    "market1501": dict(arch="resnet50", weights="imagenet", size=(256, 128), eps=.6, k1=30,
                       epochs=50, iters=200, batch_size=256, num_instances=16, lr=3.5e-4,
                       lr_drop=20, bn_splits=4, eval_every=10, teacher_bn="batch")}
SETTINGS["toy-source"] = SETTINGS["toy"]
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], iters=400, eps=.7)
WEIGHT_DECAY = 5e-4


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    add = parser.add_argument_group("paper; weight 0: no such term; (default here / published)"
                                    ).add_argument
    add("--stage", choices=("both", "teacher", "student"), default="both", help="a stage that is "
        "finished in OUT is skipped (%(default)s)")
    add("--teacher", help="folder of a finished teacher, which is not trained "
        "again (OUT/teacher)")
    add("--l1", type=number(float, 0, .5), default=.15, help="weight of each half's distance; 0: "
        "clusters of the global feature alone (%(default)s / 0.15)")
    add("--l2", type=number(float, 0, 1), default=.2, help="weight of each half's loss "
        "(%(default)s / 0.2)")
    add("--mu", type=number(float, 0), default=1, help="weight of the distillation terms; 0: the "
        "teacher gives only labels and memories of epoch 0 (%(default)s / 1)")  # D3
    add("--teacher-bn", choices=("batch", "running"), help="statistics that the "
        "teacher normalises with: the batch's or its own (%(default)s / batch)")
    add("--temp", type=number(float, 1e-3), default=.05, help="tau (%(default)s / 0.05)")
    add("--momentum", type=number(float, 0, 1), default=.1,
        help="share of a memory that stays when an image comes (%(default)s / 0.1)")
    add("--eps", type=number(float, 0, 1), help="DBSCAN's radius (%(default)s / 0.6, MSMT17 0.7); "
        "lower it when clusters mix people, raise it when most images are outliers")
    add("--k1", type=number(int, 1), help="neighbours of the Jaccard distance (%(default)s / 30); "
        "about the images of a person")
    add = parser.add_argument_group("schedule of each stage").add_argument
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
    args = common.parse(parser, argv, "mskd", SETTINGS)
    if args.teacher and args.stage == "teacher":
        raise common.Problem("--teacher names a finished teacher, which leaves nothing to --stage "
                             "teacher (leave one out)")
    if math.ceil(args.size[0] / 16) % 2:
        raise common.Problem(f"--size {args.size[0]}: the network's map has an odd number of rows, "
                             "so no two halves (make the height a multiple of 32)")
    return args


# ======================================================= the paper's steps, as the loop meets them


def mixed_distance(views, k1, l1):
    """Step 2: J = (1 - 2 l1) J_g + l1 J_u + l1 J_d -> sparse (N, N); not stored: distance 1.

    views (3, N, D). What is not stored has similarity S = 1 - J = 0, and the weights sum to 1: so
    1 - J is the weighted sum of three sparse S, exact, and there is no N x N array.
    """
    mixed = csr_array((views.shape[1],) * 2, dtype=np.float32)
    for features, weight in zip(views, (1 - 2 * l1, l1, l1)):
        if weight:
            similar = common.jaccard_distance(features, k1)
            similar.data = weight * (1 - similar.data)
            mixed = mixed + similar
    mixed.data = (1 - mixed.data).clip(0)
    return mixed


def view_losses(f, memory, k, temp):
    """L_g, L_u, L_d: cross-entropy of <f_v, m_v> / tau at the image's cluster, batch mean.

    f (3, B, D), memory (3, C, D), k (B,) -> (3,).
    """
    logits = f @ memory.transpose(1, 2) / temp                                    # (3, B, C)
    return torch.stack([F.cross_entropy(view, k) for view in logits])


def distillation_losses(f, t):
    """D_g, D_u, D_d: ||f_v - t_v||^2, batch mean. f, t (3, B, D); no gradient to t -> (3,)."""
    return (f - t.detach()).square().sum(2).mean(1)


def load_teacher(folder, args):
    """-> the finished teacher of `folder`, frozen. Raises Problem for a checkpoint that is none, or
    of other data, --arch or --size."""
    path = os.path.join(folder, "last.pt")
    if not os.path.exists(path):
        raise common.Problem(f"no teacher in {folder} (run --stage teacher, or name one with "
                             "--teacher)")
    teacher, state = common.load_encoder(path)
    if state.get("stage") != "teacher" or state["parts"] != 2:
        raise common.Problem(f"{path} is no teacher of mskd.py (name the folder of one; that of a "
                             "run OUT is OUT/teacher)")
    for flag in ("arch", "size", "data"):
        if state[flag] != getattr(args, flag):
            raise common.Problem(f"the teacher {path} has --{flag} {state[flag]}, not "
                                 f"{getattr(args, flag)} (say the same, or name another --teacher)")
    if state["epoch"] < state["epochs"]:
        raise common.Problem(f"the teacher {path} stopped after epoch {state['epoch']} of "
                             f"{state['epochs']} (delete it and run --stage teacher)")
    teacher.train(args.teacher_bn == "batch")
    return teacher.requires_grad_(False)


def main(argv=None):
    args = get_args(argv)
    folder = args.teacher or os.path.join(args.out, "teacher")  # D2
    if args.stage != "student" and not args.teacher:
        scores = train_stage(args, folder)
    if args.stage != "teacher":
        scores = train_stage(args, args.out, folder)
    return scores


def train_stage(args, out, folder=None):
    """The teacher's stage, or the student's of the teacher in `folder`. -> its last evaluation."""
    args = copy.copy(args)
    args.stage = "student" if folder else "teacher"  # what the checkpoint says it is
    device = common.pick_device(args.device)
    log = common.Log(out, device, args, free=() if folder else ("teacher", "mu", "teacher_bn"))
    if log.finished:
        return log.finished["scores"]
    teacher = load_teacher(folder, args) if folder else None
    generator = common.seed_everything(args.seed)  # both stages start from the same network

    # ---- 0 data, network, optimiser
    train, query, gallery = common.load(args.data, args.root, args.batch_size)
    cams, from_scratch = train.cams, args.weights == "none"
    P, K = args.batch_size // args.num_instances, args.num_instances  # clusters, images of each
    model = common.Encoder(args.arch, args.weights, parts=2, pooling="gem").on(device, args)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=WEIGHT_DECAY,
                                 fused=device.type == "cuda")
    images, query_images, gallery_images = (
        common.read_images(split, *args.size) for split in (train, query, gallery))
    images = common.place(images, device)

    def test():
        return common.evaluate(common.extract_features(model, query_images)[0],
                               common.extract_features(model, gallery_images)[0], query, gallery)

    kept = log.restore(len(images), generator=generator, model=model, optimizer=optimizer)
    labels = kept.get("labels")
    if not kept:  # a new run, not one that --resume goes on with
        log.epoch("start", scores=test())
        if from_scratch:  # N2
            common.warm_up(model, images, cams, generator)
            log.epoch("warmed up", scores=test())
    if teacher:
        teacher.on(device, args)

    first = -1 if teacher else 0  # -1: the student's round on the teacher's labels, "epoch 0"
    for epoch in range(kept.get("epoch", first), args.epochs):
        # ---- 1 features of three views: global, upper half, lower half
        features = common.extract_features(teacher if epoch < 0 else model, images)  # (3, N, D)

        # ---- 2 pseudo labels
        centred = common.centre_cameras(features, cams) if from_scratch else features  # N2
        if args.true_ids:
            labels = common.renumber(train.pids)                                  # (N,)
        else:
            distance = mixed_distance(centred, args.k1, args.l1)
            labels = common.dbscan(distance, args.eps, at_least=P,
                                   instead=labels if args.on_collapse == "skip" else None)

        # ---- 4 memories
        memory = common.cluster_means(features, labels)                           # (3, C, D)
        y = torch.from_numpy(labels).to(device)

        # ---- 5 batches of P clusters x K images
        model.train()
        means, iters = common.Means(), args.iters * (2 if epoch < 0 else 1)
        batches = common.pk_batches(labels, cams, P, K, iters, generator)
        for step, index in enumerate(tqdm(batches, f"epoch {epoch + 1}", iters, leave=False)):
            # 5a features of augmented images
            batch = common.augment(common.take(images, index, device), generator,
                                   jitter=.5 if from_scratch else 0)
            chunks = batch.chunk(args.bn_splits)
            f = torch.cat([model(chunk) for chunk in chunks], 1)                  # (3, B, D)
            index = common.send(index, device)
            k = y[index]                                                          # (B,)
            D_g = D_u = D_d = 0

            # 5b similarity to clusters
            L_g, L_u, L_d = view_losses(f, memory, k, args.temp)

            # 5c the teacher's features of the same images
            if teacher and args.mu:
                t = torch.cat([teacher(chunk) for chunk in chunks], 1)            # (3, B, D)
                D_g, D_u, D_d = distillation_losses(f, t)

            # 5f total loss, step
            loss = ((1 - args.l2) * (L_g + args.mu * D_g) + args.l2 * (L_u + args.mu * D_u)
                    + args.l2 * (L_d + args.mu * D_d))
            turn, turns = epoch - first, args.epochs - first  # N1
            lr = args.lr * (.1 ** (turn // args.lr_drop) if args.lr_drop else
                            .5 + .5 * math.cos(math.pi * (turn + step / iters) / turns))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 5g memories follow the batch
            if epoch >= 0:
                for v in range(3):
                    common.update_memory(memory[v], f[v].detach(), k, args.momentum, K)
            means.add(L_g=L_g, L_u=L_u, L_d=L_d, D_g=D_g, D_u=D_u, D_d=D_d)

        # ---- 6 report, evaluate, save
        losses, last = means.values(epoch + 1), epoch + 1 == args.epochs  # D1
        scores = test() if last or (epoch + 1) % args.eval_every == 0 else {}
        log.epoch(f"epoch {epoch + 1}/{args.epochs}", common.label_quality(labels, train.pids),
                  losses, scores, epoch=epoch + 1, keep=dict(
                      generator=generator, model=model, optimizer=optimizer, labels=labels))
    return scores


if __name__ == "__main__":
    common.run(main)
