"""Every shared step against a slow, obvious second version, or a value worked out by hand."""

import argparse
import contextlib
import functools
import json
import math
import os
import re

import numpy as np
import pytest
import sklearn.cluster
import sklearn.metrics
import slow
import torch
import torch.nn.functional as F
import torchvision
from conftest import HERE, checkpoint, older, quantised, refusal, short, unit
from scipy.sparse import csgraph, csr_array
from torch import nn

import ccsd
import common
import mskd
import sskd


def code_of(name):
    """-> all code within the lines of a text."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        parts = re.findall(r"`([^`]+)`", file.read().replace("```", ""))
    return [" ".join(part.split()) for part in parts]


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


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_is_close_and_gives_float32(name):
    torch.manual_seed(0)
    model, images = common.Encoder("resnet18-layer3", "none").eval(), torch.randn(4, 3, 64, 32)
    exact, flags = model(images), dict(recompute=False, size=(64, 32))
    model.on(torch.device("cpu"), argparse.Namespace(precision=name, **flags))
    kinds = []
    model.backbone.register_forward_hook(lambda _, inputs, output: kinds.append(output.dtype))
    model.pools[0].register_forward_hook(lambda _, inputs, output: kinds.append(inputs[0].dtype))
    rough = model(images)
    assert kinds == [dict(bf16=torch.bfloat16, fp16=torch.float16)[name], torch.float32]
    assert rough.dtype == torch.float32 and model.backbone[0].weight.dtype == torch.float32
    assert not torch.equal(rough, exact) and (rough * exact).sum(1).min() > .99
    flags["recompute"] = True
    model.on(torch.device("cpu"), argparse.Namespace(precision="fp32", **flags))
    assert torch.equal(model(images), exact) and model.recompute


def test_gem_is_the_generalised_mean():
    x = torch.rand(2, 3, 4, 5)
    pool = common.GeM()
    np.testing.assert_allclose(pool(x).detach(), (x ** 3).mean((2, 3)) ** (1 / 3), rtol=1e-5)
    pool.p.data.fill_(1)
    np.testing.assert_allclose(pool(x).detach(), x.mean((2, 3)), rtol=1e-5)
    pool(x).sum().backward()
    assert pool.p.grad is not None                                 # p is learned
    nothing = common.GeM()(-x).detach()                            # all is cut off at 1e-6
    torch.testing.assert_close(nothing, torch.full((2, 3), 1e-6), atol=1e-8, rtol=0)


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
    assert len(model.pools) == len(model.necks) == 3
    last = torch.randn(3, 256, 4, 2)
    model.backbone = nn.Identity()
    out = model(last)
    assert out.shape == (3, 3, 256)
    changed = last.clone()
    changed[:, :, 2:] += 1                                         # the lower half of the map
    again = model(changed)
    assert not torch.equal(again[0], out[0]) and torch.equal(again[1], out[1])
    assert not torch.equal(again[2], out[2])


@pytest.mark.parametrize("size, parts, rows, remedy", [
    (48, 2, 3, 32), (80, 2, 5, 32), (72, 2, 5, 32), (64, 3, 4, 48), (96, 2, 6, 0), (64, 4, 4, 0)])
def test_stripes_of_a_map_are_equal_or_refused(size, parts, rows, remedy):
    for arch in ("small", "resnet18"):
        assert common.map_rows(arch, (size, 32)) == rows
        model = common.Encoder(arch, "none", parts).eval()
        says = f"--size {size}: .* {rows} rows.*{parts} equal.*multiple of {remedy}\\)"
        with pytest.raises(common.Problem, match=says) if remedy else contextlib.nullcontext():
            assert model(torch.randn(2, 3, size, 32)).shape[0] == 1 + parts
        if remedy:  # and it is one
            assert common.map_rows(arch, (remedy, 32)) % parts == 0


def test_a_backbone_is_one_line_of_archs(tiny, tmp_path, monkeypatch, capsys):
    """The course's, with a stride of 32: a map of 3 rows at a height of 96 has no halves."""
    lines = [line for line in code_of("tests/COURSE.md") if line.startswith('"')]
    assert len(lines) == 2
    more = eval("{" + ", ".join(lines) + "}", dict(vars(common), torchvision=torchvision))
    names = [common.running_code(common)]
    for name, line in more.items():
        monkeypatch.setitem(common.ARCHS, name, line)
        names.append(common.running_code(common))
    assert len({*names}) == 3 and "in memory differs" in capsys.readouterr().err
    assert common.Encoder("resnet101", "none", 2).eval()(torch.randn(1, 3, 64, 32)).shape == (
        3, 1, 2048)
    words = short(tiny, tmp_path, "--arch", "mobilenet", "--epochs", "1", "--stage", "teacher")
    line = refusal(lambda: mskd.main([*words, "--size", "96", "32"]), capsys)
    assert "--size 96" in line and "3 rows" in line and "multiple of 64" in line
    mskd.main([*words, "--size", "128", "32"])
    model, state = common.load_encoder(str(tmp_path / "teacher"))
    assert state["arch"] == "mobilenet" and model(torch.randn(2, 3, 128, 32)).shape == (3, 2, 960)


