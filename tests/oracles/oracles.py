# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.4.6"]
# ///
"""What transformers computes, for tests that have no transformers.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    # for delta_net_* alone, what delta_net.py says
    python tests/oracles/oracles.py                  # writes tests/oracles/golden/NAME/ anew, one folder for each entry of MODELS
    python tests/oracles/oracles.py --check FOLDER…  # opens each in transformers: no key may be missing, unexpected or of another shape; index, dtype
                                                     # and tokenizer must be as stated; a folder of the same name under golden/ says which weights and
                                                     # logits it must have

A golden folder is a checkpoint (config.json, model.safetensors or shards, perhaps generation_config.json) and golden.safetensors:

    input_ids [N], cu_seqlens [D + 1]  documents of different lengths, one after another; each was given to transformers on its own
    logits [N, V], hidden.I [N, H]     hidden.I is the residual stream after layer I, hidden.norm the final norm's output
    router.I [N, E]                    the router's logits of layer I, where it has experts
    loss, aux_loss                     the mean over all N - D predictions plus router_aux_loss_coef x aux_loss, which pools all layers and tokens
    grad.NAME                          of that loss, by the names that transformers has in memory (experts fused, OLMo-Hybrid's convolution whole)
    adamw                              that loss before each of twenty updates (ADAMW; all parameters decay)
    prompt, continuation               greedy, by model.generate, in f32

All but the last are computed in f64 (transformers casts to f32 in many places: "f32" is made to mean f64) and kept in f32, so that a test's error is its
own. The script asserts that transformers' own f32 agrees, and that no choice (argmax, top-k) hangs on less than rounding can move. Transformers has no gate of
2505.06708's authors: gated_qwen3.py stands in. Nor has it a DeltaNet: delta_net.py is one around fla-core's naive recurrence.
"""

import argparse
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, logging
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

import delta_net
import gated_qwen3
from gated_qwen3 import GatedQwen3

GOLDEN = Path(__file__).parent / "golden"
ADAMW = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1.0)  # gentle, so that rounding does not grow; the decay shows in the loss
COMMON = dict(initializer_range=0.1, router_aux_loss_coef=0.01, output_router_logits=True, pad_token_id=None, bos_token_id=None, eos_token_id=None)
EAGER = dict(attn_implementation="eager", experts_implementation="eager")  # the default sorts of product know no f64

