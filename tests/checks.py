"""What the tests of a hand-out and the process that runs a submission do: call a function of a page
on given inputs, look at its result, say what is wrong with it. No answers are here: handout.py
computes them, and copies this file into every hand-out.

A point is (words, inputs, wanted). The first of the words is its kind: `shape`, `gradient` (of all
inputs), or a name for values. A submission's process only calls; whoever grades looks.
"""

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

# -------------------------------------------------------- how functions are called -> array, arrays


def sparse(dense):
    """(N, N) tensor -> sparse: zeros are stored, pairs at distance 1 are not."""
    rows, columns = np.nonzero(dense.numpy() < 1)
    return csr_array((dense.numpy()[rows, columns], (rows, columns)), dense.shape)


def pairs(distance):
    """The inverse, for different images; an array or a tensor is taken too."""
    entries = csr_array(distance).tocoo()
    out = np.ones(entries.shape)
    out[entries.coords] = entries.data
    np.fill_diagonal(out, 0)
    return out


def update_memory(function, memory, *rest):
    memory = memory.detach().clone()
    function(memory, *rest)
    return memory


def follow(function, slow, fast, alpha):
    slow = [x.detach().clone() for x in slow]
    function(iter(slow), iter(fast), alpha)
    return torch.stack(slow)


def pk_batches(function, labels, cams, p, k, iters):
    """Twice with one seed, then with another -> (3, iters, p k)."""
    runs = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        batches = function(labels.numpy(), cams.numpy(), p, k, iters, generator)
        runs.append([np.asarray(x) for x in itertools.islice(batches, iters + 1)])
    return np.array(runs)


def mixed_distance(function, *inputs):
    """With another distance, of cosines: common.jaccard_distance() may be another blank."""
    def cosine_distance(features, *_, **__):
        unit = F.normalize(features)
        return sparse((1 - unit @ unit.T).clip(0, 1))
    with mock.patch("common.jaccard_distance", cosine_distance):
        return pairs(function(*inputs))


def soft_labels(function, weights, views, classifiers, means, index, temp):
    """Here the pooled features of a network are its images, and its neck is a product."""
    nets = [torch.nn.Module() for _ in weights]
    for net, weight in zip(nets, weights):
        net.forward = lambda x, inside=False, weight=weight: (x, x @ weight)
    args = types.SimpleNamespace(temp=temp, bn_splits=1, nets=len(nets))
    return function(nets, [*classifiers], [*views], means, index, args)


CALLS = {
    "common.cluster_means": lambda f, x, labels: f(x, labels.numpy()),
    "common.GeM": lambda f, x, p: torch.func.functional_call(f(), {"p": p}, (x,)),
    "common.jaccard_distance": lambda f, *inputs: pairs(f(*inputs)),
    "common.update_memory": update_memory, "common.pk_batches": pk_batches,
    "ccsd.split_by_camera": lambda f, labels, cams: f(labels.numpy(), cams.numpy()),
    "mskd.mixed_distance": mixed_distance,
    "sskd.adaptive_eps": lambda f, distance, rho: f(sparse(distance), rho),
    "sskd.soft_labels": soft_labels, "sskd.follow": follow}


def observe(name, words, inputs):
    """Call PAGE.FUNCTION of the pages beside this file -> dict: arrays, its results as lists, or
    the gradients of their weighted sum; or the error."""
    page, function = name.split(".")
    inputs = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    leaves = [x.requires_grad_() for x in inputs if words.startswith("gradient")
              and torch.is_tensor(x) and x.is_floating_point()]
    try:
        function = getattr(importlib.import_module(page), function)
        result = CALLS.get(name, lambda f, *inputs: f(*inputs))(function, *inputs)
        result = result if isinstance(result, tuple) else (result,)
        if leaves:
            total = sum((x.flatten() * torch.linspace(1, 2, x.numel())).sum() for x in result
                        if torch.is_tensor(x) and x.requires_grad)
            result = torch.autograd.grad(total + sum(0 * x.sum() for x in leaves), leaves)
        arrays = [np.asarray(x.detach() if torch.is_tensor(x) else x) for x in result]
        return dict(arrays=[x.tolist() for x in arrays])
    except (Exception, SystemExit) as error:
        if isinstance(error, NotImplementedError) and str(error).startswith(name):
            return dict(error="still a blank")
        frames = [x for x in traceback.extract_tb(error.__traceback__)
                  if os.path.dirname(x.filename) == HERE]
        where = "".join(f" ({os.path.basename(x.filename)}, line {x.lineno})" for x in frames[-1:])
        return dict(error=f"raised {type(error).__name__}: {' '.join(str(error).split())}{where}")


