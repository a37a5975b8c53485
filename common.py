"""What the three methods share and no paper claims: data, images, network, clusters, scores.

Data flows one way:  folder -> Split -> uint8 images -> augmented batch -> network -> unit features
                     -> distances -> pseudo labels -> memory -> (losses, in the page of the method)

Said once, meant everywhere:
  N images of a split, B of a batch, C clusters, D width of a feature, H x W size of an image.
  Feature rows have unit length. Row i of every per-image array belongs to split.paths[i].
  A label of -1 is an outlier. Distances lie in [0, 1]. Scores are fractions, printed as per cent.
  An error of use or of data is a Problem: one line that names culprit and remedy, exit code 2.
"""

import argparse
import colorsys
import contextlib
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: there two runs in one folder are not noticed
    fcntl = None
import numpy as np
import sklearn
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFilter
from scipy.sparse import csr_array, vstack
from sklearn import metrics
from sklearn.cluster import DBSCAN
from sklearn.neighbors import sort_graph_by_row_values
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class Problem(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all others; --help keeps the page's layout."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

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


def add_run_flags(parser):
    """The flags of every page that no paper is about."""
    add = parser.add_argument_group("run").add_argument
    add("--data", default="toy", help="a folder, or one of " + ", ".join(DATASETS) +
        " (%(default)s), with :source or :target for a half of it; sets the other defaults, those "
        "of market1501 for a folder")
    add("--root", default="data", help="where data sets live (%(default)s)")
    add("--out", help="folder of the run (runs/METHOD-DATA-sSEED)")
    add("--resume", action="store_true", help="go on after the last finished epoch in OUT, where "
        "there is one; --epochs may have grown")
    add("--on-collapse", choices=("stop", "skip"), default="stop", help="when clustering finds "
        "fewer clusters than a batch needs: stop, or train on the labels of the epoch before "
        "(%(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all chance (%(default)s)")
    add("--device", default="auto", choices=DEVICES, help="(%(default)s)")
    add("--arch", choices=ARCHS, help="network (%(default)s)")
    add("--weights", help="imagenet, a torchvision FILE, or none: from random weights, with "
        "jitter, centring per camera and, where there is no source, a warm-up (%(default)s)")
    add("--fp32", action="store_true", help="no bfloat16 on CUDA, where it is the default; "
        "convolutions may still use TF32, as is PyTorch's default")
    add("--bf16", action="store_true", help="bfloat16 elsewhere too; pays where the CPU has it")
    add("--recompute", action="store_true", help="for a small GPU: keep no activations, compute "
        "those of a chunk of --bn-splits again for its gradient; the same numbers, a third slower")
    add("--size", type=number(int, 32, 2048), nargs=2, metavar=("H", "W"),
        help="height and width of an image (%(default)s / 256 128)")
    add("--true-ids", action="store_true", help="no clustering, the true ids: the upper bound")


def parse(parser, argv, method, settings):
    """Parse argv with the defaults of its --data (those of market1501 for other folders), and check
    what flags must share. Raises Problem."""
    early = Parser("", add_help=False)
    early.add_argument("--data", default="toy")
    data = early.parse_known_args(argv)[0].data.rsplit(":", 1)[0]
    parser.set_defaults(**settings.get(data, settings["market1501"]))
    args = parser.parse_args(argv)
    if args.batch_size % args.num_instances or args.batch_size % args.bn_splits:
        raise Problem(f"--batch-size {args.batch_size} is no multiple of --num-instances "
                      f"{args.num_instances} and --bn-splits {args.bn_splits} (change one of them)")
    if args.fp32 and args.bf16:
        raise Problem("--fp32 and --bf16 exclude each other (leave one out)")
    if args.batch_size // args.bn_splits < 2:
        raise Problem(f"--bn-splits {args.bn_splits} leaves batch norm one image (lower it)")
    folder = os.path.basename(os.path.normpath(args.data)).replace(":", "-")
    args.size = tuple(args.size)
    args.out = args.out or os.path.join("runs", f"{method}-{folder}-s{args.seed}")
    return args


def run(main, resume="--resume"):
    """Call main() as a program: a Problem becomes one line on stderr and exit code 2; Ctrl-C and
    SIGTERM one line with the command that goes on, by the flag `resume`, and exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except Problem as problem:
        message = problem
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # of a progress bar that was cut short
        words = shlex.join([*(word for word in sys.argv if word != resume), resume or ""])
        print("\ninterrupted" if not resume else "\ninterrupted, finished epochs are kept; go on "
              f"with: python {words}", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:  # torch raises the latter for main memory too
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        message = "out of memory (lower --batch-size or --size, or choose a smaller --arch)"
    line = " ".join(str(message).splitlines())  # a file's name may hold anything
    print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    sys.exit(2)


# ================================================================================ data sets on disk


class Split(NamedTuple):
    """N images: where they lie, who is on them, which camera took them."""

    paths: list       # N file names
    pids: np.ndarray  # (N,) int64 person ids; of unlabelled images for label_quality, --true-ids
    cams: np.ndarray  # (N,) int64 cameras 0..V-1


class Facts(NamedTuple):
    """The published counts of a data set, so that half a download is noticed."""

    folders: tuple = ()                 # names of the official folder
    counts: tuple = (None, None, None)  # images of KINDS without junk; None where releases differ


DATASETS = {
    "market1501": Facts(("Market-1501-v15.09.15",), (12936, 3368, 15913)),
    "msmt17": Facts(("MSMT17_V1", "MSMT17_V2", "MSMT17_V2/MSMT17_V2"), (32621, 11659, 82161)),
    "cuhk03": Facts(("cuhk03-np/detected", "cuhk03-np/labeled"), (None, 1400, None)),
    "personx": Facts(("PersonX", "subset1"), (9840, 5136, 30816)),
    "veri776": Facts(("VeRi",), (37778, 1678, 11579)),
    "dukemtmc": Facts(("DukeMTMC-reID",), (16522, 2228, 17661)),  # withdrawn in 2019, see README
    "toy": Facts(),         # drawn by make_toy on first use
    "toy-source": Facts(),  # the second domain, other people, other cameras
}
KINDS = ("train", "query", "gallery")
TRIPLES = (("bounding_box_train", "query", "bounding_box_test"),
           ("image_train", "image_query", "image_test"))
SUFFIXES, FORMATS = (".jpg", ".jpeg", ".png", ".bmp"), ("JPEG", "PNG", "BMP")


def load(name, root="data", at_least=1, draw=True):
    """Read a data set -> train, query, gallery (Splits, in sorted order of the files).

    `name` is a key of DATASETS, looked for in root/name, root/name/<official folder>,
    root/<official folder> and root, or any folder that holds one of TRIPLES. A file name starts
    with the person and the camera, 0002_c1...: person -1 is junk and dropped, person 0 is a
    distractor, in no query, and so a wrong answer wherever it is ranked (in MSMT17's lists, a
    person like any other). Cameras are renumbered 0..V-1 over all splits. The toy sets are drawn on
    first use, unless `draw` is False. Raises Problem for a missing folder, an empty split, less
    than `at_least` training images (a batch), a name that does not parse or a link that leaves the
    folder.

    A `name` that ends in :source or :target is one half of a data set, to try domain adaptation
    with a single one: of the training people, shuffled with seed 0, the first half in the first
    half of the cameras, or the others in the other cameras; tests keep all their people, in the
    half's cameras. So training images of the two halves share neither people nor cameras.
    """
    name, half = name.rsplit(":", 1) if name.endswith((":source", ":target")) else (name, None)
    if draw and name in ("toy", "toy-source") and not os.path.isdir(os.path.join(root, name)):
        make_toy(os.path.join(root, name), domain=name)
    facts, folders = DATASETS.get(name, Facts()), [name]
    if name in DATASETS:
        official = [os.path.join(*p, f) for f in facts.folders for p in ((root, name), (root,))]
        folders = [os.path.join(root, name), *official, root]
    for folder in folders:
        for parts in TRIPLES:
            if all(os.path.isdir(os.path.join(folder, part)) for part in parts):
                raw = [_read_folder(os.path.join(folder, part)) for part in parts]
                return _finish(name, folder, raw, facts, at_least, half)
        if os.path.isfile(os.path.join(folder, "list_train.txt")):
            return _finish(name, folder, _read_msmt_lists(folder), facts, at_least, half)
    known = "" if name in DATASETS else f"; a name can be a folder or one of {', '.join(DATASETS)}"
    raise Problem(f"data set {name!r} not found: no folder with {', '.join(TRIPLES[0])} in "
                  f"{', '.join(folders)} (put it there or say --root{known})")


def _read_folder(folder):
    """-> list of (path, person, camera), sorted by name; every file must parse."""
    rows, wrong = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise Problem(f"{folder} cannot be read: {error} (change its rights)") from error
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX"):
            continue
        match = re.match(r"(-?\d{1,9})_c(\d{1,9})(?!\d)", name)
        if match and name.lower().endswith(SUFFIXES):
            rows.append((entry.path, int(match[1]), int(match[2])))
        else:
            wrong.append(name)
    if wrong:
        raise Problem(f"{folder}: {len(wrong)} files are not named <person>_c<camera>...jpg (png, "
                      f"bmp), the first: {', '.join(wrong[:5])} (rename or move them)")
    return rows


def _read_msmt_lists(folder):
    """MSMT17's own layout: four list files, the camera is the third field of the file's name."""
    def read(listing, *parts):
        part = next((p for p in parts if os.path.isdir(os.path.join(folder, p))), None)
        if part is None:
            raise Problem(f"{folder} has {listing} but no folder {' or '.join(parts)} (unpack it)")
        rows, line = [], ""
        try:
            with open(os.path.join(folder, listing), encoding="utf-8-sig") as file:
                for line in sorted(filter(str.strip, file)):
                    path, person = line.split()
                    if os.path.isabs(path) or ".." in path.split("/"):
                        raise ValueError("leaves the data set")
                    camera = int(os.path.basename(path).split("_")[2])
                    rows.append((os.path.join(folder, part, path), int(person), camera))
        except (OSError, ValueError, IndexError) as error:
            raise Problem(f"{os.path.join(folder, listing)}: {line.strip()[:80]!r}: {error} (a line"
                          " reads 0000/0000_045_12_0303morning_0006_2.jpg 0)") from error
        return rows
    train, test = ("train", "mask_train_v2"), ("test", "mask_test_v2")
    return (read("list_train.txt", *train) + read("list_val.txt", *train),  # merged, as is usual
            read("list_query.txt", *test), read("list_gallery.txt", *test))


def _finish(name, folder, raw, facts, at_least, half):
    """Drop junk, compare with the published counts, take a half, renumber cameras."""
    raw = [[row for row in rows if row[1] != -1] for rows in raw]
    for kind, rows, count in zip(KINDS, raw, facts.counts):
        if count is not None and rows and len(rows) != count:
            print(f"warning: {name} {kind}: {len(rows):,} images in {folder}, {count:,} published",
                  file=sys.stderr)
    _stay_inside(folder, [path for rows in raw for path, _, _ in rows])
    if half:
        cameras = sorted({camera for rows in raw for _, _, camera in rows})
        people = np.random.default_rng(0).permutation(sorted({person for _, person, _ in raw[0]}))
        n, v, name = len(people) // 2, len(cameras) // 2, f"{name}:{half}"
        people = set((people[:n] if half == "source" else people[n:]).tolist())
        cameras = set(cameras[:v] if half == "source" else cameras[v:])
        raw[0] = [row for row in raw[0] if row[1] in people]
        raw = [[row for row in rows if row[2] in cameras] for rows in raw]
    for kind, rows in zip(KINDS, raw):
        if not rows:
            raise Problem(f"{folder}: the {kind} split holds no images (is the download complete?)")
        if any(not 0 <= person < 10**9 for _, person, _ in rows):
            raise Problem(f"{folder}: a person of the {kind} split is not from -1 to 999,999,999")
    if not {row[1] for row in raw[1]} & {row[1] for row in raw[2]}:
        raise Problem(f"{folder}: nobody in the query split is in the gallery, so nothing can be "
                      "scored (check what lies in the two folders)")
    if len(raw[0]) < at_least:
        raise Problem(f"{folder}: {len(raw[0])} training images are fewer than a batch of "
                      f"{at_least} (lower --batch-size)")
    cameras = sorted({camera for rows in raw for _, _, camera in rows})
    splits = [Split([path for path, _, _ in rows],
                    np.array([person for _, person, _ in rows], np.int64),
                    np.searchsorted(cameras, [camera for _, _, camera in rows]).astype(np.int64))
              for rows in raw]
    print(f"{name}: {folder}, {len(cameras)} cameras; " + ", ".join(
        f"{kind} {len(split.paths):,} images of {len(set(split.pids.tolist())):,}"
        for kind, split in zip(KINDS, splits)) + " ids", file=sys.stderr)
    return splits


def _stay_inside(folder, paths):
    """Raises Problem for what is no plain file: a pipe, a folder, a link that leaves the data set
    (it could show any file of this machine). The data set's own folder may be a link."""
    home, parts = os.path.realpath(folder), {}
    for path in paths:
        part, name = os.path.split(path)
        if part not in parts:
            parts[part] = os.path.realpath(part)
        try:
            kind = os.lstat(path).st_mode
            real = os.path.realpath(path) if stat.S_ISLNK(kind) else os.path.join(parts[part], name)
            if os.path.commonpath([home, real]) != home:
                raise Problem(f"{path} leads out of {folder}, to {real} (copy the images, links "
                              "that leave a data set are not followed)")
            if not os.path.isfile(real):
                raise OSError("not a file")
        except (OSError, ValueError) as error:
            raise Problem(f"{path} cannot be read: {error} (remove it or copy it again)") from error


# ====================================================================================== the toy set
# Pedestrians drawn by a program. A person is a combination of body, hair, clothes and bags; a
# camera is a background, a colour cast, contrast, blur and noise. Within a camera people are easy
# to tell apart, across cameras they are not: the problem that the papers attack.

TOY_W, TOY_H, TOY_SCALE = 64, 128, 2  # size of an image; it is drawn at twice the size, then shrunk
SKINS = ((245, 214, 186), (222, 178, 140), (172, 118, 80), (110, 72, 48))
HAIRS = ((25, 20, 20), (80, 50, 30), (150, 100, 50), (215, 185, 110), (140, 140, 145),
         (150, 50, 30))
CLOTHES = ((0, .85, .8), (.06, .85, .95), (.14, .85, .95), (.30, .7, .6), (.47, .7, .65),
           (.6, .8, .85), (.68, .65, .45), (.78, .55, .65), (.91, .5, .9), (0, 0, .95), (0, 0, .55),
           (0, 0, .12), (.08, .5, .42))  # hue, saturation, value
FRONT, SIDE, BACK = range(3)


def make_toy(root, seed=1, domain="toy"):
    """Draw a toy data set in Market-1501's layout into the new folder `root` (2,217 JPEGs).

    Two domains: "toy" has 5 very different cameras, "toy-source" 4 milder ones and other people.
    Equal arguments give equal pixels. The folder appears only when it is complete.
    """
    rng = np.random.default_rng([seed, ("toy", "toy-source").index(domain)])
    cameras, gap, train_ids, test_ids = (5, 1.0, 80, 50) if domain == "toy" else (4, .6, 60, 20)
    cameras = [toy_camera(rng, gap) for _ in range(cameras)]
    plan = []  # tracklets: person, looks, camera, folder of each of its images
    for person in range(1, train_ids + test_ids + 1):
        looks, test = toy_looks(rng), person > train_ids
        order = rng.permutation(len(cameras))
        for camera in order[:rng.integers(len(cameras) - 2, len(cameras) + 1)]:
            shots = rng.integers(3, 6)
            parts = ["query"] + ["bounding_box_test"] * (shots - 1)
            plan.append((person, looks, camera, parts if test else ["bounding_box_train"] * shots))
    for _ in range(40):  # distractors: people nobody asks for
        plan.append((0, toy_looks(rng), rng.integers(len(cameras)), ["bounding_box_test"] * 3))
    for i in range(40):  # junk: boxes that cut or miss the person
        looks = dict(toy_looks(rng), height=rng.uniform(.3, .5) if i % 2 else 1.9)
        plan.append((-1, looks, rng.integers(len(cameras)), ["bounding_box_test"]))
    try:
        os.makedirs(os.path.dirname(os.path.abspath(root)), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(root))) as draft:
            for part in TRIPLES[0]:
                os.makedirs(os.path.join(draft, "new", part))
            frame = 0
            for person, looks, camera, parts in tqdm(plan, f"drawing {root}", leave=False):
                view = rng.choice(3, p=.25 + .25 * cameras[camera]["views"])
                light, cover = np.exp(rng.normal(0, .08)), rng.random() < .12 and rng.integers(1, 3)
                for shot, part in enumerate(parts):
                    frame += int(rng.integers(5, 60))
                    turned = view if rng.random() < .8 else rng.integers(3)
                    picture = toy_picture(rng, looks, cameras[camera], turned, light, cover)
                    who = f"{person:04d}" if person >= 0 else "-1"
                    name = f"{who}_c{camera + 1}s1_{frame:06d}_{shot + 1:02d}.jpg"
                    picture.save(os.path.join(draft, "new", part, name), quality=88)
            try:
                os.rename(os.path.join(draft, "new"), root)
            except OSError:
                if not os.path.isdir(root):  # else another run drew the same pictures meanwhile
                    raise
    except OSError as error:
        raise Problem(f"cannot draw the toy set into {root}: {error} (say --root)") from error