MODELS = {
    # two key groups with two value heads each, heads of 32, a dense layer among sparse ones, documents of 1 to 70 tokens (the delta rule's chunks: 32, 64)
    "next_d32": dict(
        seed=51, docs=[9, 1, 64, 70, 33],
        config=dict(
            model_type="qwen3_next", vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=12, num_experts=6,
            num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12, mlp_only_layers=[1],
        ),
    ),
    # the older spelling of a configuration, tied embeddings, a file in bf16, every second layer sparse, one expert for a token, three key groups
    "next_d64_old": dict(
        seed=32, docs=[40, 40], dtype=torch.bfloat16, old=True,
        config=dict(
            model_type="qwen3_next", vocab_size=47, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1,
            head_dim=64, linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=5,
            num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8, decoder_sparse_step=2, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.5),
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        ),
    ),
    # experts fused in shards with an index, tensors of multi-token prediction beside them, ten experts for a token with weights that are not renormalised
    "next_d128_shards": dict(
        seed=23, docs=[5, 35, 2], shards=3, mtp=True,
        config=dict(
            model_type="qwen3_next", vocab_size=53, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
            linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=32, linear_value_head_dim=32, num_experts=12, num_experts_per_tok=10,
            norm_topk_prob=False, moe_intermediate_size=6, shared_expert_intermediate_size=6,
            layer_types=["full_attention", "linear_attention", "linear_attention"],
        ),
    ),
    # heads of 256 as published, linear heads of 128 with more value heads than key heads, four experts for a token
    "next_d256": dict(
        seed=64, docs=[1, 20, 3], dtype=torch.bfloat16,
        config=dict(
            model_type="qwen3_next", vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=256,
            linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=128, linear_value_head_dim=128, num_experts=8, num_experts_per_tok=4,
            moe_intermediate_size=6, shared_expert_intermediate_size=6, layer_types=["linear_attention", "full_attention"],
        ),
    ),
    # dense Qwen3: tied, with the output projection in the file all the same, as published; the older spelling
    "qwen3_tied": dict(
        seed=5, docs=[24, 1, 40], old=True, twice=True,
        config=dict(
            model_type="qwen3", vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
    ),
    # Qwen3 with experts, whose weights are not renormalised, and no shared one; a dense layer; in bf16
    "qwen3_moe": dict(
        seed=6, docs=[30, 30], dtype=torch.bfloat16,
        config=dict(
            model_type="qwen3_moe", vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=64, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8, mlp_only_layers=[1],
        ),
    ),
    # the text model of Qwen3.5, dense: the delta rule's projections apart, three key groups with two value heads each
    "qwen3_5_d32": dict(
        seed=7, docs=[40, 1, 70, 9],
        config=dict(
            model_type="qwen3_5_text", vocab_size=47, hidden_size=20, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, linear_num_key_heads=3, linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=12,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
        ),
    ),
    # with experts, in bf16 but for the delta rule's decay and norms, which are f32, as published
    "qwen3_5_moe_d256": dict(
        seed=18, docs=[1, 20, 3], dtype=torch.bfloat16, wide=("A_log", "linear_attn.norm.weight"),
        config=dict(
            model_type="qwen3_5_moe_text", vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=256,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=24, linear_value_head_dim=16, num_experts=8, num_experts_per_tok=3,
            moe_intermediate_size=6, shared_expert_intermediate_size=6, layer_types=["linear_attention", "full_attention"],
        ),
    ),
    # as published: inside a model that reads images, too; tied, rotations for images, tensors of multi-token prediction
    "qwen3_5_images_d64": dict(
        seed=89, docs=[30, 1, 35], mtp=True, around="qwen3_5",
        config=dict(
            model_type="qwen3_5_text", vocab_size=43, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_interleaved=True, mrope_section=[3, 3, 2]),
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    # likewise with experts, fused, in shards
    "qwen3_5_moe_images_d128": dict(
        seed=30, docs=[25, 25], dtype=torch.bfloat16, wide=("A_log", "linear_attn.norm.weight"), shards=2, mtp=True, around="qwen3_5_moe",
        config=dict(
            model_type="qwen3_5_moe_text", vocab_size=47, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
            linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=6, num_experts_per_tok=2,
            moe_intermediate_size=8, shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
            rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25, mrope_interleaved=True, mrope_section=[6, 5, 5]),
        ),
    ),
    # OLMo-Hybrid as transformers writes it, the convolution in three of almost the same size; rotation; more value heads than key heads, grouped queries
    "olmo_hybrid_d32": dict(
        seed=21, docs=[33, 1, 66],
        config=dict(
            model_type="olmo_hybrid", vocab_size=47, hidden_size=20, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=12, linear_value_head_dim=8,
            rope_parameters=dict(rope_type="default", rope_theta=5e5),
        ),
    ),
    # as published: no rotation, its names for norms, the convolution in its three parts, in bf16
    "olmo_hybrid_d64": dict(
        seed=2, docs=[30, 30], dtype=torch.bfloat16, published=True,
        config=dict(
            model_type="olmo_hybrid", vocab_size=43, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, head_dim=64,
            linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=16, linear_allow_neg_eigval=False,
            rope_parameters=dict(rope_type="default", rope_theta=None), layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    # YaRN as its paper has it, documents of up to four times the original context; the rotated part is half a head
    "next_yarn_d32": dict(
        seed=42, docs=[64, 1, 50],
        config=dict(
            model_type="qwen3_next", vocab_size=41, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "full_attention"], max_position_embeddings=64,
            rope_parameters=dict(rope_type="yarn", rope_theta=1e4, partial_rotary_factor=0.5, factor=4.0, original_max_position_embeddings=16),
        ),
    ),
    # YaRN with all that can be said of it, in the older spelling
    "qwen3_yarn": dict(
        seed=45, docs=[96, 40], old=True,
        config=dict(
            model_type="qwen3", vocab_size=41, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=96,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e3, factor=3.0, original_max_position_embeddings=32, beta_fast=6.0, beta_slow=0.5, mscale=1.3,
                mscale_all_dim=0.4, truncate=False,
            ),
        ),
    ),
    # an attention factor that is said
    "qwen3_yarn_factor": dict(
        seed=46, docs=[70],
        config=dict(
            model_type="qwen3", vocab_size=41, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=64,
            rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32, attention_factor=1.25),
        ),
    ),
    # as Llama 3.1 stretches, some wavelengths on each side of its ramp and on it
    "qwen3_llama3": dict(
        seed=47, docs=[64, 40],
        config=dict(
            model_type="qwen3", vocab_size=41, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=64,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=1e3, factor=4.0, original_max_position_embeddings=32, low_freq_factor=0.5, high_freq_factor=4.0,
            ),
        ),
    ),
    # positions divided
    "qwen3_linear": dict(
        seed=48, docs=[64, 40],
        config=dict(
            model_type="qwen3", vocab_size=41, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=64, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0),
        ),
    ),
    # 2505.06708's own checkpoints: a gate for each head, tied
    "gated_head_d128": dict(
        seed=13, docs=[25, 1, 40],
        config=dict(
            model_type="gated_qwen3", vocab_size=43, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=128, headwise_attn_output_gate=True, tie_word_embeddings=True, rope_theta=1e6,
        ),
    ),
    # for each dimension, with biases, without norms of queries and keys, in bf16
    "gated_elements_d64": dict(
        seed=44, docs=[30, 2], dtype=torch.bfloat16,
        config=dict(
            model_type="gated_qwen3", vocab_size=43, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            head_dim=64, elementwise_attn_output_gate=True, qkv_bias=True, use_qk_norm=False,
        ),
    ),
    # Mamba2 with two groups of heads, documents of 1 to 70 tokens
    "mamba2_groups": dict(
        seed=3, docs=[9, 1, 64, 70, 33],
        config=dict(
            model_type="mamba2", vocab_size=47, hidden_size=16, num_hidden_layers=3, num_heads=8, head_dim=4, state_size=12, n_groups=2, chunk_size=16,
        ),
    ),
    # tied, in bf16, one group, no bias of the convolution, steps within limits (which transformers forgets where it decodes with a cache)
    "mamba2_limits": dict(
        seed=4, docs=[40, 40], dtype=torch.bfloat16, cached=False,
        config=dict(
            model_type="mamba2", vocab_size=43, hidden_size=24, num_hidden_layers=3, num_heads=6, head_dim=8, state_size=16, n_groups=1, chunk_size=64,
            use_conv_bias=False, time_step_limit=(0.2, 0.7), tie_word_embeddings=True, conv_kernel=3,
        ),
    ),
    # DeltaNet, with two value heads for each key head
    "delta_net_d16": dict(
        seed=5, docs=[9, 1, 64, 70, 33],
        config=dict(
            model_type="delta_net", vocab_size=47, hidden_size=16, intermediate_size=20, num_hidden_layers=3, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=12,
        ),
    ),
    # as many of each, beta up to 2
    "delta_net_beta2": dict(
        seed=6, docs=[40, 40],
        config=dict(
            model_type="delta_net", vocab_size=43, hidden_size=16, intermediate_size=24, num_hidden_layers=3, linear_num_key_heads=3,
            linear_num_value_heads=3, linear_key_head_dim=8, linear_value_head_dim=16, linear_allow_neg_eigval=True,
        ),
    ),
}
# what DeltaNet is where nothing is said
DELTA_NET = dict(linear_conv_kernel_dim=4, linear_allow_neg_eigval=False, tie_word_embeddings=False, rms_norm_eps=1e-6, initializer_range=0.2)
# what Qwen3 and its authors' gates are where nothing is said
GATED = dict(
    headwise_attn_output_gate=False, elementwise_attn_output_gate=False, qkv_bias=False, use_qk_norm=True, tie_word_embeddings=False, rope_theta=1e4,
    rms_norm_eps=1e-6, initializer_range=0.1,
)
VISION = dict(depth=1, hidden_size=4, intermediate_size=4, num_heads=2, patch_size=2, num_position_embeddings=4)


