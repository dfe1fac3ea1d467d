"""A language model of DeltaNet (2406.06484) around fla-core's naive recurrence, for oracles.py: transformers has none.

    pip install einops==0.8.1
    pip install --no-deps --target /tmp/fla-core fla-core==0.6.0
    FLA_CORE=/tmp/fla-core python tests/oracles/oracles.py delta_net_d16 delta_net_beta2

The recurrence is `fla/ops/delta_rule/naive.py`, loaded by its path, and the package is kept out of Python's way: it asks for Triton, and transformers would use it. What stands around it is 2412.06464 §3.4 without
decay: queries, keys and values behind a causal depthwise convolution and SiLU, queries and keys of 2-norm 1, beta a sigmoid (of twice that, where its range
is 2), each head's output normalised and multiplied by a SiLU of the gate. Norms, SwiGLU and the rest are gated_qwen3.py's.
"""

import importlib.util
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from gated_qwen3 import GatedQwen3, Mlp, Norm


def naive():
    """fla-core's module, without its package."""
    if "FLA_CORE" not in os.environ:
        raise SystemExit("FLA_CORE must be the folder that fla-core 0.6.0 was installed into: see delta_net.py")
    spec = importlib.util.spec_from_file_location("naive", Path(os.environ["FLA_CORE"]) / "fla/ops/delta_rule/naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.k, self.v = c.linear_num_key_heads * c.linear_key_head_dim, c.linear_num_value_heads * c.linear_value_head_dim
        self.q_proj, self.k_proj = nn.Linear(c.hidden_size, self.k, bias=False), nn.Linear(c.hidden_size, self.k, bias=False)
        self.v_proj, self.g_proj = nn.Linear(c.hidden_size, self.v, bias=False), nn.Linear(c.hidden_size, self.v, bias=False)
        self.b_proj = nn.Linear(c.hidden_size, c.linear_num_value_heads, bias=False)
        width = 2 * self.k + self.v
        self.conv1d = nn.Conv1d(width, width, c.linear_conv_kernel_dim, groups=width, padding=c.linear_conv_kernel_dim - 1, bias=False)
        self.o_norm = Norm(c.linear_value_head_dim, c.rms_norm_eps)
        self.o_proj = nn.Linear(self.v, c.hidden_size, bias=False)

    def forward(self, x):
        c, t, heads = self.c, len(x), self.c.linear_num_value_heads
        together = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        together = F.silu(self.conv1d(together.T[None])[0, :, :t].T)
        q, k, v = together.split([self.k, self.k, self.v], -1)

        def of_heads(x, n):
            """[1, heads, T, D]; key heads are read by as many value heads each."""
            return x.view(t, n, -1).repeat_interleave(heads // n, 1).transpose(0, 1)[None]

        q, k = (of_heads(x, c.linear_num_key_heads) for x in (q, k))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        beta = self.b_proj(x).sigmoid() * (2 if c.linear_allow_neg_eigval else 1)
        o, _ = naive().delta_rule_recurrence(q, k, of_heads(v, heads), beta.T[None])
        o = self.o_norm(o[0].transpose(0, 1)) * F.silu(self.g_proj(x)).view(t, heads, -1)
        return self.o_proj(o.reshape(t, -1))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.linear_attn = Norm(c.hidden_size, c.rms_norm_eps), DeltaNet(c)
        self.post_attention_layernorm, self.mlp = Norm(c.hidden_size, c.rms_norm_eps), Mlp(c)

    def forward(self, x):
        x = x + self.linear_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class DeltaNetModel(GatedQwen3):
    layer = Layer

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        c = vars(self.config)
        said = dict(model_type="tidegate", layer_types=["delta_net"] * c["num_hidden_layers"], zero_centered_norms=False, num_experts=0)
        said["dtype"] = str(self.lm_head.weight.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(said | c, indent=2, sort_keys=True) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})


OURS = ["model_type", "layer_types", "zero_centered_norms", "num_experts", "dtype"]


def opened(folder, dtype):
    """The model of a folder."""
    said = json.loads((folder / "config.json").read_text())
    model = DeltaNetModel({key: x for key, x in said.items() if key not in OURS})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(dtype)
