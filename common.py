"""What the three pages share and no paper claims, in the order in which it is used.

  1 data sets    Split, load, read_data           a folder -> files, people, cameras
  2 images       read_images, augment             files -> uint8 tensor -> augmented batch
  3 batches      pk_batches                       P clusters x K images
  4 network      GeM, Encoder                     images -> unit features
  5 features     extract_features, nearest        all images -> features -> neighbours
  6 distance     jaccard_distance                 shared neighbours -> sparse distance
  7 clusters     dbscan                           distance -> pseudo labels
  8 memory       cluster_means, update_memory     what an image is compared with
  9 evaluation   test, evaluate                   mAP and CMC
Appendices: A starting from random weights, B speed, C data on disk, D command line, E logs and
  checkpoints, F several GPUs. No paper needs them.

Everywhere: N images in a split, B in a batch, C clusters, V cameras, D values in a feature, H x W
pixels. Feature rows have unit length. Row i of every per-image array belongs to split.paths[i]. The
label -1 marks an outlier. Distances lie in [0, 1]. Scores are fractions, printed in per cent. A
mistake of the user raises Problem: one line that says what is wrong and what to do.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.sparse import csr_array, vstack
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

HERE = os.path.dirname(os.path.abspath(__file__))
NOTEBOOK = "ipykernel" in sys.modules
progress = functools.partial(tqdm, leave=False, disable=False if NOTEBOOK else None)
# a bar, only on a terminal or in a notebook


class Problem(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, what to do."""


# ===================================================================================== 1 data sets


class Split(NamedTuple):
    """N images: their files, the people in them, the cameras that took them."""

    paths: list       # N file names
    pids: np.ndarray  # (N,) int64 person ids, -1: unknown; on a target they only score labels
    cams: np.ndarray  # (N,) int64 cameras, 0..V-1
    camera_names: list = ()  # (V,) what files and folders call them


def load(name, root="data", at_least=1, draw=True, few=False):
    """Read a data set -> train, query, gallery: a Split each, sorted by file name.

    name: a key of DATASETS, looked for below `root`, or a folder: one of TRIPLES, its training part
    alone, or own images (read_own). NAME:source and NAME:target read half of it (take_half). A file
    name starts with person and camera, 0002_c1...; person -1 is junk and dropped; person 0, a
    distractor in Market-1501, is a person like others and wrong for every other person's query.
    Cameras are renumbered 0..V-1. draw: draw a missing toy set. few: only some people (--quick).
    Raises Problem if files cannot be read or there are fewer than `at_least` training images.
    """
    name, root = os.fspath(name), os.fspath(root)
    half = None
    if name.endswith((":source", ":target")):
        name, half = name.rsplit(":", 1)
    folder, rows = from_rank_0(find_and_read, name, root, draw)
    rows = [[row for row in split if row[1] != -1] for split in rows]             # no junk
    if half:
        name, rows = f"{name}:{half}", take_half(rows, half)
    check_rows(name, folder, rows, at_least)
    rows = take_few(rows) if few else rows
    cameras = sorted({camera for split in rows for _, _, camera in split})
    splits = []
    for split in rows:
        people = [-1 if person is None else person for _, person, _ in split]
        cams = np.searchsorted(cameras, [camera for _, _, camera in split])
        splits.append(Split([path for path, _, _ in split], np.array(people, np.int64),
                            cams.astype(np.int64), cameras))
    sizes = [f"{kind} {len(split.paths):,} images of "
             + (f"{len(np.unique(split.pids)):,} ids" if split.pids.max() >= 0 else "unknown ids")
             for kind, split in zip(KINDS, splits) if split.paths]
    say(f"{name}: {folder}, {len(cameras)} cameras; {', '.join(sizes)}", sys.stderr)
    return splits


# ======================================================================================== 2 images

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # ImageNet's, per channel, of pixels in [0, 1]


def read_image(path, height, width):
    """Decode and resize (bicubic) a file -> (3, H, W) uint8. Raises Problem if that fails."""
    picture = open_image(path).resize((width, height), Image.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_images(split, height, width):
    """Decode every file once -> (N, 3, H, W) uint8 in main memory, 1.27 GB for Market-1501's
    training set at 256 x 128. Raises Problem that names files that are no images."""
    n, start = len(split.paths), 0
    check_memory(n, height, width)
    images = torch.empty(n, 3, height, width, dtype=torch.uint8)
    parts = n // 64 + 1
    read = read_ahead(split.paths, parts, height, width)
    for part in progress(read, "decoding images", parts):
        images[start:start + len(part)] = part
        start += len(part)
    return images


def read_data(args, device):
    """Read the data set of --data, --root and --size -> the training Split, its images, on the GPU
    if it has room, and the test set: query and gallery, whose files are decoded when scored."""
    train, query, gallery = load(args.data, args.root, args.batch_size, True, args.quick)
    if args.true_ids and train.pids.min() < 0:
        raise Problem(f"--true-ids: the ids of {args.data} are not known (leave it out)")
    if args.centre:
        warn_of_few(train.cams)
    return train, place(read_images(train, *args.size), device), (query, gallery)


def normalise(images):
    """(B, 3, H, W) uint8 -> float32, by ImageNet's mean and standard deviation."""
    mean, std = send(torch.tensor((MEAN, STD)), images.device)[:, :, None, None]  # (3, 1, 1) each
    return (images.float() / 255 - mean) / std


def augment(images, generator, pad=None, erase=.5, jitter=0.):
    """(B, 3, H, W) uint8 -> normalised float32; each image is changed at random, in this order.

    Flip with probability 1/2; pad with `pad` black pixels (10 at height 256, in proportion for
    others) and crop at random; with `jitter` > 0, change the colours; with probability `erase`,
    erase a rectangle. Random numbers come from the CPU `generator`: the same on every device.
    """
    b, _, h, w = images.shape
    pad = h // 24 if pad is None else pad
    u = send(torch.rand(b, 31, generator=generator), images.device)  # all random numbers
    out = flip_and_crop(images, pad, u[:, 0], u[:, 1], u[:, 2])
    if jitter:
        out = jitter_colours(out, jitter * (u[:, 6:11] - .5))
    mean, std = send(torch.tensor((MEAN, STD)), u.device)[:, :, None, None]       # (3, 1, 1) each
    out.sub_(mean).div_(std)
    erased = rectangles(h, w, u[:, 4], u[:, 5], u[:, 11:21], u[:, 21:31])         # (B, H, W)
    erased &= (u[:, 3] < erase)[:, None, None]
    return out.masked_fill_(erased[:, None], 0)  # 0 is the mean colour


def flip_and_crop(images, pad, flip, dy, dx):
    """(B, 3, H, W) uint8 -> float32 in [0, 1]; mirrored where flip >= 1/2 and shifted by up to
    `pad` pixels, with black at the borders. flip, dy, dx (B,) in [0, 1)."""
    b, _, h, w = images.shape
    y = torch.arange(h, device=images.device)
    x = torch.arange(w, device=images.device)
    mirrored = torch.where(flip[:, None] < .5, x, w - 1 - x)                      # (B, W)
    rows = y + (dy[:, None] * (2 * pad + 1)).long()                               # (B, H)
    columns = mirrored + (dx[:, None] * (2 * pad + 1)).long()                     # (B, W)
    pixel = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).flatten(1)   # (B, H W)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)           # (B, 3, padded H x padded W)
    moved = padded.gather(2, pixel[:, None].expand(-1, 3, -1))
    return moved.view(b, 3, h, w).float().div_(255)


def jitter_colours(images, draws):
    """Change each channel's gain, the contrast and the saturation. images (B, 3, H, W) in [0, 1];
    draws (B, 5): logarithms of the factors; 0 changes nothing."""
    factors = torch.exp(draws[:, :, None, None])
    gain, contrast, saturation = factors.split([3, 1, 1], 1)          # (B, 3, 1, 1), (B, 1, 1, 1)
    images.mul_(gain)
    images.mul_(contrast).add_(images.mean((1, 2, 3), True) * (1 / contrast - 1))
    images.mul_(saturation).add_(images.mean(1, True) * (1 / saturation - 1))
    return images.clamp_(0, 1)


def rectangles(h, w, top, left, share, stretch):
    """Random erasing (Zhong et al., AAAI 2020) -> (B, H, W) bool, a rectangle in every image.

    It covers 2 to 40 % of the image at an aspect ratio of 0.3 to 3.33. top, left (B,) and share,
    stretch (B, 10), for ten tries, are uniform in [0, 1); if no try fits, nothing is erased.
    """
    area = h * w * (.02 + .38 * share)
    aspect = .3 + (1 / .3 - .3) * stretch
    height = (area * aspect).sqrt().round()                                       # (B, 10)
    width = (area / aspect).sqrt().round()                                        # (B, 10)
    fits = (height < h) & (width < w)
    first = fits.float().argmax(1, keepdim=True)
    height = height.gather(1, first)                                              # (B, 1)
    width = width.gather(1, first)                                                # (B, 1)
    y0 = (top[:, None] * (h - height + 1)).floor()
    x0 = (left[:, None] * (w - width + 1)).floor()
    y = torch.arange(h, device=top.device)
    x = torch.arange(w, device=top.device)
    in_rows = (y >= y0) & (y < y0 + height) & fits.any(1, keepdim=True)           # (B, H)
    in_columns = (x >= x0) & (x < x0 + width)                                     # (B, W)
    return in_rows[:, :, None] & in_columns[:, None, :]


# ======================================================================================= 3 batches


def pk_batches(labels, cams, p, k, iters, generator):
    """Yield `iters` index tensors (p * k,): p labels with k images each, one label after the other.

    labels: (N,) int64; images with label -1 are never drawn. Labels are drawn in random order, each
    once before any repeats; the last ones, if fewer than p, are skipped. The first of the k images
    is uniform; the others come from other cameras than the first if there are any (cams=None: from
    any camera), and without repeats if there are enough. Raises Problem for fewer than p labels,
    and for one alone, which has nothing to be told from: losses would be 0.
    A label of one image fills k places with it: outliers as labels of their own fill most of a
    batch with copies. Leave them out, and put them into the memory only, as negatives.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    if len(members) == 1:
        raise Problem("1 cluster or person has nothing to be told from (take images of several "
                      "people, or lower --eps of clusters)")
    if len(members) < p:
        raise Problem(f"{len(members)} clusters or people are fewer than the {p} of a batch (lower "
                      f"--batch-size to at most {len(members) * k}, or change --eps of clusters)")
    order = []
    for _ in range(iters):
        if len(order) < p:
            order = torch.randperm(len(members), generator=generator).tolist()
        chosen, order = order[:p], order[p:]
        batch = []
        for images in (members[label] for label in chosen):
            anchor = images[torch.randint(len(images), (1,), generator=generator).item()]
            others = images[cams[images] != cams[anchor]] if cams is not None else images[:0]
            if len(others) == 0:
                others = images[images != anchor] if len(images) > 1 else images
            draw = torch.randperm(len(others), generator=generator)
            if len(others) < k - 1:
                draw = torch.randint(len(others), (k - 1,), generator=generator)
            batch += [anchor, *others[draw[:k - 1].numpy()]]
        yield torch.from_numpy(np.array(batch))


# ======================================================================================= 4 network


class GeM(nn.Module):
    """Generalised-mean pooling (Radenovic et al., TPAMI 2019): (B, D, h, w) -> (B, D). p = 1 is the
    average, a large p the maximum; p is learned."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


