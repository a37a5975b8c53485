"""Every shared step against a slow, obvious second version, or a value worked out by hand."""

import argparse
import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN
from torch import nn

import common


def unit(n, d=16, seed=0, spread=.5, people=8):
    """n unit features around a few centres."""
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(people, d, generator=g))
    return F.normalize(centres[torch.arange(n) % people]
                       + spread * torch.randn(n, d, generator=g) / d ** .5)


def quantised(n, seed=0):
    """n unit features whose products are exact multiples of 1/4: many true ties, no rounding."""
    rng = np.random.default_rng(seed)
    features = np.zeros((n, 6), np.float32)
    for row in features:
        row[rng.permutation(6)[:4]] = rng.choice([-.5, .5], 4)
    return torch.from_numpy(features)


# ------------------------------------------------------------------------------------------ network

def kept_bytes(forward):
    """-> bytes of the tensors that autograd keeps for the backward pass of forward()."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


@pytest.mark.parametrize("arch", ["small", "resnet18-layer3"])
def test_recompute_is_the_same_to_the_bit_in_less_memory(arch):
    models, images = [], torch.randn(4, 3, 64, 32)
    for recompute in (False, True):
        torch.manual_seed(0)
        model = common.Encoder(arch, "none")
        model.recompute = recompute
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(2):
            chunks = [model(chunk) for chunk in images.chunk(2)]
            torch.cat(chunks).square()[:, 0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[key], b[key]) for key in a)           # running statistics, too
    plain, less = (kept_bytes(lambda: model(images)) for model in models)
    assert less < plain / 5


def test_bf16_is_close_and_gives_float32():
    torch.manual_seed(0)
    model, images = common.Encoder("resnet18-layer3", "none").eval(), torch.randn(4, 3, 64, 32)
    exact = model(images)
    model.on(torch.device("cpu"), argparse.Namespace(bf16=True, fp32=False, recompute=False))
    rough = model(images)
    assert rough.dtype == torch.float32 and model.backbone[0].weight.dtype == torch.float32
    assert not torch.equal(rough, exact) and (rough * exact).sum(1).min() > .99
    model.on(torch.device("cpu"), argparse.Namespace(bf16=False, fp32=False, recompute=True))
    assert torch.equal(model(images), exact) and model.recompute


def test_gem_is_the_generalised_mean():
    x = torch.rand(2, 3, 4, 5)
    pool = common.GeM()
    np.testing.assert_allclose(pool(x).detach(), (x ** 3).mean((2, 3)) ** (1 / 3), rtol=1e-5)
    pool.p.data.fill_(1)
    np.testing.assert_allclose(pool(x).detach(), x.mean((2, 3)), rtol=1e-5)
    pool(x).sum().backward()
    assert pool.p.grad is not None                                 # p is learned


def test_instance_batch_norm():
    x = torch.randn(6, 5, 4, 3) * 3 + 1
    y = common.InstanceBatchNorm(5)(x)
    a, b = x[:, :2], x[:, 2:]
    one = (a - a.mean((2, 3), True)) / (a.var((2, 3), False, True) + 1e-5).sqrt()
    two = (b - b.mean((0, 2, 3), True)) / (b.var((0, 2, 3), False, True) + 1e-5).sqrt()
    torch.testing.assert_close(y, torch.cat([one, two], 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch, width", [("small", 256), ("resnet18", 512),
                                         ("resnet18-layer3", 256), ("resnet34", 512),
                                         ("resnet50", 2048)])
def test_encoder(arch, width):
    model = common.Encoder(arch, "none").eval()
    x = torch.randn(2, 3, 64, 32)
    assert model.backbone(x).shape == (2, width, 4, 2)             # stride 16, not 32
    torch.testing.assert_close(model(x).norm(dim=1), torch.ones(2))
    assert not model.necks[0].bias.requires_grad and model.necks[0].weight.requires_grad


def test_encoder_parts_see_their_stripe_only():
    model = common.Encoder("small", "none", parts=2).eval()
    whole, upper, lower = model(torch.randn(3, 3, 64, 32))
    last = torch.randn(3, 256, 4, 2)
    model.backbone = nn.Identity()
    out = model(last)
    assert out.shape == (3, 3, 256)
    changed = last.clone()
    changed[:, :, 2:] += 1                                         # the lower half of the map
    again = model(changed)
    assert not torch.equal(again[0], out[0]) and torch.equal(again[1], out[1])
    assert not torch.equal(again[2], out[2])
    with pytest.raises(common.Problem, match="multiple of 32"):
        model(torch.randn(3, 256, 3, 2))


def test_encoder_pooling_avg():
    model = common.Encoder("small", "none", pooling="avg").eval()
    x = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model(x),
                               F.normalize(model.necks[0](model.backbone(x).mean((2, 3)))))


def test_encoder_equals_torchvision_but_for_the_last_stride():
    import torchvision
    net = torchvision.models.resnet18()
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    path_free = {k: v for k, v in net.state_dict().items()}
    model = common.Encoder("resnet18", "none").eval()
    model.backbone.load_state_dict({k: v for k, v in path_free.items() if not k.startswith("fc")})
    net.fc, net.avgpool = nn.Identity(), nn.Identity()
    x = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model.backbone(x).flatten(1), net.eval()(x))


def test_weights_from_a_file(tmp_path):
    import torchvision
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "r18.pth")
    model = common.Encoder("resnet18", str(tmp_path / "r18.pth"))
    torch.testing.assert_close(model.backbone.conv1.weight, state["conv1.weight"])
    part = common.Encoder("resnet18-layer3", str(tmp_path / "r18.pth"))
    torch.testing.assert_close(part.backbone.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    with pytest.raises(common.Problem, match="--arch resnet50"):
        common.Encoder("resnet50", str(tmp_path / "r18.pth"))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(common.Problem, match="also has layer1.2.conv1.weight"):
        common.Encoder("resnet18", str(tmp_path / "r34.pth"))
    for junk in (torch.zeros(3), None, ["conv1.weight"], dict(state, **{"conv1.weight": None})):
        torch.save(junk, tmp_path / "junk.pth")
        with pytest.raises(common.Problem, match="junk.pth"):
            common.Encoder("resnet18", str(tmp_path / "junk.pth"))
    torch.save({k: v for k, v in state.items() if "layer4" not in k}, tmp_path / "cut.pth")
    with pytest.raises(common.Problem, match="layer4.0.conv1.weight"):
        common.Encoder("resnet18", str(tmp_path / "cut.pth"))
    with pytest.raises(common.Problem, match="nothing.pth"):
        common.Encoder("resnet18", str(tmp_path / "nothing.pth"))
    with pytest.raises(common.Problem, match="no ImageNet weights"):
        common.Encoder("small", "imagenet")


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def offline(url, **_):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    # V1's name
    with pytest.raises(common.Problem, match=f"{tmp_path}.checkpoints.resnet50-0676ba61.pth"):
        common.Encoder("resnet50", "imagenet")


@pytest.mark.parametrize("parts", [0, 2])
def test_warm_up_loss_ignores_other_cameras(parts):
    """One step of warm_up equals one step on the loss written as a double loop."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.parts = nn.Linear(3 * 8 * 4, 5 * (1 + parts)), parts

        def forward(self, x):
            views = F.normalize(self.f(x.flatten(1)).view(len(x), 1 + parts, 5), dim=2)
            return views.transpose(0, 1) if parts else views[:, 0]
    torch.manual_seed(0)
    model, twin = Net().double(), Net().double()
    twin.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (6, 3, 8, 4), dtype=torch.uint8)
    cams = np.array([0, 0, 0, 1, 1, 2])
    augment, seen = common.augment, []

    def spy(*args, **kwargs):
        seen.append(augment(*args, **kwargs).double())
        return seen[-1]
    common.augment = spy
    try:
        g = torch.Generator().manual_seed(0)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        common.warm_up(model, images, cams, g, epochs=1, lr=.01)
    finally:
        common.augment = augment
    views, c = twin(torch.cat(seen)), np.tile(cams[order], 2)
    loss = 0
    for f in views if parts else [views]:
        for i in range(12):
            rivals = [torch.exp(f[i] @ f[j] / .1) for j in range(12) if j != i and c[j] == c[i]]
            loss -= torch.log(torch.exp(f[i] @ f[(i + 6) % 12] / .1) / sum(rivals)) / 12
    optimizer = torch.optim.Adam(twin.parameters(), .01)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.f.weight, twin.f.weight)


