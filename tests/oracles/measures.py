# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "transformers==5.23.0", "safetensors==0.8.0", "numpy==2.4.6"]
# ///
"""What `tidegate measure` should find, by transformers: attention sinks, first-token attention, massive activations, the logit lens, ranks of W_V W_O.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    python tests/oracles/measures.py    # writes tests/oracles/golden/measures_NAME/ anew: config.json, model.safetensors, measures.json

The models are tiny and random, with what the measures look for planted in them: a token whose embedding is far larger than all else in one channel (a massive
activation at every layer), embeddings with a direction in common (which lets some heads' queries agree on that token's key), and large weights of the norms of
queries and keys (so that attention is not uniform). Text of `windows` windows of `time` random tokens begins each of them with that token, in every second sample
of 64 tokens, too. Everything is computed in f64 from `output_attentions` and `output_hidden_states`, window by window:

    tokens                    windows · time + 1 of them
    loss                      nats per token
    first_token, entropy, max_score, sink_rate: [layer][head], of layers with a softmax; sinks over the samples of 64 tokens, each on its own, ε = 0.3
    received                  [layer][window]: the sink token, argmax_t of the mean over heads and queries after t of A[q, t]
    alignment, retention      of 2608.12149, of hybrids: hits by events over all windows, and the mean over windows
    max, median, ratio, massive, top: [layer], of the hidden state after each layer, median and ratio by window (mean, largest); top is the largest value's
                              window, position, channel and value
    lens                      [layer], nats per token
    ranks, stable             [layer][head]
"""

import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

from oracles import EAGER, f32_means_f64

