"""Folders, names, pictures: what is read is what lies there, and what is wrong is named."""

import os

import numpy as np
import pytest
import torch
import toy
from conftest import draw
from PIL import Image, ImageOps

import common


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 8), (200, 30, 60)).save(folder / name, format="PNG")


def market(root):
    touch(root / "bounding_box_train", "0002_c3s1_000451_03.jpg", "0007_c1s1_1.PNG")
    touch(root / "query", "0001_c1s1_1.jpg.jpg", "0001_c3s1_2.jpg")
    touch(root / "bounding_box_test", "0001_c5s1_1.jpg", "-1_c1s1_1.jpg", "0000_c1s1_9.jpg")
    return root


def test_market_grammar(tmp_path, monkeypatch):
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    train, query, gallery = common.load(str(market(tmp_path / "m")))
    # cameras 1, 3, 5 -> 0, 1, 2
    assert train.pids.tolist() == [2, 7] and train.cams.tolist() == [1, 0]
    assert query.pids.tolist() == [1, 1] and query.cams.tolist() == [0, 1]  # .jpg.jpg is read
    # junk is gone
    assert sorted(zip(gallery.pids.tolist(), gallery.cams.tolist())) == [(0, 0), (1, 2)]
    assert ([os.path.basename(p) for p in train.paths]
            == sorted(os.path.basename(p) for p in train.paths))
    assert train.pids.dtype == train.cams.dtype == np.int64


@pytest.mark.parametrize("where", ["", "market1501", "market1501/Market-1501-v15.09.15",
                                   "Market-1501-v15.09.15"])
def test_every_place_a_key_is_looked_for(tmp_path, where, capsys):
    market(tmp_path / where)
    assert len(common.load("market1501", str(tmp_path))[0].paths) == 2
    said = capsys.readouterr().err
    assert "2 images in" in said and "12,936 published" in said


def test_more_images_than_published_are_told_too(tmp_path, monkeypatch, capsys):
    market(tmp_path)
    monkeypatch.setitem(common.DATASETS, "market1501", (["."], (1, 2, 2)))
    common.load("market1501", str(tmp_path))
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "train: 2 images in" in said and "1 published" in said


def test_fewer_training_images_than_a_batch(tmp_path):
    folder = str(market(tmp_path))
    assert len(common.load(folder, at_least=2)[0].paths) == 2
    with pytest.raises(common.Problem, match="2 training images .* batch of 3 .lower --batch-size"):
        common.load(folder, at_least=3)


@pytest.mark.parametrize("key", [k for k in common.DATASETS if not k.startswith("toy")])
def test_every_key_reads_its_official_folder(tmp_path, key):
    for folder in common.DATASETS[key][0]:
        parts = common.TRIPLES[1] if key == "veri776" else common.TRIPLES[0]
        for part in parts:
            touch(tmp_path / folder / part, "0001_c001_00016450_0.jpg", "0005_c2_f0046985.png")
        assert [len(s.paths) for s in common.load(key, str(tmp_path))] == [2, 2, 2]
        for part in parts:
            os.rename(tmp_path / folder / part, tmp_path / folder / ("old_" + part))


