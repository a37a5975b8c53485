"""Run the rows of a table with several seeds, and print mean, standard deviation and every seed.

  python tests/ablate.py sskd-toy               run what results.jsonl lacks, then print
  python tests/ablate.py sskd-toy --print       only print
  python tests/ablate.py verdicts               run nothing; write and print the papers' claims
  python tests/ablate.py ccsd-market --root data --weights FILE      a table on real images

Two runs at a time, with one thread each. Ctrl-C stops at any time, and the same command continues.
A finished run adds a line to tests/results.jsonl. All printed numbers come from that file, and so
do the tables in README.md and RESULTS.md, which are written anew after the runs. Differences are
paired by seed; intervals are Student's t, at 95 %, of one row alone. Verdicts are not drawn from
them but from p values that are corrected for all comparisons of their table (verdicts()).
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
from scipy import stats

HERE = os.path.dirname(os.path.abspath(__file__))
TOP, RESULTS = os.path.dirname(HERE), os.path.join(HERE, "results.jsonl")
sys.path.insert(0, TOP)  # for common.py
import common  # noqa: E402

TEXTS = os.path.join(TOP, "README.md"), os.path.join(HERE, "RESULTS.md")  # with tables
TEN, THREE = range(10), range(3)
ALPHA = .05  # the chance of a wrong verdict anywhere in the table, if no claim were true


class Row(NamedTuple):
    flags: str          # {NAME}: the folder of the run of row NAME with the same seed
    against: str = ""   # the row that this one is compared with
    seeds: range = TEN


class Verdict(NamedTuple):
    claim: str          # in the paper's words
    compared: str       # in ours
    page: str           # of the tables PAGE-toy and PAGE-market
    row: str
    against: str
    epoch: int = None   # scores of this epoch instead of the last
    real: tuple = ()    # on Market-1501 another table, row and against


class Table(NamedTuple):
    page: str
    rows: dict          # name: Row
    flags: str = ""     # added to those of every row
    real: bool = False  # needs --root and --weights


SMALL = ("--data market1501 --arch resnet18-layer3 --size 128 64 --epochs {0} --iters {1} "
         "--batch-size 64 --num-instances 4 --bn-splits 1 --precision bf16 --lr-drop 0 "
         "--eval-every {2}")
CPU, HOUR = SMALL.format(20, 100, 20), SMALL.format(40, 200, 40)
PAIR = ("--source {} --data {} --arch resnet18-layer3 --size 96 48 --source-epochs 10 "
        "--epochs 10 --iters 200{} --bn-splits 1{} --lr-drop 0 --eval-every 10")
FROM_CUHK03 = ("--source cuhk03 --data market1501 --arch resnet18-layer3 --size 128 64 "
               "--precision bf16 --source-epochs 10 --epochs {0} --iters 100 --nets {1} "
               "--bn-splits 1 --lr-drop 0 --eval-every {0}")
FLOAT = FROM_CUHK03.replace(" --precision bf16", "")  # for a CPU without bfloat16
NO_SOURCE = FLOAT.replace("--source-epochs 10", "--source-epochs 1 --source-iters 1")
CCSD = {
    "baseline (ClusterContrast)": Row("--refine none"),
    "+ split": Row("--kd 0 --cross 0", "baseline (ClusterContrast)"),
    "+ split + cross": Row("--kd 0", "+ split"),
    "+ split + cross + distillation": Row("", "+ split + cross"),
    "+ split + distillation, no cross": Row("--cross 0", "+ split")}
MSKD = {
    "teacher": Row("--stage teacher"),
    "student, labels alone": Row("--stage student --teacher {teacher}/teacher --mu 0", "teacher"),
    "student, labels and distillation": Row("--stage student --teacher {teacher}/teacher",
                                            "student, labels alone"),
    "teacher as long as both stages": Row("--stage teacher --epochs 41", "teacher"),
    "the long teacher's student, labels alone": Row(
        "--stage student --teacher {teacher as long as both stages}/teacher --mu 0",
        "teacher as long as both stages"),
    "the long teacher's student, labels and distillation": Row(
        "--stage student --teacher {teacher as long as both stages}/teacher",
        "the long teacher's student, labels alone")}
SOURCES = "--sources {default}/source"
TABLES = {
    "ccsd-toy": Table("ccsd.py", {
        **CCSD,
        "all terms against the baseline": Row("", "baseline (ClusterContrast)"),
        "+ split, reassign": Row("--kd 0 --cross 0 --refine reassign", "+ split", THREE),
        "+ split, recluster": Row("--kd 0 --cross 0 --refine recluster", "+ split", THREE),
        "all terms, reassign": Row("--refine reassign", "+ split + cross + distillation", THREE),
        "all terms, b = 2": Row("--kd 2", "+ split + cross + distillation", THREE),
        "all terms, b = 4": Row("--kd 4", "+ split + cross + distillation", THREE),
        "bound: baseline on the true ids": Row("--refine none --true-ids", seeds=THREE)}),
    "mskd-toy": Table("mskd.py", {
        **MSKD,
        "teacher as long as the long one and its student": Row(
            "--stage teacher --epochs 62", "the long teacher's student, labels and distillation",
            THREE),
        "teacher, global only": Row("--stage teacher --l1 0 --l2 0", "teacher", THREE),
        "teacher with the batch's statistics": Row(
            "--stage student --teacher {teacher}/teacher --teacher-bn batch",
            "student, labels and distillation", THREE),
        "the same, mu = 4": Row(
            "--stage student --teacher {teacher}/teacher --teacher-bn batch --mu 4",
            "teacher with the batch's statistics", THREE)}),
    "sskd-toy": Table("sskd.py", {
        "default": Row(""),
        "identity learning alone": Row(f"{SOURCES} --soft 0 --ms 0 --nuc 0"),
        "identity learning + soft labels": Row(f"{SOURCES} --ms 0 --nuc 0",
                                               "identity learning alone"),
        "default without soft labels": Row(f"{SOURCES} --soft 0", "default"),
        "default without nuclear norm": Row(f"{SOURCES} --nuc 0", "default", THREE),
        "one network": Row(f"{SOURCES} --nets 1", "default", THREE),
        "one network without soft labels": Row(f"{SOURCES} --nets 1 --soft 0", "one network",
                                               THREE),
        "two networks": Row(f"{SOURCES} --nets 2", "default", THREE),
        "one view for all networks": Row(f"{SOURCES} --shared-view", "default"),
        "one view without soft labels": Row(f"{SOURCES} --shared-view --soft 0",
                                            "one view for all networks"),
        "tau of the code": Row("--temp 1", "default", THREE),
        "alpha of the code": Row(f"{SOURCES} --alpha .999", "default", THREE),
        "bound: true ids": Row(f"{SOURCES} --true-ids", "default", THREE)}),
    "ccsd-market": Table("ccsd.py", {
        name: row._replace(seeds=THREE) for name, row in {
            **CCSD,
            "all terms, reassign": Row("--refine reassign", "+ split + cross + distillation"),
            "baseline, cameras centred": Row("--refine none --centre",
                                             "baseline (ClusterContrast)"),
            "no distillation, cameras centred": Row("--kd 0 --centre",
                                                    "baseline, cameras centred"),
            "all terms, cameras centred": Row("--centre", "no distillation, cameras centred"),
        }.items()}, CPU, True),
    "ccsd-hour": Table("ccsd.py", {
        "40 epochs, eps = .5": Row(f"{HOUR} --eps .5 --centre", "ClusterContrast, cameras centred",
                                   THREE),
        "the same in float32, seed 1": Row(
            f"{HOUR.replace(' --precision bf16', '')} --eps .5 --centre", seeds=(1,)),
        "30 epochs, eps = .6": Row(f"{SMALL.format(30, 200, 30)} --centre", seeds=range(1)),
        "ClusterContrast, cameras centred": Row(f"{HOUR} --eps .5 --centre --refine none",
                                                seeds=THREE)},
                       real=True),
    "mskd-hour": Table("mskd.py", {
        "20 epochs a stage": Row(f"{CPU} --eps .5 --centre", seeds=THREE),
        "short teacher, 8 x 100 steps": Row(
            f"{SMALL.format(8, 100, 8)} --eps .5 --centre --stage teacher", seeds=range(1)),
        "short teacher, 5 x 200 steps": Row(
            f"{SMALL.format(5, 200, 5)} --eps .5 --centre --stage teacher",
            "short teacher, 8 x 100 steps", range(1))}, real=True),
    "sskd-hour": Table("sskd.py", {
        "two networks": Row(f"{FROM_CUHK03.format(20, 2)} --eps .5 --centre --alpha .995",
                            seeds=THREE),
        "one network": Row(f"{FROM_CUHK03.format(20, 1)} --eps .5 --centre --alpha .995 "
                           "--sources {two networks}/source", "two networks", THREE),
        "one network, wide radius": Row(
            f"{FROM_CUHK03.format(20, 1)} --eps .6 --centre --alpha .9 "
            "--sources {two networks, half as long}/source", seeds=THREE),
        "two networks, half as long": Row(
            f"{FROM_CUHK03.format(10, 2)} --eps .6 --centre --alpha .9",
            "two networks, half as long, without soft labels", THREE),
        "two networks, half as long, without soft labels": Row(
            f"{FROM_CUHK03.format(10, 2)} --eps .6 --centre --alpha .9 "
            "--sources {two networks, half as long}/source --soft 0", seeds=THREE),
        "short": Row(f"{FROM_CUHK03.format(6, 1)} --rho 4e-4", seeds=range(1)),
        "short, centred": Row(f"{FROM_CUHK03.format(6, 1)} --rho 4e-4 --centre "
                              "--sources {short}/source", "short", range(1)),
        "short, centred, eps": Row(f"{FROM_CUHK03.format(6, 1)} --eps .5 --centre "
                                   "--sources {short}/source", "short, centred", range(1)),
        "short, centred, eps, alpha": Row(
            f"{FROM_CUHK03.format(6, 1)} --eps .5 --centre --alpha .98 --sources {{short}}/source",
            "short, centred, eps", range(1)),
        "short, float32, quick copy": Row(f"{FLOAT.format(6, 1)} --eps .5 --centre --alpha .9",
                                          seeds=THREE),  # seeds 1 and 2: for their sources
        "short, float32, quick copy, no source": Row(
            f"{NO_SOURCE.format(6, 1)} --eps .5 --centre --alpha .9", "short, float32, quick copy",
            range(1)),
        "short, float32, without L_ms and L_nuc": Row(
            f"{FLOAT.format(6, 1)} --eps .5 --centre --alpha .98 "
            "--sources {short, float32, quick copy}/source --ms 0 --nuc 0", seeds=range(1)),
        "one network, float32, quick copy": Row(
            f"{FLOAT.format(20, 1)} --eps .5 --centre --alpha .9 "
            "--sources {short, float32, quick copy}/source", seeds=THREE)},
                       real=True),
    "sskd-soft": Table("sskd.py", {
        "soft labels": Row("", "without soft labels", THREE),
        "without soft labels": Row("--sources {soft labels}/source --soft 0", seeds=THREE)},
                       f"{FROM_CUHK03.format(6, 1)} --eps .5 --centre --alpha .98", True),
    "mskd-market": Table("mskd.py", {name: row._replace(seeds=THREE) for name, row in MSKD.items()},
                         SMALL.format(20, 100, 5), True),
    "sskd-market": Table("sskd.py", {
        "default": Row("", seeds=range(1)),
        "default without soft labels": Row(f"{SOURCES} --soft 0", "default", range(1)),
        "identity learning alone": Row(f"{SOURCES} --soft 0 --ms 0 --nuc 0", seeds=range(1)),
        "identity learning + soft labels": Row(f"{SOURCES} --ms 0 --nuc 0",
                                               "identity learning alone", range(1)),
        "one network": Row(f"{SOURCES} --nets 1", "default", range(1)),
        "one network without soft labels": Row(f"{SOURCES} --nets 1 --soft 0", "one network",
                                               range(1)),
        "one view for all networks": Row(f"{SOURCES} --shared-view", "default", range(1)),
        "one view without soft labels": Row(f"{SOURCES} --shared-view --soft 0",
                                            "one view for all networks", range(1))},
                         PAIR.format("cuhk03", "market1501", " --precision bf16", " --rho 4e-4"),
                         True),
    "sskd-halves": Table("sskd.py", {
        "one network": Row("--nets 1", seeds=range(1)),
        "one network, rho of the real pair": Row(
            "--nets 1 --rho 4e-4 --sources {one network}/source", "one network", range(1)),
        "one network, cameras centred": Row("--nets 1 --centre --sources {one network}/source",
                                            "one network", range(1))},
                         PAIR.format("market1501:source", "market1501:target", "", ""), True)}
VERDICTS = [
    Verdict("CCSD: clusters split by camera", "split with L_intra (`--kd 0 --cross 0`) against "
            "ClusterContrast (`--refine none`)", "ccsd", "+ split", "baseline (ClusterContrast)"),
    Verdict("CCSD as a whole", "all terms against ClusterContrast", "ccsd",
            "+ split + cross + distillation", "baseline (ClusterContrast)"),
    Verdict("CCSD: intra-camera similarity teaches cross-camera similarity",
            "distillation on and off (`--kd 0`)", "ccsd", "+ split + cross + distillation",
            "+ split + cross"),
    Verdict("the same, as the only bridge between cameras", "on and off, both with `--cross 0`",
            "ccsd", "+ split + distillation, no cross", "+ split"),
    Verdict("MSKD: a student that meets less label noise", "student against its teacher", "mskd",
            "student, labels and distillation", "teacher"),
    Verdict("the same, at nearly equal steps", "student against a teacher trained as long as both "
            "stages", "mskd", "student, labels and distillation", "teacher as long as both stages"),
    Verdict("MSKD: the teacher guides the student, which converges fast", "distillation on and off "
            "(`--mu 0`), after 5 of 20 epochs", "mskd", "student, labels and distillation",
            "student, labels alone", epoch=5),
    Verdict("the same, at the end", "on and off, after all epochs", "mskd",
            "student, labels and distillation", "student, labels alone"),
    Verdict("the same, from a teacher trained twice as long", "on and off, after all epochs; the "
            "teacher's 41 epochs were chosen on toy seeds 0 to 2, which are left out", "mskd",
            "the long teacher's student, labels and distillation",
            "the long teacher's student, labels alone"),
    Verdict("SSKD: soft labels beside hard ones", "soft labels on and off (`--soft 0`); on "
            "Market-1501 two networks, 1,000 steps and a radius that was chosen on seed 0, which "
            "is left out", "sskd", "default", "default without soft labels", real=(
                "sskd-hour", "two networks, half as long",
                "two networks, half as long, without soft labels")),
    Verdict("the same, without the code's two other terms", "on and off, both with "
            "`--ms 0 --nuc 0`", "sskd", "identity learning + soft labels",
            "identity learning alone"),
    Verdict("the same, network and peer see one view", "on and off, both with `--shared-view`, a "
            "setting chosen on toy seeds 0 to 2, which are left out", "sskd",
            "one view for all networks", "one view without soft labels")]
CHOSEN_ON = {  # rows of verdicts: seeds that confirm nothing
    ("mskd-toy", "the long teacher's student, labels and distillation"): THREE,
    ("sskd-toy", "one view for all networks"): THREE,
    ("sskd-hour", "two networks, half as long"): range(1)}


# ========================================================================================== running


def folder(name, row, seed):
    """-> the folder of a run, relative to TOP."""
    row = re.sub("[^a-z0-9]+", "-", row.lower()).strip("-")
    return os.path.join("runs", name, f"{row}-s{seed}")


def command(name, row, seed):
    """-> the command to run and the key of its result, as lists of words."""
    table = TABLES[name]
    flags = f"{table.flags} {table.rows[row].flags} --seed {seed}"
    words = flags.format_map({other: folder(name, other, seed) for other in table.rows}).split()
    return [table.page, *words, "--out", folder(name, row, seed)], f"{table.page} {flags}".split()


def bf16_left_out(words):
    """Would the page not run in bfloat16 here, although its command names it?"""
    return "bf16" in words and common.precision(common.pick_device("auto"), "bf16") != "bf16"


def read_results():
    """-> {key of a command, as a tuple: result of its run}."""
    if not os.path.exists(RESULTS):
        return {}
    with open(RESULTS, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return {tuple(line["command"].split()): line for line in lines}


def commit_of(head):
    """A log's first line -> the commit of its run; "-dirty", as results.jsonl makes every commit,
    is left out if page and common.py were those of the commit."""
    commit = head["commit"].removesuffix("-dirty")
    for file, mark in head["args"]["code"].items():
        show = subprocess.run(["git", "-C", TOP, "show", f"{commit}:{file}"], capture_output=True)
        if hashlib.sha256(show.stdout).hexdigest()[:len(mark)] != mark:
            return head["commit"]
    return commit


def harvest(name, row, seed):
    """-> the result of a finished run, a line for results.jsonl, or None."""
    words, key = command(name, row, seed)
    out = os.path.join(TOP, folder(name, row, seed))
    out = os.path.join(out, "teacher") if "--stage teacher" in " ".join(words) else out
    try:
        with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
            head, *lines = [json.loads(line) for line in file]
    except OSError:
        return None
    last = lines[-1] if lines else {}
    if last.get("epoch") != head["args"]["epochs"]:
        return None
    scored = {f"{line['epoch']} {line['title']}": line["scores"]["mAP"] for line in lines
              if "scores" in line}
    return dict(command=" ".join(key), commit=commit_of(head), torch=head["torch"],
                threads=head["threads"], seconds=last["seconds"], scores=last["scores"],
                quality=last.get("quality"), losses=last["losses"], mAP=scored)


def run_table(name, more):
    """Run what has no result yet, two seeds at a time; `more`: flags left out of the key."""
    lock, rows = threading.Lock(), TABLES[name].rows
    queue = sorted({(-len(row.seeds), seed) for row in rows.values() for seed in row.seeds})
    stop, running = threading.Event(), set()

    def work():
        while not stop.is_set():
            with lock:
                if not queue:
                    return
                size, seed = queue.pop(0)  # rows with the most seeds first
            for row, about in rows.items():
                if len(about.seeds) == -size and seed in about.seeds and not stop.is_set():
                    run_row(row, seed)

    def run_row(row, seed):
        words, key = command(name, row, seed)
        with lock:
            if tuple(key) in read_results():
                needed = any(f"{{{row}}}" in other.flags and seed in other.seeds
                             and tuple(command(name, title, seed)[1]) not in read_results()
                             for title, other in rows.items())
                if not needed or harvest(name, row, seed):
                    return
        if bf16_left_out(words):
            print(f"{row}, seed {seed}: not run, because there is no bfloat16 on this machine")
            return
        out = os.path.join(TOP, folder(name, row, seed))
        os.makedirs(out, exist_ok=True)
        print(f"{row}, seed {seed}: python {shlex.join(words)}", flush=True)
        with open(f"{out}.txt", "a", encoding="utf-8") as text:
            process = subprocess.Popen(
                [sys.executable, *words, *more, "--resume"], cwd=TOP, stdout=text, stderr=text,
                env=dict(os.environ, OMP_NUM_THREADS="1"))
            running.add(process)
            code = process.wait()
            running.discard(process)
        result = harvest(name, row, seed)
        if code or not result:
            print(f"{row}, seed {seed}: exit code {code}, see {out}.txt", flush=True)
            return
        with lock:
            if tuple(key) not in read_results():
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
        print(f"{row}, seed {seed}: {100 * result['scores']['mAP']:.1f} mAP, "
              f"{result['seconds'] / 60:.1f} minutes", flush=True)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        stop.set()
        for process in list(running):
            process.terminate()
        for worker in workers:
            worker.join()
        print("stopped; the same command continues")


# ========================================================================================= printing


def results_of(name, row, results):
    """-> {seed: result} of the finished runs of a row."""
    found = {seed: results.get(tuple(command(name, row, seed)[1]))
             for seed in TABLES[name].rows[row].seeds}
    return {seed: result for seed, result in found.items() if result}


def spread(values):
    """-> mean ± standard deviation, in per cent."""
    values = 100 * np.array(values)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def on_the_way(result):
    """-> {epoch or "first round": mAP} of a result's evaluations between warm-up and last epoch."""
    return {"first round" if "round" in title else int(title.split()[0]): score
            for title, score in list(result.get("mAP", {}).items())[:-1]
            if title not in ("0 start", "0 warmed up")}


