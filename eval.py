"""Score a trained network on any data set, with or without re-ranking.

  python eval.py runs/ccsd-toy-s0                          the data set it was trained on
  python eval.py runs/ccsd-toy-s0 --data toy-source --root data   any other, drawn into data/
  python eval.py runs/ccsd-market1501-s0 --rerank --json   k-reciprocal re-ranking; one line of JSON

Market-1501's rule: gallery images of the query's person and camera are ignored. mAP is not
interpolated. Re-ranking uses the gallery's own structure: compare it with re-ranked figures only.
"""

import argparse
import json
import os

import common  # before torch: Ctrl-C during the imports is quiet
import numpy as np
import torch


def rerank(query_features, gallery_features, k1=20, k2=6, lam=.3, block=256):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): yield similarities, (block, G) at a time.

    Unit features (Q, D) and (G, D) on any device. A similarity is minus the paper's final distance
    (eq. 12), (1 - lam) Jaccard + lam d, with d the squared Euclidean distance over the largest of
    its row. Memory grows with Q + G, never with its square.
    """
    features = torch.cat([query_features, gallery_features])
    common.check_finite(features)
    farthest = torch.cat([2 - 2 * (rows @ features.T).min(1).values for rows in
                          features.split(block)])
    farthest = farthest.clamp(min=1e-12).cpu().numpy()                            # (Q + G,)

    def weigh(cosine, vectors):
        return np.exp(-(2 - 2 * cosine) / common.per_entry(farthest, vectors))

    vectors = common.reciprocal_vectors(features, common.nearest(features, k1 + 1), k1, k2, weigh)
    q = len(query_features)
    shared = common.overlaps(vectors[:q], vectors[q:], block)
    for start, overlap in zip(range(0, q, block), shared):
        overlap = overlap.toarray()                                               # (block, G)
        jaccard = 1 - overlap / (2 - overlap)
        rows = query_features[start:start + block]
        euclid = (2 - 2 * (rows @ gallery_features.T)).cpu().numpy()
        euclid /= farthest[start:start + len(rows), None]
        yield torch.from_numpy(-(1 - lam) * jaccard - lam * euclid)


def get_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("checkpoint", help="a run's folder or its last.pt")
    parser.add_argument("--data", help="key or folder of the data set (the one of the run)")
    parser.add_argument("--root", help="where data sets live (the one of the run)")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, no table")
    parser.add_argument("--device", default="auto", choices=common.DEVICES, help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    device = common.pick_device(args.device)
    path = args.checkpoint
    if os.path.isdir(path):
        path = os.path.join(path, "last.pt")
    model, state = common.load_encoder(path)
    name = args.data or state["data"]
    _, query, gallery = common.load(name, args.root or state["root"],
                                    draw=bool(args.root))  # no checkpoint says where to draw
    model.on(device, argparse.Namespace(bf16=state["bf16"], fp32=state["fp32"], recompute=False))
    features = [common.extract_features(model, common.read_images(split, *state["size"]))
                for split in (query, gallery)]
    if model.parts:
        features = [views[0] for views in features]  # the global feature
    if args.rerank:
        scores = common.score_ranking(rerank(*features), query, gallery)
    else:
        scores = common.evaluate(*features, query, gallery)
    scores = dict(data=name, rerank=args.rerank, **scores)
    if args.json:
        print(json.dumps(scores))
    else:
        print(f"{'data':20} re-ranked    mAP     R1     R5    R10  queries")
        print(f"{name:20} {'yes' if args.rerank else 'no':>9} " + " ".join(
            f"{100 * scores[key]:6.1f}" for key in ("mAP", "rank1", "rank5", "rank10"))
            + f" {scores['queries']:8,}")
    return scores


if __name__ == "__main__":
    common.run(main, resume=None)
