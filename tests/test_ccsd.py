"""The own functions of ccsd.py against loops in float64, written from shared notation."""

import os

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from conftest import (change_clusters, check_end, check_features, check_forward, check_line,
                      check_scaler, check_seed, check_start, check_step, check_view, close,
                      collapse, double, learning, rate, same_loss, short, spelled, stop_after,
                      the_next)

import ccsd
import common

TEMP = .07


@pytest.fixture
def case():
    """40 images, 5 clusters, 4 cameras; cluster 3 is seen by camera 0 only, 4 by 1 and 2 only."""
    rng = np.random.default_rng(0)
    labels, cams = rng.integers(0, 5, 40), rng.integers(0, 3, 40)
    cams[labels == 3] = 0
    cams[(labels == 4) & (cams == 0)] = 1
    cams[np.flatnonzero(labels == 0)[-1]] = 3                      # camera 3 sees cluster 0 only
    labels[:4] = -1
    groups, parent, camera, table = ccsd.split_by_camera(labels, cams)
    torch.manual_seed(0)
    features = F.normalize(torch.randn(40, 8, dtype=torch.float64))
    means = common.cluster_means(features, groups)
    batch = np.flatnonzero(labels >= 0)[:24]
    return dict(labels=labels, cams=cams, groups=groups, parent=parent, camera=camera, table=table,
                features=features, means=means, batch=batch)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def test_split_by_camera(case):
    groups, labels, cams = case["groups"], case["labels"], case["cams"]
    wanted = sorted({(k, v) for k, v in zip(labels.tolist(), cams.tolist()) if k >= 0})
    assert list(zip(case["parent"].tolist(), case["camera"].tolist())) == wanted
    for i in range(40):
        assert groups[i] == (wanted.index((labels[i], cams[i])) if labels[i] >= 0 else -1)
    for k in range(5):
        for v in range(4):
            assert case["table"][k, v] == (wanted.index((k, v)) if (k, v) in wanted else -1)


def blobs():
    """Two people, two cameras; one image of person 0 in camera 1 was put into cluster 1."""
    centre = {(0, 0): [1, 0, 0], (1, 0): [0, 1, 0], (0, 1): [.7, 0, .7], (1, 1): [0, .7, .7]}
    who, cams = np.repeat([0, 1, 0, 1], 6), np.repeat([0, 0, 1, 1], 6)
    rng = np.random.default_rng(0)
    features = F.normalize(torch.tensor(np.array([centre[w, c] for w, c in zip(who, cams)])
                                        + .05 * rng.normal(size=(24, 3))).float())
    labels = who.copy()
    labels[12] = 1
    return features, who, cams, labels


def test_reassign_repairs_a_wrong_image_and_leaves_outliers():
    features, who, cams, labels = blobs()
    labels[3] = -1
    fixed = ccsd.reassign(labels, cams, features)
    assert fixed[3] == -1 and (np.delete(fixed, 3) == np.delete(who, 3)).all()


def plain_reassign(labels, cams, features):
    """One round of N1: every image moves to the cluster whose mean in its camera is nearest."""
    means = {(k, v): F.normalize(features[(labels == k) & (cams == v)].sum(0), dim=0)
             for k, v in zip(labels.tolist(), cams.tolist()) if k >= 0}
    nearest = [max((k for k, w in means if w == v), key=lambda k: (f @ means[k, v]).item())
               for f, v in zip(features, cams.tolist())]
    return np.where(labels >= 0, nearest, -1)


def test_reassign_never_gets_less_compact():
    rng = np.random.default_rng(1)
    features = F.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    cams, labels = rng.integers(0, 3, 200), rng.integers(-1, 8, 200)

    def compactness(labels):
        groups, *_ = ccsd.split_by_camera(labels, cams)
        means = common.cluster_means(features, groups)
        return sum((features[i] @ means[groups[i]]).item() for i in range(200) if groups[i] >= 0)
    before = compactness(labels)
    for rounds in range(1, 6):
        after = compactness(ccsd.reassign(labels, cams, features, rounds))
        assert after >= before - 1e-4
        before = after
    moved = labels
    for rounds in range(1, 21):
        moved = plain_reassign(moved, cams, features)
        if rounds in (1, 20):
            assert (ccsd.reassign(labels, cams, features, rounds) == common.renumber(moved)).all()
    assert (ccsd.reassign(labels, cams, features) == common.renumber(moved)).all()


