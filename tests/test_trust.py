"""Runs to trust: stopped, killed, out of disk, resumed; and no hostile file is obeyed."""

import errno
import io
import os
import random
import re
import shlex
import shutil
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import (change_clusters, checkpoint, draw, losses, program, refusal,
                      short, two_convolutions, weights)
from PIL import Image

import ccsd
import common
import eval as scoring
import mskd
import sskd

PAGES = dict(ccsd=ccsd, mskd=mskd, sskd=sskd)


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    """What a run writes and reads does not depend on its network, and most runs are of seconds."""
    small = common.small_backbone
    with pytest.MonkeyPatch.context() as patch:
        two_convolutions(patch)
        tiny = common.small_backbone
        patch.setattr(common, "small_backbone", lambda weights: small(weights) and tiny(weights))
        yield


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The labelled source of sskd.py."""
    return draw(tmp_path_factory.mktemp("data") / "other", train=9, test=4, cameras=2, shots=4)


def words(name, tiny, other, out, *more):
    extra = ["--source", str(other), "--source-epochs", "2", "--source-iters", "2", "--nets", "2",
             "--batch-size", "6", "--eps", "0", "--rho", ".1"]
    return short(tiny, out, "--epochs", "3", "--size", "32", "32",
                 *(extra if name == "sskd" else ["--warm-up", "1"]), *map(str, more))


def true(tiny, out, *more):
    """The flags of a run of ccsd.py with true ids: no rounding decides whether there are clusters.
    """
    return words("ccsd", tiny, None, out, "--true-ids", *more)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished run. Read only."""
    out = tmp_path_factory.mktemp("runs") / "R"
    ccsd.main(true(tiny, out))
    return out


@pytest.fixture
def copied(done, tmp_path):
    """A finished run to spoil."""
    return shutil.copytree(done, tmp_path / "copied")


def same_run(a, b):
    """Weights, logs and what else a checkpoint holds, of every stage, but for time and place."""
    names = sorted(path.relative_to(a) for path in a.rglob("last.pt"))
    assert names == sorted(path.relative_to(b) for path in b.rglob("last.pt")) and names
    for name in names:
        assert losses((a / name).parent) == losses((b / name).parent)
        mine, its = (common.load_checkpoint(str(top / name)) for top in (a, b))
        assert mine.keys() == its.keys()
        assert "".join(its["lines"]) == (b / name).with_name("log.jsonl").read_text()
        other = [key for key in mine.keys() - common.NO_NUMBER - {"lines", "seconds"}
                 if plain(mine[key]) != plain(its[key])]
        assert not other, other


def plain(value):
    """Nested dicts and lists of tensors, as what == compares."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return (value.dtype, value.tolist()) if torch.is_tensor(value) else value


def stop_in_batch(monkeypatch, calls):
    """Ctrl-C at a call of augment(), in the middle of a batch."""
    augment, left = common.augment, [calls]

    def stopping(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return augment(*args, **more)
    monkeypatch.setattr(common, "augment", stopping)


def signal_once_saved(monkeypatch, number):
    """This process gets a signal when a checkpoint has its name."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a background job
    replace = os.replace

    def then_signal(*names):
        replace(*names)
        signal.raise_signal(number)
    monkeypatch.setattr(os, "replace", then_signal)


# ------------------------------------------------------------------------------------ stop, resume

