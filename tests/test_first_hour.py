"""The first hour of a student: editing a page, running it again, own images, use from Python."""

import argparse
import csv
import gc
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import (HERE, SHORT, check_end, checkpoint, close, draw, losses, program, refusal,
                      short, weights)
from PIL import Image

import ccsd
import common
import mskd
import sskd

FEW = [*SHORT, "--epochs", "1", "--warm-up", "0", "--true-ids", "--batch-size", "4"]
EDIT = "args.base * L_base +", "2 * args.base * L_base +"


pytestmark = pytest.mark.usefixtures("two_layers_in_this_file")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """16 training images, for runs that only need an end."""
    return draw(tmp_path_factory.mktemp("data") / "few", train=4, test=2, cameras=2, shots=2)


@pytest.fixture
def copy(tmp_path, few):
    """A copy of the pages, with a smaller network, that may be edited -> a function that runs one
    of them there."""
    for name in ("ccsd.py", "mskd.py", "common.py"):
        shutil.copy(os.path.join(HERE, name), tmp_path)
    edit(tmp_path / "common.py",
         "(24, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)", "(24, 256, 8),")

    def run(page, *words, code=0):
        done = program(str(tmp_path / page), "--data", few, *FEW, *words, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "%|" not in done.stderr, "bars are for terminals"
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
    score = re.findall(r"mAP +[\d.]+  R1 +[\d.]+", copy("ccsd.py").stdout)[-1]
    (base,) = folders(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*")}
    again = copy("ccsd.py").stdout
    assert folders(tmp_path) == [base] and "nothing to do" in again
    assert score in again                                          # not only that it is finished
    edit(tmp_path / "ccsd.py", *EDIT)
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
open("ccsd.py", "w").write(text.replace(%r, %r))
run()                                                          # 3 edited, but not loaded
importlib.reload(ccsd)
run()                                                          # 4
""" % EDIT


def test_what_is_in_memory_is_what_a_notebook_s_run_is_named_after(copy, tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    done = copy("notebook.py")
    assert done.stdout.count("epoch 1/1") == 5 and "nothing to do" not in done.stdout
    assert len(folders(tmp_path)) == 5
    assert done.stderr.count("ccsd.py in memory differs from the file") == 3
    copy("ccsd.py")                                                # a program: the edited file
    assert len(folders(tmp_path)) == 5


def test_over_edited_code_only_resume_goes_on_and_kept_values_survive(copy, tmp_path):
    """The page keeps a value of each image: the two lines of the course."""
    page, old = tmp_path / "ccsd.py", '    labels = resumed.get("labels")\n'
    edit(page, old, old + '    score = resumed.get("score", np.zeros(len(images)))\n')
    edit(page, "keep=dict(state, labels=labels)",
         "keep=dict(state, labels=labels, score=score + epoch + 1)")
    copy("ccsd.py", "--out", "mine")
    edit(page, *EDIT)
    says = copy("ccsd.py", "--out", "mine", code=2).stderr
    assert "a run before ccsd.py was edited" in says and "--out" in says
    says = copy("ccsd.py", "--out", "mine", "--resume", "--epochs", "2").stderr
    assert "warning: mine: ccsd.py was edited since this run began" in says
    assert len(losses(tmp_path / "mine")) == 4
    state = common.load_checkpoint(str(tmp_path / "mine" / "last.pt"))
    assert (state["score"] == 1 + 2).all()


def test_resume_after_an_edit_starts_anew_in_another_folder(copy, tmp_path):
    copy("ccsd.py")
    (base,) = folders(tmp_path)
    edit(tmp_path / "ccsd.py", *EDIT)
    done = copy("ccsd.py", "--resume")                             # the old score is not its own
    (new,) = set(folders(tmp_path)) - {base}
    assert new.startswith(base + "-") and new in done.stderr and "epoch 1/1" in done.stdout


def test_a_teacher_serves_every_student_until_the_page_is_edited(copy, tmp_path):
    copy("mskd.py")
    (base,) = folders(tmp_path)
    assert f"{base}/teacher: finished before" in copy("mskd.py", "--mu", "0").stdout
    student = base.replace("-s0-", "-s0-mu0-")
    assert folders(tmp_path) == sorted([base, student])
    assert not (tmp_path / "runs" / student / "teacher").exists()
    edit(tmp_path / "mskd.py", "args.mu * D_g", "2 * args.mu * D_g")
    assert "finished before" not in copy("mskd.py").stdout and len(folders(tmp_path)) == 3


@pytest.mark.parametrize("page, words, name", [
    (ccsd, "", "ccsd-toy-s0"),
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
    model = common.Encoder("small", "none", parts=2).state_dict()
    checkpoint(tmp_path / "last.pt", model=model, parts=2, size=(64, 32))
    model, state = common.load_encoder(tmp_path)
    assert not model.training and model.size == state["size"] == (64, 32)
    query = common.load(tiny)[1]
    features = common.embed(model, query.paths)                    # the global ones
    one = torch.cat([common.embed(model, file) for file in query.paths])
    torch.testing.assert_close(features, one)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(12))
    images = common.read_images(query, 64, 32)
    torch.testing.assert_close(features, common.extract_features(model, images)[0])
    with pytest.raises(common.Problem, match="no image files are named"):
        common.embed(model, [])


def test_paths_and_numbers_are_words_and_a_notebook_s_own_are_not(tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(common, "COMMAND_LINE", [])
    assert ccsd.get_args().data == "toy" and mskd.get_args().out and sskd.get_args().out
    args = ccsd.get_args(["--data", tiny, "--seed", 3])
    assert args.data == str(tiny) and args.seed == 3
    assert ccsd.get_args("--data 'a b' --seed 3").data == "a b"      # a line, as in a shell


@pytest.mark.parametrize("wrap, prefix", [("state_dict", "module."), ("model", "backbone."),
                                          ("", "module.encoder_q."), ("state_dict", "")])
def test_published_weights_are_unwrapped(wrap, prefix):
    net = {"conv1.weight": 1, "bn1.bias": 2, "layer1.0.conv1.weight": 3, "layer4.1.bn2.bias": 4}
    state = {prefix + key: value for key, value in net.items()}
    state.update({"module.head.weight": 5, prefix + "fc.bias": 6})
    assert common.unwrapped({wrap: state, "epoch": 3} if wrap else state, "x.pth") == net
    with pytest.raises(common.Problem, match="y.pth holds no ResNet.*names start with base.0.weig"):
        common.unwrapped({"state_dict": {"base.0.weight": 1}}, "y.pth")


def test_the_lines_of_the_readme(tiny, tmp_path):
    text = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    code = next(x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "embed" in x)
    assert len(code.strip().splitlines()) <= 10
    for folder in ("data", "runs/ccsd-toy-s0"):
        os.makedirs(tmp_path / folder)
    os.symlink(tiny, tmp_path / "data" / "toy")
    checkpoint(tmp_path / "runs" / "ccsd-toy-s0" / "last.pt")
    (tmp_path / "lines.py").write_text(code)
    done = program(str(tmp_path / "lines.py"), cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.split()) >= 2, done.stderr
    assert -1 <= float(done.stdout.split()[0]) <= 1


# --------------------------------------------------------------------------------------- own images

@pytest.mark.parametrize("known, name", [(False, "shot_{i:02d}_c{c}.jpg"),
                                         (True, "bounding_box_train/{p}_c{c}_{i:02d}.jpg")])
def test_a_run_without_ids_or_a_test_set_ends_with_its_clusters(known, name, tiny, tmp_path,
                                                                capsys):
    files = {}                                                     # of each new name: its camera
    for i, path in enumerate(sorted((tiny / "bounding_box_train").iterdir())):
        new = tmp_path / "own" / name.format(i=i, p=path.name[:4], c=path.name[6])
        files[str(new)] = path.name[6]
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    words = short(tmp_path / "own", tmp_path / "out", "--batch-size", "4")
    assert ccsd.main(words) == {}
    said = capsys.readouterr().out
    first, last = [line for line in said.splitlines() if "epoch " in line]
    assert re.search(r"\d+ s, \d+ s left$", first) and not last.endswith("left")
    assert "clusters" in first and "mAP" not in said
    assert ("ARI" in first) == ("purity" in first) == known
    assert "null" not in (tmp_path / "out" / "log.jsonl").read_text().split("\n", 1)[1]
    with open(tmp_path / "out" / "clusters.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    state = common.load_checkpoint(str(tmp_path / "out" / "last.pt"))
    assert [int(row["cluster"]) for row in rows] == state["labels"].tolist()
    assert [(row["file"], row["camera"]) for row in rows] == sorted(files.items())  # _c1.jpg: 1
    ccsd.main(words)
    assert "finished before on 72 images, nothing to do" in capsys.readouterr().out


def pictures(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (90, 20, 40)).save(folder / name, "PNG")
    return str(folder)


@pytest.mark.parametrize("names, pids, cameras", [
    ("IMG1.jpg IMG2.jpg", [-1, -1], [0, 0]),
    ("shot1_c1.jpg shot2_c3.jpg", [-1, -1], [1, 3]),
    ("0001_C1_1.JPG 0007_C2_1.JPG", [1, 7], [1, 2]),
    ("0001_c1_1.jpg img.jpg", [-1, -1], [0, 0]),  # what one does not say, none does
    ("p1/x_c1.jpg p1/x_c2.jpg p4/x_c1.jpg", [1, 1, 2], [1, 2, 1]),
    ("cam_a/001_0.bmp cam_b/001_90.bmp", [-1, -1], ["cam_a", "cam_b"]),
    ("camA/1.jpg camB/1.jpg", [-1, -1], ["camA", "camB"]),
    ("back_camera/1.jpg camera_front/1.webp", [-1, -1], ["back_camera", "camera_front"]),
    ("cam3/0001_c3_1.jpg cam7/0002_c7_1.tif", [1, 2], [3, 7]),
    ("cam01/anna/1.jpg cam02/anna/1.jpg", [1, 1], ["cam01", "cam02"]),
    ("cam1/anna/x_c1.jpg cam1/anna/y_c1.jpg", [1, 1], [1, 1]),
    ("anna/cam1/1.jpg bob/cam2/1.jpg", [1, 2], ["cam1", "cam2"]),
    ("view1/1.jpg view3/1.jpg", [-1, -1], ["view1", "view3"]),
    ("c1s1/1.jpg c2s1/1.jpg", [-1, -1], ["c1s1", "c2s1"]),
    ("left/0001_c1_1.jpg right/0001_c2_1.jpg", [1, 1], [1, 2]),
    ("own/cam1/1.jpg own/cam2/1.jpg", [-1, -1], ["cam1", "cam2"]),  # unpacked into itself
    ("images/anna/1.jpg images/bob/1.jpg", [1, 2], [0, 0]),
    ("cameron/1_c2.jpg camille/2_c2.jpg", [1, 2], [2, 2])])
def test_folders_of_cameras_and_people(names, pids, cameras, tmp_path, capsys):
    folder, names = tmp_path / "own", names.split()
    train, query, gallery = common.load(pictures(folder, *names))
    assert [os.path.relpath(path, folder) for path in train.paths] == sorted(names)
    assert not query.paths and not gallery.paths and train.pids.tolist() == pids
    assert [train.camera_names[camera] for camera in train.cams] == cameras
    said = capsys.readouterr().err
    assert f"{len(names)} images, such as {min(names)}: " in said
    assert ("no person ids" in said) == (pids[0] == -1)
    ids = "unknown ids" if pids[0] == -1 else f"{len(set(pids))} ids"
    assert f"train {len(names)} images of {ids}\n" in said
    assert ("no cameras" in said) == (cameras[0] == 0)


@pytest.mark.parametrize("names, says", [
    ("train/0001_c1_1.jpg test/0001_c2_1.jpg", "test is called like a part.*--data .*test"),
    ("gallery/1.png probe/1.png", "called like a part"),
    ("trainset/1.jpg valset/1.jpg", "trainset is called like a part"),
    ("TestImages/1.jpg x/1.jpg", "called like a part"),
    ("hall/0001_c1_1.jpg yard/0001_c2_1.jpg", "the folders are no persons"),
    ("hall/0.jpg hall/1_c1.jpg hall/2_c1.jpg yard/3_c1.jpg", "the folders are no persons"),
    ("cam1/0.jpg cam1/x_c1.jpg cam1/y_c2.jpg cam2/z_c3.jpg", "the folders are no cameras"),
    ("hall/x_c1_1.jpg yard/x_c2_1.jpg", "images of one camera"),
    ("cam1/x_c2.jpg cam2/x_c1.jpg", "camera 1 by the folder, 2 by the file name"),
    ("", "nor images"), ("1.heic", "1 files .*1.heic.*convert them"),
    ("1.jpg cam1/1.jpg", "images in .*own beside .*in one folder, in one per camera"),
    ("cam1/1.jpg more/1.jpg", "images in .*more beside .*in one folder, in one per camera"),
    ("cam1/1.jpg cam1/anna/1.jpg", "beside those in"),
    ("a/b/c/1.jpg", "3 folders deep, the first in .*c "),
    ("cam1/1.jpg cam2/b/c/d/e/f/1.jpg", "cam2/b/c/d/e: folders lie too deep"),
    ("anna/cam1/1.jpg anna/more/1.jpg", "anna/more beside those in"),
    ("day1/anna/1.jpg day2/bob/1.jpg", "which level"),
    ("Market/bounding_box_train/0001_c1_1.jpg", "Market looks like it"),
    ("bounding_box_train/0001_c1_1.jpg query/0001_c1_1.jpg", "but not bounding_box_test"),
    ("bounding_box_train/0001_c1_1.jpg bounding_box_test/0001_c1_1.jpg", "but not query"),
    ("bounding_box_train/bounding_box_train/0001_c1_1.jpg", "1 files or folders.*first: bound")])
def test_trees_that_would_give_wrong_labels_are_refused(names, says, tmp_path):
    with pytest.raises(common.Problem, match=says):
        common.load(pictures(tmp_path / "own", *names.split()))


def test_files_that_are_left_out_are_named(tmp_path, capsys):
    folder = pictures(tmp_path / "own", "cam1/1.png", "cam2/1.png", "cam2/a.heic", "cam2/b.heic",
                      "cam2/notes.txt")
    os.makedirs(tmp_path / "own" / "an empty folder")
    assert len(common.load(folder)[0].paths) == 2
    said = capsys.readouterr().err
    assert "left out: 3 files that are no JPEG" in said and "first: cam2/a.heic" in said
    with pytest.raises(common.Problem, match="a.heic' not found.*unpack archives"):
        common.load(os.path.join(folder, "cam2", "a.heic"))


def test_true_ids_that_are_not_known_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "warm_up", None)                   # it is not even reached
    folder = pictures(tmp_path / "own", *(f"shot{i}.jpg" for i in range(8)))
    with pytest.raises(common.Problem, match="--true-ids: the ids of .*own are not known"):
        ccsd.main(short(folder, tmp_path / "out", "--true-ids"))


def test_halves_need_two_people_and_two_cameras(tmp_path):
    folder = pictures(tmp_path / "a", "shot1_c1.jpg", "shot2_c2.jpg")
    with pytest.raises(common.Problem, match="here are 1 and 2 .leave out :target"):
        common.load(f"{folder}:target")
    folder = pictures(tmp_path / "b", "0001_c1_1.jpg", "0002_c1_1.jpg", "0003_c1_1.jpg")
    with pytest.raises(common.Problem, match="here are 3 and 1 .leave out :source"):
        common.load(f"{folder}:source")
    folder = pictures(tmp_path / "c", *(f"000{i}_c{c}_1.jpg" for i in (1, 2) for c in (1, 2)))
    halves = [common.load(f"{folder}:{half}")[0] for half in ("source", "target")]
    assert [len(train.paths) for train in halves] == [1, 1]


def test_data_sets_that_are_linked_or_misspelt(tiny, tmp_path):
    with pytest.raises(common.Problem, match="name a folder or one of market1501") as problem:
        common.load("Market-1501", tmp_path)
    assert "--root" not in str(problem.value)                      # which would change nothing
    with pytest.raises(common.Problem, match="put it there, or say --root.$"):
        common.load("market1501", tmp_path / "nowhere")
    for part in common.TRIPLES[0]:
        os.symlink(tiny / part, tmp_path / part)
    assert [len(split.paths) for split in common.load(tmp_path)] == [72, 12, 24]


def test_a_source_needs_training_images_only(few, tmp_path):
    part = "bounding_box_train"
    shutil.copytree(few / part, tmp_path / "people" / part)
    pictures(tmp_path / "nobody", "1.jpg", "2.jpg", "3.jpg", "4.jpg")

    def train_source(name):
        words = ["--source", str(tmp_path / name), "--source-epochs", "1", "--source-iters", "2",
                 "--batch-size", "4", "--nets", "1"]
        args = sskd.get_args(short(few, tmp_path / "out", *words))
        images = torch.zeros(20, 3, 64, 32, dtype=torch.uint8)
        sskd.train_source(args, 1, torch.device("cpu"), images)
    with pytest.raises(common.Problem, match="has it labels"):
        train_source("nobody")
    train_source("people")
    assert (tmp_path / "out" / "source" / "1" / "last.pt").exists()


def test_random_weights_start_from_the_toy_set_s_settings():
    args = ccsd.get_args(["--data", "my/folder", "--weights", "none"])
    assert (args.arch, args.eps, args.size) == ("small", .45, (96, 48))
    args = ccsd.get_args(["--data", "my/folder"])
    assert (args.arch, args.eps, args.size) == ("resnet50", .6, (256, 128))


# ---------------------------------------------------------------------------------- small stumbles

def test_a_long_run_says_how_long(tmp_path, capsys, monkeypatch):
    args, now = ccsd.get_args(["--data", "x", "--out", str(tmp_path)]), [0]
    log = common.Log(args.out, "cpu", args)
    monkeypatch.setattr(common.time, "time", lambda: now[0])

    def batches():
        for i in range(200):
            now[0] += 10                                           # seconds a step
            yield i
    assert [*log.steps(batches(), "epoch 1", 200)] == [(i, i) for i in range(200)]
    said = capsys.readouterr().err
    assert f"about {10 * 200 * 50 / 3600:.1f} hours" in said and "--arch resnet18-layer3" in said
    assert [*log.steps(batches(), "epoch 2", 200)] and "hours" not in capsys.readouterr().err


def test_the_readme_has_the_commands_for_a_cpu():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = " ".join(file.read().split())
    assert f"`{common.ON_A_CPU['ccsd.py']}`" in text
    for words in common.ON_A_CPU.values():
        assert f"`{words.split('--centre ')[1]}`" in text or words in text


def test_a_closed_pipe_or_no_stderr_end_no_run(few, tmp_path):
    words = " ".join(map(str, ["--data", few, "--out", tmp_path / "b", *FEW]))
    code = subprocess.run(f"({sys.executable} {os.path.join(HERE, 'ccsd.py')} {words}; "
                          f"echo $? > {tmp_path}/code) 2>&- | true", shell=True)
    assert code.returncode == 0 and open(tmp_path / "code").read().strip() == "0"
    assert losses(tmp_path / "b")[-1]["epoch"] == 1


def test_an_absurd_folder_is_one_line(tiny, tmp_path, capsys):
    says = refusal(lambda: ccsd.main(short(tiny, tmp_path / ("a" * 300))), capsys)
    assert "cannot be written" in says and "--out" in says


def test_nothing_is_left_open(few, tmp_path):
    gc.collect()                                                   # what others left
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always", ResourceWarning)
        ccsd.main(["--data", str(few), "--out", str(tmp_path), *FEW])
        gc.collect()
    assert not [str(x.message) for x in noticed if x.category is ResourceWarning]
    check_end(tmp_path)


@pytest.mark.parametrize("page", [ccsd, mskd, sskd], ids=lambda page: page.__name__)
def test_centre_is_a_flag_with_any_weights(page, tiny, few, tmp_path, monkeypatch, watch):
    """From given weights, too, clustering sees features less their camera's mean."""
    words = short(tiny, tmp_path, "--weights", "given", "--centre")
    if page is sskd:
        words += ["--source", str(few), "--source-epochs", "1", "--source-iters", "1",
                  "--nets", "1", "--batch-size", "4"]
    extracted, clustered = watch(common, "extract_features"), []

    def stop(features, *_, **__):
        clustered.append(features)
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "jaccard_distance", stop)
    with pytest.raises(KeyboardInterrupt):
        page.main(words)
    cams = common.load(tiny)[0].cams
    features = next(result for (_, images, *_), result in extracted if len(images) == len(cams))
    features = features.view(-1, *features.shape[-2:])[0]          # of the whole image
    close(clustered[0], common.centre_cameras(features, cams), "not centred", atol=1e-6, rtol=0)
    assert not torch.allclose(clustered[0], features, atol=1e-3)