def difference(mine, other, epoch=None, alpha=.05):
    """Two {seed: result} -> differences in mAP by seed, in points, and Student's t interval; after
    `epoch` if given, else after the last."""
    mine, other = ({seed: on_the_way(result).get(epoch) if epoch else result["scores"]["mAP"]
                    for seed, result in results.items()} for results in (mine, other))
    by_seed = np.array([100 * (mine[seed] - other[seed]) for seed in sorted(mine)
                        if None not in (mine[seed], other.get(seed))])
    if len(by_seed) < 2:
        return by_seed, (-np.inf, np.inf)
    half = stats.t.ppf(1 - alpha / 2, len(by_seed) - 1) * stats.sem(by_seed)
    return by_seed, (by_seed.mean() - half, by_seed.mean() + half)


def describe(by_seed, interval):
    """-> a difference as text."""
    if not len(by_seed):
        return "not run"
    text = f"{by_seed.mean():+.1f}"
    if len(by_seed) > 1:
        text += f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{text}, {(by_seed > 0).sum()} of {len(by_seed)} seeds gain"


def table_of(name):
    """-> a table as Markdown."""
    table, results = TABLES[name], read_results()
    runs = {row: results_of(name, row, results) for row in table.rows}
    every = {run["command"]: run for row in runs.values() for run in row.values()}.values()
    soft = any("soft_own" in result["losses"] for result in every)
    way = any(on_the_way(result) for result in every)
    text = [f"`python {' '.join([table.page, *table.flags.split()])} --seed S` and the flags of "
            f"the row{', `--root` and `--weights`' * table.real}; {{row}} is the folder of that "
            "row's run with the same seed.\n",
            "| row | flags | mAP | mAP by seed | R1 | ARI of the labels | "
            + "clusters in a soft label, weight on its own | " * soft
            + "mAP after earlier epochs | " * way + "difference in mAP |",
            "|" + "---|" * (7 + soft + way)]
    for row, about in table.rows.items():
        found = runs[row]
        cells = [row, f"`{about.flags}`" if about.flags else ""]
        if found:
            cells += [spread([x["scores"]["mAP"] for x in found.values()]),
                      " / ".join(f"{100 * found[seed]['scores']['mAP']:.1f}" if seed in found
                                 else "-" for seed in about.seeds if seed <= max(found)),
                      spread([x["scores"]["rank1"] for x in found.values()]),
                      f"{np.mean([x['quality']['ARI'] for x in found.values()]):.2f}"]
            if soft:
                cells.append(", ".join(
                    f"{np.mean([x['losses'][key] for x in found.values()]):.2f}"
                    for key in ("soft_clusters", "soft_own")))
            if way:
                curves = [on_the_way(x) for x in found.values()]
                cells.append(", ".join(
                    f"{epoch}: {100 * np.mean([curve[epoch] for curve in curves]):.1f}"
                    for epoch in curves[0]))
        else:
            cells += ["not run"] + [""] * (3 + soft + way)
        if about.against:
            gain = difference(found, runs[about.against])
            cells.append(f"to \"{about.against}\": {describe(*gain)}" if len(gain[0]) else "")
        else:
            cells.append("")
        text.append("| " + " | ".join(cells) + " |")
    if every:
        minutes = np.array([x["seconds"] / 60 for x in every])
        span = " to ".join(f"{x:.1f}" for x in sorted({minutes.min(), minutes.max()}))
        several, threads = len(every) > 1, sorted({x["threads"] for x in every})
        text.append(f"\n{len(every)} run{'s' * several}, {span} minutes{' each' * several}, "
                    f"{' or '.join(map(str, threads))} thread{'s' * (threads != [1])}, torch "
                    f"{'/'.join(sorted({x['torch'] for x in every}))}, commit "
                    f"{', '.join(sorted({x['commit'] for x in every}))}.")
    return "\n".join(text)


