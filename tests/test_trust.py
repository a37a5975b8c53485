"""Runs to trust: stopped, killed, out of disk, resumed; and no hostile file is obeyed."""

import errno
import io
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import sklearn.cluster
import torch
from conftest import (HERE, checkpoint, draw, first_scale, losses, older, program, refusal, short,
                      weights)
from PIL import Image

import ccsd
import common
import eval as scoring
import mskd
import sskd

PAGES = dict(ccsd=ccsd, mskd=mskd, sskd=sskd)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The labelled source of sskd.py."""
    return draw(tmp_path_factory.mktemp("data") / "other", train=9, test=4, cameras=2, shots=4)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "R"
    ccsd.main(short(tiny, out))
    return out


def words(name, tiny, other, out, *more):
    extra = ["--source", str(other), "--source-epochs", "2", "--source-iters", "2", "--nets", "2",
             "--batch-size", "6", "--eps", "0", "--rho", ".1"]
    return short(tiny, out, "--epochs", "3", *(extra if name == "sskd" else ()), *map(str, more))


def same_run(a, b):
    """Weights, logs and what else a checkpoint holds, of every stage, but for time and place."""
    names = sorted(path.relative_to(a) for path in a.rglob("last.pt"))
    assert names == sorted(path.relative_to(b) for path in b.rglob("last.pt")) and names
    for name in names:
        assert losses((a / name).parent) == losses((b / name).parent)
        mine, its = (common.load_checkpoint(str(top / name)) for top in (a, b))
        assert mine.keys() == its.keys()
        assert "".join(its["lines"]) == (b / name).with_name("log.jsonl").read_text()
        for key in mine.keys() - {"lines", "seconds", "out", "first_stage", "resume", "eval_every"}:
            equal(mine[key], its[key])


def equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            equal(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def stop_after(monkeypatch, calls):
    """Ctrl-C at a call of augment(), in the middle of a batch."""
    augment, left = common.augment, [calls]

    def stopping(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return augment(*args, **more)
    monkeypatch.setattr(common, "augment", stopping)


# ------------------------------------------------------------------------------------ stop, resume

@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_is_bit_identical(name, precision, tiny, other, tmp_path, monkeypatch, request):
    """Stopped again and again, in every stage, warm-up included, and once in a batch's middle."""
    page, stops, more = PAGES[name], 0, ["--precision", precision]
    monkeypatch.setattr(ccsd, "GROUP_START", 1)
    monkeypatch.setattr(sskd, "SAVE_EVERY", 1)
    if precision == "fp16":
        request.getfixturevalue("two_layers")
        scalers, more = first_scale(monkeypatch, 2. ** 20), [*more, "--true-ids"]
    whole = page.main(words(name, tiny, other, tmp_path / "a", *more))
    assert precision == "fp32" or scalers[0].get_scale() < 2 ** 20      # not that of a new run
    for calls in itertools.chain([1, 3], itertools.count(3)):
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            try:
                scores = page.main(words(name, tiny, other, tmp_path / "b", *more, "--resume"))
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 3 and scores == whole
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", PAGES)
def test_recompute_changes_no_number_and_bf16_trains(name, tiny, other, tmp_path):
    splits = ["--bn-splits", "2", "--epochs", "2",
              "--true-ids"]  # rounding must not decide whether clusters form
    a, b, c = (PAGES[name].main(words(name, tiny, other, tmp_path / out, *splits, *more)) for
               out, more in (("a", []), ("b", ["--recompute"]), ("c", ["--precision", "bf16"])))
    assert a == b and 0 < c["mAP"] <= 1
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    has = common.cpu_has_bfloat16() is not False
    assert (losses(tmp_path / "a") != losses(tmp_path / "c")) is has
    mine, its = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(mine[key], its[key]) for key in mine)


def test_resume_refuses_other_flags_and_grows(tiny, tmp_path, capsys):
    ccsd.main(short(tiny, tmp_path / "a", "--epochs", "1"))
    before = (tmp_path / "a" / "last.pt").read_bytes()

    def again(*more):
        return lambda: ccsd.main(short(tiny, tmp_path / "a", *more))
    says = refusal(again("--resume", "--kd", "2", "--eps", ".5", "--seed", "1"), capsys)
    assert all(x in says for x in ("--kd 1, now 2", "--eps 0.55, now 0.5", "--seed 0, now 1",
                                   "--out")) and "--epochs" not in says
    assert "stopped after epoch 1 of 2 (go on with --resume" in refusal(again(), capsys)
    assert before == (tmp_path / "a" / "last.pt").read_bytes()
    os.rename(tmp_path / "a", tmp_path / "moved")
    ccsd.main(short(tiny, tmp_path / "moved", "--resume", "--eval-every", "1", "--epochs", "3"))
    lines = losses(tmp_path / "moved")
    assert [x["epoch"] for x in lines] == [0, 0, 1, 2, 3] and "mAP" in lines[-2]
    says = refusal(lambda: ccsd.main(short(tiny, tmp_path / "moved", "--resume")), capsys)
    assert "--epochs 3, now 2" in says


