"""Gated SDPA and the chunkwise gated delta rule in PyTorch on the CPU, f32, medians in ms: `name forward forward+backward`."""
import sys
import time
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
torch.manual_seed(0)


def median(f, runs=7):
    f()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2] * 1e3


def report(name, forward):
    with torch.no_grad():
        fwd = median(forward)
    print(f"{name:40s} fwd {fwd:8.1f} ms   fwd+bwd {median(lambda: forward().sum().backward()):8.1f} ms", flush=True)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


for b, h, hk, t, d in [(1, 8, 8, 2048, 64), (4, 4, 2, 512, 64), (1, 8, 2, 4096, 128)]:
    q, k, v, gate = leaf(b, h, t, d), leaf(b, hk, t, d), leaf(b, hk, t, d), leaf(b, h, t, d)
    report(
        f"gated_sdpa B{b} H{h}/{hk} T{t} D{d}",
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != hk) * torch.sigmoid(gate),
    )
for b, t, h, d in [(1, 4096, 4, 128), (4, 512, 4, 64)]:
    q, k, v = leaf(b, t, h, d), leaf(b, t, h, d), leaf(b, t, h, d)
    g, beta = (-torch.rand(b, t, h) * 0.1).requires_grad_(), torch.rand(b, t, h, requires_grad=True)
    report(
        f"delta_rule B{b} T{t} H{h} D{d}",
        lambda: torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0],
    )