def test_reassign_leaves_no_gap_where_a_cluster_loses_all_images():
    angle = torch.tensor([.3, .31, .3, -.3, -.3, -.31])
    features, cams = torch.stack([angle.cos(), angle.sin()], 1), np.zeros(6, int)
    labels = ccsd.reassign(np.array([0, 0, 1, 1, 2, 2]), cams, features)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_recluster_drops_the_loose_image_and_keeps_the_parent():
    features, who, cams, labels = blobs()
    distance = common.jaccard_distance(features, 6, 2)
    dense = slow.dense(distance)
    new = ccsd.recluster(labels, cams, distance, .4)
    groups, *_ = ccsd.split_by_camera(labels, cams)
    for i in range(24):
        close = [j for j in range(24) if groups[j] == groups[i] and dense[i, j] <= .4]
        assert (new[i] == -1) == (len(close) < 2)                  # a point counts itself
        assert new[i] in (-1, labels[i])
    assert new[12] == -1
    lonely = np.where((labels == 0) & (cams == 0), 0, -1)          # one group is no collapse
    assert (ccsd.recluster(lonely, cams, distance, .4) == lonely).all()


def plain_intra(s, group, camera):
    total = 0
    for row, g in zip(s / TEMP, group):
        own = [row[h] for h in range(len(camera)) if camera[h] == camera[g]]
        total -= torch.log(row[g].exp() / sum(x.exp() for x in own))
    return total / len(s)


def test_intra_camera_loss(case):
    group, camera = tensors(case["groups"][case["batch"]], case["camera"])
    similar = case["features"][case["batch"]] @ case["means"].T
    same_loss("L_intra, cross-entropy over the groups of the image's own camera",
              lambda s: ccsd.intra_camera_loss(s, group, camera, TEMP),
              lambda s: plain_intra(s, group, camera), similar)


def plain_cross(s, group, parent, negatives):
    losses = []
    for row, g in zip(s / TEMP, group):
        positive = [row[h] for h in range(len(parent)) if parent[h] == parent[g] and h != g]
        wrong = sorted((row[h] for h in range(len(parent)) if parent[h] != parent[g]),
                       key=lambda x: -x.item())[:negatives]
        if positive:
            total = sum(x.exp() for x in positive + wrong)
            losses.append(-sum(torch.log(x.exp() / total) for x in positive) / len(positive))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("negatives", [1, 3, 50])
def test_cross_camera_loss(case, negatives):
    group, parent = tensors(case["groups"][case["batch"]], case["parent"])
    similar = case["features"][case["batch"]] @ case["means"].T
    assert (parent[group] == 3).any()                              # which has one camera only
    same_loss("L_cross, the cluster's groups in other cameras against the hardest of others",
              lambda s: ccsd.cross_camera_loss(s, group, parent, TEMP, negatives),
              lambda s: plain_cross(s, group, parent, negatives), similar)


def test_cross_camera_loss_of_many_groups():
    group, parent = torch.arange(6) * 11, torch.arange(70) // 2
    same_loss("L_cross with the 50 hardest of 68 groups of other clusters",
              lambda s: ccsd.cross_camera_loss(s, group, parent, TEMP),
              lambda s: plain_cross(s, group, parent, 50), double(6, 70).tanh())


def plain_kd(s, group, parent, camera, table):
    losses = []
    for row, g in zip(s, group):
        v, divergences = camera[g], []
        for w in range(table.shape[1]):
            shared = [k for k in range(len(table)) if table[k, v] >= 0 and table[k, w] >= 0]
            if w != v and len(shared) >= 2 and parent[g] in shared:
                p = (row[table[shared, v]].detach() / TEMP).softmax(0)  # teacher: no gradient
                q = (row[table[shared, w]] / TEMP).softmax(0)
                divergences.append((p * (p.log() - q.log())).sum())
        if divergences:
            losses.append(sum(divergences) / len(divergences))
    return sum(losses) / len(losses)


