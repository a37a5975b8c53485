"""The report's first chapter: what it draws is what the page's losses get for the same images."""

import shutil
from types import SimpleNamespace

import lesson
import numpy as np
import pytest
import report
import slow
import torch
from conftest import change_clusters, draw, short, watch
from test_report import Page, change_data, read_page, without_ids

import ccsd
import common
import eval as scoring
import mskd
import sskd


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module", params=[ccsd, mskd, sskd], ids=lambda page: page.__name__)
def run(request, tiny, tmp_path_factory):
    """A short run and its report -> page, folder and words of the run; text of the report; of what
    the chapter computed: seen, the arguments and results of functions, e, the epoch, c, the
    choices, rows and absent, the cases, looks, what is drawn of images."""
    page, folder = request.param, tmp_path_factory.mktemp("runs")
    words = short(tiny, folder / "run", "--epochs", "4", "--eval-every", "9")
    if page is sskd:
        draw(folder / "source", cameras=2)
        words += ["--epochs", "2", "--source", str(folder / "source"), "--nets", "2",
                  "--source-epochs", "1", "--source-iters", "2", "--batch-size", "4"]
    page.main(words)
    look = f"{page.__name__}_look"
    with pytest.MonkeyPatch.context() as only:
        seen = {name: watch.__wrapped__(only)(lesson, name) for name in (
            "find_labels", "first_batch", "cases", look, "neighbourhood", "shared_weight")}
        scoring.main([str(folder / "run"), "--report"])
    (e, c, *_), (rows, absent) = seen["cases"][0]
    return SimpleNamespace(page=page, folder=folder / "run", words=words, seen=seen, e=e, c=c,
                           rows=rows, absent=absent, looks=seen[look],
                           text=read_page(folder / "run" / "report.html").text)


def only(page):
    """Of the runs above, this page's alone."""
    return pytest.mark.parametrize("run", [page], indirect=True, ids=[page.__name__])


LOSSES = {ccsd: dict(L_intra="intra_camera_loss", L_cross="cross_camera_loss",
                     L_kd="distillation_loss"),
          mskd: dict(L="view_losses", D="distillation_losses"),
          sskd: dict(L_soft="soft_label_loss")}


def test_the_batch_is_the_next_one_of_the_run(run, monkeypatch, watch):
    """Go on with the run: labels, images, augmented views and losses of its next step."""
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "average_gradients", stop)
    drawn, taken, augmented = (watch(common, name) for name in ("pk_batches", "take", "augment"))
    got = {term: watch(run.page, name) for term, name in LOSSES[run.page].items()}
    with pytest.raises(KeyboardInterrupt):
        run.page.main([*run.words, "--epochs", "9", "--resume",
                       *(["--stage", "student"] if run.page is mskd else [])])
    _, (index, views, terms) = run.seen["first_batch"][0]
    assert (drawn[0][0][0] == run.e.labels).all() and torch.equal(taken[0][0][1], index)
    for view, (_, batch) in zip(views, augmented, strict=True):
        torch.testing.assert_close(view, batch, atol=1e-6, rtol=0)
    for term, calls in got.items():
        expected = calls[0][1]
        names = (term,) if expected.ndim == 0 else (f"{term}_g", f"{term}_u", f"{term}_d")
        for name, value in zip(names, expected.flatten().tolist()):
            assert terms[name] == pytest.approx(value, abs=1e-6), name
    for name, value in terms.items():
        assert f"{name} {value:.4f}" in run.text


def test_what_is_drawn_of_an_image_is_what_the_loss_gets(run):
    """Each image of the lesson again, in float64 from features and definitions."""
    page, e, looks = run.page, run.e, run.looks
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
    if page is mskd:
        for (_, f, t, i), (p, q, D) in looks:
            for v in range(3):
                assert D[v] == pytest.approx(float(((f[v, i] - t[v, i]) ** 2).sum()), abs=1e-6)
                for near, x in ((p, t), (q, f)):
                    for j in range(len(e.labels)):
                        other = e.train.cams[j] != e.train.cams[i]
                        expected = float(x[v, i] @ x[v, j]) if other else -1
                        assert near[v, j] == pytest.approx(expected, abs=1e-6)
    if page is sskd:
        for (_, (rows, slow_rows, means), student, copies, index), (p, q) in looks:
            batch = common.normalise(e.images[index])
            for net, matrix, drawn, mean in ((copies[1], slow_rows, p, means),
                                             (student, rows, q, None)):
                with torch.no_grad():
                    _, neck = net.eval()(batch, inside=True)
                neck = neck.double()
                if mean is not None:
                    unit = torch.nn.functional.normalize(neck) - mean[1, e.train.cams[index]]
                    neck = torch.nn.functional.normalize(unit) * neck.norm(dim=1, keepdim=True)
                expected = (neck @ matrix.double().T / e.args.temp).softmax(1)
                torch.testing.assert_close(drawn.double(), expected, atol=1e-5, rtol=0)