@pytest.mark.parametrize("train, test", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_lists(tmp_path, train, test):
    root = tmp_path / "MSMT17_V1"
    lists = {"train": "0000/0000_045_12_0303morning_0006_2.jpg 0",
             "val": "0001/0001_000_02_a.jpg 1", "query": "0000/0000_000_15_b.jpg 0",
             "gallery": "0000/0000_001_02_c.jpg 0"}
    for kind, line in lists.items():
        touch(root / (train if kind in ("train", "val") else test) / line[:4], line.split()[0][5:])
        (root / f"list_{kind}.txt").write_text(line + "\n")
    splits = common.load("msmt17", str(tmp_path))
    assert [s.pids.tolist() for s in splits] == [[0, 1], [0], [0]]
    assert [s.cams.tolist() for s in splits] == [[1, 0], [2], [0]]  # cameras 12, 2 | 15 | 2
    assert all(os.path.isfile(path) for s in splits for path in s.paths)
    for line in ("0000/0000.jpg 0", "0000/0000_000_15_b.jpg", "0000/0000_000_15_b.jpg zero",
                 "../../0000_000_15_b.jpg 0", "/0000_000_15_b.jpg 0"):
        (root / "list_query.txt").write_text(line + "\n")
        with pytest.raises(common.Problem, match="list_query.txt"):
            common.load("msmt17", str(tmp_path))
    os.rename(root / train, root / "elsewhere")
    with pytest.raises(common.Problem, match="no folder train or mask_train_v2"):
        common.load("msmt17", str(tmp_path))


def test_what_is_no_image_is_skipped_or_named(tmp_path):
    market(tmp_path)
    for name in ("Thumbs.db", ".DS_Store", "._0002_c1.jpg"):
        (tmp_path / "query" / name).write_bytes(b"x")
    (tmp_path / "query" / "__MACOSX").mkdir()
    assert len(common.load(str(tmp_path))[1].paths) == 2
    for i in range(7):
        (tmp_path / "query" / f"person{i}.jpg").write_bytes(b"x")
    with pytest.raises(common.Problem, match="7 files.*person0.jpg.*person4.jpg"):
        common.load(str(tmp_path))


@pytest.mark.parametrize("name", ["99999999999_c1.jpg", "-2_c1.jpg", "0001_c9999999999.jpg"])
def test_numbers_that_are_no_people(tmp_path, name):
    market(tmp_path)
    touch(tmp_path / "query", name)
    with pytest.raises(common.Problem, match="query"):
        common.load(str(tmp_path))


def test_query_without_gallery(tmp_path):
    market(tmp_path)
    os.rename(tmp_path / "bounding_box_test" / "0001_c5s1_1.jpg",
              tmp_path / "bounding_box_test" / "0009_c5s1_1.jpg")
    with pytest.raises(common.Problem, match="nobody in the query split is in the gallery"):
        common.load(str(tmp_path))


def test_a_few_images_without_ids_are_of_every_camera():
    train = [(f"{i}.jpg", None, "a" if i < 250 else "b") for i in range(300)]
    few = [*train[:100], *train[250:]]
    assert common.take_few([train, [], []]) == [few, [], []]


def test_missing_and_empty(tmp_path):
    with pytest.raises(common.Problem) as problem:
        common.load("market1501", str(tmp_path))
    for tried in ("", "market1501", "market1501/Market-1501-v15.09.15", "Market-1501-v15.09.15"):
        assert os.path.join(str(tmp_path), tried).rstrip("/") in str(problem.value)
    market(tmp_path)
    for name in os.listdir(tmp_path / "query"):
        os.remove(tmp_path / "query" / name)
    with pytest.raises(common.Problem, match="query split holds no images"):
        common.load(str(tmp_path))


@pytest.mark.parametrize("domain, cameras, ids", [("toy", 5, 80), ("toy-source", 4, 60)])
def test_toy_set(tmp_path, domain, cameras, ids, monkeypatch):
    if domain == "toy":                                          # one is drawn in full
        monkeypatch.setattr(toy, "draw_picture", lambda *_: Image.new("RGB", (64, 128)))
        monkeypatch.setattr(common, "draw_toy", lambda folder, _: toy.draw_set(folder))
    train, query, gallery = common.load(domain, str(tmp_path))
    assert set(train.cams) == set(range(cameras)) and set(train.pids) == set(range(1, ids + 1))
    assert not set(train.pids) & set(query.pids)                 # other people in the test
    assert 0 in gallery.pids and 0 not in query.pids             # distractors
    names = os.listdir(tmp_path / domain / "bounding_box_test")
    assert sum(name.startswith("-1_") for name in names) == 40   # junk, dropped by load
    assert all(Image.open(path).size == (64, 128) for path in query.paths[:5])
    for person in range(1, ids + 1):                             # nobody is seen by one camera only
        assert len(set(train.cams[train.pids == person])) >= 2


def test_toy_set_is_deterministic(tmp_path, capfd, monkeypatch):
    draw_picture = toy.draw_picture

    def every_tenth(rng, *about):
        return draw_picture(rng, *about) if next(count) % 10 == 0 else Image.new("RGB", (8, 8))
    monkeypatch.setattr(toy, "draw_picture", every_tenth)
    read = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        count = iter(range(10**6))
        toy.draw_set(str(tmp_path / folder), seed, "toy-source")
        read.append({path.relative_to(tmp_path / folder): path.read_bytes()
                     for path in (tmp_path / folder).glob("*/*")})
    assert read[0] == read[1] != read[2] and len(read[0]) > 1000
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]         # no draft is left behind
    with pytest.raises(common.Problem, match="/dev/null/toy .*--root"):
        common.draw_toy("/dev/null/toy", "toy")
    assert "cannot draw into /dev/null/toy" in capfd.readouterr().err


