"""Qwen3 with the gate of 2505.06708, in the form that its authors' checkpoints have: transformers knows none. Written after their formulas, for oracles.py.

The query projection's rows come in groups, one for each key/value head: the queries of the query heads that read it, then their gates (one number per head,
or one per dimension). `sigmoid(gate)` multiplies each head's output in front of the output projection. All else is Qwen3's: a plain RMS norm of each head's
queries and keys, rotation in halves, SwiGLU, norms before attention and feed-forward.
"""

import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


class Norm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def rotated(x, theta):
    """x [T, heads, D] at positions 0, 1, …"""
    t, _, d = x.shape
    angle = torch.arange(t, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, d, kv = c, c.head_dim, c.num_key_value_heads
        self.gate = 1 if c.headwise_attn_output_gate else d if c.elementwise_attn_output_gate else 0
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * (d + self.gate), bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * d, c.hidden_size, bias=c.qkv_bias)
        if c.use_qk_norm:
            self.q_norm, self.k_norm = Norm(d, c.rms_norm_eps), Norm(d, c.rms_norm_eps)

    def forward(self, x):
        c, t, d, kv = self.c, len(x), self.c.head_dim, self.c.num_key_value_heads
        n = c.num_attention_heads // kv
        q, gate = self.q_proj(x).unflatten(-1, (kv, -1)).split([n * d, n * self.gate], -1)
        q, k, v = q.reshape(t, kv * n, d), self.k_proj(x).view(t, kv, d), self.v_proj(x).view(t, kv, d)
        if c.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q, c.rope_theta), rotated(k, c.rope_theta)
        q = q.unflatten(1, (kv, n))
        scores = torch.einsum("igrd,jgd->grij", q, k) / d**0.5
        weights = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        o = torch.einsum("grij,jgd->igrd", weights, v)
        if self.gate:
            o = o * gate.reshape(t, kv, n, self.gate).sigmoid()
        return self.o_proj(o.reshape(t, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = Norm(c.hidden_size, c.rms_norm_eps), Mlp(c)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class GatedQwen3(nn.Module):
    """Documents are given one at a time, `[1, T]`."""

    layer = Layer

    def __init__(self, config):
        super().__init__()
        self.config = c = SimpleNamespace(**config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList([self.layer(c) for _ in range(c.num_hidden_layers)])
        self.model.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for key, p in self.named_parameters():
            if p.dim() > 1 or key.endswith("bias"):
                nn.init.normal_(p, std=c.initializer_range)

    def forward(self, input_ids, use_cache=False):
        x = self.model.embed_tokens(input_ids[0])
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x))[None])

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, **_):
        logits = []
        for _ in range(max_new_tokens):
            logits.append(self(input_ids).logits[:, -1])
            input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], -1)
        return SimpleNamespace(sequences=input_ids, logits=logits)

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        said = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", attention_bias=False, attention_dropout=0.0, rope_scaling=None)
        said |= dict(sliding_window=None, use_sliding_window=False, torch_dtype=str(self.lm_head.weight.dtype).removeprefix("torch."))
        said |= dict(auto_map={"AutoConfig": "configuration_qwen3.Qwen3Config", "AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"})
        (folder / "config.json").write_text(json.dumps(said | vars(self.config), indent=2, sort_keys=True) + "\n")
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


KEYS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta initializer_range
tie_word_embeddings headwise_attn_output_gate elementwise_attn_output_gate qkv_bias use_qk_norm""".split()


def opened(folder, dtype):
    """The model of a folder."""
    said = json.loads((folder / "config.json").read_text())
    model = GatedQwen3({key: said[key] for key in KEYS})
    weights = load_file(folder / "model.safetensors")
    if said["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.to(dtype)