def _rgb(hue, saturation, value):
    return tuple(int(255 * c) for c in
                 colorsys.hsv_to_rgb(hue % 1, *np.clip((saturation, value), 0, 1)))


def toy_looks(rng):
    """-> dict: what stays the same about a person in every picture."""
    def cloth(which):
        hue, saturation, value = CLOTHES[which]
        return _rgb(hue + rng.normal(0, .01), saturation * rng.uniform(.85, 1.1),
                    value * rng.uniform(.85, 1.1))
    upper, upper2 = rng.permutation(len(CLOTHES))[:2]
    return dict(
        skin=SKINS[rng.integers(len(SKINS))], hair=HAIRS[rng.integers(len(HAIRS))],
        long_hair=rng.random() < .4,
        upper=cloth(upper), upper2=cloth(upper2), lower=cloth(rng.integers(len(CLOTHES))),
        shoes=cloth(rng.integers(len(CLOTHES))), bag_colour=cloth(rng.integers(len(CLOTHES))),
        pattern=rng.choice(
            ["plain", "plain", "rows", "columns", "check", "half", "logo", "jacket"]),
        sleeves=rng.random() < .5, legs=rng.choice(["trousers", "trousers", "shorts", "skirt"]),
        bag=rng.choice(["none", "none", "backpack", "handbag", "sling"]), hat=rng.random() < .15,
        height=rng.uniform(.84, 1.0), width=rng.uniform(.82, 1.25))


