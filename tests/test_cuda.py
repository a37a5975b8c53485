"""What only a GPU can show. Skipped where there is none, so CI does not run it."""

import pytest
import torch
from conftest import quantised, short, unit

import ccsd
import common
import mskd
import sskd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def never_waits(monkeypatch):
    """Inside the loops over batches, what waits for the GPU raises; but singular values do wait."""
    batches, singular, mode = common.pk_batches, sskd.nuclear_norm_loss, torch.cuda

    def watched(*args):
        mode.set_sync_debug_mode("error")
        try:
            yield from batches(*args)
        finally:
            mode.set_sync_debug_mode("default")

    def waits(z):
        mode.set_sync_debug_mode("default")
        loss = singular(z)
        mode.set_sync_debug_mode("error")
        return loss
    monkeypatch.setattr(common, "pk_batches", watched)
    monkeypatch.setattr(sskd, "nuclear_norm_loss", waits)


@pytest.mark.parametrize("page, more", [
    (ccsd, []), (ccsd, ["--precision", "fp32", "--recompute", "--bn-splits", "2"]),
    (ccsd, ["--precision", "fp16"]), (mskd, []),
    (sskd, ["--source-epochs", "1", "--source-iters", "2", "--nets", "2"])])
def test_a_step_never_waits_for_the_gpu(page, more, tiny, tmp_path, monkeypatch, never_waits):
    monkeypatch.setattr(ccsd, "GROUP_START", 0)  # all of its terms
    if page is sskd:
        more = [*more, "--source", f"{tiny}:source"]
    more = [*more, "--device", "cuda", "--batch-size", "4", "--eps", ".65"]  # two clusters suffice
    scores = page.main(short(tiny, tmp_path, *more))
    assert 0 < scores["mAP"] <= 1
    images = common.read_images(common.load(str(tiny))[0], 64, 32)
    assert common.place(images, torch.device("cuda")).is_cuda


def test_the_watch_sees_a_wait(never_waits):
    with pytest.raises(RuntimeError):
        for _ in common.pk_batches(torch.arange(4).numpy() // 2, None, 2, 2, 1, None):
            torch.ones(3, device="cuda").sum().item()


def test_neighbours_and_labels_are_those_of_the_cpu():
    for features in (unit(700, 64, spread=1., people=40), quantised(700)):
        there = features.cuda()
        assert (common.nearest(features, 30) == common.nearest(there, 30)).all()
        a, b = (common.jaccard_distance(its, 20) for its in (features, there))
        assert (abs(a - b) > 1e-5).nnz == 0
        assert (common.dbscan(a, .5) == common.dbscan(b, .5)).all()


def test_images_and_scores_are_those_of_the_cpu():
    images = torch.randint(256, (9, 3, 48, 24), dtype=torch.uint8)
    a, b = (common.augment(its, torch.Generator().manual_seed(0), jitter=.5).cpu()
            for its in (images, images.cuda()))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    model = common.Encoder("small", "none")
    here = common.extract_features(model, images)
    torch.testing.assert_close(common.extract_features(model.cuda(), images).cpu(), here,
                               atol=1e-4, rtol=0)
    split = common.Split([""] * 60, torch.arange(60).numpy() % 9, torch.arange(60).numpy() % 4)
    features = unit(60)
    here, there = (common.evaluate(its, its, split, split) for its in (features, features.cuda()))
    assert here == pytest.approx(there)