def test_distillation_loss(case):
    group, parent, camera, table = tensors(case["groups"][case["batch"]], case["parent"],
                                           case["camera"], case["table"])
    similar = case["features"][case["batch"]] @ case["means"].T

    def distil(s):
        return ccsd.distillation_loss(s, group, parent, camera, table, TEMP)
    student = similar.clone().requires_grad_()
    grad, = torch.autograd.grad(distil(student), student)
    assert (grad[camera == camera[group][:, None]] == 0).all(), (
        "a gradient reaches the teacher: L_kd changes an image's similarities in its own camera")
    same_loss("L_kd, KL(teacher || student) over the clusters that both cameras see", distil,
              lambda s: plain_kd(s, group, parent, camera, table), similar)


def test_losses_of_images_without_a_counterpart_are_zero():
    """One camera sees everything once: nothing to compare across cameras, and no NaN anywhere."""
    table = torch.tensor([[0, -1], [1, -1], [-1, 2]])
    group, camera = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
    parent = torch.tensor([0, 1, 2])
    similar = torch.rand(3, 3, requires_grad=True)
    loss = (ccsd.cross_camera_loss(similar, group, parent, TEMP)
            + ccsd.distillation_loss(similar, group, parent, camera, table, TEMP))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(similar.grad).all()


# ----------------------------------------------------------------------------- the loop, as a whole
# The epoch of the docstring once more: plain, in float64, an image at a time. FLAGS are chosen so
# that no two mistakes look the same: every weight, temperature and momentum is another number.

FLAGS = dict(refine="split", base=2, intra=3, cross=5, kd=7, temp=.08, momentum=.3, eps=.53, k1=8,
             epochs=4, iters=2, lr=1e-3, lr_drop=0, bn_splits=2, batch_size=12,
             num_instances=3, eval_every=3, seed=5, warm_up=3)
P, K = 4, 3


def plain_labels(features, cams, flags, centred):
    """Steps 1 to 3 -> unrefined labels, labels. features (N, D): those of the network."""
    f = slow.centre(features, cams) if centred else features
    distance = slow.jaccard_distance(f, flags["k1"])
    assert (abs(distance - flags["eps"]) > 5e-5).all()             # rounding decides nothing
    unrefined = labels = slow.dbscan(distance, flags["eps"])
    if flags["refine"] == "reassign":
        unrefined = labels = mix(labels)
        for _ in range(20):
            labels = plain_reassign(labels, cams, f)
    if flags["refine"] == "recluster":
        group = labels * 100 + cams                                # in one group: equal numbers
        distance[group[:, None] != group] = 1
        loose = slow.dbscan(distance, .8 * flags["eps"], min_samples=2) < 0
        labels = np.where(loose, -1, labels)
    kept = sorted(set(labels.tolist()) - {-1})
    return unrefined, np.array([kept.index(k) if k >= 0 else -1 for k in labels])


def plain_memories(features, labels, cams):
    """Step 4 -> a mean per cluster (C, D), the groups (k, v) and a mean of each (G, D)."""
    groups = sorted({(k, v) for k, v in zip(labels.tolist(), cams.tolist()) if k >= 0})
    of_image = np.array([groups.index((k, v)) if k >= 0 else -1
                         for k, v in zip(labels.tolist(), cams.tolist())])
    return slow.means(features, labels), groups, of_image, slow.means(features, of_image)


def plain_terms(f, k, g, clusters, groups, memory, flags, started):
    """5b to 5e -> the terms that are on. f (B, D) float64; k, g (B,); clusters, memory: step 4."""
    similar, terms = f @ memory.T, {}
    parent, camera = (torch.tensor(side) for side in zip(*groups))
    table = torch.full((len(clusters), int(camera.max()) + 1), -1)
    table[parent, camera] = torch.arange(len(groups))
    if flags["base"]:
        terms["base"] = slow.cross_entropy(f @ clusters.T / flags["temp"], k)
    if flags["refine"] == "none":
        return terms
    if flags["intra"]:
        terms["intra"] = plain_intra(similar, g, camera)
    if flags["cross"] and started:
        terms["cross"] = plain_cross(similar, g, parent, 50)
    if flags["kd"] and started:
        terms["kd"] = plain_kd(similar, g, parent, camera, table)
    return terms


