"""Sets tidegate's benches against PyTorch and transformers on this machine and prints the ratios as Markdown.

    python3 benches/compare.py --peer /tmp/peers/bin/python [--rounds 3] [--decode [--dtype bf16]]

`--peer` is a Python that has the peers (see benches/peers/README.md). Both sides run in turn, round by round, with the same number of threads. A cell is
the median over the rounds of each side's median; the ratio is taken within each round, and its median and its range over the rounds are given.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent


def run(*command):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: ended with {done.returncode}")
    return done.stdout


def executables():
    out = run("cargo", "bench", "-p", "tidegate-benches", "--no-run", "--message-format", "json")
    messages = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {m["target"]["name"]: m["executable"] for m in messages if m.get("executable") and m["target"]["kind"] == ["bench"]}


def criterion(executable):
    """Runs a bench; its medians in ms by name, and what it printed."""
    start = time.time()
    out = run(executable, "--bench", "--noplot", "--warm-up-time", "1", "--measurement-time", "3")
    found = {}
    for samples in (ROOT / "target" / "criterion").glob("*/*/new/sample.json"):
        if samples.stat().st_mtime >= start:
            data = json.loads(samples.read_text())
            name = json.loads(samples.with_name("benchmark.json").read_text())["full_id"]
            found[name] = statistics.median(t / i / 1e6 for t, i in zip(data["times"], data["iters"]))
    return found, out


def peer_ops(python):
    rows = re.findall(r"^(\S+ .*?)\s+fwd\s+([\d.]+) ms\s+fwd\+bwd\s+([\d.]+) ms", run(python, HERE / "peers" / "ops.py"), re.M)
    return {f"{name.replace('/', '-')}/{kind}": float(ms) for name, *both in rows for kind, ms in zip(["fwd", "fwd+bwd"], both)}


def peer_step(python):
    ms, gb = re.search(r"([\d.]+) ms/step.*peak ([\d.]+) GB", run(python, HERE / "peers" / "train_step.py")).groups()
    return float(ms), float(gb)


def decode(python, dtype="f32"):
    """Tokens per second of the two, by what was done: reading a prompt, and decoding on top of it."""
    theirs = {}
    for context, prompt, written in re.findall(r"^context (\d+): prompt ([\d.]+) tokens/s, decode ([\d.]+)", run(python, HERE / "peers" / "decode.py", "--dtype", dtype), re.M):
        theirs |= {f"prompt of {context}": float(prompt), f"decode after {context}": float(written)}
    run("cargo", "build", "--release", "-p", "tidegate-train")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "decode.json"
        run("target/release/tidegate", "bench", "decode", HERE / "configs" / "decode-small.toml", "--device", "cpu", "--dtype", dtype, "--json", path)
        ours = {}
        for r in json.loads(path.read_text())["results"]:
            ours |= {f"prompt of {r['context']}": r["prompt_tokens_per_s"], f"decode after {r['context']}": r["decode_tokens_per_s"]}
    return {name: (1e3 / ours[name], 1e3 / theirs[name]) for name in theirs}


def row(name, unit, pairs):
    ours, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratios = sorted(b / a for a, b in pairs)
    print(f"| {name} | {ours:.3g} {unit} | {theirs:.3g} {unit} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |", flush=True)


def table(options, pairs):
    commit = run("git", "rev-parse", "--short", "HEAD").strip()
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())[1] if os.path.exists("/proc/cpuinfo") else platform.processor()
    peers = run(options.peer, "-c", "import torch, transformers as t; print(f'torch {torch.__version__}, transformers {t.__version__}')").strip()
    print(f"\nCommit {commit}; {len(os.sched_getaffinity(0))} cores of {cpu}; {peers}; {options.rounds} rounds.\n")
    print(f"| {options.dtype} | tidegate | peer | peer / tidegate (range) |\n|---|---:|---:|---:|")
    for (name, unit), p in pairs.items():
        row(name, unit, p)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peer", required=True, help="a Python with torch and transformers")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--decode", action="store_true", help="decoding alone")
    options.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of --decode")
    options = options.parse_args()
    if options.dtype != "f32" and not options.decode:
        sys.exit("--dtype bf16 is for --decode: the other benches compute in f32")
    pairs = {}
    if options.decode:
        for n in range(options.rounds):
            print(f"round {n + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for name, both in decode(options.peer, options.dtype).items():
                pairs.setdefault((name + ", per token", "ms"), []).append(both)
        return table(options, pairs)
    bench = executables()
    for n in range(options.rounds):
        print(f"round {n + 1} of {options.rounds}", file=sys.stderr, flush=True)
        theirs, (ours, _) = peer_ops(options.peer), criterion(bench["ops"])
        if missing := set(theirs) ^ set(ours):
            sys.exit(f"measured by one side alone: {sorted(missing)}")
        for name in ours:
            pairs.setdefault((name, "ms"), []).append((ours[name], theirs[name]))
        (their_ms, their_gb), (ours, printed) = peer_step(options.peer), criterion(bench["train_step"])
        (name, ms), = ours.items()
        pairs.setdefault((name, "ms"), []).append((ms, their_ms))
        gb = float(re.search(r"peak memory ([\d.]+) GB", printed)[1])
        pairs.setdefault((name + ", peak memory", "GB"), []).append((gb, their_gb))
        for name, both in decode(options.peer).items():
            pairs.setdefault((name + ", per token", "ms"), []).append(both)
    table(options, pairs)
    print(f"\n```\n{printed[printed.index('five steps:'):].strip()}\n```")


main()
