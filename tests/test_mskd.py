"""The own functions of mskd.py against loops in float64, and its two stages end to end."""

import json
import os

import numpy as np
import pytest
import slow
import torch
import torch.nn.functional as F
from conftest import (close, double, losses, permuted_ids, program, refusal, same_weights, short,
                      weights)

import common
import mskd


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    """Both stages, once, as a program. -> the folder of the run and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "mskd"
    return out, program("mskd.py", *short(tiny, out))


# ------------------------------------------------------------------------------------ its functions

def views(n, width=12, people=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, people, width, generator=g)
    return F.normalize(centres[:, torch.arange(n) % people]
                       + .6 * torch.randn(3, n, width, generator=g), dim=2)


@pytest.mark.parametrize("l1", [0, .15, .5])
@pytest.mark.parametrize("n, k1", [(60, 12), (90, 20), (9, 30)])
def test_mixed_distance_is_the_mix_of_three_dense_ones(n, k1, l1):
    features = views(n)
    features[:, 1] = features[:, 0]                                # a duplicate image
    sparse = mskd.mixed_distance(features, k1, l1)
    g, u, d = (slow.jaccard_distance(view, k1) for view in features)
    wanted = (1 - 2 * l1) * g + l1 * u + l1 * d
    np.testing.assert_allclose(slow.dense(sparse), wanted, atol=1e-5,
                               err_msg="not J = (1 - 2 l1) J_g + l1 J_u + l1 J_d")
    assert (sparse.diagonal() < 1e-6).all() and (sparse.nnz < n * n or n == 9)
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

def test_end_to_end_and_a_second_run_does_nothing(both, tiny):
    out, done = both
    assert done.returncode == 0, done.stderr
    teacher, student = losses(out / "teacher"), losses(out)
    assert [line["title"] for line in teacher] == ["start", "warmed up", "epoch 1/2", "epoch 2/2"]
    assert [line["title"] for line in student] == ["start", "warmed up", "first round", "epoch 1/2",
                                                   "epoch 2/2"]
    assert [line["epoch"] for line in student] == [0, 0, 0, 1, 2]
    assert "D_g" not in teacher[-1] and {"L_g", "L_u", "L_d", "D_g", "D_u", "D_d"} <= {*student[-1]}
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in files} == {
        "last.pt", "log.jsonl", os.path.join("teacher", "last.pt"),
        os.path.join("teacher", "log.jsonl")}
    again = program("mskd.py", *short(tiny, out))
    assert again.returncode == 0 and again.stdout.count("nothing to do") == 2
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for folder in (out, out / "teacher"):                          # scored with the global feature
        scores = json.loads(program("eval.py", folder, "--json").stdout)
        assert scores["mAP"] == losses(folder)[-1]["mAP"]


def test_stages_alone_equal_both(both, tiny, tmp_path):
    out, _ = both
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
    a, b = weights(both[0]), weights(tmp_path)
    same_weights(a, b, "with other training ids other weights: a true id reaches a training step")
    mskd.main(short(tiny, tmp_path / "c", "--true-ids"))           # here, and only here, ids matter
    assert not torch.equal(a["necks.0.weight"], weights(tmp_path / "c")["necks.0.weight"])


def test_the_student_round_by_round(both, tiny, tmp_path, monkeypatch, watch, after_each_step):
    """Total loss, learning rate, memories and whose features: as methods and schedule say."""
    rates, update, updates = [], common.update_memory, []
    after_each_step.append(lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    monkeypatch.setattr(common, "warm_up", lambda *args: None)
    monkeypatch.setattr(common, "update_memory", lambda *args: (
        updates.append(len(rates)), update(*args)))
    L, D, extracted = (watch(mskd, "view_losses"), watch(mskd, "distillation_losses"),
                       watch(common, "extract_features"))
    mskd.main(short(tiny, tmp_path, "--teacher", str(both[0] / "teacher"), "--l2", ".3", "--mu",
                    "2", "--lr-drop", "2", "--lr", "1e-3", "--epochs", "3", "--eval-every", "3"))
    assert len(L) == len(D) == 2 * 2 + 3 * 2  # the first round is twice as long
    np.testing.assert_allclose(rates, [1e-3] * 6 + [1e-4] * 4)     # the drops count that round
    assert updates == [n for n in range(5, 11) for _ in range(3)]  # it leaves its memories alone
    for calls, weight in ((L, 1), (D, 2)):
        for _, loss in calls:
            close(loss.grad, weight * torch.tensor([.7, .3, .3]), "other weights than those of "
                  "(1 - l2) (L_g + mu D_g) + l2 (L_u + mu D_u) + l2 (L_d + mu D_d)")
    # queries and gallery twice, the teacher's features of the training images, queries and gallery,
    # the student's features for each epoch, queries and gallery
    learns = [next(model.parameters()).requires_grad for (model, *_), _ in extracted]
    assert learns == [True] * 4 + [False] + [True] * 2 + [True] * 3 + [True] * 2


def test_both_stages_start_from_the_same_network(tiny, tmp_path, monkeypatch):
    first = []
    monkeypatch.setattr(common, "warm_up", lambda model, *args: first.append(
        {key: value.clone() for key, value in model.state_dict().items()}))
    mskd.main(short(tiny, tmp_path, "--true-ids"))
    assert len(first) == 2 and all(torch.equal(first[0][key], first[1][key]) for key in first[0])


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_no_step_changes_the_teacher(mode, both, tiny, tmp_path, watch):
    loaded = watch(mskd, "load_teacher")
    teacher = both[0] / "teacher"
    mskd.main(short(tiny, tmp_path, "--teacher", str(teacher), "--teacher-bn", mode))
    (_, kept), = loaded
    before, after = weights(teacher), dict(kept.named_parameters())
    same_weights(after, before, "the frozen teacher is trained")
    assert kept.training == (mode == "batch")
    if mode == "batch":  # the default from random weights is running
        assert losses(tmp_path)[-1]["D_g"] != losses(both[0])[-1]["D_g"]


# ----------------------------------------------------------------------------------------- refusals

def test_teachers_that_are_refused(both, tiny, tmp_path, capsys):
    out, _ = both
    teacher = out / "teacher" / "last.pt"

    def refuse(*more, says):
        line = refusal(lambda: mskd.main(short(tiny, tmp_path / "out", *map(str, more))), capsys)
        assert all(x in line for x in says), line
        assert not (tmp_path / "out" / "last.pt").exists()
    refuse("--stage", "student", says=["no teacher", "--stage teacher"])
    refuse("--stage", "teacher", "--teacher", teacher.parent, says=["--teacher", "--stage"])
    refuse("--teacher", teacher.parent, "--size", "96", "32", says=["--size (64, 32)", "(96, 32)"])
    refuse("--teacher", teacher.parent, "--arch", "resnet18", says=["--arch small", "resnet18"])
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
    out, _ = both
    (tmp_path / "last.pt").write_bytes((out / "last.pt").read_bytes())
    mskd.main(short(tiny, tmp_path, "--stage", "student"))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(common.Problem, match="OUT is OUT/teacher"):
        mskd.main(short(tiny, tmp_path / "b", "--teacher", str(out)))
    with pytest.raises(common.Problem, match="--stage teacher, now student"):
        mskd.main(short(tiny, out / "teacher", "--stage", "student"))


def test_a_finished_stage_with_other_flags_is_refused(both, tiny, capsys):
    out, _ = both
    before = (out / "last.pt").read_bytes(), (out / "teacher" / "last.pt").read_bytes()
    for more, says in ((["--eps", ".5"], "--eps 0.55, now 0.5"), (["--mu", "3"], "--mu 1, now 3"),
                       (["--epochs", "4"], "stopped after epoch 2 of 4"),
                       (["--epochs", "1"], "--epochs 2, now 1")):
        assert says in refusal(lambda: mskd.main(short(tiny, out, *more)), capsys)
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
