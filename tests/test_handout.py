"""Assignments: other people's right answers get all points, usual mistakes lose the right ones, and
whatever a submission does costs its author only.

The answers below are slow and in float64; the mistakes are edits of their text.
"""

import csv
import functools
import importlib
import inspect
import math
import os
import subprocess
import sys
import time

import checks
import handout
import numpy as np
import pytest
import torch
from conftest import checkpoint, program, short
from scipy.sparse import coo_array
from torch import nn

import common


class GeM(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.]))

    def forward(self, x):
        x = x.double()
        x = torch.maximum(x, torch.full_like(x, 1e-6))
        total = (x ** self.p).sum(3).sum(2)
        return (total / (x.shape[2] * x.shape[3])) ** (1 / self.p)


def cluster_means(features, labels):
    if features.dim() == 3:
        return torch.stack([cluster_means(view, labels) for view in features])
    rows = []
    for k in range(labels.max() + 1):
        mean = features[labels == k].double().mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def update_memory(memory, features, labels, momentum, k):
    for f, y in zip(features.detach(), labels):
        m = momentum * memory[y] + (1 - momentum) * f
        memory[y] = m / m.norm()


def average_precision(similar, right):
    AP, first = [], []
    for row, hit in zip(similar.tolist(), right.tolist()):
        order = sorted(range(len(row)), key=lambda j: (-row[j], hit[j]))
        ranks = [rank for rank, j in enumerate(order, 1) if hit[j]]
        AP.append(sum(n / rank for n, rank in enumerate(ranks, 1)) / len(ranks))
        first.append(ranks[0] - 1)
    return torch.tensor(AP), torch.tensor(first)


def pk_batches(labels, cams, p, k, iters, generator):
    def permuted(values):
        values = list(values)
        return [values[i] for i in torch.randperm(len(values), generator=generator)]
    people = sorted(set(labels.tolist()) - {-1})
    if len(people) < p:
        raise common.Problem("too few")
    queue = []
    for _ in range(iters):
        if len(queue) < p:
            queue = permuted(people)
        batch = []
        for person in queue[:p]:
            images = permuted(np.flatnonzero(labels == person))
            others = [i for i in images if cams[i] != cams[images[0]]] or images[1:] or images
            enough = permuted(others)
            while len(enough) < k - 1:
                enough += permuted(others)
            batch += [images[0], *enough[:k - 1]]
        queue = queue[p:]
        yield torch.tensor(batch)


def jaccard_distance(features, k1=30, k2=6, max_distance=1.):
    v = common.neighbour_vectors(features, k1, k2).toarray().astype(float)
    rows, columns, values = [], [], []
    for i in range(len(v)):
        for j in range(len(v)):
            d = 1 - np.minimum(v[i], v[j]).sum() / np.maximum(v[i], v[j]).sum()
            if d < 1 and d <= max_distance:
                rows, columns, values = rows + [i], columns + [j], values + [max(d, 0)]
    return coo_array((values, (rows, columns)), (len(v), len(v))).tocsr()


def split_by_camera(labels, cams):
    names = {}
    table = np.full((max(labels) + 1, max(cams) + 1), -1)
    groups = np.full(len(labels), -1)
    for i, name in enumerate(zip(labels.tolist(), cams.tolist())):
        if name[0] >= 0:
            groups[i] = table[name] = names.setdefault(name, len(names))
    return groups, np.array([k for k, v in names]), np.array([v for k, v in names]), table


def intra_camera_loss(similarity, group, camera, temp):
    total = 0
    for s, g in zip(similarity.double() / temp, group):
        total = total + s[camera == camera[g]].logsumexp(0) - s[g]
    return total / len(group)