# --------------------------------------------------------------------------- features and distances

def test_extract_features_is_eval_mode_and_restores_the_mode():
    model = common.Encoder("small", "none").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randint(0, 256, (11, 3, 32, 16), dtype=torch.uint8)
    features = common.extract_features(model, images, batch_size=4)
    assert model.training and not features.requires_grad and features.shape == (11, 256)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(features, model.eval()(common.normalise(images)))
    common.extract_features(model, images)
    assert not model.training
    model = common.Encoder("small", "none", parts=2)
    assert common.extract_features(model, images, batch_size=4).shape == (3, 11, 256)


def test_centre_cameras():
    features, cams = unit(20), np.arange(20) % 3
    out = common.centre_cameras(features, cams)
    for i in range(20):
        mean = features[[j for j in range(20) if cams[j] == cams[i]]].mean(0)
        torch.testing.assert_close(out[i], F.normalize(features[i] - mean, dim=0))


def dense_jaccard(features, k1, k2):
    """The definition, image by image in float64."""
    f = features.double().numpy()
    n, similar = len(f), f @ f.T
    rank = [sorted(range(n), key=lambda j: (j != i, -similar[i, j], j))[:k1] for i in range(n)]

    def reciprocal(i, k):
        return {j for j in rank[i][:k + 1] if i in rank[j][:k + 1]}
    v = np.zeros((n, n))
    for i in range(n):
        wide = reciprocal(i, k1)
        grown = set(wide)
        for c in wide:
            close = reciprocal(c, round(k1 / 2))
            if len(close & wide) > 2 / 3 * len(close):
                grown |= close
        members = sorted(grown)
        weight = np.exp(-(2 - 2 * similar[i, members]))
        v[i, members] = weight / weight.sum()
    v = np.array([v[rank[i][:k2]].mean(0) for i in range(n)])
    shared = np.array([[np.minimum(v[i], v[j]).sum() for j in range(n)] for i in range(n)])
    return (1 - shared / (2 - shared)).clip(0)


