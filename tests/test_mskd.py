"""The own functions of mskd.py against loops in float64, and its two stages end to end."""

import json
import os

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from conftest import (change_clusters, check_end, check_features, check_forward, check_line,
                      check_scaler, check_seed, check_start, check_step, check_view, close,
                      collapse, double, learning, losses, permuted_ids, rate, refusal,
                      same_weights, short, spelled, stop_after, the_next, weights)

import common
import eval
import mskd


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """Both stages, once. -> the folder of the run."""
    out = tmp_path_factory.mktemp("runs") / "mskd"
    mskd.main(short(tiny, out))
    return out


# ------------------------------------------------------------------------------------ its functions

def views(n, width=12, people=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, people, width, generator=g)
    return F.normalize(centres[:, torch.arange(n) % people]
                       + .6 * torch.randn(3, n, width, generator=g), dim=2)


@pytest.mark.parametrize("l1", [0, .03, .15, .5])
@pytest.mark.parametrize("n, k1", [(60, 12), (90, 20), (9, 30)])
def test_mixed_distance_is_the_mix_of_three_dense_ones(n, k1, l1):
    features = views(n)
    features[:, 1] = features[:, 0]                                # a duplicate image
    sparse = mskd.mixed_distance(features, k1, l1)
    g, u, d = (slow.jaccard_distance(view, k1) for view in features)
    wanted = (1 - 2 * l1) * g + l1 * u + l1 * d
    np.testing.assert_allclose(slow.dense(sparse), wanted, atol=1e-5,
                               err_msg="not J = (1 - 2 l1) J_g + l1 J_u + l1 J_d")
    assert slow.dense(sparse)[0, 1] > .9 * common.DUPLICATE
    assert (sparse.diagonal() == 0).all() and (sparse.nnz < n * n or n == 9)
    for eps in (.35, .45, .6):
        labels = slow.dbscan(wanted, eps)
        assert (common.dbscan(sparse, eps, at_least=0) == labels).all()


def test_view_losses_and_distillation_losses():
    f, t, memory = (F.normalize(double(3, n, 5, seed=seed), dim=2).requires_grad_()
                    for seed, n in enumerate((8, 8, 4)))
    k = torch.arange(8) % 4
    got = [*mskd.view_losses(f, memory, k, .05), *mskd.distillation_losses(f, t)]
    assert torch.autograd.grad(sum(got), t, retain_graph=True, allow_unused=True)[0] is None, (
        "a gradient reaches the teacher: D lets the student pull t_v towards f_v")
    names = [f"{term}_{view}, {of}" for term, of in (
        ("L", "cross-entropy of <f_v, m_v> / tau"), ("D", "||f_v - t_v||^2")) for view in "gud"]
    wanted = [slow.cross_entropy(f[v] @ memory[v].T / .05, k) for v in range(3)]
    wanted += [sum(sum((f[v, i, j] - t[v, i, j].detach()) ** 2 for j in range(5))
                   for i in range(8)) / 8 for v in range(3)]
    for name, a, b in zip(names, got, wanted):
        close(a, b, f"another value than {name}", atol=1e-9, rtol=0)
        ga, gb = (torch.autograd.grad(x, f, retain_graph=True)[0] for x in (a, b))
        close(ga, gb, f"the value of {name}, but another gradient", atol=1e-9, rtol=1e-9)
        assert ga.abs().sum() > 0


# -------------------------------------------------------------------------------------- both stages

def test_end_to_end_and_a_second_run_does_nothing(both, tiny, capsys):
    teacher, student = losses(both / "teacher"), losses(both)
    assert [line["title"] for line in teacher] == ["start", "warmed up", "epoch 1/2", "epoch 2/2"]
    assert [line["title"] for line in student] == ["start", "warmed up", "first round", "epoch 1/2",
                                                   "epoch 2/2"]
    assert [line["epoch"] for line in student] == [0, 0, 0, 1, 2]
    assert "D_g" not in teacher[-1] and {"L_g", "L_u", "L_d", "D_g", "D_u", "D_d"} <= {*student[-1]}
    files = {path: path.read_bytes() for path in both.rglob("*") if path.is_file()}
    assert {str(path.relative_to(both)) for path in files} == {
        "last.pt", "log.jsonl", os.path.join("teacher", "last.pt"),
        os.path.join("teacher", "log.jsonl")}
    capsys.readouterr()
    assert mskd.main(short(tiny, both)) == common.load_run(str(both / "last.pt"))["scores"]
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert files == {path: path.read_bytes() for path in both.rglob("*") if path.is_file()}
    for folder in (both, both / "teacher"):                        # scored with the global feature
        eval.main([str(folder), "--json"])
        assert json.loads(capsys.readouterr().out)["mAP"] == losses(folder)[-1]["mAP"]