def test_epochs_do_not_shrink_to_where_a_run_stopped(tiny, tmp_path, capsys, monkeypatch):
    augment, calls = common.augment, iter(range(99))

    def stop(*args, **more):
        if next(calls) == 11:  # after 8 of the warm-up, and 2 an epoch: in the second epoch
            raise KeyboardInterrupt
        return augment(*args, **more)
    monkeypatch.setattr(common, "augment", stop)
    with pytest.raises(KeyboardInterrupt):
        ccsd.main(short(tiny, tmp_path, "--epochs", "3"))
    assert common.load_checkpoint(str(tmp_path / "last.pt"))["epoch"] == 1
    says = refusal(lambda: ccsd.main(short(tiny, tmp_path, "--epochs", "1")), capsys)
    assert "--epochs 3, now 1" in says


def test_resume_needs_the_same_images(tmp_path, capsys):
    folder = draw(tmp_path / "d")
    ccsd.main(short(folder, tmp_path / "a", "--epochs", "1"))
    os.remove(next((folder / "bounding_box_train").iterdir()))
    says = refusal(lambda: ccsd.main(short(folder, tmp_path / "a", "--resume")), capsys)
    assert "72 training images, now there are 71" in says and "--out" in says


def test_kept_values_come_back_as_they_were(tiny, tmp_path):
    argv = short(tiny, tmp_path / "a")
    argv = [*argv, "--precision", "fp32"]
    args, model = ccsd.get_args(argv), common.Encoder("small", "none")
    split = common.load(str(tiny))[0]
    kept = dict(labels=np.arange(72), mine=np.ones(3), word="x", ensemble=torch.arange(3.))
    log = common.Log(args.out, "cpu", args)
    assert log.restore(split) == {}
    log.epoch("epoch 1/2", epoch=1, keep=dict(model=model, **kept))
    args = ccsd.get_args([*argv, "--resume"])
    back = common.Log(args.out, "cpu", args).restore(split, model=model)
    for name, value in kept.items():
        assert type(back[name]) is type(value)
        assert back[name] == value if name == "word" else (back[name] == value).all()
    for taken in ("epoch", "kd"):                                  # a flag, too
        with pytest.raises(common.Problem, match=f"keep={taken}: last.pt holds something else"):
            log.epoch("epoch 2/2", epoch=2, keep={"model": model, **kept, taken: 3})
    for value in (np.float64(.5), [np.ones(2)], np.array(["a"]), lambda: 0):  # last.pt stays good
        with pytest.raises((common.Problem, TypeError), match="could not give back|can't convert"):
            log.epoch("epoch 2/2", epoch=2, keep=dict(model=model, **kept, odd=value))
    common.load_run(str(tmp_path / "a" / "last.pt"))


