# SPDX-License-Identifier: Apache-2.0
"""Prepared text on disk: passages of at most 255 tokens, in documents, with their questions.

A source is a folder of flat arrays that many processes map at once:

  tokens.npy          uint16, the tokens of all passages one after the other
  token_offsets.npy   int64, passages + 1
  documents.npy       int64, documents + 1: the first passage of each document
  text.bin            the passages' texts, UTF-8
  text_offsets.npy    int64, passages + 1, in bytes
  questions.json      a list a passage of [question, answer] (question sources only)
  generated.json      the same, written by generate.py; both may have a third item, the numbers of
                      passages that the service would read for it and that do not answer it
"""
import json
import os

import numpy as np

PASSAGE_TOKENS_MAX = 255  # with <doc> in front, a passage fills a window of 256

# Special tokens, by number in the vocabulary.
PAD, BOS, EOS, DOC, QUESTION, EVIDENCE, ANSWER, LANDMARK, META, NONE = range(10)
SPECIAL_TOKENS = 32  # numbers below are not text


class Tokenizer:
    """The model's tokenizer. Every text of the model starts with a space."""

    def __init__(self, path):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        self.inner = HuggingFaceTokenizer.from_file(path)

    def encode(self, text):
        return self.inner.encode(" " + text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        encoded = self.inner.encode_batch([" " + text for text in texts],
                                          add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, tokens):
        return self.inner.decode([int(t) for t in tokens if t >= SPECIAL_TOKENS]).strip()


class Corpus:
    """A prepared source, mapped read-only."""

    def __init__(self, folder):
        def load(name):
            return np.load(os.path.join(folder, name), mmap_mode="r")

        self.name = os.path.basename(os.path.normpath(folder))
        self.tokens = np.asarray(load("tokens.npy"))
        self.token_offsets = np.array(load("token_offsets.npy"))
        self.documents = np.array(load("documents.npy"))
        self.text_offsets = np.array(load("text_offsets.npy"))
        self.text_bytes = np.asarray(np.memmap(os.path.join(folder, "text.bin"), np.uint8, "r"))
        self.document_of = np.repeat(np.arange(len(self.documents) - 1), np.diff(self.documents))
        self.questions, self.generated = None, None
        for kind in ("questions", "generated"):
            path = os.path.join(folder, kind + ".json")
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    setattr(self, kind, json.load(file))

    def __len__(self):
        """Number of passages."""
        return len(self.token_offsets) - 1

    def passage(self, index):
        """Tokens of a passage, without <doc>."""
        return self.tokens[self.token_offsets[index]:self.token_offsets[index + 1]]

    def length(self, index):
        return int(self.token_offsets[index + 1] - self.token_offsets[index])

    def text(self, index):
        return bytes(self.text_bytes[self.text_offsets[index]:self.text_offsets[index + 1]]).decode()

    def document(self, index):
        """First and last (excluded) passage of the document that holds a passage."""
        number = int(self.document_of[index])
        return int(self.documents[number]), int(self.documents[number + 1])

    def run(self, start, count):
        """Indices of at most `count` passages in a row, of one document, that hold `start`."""
        first, last = self.document(start)
        begin = max(first, min(start, last - count))
        return range(begin, min(begin + count, last))


def write_corpus(folder, parts, with_questions):
    """Writes the parts (texts, token lists, document lengths, questions) as one source."""
    os.makedirs(folder, exist_ok=True)
    texts = [text for part in parts for text in part["texts"]]
    tokens = [ids for part in parts for ids in part["tokens"]]
    documents = [n for part in parts for n in part["documents"]]

    def offsets(lengths):
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)

    def save(name, array):
        np.save(os.path.join(folder, name), array)

    encoded = [text.encode() for text in texts]
    save("tokens.npy", np.concatenate(tokens) if tokens else np.zeros(0, np.uint16))
    save("token_offsets.npy", offsets([len(ids) for ids in tokens]))
    save("documents.npy", offsets(documents))
    save("text_offsets.npy", offsets([len(text) for text in encoded]))
    with open(os.path.join(folder, "text.bin"), "wb") as file:
        file.write(b"".join(encoded))
    if with_questions:
        with open(os.path.join(folder, "questions.json"), "w", encoding="utf-8") as file:
            json.dump([q for part in parts for q in part["questions"]], file)


class LexicalIndex:
    """Passages that share rare tokens with a question: the hard negatives of a corpus.

    Tokens in more than `common` passages are left out: they say little and cost most.
    """

    def __init__(self, corpus, common=600):
        owners, values = [], []
        for index in range(len(corpus)):
            unique = np.unique(corpus.passage(index))
            values.append(unique)
            owners.append(np.full(len(unique), index, np.int32))
        values, owners = np.concatenate(values), np.concatenate(owners)
        order = np.argsort(values, kind="stable")
        self.owners = owners[order]
        counts = np.bincount(values, minlength=1 << 16)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.weights = np.log((len(corpus) + 1) / (counts + 0.5)).clip(0)
        self.counts, self.common, self.size = counts, common, len(corpus)

    def nearest(self, tokens, count):
        """Up to `count` passages by summed inverse document frequency, best first."""
        score = np.zeros(self.size, np.float32)
        for token in set(tokens):
            if 0 < self.counts[token] <= self.common:
                score[self.owners[self.starts[token]:self.starts[token + 1]]] += self.weights[token]
        count = min(count, self.size - 1)
        best = np.argpartition(-score, count)[:count]
        best = best[np.argsort(-score[best], kind="stable")]
        return [int(i) for i in best if score[i] > 0]