class Close(Exception):
    """Something hangs on less than rounding can move: another seed is taken."""


def create(name, how, seed):
    """Writes the checkpoint of a random model."""
    out = GOLDEN / name
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(seed)
    config = dict(how["config"])
    kind = config.pop("model_type")
    if kind == "gated_qwen3":
        config = SimpleNamespace(**GATED | config)
    elif kind == "delta_net":
        config = SimpleNamespace(**DELTA_NET | config)
    elif kind == "mamba2":
        config = AutoConfig.for_model(kind, **config, **{k: x for k, x in COMMON.items() if "router" not in k})
    else:
        config = AutoConfig.for_model(kind, **COMMON | config)
    model = fresh(config, torch.float32)
    with torch.no_grad():  # transformers starts these at constants, which would hide a mistake in how they enter, or where almost nothing is remembered
        for key, p in model.named_parameters():
            if key.endswith("norm.weight"):
                p.add_(0.3 * torch.randn_like(p))
            elif key.endswith((".D", "conv1d.bias")):
                p.normal_()
            elif key.endswith("dt_bias"):
                p.uniform_(-3, 1)
            elif key.endswith("A_log"):
                p.copy_(torch.empty_like(p).uniform_(0.05, 3).log())
    model = model.to(how.get("dtype", torch.float32))
    for key, p in model.named_parameters():
        if key.endswith(how.get("wide", ())):
            p.data = p.data.float()
    if how.get("around"):
        model = inside(model, how["around"])
    model.save_pretrained(out)
    path, spelled = out / "model.safetensors", json.loads((out / "config.json").read_text())
    if how.get("old"):
        rope = spelled.pop("rope_parameters")
        spelled |= dict(rope_scaling=None, rope_theta=rope.pop("rope_theta"))
        if "partial_rotary_factor" in rope:
            spelled |= dict(partial_rotary_factor=rope.pop("partial_rotary_factor"), full_attention_interval=2)
        if (kind := rope.pop("rope_type")) != "default":
            spelled["rope_scaling"] = dict(type=kind) | rope
        del spelled["layer_types"]
        spelled["torch_dtype"] = spelled.pop("dtype")
        (out / "config.json").write_text(json.dumps(spelled, indent=2) + "\n")
    if how.get("twice"):
        weights = load_file(path)
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})
    if how.get("published"):
        publish(path, spelled, config)
        (out / "config.json").write_text(json.dumps(spelled, indent=2) + "\n")
    h = config.hidden_size
    mtp = {"mtp.fc.weight": torch.randn(h, 2 * h), "mtp.norm.weight": torch.randn(h).to(torch.bfloat16)} if how.get("mtp") else {}
    if mtp and not how.get("shards"):
        save_file(load_file(path) | mtp, path, metadata={"format": "pt"})
    if how.get("shards"):
        weights = {k: v.contiguous() for k, v in model.state_dict().items()} | mtp
        parts = [f"model-{i + 1:05}-of-{how['shards']:05}.safetensors" for i in range(how["shards"])]
        index = {key: parts[i % len(parts)] for i, key in enumerate(sorted(weights))}
        for part in parts:
            save_file({k: weights[k] for k in weights if index[k] == part}, out / part, metadata={"format": "pt"})
        (out / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index), indent=1) + "\n")
        path.unlink()
    else:
        (out / "generation_config.json").unlink(missing_ok=True)
    for f in out.iterdir():
        f.chmod(0o644)