RUNS = {  # what differs from FLAGS, further words, and when L_cross and L_kd start
    "reassign, resumed": (dict(refine="reassign"), ["--resume", "--on-collapse", "skip"], 1),
    "recluster": (dict(refine="recluster", lr_drop=3, eps=.59), ["--on-collapse", "skip"], 0),
    "split, collapsed": (dict(base=0, kd=0, epochs=5, eval_every=2, eps=.535),
                         ["--on-collapse", "skip"], 1),
    "no camera, not centred": (dict(refine="none", weights="given", eps=.55, k1=6, seed=6,
                                    epochs=3), [], 0),
    "true ids": (dict(intra=0, cross=0, epochs=2, lr_drop=1), ["--quick", "--true-ids"], 0)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_docstring(name, tiny, tmp_path, monkeypatch, two_layers, story,
                                         watch):
    """Every step of whole runs: what it starts from, its loss, all gradients, memories, Adam, log.
    """
    change, more, starts = RUNS[name]
    flags = {**FLAGS, **change}
    argv = short(tiny, tmp_path, *spelled(flags), *more)
    refined = watch(ccsd, "reassign")
    if name == "split, collapsed":
        change_clusters(collapse({1, 3}), monkeypatch)
    if name == "recluster":
        monkeypatch.setattr(ccsd, "GROUP_START", 0)                # less than a quarter of the run
        change_clusters(collapse({2}), monkeypatch)
    if name == "reassign, resumed":
        change_clusters(lambda n, labels: collapse({2})(n, mix(labels)), monkeypatch)
        stop_after(2, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            ccsd.main(argv)
    result = ccsd.main(argv)
    assert len(refined) == 3 * (name == "reassign, resumed"), "labels are refined a second time"
    check_end(tmp_path)
    assert ccsd.main(argv) == result                               # nothing to do: tells nothing
    follow(story, flags, more, starts, tiny, result)


def mix(labels):
    """Move every seventh image to another cluster."""
    labels = labels.copy()
    seventh = np.flatnonzero(labels >= 0)[::7]
    labels[seventh] = (labels[seventh] + 1) % (labels.max() + 1)
    return labels


def follow(told, flags, more, starts, folder, result):
    train = common.load(str(folder))[0]
    images, cams, iters = common.read_images(train, 64, 32), train.cams, flags["iters"]
    skip, random = "skip" in more, "weights" not in flags
    labels, moments, trained, draws = None, {}, {}, None
    check_start(told, {**flags, "quick": "--quick" in more}, images, cams)
    for epoch in range(flags["epochs"]):
        if "--resume" in more and epoch == 2:
            check_seed(told, flags)

        # 1 to 4
        features = check_features(told, images, trained)[0]
        last = labels
        if "--true-ids" in more:
            unrefined = labels = train.pids - 1
        else:
            clustered = the_next(told, "dbscan", "step 2: DBSCAN")
            assert clustered.at_least == P, "a batch needs P clusters"
            if not skip:
                assert clustered.instead is None, "--on-collapse stop goes on with old labels"
            if skip and last is not None and clustered.result is clustered.objects["instead"]:
                unrefined = labels
            else:
                unrefined, labels = plain_labels(features, cams, flags, random)
                assert flags["refine"][:2] != "re" or (labels != unrefined).any()
                if flags["refine"] == "recluster":
                    the_next(told, "dbscan", "step 3: DBSCAN within each group")
            assert (clustered.result == unrefined).all(), (
                "step 2: other labels than DBSCAN on the Jaccard distance of the "
                + ("centred " * random) + "features")
        clusters, groups, of_image, memory = plain_memories(features, labels, cams)
        assert len(groups) > len(clusters) or not random           # memories of different sizes
        drawn = the_next(told, "pk_batches", "step 5 draws batches")
        assert (drawn.labels == labels).all(), (
            f"batches are not drawn by the labels of step 3 ({flags['refine']})")
        assert (drawn.cams == cams).all() and (drawn.p, drawn.k, drawn.iters) == (P, K, iters), (
            "not P clusters x K images, or another number of batches")
        assert draws is None or torch.equal(drawn.generator, draws), "random numbers start anew"

        # 5
        means = {}
        for step in range(iters):
            index = the_next(told, "index", "a batch is drawn").index
            view = check_view(told, index, images, random)
            ran = check_forward(told, view, flags["bn_splits"])
            net, k, g = ran.model.double(), *tensors(labels[index], of_image[index])
            f = slow.encode(net, view, flags["bn_splits"])[2][0]
            terms = plain_terms(f, k, g, clusters, groups, memory, flags, epoch >= starts)
            total = sum(flags[name] * term for name, term in terms.items())
            for name, term in terms.items():
                assert abs(term.item()) > 1e-3
                means[name] = means.get(name, 0) + term.item() / iters
            loss = the_next(told, "loss", "5f: the total loss")
            assert loss.value.item() == pytest.approx(total.item(), rel=1e-3), (
                "5f: another total loss than L_base + L_intra + a L_cross + b L_kd, weighted")
            stepped = the_next(told, "step", "5f: a step of the optimiser")
            check_step(stepped, learning(ran, net, total), moments,
                       rate(flags, epoch, flags["epochs"], step, iters))
            f = f.detach()
            clusters = slow.update_memory(clusters, f, k, flags["momentum"])
            updated = [the_next(told, "update_memory", "5g: memories")]
            if flags["refine"] != "none":
                memory = slow.update_memory(memory, f, g, .2)
                updated.append(the_next(told, "update_memory", "5g: two memories"))
            for update in updated:
                wanted = clusters if len(update.memory) == len(clusters) else memory
                close(update.after["memory"].double(), wanted, "5g: another memory than mu m + "
                      "(1 - mu) f of the batch", atol=1e-4, rtol=0)

        # 6
        trained = {name: stepped.after[id(p)]
                   for name, p in ran.objects["model"].named_parameters()}
        line = check_line(told, flags, epoch, trained, labels, means)
        assert line.title == f"epoch {epoch + 1}/{flags['epochs']}"
        assert line.quality == common.label_quality(labels, train.pids), "quality of other labels"
        assert line.more["unrefined_ARI"] == common.label_quality(unrefined, train.pids)["ARI"]
        draws = line.keep["generator"]
    assert not told, f"more happens: {told[0].kind}"
    assert result == line.scores and len(result) == 5


def test_fp16_is_scaled(tiny, tmp_path, monkeypatch, two_layers, story):
    argv = short(tiny, tmp_path, *spelled(FLAGS), "--precision", "fp16")
    check_scaler(story, lambda: ccsd.main(argv), monkeypatch)


def test_settings_and_flags():
    toy, market = ccsd.get_args([]), ccsd.get_args(["--data", "market1501"])
    assert (toy.arch, toy.weights, toy.out) == (
        "small", "none", os.path.join("runs", "ccsd-toy-s0"))
    assert (market.arch, market.batch_size, market.num_instances, market.iters, market.epochs,
            market.lr, market.eps, market.k1, market.bn_splits, market.temp, market.momentum) == (
        "resnet50", 256, 16, 200, 50, 3.5e-4, .6, 30, 4, .05, .1)  # the published settings
    assert ccsd.get_args(["--data", "msmt17"]).iters == 400 and ccsd.GROUP_START == 5
    assert ccsd.get_args(["--data", "some/folder", "--seed", "3"]).out.endswith("ccsd-folder-s3")
    assert ccsd.get_args(["--data", "market1501", "--eps", ".5"]).eps == .5
    for data in common.DATASETS:
        assert None not in vars(ccsd.get_args(["--data", data])).values()
