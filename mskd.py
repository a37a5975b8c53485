"""MSKD: Multi-scale knowledge distillation for unsupervised person re-identification
Lan, Teng, Zhang, Zhang, Tao; arXiv 2204.09931 v1, 2022 (v2 and IEEE TIP 2023: "Learning to
Purification for Unsupervised Person Re-identification")

Pseudo labels are noisy: pose and occlusion change how a person looks (appearance noise), and one
global feature misses details. MSKD uses several scales, the whole body and its upper and lower
halves, and trains twice. A teacher learns from the noisy labels of its own clusters, which improve
step by step. A student then starts anew with the labels of the finished teacher and is guided by
the teacher's features, so it converges fast and meets less label noise.

One epoch of either stage, teacher or student ([paper]: abstract or introduction; [code]: the
authors' released code; the rest is the usual baseline, ClusterContrast: Dai et al., ACCV 2022)
  0 data, network; a warm-up W if from random weights    common.read_data, Encoder, warm_up
  1 extract features of three views of all training images [paper]   common.extract_features
  2 pseudo labels: J = (1 - 2 l1) J_g + l1 J_u + l1 J_d [code], DBSCAN   mixed_distance
  3 (no refinement in this paper)
  4 memories: a mean per cluster and view [code]         common.cluster_means
  5 for every batch of P clusters x K images
    5a features of augmented images, three views         common.augment, the network
    5b L_g, L_u, L_d: similarity to clusters             view_losses
    5c D_g, D_u, D_d, student only: regress the teacher's features of the same images [code]
                                                         distillation_losses
    5f L = (1 - l2) (L_g + mu D_g) + l2 (L_u + mu D_u) + l2 (L_d + mu D_d) [code], optimiser step
    5g momentum update of the memories                   common.update_memory
  6 report, evaluate the global feature [code], save     common.label_quality, test, Log.epoch
First round: before its first epoch the student trains on labels and memories computed from the
  teacher's features; the memories are frozen, and there are twice as many iterations [code].
Symbols: views g, u, d: global, upper half, lower half; f_v unit feature, t_v the teacher's; J_v
  Jaccard distance; k = y(i) cluster, m_v its unit memories; tau --temp; l1 --l1, l2 --l2, mu --mu
Differences from the code
  D1 we report the last epoch; the authors' code reports the epoch that is best on the test set
  D2 two checkpoints, OUT/teacher (or a shared one) and OUT; in the code the student overwrites it
  D3 distillation is on by default; in the code all weights default to 0, the plain baseline
  D4 on the toy set the teacher normalises with its running statistics, in the code with the batch's
  D5 harmless (the code's choice in brackets): erased pixels get the mean colour (.485, .456, .406
     after normalisation); 10 tries for a rectangle (100); K - 1 other images without
     repeats (with); a cluster of one image fills K places (one); eps + 1e-5; running statistics of
     all chunks (of the first GPU); bfloat16 on CUDA
Not stated in paper or code, our choices
  N1 the first round counts in the schedule: --lr-drop 20 acts after epochs 19 and 39, as in the
     code, and the cosine of --lr-drop 0 includes it too
  W  --weights none adds what no paper claims: a warm-up without labels, colour jitter, IBN-a blocks
     in the small network, and --centre: subtract each camera's mean feature before clustering
Run
  python mskd.py                                     toy set, 2 CPU cores: 212 s, 85 mAP
  python mskd.py --data market1501 --root data       one GPU of 24 GB, estimated: not measured
  python mskd.py --stage teacher --epochs 41 --out runs/long    a teacher of twice the length:
  python mskd.py --stage student --teacher runs/long/teacher    distillation then helps to the end
"""

import copy
import os

import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

import common

SETTINGS = {  # defaults of the flags; tests/RESULTS.md says how the toy set's were chosen
    "toy": dict(
        arch="small", weights="none", size=(96, 48), eps=.45, k1=20,
        epochs=20, iters=24, batch_size=64, num_instances=4, lr=1e-3, lr_drop=0,
        bn_splits=1, eval_every=5, teacher_bn="running"),  # D4: not the batch's
    "market1501": dict(
        arch="resnet50", weights="imagenet", size=(256, 128), eps=.6, k1=30,
        epochs=50, iters=200, batch_size=256, num_instances=16, lr=3.5e-4, lr_drop=20,
        bn_splits=4, eval_every=10, teacher_bn="batch")}
SETTINGS["toy-source"] = SETTINGS["toy"]
SETTINGS["msmt17"] = dict(SETTINGS["market1501"], iters=400, eps=.7)
WEIGHT_DECAY = 5e-4
STUDENT_FLAGS = "teacher", "mu", "teacher_bn"  # of the student; a teacher ignores them