def cross_camera_loss(similarity, group, parent, temp, negatives=50):
    losses = []
    for s, g in zip(similarity.double() / temp, group):
        positives = [h for h in range(len(parent)) if parent[h] == parent[g] and h != g]
        other = s[parent != parent[g]]
        other = other.sort(descending=True).values[:negatives]
        total = sum(s[h].exp() for h in positives) + other.exp().sum()
        if positives:
            losses.append(sum(total.log() - s[h] for h in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0 * similarity.sum()


def distillation_loss(similarity, group, parent, camera, table, temp):
    losses = []
    for s, g in zip(similarity.double() / temp, group):
        v, terms = camera[g], []
        for w in range(table.shape[1]):
            both = [j for j in range(len(table)) if table[j, v] >= 0 and table[j, w] >= 0]
            if w != v and parent[g].item() in both and len(both) > 1:
                log_p = s[table[both, v]].log_softmax(0).detach()
                log_q = s[table[both, w]].log_softmax(0)
                terms.append((log_p.exp() * (log_p - log_q)).sum())
        if terms:
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses) if losses else 0 * similarity.sum()


def view_losses(f, memory, k, temp):
    views = []
    for v in range(3):
        z = f[v].double() @ memory[v].double().T / temp
        views.append(sum(row.logsumexp(0) - row[y] for row, y in zip(z, k)) / len(k))
    return torch.stack(views)


def distillation_losses(f, t):
    t = t.detach()
    return torch.stack([sum(((a - b) ** 2).sum() for a, b in zip(f[v].double(), t[v])) / f.shape[1]
                        for v in range(3)])


def mixed_distance(views, k1, l1):
    total, n = {}, views.shape[1]
    for features, weight in zip(views, [1 - 2 * l1, l1, l1]):
        distance = common.jaccard_distance(features, k1).tocoo()
        for i, j, d in zip(*distance.coords, distance.data):
            total[i, j] = total.get((i, j), 0) + weight * (1 - d)
    stored = {pair: max(1 - s, 0) for pair, s in total.items() if s > 0}
    return coo_array((list(stored.values()), tuple(zip(*stored))), (n, n)).tocsr()


def soft_label_loss(z, soft):
    z = z.double()
    z = z - z.max(1, keepdim=True).values
    log_q = z - z.exp().sum(1, keepdim=True).log()
    return -(soft * log_q).sum() / len(z)


def follow(slow, fast, alpha):
    for e, m in zip(slow, fast):
        m = m.detach()
        e.copy_(alpha * e + (1 - alpha) * m)


def adaptive_eps(distance, rho):
    dense = checks.pairs(distance)
    n = len(dense)
    every = sorted(dense[i, j] for i in range(n) for j in range(i))
    every = [d for d in every if d > 1e-6]
    count = round(rho * len(every))
    return np.mean(every[:max(count, 1)])


def soft_labels(slow, classifiers, views, camera_means, index, args):
    soft = []
    for i in range(len(slow)):
        b = common.forward(slow[i], views[i], args.bn_splits, inside=True)[1].detach()
        if camera_means is not None:
            length = b.norm(dim=1, keepdim=True)
            b = b / length - camera_means[i][index]
            b = b / b.norm(dim=1, keepdim=True) * length
        z = b @ classifiers[i].detach().T
        z = z / args.temp
        soft.append(z.exp() / z.exp().sum(1, keepdim=True))
    return torch.stack(soft)


def multi_similarity_loss(pooled, labels, threshold=.5, margin=.1, low=2., high=40.):
    x = pooled.double()
    x = x / x.norm(dim=1, keepdim=True)
    S, terms = x @ x.T, []
    for i, (s, y) in enumerate(zip(S, labels)):
        pos, neg = s[(labels == y) & (s < 1 - 1e-5)], s[labels != y]
        if len(pos) and len(neg):
            pos, neg = pos[pos < neg.max() + margin], neg[neg > pos.min() - margin]
        if len(pos) and len(neg):
            terms.append((1 + (-low * (pos - threshold)).exp().sum()).log() / low
                         + (1 + (high * (neg - threshold)).exp().sum()).log() / high)
    return sum(terms) / len(S)


MISTAKES = {  # function: its text, what students write instead, the kinds of points that this costs
    "common.GeM": [
        ("1 / self.p", "1 / 3", "power floor gradient"),
        ("** self.p", "** self.p.detach()", "gradient"),
        ("1e-6", "0", "gradient"),
        ("torch.maximum(x, torch.full_like(x, 1e-6))", "x", "floor gradient"),
        ("total / (x.shape[2] * x.shape[3])", "x ** self.p", "all and shape")],
    "common.cluster_means": [
        ("labels.max() + 1", "labels.max()", "all and shape"),
        ("mean / mean.norm()", "mean", "all"),
        ("mean(0)", "mean(1)", "all and shape"),
        ("range(labels.max() + 1)", "np.unique(labels)", "outliers"),
        ("if features.dim() == 3", "if False", "views")],
    "common.update_memory": [
        ("features.detach()", "features", "gradient"),
        ("momentum * memory[y] + (1 - momentum) * f",
         "momentum * f + (1 - momentum) * memory[y]", "momentum"),
        ("m / m.norm()", "m", "values momentum order"),
        ("for f, y in", "memory = memory.clone()\n    for f, y in", "values momentum order"),
        ("zip(features.detach(), labels)", "reversed([*zip(features.detach(), labels)])", "order")],
    "common.average_precision": [
        ("(-row[j], hit[j])", "(-row[j], -hit[j])", "ties"),
        ("ranks[0] - 1", "ranks[0]", "first"),
        ("n / rank for n, rank in enumerate(ranks, 1)",
         "1 / rank for rank in ranks", "AP ties ignored"),
        ("/ len(ranks)", "/ len(row)", "AP ties ignored")],
    "common.pk_batches": [
        (" - {-1}", "", "labels Problem"),
        ("queue = queue[p:]", "queue = []", "turns"),
        ("if cams[i] != cams[images[0]]", "if i != images[0]", "cameras"),
        ("enough = permuted(others)", "enough = [others[0]]", "repeats"),
        ("generator=generator", "generator=None", "generator"),
        ("len(people) < p", "False", "Problem")],
    "common.jaccard_distance": [
        ("k1, k2)", "k1)", "k2"),
        ("d <= max_distance", "True", "max_distance"),
        ("if d < 1", "if 0 < d < 1", "zeros"),
        ("np.maximum(v[i], v[j]).sum()", "2", "all"),
        ("1 - np.minimum", "np.minimum", "all")],
    "ccsd.split_by_camera": [
        ("if name[0] >= 0", "if True", "outliers"),
        ("(max(labels) + 1, max(cams) + 1), -1", "(max(labels) + 1, max(cams) + 1), 0", "unseen"),
        ("np.full(len(labels), -1)", "np.full(len(labels), 0)", "outliers"),
        ("max(cams) + 1", "max(cams) + 2", "shape unseen"),
        ("[k for k, v in names]", "[v for k, v in names]", "groups table")],
    "ccsd.intra_camera_loss": [
        (" / temp", "", "temperature"),
        ("[camera == camera[g]]", "", "all"),
        ("/ len(group)", "", "all"),
        ("similarity.double()", "similarity.detach().double()", "gradient")],
    "ccsd.cross_camera_loss": [
        (" / temp", "", "temperature"),
        ("s[parent != parent[g]]",
         "s[torch.arange(len(s)) != g]", "values several temperature hardest without gradient"),
        (" and h != g", "", "all"),
        ("[:negatives]", "", "hardest"),
        (") / len(positives)", ")", "several without"),
        ("sum(losses) / len(losses) if losses else",
         "sum(losses) / len(group) if losses else", "without"),
        ("if losses else 0 * similarity.sum()", "", "none")],
    "ccsd.distillation_loss": [
        (".detach()", "", "gradient"),
        (" / temp", "", "temperature"),
        ("log_p.exp() * (log_p - log_q)",
         "log_q.exp() * (log_q - log_p)", "values cameras temperature unseen gradient"),
        ("if table[j, v] >= 0 and table[j, w] >= 0", "", "unseen"),
        ("if losses else 0 * similarity.sum()", "", "none"),
        ("sum(terms) / len(terms)", "sum(terms)", "cameras unseen"),
        ("w != v and", "", "values cameras temperature unseen gradient")],
    "mskd.view_losses": [
        (" / temp", "", "temperature"),
        ("memory[v]", "memory[0]", "all"),
        ("torch.stack(views)", "torch.stack(views).mean()", "all and shape"),
        ("f[v]", "f[v].detach()", "gradient")],
    "mskd.distillation_losses": [
        ("t = t.detach()", "", "gradient"),
        ("torch.stack(", "sum(", "all and shape"),
        ("/ f.shape[1]", "", "all")],
    "mskd.mixed_distance": [
        ("1 - 2 * l1", "1 - l1", "values missing zeros"),
        ("[1 - 2 * l1, l1, l1]", "[1, l1, l1]", "values missing zeros"),
        ("if s > 0", "if 0 < s < .99999", "zeros"),
        ("views, [1", "views[:1], [1", "values missing zeros"),
        ("max(1 - s, 0)", "s", "all")],
    "sskd.soft_label_loss": [
        ("z - z.max(1, keepdim=True).values", "z", "large"),
        ("keepdim=True).log()", "keepdim=True).log() * 0", "values hard gradient"),
        ("soft * log_q", "log_q.exp() * soft.log()", "all"),
        ("soft * log_q", "soft * (log_q - soft.log())", "all"),
        ("z.double()", "z.detach().double()", "gradient")],
    "sskd.follow": [
        ("alpha * e + (1 - alpha) * m", "alpha * m + (1 - alpha) * e", "alpha first"),
        ("m.detach()", "m", "gradient"),
        ("e.copy_(", "e = (", "values alpha first"),
        ("e.copy_(", "m.copy_(", "values alpha first"),
        (" + (1 - alpha) * m", "", "values alpha first")],
    "sskd.adaptive_eps": [
        ("if d > 1e-6", "", "duplicates"),
        ("rho * len(every)", "rho * n * n", "values missing duplicates"),
        ("every[:max(count, 1)]", "sorted(2 * every)[:max(count, 1)]", "values missing duplicates"),
        ("max(count, 1)", "count", "few"),
        ("if d > 1e-6", "if 1e-6 < d < 1", "missing"),
        ("np.mean(every[:max(count, 1)])",
         "every[max(count, 1) - 1]", "values missing duplicates")],
    "sskd.soft_labels": [
        (" / args.temp", "", "temperature"),
        ("[1].detach()", "[1]", "gradient"),
        ("views[i]", "views[0]", "values temperature cameras"),
        ("classifiers[i]", "classifiers[0]", "values temperature cameras"),
        ("* length", "", "cameras"),
        ("sum(1, keepdim=True)", "sum(0, keepdim=True)", "values temperature cameras"),
        ("b / length - ", "b - ", "cameras")],
    "sskd.multi_similarity_loss": [
        ("x / x.norm(dim=1, keepdim=True)", "x", "all"),
        (" & (s < 1 - 1e-5)", "", "values duplicates"),
        ("pos[pos < neg.max() + margin], neg[neg > pos.min() - margin]",
         "pos, neg", "mining solved gradient"),
        ("/ len(S)", "/ len(terms)", "solved"),
        ("(s < 1 - 1e-5)", "(torch.arange(len(s)) != i)", "duplicates"),
        ("/ low", "", "all")]}


@functools.cache
def cases(name, seed):
    return handout.cases([name], seed)[name]


def kinds(name, function, monkeypatch, seed=1):
    """-> the kinds of points that a function gets and loses in the place of a page's."""
    page, attribute = name.split(".")
    rows = cases(name, seed)
    monkeypatch.setattr(sys.modules[page], attribute, function)
    points, wrong = handout.score(name, rows, [checks.observe(name, *row[:2]) for row in rows])
    lost = {x.split(":")[0] for x in wrong}
    assert points in (0, len(rows) - len(wrong))
    return points, lost, wrong


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", handout.BLANKS)
def test_another_right_answer_gets_all_points(name, seed, monkeypatch):
    points, lost, wrong = kinds(name, globals()[name.split(".")[1]], monkeypatch, seed)
    assert not lost, wrong


def mistaken(name, text, instead):
    function = globals()[name.split(".")[1]]
    source = inspect.getsource(function)
    assert source.count(text) == 1, (name, text, source.count(text))
    space = dict(globals())
    exec(source.replace(text, instead), space)
    return space[function.__name__]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", handout.BLANKS)
def test_a_usual_mistake_costs_its_points_and_no_other(name, monkeypatch):
    every, ever = {words.split(":")[0] for words, *_ in cases(name, 1)}, {"shape"}
    for text, instead, costs in MISTAKES[name]:
        costs = every - ({"shape"} - {*costs.split()}) if "all" in costs else {*costs.split()}
        _, lost, wrong = kinds(name, mistaken(name, text, instead), monkeypatch)
        assert lost == costs, (text, instead, wrong)
        ever |= lost
    assert ever >= every, "a point that no mistake costs"


# ------------------------------------------------------------------------- handed out and graded

HEAD = """
import math, os, shutil, sys
import numpy as np
import checks, common
from scipy.sparse import coo_array
"""


def fill(folder, page, *answers):
    """Write answers below the blanks of a page."""
    path = os.path.join(folder, f"{page}.py")
    top, *main = handout.read(path).partition("\nif __name__")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([top, HEAD, *answers, "".join(main)]))


