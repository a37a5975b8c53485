"""What suits which machine: precision, kernels, memory. Cards are pretended."""

import json
import math
import re

import pytest
import torch
from conftest import draw, first_scale, refusal, short

import ccsd
import common
import eval as scoring
import mskd
import sskd

PAGES = dict(ccsd=ccsd, mskd=mskd, sskd=sskd)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("machine, auto, bf16", [
    ((6, 1), "fp32", "fp32"), ((7, 0), "fp16", "fp16"), ((7, 5), "fp16", "fp16"),
    ((8, 0), "bf16", "bf16"), ((12, 0), "bf16", "bf16"),           # compute capability of a GPU
    (True, "fp32", "bf16"), (None, "fp32", "bf16"), (False, "fp32", "fp32")])  # CPU has bfloat16
def test_the_precision_suits_the_machine(machine, auto, bf16, monkeypatch, capsys):
    """Emulated, bfloat16 takes several times as long as float32; commands name it for all."""
    device = CUDA if isinstance(machine, tuple) else CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine)
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: machine)
    for wanted, used in dict(auto=auto, bf16=bf16, fp32="fp32", fp16="fp16").items():
        assert common.precision(device, wanted) == used
        note = capsys.readouterr().err
        assert note.count("\n") == (wanted != "auto" and wanted != used), note
        assert not note or f"no bfloat16, so --precision is {used}" in note
    monkeypatch.setattr(common.Encoder, "to", lambda self, _: self)
    network = common.Encoder("small", "none")
    assert scoring.prepare(network, dict(precision="bf16", size=(64, 32)), device).precision == bf16
    half = scoring.prepare(network, dict(precision="fp16", size=(64, 32)), device).precision
    assert half == ("fp32" if device is CPU else "fp16")           # on a CPU: 15 times as slow


def test_a_run_keeps_its_precision(tiny, tmp_path, monkeypatch, capsys, two_layers):
    """--precision auto does not change the folder's name, and goes on as the run began, on whatever
    machine; another precision is refused."""
    monkeypatch.chdir(tmp_path)
    flags = [*short(tiny, "x")[:2], *short(tiny, "x")[4:]]
    plain, named = (ccsd.get_args([*flags, *more]) for more in ([], ["--precision", "fp32"]))
    assert "precision" not in plain.out and named.out == plain.out + "-precision-fp32"
    best, choose = ["bf16"], common.precision
    monkeypatch.setattr(common, "precision", lambda device, wanted: choose(
        device, best[0] if wanted == "auto" else wanted))
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: True)
    ccsd.main([*flags, "--epochs", "1", "--out", "a"])               # new: what suits the machine
    assert json.loads(open("a/log.jsonl").readline())["args"]["precision"] == "bf16"
    best[0] = "fp32"
    more = ["--epochs", "2", "--out", "a", "--resume"]
    says = refusal(lambda: ccsd.main([*flags, *more, "--precision", "fp32"]), capsys)
    assert "--precision bf16, now fp32" in says
    scores = ccsd.main([*flags, *more])
    assert common.load_run("a/last.pt")["precision"] == "bf16"
    assert scores.items() <= scoring.main(["a", "--report"]).items()
    assert " s on cpu in bf16" in open("a/report.html").read()
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: False)   # it cannot go on there
    says = refusal(lambda: ccsd.main([*flags, *more]), capsys)
    assert "--precision bf16, now fp32" in says


