"""Hand out an assignment, a copy of the project with blanks; grade what comes back.

  python tests/handout.py list                     functions, points, what each needs to know
  python tests/handout.py make FOLDER              the students' copy, with every blank
  python tests/handout.py make FOLDER --blank ccsd common.GeM      those of a page, and one more
  python tests/handout.py grade FOLDER ... [--blank ...]           scores copies into grades.csv

Each check is a point. A copy's tests hold arrays that were computed when it was made; grades come
from other inputs. Right answers are computed here, by this checkout's functions. A submission runs
in processes of its own, in a temporary copy, with a time limit, and hears only the inputs. What it
prints, deletes or hangs costs its author the points of that function.

`grade` RUNS FOREIGN CODE WITH YOUR RIGHTS. All this helps against accidents, not against malice: a
submission can read and delete what you can, and fill the memory. Fence it: a container without
network that holds only the checkout and the submissions, or a user who owns nothing else. On
Windows, processes that a submission starts are not ended.
"""

import argparse
import ast
import contextlib
import csv
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

import checks
import common
import numpy as np
import torch
import torch.nn.functional as F

HERE = common.HERE
TOY = dict(ccsd="--epochs 3", mskd="--epochs 1 --warm-up 2",
           sskd="--nets 1 --source-epochs 2 --epochs 2")  # runs for the column of scores
BLANKS = {  # function: what it needs to know; what to do
    "common.GeM": ("powers, autograd", "the p-th root of the mean p-th power, floored at 1e-6"),
    "common.cluster_means": ("indexing by labels", "unit means, without label -1"),
    "common.update_memory": ("momentum", "image after image, in place, without gradient"),
    "common.average_precision": ("ranks, ties", "mean precision at the ranks of right answers"),
    "common.pk_batches": ("random numbers", "p labels x k images, drawn by the generator"),
    "common.jaccard_distance": ("neighbours, sparse matrices", "from V of reciprocal_vectors() "
                                "with weights exp(2 cosine - 2); a dense matrix first is fine"),
    "ccsd.split_by_camera": ("np.unique", "number the pairs (cluster, camera) that occur"),
    "ccsd.intra_camera_loss": ("cross-entropy, masks", "compare within the image's camera"),
    "ccsd.cross_camera_loss": ("log-sum-exp, top-k", "a cross-entropy for each positive"),
    "ccsd.distillation_loss": ("KL divergence, detach", "the own camera teaches the others"),
    "mskd.view_losses": ("cross-entropy", "a cross-entropy for each view"),
    "mskd.distillation_losses": ("detach", "squared distance to the teacher's feature"),
    "mskd.mixed_distance": ("sparse matrices", "weigh common.jaccard_distance() of the views"),
    "sskd.soft_label_loss": ("log-softmax", "cross-entropy with a distribution as target"),
    "sskd.follow": ("no_grad, in-place changes", "move slow parameters towards the fast ones"),
    "sskd.adaptive_eps": ("sparse matrices, sorting", "the smallest distances, each pair once"),
    "sskd.soft_labels": ("softmax, no_grad", "ask each slow copy about its own view"),
    "sskd.multi_similarity_loss": ("masks, log-sum-exp", "the hard pairs of every anchor")}
TWINS = {"common.jaccard_distance": "eval.rerank", "common.average_precision": "eval.rank_queries"}