def fresh(config, dtype):
    """A random model."""
    if hasattr(config, "elementwise_attn_output_gate"):
        return GatedQwen3(vars(config)).to(dtype)
    if isinstance(config, SimpleNamespace):
        return delta_net.DeltaNetModel(vars(config)).to(dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **EAGER)


def publish(path, spelled, config):
    """Makes an OLMo-Hybrid's files what the published ones are: transformers writes other parts of the convolution, and another name for a norm."""
    weights, k = load_file(path), config.linear_num_key_heads * config.linear_key_head_dim
    for layer, kind in enumerate(config.layer_types):
        at = f"model.layers.{layer}."
        if kind == "linear_attention":
            whole = torch.cat([weights.pop(f"{at}linear_attn.{c}_conv1d.weight") for c in "qkv"])
            parts = whole.split([k, k, len(whole) - 2 * k])
            weights |= {f"{at}linear_attn.{c}_conv1d.weight": w.clone() for c, w in zip("qkv", parts)}
        else:
            weights[f"{at}post_attention_layernorm.weight"] = weights.pop(f"{at}feedforward_layer_norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    spelled["rope_parameters"] = dict(rope_theta=None)


def inside(text, kind):
    """The model that reads images, too, with this text model."""
    config = AutoConfig.for_model(kind, text_config=text.config.to_dict(), vision_config=dict(VISION, out_hidden_size=text.config.hidden_size))
    config.tie_word_embeddings = text.config.tie_word_embeddings
    model = AutoModelForImageTextToText.from_config(config, dtype=text.dtype, **EAGER)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.tie_weights()
    return model


def opened(folder, dtype):
    """The model of a folder, and an error if a key is missing, unexpected or of another shape."""
    if "elementwise_attn_output_gate" in (folder / "config.json").read_text():
        return gated_qwen3.opened(folder, dtype).eval()
    if '"delta_net"' in (folder / "config.json").read_text():
        return delta_net.opened(folder, dtype).eval()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **EAGER)
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if wrong:
        raise SystemExit(f"{folder}: transformers does not take it as it is: {wrong}")
    return model.eval()


