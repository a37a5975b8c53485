"""The own functions of sskd.py against loops in float64, and its two stages end to end."""

import copy
import json
import math
import os
import shutil

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
import torchvision
from conftest import (close, double, draw, losses, older, permuted_ids, program, refusal,
                      same_loss, same_weights, short, weights)
from scipy.sparse import csr_array

import common
import sskd


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A labelled source: other people than the target's, other shots."""
    return draw(tmp_path_factory.mktemp("data") / "other", train=9, test=2, cameras=2, shots=4)


SHORT = ["--source-epochs", "2", "--source-iters", "4", "--temp", "1.6", "--batch-size", "6"]


def pair(other, folder, out, *more):
    return short(folder, out, "--source", str(other), *SHORT, *more)


@pytest.fixture(scope="module")
def finished(tiny, other, tmp_path_factory):
    """Source training and adaptation, once, as a program. -> the folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "sskd"
    return out, program("sskd.py", *pair(other, tiny, out))


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """Flags of runs that start from given weights, so that nothing is centred; these are random."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return ["--arch", "resnet18", "--weights", str(path), "--nets", "2", "--epochs", "1", "--eps",
            "0", "--rho", ".1", "--source-iters", "1", "--source-epochs", "1"]


# ------------------------------------------------------------------------------------ its functions

def sparse(dense):
    """Store what is not at distance 1, zeros too."""
    rows, columns = np.nonzero(dense < 1)
    return csr_array((dense[rows, columns], (rows, columns)), dense.shape)


@pytest.mark.parametrize("rho", [.001, .02, .1, .5, 1])
def test_adaptive_eps_is_the_mean_of_the_smallest_share(rho):
    rng = np.random.default_rng(0)
    dense = np.triu(np.where(rng.random((40, 40)) < .4, rng.random((40, 40)), 1), 1)
    dense = np.float32(dense + dense.T)
    dense[3, 4] = dense[4, 3] = 0                                  # a duplicate does not count
    upper = dense[np.triu_indices(40, 1)]
    upper = np.sort(upper[np.nonzero(upper)].astype(np.float64))
    wanted = upper[:max(1, round(rho * len(upper)))].mean()        # dense: absent pairs are 1
    assert abs(sskd.adaptive_eps(sparse(dense), rho) - wanted) < 1e-7


def test_soft_label_loss():
    soft = double(6, 5, seed=1).softmax(1)
    same_loss("L_soft, the cross-entropy with the peer's soft label",
              lambda z: sskd.soft_label_loss(z, soft), lambda z: slow.cross_entropy(z, soft),
              double(6, 5))


@pytest.mark.parametrize("spread", [.3, 1, 3])
def test_multi_similarity_loss(spread):
    labels = torch.arange(16) // 4
    pooled = double(4, 6, seed=2)[labels] + spread * double(16, 6, seed=3)
    pooled[1] = pooled[0] * 2                                      # a pair at cosine 1 is left out

    def looped(x):
        unit, total = F.normalize(x), 0
        for i in range(16):
            s = unit @ unit[i]
            positive = [s[j] for j in range(16) if labels[j] == labels[i] and s[j] < 1 - 1e-5]
            negative = [s[j] for j in range(16) if labels[j] != labels[i]]
            kept = [p for p in positive if p - .1 < max(negative)]
            hard = [q for q in negative if q + .1 > min(positive)]
            if kept and hard:
                total = total + torch.log(1 + sum(torch.exp(-2 * (p - .5)) for p in kept)) / 2
                total = total + torch.log(1 + sum(torch.exp(40 * (q - .5)) for q in hard)) / 40
        return total / 16
    same_loss("L_ms of hard positives and negatives",
              lambda x: sskd.multi_similarity_loss(x, labels), looped, pooled, 1e-6, 1e-4)