def test_stages_alone_equal_both(both, tiny, tmp_path):
    out = both
    mskd.main(short(tiny, tmp_path, "--stage", "teacher"))
    assert not (tmp_path / "last.pt").exists()
    mskd.main(short(tiny, tmp_path, "--stage", "student"))
    for folder in (".", "teacher"):
        a, b = weights(out / folder), weights(tmp_path / folder)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert losses(out / folder) == losses(tmp_path / folder)


def test_ids_do_not_leak(both, tiny, tmp_path):
    with permuted_ids(tiny):
        mskd.main(short(tiny, tmp_path))
    a, b = weights(both), weights(tmp_path)
    same_weights(a, b, "with other training ids other weights: a true id reaches a training step")
    mskd.main(short(tiny, tmp_path / "c", "--true-ids"))           # here, and only here, ids matter
    assert not torch.equal(a["necks.0.weight"], weights(tmp_path / "c")["necks.0.weight"])


# ----------------------------------------------------------------------------- the loop, as a whole
# Both stages of the docstring once more: plain, in float64. No two mistakes look the same: every
# weight, temperature and momentum is another number.

FLAGS = dict(l1=.2, l2=.3, mu=2, temp=.08, momentum=.3, eps=.57, k1=8, epochs=2, iters=2, lr=1e-3,
             lr_drop=0, bn_splits=2, batch_size=6, eval_every=2, seed=5, warm_up=3,
             teacher_bn="running")
P, K = 3, 2


def plain_labels(views, cams, flags, centred):
    """Step 2 -> labels. views (3, N, D): features of a network."""
    j = [slow.jaccard_distance(slow.centre(f, cams) if centred else f, flags["k1"]) for f in views]
    l1 = flags["l1"]
    distance = (1 - 2 * l1) * j[0] + l1 * j[1] + l1 * j[2]
    assert (abs(distance - flags["eps"]) > 1e-5).all()             # rounding decides nothing
    return slow.dbscan(distance, flags["eps"])


def plain_terms(f, t, memory, k, temp):
    """5b, 5c -> L_g, L_u, L_d and, from the teacher's t, D_g, D_u, D_d. f, t (3, B, D) float64."""
    terms = {}
    for v, view in enumerate("gud"):
        terms[f"L_{view}"] = slow.cross_entropy(f[v] @ memory[v].T / temp, k)
        if t is not None:
            terms[f"D_{view}"] = sum((a - b).square().sum() for a, b in zip(f[v], t[v])) / len(k)
    return terms


RUNS = {  # what differs from FLAGS and further words
    "both stages": (dict(), []),
    "the batch's statistics, resumed": (dict(teacher_bn="batch", lr_drop=2, epochs=3),
                                        ["--resume", "--on-collapse", "skip"]),
    "not centred": (dict(weights="given", eps=.52, k1=6, seed=6, eval_every=1), []),
    "no distillation": (dict(mu=0, iters=1, lr_drop=1), ["--quick", "--true-ids"])}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_docstring(name, tiny, tmp_path, monkeypatch, story):
    """Every step of both stages: what it starts from, its loss, all gradients, memories, Adam, log.
    """
    change, more = RUNS[name]
    flags = {**FLAGS, **change}
    argv = short(tiny, tmp_path, *spelled(flags), *more)
    if "--resume" in more:
        change_clusters(collapse({1, 4}), monkeypatch)             # the first after each stop
        for epoch in (1, 0):                                       # the teacher, the first round
            stop_after(epoch, monkeypatch)
            with pytest.raises(KeyboardInterrupt):
                mskd.main(argv)
    result = mskd.main(argv)
    check_end(tmp_path)
    assert mskd.main(argv) == result                               # nothing to do: tells nothing
    train = common.load(str(tiny))[0]
    images = common.read_images(train, 64, 32)
    told = story
    first, teacher, _ = follow(told, flags, more, train, images)
    second, _, line = follow(told, flags, more, train, images, teacher)
    assert not told, f"more happens: {told[0].kind}"
    if first:
        same_weights(first.state_dict(), second.state_dict(), "the student starts from another "
                     "network than the teacher")
    assert result == line.scores and len(result) == 5


