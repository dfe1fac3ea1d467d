"""One AdamW step of the 10.06 M-parameter Qwen3-Next in transformers on the CPU, f32, batch 4 x 512: median ms, tokens/s, peak resident memory."""
import resource
import sys
import time
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64, num_experts=16, num_experts_per_tok=2,
    moe_intermediate_size=128, shared_expert_intermediate_size=128, tie_word_embeddings=False, max_position_embeddings=4096, use_cache=False,
    output_router_logits=True,
)
model = Qwen3NextForCausalLM(config).train()
if len(sys.argv) > 1:
    model.set_experts_implementation(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
ids = torch.randint(0, 4096, (4, 512))


def step():
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


step(), step()
times = []
for _ in range(5):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
ms = sorted(times)[2] * 1e3
params = sum(p.numel() for p in model.parameters())
print(f"transformers: {params / 1e6:.2f} M parameters, {ms:.0f} ms/step, {4 * 512 / ms * 1e3:.0f} tok/s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
