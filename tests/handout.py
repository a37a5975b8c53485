"""Hand out an assignment, a copy of the project with blanks; grade what comes back.

  python tests/handout.py --list                       functions, points, what each needs to know
  python tests/handout.py make FOLDER                  the students' copy, with every blank
  python tests/handout.py make FOLDER --blank ccsd common.GeM      those of a page, and one more
  python tests/handout.py grade FOLDER ... [--blank ...]           scores them into grades.csv
  python tests/handout.py grade . FOLDER ...           this checkout, too: what right answers get

A copy's tests hold arrays that were computed when it was made; grades come from other inputs. A
submission runs in processes of its own, in a temporary copy, with a time limit, and is told only
the inputs. A crash, a hang, a print or a deleted file costs its author points, nobody else any.
Grade with the checkout that made the hand-out: what differs from it counts as changed.

`grade` RUNS FOREIGN CODE WITH YOUR RIGHTS. All this helps against accidents, not against malice: a
submission can read (this checkout's answers, too) and delete what you can, use the network, fill
memory and disk, leave processes behind. Fence it: a container without network that holds only
copies of this checkout and the submissions, or a user who owns nothing else.
"""

import ast
import contextlib
import csv
import glob
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
    "common.jaccard_distance": ("neighbours, sparse matrices", "compare neighbour_vectors()"),
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
HELPERS = {"ccsd.distillation_loss": ["teacher_and_student"]}  # part of an answer
PAGES = [*dict.fromkeys(name.split(".")[0] for name in BLANKS)]

# ------------ cases: (function, (words of a point, *inputs), ...), see checks.py; words alone have
# the inputs of the first; so has one more point, of the shape


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
    yield ("common.update_memory", "gradient: none reaches the features",
           ("values: unit(mu m + (1 - mu) f), in place", memory, f[0, :3], y, .5, 1),
           ("momentum: mu weighs the memory, not the image", memory, f[0, :3], y, .1, 1),
           ("order: images change a row one after the other", memory, f[0, :9],
            y.repeat_interleave(3), .5, 3))
    s, order = torch.randn(6, 12 + C), torch.rand(6, 12 + C).argsort(1)
    right, gone = order <= torch.arange(6)[:, None] % 4, (order > 3) & (order < 9)
    yield ("common.average_precision", "first: how many wrong answers precede the first right one",
           ("AP: mean of the precision at the right answers' ranks", s, right),
           ("ties: of equal answers, the wrong ones come first", s.round(), right),
           ("ignored: answers at -inf come last", s.masked_fill(gone, -torch.inf), right))
    y, cams = torch.randperm(56) % 8 - 1, torch.randint(3, (56,))  # 7 labels and outliers
    cams[y == 0], y[(y == 1).nonzero()[1:]], y[0] = 0, -1, 2       # one camera; one image
    yield ("common.pk_batches", "turns: every label once before any repeats",
           ("labels: p of them, k images of each in a row, no outlier", y, cams, 3, 3, 2 * C),
           "cameras: the others come from other cameras than the first",
           "repeats: no image twice if there are enough", "generator: it alone draws, repeatably",
           ("Problem: fewer than p labels", y, cams, 8, 3, 1))
    f = F.normalize(unit(4, 6)[torch.arange(20 + C) % 4] + .2 * torch.randn(20 + C, 6))
    yield ("common.jaccard_distance", ("values: 1 - sum of minima / sum of maxima", f, 8),
           ("k2: vectors are averaged over the k2 nearest", f, 8, 1),
           ("zeros: duplicates are stored", torch.cat([f, f[:1]]), 8),
           ("max_distance: pairs farther apart are not stored", f, 8, 6, .5))


def grouped(seen):
    """seen (C, V) bool: which camera sees which cluster -> similarities of 12 images to groups,
    their groups, cluster, camera and table of the groups."""
    table, (parent, camera) = torch.full(seen.shape, -1), seen.nonzero().T
    table[seen] = torch.arange(len(parent))
    return .6 * torch.randn(12, len(parent)), -torch.arange(12) % len(parent), parent, camera, table