def test_read_images(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 40, 20, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    Image.new("L", (20, 40), 77).save(tmp_path / "5.png")          # grey becomes three channels
    split = common.Split([str(tmp_path / f"{i}.png") for i in range(6)], np.zeros(6), np.zeros(6))
    told = []
    monkeypatch.setattr(common, "check_memory", lambda *args: told.append(args))
    images = common.read_images(split, 40, 20)
    assert told == [(6, 40, 20)]                                   # before any is read
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 40, 20)
    assert (images[:5].permute(0, 2, 3, 1).numpy() == pixels).all() and (images[5] == 77).all()
    half = Image.fromarray(pixels[0]).resize((10, 20), Image.BICUBIC)
    assert (common.read_images(split, 20, 10)[0].permute(1, 2, 0).numpy() == np.array(half)).all()
    many = split._replace(paths=split.paths * 25)                  # they come in several parts
    assert torch.equal(common.read_images(many, 40, 20), images.repeat(25, 1, 1, 1))


@pytest.mark.parametrize("spoil", ["empty", "text", "truncated", "huge"])
def test_unreadable_image_is_named(tmp_path, spoil, monkeypatch):
    path = tmp_path / "0001_c1s1_000001_00.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "truncated": data[:len(data) // 2],
                      "huge": data}[spoil])
    if spoil == "huge":
        monkeypatch.setattr(common, "MAX_PIXELS", 64 * 32 - 1)
    with pytest.raises(common.Problem, match="0001_c1s1_000001_00.jpg"):
        common.read_images(common.Split([str(path)], np.zeros(1), np.zeros(1)), 64, 32)


def test_pictures_look_as_in_a_viewer(tmp_path):
    """EXIF orientation, transparency over hidden colours: as Pillow's own functions."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 6, 3), dtype=np.uint8))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for name in ("x.png", "x.tif", "x.webp"):
            picture.save(tmp_path / name, exif=exif, lossless=True)
            wanted = ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
            assert (np.array(common.open_image(tmp_path / name)) == np.array(wanted)).all()
    exif = Image.Exif()
    exif[0x0112], exif[0x011a] = 6, 72.
    damaged = bytearray(exif.tobytes())
    damaged[31] = 2  # the resolution is text: Pillow can read this, but not write it again
    picture.save(tmp_path / "damaged.png", exif=bytes(damaged))
    seen = np.array(common.open_image(tmp_path / "damaged.png"))
    assert (seen == np.rot90(np.array(picture), -1)).all()
    hidden = picture.convert("RGBA")
    hidden.putalpha(Image.fromarray(np.repeat([[0], [255]], 6, 0).repeat(6, 1).astype(np.uint8)))
    hidden.save(tmp_path / "hidden.png")
    seen = np.array(common.open_image(tmp_path / "hidden.png"))
    assert (seen[:6] == 255).all() and (seen[6:] == np.array(picture)[6:]).all()
    grey = np.array(picture.convert("L"))
    for name, wide in ("16.png", grey.astype(np.uint16)), ("f.tif", grey.astype(np.float32)):
        Image.fromarray(wide).save(tmp_path / name)
        with pytest.raises(common.Problem, match=f"{name}.*mode .*8 bits"):
            common.open_image(tmp_path / name)


def test_files_that_are_no_images_are_counted_and_named(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>not found</html>")
    split = common.Split([str(tmp_path / f"{i}.jpg") for i in range(7)], None, None)
    says = "7 images are no good.*0.jpg.*it is a web page.*4.jpg"
    with pytest.raises(common.Problem, match=says):
        common.read_images(split, 64, 32)


def by_hand(image, u, pad, erase, jitter):
    """augment() of one image with one image's 31 random numbers, pixel by pixel in float64."""
    _, h, w = image.shape
    flip, dy, dx, gate, top, left = u[:6]
    dy, dx = int(dy * (2 * pad + 1)) - pad, int(dx * (2 * pad + 1)) - pad
    out = np.zeros((3, h, w))
    for y in range(h):
        for x in range(w):
            sx = x if flip < .5 else w - 1 - x
            if 0 <= y + dy < h and 0 <= sx + dx < w:
                out[:, y, x] = image[:, y + dy, sx + dx] / 255
    if jitter:
        out *= np.exp(jitter * (u[6:9] - .5))[:, None, None]
        contrast, saturation = np.exp(jitter * (u[9:11] - .5))
        out = out.mean() + contrast * (out - out.mean())
        grey = out.mean(0)
        out = (grey + saturation * (out - grey)).clip(0, 1)
    out = (out - np.array(common.MEAN)[:, None, None]) / np.array(common.STD)[:, None, None]
    for share, aspect in zip(u[11:21], u[21:31]):
        area, aspect = h * w * (.02 + .38 * share), .3 + (1 / .3 - .3) * aspect
        height, width = round((area * aspect) ** .5), round((area / aspect) ** .5)
        if height < h and width < w:
            if gate < erase:
                y, x = int(top * (h - height + 1)), int(left * (w - width + 1))
                out[:, y:y + height, x:x + width] = 0
            break
    return out