# ------------------------- cases: (key of checks.facts, "name of the point: words", *inputs) each


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def common_cases(C):
    x, p, f = torch.rand(C, 3, 4, 2) + .1, torch.tensor([3.]), unit(3, 5 * C, 4)
    yield "common.GeM", [
        ("shape", "shape: (B, D, h, w) -> (B, D)", x, p),
        ("values", "values: the generalised mean over the map", x, p),
        ("values", "power: the module's own p counts, not only 3", x, p / 2),
        ("values", "floor: values below 1e-6 count as 1e-6", x - .6, p - .5),
        ("gradient0", "gradient: reaches the images, and is finite", x - .6, p - .5),
        ("gradient1", "learned p: the gradient reaches p", x, p)]
    y = torch.cat([torch.arange(C), torch.randint(C, (4 * C,))])
    yield "common.cluster_means", [
        ("shape", "shape: one row for each cluster", f[0], y),
        ("values", "values: the mean of a cluster's features, of length 1", f[0], y),
        ("values", "outliers: images with label -1 count nowhere", f[0], y - 1),
        ("values", "views: (3, N, D) features have one more axis, in front", f, y)]
    memory, y = unit(C + 2, 4), torch.randperm(C + 2)[:3]
    yield "common.update_memory", [
        ("values", "values: unit(mu m + (1 - mu) f), in place", memory, f[0, :3], y, .5, 1),
        ("values", "momentum: mu weighs the memory, not the image", memory, f[0, :3], y, .1, 1),
        ("values", "order: images change a row one after the other", memory, f[0, :9],
         y.repeat_interleave(3), .5, 3),
        ("values", "others: rows without an image stay", 2 * memory, f[0, :3], y, .5, 1),
        ("gradient1", "gradient: none reaches the features", memory, f[0, :3], y, .5, 1)]
    y, cams = torch.randperm(56) % 8 - 1, torch.randint(3, (56,))  # 7 labels and outliers
    cams[y == 0], y[(y == 1).nonzero()[1:]] = 0, -1                # one camera; one image
    rest = y, cams, 3, 3, 5
    yield "common.pk_batches", [
        ("shape", "shape: `iters` batches of p * k images", *rest),
        ("labels", "labels: p different ones, k images of each, no outlier", *rest),
        ("turns", "turns: every label once before any repeats", *rest),
        ("cameras", "cameras: the others come from other cameras than the first", *rest),
        ("repeats", "repeats: no image twice if there are enough", *rest),
        ("generator", "generator: it alone draws; equal seeds give equal batches", *rest),
        ("Problem", "too few: fewer than p labels raise Problem", y, cams, 8, 3, 1)]
    f = F.normalize(unit(4, 6)[torch.arange(20 + C) % 4] + .2 * torch.randn(20 + C, 6))
    third = np.array_split(np.sort(common.jaccard_distance(f, 8, 1).data), 3)[1]
    far = float(third[np.diff(third).argmax():][:2].mean())        # in a gap
    yield "common.jaccard_distance", [
        ("shape", "shape: sparse (N, N)", f, 8, 1),
        ("pairs", "values: 1 - sum of minima / sum of maxima", f, 8, 1),
        ("pairs", "k2: vectors are averaged over the k2 nearest", f, 8, 4),
        ("values", "zeros: diagonal and duplicates are stored", torch.cat([f, f[:1]]), 8, 1),
        ("values", "max_distance: pairs farther apart are not stored", f, 8, 1, far),
        ("Problem", "finite: other features raise Problem", f / (f - f[:1]).abs(), 8, 1)]
    s, order = torch.randn(6, 12 + C), torch.rand(6, 12 + C).argsort(1)
    right, gone = order < 3, (order > 2) & (order < 8)
    yield "common.average_precision", [
        ("shape", "shape: two results, (b,) each", s, right),
        ("first result", "values: mean precision at the right answers' ranks", s, right),
        ("first result", "counts: queries have different numbers of right answers", s,
         order <= torch.arange(6)[:, None]),
        ("second result", "first: number of wrong answers before the first right one", s, right),
        ("first result", "ties: of equal answers, the wrong ones come first", s.round(), right),
        ("first result", "ignored: -inf comes last", s.masked_fill(gone, -torch.inf), right)]


def grouped(seen):
    """seen (C, V) bool: which camera sees which cluster -> similarities of 12 images to groups,
    their groups, cluster, camera and table of the groups."""
    table, (parent, camera) = torch.full(seen.shape, -1), seen.nonzero().T
    table[seen] = torch.arange(len(parent))
    return .6 * torch.randn(12, len(parent)), torch.arange(12) % len(parent), parent, camera, table