def test_a_finished_run_is_of_its_images(tmp_path, capsys):
    """Others under the same number are noticed; a set that moved or is gone is no reason to stop.
    """
    folder = draw(tmp_path / "d")
    argv = short(folder, tmp_path / "a", "--epochs", "1")
    scores = ccsd.main(argv)
    first = min((folder / "bounding_box_train").iterdir())
    os.rename(first, first.with_name("0001_c1_renamed.jpg"))
    says = refusal(lambda: ccsd.main(argv), capsys)
    assert "72 training images, now there are 72, or their names are others" in says
    split = common.load(str(folder))[0]
    shutil.move(folder, tmp_path / "moved")
    assert common.names_of(split) == common.names_of(common.load(str(tmp_path / "moved"))[0])
    assert ccsd.main(argv) == scores


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_name_the_command_that_goes_on(number, tiny, other, tmp_path):
    """That command, run as it was printed, ends like a run that was never stopped."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a background job
    out = tmp_path / "a b"                                         # a name that needs quotes
    more = ["--epochs", "12", "--true-ids"]
    argv = [sys.executable, os.path.join(HERE, "ccsd.py"),
            *words("ccsd", tiny, other, out, *more)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not (out / "last.pt").exists():
            time.sleep(.01)
        run.send_signal(number)
        _, err = run.communicate(timeout=600)
    assert run.returncode == 130 and "Traceback" not in err, err
    command = re.search(r"go on with: python (.*)", err)[1]
    assert command.endswith(" --resume") and common.load_checkpoint(str(out / "last.pt"))
    if number == signal.SIGINT:
        done = program(*shlex.split(command))
        assert done.returncode == 0 and "epoch 12/12" in done.stdout, done.stderr
        program("ccsd.py", *words("ccsd", tiny, other, tmp_path / "whole", *more))
        same_run(tmp_path / "whole", out)


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {here!r})
import torch
import ccsd, common
torch.set_num_threads(1)
out, words = {out!r}, {words!r}


def child(out, event=0, seconds=0, *more):
    '''Run in a process of its own, killed at the event or after the seconds. -> exit code.'''
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(out + ".txt", "a")
        seen = [0]

        def note(call, before=lambda *args: None):
            def noted(*args):
                seen[0] += 1
                if seen[0] == event:
                    before(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return noted

        def half(log):  # of what the log lacks is on the disk
            new, old = "".join(log.lines), open(log.path).read()
            same = len(os.path.commonprefix([new, old]))
            log.file.truncate(same)
            os.write(log.file.fileno(), new[same:same + (len(new) - same) // 2].encode())
        os.fsync, os.replace = note(os.fsync), note(os.replace)
        common.Log._write = note(common.Log._write, half)
        try:
            ccsd.main([*words, "--out", out, *more])
            os._exit(0)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(out):
    if os.path.exists(out + "/last.pt"):  # whose lines the log will have, and no others
        _, state = common.load_encoder(out + "/last.pt")
        assert "".join(state["lines"]).startswith(open(out + "/log.jsonl").read())


ccsd.main([*words, "--out", out + "-here"])  # its imports serve every child
start = time.time()
assert child(out + "0") == 0
whole, kills = time.time() - start, 0
draws = random.Random(0)
for name, plan in (("1", [dict(event=n) for n in (1, 2, 3, 5, 6, 4, 3, 2, 5, 4)]),
                   ("2", [dict(seconds=draws.uniform(.1, 1) * whole) for _ in range(6)])):
    for kill in plan:
        code = child(out + name, kill.get("event", 0), kill.get("seconds", 0), "--resume")
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), open(out + name + ".txt").read()
        check(out + name)
    assert child(out + name, 0, 0, "--resume") == 0, open(out + name + ".txt").read()
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")
def test_killed_at_any_moment(tiny, tmp_path):
    """kill -9 around every flush, rename and line of the log, and at random moments."""
    out = str(tmp_path / "run")
    code = KILLED.format(here=HERE, out=out, words=short(tiny, out, "--epochs", "6", "--true-ids"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) >= 10, done.stderr + done.stdout
    for name in "12":
        same_run(tmp_path / "run0", tmp_path / f"run{name}")
        assert os.listdir(tmp_path / f"run{name}") and not list(tmp_path.rglob("*.tmp"))


def limited(code, size, folder):
    """Run python code in a process whose files may not grow beyond `size` bytes: a full disk."""
    pytest.importorskip("resource")
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    (folder / "limited.py").write_text(limit + code)
    return program(str(folder / "limited.py"))


def test_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path):
    out = tmp_path / "a"
    ccsd.main(short(tiny, out))
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    more = short(tiny, out, "--resume", "--epochs", "3")
    code = f"import ccsd, common\ncommon.run(lambda: ccsd.main({more!r}))"
    done = limited(code, 10**6, tmp_path)
    errors = [x for x in re.split(r"[\r\n]+", done.stderr) if x.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "last.pt cannot be written" in errors[0] and "kept" in errors[0]
    assert before == {name: (out / name).read_bytes() for name in os.listdir(out)}
    # the log alone: half a line is taken back, and the next resume goes on
    size = len(before["log.jsonl"])
    code = f"""if 1:
        import common, ccsd
        log = common.Log({str(out)!r}, "cpu", ccsd.get_args({more!r}))
        common.run(lambda: log.epoch("epoch 3/3", epoch=3))"""
    done = limited(code, size + 20, tmp_path)
    assert done.returncode == 2 and "log.jsonl cannot be written" in done.stderr, done.stderr
    assert (out / "log.jsonl").read_bytes() == before["log.jsonl"]
    assert ccsd.main(more)["mAP"] and losses(out)[-1]["epoch"] == 3


@pytest.mark.parametrize("spoil", [
    lambda text: text + b'{"title": "epo',                         # killed in a line
    lambda text: text.removesuffix(text.splitlines(True)[-1]),     # killed before the line
    lambda text: text + text.splitlines(True)[-1].replace(b'"epoch": 2', b'"epoch": 3'),  # old .pt
    lambda text: text.splitlines(True)[0] + b"no record\n", lambda text: b"\xff\0" + text[2:],
    lambda text: b""])
def test_the_log_is_mended(spoil, done, tiny, tmp_path, capsys):
    """It is made what last.pt says, byte by byte."""
    out = tmp_path / "a"
    shutil.copytree(done, out)
    log = out / "log.jsonl"
    whole = log.read_bytes()
    assert len(whole.splitlines()) == 5
    log.write_bytes(spoil(whole))
    ccsd.main(short(tiny, out))
    assert "nothing to do" in capsys.readouterr().out and log.read_bytes() == whole
    log.unlink()
    ccsd.main(short(tiny, out))
    assert log.read_bytes() == whole


@pytest.mark.skipif(common.fcntl is None, reason="no file locks here")
def test_a_folder_takes_one_run_at_a_time(tiny, tmp_path):
    args = ccsd.get_args(short(tiny, tmp_path / "a"))
    log = common.Log(args.out, "cpu", args)
    for more in ([], ["--resume"]):
        done = program("ccsd.py", *short(tiny, tmp_path / "a", *more))
        assert done.returncode == 2 and "another process" in done.stderr, done.stderr
    ccsd.main(short(tiny, tmp_path / "a"))                         # of the same process: it goes on
    del log


@pytest.mark.skipif(common.fcntl is None, reason="no file locks here")
def test_a_file_system_without_locks(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(common.fcntl, "flock", refuse)
    args = ccsd.get_args(short(tiny, tmp_path / "a"))
    common.Log(args.out, "cpu", args).file.close()
    assert capsys.readouterr().err.count("cannot be locked here") == 1


def test_nothing_that_is_not_finite_is_saved(tiny, tmp_path):
    """Not only the network that is evaluated: SSKD keeps several."""
    args = ccsd.get_args(short(tiny, tmp_path / "a"))
    log, good, bad = common.Log(args.out, "cpu", args), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    good.parts, good.pooling = 0, "gem"
    bad.weight.data[0, 0] = torch.nan
    optimizer = torch.optim.Adam(good.parameters())
    optimizer.state[good.weight]["exp_avg"] = torch.full((2, 2), torch.inf)
    for extra in (dict(students=torch.nn.ModuleList([good, bad])), dict(optimizer=optimizer)):
        with pytest.raises(common.Problem, match="not finite.*last good epoch is kept"):
            log.epoch("epoch 1/2", epoch=1, keep=dict(model=good, labels=np.zeros(3), **extra))
    assert not (tmp_path / "a" / "last.pt").exists()


def test_a_log_that_was_deleted_meanwhile_comes_back_on_resume(tiny, tmp_path, monkeypatch):
    ccsd.main(short(tiny, tmp_path / "whole"))
    evaluate, folder = common.evaluate, tmp_path / "a"

    def delete(*args):
        if (folder / "last.pt").exists():
            (folder / "log.jsonl").unlink()
        return evaluate(*args)
    monkeypatch.setattr(common, "evaluate", delete)
    ccsd.main(short(tiny, folder))
    assert not (folder / "log.jsonl").exists()
    ccsd.main(short(tiny, folder, "--resume"))
    assert losses(folder) == losses(tmp_path / "whole")


def test_only_a_lack_of_memory_is_called_one(capsys):
    def wrong():
        torch.zeros(1).expand(3).add_(torch.ones(3))  # its message has the word, too
    with pytest.raises(RuntimeError, match="memory"):
        common.run(wrong)
    assert "out of memory" in refusal(lambda: torch.empty(2 ** 50), capsys)


# -------------------------------------------------------------------- divergence and collapse

def test_divergence_names_epoch_iteration_and_terms(tiny, tmp_path, after_each_step, capsys):
    means = common.Means()
    for step in range(5):
        means.add(a=torch.tensor(float("nan") if step > 2 else 1.), off=0,
                  b=torch.tensor(float("inf") if step > 1 else 2.))
    with pytest.raises(common.Problem, match="epoch 7, iteration 3: not finite: b; .*--lr"):
        means.values(7)
    means = common.Means()
    for value in (1., 2., 6.):
        means.add(a=torch.tensor(value), off=0)
    assert means.values(1) == {"a": 3.}
    # weights that break in the very last step, after the last loss
    ccsd.main(short(tiny, tmp_path / "a"))
    before = (tmp_path / "a" / "last.pt").read_bytes()
    steps = []

    def breaking(optimizer):
        steps.append(optimizer)
        if len(steps) == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0] = float("nan")
    after_each_step.append(breaking)
    argv = short(tiny, tmp_path / "a", "--resume", "--epochs", "4", "--eval-every", "9")
    says = refusal(lambda: ccsd.main(argv), capsys)
    assert "epoch 3/4: weights are not finite" in says and "last good epoch is kept" in says
    assert before == (tmp_path / "a" / "last.pt").read_bytes()


@pytest.mark.parametrize("name", PAGES)
def test_collapse(name, tiny, other, tmp_path, monkeypatch, capsys):
    """From the second epoch on everything is one cluster: stop, or the labels of the first."""
    page, fit, fits, seen = PAGES[name], sklearn.cluster.DBSCAN.fit, [], []
    quality = common.label_quality

    def collapsing(self, graph, *_, **__):
        fit(self, graph)
        fits.append(1)
        if len(fits) > 1:
            self.labels_ = np.where(np.arange(len(self.labels_)) < 3, 0, -1)
        return self
    monkeypatch.setattr(sklearn.cluster.DBSCAN, "fit", collapsing)
    monkeypatch.setattr(common, "label_quality", lambda labels, pids: (
        seen.append(labels), quality(labels, pids))[1])
    stage = ["--stage", "teacher"] if name == "mskd" else []
    says = refusal(lambda: page.main(words(name, tiny, other, tmp_path, *stage)), capsys)
    radius = "--rho" if name == "sskd" else "--eps"                # the flag that sets it
    for part in ("1 clusters and 69 outliers among 72 images", "eps", f"raise {radius}",
                 "--on-collapse skip", "a batch needs "):
        assert part in says, says
    first = seen[0]
    for _ in range(2):                                             # the choice may change, too
        page.main(words(name, tiny, other, tmp_path, *stage, "--resume", "--on-collapse", "skip"))
    err = capsys.readouterr().err
    assert err.count("warning: 1 clusters") == 2 and "labels of the epoch before" in err
    assert len(np.unique(first)) > 3 and all(np.array_equal(first, labels) for labels in seen)


@pytest.mark.parametrize("refine", ["reassign", "recluster"])
def test_labels_of_the_epoch_before_are_not_refined_again(refine, tiny, tmp_path, monkeypatch,
                                                          watch):
    dbscan, calls = common.dbscan, []

    def collapsing(distance, eps, min_samples=4, at_least=2, instead=None, **more):
        if at_least and instead is not None:                       # not within recluster()
            return instead
        calls.append(1)
        return dbscan(distance, eps, min_samples, at_least, **more)
    monkeypatch.setattr(common, "dbscan", collapsing)
    seen = watch(ccsd, "split_by_camera")
    batches = watch(common, "pk_batches")
    ccsd.main(words("ccsd", tiny, None, tmp_path, "--refine", refine, "--on-collapse", "skip"))
    first, *others = [labels for (labels, *_), _ in batches]
    assert len(others) == 2 and all(np.array_equal(first, labels) for labels in others)
    assert len(seen) >= 3


def test_fewer_clusters_than_a_batch_needs_are_a_collapse(tiny, tmp_path, capsys):
    argv = short(tiny, tmp_path, "--batch-size", "36", "--num-instances", "2")
    says = refusal(lambda: ccsd.main([*argv, "--on-collapse", "skip"]), capsys)  # nothing before it
    assert re.search(r"\d+ clusters .* eps 0.55.* needs 18 clusters: .*--batch-size", says), says


# ----------------------------------------------------------------------------------- hostile input

def png(width, height, *chunks):
    """The bytes of a PNG that claims a size and holds next to nothing."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunk(*c) for c in chunks)
            + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


