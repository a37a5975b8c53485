"""Shared by the tests: the pages are importable, and a data set of a few drawn people is at hand.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import common  # noqa: E402

SHORT = ["--arch", "small", "--weights", "none", "--size", "64", "32", "--epochs", "2",
         "--iters", "2", "--batch-size", "8", "--num-instances", "2", "--bn-splits", "1",
         "--eps", ".55", "--k1", "8", "--device", "cpu"]


def short(folder, out, *more):
    """The flags of a run of seconds."""
    return ["--data", str(folder), "--out", str(out), *SHORT, *more]


def program(script, *words, cwd=None):
    """Run a page as a person does."""
    return subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, words)], cwd=cwd,
                          capture_output=True, text=True)


def refusal(main, capsys):
    """-> the one line of a refused call, without its "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    lines = [x for x in re.split(r"[\r\n]+", capsys.readouterr().err) if x.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def weights(out):
    return common.load_checkpoint(os.path.join(out, "last.pt"))["model"]


def losses(out):
    """The lines of a log without its header, without seconds, without what the true ids say."""
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    known = ("seconds", "ARI", "NMI", "purity", "unrefined_ARI")
    return [{k: v for k, v in line.items() if k not in known} for line in lines[1:]]


def draw(folder, train=8, test=4, cameras=3, shots=3):
    """Write a Market-1501 layout of drawn people, `shots` images for every person and camera."""
    rng = np.random.default_rng(0)
    eyes = [common.toy_camera(rng, .3) for _ in range(cameras)]
    for part in common.TRIPLES[0]:
        (folder / part).mkdir(parents=True)
    for person in range(1, train + test + 1):
        looks = common.toy_looks(rng)
        for camera in range(cameras):
            for shot in range(shots):
                part = ("bounding_box_train" if person <= train
                        else "query" if shot == 0 else "bounding_box_test")
                picture = common.toy_picture(rng, looks, eyes[camera], common.FRONT, 1, 0)
                picture.save(folder / part / f"{person:04d}_c{camera + 1}s1_{shot:06d}_00.jpg")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with 8 training and 4 test people, 3 cameras, 3 images each. Read only."""
    return draw(tmp_path_factory.mktemp("data") / "tiny")