def watched(model):
    """Lists that fill with what passes: hidden states after each layer and the final norm, and routers' logits, by layer."""
    seen = {}

    def hook(key):
        def see(_, __, y):
            seen.setdefault(key, []).append((y[0] if isinstance(y, tuple) else y).flatten(0, -2))
        return see

    inner = model.backbone if hasattr(model, "backbone") else model.model
    for i, layer in enumerate(inner.layers):
        layer.register_forward_hook(hook(f"hidden.{i}"))
        if hasattr(getattr(layer, "mlp", None), "experts"):
            layer.mlp.gate.register_forward_hook(hook(f"router.{i}"))
    (inner.norm_f if hasattr(inner, "norm_f") else inner.norm).register_forward_hook(hook("hidden.norm"))
    return seen


def compute(model, seen, docs):
    """Everything that one pass over the documents shows, by golden name."""
    seen.clear()
    logits = [model(input_ids=d[None], use_cache=False).logits[0] for d in docs]
    out = {"logits": torch.cat(logits)} | {k: torch.cat(v) for k, v in seen.items()}
    ahead = torch.cat([x[:-1] for x in logits]), torch.cat([d[1:] for d in docs])
    out["loss"] = F.cross_entropy(*ahead)
    routers = tuple(v for k, v in out.items() if k.startswith("router."))
    if routers:
        out["aux_loss"] = load_balancing_loss_func(routers, model.config.num_experts, model.config.num_experts_per_tok)
        out["loss"] = out["loss"] + model.config.router_aux_loss_coef * out["aux_loss"]
    return out


def margin(out, config):
    """How near a router came to another choice: the least difference of logits between the last expert taken and the first not taken."""
    k = getattr(config, "num_experts_per_tok", 0)
    tops = [v.topk(k + 1).values for n, v in out.items() if n.startswith("router.") and v.shape[1] > k]
    return min([float((t[:, k - 1] - t[:, k]).min().detach()) for t in tops], default=float("inf"))


