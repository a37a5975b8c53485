"""The report's first chapter: what it draws is what the page's losses get for the same images."""

import copy
import shutil

import lesson
import numpy as np
import pytest
import report
import slow
import torch
from conftest import draw, short
from test_report import Page, read_page, without_ids

import ccsd
import common
import eval as scoring
import mskd
import sskd


class Stop(Exception):
    """Ends a run after its first batch."""


def flags(page, tiny, folder):
    more = ["--epochs", "4", "--eval-every", "9", "--batch-size", "8"]
    if page is sskd:
        more = ["--epochs", "2", "--source", str(folder / "source"), "--nets", "2",
                "--source-epochs", "1", "--source-iters", "2", "--batch-size", "4"]
    return short(tiny, folder / "run", *more)


@pytest.fixture(scope="module", params=[ccsd, mskd, sskd], ids=lambda page: page.__name__)
def run(request, tiny, tmp_path_factory):
    """-> a page, the folder of a short run of it, and its flags."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    if request.param is sskd:
        draw(folder / "source", cameras=2)
    words = flags(request.param, tiny, folder)
    request.param.main(words)
    return request.param, folder / "run", words


def spy(monkeypatch, where, name):
    """-> list of (arguments, result) of each call of where.name."""
    call, seen = getattr(where, name), []

    def noted(*args, **more):
        result = call(*args, **more)
        seen.append((args, result))
        return result
    monkeypatch.setattr(where, name, noted)
    return seen


def report_of(run, monkeypatch):
    """Draw a run's report -> what its chapter computed, by function: (arguments, result)."""
    seen = {name: spy(monkeypatch, lesson, name) for name in (
        "find_labels", "first_batch", "choices", "cases", "ccsd_look", "mskd_look", "sskd_look",
        "neighbourhood", "shared_weight")}
    scoring.main([str(run), "--report"])
    return seen


LOSSES = {ccsd: dict(L_intra="intra_camera_loss", L_cross="cross_camera_loss",
                     L_kd="distillation_loss"),
          mskd: dict(L="view_losses", D="distillation_losses"),
          sskd: dict(L_soft="soft_label_loss")}


def test_the_batch_is_the_next_one_of_the_run(run, monkeypatch):
    """Go on with the run: labels, images, augmented views and losses of its next step."""
    page, folder, words = run
    seen = report_of(folder, monkeypatch)
    (e, *_), (index, views, terms) = seen["first_batch"][0]
    augmented, batches = spy(monkeypatch, common, "augment"), []
    pk_batches, at = common.pk_batches, {}

    def first_batch_only(labels, *args):
        at["labels"] = labels
        for batch in pk_batches(labels, *args):
            batches.append(batch)
            yield batch
    monkeypatch.setattr(common, "pk_batches", first_batch_only)
    monkeypatch.setattr(common, "average_gradients", lambda _: (_ for _ in ()).throw(Stop))
    got = {term: spy(monkeypatch, page, name) for term, name in LOSSES[page].items()}
    longer = copy.copy(words)
    longer[max(i for i, word in enumerate(words) if word == "--epochs") + 1] = "9"
    state = common.load_run(str(folder / "last.pt"))
    with pytest.raises(Stop):
        page.main([*longer, "--resume", *(["--stage", "student"] if page is mskd else [])])
    assert common.load_run(str(folder / "last.pt"))["epoch"] == state["epoch"]   # nothing trained
    assert (at["labels"] == e.labels).all() and torch.equal(batches[0], index)
    for view, (_, batch) in zip(views, augmented):
        torch.testing.assert_close(view, batch, atol=1e-6, rtol=0)
    for term, calls in got.items():
        expected = calls[0][1]
        names = (term,) if expected.ndim == 0 else (f"{term}_g", f"{term}_u", f"{term}_d")
        for name, value in zip(names, expected.flatten().tolist()):
            assert terms[name] == pytest.approx(value, abs=1e-6), name
    text = (folder / "report.html").read_text()
    for name, value in terms.items():
        assert f"{name} {value:.4f}" in text