def test_multi_similarity_loss_of_a_solved_batch_is_zero():
    pooled = (10 * torch.eye(4)[torch.arange(16) // 4] + .01 * torch.rand(16, 4)).requires_grad_()
    loss = sskd.multi_similarity_loss(pooled, torch.arange(16) // 4)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(pooled.grad).all()


def test_nuclear_norm_loss():
    def looped(z):
        p = z.softmax(1)
        return -torch.linalg.eigvalsh(p @ p.T).clamp(min=0).sqrt().sum() / 4
    same_loss("L_nuc, minus the nuclear norm of softmax(z) / B", sskd.nuclear_norm_loss, looped,
              double(4, 9), 1e-5, 1e-4)
    sure = 100 * torch.eye(5)                                      # sure and varied: the best
    assert abs(sskd.nuclear_norm_loss(sure).item() + 1) < 1e-6
    assert sskd.nuclear_norm_loss(sure[[0] * 5]).item() > -.5


def test_slow_copies_follow_exactly():
    """alpha_t = min(1 - 1/(t+1), alpha): the running mean at first; buffers stay the copy's own."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    slow, wanted, seen = copy.deepcopy(net), None, []
    for t in range(30):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += double(*parameter.shape, seed=t)
            net[1].running_mean += 1
        alpha = min(1 - 1 / (t + 1), .9)
        sskd.follow(slow.parameters(), net.parameters(), alpha)
        seen.append(net[0].weight.detach().clone())
        wanted = seen[-1] if wanted is None else alpha * wanted + (1 - alpha) * seen[-1]
        close(slow[0].weight.data, wanted, "E does not follow M as alpha E + (1 - alpha) M")
        if t == 8:
            torch.testing.assert_close(slow[0].weight.data, sum(seen) / 9)
    assert (slow[1].running_mean == 0).all(), "batch-norm statistics of E follow too"


# -------------------------------------------------------------------------------------- both stages

def test_end_to_end_and_a_second_run_has_nothing_to_do(finished, tiny, other):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert [line["title"] for line in losses(out)] == ["source only", "epoch 1/2", "epoch 2/2"]
    assert {"id", "soft", "ms", "nuc", "eps", "mAP"} <= losses(out)[-1].keys()
    for n in "123":
        assert losses(out / "source" / n)[-1]["epoch"] == 2
    a, b = (weights(out / "source" / n)["necks.0.weight"] for n in "12")
    assert not torch.equal(a, b)                                   # networks of different seeds
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = program("sskd.py", *pair(other, tiny, out))
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    scores = json.loads(program("eval.py", out, "--json").stdout)
    assert scores["mAP"] == losses(out)[-1]["mAP"]


def test_sources_are_trained_once_and_target_ids_do_not_leak(finished, tiny, other, tmp_path):
    with permuted_ids(tiny):                                       # the source is not even read
        sskd.main(pair(other, tiny, tmp_path, "--sources", str(finished[0] / "source")))
    a, b = weights(finished[0]), weights(tmp_path)
    same_weights(a, b, "with other target ids other weights: a true id reaches a training step")
    assert losses(finished[0]) == losses(tmp_path)
    sskd.main(pair(other, tiny, tmp_path / "c", "--sources", str(finished[0] / "source"),
                   "--true-ids"))
    assert not torch.equal(a["necks.0.weight"], weights(tmp_path / "c")["necks.0.weight"])


@pytest.mark.parametrize("nets, shared", [(1, False), (2, False), (3, False), (3, True)])
def test_views_and_peers(nets, shared, finished, tiny, other, tmp_path, monkeypatch, watch):
    """View i reaches M_i and E_i only; soft labels come from the next slow copy, no gradient to
    it; what they hold is logged."""
    forward, calls = common.forward, []

    def noted(model, batch, splits, inside=False):
        calls.append((id(model), batch, next(model.parameters()).requires_grad))
        assert model.training                                      # batch statistics, all of them
        return forward(model, batch, splits, inside)
    monkeypatch.setattr(common, "forward", noted)
    said, lessons = watch(sskd, "soft_labels"), watch(sskd, "soft_label_loss")
    batches = watch(common, "pk_batches")
    sskd.main(pair(other, tiny, tmp_path, "--sources", str(finished[0] / "source"), "--nets",
                   str(nets), *["--shared-view"] * shared, "--epochs", "1", "--iters", "3"))
    assert (len(calls), len(said), len(lessons)) == (2 * nets * 3, 3, nets * 3)
    for i in range(3):
        step = calls[2 * nets * i:2 * nets * (i + 1)]
        copies, students = step[:nets], step[nets:]
        assert not any(grad for *_, grad in copies), "slow copies E are trained"
        assert all(grad for *_, grad in students), "networks M are not trained"
        assert len({name for name, *_ in step}) == 2 * nets
        each = said[i][1]                                          # what E_1..E_n say
        for n in range(nets):
            assert torch.equal(copies[n][1], students[n][1])
            assert torch.equal(students[n][1], students[0][1]) == (shared or n == 0)
            soft = lessons[nets * i + n][0][1]
            assert not soft.requires_grad, "a gradient reaches the slow copy that says soft labels"
            from_peer = [torch.equal(soft, one) for one in each]
            assert from_peer == [m == (n + 1) % nets for m in range(nets)], (
                f"soft labels of network {n + 1} are not those of its peer, the next slow copy")
    labels, last = batches[0][0][0], losses(tmp_path)[-1]
    soft = torch.stack([result for _, result in said]).double().flatten(0, 1)  # (3 n, B, C)
    k = np.repeat([labels[args[4]] for args, _ in said], nets, 0)  # (3 n, B)
    assert last["soft_clusters"] == pytest.approx(math.exp(-(soft * soft.log()).sum(2).mean()))
    assert last["soft_own"] == pytest.approx(
        np.mean([p[b, k[s, b]] for s, p in enumerate(soft) for b in range(len(p))]))


def test_the_slow_copy_is_the_result(finished, tiny, other, tmp_path, monkeypatch):
    """At alpha 1 the copies stay where the first steps left them: a mean of M's weights."""
    alphas, follow, total = [], sskd.follow, []

    def noted(copies, fast, alpha):
        copies, fast = list(copies), list(fast)
        alphas.append(alpha)
        total[:] = [a + b.detach() for a, b in zip(total or [0] * len(fast), fast)]
        follow(copies, fast, alpha)
    monkeypatch.setattr(sskd, "follow", noted)
    sskd.main(pair(other, tiny, tmp_path, "--sources", str(finished[0] / "source"), "--nets", "2",
                   "--alpha", "1"))
    assert alphas == [1 - 1 / (t + 1) for t in range(4)]           # t counts on
    state = common.load_checkpoint(str(tmp_path / "last.pt"))
    first, second = (x / 4 for x in (total[0], total[len(total) // 2]))
    torch.testing.assert_close(state["model"]["backbone.0.weight"], first)
    torch.testing.assert_close(state["slow"]["0.backbone.0.weight"], first)
    torch.testing.assert_close(state["slow"]["1.backbone.0.weight"], second)
    own, fast = (state[kind]["0.necks.0.running_mean"] for kind in ("slow", "students"))
    assert not torch.equal(own, fast)                              # statistics do not follow


WEIGHTS = dict(id=.7, soft=.4, ms=3, nuc=1.5)


@pytest.mark.parametrize("terms", [["id"], ["soft"], ["ms"], ["nuc"], [*WEIGHTS]], ids="+".join)
def test_from_the_last_map_to_logits_and_gradients(terms, tiny, other, resnet18, tmp_path,
                                                   monkeypatch, watch):
    """Everything behind the backbone once more in float64: average, batch norm, logits z = W B(x)
    on the neck's output as it is (not of unit length), the weighted sum of terms, its gradient to
    the map."""
    maps, scale, forward = {}, {}, common.forward

    def noted(model, batch, splits, inside=False):
        def keep(_, __, output):
            if output.requires_grad:
                output.retain_grad()
            maps[model] = output
            scale[model] = model.necks[0].weight.detach().double()  # before the step
        hook = model.backbone.register_forward_hook(keep)
        result = forward(model, batch, splits, inside)
        hook.remove()
        return result
    monkeypatch.setattr(common, "forward", noted)
    means = watch(common, "cluster_means")
    batches, index = common.pk_batches, []
    monkeypatch.setattr(common, "pk_batches", lambda labels, *args: (
        index.append((labels, i := next(batches(labels, *args)))), iter([i]))[1])
    weight = {name: value * (name in terms) for name, value in WEIGHTS.items()}
    weight["id"] = weight["id"] or 1e-12                           # one of the labels' terms stays
    sskd.main(pair(other, tiny, tmp_path, *resnet18, "--iters", "1", "--temp", "1.5",
                   *(word for name in weight for word in (f"--{name}", str(weight[name])))))
    labels, picked = index[-1]
    k = torch.from_numpy(labels)[picked]
    W = means[0][1].double() / 1.5
    torch.testing.assert_close(W.norm(dim=1), torch.ones(len(W)).double() / 1.5)
    *_, slow1, slow2, first, second = maps                         # after both source networks

    def logits(model, last):
        pooled = last.mean((2, 3))
        neck = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
        neck = neck * scale[model]
        assert 10 < neck.norm(dim=1).mean() < 30                   # near sqrt(512) = 22.6
        return pooled, neck @ W.T
    for student, teacher in ((first, slow2), (second, slow1)):
        last = maps[student].detach().double().requires_grad_()
        pooled, z = logits(student, last)
        p = logits(teacher, maps[teacher].double())[1].softmax(1)
        smooth = F.one_hot(k, len(W)) * .9 + .1 / len(W)
        term = dict(id=slow.cross_entropy(z, smooth), soft=slow.cross_entropy(z, p),
                    ms=sskd.multi_similarity_loss(pooled, k),
                    nuc=-torch.linalg.svdvals(z.softmax(1)).sum() / 6)
        sum(weight[name] * term[name] for name in terms).backward()
        wanted = last.grad
        assert wanted.abs().max() > 1e-6
        close(maps[student].grad.double(), wanted, "another gradient than that of id L_id + soft "
              "L_soft + ms L_ms + nuc L_nuc reaches the last map", rtol=1e-3,
              atol=2e-4 * wanted.abs().max().item())


def test_soft_labels_are_free_of_the_camera(finished, tiny, other, tmp_path, watch):
    """From random weights (W): the direction of B(x) loses its camera's mean, its length stays;
    and the rows it meets are means of features without theirs, network by network."""
    outputs, lessons = watch(common, "forward"), watch(sskd, "soft_label_loss")
    said = watch(sskd, "soft_labels")
    extracted, batches = watch(common, "extract_features"), watch(common, "pk_batches")
    sskd.main(pair(other, tiny, tmp_path, "--sources", str(finished[0] / "source"), "--nets", "2",
                   "--epochs", "1", "--iters", "1"))
    cams = common.load(str(tiny))[0].cams
    each = [f.double() for _, f in extracted if len(f) == len(cams)]
    means = [torch.stack([f[cams == v].mean(0) for v in range(3)])[cams] for f in each]
    free = sum(F.normalize(f - m) for f, m in zip(each, means))
    labels, index = batches[0][0][0], said[0][0][4]
    rows = torch.stack([F.normalize(F.normalize(free)[labels == c].mean(0), dim=0)
                        for c in range(labels.max() + 1)])
    for i in range(2):
        neck = outputs[i][1][1].double()                           # of E_i, no gradient
        soft = lessons[1 - i][0][1]                                # the other one's lesson
        for b, m, found in zip(neck, means[i][index], soft):       # m: of the image's own camera
            wanted = (rows @ F.normalize(b / b.norm() - m, dim=0) * b.norm() / 1.6).softmax(0)
            assert (wanted - found).abs().max() < 1e-4


def test_slow_classifiers_follow_when_nothing_is_centred(tiny, other, resnet18, tmp_path,
                                                         monkeypatch):
    """As in the authors' code: started from given weights, the copies of the classifiers follow."""
    follow, shapes, augment, jitters = sskd.follow, [], common.augment, []

    def noted(copies, fast, alpha):
        copies, fast = list(copies), list(fast)
        shapes.append([tuple(x.shape) for x in (fast[0], fast[len(fast) // 2])])
        follow(copies, fast, alpha)
        assert all(torch.equal(a, b) for a, b in zip(copies, fast)) == (len(shapes) <= 2)
    monkeypatch.setattr(sskd, "follow", noted)
    monkeypatch.setattr(common, "augment", lambda *args, **more: (
        jitters.append(more.get("jitter", 0)), augment(*args, **more))[1])
    sskd.main(pair(other, tiny, tmp_path, *resnet18, "--batch-size", "4"))
    assert len(shapes) == 4 and shapes[0] == shapes[2] == [(64, 3, 7, 7)] * 2
    assert shapes[1] == shapes[3] and [width for _, width in shapes[1]] == [512, 512]
    assert not any(jitters)


def test_source_training_lets_the_target_pass_and_learns_the_source(tiny, other, tmp_path,
                                                                    monkeypatch, after_each_step):
    forward, learns, rates = common.forward, [], []
    monkeypatch.setattr(common, "forward", lambda *args, **more: (
        learns.append(torch.is_grad_enabled()), forward(*args, **more))[1])
    after_each_step.append(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    args = sskd.get_args(pair(other, tiny, tmp_path, "--source-epochs", "16", "--source-iters", "1",
                              "--lr", "1e-3", "--batch-size", "18"))
    images = common.read_images(common.load(str(tiny))[0], 64, 32)
    sskd.train_source(args, 2, torch.device("cpu"), images)
    assert learns == [False, True] * 16  # the target first, as in the code
    np.testing.assert_allclose(rates, [5.05e-4] + [1e-3] * 6 + [1e-4] * 6 + [1e-5] * 3)
    first, *_, last = losses(tmp_path / "source" / "2")
    assert last["source"] < 1 < 2 < first["source"]                # untrained it stays at 2.5


# ----------------------------------------------------------------------------------------- refusals

def test_pairs_that_are_refused(finished, tiny, other, tmp_path, capsys):
    sources = finished[0] / "source"

    def refuse(*flags, says, out=tmp_path / "out"):
        line = refusal(lambda: sskd.main(pair(other, tiny, out, *map(str, flags))), capsys)
        assert all(x in line for x in says), line
        assert not (tmp_path / "out" / "last.pt").exists()
    refuse("--source", tiny, says=["--source and --data", "two data sets"])
    refuse("--source", "/nowhere", says=["/nowhere"])
    refuse("--id", "0", "--ms", "0", "--soft", "0", says=["--id 0 --soft 0 --ms 0"])
    refuse("--sources", tmp_path / "nothing", "--nets", "1", says=["no source network", "(name an"])
    refuse("--lr", "1e9", says=["training diverged"])
    refuse("--sources", sources, "--arch", "resnet18",
           says=["--arch small, now resnet18", "choose another --sources"])
    refuse("--sources", sources, "--source", "toy-source", says=["--source", "now toy-source"])
    refuse("--sources", sources, "--source-epochs", "1", says=["--source-epochs 2, now 1"])
    single = draw(tmp_path / "single", train=12, test=2, cameras=2, shots=2)
    for path in (single / "bounding_box_train").iterdir():
        if "c1s1_000000" not in path.name:
            os.remove(path)
    refuse("--source", single, says=["single", "no person has two images"])
    refuse("--nets", "2", out=finished[0], says=["--nets 3, now 2"])
    (tmp_path / "half" / "1").mkdir(parents=True)
    whole = (sources / "1" / "last.pt").read_bytes()
    (tmp_path / "half" / "1" / "last.pt").write_bytes(whole[:4000])
    lower = ["--sources", tmp_path / "half", "--nets", "1"]
    refuse(*lower, says=[os.path.join("half", "1"), "last.pt"])
    state = common.load_checkpoint(str(sources / "1" / "last.pt"))
    common.save_checkpoint(str(tmp_path / "half" / "1" / "last.pt"), **{**state, "epoch": 1})
    refuse(*lower, says=["stopped after epoch 1 of 2", "--resume"])
    older(tmp_path / "half" / "1" / "last.pt")
    refuse(*lower, says=[os.path.join("half", "1"), "older version", "--out"])
    (tmp_path / "half" / "1" / "last.pt").write_bytes(whole)
    refuse(*lower[:2], says=["no source network in", os.path.join("half", "2"), "lower --nets"])
    shutil.copytree(sources, tmp_path / "out" / "source", dirs_exist_ok=True)
    refuse("--seed", "1", says=["--seed 0, now 1"])                # the run's own are of its seed


def test_sources_from_before_an_edit_serve_and_are_left_alone(finished, tiny, other, tmp_path):
    shutil.copytree(finished[0] / "source", tmp_path / "source")
    path = tmp_path / "source" / "1" / "last.pt"
    state = common.load_checkpoint(str(path))
    common.save_checkpoint(str(path), **{**state, "code": {"sskd.py": "0", "common.py": "0"}})
    before = path.read_bytes()
    sskd.main(pair(other, tiny, tmp_path / "out", "--sources", str(tmp_path / "source"), "--nets",
                   "1", "--epochs", "1"))
    assert losses(tmp_path / "out")[-1]["epoch"] == 1 and path.read_bytes() == before


@pytest.mark.parametrize("off", ["id", "soft", "ms", "nuc"])
def test_a_term_of_weight_0_is_not_there(off, tiny, other, tmp_path):
    sskd.main(pair(other, tiny, tmp_path, f"--{off}", "0", "--nets", "1", "--epochs", "1",
                   "--eps", "0", "--rho", ".15", "--batch-size", "4"))
    last = losses(tmp_path)[-1]
    assert {"id", "soft", "ms", "nuc"} - last.keys() == {off} and 0 < last["eps"] < 1


def test_settings_and_flags():
    assert sskd.get_args(["--data", "toy-source"]).source == "toy"
    assert sskd.get_args(["--data", "msmt17"]).source == "market1501"
    assert sskd.get_args(["--seed", str(2**32 - 1)]).seed == 2**32 - 1
    toy, market = sskd.get_args([]), sskd.get_args(["--source", "msmt17", "--data", "market1501"])
    assert (toy.source, toy.data, toy.arch) == ("toy-source", "toy", "small")
    assert (market.nets, market.id, market.soft, market.ms, market.nuc, market.alpha, market.rho,
            market.k1, market.lr, market.lr_drop >= market.epochs, market.batch_size,
            market.num_instances, market.iters, market.epochs, market.source_epochs,
            market.source_iters, market.bn_splits, market.temp) == (
        3, .5, .5, 3, 1.5, .999, 1.6e-3, 20, 3.5e-4, True, 64, 4, 400, 20, 80, 100, 4, 1)