def bodies(name):
    """-> the long lines of the code of a page's function."""
    function = getattr(sys.modules[name.split(".")[0]], name.split(".")[1])
    source = inspect.getsource(inspect.unwrap(getattr(function, "forward", function)))
    return {row.strip() for row in source.replace(function.__doc__ or "-", "").split("\n")[1:]
            if len(row.split("#")[0].strip()) > 50 and not row.startswith("def ")}


def test_a_student_finds_no_answer_and_hears_what_is_wrong(tmp_path, tiny):
    folder = tmp_path / "copy"
    handout.main(["make", str(folder)])
    texts = {path.relative_to(folder).as_posix(): handout.read(path)
             for path in folder.rglob("*") if path.is_file() and path.suffix != ".bin"}
    assert texts.keys() == {
        "README.md", "requirements.txt", ".gitignore", "LICENSE", "tests/toy.py", "tests/checks.py",
        "tests/test_assignment.py", *(f"{page}.py" for page in handout.PAGES)}
    for name in ["ccsd.teacher_and_student", *handout.BLANKS]:
        for row in bodies(name):
            assert not any(row in text for text in texts.values()), (name, row)
    assert "@torch.no_grad()\ndef follow" not in texts["sskd.py"]    # half of the answer
    stopped = program(folder / "ccsd.py", *short(tiny, "run"), cwd=folder)
    assert stopped.returncode == 2
    assert stopped.stderr.splitlines()[-1].startswith("error: common.GeM: the p-th root")

    wrong = MISTAKES["common.update_memory"][-1]                   # the order
    fill(folder, "common", inspect.getsource(cluster_means),
         inspect.getsource(update_memory).replace(*wrong[:2]))
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rN", "tests"], cwd=folder,
                            capture_output=True, text=True).stdout     # -rN: every message once
    passed = sum(len(cases(f"common.{name}", 0)) for name in ("cluster_means", "update_memory")) - 1
    blank = sum(len(cases(name, 0)) for name in handout.BLANKS) - passed - 1
    assert f"{blank + 1} failed, {passed} passed" in tested
    assert tested.count(": still a blank\n") == blank
    assert "order: images change a row one after the other (" in tested