def get_args(argv=None):
    number, parser = common.number, common.Parser(__doc__)
    title = "paper (default / published); weight 0: off"
    add = parser.add_argument_group(title).add_argument
    add("--stage", choices=("both", "teacher", "student"), default="both",
        help="a stage that is finished in OUT is skipped (%(default)s)")
    add("--teacher",
        help="folder of a finished teacher, used instead of a new one (that of a run "
        "with the same flags but those of the student, or OUT/teacher)")
    add("--l1", type=number(float, 0, .49), default=.15,
        help="weight of each half's distance (%(default)s / 0.15)")
    add("--l2", type=number(float, 0, 1), default=.2,
        help="weight of each half's loss (%(default)s / 0.2)")
    add("--mu", type=number(float, 0), default=1,  # D3: on
        help="weight of distillation; 0: the teacher provides only the labels and "
        "memories of the first round (%(default)s / 1)")
    add("--teacher-bn", choices=("batch", "running"),
        help="batch-norm statistics that the teacher uses: the batch's or its running "
        "ones (%(default)s / batch)")
    add("--temp", type=number(float, 1e-3), default=.05, help="tau (%(default)s / 0.05)")
    add("--momentum", type=number(float, 0, 1), default=.1,
        help="a in the memory update m <- a m + (1 - a) f (%(default)s / 0.1)")
    add("--eps", type=number(float, 0, 1),
        help="DBSCAN's radius; lower it when clusters mix people, raise it when most "
        "images are outliers (%(default)s / 0.6, MSMT17 0.7)")
    add("--k1", type=number(int, 1),
        help="neighbours in the Jaccard distance, about as many as a person has images "
        "(%(default)s / 30)")
    common.add_schedule_flags(parser, SETTINGS["market1501"])
    common.add_run_flags(parser)
    args = common.parse(parser, argv, "mskd", SETTINGS, STUDENT_FLAGS)
    if args.teacher and args.stage == "teacher":
        raise common.Problem("--teacher names a finished teacher, so --stage teacher "
                             "has nothing to do (leave one of them out)")
    common.check_stripes(args.size[0], common.map_rows(args.arch, args.size), 2)
    return args


# ========================================================= the paper's steps, in the loop's order


def mixed_distance(views, k1, l1):
    """Step 2: J = (1 - 2 l1) J_g + l1 J_u + l1 J_d -> sparse (N, N); not stored: distance 1.

    views (3, N, D). A pair that is not stored has similarity S = 1 - J = 0, and the weights sum to
    1. So 1 - J is exactly the weighted sum of three sparse S, and no N x N array is needed. All
    pairs are kept: those that are far apart in one view may be close in the mean.
    """
    mixed = csr_array((views.shape[1],) * 2, dtype="float32")
    for features, weight in zip(views, (1 - 2 * l1, l1, l1)):
        if weight:
            similarity = common.jaccard_distance(features, k1)
            similarity.data = weight * (1 - similarity.data)
            mixed = mixed + similarity
    mixed.data = 1 - mixed.data
    return common.zeros_on_diagonal(mixed)


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
    """-> the finished teacher in `folder`, frozen. Raises Problem for a checkpoint that is no
    finished teacher or differs in --data, --arch or --size."""
    path = os.path.join(folder, "last.pt")
    if not os.path.exists(path):
        raise common.Problem(f"no teacher in {folder} (run --stage teacher, or name one "
                             "with --teacher)")
    teacher, state = common.load_encoder(path)
    if state.get("stage") != "teacher" or state["parts"] != 2:
        raise common.Problem(f"{path} is no teacher of mskd.py (name the folder of one; "
                             "that of a run OUT is OUT/teacher)")
    for flag in ("arch", "size", "data"):
        theirs, ours = state[flag], getattr(args, flag)
        if theirs != ours:
            raise common.Problem(f"the teacher {path} has --{flag} {theirs}, not {ours} "
                                 "(use the same, or name another --teacher)")
    epoch, epochs = state["epoch"], state["epochs"]
    if epoch < epochs:
        raise common.Problem(f"the teacher {path} stopped after epoch {epoch} of {epochs} "
                             "(finish it with --stage teacher --resume)")
    teacher.train(args.teacher_bn == "batch")  # D4: or its running statistics
    return teacher.requires_grad_(False)


def main(argv=None):
    args = get_args(argv)
    teacher = args.teacher or os.path.join(args.first_stage, "teacher")  # D2: a folder of its own

    # ==== first stage: the teacher, from the noisy labels of its own clusters
    if args.stage != "student" and not args.teacher:
        scores = train_stage(args, "teacher", teacher)

    # ==== second stage: the student, guided by the finished teacher
    if args.stage != "teacher":
        scores = train_stage(args, "student", args.out, teacher)
    return scores