class Encoder(nn.Module):
    """Images (B, 3, H, W) float32 -> unit features (B, D); with parts > 0 (1 + parts, B, D).

    A torchvision ResNet with last stride 1, so that its last map is (H / 16, W / 16);
    "resnet18-layer3" ends before the last stage, "small" is a slim ResNet for the toy set. Then
    pooling ("gem" or "avg") and a neck: batch norm without bias (Luo et al., CVPRW 2019). With
    `parts`, the map is also cut into that many stripes, top to bottom, each with its own pooling
    and neck; the first feature is that of the whole map.
    weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a file in torchvision's format.
    """

    def __init__(self, arch="resnet50", weights="imagenet", parts=0, pooling="gem"):
        super().__init__()
        self.precision, self.recompute = "fp32", False  # set by on()
        self.width, build = ARCHS[arch]
        self.backbone = build(arch, weights)
        self.parts, self.pooling = parts, pooling
        self.pools = nn.ModuleList(
            GeM() if pooling == "gem" else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            for _ in range(1 + parts))
        self.necks = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(1 + parts))
        for neck in self.necks:
            neck.bias.requires_grad_(False)
        if arch != "small":  # the layout that is faster on a CPU and in half precision
            self.to(memory_format=torch.channels_last)

    def on(self, device, args):
        """-> self on the device, set as --precision and --recompute say (appendix B), with `size`,
        the height and width of images that are read for it."""
        self.precision, self.recompute, self.size = args.precision, args.recompute, args.size
        return self.to(device)

    def forward(self, images, inside=False):
        """inside=True: return the outputs of pooling and of the neck instead of unit features."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, half, enabled=self.precision != "fp32"):
            last = recomputed(self.backbone, images) if self.recompute else self.backbone(images)
        last = last.float()                                                       # (B, D, h, w)
        check_stripes(images.shape[2], last.shape[2], self.parts)
        views = [last, *(last.chunk(self.parts, 2) if self.parts else ())]
        pooled = [pool(view) for pool, view in zip(self.pools, views)]            # (B, D) each
        necks = [neck(x) for neck, x in zip(self.necks, pooled)]                  # (B, D) each
        features = [F.normalize(neck) for neck in necks]
        join = torch.stack if self.parts else lambda views: views[0]
        return (join(pooled), join(necks)) if inside else join(features)


def resnet_backbone(arch, weights):
    """-> a torchvision ResNet up to its last map, with the last stride 1 instead of 2."""
    import torchvision  # takes 3 s, which --help need not
    net = getattr(torchvision.models, arch.removesuffix("-layer3"))()
    if weights != "none":
        load_weights(net, arch, weights)
    block = net.layer4[0]
    for conv in (block.conv1, block.conv2, block.downsample[0]):
        conv.stride = (1, 1)
    left_out = ["avgpool", "fc"] + ["layer4"] * arch.endswith("-layer3")
    backbone = nn.Sequential()
    for name, module in net.named_children():
        if name not in left_out:
            backbone.add_module(name, module)
    return backbone


ARCHS = {  # --arch: D and a function (arch, weights) -> a module (B, 3, H, W) -> (B, D, h, w)
    "small": (256, lambda arch, weights: small_backbone(weights)),                # appendix A
    "resnet18": (512, resnet_backbone),
    "resnet18-layer3": (256, resnet_backbone),
    "resnet34": (512, resnet_backbone),
    "resnet50": (2048, resnet_backbone)}


def map_rows(arch, size):
    """-> h, the rows of the last map of images of that size (H, W); nothing is computed."""
    with torch.device("meta"):
        return ARCHS[arch][1](arch, "none").eval()(torch.empty(1, 3, *size)).shape[2]


def check_stripes(height, rows, parts):
    """Raises Problem if the map of an image of that height has no equal stripes, `parts` of them.
    """
    if parts and rows % parts:
        stride = 2 ** round(math.log2(height / rows))
        raise Problem(f"--size {height}: the network's map has {rows} rows, which cannot be cut "
                      f"into {parts} equal stripes (make the height a multiple of "
                      f"{parts * stride})")


# ====================================================================================== 5 features


@torch.no_grad()
def extract_features(model, images, batch_size=None):
    """(N, 3, H, W) uint8, or a Split, whose files are then read on the way -> (N, D) float32 on the
    model's device, in eval mode; with parts (1 + parts, N, D). Images need not fit on the device.
    Batches: 64 fit a CPU's caches."""
    device, training = next(model.parameters()).device, model.training
    images = images.paths if isinstance(images, Split) else images
    size, mine = batch_size or (64 if device.type == "cpu" else 256), my_share(images)
    batches = len(mine) // size + 1
    model.eval()
    parts = (mine.tensor_split(batches) if torch.is_tensor(mine)
             else read_ahead(mine, batches, *model.size))
    features, start = None, 0
    for part in progress(parts, "extracting features", batches):
        found = model(normalise(send(part, device)))
        if features is None:  # many small results beside freed batches would fragment main memory
            features = found.new_empty(*found.shape[:-2], len(mine), found.shape[-1])
        features[..., start:start + len(part), :] = found
        start += len(part)
    model.train(training)
    return gathered(features, len(images))


def global_features(model, images):
    """extract_features() without those of the parts -> (N, D)."""
    return extract_features(model, images)[0 if model.parts else ...]


def nearest(features, k, block=512):
    """-> (N, min(k, N)) int64: the k most similar images to each image, itself first. Exact; equal
    similarities are ranked by index. Works on `block` rows at a time."""
    k = min(k, len(features))
    search = bfloat16_search if bfloat16_pays(features, k) else exact_search  # appendix B
    search = search(features)
    blocks = my_share(torch.arange(len(features), device=features.device)).split(block)
    ranks = [search(rows, k).cpu() for rows in progress(blocks, "nearest neighbours")]
    return gathered(torch.cat(ranks), len(features)).numpy()


def exact_search(features):
    """-> a function (rows, k) -> (b, k): the k <= N nearest of each of the images `rows` (b,)."""
    def search(rows, k):
        similar = features[rows] @ features.T                                     # (b, N)
        similar[torch.arange(len(rows)), rows] = math.inf
        value, index = similar.topk(min(k + 1, len(features)))
        if k < len(features):  # if the k-th and the next are equal, the index decides
            tied = value[:, k - 1] == value[:, k]
            index[tied] = similar[tied].sort(descending=True, stable=True).indices[:, :k + 1]
        index = index[:, :k].sort().values
        order = similar.gather(1, index).sort(descending=True, stable=True).indices
        return index.gather(1, order)
    return search


# ====================================================================================== 6 distance

DUPLICATE = 1e-6  # distance of two images that share all neighbours; see zeros_on_diagonal()


def check_features(*features):
    """Raises Problem for features (N, D) that are not finite, or 0: all are equally near to it."""
    for rows in features:
        length = rows.norm(dim=1)
        if not length.isfinite().all():
            raise Problem("features are not finite: bad weights, or training diverged (lower --lr)")
        zero = int((length == 0).sum())
        if zero:
            raise Problem(f"{zero:,} of {len(rows):,} features are 0: equal images, or a network "
                          "that no longer tells images apart (other images, or lower --lr)")


def jaccard_distance(features, k1=30, k2=6, max_distance=1.):
    """k-reciprocal Jaccard distance (Zhong et al., CVPR 2017): (N, D) -> sparse CSR (N, N) float32.

    Two images are close if they share neighbours. Exact, in [0, 1]. Pairs that share none are at
    distance 1 and not stored, and neither are pairs farther apart than max_distance. The diagonal
    is stored, as 0; no other pair is below DUPLICATE. k1 counts the image itself (30 columns), as
    in ClusterContrast. Raises Problem for features that are not finite.
    """
    vectors, rows = neighbour_vectors(features, k1, k2), []
    blocks = len(features) // 256 + 1
    for shared in progress(overlaps(vectors, vectors), "Jaccard distance", blocks):
        shared.data = 1 - shared.data / (2 - shared.data)                         # J(i, j)
        keep = shared.data <= max_distance + 1e-4  # dbscan() widens eps a little
        ends = np.concatenate([[0], keep.cumsum()])[shared.indptr]
        rows.append(csr_array((shared.data[keep], shared.indices[keep], ends), shared.shape))
    distance = zeros_on_diagonal(vstack(rows, format="csr"))
    distance.sort_indices()
    return distance


def zeros_on_diagonal(distance):
    """In place: 0 on the diagonal, which is stored, at least DUPLICATE elsewhere -> the distance.
    For SciPy a stored 0 is no edge: its spanning tree drops it, and HDBSCAN then never ends."""
    distance.data = distance.data.clip(DUPLICATE)
    distance.setdiag(0)
    return distance


def neighbour_vectors(features, k1, k2=6):
    """-> sparse (N, N): each image's neighbours and how much each counts; rows sum to 1. The
    Jaccard distance compares two rows."""
    check_features(features)
    rank = nearest(features, k1)
    vectors = reciprocal_neighbours(rank, k1)
    vectors.data = np.exp(2 * cosines(features, vectors) - 2)
    return spread(vectors, rank, k2)


def reciprocal_neighbours(rank, k1):
    """The sets R* of k-reciprocal encoding (Zhong et al., CVPR 2017): a ranking from nearest() ->
    sparse (N, N), whose stored entries of row i are R*(i, k1).

    R(i, k), the k-reciprocal neighbours: i, and those among the first k others in its ranking that
    have i among theirs. R(i, k1) is extended to R*(i, k1) by R(c, k1/2) of each member c if more
    than 2/3 of that lies in R(i, k1).
    """
    def mutual(k):
        graph = first_columns(rank, k)
        return graph.multiply(graph.T)
    wide, close = mutual(k1 + 1), mutual(round(k1 / 2) + 1)
    accepted = (wide @ close.T).multiply(wide)  # for c in R(i, k1): |R(c, k1/2) in R(i, k1)|
    overlap, size = accepted.data, np.diff(close.indptr)[accepted.indices]
    accepted.data = (3 * overlap > 2 * size).astype(np.float32)
    accepted.eliminate_zeros()
    found = wide + accepted @ close
    found.sort_indices()
    return found


def spread(vectors, rank, k2):
    """The vectors V of k-reciprocal encoding: sparse (N, N) weights of neighbours -> sparse (N, N),
    each row scaled to sum 1, then the mean of the rows of its image's first k2."""
    vectors.data /= per_entry(vectors.sum(1), vectors)
    if k2 > 1:
        nearby = first_columns(rank, k2)
        nearby.data /= min(k2, rank.shape[1])
        vectors = nearby @ vectors
        vectors.sort_indices()
    return vectors


def overlaps(vectors, others, block=256):
    """Yield sparse sums over l of min(vectors[i, l], others[j, l]), for `block` rows i at a time.
    Only pairs (i, j) with a common l are computed, which keeps the distance sparse and exact."""
    columns = others.T.tocsr()
    for start in range(0, vectors.shape[0], block):
        rows = vectors[start:start + block]
        pairs = columns[rows.indices]           # for every entry (i, l) a row: all entries (j, l)
        pairs.data = np.minimum(pairs.data, per_entry(rows.data, pairs))
        gather = csr_array((np.ones_like(rows.data), np.arange(rows.nnz), rows.indptr),
                           (rows.shape[0], rows.nnz))
        yield gather @ pairs


def first_columns(rank, k):
    """(N, K) ranking -> sparse (N, N): 1 where j is among the first k of i."""
    first = rank[:, :k]
    indptr = np.arange(0, first.size + 1, first.shape[1])
    return csr_array((np.ones(first.size, np.float32), first.ravel(), indptr), (len(rank),) * 2)


def per_entry(values, matrix):
    """Repeat each row's value for all stored entries of that row of the CSR matrix."""
    return np.repeat(values, np.diff(matrix.indptr))


# ====================================================================================== 7 clusters


