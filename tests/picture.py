"""Draw the README's picture: people of the toy set under each camera, framed by cluster, as the
first epoch found them and as the last.

  python ccsd.py --epochs 1 --iters 1 && python ccsd.py
  python tests/picture.py runs/ccsd-toy-s0-epochs1-iters1 runs/ccsd-toy-s0 tests/clusters.png
"""

import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f3c8d",
           "#11a579", "#a5682a", "#3969ac", "#80ba5a")  # told apart by colour-blind people, too
WIDTH, HEIGHT, GAP, FRAME, TOP = 44, 88, 14, 5, 44
PEOPLE = 5


def draw_panel(title, train, labels, people, cameras):
    """-> a picture: a row for each person, a column for each camera, the frame tells the cluster;
    grey: an outlier."""
    columns = len(cameras)
    panel = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, TOP + len(people) * (HEIGHT + GAP)),
                      "white")
    draw, colour = ImageDraw.Draw(panel), {-1: "#999999"}
    draw.text((GAP, 4), title, "#222222", ImageFont.load_default(15))
    for column, camera in enumerate(cameras):
        draw.text((GAP + column * (WIDTH + GAP), 25), f"camera {camera + 1}", "#555555",
                  ImageFont.load_default(10))
    for row, person in enumerate(people):
        for column, camera in enumerate(cameras):
            image = np.flatnonzero((train.pids == person) & (train.cams == camera))[0]
            picture = Image.open(train.paths[image]).resize((WIDTH, HEIGHT))
            x, y = GAP + column * (WIDTH + GAP), TOP + row * (HEIGHT + GAP)
            cluster = labels[image]
            tone = colour.setdefault(cluster, COLOURS[(len(colour) - 1) % len(COLOURS)])
            draw.rectangle((x - FRAME, y - FRAME, x + WIDTH + FRAME - 1, y + HEIGHT + FRAME - 1),
                           tone)
            panel.paste(picture, (x, y))
            name = "none" if cluster < 0 else str(cluster)
            draw.rectangle((x, y + HEIGHT - 11, x + 8 + 5 * len(name), y + HEIGHT - 1), tone)
            draw.text((x + 3, y + HEIGHT - 12), name, "white", ImageFont.load_default(9))
    return panel


def main(before, after, path):
    runs = [common.load_run(os.path.join(run, "last.pt")) for run in (before, after)]
    train, *_ = common.load(runs[1]["data"], runs[1]["root"])
    cameras = np.unique(train.cams)
    seen = [p for p in np.unique(train.pids) if len(set(train.cams[train.pids == p])) == 5]
    people = np.random.default_rng(1).choice(seen, PEOPLE, replace=False)
    panels = [draw_panel(title, train, run["labels"].numpy(), people, cameras) for title, run in
              zip(("Clusters of the first epoch", "Clusters of the last epoch"), runs)]
    width, height = panels[0].size
    whole = Image.new("RGB", (2 * width + 30, height), "white")
    whole.paste(panels[0], (0, 0))
    whole.paste(panels[1], (width + 30, 0))
    whole.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