def ccsd_cases(C):
    V, seen = 3 + C % 2, torch.zeros(C + 2, 5, dtype=bool)
    seen[:C, :3], seen[C - 1, 2], seen[C, 0], seen[C + 1, 1:3], seen[0, 3] = 1, 0, 1, 1, 1
    draws = torch.cat([torch.randperm(C * V), torch.randint(C * V, (9,))])
    y, cams = draws // V, draws % V
    yield "ccsd.split_by_camera", [
        ("shape", "shape: (N,), (G,), (G,), (C, V)", y, cams),
        ("groups", "groups: each image's group has its cluster and camera", y, cams),
        ("groups", "outliers: images with label -1 have group -1", y - 1, cams),
        ("table", "table: the group of cluster k and camera v", y, cams),
        ("table", "unseen: -1 where v does not see k", y, torch.where(y < 2, y, cams))]
    s, g, parent, camera, table = grouped(torch.ones(C, 2, dtype=bool))
    s3, g3, *groups3 = grouped(torch.ones(C, V, dtype=bool))
    s5, g5, *groups5 = grouped(seen)
    alone = torch.where(torch.arange(12) < 4, 3, g5)               # camera 3 has one group
    yield "ccsd.intra_camera_loss", [
        ("values", "values: cross-entropy over the camera's groups, mean", s, g, camera, 1),
        ("values", "temperature: similarities are divided by temp", s, g, camera, .3),
        ("values", "alone: a camera's only group gives 0, and counts", s5, alone, groups5[1], 1),
        ("gradient0", "gradient: reaches the similarities", s, g, camera, 1)]
    none = s[:, ::2], g // 2, parent[::2]
    yield "ccsd.cross_camera_loss", [
        ("values", "values: the other camera's group against those of other clusters; the image's "
         "own is neither", s, g, parent, 1),
        ("values", "several: mean over all positives", s3, g3, groups3[0], 1),
        ("values", "temperature: similarities are divided by temp", s, g, parent, .3),
        ("values", "hardest: only the most similar negatives", s, g, parent, 1, 2),
        ("values", "without: images without a positive do not count", s5, g5, groups5[0], 1),
        ("values", "none: 0 and not NaN if nobody has a positive", *none, 1),
        ("gradient0", "gradient: reaches positives and negatives", s, g, parent, 1)]
    groups = parent, camera, table
    yield "ccsd.distillation_loss", [
        ("values", "values: KL(teacher || student), two cameras", s, g, *groups, 1),
        ("values", "cameras: mean over the other cameras", s3, g3, *groups3, 1),
        ("values", "temperature: similarities are divided by temp", s, g, *groups, .3),
        ("values", "unseen: only clusters that both see, two or more", s5, g5, *groups5, 1),
        ("values", "none: 0, not NaN, with one camera", *none, 0 * parent[::2], table[:, :1] // 2,
         1),
        ("gradient0", "gradient: to the student, none to the teacher", s, g, *groups, 1)]


def mskd_cases(C):
    f, t, m, y = unit(3, 8, 5), unit(3, 8, 5), unit(3, C, 5), torch.arange(8) % 3
    yield "mskd.view_losses", [
        ("shape", "shape: a loss for each view, (3,)", f, m, y, 1),
        ("values", "values: cross-entropy with the view's own memory", f, m, y, 1),
        ("values", "temperature: similarities are divided by temp", f, m, y, .2),
        ("gradient0", "gradient: reaches the features", f, m, y, 1)]
    yield "mskd.distillation_losses", [
        ("shape", "shape: a loss for each view, (3,)", f, t),
        ("values", "values: squared distance, mean over the batch only", f, t),
        ("gradient0", "gradient: reaches the student", f, t),
        ("gradient1", "teacher: no gradient reaches the teacher", f, t)]
    x = F.normalize(unit(3, 4, 5)[:, torch.arange(24) % 4] + .2 * torch.randn(3, 24, 5), dim=2)
    x[:, 1] = x[:, 0]
    (near, *nears), (x, *fars) = (
        (v, *(torch.tensor(checks.dense(common.jaccard_distance(view, k))) for view in v))
        for v, k in ((x[:, 2:6 + C], 12), (x, 6)))
    yield "mskd.mixed_distance", [
        ("shape", "shape: sparse (N, N)", near, 12, .2, *nears),
        ("pairs", "values: weights 1 - 2 l1, l1, l1", near, 12, .2, *nears),
        ("pairs", "missing: what a view does not store is 1 there", x, 6, .2, *fars),
        ("pairs", "l1 = 0: the global view alone", x, 6, 0, *fars),
        ("values", "zeros: the diagonal and duplicates are stored", x, 6, .2, *fars)]