def follow(told, flags, more, train, images, teacher=None):
    """One stage -> the network it starts with, name -> parameter at its end, its last line."""
    cams, skip, random = train.cams, "skip" in more, "weights" not in flags
    labels, moments, trained, draws = None, {}, {}, None
    network = check_start(told, {**flags, "quick": "--quick" in more}, images, cams)
    first = -1 if teacher else 0
    for epoch in range(first, flags["epochs"]):
        if "--resume" in more and epoch == (0 if teacher else 1):
            check_seed(told, flags)

        # 1 to 4
        features = check_features(told, images, teacher if epoch < 0 else trained)
        last = labels
        if "--true-ids" in more:
            labels = train.pids - 1
        else:
            clustered = the_next(told, "dbscan", "step 2: DBSCAN")
            assert clustered.at_least == P, "a batch needs P clusters"
            if not skip:
                assert clustered.instead is None, "--on-collapse stop goes on with old labels"
            if not (skip and last is not None
                    and clustered.result is clustered.objects["instead"]):
                labels = plain_labels(features, cams, flags, random)
            assert (clustered.result == labels).all(), (
                "step 2: other labels than DBSCAN on the mixed distance of the "
                + ("centred " * random) + "views")
        memory = [slow.means(f, labels) for f in features]
        drawn = the_next(told, "pk_batches", "step 5 draws batches")
        iters = flags["iters"] * (2 if epoch < 0 else 1)
        assert (drawn.labels == labels).all(), "batches are not drawn by the labels of step 2"
        assert (drawn.cams == cams).all() and (drawn.p, drawn.k) == (P, K), "not P x K images"
        assert drawn.iters == iters, "another number of batches (twice as many in the first round)"
        assert draws is None or torch.equal(drawn.generator, draws), "random numbers start anew"

        # 5
        means = {}
        for step in range(iters):
            index = the_next(told, "index", "a batch is drawn").index
            view = check_view(told, index, images, random)
            ran = check_forward(told, view, flags["bn_splits"], parts=2)
            net, k, t = ran.model.double(), torch.from_numpy(labels)[index], None
            f = slow.encode(net, view, flags["bn_splits"])[2]
            if teacher and flags["mu"]:
                taught = the_next(told, "forward", "5c: the teacher sees the batch")
                assert torch.equal(taught.images, view), "5c: not the images of the student"
                assert taught.splits == flags["bn_splits"] and not taught.grad, (
                    "a gradient reaches the teacher")
                same_weights(dict(taught.model.named_parameters()), teacher, "another teacher")
                assert taught.model.training == (flags["teacher_bn"] == "batch"), (
                    "the teacher normalises by other statistics than --teacher-bn says")
                t = slow.encode(taught.model.double(), view, flags["bn_splits"])[2].detach()
            terms = plain_terms(f, t, memory, k, flags["temp"])
            weight = dict(g=1 - flags["l2"], u=flags["l2"], d=flags["l2"])
            total = sum(weight[name[2]] * (flags["mu"] if name[0] == "D" else 1) * term
                        for name, term in terms.items())
            for name, term in terms.items():
                assert term.item() > 1e-3
                means[name] = means.get(name, 0) + term.item() / iters
            loss = the_next(told, "loss", "5f: the total loss")
            assert loss.value.item() == pytest.approx(total.item(), rel=1e-3), (
                "5f: another total loss than (1 - l2) (L_g + mu D_g) + l2 (L_u + mu D_u) + l2 (L_d "
                "+ mu D_d)")
            stepped = the_next(told, "step", "5f: a step of the optimiser")
            check_step(stepped, learning(ran, net, total), moments, rate(
                flags, epoch - first, flags["epochs"] - first, step, iters))
            if epoch >= 0:
                for v in range(3):
                    memory[v] = slow.update_memory(memory[v], f[v].detach(), k, flags["momentum"])
                    update = the_next(told, "update_memory", "5g: three memories")
                    close(update.after["memory"].double(), memory[v], "5g: another memory than m_v "
                          "<- a m_v + (1 - a) f_v of the batch", atol=1e-4, rtol=0)

        # 6
        trained = {name: stepped.after[id(p)]
                   for name, p in ran.objects["model"].named_parameters()}
        line = check_line(told, flags, epoch, trained, labels, means)
        assert line.title == (f"epoch {epoch + 1}/{flags['epochs']}" if epoch >= 0
                              else "first round")
        assert line.quality == common.label_quality(labels, train.pids), "quality of other labels"
        draws = line.keep["generator"]
    return network, trained, line


