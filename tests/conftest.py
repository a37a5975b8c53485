"""Shared by the tests: the pages are importable, a data set of a few drawn people is at hand, and
what several tests need to run, to watch and to read a program.
"""

import contextlib
import copy
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # threads wait for each other, and in a fork for ever

import numpy as np
import pytest
import sklearn.cluster
import slow
import torch
import torch._dynamo  # noqa: F401  as an optimiser does: not again in each fork
import torch.nn.functional as F
import toy
from halves import pytest_runtestloop  # noqa: F401, a hook of pytest
from torch import nn
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
import common  # noqa: E402

SHORT = ["--arch", "small", "--weights", "none", "--size", "64", "32", "--epochs", "2",
         "--iters", "2", "--batch-size", "8", "--num-instances", "2", "--bn-splits", "1",
         "--eps", ".55", "--k1", "8", "--device", "cpu"]


def short(folder, out, *more):
    """The flags of a run of seconds."""
    known = "--true-ids" in more and "--source" not in more  # labels need no good features
    return ["--data", str(folder), "--out", str(out), *SHORT,
            *(["--warm-up", "1"] if known else []), *more]


def spelled(flags):
    """A dict of flags -> the words of a command line."""
    return [word for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]


def program(script, *words, cwd=None):
    """Run a page as a person does -> CompletedProcess. Where the system can, in a fork of this
    process, which has imported everything: that takes a tenth of the time of a start."""
    argv = [os.path.join(HERE, script), *map(str, words)]
    if not hasattr(os, "fork"):
        return start(*argv, cwd=cwd)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            run_in_fork(argv, cwd or os.getcwd(), out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(argv, code, *texts)


def run_in_fork(argv, cwd, out, err):
    """Be Python, called with these words; does not return."""
    code = 1
    try:
        os.chdir(cwd)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        home = os.path.dirname(argv[0])
        sys.argv, sys.path[0] = argv, home
        for name in {"common", "ccsd", "mskd", "sskd"} if home != HERE else ():
            if os.path.exists(os.path.join(home, name + ".py")):  # a copy of the pages
                sys.modules.pop(name, None)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(script, *words, cwd=None):
    """program() with a true start, imports and all."""
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
                 files="", precision="fp32", code={}, arrays=[], format=common.FORMAT)
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


def two_convolutions(patch):
    """From now on, and as long as `patch` lasts, --arch small has two convolutions: CPUs are slow
    in fp16, and much of what is tested happens around the network."""
    def backbone(weights):
        return nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.Conv2d(16, 256, 4, 4), nn.BatchNorm2d(256))
    patch.setattr(common, "small_backbone", backbone)


@pytest.fixture
def two_layers(monkeypatch):
    two_convolutions(monkeypatch)


@pytest.fixture(scope="module")
def two_layers_in_this_file():
    with pytest.MonkeyPatch.context() as patch:
        two_convolutions(patch)
        yield


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


TOLD = ("seed_everything", "extract_features", "test", "warm_up", "dbscan", "pk_batches", "augment",
        "forward", "update_memory")