@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_is_bit_identical(name, precision, tiny, other, tmp_path, monkeypatch):
    """Stopped again and again, in the middle of batches: in the warm-up and in every stage."""
    page, stops, more = PAGES[name], 0, ["--precision", precision]
    monkeypatch.setattr(sskd, "SAVE_EVERY", 1)
    if precision == "fp16":
        more.append("--true-ids")
    whole = page.main(words(name, tiny, other, tmp_path / "a", *more))
    for path in (tmp_path / "a").rglob("last.pt"):                 # a scaler counts its steps
        assert bool(common.load_checkpoint(str(path))["scaler"]) == (precision == "fp16")
    for calls in [1, 5, 3, 9] * 4:                                 # 9: of mskd.py's first round
        with monkeypatch.context() as patch:
            stop_in_batch(patch, calls)
            try:
                scores = page.main(words(name, tiny, other, tmp_path / "b", *more, "--resume"))
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 3 and scores == whole
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", PAGES)
def test_recompute_changes_no_number_and_bf16_trains(name, tiny, other, tmp_path, monkeypatch):
    """Every network of a page is set as the flags say."""
    forward, seen = common.Encoder.forward, set()

    def noted(self, *args):
        seen.add((self.precision, self.recompute))
        return forward(self, *args)
    monkeypatch.setattr(common.Encoder, "forward", noted)
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: True)
    scores = []
    for more in ([], ["--recompute"]):
        scores.append(PAGES[name].main(words(
            name, tiny, other, tmp_path / f"{len(more)}", "--bn-splits", "2", "--epochs", "2",
            "--true-ids", "--precision", "bf16", *more)))
        assert seen == {("bf16", bool(more))}
        seen.clear()
    assert scores[0] == scores[1] and losses(tmp_path / "0") == losses(tmp_path / "1")
    a, b = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_refuses_other_flags_and_grows(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signal_once_saved(patch, signal.SIGINT)
        ccsd.main(true(tiny, out))
    before = (out / "last.pt").read_bytes()

    def says(*more):
        return refusal(lambda: ccsd.main(true(tiny, out, *more)), capsys)
    line = says("--resume", "--kd", "2", "--eps", ".5", "--seed", "1", "--epochs", "4")
    assert all(x in line for x in ("--kd 1, now 2", "--eps 0.55, now 0.5", "--seed 0, now 1",
                                   "--out")) and "--epochs" not in line
    assert "stopped after epoch 1 of 3 (go on with --resume" in says()
    assert "--epochs 3, now 1" in says("--epochs", "1")            # not to where it has stopped
    assert before == (out / "last.pt").read_bytes()
    out = out.rename(tmp_path / "moved")
    ccsd.main(true(tiny, out, "--resume", "--eval-every", "1", "--epochs", "4"))
    lines = losses(out)
    assert [x["epoch"] for x in lines] == [0, 0, 1, 2, 3, 4] and "mAP" in lines[-2]
    assert "--epochs 4, now 3" in says("--resume")


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


def test_a_run_is_of_its_images(tmp_path, capsys):
    """Others under the same number are noticed, and fewer; a set that moved or is gone is no reason
    to stop a finished run."""
    folder, out = draw(tmp_path / "d", train=6, test=2), tmp_path / "a"
    argv = true(folder, out, "--epochs", "1")
    scores = ccsd.main(argv)
    first = min((folder / "bounding_box_train").iterdir())
    first = first.rename(first.with_name("0001_c1_renamed.jpg"))
    says = refusal(lambda: ccsd.main(argv), capsys)
    assert "54 training images, now there are 54, or their names are others" in says
    split = common.load(str(folder))[0]
    shutil.move(folder, tmp_path / "moved")
    assert common.names_of(split) == common.names_of(common.load(str(tmp_path / "moved"))[0])
    assert ccsd.main(argv) == scores
    shutil.move(tmp_path / "moved", folder)
    first.unlink()
    says = refusal(lambda: ccsd.main(true(folder, out, "--epochs", "2", "--resume")), capsys)
    assert "54 training images, now there are 53" in says and "--out" in says


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and kills as POSIX does")
def test_signals_name_the_command_that_goes_on(done, tiny, tmp_path, monkeypatch):
    """That command, run as it was printed, ends like a run that was never stopped."""
    out = tmp_path / "a b"                                         # a name that needs quotes
    command = ["ccsd.py", *true(tiny, out)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with monkeypatch.context() as patch:
            signal_once_saved(patch, number)
            stopped = program(*command)
        assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
        command = shlex.split(re.search(r"go on with: python (.*)", stopped.stderr)[1])
        assert command[-1] == "--resume" and common.load_checkpoint(str(out / "last.pt"))
    ended = program(*command)
    assert ended.returncode == 0 and "epoch 3/3" in ended.stdout, ended.stderr
    same_run(done, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and kills as POSIX does")
def test_killed_between_any_two_writes(done, tiny, tmp_path, monkeypatch):
    """kill -9 before a flush, a rename or a line of the log, the next one in every start."""
    out, left = tmp_path / "a", [0]

    def deadly(call):
        def counted(*args):
            left[0] -= 1                                           # in a fork, so for itself alone
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)
        return counted
    for where, name in ((os, "fsync"), (os, "replace"), (common.Log, "_write")):
        monkeypatch.setattr(where, name, deadly(getattr(where, name)))
    for event in (1, 2, 3, 4, 5, *[1, 2, 3, 4] * 2):
        left[0] = event
        killed = program("ccsd.py", *true(tiny, out, "--resume"))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if (out / "last.pt").exists():  # whose lines the log will have, and no others
            state = common.load_run(str(out / "last.pt"))
            assert "".join(state["lines"]).startswith((out / "log.jsonl").read_text())
    left[0] = 0
    ended = program("ccsd.py", *true(tiny, out))
    assert "finished before" in ended.stdout, ended.stderr
    same_run(done, out)
    assert sorted(os.listdir(out)) == ["last.pt", "log.jsonl"]


def limited(code, size, folder):
    """Run python code in a process whose files may not grow beyond `size` bytes: a full disk."""
    pytest.importorskip("resource")
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    (folder / "limited.py").write_text(limit + code)
    return program(str(folder / "limited.py"))


def test_full_disk_keeps_the_last_good_checkpoint(copied, tiny, tmp_path):
    before = {path: path.read_bytes() for path in copied.iterdir()}
    more = true(tiny, copied, "--resume", "--epochs", "4")
    code = f"import ccsd, common\ncommon.run(lambda: ccsd.main({more!r}))"
    full = limited(code, 10**5, tmp_path)
    errors = [x for x in re.split(r"[\r\n]+", full.stderr) if x.startswith("error: ")]
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert len(errors) == 1 and "last.pt cannot be written" in errors[0] and "kept" in errors[0]
    assert before == {path: path.read_bytes() for path in copied.iterdir()}
    # the log alone: half a line is taken back, and the next resume goes on
    code = f"""if 1:
        import common, ccsd
        log = common.Log({str(copied)!r}, "cpu", ccsd.get_args({more!r}))
        common.run(lambda: log.epoch("epoch 4/4", epoch=4))"""
    full = limited(code, (copied / "log.jsonl").stat().st_size + 20, tmp_path)
    assert full.returncode == 2 and "log.jsonl cannot be written" in full.stderr, full.stderr
    assert before == {path: path.read_bytes() for path in copied.iterdir()}
    assert ccsd.main(more)["mAP"] and losses(copied)[-1]["epoch"] == 4


@pytest.mark.parametrize("spoil", [
    lambda text: text + b'{"title": "epo',                         # killed in a line
    lambda text: text.removesuffix(text.splitlines(True)[-1]),     # killed before the line
    lambda text: text + text.splitlines(True)[-1].replace(b'"epoch": 3', b'"epoch": 4'),  # old .pt
    lambda text: text.splitlines(True)[0] + b"no record\n", lambda text: b"\xff\0" + text[2:],
    lambda text: b"", lambda text: None])                          # deleted
def test_the_log_is_mended(spoil, copied, tiny, capsys):
    """It is made what last.pt says, byte by byte."""
    log = copied / "log.jsonl"
    whole = log.read_bytes()
    assert len(whole.splitlines()) == 6
    log.unlink()
    text = spoil(whole)
    if text is not None:
        log.write_bytes(text)
    ccsd.main(true(tiny, copied))
    assert "nothing to do" in capsys.readouterr().out and log.read_bytes() == whole


@pytest.mark.skipif(common.fcntl is None, reason="no file locks here")
def test_a_folder_takes_one_run_at_a_time(tiny, tmp_path):
    argv = true(tiny, tmp_path, "--epochs", "1")
    log = common.Log(str(tmp_path), "cpu", ccsd.get_args(argv))
    for more in ([], ["--resume"]):
        busy = program("ccsd.py", *argv, *more)
        assert busy.returncode == 2 and "another process" in busy.stderr, busy.stderr
    ccsd.main(argv)                                                # of the same process: it goes on
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
    keep, last = dict(model=good, labels=np.zeros(3)), tmp_path / "a" / "last.pt"
    log.epoch("epoch 1/2", epoch=1, keep=keep)
    before = last.read_bytes()
    for extra in (dict(students=torch.nn.ModuleList([good, bad])), dict(optimizer=optimizer)):
        with pytest.raises(common.Problem, match="not finite, in .*last good epoch is kept"):
            log.epoch("epoch 2/2", epoch=2, keep=dict(keep, **extra))
    assert last.read_bytes() == before


def test_a_log_that_was_deleted_meanwhile_comes_back_on_resume(done, tiny, tmp_path, monkeypatch):
    evaluate, folder = common.evaluate, tmp_path / "a"

    def delete(*args):
        if (folder / "last.pt").exists():
            (folder / "log.jsonl").unlink()
        return evaluate(*args)
    monkeypatch.setattr(common, "evaluate", delete)
    ccsd.main(true(tiny, folder))
    assert not (folder / "log.jsonl").exists()
    ccsd.main(true(tiny, folder, "--resume"))
    assert losses(folder) == losses(done)


# -------------------------------------------------------------------- divergence and collapse

def test_divergence_names_epoch_iteration_and_terms():
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


@pytest.mark.parametrize("name", PAGES)
def test_collapse(name, tiny, other, tmp_path, monkeypatch, watch, capsys):
    """From the second epoch on everything is one cluster: stop, or the labels of the first."""
    people = np.arange(72) // 9
    one = np.where(np.arange(72) < 3, 0, -1)
    change_clusters(lambda n, labels: one if n else people, monkeypatch)
    seen = watch(common, "label_quality")
    stage = ["--stage", "teacher"] if name == "mskd" else []

    def run(*more):
        PAGES[name].main(words(name, tiny, other, tmp_path, *stage, *more))
    says = refusal(run, capsys)
    radius = "--rho" if name == "sskd" else "--eps"                # the flag that sets it
    for part in ("1 clusters and 69 outliers among 72 images", "eps", f"raise {radius}",
                 "--on-collapse skip", "a batch needs "):
        assert part in says, says
    for _ in range(2):                                             # the choice may change, too
        run("--resume", "--on-collapse", "skip")
    err = capsys.readouterr().err
    assert err.count("warning: 1 clusters") == 2 and "labels of the epoch before" in err
    assert len(seen) >= 3 and all((labels == people).all() for (labels, _), _ in seen)


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
        "--out R/last.pt": "R/last.pt", "--eps 2": "--eps",
    }.items()},
    "ccsd --batch-size 36 --on-collapse skip":                     # nothing before it
        r"\d+ clusters .* eps 0.55.* needs 18 clusters: .*--batch-size",
    "ccsd --refine best": "--refine", "ccsd --kd -1": "--kd", "ccsd --kd": "--kd",
    "ccsd --momentum 1.5": "--momentum",
    "ccsd --true-ids --refine recluster": "--true-ids", "ccsd --base 0 --refine none": "--base 0",
    "ccsd --lr 1e30": "--lr", "ccsd --out R --resume --kd 2": "--kd 1, now 2",
    "mskd --stage third": "--stage", "mskd --l1 .5": "--l1", "mskd --l2 -1": "--l2",
    "mskd --teacher-bn none": "--teacher-bn", "mskd --teacher R": "no teacher of mskd.py",
    "mskd --mu inf": "--mu", "sskd --sources R": "no source network", "sskd --nets 0": "--nets",
    "sskd --alpha 2": "--alpha", "sskd --rho 0": "--rho",
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


