#!/usr/bin/env bash
# run.sh of the GPU bundle: the doctor, the tests and the benches of tidegate on this machine; needs neither Rust nor a network.
#
#     run.sh [doctor] [tests] [ops] [step]      these parts (default: all)
#
# OUT=./out     where the logs and results go: log.txt, summary.txt, *.json
# LIMIT=300     seconds that one program may take
# EMULATE=1     on a GPU machine, run the emulated tests, too (without a GPU they run in any case)
# TIDEGATE_CUDA_LIBS   folders with libnvrtc and libcublasLt, when they are not in the usual places
#
# Goes on after a failure; the exit code is 1 if anything failed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${OUT:=./out}" || exit 2
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt summary=$OUT/summary.txt
: >"$log"
: >"$summary"
parts=${*:-doctor tests ops step}
for p in $parts; do
    case $p in doctor | tests | ops | step) ;; *) echo "run.sh: unknown part \`$p\`; there are doctor, tests, ops, step" >&2; exit 2 ;; esac
done
failed=0
say() { printf '%s\n' "$*" | tee -a "$log"; }
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac }

# the driver's library where the dynamic linker does not look
if ! ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; then
    for d in /usr/local/nvidia/lib64 /usr/lib64-nvidia /usr/lib/wsl/lib; do
        if [ -e "$d/libcuda.so.1" ]; then export LD_LIBRARY_PATH="$d${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi
    done
fi

# folders that may hold CUDA's libraries, the likeliest first
folders() {
    tr ':' '\n' <<<"${TIDEGATE_CUDA_LIBS:-}"
    find "$here/libs" -type d 2>/dev/null
    python3 - 2>/dev/null <<'PY'
import glob, os, sys
for p in sys.path:
    for d in sorted(glob.glob(os.path.join(p or ".", "nvidia", "*", "lib"))):
        print(d)
PY
    printf '%s\n' /usr/local/cuda/lib64 /usr/local/cuda-13*/lib64 /usr/local/cuda/targets/x86_64-linux/lib /opt/cuda/lib64 /usr/lib/x86_64-linux-gnu
}
libs=
for name in libnvrtc.so libcublasLt.so; do
    found=
    # CUDA 13 is what tidegate is built for; another version is better than none
    for version in .13 ''; do
        while read -r d; do
            [ -n "$d" ] && [ -z "$found" ] && compgen -G "$d/$name$version*" >/dev/null && found=$d
        done < <(folders)
    done
    say "$name: ${found:-not found in TIDEGATE_CUDA_LIBS, gpu-bundle/libs, the wheels of python3, /usr/local/cuda}"
    case ":$libs:" in *":$found:"*) ;; *) libs=${libs:+$libs:}$found ;; esac
done
if [ -n "$libs" ]; then export TIDEGATE_CUDA_LIBS=$libs; fi
export TIDEGATE_CACHE=${TIDEGATE_CACHE:-$here/cache}

gpu=
if [ -e /dev/nvidiactl ] || nvidia-smi -L >/dev/null 2>&1; then gpu=1; fi
compiler=
for c in "${CXX:-}" g++ clang++ c++; do
    if [ -n "$c" ] && "$c" --version >/dev/null 2>&1; then compiler=$c; break; fi
done
say "GPU: ${gpu:+yes}${gpu:-none}; C++ compiler for the emulator: ${compiler:-none}"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader 2>/dev/null | tee -a "$log"

row() { printf '%-28s %-8s %8s  %s\n' "$@" >>"$summary"; }
row item result seconds note

# one NAME COMMAND…: runs it into the log; $item is then its own output
item=$(mktemp)
trap 'rm -f "$item"' EXIT
one() {
    local name=$1 begin rc took
    shift
    say "" "== $name: $*"
    begin=$(date +%s.%N)
    timeout -k 10 "${LIMIT:-300}" "$@" </dev/null >"$item" 2>&1
    rc=$?
    took=$(awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    cat "$item" >>"$log"
    case $rc in
        0) result=ok ;;
        124 | 137) result=TIMEOUT failed=1 ;;
        *) result=FAILED failed=1 ;;
    esac
    row "$name" "$result" "$took" "$(note)"
    say "   $result after $took s"
    if [ $rc != 0 ]; then tail -n 15 "$item"; fi
}
# the line that says most of what came of it
note() {
    local results skipped
    results=$(grep -aoE 'test result: .*; [0-9]+ failed' "$item" | sed 's/test result: [a-zA-Z]*\. //' | tail -n 1)
    skipped=$(grep -ao 'SKIPPED: .*' "$item" | sort -u | tr '\n' ' ')
    if [ -n "$results$skipped" ]; then printf '%s' "$results${skipped:+ (${skipped% })}" | cut -c 1-200; return; fi
    awk '/^ *ms a step/ { getline; print $1 " ms a step, " $3 " tokens/s, " $5 " TFLOP/s" } /^error:/' "$item" | tail -n 1 | cut -c 1-200
}

if wanted doctor; then
    one doctor "$here/tidegate" doctor
    grep -avE '^ok ' "$item"
    say "$(grep -acE '^ok ' "$item") self-tests ok, $(grep -acE '^FAILED ' "$item") failed"
fi
if wanted tests; then
    nothing=$(mktemp -d)
    while read -r name kind; do
        if [ -n "$gpu" ] && [ "$kind" = gpu ] && [ -z "${EMULATE:-}" ]; then
            # without a C++ compiler nothing is emulated
            one "test $name" env PATH="$nothing" CXX= "$here/tests/$name" --nocapture
        elif [ -n "$gpu" ] && [ "$kind" = emulated ] && [ -z "${EMULATE:-}" ]; then
            row "test $name" skipped - "needs no GPU (EMULATE=1 runs it)"
        elif [ -z "$compiler" ]; then
            row "test $name" skipped - "no GPU, and no C++ compiler for the emulator"
        else
            one "test $name" "$here/tests/$name" --nocapture
        fi
    done <"$here/tests.txt"
    rmdir "$nothing"
fi
if wanted ops; then
    one "bench ops" "$here/tidegate" bench ops --json "$OUT/ops.json"
    cat "$item"
    if [ -n "$gpu" ]; then
        one "bench ops, graphs" "$here/tidegate" bench ops --graph --device cuda --json "$OUT/ops-graph.json"
        cat "$item"
    fi
fi
if wanted step; then
    if [ -n "$gpu" ]; then steps=("$here"/configs/*.toml); else steps=(smoke); fi
    for s in "${steps[@]}"; do
        name=$(basename "$s" .toml)
        one "bench step $name" "$here/tidegate" bench step "$s" --json "$OUT/step-$name.json"
        cat "$item"
    done
fi

printf '\n'
cat "$summary"
printf '\nlogs and results: %s\n' "$OUT"
exit $failed