def kept(value):
    """A copy of what a later step could change; of a network, with its weights and its mode."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return value.copy()
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: kept(part) for key, part in value.items()}
    return copy.deepcopy(value) if isinstance(value, nn.Module) else value


@pytest.fixture
def story(monkeypatch):
    """-> a list that tells what a run does, in its order. Every call of a function in TOLD is a
    namespace: its kind, its arguments as they were, its result; so is every draw of a batch
    (index), every loss that is scaled (loss), every step of an optimiser (step), with the
    parameters before it and after it, and every line of the log (line). Warm-up does nothing."""
    told, inside = [], []

    def tell(kind, **about):
        if not inside:
            told.append(SimpleNamespace(kind=kind, **about))
            return told[-1]
        return SimpleNamespace()

    def spy(where, name, kind, call):
        signature = inspect.signature(getattr(where, name))

        def noted(*args, **more):
            bound = signature.bind(*args, **more)
            bound.apply_defaults()
            about = tell(kind, objects=bound.arguments,
                         **{key: kept(value) for key, value in bound.arguments.items()})
            if kind == "test":
                inside.append(1)  # what it calls is no step of ours
            about.result = call(*args, **more)
            if kind == "test":
                inside.pop()
            about.after = {key: kept(value) for key, value in bound.arguments.items()
                           if torch.is_tensor(value)}
            if torch.is_tensor(about.result):
                about.grad, result = about.result.requires_grad, about.result
                about.result = result.detach().clone()
                return result
            if type(about.result) is tuple:  # of tensors
                about.grad = any(x.requires_grad for x in about.result)
            return about.result
        monkeypatch.setattr(where, name, noted)

    def drawn(*args, **more):
        for index in draw_batches(*args, **more):
            tell("index", index=index.clone())
            yield index
    draw_batches = common.pk_batches
    for name in TOLD:
        call = dict(pk_batches=drawn, warm_up=lambda *args, **more: None)
        spy(common, name, name, call.get(name, getattr(common, name)))
    spy(common.Log, "epoch", "line", common.Log.epoch)

    class Scaler(torch.amp.GradScaler):
        """Scales by 16 even in float32: an exact factor, which has to be taken back."""

        def __init__(self, device, enabled):
            tell("scaler", enabled=enabled)
            super().__init__(device, init_scale=16., enabled=True)

        def scale(self, loss):
            tell("loss", value=loss.detach().clone())
            return super().scale(loss)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)

    def parameters(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def before(optimizer, *_):
        tell("step", optimizer=type(optimizer), ids=[id(p) for p in parameters(optimizer)],
             rates={group["lr"] for group in optimizer.param_groups},
             before={id(p): p.detach().clone() for p in parameters(optimizer)},
             grad={id(p): kept(p.grad) for p in parameters(optimizer)})

    def after(optimizer, *_):
        told[-1].after = {id(p): p.detach().clone() for p in parameters(optimizer)}
    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    yield told
    for hook in hooks:
        hook.remove()


def the_next(told, kind, why):
    """Take the next event, which has to be of this kind; if not, the test says `why`."""
    assert told, f"{why}, but the run has ended (no more {kind})"
    event = told.pop(0)
    assert event.kind == kind, f"{why} ({kind}), but {event.kind} comes"
    return event


def check_start(told, flags, images, cams):
    """Step 0 -> the network that is scored first, or None with --quick. flags: seed, warm_up,
    weights (none, if not there) and quick."""
    check_seed(told, flags)
    first = None
    if not flags.get("quick"):
        first = the_next(told, "test", "the untrained network is scored")
    line = the_next(told, "line", "its scores are logged")
    assert (line.title, line.scores) == ("start", first.result if first else {})
    if "weights" not in flags:
        warm = the_next(told, "warm_up", "from random weights, a warm-up W")
        assert torch.equal(warm.images, images) and (warm.cams == cams).all()
        assert warm.epochs == flags["warm_up"]
        score = the_next(told, "test", "the warmed-up network is scored")
        line = the_next(told, "line", "its scores are logged")
        assert (line.title, line.scores) == ("warmed up", score.result)
    return first and first.model


def check_seed(told, flags):
    assert the_next(told, "seed_everything", "a run is seeded first").seed == flags["seed"]
    assert not the_next(told, "scaler", "then its scaler").enabled, "only fp16 is scaled"


def check_scaler(told, run, monkeypatch):
    """A run with --precision fp16 scales its gradients. Others: check_seed()."""
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "test", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [event.enabled for event in told if event.kind == "scaler"][-1], "fp16 is not scaled"


def check_features(told, images, trained):
    """Step 1 -> features (1 + parts, N, D) in float64. trained: name -> parameter, if not {}: the
    network that they are of."""
    seen = the_next(told, "extract_features", "step 1: features of all training images")
    assert torch.equal(seen.images, images), "step 1: not the training images as they are"
    if trained:
        same_weights(dict(seen.model.named_parameters()), trained, "step 1 is of another network")
    wanted = slow.encode(seen.model.double().eval(), common.normalise(images))[2].detach()
    found = seen.result.double().view_as(wanted)
    close(found, wanted, "step 1: not the network's features in evaluation mode, without "
          "augmentation", atol=1e-4, rtol=0)
    return found


def check_view(told, index, images, random, erase=.5):
    """5a -> a view of a batch: the images of index, augmented."""
    made = the_next(told, "augment", "5a: augmented images")
    assert torch.equal(made.images, images[index]), "5a: not the images of the batch"
    assert (made.jitter, made.erase, made.pad) == (.5 * random, erase, None), (
        "5a: colours are jittered if, and only if, the network starts from random weights")
    return made.result


def check_forward(told, view, splits, inside=False, parts=0, pooling="gem"):
    """5a -> the call: a network in training mode sees a view, in chunks."""
    ran = the_next(told, "forward", "5a: the network sees the batch")
    assert torch.equal(ran.images, view), "5a: not the augmented images"
    assert ran.model.training, "5a: not in training mode"
    assert ran.splits == splits, "5a: batch norm sees other chunks than --bn-splits says"
    assert (ran.inside, ran.model.parts, ran.model.pooling) == (inside, parts, pooling)
    return ran


def learning(ran, net, total, *more):
    """What check_step() needs: (name, id, gradient of the total loss) of each parameter of a
    network that ran, whose copy in float64 is net, and of more tensors: (name, id, tensor)."""
    each = [(name, id(real), p) for (name, p), real in
            zip(net.named_parameters(), ran.objects["model"].parameters())]
    each += more
    wanted = iter(torch.autograd.grad(total, [p for *_, p in each if p.requires_grad]))
    return [(name, real, next(wanted) if p.requires_grad else None) for name, real, p in each]


def rate(flags, turn, turns, step, iters):
    """The learning rate of a step in the turn-th of all epochs."""
    if flags["lr_drop"]:
        return flags["lr"] * .1 ** (turn // flags["lr_drop"])
    return flags["lr"] * (1 + np.cos(np.pi * (turn * iters + step) / (turns * iters))) / 2


def check_line(told, flags, epoch, trained, labels, means):
    """Step 6 -> the line. trained: name -> parameter; means: of the losses of the epoch."""
    scores = {}
    if (epoch + 1) % flags["eval_every"] == 0 or epoch + 1 == flags["epochs"]:
        score = the_next(told, "test", "step 6: scores")
        same_weights(dict(score.model.named_parameters()), trained, "scores of another network")
        scores = score.result
    line = the_next(told, "line", "step 6: a line of the log")
    assert (line.epoch, line.scores) == (epoch + 1, scores), "scores at another epoch"
    assert line.losses == pytest.approx(means, rel=1e-3), "logged losses are not the means"
    assert (line.keep["labels"] == labels).all(), "other labels are kept"
    same_weights(dict(line.keep["model"].named_parameters()), trained, "another network is kept")
    return line


def check_end(folder):
    """A run that has ended leaves its folder to others."""
    path = os.path.realpath(os.path.join(folder, "log.jsonl"))
    assert path not in common.LOCKS, "the run has not finished its log: the folder stays locked"


def check_step(step, parameters, moments, lr, decay=5e-4):
    """A step of Adam is that of the plain version. parameters: a list of (name, id, the gradient
    it should get, in float64); moments: name -> those of slow.adam()."""
    assert step.optimizer is torch.optim.Adam, "another optimiser than Adam"
    assert sorted(step.ids) == sorted(p for _, p, _ in parameters), (
        "the optimiser does not train every parameter of the network, and nothing else")
    assert len(step.rates) == 1 and step.rates.pop() == pytest.approx(lr, rel=1e-9, abs=1e-12), (
        "another learning rate than the schedule's")
    total = sum(float(g.square().sum()) for *_, g in parameters if g is not None) ** .5
    for name, p, wanted in parameters:
        got = step.grad[p]
        if wanted is None:
            assert got is None, f"{name} gets a gradient"
            continue
        assert got is not None, f"no gradient reaches {name}"
        error = float((got.double() - wanted).norm())
        assert error < 1e-2 * float(wanted.norm()) + 1e-4 * total, (
            f"the optimiser gets another gradient of {name} than that of the total loss of 5f "
            f"(wrong by {error:.3g}, its length is {float(wanted.norm()):.3g})")
        wanted = slow.adam(moments.setdefault(name, {}), step.before[p].double(), got.double(),
                           lr, decay)
        error = float((step.after[p].double() - wanted).abs().max())
        assert error < 2e-3 * lr + 1e-6, f"{name} is not stepped as Adam with weight decay does"


def stop_after(epoch, monkeypatch):
    """The next run is interrupted, once, when it has written this epoch."""
    write, stopped = common.Log.epoch, []

    def once(log, *args, **more):
        write(log, *args, **more)
        if more.get("epoch") == epoch and not stopped:
            stopped.append(epoch)
            raise KeyboardInterrupt
    monkeypatch.setattr(common.Log, "epoch", once)


def change_clusters(change, monkeypatch):
    """From now on change(n, labels) is what DBSCAN finds, labels in truth, in its n-th call."""
    kind, count = sklearn.cluster.DBSCAN, iter(range(99))

    class Changed(kind):
        def fit_predict(self, distance):
            return change(next(count), super().fit_predict(distance))
    monkeypatch.setattr(sklearn.cluster, "DBSCAN", Changed)


def collapse(calls):
    """-> what change_clusters() needs: outliers alone in these calls."""
    return lambda n, labels: np.full_like(labels, -1) if n in calls else labels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with 8 training and 4 test people, 3 cameras, 3 images each. Read only."""
    return draw(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Tests run in an empty folder: runs/ and data/ of the checkout are the reader's."""
    with pytest.MonkeyPatch.context() as only:
        only.chdir(tmp_path_factory.mktemp("here"))
        yield