GIF = io.BytesIO()  # a whole one, that Pillow could read
Image.new("P", (64, 128)).save(GIF, "GIF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n(owned) (w) file closefile showpage\n"


@pytest.mark.parametrize("content", [
    png(60000, 60000), png(2**31 - 1, 2**31 - 1), png(0, 0), png(64, 128), EPS, b"",
    b"\xff\xd8\xff", GIF.getvalue(), b"P6 64 128 255\n" + bytes(64 * 128 * 3),
    png(64, 128, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20))))],
    ids=["bomb", "claims 2^31", "no pixels", "cut", "postscript", "empty", "jpeg head", "gif",
         "ppm", "text bomb"])
def test_hostile_images(content, tmp_path):
    """Formats with other programs behind them are not decoded, but called by their names."""
    path = tmp_path / "0001_c1_0.jpg"
    path.write_bytes(content)
    split = common.Split([str(path)], np.array([1]), np.array([0]))
    says = {EPS: "it is PostScript", GIF.getvalue(): "it is GIF", b"": "it is empty"}.get(
        content, "it is PPM" if content.startswith(b"P6") else "")
    with pytest.raises(common.Problem, match=f"0001_c1_0.jpg: cannot.*{says}.*remove"):
        common.read_images(split, 64, 32)


def test_links_and_pipes(tmp_path, capsys):
    folder = draw(tmp_path / "d", train=4, test=2, cameras=2, shots=2)
    part = folder / "bounding_box_train"
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(next(part.iterdir()).read_bytes())
    trick = part / "0099_c1s1_000000_00.jpg"
    for target in (secret, os.path.join("..", "..", "secret.jpg")):  # caches are made of links
        os.symlink(target, trick)
        assert len(common.load(str(folder))[0].paths) == 17
        os.remove(trick)
    for target in (tmp_path / "nothing", trick, folder):           # a dead link, a loop, a folder
        os.symlink(target, trick)
        with pytest.raises(common.Problem, match="0099_c1|holds 1 folders"):
            common.load(str(folder))
        os.remove(trick)
    os.mkfifo(trick)                                               # reading it would wait for ever
    with pytest.raises(common.Problem, match="1 of 17 images cannot.*not a file: .*0099_c1"):
        common.load(str(folder))
    os.remove(trick)
    os.symlink(folder, tmp_path / "alias")
    assert len(common.load(str(tmp_path / "alias"))[0].paths) == 16  # a link to the whole set
    os.rename(folder / "query", tmp_path / "query")
    os.symlink(tmp_path / "query", folder / "query")
    assert common.load(str(folder))[1].paths