NASTY = r"""
def view_losses(f, memory, k, temp):
    print("x" * 10**6)
    print("y" * 2**25, file=sys.stderr)             # more than is read
    return torch.stack([F.cross_entropy(a @ b.T / temp, k) for a, b in zip(f, memory)])

def distillation_losses(f, t):                      # lies to the grader, deletes, ends
    checks.observe = lambda *_: dict(arrays=[0.])
    checks.complaint = lambda *_: ""
    for words in ('["mskd.distillation_losses", 7]', '["other", null]', "[" * 9999, '"\\ud800"'):
        os.write(2, words.encode() + b"\n")
    shutil.rmtree(".", ignore_errors=True)
    shutil.rmtree(OTHER)
    os._exit(0)
"""


def test_a_submission_costs_its_author_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    nasty, good = tmp_path / "nasty", tmp_path / "good"
    draw, seeds = handout.cases, []
    monkeypatch.setattr(handout, "cases", lambda x, seed: [seeds.append(seed), draw(x, seed)][1])
    blanks = ["--blank", "mskd.view_losses", "mskd.distillation_losses"]
    for folder in (nasty, good):
        handout.main(["make", str(folder), *blanks])
    fill(nasty, "mskd", f"OTHER = {str(good)!r}", NASTY)
    fill(good, "mskd", inspect.getsource(view_losses), inspect.getsource(distillation_losses))
    (nasty / "common.py").write_text(handout.read(nasty / "common.py").replace("2 ** 25", "9"))
    (nasty / "sskd.py").unlink()
    for name in ("checks.py", "conftest.py"):
        (nasty / "tests" / name).write_text("")
    handout.main(["grade", "--no-toy", "nasty", "good", *blanks])
    with open("grades.csv", newline="", encoding="utf-8") as file:
        bad, fine = csv.DictReader(file)
    assert bad["wrong"] == "mskd.distillation_losses: the process ended, exit code 0"
    assert not good.exists()
    assert seeds[:2] == [0, 0] and seeds[2] != 0                   # graded with other inputs
    assert [x["folder"] for x in (bad, fine)] == ["nasty", "good"]
    assert [x["points"] for x in (bad, fine)] == ["4", "7"]
    assert fine["wrong"] == "" and fine["changed files"] == "mskd.py"    # what fill() adds
    assert bad["changed files"] == "common.py mskd.py sskd.py tests/checks.py tests/conftest.py"
    assert "   4 of 7  nasty" in capsys.readouterr().out