@pytest.mark.parametrize("pad, erase, jitter, size", [
    (10, .5, 0, (32, 16)), (6, .5, .5, (32, 16)), (0, 0, 0, (32, 16)), (3, 1, 1, (32, 16)),
    (0, 1, 0, (12, 12)),                                           # some tries do not fit
    (0, 1, 0, (4, 60)), (0, 1, 0, (60, 4))])                       # in some images none does
def test_augment_equals_pixel_by_pixel(pad, erase, jitter, size):
    images = torch.randint(0, 256, (24, 3, *size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    before = images.clone()
    out = common.augment(images, torch.Generator().manual_seed(2), pad, erase, jitter)
    u = torch.rand(24, 31, generator=torch.Generator().manual_seed(2)).double().numpy()
    for i in range(24):
        expected = by_hand(images[i].numpy(), u[i], pad, erase, jitter)
        np.testing.assert_allclose(out[i].numpy(), expected, atol=2e-5)
    assert torch.equal(images, before)


def test_normalise_is_augment_without_changes():
    image = torch.randint(0, 256, (1, 3, 16, 8), dtype=torch.uint8)
    expected = by_hand(image[0].numpy(), np.zeros(31), pad=0, erase=0, jitter=0)
    np.testing.assert_allclose(common.normalise(image)[0], expected, atol=2e-5)


@pytest.mark.parametrize("height, pad", [(24, 1), (47, 1), (48, 2), (72, 3)])
def test_augment_pads_in_proportion_to_the_height_and_erases_in_half_of_the_images(height, pad):
    images = torch.randint(0, 256, (48, 3, height, 24), dtype=torch.uint8)
    out, same = (common.augment(images, torch.Generator().manual_seed(0), *more)
                 for more in ((), (pad, .5, 0)))
    assert torch.equal(out, same)


def test_pk_batches():
    rng = np.random.default_rng(0)
    labels, cams = rng.integers(-1, 9, 120), rng.integers(0, 3, 120)
    labels[labels == 4] = -1
    labels[7] = 4                                                # a singleton repeats its image
    generator = torch.Generator().manual_seed(0)
    seen = []
    for index in common.pk_batches(labels, cams, 4, 5, 50, generator):
        assert index.shape == (20,) and index.dtype == torch.int64
        of = labels[index].reshape(4, 5)
        assert (of == of[:, :1]).all() and len(set(of[:, 0])) == 4 and (of >= 0).all()
        for row in index.view(4, 5).numpy():
            mine = np.flatnonzero(labels == labels[row[0]])
            others = mine[cams[mine] != cams[row[0]]]
            if len(mine) == 1:
                assert (row == 7).all()
            elif len(others):
                assert (cams[row[1:]] != cams[row[0]]).all()     # other cameras where there are any
            if len(others) >= 4:
                assert len(set(row)) == 5                        # no repeats while there are enough
        seen.append(of[:, 0])
    assert len(seen) == 50
    for start in range(0, 50, 2):  # 9 labels, 4 a batch: two batches use 8 different labels
        assert len(set(np.concatenate(seen[start:start + 2]))) == 8


def test_pk_batches_anchor_is_uniform_and_cameras_can_be_ignored():
    labels, cams = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 0])
    count = np.zeros(5)
    for index in common.pk_batches(labels, cams, 1, 1, 8000, torch.Generator().manual_seed(0)):
        count[index] += 1
    assert abs(count[:4] / 4000 - .25).max() < .03
    pairs = [index.tolist() for index in
             common.pk_batches(labels, None, 1, 2, 600, torch.Generator().manual_seed(0))]
    assert {b for a, b in pairs if a == 0} == {1, 2, 3}
    assert {b for a, b in [i.tolist() for i in common.pk_batches(
        labels, cams, 1, 2, 600, torch.Generator().manual_seed(0))] if a == 0} == {3}
    with pytest.raises(common.Problem, match="--batch-size"):
        next(common.pk_batches(labels, cams, 3, 2, 1, torch.Generator()))
    with pytest.raises(common.Problem, match="nothing to be told from"):  # also of --true-ids
        next(common.pk_batches(np.zeros(5, int), cams, 1, 2, 1, torch.Generator()))


