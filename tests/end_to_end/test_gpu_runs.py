# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu-runs, on the CPU: runs of a plan side by side, one over all of the "GPUs", and its time limit."""
import csv
import json
import subprocess
import time

from support import BINARY, ROOT
from train_support import SMALL, TrainCase


class GpuRuns(TrainCase):
    def run_plan(self, plan, seconds=300):
        (self.dir / "small.toml").write_text(SMALL, encoding="utf-8")
        (self.dir / "a.plan").write_text(plan.replace("SMALL", str(self.dir / "small.toml")), encoding="utf-8")
        return subprocess.run(
            [ROOT / "scripts/gpu-runs", self.dir / "a.plan", "--kilin", BINARY, "--out", self.dir / "out", "--seconds",
             str(seconds), "--gpus", "2", "--at-once", "2", "--heavy-at-once", "1", "--device", "cpu", "--threads", "1"],
            capture_output=True, text=True, cwd=ROOT, timeout=400)

    def losses(self, name):
        with open(self.dir / "out" / name / "log.csv", encoding="utf-8") as file:
            return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]

    def test_runs_and_data_parallel(self):
        result = self.run_plan("# two shapes\nboth@all SMALL\nwait\none SMALL run.steps=12  # the same\n"
                               "other@heavy SMALL run.seed=2\nmore@heavy SMALL run.seed=3\n")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        lines = result.stdout.splitlines()
        self.assertEqual(lines[0].split()[:5], ["both", "exit", "[0,", "0]", "after"])
        self.assertEqual({line.split()[0] for line in lines[1:]}, {"one", "other", "more"})
        self.assertEqual((self.dir / "out/summary.txt").read_text(encoding="utf-8").splitlines()[:4], lines)
        alone, together = self.losses("one"), self.losses("both")
        self.assertEqual(len(alone), 12)
        for a, b in zip(alone, together):
            self.assertAlmostEqual(a, b, delta=2e-5 * a)
        self.assertNotEqual(alone, self.losses("other"))
        self.assertEqual(json.loads((self.dir / "out/one.out").read_text(encoding="utf-8"))["steps"], 12)

    def test_the_time_ends_runs_and_begins_no_other(self):
        begin = time.monotonic()
        result = self.run_plan("long SMALL run.steps=10_000_000\nwait\nlater SMALL\n", seconds=22)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertLess(time.monotonic() - begin, 60)
        summary = (self.dir / "out/summary.txt").read_text(encoding="utf-8")
        self.assertIn("exit [130]", summary)
        self.assertIn("later                        not begun: no time left\n", summary)

    def test_failures(self):
        result = self.run_plan("good SMALL\nbad SMALL optimizer.lr=fast\n")
        self.assertEqual(result.returncode, 1)
        self.assertIn("key 'optimizer.lr': found \"fast\"", result.stdout)
        for plan in ("only-a-name\n", "a SMALL\na SMALL\n", "a@some SMALL\n", "a SMALL optimizer.lr 3\n"):
            result = self.run_plan(plan)
            self.assertEqual(result.returncode, 1)
            self.assertIn("expected NAME CONFIG [KEY=VALUE]... with a new name", result.stderr)
            self.assertIn(f"a.plan:{plan.count(chr(10))}: found '", result.stderr)


if __name__ == "__main__":
    import unittest

    unittest.main()