LACKS = object()
SPOILT = {  # what is wrong -> another content of last.pt, or what differs there
    "a list": [1], "a tensor": torch.zeros(3), "other images": dict(images=3),
    "no optimizer": dict(optimizer=LACKS), "no generator": dict(generator=LACKS),
    "no format, as of older pages": dict(format=LACKS), "no lines": dict(lines=LACKS),
    "epoch is late": dict(epoch=7), "model of nothing": dict(model={}),
    "optimizer of nothing": dict(optimizer={}),
    "generator too short": dict(generator=torch.zeros(5, dtype=torch.uint8)),
    "generator of floats": dict(generator=torch.zeros(5056))}


@pytest.mark.parametrize("case", SPOILT)
def test_bad_checkpoints(case, copied, tiny, capsys):
    path, state = copied / "last.pt", SPOILT[case]
    if isinstance(state, dict):
        state = {**common.load_checkpoint(str(path)), **state}
        state = {key: value for key, value in state.items() if value is not LACKS}
    torch.save(state, path)
    before = {file: file.read_bytes() for file in copied.iterdir()}
    says = refusal(lambda: ccsd.main(true(tiny, copied, "--epochs", "4", "--resume")), capsys)
    assert str(copied) in says and re.search(r"\(.+\)|--out", says), says
    assert before == {file: file.read_bytes() for file in copied.iterdir()}
