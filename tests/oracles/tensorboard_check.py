"""Reads a run's TensorBoard event files with the `tensorboard` package and holds them against the run's metrics.jsonl.

    pip install tensorboard==2.21.0
    python3 tests/oracles/tensorboard_check.py runs/quickstart

Every number of metrics.jsonl must be there once, at its step, rounded to f32, and nothing else; histograms must add up. With a second argument it first
reads that older copy of the event files, as a TensorBoard does that has been looking since before the run went on.
"""

import json
import math
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator, tag_types


def tag_of(name, closing):
    group, dot, last = name.rpartition(".")
    if dot:
        return f"{group}/{last}"
    return ("final/" if closing else "eval/" if name.startswith("held_out") else "train/") + name


def main(run, before=None):
    expected = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        fields = json.loads(line)
        step = fields.pop("step")
        for name, x in fields.items():
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                expected.setdefault(tag_of(name, "final" in fields), []).append((step, struct.unpack("f", struct.pack("f", x))[0]))
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder)
        everything = {tag_types.SCALARS: 0, tag_types.HISTOGRAMS: 0, tag_types.TENSORS: 0}
        events = event_accumulator.EventAccumulator(str(shown), size_guidance=everything)
        if before:
            for f in Path(before).iterdir():
                shutil.copy(f, shown)
            events.Reload()
            assert events.Tags()["scalars"], "the older copy holds nothing"
        for f in (run / "tensorboard").iterdir():
            shutil.copy(f, shown)
        events.Reload()
        tags = events.Tags()
        found = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}
        assert set(found) == set(expected), (set(found) ^ set(expected))
        for tag, values in expected.items():
            assert found[tag] == values, (tag, found[tag], values)
        histograms = {t: events.Histograms(t) for t in tags["histograms"]}
    steps = set()
    for tag, all_of in histograms.items():
        assert [e.step for e in all_of] == sorted({e.step for e in all_of}), tag
        for e in all_of:
            h = e.histogram_value
            steps.add(e.step)
            assert h.num == sum(h.bucket) > 0 and len(h.bucket) == len(h.bucket_limit), tag
            assert list(h.bucket_limit) == sorted(h.bucket_limit) and math.isclose(h.bucket_limit[-1], h.max, rel_tol=1e-6), tag
            assert h.num * h.min <= h.sum * (1 + 1e-4) + 1e-4 and h.sum <= h.num * h.max * (1 + 1e-4) + 1e-4, tag
            assert h.sum_squares * h.num >= h.sum**2 * (1 - 1e-4), tag
    print(json.dumps({"scalars": len(found), "values": sum(map(len, found.values())), "histograms": sorted(histograms), "steps": sorted(steps)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