# ------------------------------------ looking: the arrays of a function -> those of a kind of point


def batches(kind, arrays, labels, cams, p, k, iters):
    """What is true of the batches, whatever was drawn."""
    y, v, (runs,) = labels.numpy(), cams.numpy(), arrays
    if kind == "shape":
        return [runs[0]]
    rows = runs[0].reshape(iters * p, k)
    label, turn = y[rows[:, 0]], len({*y[y >= 0]}) // p * p
    away = [np.flatnonzero((y == y[i]) & (v != v[i])) for i in rows[:, 0]]
    several = np.repeat([len({*x}) == p for x in label.reshape(iters, p)], p)
    return [dict(
        labels=(y[rows] == label[:, None]).all(1) & (label >= 0) & several,
        turns=[len({*label[i:i + turn]}) == turn for i in range(0, len(label), turn)],
        cameras=[len(x) == 0 or {*row[1:]} <= {*x} for x, row in zip(away, rows)],
        repeats=[len(x) < k - 1 or len({*row[1:]}) == k - 1 for x, row in zip(away, rows)],
        generator=[np.array_equal(*runs[:2]), not np.array_equal(*runs[1:])])[kind]]


def groups(kind, arrays, labels, cams):
    """Groups may be numbered in any order: they are judged by their cluster and camera."""
    if kind == "shape":
        return arrays
    y, v, (group, parent, camera, table) = labels.numpy(), cams.numpy(), arrays
    valid, name = y >= 0, 100 * parent + camera
    right = (100 * y + v)[valid]
    return [dict(groups=name[group[valid]] == right, outliers=group[~valid] == -1,
                 table=name[table[y[valid], v[valid]]] == right, unseen=table >= 0)[kind]]


LOOKS = {
    "common.pk_batches": batches, "ccsd.split_by_camera": groups,
    "common.average_precision": lambda kind, arrays, *_: (
        arrays if kind == "shape" else arrays[kind == "first":][:1]),
    "common.jaccard_distance": lambda kind, arrays, *_: (  # small ones count in `zeros` only
        arrays if kind in ("shape", "zeros") else [np.where(arrays[0] > 1e-5, arrays[0], 1)])}


def complaint(name, words, inputs, seen, wanted):
    """-> "" or what is wrong, in words for a student. `seen` may be anything."""
    kind = words.split(":")[0]
    try:
        error = "".join(filter(str.isprintable, seen.get("error", "")))[:200]
        if "error" in wanted:  # a Problem
            right = error.startswith(wanted["error"].split(":")[0])
            return "" if right else f"{kind}: {error}" if error else f"{words} (no error)"
        if error:
            return f"{kind}: {error}"
        arrays = [[np.asarray(x) for x in y["arrays"]] for y in (seen, wanted)]
        if name in LOOKS:
            arrays = [LOOKS[name](kind, x, *inputs) for x in arrays]
        shapes = [", ".join(str(np.shape(x)) for x in y) for y in arrays]
        if shapes[0] != shapes[1]:
            return f"{words} (shape {shapes[0][:99]} instead of {shapes[1]})"
        if kind == "shape":
            return ""
        a, b = (np.concatenate([np.ravel(x) for x in y]) for y in arrays)
        off = ~(np.abs(a - 1. * b) <= 1e-3 * np.abs(b) + 1e-4 * np.abs(b).max() + 1e-6)
        i = off.argmax()
        number = "no" if b[i] is np.True_ else f"{a[i]:.4g} instead of {b[i]:.4g}"
    except Exception:  # whatever a stranger's process wrote
        return f"{words} (the result cannot be read)"
    places = f" in {off.sum()} of {len(b)} places" * (len(b) > 1)
    return f"{words} ({number}{places})" if off.any() else ""


def work():
    """In a process of its own: for each function of {name: [(words, inputs)]} in inputs.bin, write
    a line of JSON to stderr before and after. What functions write there goes nowhere."""
    out, sys.stderr = sys.stderr, open(os.devnull, "w")
    for name, rows in torch.load("inputs.bin", weights_only=True).items():
        print(json.dumps([name, None]), file=out, flush=True)
        seen = [observe(name, words, inputs) for words, inputs in rows]
        print(json.dumps([name, seen]), file=out, flush=True)
    os._exit(0)  # whatever still runs in a thread
