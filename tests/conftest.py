"""Shared by the tests: the pages are importable, and a data set of a few drawn people is at hand.
"""

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402


def draw(folder, train=8, test=4, cameras=3, shots=3):
    """Write a Market-1501 layout of drawn people, `shots` images for every person and camera."""
    rng = np.random.default_rng(0)
    eyes = [common.toy_camera(rng, .3) for _ in range(cameras)]
    for part in common.TRIPLES[0]:
        (folder / part).mkdir(parents=True)
    for person in range(1, train + test + 1):
        looks = common.toy_looks(rng)
        for camera in range(cameras):
            for shot in range(shots):
                part = ("bounding_box_train" if person <= train
                        else "query" if shot == 0 else "bounding_box_test")
                picture = common.toy_picture(rng, looks, eyes[camera], common.FRONT, 1, 0)
                picture.save(folder / part / f"{person:04d}_c{camera + 1}s1_{shot:06d}_00.jpg")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with 8 training and 4 test people, 3 cameras, 3 images each. Read only."""
    return draw(tmp_path_factory.mktemp("data") / "tiny")