def test_lists_that_leave_the_data_set(tmp_path):
    folder = tmp_path / "msmt"
    for part in ("train", "test"):
        os.makedirs(folder / part)
    for file in (tmp_path / "secret_000_01.jpg", folder / "0000_000_01_0.jpg",
                 folder / "train" / "0000_000_01_0.jpg"):
        file.touch()                                               # a leak would find its file
    for path in ("../../secret_000_01.jpg", f"{tmp_path}/secret_000_01.jpg", "0000_000_01_0.jpg",
                 "0000/0000_000_01_0.jpg", "../0000_000_01_0.jpg", "0000/0000_000_01_\0.jpg"):
        for name in ("train", "val", "query", "gallery"):
            (folder / f"list_{name}.txt").write_text(path + " 0\n")
        says = "not a file" if path == "0000/0000_000_01_0.jpg" else "list_train.txt"
        with pytest.raises(common.Problem, match=says):
            common.load(str(folder))


@pytest.mark.parametrize("name", ["0001_c1\x1b[2J.jpg", "0001_c1 \n\r$(reboot).jpg",
                                  "0001_c1\u202e.jpg", "0001_c1 ; rm x.jpg", b"0001_c1\xff.jpg"])
def test_odd_names(name, tiny, tmp_path, capsys):
    """They load where they parse, and a message shows nothing that a terminal would obey."""
    folder = draw(tmp_path / "d", train=6, test=2, cameras=2, shots=2)
    first = min(os.listdir(folder / "bounding_box_train"))
    name = os.fsdecode(name)
    os.rename(folder / "bounding_box_train" / first, folder / "bounding_box_train" / name)
    assert len(common.load(str(folder))[0].paths) == 24
    (folder / "bounding_box_train" / name).write_bytes(b"no image")
    says = refusal(lambda: ccsd.main(short(folder, tmp_path / "out")), capsys)
    assert "0001_c1" in says and "remove these files" in says
    assert all(c.isprintable() for c in says)


