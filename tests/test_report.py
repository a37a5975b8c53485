"""The report: its numbers against slow versions, its pages as a browser reads them, and what
eval.py does when something is missing, mistyped or full.
"""

import argparse
import html.parser
import io
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import report
import torch
from conftest import SHORT, draw, program, quantised, refusal, short, unit

import ccsd
import common
import eval as scoring
import sskd


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a short run of ccsd.py."""
    out = tmp_path_factory.mktemp("runs") / "one"
    ccsd.main(short(tiny, out, "--epochs", "3", "--eval-every", "2"))
    return out


def report_of(run, *words):
    """-> the report that eval.py draws of a run."""
    scoring.main([str(run), "--report", *map(str, words)])
    return read_page(words[0] if words else run / "report.html")


def some_test_set(q, g, seed=0):
    """Random people and cameras, a distractor among them."""
    rng = np.random.default_rng(seed)
    query, gallery = (common.Split([f"{kind}{i}" for i in range(n)], rng.integers(low, 5, n),
                                   rng.integers(0, 3, n))
                      for kind, n, low in (("q", q, 1), ("g", g, 0)))
    return query, gallery


# ------------------------------------------------------------------------------------ its numbers


def test_rerank_at_its_borders():
    """Elsewhere: test_run.py."""
    query = unit(1, 12).repeat(3, 1)
    for noise in (0, 1e-7):  # a CPU may round the same similarity in two ways
        gallery = query.repeat(3, 1) + noise * unit(9, 12, seed=1)
        same = torch.cat(list(scoring.rerank(query, gallery)))
        assert same.abs().max() < 1e-5                             # nothing is farthest
    with pytest.raises(common.Problem, match="not finite"):
        list(scoring.rerank(query, query / 0))


@pytest.mark.parametrize("g", [400, 10, 7, 5])  # many equal right answers; about as few as shown
@pytest.mark.parametrize("draw_features", [unit, quantised])
def test_rank_queries_equals_one_answer_at_a_time(draw_features, g):
    query, gallery = some_test_set(20, g, seed=5)
    query.pids[:2] = 99                                        # nobody in the gallery: left out
    query.pids[2], gallery.pids[0] = 98, 98                    # a single right answer
    gallery.cams[0] = (query.cams[2] + 1) % 3
    features = draw_features(20), draw_features(g, seed=1)
    ranked = scoring.rank_queries(features, query, gallery, block=4)
    for r in ranked:
        i, similar = r["i"], (features[0][r["i"]] @ features[1].T).tolist()
        same = [int(gallery.pids[j] == query.pids[i]) for j in range(g)]
        answers = [j for j in range(g) if not (same[j] and gallery.cams[j] == query.cams[i])]
        answers.sort(key=lambda j: (-similar[j], same[j]))  # of equals, the wrong one first
        shown = [similar[j] for j in answers[:7]]
        assert shown == pytest.approx(r["similar"].tolist(), abs=1e-6)
        assert answers[:7] == r["shown"].tolist()
        hits = [j for j in answers if same[j]]
        precision = [(n + 1) / (answers.index(j) + 1) for n, j in enumerate(hits)]
        assert precision == pytest.approx(r["precision"].tolist())
        assert gallery.cams[hits].tolist() == r["cams"].tolist()
    assert {2} <= {r["i"] for r in ranked} == {i for i in range(20) if any(
        (gallery.pids == query.pids[i]) & (gallery.cams != query.cams[i]))}


def test_the_first_answers_of_a_long_gallery():
    """Beyond a few hundred images a partial sort is one: its order of the others is any."""
    query, gallery = some_test_set(250, 2000)
    gallery.cams[:] = 9                                            # nothing is ignored
    features = unit(250), unit(2000, seed=1)
    similar = (features[0] @ features[1].T).numpy()
    for r in scoring.rank_queries(features, query, gallery):
        assert r["shown"].tolist() == np.argsort(-similar[r["i"]], kind="stable")[:7].tolist()


@pytest.mark.parametrize("q", [30, 2])  # few: some pairs of cameras have no or hardly any answer
def test_by_camera_pair_has_the_map_as_its_mean(q):
    query, gallery = some_test_set(q, 80)
    features = unit(q), unit(80, seed=1)
    ranked = scoring.rank_queries(features, query, gallery)
    value, weight = scoring.by_camera_pair(ranked, query, 3)
    expected = common.evaluate(*features, query, gallery)["mAP"]
    assert np.nansum(value * weight) / weight.sum() == pytest.approx(expected)
    assert weight.sum() == pytest.approx(len(ranked))
    assert np.isnan(np.diag(value)).all()  # right answers in the query's camera are ignored
    for a in range(3):
        for b in set(range(3)) - {a}:
            top = bottom = 0
            for r in ranked:
                if query.cams[r["i"]] == a:
                    for camera, precision in zip(r["cams"], r["precision"]):
                        top += (camera == b) * precision / len(r["cams"])
                        bottom += (camera == b) / len(r["cams"])
            mean = top / bottom if bottom else np.nan
            assert value[a, b] == pytest.approx(mean, nan_ok=True)


@pytest.mark.parametrize("q, g", [(12, 30), (30, 12)])
def test_pair_counts_equal_one_pair_at_a_time(q, g):
    query, gallery = some_test_set(q, g)
    features, edges = (quantised(q), quantised(g, 1)), np.array([-.5, 0, .25, .5, 2])
    counts = scoring.pair_counts(features, query, gallery, edges, block=5)
    expected = np.zeros((4, 6), np.int64)                      # nothing is more similar than 2
    for i in range(q):
        for j in range(g):
            kind = (("other person", "same person")[int(query.pids[i] == gallery.pids[j])] + ", "
                    + ("other camera", "same camera")[int(query.cams[i] == gallery.cams[j])])
            similar = (features[0][i] @ features[1][j]).item()
            expected[report.PAIRS.index(kind), sum(similar >= edge for edge in edges)] += 1
    np.testing.assert_array_equal(counts, expected, strict=True)
    assert (counts > 0).sum() > 12


def test_a_similarity_on_an_edge_is_not_below_it():
    one = common.Split(["a"], np.array([1]), np.array([0]))
    features = torch.tensor([[.7]]), torch.tensor([[1.]])          # .7 in float32 is below .7
    counts = scoring.pair_counts(features, one, one, np.array([.7]))
    assert counts.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]


def test_clusters_are_what_their_titles_say(tiny):
    """Cluster 0 is pure, 1 is mixed; person 3 is split by camera, 4 at random; 5 is left out."""
    people = np.repeat([1, 2, 3, 4, 5], [4, 4, 4, 4, 2])
    labels = np.array([0] * 4 + [1] * 3 + [3] + [2, 2, 3, 3] + [1, 2, 1, 2] + [-1] * 2)
    cams = np.array([0, 1, 0, 1] + [0, 1, 0, 1] + [0, 0, 1, 1] + [0, 0, 1, 1] + [0, 1])
    groups = report.known_clusters(labels, people, cams)
    titles = [title for title, _, _ in groups]
    assert titles[0].startswith("Pure: cluster 0, 4 images, 100 %") and groups[0][2] == 1
    assert titles[2].startswith("Mixed: cluster 2, 4 images, 50 %")
    assert titles[4].startswith("Split by camera: person 3 in 2 clusters")
    assert groups[4][1].tolist() == [8, 9, 10, 11]
    picture = str(tiny / "query" / sorted(os.listdir(tiny / "query"))[0])
    train = common.Split([picture] * 18, people, cams, [1, 2])
    page = Page(report.clusters(train, labels, True))
    assert len(page.kinds["right"]) >= 8 and "Left out: 2 images" in page.text
    assert any("id 5" in alt for alt in page.alts)


# ------------------------------------------------------------------------------------- its pages


class Page(html.parser.HTMLParser):
    """What a browser finds: text, headings, figures, alternative texts, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.text, self.heads, self.alts, self.kinds, self.open = "", [], [], {}, []
        self.figures, self.tags = [], set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes.items():
            assert name not in ("href", "srcset", "data", "action", "onload", "onclick")
            assert name != "src" or value.startswith("data:image/jpeg;base64,")
        if tag == "img":
            assert len(attributes["alt"]) > 5
            self.alts.append(attributes["alt"])
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"]) > 5
            self.alts.append(attributes["aria-label"])
        if tag == "div":
            self.kinds.setdefault(attributes.get("class"), []).append(attributes)
        if tag == "figure":
            self.figures.append(0)
        if tag == "p" and "figcaption" in self.open:
            self.figures[-1] += 1

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert "url" not in data and "@import" not in data and "prefers-color-scheme" in data
        elif "h2" in self.open:
            self.heads.append(data)
        self.text += data