def test_the_pictures_hold_these_numbers(run):
    page, e, c, rows = run.page, run.e, run.c, run.rows
    assert 1 <= len(rows) <= 6 and len({c.image[row] for _, row in rows}) == len(rows)
    for title, row in rows:
        i = c.image[row]
        assert f"{title}: person {e.train.pids[i]}, camera c{e.train.cams[i] + 1}" in run.text
        assert ("differ" in title) <= (c.teacher[row] != c.student[row])
        if "wrong, the teacher right" in title:
            assert c.t[row] and not c.label[row]
    for title in run.absent:
        assert title in run.text
    looks = [x for x in run.looks if page is not sskd or len(x[0][-1]) == 1]
    assert len(looks) >= 2 * len(rows)
    for _, numbers in looks:
        if page is ccsd:
            p, q, kl = numbers
            assert f"KL(p || q) = {kl:.3f}" in run.text
            assert f"p {100 * p.max():.0f} %" in run.text
        if page is mskd:
            assert all(f"D = {value:.3f}" in run.text for value in numbers[2])
            assert f"t {numbers[0][0].max():.2f}" in run.text
        if page is sskd:
            p, q = numbers
            assert f"p {100 * float(p.max()):.0f} %" in run.text
            assert f"L_soft = {float(sskd.soft_label_loss(q.log(), p)):.3f}" in run.text
    share = f"right are the label in {100 * c.label.mean():.1f} %, the teacher in " \
            f"{100 * c.t.mean():.1f} %, the student in {100 * c.s.mean():.1f} %"
    assert share in run.text and f"All {len(c.image):,} " in run.text


def test_choices_are_counted_as_by_the_program_that_watches_a_loss(run):
    """The label, teacher and student are right as often as loops over the definition say."""
    page, e, c = run.page, run.e, run.c
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
        (_, f, t, _), _ = run.looks[-1]
        for i, teacher, student in zip(c.image, c.teacher, c.student):
            others = np.flatnonzero(cams != cams[i])
            for choice, x in ((teacher, t), (student, f)):
                assert choice == max(others, key=lambda j: float(x[0, i] @ x[0, j]))
        assert (c.t == (pids[c.teacher] == pids[c.image])).all()
    else:
        assert (c.s == [person[k] == pids[i] for i, k in zip(c.image, c.student)]).all()


def test_neighbours_are_those_of_the_definition(run):
    e, seen = run.e, run.seen
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
        assert f"is {expected[i, j]:.3f}" in run.text


@only(ccsd)
@pytest.mark.parametrize("refine", ["reassign", "recluster", "none"])
def test_refinements(refine, run, tmp_path, monkeypatch, watch):
    """As if the run had been with another --refine, and every seventh label were wrong."""
    def mixed(n, labels):
        return np.where(np.arange(len(labels)) % 7 + n, labels, 0)
    change_clusters(mixed, monkeypatch)
    state = common.load_checkpoint(str(run.folder / "last.pt"))
    common.save_checkpoint(str(tmp_path / "last.pt"), **{**state, "refine": refine})
    found = watch(lesson, "find_labels")
    scoring.main([str(tmp_path), "--report"])
    (e, _), _ = found[0]
    text = read_page(tmp_path / "report.html").text
    assert (f"After --refine {refine}" in text) == (refine != "none")
    features, cams = e.centred, e.train.cams
    wanted = {"none": e.found, "reassign": ccsd.reassign(e.found, cams, features),
              "recluster": ccsd.recluster(e.found, cams, e.distance, .8 * e.args.eps)}
    assert (e.labels == wanted[refine]).all()
    assert (e.labels == e.found).all() == (refine == "none")


def test_without_ids_the_chapter_shows_all_but_who_is_right(run, monkeypatch, tmp_path):
    without_ids(monkeypatch)
    scoring.main([str(run.folder), "--report", str(tmp_path / "r.html")])
    text = read_page(tmp_path / "r.html").text
    chapter = text.split("One epoch, step by step")[1].split("Curves by epoch")[0]
    for title in ("1 Features: three clusters", "Easy: ", "Hard: ", "eps", "3 A cluster",
                  "5a The next batch", "The lesson", "teacher and student differ in"):
        assert title in chapter, title
    for known in ("person ", "\u2713", "\u2717", " id ", "right are"):
        assert known not in chapter, known


def test_one_camera_leaves_nothing_to_teach_across(run, monkeypatch, tmp_path, watch):
    says = {ccsd: "No cluster is seen by two cameras", mskd: "The student now, f",
            sskd: "teacher and student differ in"}[run.page]
    looks = watch(lesson, f"{run.page.__name__}_look")
    change_data(lambda train, *rest: (train._replace(cams=0 * train.cams), *rest), monkeypatch)
    scoring.main([str(run.folder), "--report", str(tmp_path / "r.html")])
    text = read_page(tmp_path / "r.html").text
    assert says in text and "nan" not in text
    assert all(values[0].max() > 0 for _, values in looks)         # there are candidates


@only(mskd)
def test_a_teacher_and_a_lost_teacher_say_so(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run.folder, out)
    scoring.main([str(out / "teacher"), "--report"])
    text = read_page(out / "teacher" / "report.html").text
    assert "is a teacher: it learned from labels alone" in text
    shutil.rmtree(out / "teacher")
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