def test_whatever_stands_for_a_function_names_a_run(monkeypatch):
    """In a notebook: also what is no function of the notebook itself."""
    monkeypatch.setattr(common, "NOTEBOOK", True)
    old, marks = ccsd.distillation_loss, [common.running_code(ccsd)]

    def times(factor, *, power=1):
        def loss(*args, _power=power):
            return factor * old(*args) ** _power
        return loss
    for other in (functools.partial(old, temp=1), F.kl_div, nn.KLDivLoss(), times(2),
                  times(3), times(3, power=2), functools.wraps(old)(times(4))):
        monkeypatch.setattr(ccsd, "distillation_loss", other)
        marks.append(common.running_code(ccsd))
    monkeypatch.setattr(ccsd, "distillation_loss", old)
    assert len(set(marks)) == 8 and common.running_code(ccsd) == marks[0]
    before = common.running_code(common)
    monkeypatch.setattr(common.Gather, "backward", staticmethod(lambda ctx, gradient: gradient))
    assert common.running_code(common) != before


def test_encoder_pooling_avg_and_what_is_inside():
    model = common.Encoder("small", "none", pooling="avg").eval()
    x = torch.randn(2, 3, 64, 32)
    mean = model.backbone(x).mean((2, 3))
    pooled, neck = model(x, inside=True)
    torch.testing.assert_close(pooled, mean)
    torch.testing.assert_close(neck, model.necks[0](mean))
    torch.testing.assert_close(model(x), F.normalize(neck))
    model = common.Encoder("small", "none", parts=2).eval()
    pooled, necks = model(x, inside=True)
    assert pooled.shape == (3, 2, 256)
    torch.testing.assert_close(model(x), F.normalize(necks, dim=2))


def test_encoder_equals_torchvision_but_for_the_last_stride():
    net = torchvision.models.resnet18()
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    path_free = {k: v for k, v in net.state_dict().items()}
    model = common.Encoder("resnet18", "none").eval()
    model.backbone.load_state_dict({k: v for k, v in path_free.items() if not k.startswith("fc")})
    net.fc, net.avgpool = nn.Identity(), nn.Identity()
    x = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(model.backbone(x).flatten(1), net.eval()(x), atol=1e-4, rtol=1e-4)