OF_SOURCE = ["--source-epochs", "1", "--source-iters", "2", "--batch-size", "4"]
SECTIONS = ["Run and score", "One epoch, step by step", "Curves by epoch",
            "Similarity within and across cameras",
            "mAP by pair of cameras", "CMC", "Ranking lists", "Clusters", "t-SNE"]


def read_page(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "://" not in text and len(text) < 5e6
    assert "default-src 'none'" in text and "width=device-width" in text
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
    assert page.figures and set(page.figures) == {2}, "two sentences each"
    return page


def test_report_of_a_run(run, capsys):
    page = report_of(run)
    assert page.heads == SECTIONS
    assert "Left out: no " not in page.text and "Left out: the " not in page.text
    last = json.loads(open(run / "log.jsonl").readlines()[-1])
    assert f"mAP: {100 * last['scores']['mAP']:.4g}" in page.text
    assert f"is the mAP, {100 * last['scores']['mAP']:.1f}." in page.text
    for term in ("base", "intra", "clusters", "outliers", "ARI", "true ids"):
        assert f"{term}: " in page.text, term
    assert "true ids: 8" in page.text and "before training (random weights)" in page.text
    assert len(page.kinds["query"]) == 6
    for kind, sign in (("right", "\u2713"), ("wrong", "\u2717")):
        assert page.text.count(sign) == len(page.kinds[kind]) > 5
    head, scores = capsys.readouterr().out.splitlines()
    assert "mAP" in head and f"{100 * last['scores']['mAP']:.1f}" in scores
    content = (run / "report.html").read_bytes()
    report_of(run)
    assert (run / "report.html").read_bytes() == content  # the same run, the same page


def test_before_training_is_the_start_of_the_log(run, tiny, tmp_path):
    one = scoring.open_run(str(run))
    network, what = scoring.initial_network(one)
    _, query, gallery = common.load(str(tiny))
    features = [common.global_features(network, common.read_images(split, 64, 32))
                for split in (query, gallery)]
    start = json.loads(open(run / "log.jsonl").readlines()[1])
    assert start["title"] == "start" and what == "random weights"
    assert common.evaluate(*features, query, gallery) == start["scores"]
    one.state["weights"], one.state["arch"] = "nowhere.pth", "resnet18"
    network, why = scoring.initial_network(one)
    assert network is None and "nowhere.pth" in why


def test_before_training_of_sskd_is_its_source(tiny, tmp_path):
    source, out = draw(tmp_path / "source", cameras=2), tmp_path / "run"
    sskd.main(short(tiny, out, *OF_SOURCE, "--source", str(source), "--nets", "2"))
    network, what = scoring.initial_network(scoring.open_run(str(out)))
    expected = common.load_checkpoint(str(out / "source" / "1" / "last.pt"))["model"]
    assert what == "source network 1"
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    page = report_of(out)
    assert page.heads == SECTIONS and "soft_own: " in page.text
    page = report_of(out / "source" / "1")
    assert "source network does not keep" in page.text and "no pseudo labels" in page.text
    assert scoring.open_run(str(out / "source" / "1")).planned == 1
    shutil.rmtree(out / "source")                                  # to save space, say
    page = report_of(out)
    assert "Before training: not shown" in page.text and "no fitting networks" not in page.text


def test_before_training_of_sskd_with_sources_that_runs_share(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without --out: the sources are in the folder of the default run
    words = ["--data", str(tiny), *SHORT, *OF_SOURCE, "--nets", "1", "--soft", "0",
             "--source", str(draw(tmp_path / "source", cameras=2))]
    out = tmp_path / sskd.get_args(words).out
    sskd.main(words)
    monkeypatch.chdir("/")
    network, what = scoring.initial_network(scoring.open_run(str(out)))
    assert network and what == "source network 1" and not (out / "source").exists()


def change_data(change, monkeypatch):
    """From now on the Splits of a data set are change(train, query, gallery)."""
    load = common.load
    monkeypatch.setattr(common, "load", lambda *args, **more: change(*load(*args, **more)))


def without_ids(monkeypatch):
    nobody = common.Split([], np.zeros(0, np.int64), np.zeros(0, np.int64))
    change_data(lambda train, *_: (train._replace(pids=np.full_like(train.pids, -1)), nobody,
                                   nobody), monkeypatch)


def test_without_ids_a_report_shows_the_rest(run, tiny, tmp_path, monkeypatch, capsys):
    without_ids(monkeypatch)
    page = report_of(run, tmp_path / "r.html")
    assert page.heads == SECTIONS and page.text.count("Left out: the test set") == 4
    assert "Largest: cluster" in page.text and "t-SNE, marks by cluster" in page.alts
    assert "true ids: " not in page.text and ", id " not in " ".join(page.alts)
    assert "no test set with ids" in refusal(lambda: scoring.main([str(run)]), capsys)
    pictures = sorted(map(str, (tiny / "query").iterdir()))[:2]
    found = scoring.main([str(run), "--pairs", *pictures])
    assert list(found) == ["similarity"] and "query" not in capsys.readouterr().out
    scoring.main([str(run), "--save-features", str(tmp_path / "f.npz")])
    assert set(np.load(tmp_path / "f.npz")["split"]) == {"train"}


def test_pseudo_labels_are_shown_on_the_images_they_are_of(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "other")                      # as many images
    text = report_of(run, tmp_path / "r.html", "--data", tmp_path / "other").text
    assert "no pseudo labels of these images" in text and "Pure: cluster" not in text
    text = report_of(run, tmp_path / "r.html", "--data", tiny).text  # the run's own, by its name
    assert "Pure: cluster" in text


def test_several_runs_in_one_plot(run, tiny, tmp_path):
    two, path = tmp_path / "two", tmp_path / "ab.html"
    ccsd.main(short(tiny, two, "--kd", "0", "--seed", "3", "--epochs", "3", "--eval-every", "2"))
    scoring.main([str(run), str(two), "--report", str(path)])
    page = read_page(path)
    assert page.heads == ["Runs", "Curves by epoch"]
    chart = next(alt for alt in page.alts if alt.startswith("Score on the test set in %: mAP"))
    assert "--kd 1 --seed 0: " in chart and "--kd 0 --seed 3: " in chart
    assert "--eps" not in page.text and "--out" not in page.text
    assert any(alt.startswith("Loss terms: base") for alt in page.alts)
    state = common.load_checkpoint(str(two / "last.pt"))
    common.save_checkpoint(str(two / "last.pt"), **{**state, "scores": {}})
    scoring.main([str(run), str(two), "--report", str(path)])
    assert "nan" not in read_page(path).text                       # of a run without scores


@pytest.mark.parametrize("names, layout", [
    (("c3", "c7", "c12"), "{part}/{person}_{camera}_{rest}"),
    (("cam_left", "cam_right", "back_camera"), "{camera}/{person}/{rest}")])
def test_cameras_are_called_as_files_and_folders_call_them(names, layout, tiny, tmp_path):
    for path in tiny.glob("*/*"):
        person, camera, rest = path.name.split("_", 2)
        copy = tmp_path / "set" / layout.format(part=path.parent.name, person=person,
                                                camera=names[int(camera[1]) - 1], rest=rest)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    ccsd.main(short(tmp_path / "set", tmp_path / "run"))
    page = report_of(tmp_path / "run", tmp_path / "r.html", "--save-features", tmp_path / "f.npz")
    for name in names:
        assert f"Camera {name} (" in page.text and any(name in alt for alt in page.alts)
    text = page.text.split("Run and score")[1]
    assert not re.search(r"\bc[12]\b|(?i:camera) [12]\b", text + " ".join(page.alts))
    kept = np.load(tmp_path / "f.npz")
    for path, camera in zip(kept["paths"], kept["cams"]):
        assert re.search(f"[/_]c?{camera}[/_]", path)


# ------------------------------------------------------------------------------- other questions


def test_pairs_and_features(run, tiny, tmp_path, capsys):
    files = sorted(map(str, (tiny / "query").iterdir()))
    scoring.main([str(run), "--save-features", str(tmp_path / "f.npz"), "--json"])
    kept = np.load(tmp_path / "f.npz")
    train, query, gallery = common.load(str(tiny))
    assert kept["paths"].tolist() == train.paths + query.paths + gallery.paths
    assert kept["pids"].tolist() == [*train.pids, *query.pids, *gallery.pids]
    assert kept["features"].shape == (72 + 12 + 24, 256)
    in_name = [os.path.basename(path).split("_")[1] for path in kept["paths"]]
    assert [f"c{camera}s1" for camera in kept["cams"]] == in_name
    of = dict(zip(kept["paths"], kept["features"]))
    capsys.readouterr()
    found = scoring.main([str(run), "--pairs", files[0], files[4], "--json"])
    assert json.loads(capsys.readouterr().out) == found
    similar = float(of[files[0]] @ of[files[4]])
    assert found["similarity"] == pytest.approx(similar, abs=1e-5)
    total, reach = dict.fromkeys(found, 0), dict.fromkeys(found, 0)
    for i, a in enumerate(query.paths):
        for j, b in enumerate(gallery.paths):
            who = ("other person", "same person")[int(query.pids[i] == gallery.pids[j])]
            where = ("other camera", "same camera")[int(query.cams[i] == gallery.cams[j])]
            for kind in (who, f"{who}, {where}"):
                total[kind] += 1
                reach[kind] += of[a] @ of[b] >= similar
    for kind in set(found) - {"similarity"}:
        assert found[kind] == pytest.approx(reach[kind] / total[kind], abs=1 / total[kind]), kind
    assert scoring.main([str(run), "--pairs", files[0], files[0]])["similarity"] > .9999
    assert "similarity 1.000" in capsys.readouterr().out


def test_a_kind_of_pairs_that_does_not_occur(tiny):
    model = common.Encoder("small", "none").eval()
    model.size = 64, 32
    files = [str(tiny / "query" / name) for name in sorted(os.listdir(tiny / "query"))[:2]]
    test_set = [common.Split(["a"], np.array([person]), np.array([person])) for person in (0, 1)]
    run, most = argparse.Namespace(model=model, test=test_set), torch.tensor([[2.]])
    found = scoring.pair(run, [most, torch.tensor([[1.]])], files)
    kinds = {kind for kind, share in found.items() if share == 1}
    assert kinds == {"other person", "other person, other camera"} and len(found) == 7
    assert sum(found.values()) == 2 + found["similarity"]          # all others: 0, not 0 / 0
    first, *lines = scoring.in_words(found)
    assert "share of all pairs" in first and len(lines) == 6
    assert lines[:2] == [f"same person {'0.00 %':>25}", f"other person {'100.00 %':>24}"]
    assert scoring.in_words(dict(similarity=.5)) == ["similarity 0.500"]


def test_a_run_is_scored_from_anywhere(tiny, tmp_path, capsys):
    """Relative --data and --root are those of the folder in which the run was started."""
    shutil.copytree(tiny, tmp_path / "a" / "sets" / "tiny")
    (tmp_path / "b").mkdir()
    done = program("ccsd.py", *short("sets/tiny", "runs/one"), cwd=tmp_path / "a")
    assert done.returncode == 0, done.stderr
    done = program("eval.py", tmp_path / "a" / "runs" / "one", "--json", cwd=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    path = str(tmp_path / "a" / "runs" / "one" / "last.pt")
    state = common.load_checkpoint(path)
    assert json.loads(done.stdout)["mAP"] == state["scores"]["mAP"]

    common.save_checkpoint(path, **dict(state, epochs=7))          # as if it had been stopped
    scores = scoring.main([path, "--data", str(tiny)])
    assert "not finished: after epoch 2 of 7" in capsys.readouterr().out
    assert (scores["epoch"], scores["epochs"]) == (2, 7)

    for root in ("dtaa", str(tmp_path)):                           # nothing is drawn there
        says = refusal(lambda: scoring.main([path, "--data", "toy", "--root", root]), capsys)
        assert root in says and not os.path.exists(os.path.join(root, "toy"))


@pytest.mark.parametrize("words, says", [
    ("R R", "--report FILE.html"), ("R R --report", "--report FILE.html"),
    ("R --report x.txt", "x.txt.html"), ("R --save-features x", "x.npz"),
    ("R --report nowhere/x.html", "nowhere/x.html cannot be written"),
    ("R --save-features nowhere/x.npz", "nowhere/x.npz cannot be written"),
    ("R --pairs x.jpg y.jpg", "x.jpg"), ("R --pairs x.jpg", "--pairs"),
    ("R nowhere --report x.html", "nowhere")])
def test_refusals(words, says, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(run) if word == "R" else word for word in words.split()]
    assert says in refusal(lambda: scoring.main(argv), capsys)
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_no_score_is_lost(run, monkeypatch, capsys):
    """A full device, a closed pipe, a closed output: the score goes to stderr, in one piece."""
    read, write = os.pipe()
    os.close(read)
    for nowhere in ("/dev/full", write):
        with open(nowhere, "w") as file:                           # which ends without an error
            monkeypatch.setattr(sys, "stdout", file)
            with pytest.raises(SystemExit) as stop:
                common.run(lambda: scoring.main([str(run)]))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and lines[-1].startswith("error: standard output: ")
        assert any("mAP     R1     R5    R10  queries" in line for line in lines)
    monkeypatch.setattr(sys, "stdout", None)
    common.run(lambda: scoring.main([str(run)]))
    assert "mAP     R1     R5    R10  queries" in capsys.readouterr().err


def test_a_terminal_without_the_letters(run, tiny, tmp_path, monkeypatch):
    os.symlink(tiny, tmp_path / "d\u00e4t\u00e4")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    scoring.main([str(run), "--data", str(tmp_path / "d\u00e4t\u00e4")])
    assert b"d?t?" in shown.getvalue()