def dbscan(distance, eps, min_samples=4, at_least=2, instead=None, flag="--eps"):
    """DBSCAN (Ester et al., KDD 1996) on a sparse distance -> (N,) int64 labels, -1 = outlier.

    Pairs that are not stored are never neighbours; an image counts as its own neighbour. 1e-5 is
    added to eps: two images that share only s of their k2 neighbours have distance 1 - s / (2 k2 -
    s), and rounding must not decide on which side of eps that lies. If there are fewer than
    `at_least` clusters, returns the labels `instead` with a warning or, if there are none, raises
    Problem, which advises to change `flag`.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import sort_graph_by_row_values
    graph = sort_graph_by_row_values(distance, copy=True, warn_when_not_sorted=False)
    at_least = max(at_least, 2) if at_least else 0  # one cluster has nothing to be told from
    method = DBSCAN(eps=eps + 1e-5, min_samples=min_samples, metric="precomputed")
    labels = from_rank_0(method.fit_predict, graph).astype(np.int64)          # appendix F
    clusters = labels.max() + 1
    outliers = (labels < 0).sum()
    if clusters >= at_least:
        return labels
    what = (f"{clusters} clusters and {outliers:,} outliers among {len(labels):,} images at eps "
            f"{eps:.4g}, min_samples {min_samples}; a batch needs {at_least} clusters")
    if instead is not None:
        say(f"warning: {what}: training on the labels of the epoch before", sys.stderr)
        return instead
    advice = "raise" if 2 * outliers > len(labels) else "lower"
    raise Problem(f"{what}: {advice} {flag}, lower --batch-size, start from better features "
                  "(--weights imagenet), or bring --k1 near the images per person; after the first "
                  "epoch, --on-collapse skip keeps the labels of the epoch before")


# ============================================================================= 8 labels and memory


def renumber(labels):
    """(N,) labels with gaps -> 0..C-1 in the same order; -1 stays."""
    values, new = np.unique(labels, return_inverse=True)
    return new - (values[0] == -1)


def cluster_means(features, labels):
    """(..., N, D) features, (N,) labels 0..C-1 -> (..., C, D) unit means; -1 is left out."""
    labels = torch.from_numpy(labels).to(features.device)
    inside = labels >= 0
    sums = features.new_zeros(*features.shape[:-2], int(labels.max()) + 1, features.shape[-1])
    return F.normalize(sums.index_add_(-2, labels[inside], features[..., inside, :]), dim=-1)


@torch.no_grad()
def update_memory(memory, features, labels, momentum, k):
    """In place, image by image in the order of the batch: m_y <- unit(mu m_y + (1 - mu) f).

    memory (C, D), features (B, D); labels (B,): clusters of a batch of pk_batches(), or groups in
    them. The r-th images of all clusters differ in their labels, so they are updated in one step.
    """
    labels, features = labels.view(-1, k), features.view(-1, k, features.shape[1])
    for r in range(k):
        y, f = labels[:, r], features[:, r]
        memory[y] = F.normalize(momentum * memory[y] + (1 - momentum) * f)


def learning_rate(args, done, epochs):
    """--lr when `done` of all epochs are over, a fraction within one: a tenth after every --lr-drop
    epochs, or with --lr-drop 0 along half a cosine down to 0."""
    if args.lr_drop:
        return args.lr * .1 ** (int(done) // args.lr_drop)
    return args.lr * (.5 + .5 * math.cos(math.pi * done / epochs))


def label_quality(labels, pids):
    """How well pseudo labels (N,) match true ids (N,), which training never uses -> dict: clusters;
    outliers; ARI and NMI, each outlier as its own cluster; purity, the share of clustered images
    with the most frequent id of their cluster. Without ids, only the first two."""
    from sklearn import metrics
    inside = labels >= 0
    if (pids < 0).all():
        return dict(clusters=int(labels.max()) + 1, outliers=int((~inside).sum()))
    filled = np.where(inside, labels, labels.max() + 1 + np.arange(len(labels)))
    table = metrics.cluster.contingency_matrix(labels[inside], pids[inside], sparse=True)
    return dict(clusters=table.shape[0], outliers=int((~inside).sum()),
                ARI=float(metrics.adjusted_rand_score(pids, filled)),
                NMI=float(metrics.normalized_mutual_info_score(pids, filled)),
                purity=float(table.max(1).sum() / inside.sum()))


# ==================================================================================== 9 evaluation


def test(model, test_set):
    """-> the scores of a network's global feature on read_data()'s test set; {} if empty."""
    query, gallery = test_set
    if not query.paths:
        return {}
    features = [global_features(model, split) for split in test_set]
    return from_rank_0(evaluate, *features, query, gallery)


@torch.no_grad()
def evaluate(query_features, gallery_features, query, gallery, topk=(1, 5, 10), block=128):
    """Rank the gallery for every query -> dict mAP, rank1, rank5, rank10 (fractions), queries.

    Market-1501's rule: for each query, gallery images with both its person and its camera are
    ignored; queries without a right answer in another camera do not count. Features (Q, D) and
    (G, D). Raises Problem for features that are not finite.
    """
    check_features(query_features, gallery_features)
    similar = (rows @ gallery_features.T for rows in query_features.split(block))
    return score_ranking(similar, query, gallery, topk)


def score_ranking(similarities, query, gallery, topk=(1, 5, 10)):
    """evaluate() for similarities that are given for some queries at a time, (block, G)."""
    precision, first, start = [], [], 0
    for similar in similarities:
        rows = slice(start, start + len(similar))
        start = rows.stop
        similar = similar if similar.is_cuda else similar.cpu()  # MPS has no float64
        same_id = query.pids[rows, None] == gallery.pids
        same_cam = query.cams[rows, None] == gallery.cams
        right = send(torch.from_numpy(same_id & ~same_cam), similar.device)       # (block, G)
        ignored = send(torch.from_numpy(same_id & same_cam), similar.device)
        similar.masked_fill_(ignored, -math.inf)
        valid = right.any(1)
        if valid.any():
            AP, wrong = average_precision(similar[valid], right[valid])
            precision.append(AP)
            first.append(wrong)
    if not precision:
        raise Problem("no query has a right answer in another camera (check the file names)")
    precision, first = torch.cat(precision).cpu(), torch.cat(first).cpu()
    cmc = {f"rank{k}": (first < k).double().mean().item() for k in topk}
    return dict(mAP=precision.mean().item(), **cmc, queries=len(precision))


def average_precision(similar, right):
    """-> AP of each query, (b,) float64, and how many wrong answers precede its first right one.

    similar, right (b, G) on any device, with at least one right answer per query. AP is the mean of
    the precision at the ranks of the right answers, not interpolated: hits at ranks 1, 2, 4, 7 give
    0.8304 (the Matlab script's trapezoid: 0.8110). The n-th best right answer has rank n plus the
    number of wrong ones at least as similar (ties count as ahead), so sorted values are enough.
    """
    total = right.sum(1)
    nth = torch.arange(1, int(total.max()) + 1, device=total.device)
    valid = nth <= total[:, None]                                                 # (b, most)
    best = similar.new_full(valid.shape, -math.inf)
    best[valid] = similar[right]
    best = best.sort(1, descending=True).values                # the n-th best right answer

    def at_least_as_similar(answers):
        if answers.is_cuda:
            answers = answers.sort(1).values
        else:  # NumPy sorts several times as fast as PyTorch does on a CPU
            answers = torch.from_numpy(np.sort(answers.numpy(), 1))
        return answers.shape[1] - torch.searchsorted(answers, best)
    wrong = at_least_as_similar(similar) - at_least_as_similar(best)              # (b, most)
    precision = torch.where(valid, nth.double() / (nth + wrong), 0)
    return precision.sum(1) / total, wrong[:, 0]


# =========================================== Reading a paper, you can stop here: appendices follow


# ================================================================ A starting from random weights
# In none of the papers. It replaces ImageNet weights, so that the toy set needs no download.

FEW_IMAGES = 10  # cameras with fewer are not centred by their own mean


class InstanceBatchNorm(nn.Module):
    """IBN-a (Pan et al., ECCV 2018): instance norm on half of the channels removes style."""

    def __init__(self, width):
        super().__init__()
        self.instance = nn.InstanceNorm2d(width // 2, affine=True)
        self.batch = nn.BatchNorm2d(width - width // 2)

    def forward(self, x):
        a, b = x.split([self.instance.num_features, self.batch.num_features], 1)
        return torch.cat([self.instance(a), self.batch(b)], 1)


class SmallBlock(nn.Module):
    """The basic residual block of He et al. (CVPR 2016): (B, D, h, w) -> (B, width, ...)."""

    def __init__(self, width_in, width, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False),
                                  nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def small_backbone(weights):
    """-> a slim ResNet of 1.2 M parameters with IBN-a in stages 1 to 3. weights: "none"."""
    if weights != "none":
        raise Problem("--arch small has no ImageNet weights (say --weights none)")
    stages = [nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
    for width_in, width, stride in ((24, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)):
        norm = nn.BatchNorm2d if width == 256 else InstanceBatchNorm
        stages.append(SmallBlock(width_in, width, stride, norm))
    return nn.Sequential(*stages)


def warm_up(model, images, cams, generator, epochs=4, batch_size=96, lr=1e-3, temp=.1, jitter=.6):
    """Train `model` from random weights, without any label, until its features can be clustered.

    Instance discrimination: two augmented views of an image attract each other, views of other
    images of the SAME camera repel. With other cameras in the denominator, background and colour
    cast would solve the task (6.9 instead of 19.3 mAP in a first draft of the toy set).
    """
    device = next(model.parameters()).device
    cams = torch.from_numpy(cams).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    fp16 = getattr(model, "precision", "fp32") == "fp16"  # any network may be warmed up
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in progress(order.split(batch_size), f"warm-up {epoch + 1}/{epochs}"):
            batch = take(images, index, device)
            views = [augment(batch, generator, jitter=jitter) for _ in range(2)]
            features = model(torch.cat(views))                                    # (2 B, D)
            camera = cams[send(index, device)].repeat(2)
            twin = torch.arange(len(camera), device=device).roll(len(index))
            loss = 0
            for f in features if model.parts else [features]:
                logits = f @ f.T / temp                                           # (2 B, 2 B)
                logits.masked_fill_(camera[:, None] != camera, -math.inf)
                loss = loss + F.cross_entropy(logits.fill_diagonal_(-math.inf), twin)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            average_gradients(optimizer)
            scaler.step(optimizer)
            scaler.update()


def camera_means(features, cams):
    """(..., N, D) features, (N,) cameras -> (..., V, D): the mean feature of each camera or, if
    that has fewer than FEW_IMAGES, of all images: a mean of few holds much of each person."""
    cams = torch.from_numpy(cams).to(features.device)
    sums = features.new_zeros(*features.shape[:-2], int(cams.max()) + 1, features.shape[-1])
    sums.index_add_(-2, cams, features)
    count = torch.bincount(cams)
    means = sums / count.clamp(min=1)[:, None]
    few = count < FEW_IMAGES
    if few.any():
        means[..., few, :] = features.mean(-2, keepdim=True)
    return means


def warn_of_few(cams):
    """Say which part of --centre does not do what its name says."""
    few = (np.bincount(cams) < FEW_IMAGES).sum()
    if few:
        say(f"note: {few} of {cams.max() + 1} cameras have fewer than {FEW_IMAGES} images; "
            "--centre does not subtract their own mean, which would take the person away too, but "
            "that of all images", sys.stderr)


def centre_cameras(features, cams):
    """Subtract what the images of a camera have in common: (..., N, D) unit rows -> the same."""
    return F.normalize(features - camera_means(features, cams)[..., cams, :], dim=-1)


# ========================================================================================= B speed
# The same results, sooner or in less memory.


def precision(device, wanted):
    """--precision -> the one to use on a device: fp32, bf16 or fp16. auto: the fastest that a CUDA
    card computes, bf16 from compute capability 8.0 on (Ampere), fp16 from 7.0 on (it has matrix
    cores for it), fp32 on older cards and elsewhere. Where bf16 would be emulated, which is slower
    than fp32, auto decides instead, with a note."""
    best = "fp32"
    lacks = device.type == "cpu" and cpu_has_bfloat16() is False
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            best = "bf16"
        elif capability >= (7, 0):
            best = "fp16"
        lacks = best != "bf16"  # torch does not complain: it loops over the images of a batch
    if wanted == "auto":
        return best
    if wanted == "bf16" and lacks:
        kind = "GPU" if device.type == "cuda" else "CPU"
        say(f"note: this {kind} has no bfloat16, so --precision is {best}", sys.stderr)
        return best
    return wanted


MEMINFO = "/proc/meminfo"
ROOM = 14e9  # bytes for a step of ResNet-50 on 256 images in half precision, counted: activations
# take 12.1e9 (tests/RESULTS.md, A small GPU)


def place(images, device):
    """-> the images, moved to a GPU if that leaves ROOM there, or if they are few. If not, they
    stay in main memory, from which a batch of 256 is 25 MB."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.nbytes < max(free - ROOM, free / 16) else images


def check_memory(n, height, width):
    """Raises Problem if n images take more main memory than is free, which only Linux tells. Each
    rank keeps all images."""
    need = LOCAL * n * 3 * height * width / 1e9
    text = read_text(MEMINFO) if os.path.exists(MEMINFO) else ""
    found = re.search(r"MemAvailable: *(\d+)", text)
    free = int(found[1]) * 1024 / 1e9 if found else math.inf
    if need > free:
        raise Problem(f"{n:,} images of {height} x {width} take {need:.1f} GB of main memory, "
                      f"{free:.1f} are free (lower --size or close other programs)")


def read_ahead(paths, parts, height, width):
    """Yield the images of the files, (b, 3, H, W) uint8, in so many parts of nearly equal size.
    Threads decode the next two parts while the caller works on one. Raises Problem that names the
    files of a part that are no images."""
    ahead = collections.deque()
    with ThreadPoolExecutor() as pool:
        for part in [*np.array_split(np.arange(len(paths)), parts), (), ()]:
            ahead.append([pool.submit(read_image, paths[i], height, width) for i in part])
            if len(ahead) > 2:
                files = ahead.popleft()
                bad = [str(file.exception()) for file in files if file.exception()]
                if bad:
                    raise Problem(f"{len(bad)} images are no good: {'; '.join(bad[:5])} (remove "
                                  "these files or copy them again)")
                if files:
                    yield torch.stack([file.result() for file in files])


def send(tensor, device):
    """-> the tensor on the device; does not wait for a copy to CUDA."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def take(images, index, device):
    """-> images[index] on the device, wherever the images are; index is on the CPU."""
    return send(images[send(index, images.device)], device)


def recomputed(backbone, images):
    """backbone(images), whose activations are not kept but recomputed when the gradient needs them
    (Chen et al., arXiv 1604.06174): same numbers, less memory, a third slower."""
    if not (backbone.training and torch.is_grad_enabled()):
        return backbone(images)
    return checkpoint(backbone, images, use_reentrant=False, preserve_rng_state=False,
                      context_fn=lambda: (contextlib.nullcontext(), statistics_once(backbone)))


@contextlib.contextmanager
def statistics_once(model):
    """Within this context, batch norms do not update their running statistics a second time."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0., None
    try:
        yield
    finally:
        for norm, kept in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = kept


def cosines(features, matrix):
    """-> the cosine of images i and j for each stored entry (i, j) of the CSR matrix, float32."""
    row = per_entry(np.arange(matrix.shape[0]), matrix)
    cosine = np.empty(matrix.nnz, np.float32)
    pieces = matrix.nnz * features.shape[1] // 2**20 + 1  # of 2^20 numbers, which fit the cache
    for part in np.array_split(np.arange(matrix.nnz), pieces):
        i, j = (torch.from_numpy(ends[part]).to(features.device).long()
                for ends in (row, matrix.indices))
        cosine[part] = (features[i] * features[j]).sum(1).cpu().numpy()
    return cosine


@functools.cache
def cpu_has_bfloat16():
    """Has this CPU bfloat16 instructions? Linux says so, other systems do not: None. Without,
    a step of ResNet-18 takes twelve times as long as in float32 (tests/RESULTS.md, Scale)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) is not None
    except OSError:
        return None


def bfloat16_pays(features, k):
    """Are the features on a CPU that has bfloat16 instructions, and is k small?"""
    return bool(cpu_has_bfloat16()) and features.device.type == "cpu" and 2 * k < len(features)


def bfloat16_search(features):
    """exact_search(), 1.3 to 2.6 times faster: products of rounded features choose 2 k candidates,
    which are then compared in float32. The rounding error is bounded: if an image that was left out
    could be among the k best of a row, that row is searched again."""
    rough, again = features.bfloat16(), exact_search(features)
    # |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'| (Cauchy-Schwarz), plus the sum of D products
    error = torch.cat([(part - rounded).norm(dim=1) for part, rounded in
                       zip(features.split(512), rough.split(512))])               # (N,)
    length = 1.01 * features.norm(dim=1).max()
    bound = (error + error.max() + features.shape[1] * 2 ** -24 * length) * length

    def search(rows, k):
        value, index = (rough[rows] @ rough.T).topk(2 * k)                        # (b, 2 k)
        # no image that was left out is more similar: 2^-8 is the rounding of a bfloat16 product
        left_out = value[:, -1].float() + 2 ** -8 * value[:, -1].float().abs() + bound[rows]
        index, buffer = index.sort().values, features.new_empty(2 * k, features.shape[1])
        similar = torch.stack([torch.index_select(features, 0, near, out=buffer) @ features[row]
                               for row, near in zip(rows, index)])                # (b, 2 k)
        similar[index == rows[:, None]] = math.inf
        value, order = similar.sort(descending=True, stable=True)
        index, unsure = index.gather(1, order)[:, :k], value[:, k - 1] <= left_out
        if unsure.any():
            index[unsure] = again(rows[unsure], k)
        return index
    return search


# ================================================================================== C data on disk

DATASETS = {  # official folder names; published numbers of images in KINDS, without junk
    "market1501": (["Market-1501-v15.09.15"], (12936, 3368, 15913)),
    "msmt17": (["MSMT17_V1", "MSMT17_V2", "MSMT17_V2/MSMT17_V2"], (32621, 11659, 82161)),
    "cuhk03": (["cuhk03-np/detected", "cuhk03-np/labeled"], (None, 1400, None)),
    "personx": (["PersonX", "subset1"], (9840, 5136, 30816)),
    "veri776": (["VeRi"], (37778, 1678, 11579)),
    "dukemtmc": (["DukeMTMC-reID"], (16522, 2228, 17661)),  # withdrawn in 2019, see README
    "toy": ([], ()), "toy-source": ([], ())}                # drawn by tests/toy.py on first use
KINDS = ("train", "query", "gallery")
TRIPLES = (("bounding_box_train", "query", "bounding_box_test"),
           ("image_train", "image_query", "image_test"))
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 2 ** 25  # a pedestrian crop has about 2 ** 13; far more means a broken or hostile file


def find_and_read(name, root, draw):
    """-> the folder of a data set, and for each of KINDS a list of (path, person, camera)."""
    folders = [name]
    if name in DATASETS:
        official, _ = DATASETS[name]
        folders = [os.path.join(root, *parts) for parts in
                   ([name], *([name, f] for f in official), *([f] for f in official), [])]
    if draw and name in ("toy", "toy-source") and not os.path.isdir(folders[0]):
        draw_toy(folders[0], name)
    for folder in folders:
        for parts in TRIPLES:
            have = [part for part in parts if os.path.isdir(os.path.join(folder, part))]
            if len(have) == 3 or have == [parts[0]]:  # training images alone are enough to train
                return folder, [read_folder(folder, part) if part in have else [] for part in parts]
            if have:
                missing = ", ".join(part for part in parts if part not in have)
                raise Problem(f"{folder} holds {', '.join(have)} but not {missing} (put it there; "
                              "training images alone are enough to train without scores)")
        if os.path.isfile(os.path.join(folder, "list_train.txt")):
            return folder, read_msmt_lists(folder)
    found = next(filter(None, map(lies_below, folders)), None)
    if found:
        raise Problem(f"data set {name!r} not found in {', '.join(folders)}, but {found} looks "
                      f"like it (say --data {found}, or move it up)")
    if name not in DATASETS and os.path.isdir(name):
        return name, [read_own(name), [], []]
    remedy = "put it there, or say --root"
    if name not in DATASETS:
        remedy = f"unpack archives, and name a folder or one of {', '.join(DATASETS)}"
    raise Problem(f"data set {name!r} not found: no folder with {', '.join(TRIPLES[0])} in "
                  f"{', '.join(folders)} ({remedy})")


def draw_toy(folder, domain):
    """Draw a toy set with tests/toy.py."""
    program = os.path.join(HERE, "tests", "toy.py")
    if subprocess.run([sys.executable, program, folder, "--domain", domain]).returncode:
        raise Problem(f"the toy set could not be drawn into {folder} (see above, or say --root)")


def list_folder(folder):
    """-> the names in a folder, sorted, without hidden and system files."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Problem(f"{folder} cannot be read: {error} (change its rights)") from error
    return [name for name in names if not name.startswith(".")
            and name not in ("Thumbs.db", "desktop.ini", "__MACOSX")]


def lies_below(folder, levels=3):
    """-> a folder at most so many levels below that holds the training part of a data set."""
    names = list_folder(folder) if os.path.isdir(folder) else []
    if any(name in ("list_train.txt", *(parts[0] for parts in TRIPLES)) for name in names):
        return folder
    below = (os.path.join(folder, name) for name in names if not is_image(name))
    return next(filter(None, (lies_below(path, levels - 1) for path in below)), None
                ) if levels else None


def is_image(name):
    return name.lower().endswith(SUFFIXES)


def read_folder(home, part):
    """-> list of (path, person, camera), sorted by name; every file name must parse."""
    rows, wrong, folder = [], [], os.path.join(home, part)
    for name in list_folder(folder):
        match = re.match(r"(?i)(-1|\d{1,9})_c(\d{1,9})(?!\d)", name)
        if match and is_image(name):
            rows.append((os.path.join(folder, name), int(match[1]), int(match[2])))
        else:
            wrong.append(name)
    if wrong:
        raise Problem(f"{folder}: {len(wrong)} files or folders are not named <person>_c<camera>"
                      f"...jpg (png, bmp, webp, tif), the first: {', '.join(wrong[:5])} (rename or "
                      "move them)")
    check_files([path for path, _, _ in rows])
    return rows


LAY_OUT = ("put the images in one folder, in one per camera, called cam1, cam2 or cam_left, in one "
           "per person, or in person folders inside camera folders, and nothing else beside them")
PART = re.compile("(?i)(?<![a-z])((train|test|galler|quer|probe)|(val|valid|validation|eval|dev)"
                  "(?![a-z]))")  # words for parts of a data set, which are no people


def read_own(home):
    """The user's own images -> list of (path, person or None, camera).

    They lie in one folder, in one per camera (c1, cam_a, camera-left), in one per person, or in
    both kinds, one inside the other. File names may give person (0002_c1...) and camera (..._c1).
    Either counts only if it is known for all images. Prints what was understood. Raises Problem
    for other trees, and where folders and file names contradict each other.
    """
    files = list_tree(home)
    images = [parts for parts in files if is_image(parts[-1])]
    others = [os.path.join(*parts) for parts in files if not is_image(parts[-1])]
    left_out = f"{len(others)} files that are no JPEG, PNG, BMP, WebP or TIFF" + (
        f", the first: {others[0]}" if others else "")
    if not images:
        raise Problem(f"{home} holds neither {', '.join(TRIPLES[0])} nor images, but {left_out} "
                      f"(convert them, unpack archives, or {LAY_OUT})")
    if others:
        say(f"warning: {home}: left out: {left_out}", sys.stderr)
    paths = [os.path.join(home, *parts) for parts in images]
    check_files(paths)
    person_folders, camera_folders = read_levels(home, images)
    people = numbers_in_names(images, r"(?i)^(-1|\d{1,9})_c\d")
    cameras = numbers_in_names(images, r"(?i)(?:^|_)c(?:am)?(\d{1,9})(?!\d)")
    check_names(paths, person_folders, camera_folders, people, cameras)
    people, of_whom = known("person", people, person_folders, "no person ids: nothing is scored")
    cameras, by_which = known("camera", cameras, camera_folders, "no cameras: all count as one")
    say(f"{home}: {len(paths)} images, such as {os.path.join(*images[0])}: {of_whom}, {by_which}",
        sys.stderr)
    if people is person_folders and people:
        people = (1 + np.unique(people, return_inverse=True)[1]).tolist()
    people = people or [None] * len(paths)
    cameras = cameras or [0] * len(paths)
    return list(zip(paths, people, cameras))


def list_tree(home, above=()):
    """-> list of (folders below home ..., name) of all files, sorted. Raises Problem where folders
    lie too deep: a link that leads back to a folder above it has no end."""
    files, folder = [], os.path.join(home, *above)
    if len(above) > 4:
        raise Problem(f"{folder}: folders lie too deep, or a link leads back (name a folder nearer "
                      f"to the images, or remove the link; {LAY_OUT})")
    for name in list_folder(folder):
        if not is_image(name) and os.path.isdir(os.path.join(folder, name)):
            files += list_tree(home, (*above, name))
        else:
            files.append((*above, name))
    return files


def is_camera(folder):
    """Is a folder called like a camera: c1, c1s2, cam2, camA, cam_left, front_camera, view3, left?
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", folder)
    plain = r"(?i)(c|ch|channel|view)[ _-]?\d+(s\d+)?|left|right|front|back"
    return bool(re.fullmatch(plain, folder) or any(
        re.fullmatch(r"(?i)(\w*cam|camera|kamera)[a-z]?", word) for word in words))


def read_levels(home, images):
    """-> for every image its folder of a person, and that of a camera; None: there are no such
    folders. images: (folders below home ..., name). Raises Problem."""
    folders = sorted({parts[:-1] for parts in images}, key=lambda parts: (len(parts), parts))
    where = [os.path.join(home, *parts) for parts in folders]
    for parts in folders:
        for level, name in enumerate(parts):
            if PART.search(name):
                part = os.path.join(home, *parts[:level + 1])
                raise Problem(
                    f"{part} is called like a part of a data set and not like a camera or a person "
                    f"(to train on it alone: --data {part}; for scores too, name the folder of "
                    f"{', '.join(TRIPLES[0])}, with files such as 0002_c1_7.jpg: person, camera)")
    depth = len(folders[-1])
    if len(folders[0]) < depth:
        raise Problem(f"{home} holds images in {where[0]} beside those in {where[-1]} ({LAY_OUT})")
    if depth > 2:
        raise Problem(f"{home}: its images lie {depth} folders deep, the first in {where[0]} (name "
                      f"a folder nearer to them, or {LAY_OUT})")
    people, cameras = [], []
    for level in range(depth):
        names = [parts[level] for parts in images]
        others = [x for x, parts in zip(where, folders) if not is_camera(parts[level])]
        if not others:
            cameras.append(names)
        elif any(map(is_camera, names)):
            raise Problem(f"{home} holds images in {others[0]} beside those in folders such as "
                          f"{next(filter(is_camera, names))} ({LAY_OUT})")
        elif level or len({*names}) > 1:  # one folder around all images is no person
            people.append(names)
    if max(len(people), len(cameras)) > 1:
        raise Problem(f"{home}: which level of {where[0]} is the camera and which the person is "
                      f"not to be seen ({LAY_OUT})")
    return (people or [None])[0], (cameras or [None])[0]


def numbers_in_names(images, pattern):
    """-> the number that the pattern finds in each image's name, or None."""
    found = [re.search(pattern, parts[-1]) for parts in images]
    return [match and int(match[1]) for match in found]


def check_names(paths, person_folders, camera_folders, people, cameras):
    """Raises Problem where folders and file names of read_own() contradict each other."""
    for kind, folders, numbers in (("person", person_folders, people),
                                   ("camera", camera_folders, cameras)):
        pair = clash(folders, numbers)
        if pair:
            raise Problem(f"{paths[pair[0]]} and {paths[pair[1]]}: the folders are no {kind}s, if "
                          f"the file names are right (rename one of them: {LAY_OUT})")
    for path, folder, camera in zip(paths, camera_folders or (), cameras):
        number = re.search(r"\d+", folder)
        if camera is not None and number and int(number[0]) != camera:
            raise Problem(f"{path}: camera {number[0]} by the folder, {camera} by the file name "
                          "(rename one of them)")
    several = len({*(person_folders or ())}) > 1
    if several and None not in cameras and not clash(person_folders, cameras):
        raise Problem(f"{paths[0]}: every folder holds the images of one camera, by the file "
                      "names, so folders look like cameras and not like people (call them cam1, "
                      "cam2, or take the cameras out of the file names)")


def clash(folders, numbers):
    """-> two images of one folder with different numbers, or the other way round; or None. An image
    without a number contradicts nothing."""
    first = {}
    for i, pair in enumerate(zip(folders or (), numbers)):
        if None in pair:
            continue
        for side in (0, 1):
            j, other = first.setdefault((side, pair[side]), (i, pair))
            if other != pair:
                return j, i
    return None


def known(kind, numbers, folders, lack):
    """-> the person or camera of every image, its number in the names or else its folder, or None;
    and in words where the first image's comes from."""
    if None not in numbers:
        return numbers, f"{kind} {numbers[0]} from its name"
    if folders:
        return folders, f"{kind} {folders[0]} from its folder"
    given = len(numbers) - numbers.count(None)
    return None, f"{lack} ({given} of {len(numbers)} names give one)"


def read_msmt_lists(folder):
    """MSMT17's own layout: four list files; the camera is the third field of a file's name. Its
    person 0 is an ordinary person. Validation images are used in training too, as is usual."""
    def read(listing, *parts):
        part = next((p for p in parts if os.path.isdir(os.path.join(folder, p))), None)
        if part is None:
            raise Problem(f"{folder} has {listing} but no folder {' or '.join(parts)} (unpack it)")
        rows, listing = [], os.path.join(folder, listing)
        for line in sorted(filter(str.strip, read_text(listing).splitlines())):
            match = re.fullmatch(r"(\w+/[^_/]+_[^_/]+_(\d{1,9})_[^/\0]*) +(\d{1,9})\s*", line)
            if not match:
                raise Problem(f"{listing}: {line[:80]!r} does not read like "
                              "0000/0000_045_12_0303morning_0006_2.jpg 0 (correct the list)")
            rows.append((os.path.join(folder, part, match[1]), int(match[3]), int(match[2])))
        check_files([path for path, _, _ in rows])
        return rows
    train = ("train", "mask_train_v2")
    test = ("test", "mask_test_v2")
    return [read("list_train.txt", *train) + read("list_val.txt", *train),
            read("list_query.txt", *test), read("list_gallery.txt", *test)]


def read_text(path):
    """-> the content of a text file. Raises Problem if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error} (copy it again)") from error


def check_files(paths):
    """Raises Problem for paths that are no file nor a link to one: a pipe, a folder, a loop."""
    bad = [path for path in paths if not os.path.isfile(path)]
    if bad:
        raise Problem(f"{len(bad)} of {len(paths)} images cannot be read: not a file: "
                      f"{', '.join(bad[:5])} (remove them or copy them again)")


def take_half(rows, half):
    """-> half of a data set, to try domain adaptation with a single set. "source": the first half
    of the training people (shuffled with seed 0) in the first half of the cameras; "target": the
    other people in the other cameras. Test images: all people in the cameras of the half."""
    train, query, gallery = rows
    cameras = sorted({camera for split in rows for _, _, camera in split})
    people = {person for _, person, _ in train}
    if min(len(people), len(cameras)) < 2:
        raise Problem("NAME:source and NAME:target need two people, whose ids are known, and two "
                      f"cameras: here are {len(people)} and {len(cameras)} (leave out :{half})")
    people = np.random.default_rng(0).permutation(sorted(people))
    n = len(people) // 2
    v = len(cameras) // 2
    if half == "source":
        people, cameras = people[:n], cameras[:v]
    else:
        people, cameras = people[n:], cameras[v:]
    people = set(people.tolist())
    train = [row for row in train if row[1] in people]
    return [[row for row in split if row[2] in cameras] for split in (train, query, gallery)]


def take_few(rows, people=12, images=200):
    """-> some of a data set: the first people of training and of the test, with all of their images
    (no distractors); without ids, the first training images of every camera."""
    train, query, gallery = rows
    if any(person is None for _, person, _ in train):
        each = images // len({camera for _, _, camera in train})
        few, seen = [], collections.Counter()
        for row in train:
            seen[row[2]] += 1
            if seen[row[2]] <= max(1, each):
                few.append(row)
        return [few, query, gallery]
    trained = sorted({person for _, person, _ in train})[:people]
    tested = sorted({person for _, person, _ in query})[:people]
    return [[row for row in split if row[1] in chosen]
            for split, chosen in ((train, trained), (query, tested), (gallery, tested))]


def check_rows(name, folder, rows, at_least):
    """Warn if counts differ from the published ones; raise Problem for unusable splits."""
    _, published = DATASETS.get(name, ([], ()))
    train, query, gallery = rows
    for kind, split, count in zip(KINDS, rows, published or (None,) * 3):
        if not split and (kind == "train" or query or gallery):
            raise Problem(f"{folder}: the {kind} split holds no images (is the download complete?)")
        if count not in (None, len(split)):
            say(f"warning: {name} {kind}: {len(split):,} images in {folder}, {count:,} published",
                sys.stderr)
    asked = {person for _, person, _ in query}
    if asked and not asked.intersection(person for _, person, _ in gallery):
        raise Problem(f"{folder}: nobody in the query split is in the gallery (check both folders)")
    if len(train) < at_least:
        raise Problem(f"{folder}: {len(train)} training images are fewer than a batch of "
                      f"{at_least} (lower --batch-size)")


def open_image(path):
    """-> a decoded RGB image, turned as its EXIF orientation says; transparent pixels become white.
    Raises Problem for a file that is no image, far too large, or has more than 8 bits a channel."""
    try:
        with Image.open(path, formats=FORMATS) as picture:  # others may start programs
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels is no pedestrian crop")
            if picture.mode[0] in "IF":  # Pillow would cut off what is above 255
                raise ValueError(f"mode {picture.mode}; convert it to 8 bits a channel")
            picture.getexif()  # is kept: where a tag is damaged, writing it again would fail
            picture.info.pop("exif", None)
            picture = ImageOps.exif_transpose(picture)
            if "transparency" in picture.info or picture.mode[-1] in "Aa":
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise Problem(f"{path}: cannot be read as an image ({what_is(path) or error})") from error


KINDS_OF_FILES = {  # how files begin that are called .jpg and are none
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull", b"%PDF": "a PDF",
    b"<!DOCTYPE": "a web page, so the download failed",
    b"<html": "a web page, so the download failed",
    b"<?xml": "XML or SVG", b"%!PS": "PostScript", b"GIF8": "GIF", b"PK": "a zip archive",
    b"P5": "PGM", b"P6": "PPM", b"\0\0\0\x0cjP": "JPEG 2000", b"ftypavif": "AVIF",
    b"ftyp": "HEIC or a video"}


def what_is(path):
    """-> what a file that cannot be read is, judged by its first bytes, or ""."""
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip()
    except OSError as error:
        return error.strerror
    for mark, kind in KINDS_OF_FILES.items():
        if head.lower().startswith(mark.lower()) or mark in head[4:12] and mark[:4] == b"ftyp":
            return f"it is {kind}"
    return "" if head else "it is empty"


def load_weights(net, arch, weights):
    """--weights: "imagenet" or a FILE in torchvision's format -> into the whole ResNet `net`."""
    if weights == "imagenet":
        import torchvision
        url = torchvision.models.get_model_weights(arch.removesuffix("-layer3")).IMAGENET1K_V1.url
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
            raise Problem(f"cannot download {url} or read what was ({type(error).__name__}: "
                          f"{error}): put a whole file at {path}, or say --weights FILE or "
                          "--weights none") from error
    else:
        state = unwrapped(load_checkpoint(weights), weights)
    unused = ("fc.", "layer4.") if arch.endswith("-layer3") else ("fc.",)
    load_into(net, state, f"--weights {weights} does not fit --arch {arch}", unused)


def unwrapped(state, path):
    """A published file's content -> the state dict of its ResNet in torchvision's names: from one
    level down ("state_dict", "model"), without a common prefix ("module.", "backbone."). Heads
    are left out. Raises Problem if there is none."""
    first = "layer1.0.conv1.weight"
    levels = [state, *state.values()] if isinstance(state, dict) else []
    for level in levels:
        for name in level if isinstance(level, dict) else ():
            if str(name).endswith(first):
                prefix = name.removesuffix(first)
                ours = tuple(prefix + part for part in ("conv1.", "bn1.", "layer"))
                return {key.removeprefix(prefix): value for key, value in level.items()
                        if key.startswith(ours)}
    names = [str(name) for level in levels[::-1] if isinstance(level, dict) for name in level]
    raise Problem(f"{path} holds no ResNet in torchvision's format, with {first}; its names start "
                  f"with {', '.join(names[:3]) or 'nothing'} (choose another file)")


def load_into(module, state, what, unused=()):
    """Load a state dict. Raises Problem, starting with `what`, if it does not fit; names that start
    with one of `unused` are ignored."""
    try:
        missing, extra = module.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise Problem(f"{what}: {' '.join(str(error).split())[-200:]} (choose the right --arch or "
                      "another file)") from error
    wrong = [name for name in [*missing, *extra] if not name.startswith(tuple(unused))
             and not name.endswith("num_batches_tracked")]
    if wrong:
        raise Problem(f"{what}: {wrong[0]} is missing or left over (choose the right --arch or "
                      "another file)")


# ================================================================= D command line, seeds, devices

COMMAND_LINE = []  # filled by run()
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("fp32", "bf16", "fp16")
NO_NUMBER = {"out", "first_stage", "code", "root", "device", "eval_every", "resume", "on_collapse",
             "recompute"}  # flags and notes that do not change the results
SMALL_RUN = ("--arch resnet18-layer3 --size 128 64 --batch-size 64 --num-instances 4 --bn-splits 1 "
             "--lr-drop 0 --precision bf16 --centre")
ON_A_CPU = {page: f"{SMALL_RUN} {steps}" for page, steps in (  # measured: tests/RESULTS.md
    ("ccsd.py", "--eps .5 --epochs 40 --iters 200"),
    ("mskd.py", "--eps .5 --epochs 20 --iters 100"),
    ("sskd.py", "--eps .6 --epochs 20 --iters 100 --source-epochs 10 --nets 1 --alpha .9"))}
QUICK = dict(  # defaults of --quick
    epochs=2, iters=3, batch_size=16, num_instances=4, bn_splits=1, eval_every=2, warm_up=1,
    source_epochs=1, source_iters=3, nets=1, k1=10, eps=.6, on_collapse="skip")
SCHEDULE = dict(
    epochs=(int, 1, "epochs, each with a new clustering"), iters=(int, 1, "batches per epoch"),
    batch_size=(int, 2, "B = P x K images"), num_instances=(int, 1, "K, images per cluster"),
    lr=(float, 0, "learning rate of Adam; lower it when training diverges"),
    lr_drop=(int, 0, "divide lr by 10 every so many epochs; 0: cosine decay to 0"),
    bn_splits=(int, 1, "chunks of a batch, normalised separately as on that many GPUs"),
    eval_every=(int, 1, "epochs between evaluations"))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like all others. --help shows the first two paragraphs of
    a page's docstring and its commands."""

    def __init__(self, doc, **options):
        text, _, commands = doc.partition("\nRun\n")
        text = "\n\n".join([*text.split("\n\n")[:2], commands]).strip()
        super().__init__(
            usage="%(prog)s [flags]", description=text, allow_abbrev=False, **options,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100))

    def parse_known_args(self, args=None, namespace=None):
        """args: words, also paths and numbers. None: those of the command line, if run() started
        the program; a notebook's own are not meant for a page."""
        args = COMMAND_LINE if args is None else args
        return super().parse_known_args([str(word) for word in args], namespace)

    def error(self, message):
        raise Problem(f"{message} (--help explains every flag)")