def densify(sparse):
    out = np.ones(sparse.shape)
    rows = np.repeat(np.arange(sparse.shape[0]), np.diff(sparse.indptr))
    out[rows, sparse.indices] = sparse.data
    return out


CASES = {
    "people": (unit(60), 10, 3), "k2 = 1": (unit(60), 10, 1), "N < k1": (unit(9), 30, 6),
    "N < k2": (unit(4), 30, 6), "odd k1": (unit(50, seed=2), 7, 2),
    "half of k1 rounds to even": (unit(50, seed=3), 5, 6),
    "duplicates": (unit(20)[torch.arange(60) % 20], 10, 6), "ties": (quantised(70), 12, 6),
    "all equal": (torch.ones(30, 4) / 2, 10, 6), "wide": (unit(80, spread=3), 20, 6),
    "one image": (unit(1), 30, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_jaccard_distance_and_dbscan_equal_the_dense_definition(case):
    features, k1, k2 = CASES[case]
    if case == "duplicates":
        features = quantised(20)[torch.arange(60) % 20]  # exact ties, whatever the rounding
    distance = common.jaccard_distance(features, k1, k2)
    expected = dense_jaccard(features, k1, k2)
    np.testing.assert_allclose(densify(distance), expected, atol=1e-5)
    assert (distance.dtype == np.float32
            and np.isin(np.arange(len(features)), distance.indices).all())
    for eps in (.3, .45, .5, .6, 2 / 3):
        dense = DBSCAN(eps=eps + 1e-5, min_samples=4, metric="precomputed").fit(expected).labels_
        if dense.max() < 1:
            with pytest.raises(common.Problem, match=f"at eps {eps:.4g}"):
                common.dbscan(distance, eps)
        else:
            np.testing.assert_array_equal(common.dbscan(distance, eps), dense)


def test_jaccard_distance_does_not_depend_on_blocks_and_can_be_cut():
    features = unit(300, people=20, spread=1.5)
    rank = common.nearest(features, 20)
    assert (common.nearest(features, 20, block=7) == rank).all()
    whole = common.jaccard_distance(features, 20)
    cut = common.jaccard_distance(features, 20, max_distance=.5)
    expected = densify(whole)
    expected[expected > .5] = 1
    np.testing.assert_array_equal(densify(cut), expected)
    assert cut.nnz < whole.nnz < 300 ** 2                          # sparse, and the cut is sparser
    v = common.reciprocal_vectors(features, rank, 20, 6, lambda cosine, _: np.exp(2 * cosine - 2))
    np.testing.assert_allclose(v.sum(1), 1, rtol=1e-5)
    dense = v.toarray()
    blocks = [part.toarray() for part in common.overlaps(v[:50], v, block=16)]
    assert [len(part) for part in blocks] == [16, 16, 16, 2]
    brute = np.array([[np.minimum(a, b).sum() for b in dense] for a in dense[:50]])
    np.testing.assert_allclose(np.concatenate(blocks), brute, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 30.])
def test_nearest_from_rounded_features_is_exact(scale, monkeypatch):
    """bfloat16 chooses candidates; what it could have missed is searched again. Against float64."""
    exact, again = common._nearest_exact, []
    monkeypatch.setattr(common, "_nearest_exact", lambda features, rows, k: (
        again.extend(rows.tolist()), exact(features, rows, k))[1])
    monkeypatch.setattr(common, "_bf16_pays", lambda features: True)
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 64, generator=g)
    spread = torch.linspace(.02, 1, 300)[:, None] * torch.randn(300, 64, generator=g)
    spread[150:250] = .05 * torch.randn(100, 64, generator=g) + centres[0] - centres[
        torch.arange(150, 250) % 12]                               # closer than bf16 can tell
    features = scale * torch.nn.functional.normalize(centres[torch.arange(300) % 12] + spread)
    features[100:120] = features[7]                                # duplicates
    for k in (5, 30, 149):
        again.clear()
        found = common.nearest(features, k, block=64)
        similar = (features.double() @ features.double().T).numpy()
        np.fill_diagonal(similar, np.inf)
        wanted = -np.sort(-similar, 1)[:, :k]
        np.testing.assert_allclose(np.take_along_axis(similar, found, 1), wanted,
                                   atol=1e-5 * scale ** 2)
        assert (found[:, 0] == np.arange(300)).all()
        assert all(len(set(row)) == k for row in found.tolist())
        assert len(set(again)) < 300
        if k == 5:                                                 # duplicates: too close to call
            assert set(again) >= {7, *range(100, 120)}
            assert (found[110] == [110, 7, 100, 101, 102]).all()
    common.nearest(features, 150)                                  # no candidates left to choose
    assert sorted(again[-300:]) == list(range(300))