def test_a_checkpoint_does_not_say_where_to_draw(tmp_path, capsys):
    checkpoint(tmp_path / "last.pt", root=str(tmp_path / "elsewhere"))
    says = refusal(lambda: scoring.main([str(tmp_path)]), capsys)
    assert "--root" in says and not (tmp_path / "elsewhere").exists()


def test_fuzzed_names_never_crash_the_loader(tmp_path):
    """Names near the grammar: each loads as its plain reading says, or one Problem names it."""
    draws = random.Random(0)
    for part in common.TRIPLES[0]:
        (tmp_path / part).mkdir()
    for part in common.TRIPLES[0][1:]:
        for camera in "12":
            (tmp_path / part / f"0001_c{camera}.jpg").touch()
    trick, loaded = tmp_path / "bounding_box_train", 0
    for _ in range(300):
        parts = draws.choices(["0", "1", "-", "_", "_c", "c1", "12", ".jpg", ".JPG", " ", "é"],
                              k=draws.randint(1, 7))
        start = draws.choice(["", "", "1_c1", "12_c"])
        name = start + "".join(parts) + draws.choice([".jpg", ".png", ""])
        (trick / name).touch()
        plain = re.fullmatch(r"(-?[0-9]+)_c([0-9]+)([^0-9].*)?\.(jpg|png)", name, re.I)
        try:
            train = common.load(str(tmp_path))[0]
            assert plain and int(plain[1]) == train.pids[0] and train.paths == [str(trick / name)]
            loaded += 1
        except common.Problem as problem:
            hidden = name.startswith(".") or (plain and int(plain[1]) < 0)
            assert not plain or hidden or len(plain[1]) > 9, (name, problem)
            assert hidden or name in str(problem) or "person" in str(problem), (name, problem)
        os.remove(trick / name)
    assert loaded > 30