def number(kind, low, high=10**9):
    """-> the type of a flag: an int or float from low to high."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is no {name} from {low} to {high:,}")
        return value
    return convert


def add_schedule_flags(parser, published):
    """Add the flags of the training schedule. published: dict of the values for real data."""
    add = parser.add_argument_group("schedule (default / published)").add_argument
    for name, (kind, low, text) in SCHEDULE.items():
        add(f"--{name.replace('_', '-')}", type=number(kind, low),
            help=f"{text} (%(default)s / {published[name]})")


def add_run_flags(parser, warm_up=True):
    """Add the flags about data, network and machine, which all pages have."""
    add = parser.add_argument_group("run").add_argument
    add("--data", default="toy",
        help=f"a folder or {', '.join(DATASETS)}; it sets the defaults of other flags; "
        "NAME:source, NAME:target: half of it (%(default)s)")
    add("--root", default="data", help="where data sets are (%(default)s)")
    add("--out", help="folder of the run (runs/, named after the flags that are not defaults)")
    add("--quick", action="store_true",
        help="try every step on a few people, in seconds: checks an edit or a data set; the "
        "scores mean nothing")
    add("--resume", action="store_true",
        help="continue after the last finished epoch in OUT, if there is one; if you name --out, "
        "--epochs may grow")
    add("--on-collapse", choices=("stop", "skip"), default="stop",
        help="with too few clusters: stop, or keep the labels of the epoch before (%(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed (%(default)s)")
    add("--device", default="auto", choices=DEVICES, help="(%(default)s)")
    add("--arch", choices=ARCHS, help="network (%(default)s)")
    add("--weights", help="imagenet, none, or a torchvision FILE (%(default)s)")
    if warm_up:
        add("--warm-up", type=number(int, 0), default=4,
            help="epochs without labels before the first clustering, with --weights none only "
            "(%(default)s)")
    add("--size", type=number(int, 32, 2048), nargs=2, metavar=("H", "W"),
        help="image size (toy set 96 48, published 256 128)")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="of the convolutions; auto: as the run in OUT began, or what suits the GPU; fp32 on "
        "a CPU (%(default)s)")
    add("--recompute", action="store_true", help="less memory, a third more time")
    add("--centre", action="store_true",
        help="subtract each camera's mean feature before clustering, which no paper does (always "
        "on with --weights none)")
    add("--true-ids", action="store_true", help="true ids instead of clusters: an upper bound")


def parse(parser, argv, method, settings, not_in_first_stage=()):
    """Parse argv, words or one line, with the defaults for its --data and check that the flags fit
    together. Adds `code`, hashes of the source files, and `first_stage`, the folder of the first
    stage, which the flags not_in_first_stage do not affect. Raises Problem."""
    argv = shlex.split(argv) if isinstance(argv, str) else argv
    defaults = set_defaults(parser, argv, settings)
    args = parser.parse_args(argv)
    check_flags(args)
    args.size = tuple(args.size)
    page = next(module for module in (sys.modules.get(method), sys.modules["__main__"])
                if getattr(module, "SETTINGS", None) is settings)
    args.code = {os.path.basename(module.__file__): running_code(module)
                 for module in (page, sys.modules[__name__])}
    if NOTEBOOK:
        words = COMMAND_LINE if argv is None else argv
        short_errors(vars(page), [str(word) for word in words])
    args.first_stage, args.out = folders_of(args, defaults, method, not_in_first_stage)
    if args.precision == "auto":  # a run goes on, and its stages are trained, in one precision
        found = [match[1] for folder in (args.out, args.first_stage)
                 for match in in_logs(folder, r'"precision": "(\w+)"')]
        args.precision = found[0] if found else "auto"
    args.centre = args.centre or args.weights == "none"  # not in the folder's name
    return args


def set_defaults(parser, argv, settings):
    """Give the parser the defaults for the --data of argv; for other folders market1501's or, with
    --weights none, the toy set's. -> what it would parse without flags."""
    early = Parser("", add_help=False)
    early.add_argument("--data", default="toy")
    early.add_argument("--weights")
    early.add_argument("--quick", action="store_true")
    early, _ = early.parse_known_args(argv)
    name = early.data.rsplit(":", 1)[0]
    like = name
    if name not in settings:
        like = "toy" if early.weights == "none" else "market1501"
    parser.set_defaults(**settings[like])
    if early.quick:
        known = [flag for flag in QUICK if parser.get_default(flag) is not None]
        parser.set_defaults(**{flag: QUICK[flag] for flag in known})
    defaults = parser.parse_args(["--data", early.data])
    if name not in settings:  # --weights none chose other settings
        defaults.weights = settings["market1501"]["weights"]
    return defaults


