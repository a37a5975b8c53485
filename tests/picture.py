"""Draw the README's pictures, from runs of the toy set: people under each camera, framed by
cluster, as the first epoch found them and as the last; the lesson of CCSD's report for one image;
the loss terms of runs.

  python ccsd.py --epochs 1 --iters 1 && python ccsd.py && python mskd.py && python sskd.py
  P=tests/picture.py; R=runs/ccsd-toy-s0
  python $P clusters $R-epochs1-iters1 $R tests/clusters.png
  python $P lesson $R tests/lesson.png
  python $P curves $R runs/mskd-toy-s0 runs/sskd-toy-s0 tests/curves.svg
"""

import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402
import eval as scoring  # noqa: E402
import lesson  # noqa: E402
import report  # noqa: E402

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
        write(draw, GAP + column * (WIDTH + GAP), 25, f"camera {train.camera_names[camera]}", 10,
              "#555555")
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


def clusters(before, after, path):
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
    save(whole, path)


def save(picture, path):
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


def write(draw, x, y, text, size=12, colour="#222222"):
    draw.text((x, y), text, colour, ImageFont.load_default(size))


def draw_candidates(whole, x, y, e, title, candidates):
    """Five candidates from (x, y) on: picture, cluster, p and q as bars."""
    draw = ImageDraw.Draw(whole)
    write(draw, x, y, title, 13)
    for n, (image, words, frame, p, q) in enumerate(candidates):
        left, top, right = x + 4 + n * 74, y + 26, frame == "right"
        draw.rectangle((left - 4, top - 4, left + WIDTH + 3, top + HEIGHT + 3),
                       COLOURS[0] if right else COLOURS[5])
        whole.paste(Image.open(e.train.paths[image]).resize((WIDTH, HEIGHT)), (left, top))
        what = "right, " if right else "wrong, "
        k, *label = words.removeprefix("cluster ").split(", ")
        write(draw, left - 4, top + HEIGHT + 6, what + k, 11)
        for name, value, colour, at in (("p", p, "#80c0b0", 22), ("q", q, "#e0b0c8", 38)):
            row = top + HEIGHT + at
            draw.rectangle((left - 4, row, left - 4 + round(64 * value), row + 13), colour)
            write(draw, left - 1, row, f"{name} {100 * value:.0f} %", 11)
        write(draw, left - 4, top + HEIGHT + 53, "".join(label), 11)


def the_lesson(path_of_run, path):
    """CCSD's teacher and student for an image of which a report says that they differ and the
    teacher is right."""
    run = scoring.open_run(path_of_run)
    scoring.load_data(run, scoring.get_args([path_of_run]))
    images = common.read_images(run.train, *run.state["size"])
    network, _ = scoring.initial_network(run)
    e, e0 = lesson.both_epochs(run, images, [network.eval()], [])
    c = lesson.ccsd_choices(e, e.features)
    rows = [row for title, row in lesson.cases(e, c)[0] if "the teacher is right" in title]
    row = max(rows, key=lambda row: images[c.image[row]].float().mean())  # the brightest
    i, w = c.image[row], int(c.other[row])
    whole = Image.new("RGB", (910, 438), "white")
    draw = ImageDraw.Draw(whole)
    write(draw, 4, 2, "The image", 15)
    whole.paste(Image.open(e.train.paths[i]).resize((2 * WIDTH, 2 * HEIGHT)), (4, 52))
    for n, line in enumerate((f"camera {lesson.camera(e, i)}", f"cluster {e.labels[i]}")):
        write(draw, 4, 234 + 15 * n, line)
    for x, when, state in ((120, "Before training began", e0), (520, "Now", e)):
        write(draw, x, 2, when, 15)
        sides, kl = lesson.ccsd_candidates(e, state.features, i, w)
        for n, (title, candidates, _) in enumerate(sides):
            draw_candidates(whole, x, 26 + 194 * n, e, title, candidates)
        write(draw, x, 416, f"KL(p || q) = {kl:.3f}", 13)
    save(whole, path)


def curves(*names):
    """Charts of the loss terms of runs, as in their reports, on white paper."""
    *paths, out = names
    charts, height = "", 0
    for n, path in enumerate(paths):
        run = scoring.open_run(path)
        scoring.read_log(run)
        lines = [(term, *zip(*((line["epoch"], line[term]) for line in run.log if term in line)))
                 for term in run.terms]
        chart = report.line_chart(f"Loss terms of {path}", lines, "epoch",
                                  uprights=report.starts(lines))
        tall = float(chart.split('viewBox="0 0 360 ')[1].split('"')[0])
        height = max(height, tall)
        page = next(name for name in lesson.PAGES if name in run.state["code"])
        charts += (f'<text x="{380 * n + 50}" y="16" class="page">{page}</text>'
                   + chart.replace("<svg ", f'<svg x="{380 * n}" y="24" width="360" '
                                   f'height="{tall:.0f}" ', 1))
    size = 380 * len(paths) - 20, round(height) + 24
    style = (":root {--paper: #fff; --ink: #1c1c1e; --rule: #d5d5da; --c0: #0072b2; --c1: #d55e00; "
             "--c2: #008060; --c3: #a8487e; --c4: #2a8fc9; --c5: #b27700} "
             + report.STYLE[report.STYLE.index(" .axis"):] + ".page {font-weight: bold}")
    with open(out, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
                   f'width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="12">'
                   f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
                   f"{charts}</svg>\n")


if __name__ == "__main__":
    dict(clusters=clusters, lesson=the_lesson, curves=curves)[sys.argv[1]](*sys.argv[2:])