def test_nearest_breaks_ties_by_index_and_puts_the_image_first():
    features = quantised(60, seed=1)[torch.arange(120) % 60]       # each image twice
    similar = (features.double() @ features.double().T).numpy()
    for k in (1, 2, 5, 30, 119, 120, 500):
        expected = [sorted(range(120), key=lambda j: (j != i, -similar[i, j], j))[:k]
                    for i in range(120)]
        np.testing.assert_array_equal(common.nearest(features, k), expected)


def test_jaccard_distance_refuses_what_is_not_finite():
    features = unit(10)
    features[3, 2] = math.nan
    with pytest.raises(common.Problem, match="--lr"):
        common.jaccard_distance(features)


def test_dbscan_keeps_explicit_zeros_and_counts_the_point_itself():
    rows = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    columns = np.array([0, 1, 2, 3, 4, 5, 1, 0, 3, 2])
    zeros = csr_array((np.zeros(10, np.float32), (rows, columns)), (6, 6))
    assert common.dbscan(zeros, .5, min_samples=2).tolist() == [0, 0, 1, 1, -1, -1]
    with pytest.raises(common.Problem,
                       match="0 clusters and 6 outliers among 6 images at eps 0.5.*raise"):
        common.dbscan(zeros, .5, min_samples=3)