def sskd_cases(C):
    z, soft = torch.randn(2, C + 1, C)
    soft, hard = soft.softmax(1), F.one_hot(torch.randint(C, (C + 1,)), C).float()
    yield "sskd.soft_label_loss", [
        ("values", "values: -sum of soft log softmax(z), mean over the batch", z, soft),
        ("values", "hard: zeros in a soft label give no NaN", z, hard),
        ("values", "large: logits of hundreds give no infinity", 200 * z, soft),
        ("gradient0", "gradient: reaches z", z, soft)]
    slow, fast = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    yield "sskd.follow", [
        ("values", "values: alpha E + (1 - alpha) M, in place; M stays", slow, fast, .5),
        ("values", "alpha: it weighs the slow copy", slow, fast, .9),
        ("values", "first: alpha 0 copies M", slow, fast, 0),
        ("gradient1", "gradient: none from the slow copy to the fast one", slow, fast, .5)]
    d = torch.rand(21, 21).mul(.9).add(.05).triu(1)
    d, twins = d + d.T, (d + d.T) * (torch.arange(21) > 5)
    missing = d.masked_fill(d + d.T > 1, 1)
    yield "sskd.adaptive_eps", [
        ("values", "values: mean of the smallest share of all pairs", d, .1),
        ("values", "missing: pairs that are not stored are at distance 1", missing, .9),
        ("values", "duplicates: pairs at distance 0 do not count", torch.minimum(twins, twins.T), .2),
        ("values", "few: at least one pair", d, .001)]
    weights, views, rows, means = (torch.randn(2, *n) for n in ((4, 5), (C, 4), (C + 1, 5), (9, 5)))
    i, few = torch.randperm(9)[:C], (weights, views, rows, None)
    yield "sskd.soft_labels", [
        ("shape", "shape: (n, B, C)", *few, i, 1, 1),
        ("values", "values: each copy's softmax for its own view", *few, i, 1, 1),
        ("values", "temperature: logits are divided by --temp", *few, i, 3, 1),
        ("values", "cameras: the mean leaves the direction, the length stays", *few[:3], means, i,
         1, 1),
        ("gradient0", "gradient: none to the slow copies", *few, i, 1, 1)]
    y, close = torch.arange(16) // 4, 1 + .12 * torch.randn(16, 6)
    x = unit(4, 6)[y] + .6 * torch.randn(16, 6)
    solved, twins = x.clone(), x.clone()
    solved[:4], twins[1] = .1 * torch.randn(4, 6) - 9 * torch.eye(6)[5], 2 * x[0]
    yield "sskd.multi_similarity_loss", [
        ("values", "values: where every pair is hard", close, y),
        ("values", "mining: pairs easier than the margin are left out", x, y),
        ("values", "solved: anchors without both kinds give 0, and count", solved, y),
        ("values", "duplicates: a positive at cosine 1 is left out", twins, y),
        ("gradient0", "gradient: reaches the features", x, y)]


