"""The program that compares teacher and student with the true ids: its counts, and that watching
changes nothing."""

import numpy as np
import pytest
import torch
from conftest import SHORT, program, same_weights, short, weights

import ccsd
import common
import knowledge
import mskd
import sskd

PAGES = {ccsd: "distillation_loss", mskd: "distillation_losses", sskd: "soft_label_loss"}


@pytest.fixture
def watch(monkeypatch):
    """-> a function that watches a page until the end of the test."""
    for module, name in ((common, "read_data"), (common, "pk_batches"), *PAGES.items()):
        monkeypatch.setattr(module, name, getattr(module, name))
    return knowledge.Watch


def batch_of(watching, rng, n=40, p=5, k=4):
    """Give it a training set with noisy labels, and draw a batch -> labels, cams, index."""
    pids, cams = rng.integers(0, 8, n), rng.integers(0, 3, n)
    labels = common.renumber(np.where(rng.random(n) < .3, rng.integers(0, 8, n), pids))
    watching.train = common.Split([""] * n, pids, cams)
    index, = common.pk_batches(labels, cams, p, k, 1, torch.Generator().manual_seed(0))
    watching.index = index.numpy()
    return labels, cams, index


def counted(choices):
    """List of (label, teacher, student right; do they differ) -> the first 9 columns."""
    label, t, s, differ = np.array(choices).T.astype(bool)
    return [100 * x.mean() for x in (label, t, s, differ, t[differ], s[differ], ~label, t[~label],
                                     s[~label])]


def test_ccsd_choices_are_counted_once_for_every_other_camera(watch):
    watching, rng = watch(ccsd), np.random.default_rng(0)
    labels, cams, index = batch_of(watching, rng)
    groups, parent, camera, table = ccsd.split_by_camera(labels, cams)
    similarity = rng.random((len(index), len(parent))).astype(np.float32)
    ccsd.distillation_loss(*map(torch.from_numpy, (similarity, groups[index], parent, camera,
                                                   table)), .1)
    pids, choices = watching.train.pids, []
    person = {k: np.bincount(pids[labels == k]).argmax() for k in range(len(table))}
    for row, i in zip(similarity, index.tolist()):
        for w in range(3):
            both = [k for k in person if table[k, cams[i]] >= 0 <= table[k, w]]
            if w != cams[i] and labels[i] in both and len(both) > 1:
                t, s = (max(both, key=lambda k: row[table[k, v]]) for v in (cams[i], w))
                choices.append((*(person[k] == pids[i] for k in (labels[i], t, s)), t != s))
    assert len(choices) > 20
    np.testing.assert_allclose(watching.table()[0, :9], counted(choices))


def test_mskd_chooses_the_nearest_image_of_another_camera(watch):
    watching, rng = watch(mskd), np.random.default_rng(1)
    labels, cams, index = batch_of(watching, rng)
    f, t = torch.nn.functional.normalize(torch.randn(2, 3, len(index), 8), dim=-1)
    mskd.distillation_losses(f, t)
    pids, at, choices = watching.train.pids[index], index.tolist(), []
    for a, i in enumerate(at):
        others = [b for b, j in enumerate(at) if cams[j] != cams[i]]
        mate = next(b for b, j in enumerate(at) if b != a and labels[j] == labels[i])
        p, q = (max(others, key=lambda b: float(x[0, a] @ x[0, b])) for x in (t, f))
        choices.append((*(pids[b] == pids[a] for b in (mate, p, q)), p != q))
    np.testing.assert_allclose(watching.table()[0, :9], counted(choices))


def test_sskd_counts_and_the_spread_of_known_distributions(watch):
    watching, rng = watch(sskd), np.random.default_rng(2)
    labels, _, index = batch_of(watching, rng)
    classes = labels.max() + 1
    soft = torch.full((len(index), classes), .5 / (classes - 2))
    soft[:, :2] = .25
    z = torch.zeros(len(index), classes)
    z[:, 2] = 50
    sskd.soft_label_loss(z, soft)
    pids = watching.train.pids
    person = np.array([np.bincount(pids[labels == k]).argmax() for k in range(classes)])
    choices = [(*(person[k] == pids[i] for k in (labels[i], 0, 2)), True) for i in index.tolist()]
    row, = watching.table()
    np.testing.assert_allclose(row[:9], counted(choices))
    entropy = .5 * np.log(4) + .5 * np.log(2 * (classes - 2))
    np.testing.assert_allclose(row[9:], [np.exp(entropy), 1], rtol=1e-5)


def test_watching_changes_nothing(tiny, tmp_path, watch, two_layers):
    ccsd.main(short(tiny, tmp_path / "plain", "--true-ids"))
    watching = watch(ccsd)
    ccsd.main(short(tiny, tmp_path / "watched", "--true-ids"))
    same_weights(weights(tmp_path / "plain"), weights(tmp_path / "watched"), "watched")
    table = watching.table()
    assert len(table) == 2 and (table[:, 0] == 100).all()  # true ids: every label is right


def test_the_program_prints_a_table(tiny, two_layers):
    run = program("tests/knowledge.py", "ccsd", 3, "--data", tiny, *SHORT, "--true-ids")
    *_, head, rule, first, second = run.stdout.splitlines()
    assert run.returncode == 0 and head.startswith("| round | label |"), run.stderr
    assert first.startswith("| 1 | 100.0 |") and second.startswith("| 2 | 100.0 |")
    shown = [line for line in run.stdout.splitlines() if line.startswith("round ")]
    assert [line.split(", ")[0] for line in shown] == [f"round {i}: label 100.0" for i in (1, 2)]
    assert "in memory differs" not in run.stderr
    run = program("tests/knowledge.py", "ccsd", "--data", tiny / "none")
    assert run.returncode == 2 and "Traceback" not in run.stderr