GOLDEN = Path(__file__).parent / "golden"
COMMON = dict(initializer_range=0.1, pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
BIG = 3  # the token with the large embedding
MODELS = {
    "next": dict(
        seed=18, windows=3, time=128, big=330.0, shared=0.5, norm=1.0,
        config=dict(
            model_type="qwen3_next", vocab_size=61, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=8, shared_expert_intermediate_size=8,
            layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        ),
    ),
    # M < D, so that W_V W_O has the lower rank
    "qwen3": dict(
        seed=12, windows=2, time=192, big=90.0, shared=0.15, norm=1.5,
        config=dict(
            model_type="qwen3", vocab_size=47, hidden_size=24, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32,
        ),
    ),
}


def made(name, how):
    """The model, saved, in f64, and its text."""
    torch.manual_seed(how["seed"])
    config = AutoConfig.for_model(**COMMON | how["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                p.fill_(how["norm"]).add_(0.2 * torch.randn_like(p))
        table = model.get_input_embeddings().weight
        table.mul_(0.5).add_(how["shared"] * torch.randn(table.shape[1]))
        table[BIG, 5] = how["big"]
    folder = GOLDEN / f"measures_{name}"
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    text = torch.randint(0, config.vocab_size, (how["windows"] * how["time"] + 1,))
    text[text == BIG] = BIG + 1
    text[torch.arange(0, len(text) - 1, how["time"])] = BIG
    text[torch.arange(0, len(text) - 64, 128)] = BIG
    return model, folder, text


def rank(sigma):
    p = sigma / sigma.sum()
    p = p[p > 1e-15]
    return (-(p * p.log()).sum()).exp().item(), ((sigma / sigma.max()) ** 2).sum().item()


class Scores:
    """The largest score before the softmax, as transformers' own attention hands it to softmax."""

    def __init__(self):
        self.seen, self.real = [], torch.nn.functional.softmax

    def __enter__(self):
        def softmax(x, *args, **kwargs):
            if x.dim() == 4:
                self.seen.append(x.detach())
            return self.real(x, *args, **kwargs)

        torch.nn.functional.softmax = softmax
        return self

    def __exit__(self, *_):
        torch.nn.functional.softmax = self.real


def stats(h):
    size = h.abs()
    return size.max().item(), size.quantile(0.5).item()


def hybrid(values, sinks):
    """Sink-spike alignment (hits, events) and inter-spike retention of one window: values [layers, time], sinks {softmax layer: token}."""
    hits, blocks = 0, []
    for f in sinks:
        block = [i for i in range(f) if not any(i <= g < f for g in sinks)]
        if block:
            blocks.append(f)
            hits += bool(values[f - 1, sinks[f]] >= values[block, sinks[f]].max())
    token = max(sorted(set(sinks.values())), key=list(sinks.values()).count)
    before, kept = [f - 1 for f in sinks if f > 0], []
    for left, right in zip(before, before[1:]):
        between = [i for i in range(left + 1, right) if i not in sinks]
        if between:
            kept.append((values[between, token] / min(values[left, token], values[right, token])).clamp(max=1).mean().item())
    return hits, len(blocks), sum(kept) / len(kept) if kept else None


def measured(model, text, windows, time):
    c = model.config
    softmax = [i for i, kind in enumerate(getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers) if kind == "full_attention"]
    zeros = lambda: torch.zeros(len(softmax), c.num_attention_heads, dtype=torch.float64)
    first, entropy, score, sinks = zeros(), zeros(), zeros().fill_(-math.inf), zeros()
    after = []

    # transformers' hidden_states end with the final norm's output: the last layer's own is caught here
    hooks = [layer.register_forward_hook(lambda _, __, y: after.append((y[0] if isinstance(y, tuple) else y)[0])) for layer in model.model.layers]
    hidden, received, nll, lens = [], [], 0.0, torch.zeros(c.num_hidden_layers, dtype=torch.float64)
    for w in range(windows):
        ids, targets = text[w * time : (w + 1) * time], text[w * time + 1 : (w + 1) * time + 1]
        after.clear()
        with Scores() as scores, torch.no_grad():
            o = model(input_ids=ids[None], use_cache=False, output_attentions=True, output_hidden_states=True)
        assert all(torch.equal(a, b[0]) for a, b in zip(after, o.hidden_states[1:-1])), "hidden states are not the layers' outputs"
        loss = lambda logits: torch.nn.functional.cross_entropy(logits, targets, reduction="none").sum().item()
        nll += loss(o.logits[0])
        a = torch.stack([x[0] for x in o.attentions if x is not None])
        assert a.shape == (len(softmax), c.num_attention_heads, time, time) and len(scores.seen) == len(softmax)
        first += a[:, :, 1:, 0].mean(-1) / windows
        entropy += -torch.special.xlogy(a, a).sum(-1).mean(-1) / windows
        seen = torch.stack([s[0].masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -math.inf) for s in scores.seen])
        score = torch.maximum(score, seen.amax((-1, -2)))
        later = torch.ones(time, time, dtype=torch.bool).tril(-1)
        mass = (a.mean(1) * later).sum(1) / later.sum(0).clamp(min=1)
        received.append(mass[:, : time - 1].argmax(-1).tolist())
        hidden.append(torch.stack(after))
        with torch.no_grad():
            lens += torch.tensor([loss(model.lm_head(model.model.norm(h))) for h in after], dtype=torch.float64)
    for hook in hooks:
        hook.remove()
    samples = windows * time // 64
    for s in range(samples):
        with torch.no_grad():
            o = model(input_ids=text[None, s * 64 : (s + 1) * 64], use_cache=False, output_attentions=True)
        a = torch.stack([x[0] for x in o.attentions if x is not None])
        sinks += (a[..., 0].mean(-1) > 0.3) / samples
    hidden = torch.stack(hidden)  # [windows, layers, time, M]
    of_windows = [hybrid(hidden[w].abs().amax(-1), dict(zip(softmax, received[w]))) for w in range(windows)]
    events, kept = sum(n for _, n, _ in of_windows), [r for _, _, r in of_windows if r is not None]
    each = [[stats(hidden[w, i]) for w in range(windows)] for i in range(c.num_hidden_layers)]
    top = []
    for i in range(c.num_hidden_layers):
        at = hidden[:, i].abs().argmax().item()
        w, t, ch = at // (time * c.hidden_size), at // c.hidden_size % time, at % c.hidden_size
        top.append([w, t, ch, hidden[w, i, t, ch].item()])
    ranks, stable = [], []
    for i in softmax:
        attn, d = model.model.layers[i].self_attn, c.head_dim
        v, o = attn.v_proj.weight.unflatten(0, (-1, d)), attn.o_proj.weight.unflatten(1, (-1, d))
        group = c.num_attention_heads // c.num_key_value_heads
        both = [rank(torch.linalg.svdvals((o[:, h] @ v[h // group]).detach())) for h in range(c.num_attention_heads)]
        ranks.append([b[0] for b in both])
        stable.append([b[1] for b in both])
    return dict(
        tokens=text.tolist(), windows=windows, time=time, softmax=softmax, loss=nll / windows / time,
        first_token=first.tolist(), entropy=entropy.tolist(), max_score=score.tolist(), sink_rate=sinks.tolist(),
        received=[list(row) for row in zip(*received)],
        alignment=sum(n for n, _, _ in of_windows) / events if events else None, retention=sum(kept) / len(kept) if kept else None,
        max=[max(m for m, _ in row) for row in each], median=[sum(m for _, m in row) / windows for row in each],
        ratio=[max(a / b for a, b in row) for row in each], massive=[any(a > 100 and a >= 1000 * b for a, b in row) for row in each],
        top=top, lens=(lens / windows / time).tolist(), ranks=ranks, stable=stable,
    )


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, how in MODELS.items():
        model, folder, text = made(name, how)
        with f32_means_f64():
            found = measured(model.double().eval(), text, how["windows"], how["time"])
        (folder / "measures.json").write_text(json.dumps(found) + "\n")
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB, loss {found['loss']:.4f}")
        for key in ["first_token", "sink_rate", "max_score", "max", "median", "ratio", "massive", "received", "alignment", "retention", "lens", "ranks"]:
            print(f"  {key}: {json.dumps(found[key])[:400]}")