def test_pk_batches_up_to_their_limits():
    """As many labels as a batch takes, or twice as many; as many images as places, one more, one
    less. None is left out, and none repeats before it must."""
    for clusters in (4, 8):
        labels, cams = np.repeat(np.arange(clusters), 6), np.arange(6 * clusters) % 2
        batches = [*common.pk_batches(labels, cams, 4, 5, 8, torch.Generator().manual_seed(0))]
        for i in range(0, 8, clusters // 4):
            seen = np.concatenate([labels[index] for index in batches[i:i + clusters // 4]])
            assert np.unique(seen, return_counts=True)[1].tolist() == [5] * clusters
    for n in range(1, 9):
        labels = np.repeat([0, 1], n + 1)
        other = np.tile([1] + [0] * n, 2)  # one image and n of another camera
        generator = torch.Generator().manual_seed(0)
        for index in common.pk_batches(labels, other, 2, 5, 20, generator):
            assert len(index) == 10
            for row in index.view(2, 5).tolist():
                drawn = set(row[1:])
                assert len(drawn) == (1 if other[row[0]] == 0 else 4) or n < 4
                assert row[0] not in drawn
        for index in common.pk_batches(labels, None, 2, 5, 20, generator):
            assert len(index) == 10
            for row in index.view(2, 5).tolist():
                assert row[0] not in row[1:] and (len(set(row)) == 5 or n < 4)


def test_halves_share_neither_people_nor_cameras(tmp_path):
    folder = draw(tmp_path / "d", train=7, test=3, cameras=4, shots=2)
    whole, halves = common.load(str(folder)), [common.load(f"{folder}:{half}")
                                               for half in ("source", "target")]
    people = np.random.default_rng(0).permutation(np.arange(1, 8))
    for half, ids, cameras in zip(halves, (people[:3], people[3:]), ({1, 2}, {3, 4})):
        where = [{int(path.split("_c")[-1][0]) for path in split.paths} for split in half]
        assert where == [cameras] * 3 and set(half[0].pids.tolist()) == set(ids.tolist())
        assert set(half[1].pids.tolist()) == set(whole[1].pids.tolist())
        assert half[0].cams.min() == 0 and half[0].cams.max() == 1
        assert len(half[0].paths) == len(ids) * 2 * 2
