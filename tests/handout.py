"""Hand out an assignment, a copy of the project with blanks; grade what comes back.

  python tests/handout.py --list                       functions, points, what each needs to know
  python tests/handout.py make FOLDER                  the students' copy, with every blank
  python tests/handout.py make FOLDER --blank ccsd common.GeM      those of a page, and one more
  python tests/handout.py grade FOLDER ... [--blank ...]           scores copies into grades.csv

A copy's tests hold arrays that were computed when it was made; grades come from other inputs. Right
answers are computed here, by this checkout's functions. A submission runs in processes of its own,
in a temporary copy, with a time limit, and is told only the inputs. A crash, a hang, a print or a
deleted file costs its author the points of a function, or of a page, and nobody else anything.

`grade` RUNS FOREIGN CODE WITH YOUR RIGHTS. All this helps against accidents, not against malice: a
submission can read and delete what you can, use the network and fill the memory. Fence it: use a
container without network that holds only this checkout and the submissions, or a user who owns
nothing else. On Windows, processes that a submission starts are not ended.
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
    "common.jaccard_distance": ("neighbours, sparse matrices", "compare the rows of "
                                "neighbour_vectors(); a dense matrix first is fine"),
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
PAGES = [*dict.fromkeys(name.split(".")[0] for name in BLANKS)]

# -------------------- cases: (function, (words of a point, *inputs), ...), see checks.py; the shape
# of the first makes one more point


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def common_cases(C):
    x, p, f = torch.rand(C, 3, 4, 2) + .1, torch.tensor([3.]), unit(3, 5 * C, 4)
    low = x - torch.arange(C)[:, None, None, None]                 # maps partly and wholly negative
    yield ("common.GeM", ("values: the generalised mean over the map", x, p),
           ("power: the module's own p counts, not only 3", x, p / 2),
           ("floor: values below 1e-6 count as 1e-6", low, p - .5),
           ("gradient: reaches images and p, and is finite", low, p - .5))
    y = torch.cat([torch.arange(C), torch.randint(C, (4 * C,))])
    yield ("common.cluster_means", ("values: the mean feature, of length 1", f[0], y),
           ("outliers: images with label -1 count nowhere", f[0], y - 1),
           ("views: (3, N, D) features have one more axis, in front", f, y))
    memory, y = unit(C + 2, 4), torch.randperm(C + 2)[:3]
    one, three = (memory, f[0, :3], y), (memory, f[0, :9], y.repeat_interleave(3))
    yield ("common.update_memory", ("values: unit(mu m + (1 - mu) f), in place", *one, .5, 1),
           ("momentum: mu weighs the memory, not the image", *one, .1, 1),
           ("order: images change a row one after the other", *three, .5, 3),
           ("gradient: none reaches the features", *one, .5, 1))
    s, order = torch.randn(6, 12 + C), torch.rand(6, 12 + C).argsort(1)
    right, gone = order <= torch.arange(6)[:, None] % 4, (order > 3) & (order < 9)
    yield ("common.average_precision",
           ("AP: mean of the precision at the right answers' ranks", s, right),
           ("ties: of equal answers, the wrong ones come first", s.round(), right),
           ("ignored: answers at -inf come last", s.masked_fill(gone, -torch.inf), right),
           ("first: the number of wrong answers before the first right one", s, right))
    y, cams = torch.randperm(56) % 8 - 1, torch.randint(3, (56,))  # 7 labels and outliers
    cams[y == 0], y[(y == 1).nonzero()[1:]] = 0, -1                # one camera; one image
    rest = y, cams, 3, 3, 6
    yield ("common.pk_batches",
           ("labels: k images of a label, one label after the other, no outlier", *rest),
           ("turns: every label once before any repeats", *rest),
           ("cameras: the others come from other cameras than the first", *rest),
           ("repeats: no image twice if there are enough", *rest),
           ("generator: it alone draws; equal seeds give equal batches", *rest),
           ("Problem: fewer than p labels", y, cams, 8, 3, 1))
    f = F.normalize(unit(4, 6)[torch.arange(20 + C) % 4] + .2 * torch.randn(20 + C, 6))
    third = np.array_split(np.sort(common.jaccard_distance(f, 8).data), 3)[1]
    far = float(third[np.diff(third).argmax():][:2].mean())        # in a gap
    yield ("common.jaccard_distance", ("values: 1 - sum of minima / sum of maxima", f, 8),
           ("k2: vectors are averaged over the k2 nearest", f, 8, 1),
           ("zeros: duplicates are stored", torch.cat([f, f[:1]]), 8),
           ("max_distance: pairs farther apart are not stored", f, 8, 6, far))


def grouped(seen):
    """seen (C, V) bool: which camera sees which cluster -> similarities of 12 images to groups,
    their groups, cluster, camera and table of the groups."""
    table, (parent, camera) = torch.full(seen.shape, -1), seen.nonzero().T
    table[seen] = torch.arange(len(parent))
    return .6 * torch.randn(12, len(parent)), (-torch.arange(12)) % len(parent), parent, camera, table


def ccsd_cases(C):
    V, seen = 3 + C % 2, torch.zeros(C + 2, 5, dtype=bool)
    seen[:C, :3], seen[C - 1, 2], seen[C, 0], seen[C + 1, 1:3], seen[C - 2, 3] = 1, 0, 1, 1, 1
    draws = torch.cat([torch.randperm(C * V), torch.randint(C * V, (9,))])
    y, cams = draws // V, draws % V
    yield ("ccsd.split_by_camera",
           ("groups: each image's group has its cluster and camera", y, cams),
           ("outliers: images with label -1 have group -1", y - 1, cams),
           ("table: the group of cluster k and camera v", y, cams),
           ("unseen: -1 where v does not see k", y, torch.where(y < 2, y, cams)))
    s, g, *groups = *_, parent, camera, table = grouped(torch.ones(C, 2, dtype=bool))
    s3, g3, *groups3 = grouped(torch.ones(C, V, dtype=bool))
    s5, g5, *groups5 = grouped(seen)
    alone = torch.where(torch.arange(12) < 4, groups5[1].argmax(), g5)  # camera 3 has one group
    yield ("ccsd.intra_camera_loss",
           ("values: cross-entropy over the camera's groups, mean", s, g, camera, 1),
           ("temperature: similarities are divided by temp", s, g, camera, .3),
           ("alone: a camera's only group gives 0, and counts", s5, alone, groups5[1], 1),
           ("gradient: reaches the similarities", s, g, camera, 1))
    none = s[:, ::2], g // 2, parent[::2]
    yield ("ccsd.cross_camera_loss",
           ("values: a positive against the groups of other clusters, without the image's own", s,
            g, parent, 1),
           ("several: mean over all positives", s3, g3, groups3[0], 1),
           ("temperature: similarities are divided by temp", s, g, parent, .3),
           ("hardest: only the most similar negatives", s, g, parent, 1, 2),
           ("without: images without a positive do not count", s5, g5, groups5[0], 1),
           ("none: 0 and not NaN if nobody has a positive", *none, 1),
           ("gradient: reaches positives and negatives", s, g, parent, 1))
    yield ("ccsd.distillation_loss",
           ("values: KL(teacher || student), two cameras", s, g, *groups, 1),
           ("cameras: mean over the other cameras", s3, g3, *groups3, 1),
           ("temperature: similarities are divided by temp", s, g, *groups, .3),
           ("unseen: only clusters that both see, two or more", s5, g5, *groups5, 1),
           ("none: 0, not NaN, with one camera", *none, 0 * parent[::2], table[:, :1] // 2, 1),
           ("gradient: to the student, none to the teacher", s, g, *groups, 1))


def mskd_cases(C):
    f, t, m, y = unit(3, 8, 5), unit(3, 8, 5), unit(3, C, 5), torch.arange(8) % 3
    yield ("mskd.view_losses", ("values: cross-entropy with the view's own memory", f, m, y, 1),
           ("temperature: similarities are divided by temp", f, m, y, .2),
           ("gradient: reaches the features", f, m, y, 1))
    yield ("mskd.distillation_losses",
           ("values: squared distance, mean over the batch only", f, t),
           ("gradient: reaches the student, and no teacher", f, t))
    x = torch.randn(3, 9 + C, 5)
    yield ("mskd.mixed_distance", ("values: weights 1 - 2 l1, l1, l1", x.abs(), 6, .2),  # all near
           ("missing: what a view does not store is at distance 1 there", x, 6, .2),
           ("global: with l1 = 0 the global view alone counts", x, 6, 0),
           ("zeros: duplicates are stored", torch.cat([x, x[:, :1]], 1).abs(), 6, .2))


def sskd_cases(C):
    z, soft = torch.randn(2, C + 1, C)
    soft, hard = soft.softmax(1), F.one_hot(torch.randint(C, (C + 1,)), C).float()
    yield ("sskd.soft_label_loss",
           ("values: -sum of soft log softmax(z), mean over the batch", z, soft),
           ("hard: zeros in a soft label give no NaN", 9 * z, hard),
           ("large: logits of thousands give no infinity", 999 * z, soft),
           ("gradient: reaches z", z, soft))
    slow, fast = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    yield ("sskd.follow", ("values: alpha E + (1 - alpha) M, in place; M stays", slow, fast, .5),
           ("alpha: it weighs the slow copy", slow, fast, .9),
           ("first: alpha 0 copies M", slow, fast, 0),
           ("gradient: none from the slow copy to the fast one", slow, fast, .5))
    d = torch.rand(21, 21).mul(.9).add(.05).triu(1)
    d, twins = d + d.T, (d + d.T) * (torch.arange(21) > 5)
    missing = d.masked_fill(d + d.T > 1, 1)
    yield ("sskd.adaptive_eps", ("values: mean of the smallest share of all pairs", d, .1),
           ("missing: pairs that are not stored are at distance 1", missing, .9),
           ("duplicates: pairs at distance 0 do not count", torch.minimum(twins, twins.T), .2),
           ("few: at least one pair", d, .001))
    weights, views, rows, means = (torch.randn(2, *n) for n in ((4, 5), (C, 4), (C + 1, 5), (9, 5)))
    i, few = torch.randperm(9)[:C], (weights, views, rows, None)
    yield ("sskd.soft_labels", ("values: each copy's softmax for its own view", *few, i, 1),
           ("temperature: logits are divided by --temp", *few, i, 3),
           ("cameras: the mean leaves the direction, the length stays", *few[:3], means, i, 1),
           ("gradient: none to the slow copies", *few, i, 1))
    y, close = torch.arange(16) // 4, 1 + .12 * torch.randn(16, 6)
    x = unit(4, 6)[y] + .6 * torch.randn(16, 6)
    solved, twins = x.clone(), close.clone()
    solved[:4], twins[1] = .1 * torch.randn(4, 6) - 9 * torch.eye(6)[5], 2 * close[0]
    yield ("sskd.multi_similarity_loss", ("values: where every pair is hard", close, y),
           ("mining: pairs easier than the margin are left out", x, y),
           ("solved: anchors without both kinds give 0, and count", solved, y),
           ("duplicates: a positive at cosine 1 is left out", twins, y),
           ("gradient: reaches the features", x, y))


def cases(names, seed):
    """-> {function: [(words, inputs, what this checkout's function gives)]}."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = {name: rows for page in (common_cases, ccsd_cases, mskd_cases, sskd_cases)
                 for name, *rows in page(4 + seed % 3)}
    return {name: [(words, inputs, checks.observe(name, words, inputs)) for words, *inputs in (
        ("shape: see the docstring", *drawn[name][0][1:]), *drawn[name])] for name in names}


# ----------------------------------------------------------------------------------- handing out

TEST = '''"""A test a point. Its message says what is wrong; checks.py calls your functions."""
import os
import checks
import pytest
import torch

path = os.path.join(os.path.dirname(__file__), "assignment.bin")
POINTS = {f"{name} {row[0].split(':')[0]}": (name, *row)
          for name, rows in torch.load(path, weights_only=True).items() for row in rows}


@pytest.mark.parametrize("point", POINTS)
def test_blank(point):
    name, words, inputs, wanted = POINTS[point]
    wrong = checks.complaint(words, checks.observe(name, words, inputs), wanted)
    if wrong:
        pytest.fail(wrong, pytrace=False)
'''


def chosen(words):
    """Names of pages and functions -> functions, in the order of BLANKS; none: all."""
    if lost := {*words} - {*BLANKS, *PAGES}:
        raise common.Problem(f"--blank {min(lost)}: no such exercise (--list shows all)")
    return [name for name in BLANKS if not words or {name, name.split(".")[0]} & {*words}]


def blanked(source, page, names):
    """-> a page's source without the bodies and decorators, half of some answers, of functions."""
    rows, nodes = source.split("\n"), {getattr(x, "name", 0): x for x in ast.parse(source).body}
    jobs = [(nodes[name.split(".")[1]], name) for name in names if name.startswith(page + ".")]
    for node, name in sorted(jobs, key=lambda job: -job[0].lineno):
        if isinstance(node, ast.ClassDef):
            node = next(x for x in node.body if getattr(x, "name", 0) == "forward")
        first, indent = node.body[0], " " * node.body[0].col_offset
        start = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
        rows[start:node.end_lineno] = [f"{indent}raise NotImplementedError(",
                                       f'{indent}    "{name}: {BLANKS[name][1]}")']
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
    texts = {f"{page}.py": blanked(read(HERE, f"{page}.py"), page, names) for page in PAGES}
    texts.update((name, read(HERE, name)) for name in (
        "requirements.txt", ".gitignore", "tests/toy.py", "tests/checks.py"))
    texts["tests/test_assignment.py"] = TEST
    readme = read(HERE, "tests", "handout.md")
    texts["README.md"] = readme.replace("<!-- blanks -->", "\n".join(rows))
    write(folder, texts)
    torch.save(expected, os.path.join(folder, "tests", "assignment.bin"))


# --------------------------------------------------------------------------------------- grading


def sources(folder):
    """-> {name: text} of the Python files in a folder and its tests/; no links, pipes, giants."""
    found = [*glob.glob("*.py", root_dir=folder), *glob.glob("tests/*.py", root_dir=folder)]
    paths = {name: os.path.join(folder, name) for name in found}
    return {name: read(path) for name, path in paths.items() if os.path.isfile(path)
            and not os.path.islink(path) and os.path.getsize(path) < 2**20}


@contextlib.contextmanager
def copied(pristine, files):
    """In this context a hand-out with the files of a submission is in a temporary folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        place = shutil.copytree(pristine, os.path.join(home, "copy"))
        write(place, {**files, "tests/checks.py": read(HERE, "tests", "checks.py")})
        yield place


def apart(place, words, limit):
    """Run Python there in a process of its own -> what it printed, how it ended."""
    own = {} if os.name == "nt" else dict(start_new_session=True)
    env = dict(os.environ, OMP_NUM_THREADS="1", TMPDIR=place, TEMP=place)
    with tempfile.TemporaryFile() as out:  # a pipe could be held open by a child that survives
        process = subprocess.Popen([sys.executable, *words], cwd=place, env=env, stdout=out,
                                   stdin=subprocess.DEVNULL, stderr=out, **own)
        try:
            end = f"the process ended, exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            end = f"not finished after {limit:g} s"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if own else process.kill()
            process.wait()
        out.seek(0)
        return out.read(2**25).decode("utf-8", "replace").splitlines(), end


def answers(pristine, files, expected, limit):
    """-> {function: what was observed at each of its points}. A process that hangs or ends is
    blamed on the function that it was in, or on all; another one goes on with the rest."""
    todo, seen = dict(expected), {}
    while todo:
        with copied(pristine, files) as place:
            torch.save({name: [(words, inputs) for words, inputs, _ in rows]
                        for name, rows in todo.items()}, os.path.join(place, "inputs.bin"))
            code = "import sys; sys.path.insert(0, 'tests'); import checks; checks.work('inputs.bin')"
            lines, end = apart(place, ["-c", code], limit)
        lost = [*todo]
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                name, *result = json.loads(line)
                lost = [name]
                seen.update({name: result[0]} if result else {})
        seen.update((name, [dict(error=end)] * 99) for name in {*lost} - {*seen})
        todo = {name: rows for name, rows in todo.items() if name not in seen}
    return seen


def score(rows, seen):
    """-> points, complaints. What a function without any sense would get right, a shape, a zero,
    an error, counts only beside something else."""
    wrong = [checks.complaint(words, x, wanted) for (words, _, wanted), x in zip(rows, seen)]
    real = [not words.startswith("shape") and any(wanted.get("values", ()))
            for words, _, wanted in rows]
    points = wrong.count("") if any(r and not w for r, w in zip(real, wrong)) else 0
    return points, [x for x in wrong if x]


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
    """Run a page on the toy set -> mAP in per cent of its network, scored here by our code, or
    why there is none."""
    with copied(pristine, files) as place:
        for name in ("toy", "toy-source"):
            shutil.copytree(os.path.join(root, name), os.path.join(place, "data", name))
        run = [f"{page}.py", *shlex.split(TOY[page]), "--device", "cpu", "--out", "run"]
        lines, end = apart(place, run, limit)
        try:
            model, _ = common.load_encoder(os.path.join(place, "run", "last.pt"))
            _, *test_set = common.load("toy", root)
            images = [common.read_images(part, *model.size) for part in test_set]
            return f"{100 * common.test(model, (*test_set, *images))['mAP']:.1f}"
        except Exception:  # a stranger's file
            return f"{end}: {lines[-1][-99:] if lines else ''}"


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
                scores = {name: score(expected[name], seen[name]) for name in names}
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
    parser = common.Parser(__doc__)
    parser.usage = "%(prog)s (make FOLDER | grade FOLDER ... | --list) [flags]"
    parser.add_argument("words", nargs="*", metavar="make FOLDER, grade FOLDER ...")
    parser.add_argument("--list", action="store_true", help="show functions and points")
    parser.add_argument("--blank", nargs="+", default=[], metavar="PAGE.FUNCTION")
    parser.add_argument("--csv", default="grades.csv", help="the table (%(default)s)")
    parser.add_argument("--seed", type=common.number(int, 1), default=1, help="of grade's inputs")
    parser.add_argument("--limit", type=common.number(float, 1), default=60,
                        help="seconds for a page, ten times as many for a toy run (%(default)s)")
    parser.add_argument("--no-toy", dest="toy", action="store_false", help="no runs on the toy set")
    parser.add_argument("--root", default="data", help="where the toy set is, or is drawn")
    args = parser.parse_args(argv)
    command, *args.folders = args.words or [""]
    if args.list:
        for name, rows in cases(chosen(args.blank), 0).items():
            common.say(f"{name:28} {len(rows)} points  {BLANKS[name][0]}")
    elif command == "make" and len(args.folders) == 1:
        make(args.folders[0], chosen(args.blank))
        common.say("grade with: python tests/handout.py grade FOLDER ..." + "".join(
            f" {word}" for word in args.blank and ["--blank", *args.blank]))
    elif command == "grade" and args.folders:
        grade(args)
    else:
        parser.error("say make FOLDER, grade FOLDER ... or --list")


if __name__ == "__main__":
    common.run(main, "")