def check_flags(args):
    """Raises Problem for a batch that cannot be divided as the flags say."""
    if args.batch_size % args.num_instances or args.batch_size % args.bn_splits:
        raise Problem(f"--batch-size {args.batch_size} is no multiple of --num-instances "
                      f"{args.num_instances} and --bn-splits {args.bn_splits} (change one of them)")
    if args.batch_size // args.bn_splits < 2:
        raise Problem(f"--bn-splits {args.bn_splits} leaves batch norm one image (lower it)")
    if args.bn_splits % RANKS:
        raise Problem(f"--bn-splits {args.bn_splits} is no multiple of the {RANKS} processes of "
                      "torchrun (change one of them)")


def folders_of(args, defaults, method, not_in_first_stage):
    """-> the folders of the first stage and of the run: --out or, named after the flags, folders
    that hold no run of other code."""
    if args.out:
        return args.out, args.out
    first = run_folder(method, args, defaults, not_in_first_stage)
    out = run_folder(method, args, defaults)
    unedited = {folder: of_this_code(folder, args.code) for folder in dict.fromkeys((first, out))}
    return unedited[first], unedited[out]


def run_folder(method, args, defaults, ignored=()):
    """-> runs/METHOD-DATA-sSEED and every flag that differs from its default and is not ignored."""
    name = f"{method}-{os.path.basename(os.path.normpath(args.data))}-s{args.seed}"
    ignored = NO_NUMBER.union(ignored, ("data", "seed", "stage"))
    for flag, value in vars(args).items():
        if flag in ignored or value == getattr(defaults, flag):
            continue
        name += f"-{flag.replace('_', '-')}"
        if flag == "size":
            name += "-" + "x".join(map(str, value))
        elif isinstance(value, (int, float)):
            name += "" if value is True else f"{value:g}"
        else:
            name += f"-{value}"
    name = re.sub(r"[^\w.-]+", "-", name)
    if len(name) > 120:  # no file system takes all lengths; other flags must not share a folder
        name = f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return os.path.join("runs", name)


