#!/usr/bin/env bash
# Packs what a GPU machine without Rust and network needs to test and time tidegate:
#
#     scripts/gpu-bundle.sh          builds, and leaves target/gpu-bundle/ and target/gpu-bundle.tar.gz
#
# There: tar xf gpu-bundle.tar.gz && gpu-bundle/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
limit=$((60 * 1000 * 1000))
bundle=target/gpu-bundle
packages=(-p tidegate-cuda -p tidegate-ops -p tidegate-nn -p tidegate-tests -p tidegate-train)
# what builds; a machine that shares its cores with others may put a lock in front: CARGO='flock FILE cargo'
read -ra cargo <<<"${CARGO:-cargo}"

"${cargo[@]}" build --release -p tidegate-train --bin tidegate
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
"${cargo[@]}" test --release --no-run --message-format=json "${packages[@]}" >"$messages"

rm -rf "$bundle" "$bundle.tar.gz"
mkdir -p "$bundle/tests" "$bundle/configs"
strip -o "$bundle/tidegate" "${CARGO_TARGET_DIR:-target}/release/tidegate"
cp benches/configs/*.toml "$bundle/configs/"
cp scripts/gpu-run.sh "$bundle/run.sh"

# The test programs that use the CUDA backend. Those that look for a GPU themselves say so ("nothing runs on a GPU"); the others are emulated alone.
python3 - "$messages" <<'PY' | while read -r name kind program; do
import json, os, sys
for line in open(sys.argv[1]):
    m = json.loads(line) if line.startswith("{") else {}
    if m.get("reason") != "compiler-artifact" or not m.get("executable") or m["target"]["kind"] != ["test"]:
        continue
    source = open(m["target"]["src_path"]).read()
    if "cuda::" not in source or "CARGO_BIN_EXE" in source:
        continue
    package = os.path.basename(os.path.dirname(os.path.dirname(m["target"]["src_path"])))
    print(f"{package}-{m['target']['name']}", "gpu" if "runs on a GPU" in source else "emulated", m["executable"])
PY
    strip -o "$bundle/tests/$name" "$program"
    printf '%s %s\n' "$name" "$kind" >>"$bundle/tests.txt"
done
[ -s "$bundle/tests.txt" ] || { echo "error: no test program uses the CUDA backend; has the tests' layout changed?" >&2; exit 1; }

tar -C target -cf - gpu-bundle | gzip -9 >"$bundle.tar.gz"
size=$(stat -c %s "$bundle.tar.gz")
if [ "$size" -gt "$limit" ]; then
    echo "error: $bundle.tar.gz has $size bytes, at most $limit are allowed; the largest of its files:" >&2
    find "$bundle" -type f -printf '%s %p\n' | sort -nr | head -n 5 >&2
    exit 1
fi
du -h --apparent-size "$bundle" "$bundle.tar.gz" | sort -k2
cat <<'END'
Not in it, for they would not fit: libnvrtc with libnvrtc-builtins (to compile kernels), and libcublasLt (products). run.sh looks for them in
TIDEGATE_CUDA_LIBS, in gpu-bundle/libs, in the wheels of python3 (PyTorch brings them), and in /usr/local/cuda. Where there are none, bring the folder
libs of: pip install --target libs nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14
END
