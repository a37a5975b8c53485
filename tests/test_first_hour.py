"""The first hour of a student: editing a page, running it again, own images, use from Python."""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import HERE, SHORT, checkpoint, draw, losses, program, refusal, short, weights
from PIL import Image

import ccsd
import common
import mskd
import sskd

FEW = [*SHORT, "--epochs", "1", "--warm-up", "1", "--true-ids"]


@pytest.fixture
def copy(tmp_path, tiny):
    """A copy of the pages that may be edited -> a function that runs one of them there."""
    for name in ("ccsd.py", "mskd.py", "common.py"):
        shutil.copy(os.path.join(HERE, name), tmp_path)

    def run(page, *words):
        done = program(str(tmp_path / page), "--data", tiny, *FEW, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done
    return run


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def folders(tmp_path):
    return sorted(os.listdir(tmp_path / "runs"))


# ------------------------------------------------------------------------------------ edited pages

def test_an_edited_page_is_a_new_run_and_an_unchanged_one_repeats_its_score(copy, tmp_path):
    first = copy("ccsd.py")
    score = re.findall(r"mAP +[\d.]+  R1 +[\d.]+", first.stdout)[-1]
    (base,) = folders(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*")}
    again = copy("ccsd.py")
    assert folders(tmp_path) == [base] and "nothing to do" in again.stdout
    assert score in again.stdout                                   # not only that it is finished
    edit(tmp_path / "ccsd.py", "args.base * L_base +", "2 * args.base * L_base +")
    edited = copy("ccsd.py")
    own = (set(folders(tmp_path)) - {base}).pop()
    assert own.startswith(base + "-") and "ccsd.py edited since" in edited.stderr
    assert own in edited.stderr and "epoch 1/1" in edited.stdout
    assert not torch.equal(*(weights(tmp_path / "runs" / name)["necks.0.weight"]
                             for name in (base, own)))
    assert "nothing to do" in copy("ccsd.py").stdout               # the edited one is finished, too
    edit(tmp_path / "common.py", "MAX_PIXELS = 2 ** 25", "MAX_PIXELS = 2 ** 24")
    assert "ccsd.py and common.py edited since" in copy("ccsd.py").stderr
    assert len(folders(tmp_path)) == 3                             # nothing was ever overwritten
    assert all(path.read_bytes() == content for path, content in before.items())
    heads = [json.loads(open(path).readline())["args"]["code"] for path in
             tmp_path.glob("runs/*/log.jsonl")]
    assert len({tuple(sorted(head.items())) for head in heads}) == 3


def test_what_a_page_keeps_of_each_image_survives_a_resume(copy, tmp_path):
    """The two lines of the course, in a page."""
    old = '    labels = resumed.get("labels")\n'
    edit(tmp_path / "ccsd.py", old, old
         + '    score = resumed.get("score", np.zeros(len(images)))\n')
    edit(tmp_path / "ccsd.py", "keep=dict(state, labels=labels)",
         "keep=dict(state, labels=labels, score=score + epoch + 1)")
    copy("ccsd.py", "--out", "a")
    copy("ccsd.py", "--out", "a", "--epochs", "2", "--resume")
    assert (common.load_checkpoint(str(tmp_path / "a" / "last.pt"))["score"] == 1 + 2).all()


NOTEBOOK = """
import importlib, re, sys
import ccsd
def run():
    ccsd.main(sys.argv[1:])
def mine(similarity, group, parent, temp):
    return 0 * similarity.sum()
run()
old, ccsd.cross_camera_loss = ccsd.cross_camera_loss, mine     # 1 replaced in memory
run()
ccsd.cross_camera_loss, ccsd.GROUP_TEMP = old, .5              # 2 another constant
run()
ccsd.GROUP_TEMP = .07
text = open("ccsd.py").read()
open("ccsd.py", "w").write(text.replace("args.base * L_base +", "2 * args.base * L_base +"))
run()                                                          # 3 edited, but not loaded
importlib.reload(ccsd)
run()                                                          # 4
"""


def test_what_is_in_memory_is_what_a_notebook_s_run_is_named_after(copy, tmp_path, tiny):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    done = copy("notebook.py")
    assert done.stdout.count("epoch 1/1") == 5 and "nothing to do" not in done.stdout
    assert len(folders(tmp_path)) == 5
    assert done.stderr.count("ccsd.py in memory differs from the file") == 3
    copy("ccsd.py")                                                # a program: the edited file
    assert len(folders(tmp_path)) == 5


def test_resume_over_edited_code_warns_and_another_out_is_never_mixed(copy, tmp_path):
    copy("ccsd.py", "--out", "mine")
    edit(tmp_path / "ccsd.py", "args.base * L_base +", "2 * args.base * L_base +")
    done = copy("ccsd.py", "--out", "mine", "--resume", "--epochs", "2")
    assert "warning: mine: ccsd.py was edited since this run began" in done.stderr
    assert len(losses(tmp_path / "mine")) == 4
    done = program(str(tmp_path / "ccsd.py"), "--out", "mine", cwd=tmp_path)
    assert done.returncode == 2 and "mine" in done.stderr and "--out" in done.stderr


def test_resume_after_an_edit_starts_anew_in_another_folder(copy, tmp_path):
    copy("ccsd.py")
    (base,) = folders(tmp_path)
    edit(tmp_path / "ccsd.py", "args.base * L_base +", "2 * args.base * L_base +")
    done = copy("ccsd.py", "--resume")                             # the old score is not its own
    (new,) = set(folders(tmp_path)) - {base}
    assert new.startswith(base + "-") and new in done.stderr and "epoch 1/1" in done.stdout


def test_a_teacher_serves_every_student_until_the_page_is_edited(copy, tmp_path):
    copy("mskd.py")
    (base,) = folders(tmp_path)
    done = copy("mskd.py", "--mu", "0")
    assert f"{base}/teacher: finished before" in done.stdout
    student = base.replace("-s0-", "-s0-mu0-")
    assert folders(tmp_path) == sorted([base, student])
    assert not (tmp_path / "runs" / student / "teacher").exists()
    edit(tmp_path / "mskd.py", "args.mu * D_g", "2 * args.mu * D_g")
    done = copy("mskd.py")
    assert "finished before" not in done.stdout and len(folders(tmp_path)) == 3


@pytest.mark.parametrize("page, words, name", [
    (ccsd, "", "ccsd-toy-s0"), (ccsd, "--kd 0", "ccsd-toy-s0-kd0"),
    (ccsd, "--kd 0.50 --seed 3", "ccsd-toy-s3-kd0.5"), (ccsd, "--kd 1", "ccsd-toy-s0"),
    (ccsd, "--refine none --true-ids", "ccsd-toy-s0-refine-none-true-ids"),
    (ccsd, "--size 64 32 --epochs 2", "ccsd-toy-s0-epochs2-size-64x32"),
    (ccsd, "--resume --root x --device cpu --eval-every 2 --recompute", "ccsd-toy-s0"),
    (ccsd, "--data some/where:source", "ccsd-where-source-s0"),
    (ccsd, "--data x --weights ../a/b.pth", "ccsd-x-s0-weights-..-a-b.pth"),
    (mskd, "--teacher runs/a/teacher --stage student", "mskd-toy-s0-teacher-runs-a-teacher"),
    (sskd, "--soft 0 --nets 1", "sskd-toy-s0-nets1-soft0")])
def test_a_folder_is_named_after_its_flags(page, words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.get_args(words.split()).out == os.path.join("runs", name)
    assert page.get_args([*words.split(), "--out", "a b"]).out == "a b"


def test_flags_of_other_kinds_have_folders_too():
    """A student's flag may hold a list, nothing, yes or no."""
    plain = argparse.Namespace(data="toy", seed=0, mine=3)
    names = {common.run_folder("ccsd", argparse.Namespace(data="toy", seed=0, mine=value), plain)
             for value in ([1, 2], [1, 3], None, True, False, "x", 2, .5)}
    assert len(names) == 8


def test_two_data_sets_of_one_name_do_not_share_a_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        os.makedirs(folder)
        os.symlink(tiny, f"{folder}/images")
    ccsd.main(["--data", "a/images", *FEW])
    line = refusal(lambda: ccsd.main(["--data", "b/images", *FEW]), capsys)
    assert "--data a/images, now b/images" in line and "another --out" in line


def test_long_names_of_folders_differ_to_the_last_flag():
    words = ["--data", "market1501", *common.ON_A_CPU["ccsd.py"].split(), "--weights", "a/b.pth"]
    outs = {ccsd.get_args(more).out for more in (words, words[:-2], [*words, "--true-ids"])}
    assert len(outs) == 3 and all(len(os.path.basename(out)) <= 120 for out in outs)


def test_sources_are_shared_by_runs_that_differ_on_the_target_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, name in (("--soft 0 --nets 1", "sskd-toy-s0"), ("--lr .1", "sskd-toy-s0-lr0.1"),
                        ("--seed 2 --alpha .5 --lr-drop 3", "sskd-toy-s2")):
        assert sskd.get_args(words.split()).first_stage == os.path.join("runs", name)


def test_a_likely_edit_of_the_views_fails_at_once_and_by_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "warm_up", None)                   # it is not even reached
    encoder = common.Encoder
    monkeypatch.setattr(common, "Encoder", lambda arch, weights, parts, pooling: encoder(
        arch, weights, 4, pooling))
    with pytest.raises(common.Problem, match="three views"):
        mskd.main(short(tiny, tmp_path))


# ---------------------------------------------------------------------------------- use from Python

def test_load_embed_compare(tiny, tmp_path):
    ccsd.main(short(tiny, tmp_path / "a"))
    model, state = common.load_encoder(str(tmp_path / "a"))
    assert not model.training and model.size == state["size"] == (64, 32)
    _, query, gallery = common.load(str(tiny))
    files = query.paths[:3]
    features = common.embed(model, files)
    one = torch.cat([common.embed(model, [file]) for file in files])
    torch.testing.assert_close(features, one)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    images = common.read_images(query, 64, 32)
    torch.testing.assert_close(features, common.extract_features(model, images)[:3])
    mskd.main(short(tiny, tmp_path / "b", "--stage", "teacher"))
    model, _ = common.load_encoder(str(tmp_path / "b" / "teacher"))
    assert common.embed(model, files).shape == (3, 256)            # the global feature


def test_paths_and_numbers_are_words_and_a_notebook_s_own_are_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(common, "COMMAND_LINE", [])
    assert ccsd.get_args().data == "toy" and mskd.get_args().out and sskd.get_args().out
    args = ccsd.get_args(["--data", tiny, "--seed", 3])
    assert args.data == str(tiny) and args.seed == 3
    assert ccsd.get_args("--data 'a b' --seed 3").data == "a b"      # a line, as in a shell
    assert len(common.load(tiny)[0].paths) == 72
    checkpoint(tmp_path / "last.pt")
    model, _ = common.load_encoder(tmp_path)
    file = common.load(tiny)[1].paths[0]
    assert torch.equal(common.embed(model, file), common.embed(model, [file]))
    with pytest.raises(common.Problem, match="no image files are named"):
        common.embed(model, [])


@pytest.mark.parametrize("wrap, prefix", [("state_dict", "module."), ("model", "backbone."),
                                          ("", "module.encoder_q."), ("state_dict", "")])
def test_published_weights_are_unwrapped(wrap, prefix, tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18()
    state = {prefix + key: value for key, value in net.state_dict().items()}
    state.update({"module.head.weight": torch.zeros(3)} if prefix else {})
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "x.pth")
    model = common.Encoder("resnet18", str(tmp_path / "x.pth"))
    assert torch.equal(model.backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    torch.save({"state_dict": {"base.0.weight": torch.zeros(3)}}, tmp_path / "y.pth")
    with pytest.raises(common.Problem, match="y.pth holds no ResNet.*names start with base.0.weig"):
        common.Encoder("resnet18", str(tmp_path / "y.pth"))


def test_the_lines_of_the_readme(tiny, tmp_path):
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    code = next(x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "embed" in x)
    assert len(code.strip().splitlines()) <= 10
    ccsd.main(short(tiny, tmp_path / "runs" / "ccsd-toy-s0"))
    os.makedirs(tmp_path / "data")
    os.symlink(tiny, tmp_path / "data" / "toy")
    (tmp_path / "lines.py").write_text(code)
    done = program(str(tmp_path / "lines.py"), cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.split()) >= 2, done.stderr
    assert -1 <= float(done.stdout.split()[0]) <= 1


# --------------------------------------------------------------------------------------- own images

def own(folder, names):
    """Write pictures of two cameras' people under any names."""
    draw(folder.parent / "drawn", train=6, test=1, cameras=2, shots=4)
    for old, new in zip(sorted((folder.parent / "drawn" / "bounding_box_train").iterdir()), names):
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(old, folder / new)
    return folder


PEOPLE, CAMERAS = np.repeat(np.arange(1, 7), 8), np.tile(np.repeat([0, 1], 4), 6)
LAYOUTS = {  # a name for each of the 48 pictures -> are ids, are cameras known
    "no person": ("shot_{i:02d}_c{c}.jpg", False, True),
    "upper case": ("{p:04d}_C{c}_{i:02d}.JPG", True, True),
    "no camera": ("IMG{i:02d}.jpg", False, False),
    "a folder a camera": ("cam{c}/{i:02d}.jpg", False, True),
    "a folder a person": ("somebody {p}/{i:02d}.jpg", True, False),
    "a stray file beside": ("cam{c}/{i:02d}.jpg", False, True),
    "persons with cameras": ("person{p}/x_c{c}_{i:02d}.jpg", True, True),
    "training images alone": ("bounding_box_train/{p:04d}_c{c}_{i:02d}.jpg", True, True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_images(layout, tmp_path, capsys):
    name, people, cameras = LAYOUTS[layout]
    names = [name.format(i=i, p=PEOPLE[i], c=CAMERAS[i] + 1) for i in range(48)]
    own(tmp_path / "own", names)
    if "stray" in layout:
        (tmp_path / "own" / "readme.txt").write_text("two cameras")
        os.makedirs(tmp_path / "own" / "an empty folder")
    train, query, gallery = common.load(str(tmp_path / "own"))
    order = np.argsort(names)
    assert len(train.paths) == 48 and not query.paths and not gallery.paths
    wanted = PEOPLE[order] if people else np.full(48, -1)
    assert (train.pids == wanted).all()
    assert (train.cams == (CAMERAS[order] if cameras else 0)).all()
    line = capsys.readouterr().err
    if "alone" not in layout:
        assert ("no person ids" in line) != people and ("no cameras" in line) != cameras


def test_a_run_without_ids_ends_with_its_clusters(tmp_path, capsys):
    names = [f"shot_{i:02d}_c{CAMERAS[i] + 1}.jpg" for i in range(48)]
    folder = own(tmp_path / "own", names)
    assert ccsd.main(short(folder, tmp_path / "out", "--batch-size", "4")) == {}
    said = capsys.readouterr().out
    header, *lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert lines and not any("null" in line for line in lines)
    assert "clusters" in said and "mAP" not in said and "ARI" not in said and "purity" not in said
    with open(tmp_path / "out" / "clusters.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    state = common.load_checkpoint(str(tmp_path / "out" / "last.pt"))
    assert [os.path.basename(row["file"]) for row in rows] == sorted(names)
    assert [int(row["cluster"]) for row in rows] == state["labels"].tolist()
    assert [int(row["camera"]) for row in rows] == (CAMERAS + 1).tolist()  # _c1.jpg: 1
    ccsd.main(short(folder, tmp_path / "out", "--batch-size", "4"))
    assert "finished before on 48 images, nothing to do" in capsys.readouterr().out


def test_known_ids_without_a_test_set_end_with_clusters_too(tmp_path):
    names = [f"{PEOPLE[i]:04d}_c{CAMERAS[i] + 1}_{i}.jpg" for i in range(48)]
    folder = own(tmp_path / "own", names)
    assert ccsd.main(short(folder, tmp_path / "out", "--batch-size", "4")) == {}
    assert (tmp_path / "out" / "clusters.csv").read_text().count("\n") == 49


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (90, 20, 40)).save(folder / name, "PNG")
    return str(folder)


@pytest.mark.parametrize("names, pids, cameras", [
    (["cam_a/001_0.bmp", "cam_b/001_90.bmp"], [-1, -1], ["cam_a", "cam_b"]),
    (["camA/1.jpg", "camB/1.jpg"], [-1, -1], ["camA", "camB"]),
    (["cam-left/1.jpg", "cam-right/1.jpg"], [-1, -1], ["cam-left", "cam-right"]),
    (["back_camera/1.jpg", "camera_front/1.webp"], [-1, -1], ["back_camera", "camera_front"]),
    (["cam3/0001_c3_1.jpg", "cam7/0002_c7_1.tif"], [1, 2], [3, 7]),
    (["cam01/anna/1.jpg", "cam02/anna/1.jpg"], [1, 1], ["cam01", "cam02"]),
    (["anna/cam1/1.jpg", "bob/cam2/1.jpg"], [1, 2], ["cam1", "cam2"]),
    (["cam1/anna/x_c1.jpg", "cam1/anna/y_c1.jpg"], [1, 1], [1]),
    (["view1/1.jpg", "view3/1.jpg"], [-1, -1], ["view1", "view3"]),
    (["c1s1/1.jpg", "c2s1/1.jpg"], [-1, -1], ["c1s1", "c2s1"]),
    (["left/0001_c1_1.jpg", "right/0001_c2_1.jpg"], [1, 1], [1, 2]),
    (["own/cam1/1.jpg", "own/cam2/1.jpg"], [-1, -1], ["cam1", "cam2"]),        # unpacked into itself
    (["images/anna/1.jpg", "images/bob/1.jpg"], [1, 2], [0]),
    (["cameron/1_c2.jpg", "camille/2_c2.jpg"], [1, 2], [2])])
def test_folders_of_cameras_and_people(names, pids, cameras, tmp_path, capsys):
    train, *_ = common.load(pictures(tmp_path / "own", *names))
    assert train.pids.tolist() == pids and train.camera_names == cameras
    assert f"2 images, such as {names[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("names, says", [
    (["train/0001_c1_1.jpg", "test/0001_c2_1.jpg"], "test is called like a part.*--data .*test"),
    (["gallery/1.png", "probe/1.png"], "called like a part"),
    (["trainset/1.jpg", "valset/1.jpg"], "trainset is called like a part"),
    (["TestImages/1.jpg", "x/1.jpg"], "called like a part"),
    (["hall/0001_c1_1.jpg", "yard/0001_c2_1.jpg"], "the folders are no persons"),
    (["hall/x_c1_1.jpg", "yard/x_c2_1.jpg"], "images of one camera"),
    (["cam1/x_c2.jpg", "cam2/x_c1.jpg"], "camera 1 by the folder, 2 by the file name"),
    (["cam1/1.jpg", "cam1/anna/1.jpg"], "beside those in"),
    (["a/b/c/1.jpg"], "3 folders deep, the first in .*c "),
    (["cam1/1.jpg", "cam2/b/c/d/e/f/1.jpg"], "cam2/b/c/d/e: folders lie too deep"),
    (["anna/cam1/1.jpg", "anna/more/1.jpg"], "anna/more beside those in"),
    (["day1/anna/1.jpg", "day2/bob/1.jpg"], "which level"),
    (["Market/bounding_box_train/0001_c1_1.jpg"], "Market looks like it"),
    (["bounding_box_train/bounding_box_train/0001_c1_1.jpg"], "1 files or folders.*first: bound")])
def test_trees_that_would_give_wrong_labels_are_refused(names, says, tmp_path):
    with pytest.raises(common.Problem, match=says):
        common.load(pictures(tmp_path / "own", *names))


def test_files_that_are_left_out_are_named(tmp_path, capsys):
    folder = pictures(tmp_path / "own", "cam1/1.png", "cam2/1.png")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / "own" / "cam2" / name).write_bytes(b"x")
    common.load(folder)
    said = capsys.readouterr().err
    assert "left out: 3 files that are no JPEG" in said and "first: cam2/a.heic" in said
    with pytest.raises(common.Problem, match="a.heic' not found.*unpack archives"):
        common.load(os.path.join(folder, "cam2", "a.heic"))
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.heic").write_bytes(b"x")
    with pytest.raises(common.Problem, match="1 files .*1.heic.*convert them"):
        common.load(str(tmp_path / "phone"))


@pytest.mark.parametrize("odd, names", [
    ("", ["{i:02d}.jpg", "cam1/{i:02d}.jpg"]),
    ("more", ["cam{c}/{i:02d}.jpg", "more/{i:02d}.jpg"])])
def test_images_beside_camera_folders_are_refused(odd, names, tmp_path):
    folder = own(tmp_path / "own", [names[i % 2].format(i=i, c=CAMERAS[i] + 1) for i in range(48)])
    with pytest.raises(common.Problem, match="in one folder, in one per camera") as problem:
        common.load(str(folder))
    assert f"images in {folder / odd}" in str(problem.value)


def test_true_ids_that_are_not_known_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "warm_up", None)                   # it is not even reached
    folder = own(tmp_path / "own", [f"shot_{i:02d}_c{CAMERAS[i] + 1}.jpg" for i in range(48)])
    with pytest.raises(common.Problem, match="--true-ids: the ids of .*own are not known"):
        ccsd.main(short(folder, tmp_path / "out", "--true-ids"))


def test_halves_need_two_people_and_two_cameras(tmp_path):
    folder = own(tmp_path / "own", [f"shot_{i:02d}_c{CAMERAS[i] + 1}.jpg" for i in range(48)])
    with pytest.raises(common.Problem, match="here are 1 and 2 .leave out :target"):
        common.load(f"{folder}:target")
    folder = own(tmp_path / "two" / "own", [f"{PEOPLE[i]:04d}_c1_{i}.jpg" for i in range(48)])
    with pytest.raises(common.Problem, match="here are 6 and 1 .leave out :source"):
        common.load(f"{folder}:source")


def test_a_mixed_folder_says_what_is_missing(tmp_path):
    names = [f"{PEOPLE[i]:04d}_c1_{i}.jpg" if i % 3 else f"img{i}.jpg" for i in range(48)]
    train, *_ = common.load(str(own(tmp_path / "own", names)))
    assert (train.pids == -1).all() and (train.cams == 0).all()  # what one does not say, none does
    os.makedirs(tmp_path / "empty" / "folders")
    with pytest.raises(common.Problem, match="nor images"):
        common.load(str(tmp_path / "empty"))


def test_splits_that_are_missing_linked_or_misspelt(tiny, tmp_path):
    for part in ("query", "bounding_box_test"):
        shutil.copytree(tiny, tmp_path / part / "d")
        shutil.rmtree(tmp_path / part / "d" / part)
        with pytest.raises(common.Problem, match=f"bounding_box_train.* but not {part}"):
            common.load(str(tmp_path / part / "d"))
    with pytest.raises(common.Problem, match="name a folder or one of market1501") as problem:
        common.load("Market-1501", str(tmp_path))
    assert "--root" not in str(problem.value)                      # which would change nothing
    with pytest.raises(common.Problem, match="put it there, or say --root.$"):
        common.load("market1501", str(tmp_path / "nowhere"))
    os.makedirs(tmp_path / "linked")
    for part in common.TRIPLES[0]:
        os.symlink(tiny / part, tmp_path / "linked" / part)
    assert [len(split.paths) for split in common.load(str(tmp_path / "linked"))] == [72, 12, 24]


def test_a_source_needs_training_images_only(tiny, tmp_path):
    folder = draw(tmp_path / "s", train=9, test=4, cameras=2, shots=4)
    for part in ("query", "bounding_box_test"):
        shutil.rmtree(folder / part)
    words = ["--source", str(folder), "--source-epochs", "1", "--source-iters", "2", "--nets", "1"]
    sskd.train_source(sskd.get_args(short(tiny, tmp_path / "a", *words)), 1, torch.device("cpu"),
                      common.read_images(common.load(str(tiny))[0], 64, 32))
    assert (tmp_path / "a" / "source" / "1" / "last.pt").exists()
    names = [f"IMG{i:02d}.jpg" for i in range(48)]
    words[1] = str(own(tmp_path / "own", names))
    with pytest.raises(common.Problem, match="has it labels"):
        sskd.train_source(sskd.get_args(short(tiny, tmp_path / "b", *words)), 1,
                          torch.device("cpu"), torch.zeros(20, 3, 64, 32, dtype=torch.uint8))


def test_random_weights_start_from_the_toy_set_s_settings():
    args = ccsd.get_args(["--data", "my/folder", "--weights", "none"])
    assert (args.arch, args.eps, args.size) == ("small", .45, (96, 48))
    args = ccsd.get_args(["--data", "my/folder"])
    assert (args.arch, args.eps, args.size) == ("resnet50", .6, (256, 128))


# ---------------------------------------------------------------------------------- small stumbles

def test_a_long_run_says_how_long(tmp_path, capsys, monkeypatch):
    args = ccsd.get_args(["--data", "x", "--out", str(tmp_path / "a")])
    log, now = common.Log(args.out, "cpu", args), [0.]
    monkeypatch.setattr(common.time, "time", lambda: now[0])

    def batches(n):
        for i in range(n):
            now[0] += 10                                           # seconds a step
            yield i
    assert list(log.steps(batches(200), "epoch 1", 200)) == [(i, i) for i in range(200)]
    said = capsys.readouterr().err
    assert f"about {10 * 200 * 50 / 3600:.1f} hours" in said and "--arch resnet18-layer3" in said
    list(log.steps(batches(200), "epoch 2", 200))
    assert "hours" not in capsys.readouterr().err                  # once is enough
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = " ".join(file.read().split())
    assert f"`{common.ON_A_CPU['ccsd.py']}`" in text
    for words in common.ON_A_CPU.values():
        assert f"`--epochs {words.split('--epochs ')[1]}`" in text or words in text


def test_time_left(tiny, tmp_path, capsys):
    ccsd.main(short(tiny, tmp_path))
    first, last = [line for line in capsys.readouterr().out.splitlines() if "epoch " in line]
    assert re.search(r"\d+ s, \d+ s left$", first) and not last.endswith("left")


def test_bars_are_for_terminals(tiny, tmp_path):
    done = program("ccsd.py", *short(tiny, tmp_path / "a", "--eps", ".01"))
    assert done.returncode == 2 and "%|" not in done.stderr


def test_a_closed_pipe_ends_no_run(tiny, tmp_path):
    words = short(tiny, tmp_path / "b", "--epochs", "1", "--warm-up", "0", "--true-ids")
    words = " ".join(map(str, words))
    code = subprocess.run(f"({sys.executable} {os.path.join(HERE, 'ccsd.py')} {words}; "
                          f"echo $? > {tmp_path}/code) 2>/dev/null | true", shell=True)
    assert code.returncode == 0 and open(tmp_path / "code").read().strip() == "0"
    assert losses(tmp_path / "b")[-1]["epoch"] == 1


def test_an_absurd_folder_is_one_line(tiny, tmp_path, capsys):
    says = refusal(lambda: ccsd.main(short(tiny, tmp_path / ("a" * 300))), capsys)
    assert "cannot be written" in says and "--out" in says


def test_nothing_is_left_open(tiny, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-X", "dev",
                           os.path.join(HERE, "ccsd.py"), *short(tiny, tmp_path, *FEW)], text=True,
                          capture_output=True)
    assert done.returncode == 0 and "ResourceWarning" not in done.stderr, done.stderr[-2000:]