def running_code(module):
    """-> a hash of the code that runs: of the module's file and of what differs from it in memory,
    where functions or constants were replaced, or the file was edited and not loaded again, as
    happens in a notebook."""
    text = read_text(module.__file__)
    differs = []
    for name, in_file in described_file(module.__file__, text).items():
        value = getattr(module, name, None)
        own = getattr(value, "__module__", "") in (module.__name__, "__main__")
        if (own or NOTEBOOK or name.isupper()) and described(value) != in_file:
            differs.append((name, described(value)))
    if differs:
        say(f"note: {os.path.basename(module.__file__)} in memory differs from the file (edited "
            "after its import, or changed here); memory is what runs. To run the file: "
            "importlib.reload, or a new kernel", sys.stderr)
        text += str(differs)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.lru_cache
def described_file(path, text):
    """-> name -> described() of the functions, classes and constants of a module's file with this
    text; {} if it was saved in the middle of an edit."""
    try:
        found = runpy.run_path(path, run_name="file")
    except Exception:
        return {}
    return {name: described(value) for name, value in found.items() if name != "LOCKS" and (
        getattr(value, "__module__", "") == "file"
        or name.isupper() and isinstance(value, (int, float, str, tuple, dict)))}


def short_errors(page, words):
    """In a notebook: one line for a Problem and for an interrupt, as in a terminal."""
    shell = sys.modules["IPython"].get_ipython()

    def show(shell, kind, error, trace, **_):
        frames = [frame.f_globals for frame, _ in traceback.walk_tb(trace)]
        if not any(frame is page for frame in frames):
            shell.showtraceback((kind, error, trace))
        elif kind is Problem:
            print(f"error: {error}", file=sys.stderr)
        else:
            again = [word for word in words if word != "--resume"] + ["--resume"]
            print(f"\ninterrupted, finished epochs are kept; go on with: main({again})",
                  file=sys.stderr)
    shell.set_custom_exc((Problem, KeyboardInterrupt), show)


def described(value):
    """-> text that tells what a function or class does, or what a constant is. Other things have
    their address in it: better a new run than an old result."""
    if not inspect.isfunction(value):
        value = getattr(value, "__wrapped__", value)  # of functools.cache, staticmethod
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return str([described(part) for part in value])
    if isinstance(value, frozenset):
        return str(sorted(map(repr, value)))
    if inspect.isclass(value):
        return str([described(part) for part in vars(value).values()
                    if inspect.isfunction(part) or isinstance(part, staticmethod)])
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        cells = [x for x in cells if isinstance(x, (int, float, str, tuple))
                 or inspect.isfunction(x)]
        return str([described(value.__code__), value.__defaults__, value.__kwdefaults__,
                    described(tuple(cells))])
    if inspect.iscode(value):
        return str([value.co_code, value.co_names, value.co_varnames, described(value.co_consts)])
    return repr(value)