def train_stage(args, stage, out, teacher_folder=None):
    """Train one stage and write it to `out` -> the scores of its last evaluation."""
    device = common.pick_device(args.device)
    args.precision = common.precision(device, args.precision)
    args = copy.copy(args)
    args.stage = stage  # for the checkpoint
    free = STUDENT_FLAGS if stage == "teacher" else ()
    log = common.Log(out, device, args, free=free)
    if log.finished:
        return log.finished["scores"]
    teacher = None
    if teacher_folder:
        teacher = load_teacher(teacher_folder, args).on(device, args)
    generator = common.seed_everything(args.seed)  # both stages start from the same network

    # ---- 0 data, network, optimiser
    train, images, test_set = common.read_data(args, device)
    cams, from_scratch = train.cams, args.weights == "none"
    jitter = .5 if from_scratch else 0  # W: not in the paper
    K = args.num_instances  # images of each of P clusters
    P = args.batch_size // K
    model = common.Encoder(args.arch, args.weights, parts=2, pooling="gem").on(device, args)
    if model.parts != 2:  # after an edit of the line above: fail here, not after the warm-up
        raise common.Problem("mixed_distance, the losses of train_stage and load_teacher "
                             "are written for three views (edit them together)")
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

    extra = 1 if teacher else 0  # N1: the student's first round, which its epochs follow
    rounds = extra + args.epochs
    start = extra + resumed["epoch"] if resumed else 0
    for r in range(start, rounds):
        first_round, epoch = r < extra, r + 1 - extra
        iters = args.iters * (2 if first_round else 1)
        title = "first round" if first_round else f"epoch {epoch}/{args.epochs}"

        # ---- 1 features of three views: global, upper half, lower half
        network = teacher if first_round else model
        features = common.extract_features(network, images)                       # (3, N, D)

        fallback = labels if args.on_collapse == "skip" else None

        # ---- 2 pseudo labels: dense groups of images that share neighbours, views averaged
        to_cluster = features                                                     # (3, N, D)
        if args.centre:  # W: not in the paper
            to_cluster = common.centre_cameras(features, cams)
        if args.true_ids:
            labels = common.renumber(train.pids)                                  # (N,)
        else:
            distance = mixed_distance(to_cluster, args.k1, args.l1)
            labels = common.dbscan(distance, args.eps, at_least=P, instead=fallback)

        # ---- 4 memories: what an image is compared with, from step 1 (not centred, like a batch's)
        memory = common.cluster_means(features, labels)                           # (3, C, D)
        cluster_of = torch.from_numpy(labels).to(device)                          # (N,)
        del features, to_cluster  # N x D values, whose memory the steps need

        # ---- 5 batches of P clusters x K images
        model.train()
        loss_means = common.Means()
        batches = common.pk_batches(labels, cams, P, K, iters, generator)
        for step, index in log.steps(batches, title, iters):
            # 5a features of augmented images, in --bn-splits chunks as if on that many GPUs
            batch = common.take(images, index, device)                            # (B, 3, H, W)
            batch = common.augment(batch, generator, jitter=jitter)
            f = common.forward(model, batch, args.bn_splits)                      # (3, B, D)
            index = common.send(index, device)
            k = cluster_of[index]                                                 # (B,)
            D_g = D_u = D_d = 0

            # 5b similarity to clusters, whose labels are noisy
            L_g, L_u, L_d = view_losses(f, memory, k, args.temp)

            # 5c the target: the teacher's features of the same images, less affected by the noise
            if teacher and args.mu:
                t = common.forward(teacher, batch, args.bn_splits)                # (3, B, D)
                D_g, D_u, D_d = distillation_losses(f, t)

            # 5f total loss, step
            loss = (1 - args.l2) * (L_g + args.mu * D_g)
            loss = loss + args.l2 * (L_u + args.mu * D_u)
            loss = loss + args.l2 * (L_d + args.mu * D_d)
            lr = common.learning_rate(args, r + step / iters, rounds)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            common.average_gradients(optimizer)  # of several GPUs; does nothing on one
            scaler.step(optimizer)  # in fp16, a step whose gradients overflow is skipped
            scaler.update()

            # 5g momentum update of the memories, so that they keep up with the network
            if not first_round:
                for v in range(len(memory)):
                    common.update_memory(memory[v], f[v], k, args.momentum, K)
            loss_means.add(L_g=L_g, L_u=L_u, L_d=L_d, D_g=D_g, D_u=D_u, D_d=D_d)

        # ---- 6 report, evaluate, save; the last epoch is the result D1
        losses = loss_means.values(epoch)
        quality = common.label_quality(labels, train.pids)
        due = epoch % args.eval_every == 0 or epoch == args.epochs
        scores = common.test(model, test_set) if due else {}
        log.epoch(title, quality, losses, scores, epoch=epoch, keep=dict(state, labels=labels))
    return log.finish(scores, train, labels)


if __name__ == "__main__":
    common.run(main)
