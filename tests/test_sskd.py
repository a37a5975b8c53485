"""The own functions of sskd.py against loops in float64, and its two stages end to end."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from conftest import (change_clusters, check_end, check_features, check_forward, check_line,
                      check_scaler, check_seed, check_step, check_view, close, collapse, double,
                      draw, learning, losses, older, permuted_ids, rate, refusal, same_loss,
                      same_weights, short, spelled, stop_after, the_next, weights)
from scipy.sparse import csr_array

import common
import eval
import sskd


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A labelled source: other people than the target's, other shots."""
    return draw(tmp_path_factory.mktemp("data") / "other", train=9, test=2, cameras=2, shots=4)


SHORT = ["--source-epochs", "2", "--source-iters", "4", "--temp", "1.6", "--batch-size", "6"]


def pair(other, folder, out, *more):
    return short(folder, out, "--source", str(other), *SHORT, *more)


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module")
def finished(tiny, other, tmp_path_factory):
    """Source training and adaptation, once. -> the folder of the run."""
    out = tmp_path_factory.mktemp("runs") / "sskd"
    sskd.main(pair(other, tiny, out))
    return out


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


def plain_ms(x, labels):
    unit, total, n = F.normalize(x), 0, range(len(x))
    for i in n:
        s = unit @ unit[i]
        positive = [s[j] for j in n if labels[j] == labels[i] and s[j] < 1 - 1e-5]
        negative = [s[j] for j in n if labels[j] != labels[i]]
        kept = [p for p in positive if p - .1 < max(negative)]
        hard = [q for q in negative if q + .1 > min(positive)]
        if kept and hard:
            total = total + torch.log(1 + sum(torch.exp(-2 * (p - .5)) for p in kept)) / 2
            total = total + torch.log(1 + sum(torch.exp(40 * (q - .5)) for q in hard)) / 40
    return total / len(x)


@pytest.mark.parametrize("spread", [.3, 1, 3])
def test_multi_similarity_loss(spread):
    labels = torch.arange(16) // 4
    pooled = double(4, 6, seed=2)[labels] + spread * double(16, 6, seed=3)
    pooled[1] = pooled[0] * 2                                      # a pair at cosine 1 is left out
    same_loss("L_ms of hard positives and negatives",
              lambda x: sskd.multi_similarity_loss(x, labels),
              lambda x: plain_ms(x, labels), pooled, 1e-6, 1e-4)


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
    sskd.nuclear_norm_loss(math.nan * sure)                        # is left to the other terms


# -------------------------------------------------------------------------------------- both stages

