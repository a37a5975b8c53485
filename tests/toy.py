"""Draw the toy set: pedestrians for learning re-identification without downloading anything.

A person is a combination of body, hair, clothes and bags; a camera is a background, a colour cast,
contrast, blur and noise. Within a camera people are easy to tell apart, across cameras they are
not: the problem that the papers attack. Two domains: "toy" has 80 + 50 people and 5 very different
cameras, "toy-source" 60 + 20 others and 4 milder cameras. Market-1501's layout and file names.

  python tests/toy.py data/toy
  python tests/toy.py data/toy-source --domain toy-source
"""

import argparse
import colorsys
import os
import sys
import tempfile

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
WIDTH, HEIGHT, SCALE = 64, 128, 2  # size of an image; it is drawn at twice the size, then shrunk
SKINS = ((245, 214, 186), (222, 178, 140), (172, 118, 80), (110, 72, 48))
HAIRS = ((25, 20, 20), (80, 50, 30), (150, 100, 50), (215, 185, 110), (140, 140, 145),
         (150, 50, 30))
CLOTHES = ((0, .85, .8), (.06, .85, .95), (.14, .85, .95), (.30, .7, .6), (.47, .7, .65),
           (.6, .8, .85), (.68, .65, .45), (.78, .55, .65), (.91, .5, .9), (0, 0, .95), (0, 0, .55),
           (0, 0, .12), (.08, .5, .42))  # hue, saturation, value
FRONT, SIDE, BACK = range(3)


def draw_set(root, seed=1, domain="toy"):
    """Draw a toy data set in Market-1501's layout into the new folder `root` (2,217 JPEGs).

    Two domains: "toy" has 5 very different cameras, "toy-source" 4 milder ones and other people.
    Equal arguments give equal pixels. The folder appears only when it is complete.
    """
    rng = np.random.default_rng([seed, ("toy", "toy-source").index(domain)])
    cameras, gap, train_ids, test_ids = (5, 1.0, 80, 50) if domain == "toy" else (4, .6, 60, 20)
    cameras = [draw_camera(rng, gap) for _ in range(cameras)]
    plan = []  # tracklets: person, looks, camera, folder of each of its images
    for person in range(1, train_ids + test_ids + 1):
        looks, test = draw_looks(rng), person > train_ids
        order = rng.permutation(len(cameras))
        for camera in order[:rng.integers(len(cameras) - 2, len(cameras) + 1)]:
            shots = rng.integers(3, 6)
            parts = ["query"] + ["bounding_box_test"] * (shots - 1)
            plan.append((person, looks, camera, parts if test else ["bounding_box_train"] * shots))
    for _ in range(40):  # distractors: people nobody asks for
        plan.append((0, draw_looks(rng), rng.integers(len(cameras)), ["bounding_box_test"] * 3))
    for i in range(40):  # junk: boxes that cut or miss the person
        looks = dict(draw_looks(rng), height=rng.uniform(.3, .5) if i % 2 else 1.9)
        plan.append((-1, looks, rng.integers(len(cameras)), ["bounding_box_test"]))
    os.makedirs(os.path.dirname(os.path.abspath(root)), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(root))) as draft:
        for part in FOLDERS:
            os.makedirs(os.path.join(draft, "new", part))
        frame = 0
        bar = tqdm(plan, f"drawing {root}", leave=False, disable=None)
        for person, looks, camera, parts in bar:
            view = rng.choice(3, p=.25 + .25 * cameras[camera]["views"])
            light, cover = np.exp(rng.normal(0, .08)), rng.random() < .12 and rng.integers(1, 3)
            for shot, part in enumerate(parts):
                frame += int(rng.integers(5, 60))
                turned = view if rng.random() < .8 else rng.integers(3)
                picture = draw_picture(rng, looks, cameras[camera], turned, light, cover)
                who = f"{person:04d}" if person >= 0 else "-1"
                name = f"{who}_c{camera + 1}s1_{frame:06d}_{shot + 1:02d}.jpg"
                picture.save(os.path.join(draft, "new", part, name), quality=88)
        try:
            os.rename(os.path.join(draft, "new"), root)
        except OSError:
            if not os.path.isdir(root):  # else another run drew the same pictures meanwhile
                raise