def test_dbscan_eps_on_an_atom():
    """Distance exactly 1/2 up to rounding: inside at eps 0.5 whichever way it was rounded."""
    for value in (.5 - 1e-7, .5, .5 + 1e-7):
        dense = np.array([[0, value], [value, 0]], np.float32)
        graph = csr_array(np.kron(np.eye(2, dtype=np.float32), dense + 1))
        graph.data -= 1
        assert common.dbscan(graph, .5, min_samples=2).tolist() == [0, 0, 1, 1]


# ------------------------------------------------------------------------------- memory and quality

def test_renumber():
    assert common.renumber(np.array([7, -1, 3, 7, 9])).tolist() == [1, -1, 0, 1, 2]
    assert common.renumber(np.array([4, 2])).tolist() == [1, 0]


def test_cluster_means():
    features, labels = unit(30), np.arange(30) % 5 - 1
    means = common.cluster_means(features, labels)
    assert means.shape == (4, 16)
    for c in range(4):
        mean = sum(features[i] for i in range(30) if labels[i] == c) / 6
        torch.testing.assert_close(means[c], F.normalize(mean, dim=0))


@pytest.mark.parametrize("momentum", [0., .1, .9, 1.])
def test_update_memory_is_image_by_image(momentum):
    memory, features = unit(6), unit(40, seed=1)
    # 5 is never drawn
    labels = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(0))
    slow = memory.clone()
    for f, y in zip(features, labels):
        slow[y] = momentum * slow[y] + (1 - momentum) * f
        slow[y] /= slow[y].norm()
    counted = memory.clone()
    common.update_memory(memory, features, labels, momentum)
    torch.testing.assert_close(memory, slow)
    assert torch.equal(memory[5], unit(6)[5])
    for most in (int(torch.bincount(labels).max()), 40):           # said, and more than said
        again = counted.clone()
        common.update_memory(again, features, labels, momentum, most)
        assert torch.equal(again, memory)


def test_label_quality():
    labels, pids = np.array([0, 0, 0, 1, 1, -1, -1]), np.array([5, 5, 7, 7, 7, 5, 9])
    quality = common.label_quality(labels, pids)
    assert quality["clusters"] == 2 and quality["outliers"] == 2 and quality["purity"] == 4 / 5
    alone = [0, 0, 0, 1, 1, 2, 3]
    assert quality["ARI"] == pytest.approx(sklearn.metrics.adjusted_rand_score(pids, alone))
    assert quality["NMI"] == pytest.approx(
        sklearn.metrics.normalized_mutual_info_score(pids, alone))
    perfect = common.label_quality(np.array([1, 1, 0, 0]), np.array([4, 4, 8, 8]))
    assert perfect["ARI"] == perfect["NMI"] == perfect["purity"] == 1


# --------------------------------------------------------------------------------------- evaluation

def test_average_precision_known_values():
    hits = np.zeros(10, bool)
    hits[[0, 1, 3, 6]] = True                                      # ranks 1, 2, 4, 7
    assert common.average_precision(hits) == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4)
    assert round(common.average_precision(hits), 4) == .8304
    assert common.average_precision(np.array([False, True])) == .5
    assert common.average_precision(np.zeros(3, bool)) == 0


