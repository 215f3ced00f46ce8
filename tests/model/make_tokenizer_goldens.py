#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/model/: tokenizer-goldens.bin, tokenizer-{llama3,qwen2,gpt2}.json.

Needs the Hugging Face `tokenizers` library (0.23). Run from the repository root:
    python3 tests/model/make_tokenizer_goldens.py [--count N] [--seed S] [--out DIR]

The goldens say what that library makes of many strings, for five tokenizers: the built-in one
with added tokens taken as plain text, the built-in one as it is, and three small ones that have
the regexes of Llama 3 (with ignore_merges), Qwen2 (with its normalizer NFC and added tokens) and
GPT-2 (whose file does not say that it is BPE). Format, little-endian: "LTG2", u32 number of
strings; for each u32 length and its bytes, then five lists of ids: u32 count (0xffffffff: the same
as the first list), and each id in LEB128.
"""
import argparse
import json
import os
import random
import struct

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, trainers)

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

WORDS = """the of and a to in is it you that he was for on are with as I his they be at one have
this from or had by hot but some what there we can out other were all your when up use word how
said an each she which do their time if will way about many then them would write like so these
her long make thing see him two has look more day could go come did my sound no most number who
over know water than call first people may down side been now find Don't it's we'll they've I'm
he'd you're CAN'T It'S WE'LL l'eau naïve café Straße déjà señor größte mañana über coöperate
московский быстрая коричневая лиса привет мир Ελληνικά γλώσσα שלום עולם مرحبا بالعالم सभी मनुष्यों
ภาษาไทย 日本語のテキスト 中文字符串测试 한국어 문장 ქართული Հայերեն தமிழ் বাংলা ትግርኛ ខ្មែរ
function return int main(void) {} if(x==1) &&|| https://example.org/a?b=c&d=e foo_bar fooBar
12345 3.14159 1,000,000 2024-05-17 0x7fff 10% $5.00 ½ Ⅷ ³ ٣٤٥ १२३ ㊿ 五 १ ⅓ e.g. i.e. U.S.A.""".split()
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000",
          "\u200b", "\u180e", "\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\ufeff", "\u202f"]
PUNCT = list(".,;:!?\"'()[]{}<>/\\|@#$%^&*-_=+`~") + ["...", "--", "'s", "'S", "'ſ", "'ll", "’s",
         "«", "»", "“", "”", "—", "…", "→", "≠", "∑", "€", "😀", "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "\u0301"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|im_end", "<eos>", "<doc>", "<q>", "<pad>", "<sp10>", "<sp31>", "<sp", "<eo", "<<eos>>", "< eos >",
         "<eos><eos>", "eos>"]


def sentence(rng):
    out = []
    for _ in range(rng.randint(1, 14)):
        out.append(rng.choice(WORDS))
        out.append(rng.choice(PUNCT) if rng.random() < 0.15 else "")
        out.append(" " if rng.random() < 0.85 else rng.choice(SPACES))
    return "".join(out)


def mixture(rng):
    kinds = [WORDS, SPACES, PUNCT, ADDED]
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 20)))


def characters(rng):
    def one():
        r = rng.random()
        if r < 0.3:
            return chr(rng.randrange(0x80))
        if r < 0.6:
            return chr(rng.randrange(0x3000))
        c = rng.randrange(0x20000 if r < 0.95 else 0x110000)
        return "\ufffd" if 0xd800 <= c < 0xe000 else chr(c)
    return "".join(one() for _ in range(rng.randint(0, 24)))


def edges(rng):
    """Alternating runs where the classes of the regexes meet."""
    alphabet = [" ", "\n", "\r", "\t", "a", "B", "'", "s", "ll", "1", "٣", "½", ".", "é", "中",
                "\u0301", "\u00a0", "\u180e", "😀", "<", ">", "eos", "\U00011de0", "\U0001611a",
                "\U000323af", "\u1c89", "\U0001e5f1", "\u0897", "ſ"]
    return "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 3, 7])
                   for _ in range(rng.randint(1, 14)))


def composing(rng):
    """What NFC changes or must leave alone: marks in any order, Hangul, singletons, exclusions."""
    starters = list("aeEnosuySA") + ["\u00fc", "\u0915", "\u0928", "\u09c7", "\u0b47", "\u0bc6",
                "\u0cc6", "\u0dd9", "\u1025", "\u3046", "\u30cf", "\u1b05", "\u05d0", "\u03c9",
                "\u0438", "\u1100", "\u1112", "\uac00", "\uac01", "\u212b", "\u2126", "\u0958",
                "\u0958", "\u2adc", "\uf900", "\U0002f800", "\U0001d15e", "\ufb1d", "\u0340",
                "\u0374", "\u1fef", "\u2000", "\u0f43", "\U00011131", " ", "1", "<|im_end|>",
                "<think>"]
    marks = ["\u0301", "\u0308", "\u0323", "\u0327", "\u0302", "\u0338", "\u0345", "\u05b7",
             "\u05bc", "\u093c", "\u09be", "\u0b3e", "\u0bbe", "\u0cd5", "\u0dcf", "\u102e",
             "\u1b35", "\u3099", "\u309a", "\u1161", "\u1175", "\u11a8", "\u11c2", "\u0344",
             "\u20d2", "\U0001d165", "\U0001d16e", "\u0f71", "\u0f73", "\U00011127"]
    return "".join(rng.choice(starters) +
                   "".join(rng.choice(marks) for _ in range(rng.choice([0, 1, 1, 2, 3, 8])))
                   for _ in range(rng.randint(1, 9)))


def runs(rng):
    unit = rng.choice(["a", "ab", " ", "\n", "=", "的", "é", "Na", "the", "1", "\u0301", "😀", "\r\n"])
    return unit * rng.randint(1, 90) + rng.choice(["", "x", " x", "1", "\n"])


def strings(count, seed):
    rng = random.Random(seed)
    kinds = [sentence, sentence, mixture, characters, edges, edges, runs, composing]
    fixed = ["", " ", "\n", "'", "a", "<eos>", "<doc>text<q>what?<ev>it<a>", "é", "\x00", "\x00a\x00"]
    return fixed + [rng.choice(kinds)(rng) for _ in range(count - len(fixed))]


QWEN2_ADDED = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True),
               ("<think>", False), ("</think>", False)]


def small_tokenizer(name, regex, corpus):
    tok = Tokenizer(models.BPE())
    if name == "gpt2":
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if name == "qwen2":
        tok.normalizer = normalizers.NFC()
        tok.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in QWEN2_ADDED])
    data = json.loads(tok.to_str())
    model = data["model"]
    model["ignore_merges"] = name == "llama3"
    # Words that only ignore_merges can find: their merge is gone, the token is still there.
    model["merges"] = [m for i, m in enumerate(model["merges"]) if i < 400 or i % 5]
    if name == "gpt2":
        del model["type"]
        model["merges"] = [" ".join(m) for m in model["merges"]]
    text = json.dumps(data, ensure_ascii=False)
    return text, Tokenizer.from_str(text)


def leb128(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def id_list(ids, same_as=None):
    if ids == same_as:
        return struct.pack("<I", 0xffffffff)
    return struct.pack("<I", len(ids)) + b"".join(map(leb128, ids))


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--count", type=int, default=1600)
    args.add_argument("--seed", type=int, default=7)
    args.add_argument("--out", default="tests/data/model")
    args = args.parse_args()
    os.makedirs(args.out, exist_ok=True)
    with open("model/default/tokenizer.json", encoding="utf-8") as file:
        data = json.load(file)
    added = Tokenizer.from_str(json.dumps(data))
    data["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(data))
    rng = random.Random(1)
    corpus = [sentence(rng) for _ in range(3000)]
    small = []
    for name, regex in (("llama3", LLAMA3), ("qwen2", QWEN2), ("gpt2", None)):
        text, tok = small_tokenizer(name, regex, corpus)
        with open(f"{args.out}/tokenizer-{name}.json", "w", encoding="utf-8") as file:
            file.write(text)
        small.append(tok)
    texts = strings(args.count, args.seed)
    with open(f"{args.out}/tokenizer-goldens.bin", "wb") as file:
        file.write(b"LTG2" + struct.pack("<I", len(texts)))
        for text in texts:
            raw = text.encode()
            ids = [t.encode(text, add_special_tokens=False).ids for t in [plain, added] + small]
            file.write(struct.pack("<I", len(raw)) + raw + id_list(ids[0]))
            file.write(id_list(ids[1], ids[0]) + b"".join(id_list(i) for i in ids[2:]))


main()