def rgb(hue, saturation, value):
    return tuple(int(255 * c) for c in
                 colorsys.hsv_to_rgb(hue % 1, *np.clip((saturation, value), 0, 1)))


def draw_looks(rng):
    """-> dict: what stays the same about a person in every picture."""
    def cloth(which):
        hue, saturation, value = CLOTHES[which]
        return rgb(hue + rng.normal(0, .01), saturation * rng.uniform(.85, 1.1),
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


def draw_camera(rng, gap):
    """-> dict: what stays the same about a camera; `gap` scales how far cameras' colours differ."""
    return dict(
        scene=rng.integers(5), period=int(rng.integers(8, 22)),
        paint=rgb(rng.random(), rng.uniform(.05, .5), rng.uniform(.3, .9)),
        paint2=rgb(rng.random(), rng.uniform(.05, .5), rng.uniform(.2, .9)),
        gain=np.exp(rng.normal(0, .20 * gap, 3)), gamma=np.exp(rng.uniform(-.45, .45) * gap),
        saturation=rng.uniform(1 - .6 * gap, 1.15), contrast=rng.uniform(1 - .4 * gap, 1.15),
        offset=rng.uniform(-22, 22) * gap, shade=rng.uniform(-.3, .3) * gap,
        blur=rng.uniform(0, 1), noise=rng.uniform(2, 9), resolution=rng.uniform(.45, 1),
        scale=rng.uniform(.84, 1.02), pitch=rng.uniform(0, 7), views=rng.dirichlet([.7, .7, .7]))


def draw_picture(rng, looks, camera, view, light, cover):
    """One detection: scene, person, perhaps something in front, then the camera's optics."""
    width, height = WIDTH * SCALE, HEIGHT * SCALE
    picture = Image.new("RGB", (width, height), camera["paint"])
    draw = ImageDraw.Draw(picture)
    draw_scene(draw, rng, camera, width, height)
    tall = .93 * height * looks["height"] * camera["scale"] * rng.normal(1, .035)
    left = width / 2 + rng.normal(0, 3) * SCALE
    top = (height - tall) / 2 + (rng.normal(0, 3.5) + camera["pitch"] - 3) * SCALE
    draw_person(draw, rng, looks, view, left, top, tall)
    if cover == 1:  # a low box of the scene's colour
        x, y = rng.uniform(0, .75) * width, rng.uniform(.45, .8) * height
        draw.rectangle([x, y, x + 40, height], fill=camera["paint2"])
    elif cover == 2:  # a post
        x = rng.uniform(0, .75) * width
        draw.rectangle([x, 0, x + 18, height], fill=(90, 90, 90))
    small = [int(side * camera["resolution"]) for side in (WIDTH, HEIGHT)]
    picture = picture.resize(small, Image.BOX).resize((WIDTH, HEIGHT), Image.BILINEAR)
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(camera["blur"])), np.float32)
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + camera["saturation"] * (pixels - grey)
    pixels = 128 + camera["contrast"] * (pixels - 128) + camera["offset"]
    pixels *= camera["gain"] * light
    pixels *= 1 + camera["shade"] * np.linspace(-1, 1, WIDTH)[None, :, None]  # light from one side
    pixels = 255 * (pixels.clip(1, 255) / 255) ** camera["gamma"]
    pixels += rng.normal(0, camera["noise"], pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_scene(draw, rng, camera, width, height):
    step, paint, paint2 = camera["period"] * SCALE, camera["paint"], camera["paint2"]
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


def draw_person(draw, rng, looks, view, left, top, tall):
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to draw; it must not exist yet")
    parser.add_argument("--domain", choices=("toy", "toy-source"), default="toy",
                        help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s; the pages use it)")
    args = parser.parse_args(argv)
    try:
        draw_set(args.folder, args.seed, args.domain)
    except OSError as error:
        sys.exit(f"cannot draw into {args.folder}: {error} (name another folder)")


if __name__ == "__main__":
    main()
