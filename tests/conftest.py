"""Shared by the tests: the pages are importable, a data set of a few drawn people is at hand, and
what several tests need to run, to watch and to read a program.
"""

import contextlib
import json
import os
import re
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, threads wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    """-> the state dict of a finished run."""
    return common.load_checkpoint(os.path.join(out, "last.pt"))["model"]


def losses(out):
    """The lines of a log without its header, its groups laid flat, without seconds and without what
    the true ids say."""
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    known, flat = ("seconds", "ARI", "NMI", "purity", "unrefined_ARI"), []
    for line in lines[1:]:
        groups = [line.pop(group, {}) for group in ("quality", "losses", "scores")]
        line.update(item for group in groups for item in group.items())
        flat.append({k: v for k, v in line.items() if k not in known})
    return flat


def draw(folder, train=8, test=4, cameras=3, shots=3):
    """Write a Market-1501 layout of drawn people, `shots` images for every person and camera."""
    rng = np.random.default_rng(0)
    eyes = [toy.draw_camera(rng, .3) for _ in range(cameras)]
    for part in toy.FOLDERS:
        (folder / part).mkdir(parents=True)
    for person in range(1, train + test + 1):
        looks = toy.draw_looks(rng)
        for camera in range(cameras):
            for shot in range(shots):
                part = ("bounding_box_train" if person <= train
                        else "query" if shot == 0 else "bounding_box_test")
                picture = toy.draw_picture(rng, looks, eyes[camera], toy.FRONT, 1, 0)
                picture.save(folder / part / f"{person:04d}_c{camera + 1}s1_{shot:06d}_00.jpg")
    return folder


def checkpoint(path, **values):
    """Write a last.pt as a page does, of a network that was never trained, but for `values`."""
    model = common.Encoder("small", "none").state_dict()
    about = dict(model=model, arch="small", parts=0, pooling="gem", size=(96, 48), data="toy",
                 root="data", epoch=1, epochs=2, scores={}, lines=[], seconds=1., images=9,
                 files="", precision="fp32", code={}, arrays=[], clashing={},
                 format=common.FORMAT)
    common.save_checkpoint(str(path), **{**about, **values})


def older(path):
    """Make a checkpoint one of the pages before they counted formats."""
    state = common.load_checkpoint(str(path))
    del state["format"]
    common.save_checkpoint(str(path), **state)


def unit(n, d=16, seed=0, spread=.5, people=8):
    """n unit features around a few centres."""
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(people, d, generator=g))
    return F.normalize(centres[torch.arange(n) % people]
                       + spread * torch.randn(n, d, generator=g) / d ** .5)


def quantised(n, seed=0):
    """n unit features whose products are exact multiples of 1/4: many true ties, no rounding."""
    rng = np.random.default_rng(seed)
    features = np.zeros((n, 6), np.float32)
    for row in features:
        row[rng.permutation(6)[:4]] = rng.choice([-.5, .5], 4)
    return torch.from_numpy(features)


def double(*shape, seed=0):
    """Normal random numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b, what, **more):
    """Two tensors are close; where they are not, the test says `what`, in the paper's words."""
    torch.testing.assert_close(a, b, **more, msg=lambda numbers: f"{what}\n{numbers}")


def same_loss(what, fast, slow, x, atol=1e-9, rtol=1e-9):
    """Two functions of x have equal values, and equal gradients that are not all 0. what: the name
    of the loss and what it is."""
    a, b = (x.clone().requires_grad_() for _ in range(2))
    values = fast(a), slow(b)
    close(*values, f"another value than {what}", atol=atol, rtol=0, check_dtype=False)
    assert values[0].requires_grad, f"no gradient reaches the student from {what}"
    ga, gb = (torch.autograd.grad(value, at)[0] for value, at in zip(values, (a, b)))
    close(ga, gb, f"the value of {what}, but another gradient", atol=atol, rtol=rtol)
    assert ga.abs().sum() > 0


@contextlib.contextmanager
def permuted_ids(folder):
    """In this context, the training people of `folder`, the only one that may be loaded, have
    permuted ids, and batches may not be drawn by them."""
    load, draw_batches, wrong = common.load, common.pk_batches, []

    def permuted(name, *args):
        train, query, gallery = load(name, *args)
        assert name == str(folder), "the finished sources need no data set, but one is read"
        wrong.append(np.random.default_rng(0).permutation(train.pids))
        return train._replace(pids=wrong[-1]), query, gallery

    def by_labels(labels, *args):
        assert (common.renumber(labels) != common.renumber(wrong[-1])).any(), (
            "batches are drawn by the true ids, which no step may use; step 5 draws them by the "
            "pseudo labels of step 2, where -1 is an outlier and in no batch")
        return draw_batches(labels, *args)
    with pytest.MonkeyPatch.context() as only:
        only.setattr(common, "load", permuted)
        only.setattr(common, "pk_batches", by_labels)
        yield


def same_weights(a, b, what):
    """Two networks (state dicts) are equal to the last bit; if not, the test says `what`."""
    other = [key for key in a if not torch.equal(a[key], b[key])]
    assert not other, f"{what}: {len(other)} of {len(a)} tensors differ, {other[:3]}"


def first_scale(monkeypatch, scale):
    """From now on gradient scalers start with this scale -> list of them."""
    made, kind = [], torch.amp.GradScaler

    def scaler(device, enabled):
        made.append(kind(device, init_scale=scale, enabled=enabled))
        return made[-1]
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return made


@pytest.fixture
def two_layers(monkeypatch):
    """--arch small has two convolutions: CPUs are slow in fp16."""
    def backbone(weights):
        return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.Conv2d(16, 256, 4, 4), nn.BatchNorm2d(256))
    monkeypatch.setattr(common, "small_backbone", backbone)


@pytest.fixture
def after_each_step():
    """-> a list of functions to call with the optimiser after each of its steps."""
    calls = []

    def stepped(optimizer, *_):
        for call in calls:
            call(optimizer)
    handle = register_optimizer_step_post_hook(stepped)
    yield calls
    handle.remove()


@pytest.fixture
def watch(monkeypatch):
    """-> watch(where, name): replaces a function of ours by one that also notes each call -> list
    of (arguments, result). A loss's .grad is then its weight in the total."""
    def start(where, name):
        call, seen = getattr(where, name), []

        def noted(*args, **more):
            result = call(*args, **more)
            seen.append((args, result))
            if torch.is_tensor(result) and result.requires_grad:
                result.retain_grad()
            return result
        monkeypatch.setattr(where, name, noted)
        return seen
    return start


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with 8 training and 4 test people, 3 cameras, 3 images each. Read only."""
    return draw(tmp_path_factory.mktemp("data") / "tiny")