def test_stages_have_one_precision_and_sources_any(tiny, tmp_path, monkeypatch, two_layers):
    """The second stage goes on in that of the first, even if a better card was found since."""
    best, choose = ["bf16"], common.precision
    monkeypatch.setattr(common, "precision", lambda device, wanted: choose(
        device, best[0] if wanted == "auto" else wanted))
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: True)
    source = draw(tmp_path / "source", train=6)
    flags = short(tiny, tmp_path / "a", "--source", str(source), "--source-epochs", "1",
                  "--source-iters", "1", "--nets", "1", "--epochs", "1", "--true-ids")
    batches, calls = common.pk_batches, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batches(*args)
    monkeypatch.setattr(common, "pk_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        sskd.main(flags)
    best[0] = "fp32"
    sskd.main([*flags, "--resume"])
    assert common.load_run(tmp_path / "a" / "last.pt")["precision"] == "bf16"
    sskd.main([*flags, "--out", str(tmp_path / "b"), "--sources", str(tmp_path / "a" / "source")])
    assert common.load_run(tmp_path / "b" / "last.pt")["precision"] == "fp32"


@pytest.mark.parametrize("name", PAGES)
def test_fp16_trains_and_an_overflow_skips_the_step(name, tmp_path, monkeypatch, after_each_step,
                                                    two_layers):
    """Every scaler starts far too high: its first steps are skipped, each halves it, and then the
    network is trained. In SSKD the step is one of all networks."""
    monkeypatch.setattr(common, "test", lambda *_: dict(mAP=0, rank1=0))
    more = ["--epochs", "1", "--iters", "12", "--true-ids", "--precision", "fp16", "--size", "32",
            "32", "--warm-up", "5"]
    if name == "sskd":
        more[-2:] = ["--source", str(draw(tmp_path / "source", train=6)), "--source-epochs", "1",
                     "--source-iters", "12", "--nets", "2"]
    scalers, updates, steps = first_scale(monkeypatch, 2. ** 20), [], []
    update = torch.amp.grad_scaler.GradScaler.update
    monkeypatch.setattr(torch.amp.grad_scaler.GradScaler, "update", lambda scaler: [
        updates.append(scaler), update(scaler)])
    after_each_step.append(steps.append)
    few = draw(tmp_path / "few", train=4, test=1, shots=2)         # CPUs are slow in fp16
    PAGES[name].main(short(few, tmp_path / "a", *more))
    skipped = {scaler: math.log2(2 ** 20 / scaler.get_scale()) for scaler in set(updates)}
    assert set(scalers) == set(updates) and min(skipped.values()) >= 2, skipped
    assert len(updates) - len(steps) == sum(skipped.values())
    assert len(steps) >= 2 * len(scalers)


# ----------------------------------------------------------------------------- kernels and memory

@pytest.mark.parametrize("words, says", [
    ("no kernel image is available for execution on the device",
     "^--device cuda: .*--device cpu.*whl/cu126"),
    ("out of memory", "^out of memory, it seems")])
def test_a_card_that_cannot_compute_is_one_line(words, says, tiny, tmp_path, monkeypatch, capsys):
    def fail(*_, device):
        raise RuntimeError(f"CUDA error: {words}\nCUDA kernel errors might be reported later")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    flags = [*short(tiny, tmp_path), "--device", "auto"]
    line = refusal(lambda: ccsd.main(flags), capsys)
    assert re.search(says, line) and f"CUDA error: {words} (" in line, line


OUT_OF_MEMORY = [  # as public issue threads quote them
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB",
    "CUDA error: out of memory", "HIP out of memory. Tried to allocate 1.16 GiB",
    "MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB).",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried",
    "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried"]


@pytest.mark.parametrize("words", [*OUT_OF_MEMORY, ""])
def test_out_of_memory_in_all_its_words_is_one_line(words, capsys):
    def fail():
        raise RuntimeError(f"{words}\nmore lines") if words else MemoryError
    says = refusal(fail, capsys)
    assert says.startswith("out of memory") and "--recompute, with larger --bn-splits" in says
    assert words[:80] in says and "more lines" not in says


@pytest.mark.parametrize("words", ["CUDA error: device-side assert triggered",
                                   "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
                                   "element refers to a single memory location"])
def test_other_errors_keep_their_traceback(words):
    def fail():
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        common.run(fail)


# ------------------------------------------------------------------------------------- main memory

def test_files_are_decoded_ahead_in_order_and_not_all_at_once(tiny, monkeypatch):
    split, read, events = common.load(str(tiny))[0], common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda *args: (events.append(1), read(*args))[1])
    parts = []
    for part in common.read_ahead(split.paths, 7, 64, 32):
        ahead = len(split.paths) // 7 + 1
        assert len(events) <= sum(map(len, parts)) + 3 * ahead     # this part and two more
        parts.append(part)
    assert [len(part) for part in parts] == [11] * 2 + [10] * 5
    one_by_one = torch.stack([read(path, 64, 32) for path in split.paths])
    assert torch.equal(torch.cat(parts), one_by_one)
    assert torch.equal(common.read_images(split, 64, 32), one_by_one)


@pytest.mark.parametrize("parts", [0, 2])
def test_features_of_files_are_those_of_their_images(parts, tiny):
    split, model = common.load(str(tiny))[0], common.Encoder("small", "none", parts)
    model.size = (64, 32)
    found = common.extract_features(model, split, 16)
    assert torch.equal(found, common.extract_features(model, common.read_images(split, 64, 32), 16))


def test_a_damaged_test_image_is_named_before_training(tmp_path, capsys):
    folder = draw(tmp_path / "d")
    files = sorted((folder / "bounding_box_test").iterdir())
    for file in files[3:5]:
        file.write_bytes(b"")
    line = refusal(lambda: ccsd.main(short(folder, tmp_path / "out")), capsys)
    assert "2 images" in line and files[3].name in line and files[4].name in line
    assert not (tmp_path / "out" / "last.pt").exists()


def test_images_that_do_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable: 2000000 kB\n")
    monkeypatch.setattr(common, "MEMINFO", str(tmp_path / "meminfo"))
    split = common.Split(["none.jpg"] * 32621, None, None)
    with pytest.raises(common.Problem, match="32,621 images .* take 3.2 GB.* 2.0 are free"):
        common.read_images(split, 256, 128)
    common.check_memory(12936, 256, 128)


@pytest.mark.parametrize("free, images, moved", [
    (7, .02, True), (7, 1.3, False), (15, .02, True), (15, 1.3, False), (23, 1.3, True),
    (23, 12, False), (79, 12, True)])  # GB
def test_images_leave_room_on_a_small_card(free, images, moved, monkeypatch):
    class Images:
        nbytes = images * 1e9

        def to(self, device):
            return device
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 1e9, 80e9))
    mine = Images()
    assert common.place(mine, CUDA) is (CUDA if moved else mine) and common.place(mine, CPU) is mine