def cases(names, seed):
    """-> {function: [(key, words, inputs, what this checkout's function gives)]}."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = dict(case for page in (common_cases, ccsd_cases, mskd_cases, sskd_cases)
                     for case in page(4 + seed % 3))
    return {name: [(key, words, inputs, checks.observe(name, key, inputs))
                   for key, words, *inputs in drawn[name]] for name in names}


# ----------------------------------------------------------------------------------- handing out


def chosen(words):
    """Names of pages and functions -> functions, in the order of BLANKS; none: all."""
    known = {*BLANKS, *(name.split(".")[0] for name in BLANKS)}
    if lost := {*words} - known:
        raise common.Problem(f"--blank {min(lost)}: no such exercise (see: handout.py list)")
    return [name for name in BLANKS if not words or {name, name.split(".")[0]} & {*words}]


def blanked(source, page, names):
    """-> a page's source without the bodies of functions, nor decorators: they are half of some
    answers. What eval.py knows about them goes, too."""
    rows, nodes = source.split("\n"), {getattr(x, "name", 0): x for x in ast.parse(source).body}
    jobs = {name: BLANKS[name][1] for name in names}
    jobs.update((TWINS[name], f"left out, it would tell {name}") for name in names if name in TWINS)
    jobs = [(nodes[x.split(".")[1]], x, do) for x, do in jobs.items() if x.startswith(page + ".")]
    for node, name, do in sorted(jobs, key=lambda job: -job[0].lineno):
        if isinstance(node, ast.ClassDef):
            node = next(x for x in node.body if getattr(x, "name", 0) == "forward")
        first, indent = node.body[0], " " * node.body[0].col_offset
        start = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
        rows[start:node.end_lineno] = [f"{indent}raise NotImplementedError(",
                                       f'{indent}    "{name}: {do}")']
        for decorator in node.decorator_list:
            del rows[decorator.lineno - 1:decorator.end_lineno]
    return "\n".join(rows)


def read(*path):
    with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
        return file.read()


def write(folder, texts):
    os.makedirs(os.path.join(folder, "tests"), exist_ok=True)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def make(folder, names):
    """Write the students' copy into a new folder."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise common.Problem(f"{folder} is there already (name a new folder)")
    expected = cases(names, seed=0)
    rows = [f"| {i} | `{name}` | {' | '.join(BLANKS[name])} | {len(expected[name])} |"
            for i, name in enumerate(names, 1)]
    texts = {name: read(HERE, name) for name in (
        "requirements.txt", ".gitignore", "tests/toy.py", "tests/report.py", "tests/checks.py")}
    texts.update((f"{page}.py", blanked(read(HERE, f"{page}.py"), page, names))
                 for page in ("common", "ccsd", "mskd", "sskd", "eval"))
    texts["tests/test_assignment.py"] = "from checks import pytest_generate_tests, test_blank\n"
    readme = read(HERE, "tests", "handout.md")
    texts["README.md"] = readme.replace("<!-- blanks -->", "\n".join(rows))
    write(folder, texts)
    torch.save(expected, os.path.join(folder, "tests", "assignment.bin"))


# --------------------------------------------------------------------------------------- grading


def sources(folder):
    """-> {name: text} of the Python files in a folder and its tests/; no links, pipes, giants."""
    names = [*os.listdir(folder), *(os.path.join("tests", name) for name in os.listdir(
        os.path.join(folder, "tests")) if os.path.isdir(os.path.join(folder, "tests")))]
    return {name: read(path) for name in names if name.endswith(".py")
            and os.path.isfile(path := os.path.join(folder, name))
            and not os.path.islink(path) and os.path.getsize(path) < 2**20}