STAND_IN = """
import json, os, sys, time

def work():  # as in checks.py, but without torch, and each function is a line of code
    todo = open("inputs.bin", "rb").read()
    for name, line in %r.items():
        if name.encode() in todo:
            print(json.dumps([name, None]), file=sys.stderr)
            exec(line)
            print(json.dumps([name, [len(name)]]), file=sys.stderr)
"""


def test_a_process_that_ends_or_hangs_is_blamed_on_one_function():
    ends = {"import os; os._exit(3)": "the process ended, exit code 3",
            "sys.exit('bye')": "the process ended, exit code 1",
            "time.sleep(999)": "not finished after 3 s"}
    if os.name != "nt":
        ends["os.kill(os.getpid(), 9)"] = "the process ended, exit code -9"
    lines = {f"page.{i}{i}": line for i, line in enumerate(["1", *ends, "2"])}
    rows = {name: [("words", [])] for name in lines}
    seen = handout.answers({"tests/checks.py": STAND_IN % lines}, rows, 3)
    assert seen == {
        name: [dict(error=ends[line]) if line in ends else 7] for name, line in lines.items()}
    seen = handout.answers({"tests/checks.py": "1 / 0"}, rows, 3)  # before any function
    assert seen == {name: [dict(error="the process ended, exit code 1")] for name in lines}