def toy_camera(rng, gap):
    """-> dict: what stays the same about a camera; `gap` scales how far cameras' colours differ."""
    return dict(
        scene=rng.integers(5), period=int(rng.integers(8, 22)),
        paint=_rgb(rng.random(), rng.uniform(.05, .5), rng.uniform(.3, .9)),
        paint2=_rgb(rng.random(), rng.uniform(.05, .5), rng.uniform(.2, .9)),
        gain=np.exp(rng.normal(0, .20 * gap, 3)), gamma=np.exp(rng.uniform(-.45, .45) * gap),
        saturation=rng.uniform(1 - .6 * gap, 1.15), contrast=rng.uniform(1 - .4 * gap, 1.15),
        offset=rng.uniform(-22, 22) * gap, shade=rng.uniform(-.3, .3) * gap,
        blur=rng.uniform(0, 1), noise=rng.uniform(2, 9), resolution=rng.uniform(.45, 1),
        scale=rng.uniform(.84, 1.02), pitch=rng.uniform(0, 7), views=rng.dirichlet([.7, .7, .7]))


def toy_picture(rng, looks, camera, view, light, cover):
    """One detection: scene, person, perhaps something in front, then the camera's optics."""
    width, height = TOY_W * TOY_SCALE, TOY_H * TOY_SCALE
    picture = Image.new("RGB", (width, height), camera["paint"])
    draw = ImageDraw.Draw(picture)
    _draw_scene(draw, rng, camera, width, height)
    tall = .93 * height * looks["height"] * camera["scale"] * rng.normal(1, .035)
    left = width / 2 + rng.normal(0, 3) * TOY_SCALE
    top = (height - tall) / 2 + (rng.normal(0, 3.5) + camera["pitch"] - 3) * TOY_SCALE
    _draw_person(draw, rng, looks, view, left, top, tall)
    if cover == 1:  # a low box of the scene's colour
        x, y = rng.uniform(0, .75) * width, rng.uniform(.45, .8) * height
        draw.rectangle([x, y, x + 40, height], fill=camera["paint2"])
    elif cover == 2:  # a post
        x = rng.uniform(0, .75) * width
        draw.rectangle([x, 0, x + 18, height], fill=(90, 90, 90))
    small = [int(side * camera["resolution"]) for side in (TOY_W, TOY_H)]
    picture = picture.resize(small, Image.BOX).resize((TOY_W, TOY_H), Image.BILINEAR)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(camera["blur"])), np.float32)
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + camera["saturation"] * (pixels - grey)
    pixels = 128 + camera["contrast"] * (pixels - 128) + camera["offset"]
    pixels *= camera["gain"] * light
    pixels *= 1 + camera["shade"] * np.linspace(-1, 1, TOY_W)[None, :, None]  # light from one side
    pixels = 255 * (pixels.clip(1, 255) / 255) ** camera["gamma"]
    pixels += rng.normal(0, camera["noise"], pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_scene(draw, rng, camera, width, height):
    step, paint, paint2 = camera["period"] * TOY_SCALE, camera["paint"], camera["paint2"]
    dx, dy = rng.integers(0, step, 2)
    horizon = int(height * .45 + rng.normal(0, 6))
    if camera["scene"] == 0:  # bricks
        for row, y in enumerate(range(-step, height, step // 2)):
            for x in range(-step, width + step, step):
                x0, y0 = x + dx + row % 2 * step // 2, y + dy
                draw.rectangle([x0, y0, x0 + step - 3, y0 + step // 2 - 3], paint2)
    elif camera["scene"] == 1:  # bars
        for x in range(-step, width, step):
            draw.rectangle([x + dx, 0, x + dx + step // 3, height], paint2)
    elif camera["scene"] == 2:  # grass
        draw.rectangle([0, horizon, width, height], paint2)
        for x, y in zip(rng.integers(0, width, 40), rng.integers(horizon, height, 40)):
            draw.ellipse([x, y, x + 9, y + 5], paint)
    elif camera["scene"] == 3:  # a road to the horizon
        draw.rectangle([0, horizon, width, height], paint2)
        for lane in range(-4, 5):
            ends = [width // 2 + lane * step, horizon, width // 2 + 4 * lane * step, height]
            draw.line(ends, paint, 3)
    else:  # discs
        for x, y in zip(rng.integers(-step, width, 14), rng.integers(-step, height, 14)):
            draw.ellipse([x, y, x + step, y + step], paint2)


def _draw_person(draw, rng, looks, view, left, top, tall):
    """Body coordinates: y from 0 (crown) to 1 (soles), x from the middle, both in body heights."""
    def box(x0, y0, x1, y1, fill):
        draw.rectangle([left + min(x0, x1) * tall, top + y0 * tall,
                        left + max(x0, x1) * tall, top + y1 * tall], fill=fill)

    def line(x0, y0, x1, y1, fill, thick):
        draw.line([left + x0 * tall, top + y0 * tall, left + x1 * tall, top + y1 * tall],
                  fill=fill, width=max(2, int(thick * tall)))

    def oval(x, y, rx, ry, fill):
        draw.ellipse([left + (x - rx) * tall, top + (y - ry) * tall,
                      left + (x + rx) * tall, top + (y + ry) * tall], fill=fill)

    side, facing = view == SIDE, 1 if rng.random() < .5 else -1
    wide = looks["width"]
    half = .125 * wide * (.72 if side else 1)            # half the width of the torso
    stride = rng.uniform(-1, 1) * (1 if side else .35)   # where in the step legs and arms are
    bag, bag_colour = looks["bag"], looks["bag_colour"]
    if bag == "backpack" and side:
        box(-1.25 * half * facing, .17, -.3 * half * facing, .42, bag_colour)

    for leg in (-1, 1):
        hip, foot = leg * half * .45, leg * half * .5 + leg * stride * .1
        line(hip, .48, foot, .95, looks["lower"] if looks["legs"] == "trousers" else looks["skin"],
             .075 * wide)
        if looks["legs"] == "shorts":
            line(hip, .48, (hip + foot) / 2, .68, looks["lower"], .085 * wide)
        box(foot - .04, .945, foot + (.07 * facing if side else .04), .985, looks["shoes"])
    if looks["legs"] == "skirt":
        draw.polygon([(left + x * half * tall, top + y * tall) for x, y in
                      ((-.8, .48), (.8, .48), (1.15, .70), (-1.15, .70))], fill=looks["lower"])

    box(-half, .145, half, .50, looks["upper"])
    pattern, colour = looks["pattern"], looks["upper2"]
    if pattern == "rows":
        for y in np.arange(.17, .48, .075):
            box(-half, y, half, y + .03, colour)
    elif pattern == "columns":
        for x in np.arange(-half + .01, half - .02, .06):
            box(x, .145, x + .022, .5, colour)
    elif pattern == "check":
        for row in range(6):
            for column in (0, 1):
                x, y = half * (.8 * column + .4 * (row % 2) - 1), .145 + row * .06
                box(x, y, x + .35 * half, y + .06, colour)
    elif pattern == "half":
        box(-half, .33, half, .5, colour)
    elif pattern == "logo" and view == FRONT:
        box(-half * .55, .22, half * .55, .34, colour)
    elif pattern == "jacket" and view != BACK:
        x0, x1 = (.4 * facing, facing) if side else (-.35, .35)
        box(half * x0, .145, half * x1, .5, colour)

    sleeve = 1 if looks["sleeves"] else .4               # how much of the arm it covers
    shade = tuple(int(.85 * c) for c in looks["upper"])
    hands = [stride * .16] if side else [s * (half * 1.25 + .02 + stride * .08) for s in (-1, 1)]
    for arm, hand in zip((0,) if side else (-1, 1), hands):
        shoulder = arm * half * 1.05
        line(shoulder, .17, hand, .49, looks["skin"], .05 * wide)
        line(shoulder, .155, shoulder + (hand - shoulder) * sleeve, .16 + .3 * sleeve, shade,
             .06 * wide)

    if bag == "backpack" and view == BACK:
        box(-half * .7, .17, half * .7, .42, bag_colour)
    elif bag == "backpack" and view == FRONT:
        for strap in (-1, 1):
            line(strap * half * .6, .15, strap * half * .6, .36, bag_colour, .03)
    elif bag == "handbag":
        box(hands[-1] - .05, .49, hands[-1] + .05, .60, bag_colour)
    elif bag == "sling":
        line(-half, .16, half, .46, bag_colour, .025)
        box(half * .5, .44, half * 1.3, .55, bag_colour)

    if looks["long_hair"]:
        box(-.065, .06, .065, .20 if view == BACK else .17, looks["hair"])
    line(0, .1, 0, .15, looks["skin"], .06)
    oval(0, .068, .056, .07, looks["hair"])
    if view != BACK:
        oval(.018 * facing * side, .083, .036 if side else .046, .055, looks["skin"])
    if looks["hat"]:
        box(-.065, 0, .065, .035, bag_colour)


# =========================================================================================== images

MEAN, STD = (.485, .456, .406), (.229, .224, .225)  # ImageNet's, per channel, of pixels in [0, 1]
MAX_PIXELS = 2 ** 25  # a pedestrian crop has about 2 ** 13; far more is a broken or hostile file


def read_images(split, height, width):
    """Decode and resize (bicubic) every file once -> (N, 3, H, W) uint8 in main memory.

    Market-1501's training set takes 1.27 GB at 256 x 128. Raises Problem naming an unreadable file.
    """
    images = torch.empty(len(split.paths), 3, height, width, dtype=torch.uint8)

    def read(i):
        try:
            with Image.open(split.paths[i], formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Problem(f"{split.paths[i]}: {picture.width} x {picture.height} pixels is "
                                  "no pedestrian crop (remove or shrink the file)")
                picture = picture.convert("RGB").resize((width, height), Image.BICUBIC)
            images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Problem(f"{split.paths[i]}: cannot be read as an image ({error}); "
                          "remove the file or copy it again") from error

    pool = ThreadPoolExecutor()
    try:
        list(tqdm(pool.map(read, range(len(images))), "decoding images", len(images), leave=False))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return images


def place(images, device):
    """-> the images on a GPU that has room for four times as many, else where they are."""
    fits = device.type == "cuda" and 4 * images.nbytes < torch.cuda.mem_get_info(device)[0]
    return images.to(device) if fits else images


def send(tensor, device):
    """-> the tensor on the device; a copy to CUDA is queued there, and the program goes on."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def take(images, index, device):
    """-> images[index] on the device, wherever the images lie; index lies on the CPU."""
    return send(images[send(index, images.device)], device)


def normalise(images):
    """(B, 3, H, W) uint8 -> float32, ImageNet mean and deviation."""
    mean, std = send(torch.tensor((MEAN, STD)), images.device)[:, :, None, None]
    return (images.float() / 255 - mean) / std


def augment(images, generator, pad=None, erase=.5, jitter=0.):
    """(B, 3, H, W) uint8 -> float32, normalised; every image draws its own changes.

    Flip with probability 1/2; `pad` black pixels around (10 at height 256, else in proportion),
    then a random crop; with `jitter` > 0 random channel gains, contrast and saturation; with
    probability `erase` a rectangle of 2-40 % of the area and aspect 0.3-3.33 becomes grey (random
    erasing, Zhong et al., AAAI 2020; 0 after normalising is the mean colour). The draws come from
    the CPU `generator`, so they do not depend on the device.
    """
    b, _, h, w = images.shape
    pad = h // 24 if pad is None else pad
    u = send(torch.rand(b, 31, generator=generator), images.device)
    flip, dy, dx, gate, top, left = u[:, :6].T[:, :, None]                        # (B, 1) each
    y, x = torch.arange(h, device=u.device), torch.arange(w, device=u.device)
    rows = y + (dy * (2 * pad + 1)).long()                                        # (B, H)
    columns = torch.where(flip < .5, x, w - 1 - x) + (dx * (2 * pad + 1)).long()  # (B, W)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)                       # (B, 3, H'W')
    pixel = (rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]).flatten(1)   # (B, HW)
    out = padded.gather(2, pixel[:, None].expand(-1, 3, -1)).view(b, 3, h, w).float().div_(255)
    if jitter:
        gain, contrast, saturation = torch.exp(              # (B, 3, 1, 1), (B, 1, 1, 1) x 2
            jitter * (u[:, 6:11, None, None] - .5)).split([3, 1, 1], 1)
        out.mul_(gain)
        out.mul_(contrast).add_(out.mean((1, 2, 3), True) * (1 / contrast - 1))
        out.mul_(saturation).add_(out.mean(1, True) * (1 / saturation - 1)).clamp_(0, 1)
    mean, std = send(torch.tensor((MEAN, STD)), u.device)[:, :, None, None]       # (3, 1, 1) each
    out.sub_(mean).div_(std)
    area = h * w * (.02 + .38 * u[:, 11:21])                                      # ten tries
    aspect = .3 + (1 / .3 - .3) * u[:, 21:31]
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, 10)
    fits = (height < h) & (width < w)
    first = fits.float().argmax(1, keepdim=True)             # the first try that fits the image
    height, width = height.gather(1, first), width.gather(1, first)               # (B, 1)
    top, left = (top * (h - height + 1)).floor(), (left * (w - width + 1)).floor()
    in_rows = (y >= top) & (y < top + height) & (gate < erase) & fits.any(1, keepdim=True)
    in_columns = (x >= left) & (x < left + width)
    return out.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def pk_batches(labels, cams, p, k, iters, generator):
    """Yield `iters` index tensors (p * k,): p labels, k images of each, label after label.

    labels: (N,) int64 array, -1 is never drawn. Labels pass in random order, each once before any
    comes again (but for a remainder under p). The first of the k images is uniform; the others are
    drawn from other cameras than its own where there are any (cams=None: from all others), without
    repeats while there are enough. Raises Problem when there are fewer than p labels.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    if len(members) < p:
        raise Problem(f"{len(members)} clusters or people are fewer than the {p} of a batch (lower "
                      f"--batch-size to at most {len(members) * k}; of clusters, change --eps)")
    order = []
    for _ in range(iters):
        if len(order) < p:
            order = torch.randperm(len(members), generator=generator).tolist()
        batch, order = order[:p], order[p:]
        picked = []
        for mine in (members[label] for label in batch):
            anchor = mine[torch.randint(len(mine), (1,), generator=generator).item()]
            others = mine[cams[mine] != cams[anchor]] if cams is not None else mine[:0]
            if not len(others):
                others = mine[mine != anchor] if len(mine) > 1 else mine
            rest = torch.randperm(len(others), generator=generator)
            if len(others) < k - 1:
                rest = torch.randint(len(others), (k - 1,), generator=generator)
            picked += [anchor, *others[rest[:k - 1].numpy()]]
        yield torch.from_numpy(np.array(picked))


# ========================================================================================== network

ARCHS = ("small", "resnet18", "resnet18-layer3", "resnet34", "resnet50")


class GeM(nn.Module):
    """Generalised-mean pooling (Radenovic et al., TPAMI 2019): (B, D, h, w) -> (B, D); p learns."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


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


@contextlib.contextmanager
def statistics_once(model):
    """Inside, batch norms use the batch's statistics and do not move their own a second time."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0., None
    try:
        yield
    finally:
        for norm, kept in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = kept


class Encoder(nn.Module):
    """Images (B, 3, H, W) float32 -> unit features (B, D); with parts > 0 (1 + parts, B, D).

    A torchvision ResNet with last stride 1, so the last map is (H / 16, W / 16); "resnet18-layer3"
    ends before the last stage, "small" is a slim ResNet (1.2 M parameters) for the toy set. Then
    pooling ("gem" or "avg") and a batch-norm neck without shift (Luo et al., CVPRW 2019). With
    `parts`, the map is also cut into that many stripes from top to bottom, each with its own
    pooling and neck. inside=True: a pair instead of the features, what the pooling gives and what
    the neck makes of it, both before they are brought to unit length.
    weights: "imagenet" (torchvision's IMAGENET1K_V1), "none", or a file in torchvision's format.
    Raises Problem for weights that cannot be had or do not fit.
    Set bf16 = True for a backbone in bfloat16 (autocast), recompute = True for activations that are
    not kept but computed again when the gradient needs them (Chen et al., arXiv 1604.06174).
    """

    def __init__(self, arch="resnet50", weights="imagenet", parts=0, pooling="gem"):
        super().__init__()
        self.bf16 = self.recompute = False
        if arch == "small":
            stages = [nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
            for width_in, width, stride in ((24, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)):
                norm = nn.BatchNorm2d if width == 256 else InstanceBatchNorm
                stages.append(SmallBlock(width_in, width, stride, norm))
            self.backbone = nn.Sequential(*stages)
        elif arch in ARCHS:
            net = getattr(torchvision.models, arch.removesuffix("-layer3"))()
            block = net.layer4[0]
            strided = block.conv2 if arch == "resnet50" else block.conv1
            strided.stride = block.downsample[0].stride = (1, 1)
            ends = ("fc", "avgpool") + ("layer4",) * arch.endswith("-layer3")
            self.backbone = nn.Sequential()
            for name, module in net.named_children():
                if name not in ends:
                    self.backbone.add_module(name, module)
        else:
            raise Problem(f"--arch {arch} is unknown (one of {', '.join(ARCHS)})")
        self.width = {"small": 256, "resnet18-layer3": 256, "resnet50": 2048}.get(arch, 512)
        pool = {"gem": GeM,
                "avg": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}[pooling]
        self.parts, self.pooling = parts, pooling
        self.pools = nn.ModuleList(pool() for _ in range(1 + parts))
        self.necks = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(1 + parts))
        for neck in self.necks:
            neck.bias.requires_grad_(False)
        if weights != "none":
            self._load_weights(arch, weights)
        if arch != "small":  # the layout that is faster in half precision and on a CPU
            self.to(memory_format=torch.channels_last)

    def _load_weights(self, arch, weights):
        if weights == "imagenet":
            if not arch.startswith("resnet"):
                raise Problem(f"--arch {arch} has no ImageNet weights (say --weights none)")
            name = arch.removesuffix("-layer3").replace("resnet", "ResNet") + "_Weights"
            url = getattr(torchvision.models, name).IMAGENET1K_V1.url
            try:
                state = torch.hub.load_state_dict_from_url(url, map_location="cpu",
                                                           weights_only=True)
            except (OSError, RuntimeError) as error:
                path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
                raise Problem(f"cannot download {url} ({error}): put the file at {path}, or say "
                              "--weights FILE or --weights none") from error
        else:
            state = load_checkpoint(weights, ("conv1.weight",))
        ours = self.backbone.state_dict()
        missing = [k for k in ours if k not in state and "num_batches" not in k]
        wanted = {k: v for k, v in state.items() if k in ours}
        cut = ("fc.", "layer4.") if arch.endswith("-layer3") else ("fc.",)
        extra = [k for k in state if k not in wanted and not str(k).startswith(cut)]
        if missing or extra:
            how = f"lacks {missing[0]}" if missing else f"also has {extra[0]}"
            raise Problem(f"--weights {weights} does not fit --arch {arch}: it {how} (choose the "
                          "--arch of the file, a torchvision state dict)")
        try:
            self.backbone.load_state_dict(wanted, strict=False)
        except (RuntimeError, AttributeError, TypeError) as error:
            line = str(error).splitlines()[-1].strip()
            raise Problem(f"--weights {weights} does not fit --arch {arch}: {line}") from error

    def on(self, device, args):
        """-> self on the device, with what --bf16, --fp32 and --recompute say."""
        self.recompute = args.recompute
        self.bf16 = args.bf16 or (device.type == "cuda" and not args.fp32)
        return self.to(device)

    def forward(self, images, inside=False):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            if self.recompute and self.training and torch.is_grad_enabled():
                last = checkpoint(self.backbone, images, use_reentrant=False,
                                  preserve_rng_state=False,  # nothing here is random
                                  context_fn=lambda: (contextlib.nullcontext(),
                                                      statistics_once(self.backbone)))
            else:
                last = self.backbone(images)
        last = last.float()                                                       # (B, D, h, w)
        if self.parts and last.shape[2] % self.parts:
            raise Problem(f"a map of {last.shape[2]} rows cannot be cut into {self.parts} equal "
                          f"stripes (make the height a multiple of {16 * self.parts})")
        views = [last, *(last.chunk(self.parts, 2) if self.parts else ())]
        pooled = [pool(view) for view, pool in zip(views, self.pools)]            # (B, D) each
        necks = [neck(view) for view, neck in zip(pooled, self.necks)]
        join = torch.stack if self.parts else lambda its: its[0]
        return (join(pooled), join(necks)) if inside else F.normalize(join(necks), dim=-1)


def warm_up(model, images, cams, generator, epochs=4, batch_size=96, lr=1e-3, temp=.1, jitter=.6):
    """Train `model` from random weights, without any label, until clustering has something to hold.

    Not a step of the papers: it stands in for the ImageNet weights, which the toy set must not
    download. Instance discrimination: two augmented views of an image attract, views of other
    images of the SAME camera repel. Other cameras are left out of the denominator, or background
    and colour cast would solve the task (6.9 instead of 19.3 mAP in a first draft of the toy set).
    """
    device = next(model.parameters()).device
    cams = torch.from_numpy(cams).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for index in tqdm(order.split(batch_size), f"warm-up {epoch + 1}/{epochs}", leave=False):
            if len(index) < 2:
                continue
            batch = take(images, index, device)
            views = [augment(batch, generator, jitter=jitter) for _ in range(2)]
            features = model(torch.cat(views))                                    # (2B, D)
            camera = cams[send(index, device)].repeat(2)
            twin = torch.arange(len(camera), device=device).roll(len(index))
            loss = 0
            for view in features if model.parts else [features]:
                logits = view @ view.T / temp                                     # (2B, 2B)
                logits.masked_fill_(camera[:, None] != camera, -math.inf)
                loss = loss + F.cross_entropy(logits.fill_diagonal_(-math.inf), twin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# ======================================================================= features and pseudo labels


@torch.no_grad()
def extract_features(model, images, batch_size=256):
    """(N, 3, H, W) uint8, wherever it lies -> (N, D) float32 on the model's device; (1 + parts,
    N, D) when the model has parts. Runs in eval mode and restores the mode; batches are moved one
    by one, so the images need not fit on the device."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    batches = tqdm(images.split(batch_size), "extracting features", leave=False)
    features = torch.cat([model(normalise(send(batch, device))) for batch in batches], -2)
    model.train(training)
    return features


def camera_means(features, cams):
    """(..., N, D) features -> (..., N, D): for every image the mean feature of its camera."""
    cams = torch.from_numpy(cams).to(features.device)
    sums = features.new_zeros(*features.shape[:-2], int(cams.max()) + 1, features.shape[-1])
    sums.index_add_(-2, cams, features)
    return (sums / torch.bincount(cams).clamp(min=1)[:, None])[..., cams, :]


def centre_cameras(features, cams):
    """Subtract each camera's mean feature: (..., N, D) unit rows -> (..., N, D) unit rows.

    Not a step of the papers: a network that starts from random weights groups images by camera
    first, and this removes what a camera's images have in common.
    """
    return F.normalize(features - camera_means(features, cams), dim=-1)


@torch.no_grad()
def nearest(features, k, block=512):
    """-> (N, min(k, N)) int64 array: the most similar images of each image, itself first.

    Exact, and equal similarities are ranked by index. Where a CPU has instructions for bfloat16,
    several times faster, products of rounded features only choose 2 k candidates of an image, which
    are then compared in float32. Rounding errors have a bound: a row where an image that was left
    out could be among the k best is searched again, all in float32.
    """
    n, k, ranks = len(features), min(k, len(features)), []
    rough = features.bfloat16() if 2 * k < n and _bf16_pays(features) else None
    if rough is not None:  # |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|; D 2^-24: summing
        error = torch.cat([(part - its).norm(dim=1) for part, its in
                           zip(features.split(block), rough.split(block))])
        length = 1.01 * features.norm(dim=1).max()
        bound = (error + error.max() + features.shape[1] * 2 ** -24 * length) * length  # (N,)
        some = features.new_empty(2 * k, features.shape[1])
    blocks = torch.arange(n, device=features.device).split(block)
    for rows in tqdm(blocks, "nearest neighbours", leave=False):
        if rough is None:
            ranks.append(_nearest_exact(features, rows, k).cpu())
            continue
        value, index = (rough[rows] @ rough.T).topk(2 * k)                        # (block, 2 k)
        left_out = value[:, -1].float() + 2 ** -8 * value[:, -1].float().abs() + bound[rows]
        index = index.sort().values
        similarity = torch.stack([torch.index_select(features, 0, its, out=some) @ features[row]
                                  for row, its in zip(rows, index)])
        similarity[index == rows[:, None]] = math.inf
        value, order = similarity.sort(descending=True, stable=True)
        index, unsure = index.gather(1, order)[:, :k], value[:, k - 1] <= left_out
        if unsure.any():
            index[unsure] = _nearest_exact(features, rows[unsure], k)
        ranks.append(index)
    return torch.cat(ranks).numpy()


def _nearest_exact(features, rows, k):
    """nearest() for some rows of the features, all similarities in float32."""
    similarity = features[rows] @ features.T                                      # (block, N)
    similarity[torch.arange(len(rows)), rows] = math.inf
    value, index = similarity.topk(min(k + 1, len(features)))
    if k < len(features):  # where the k-th and the next are equal, the choice is by index
        tied = value[:, k - 1] == value[:, k]
        index[tied] = similarity[tied].sort(descending=True, stable=True).indices[:, :k + 1]
    index = index[:, :k].sort().values
    order = similarity.gather(1, index).sort(descending=True, stable=True).indices
    return index.gather(1, order)


def _bf16_pays(features):
    """Do the features lie on a CPU with instructions for bfloat16? Asked of Linux; timing would not
    give the same answer every time, and then not the same last digits."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return (features.device.type == "cpu"
                    and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read())))
    except OSError:
        return False


def _neighbours(rank, k):
    """(N, K) ranking -> sparse 0/1 matrix (N, N) of the first k columns."""
    first = rank[:, :k]
    indptr = np.arange(0, first.size + 1, first.shape[1])
    return csr_array((np.ones(first.size, np.float32), first.ravel(), indptr), (len(rank),) * 2)


def per_entry(values, matrix):
    """One value a row -> one value a stored entry of the CSR matrix."""
    return np.repeat(values, np.diff(matrix.indptr))


def reciprocal_vectors(features, rank, k1, k2, weigh):
    """The vectors V of k-reciprocal encoding (Zhong et al., CVPR 2017) as a sparse (N, N) matrix.

    R(i, k) holds the j that rank i among their own first k and are among the first k of i. R(i, k1)
    is grown by R(c, k1/2) of each member c of which more than 2/3 lies in R(i, k1) already. V_i
    spreads a weight of 1 over that set by weigh(cosine, V) per stored entry, then becomes the mean
    over the first k2 in the ranking of i (itself included). R(i, k) counts the image and k others,
    as far as `rank` has columns.
    """
    def mutual(k):
        graph = _neighbours(rank, k)
        return graph.multiply(graph.T)
    wide, close = mutual(k1 + 1), mutual(round(k1 / 2) + 1)
    shared = (wide @ close.T).multiply(wide)             # |R(c, k1/2) in R(i, k1)|, c in R(i, k1)
    shared.data = (3 * shared.data > 2 * np.diff(close.indptr)[shared.indices]).astype(np.float32)
    shared.eliminate_zeros()
    vectors = wide + shared @ close
    vectors.sort_indices()
    row = per_entry(np.arange(len(rank)), vectors)
    cosine = np.empty(vectors.nnz, np.float32)
    pieces = vectors.nnz * features.shape[1] // 2**20 + 1    # of 2^20 numbers: they stay in cache
    for part in np.array_split(np.arange(vectors.nnz), pieces):
        i, j = (torch.from_numpy(ends[part]).to(features.device).long()
                for ends in (row, vectors.indices))
        cosine[part] = (features[i] * features[j]).sum(1).cpu().numpy()
    vectors.data = weigh(cosine, vectors)
    vectors.data /= per_entry(vectors.sum(1), vectors)
    if k2 > 1:
        nearby = _neighbours(rank, k2)
        nearby.data /= min(k2, rank.shape[1])
        vectors = nearby @ vectors
        vectors.sort_indices()
    return vectors


def overlaps(vectors, others, block=256):
    """Yield, a block of rows at a time, the sparse sums over l of min(vectors[i, l], others[j, l]).

    Only pairs with a common l are ever touched, which is what keeps the distance sparse and exact.
    """
    columns = others.T.tocsr()
    for start in range(0, vectors.shape[0], block):
        mine = vectors[start:start + block]
        pairs = columns[mine.indices]                        # a row per entry (i, l): all (l, j)
        pairs.data = np.minimum(pairs.data, per_entry(mine.data, pairs))
        gather = csr_array((np.ones_like(mine.data), np.arange(mine.nnz), mine.indptr),
                           (mine.shape[0], mine.nnz))
        yield gather @ pairs


def jaccard_distance(features, k1=30, k2=6, max_distance=1.):
    """k-reciprocal Jaccard distance (Zhong et al., CVPR 2017): (N, D) -> sparse CSR (N, N) float32.

    Exact, in [0, 1]; pairs that share no neighbour are at distance 1 and not stored, nor are pairs
    farther apart than max_distance; the diagonal and other zeros are stored. k1 counts the image
    itself (30 columns), as in ClusterContrast. Raises Problem for features that are not finite.
    """
    if not features.sum(1).isfinite().all():
        raise Problem("features are not finite: bad weights, or training diverged (lower --lr)")
    rank = nearest(features, k1)
    vectors = reciprocal_vectors(features, rank, k1, k2, lambda cosine, _: np.exp(2 * cosine - 2))
    rows = []
    for shared in tqdm(overlaps(vectors, vectors), "Jaccard distance", len(rank) // 256 + 1,
                       leave=False):
        shared.data = (1 - shared.data / (2 - shared.data)).clip(0)               # J(i, j)
        keep = shared.data <= max_distance + 1e-4            # dbscan's eps is a little wider too
        ends = np.concatenate([[0], keep.cumsum()])[shared.indptr]
        rows.append(csr_array((shared.data[keep], shared.indices[keep], ends), shared.shape))
    distance = vstack(rows, format="csr")
    distance.sort_indices()
    return distance


def dbscan(distance, eps, min_samples=4, at_least=2, instead=None):
    """DBSCAN (Ester et al., KDD 1996) on a sparse distance -> (N,) int64 labels, -1 = outlier.

    Pairs that are not stored are never neighbours; a point counts itself. 1e-5 is added to eps: two
    images that share s of k2 neighbours and nothing else are at exactly 1 - s / (2 k2 - s), and
    rounding must not decide which side of eps they fall. Fewer than `at_least` clusters are a
    collapse: the labels `instead` and a warning, or a Problem when there are none.
    """
    graph = sort_graph_by_row_values(distance, copy=True, warn_when_not_sorted=False)
    found = DBSCAN(eps=eps + 1e-5, min_samples=min_samples, metric="precomputed").fit(graph)
    labels = found.labels_.astype(np.int64)
    clusters, outliers = labels.max() + 1, (labels < 0).sum()
    if clusters >= at_least:
        return labels
    what = (f"{clusters} clusters and {outliers:,} outliers among {len(labels):,} images at eps "
            f"{eps:.4g}, min_samples {min_samples}; a batch needs {at_least} clusters")
    if instead is not None:
        tqdm.write(f"warning: {what}: training on the labels of the epoch before", sys.stderr)
        return instead
    way = "raise" if 2 * outliers > len(labels) else "lower"
    raise Problem(f"{what}: {way} --eps, lower --batch-size, start from better features (--weights "
                  "imagenet), bring --k1 near the images per person, or say --on-collapse skip")


# ==================================================================== labels, their quality, memory


def renumber(labels):
    """(N,) labels with gaps -> 0..C-1 in the same order; -1 stays."""
    values, new = np.unique(labels, return_inverse=True)
    return new - (values[0] == -1)


def cluster_means(features, labels):
    """(..., N, D) features, (N,) labels 0..C-1 -> (..., C, D) unit means; -1 takes no part."""
    labels = torch.from_numpy(labels).to(features.device)
    inside = labels >= 0
    sums = features.new_zeros(*features.shape[:-2], int(labels.max()) + 1, features.shape[-1])
    return F.normalize(sums.index_add_(-2, labels[inside], features[..., inside, :]), dim=-1)


@torch.no_grad()
def update_memory(memory, features, labels, momentum, most=None):
    """In place, image by image in batch order: m_y <- unit(momentum m_y + (1 - momentum) f).

    memory (C, D), features (B, D), labels (B,) int64. The r-th image of every label is done in one
    step, since different labels never meet. `most`: images of a label at most; a GPU need not be
    asked for it then.
    """
    labels, features = labels.to(memory.device), features.to(memory.dtype)
    nth = (labels[:, None] == labels).tril(-1).sum(1)         # how many of its label came before it
    rows = torch.cat([memory, memory[:1]])                    # the last is for whose turn it is not
    for r in range(int(nth.max()) + 1 if most is None else most):
        moved = F.normalize(momentum * rows[labels] + (1 - momentum) * features)
        rows[torch.where(nth == r, labels, len(memory))] = moved
    memory.copy_(rows[:-1])


def label_quality(labels, pids):
    """How well pseudo labels (N,) match the true ids (N,): diagnosis only, nothing trains on it.

    -> dict: clusters; outliers; ARI and NMI with every outlier as a cluster of its own; purity, the
    share of clustered images whose id is the most frequent of their cluster.
    """
    inside = labels >= 0
    alone = np.where(inside, labels, labels.max() + 1 + np.arange(len(labels)))
    table = metrics.cluster.contingency_matrix(labels[inside], pids[inside], sparse=True)
    return dict(clusters=table.shape[0], outliers=int((~inside).sum()),
                ARI=float(metrics.adjusted_rand_score(pids, alone)),
                NMI=float(metrics.normalized_mutual_info_score(pids, alone)),
                purity=float(table.max(1).sum() / inside.sum()))


# ======================================================================================= evaluation


def average_precision(hits):
    """Boolean array, best-ranked first -> mean over the hits of the precision at their rank.

    Not interpolated: hits at ranks 1, 2, 4, 7 give 0.8304 (the Matlab trapezoid gives 0.8110). The
    definition; score_ranking counts the same for many queries at once, and tests compare the two.
    """
    ranks = np.flatnonzero(hits) + 1
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks)) if len(ranks) else 0.


@torch.no_grad()
def evaluate(query_features, gallery_features, query, gallery, topk=(1, 5, 10), block=256):
    """Rank the gallery for every query -> dict mAP, rank1, rank5, rank10 (fractions), queries.

    Market-1501's rule: gallery images of the query's person AND camera are ignored; queries without
    another right answer do not count. Features (Q, D) and (G, D), or any pair whose product ranks.
    Raises Problem for features that are not finite; warns when equal similarities decide a rank.
    """
    for features in (query_features, gallery_features):
        if not features.sum(1).isfinite().all():
            raise Problem("features are not finite: bad weights, or training diverged (lower --lr)")
    similar = (query_features[s:s + block] @ gallery_features.T for s in
               range(0, len(query_features), block))
    return score_ranking(similar, query, gallery, topk, block)


def score_ranking(similarities, query, gallery, topk=(1, 5, 10), block=256):
    """evaluate() for similarities (block, G) that come block of queries by block of queries.

    Of a right answer only its rank counts: how many wrong ones are more similar. Values that were
    sorted without their indices, several times faster, tell that; equal ones are ranked by index.
    """
    precision, first, tied = [], [], 0
    for start, similar in zip(range(0, len(query.pids), block), similarities):
        similar = similar.cpu()
        same_id = query.pids[start:start + block, None] == gallery.pids
        same_cam = query.cams[start:start + block, None] == gallery.cams
        right = torch.from_numpy(same_id & ~same_cam)                             # (block, G)
        similar.masked_fill_(torch.from_numpy(same_id & same_cam), -math.inf)     # ignored: last
        similar, right = similar[right.any(1)], right[right.any(1)]
        if not len(right):
            continue
        total = right.sum(1)
        nth = torch.arange(1, int(total.max()) + 1)
        valid = nth <= total[:, None]                                             # (block, most)
        value = similar.new_full(valid.shape, -math.inf)
        value[valid] = similar[right]
        value = value.sort(1, descending=True).values      # of right answers, the nth best there

        def ahead(answers):
            """-> how many of the answers are more similar than each value; and how many equal."""
            answers = torch.from_numpy(np.sort(answers.numpy(), 1))
            upper = torch.searchsorted(answers, value, right=True)
            return answers.shape[1] - upper, upper - torch.searchsorted(answers, value)
        (above, equal), (right_above, right_equal) = ahead(similar), ahead(value)
        wrong = above - right_above                                               # ahead of the nth
        tie = ((equal > right_equal) & valid).any(1)
        if tie.any():
            order = similar[tie].sort(dim=1, descending=True, stable=True).indices
            hit = right[tie].gather(1, order)
            wrong[valid & tie[:, None]] = (~hit).cumsum(1)[hit]
        tied += int(tie.sum())
        precision.append(torch.where(valid, nth.double() / (nth + wrong), 0).sum(1) / total)
        first.append(wrong[:, 0])
    if not precision:
        raise Problem("no query has a right answer in another camera: nothing to evaluate")
    precision, first = torch.cat(precision), torch.cat(first)
    if tied:
        print(f"warning: {tied} queries have right and wrong answers at equal similarity; ranked "
              "by name", file=sys.stderr)
    return dict(mAP=precision.mean().item(),
                **{f"rank{k}": (first < k).double().mean().item() for k in topk},
                queries=len(precision))


# ===================================================================== seeds, logs and checkpoints


def seed_everything(seed):
    """Same seed, same machine, same numbers. -> the CPU generator that draws batches and crops."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.Generator().manual_seed(seed)


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name):
    """One of DEVICES -> torch.device; Problem when it is not there."""
    have = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = "cuda" if have["cuda"] else "mps" if have["mps"] else "cpu"
    if not have[name]:
        raise Problem(f"--device {name}: this PyTorch sees none (say --device cpu, or install a "
                      "PyTorch built for it)")
    return torch.device(name)


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
        wrong = {name: (~terms.isfinite()).nonzero()[0].item() + 1
                 for name, terms in history.items() if not terms.isfinite().all()}
        if wrong:
            first = min(wrong.values())
            names = ", ".join(name for name, step in wrong.items() if step == first)
            raise Problem(f"epoch {epoch}, iteration {first}: not finite: {names}; training "
                          "diverged (lower --lr; the last good epoch is kept)")
        return {name: terms.double().mean().item() for name, terms in history.items()}


OPEN_LOGS = weakref.WeakValueDictionary()  # of this process: number of the file -> file


class Log:
    """A run's folder: lines on the screen and in log.jsonl, the last finished epoch in last.pt.

    The first line of log.jsonl holds versions, device, commit and every argument. `finished` is the
    checkpoint of a run that has nothing left to do, or None. What a run left that finished no epoch
    is replaced. Raises Problem for a folder that cannot be written, that another process writes
    into, or that holds a run of other flags or, without --resume, one that stopped early.
    `epochs`: the flag that counts them; `free`: flags that may differ.
    """

    def __init__(self, folder, device, args, epochs="epochs", free=()):
        self.folder, self.args, self.epochs, self.free = folder, args, epochs, free
        self.path, self.start = os.path.join(folder, "log.jsonl"), time.time()
        total, state = vars(args)[epochs], self._read_state()
        here = os.path.dirname(os.path.abspath(__file__))
        try:
            commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, text=True,
                                    capture_output=True).stdout.strip()
        except OSError:  # no git here
            commit = ""
        self.header = json.dumps(dict(
            args=vars(args), device=str(device), threads=torch.get_num_threads(), commit=commit,
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
            torchvision=torchvision.__version__, sklearn=sklearn.__version__))
        if not (state and state["epoch"] == total and self._text().endswith(state["line"] + "\n")):
            self._take()
            state = self._read_state()  # as it is now that nobody else writes
            if state and state["epoch"] < total and not args.resume:
                raise Problem(f"{folder} holds a run that stopped after epoch {state['epoch']} of "
                              f"{total} (go on with --resume, choose another --out, or delete its "
                              "last.pt)")
            if state:
                self._mend(state)
        self.state, self.finished = state, state if state and state["epoch"] == total else None
        if self.finished:
            print(f"{folder}: finished before, nothing to do")

    def _read_state(self):
        """-> the checkpoint in the folder, or None. Raises Problem when its flags are not today's,
        but for those that change no number, and for more epochs."""
        path = os.path.join(self.folder, "last.pt")
        if not os.path.lexists(path):
            return None
        flags = [flag for flag in vars(self.args) if flag not in
                 {*self.free, "out", "root", "device", "eval_every", "resume", "on_collapse",
                  "recompute"}]
        now, state = vars(self.args), load_checkpoint(
            path, ("images", *flags), epoch=int, scores=dict, line=str, seconds=float)
        if state["epoch"] not in range(state[self.epochs] + 1):
            raise Problem(f"{path} was not written by these pages (choose another --out)")
        other = [f"--{flag.replace('_', '-')} {state[flag]}, now {now[flag]}" for flag in flags
                 if state[flag] != now[flag]
                 and not (flag == self.epochs and state[flag] <= now[flag])]
        if other:
            raise Problem(f"{path} is of a run with other flags: {'; '.join(other)} (say the same, "
                          "choose another --out, or delete that file alone)")
        return state

    def _take(self):
        """Open the log, and lock it: the lock goes with the process, however that ends, or with the
        next run of the same process in the folder, as in a notebook."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)
            same = os.fstat(self.file.fileno())[1:3]  # inode and device, by whatever name
            if same in OPEN_LOGS:
                OPEN_LOGS.pop(same).close()
            OPEN_LOGS[same] = self.file
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Problem(f"another process is writing into {self.folder} (wait for it, or choose "
                          "another --out)") from error
        except OSError as error:
            raise Problem(f"{self.folder} cannot be written: {error} (choose another --out)"
                          ) from error

    def _text(self):
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def _mend(self, state):
        """Make the log end with the line of the checkpoint: a stop between the two leaves it out,
        and what a full disk or another last.pt left behind it comes again."""
        old = self._text()
        try:  # half a line at the end is none
            kept = [line for line in old.split("\n")[:-1]
                    if json.loads(line).get("epoch", -1) < state["epoch"]]
        except (ValueError, AttributeError, TypeError) as error:
            raise Problem(f"{self.path} has a line that is no record of a run (move the file away)"
                          ) from error
        new = "".join(line + "\n" for line in [*(kept or [self.header]), state["line"]])
        same = len(os.path.commonprefix([old, new]).encode())
        self._append(new.encode()[same:], same)
        self.header, self.start = None, self.start - state["seconds"]

    def _append(self, data, size):
        """Cut the log to `size` bytes and append `data`, all of it or nothing."""
        try:
            self.file.truncate(size)
            if self.file.write(data) < len(data):
                raise OSError("the disk is full")
        except OSError as error:
            self.file.truncate(size)
            raise Problem(f"{self.path} cannot be written: {error} (free some space, then go on "
                          "with --resume)") from error

    def restore(self, images, **parts):
        """--resume: put the checkpoint's state into `parts`, modules, optimisers and generators.

        -> dict of what else it holds: epoch, the number of finished ones, and the values that
        epoch() was told to keep; {} in a new run. Raises Problem when a part does not fit or the
        number of training images is another.
        """
        state, self.state = self.state, None
        if not state:
            return {}
        if state["images"] != images:
            raise Problem(f"{self.folder} is of a run on {state['images']} training images, now "
                          f"there are {images} (restore the data set, or choose another --out)")
        try:
            for name, part in parts.items():
                load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                load(state.pop(name))
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Problem(f"{self.folder} cannot be resumed: its last.pt holds no fitting {name} "
                          "(choose another --out)") from error
        return {key: value.numpy() if torch.is_tensor(value) else value
                for key, value in state.items()}

    def epoch(self, title, quality=None, losses=None, scores=None, keep=None, **more):
        """One line a person can read, one line of JSON; empty groups are left out.

        keep: dict of what --resume and eval.py need, `model` and `labels` among it: modules,
        optimisers, generators, arrays and plain values; the checkpoint comes first
        and holds the line, so neither is ever without the other for good. Raises Problem, and keeps
        the last checkpoint, for weights that are not finite.
        """
        seconds = time.time() - self.start
        text = [f"{title:>12}"]
        if quality:
            text.append(f"{quality['clusters']:5d} clusters {quality['outliers']:6d} outliers  ARI "
                        f"{quality['ARI']:.3f}  purity {quality['purity']:.3f}")
        if losses:
            text.append("  ".join(f"{name} {value:6.3f}" for name, value in losses.items()))
        if scores:
            text.append(f"mAP {100 * scores['mAP']:5.1f}  R1 {100 * scores['rank1']:5.1f}")
        line = json.dumps(dict(title=title, **more, **(quality or {}), **(losses or {}),
                               **(scores or {}), seconds=round(seconds, 2)))
        if keep:
            model, state = keep["model"], {}
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                raise Problem(f"{title}: weights are not finite, training diverged (lower --lr; "
                              "the last good epoch is kept)")
            for name, value in keep.items():
                state[name] = (value.get_state() if isinstance(value, torch.Generator) else
                               torch.from_numpy(value) if isinstance(value, np.ndarray) else
                               value.state_dict() if hasattr(value, "state_dict") else value)
            save_checkpoint(os.path.join(self.folder, "last.pt"), **vars(self.args), **state,
                            parts=model.parts, pooling=model.pooling, epoch=more["epoch"],
                            images=len(keep["labels"]), scores=scores or {}, line=line,
                            seconds=seconds)
        top = f"{self.header}\n" if self.header else ""  # a new run replaces what failed before
        self._append(f"{top}{line}\n".encode(), 0 if top else self.file.seek(0, os.SEEK_END))
        self.header = None
        try:
            tqdm.write(" | ".join(text) + f" | {seconds:6.0f} s", file=sys.stdout)
        except OSError:  # nobody reads the screen any more (| head): the log goes on
            pass


def save_checkpoint(path, **state):
    """Write plain values and tensors to `path` in one move: a reader sees the old file or the new
    one. Raises Problem, and keeps the old file, when that fails."""
    draft = f"{path}.tmp"
    try:
        with open(draft, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        raise Problem(f"{path} cannot be written: {error} (free some space or choose another --out;"
                      " an earlier file is kept)") from error
    finally:
        if os.path.exists(draft):
            os.remove(draft)


def load_checkpoint(path, keys=(), **kinds):
    """Read what save_checkpoint wrote, never executing anything in it. Raises Problem if it lacks
    `keys`, or values of `kinds`: key=type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror} (name a finished run's folder, its "
                      "last.pt, or a file of weights)") from error
    except Exception as error:  # torch raises many kinds here; each means a file of no use
        raise Problem(f"{path} is no checkpoint of tensors and plain values, so it is not read "
                      f"({type(error).__name__}; choose another file)") from error
    missing = [k for k in (*keys, *kinds) if not isinstance(state, dict) or k not in state]
    if missing:
        raise Problem(f"{path} is a file of another kind: it has no {', '.join(missing[:5])} "
                      "(choose another file, or another --out)")
    if not all(isinstance(state[key], kind) for key, kind in kinds.items()):
        raise Problem(f"{path} was not written by these pages (choose another file, or --out)")
    return state


def load_encoder(path):
    """A checkpoint of any page -> the network on the CPU, and the checkpoint's dict.

    Raises Problem for a file that is none, or whose weights do not fit the architecture it names.
    """
    state = load_checkpoint(path, model=dict, arch=str, parts=int, pooling=str, size=tuple,
                            data=str, root=str, epoch=int, epochs=int, bf16=bool, fp32=bool)
    if not (state["parts"] in range(9) and state["pooling"] in ("gem", "avg")
            and len(state["size"]) == 2
            and all(type(side) is int and 32 <= side <= 2048 for side in state["size"])):
        raise Problem(f"{path} was not written by these pages (choose another file)")
    model = Encoder(state["arch"], "none", state["parts"], state["pooling"])
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        line = str(error).splitlines()[:2][-1].strip()
        raise Problem(f"{path} holds no network of --arch {state['arch']}: {line[:200]}") from error
    return model, state