def test_weights_from_a_file(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "r18.pth")
    model = common.Encoder("resnet18", str(tmp_path / "r18.pth"))
    torch.testing.assert_close(model.backbone.conv1.weight, state["conv1.weight"])
    part = common.Encoder("resnet18-layer3", str(tmp_path / "r18.pth"))
    torch.testing.assert_close(part.backbone.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    with pytest.raises(common.Problem, match="--arch resnet50"):
        common.Encoder("resnet50", str(tmp_path / "r18.pth"))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(common.Problem, match="layer1.2.conv1.weight is missing or left over"):
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
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")        # nobody answers there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(common.Problem, match=f"{tmp_path}.*resnet50-0676ba61.pth.*--weights FILE"):
        common.Encoder("resnet50", "imagenet")                     # the file is V1's
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save({"conv1.weight": 1}, tmp_path / "cut")
    for content in (b"", b"half a file", (tmp_path / "cut").read_bytes()[:200]):
        (tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth").write_bytes(content)
        with pytest.raises(common.Problem, match=f"a whole file at {tmp_path}.*--weights FILE"):
            common.Encoder("resnet50", "imagenet")


@pytest.mark.parametrize("parts", [0, 2])
def test_warm_up_loss_ignores_other_cameras(parts, monkeypatch):
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

    def noted(*args, **more):
        seen.append(augment(*args, **more).double())
        return seen[-1]
    monkeypatch.setattr(common, "augment", noted)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    common.warm_up(model, images, cams, torch.Generator().manual_seed(0), epochs=1, lr=.01)
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
    features, cams = unit(40), np.array([0] * 20 + [1] * 15 + [2] * 4 + [3])
    out = common.centre_cameras(features, cams)
    for i in range(40):
        seen = [j for j in range(40) if cams[j] == cams[i] or cams[i] > 1]  # few images: all
        mean = features[seen].mean(0)
        torch.testing.assert_close(out[i], F.normalize(features[i] - mean, dim=0))


def test_cameras_of_one_image_do_not_become_one_cluster(capsys):
    """Four people, a camera of one image each, beside a camera of many images of others."""
    features, cams = unit(64), np.array([0] * 60 + [1, 2, 3, 4])
    out = common.centre_cameras(features, cams)
    assert (out.norm(dim=1) > .99).all()
    labels = common.dbscan(common.jaccard_distance(out, 8), .6)
    assert len(set(labels[60:])) == 4                              # unit() numbers people by % 8
    common.warn_of_few(cams)
    assert "4 of 5 cameras have fewer than 10 images" in capsys.readouterr().err


def test_features_of_length_0_and_a_single_cluster_are_refused():
    features = unit(20)
    features[3] = 0
    with pytest.raises(common.Problem, match="1 of 20 features are 0"):
        common.jaccard_distance(features)
    with pytest.raises(common.Problem, match="1 clusters .* needs 2 clusters"):
        common.dbscan(common.jaccard_distance(unit(20, people=1, spread=.01)), .9, at_least=1)


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
    expected = slow.jaccard_distance(features, k1, k2)
    np.testing.assert_allclose(slow.dense(distance), expected, atol=1e-5)
    assert (distance.dtype == np.float32
            and np.isin(np.arange(len(features)), distance.indices).all())
    before = distance.indices.copy()
    for eps in (.3, .45, .5, .6, 2 / 3):
        dense = slow.dbscan(expected, eps)
        if dense.max() < 1:
            with pytest.raises(common.Problem, match=f"at eps {eps:.4g}"):
                common.dbscan(distance, eps)
        else:
            np.testing.assert_array_equal(common.dbscan(distance, eps), dense)
    assert (distance.indices == before).all()                      # not sorted for its own use


def test_jaccard_distance_does_not_depend_on_blocks_and_can_be_cut():
    features = unit(300, people=20, spread=1.5)
    rank = common.nearest(features, 20)
    assert (common.nearest(features, 20, block=7) == rank).all()
    same = common.jaccard_distance(features), common.jaccard_distance(features, 30, 6, 1)
    assert abs(same[0] - same[1]).max() == 0
    whole = common.jaccard_distance(features, 20)
    cut = common.jaccard_distance(features, 20, max_distance=.5)
    expected = slow.dense(whole)
    expected[expected > .5] = 1
    np.testing.assert_array_equal(slow.dense(cut), expected)
    assert cut.nnz < whole.nnz < 300 ** 2                          # sparse, and the cut is sparser
    v = common.neighbour_vectors(features, 20)
    assert abs(v - common.neighbour_vectors(features, 20, 6)).max() == 0
    np.testing.assert_allclose(v.sum(1), 1, rtol=1e-5)
    dense = v.toarray()
    blocks = [part.toarray() for part in common.overlaps(v[:50], v, block=16)]
    assert [len(part) for part in blocks] == [16, 16, 16, 2]
    brute = np.array([[np.minimum(a, b).sum() for b in dense] for a in dense[:50]])
    np.testing.assert_allclose(np.concatenate(blocks), brute, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 30.])
def test_nearest_from_rounded_features_is_exact(scale, monkeypatch):
    """bfloat16 chooses candidates; what it could have missed is searched again. Against float64."""
    exact, again = common.exact_search, []

    def noted(features):
        search = exact(features)
        return lambda rows, k: (again.extend(rows.tolist()), search(rows, k))[1]
    monkeypatch.setattr(common, "exact_search", noted)
    monkeypatch.setattr(common, "bfloat16_pays", lambda features, k: 2 * k < len(features))
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 64, generator=g)
    spread = torch.linspace(.02, 1, 300)[:, None] * torch.randn(300, 64, generator=g)
    spread[150:250] = .05 * torch.randn(100, 64, generator=g) + centres[0] - centres[
        torch.arange(150, 250) % 12]                               # closer than bf16 can tell
    features = scale * F.normalize(centres[torch.arange(300) % 12] + spread)
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
        np.testing.assert_array_equal(common.nearest(features, k), slow.ranking(similar, k))
    assert not common.bfloat16_pays(features, 60)                  # candidates would be all images


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


