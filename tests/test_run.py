"""The programs as a person runs them: end to end, the same twice, no leak, and every refusal."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import slow
import torch
from conftest import (HERE, draw, losses, permuted_ids, program, refusal, same_weights, short,
                      start, unit, weights)

import ccsd
import common
import eval as scoring
import mskd
import sskd


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One short run of ccsd.py as a program, with all its imports."""
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, start("ccsd.py", *short(tiny, out))


def test_end_to_end(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    assert lines[0]["args"]["eps"] == .55 and lines[0]["device"] == "cpu"
    assert [line["title"] for line in lines[1:]] == [
        "start", "warmed up", "epoch 1/2", "epoch 2/2"]
    assert lines[-1]["epoch"] == 2 and 0 < lines[-1]["scores"]["mAP"] <= 1
    assert lines[-1]["scores"]["queries"] == 12 and lines[-1]["quality"]["clusters"] >= 4
    assert all(np.isfinite(lines[-1]["losses"][term]) for term in ("base", "intra"))
    assert "epoch 2/2" in done.stdout and "mAP" in done.stdout


def test_eval_repeats_the_last_score(finished, tiny):
    out, _ = finished
    last = json.loads(open(out / "log.jsonl").readlines()[-1])["scores"]
    again = program("eval.py", out, "--json")
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)
    assert all(scores[key] == last[key] for key in ("mAP", "rank1", "rank5", "rank10", "queries"))
    table = program("eval.py", out / "last.pt", "--data", tiny, "--rerank")
    assert table.returncode == 0 and len(table.stdout.splitlines()) == 2
    assert ("mAP" in table.stdout and " yes " in table.stdout
            and table.stdout.rstrip().endswith("12"))


def test_same_seed_same_numbers_and_ids_do_not_leak(tiny, tmp_path, two_layers):
    """A run whose training ids were permuted in memory is equal to the last bit."""
    fast = ["--warm-up", "1", "--size", "32", "32"]
    with permuted_ids(tiny):
        ccsd.main(short(tiny, tmp_path / "b", *fast))
    for out, more in (("a", []), ("c", ["--true-ids"]), ("d", ["--seed", "1"])):
        ccsd.main(short(tiny, tmp_path / out, *fast, *more))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    same_weights(a, b, "with other training ids other weights: a true id reaches a training step")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for other in "cd":                                             # --true-ids: ids matter
        assert not torch.equal(a["necks.0.weight"], weights(tmp_path / other)["necks.0.weight"])


def test_bn_splits_see_their_own_statistics():
    torch.manual_seed(0)
    model, images = common.Encoder("small", "none"), torch.rand(8, 3, 64, 32)
    whole, halves = (common.forward(model, images, splits) for splits in (1, 2))
    torch.testing.assert_close(halves, torch.cat([model(half) for half in images.chunk(2)]))
    assert not torch.allclose(halves, whole, atol=1e-3)


# ----------------------------------------------------------------------------------------- refusals

