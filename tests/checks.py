"""What the tests of a hand-out, and the process that runs a submission, do: call a function on given
inputs, look at its result, say what is wrong with it. There are no answers here; handout.py
computes them, and copies this file into every hand-out.
"""

import contextlib
import importlib
import itertools
import json
import os
import sys
import traceback
import types
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

# ------------------------------------------------------------------------- how functions are called


class Net(torch.nn.Module):
    """A network for soft_labels(): images (B, D) are the pooled features, the neck a product."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, images, inside=False):
        neck = images @ self.weight
        return (images, neck) if inside else F.normalize(neck)


def sparse(dense):
    """(N, N) tensor -> sparse: zeros are stored, pairs at distance 1 are not."""
    rows, columns = np.nonzero(dense.numpy() < 1)
    return csr_array((dense.numpy()[rows, columns], (rows, columns)), dense.shape)


def dense(distance):
    """The inverse; an array or a tensor is taken too."""
    entries = csr_array(distance).tocoo()
    out = np.ones(entries.shape)
    out[entries.coords] = entries.data
    return out


def update_memory(function, memory, features, labels, momentum, k):
    function(memory := memory.clone(), features, labels, momentum, k)
    return memory


def pk_batches(function, labels, cams, p, k, iters):
    runs = []
    for seed in (1, 1, 2):
        batches = function(labels.numpy(), cams.numpy(), p, k, iters,
                           torch.Generator().manual_seed(seed))
        runs.append(np.array([*itertools.islice(batches, iters + 1)]))
    return np.array(runs)                                                         # (3, iters, p k)


def mixed_distance(function, views, k1, l1, *known):
    """Here common.jaccard_distance() looks its result up: it may be another blank."""
    def look_up(features, *_, **__):
        off = (views.double() - torch.as_tensor(features).double()).abs().sum((1, 2))
        return sparse(known[off.argmin()])
    with mock.patch("common.jaccard_distance", look_up):
        return dense(function(views, k1, l1))


def soft_labels(function, weights, views, classifiers, means, index, temp, splits):
    args = types.SimpleNamespace(temp=temp, bn_splits=splits, nets=len(weights))
    return function([Net(w) for w in weights], [*classifiers], [*views], means, index, args)


def follow(function, slow, fast, alpha):
    copies = [x.clone() for x in slow]
    function(iter(copies), iter(fast), alpha)
    return torch.stack(copies), fast


CALLS = {
    "common.cluster_means": lambda f, x, labels: f(x, labels.numpy()),
    "common.GeM": lambda f, x, p: torch.func.functional_call(f(), {"p": p}, (x,)),
    "common.jaccard_distance": lambda f, *inputs: dense(f(*inputs)),
    "ccsd.split_by_camera": lambda f, labels, cams: f(labels.numpy(), cams.numpy()),
    "sskd.adaptive_eps": lambda f, distance, rho: f(sparse(distance), rho),
    "common.update_memory": update_memory, "common.pk_batches": pk_batches,
    "mskd.mixed_distance": mixed_distance, "sskd.soft_labels": soft_labels, "sskd.follow": follow}


def observe(name, key, inputs):
    """Call a function of the pages beside this file -> dict: shapes and values of its results, or
    for "gradient1" the gradient of their weighted sum to input 1; or the error."""
    page, function = name.split(".")
    inputs = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    try:
        at = inputs[int(key[-1])].requires_grad_() if key.startswith("gradient") else None
        function = getattr(importlib.import_module(page), function)
        call = CALLS.get(name, lambda f, *inputs: f(*inputs))
        result = call(function, *inputs)
        result = result if isinstance(result, tuple) else (result,)
        if at is not None:
            linked = [x for x in result if torch.is_tensor(x) and x.requires_grad]
            total = sum((x.flatten() * torch.linspace(1, 2, x.numel())).sum() for x in linked)
            gradient = torch.autograd.grad(total, at, allow_unused=True)[0] if linked else None
            result = [torch.zeros_like(at) if gradient is None else gradient]
        arrays = [np.asarray(x.detach() if torch.is_tensor(x) else x, float) for x in result]
        return dict(shape=[list(x.shape) for x in arrays], values=[x.ravel().tolist()
                                                                  for x in arrays])
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and str(error).startswith(name):
            return dict(error="still a blank")
        frames = [x for x in traceback.extract_tb(error.__traceback__)
                  if os.path.dirname(x.filename) == HERE]
        where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
        message = " ".join(str(error).split())[:150]
        return dict(error=f"raised {type(error).__name__}: {message}{where * bool(frames)}")


def facts(key, inputs, seen):
    """What a check compares: all values, or what is true whatever was drawn or numbered."""
    arrays = [np.array(x, float).reshape(shape) for x, shape in zip(seen["values"], seen["shape"])]
    if key in ("groups", "table"):  # as (cluster, camera): groups may be numbered in any order
        groups, parent, camera, table = (x.astype(int) for x in arrays)
        chosen = groups if key == "groups" else table
        return np.where(chosen < 0, -1, 100 * parent[chosen] + camera[chosen])
    if key == "pairs":  # of different images
        return arrays[0] * (1 - np.eye(len(arrays[0])))
    if key in ("first result", "second result"):
        return arrays[key == "second result"]
    if key not in ("labels", "turns", "cameras", "repeats", "generator"):
        return np.concatenate([x.ravel() for x in arrays])
    labels, cams, p, k, _ = inputs                                 # of pk_batches
    runs = arrays[0].astype(int)
    if key == "generator":
        return np.array([(runs[0] == runs[1]).all(), (runs[0] != runs[2]).any()])
    labels, cams, rows = labels.numpy(), cams.numpy(), runs[0].reshape(-1, k)     # (iters p, k)
    of_row = labels[rows[:, 0]]
    if key == "labels":
        return np.array([(labels[rows] == of_row[:, None]).all(), of_row.min() >= 0, all(
            len(set(batch)) == p for batch in of_row.reshape(-1, p).tolist())])
    if key == "turns":
        turn = p * (len(set(labels[labels >= 0].tolist())) // p)
        return np.array([len(set(of_row[i:i + turn])) == turn
                         for i in range(0, len(of_row) - turn + 1, turn)])
    good = []
    for anchor, *others in rows:
        same = np.flatnonzero(labels == labels[anchor])
        away = same[cams[same] != cams[anchor]]
        may = away if len(away) else same[same != anchor] if len(same) > 1 else same
        good.append(set(others) <= set(may) if key == "cameras" else
                    len(set(others)) == len(others) or len(may) < len(others))
    return np.array(good)


def complaint(key, words, inputs, seen, wanted):
    """-> "" or what is wrong, in words for a student. `seen` may be anything."""
    error = seen.get("error") if isinstance(seen, dict) else "no readable result"
    if key == "Problem":
        return "" if str(error).startswith("raised Problem") else f"{words} ({error or 'no error'})"
    if error:
        return f"{words.split(':')[0]}: {error}"
    try:
        if seen["shape"] != wanted["shape"]:
            shapes = [", ".join(str(tuple(x)) for x in y["shape"]) for y in (seen, wanted)]
            return f"{words} (shape {shapes[0]} instead of {shapes[1]})"
        if key == "shape":
            return ""
        a, b = (facts(key, inputs, x).astype(float).ravel() for x in (seen, wanted))
        off = np.abs(a - b) > 1e-3 * np.abs(b) + 1e-4 * np.abs(b).max() + 1e-6
        off |= ~np.isfinite(a)
    except Exception:  # whatever a stranger's process wrote
        return f"{words} (the result cannot be read)"
    i = off.argmax()
    return f"{words} ({a[i]:.4g} instead of {b[i]:.4g})" if off.any() else ""


def score(checks, seen):
    """checks: (key, words, inputs, wanted) each; seen: of each -> points, complaints. What a
    function without any sense would get right, a shape, a zero, an error, counts only beside
    something else."""
    wrong = [complaint(*check[:3], x, check[3]) for check, x in zip(checks, seen)]
    real = [key not in ("shape", "Problem") and bool(np.abs(facts(key, inputs, wanted)).max() > 0)
            for key, _, inputs, wanted in checks]
    points = wrong.count("") if any(r and not w for r, w in zip(real, wrong)) else 0
    return points, [x for x in wrong if x]


def work(path):
    """In a process of its own: run the checks in a file, write a line of JSON before and after
    each function. Only this function can write to the output; prints go nowhere."""
    out, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name, checks in torch.load(path, weights_only=True).items():
        page = name.split(".")[0]
        if page not in sys.modules:
            print(json.dumps([page]), file=out, flush=True)
            with contextlib.suppress(Exception, SystemExit):  # observe() reports it
                importlib.import_module(page)
        print(json.dumps([name]), file=out, flush=True)
        seen = [observe(name, key, inputs) for key, inputs in checks]
        print(json.dumps([name, seen]), file=out, flush=True)
    os._exit(0)  # whatever still runs in a thread