def in_logs(folder, pattern):
    """-> what matches the pattern first in the log of a run and in those of its stages."""
    logs = [os.path.join(folder, part, "log.jsonl") for part in ("", "teacher", "source/1")]
    found = [re.search(pattern, read_text(log)) for log in logs if os.path.exists(log)]
    return [match for match in found if match]


def of_this_code(folder, code):
    """-> the folder or, if it holds a run of other source code than `code`, another one."""
    found = in_logs(folder, r'"code": (\{[^}]*\})')
    edited = []
    for file, mark in code.items():
        if any(mark not in match[1] for match in found):
            edited.append(file)
    if not edited:
        return folder
    other = f"{folder}-{''.join(mark[:3] for mark in code.values())}"
    say(f"{' and '.join(edited)} edited since the run in {folder}: this one is in {other}",
        sys.stderr)
    return other


OUT_OF_MEMORY = "(?i)" + "|".join((  # what torch says, and what its libraries say instead
    "out of memory", "enough memory", "allocat", "bad_alloc", "alloc_failed",
    "(cublas|cudnn|cusolver)_status_(not_initialized|internal_error)",
    "unable to find (an engine|a valid cudnn algorithm)"))


def run(main, resume="--resume"):
    """Call main() as a program: a Problem becomes one line on stderr and exit code 2; Ctrl-C and
    SIGTERM become one line with the command that continues (with `resume`) and exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if it was closed
    sys.stdout = sys.stdout or sys.stderr
    try:
        COMMAND_LINE[:] = sys.argv[1:]
        return as_one(main)
    except Problem as problem:
        line, code = f"error: {' '.join(str(problem).split())}", 2  # file names can be odd
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # from a progress bar that was cut off
        print(file=sys.stderr)
        line, code = "interrupted", 130
        if resume:
            words = shlex.join([*(word for word in sys.argv if word != resume), resume])
            line += f", finished epochs are kept; go on with: {LAUNCH} {words}"
    except (MemoryError, RuntimeError) as error:  # torch raises the latter
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        words, code = str(error).partition("\n")[0][:90], 2
        line = f"error: out of memory, it seems: {words} (say --device cpu)"
        if resume:
            line = (f"error: out of memory, it seems: {words} (lower --batch-size or --size, "
                    "choose a smaller --arch, or keep less of a batch: --recompute, with larger "
                    "--bn-splits)")
    finally:
        for log in LOCKS.values():
            log.close()
        with contextlib.suppress(OSError):  # a pipe that nobody reads any more
            sys.stdout.flush()
    say("".join(c if c.isprintable() else "?" for c in line), sys.stderr)
    sys.exit(code)


def say(text, file=None):
    """Print a line; a closed pipe, a full device or a limited terminal must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(text, file or sys.stdout)


def pick_device(name):
    """One of DEVICES -> torch.device. Raises Problem if it is not available, or cannot compute: for
    old and very new GPUs this PyTorch may hold no kernels."""
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(kind for kind in have if have[kind]) if name == "auto" else name
    remedy = "say --device cpu, or install a PyTorch built for it"
    if not have[name]:
        raise Problem(f"--device {name}: this PyTorch sees none ({remedy})")
    device = join_ranks(torch.device(name))
    try:
        torch.ones(1, device=device).add(1)
    except RuntimeError as error:
        if re.search(OUT_OF_MEMORY, str(error)):  # run() says what to do
            raise
        words = str(error).partition("\n")[0]
        raise Problem(f"--device {name}: {words} ({remedy}: for cards older than 2018, pip install "
                      "torch torchvision --index-url https://download.pytorch.org/whl/cu126)"
                      ) from error
    return device


def seed_everything(seed):
    """Same seed, same machine, same numbers; on a GPU but for the last digits, because its threads
    add in any order. -> the CPU generator that draws batches and crops."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# ========================================================================== E logs and checkpoints

FORMAT = 4  # of last.pt; files of another format are refused
RESERVED = {"path", "arrays", "format", "parts", "pooling", "epoch", "scores", "images", "files",
            "lines", "seconds"}  # what last.pt holds besides flags and kept values
LOCKS = {}  # path -> open log of this process


class Means:
    """The mean of each loss term over an epoch, without waiting for the device at every step."""

    def __init__(self):
        self.history = {}

    def add(self, **terms):
        for name, term in terms.items():
            if torch.is_tensor(term):  # a term that is switched off is a plain 0
                self.history.setdefault(name, []).append(term.detach())

    def values(self, epoch):
        """-> dict of floats. Raises Problem when a term was not finite: the run diverged."""
        history = {name: torch.stack(terms).cpu() for name, terms in self.history.items()}
        bad = {name: (~terms.isfinite()).nonzero()[0].item() + 1
               for name, terms in history.items() if not terms.isfinite().all()}
        if bad:
            names = ", ".join(name for name, step in bad.items() if step == min(bad.values()))
            raise Problem(f"epoch {epoch}, iteration {min(bad.values())}: not finite: {names}; "
                          "training diverged (lower --lr; the last good epoch is kept)")
        return {name: terms.double().mean().item() for name, terms in history.items()}


class Log:
    """A run's folder: lines on the screen and in log.jsonl, the last finished epoch in last.pt.

    The log's first line holds versions, device, commit and every argument; last.pt holds all lines
    too, and the log is repaired from it. `finished`: the checkpoint of a run with nothing left to
    do, or None. `epochs`: the flag with the number of epochs; `free`: flags that may differ, and
    "code", for a folder of --sources, which is only read. Raises Problem for a folder that is in
    use, cannot be written, or holds a run with other flags or other source code or, without
    --resume, one that stopped early.
    """

    def __init__(self, folder, device, args, epochs="epochs", free=()):
        self.folder, self.args = folder, vars(args)
        self.path = os.path.join(folder, "log.jsonl")
        self.file, self.start, self.total = None, time.time(), self.args[epochs]
        self.files = ""
        self.device, self.began, self.rounds = torch.device(device), None, 0
        state = from_rank_0(self._read, epochs, free)
        if not state or state["epoch"] < self.total:
            from_rank_0(self._lock)
            state = from_rank_0(self._read, epochs, free)  # again, now that nobody else writes
        if state and state["epoch"] < self.total and not args.resume:
            raise Problem(f"{folder} holds a run that stopped after epoch {state['epoch']} of "
                          f"{self.total} (go on with --resume, choose another --out, or delete its "
                          "last.pt)")
        self.state, self.finished, self.lines = state, None, [header(device, self.args)]
        if state:
            self.start, self.lines = self.start - state["seconds"], state["lines"]
            from_rank_0(self._write)
            if state["epoch"] == self.total:
                if "code" not in free:
                    self._check_data("source" if epochs == "source_epochs" else "data", state)
                self.finished = state
                say(f"{folder}: finished before on {state['images']:,} images, nothing to do"
                    + in_words(state["scores"]))

    def _read(self, epochs, free):
        """-> the checkpoint in the folder, or None. Raises Problem if its source code differs from
        the present one, or a flag that affects the results; only --epochs may be larger now."""
        path = os.path.join(self.folder, "last.pt")
        if not os.path.lexists(path):
            return None
        flags = [flag for flag in self.args if flag not in NO_NUMBER.union(free)]
        state = load_run(path, *flags)
        if state["epoch"] not in range(state[epochs] + 1):
            raise Problem(f"{path} was not written by these pages (choose another --out)")
        grows = state[epochs] < self.args[epochs]
        other = [f"--{flag.replace('_', '-')} {state[flag]}, now {self.args[flag]}"
                 for flag in flags if state[flag] != self.args[flag]
                 and not (flag == epochs and grows)]
        if other:
            flag = "--sources" if "code" in free else "--out"
            raise Problem(f"{path} is of a run with other flags: {'; '.join(other)} (say the same, "
                          f"choose another {flag}, or delete that file alone)")
        edited = [name for name, mark in self.args.get("code", {}).items()
                  if mark != state["code"].get(name) and "code" not in free]
        if edited and not self.args["resume"]:
            raise Problem(f"{path} is of a run before {' and '.join(edited)} was edited (choose "
                          "another --out, or go on with the edited code: --resume)")
        if edited and self.file is None:
            say(f"warning: {self.folder}: {' and '.join(edited)} was edited since this run began",
                sys.stderr)
        return state

    def _lock(self):
        """Open the log and lock it. The lock ends with the process, even after kill -9; a later run
        in the same process, as in a notebook, takes it over."""
        name = os.path.realpath(self.path)
        try:
            os.makedirs(self.folder, exist_ok=True)
            if name in LOCKS:
                LOCKS.pop(name).close()
            LOCKS[name] = self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise Problem(f"{self.folder} cannot be written: {error} (choose another --out)"
                          ) from error
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Problem(f"{self.folder} cannot be written: another process is writing there "
                          "(choose another --out)") from error
        except OSError as error:  # some file systems of clusters have no locks
            say(f"note: {name} cannot be locked here ({error.strerror}); do not start two runs in "
                "this folder", sys.stderr)

    def _write(self):
        """Make the log file equal to self.lines: cut off what differs, append what is missing."""
        old = read_text(self.path).encode() if os.path.exists(self.path) else b""
        new = "".join(self.lines).encode()
        same = len(os.path.commonprefix([old, new]))
        if same == len(old) == len(new):
            return
        if self.file is None:  # of a finished run
            self._lock()
        try:
            self.file.truncate(same)
            if self.file.write(new[same:]) < len(new) - same:
                raise OSError("the disk is full")
        except OSError as error:
            self.file.truncate(same)
            raise Problem(f"{self.path} cannot be written: {error} (free some space, then go on "
                          "with --resume)") from error

    def _check_data(self, flag, state):
        """Raises Problem if the data set of a finished run has other images now. If it is not there
        any more, the run is shown all the same."""
        try:
            train, *_ = load(self.args[flag], self.args["root"], 1, True, self.args["quick"])
        except Problem:
            return
        self._check_files(train, state)

    def _check_files(self, train, state):
        if (state["images"], state["files"]) != (len(train.paths), names_of(train)):
            raise Problem(f"{self.folder} is of a run on {state['images']} training images, now "
                          f"there are {len(train.paths)}, or their names are others (restore the "
                          "data set, or choose another --out)")

    def restore(self, train, **parts):
        """--resume: load the checkpoint's state into `parts`: modules, optimisers and generators.

        train: the Split that is trained on. -> dict of the rest: epoch, the number of finished
        epochs, and what epoch() was told to keep, arrays as arrays; {} in a new run. Raises Problem
        if a part or the names of the images do not fit.
        """
        self.files = names_of(train)
        state, self.state = self.state, None
        if not state:
            return {}
        self._check_files(train, state)
        try:
            for name, part in parts.items():
                load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                load(state.pop(name))
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Problem(f"{self.folder} cannot be resumed: its last.pt holds no fitting {name} "
                          "(choose another --out)") from error
        return {key: value.numpy() if key in state["arrays"] else value
                for key, value in state.items()}

    def steps(self, batches, title, iters):
        """Yield (step, index) of the `iters` batches of an epoch, with a bar on a terminal. In the
        first epoch, after a few batches, say how long a long run will take."""
        first, self.began = self.began is None, self.began or time.time()
        for step, index in enumerate(progress(batches, title, iters)):
            if step == 2:
                start = time.time()
            if first and step == min(12, iters - 1) > 2:
                hours = (time.time() - start) / (step - 2) * iters * self.total / 3600
                page = next(iter(self.args["code"]))
                advice = ""
                if hours > 3 and self.device.type == "cpu":
                    advice = f"; for a CPU, much smaller: {ON_A_CPU.get(page, ON_A_CPU['ccsd.py'])}"
                if hours > .2:
                    say(f"about {hours:.1f} hours of training steps for {self.total} epochs"
                        + advice, sys.stderr)
            yield step, index

    def epoch(self, title, quality=None, losses=None, scores=None, keep=None, epoch=0, **more):
        """Print a line and log it as JSON; what is not given is left out.

        keep: dict of what --resume and eval.py need, with `model` and `labels`: modules,
        optimisers, generators, arrays, plain values. The checkpoint is written first and holds the
        line, so a stop between the two loses nothing. Raises Problem for non-finite weights.
        """
        seconds = time.time() - self.start
        groups = dict(quality=quality, losses=losses, scores=scores)
        record = dict(title=title, epoch=epoch)
        record.update((name, value) for name, value in {**more, **groups}.items()
                      if value not in (None, {}))
        self.lines.append(json.dumps(dict(record, seconds=round(seconds, 2))) + "\n")
        if keep:
            self._save(title, keep, epoch, scores or {}, seconds)
        from_rank_0(self._write)
        text = [f"{title:>12}"]
        if quality:
            text.append(f"{quality['clusters']:5d} clusters {quality['outliers']:6d} outliers"
                        + "".join(f"  {name} {quality[name]:.3f}" for name in ("ARI", "purity")
                                  if name in quality))
        if losses:
            text.append("  ".join(f"{name} {value:6.3f}" for name, value in losses.items()))
        left = ""
        if self.began and keep and epoch < self.total:
            self.rounds += 1
            minutes = (time.time() - self.began) / self.rounds * (self.total - epoch) / 60
            left = f", {minutes:.0f} min left" if minutes >= 1.5 else f", {60 * minutes:.0f} s left"
        say(" | ".join(text) + in_words(scores) + f" | {seconds:6.0f} s{left}")

    def _save(self, title, keep, epoch, scores, seconds):
        """Write last.pt."""
        taken = (RESERVED | self.args.keys()) & keep.keys()
        if taken:
            raise Problem(f"keep={', '.join(taken)}: last.pt holds something else of that name "
                          "(call it otherwise)")
        state = {name: to_keep(value) for name, value in keep.items()}
        bad = [name for name, value in state.items()
               if not all(x.isfinite().all() for x in tensors_in(value))]
        if bad:
            raise Problem(f"{title}: weights are not finite, in {', '.join(bad)}: training "
                          "diverged (lower --lr; the last good epoch is kept)")
        arrays = [name for name, value in keep.items() if isinstance(value, np.ndarray)]
        state.update(self.args, arrays=arrays, format=FORMAT, parts=keep["model"].parts,
                     pooling=keep["model"].pooling, epoch=epoch, scores=scores,
                     images=len(keep["labels"]), files=self.files, lines=self.lines,
                     seconds=seconds)
        from_rank_0(save_checkpoint, os.path.join(self.folder, "last.pt"), **state)

    def finish(self, scores, train, labels):
        """End a run -> scores. Without scores, write clusters.csv: file, cluster (-1: an outlier)
        and camera, as files or folders call it, of every training image. The folder is unlocked."""
        if not scores and RANK == 0:
            cameras = [train.camera_names[camera] for camera in train.cams]
            rows = zip(train.paths, labels.tolist(), cameras)
            path = os.path.join(self.folder, "clusters.csv")
            with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([("file", "cluster", "camera"), *rows])
            say(f"the cluster of every image: {path}")
        say(f"look at it: python eval.py {shlex.quote(self.folder)} --report")
        if RANK == 0:
            LOCKS.pop(os.path.realpath(self.path)).close()
        return scores


def names_of(split):
    """-> a hash of the images' names below their common folder, which may move."""
    home = os.path.commonpath(split.paths)
    names = sorted(os.path.relpath(path, home) for path in split.paths)
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def to_keep(value):
    """-> what last.pt holds of a value that epoch() keeps."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.state_dict() if hasattr(value, "state_dict") else value


def tensors_in(value):
    """-> all tensors in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in tensors_in(part)]
    return [value] if torch.is_tensor(value) else []