def p_value(by_seed):
    """Differences by seed, at least two -> p of Student's paired t-test, two-sided."""
    spread = max(stats.sem(by_seed), 1e-9)  # 0 if all are equal
    return 2 * stats.t.sf(abs(by_seed.mean()) / spread, len(by_seed) - 1)


def holm(p):
    """Holm's correction (Scand. J. Statist. 1979): p values of a family -> those to compare with
    ALPHA. The smallest counts times their number, the next times one less, and so on; none may be
    smaller than one before it."""
    p = np.array(p, float)
    order = p.argsort()
    rising = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = rising.clip(max=1)
    return corrected


def verdict_of(toy, market):
    """(mean difference, corrected p) on two data sets -> in words."""
    places = ("the toy set", toy), ("Market-1501", market)
    up = [place for place, (mean, p) in places if p < ALPHA and mean > 0]
    down = [place for place, (mean, p) in places if p < ALPHA and mean < 0]
    if bool(up) == bool(down):
        return "not shown"
    word, where = ("shown", up) if up else ("refuted", down)
    return word if len(where) == 2 else f"{word} on {where[0]}"


def verdicts():
    """-> the table of verdicts as Markdown. One rule for every row: all seeds that were run and did
    not choose a setting of the row; the family of Holm's correction is every cell, of either data
    set, with at least two of them."""
    results, gains = read_results(), {}  # gains: (row of VERDICTS, data set) -> difference()
    for i, (_, _, page, row, against, epoch, real) in enumerate(VERDICTS):
        for data in ("toy", "market"):
            table, *rows = f"{page}-{data}", row, against
            if real and data == "market":
                table, *rows = real
            mine, other = (results_of(table, which, results) for which in rows)
            for seed in CHOSEN_ON.get((table, rows[0]), ()):
                mine.pop(seed, None)
            gains[i, data] = difference(mine, other, epoch)
    family = [cell for cell, (by_seed, _) in gains.items() if len(by_seed) > 1]
    corrected = dict(zip(family, holm([p_value(gains[cell][0]) for cell in family])))
    text = ["| claim of the paper | compared | toy set: difference in mAP "
            "| Market-1501 | verdict |", "|---|---|---|---|---|"]
    for i, (claim, compared, *_) in enumerate(VERDICTS):
        cells, found = [], []
        for data in ("toy", "market"):
            by_seed, p = gains[i, data][0], corrected.get((i, data), 1)
            note = f", p {p:.3f}".replace("p 0.000", "p < .001").replace("p 0.", "p .")
            cells.append(describe(*gains[i, data]) + note * ((i, data) in corrected))
            found.append((by_seed.mean() if len(by_seed) else 0, p))
        text.append(f"| {claim} | {compared} | {' | '.join(cells)} | {verdict_of(*found)} |")
    return "\n".join([*text, "", f"p: Holm's correction over the {len(family)} comparisons above "
                      "that have at least two seeds."])


def printed(name):
    return verdicts() if name == "verdicts" else table_of(name)


def with_tables(text):
    """-> the text with what stands between <!-- TABLE --> and <!-- end --> printed anew."""
    return re.sub(r"(<!-- ([a-z-]+) -->\n).*?(<!-- end -->)",
                  lambda found: f"{found[1]}{printed(found[2])}\n{found[3]}", text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "verdicts"))
    parser.add_argument("--print", action="store_true", help="only print, run nothing")
    parser.add_argument("--root", help="where data sets are")
    parser.add_argument("--weights", help="file of the initial weights")
    args = parser.parse_args()
    if not args.print:
        more = [word for flag in ("root", "weights") if getattr(args, flag)
                for word in (f"--{flag}", getattr(args, flag))]
        if args.table != "verdicts":
            run_table(args.table, more)
        for path in TEXTS:
            with open(path, encoding="utf-8") as file:
                text = with_tables(file.read())
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    print(printed(args.table))


if __name__ == "__main__":
    main()