def test_pictures_of_another_size_are_read(tmp_path):
    Image.new("RGB", (300, 500), (10, 20, 30)).save(tmp_path / "a.png")
    split = common.Split([str(tmp_path / "a.png")], None, None)
    images = common.read_images(split, 64, 32)
    assert images.shape == (1, 3, 64, 32)
    assert (images == torch.tensor([10, 20, 30])[:, None, None]).all()


@pytest.mark.parametrize("page", [ccsd, mskd, sskd], ids=["ccsd", "mskd", "sskd"])
def test_centre_is_a_flag_with_any_weights(page, tiny, tmp_path, monkeypatch, watch):
    """Clustering sees features less their camera's mean with --centre, and plain ones without."""
    path = tmp_path / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    words = short(tiny, tmp_path / "a", "--arch", "resnet18-layer3", "--weights", str(path),
                  "--epochs", "1")
    pids = common.load(str(tiny))[0].pids
    monkeypatch.setattr(common, "dbscan", lambda *_, **__: common.renumber(pids))
    if page is sskd:
        source = draw(tmp_path / "s", train=9, test=4, cameras=2, shots=4)
        words += ["--source", str(source), "--source-epochs", "1", "--source-iters", "1",
                  "--nets", "1"]
    seen, extracted = watch(common, "jaccard_distance"), watch(common, "extract_features")
    for more, wanted in (([], 0), (["--centre"], 1)):
        seen.clear(), extracted.clear()
        page.main([*words, "--out", str(tmp_path / f"{len(more)}"), *more])
        cams = common.load(str(tiny))[0].cams
        features = next(result for (_, images, *_), result in extracted if len(images) == len(cams))
        features = features[0] if features.dim() == 3 else features
        plain = torch.allclose(seen[0][0][0], features, atol=1e-6)
        centred = torch.allclose(seen[0][0][0], common.centre_cameras(features, cams), atol=1e-6)
        assert (plain, centred) == (not wanted, bool(wanted))
