"""PyTorch, flash-linear-attention and transformers on the GPU, in bf16, at the shapes of `tidegate bench`: one line for each case, medians in ms.

    python gpu.py ops                                # attention, the delta rule, and the card's own ceilings
    python gpu.py step benches/configs/moe-1b.toml   # an AdamW step of the same model in transformers
    for i in $(seq 10); do python gpu.py warm $i & done; wait    # before those: compiles Triton's kernels on many cores

Needs torch and transformers; `pip install flash-linear-attention` for the delta rule's kernels (transformers takes them when they are there).
"""
import sys
import time
import tomllib
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def median(f, runs=20):
    """By events, with a cold L2 cache, after three calls that warm up."""
    for _ in range(3):
        f()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[runs // 2]


def leaf(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def both(name, inputs, forward):
    try:
        with torch.no_grad():
            fwd = median(forward)
        grad = torch.randn_like(forward())
        all_ = median(lambda: torch.autograd.grad(forward(), inputs, grad))
        print(f"{name:58s} forward {fwd:8.3f} ms   with backward {all_:8.3f} ms", flush=True)
    except Exception as e:  # a peer that does not run here is a row, too
        print(f"{name:58s} FAILED: {str(e).splitlines()[0][:120]}", flush=True)


def ops():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(f"{'matrix product 8192^3 bf16':58s} {2 * 8192**3 / median(lambda: a @ b) / 1e9:8.0f} TFLOP/s")
    big, to = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    print(f"{'copy of 1 GiB':58s} {2 * 2**30 / median(lambda: to.copy_(big)) / 1e9:8.2f} TB/s")
    for B, T, H, Hk, D in [(1, 16384, 16, 16, 128), (1, 16384, 16, 4, 128), (1, 16384, 8, 2, 256)]:
        q, k, v, g = leaf(B, H, T, D), leaf(B, Hk, T, D), leaf(B, Hk, T, D), leaf(B, H, T, D)
        for backend in [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]:
            def run():
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != Hk) * torch.sigmoid(g)
            both(f"gated_sdpa {backend.name} B{B} T{T} H{H}/{Hk} D{D}", [q, k, v, g], run)
    for B, T, Hk, Hv, D in [(4, 8192, 16, 32, 128), (1, 8192, 2, 8, 128)]:
        inputs = delta_rule_inputs(B, T, Hk, Hv, D)
        both(f"delta_rule fla B{B} T{T} H{Hk}/{Hv} D{D}", inputs, lambda: delta_rule(inputs))


def delta_rule_inputs(B, T, Hk, Hv, D):
    g = (-0.1 * torch.sigmoid(torch.randn(B, T, Hv, device="cuda"))).requires_grad_()
    return [leaf(B, T, Hk, D), leaf(B, T, Hk, D), leaf(B, T, Hv, D), g, torch.rand(B, T, Hv, device="cuda").requires_grad_()]


def delta_rule(inputs):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    return chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0]


def warm(seed):
    """Each process tries a kernel's configurations in an order of its own, and all share Triton's cache."""
    import random
    from triton.runtime.autotuner import Autotuner
    order, plain = random.Random(int(seed)), Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: order.sample(found := list(plain(self, kwargs)), len(found))
    for B, T, Hk, Hv, D in [(1, 8192, 2, 8, 128), (4, 8192, 16, 32, 128), (1, 4096, 8, 8, 128)]:
        inputs = delta_rule_inputs(B, T, Hk, Hv, D)
        delta_rule(inputs).float().square().sum().backward()
        torch.cuda.synchronize()


def step(path, experts=None):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    c = tomllib.load(open(path, "rb"))
    m, rows, T = c["model"], c["data"]["batch"], c["data"]["seq_len"]
    if not m.get("num_experts"):
        m = {k: v for k, v in m.items() if k != "num_experts"} | {"mlp_only_layers": list(range(m["num_hidden_layers"]))}
    config = Qwen3NextConfig(**m, use_cache=False, max_position_embeddings=T, output_router_logits="num_experts" in m)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = Qwen3NextForCausalLM(config).train()
    if experts:
        model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (rows, T), device="cuda")

    def one():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    first, times = one(), []
    one()
    for _ in range(6):
        start = time.perf_counter()
        last = one()
        times.append(time.perf_counter() - start)
    ms = sorted(times)[len(times) // 2] * 1e3
    n = sum(p.numel() for p in model.parameters())
    print(f"transformers {c['name']} {experts or ''}: {n / 1e6:.1f} M parameters, {ms:.1f} ms a step, {rows * T / ms * 1e3:.0f} tokens/s, "
          f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, loss {first:.3f} -> {last:.3f}", flush=True)


if sys.argv[1:2] == ["ops"]:
    ops()
elif sys.argv[1:2] == ["warm"] and len(sys.argv) > 2:
    warm(sys.argv[2])
elif sys.argv[1:2] == ["step"] and len(sys.argv) > 2:
    step(*sys.argv[2:4])
else:
    sys.exit(__doc__)