def test_fuzzed_features_cluster_or_are_refused():
    """Duplicates, blobs, a single point, few or many neighbours: labels or one Problem."""
    draws = np.random.default_rng(0)
    for _ in range(60):
        n, d = draws.integers(1, 60), draws.integers(1, 8)
        points = draws.normal(size=(draws.integers(1, n + 1), d))
        spread = draws.choice([0, .1]) * draws.normal(size=(n, d))
        features = points[draws.integers(len(points), size=n)] + spread
        features = torch.nn.functional.normalize(torch.from_numpy(features).float())
        distance = common.jaccard_distance(features, int(draws.integers(1, 70)))
        assert distance.data.min() >= 0 and distance.data.max() <= 1 + 1e-6
        assert abs(distance - distance.T).max() < 1e-6 and (distance.diagonal() == 0).all()
        try:
            labels = common.dbscan(distance, float(draws.uniform(0, 1)))
            assert set(labels.tolist()) - {-1} == set(range(labels.max() + 1)) and labels.max() > 0
        except common.Problem as problem:
            assert "clusters and" in str(problem)


# ------------------------------------------------------------ sixty ways to get it wrong, and more
# page and flags -> what the one line must name. D and R stand for the data and a finished run.

FLAGS = {
    **{f"{page} {flags}": says for page in PAGES for flags, says in {
        "--epochs 0": "--epochs", "--epochs 1.5": "'1.5' is no whole number",
        "--iters -3": "--iters", "--lr nan": "--lr", "--lr -1": "--lr",
        "--batch-size 9": "--batch-size 9", "--batch-size 512": "--batch-size",
        "--bn-splits 5": "--bn-splits", "--k1 0": "--k1", "--num-instances 0": "--num-instances",
        "--bn-splits 8": "--bn-splits 8", "--temp 0": "--temp", "--seed -1": "--seed",
        "--seed 4294967296": "--seed", "--size 8 8": "--size", "--size 64": "--size",
        "--device tpu": "--device", "--arch vgg": "--arch", "--weights imagenet": "--weights none",
        "--arch resnet18 --weights nowhere.pth": "nowhere.pth",
        "--arch resnet18 --weights D": "cannot be read", "--weights D": "--weights none",
        "--data nowhere": "nowhere", "--nonsense": "--nonsense",
        "--epoch 3": "--epoch", "--out /proc/nowhere": "/proc/nowhere.* cannot be written",
        "--on-collapse ask": "--on-collapse", "--resume 3": "unrecognized arguments: 3",
        "--precision half": "--precision", "--size 32 4096": "--size",
        "--iters 99999999999": "--iters",
        "--eps .001": "raise --eps", "--out R/last.pt": "R/last.pt", "--eps 2": "--eps",
    }.items()},
    "ccsd --refine best": "--refine", "ccsd --kd -1": "--kd", "ccsd --kd": "--kd",
    "ccsd --momentum 1.5": "--momentum",
    "ccsd --true-ids --refine recluster": "--true-ids", "ccsd --base 0 --refine none": "--base 0",
    "ccsd --lr 1e30": "--lr", "ccsd --out R --resume --kd 2": "--kd 1, now 2",
    "mskd --size 80 32": "multiple of 32", "mskd --stage third": "--stage", "mskd --l1 .5": "--l1",
    "mskd --l2 -1": "--l2", "mskd --teacher-bn none": "--teacher-bn",
    "mskd --stage student": "--stage", "mskd --teacher nowhere": "no teacher in nowhere",
    "mskd --teacher R": "no teacher of mskd.py", "mskd --teacher R --stage teacher": "--teacher",
    "mskd --mu inf": "--mu", "sskd --source D": "--source and --data",
    "sskd --source nowhere": "nowhere", "sskd --sources nowhere": "no source network in nowhere",
    "sskd --sources R": "no source network", "sskd --nets 0": "--nets", "sskd --alpha 2": "--alpha",
    "sskd --rho 0": "--rho", "sskd --id 0 --soft 0 --ms 0": "--id 0",
    "sskd --source-epochs 0": "--source-epochs", "eval nowhere": "nowhere", "eval D": "last.pt",
    "eval R --data nowhere": "nowhere", "eval R --device tpu": "--device",
    "eval R/log.jsonl": "no checkpoint", "eval": "checkpoint",
    "eval R --root nowhere --data market1501": "market1501",
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_input(case, done, tiny, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = (done / "last.pt").read_bytes(), (done / "log.jsonl").read_bytes()
    name, *flags = [str(tiny) + x[1:] if re.match("D(/|$)", x) else
                    str(done) + x[1:] if re.match("R(/|$)", x) else x for x in case.split()]
    argv = flags if name == "eval" else words(name, tiny, other, tmp_path / "out", *flags)
    says = refusal(lambda: dict(PAGES, eval=scoring)[name].main(argv), capsys)
    assert re.search(FLAGS[case].replace("R/", str(done) + "/"), says), says
    assert re.search(r"\(.+\)", says), says                        # every line says what to do
    assert before == ((done / "last.pt").read_bytes(), (done / "log.jsonl").read_bytes())
    assert not (tmp_path / "out" / "last.pt").exists()


def broken_checkpoints():
    def change(**values):
        return lambda state: {**state, **values}

    def drop(key):
        return lambda state: {k: v for k, v in state.items() if k != key}
    for key in ("model", "optimizer", "generator", "epoch", "scores", "lines", "images", "format"):
        yield f"no {key}", drop(key)
    yield "epoch is text", change(epoch="1")
    yield "epoch is late", change(epoch=7)
    yield "model is a list", change(model=[1, 2])
    yield "model of nothing", change(model={})
    yield "optimizer of nothing", change(optimizer={})
    yield "generator too short", change(generator=torch.zeros(5, dtype=torch.uint8))
    yield "generator of floats", change(generator=torch.zeros(5056))
    yield "lines are a number", change(lines=3)
    yield "another format", change(format=1)
    yield "other images", change(images=3)
    yield "a list", lambda state: [state]
    yield "a tensor", lambda state: torch.zeros(3)


@pytest.mark.parametrize("name, spoil", list(broken_checkpoints()), ids=lambda x: str(x)[:20])
def test_bad_checkpoints(name, spoil, done, tiny, tmp_path, capsys):
    state = spoil(common.load_checkpoint(str(done / "last.pt")))
    out = tmp_path / "out"
    out.mkdir()
    torch.save(state, out / "last.pt")
    before = (out / "last.pt").read_bytes()
    argv = short(tiny, out, "--epochs", "3", "--resume")
    says = refusal(lambda: ccsd.main(argv), capsys)
    assert str(out) in says and re.search(r"\(.+\)|--out", says), says
    assert before == (out / "last.pt").read_bytes()


def test_a_checkpoint_of_older_pages_is_refused(done, tiny, tmp_path, capsys):
    """sskd.py's networks were trained in another way then; sources and teachers: their own tests.
    """
    out = tmp_path / "R"
    shutil.copytree(done, out)
    older(out / "last.pt")
    before = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    for main, argv in ((scoring.main, [str(out)]), (ccsd.main, short(tiny, out)),
                       (ccsd.main, short(tiny, out, "--epochs", "3", "--resume"))):
        says = refusal(lambda: main(argv), capsys)
        assert str(out) in says and "older version" in says and "--out" in says, says
    assert before == ((out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes())