def test_what_a_submission_starts_ends_with_it(tmp_path):
    """Not on Windows."""
    path = tmp_path / "late"
    late = f"import time; time.sleep(1); open({str(path)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {late!r}])"
    assert handout.apart(tmp_path, ["-c", code], 60)[1] == "the process ended, exit code 0"
    time.sleep(1.5)
    assert os.name == "nt" or not path.exists()


def test_what_comes_from_a_submission_may_be_anything():
    name, rows = "mskd.view_losses", cases("mskd.view_losses", 1)
    for thing in (None, 3, "x", [], {}, dict(error=3), dict(arrays=3), dict(arrays=[]),
                  dict(arrays=[[[1], 2]]), dict(arrays=["x"]), dict(arrays=[[1e400, 2, None]]),
                  dict(arrays=[[math.nan] * 3]), dict(shape=[[3]], values=[1, 2, 3])):
        points, wrong = handout.score(name, rows, [thing] * len(rows))
        assert points == 0 and all(isinstance(words, str) for words in wrong), thing


def test_a_table_of_the_hand_out_s_arrays_gets_nothing():
    """Nor does what is easy to guess: zeros of the right shape."""
    for name in handout.BLANKS:
        pasted = [wanted for *_, wanted in cases(name, 0)]
        assert handout.score(name, cases(name, 1), pasted)[0] == 0, name
        zeros = [dict(arrays=[(0 * np.asarray(x)).tolist() for x in wanted.get("arrays", ())])
                 for *_, wanted in cases(name, 1)]
        assert handout.score(name, cases(name, 1), zeros)[0] == 0, name


def test_the_network_of_a_toy_run_is_scored_by_this_checkout(tmp_path, tiny):
    for page, flags in handout.TOY.items():
        assert importlib.import_module(page).get_args(flags.split()).data == "toy"
    _, *test_set = common.load(tiny)
    checkpoint(tmp_path / "last.pt")
    copy = "import os, shutil\nos.mkdir('run')\nshutil.copy(%r, 'run')" % str(tmp_path / "last.pt")
    assert 0 < float(handout.toy_score({"ccsd.py": copy}, "ccsd", test_set, 300)) < 100
    other = handout.toy_score({"ccsd.py": "raise SystemExit('no time')"}, "ccsd", test_set, 300)
    assert other == "the process ended, exit code 1: no time"
