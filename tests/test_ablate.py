"""The program that fills the tables of results: its commands, its statistics, its file."""

import hashlib
import itertools
import json
import os
import re
import subprocess

import ablate
import numpy as np
import pytest
from scipy import stats

import ccsd
import common
import mskd
import sskd

PAGES = {"ccsd.py": ccsd, "mskd.py": mskd, "sskd.py": sskd}


def test_every_command_parses_and_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setattr(common, "running_code", lambda module: "")  # slow, and the same for all
    folders = set()
    for name, table in ablate.TABLES.items():
        for row, about in table.rows.items():
            assert not about.against or about.against in table.rows
            for seed in about.seeds:
                (page, *words), _ = ablate.command(name, row, seed)
                args = PAGES[page].get_args(words)
                assert args.seed == seed and args.out not in folders
                folders.add(args.out)
    for _, _, page, row, against, _, real in ablate.VERDICTS:
        market = real or (f"{page}-market", row, against)
        for table, *rows in ((f"{page}-toy", row, against), market):
            assert {*rows} <= ablate.TABLES[table].rows.keys()
    assert all(row in ablate.TABLES[table].rows for table, row in ablate.CHOSEN_ON)


def test_differences_are_paired_and_their_interval_is_student_s():
    rng = np.random.default_rng(0)
    mine, other = ({seed: dict(scores=dict(mAP=value)) for seed, value in enumerate(rng.random(9))}
                   for _ in range(2))
    del other[3]
    by_seed, (low, high) = ablate.difference(mine, other)
    pairs = [[100 * run[seed]["scores"]["mAP"] for seed in range(9) if seed != 3]
             for run in (mine, other)]
    np.testing.assert_allclose(by_seed, np.subtract(*pairs))
    wanted = stats.ttest_rel(*pairs).confidence_interval(.95)
    assert (low, high) == pytest.approx((wanted.low, wanted.high))
    assert ablate.describe(np.array([1., -2., 4.]), (-6., 8.)) == (
        "+1.0 [-6.0, 8.0], 2 of 3 seeds gain")


def test_a_table_prints_what_the_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "RESULTS", str(tmp_path / "results.jsonl"))
    with open(ablate.RESULTS, "w") as file:
        for row, gain, seeds in (("+ split", 0, (0, 1)), ("+ split + cross", .1, (0, 1)),
                                 ("bound: baseline on the true ids", 0, (1,))):
            for seed in seeds:
                _, key = ablate.command("ccsd-toy", row, seed)
                result = dict(command=" ".join(key), commit="abc", torch="2", threads=1, seconds=60,
                              scores=dict(mAP=.5 + .2 * seed + gain, rank1=.7),
                              quality=dict(ARI=.6), losses=dict(base=1),
                              mAP={"0 start": .1, "0 warmed up": .2, "0 first round": .3,
                                   "5 epoch 5/20": .4 + 2 * gain, "20 epoch 20/20": .5})
                file.write(json.dumps(result) + "\n")
    lines = ablate.printed("ccsd-toy").splitlines()
    row = next(line for line in lines if line.startswith("| + split + cross |"))
    assert "| 70.0 ± 14.1 | 60.0 / 80.0 |" in row and '+10.0' in row and "2 of 2 seeds" in row
    assert "| first round: 30.0, 5: 60.0 |" in row
    mine, other = (ablate.results_of("ccsd-toy", name, ablate.read_results())
                   for name in ("+ split + cross", "+ split"))
    np.testing.assert_allclose(ablate.difference(mine, other, epoch=5)[0], [20, 20])
    assert not len(ablate.difference(mine, other, epoch=6)[0])
    assert "| - / 70.0 |" in next(line for line in lines if "bound" in line)  # seed 0: not run
    assert "not run" in next(line for line in lines if "recluster" in line)
    assert "not run" in ablate.printed("verdicts")
    for toy, market, words in (((1, .01), (2, .04), "shown"), ((-3, .01), (-2, .01), "refuted"),
                               ((1, .01), (2, .06), "shown on the toy set"),
                               ((-2, .01), (1, .3), "refuted on the toy set"),
                               ((0, 1), (1, .01), "shown on Market-1501"),
                               ((1, .01), (-2, .01), "not shown"),
                               ((2, .06), (2, .1), "not shown")):
        assert ablate.verdict_of(toy, market) == words


