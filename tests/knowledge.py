"""What does a teacher know that its student does not? Measured during a run of a page.

  python tests/knowledge.py sskd                     seed 0 of the toy set
  python tests/knowledge.py ccsd 0 1 2 --cross 0     means of three seeds, with flags of the page
  python tests/knowledge.py sskd 0 1 --sources runs/row-sSEED/source     SEED: becomes the seed

The page runs as it is; this program only watches its distillation loss. It compares the choices of
teacher and student with the true ids, which training never sees. In CCSD and SSKD a choice is a
cluster, which is right if the image's person is the most frequent in it. In MSKD it is the image of
another camera in the batch whose global feature is nearest, and the label's choice is another image
of the cluster. CCSD chooses among the clusters that both cameras see, once for every other camera,
and SSKD once for every network. A round is a clustering and the batches after it; MSKD's round 1 is
the student's first round. Columns, in per cent of a round's choices, but for the spread:

  label, teacher, student     choices that are right
  differ: teacher, student    cases in which teacher and student choose differently; of these,
                              the choices of each that are right
  wrong: teacher, student     cases in which the label is wrong; of these, those that are right
  spread: teacher, student    how many candidates they weigh: exp(mean entropy)

Every round of a seed is printed when it ends, and a table of all seeds at the end.
"""

import argparse
import importlib
import os
import sys
import tempfile

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402

HEAD = ("round", "label", "teacher", "student", "differ", "teacher", "student", "wrong", "teacher",
        "student", "spread: teacher", "student")


class Watch:
    """True ids, pseudo labels and batch of the moment; sums over the images of every round."""

    def __init__(self, page):
        self.page, self.sums = page, []
        original, patched = common.read_data, {"ccsd": self.ccsd, "mskd": self.mskd,
                                               "sskd": self.sskd}[page.__name__]

        def read_data(*args):
            self.train, *rest = original(*args)
            self.sums = []  # every stage counts its rounds from 1
            return self.train, *rest
        common.read_data, common.pk_batches = read_data, self.batches(common.pk_batches)
        patched()

    def batches(self, original):
        def pk_batches(labels, cams, *args):
            if cams is self.train.cams:  # not batches of a source
                self.labels, pids, clusters = labels, self.train.pids, range(labels.max() + 1)
                self.persons = np.array([np.bincount(pids[labels == c]).argmax() for c in clusters])
                self.sums.append(0)
            for index in original(labels, cams, *args):
                self.index = index.numpy()
                yield index
            if cams is self.train.cams and torch.is_tensor(self.sums[-1]):
                row = zip(HEAD[1:], columns(self.sums[-1]))  # a run that is cut has shown these
                row = ", ".join(f"{name} {x:.1f}" for name, x in row)
                common.say(f"round {len(self.sums)}: {row}")
        return pk_batches

    def compare(self, teacher, student, label, right):
        """teacher, student: distributions (b, C); label (b,): the label's choice; right (b, C)."""
        teacher, student, rows = teacher.cpu(), student.cpu(), torch.arange(len(label))
        t, s, l = (right[rows, choice] for choice in (teacher.argmax(1), student.argmax(1), label))
        differ = teacher.argmax(1) != student.argmax(1)
        entropy = [torch.special.entr(x).sum(1) for x in (teacher, student)]
        self.sums[-1] += torch.stack([x.double().sum() for x in (
            torch.ones(len(label)), l, t, s, differ, differ & t, differ & s, ~l, ~l & t, ~l & s,
            *entropy)])

    def ccsd(self):
        original = self.page.distillation_loss

        def distillation_loss(similarity, group, parent, camera, table, temp):
            log_p, log_q, valid = (x.cpu() for x in self.page.teacher_and_student(
                similarity.detach(), group, parent, camera, table, temp))         # (B, C, V) twice
            right = torch.from_numpy(self.persons == self.train.pids[self.index][:, None])
            k = parent[group].cpu()
            for w in range(table.shape[1]):
                rows = valid[:, w]
                p, q = (x[rows, :, w].exp() for x in (log_p, log_q))
                self.compare(p, q, k[rows], right[rows])
            return original(similarity, group, parent, camera, table, temp)
        self.page.distillation_loss = distillation_loss

    def mskd(self):
        original = self.page.distillation_losses

        def distillation_losses(f, t):
            person, camera, label = (torch.from_numpy(array[self.index]) for array in (
                self.train.pids, self.train.cams, self.labels))
            valid = (camera[:, None] != camera).any(1)
            near = camera[:, None] == camera
            p, q = ((x[0] @ x[0].T / .05).detach().cpu().masked_fill(near, -1e4).softmax(1)[valid]
                    for x in (t, f))
            other = (label[:, None] == label).fill_diagonal_(False).float().argmax(1)
            self.compare(p, q, other[valid], (person[:, None] == person)[valid])
            return original(f, t)
        self.page.distillation_losses = distillation_losses

    def sskd(self):
        original = self.page.soft_label_loss

        def soft_label_loss(z, soft):
            right = torch.from_numpy(self.persons == self.train.pids[self.index][:, None])
            label = torch.from_numpy(self.labels[self.index])
            self.compare(soft, z.detach().softmax(1), label, right)
            return original(z, soft)
        self.page.soft_label_loss = soft_label_loss

    def table(self):
        """-> (rounds with a distillation loss, 11): the columns after the first."""
        return np.array([columns(sums) for sums in self.sums if torch.is_tensor(sums)])


def columns(sums):
    """Sums over the choices of a round -> its 11 columns after the first."""
    n, label, t, s, differ, differ_t, differ_s, wrong, wrong_t, wrong_s, *entropy = sums.tolist()
    return [*(100 * x / n for x in (label, t, s, differ)),
            *(100 * x / max(1, differ) for x in (differ_t, differ_s)),
            100 * wrong / n, *(100 * x / max(1, wrong) for x in (wrong_t, wrong_s)),
            *(np.exp(x / n) for x in entropy)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=("ccsd", "mskd", "sskd"))
    parser.add_argument("seeds", type=int, nargs="*", default=[0])
    args, flags = parser.parse_known_args()
    watch, tables = Watch(importlib.import_module(args.page)), []
    common.running_code = lambda module: "watched"  # no note that this program replaced functions
    for seed in args.seeds:
        watch.sums = []
        with tempfile.TemporaryDirectory() as folder:
            words = [flag.replace("SEED", str(seed)) for flag in flags]
            watch.page.main([*words, "--seed", str(seed), "--out", os.path.join(folder, "run")])
        tables.append(watch.table())
    mean = np.mean(tables, 0)
    rounds = [i + 1 for i, sums in enumerate(watch.sums) if torch.is_tensor(sums)]
    print(f"\n`python tests/knowledge.py {' '.join(sys.argv[1:])}`\n\n| {' | '.join(HEAD)} |")
    print("|" + "---|" * len(HEAD))
    for i, row in zip(rounds, mean):
        print(f"| {i} | " + " | ".join(f"{x:.1f}" for x in row) + " |")


if __name__ == "__main__":
    common.run(main, "")