def people(n, seed, ids=12, cameras=3):
    rng = np.random.default_rng(seed)
    return common.Split([str(i) for i in range(n)], rng.integers(0, ids, n),
                        rng.integers(0, cameras, n))


def slow_evaluate(similar, query, gallery):
    """One query at a time, each rule in a line."""
    precisions, firsts = [], []
    for q in range(len(query.pids)):
        kept = [g for g in range(len(gallery.pids))
                if not (gallery.pids[g] == query.pids[q] and gallery.cams[g] == query.cams[q])]
        kept.sort(key=lambda g: (-similar[q, g], g))
        hits = np.array([gallery.pids[g] == query.pids[q] for g in kept])
        if hits.any():
            precisions.append(common.average_precision(hits))
            firsts.append(hits.argmax())
    return dict(mAP=np.mean(precisions), queries=len(precisions),
                **{f"rank{k}": np.mean(np.array(firsts) < k) for k in (1, 5, 10)})


@pytest.mark.parametrize("features", [unit, lambda n, seed: quantised(n, seed)])
def test_evaluate_equals_one_query_at_a_time(features, capsys):
    query, gallery = people(40, 0), people(150, 1)
    query.pids[:3] = 99                                         # nobody in the gallery: not counted
    gallery.pids[:20] = 77                                      # distractors: wrong answers
    q, g = features(40, seed=3), features(150, seed=4)
    scores = common.evaluate(q, g, query, gallery, block=16)
    expected = slow_evaluate((q.double() @ g.double().T).numpy(), query, gallery)
    assert scores.keys() == expected.keys() and scores["queries"] == 37
    for key in expected:
        assert scores[key] == pytest.approx(expected[key], abs=1e-12)
    # ties are reported
    assert ("equal similarity" in capsys.readouterr().err) == (features is not unit)


def test_equal_right_answers_are_no_tie(capsys):
    query, gallery = (common.Split([], np.array(pids), np.full(len(pids), camera))
                      for camera, pids in enumerate(([1], [1, 1, 2])))
    features = torch.tensor([[1., 0], [1, 0], [0, 1]])
    assert common.evaluate(features[:1], features, query, gallery)["mAP"] == 1
    common.evaluate(features[:1], features[[0, 2, 0]], query, gallery)  # right, wrong, equal wrong
    assert capsys.readouterr().err.count("equal similarity") == 1


def test_evaluate_agrees_with_scikit_learn():
    query, gallery = people(30, 5, cameras=1), people(90, 6, cameras=1)
    gallery = gallery._replace(cams=gallery.cams + 1)              # nothing is ignored
    q, g = unit(30, seed=7), unit(90, seed=8)
    expected = np.mean([sklearn.metrics.average_precision_score(gallery.pids == p, (g @ f).numpy())
                        for f, p in zip(q, query.pids)])
    assert common.evaluate(q, g, query, gallery)["mAP"] == pytest.approx(expected, abs=1e-6)


def test_evaluate_refuses_nonsense():
    query, gallery = people(5, 0), people(9, 1)
    bad = unit(5)
    bad[0, 0] = math.inf
    with pytest.raises(common.Problem, match="not finite"):
        common.evaluate(bad, unit(9), query, gallery)
    with pytest.raises(common.Problem, match="no query has a right answer"):
        common.evaluate(unit(5), unit(9), query, gallery._replace(pids=gallery.pids + 100))


# ------------------------------------------------------------------------- seeds, logs, checkpoints

def test_seed_everything():
    draws = []
    for seed in (1, 1, 2):
        generator = common.seed_everything(seed)
        draws.append((torch.rand(1, generator=generator).item(), torch.rand(1).item(),
                      np.random.rand()))
    assert draws[0] == draws[1] != draws[2]


