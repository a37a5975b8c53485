"""The own functions of ccsd.py against loops in float64, written from shared notation."""

import os

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from conftest import same_loss, short

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
    once = labels.copy()  # one round, image by image
    groups, parent, camera, _ = ccsd.split_by_camera(labels, cams)
    means = common.cluster_means(features, groups)
    for i in np.flatnonzero(labels >= 0):
        mine = [g for g in range(len(parent)) if camera[g] == cams[i]]
        once[i] = parent[max(mine, key=lambda g: (features[i] @ means[g]).item())]
    assert (ccsd.reassign(labels, cams, features, 1) == common.renumber(once)).all()


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


def test_intra_camera_loss(case):
    group, camera = tensors(case["groups"][case["batch"]], case["camera"])
    similar = case["features"][case["batch"]] @ case["means"].T

    def looped(s):
        total = 0
        for row, g in zip(s / TEMP, group):
            own = [row[h] for h in range(len(camera)) if camera[h] == camera[g]]
            total -= torch.log(row[g].exp() / sum(x.exp() for x in own))
        return total / len(s)
    same_loss("L_intra, cross-entropy over the groups of the image's own camera",
              lambda s: ccsd.intra_camera_loss(s, group, camera, TEMP), looped, similar)


@pytest.mark.parametrize("negatives", [1, 3, 50])
def test_cross_camera_loss(case, negatives):
    group, parent = tensors(case["groups"][case["batch"]], case["parent"])
    similar = case["features"][case["batch"]] @ case["means"].T

    def looped(s):
        losses = []
        for row, g in zip(s / TEMP, group):
            positive = [row[h] for h in range(len(parent)) if parent[h] == parent[g] and h != g]
            wrong = sorted((row[h] for h in range(len(parent)) if parent[h] != parent[g]),
                           key=lambda x: -x.item())[:negatives]
            if positive:
                total = sum(x.exp() for x in positive + wrong)
                losses.append(-sum(torch.log(x.exp() / total) for x in positive) / len(positive))
        assert len(losses) < len(s)                                # cluster 3 has one camera only
        return sum(losses) / len(losses)
    same_loss("L_cross, the cluster's groups in other cameras against the hardest of others",
              lambda s: ccsd.cross_camera_loss(s, group, parent, TEMP, negatives), looped, similar)


def test_distillation_loss(case):
    group, parent, camera, table = tensors(case["groups"][case["batch"]], case["parent"],
                                           case["camera"], case["table"])
    similar = case["features"][case["batch"]] @ case["means"].T

    def looped(s):
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

    def distil(s):
        return ccsd.distillation_loss(s, group, parent, camera, table, TEMP)
    student = similar.clone().requires_grad_()
    grad, = torch.autograd.grad(distil(student), student)
    assert (grad[camera == camera[group][:, None]] == 0).all(), (
        "a gradient reaches the teacher: L_kd changes an image's similarities in its own camera")
    same_loss("L_kd, KL(teacher || student) over the clusters that both cameras see", distil,
              looped, similar)


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


def test_terms_agree_when_cameras_agree():
    """If every camera's groups look the same, teacher and student say the same: L_kd is 0."""
    table = torch.arange(8).view(4, 2)
    similar = torch.rand(6, 4).repeat_interleave(2, 1)
    camera, parent = torch.tensor([0, 1] * 4), torch.arange(4).repeat_interleave(2)
    group = torch.randint(0, 8, (6,))
    assert ccsd.distillation_loss(similar, group, parent, camera, table, TEMP).abs() < 1e-6


def test_weights_of_the_terms_and_learning_rate(tiny, tmp_path, monkeypatch, watch,
                                                after_each_step):
    monkeypatch.setattr(ccsd, "GROUP_START", 1)                    # L_cross and L_kd: 1 epoch less
    monkeypatch.setattr(common, "warm_up", lambda *args: None)
    terms, rates = [watch(ccsd, f"{name}_loss") for name in
                    ("intra_camera", "cross_camera", "distillation")], []
    after_each_step.append(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    ccsd.main(short(tiny, tmp_path, "--intra", "3", "--cross", "5", "--kd", "7", "--lr", "1e-3",
                    "--lr-drop", "0", "--epochs", "4", "--true-ids"))
    grads = [[loss.grad.item() for _, loss in calls] for calls in terms]
    assert grads == [[3] * 8, [5] * 6, [7] * 6], (
        "not L_base + 3 L_intra in all epochs and 5 L_cross + 7 L_kd from the second on")
    np.testing.assert_allclose(rates, .5e-3 + .5e-3 * np.cos(np.pi * np.arange(8) / 8))


def test_settings_and_flags():
    toy, market = ccsd.get_args([]), ccsd.get_args(["--data", "market1501"])
    assert (toy.arch, toy.weights, toy.out) == (
        "small", "none", os.path.join("runs", "ccsd-toy-s0"))
    assert (market.arch, market.batch_size, market.num_instances, market.iters, market.epochs,
            market.lr, market.eps, market.k1, market.bn_splits, market.temp, market.momentum) == (
        "resnet50", 256, 16, 200, 50, 3.5e-4, .6, 30, 4, .05, .1)  # the published settings
    assert ccsd.get_args(["--data", "msmt17"]).iters == 400
    assert ccsd.get_args(["--data", "some/folder", "--seed", "3"]).out.endswith("ccsd-folder-s3")
    assert ccsd.get_args(["--data", "market1501", "--eps", ".5"]).eps == .5
    for data in common.DATASETS:
        assert None not in vars(ccsd.get_args(["--data", data])).values()