def train(model, seen, docs):
    """The losses before each of twenty updates, and the narrowest choice on the way."""
    optimizer, losses, narrow = torch.optim.AdamW(model.parameters(), **ADAMW), [], float("inf")
    for _ in range(20):
        out = compute(model, seen, docs)
        narrow = min(narrow, margin(out, model.config))
        losses.append(out["loss"].detach())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    return torch.stack(losses), narrow


def error(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


def in_f32(name, how, seed):
    """What transformers computes as it is."""
    folder = GOLDEN / name
    model = opened(folder, torch.float32)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1000 + seed)
    docs = [torch.randint(0, model.config.vocab_size, (n,)) for n in how["docs"]]
    prompt = max(docs, key=len)[:5]
    greedily = dict(max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
    written = model.generate(prompt[None], use_cache=how.get("cached", True), **greedily)
    top = torch.stack([x[0].topk(2).values for x in written.logits])
    if (top[:, 0] - top[:, 1]).min() < 1e-3:
        raise Close("the greedy continuation")
    if len(set(written.sequences[0, len(prompt):].tolist())) < 3:
        raise Close("the greedy continuation, which says the same again and again,")
    seen = watched(model)
    out = compute(model, seen, docs)
    if how.get("around"):  # the whole model reads text as its text model does
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **EAGER)
        assert all(error(whole(input_ids=d[None], use_cache=False).logits[0], model(input_ids=d[None], use_cache=False).logits[0]) < 1e-6 for d in docs)
    if len(set(how["docs"])) == 1 and not isinstance(model, GatedQwen3):  # equal lengths: transformers' own batch and loss
        batch = torch.stack(docs)
        whole = model(input_ids=batch, labels=batch, use_cache=False)
        assert error(whole.loss, out["loss"]) < 1e-6 and error(whole.logits.flatten(0, 1), out["logits"]) < 1e-5
    losses, narrow = train(model, seen, docs)
    if narrow < 2e-5:
        raise Close("a router's choice")
    greedy = dict(prompt=prompt, continuation=written.sequences[0, len(prompt):].clone())
    return model.config, weights, docs, greedy, {k: v.detach() for k, v in out.items()} | {"adamw": losses}


@contextmanager
def f32_means_f64():
    real = torch.Tensor.float, torch.float, torch.float32
    torch.Tensor.float, torch.float, torch.float32 = torch.Tensor.double, torch.float64, torch.float64
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float, torch.float, torch.float32 = real
        torch.set_default_dtype(torch.float32)