def test_end_to_end_and_a_second_run_has_nothing_to_do(finished, tiny, other, capsys):
    out = finished
    assert [line["title"] for line in losses(out)] == ["source only", "epoch 1/2", "epoch 2/2"]
    assert {"id", "soft", "ms", "nuc", "eps", "mAP"} <= losses(out)[-1].keys()
    for n in "123":
        assert losses(out / "source" / n)[-1]["epoch"] == 2
    a, b = (weights(out / "source" / n)["necks.0.weight"] for n in "12")
    assert not torch.equal(a, b)                                   # networks of different seeds
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    sskd.main(pair(other, tiny, out))
    assert "nothing to do" in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    eval.main([str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["mAP"] == losses(out)[-1]["mAP"]


def test_sources_are_trained_once_and_target_ids_do_not_leak(finished, tiny, other, tmp_path):
    with permuted_ids(tiny):                                       # the source is not even read
        sskd.main(pair(other, tiny, tmp_path, "--sources", str(finished / "source")))
    a, b = weights(finished), weights(tmp_path)
    same_weights(a, b, "with other target ids other weights: a true id reaches a training step")
    assert losses(finished) == losses(tmp_path)
    sskd.main(pair(other, tiny, tmp_path / "c", "--sources", str(finished / "source"),
                   "--true-ids"))
    assert not torch.equal(a["necks.0.weight"], weights(tmp_path / "c")["necks.0.weight"])


# ----------------------------------------------------------------------------- the loop, as a whole
# Both stages of the docstring once more: plain, in float64. No two mistakes look the same: every
# weight and temperature is another number.

FLAGS = dict(nets=2, id=.7, soft=.4, ms=3, nuc=1.5, alpha=.6, temp=1.7, rho=.06, eps=0, k1=8,
             source_epochs=2, source_iters=2, epochs=2, iters=2, lr=1e-3, lr_drop=0, bn_splits=2,
             batch_size=6, eval_every=2, seed=5)
P, K = 3, 2


def plain_terms(pooled, z, soft, k, flags):
    """5b to 5e -> the terms that are on. pooled (B, D); z, soft (B, C), k (B,)."""
    smooth = F.one_hot(k, z.shape[1]) * .9 + .1 / z.shape[1]
    terms = dict(id=slow.cross_entropy(z, smooth), ms=plain_ms(pooled, k),
                 nuc=-torch.linalg.svdvals(z.softmax(1)).sum() / len(z))
    if soft is not None:
        terms["soft"] = slow.cross_entropy(z, soft)
    return {name: term for name, term in terms.items() if flags[name]}


def plain_soft(necks, rows, camera_means, temp):
    """5c -> distributions (B, C): what a copy says. necks (B, D); rows (C, D): its classifier;
    camera_means (B, D), of each image's camera, or None."""
    said = []
    for i, b in enumerate(necks):
        if camera_means is not None:
            free = b / b.norm() - camera_means[i]
            b = free / free.norm() * b.norm()
        said.append((rows @ b / temp).softmax(0))
    return torch.stack(said)


def plain_radius(distance, rho):
    """Step 2: the mean of the smallest share rho of the distances of all pairs."""
    pairs = np.sort(distance[np.triu_indices(len(distance), 1)])
    pairs = pairs[pairs > 2e-6]                                    # duplicates do not count
    return pairs[:max(1, round(rho * len(pairs)))].mean()


def statistics(net, pooled, splits):
    """-> the running mean of the neck after a forward pass in training mode."""
    mean = net.necks[0].running_mean
    for chunk in pooled.chunk(splits):
        mean = .9 * mean + .1 * chunk.mean(0)
    return mean.detach()


def follow_source(told, flags, i, source, images, resumed):
    """Step 0: a source network."""
    own, y = common.read_images(source, 64, 32), source.pids - 1
    seed, moments, iters = dict(seed=9 * flags["seed"] + i), {}, flags["source_iters"]
    check_seed(told, seed)
    for epoch in range(flags["source_epochs"]):
        if resumed and epoch == 1:
            check_seed(told, seed)
        drawn = the_next(told, "pk_batches", "the source network draws batches")
        assert (drawn.labels == y).all() and (drawn.cams == source.cams).all(), "not by its people"
        assert (drawn.p, drawn.k, drawn.iters) == (P, K, iters)
        assert epoch == 0 or torch.equal(drawn.generator, draws), "random numbers start anew"
        mean = 0
        for _ in range(iters):
            index = the_next(told, "index", "a batch is drawn").index
            target = told[0].images
            picked = [next(j for j, x in enumerate(images) if torch.equal(x, one))
                      for one in target]
            assert len(set(picked)) == P * K, "not as many target images"
            ran = check_forward(told, check_view(told, picked, images, 0, erase=0),
                                flags["bn_splits"], pooling="avg")
            assert not ran.grad, "the target's images are forwarded for their statistics only"
            view = check_view(told, index, own, 0, erase=0)
            ran = check_forward(told, view, flags["bn_splits"], True, pooling="avg")
            loss = the_next(told, "loss", "the source's loss")
            step = the_next(told, "step", "a step on the source")
            network = {id(p) for p in ran.objects["model"].parameters()}
            classifier, = (p for p in step.ids if p not in network)
            rows = step.before[classifier].double().requires_grad_()
            net, k = ran.model.double(), torch.from_numpy(y)[index]
            pooled, necks, _ = slow.encode(net, view, flags["bn_splits"])
            terms = plain_terms(pooled[0], necks[0] @ rows.T / flags["temp"], None, k,
                                dict(id=1, ms=1, nuc=1))
            total = terms["id"] + terms["ms"] + 2 * terms["nuc"]
            assert loss.value.item() == pytest.approx(total.item(), rel=1e-3), (
                "another loss on the source than L_id + L_ms + 2 L_nuc")
            mean += total.item() / iters
            done = (epoch + 1) / flags["source_epochs"]
            lr = flags["lr"] * min(1, .01 + .99 * 8 * done) * .1 ** (
                (done >= 1 / 2) + (done >= 7 / 8))
            check_step(step, learning(ran, net, total, ("classifier", classifier, rows)),
                       moments, lr)
        line = the_next(told, "line", "a line of the source's log")
        assert line.title == f"source {i}, {epoch + 1}" and line.epoch == epoch + 1
        assert line.losses == pytest.approx(dict(source=mean), rel=1e-3)
        assert (line.keep["labels"] == y).all()
        draws = line.keep["generator"]


def follow(told, flags, more, train, images, sources, result):
    """The stage on the target. sources: the weights of M_1..M_n, which E_1..E_n start with."""
    cams, random = train.cams, "weights" not in flags
    n, skip, splits, iters = flags["nets"], "skip" in more, flags["bn_splits"], flags["iters"]
    labels, radius, draws, copies = None, None, None, None
    check_seed(told, flags)
    line = None
    if "--quick" not in more:
        line = the_next(told, "test", "the first source network is scored")
        same_weights(line.model.state_dict(), sources[0], "not the first source network")
    start = the_next(told, "line", "its scores are logged")
    assert (start.title, start.scores) == ("source only", line.result if line else {})
    students = list(sources)
    E = [{name: value.double() for name, value in one.items()} for one in sources]
    for epoch in range(flags["epochs"]):
        if "--sources" in more and epoch == 1:
            check_seed(told, flags)                                # it was interrupted

        # 1 to 4
        each = []
        for i in range(n):
            if not copies:
                same_weights(told[0].model.state_dict(), sources[i], "step 1 is not of E_i = M_i")
            each.append(check_features(told, images, copies and copies[i])[0])
        features = F.normalize(sum(each))
        centred = F.normalize(sum(slow.centre(f, cams) for f in each)) if random else features
        last = labels
        if "--true-ids" in more:
            labels, radius = train.pids - 1, 0
        else:
            clustered = the_next(told, "dbscan", "step 2: DBSCAN")
            distance = slow.jaccard_distance(centred, flags["k1"])
            if flags["eps"] or epoch == 0:
                radius = flags["eps"] or plain_radius(distance, flags["rho"])
            assert clustered.eps == pytest.approx(radius, abs=1e-5), (
                "another radius than that of the first epoch, the mean of the smallest distances")
            assert (abs(distance - radius) > 2e-5).all()           # rounding decides nothing
            assert clustered.at_least == P, "a batch needs P clusters"
            assert clustered.flag == ("--eps" if flags["eps"] else "--rho")
            if not skip:
                assert clustered.instead is None, "--on-collapse stop goes on with old labels"
            if not (skip and last is not None
                    and clustered.result is clustered.objects["instead"]):
                labels = slow.dbscan(distance, radius)
            assert (clustered.result == labels).all(), (
                "step 2: other labels than DBSCAN on the Jaccard distance of the "
                + ("centred " * random) + "features")
        A = [slow.means(features, labels)] * n
        V = [slow.means(centred, labels)] * n
        camera_means = None
        if random:
            camera_means = [torch.stack([f[cams == v].mean(0) for v in cams]) for f in each]
        drawn = the_next(told, "pk_batches", "step 5 draws batches")
        assert (drawn.labels == labels).all(), "batches are not drawn by the labels of step 2"
        assert (drawn.cams == cams).all() and (drawn.p, drawn.k, drawn.iters) == (P, K, iters), (
            "not P clusters x K images, or another number of batches")
        assert draws is None or torch.equal(drawn.generator, draws), "random numbers start anew"

        # 5
        means, moments, norm = {}, {}, [None] * n                  # a new Adam
        for step in range(iters):
            index = the_next(told, "index", "a batch is drawn").index
            k = torch.from_numpy(labels)[index]
            views = [check_view(told, index, images, random)
                     for _ in range(1 if "--shared-view" in more else n)]
            views = (views * n)[:n]
            soft = []
            for i in range(n):                                     # 5c
                ran = check_forward(told, views[i], splits, True, pooling="avg")
                assert not ran.grad, "a gradient reaches the slow copy that says soft labels"
                assert not any(p.requires_grad for p in ran.model.parameters()), "E is trained"
                net = ran.model.double()
                for name, p in net.named_parameters():
                    close(p, E[i][name], "5g: another slow copy than alpha E + (1 - alpha) M",
                          atol=1e-5, rtol=1e-4)
                if norm[i] is not None:
                    close(net.necks[0].running_mean, norm[i], "E's statistics are not its own",
                          atol=2e-6, rtol=2e-5)
                pooled, necks, _ = slow.encode(net, views[i], splits)
                norm[i] = statistics(net, pooled[0], splits)
                soft.append(plain_soft(necks[0].detach(), V[i], random and camera_means[i][index]
                                       if random else None, flags["temp"]).detach())
            calls = [(check_forward(told, views[i], splits, True, pooling="avg"),
                      the_next(told, "loss", "5f: the total loss")) for i in range(n)]
            stepped = the_next(told, "step", "5f: one step of all")
            networks = [dict(ran.objects["model"].named_parameters()) for ran, _ in calls]
            inner = {id(p) for network in networks for p in network.values()}
            assert len(inner) == sum(map(len, networks)), "not n networks"
            classifiers, parameters = [p for p in stepped.ids if p not in inner], []
            assert len(classifiers) == n, "not a classifier for each network"
            for i, (ran, loss) in enumerate(calls):
                rows = stepped.before[classifiers[i]].double().requires_grad_()
                if step == 0:
                    close(rows.detach(), A[i], "step 4: other classifiers than the clusters' means "
                          "of features that are not centred", atol=1e-4, rtol=0)
                same_weights(dict(ran.model.named_parameters()), students[i], "M_i is not what the "
                             "step before left, or, at first, the source network i")
                students[i] = {name: stepped.after[id(p)] for name, p in networks[i].items()}
                net = ran.model.double()
                pooled, necks, _ = slow.encode(net, views[i], splits)
                terms = plain_terms(pooled[0], necks[0] @ rows.T / flags["temp"],
                                    soft[(i + 1) % n], k, flags)
                total = sum(flags[name] * term for name, term in terms.items())
                assert loss.value.item() == pytest.approx(total.item(), rel=1e-3), (
                    f"5f: another loss of network {i + 1} than id L_id + soft L_soft + ms L_ms + "
                    "nuc L_nuc, soft labels from its peer, the next slow copy")
                parameters += [(f"M_{i + 1} {name}", p, wanted) for name, p, wanted in learning(
                    ran, net, total, ("classifier", classifiers[i], rows))]
                p = soft[i]
                terms.update(soft_clusters=-(p * p.log()).sum(1).mean(),
                             soft_own=p[range(P * K), k].mean())
                for name, term in terms.items():
                    assert abs(term.item()) > 1e-4
                    means[name] = means.get(name, 0) + term.item() / iters / n
            check_step(stepped, parameters, moments,
                       rate(flags, epoch, flags["epochs"], step, iters))
            alpha = min(1 - 1 / (epoch * iters + step + 1), flags["alpha"])
            for i, network in enumerate(networks):
                for name, p in network.items():
                    E[i][name] = alpha * E[i][name] + (1 - alpha) * stepped.after[id(p)]
                if not random:
                    V[i] = alpha * V[i] + (1 - alpha) * stepped.after[classifiers[i]]

        # 6
        kept = next(event for event in told if event.kind == "line").keep
        for i, net in enumerate(kept["slow"]):
            for name, p in net.named_parameters():
                close(p.double(), E[i][name], "5g: another slow copy than alpha E + (1 - alpha) M",
                      atol=1e-5, rtol=1e-4)
            close(net.necks[0].running_mean.double(), norm[i], "E's statistics are not its own",
                  atol=2e-6, rtol=2e-5)
        copies = [dict(net.named_parameters()) for net in kept["slow"]]
        means["soft_clusters"] = math.exp(means["soft_clusters"])
        line = check_line(told, flags, epoch, copies[0], labels, means)
        assert line.title == f"epoch {epoch + 1}/{flags['epochs']}"
        assert line.quality == common.label_quality(labels, train.pids), "quality of other labels"
        assert line.more["eps"] == pytest.approx(radius, abs=1e-5)
        draws = kept["generator"]
    assert not told, f"more happens: {told[0].kind}"
    assert result == line.scores and len(result) == 5


RUNS = {  # what differs from FLAGS and further words
    "sources, resumed": (dict(), ["--resume"]),
    "three networks, resumed": (
        dict(nets=3, epochs=3, lr_drop=2, alpha=.7, temp=1.6, bn_splits=1, source_iters=4, seed=0),
        ["--resume", "--on-collapse", "skip", "--sources"]),
    "not centred": (dict(weights="given", nets=2, eps=.62, k1=6, seed=8, alpha=.45, lr=.01,
                         iters=3, epochs=1, source_epochs=1, source_iters=1), []),
    "one network, two terms": (dict(nets=1, id=0, nuc=0, source_epochs=16, source_iters=1,
                                    epochs=1), []),
    "one view, two terms": (dict(soft=0, ms=0, source_epochs=1, source_iters=1, epochs=1),
                            ["--shared-view", "--true-ids", "--quick"])}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_docstring(name, finished, tiny, other, tmp_path, monkeypatch, story):
    """Every step of both stages: what it starts from, all losses and gradients, slow copies,
    classifiers, Adam, log."""
    change, more = RUNS[name]
    monkeypatch.setattr(sskd, "SAVE_EVERY", 1)
    flags, home = {**FLAGS, **change}, tmp_path
    more = [*more, str(finished / "source")] if "--sources" in more else more
    argv = pair(other, tiny, tmp_path, *spelled(flags), *more)
    if "--sources" in more:
        home = finished
        change_clusters(collapse({1}), monkeypatch)                # the first after the stop
    if "--resume" in more:                                         # a source, or the first epoch
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            sskd.main(argv)
    result = sskd.main(argv)
    check_end(tmp_path)
    assert sskd.main(argv) == result                               # nothing to do: tells nothing
    source, train = common.load(str(other))[0], common.load(str(tiny))[0]
    images, told = common.read_images(train, 64, 32), list(story)
    each = range(1, flags["nets"] + 1)
    if "--sources" not in more:
        for i in each:
            follow_source(told, flags, i, source, images, "--resume" in more and i == 1)
    trained = [weights(home / "source" / str(i)) for i in each]
    follow(told, flags, more, train, images, trained, result)


def test_a_source_is_saved_now_and_then_and_at_its_end(other, tiny, tmp_path, monkeypatch):
    """Its checkpoints are large; a run that is stopped goes on after the last of them."""
    save, saved = common.save_checkpoint, []

    def noted(path, **state):
        saved.append(state["epoch"])
        save(path, **state)
    monkeypatch.setattr(sskd, "SAVE_EVERY", 2)
    monkeypatch.setattr(common, "save_checkpoint", noted)
    sskd.main(pair(other, tiny, tmp_path, *spelled({**FLAGS, "nets": 1, "source_epochs": 5,
                                                    "source_iters": 1, "iters": 1, "epochs": 1})))
    assert saved == [2, 4, 5, 1]
    lines = losses(tmp_path / "source" / "1")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]


def test_fp16_is_scaled(finished, tiny, other, tmp_path, monkeypatch, story):
    argv = pair(other, tiny, tmp_path, *spelled(FLAGS), "--precision", "fp16")
    check_scaler(story, lambda: sskd.main(argv), monkeypatch)


# ----------------------------------------------------------------------------------------- refusals

def test_pairs_that_are_refused(finished, tiny, other, tmp_path, capsys):
    sources = finished / "source"

    def refuse(*flags, says, out=tmp_path / "out"):
        line = refusal(lambda: sskd.main(pair(other, tiny, out, *map(str, flags))), capsys)
        assert all(x in line for x in says), line
        assert not (tmp_path / "out" / "last.pt").exists()
    refuse("--source", tiny, says=["--source and --data", "two data sets"])
    refuse("--source", "/nowhere", says=["/nowhere"])
    refuse("--id", "0", "--ms", "0", "--soft", "0", says=["--id 0 --soft 0 --ms 0"])
    refuse("--sources", tmp_path / "nothing", "--nets", "1", says=["no source network", "(name an"])
    with pytest.MonkeyPatch.context() as only:
        only.setattr(sskd, "nuclear_norm_loss", lambda z: math.nan * z.sum())
        refuse(says=["not finite: source", "training diverged"])
    refuse("--sources", sources, "--arch", "resnet18",
           says=["--arch small, now resnet18", "choose another --sources"])
    refuse("--sources", sources, "--source", "toy-source", says=["--source", "now toy-source"])
    refuse("--sources", sources, "--source-epochs", "1", says=["--source-epochs 2, now 1"])
    single = draw(tmp_path / "single", train=12, test=2, cameras=2, shots=2)
    for path in (single / "bounding_box_train").iterdir():
        if "c1s1_000000" not in path.name:
            os.remove(path)
    refuse("--source", single, says=["single", "no person has two images"])
    refuse("--nets", "2", out=finished, says=["--nets 3, now 2"])
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
    shutil.copytree(finished / "source", tmp_path / "source")
    path = tmp_path / "source" / "1" / "last.pt"
    state = common.load_checkpoint(str(path))
    common.save_checkpoint(str(path), **{**state, "code": {"sskd.py": "0", "common.py": "0"}})
    before = path.read_bytes()
    sskd.main(pair(other, tiny, tmp_path / "out", "--sources", str(tmp_path / "source"), "--nets",
                   "1", "--epochs", "1"))
    assert losses(tmp_path / "out")[-1]["epoch"] == 1 and path.read_bytes() == before


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