def test_what_is_drawn_of_an_image_is_what_the_loss_gets(run, monkeypatch):
    """Each image of the lesson again, in float64 from features and definitions; KL, D and
    cross-entropy are those that the page's loss has for it."""
    page, folder, _ = run
    seen = report_of(folder, monkeypatch)
    (e, *_), _ = seen["find_labels"][0]
    looks = seen[f"{page.__name__}_look"]
    if page is ccsd:
        groups, parent, camera, table = ccsd.split_by_camera(e.labels, e.train.cams)
        for (_, features, i, w), (p, q, kl) in looks:
            memory = common.cluster_means(features.double(), groups)
            s = (features[i].double() @ memory.T / ccsd.GROUP_TEMP).numpy()
            v, expected = e.train.cams[i], np.zeros((2, len(table)))
            both = [k for k in range(len(table)) if table[k, v] >= 0 <= table[k, w]]
            for row, c in zip(expected, (v, w)):
                row[both] = np.exp(s[table[both, c]]) / np.exp(s[table[both, c]]).sum()
            np.testing.assert_allclose(np.stack([p, q]), expected, atol=1e-5)
            p, q = expected[:, both]
            assert kl == pytest.approx((p * np.log(p / q)).sum(), abs=1e-4)
        # the loss of all images is the mean of what is drawn for each
        many = np.flatnonzero(e.labels >= 0)[:12]
        sides = lesson.ccsd_sides(e, e.features, many)
        _, _, valid = ccsd.teacher_and_student(*sides)
        drawn = [np.mean([lesson.ccsd_look(e, e.features, i, w)[2] for w in np.flatnonzero(row)])
                 for i, row in zip(many, valid.numpy()) if row.any()]
        assert np.mean(drawn) == pytest.approx(float(ccsd.distillation_loss(*sides)), abs=1e-6)
    if page is mskd:
        for (_, f, t, i), (p, q, D) in looks:
            for v in range(3):
                assert D[v] == pytest.approx(float(((f[v, i] - t[v, i]) ** 2).sum()), abs=1e-6)
                for near, x in ((p, t), (q, f)):
                    for j in range(len(e.labels)):
                        other = e.train.cams[j] != e.train.cams[i]
                        expected = float(x[v, i] @ x[v, j]) if other else -1
                        assert near[v, j] == pytest.approx(expected, abs=1e-6)
        (_, f, t, i), _ = looks[-1]
        drawn = [lesson.mskd_look(e, f, t, i)[2] for i in range(9)]
        np.testing.assert_allclose(np.mean(drawn, 0), mskd.distillation_losses(f[:, :9], t[:, :9]),
                                   atol=1e-6)
    if page is sskd:
        for (_, (rows, slow_rows, means), student, copies, index), (p, q) in looks:
            batch = common.normalise(e.images[index])
            for net, matrix, drawn, mean in ((copies[1], slow_rows, p, means),
                                             (student, rows, q, None)):
                with torch.no_grad():
                    _, neck = net.eval()(batch, inside=True)
                neck = neck.double()
                if mean is not None:
                    unit = torch.nn.functional.normalize(neck) - mean[1, index]
                    neck = torch.nn.functional.normalize(unit) * neck.norm(dim=1, keepdim=True)
                expected = (neck @ matrix.double().T / e.args.temp).softmax(1)
                torch.testing.assert_close(drawn.double(), expected, atol=1e-5, rtol=0)


def test_the_pictures_hold_these_numbers(run, monkeypatch):
    page, folder, _ = run
    seen = report_of(folder, monkeypatch)
    found = read_page(folder / "report.html")
    (e, c, *_), (rows, absent) = seen["cases"][0]
    assert 1 <= len(rows) <= 6 and len({c.image[row] for _, row in rows}) == len(rows)
    for title, row in rows:
        i = c.image[row]
        assert f"{title}: person {e.train.pids[i]}, camera c{e.train.cams[i] + 1}" in found.text
        assert ("differ" in title) <= (c.teacher[row] != c.student[row])
        if "wrong, the teacher right" in title:
            assert c.t[row] and not c.label[row]
    for title in absent:
        assert title in found.text
    looks = [x for x in seen[f"{page.__name__}_look"] if page is not sskd or len(x[0][-1]) == 1]
    assert len(looks) >= 2 * len(rows)
    for _, numbers in looks:
        if page is ccsd:
            p, q, kl = numbers
            assert f"KL(p || q) = {kl:.3f}" in found.text
            assert f"p {100 * p.max():.0f} %" in found.text
        if page is mskd:
            assert all(f"D = {value:.3f}" in found.text for value in numbers[2])
            assert f"t {numbers[0][0].max():.2f}" in found.text
        if page is sskd:
            p, q = numbers
            assert f"p {100 * float(p.max()):.0f} %" in found.text
            assert f"L_soft = {float(sskd.soft_label_loss(q.log(), p)):.3f}" in found.text
    share = f"right are the label in {100 * c.label.mean():.1f} %, the teacher in " \
            f"{100 * c.t.mean():.1f} %, the student in {100 * c.s.mean():.1f} %"
    assert share in found.text and f"All {len(c.image):,} " in found.text


def test_choices_are_counted_as_by_the_program_that_watches_a_loss(run, monkeypatch):
    """The label, teacher and student are right as often as loops over the definition say."""
    page, folder, _ = run
    seen = report_of(folder, monkeypatch)
    (e, c, *_), _ = seen["cases"][0]
    pids, cams = e.train.pids, e.train.cams
    person = {k: np.bincount(pids[e.labels == k]).argmax() for k in range(e.labels.max() + 1)}
    assert (c.label == [person[e.labels[i]] == pids[i] for i in c.image]).all()
    if page is ccsd:
        groups, _, _, table = ccsd.split_by_camera(e.labels, cams)
        s, wanted = (e.features @ common.cluster_means(e.features, groups).T).numpy(), []
        for i in np.flatnonzero(e.labels >= 0):
            for w in range(table.shape[1]):
                both = [k for k in person if table[k, cams[i]] >= 0 <= table[k, w]]
                if w != cams[i] and e.labels[i] in both and len(both) > 1:
                    wanted.append((i, w, *(max(both, key=lambda k: s[i, table[k, v]])
                                           for v in (cams[i], w))))
        assert list(zip(c.image, c.other, c.teacher, c.student)) == wanted
    if page is mskd:
        (_, f, t, _), _ = seen["mskd_look"][-1]
        for i, teacher, student in zip(c.image, c.teacher, c.student):
            others = np.flatnonzero(cams != cams[i])
            for choice, x in ((teacher, t), (student, f)):
                assert choice == max(others, key=lambda j: float(x[0, i] @ x[0, j]))
        assert (c.t == (pids[c.teacher] == pids[c.image])).all()
    else:
        assert (c.s == [person[k] == pids[i] for i, k in zip(c.image, c.student)]).all()