def in_f64(name, config, weights, docs):
    """What transformers computes where "f32" means f64."""
    with f32_means_f64():
        model = fresh(config, torch.float64).eval()
        model.load_state_dict(weights)
        seen = watched(model)
        out = compute(model, seen, docs)
        assert all(v.dtype == torch.float64 for v in out.values())
        out["loss"].backward()
        gold = {k: v.detach() for k, v in out.items()} | {"grad." + n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        gold["adamw"], narrow = train(model, seen, docs)
    assert narrow > 1e-5, f"{name}: a router's choice hangs on {narrow:.1e}"
    return gold, narrow


def write(names):
    for name in names:
        config, weights, docs, greedy, plain = drawn(name, MODELS[name])
        gold, narrow = in_f64(name, config, weights, docs)
        errors = {k: error(v, gold[k]) for k, v in plain.items()}
        assert max(errors.values()) < 1e-5, f"{name}: transformers' f32 is far from its f64: {errors}"
        losses = gold["adamw"].tolist()
        ends = torch.tensor([0] + [len(d) for d in docs]).cumsum(0)
        gold = {k: v.float().contiguous() for k, v in gold.items()} | {"input_ids": torch.cat(docs), "cu_seqlens": ends} | greedy
        save_file(gold, GOLDEN / name / "golden.safetensors")
        (GOLDEN / name / "golden.safetensors").chmod(0o644)
        size = sum(f.stat().st_size for f in (GOLDEN / name).iterdir())
        print(
            f"{name}: {sum(w.numel() for w in weights.values())} numbers, {size / 1e3:.0f} kB, loss {losses[0]:.4f} to {losses[-1]:.4f}, narrowest routing "
            f"{narrow:.1e}, transformers' f32 off by at most {max(errors.values()):.1e}, continuation {greedy['continuation'].tolist()}"
        )


def drawn(name, how):
    """The checkpoint and transformers' own f32, with the first seed that leaves nothing close."""
    for seed in range(how["seed"], how["seed"] + 1000, 10):
        create(name, how, seed)
        try:
            return in_f32(name, how, seed)
        except Close as e:
            print(f"{name}: {e} is close with seed {seed}")
    raise SystemExit(f"{name}: no seed leaves nothing close")


def stored(folder):
    """All tensors of a folder's files, and an error if its index says otherwise."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    index = json.loads(index.read_text())
    shards = {name: load_file(folder / name) for name in sorted(set(index["weight_map"].values()))}
    assert sorted(shards) == sorted(f.name for f in folder.glob("*.safetensors") if f.name != "golden.safetensors"), "shards that no index names"
    assert index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}, "the index is wrong"
    weights = {key: x for shard in shards.values() for key, x in shard.items()}
    size = sum(x.numel() * x.element_size() for x in weights.values())
    assert index["metadata"].get("total_size", size) == size, f"total_size is not {size}"
    print(f"{len(shards)} shards, and their index is right")
    return weights


def check(folder):
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "tidegate":
        raise SystemExit(f"{folder}: its model_type is tidegate, for models that are no qwen3_next: transformers has no such model")
    weights, dtype = stored(folder), getattr(torch, config.get("dtype") or config["torch_dtype"])
    odd = [key for key, x in weights.items() if x.dtype != dtype and not key.startswith("mtp.")]
    assert not odd, f"config.json says {dtype}, and these are in another: {odd}"
    model, as_stored = opened(folder, torch.float32), opened(folder, "auto")
    assert {p.dtype for p in as_stored.parameters()} == {dtype}, "transformers does not take it in the dtype that it states"
    print(f"{folder}: transformers opens it as {type(model).__name__} in {dtype}; every key is there and none is unknown")
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer
        text = "Call me Ishmael. 12345 don't\r\n\n  x <|endoftext|>"
        tokens, same = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids, AutoTokenizer.from_pretrained(folder)
        assert same(text)["input_ids"] == tokens, "transformers takes another tokenizer"
        print(f"and its tokenizer as {type(same).__name__} of {len(same)} tokens, with the end {same.eos_token!r}")
    gold = GOLDEN / folder.resolve().name / "golden.safetensors"
    if not gold.exists():
        return
    reference = opened(gold.parent, torch.float32)
    if dtype != torch.float32:  # what PyTorch makes of the original's weights
        reference = reference.to(dtype).float()
    if type(reference) is type(model):  # the text model of Qwen3.5 is saved as the Qwen3-Next that it is, with rows in another order
        for (name, x), (_, y) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            assert torch.equal(x, y), f"{name} is not that of {gold.parent} in {dtype}"
        print(f"its weights are those of {gold.parent.name} in {dtype}, bit for bit")
    gold = load_file(gold)
    ids, ends = gold["input_ids"], gold["cu_seqlens"].tolist()
    with torch.no_grad():
        logits = torch.cat([model(input_ids=ids[None, a:b], use_cache=False).logits[0] for a, b in zip(ends, ends[1:])])
    off, most = error(logits, gold["logits"]), 1e-5 if dtype == torch.float32 else 0.1
    print(f"its logits are off those of {folder.resolve().name} by {off:.1e}")
    if not off < most:
        raise SystemExit(f"that is more than {most:.0e}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", metavar="FOLDER", type=Path, nargs="+", help="only open these checkpoints in transformers")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"write only these of {', '.join(MODELS)}")
    options = options.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the same bits everywhere
    for folder in options.check or []:
        check(folder)
    options.check or write(options.names or list(MODELS))