def test_quick_reads_few_people_and_ends(tmp_path, monkeypatch, two_layers):
    """The debug line: a set of any size, all steps; it never meets a run of the whole set."""
    monkeypatch.chdir(tmp_path)
    folder = draw(tmp_path / "d", train=14, test=13, cameras=2, shots=4)
    split = [part.paths for part in common.load(str(folder), few=True)]
    people = [{os.path.basename(path)[:4] for path in part} for part in split]
    assert [len(part) for part in split] == [12 * 8, 12 * 2, 12 * 6]
    assert people[0] == {f"{i:04d}" for i in range(1, 13)} and people[1] == people[2]
    args = ["--data", str(folder), "--weights", "none", "--true-ids"]
    assert ccsd.main([*args, "--quick"])["queries"] == 24
    with open(ccsd.get_args([*args, "--quick"]).out + "/log.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["epoch"] for line in lines[1:]] == [0, 0, 1, 2] and "scores" not in lines[1]
    assert ccsd.get_args(args).out != ccsd.get_args([*args, "--quick"]).out
    assert ccsd.get_args([*args, "--quick", "--epochs", "3"]).epochs == 3
    assert ccsd.get_args([*args, "--quick"]).on_collapse == "skip"  # an edit is tried to the end


def test_bad_data(tmp_path, capsys, two_layers):
    folder = draw(tmp_path / "d", train=3, test=2, cameras=2, shots=2)

    def refuse(*more, says):
        line = refusal(lambda: ccsd.main(short(folder, tmp_path / "out", *more)), capsys)
        assert re.search(says, line), line
    refuse("--batch-size", "16", says="12 training images.*--batch-size")  # fewer than P x K
    few = ["--batch-size", "4"]
    image = folder / "bounding_box_train" / "0001_c1s1_000000_00.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:300])
    refuse(*few, says="0001_c1s1_000000_00.jpg: cannot be read")
    image.write_bytes(whole)
    (folder / "query" / "somebody.jpg").write_bytes(whole)
    refuse(*few, says="somebody.jpg")
    os.remove(folder / "query" / "somebody.jpg")
    refuse(*few, "--eps", ".01", says="0 clusters and 12 outliers.*at eps 0.01")
    refuse(*few, "--eps", "1", says="1 clusters and 0 outliers.*at eps 1")
    for path in (folder / "bounding_box_train").iterdir():
        os.remove(path)
    refuse(*few, says="train split holds no images")


def test_a_refinement_that_leaves_too_few_clusters(tiny, tmp_path, capsys, monkeypatch,
                                                   two_layers):
    monkeypatch.setattr(ccsd, "RECLUSTER_EPS", 0)
    flags = ["--refine", "recluster", "--on-collapse", "skip"]  # not a collapse of the clustering
    line = refusal(lambda: ccsd.main(short(tiny, tmp_path, *flags)), capsys)
    assert re.match(r"\d clusters .* 4 of a batch .*--batch-size", line), line


def test_a_taken_folder(finished):
    out, done = finished
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    words = done.args[2:]
    done = program("ccsd.py", *words)
    assert done.returncode == 0 and "finished before on 72 images" in done.stdout
    done = program("ccsd.py", *words, "--kd", "2")
    assert done.returncode == 2 and "--kd 1, now 2" in done.stderr
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_one_camera_is_enough(tmp_path, two_layers):
    folder = draw(tmp_path / "d", train=6, test=3, cameras=2, shots=4)
    for path in (folder / "bounding_box_train").iterdir():
        if "_c2" in path.name:
            os.remove(path)
    ccsd.main(short(folder, tmp_path / "out", "--batch-size", "4", "--true-ids"))
    last = losses(tmp_path / "out")[-1]
    assert last["intra"] > 0 and last["cross"] == last["kd"] == 0


# --------------------------------------------------------------------------------------- re-ranking

@pytest.mark.parametrize("k1, k2, lam", [(20, 6, .3), (5, 1, 0), (60, 3, .5)])
def test_rerank(k1, k2, lam):
    features = unit(70, 12, spread=1., people=9)
    query, gallery = features[:20], features[20:]
    blocks = list(scoring.rerank(query, gallery, k1, k2, lam, block=8))
    assert [len(part) for part in blocks] == [8, 8, 4]
    np.testing.assert_allclose(-torch.cat(blocks).numpy(),
                               slow.rerank(query, gallery, k1, k2, lam), atol=2e-6)


# --------------------------------------------------------------------------------------- the README

def test_every_command_of_the_readme_and_the_course_parses():
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    text += open(os.path.join(HERE, "tests", "COURSE.md"), encoding="utf-8").read()
    text += ccsd.__doc__ + mskd.__doc__ + sskd.__doc__
    commands = re.findall(r"python (ccsd|mskd|sskd|eval)\.py([^\n`#|]*)", text)
    assert len(commands) > 8
    for page, words in commands:
        words = [word for word in shlex.split(re.split(r"\s{3,}", words)[0])]
        if "--help" not in words:
            dict(ccsd=ccsd, mskd=mskd, sskd=sskd, eval=scoring)[page].get_args(words)
    assert "python -m pytest" in text
    with open(os.path.join(HERE, ".ci", "run"), encoding="utf-8") as file:
        assert "python -m pytest -q tests" in file.read()


def test_help():
    """Of every program, in one fresh interpreter that has imported nothing for them."""
    code = """if 1:
        import runpy, sys
        for name in ("ccsd", "mskd", "sskd", "eval"):
            sys.argv = [f"{name}.py", "--help"]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                assert not stop.code"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == done.stdout.count("\n  --data ") == 4
    assert "(None" not in done.stdout