def test_neighbours_are_those_of_the_definition(run, monkeypatch):
    page, folder, _ = run
    seen = report_of(folder, monkeypatch)
    (e, *_), _ = seen["find_labels"][0]
    f, k1 = e.centred.double().numpy(), e.args.k1
    rank = slow.ranking(f @ f.T, k1)
    assert len(seen["neighbourhood"]) >= 2
    for (_, _, i), (order, mutual, added) in seen["neighbourhood"]:
        assert rank[i][1:] == order.tolist()
        wide = slow.reciprocal(rank, i, k1)
        assert {i, *order[mutual].tolist()} == wide
        assert sorted(set(slow.expanded(rank, i, k1)) - wide) == sorted(added.tolist())
    expected = slow.jaccard_distance(e.centred, k1)
    for (_, i, j), (both, weight) in seen["shared_weight"]:
        assert 1 - weight.sum() / (2 - weight.sum()) == pytest.approx(expected[i, j], abs=1e-5)
        assert len(both) == len(set(both.tolist()))
        assert f"is {expected[i, j]:.3f}" in (folder / "report.html").read_text()


@pytest.mark.parametrize("refine", ["reassign", "recluster", "none"])
def test_refinements(refine, tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    ccsd.main(short(tiny, out, "--refine", refine, "--batch-size", "4"))
    seen = report_of(out, monkeypatch)
    (e, _), _ = seen["find_labels"][0]
    text = read_page(out / "report.html").text
    assert (f"After --refine {refine}" in text) == (refine != "none")
    if refine == "recluster":
        assert ((e.labels >= 0) <= (e.found >= 0)).all()


def test_without_ids_the_chapter_shows_all_but_who_is_right(run, monkeypatch, tmp_path):
    page, folder, _ = run
    without_ids(monkeypatch)
    scoring.main([str(folder), "--report", str(tmp_path / "r.html")])
    text = read_page(tmp_path / "r.html").text
    chapter = text.split("One epoch, step by step")[1].split("Curves by epoch")[0]
    for title in ("1 Features: three clusters", "Easy: ", "Hard: ", "eps", "3 A cluster",
                  "5a The next batch", "The lesson", "teacher and student differ in"):
        assert title in chapter, title
    for known in ("person ", "\u2713", "\u2717", " id ", "right are"):
        assert known not in chapter, known


def test_one_camera_leaves_nothing_to_teach_across(tiny, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for n, path in enumerate(sorted((tiny / "bounding_box_train").iterdir())):
        shutil.copy(path, folder / f"shot{n}.jpg")
    ccsd.main(short(folder, tmp_path / "a", "--epochs", "1"))
    mskd.main(short(folder, tmp_path / "b", "--epochs", "1"))
    for name, says in (("a", "No cluster is seen by two cameras"), ("b", "The student now, f")):
        scoring.main([str(tmp_path / name), "--report"])
        text = read_page(tmp_path / name / "report.html").text
        assert says in text and "nan" not in text


def test_a_teacher_and_a_lost_teacher_say_so(tiny, tmp_path):
    out = tmp_path / "run"
    mskd.main(short(tiny, out, "--epochs", "1"))
    scoring.main([str(out / "teacher"), "--report"])
    text = read_page(out / "teacher" / "report.html").text
    assert "is a teacher: it learned from labels alone" in text
    (out / "teacher").rename(tmp_path / "elsewhere")
    scoring.main([str(out), "--report"])
    text = read_page(out / "report.html").text
    assert "Left out: no teacher in" in text and "Loss terms" in text


def test_matrix_and_starting_terms():
    values = np.array([[1, .5, 0], [.5, 1, .25], [0, .25, 1]])
    picture = Page(report.matrix("some matrix", values, [2, 1], ["a", "b"]))
    assert "faint 0.00, strong 0.50" in picture.text and picture.alts == ["some matrix"]
    log = [dict(epoch=n, base=1., **(dict(cross=2., kd=3.) if n > 2 else {})) for n in range(1, 5)]
    chart = report.curves([("", log, ["base", "cross", "kd"])])
    assert "cross, kd from here on" in Page(chart).text
    assert "from here on" not in Page(report.curves([("", log[2:], ["base", "cross"])])).text