def test_fp16_is_scaled(tiny, tmp_path, monkeypatch, story):
    argv = short(tiny, tmp_path, *spelled(FLAGS), "--precision", "fp16")
    check_scaler(story, lambda: mskd.main(argv), monkeypatch)


# ----------------------------------------------------------------------------------------- refusals

def test_teachers_that_are_refused(both, tiny, tmp_path, capsys):
    out = both
    teacher = out / "teacher" / "last.pt"

    def refuse(*more, says):
        line = refusal(lambda: mskd.main(short(tiny, tmp_path / "out", *map(str, more))), capsys)
        assert all(x in line for x in says), line
        assert not (tmp_path / "out" / "last.pt").exists()
    refuse("--stage", "student", says=["no teacher", "--stage teacher"])
    refuse("--stage", "teacher", "--teacher", teacher.parent, says=["--teacher", "--stage"])
    refuse("--teacher", teacher.parent, "--size", "96", "32", says=["--size (64, 32)", "(96, 32)"])
    refuse("--teacher", teacher.parent, "--arch", "resnet18", says=["--arch small", "resnet18"])
    refuse("--teacher", teacher.parent, "--data", "/elsewhere", says=["--data", "not /elsewhere"])
    refuse("--size", "80", "32", says=["--size 80", "multiple of 32"])
    refuse("--l1", ".6", says=["--l1"])
    state = common.load_checkpoint(str(teacher))
    for name, change, says in (("early", dict(epoch=1), "epoch 1 of 2"),
                               ("whole", dict(parts=0), "no teacher"),
                               ("pupil", dict(stage="student"), "no teacher")):
        (tmp_path / name).mkdir()
        model = common.Encoder("small", "none", change.get("parts", 2)).state_dict()
        common.save_checkpoint(str(tmp_path / name / "last.pt"),
                               **{**state, "model": model, **change})
        refuse("--teacher", tmp_path / name, says=[name, says])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "last.pt").write_bytes(teacher.read_bytes()[:5000])
    refuse("--teacher", tmp_path / "half", says=["half", "cannot be read"])


def test_a_finished_student_needs_no_teacher_but_is_none_itself(both, tiny, tmp_path, capsys):
    out = both
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes())
    mskd.main(short(tiny, tmp_path, "--stage", "student"))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(common.Problem, match="OUT is OUT/teacher"):
        mskd.main(short(tiny, tmp_path / "b", "--teacher", str(out)))
    with pytest.raises(common.Problem, match="--stage teacher, now student"):
        mskd.main(short(tiny, out / "teacher", "--stage", "student"))


def test_a_finished_stage_with_other_flags_is_refused(both, tiny, capsys):
    out = both
    before = (out / "last.pt").read_bytes(), (out / "teacher" / "last.pt").read_bytes()
    for more, says in ((["--eps", ".5"], "--eps 0.55, now 0.5"), (["--mu", "3"], "--mu 1, now 3"),
                       (["--epochs", "4"], "stopped after epoch 2 of 4"),
                       (["--epochs", "1"], "--epochs 2, now 1")):
        assert says in refusal(lambda: mskd.main(short(tiny, out, *more)), capsys)
    mskd.main(short(tiny, out, "--mu", "3", "--stage", "teacher"))
    assert "nothing to do" in capsys.readouterr().out              # mu is a flag of the student
    assert before == ((out / "last.pt").read_bytes(), (out / "teacher" / "last.pt").read_bytes())


def test_settings_and_flags():
    toy, market = mskd.get_args([]), mskd.get_args(["--data", "market1501"])
    msmt = mskd.get_args(["--data", "msmt17"])
    assert (toy.arch, toy.teacher_bn, toy.out) == (
        "small", "running", os.path.join("runs", "mskd-toy-s0"))
    assert (market.l1, market.l2, market.mu, market.eps, market.iters, market.epochs, market.lr,
            market.lr_drop, market.bn_splits, market.batch_size, market.num_instances, market.k1,
            market.temp, market.momentum, market.teacher_bn) == (
        .15, .2, 1, .6, 200, 50, 3.5e-4, 20, 4, 256, 16, 30, .05, .1, "batch")  # the authors' code
    assert (msmt.eps, msmt.iters, msmt.l1) == (.7, 400, .15)