def test_only_the_diagonal_is_at_0_so_that_graphs_keep_every_edge():
    """SciPy takes a stored 0 for no edge. Here many images share all neighbours: distance 0."""
    features = unit(400, 32, people=80, spread=.3)
    assert (slow.jaccard_distance(features, 8) < 1e-9).sum() > 400
    for distance in (common.jaccard_distance(features, 8),
                     mskd.mixed_distance(torch.stack([features] * 3), 8, .15)):
        coo = distance.tocoo()
        own = coo.row == coo.col
        assert own.sum() == 400 and (coo.data[own] == 0).all()
        assert coo.data[~own].min() > .9 * common.DUPLICATE
        assert csgraph.minimum_spanning_tree(distance).nnz == 399


@pytest.mark.parametrize("seed", range(6))
def test_duplicates_change_no_label_and_no_radius(seed):
    rng = np.random.default_rng(seed)
    features = quantised(24, seed)[torch.from_numpy(rng.integers(0, 24, 90))]
    k1 = int(rng.integers(4, 30))
    distance, dense = common.jaccard_distance(features, k1), slow.jaccard_distance(features, k1)
    for eps in (0, *rng.uniform(0, .9, 6)):
        assert (common.dbscan(distance, eps, at_least=0) == slow.dbscan(dense, eps)).all()
    upper = dense[np.triu_indices(90, 1)]
    distinct = np.sort(upper[upper > 1e-9])
    assert len(distinct) < len(upper)
    for rho in (.01, .1, 1):
        wanted = distinct[:max(1, round(rho * len(distinct)))].mean()
        assert sskd.adaptive_eps(distance, rho) == pytest.approx(wanted, abs=1e-6)