def test_p_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10):
        mine, other = rng.random((2, n))
        assert ablate.p_value(mine - other) == pytest.approx(stats.ttest_rel(mine, other).pvalue)
    assert ablate.p_value(np.array([2., 2.])) < 1e-6 and ablate.p_value(np.array([0., 0.])) == 1


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis falls if every family with it falls by Bonferroni (Marcus et al., 1976)."""
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 7):
        p = rng.random(m) ** 3
        p[m // 2] = p[0]                                           # equal ones, too
        families = [s for k in range(m) for s in itertools.combinations(range(m), k + 1)]
        wanted = [max(min(1, len(s) * p[list(s)].min()) for s in families if i in s)
                  for i in range(m)]
        np.testing.assert_allclose(ablate.holm(p), wanted)
    # p.adjust(c(.01, .04, .03, .005), "holm") of R
    np.testing.assert_allclose(ablate.holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    assert not len(ablate.holm([]))


def test_verdicts_are_corrected_for_the_whole_table(tmp_path, monkeypatch):
    """Two intervals leave out 0; corrected, one falls. A cell of one seed does not count."""
    base, *rows = [*ablate.CCSD][:4]
    monkeypatch.setattr(ablate, "RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setattr(ablate, "VERDICTS", [ablate.Verdict(row, "", "ccsd", row, base)
                                             for row in rows])
    points = {("toy", base): [0] * 4, ("toy", rows[0]): [2, 3, 1, 2],
              ("toy", rows[1]): [2, 9, 4, 6], ("toy", rows[2]): [-1, 2, 1, 0],
              ("market", base): [0], ("market", rows[0]): [5]}
    with open(ablate.RESULTS, "w") as file:
        for (data, row), gains in points.items():
            for seed, gain in enumerate(gains):
                _, key = ablate.command(f"ccsd-{data}", row, seed)
                result = dict(command=" ".join(key), scores=dict(mAP=.5 + gain / 100))
                file.write(json.dumps(result) + "\n")
    p = sorted(stats.ttest_1samp(points["toy", row], 0).pvalue for row in rows)
    assert 3 * p[0] < .05 < 2 * p[1] and p[1] < .05
    first, second, third, _, count = ablate.verdicts().splitlines()[2:]
    assert first.endswith("gain, p .049 | +5.0, 1 of 1 seeds gain | shown on the toy set |")
    assert second.endswith("gain, p .078 | not run | not shown |") and "[0.5, 10.0]" in second
    assert third.endswith("gain, p .495 | not run | not shown |") and " 3 comparisons" in count


def test_seeds_that_chose_a_setting_do_not_confirm_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "RESULTS", str(tmp_path / "results.jsonl"))
    with open(ablate.RESULTS, "w") as file:
        for data, seeds, gain in (("toy", range(3), .3), ("toy", range(3, 6), .1),
                                  ("market", range(1), .2)):
            for row in ("one view for all networks", "one view without soft labels"):
                for seed in seeds:
                    _, key = ablate.command(f"sskd-{data}", row, seed)
                    file.write(json.dumps(dict(command=" ".join(key), scores=dict(
                        mAP=.5 + gain * ("without" not in row)))) + "\n")
    line = next(line for line in ablate.verdicts().splitlines() if "network and peer" in line)
    assert "seeds 0 to 2" in line and "| +10.0 [10.0, 10.0], 3 of 3 seeds gain, p" in line
    assert "| +20.0, 1 of 1 seeds gain | shown on the toy set |" in line
    with open(ablate.RESULTS, "a") as file:  # a row of another table stands for Market-1501
        for data, seeds, gain in (("market", range(1), -.3), ("hour", range(1), .3),
                                  ("hour", range(1, 3), .1)):
            name = "default" if data == "market" else "two networks, half as long"
            other = f"{name}{',' * (data == 'hour')} without soft labels"
            for row in (name, other):
                for seed in seeds:
                    _, key = ablate.command(f"sskd-{data}", row, seed)
                    file.write(json.dumps(dict(command=" ".join(key), scores=dict(
                        mAP=.5 + gain * ("without" not in row)))) + "\n")
    line = next(line for line in ablate.verdicts().splitlines() if "soft labels beside" in line)
    assert "| not run | +10.0 [10.0, 10.0], 2 of 2 seeds gain, p" in line


def test_the_run_on_a_cpu_is_the_one_that_was_measured():
    for page, row in (("mskd", "20 epochs a stage"), ("sskd", "one network, wide radius"),
                      ("ccsd", "40 epochs, eps = .5")):
        words, key = ablate.command(f"{page}-hour", row, 0)
        args, measured = (PAGES[f"{page}.py"].get_args(flags) for flags in (
            ["--data", "market1501", *common.ON_A_CPU[f"{page}.py"].split()], words[1:-2]))
        other = {name for name in vars(args) if getattr(args, name) != getattr(measured, name)}
        assert other <= {"out", "first_stage", "eval_every", "source", "sources"}, other
    scores = ablate.read_results()[tuple(key)]["scores"]
    with open(ablate.TEXTS[0], encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("| real images, small |"))
    assert line.endswith(f"| {100 * scores['mAP']:.1f} / {100 * scores['rank1']:.1f} |\n")


def test_the_table_of_runs_on_a_cpu_holds_what_was_measured():
    ccsd, float32 = ("ccsd-hour", "40 epochs, eps = .5"), "the same in float32, seed 1"
    rows = {
        "| `ccsd.py` | `--eps": [ccsd, ("ccsd-hour", float32), ccsd],
        "| its baseline, ClusterC": [("ccsd-hour", "ClusterContrast, cameras centred")] * 3,
        "| `mskd.py`, both stages": [("mskd-hour", "20 epochs a stage")] * 3,
        "| `sskd.py --source cuhk03`": [("sskd-hour", "one network, wide radius")] * 3,
        "| ClusterContrast of as": [("ccsd-market", "baseline, cameras centred")] * 3}
    results = ablate.read_results()
    with open(ablate.TEXTS[0], encoding="utf-8") as file:
        text = file.readlines()
    for start, runs in rows.items():
        found = [ablate.results_of(*run, results)[seed]["scores"] for seed, run in enumerate(runs)]
        first, second, third = (f"{100 * x['mAP']:.1f} / {100 * x['rank1']:.1f}" for x in found)
        line, = (line for line in text if line.startswith(start))
        assert line.endswith(f"| {first} | {second} and {third} |\n"), line


def test_no_float32_run_stands_under_bf16(tmp_path, monkeypatch, capsys):
    row = "baseline (ClusterContrast)"
    rows = {row: ablate.TABLES["ccsd-market"].rows[row]._replace(seeds=range(1))}
    table = ablate.TABLES["ccsd-market"]._replace(rows=rows)
    monkeypatch.setitem(ablate.TABLES, "ccsd-market", table)
    monkeypatch.setattr(ablate, "TOP", str(tmp_path))
    monkeypatch.setattr(ablate, "RESULTS", str(tmp_path / "results.jsonl"))
    (tmp_path / "ccsd.py").write_text("")
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)  # --device is auto
    for has in (True, False):
        monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: has)
        ablate.run_table("ccsd-market", [])
        text = capsys.readouterr().out
        assert ("exit code 0" in text) is has and ("there is no bfloat16" in text) is not has
    assert not ablate.bf16_left_out(["ccsd.py"]) and not ablate.read_results()


def test_a_commit_is_clean_if_its_sources_are():
    describe = subprocess.run(["git", "-C", ablate.TOP, "describe", "--always"],
                              capture_output=True, text=True)
    if describe.returncode:
        pytest.skip("no git repository")
    commit = describe.stdout.strip()
    code = {}
    for file in ("ccsd.py", "common.py"):
        show = subprocess.run(["git", "-C", ablate.TOP, "show", f"HEAD:{file}"],
                              capture_output=True)
        code[file] = hashlib.sha256(show.stdout).hexdigest()[:12]
    head = dict(commit=f"{commit}-dirty", args=dict(code=code))
    assert ablate.commit_of(head) == commit
    code["common.py"] = "0" * 12
    assert ablate.commit_of(head) == f"{commit}-dirty"


def test_the_results_are_of_known_commands():
    assert os.path.exists(ablate.RESULTS)
    known = {tuple(ablate.command(name, row, seed)[1]) for name, table in ablate.TABLES.items()
             for row, about in table.rows.items() for seed in about.seeds}
    assert set(ablate.read_results()) <= known


def test_the_written_tables_are_what_is_printed():
    names = []
    for path in ablate.TEXTS:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        names += re.findall("<!-- (?!end)([a-z-]+) -->", text)
        older = text.replace("difference in mAP |", "")  # in the head of every table only
        assert older.count("\n<!-- end -->") == text.count("difference in mAP |") > 0
        assert ablate.with_tables(older) == ablate.with_tables(text) == text, (
            f"{path} has older tables than results.jsonl; python tests/ablate.py TABLE writes them")
    assert sorted(names) == sorted([*ablate.TABLES, "verdicts"])