def ccsd_cases(C):
    V, seen = 3 + C % 2, torch.zeros(C + 2, 5, dtype=bool)
    seen[:C, :3], seen[C - 1, 2], seen[C, 0], seen[C + 1, 1:3], seen[C - 2, 3] = 1, 0, 1, 1, 1
    draws = torch.cat([torch.randperm(C * V), torch.randint(C * V, (9,))])
    y, cams = draws // V, draws % V
    yield ("ccsd.split_by_camera", "table: the group of cluster k and camera v",
           ("groups: each image's group has its cluster and camera", y, cams),
           ("outliers: images with label -1 have group -1", y - 1, cams),
           ("unseen: -1 where v does not see k", y, torch.where(y < 2, y, cams)))
    s, g, parent, camera, table = grouped(torch.ones(C, 2, dtype=bool))
    s3, g3, *groups3 = grouped(torch.ones(C, V, dtype=bool))
    s5, g5, *groups5 = grouped(seen)
    alone = torch.where(torch.arange(12) < 4, groups5[1].argmax(), g5)  # camera 3 has one group
    none, temp = (s[:, ::2], g // 2, parent[::2]), "temperature: similarities are divided by temp"
    yield ("ccsd.intra_camera_loss", "gradient: reaches the similarities",
           ("values: cross-entropy over the camera's groups, mean", s, g, camera, 1),
           (temp, s, g, camera, .3),
           ("alone: a camera's only group gives 0, and counts", s5, alone, groups5[1], 1))
    yield ("ccsd.cross_camera_loss", "gradient: reaches positives and negatives",
           ("values: one positive; the image's own group is no negative", s, g, parent, 1),
           ("several: mean over all positives", s3, g3, groups3[0], 1), (temp, s, g, parent, .3),
           ("hardest: only the most similar negatives", s, g, parent, 1, 2),
           ("without: images without a positive do not count", s5, g5, groups5[0], 1),
           ("none: 0 and not NaN if nobody has a positive", *none, 1))
    yield ("ccsd.distillation_loss", "gradient: to the student, none to the teacher",
           ("values: KL(teacher || student), two cameras", s, g, parent, camera, table, 1),
           ("cameras: mean over the other cameras", s3, g3, *groups3, 1),
           (temp, s, g, parent, camera, table, .3),
           ("unseen: only clusters that both see, two or more", s5, g5, *groups5, 1),
           ("none: 0, not NaN, with one camera", *none, 0 * parent[::2], table[:, :1] // 2, 1))


def mskd_cases(C):
    f, t, m, y = unit(3, 8, 5), unit(3, 8, 5), unit(3, C, 5), torch.arange(8) % 3
    yield ("mskd.view_losses", ("values: cross-entropy with the view's own memory", f, m, y, 1),
           ("temperature: similarities are divided by temp", f, m, y, .2),
           "gradient: reaches the features")
    yield ("mskd.distillation_losses", "gradient: reaches the student, and no teacher",
           ("values: squared distance, mean over the batch only", f, t))
    x = torch.randn(3, 9 + C, 5)
    yield ("mskd.mixed_distance", ("values: weights 1 - 2 l1, l1, l1", x.abs(), 6, .2),  # all near
           ("missing: what a view does not store is at distance 1 there", x, 6, .2),
           ("global: with l1 = 0 the global view alone counts", x, 6, 0),
           ("zeros: duplicates are stored", torch.cat([x, x[:, :1]], 1).abs(), 6, .2))


def sskd_cases(C):
    z, soft = torch.randn(2, C + 1, C)
    soft, hard = soft.softmax(1), F.one_hot(torch.randint(C, (C + 1,)), C).float()
    yield ("sskd.soft_label_loss", "gradient: reaches z",
           ("values: -sum of soft log softmax(z), mean over the batch", z, soft),
           ("hard: zeros in a soft label give no NaN", 9 * z, hard),
           ("large: logits of thousands give no infinity", 999 * z, soft))
    slow, fast = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    yield ("sskd.follow", "gradient: none from the slow copy to the fast one",
           ("values: alpha E + (1 - alpha) M, in place", slow, fast, .5),
           ("alpha: it weighs the slow copy", slow, fast, .9), ("first: 0 copies M", slow, fast, 0))
    d = torch.rand(21, 21).mul(.9).add(.05).triu(1)
    d, twins = d + d.T, (d + d.T) * (torch.arange(21) > 5)
    yield ("sskd.adaptive_eps", ("values: mean of the smallest share of all pairs", d, .1),
           ("missing: pairs that are not stored are at distance 1", d + (d > .5), .9),
           ("duplicates: pairs at distance 0 do not count", torch.minimum(twins, twins.T), .2),
           ("few: at least one pair", d, .001))
    weights, views, rows, means = (torch.randn(2, *n) for n in ((4, 5), (C, 4), (C + 1, 5), (9, 5)))
    i, few = torch.randperm(9)[:C], (weights, views, rows)
    yield ("sskd.soft_labels", "gradient: none to the slow copies",
           ("values: each copy's softmax for its own view", *few, None, i, 1),
           ("temperature: logits are divided by --temp", *few, None, i, 3),
           ("cameras: the mean leaves the direction, the length stays", *few, means, i, 1))
    y, close = torch.arange(4 * C) // 4, 1 + .12 * torch.randn(4 * C, 6)
    x = unit(C, 6)[y] + .6 * torch.randn(4 * C, 6)
    solved, twins = x.clone(), close.clone()
    solved[:4], twins[1] = .1 * torch.randn(4, 6) - 9 * torch.eye(6)[5], 2 * close[0]
    yield ("sskd.multi_similarity_loss", ("values: where every pair is hard", close, y),
           ("mining: pairs easier than the margin are left out", x, y),
           ("solved: anchors without both kinds give 0, and count", solved, y),
           ("duplicates: a positive at cosine 1 is left out", twins, y),
           ("gradient: reaches the features", x, y))


def cases(names, seed):
    """-> {function: [(words, inputs, what this checkout's function gives)]}."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for page in (common_cases, ccsd_cases, mskd_cases, sskd_cases):
            for name, *rows in page(4 + seed % 3):
                first = next(x[1:] for x in rows if isinstance(x, tuple))
                found[name] = [(x, first) if isinstance(x, str) else (x[0], x[1:])
                               for x in ("shape: see the docstring", *rows)]
    return {name: [(words, inputs, checks.observe(name, words, inputs))
                   for words, inputs in found[name]] for name in names}


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
    *point, wanted = POINTS[point]
    wrong = checks.complaint(*point, checks.observe(*point), wanted)
    if wrong:
        pytest.fail(wrong, pytrace=False)
'''


def chosen(words):
    """Names of pages and functions -> functions, in the order of BLANKS; none: all."""
    if lost := {*words} - {*BLANKS, *PAGES}:
        raise common.Problem(f"--blank {min(lost)}: no such exercise (--list shows all)")
    return [name for name in BLANKS if not words or {name, name.split(".")[0]} & {*words}]


def blanked(source, page, names):
    """-> a page's source without the bodies of functions, of helpers that are half of the answer,
    and without decorators, which may be, too. In it, a blank ends a run with one line."""
    rows, nodes = source.split("\n"), {getattr(x, "name", 0): x for x in ast.parse(source).body}
    jobs = [(nodes[function], name) for name in names if name.startswith(page + ".")
            for function in (name.split(".")[1], *HELPERS.get(name, ()))]
    for node, name in sorted(jobs, key=lambda job: -job[0].lineno):
        if isinstance(node, ast.ClassDef):
            node = next(x for x in node.body if getattr(x, "name", 0) == "forward")
        first, indent = node.body[0], " " * node.body[0].col_offset
        start = first.lineno - 1 if ast.get_docstring(node) is None else first.end_lineno
        rows[start:node.end_lineno] = [f"{indent}raise NotImplementedError(",
                                       f'{indent}    "{name}: {BLANKS[name][1]}")']
        for decorator in node.decorator_list:
            del rows[decorator.lineno - 1:decorator.end_lineno]
    return "\n".join(rows).replace("except Problem as", "except (Problem, NotImplementedError) as")


def read(*path):
    with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
        return file.read()


def write(folder, texts):
    os.makedirs(os.path.join(folder, "tests"), exist_ok=True)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def python_files(names):
    """-> {name: text} of a hand-out's Python files."""
    texts = {f"tests/{name}.py": read(HERE, "tests", f"{name}.py") for name in ("toy", "checks")}
    texts.update((f"{page}.py", blanked(read(HERE, f"{page}.py"), page, names)) for page in PAGES)
    return {**texts, "tests/test_assignment.py": TEST}


def make(folder, names):
    """Write the students' copy into a new folder."""
    if os.path.exists(folder):
        raise common.Problem(f"{folder} is there already (name a new folder)")
    expected = cases(names, seed=0)
    table = "\n".join(f"| `{name}` | {' | '.join(BLANKS[name])} | {len(expected[name])} |"
                      for name in names)
    about = read(HERE, "tests", "handout.md").replace("<!-- blanks -->", table)
    write(folder, {**python_files(names), "README.md": about, **{
        name: read(HERE, name) for name in ("requirements.txt", ".gitignore", "LICENSE")}})
    torch.save(expected, os.path.join(folder, "tests", "assignment.bin"))


def sources(folder):
    """-> {name: text} of the Python files in a folder and its tests/; no links, pipes, giants."""
    found = [*Path(folder).glob("*.py"), *Path(folder).glob("tests/*.py")]
    return {path.relative_to(folder).as_posix(): read(path) for path in found if path.is_file()
            and not path.is_symlink() and path.stat().st_size < 2**20}


def apart(place, words, limit):
    """Run Python there in a process of its own -> the lines of its stderr, how it ended. What it
    prints goes nowhere."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUTF8="1", TMPDIR=place, TEMP=place)
    with tempfile.TemporaryFile() as err:  # a pipe could be held open by a child that survives
        process = subprocess.Popen(
            [sys.executable, *words], cwd=place, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
        try:
            end = f"the process ended, exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            end = f"not finished after {limit:g} s"
        finally:  # after Ctrl-C, too; with what it started, except on Windows
            with contextlib.suppress(OSError):
                getattr(os, "killpg", os.kill)(process.pid, 9)
            process.wait()
        err.seek(0)
        return err.read(2**25).decode("utf-8", "replace").splitlines(), end


def answers(files, todo, limit):
    """todo: {function: its points} -> {function: what was observed at each}. A process that hangs
    or ends is blamed on the function that it was in, or on all; another one does the rest."""
    seen, code = {}, "import sys; sys.path.insert(0, 'tests'); import checks; checks.work()"
    while rest := {name: rows for name, rows in todo.items() if name not in seen}:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            write(place, files)
            torch.save({name: [row[:2] for row in rows] for name, rows in rest.items()},
                       os.path.join(place, "inputs.bin"))
            lines, end = apart(place, ["-c", code], limit)
        found = {}
        for line in lines:
            with contextlib.suppress(Exception):  # whatever a stranger's process wrote
                name, result = json.loads(line)
                found[name] = result and [*result]
        found = {name: found[name] for name in rest if name in found} or dict.fromkeys(rest)
        seen.update((name, x or [dict(error=end)] * len(rest[name])) for name, x in found.items())
    return seen


def score(name, rows, seen):
    """-> points, what is wrong. What a function without any sense would get right, a shape, a zero,
    an error, counts only beside something else."""
    wrong = [checks.complaint(name, words, inputs, x, wanted)
             for (words, inputs, wanted), x in zip(rows, seen)]
    sense = [not x and np.any(wanted.get("arrays", [0])[0]) and not words.startswith("shape")
             for (words, _, wanted), x in zip(rows, wrong)]
    return any(sense) * wrong.count(""), [x for x in wrong if x]


def changes(given, files, names):
    """-> the Python files that differ from the hand-out apart from the blanks."""
    changed = []
    for name in sorted({*given, *files}):
        text = files.get(name)
        with contextlib.suppress(Exception):  # missing, no Python, or without a blank
            text = blanked(text, name.removesuffix(".py"), names)
        if text != given.get(name):
            changed.append(name)
    return changed


def toy_score(files, page, test_set, limit):
    """Train a page on the toy set -> mAP in per cent of its network, scored here by our code, or
    why there is none."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        write(place, files)
        run = [f"{page}.py", *TOY[page].split(), "--device", "cpu", "--out", "run",
               "--root", os.path.abspath("data")]
        lines, end = apart(place, run, limit)
        try:
            model, _ = common.load_encoder(os.path.join(place, "run"))
            return f"{100 * common.test(model, test_set)['mAP']:.1f}"
        except Exception:  # a stranger's file
            return f"{end}: {''.join(filter(str.isprintable, ''.join(lines[-1:])))[-99:]}"


def grade(folders, names, toy, limit):
    """Score folders and write the table, anew after each of them."""
    folders = [x for word in folders for x in sorted(glob.glob(word)) or [word]]
    if lost := [folder for folder in folders if not os.path.isdir(folder)]:
        raise common.Problem(f"{lost[0]}: no such folder (name the folders that were handed in)")
    handed_in = {folder: sources(folder) for folder in folders}  # before any of them runs
    given, expected, table = python_files(names), cases(names, seed=1), []
    pages = [page for page in TOY if toy and any(x.startswith(page) for x in names)]
    if pages:
        common.load("toy-source")  # draws it
        _, *test_set = common.load("toy")
    for folder, files in handed_in.items():
        row, wrong = dict(folder=folder, points=0), []
        files = {**given, **files, "tests/checks.py": given["tests/checks.py"]}
        seen = answers(files, expected, limit)
        for name in names:
            row[name], lost = score(name, expected[name], seen[name])
            row["points"] += row[name]
            reasons = {x.partition(": ")[2] for x in lost}
            lost = reasons if len(reasons) == 1 else lost  # the same at every point
            wrong += [f"{name}: {'; '.join(lost)}"] * bool(lost)
        for page in pages:
            row[f"toy mAP {page}"] = toy_score(files, page, test_set, 10 * limit)
        row["wrong"] = " | ".join(wrong)
        row["changed files"] = " ".join(changes(given, handed_in[folder], names))
        table.append(row)
        with open("grades.csv", "w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(table)
        common.say(f"{row['points']:4} of {sum(map(len, expected.values()))}  {folder}")


def main(argv=None):
    parser = common.Parser(__doc__)
    parser.usage = "%(prog)s (make FOLDER | grade FOLDER ... | --list) [flags]"
    add = parser.add_argument
    add("words", nargs="*", metavar="make FOLDER, grade FOLDER ...")
    add("--list", action="store_true", help="show functions and points")
    add("--blank", nargs="+", default=[], metavar="PAGE.FUNCTION",
        help="only these, or all of a PAGE")
    add("--no-toy", dest="toy", action="store_false", help="grade without runs on the toy set")
    add("--limit", type=common.number(float, 10), default=60,
        help="seconds until a process is ended, the import of PyTorch included; ten times as many "
        "for a toy run (%(default)s)")
    args = parser.parse_intermixed_args(argv)
    names, (command, *folders) = chosen(args.blank), args.words or [""]
    if args.list:
        for name, rows in cases(names, 0).items():
            common.say(f"{name:28} {len(rows)} points  {BLANKS[name][0]}")
    elif command == "make" and len(folders) == 1:
        make(folders[0], names)
        blank = "".join(f" {x}" for x in ["--blank", *args.blank] if args.blank)
        common.say(f"later, with this checkout: python tests/handout.py grade FOLDER ...{blank}")
    elif command == "grade" and folders:
        grade(folders, names, args.toy, args.limit)
    else:
        parser.error("say make FOLDER, grade FOLDER ... or --list")


if __name__ == "__main__":
    common.run(main, "")