@contextlib.contextmanager
def copied(pristine, files):
    """In this context a hand-out with the files of a submission is in a temporary folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        place = shutil.copytree(pristine, os.path.join(home, "copy"))
        write(place, {**files, "tests/checks.py": read(HERE, "tests", "checks.py")})
        yield place


def apart(place, words, limit):
    """Run Python there in a process of its own -> how it ended, what it printed."""
    own = {} if os.name == "nt" else dict(start_new_session=True)
    env = dict(os.environ, OMP_NUM_THREADS="1", TMPDIR=place, TEMP=place)
    with tempfile.TemporaryFile() as out:  # a pipe could be held open by a child that survives
        process = subprocess.Popen([sys.executable, *words], cwd=place, env=env, stdout=out,
                                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **own)
        try:
            end = f"the process ended, exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            end = f"not finished after {limit} s"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if own else process.kill()
            process.wait()
        out.seek(0)
        return end, out.read(2**25).decode("utf-8", "replace")


def answers(pristine, files, expected, limit):
    """-> {function: what was observed in each check}. A process that hangs or ends is blamed on
    the function, or the import of a page, that it was in; another one goes on with the rest."""
    todo, seen = dict(expected), {}
    while todo:
        with copied(pristine, files) as place:
            torch.save({name: [(key, inputs) for key, _, inputs, _ in rows]
                        for name, rows in todo.items()}, os.path.join(place, "inputs.bin"))
            code = "import sys; sys.path.insert(0, 'tests'); import checks; checks.work()"
            end, lines = apart(place, ["-c", code], limit)
        at = "common"
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                at, *result = json.loads(line)
                if result and at in todo:
                    seen[at] = [*result[0], *todo[at]][:len(todo[at])]  # some may be missing
        lost = [name for name in todo if at in ("common", name, name.split(".")[0])]
        seen.update((name, [dict(error=end)] * len(todo[name])) for name in {*lost} - {*seen})
        todo = {name: rows for name, rows in todo.items() if name not in seen}
    return seen


def changes(pristine, files, names):
    """-> what differs from the hand-out in the Python files, apart from the blanks."""
    given, words = sources(pristine), []
    for name in sorted({*given, *files}):
        text = files.get(name)
        with contextlib.suppress(SyntaxError, ValueError, KeyError, StopIteration):
            text = blanked(text, name.removesuffix(".py"), names) if text else text
        if text != given.get(name):
            words.append(name + " missing" * (text is None) + " new" * (name not in given))
    return ", ".join(words)


def toy_score(pristine, files, page, root, limit):
    """Run a page on the toy set -> mAP in per cent, or why there is none. Its network is scored
    here, with our code."""
    with copied(pristine, files) as place:
        for name in ("toy", "toy-source"):
            shutil.copytree(os.path.join(root, name), os.path.join(place, "data", name))
        end, _ = apart(place, [f"{page}.py", *shlex.split(TOY[page]), "--device", "cpu", "--out",
                               "run"], limit)
        try:
            model, state = common.load_encoder(os.path.join(place, "run", "last.pt"))
            _, query, gallery = common.load("toy", root)
            images = [common.read_images(part, *model.size) for part in (query, gallery)]
            return f"{100 * common.test(model, (query, gallery, *images))['mAP']:.1f}"
        except Exception:  # a stranger's file
            return end


def grade(args):
    """Score folders and write the table, anew after each of them. The first row is the checkout."""
    names, rows = chosen(args.blank), []
    folders = [x for word in args.folders for x in sorted(glob.glob(word)) or [word]]
    pages = [page for page in TOY if args.toy and any(x.startswith(page) for x in names)]
    expected = cases(names, args.seed)
    for name in ("toy", "toy-source") if pages else ():
        common.load(name, args.root)  # draws it
    with tempfile.TemporaryDirectory() as home:
        make(pristine := os.path.join(home, "handout"), names)
        for folder in (HERE, *folders):
            row = dict.fromkeys(names, 0)
            try:
                files = sources(folder)
                seen = answers(pristine, files, expected, args.limit)
                scores = {name: checks.score(expected[name], seen[name]) for name in names}
                row = {name: points for name, (points, _) in scores.items()}
                row["wrong"] = " | ".join(f"{name}: {'; '.join(dict.fromkeys(wrong))}"
                                          for name, (_, wrong) in scores.items() if wrong)
                row.update((f"toy mAP {page}", toy_score(
                    pristine, files, page, args.root, 10 * args.limit)) for page in pages)
                row["changed files"] = folder != HERE and changes(pristine, files, names) or ""
            except OSError as error:
                row["wrong"] = f"cannot be read: {error}"
            rows.append(dict(folder=folder, points=sum(row[name] for name in names), **row))
            with open(args.csv, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
            common.say(f"{rows[-1]['points']:4d} of {rows[0]['points']}  {folder}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "make", "grade"))
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--blank", nargs="+", default=[], metavar="PAGE.FUNCTION")
    parser.add_argument("--csv", default="grades.csv")
    parser.add_argument("--seed", type=common.number(int, 1), default=1, help="of grade's inputs")
    parser.add_argument("--limit", type=common.number(float, 1), default=60,
                        help="seconds of a process, ten times as many for a toy run (%(default)s)")
    parser.add_argument("--no-toy", dest="toy", action="store_false", help="no runs on the toy set")
    parser.add_argument("--root", default="data", help="where the toy set is, or is drawn")
    args = parser.parse_args(argv)
    if args.command != "list" and not args.folders or args.command == "make" and args.folders[1:]:
        raise common.Problem(f"{args.command} needs {'a folder' if args.command == 'make' else 'folders'}")
    if args.command == "list":
        for name, rows in cases(chosen(args.blank), 0).items():
            common.say(f"{name:28} {len(rows)} points  {BLANKS[name][0]}")
    elif args.command == "make":
        make(args.folders[0], chosen(args.blank))
        common.say("grade with: python tests/handout.py grade FOLDER ..." + (
            f" --blank {' '.join(args.blank)}" if args.blank else ""))
    else:
        grade(args)


if __name__ == "__main__":
    common.run(main, "")
