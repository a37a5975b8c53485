"""Several processes under torchrun are one process with as many chunks: the same labels, losses and
files; and what one sees when a process is lost. Two gloo processes on the CPU, loopback only.

torchrun starts this file itself, as a program that calls the pages, because starting takes longer
than the tiny runs: test_ranks.py JOBS, a JSON list of [page, its words]. Page "step" checks single
steps, in which Adam cannot hide a factor; "half" is ccsd.py in fp16; "die" is the last.
"""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import HERE, draw, first_scale, losses, refusal, short, stop_after, two_convolutions
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ccsd
import common
import mskd
import sskd

PAGES = dict(ccsd=ccsd, mskd=mskd, sskd=sskd)
CHUNKS = ["--bn-splits", "2", "--batch-size", "16", "--num-instances", "4"]


def torchrun(program, *words):
    """Start a program as two ranks -> what it has printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", program, *words]
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)


def said(done):
    """-> the lines on stderr that are ours, not torchrun's report or a progress bar."""
    return [line for line in re.split(r"[\r\n]+", done.stderr)
            if re.search("error: |interrupted|go on with", line)]


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory):
    """-> the words of a short run: flags(page, out)."""
    source = draw(tmp_path_factory.mktemp("data") / "source", train=10)
    more = dict(ccsd=["--refine", "reassign", "--warm-up", "1"],
                mskd=["--epochs", "1", "--warm-up", "1"],
                sskd=["--source", str(source), "--source-epochs", "1", "--source-iters", "2",
                      "--nets", "2", "--epochs", "1"])
    return lambda page, out: short(tiny, out, "--bn-splits", "2", "--batch-size", "16",
                                   "--num-instances", "4", "--on-collapse", "skip",
                                   "--lr", "1e-5",  # rounding must not decide on labels
                                   *more[page])


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """All three pages in one process and in two; in `resumed`, one process has stopped after its
    first epoch and two have gone on; in `died`, rank 1 has. -> the two folders, and what torchrun
    printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for page, module in PAGES.items():
        module.main(flags(page, one / page))
    fp16(flags("ccsd", one / "half"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        ccsd.main(flags("ccsd", two / "resumed"))
    for log in common.LOCKS.values():
        log.close()  # as if this process had ended
    done = torchrun(__file__, json.dumps([
        ["step", []], *([page, flags(page, two / page)] for page in PAGES),
        ["ccsd", [*flags("ccsd", two / "resumed"), "--resume"]],
        ["half", flags("ccsd", two / "half")], ["die", flags("ccsd", two / "died")]]))
    assert done.returncode == 1 and (two / "died").exists(), done.stderr
    return one, two, done


def fp16(words):
    """Run ccsd.py in fp16; in its second step, gradients overflow on the last rank."""
    average, calls = common.average_gradients, []

    def overflow(optimizer):
        calls.append(1)
        if len(calls) == 2 and common.RANK == common.RANKS - 1:
            optimizer.param_groups[0]["params"][0].grad[0] = torch.inf
        average(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "average_gradients", overflow)
        scalers = first_scale(patch, 2. ** 4)
        ccsd.main([*words, "--precision", "fp16", "--true-ids", "--refine", "split", "--epochs",
                   "1", "--warm-up", "0", "--iters", "4"])
        assert scalers[0].get_scale() == 2 ** 3  # one step was skipped


def same_run(a, b):
    """Two finished runs have the same lines, labels and network, but for rounding, which Adam makes
    larger with every step: hence the short runs."""
    lines, others = losses(a), losses(b)
    assert [line["title"] for line in lines] == [line["title"] for line in others]
    for line, other in zip(lines, others):
        assert line.keys() == other.keys()
        for name in line.keys() - {"title"}:
            score = name == "mAP" or name.startswith("rank")  # rounding swaps two of 24 images
            same = pytest.approx(other[name], rel=2e-4, abs=.1 if score else 1e-4)
            assert line[name] == same, (line["title"], name)
    old, new = (common.load_checkpoint(os.path.join(out, "last.pt")) for out in (a, b))
    assert torch.equal(old["labels"], new["labels"]) and (old["labels"] >= 0).any()
    for name, value in old["model"].items():
        torch.testing.assert_close(new["model"][name], value, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("out", ["ccsd", "mskd/teacher", "mskd", "sskd/source/1", "sskd/source/2",
                                 "sskd"])
def test_two_processes_are_one_with_two_chunks(out, runs):
    one, two, done = runs
    same_run(one / out, two / out)
    heads = [json.loads(open(folder / out / "log.jsonl").readline()) for folder in (one, two)]
    assert [head["ranks"] for head in heads] == [1, 2]


def test_all_ranks_skip_the_same_steps(runs):
    """In fp16, an overflow on one rank is one on all, because gradients are averaged first (each
    rank looks, in fp16()); numbers of fp16 round more coarsely."""
    one, two = (common.load_checkpoint(str(top / "half" / "last.pt")) for top in runs[:2])
    assert one["scaler"] == two["scaler"]
    for a, b in zip(losses(runs[0] / "half"), losses(runs[1] / "half")):
        assert all(a[name] == pytest.approx(b[name], rel=.02) for name in a.keys() - {"title"})
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=.02, rtol=.02)


def test_only_rank_0_prints_and_writes(runs):
    one, two, done = runs
    assert done.stdout.count("one step: same") == 1
    titles = [line.split("|")[0].strip() for line in done.stdout.splitlines()]
    assert titles.count("source 2, 1") == titles.count("source only") == 1
    assert titles.count("first round") == 1 and titles.count("warmed up") == 5
    assert done.stderr.count("3 cameras; train 72") == 7  # ccsd, teacher, student, sskd, ...
    for folder, _, files in os.walk(two):
        assert set(files) <= {"last.pt", "log.jsonl"}


def test_one_process_stops_and_two_go_on(runs):
    one, two, _ = runs
    same_run(one / "ccsd", two / "resumed")


def test_a_rank_dies_and_one_process_goes_on(runs, flags):
    """torchrun ends the other within seconds; one line says how to go on, and one process can."""
    one, two, done = runs
    assert [line["epoch"] for line in losses(two / "died")] == [0, 0, 1]
    page = re.escape(os.path.join(HERE, "ccsd.py"))
    lines = said(done)
    assert len(lines) == 1 and re.search("finished epochs are kept; go on with: torchrun "
                                         f"--nproc-per-node 2 {page} .* --resume$", lines[0]), lines
    ccsd.main([*flags("ccsd", two / "died"), "--resume"])
    same_run(one / "ccsd", two / "died")


def test_chunks_must_fit_the_ranks_and_one_of_them_says_so(tiny, tmp_path, capsys, monkeypatch):
    def refused():
        return main(short(tiny, tmp_path / "out", "--bn-splits", "2"))
    says = "--bn-splits 2 is no multiple of the 4 processes of torchrun (change one of them)"
    monkeypatch.setattr(common, "RANKS", 4)
    for main in (ccsd.main, mskd.main, sskd.main):
        assert refusal(refused, capsys) == says
    store = dist.HashStore()                                       # that torchrun gives its ranks
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 4)]))
    monkeypatch.setattr(common, "TORCHRUN", True)
    for rank, lines in ((1, f"error: {says}\n"), (0, "")):         # the first to fail
        monkeypatch.setattr(common, "RANK", rank)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            for name in ("stdout", "stderr"):                      # put back afterwards
                patch.setattr(sys, name, getattr(sys, name))
            common.run(refused)
        assert capsys.readouterr() == ("", lines)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- what the two ranks run


def one_step(splits, parts):
    """Features, gradients, also of weights that every rank applies to all images, and running
    statistics, against the whole batch in this process alone."""
    torch.manual_seed(0)
    images, y = torch.rand(16, 3, 64, 32), torch.arange(16) % 5
    model, last = common.Encoder("small", "none", parts), torch.nn.Linear(256, 5)
    model.necks[0].momentum = .3                                   # a method may change it
    twin, twin_last = copy.deepcopy(model), copy.deepcopy(last)
    optimizer = torch.optim.SGD([*model.parameters(), *last.parameters()], 1)
    for _ in range(2):
        f = common.forward(model, images, splits)
        g = torch.cat([twin(chunk) for chunk in images.chunk(splits)], -2)
        optimizer.zero_grad()
        for module in (twin, twin_last):
            module.zero_grad()
        for features, layer in ((f, last), (g, twin_last)):
            F.cross_entropy(layer(features).flatten(0, -2), y.repeat(1 + parts)).backward()
        common.average_gradients(optimizer)
        torch.testing.assert_close(f, g, atol=1e-5, rtol=0)
        for ours, theirs in ((model, twin), (last, twin_last)):
            for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
                if q.grad is not None:
                    error = (p.grad - q.grad).norm() / q.grad.norm()
                    assert error < 1e-4 or q.grad.norm() < 1e-6, (name, error)
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5, msg=name)
    pooled, neck = common.forward(model, images, splits, inside=True)
    torch.testing.assert_close(F.normalize(neck, dim=-1), common.forward(model, images, splits))
    assert pooled.shape == neck.shape == f.shape


def shares():
    """Work on all images is divided, and everybody has all of the result."""
    torch.manual_seed(0)
    images = torch.randint(256, (37, 3, 64, 32), dtype=torch.uint8)
    model, seen = common.Encoder("small", "none", 2), []
    hook = model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    features = common.extract_features(model, images, 8)
    hook.remove()
    assert sum(seen) == (18, 19)[common.RANK]
    whole = model.eval()(common.normalise(images)).detach()
    torch.testing.assert_close(features, whole, atol=1e-5, rtol=0)
    features = F.normalize(torch.randn(37, 8))
    rank = common.nearest(features, 5)
    assert len(common.my_share(features)) == (18, 19)[common.RANK]
    np.testing.assert_array_equal(rank, (features @ features.T).topk(5).indices)
    assert common.from_rank_0(lambda: os.environ["RANK"]) == "0"


def check_steps(_):
    common.pick_device("cpu")
    one_step(2, 0)
    one_step(4, 2)
    shares()
    print("one step: same")
    two_convolutions(pytest.MonkeyPatch())  # for the jobs that follow


def die(words):
    """Run ccsd.py; rank 1 is killed when it asks for the batches of the second epoch."""
    batches, calls = common.pk_batches, []

    def deadly(*args):
        calls.append(1)
        if common.RANK == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(*args)
    common.pk_batches = deadly
    ccsd.main(words)


def same_gradients(optimizer, *_):
    """Adam would hide gradients that no page has averaged, for a while."""
    for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        if p.grad is not None:
            of_rank_0 = p.grad.clone()
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(p.grad, of_rank_0), "ranks step with different gradients"


def work(jobs):
    register_optimizer_step_pre_hook(same_gradients)
    pages = {name: page.main for name, page in PAGES.items()}
    for name, words in jobs:
        dict(pages, step=check_steps, half=fp16, die=die)[name](words)


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    sys.argv = [os.path.join(HERE, "ccsd.py"), *jobs[-1][1]]  # as if that were started
    common.run(lambda: work(jobs))