def test_the_clusterings_of_the_course():
    code = "\n".join(line for line in code_of("tests/COURSE.md")
                     if re.match(r"(full|np.fill_diagonal|labels = \w+\(|medoids)", line))
    people = np.arange(400) % 80
    names = dict(vars(sklearn.cluster), np=np, found=[], distance=common.jaccard_distance(
        unit(400, 32, people=80, spread=.3), 8))
    code = re.sub("(?m)^labels = .*$", r"\g<0>; found.append(labels)", code)
    code, start, step = re.split("(?m)^(?=medoids)", code)
    loop = "labels = full[:, medoids].argmin(1)"
    assert loop in code_of("tests/COURSE.md")
    exec(code + start + "for _ in range(20):\n " + loop + "\n " + step, names)
    *others, medoids = [sklearn.metrics.adjusted_rand_score(people, labels)
                        for labels in (*names["found"], names["labels"])]
    assert others == [1] * 4 and medoids > .6                      # from random images: a local one
    apart = common.jaccard_distance(unit(640, 32, people=80, spread=.3), 12)
    assert csgraph.connected_components(apart)[0] == 2
    with pytest.raises(ValueError, match="2 connected components"):
        exec(code, dict(names, distance=apart))


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
    several = torch.stack([features, unit(30, seed=1), unit(30, seed=2)])  # of several networks
    wanted = torch.stack([common.cluster_means(one, labels) for one in several])
    torch.testing.assert_close(common.cluster_means(several, labels), wanted)


@pytest.mark.parametrize("momentum", [0., .1, .9, 1.])
def test_update_memory_is_image_by_image(momentum):
    """Of batches of clusters, and of their parts by camera, as in ccsd.py."""
    clusters, cams = np.arange(90) % 6, np.random.default_rng(0).integers(0, 3, 90)
    index = next(common.pk_batches(clusters, cams, 4, 5, 1, torch.Generator().manual_seed(0)))
    features = unit(20, seed=1).requires_grad_()                   # those of a training step
    for labels in (clusters[index], (3 * clusters + cams)[index]):
        labels, memory = torch.from_numpy(labels), unit(18)
        wanted = slow.update_memory(memory, features.detach(), labels, momentum)
        absent = np.setdiff1d(np.arange(18), labels)
        before = memory[absent]
        common.update_memory(memory, features, labels, momentum, 5)
        torch.testing.assert_close(memory, wanted)
        assert torch.equal(memory[absent], before) and not memory.requires_grad


def test_label_quality():
    labels, pids = np.array([-1, -1, 0, 0, 0, 1, 1]), np.array([5, 9, 5, 5, 7, 7, 8])
    quality = common.label_quality(labels, pids)
    assert quality["clusters"] == 2 and quality["outliers"] == 2 and quality["purity"] == 3 / 5
    alone = [2, 3, 0, 0, 0, 1, 1]
    assert quality["ARI"] == pytest.approx(sklearn.metrics.adjusted_rand_score(pids, alone))
    assert quality["NMI"] == pytest.approx(
        sklearn.metrics.normalized_mutual_info_score(pids, alone))
    without = common.label_quality(labels, np.full(7, -1))
    assert without == dict(clusters=2, outliers=2)
    for found in (quality, without):
        assert json.loads(json.dumps(found)) == found              # plain numbers, as in logs
    perfect = common.label_quality(np.array([1, 1, 0, 0]), np.array([4, 4, 8, 8]))
    assert perfect["ARI"] == perfect["NMI"] == perfect["purity"] == 1


# --------------------------------------------------------------------------------------- evaluation

def test_average_precision_known_values():
    def values(similar, *right):
        AP, wrong = common.average_precision(torch.tensor([similar] * len(right)).float(),
                                             torch.tensor(right) > 0)
        return AP.tolist(), wrong.tolist()
    hits = [1, 1, 0, 1, 0, 0, 1, 0, 0, 0]                          # ranks 1, 2, 4, 7
    both = hits, hits[::-1]
    AP, wrong = values([*range(10, 0, -1)], *both)
    assert AP[0] == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4) and round(AP[0], 4) == .8304
    assert AP == pytest.approx([slow.average_precision(np.array(x)) for x in both])
    assert wrong == [0, 3]
    # of equal similarities the wrong one is ahead, and equal right ones cost nothing
    assert values([5, 5, 5, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]) == (
        [pytest.approx((1 / 2 + 2 / 3) / 2), 1, 1 / 4], [1, 0, 3])