def in_words(scores):
    """-> " | mAP  77.9  R1  88.8", or nothing without scores."""
    return f" | mAP {100 * scores['mAP']:5.1f}  R1 {100 * scores['rank1']:5.1f}" if scores else ""


def header(device, args):
    """-> the first line of a log."""
    try:
        git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], text=True,
                             capture_output=True)
    except OSError:  # no git here
        git = None
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    torchvision=version("torchvision"), sklearn=version("scikit-learn"))
    return json.dumps(dict(args=args, device=str(device), ranks=RANKS,
                           threads=torch.get_num_threads(),
                           commit=git.stdout.strip() if git else "", **versions)) + "\n"


def save_checkpoint(path, **state):
    """Write plain values and tensors atomically: a reader sees the old file or the new one. Raises
    Problem, and keeps the old file, if that fails or the new one could not be read again."""
    draft, content = f"{path}.tmp", io.BytesIO()
    try:
        torch.save(state, content)
        content.seek(0)
        torch.load(content, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise Problem(f"{path} could not give back what is to be kept ({type(error).__name__}; "
                      "keep arrays and tensors of numbers, and plain values: float(x))") from error
    kept = "; the earlier file is kept" if os.path.exists(path) else ""
    try:
        with open(draft, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise Problem(f"{path} cannot be written: {error} (free some space or choose another --out"
                      f"{kept})") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(draft)


def load_checkpoint(path, keys=()):
    """-> the dict that save_checkpoint wrote; nothing in it is ever executed. Raises Problem for
    other files, for damaged ones, and for one that lacks some of `keys`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror} (name a finished run's folder, its "
                      "last.pt, or a file of weights)") from error
    except Exception as error:  # torch raises many kinds; each means a useless file
        raise Problem(f"{path} is no checkpoint of tensors and plain values, or damaged, so it is "
                      f"not read ({type(error).__name__}; choose another file)") from error
    lacking = [key for key in keys if not isinstance(state, dict) or key not in state]
    if lacking:
        raise Problem(f"{path} has no {', '.join(lacking[:5])}: it is of another kind, or was "
                      "written by an older version of these pages (choose another file, or train "
                      "again into another --out)")
    return state


def load_run(path, *keys):
    """-> the dict of a run's last.pt. Raises Problem for any other file."""
    kinds = dict(format=int, model=dict, arch=str, parts=int, pooling=str, size=tuple, data=str,
                 root=str, epoch=int, epochs=int, scores=dict, lines=list, seconds=float,
                 precision=str, images=int, files=str, code=dict, arrays=list)
    state = load_checkpoint(path, (*kinds, *keys))
    ours = all(isinstance(state[key], kind) for key, kind in kinds.items())
    if not ours or state["format"] != FORMAT or state["arch"] not in ARCHS:
        raise Problem(f"{path} was not written by these pages (choose another file, or --out)")
    return state


def load_encoder(path):
    """A run's folder, or its last.pt -> the network on the CPU in eval mode, with `size`, the
    height and width of its images, and the checkpoint's dict. Raises Problem for other files."""
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    state = load_run(path)
    model = Encoder(state["arch"], "none", state["parts"], state["pooling"])
    load_into(model, state["model"], f"{path} holds no network of --arch {state['arch']}")
    model.size = state["size"]
    return model.eval(), state


def embed(model, files):
    """Features of image files, one or several, from a network of load_encoder() -> (len(files), D),
    unit rows, so that the product of two rows is the similarity of two images, from -1 to 1."""
    files = [files] if isinstance(files, (str, os.PathLike)) else files
    files = [os.fspath(file) for file in files]
    if not files:
        raise Problem("no image files are named (look at the folder and the pattern)")
    return global_features(model, Split(files, None, None))


# ================================================================================== F several GPUs
# `torchrun --nproc-per-node 4 ccsd.py` starts the page four times: four ranks, a GPU each. All draw
# the same batches, keep all images, features and memories, and compute the same losses. They divide
# the chunks of a batch, the extraction and the search for neighbours among them; rank 0 makes
# files, labels and scores. Without torchrun these functions change nothing.

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK, RANKS, LOCAL = (int(os.environ[name]) if TORCHRUN else plain for name, plain in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
LAUNCH = f"torchrun --nproc-per-node {LOCAL}" if TORCHRUN else "python"


def join_ranks(device):
    """-> the device of this rank. Connects the ranks: CUDA tensors by nccl, others by gloo."""
    if not TORCHRUN:
        return device
    if device.type == "cuda":
        if LOCAL > torch.cuda.device_count():
            raise Problem(f"torchrun starts {LOCAL} processes here, for {torch.cuda.device_count()}"
                          " GPUs (lower --nproc-per-node, or say --device cpu)")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def as_one(main):
    """Call main() so that the ranks behave like one program: only rank 0 prints, and only the first
    rank that fails reports its error; torchrun ends the others."""
    if not TORCHRUN:
        return main()
    store, screen, silence = next(dist.rendezvous("env://"))[0], sys.stderr, open(os.devnull, "w")
    lost = ("lost a rank, finished epochs are kept; go on with: "
            f"{LAUNCH} {shlex.join(word for word in sys.argv if word != '--resume')} --resume")
    if RANK:
        sys.stdout = sys.stderr = silence
    try:
        result = main()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still reads
            dist.destroy_process_group()
        return result
    except (Exception, KeyboardInterrupt) as error:
        sys.stderr = screen if store.add("failed", 1) == 1 else silence
        if isinstance(error, RuntimeError) and re.search("(?i)gloo|nccl", str(error)):
            raise Problem(lost) from error
        raise


def my_share(rows):
    """-> this rank's share of a tensor or a list: consecutive rows."""
    return rows[len(rows) * RANK // RANKS:len(rows) * (RANK + 1) // RANKS]


def from_rank_0(function, *args, **more):
    """-> function(...), called by rank 0 only: one process writes, and labels cannot differ."""
    result = [function(*args, **more) if RANK == 0 else None]
    if TORCHRUN:
        dist.broadcast_object_list(result)
    return result[0]


class Gather(torch.autograd.Function):
    """gathered() with a gradient. Every rank computes the same loss of all rows, so it has the
    gradient of its own; times RANKS, because average_gradients() divides by RANKS."""

    @staticmethod
    def forward(ctx, rows, n):
        every = rows.new_zeros(*rows.shape[:-2], n, rows.shape[-1])
        my_share(every.transpose(0, -2)).copy_(rows.transpose(0, -2))
        dist.all_reduce(every)  # a sum: rows of other ranks are 0
        return every

    @staticmethod
    def backward(ctx, gradient):
        return RANKS * my_share(gradient.transpose(0, -2)).transpose(0, -2), None


def gathered(rows, n):
    """Each rank's share of n rows, (..., share, D) -> all rows on every rank, (..., n, D)."""
    return Gather.apply(rows, n) if TORCHRUN else rows


def forward(model, images, splits, inside=False):
    """-> the network's output for a batch, (..., B, D), computed in `splits` chunks as if on so
    many GPUs; each rank forwards its share of the chunks and gets the features of all."""
    with statistics_of_all(model, splits):
        outputs = [model(chunk, inside) for chunk in my_share(images.chunk(splits))]

    def whole(features):
        return gathered(torch.cat(features, -2), len(images))
    return tuple(map(whole, zip(*outputs))) if inside else whole(outputs)


@contextlib.contextmanager
def statistics_of_all(model, splits):
    """In this context each rank forwards its chunks; then the running statistics r of batch norms
    are those of one process: r <- (1 - m) r + m s for all chunks in order, m: their momentum. This
    is a sum over chunks, so each rank starts from its share of r and decays it for others' chunks;
    then all are added."""
    norms = [x for x in model.modules() if isinstance(x, (nn.BatchNorm1d, nn.BatchNorm2d))]
    norms = norms if TORCHRUN and model.training else []
    running = [(x.data, 1 - norm.momentum) for norm in norms
               for x in (norm.running_mean, norm.running_var)]
    share = splits // RANKS
    for x, decay in running:
        x.mul_(decay ** (share * RANK) / RANKS)
    yield
    for x, decay in running:
        x.mul_(decay ** (splits - share * (RANK + 1)))
    add_ranks([x for x, _ in running])
    for norm in norms:
        norm.num_batches_tracked += splits - share


def average_gradients(optimizer):
    """After backward(): average gradients over ranks, as over the whole batch."""
    if TORCHRUN:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
        add_ranks(gradients)
        torch._foreach_div_(gradients, RANKS)


def add_ranks(tensors):
    """In place: the sum over ranks of each tensor, in one message."""
    if tensors:
        message = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(message)
        for x, total in zip(tensors, message.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))
