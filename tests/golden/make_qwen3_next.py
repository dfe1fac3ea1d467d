"""Writes tests/golden/qwen3_next/: a tiny random Qwen3NextForCausalLM as transformers saves it (config.json, model.safetensors), and
golden.safetensors with its input, logits, losses and every gradient. Pinned: torch 2.15.0, transformers 5.23.0, safetensors 0.8.0.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/golden/make_qwen3_next.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

out = Path(__file__).parent / "qwen3_next"
torch.manual_seed(7)
config = Qwen3NextConfig(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, linear_conv_kernel_dim=4,
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20, mlp_only_layers=[1],
    output_router_logits=True, router_aux_loss_coef=0.01, initializer_range=0.2, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="eager", experts_implementation="eager",
)
model = Qwen3NextForCausalLM(config).float().train()
with torch.no_grad():  # transformers starts these at constants, which would hide a mistake in how they enter
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "dt_bias")):
            p.add_(0.3 * torch.randn_like(p))
ids = torch.randint(0, config.vocab_size, (2, 75))  # 75: the delta rule's chunk is 64
model.save_pretrained(out)
(out / "generation_config.json").unlink(missing_ok=True)
(out / "model.safetensors").chmod(0o644)

# transformers computes norms, router, decay and delta rule in f32 whatever the model's dtype: for a reference in f64, "f32" means f64 from here on
model = model.double()
torch.Tensor.float = torch.Tensor.double
torch.float = torch.float32 = torch.float64
torch.set_default_dtype(torch.float64)
o = model(input_ids=ids, labels=ids, use_cache=False)
o.loss.backward()
assert o.loss.dtype == o.logits.dtype == torch.float64
gold = {"input_ids": ids.to(torch.int64), "logits": o.logits, "loss": o.loss.reshape(1), "aux_loss": o.aux_loss.reshape(1)}
gold |= {"grad." + n: p.grad for n, p in model.named_parameters()}
save_file({n: t.detach().contiguous() for n, t in gold.items()}, out / "golden.safetensors")
print("loss", o.loss.item(), "aux", o.aux_loss.item(), "parameters", sum(p.numel() for p in model.parameters()))