def people(n, seed, ids=12, cameras=3):
    rng = np.random.default_rng(seed)
    return common.Split([str(i) for i in range(n)], rng.integers(0, ids, n),
                        rng.integers(0, cameras, n))


@pytest.mark.parametrize("features", [unit, quantised])
def test_evaluate_equals_one_query_at_a_time(features):
    query, gallery = people(40, 0), people(150, 1)
    query.pids[:3] = 99                                         # nobody in the gallery: not counted
    gallery.pids[:20] = 77                                      # distractors: wrong answers
    q, g = features(40, seed=3), features(150, seed=4)
    expected = slow.evaluate((q.double() @ g.double().T).numpy(), query, gallery)
    assert expected["queries"] == 37
    for block in (16, 256):
        scores = common.evaluate(q, g, query, gallery, block=block)
        assert scores == pytest.approx(expected, abs=1e-12)
    assert common.score_ranking([q @ g.T], query, gallery) == scores
    assert json.loads(json.dumps(scores)) == scores            # plain numbers, as logs need them
    few = common.Split(*(part[20:45] for part in gallery))     # less than queries
    expected = slow.evaluate((q.double() @ g[20:45].double().T).numpy(), query, few)
    scores = common.evaluate(q, g[20:45], query, few, block=16)
    assert scores == pytest.approx(expected, abs=1e-12)


def test_a_test_set_is_scored_by_the_global_feature(tiny):
    torch.manual_seed(0)
    model = common.Encoder("small", "none", parts=2)
    model.size = 64, 32
    _, *test_set = common.load(str(tiny))
    query, gallery = (common.extract_features(model, split)[0] for split in test_set)
    expected = slow.evaluate((query @ gallery.T).numpy(), *test_set)
    assert common.test(model, test_set) == pytest.approx(expected)
    model.parts = 0
    assert torch.equal(common.global_features(model, test_set[0]), query)
    nobody = common.Split([], np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert common.test(model, (nobody, test_set[1])) == {}


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
    for features in ((bad, unit(9)), (unit(5), torch.cat([bad, unit(4)]))):
        with pytest.raises(common.Problem, match="not finite"):
            common.evaluate(*features, query, gallery)
    with pytest.raises(common.Problem, match="no query has a right answer"):
        common.evaluate(unit(5), unit(9), query, gallery._replace(pids=gallery.pids + 100))


# ------------------------------------------------------------------------- seeds, logs, checkpoints

def test_seed_everything():
    draws = []
    for seed in (1, 1, 2):
        generator = common.seed_everything(seed)
        draws.append((torch.rand(1, generator=generator).item(), torch.rand(1).item(),
                      np.random.rand()))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


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
    assert second["epoch"] == 1 and second["scores"]["mAP"] == .5
    assert second["losses"] == {"base": 1.25} and second["quality"]["clusters"] == 7
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
    path = tmp_path / "last.pt"
    model = common.Encoder("small", "none").eval()
    checkpoint(path, model=model.state_dict())
    again, state = common.load_encoder(str(path))
    x = torch.randn(2, 3, 96, 48)
    assert torch.equal(again.eval()(x), model(x)) and state["data"] == "toy"
    for wrong in (dict(size="48"), dict(parts="2"), dict(data=3), dict(arch="vgg"),
                  dict(epoch="1"), dict(model=None), dict(model={1: 2}), dict(lines="text"),
                  dict(scores=None), dict(images=None), dict(format=1)):
        checkpoint(path, **wrong)
        with pytest.raises(common.Problem, match="last.pt"):
            common.load_encoder(str(path))
    older(path)
    with pytest.raises(common.Problem, match="last.pt .* older version"):
        common.load_encoder(str(path))
    checkpoint(path, arch="resnet18")
    with pytest.raises(common.Problem, match="last.pt holds no network of --arch resnet18"):
        common.load_encoder(str(path))