def test_pick_device():
    assert common.pick_device("cpu").type == "cpu" and common.pick_device("auto")
    if not torch.cuda.is_available():
        with pytest.raises(common.Problem, match="--device cuda"):
            common.pick_device("cuda")


def test_log(tmp_path, capsys):
    args = argparse.Namespace(seed=3, epochs=2, resume=False)
    log = common.Log(str(tmp_path / "run"), "cpu", args)
    log.epoch("epoch 1/2", dict(clusters=7, outliers=3, ARI=.5, NMI=.6, purity=.7), dict(base=1.25),
              dict(mAP=.5, rank1=.75, rank5=1., rank10=1., queries=4), epoch=1)
    first, second = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert first["args"] == vars(args) and {"torch", "commit", "device", "python"} <= first.keys()
    assert second["epoch"] == 1 and second["mAP"] == .5 and second["base"] == 1.25
    line = capsys.readouterr().out
    assert "7 clusters" in line and "mAP  50.0" in line and "R1  75.0" in line
    common.Log(str(tmp_path / "run"), "cpu", args)                 # no epoch saved yet: free
    (tmp_path / "run" / "last.pt").touch()
    with pytest.raises(common.Problem, match="last.pt is no checkpoint"):
        common.Log(str(tmp_path / "run"), "cpu", args)
    assert len(open(tmp_path / "run" / "log.jsonl").readlines()) == 2  # nothing was lost
    with pytest.raises(common.Problem, match="cannot be written"):
        common.Log("/dev/null/run", "cpu", args)


def test_checkpoints(tmp_path):
    path = str(tmp_path / "last.pt")
    common.save_checkpoint(path, model={"w": torch.arange(3.)}, epoch=4)
    state = common.load_checkpoint(path, ("model", "epoch"))
    assert torch.equal(state["model"]["w"], torch.arange(3.)) and state["epoch"] == 4
    with pytest.raises(common.Problem, match="optimizer"):
        common.load_checkpoint(path, ("optimizer",))
    (tmp_path / "half.pt").write_bytes(open(path, "rb").read()[:200])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name in ("half.pt", "text.pt", "absent.pt"):
        with pytest.raises(common.Problem, match=name):
            common.load_checkpoint(str(tmp_path / name))
    with pytest.raises(common.Problem, match="cannot be written"):
        common.save_checkpoint(str(tmp_path / "no" / "last.pt"), epoch=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.pt", "last.pt", "text.pt"]


def test_a_checkpoint_cannot_execute_anything(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")
    torch.save({"model": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(common.Problem, match="bad.pt"):
        common.load_checkpoint(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "owned").exists()


def test_load_encoder(tmp_path):
    model = common.Encoder("small", "none")
    about = dict(parts=0, pooling="gem", size=(96, 48), data="toy", root="data",
                 epoch=1, epochs=2, bf16=False, fp32=False)
    common.save_checkpoint(str(tmp_path / "a.pt"), model=model.state_dict(), arch="small", **about)
    again, state = common.load_encoder(str(tmp_path / "a.pt"))
    x = torch.randn(2, 3, 96, 48)
    for wrong in (dict(size="48"), dict(size=(8, 8)), dict(parts="2"), dict(pooling="max"),
                  dict(data=3), dict(arch="vgg"), dict(epoch="1"), dict(model=None),
                  dict(model={1: 2}), dict(bf16="yes")):
        state = dict(dict(model=model.state_dict(), arch="small", **about), **wrong)
        common.save_checkpoint(str(tmp_path / "c.pt"), **state)
        with pytest.raises(common.Problem):
            common.load_encoder(str(tmp_path / "c.pt"))
    common.save_checkpoint(str(tmp_path / "b.pt"), model=model.state_dict(), arch="resnet18",
                           **about)
    with pytest.raises(common.Problem, match="b.pt holds no network of --arch resnet18"):
        common.load_encoder(str(tmp_path / "b.pt"))
