# SPDX-License-Identifier: Apache-2.0
"""Packs: what a training step sees, one flat sequence of slots.

A slot holds segments. Context segments (<doc> and a passage) attend inside themselves only. Query
segments attend to themselves and, in the retrieval layers, to all context segments of their slot.
Language segments (longer runs of text) and isolated query segments attend to themselves only.

  query     <question> question <answer>                                       -> answer <eos>
  isolated  <question> question (<evidence> passage)+ <question> question <answer>
                                                            -> answer <eos>, or <none> <eos>
  generation <doc> passage <answer>              -> answer <question> question <eos>: isolated, too

Of a query's answer, the rows that the auxiliary losses look at point at the tokens of the gold passage
that they should copy.

A pack depends on its seed alone, so that training resumes at any pack with the same data.
"""
import dataclasses
import math
import random

import numpy as np

import questions as q
from corpus import (ANSWER, DOC, EOS, EVIDENCE, NONE, PASSAGE_TOKENS_MAX, QUESTION, LexicalIndex)
from facts import FactMaker
from wordings import NaturalFacts

ANSWER_TYPES = ["none", "question", "cloze", "recurring", "fact", "read_question", "read_other",
                "continuation", "refusal", "generated", "read_generated", "generation"]
ANSWER_TOKENS_MAX = 48
QUESTION_TOKENS_MAX = 60
MINED_PASSAGES = 4  # wrong passages of a question that are read: as many as the service reads
ANSWERING_ROWS = 3  # of a question that auxiliary losses look at: the first, and others
POINTERS = 3  # places of a token to be copied
REMOVED_CHARACTERS_MIN = 120  # of a passage without its answering sentences
SMALL_SLOT = 8192  # tokens: larger slots mix everything inside


def passages_max(slot_tokens):
    """Passages of a slot that are told apart, and one number for all that is none of them."""
    return slot_tokens // 64 + 32


@dataclasses.dataclass
class Passage:
    """A passage in a slot; `text` only if it differs from the corpus's."""
    source: object
    index: int
    weight: float  # of its tokens in the language loss
    tokens: np.ndarray
    text: str = None
    growth: int = 0  # tokens that facts added, about

    def content(self):
        return self.source.text(self.index) if self.text is None else self.text


@dataclasses.dataclass
class Asked:
    """A question about a passage of a slot (by number)."""
    kind: str
    question: str
    answer: str
    gold: int


@dataclasses.dataclass
class Segment:
    kind: str  # context, language, query, isolated
    tokens: np.ndarray
    weight: float = 0.0
    passage: int = -1  # context: its number; query: the passage that holds the answer
    answer: np.ndarray = None
    answer_type: str = "none"
    question_tokens: int = 0

    def __len__(self):
        return len(self.tokens) + (0 if self.answer is None else len(self.answer))


def context_segment(tokens, weight, passage):
    return Segment("context", np.concatenate([[DOC], tokens]).astype(np.uint16), weight, passage)


class Packer:
    """Makes packs from sources (name -> Corpus). `config` is the whole TOML."""

    def __init__(self, sources, words, tokenizer, config):
        self.tokenizer, self.config, self.mix = tokenizer, config, config["mix"]
        self.sources = sources
        self.questions = sources["questions"]
        self.written = [(self.questions, i) for i, pairs in enumerate(self.questions.questions)
                        if pairs]
        self.generated = [(source, i) for source in sources.values() if source.generated
                          for i, pairs in enumerate(source.generated) if pairs]
        self.index = LexicalIndex(self.questions)
        self.facts = FactMaker(words, self.mix["invented_keys"])
        self.replacer = q.AnswerReplacer(self.questions.questions, words["names"])
        self.natural = NaturalFacts(self.questions, [i for _, i in self.written], self.replacer,
                                    self.facts)
        settings = config["sources"]
        names = [n for n in sources if n != "questions"]
        self.text_draw = ([*names, "questions"],
                          [settings[n]["weight"] for n in [*names, "questions"]])
        self.cloze_draw = (names, [settings[n]["cloze"] for n in names])
        self.rng = random.Random(0)

    def draw_source(self, draw):
        return self.sources[self.rng.choices(*draw)[0]]

    # --- language ----------------------------------------------------------------------------

    def language_segments(self, tokens):
        """Runs of text that fill so many tokens."""
        out, rng = [], self.rng
        while tokens > 0:
            source = self.draw_source(self.text_draw)
            limit = min(tokens, rng.choice([512, 1024, 1024]))
            start = rng.randrange(len(source))
            end = int(source.token_offsets[source.document(start)[1]])
            begin = int(source.token_offsets[start])
            ids = source.tokens[begin:min(begin + limit - 1, end)]
            if len(ids) < min(64, tokens - 1) and tokens > 8:
                continue
            segment = np.concatenate([[DOC], ids]).astype(np.uint16)
            out.append(Segment("language", segment, 1.0))
            tokens -= len(segment)
        return out

    # --- passages and questions about them ---------------------------------------------------

    def insert_fact(self, passage, statement):
        """Puts a statement between sentences, early enough that it is not cut off."""
        text = passage.content()
        size = len(passage.tokens) + passage.growth
        if len(statement) > 260:
            passage.text = statement + " " + text[:200]
        else:
            room = max(0.0, (235 - len(statement) / 2.4) / max(size, 1))
            limit = len(text) * min(1.0, room)
            places = [0] + [m.end() for m in q.SENTENCE.finditer(text)] + [len(text)]
            place = self.rng.choice([p for p in places if p <= limit] or [0])
            head, tail = text[:place].rstrip(), text[place:].lstrip()
            passage.text = f"{head} {statement} {tail}".strip()
        passage.growth += len(statement) // 3

    def plant_facts(self, passages, places, asked):
        """Facts into the passages at `places`, one set after the other."""
        rng, at = self.rng, 0
        rng.shuffle(places)
        while at < len(places):
            together = rng.random() < 0.15  # the whole set in one passage
            natural = rng.random() < self.mix["natural_facts"]
            for statement, pairs in (self.natural if natural else self.facts).make(rng):
                if at >= len(places):
                    break
                passage = passages[places[at]]
                self.insert_fact(passage, statement)
                asked += [Asked("fact", *pair, places[at]) for pair in pairs]
                full = len(passage.tokens) + passage.growth > 200
                if full or not together and rng.random() < 0.7:
                    at += 1
            at += together

    def ask_made(self, passage, number, asked):
        """Questions made from a passage's own text."""
        rng, text = self.rng, passage.content()
        if rng.random() > 0.92:
            if made := q.continuation(rng, text):
                asked.append(Asked("continuation", *made, number))
        if passage.source is not self.questions and rng.random() > 0.62:
            if made := q.recurring(rng, text):
                text = passage.text = made[2]
                asked.append(Asked("recurring", made[0], made[1], number))
        seen = set()
        for _ in range(rng.choice([1, 2, 3, 4])):
            made = q.cloze(rng, text)
            if made and made[1] not in seen:
                seen.add(made[1])
                asked.append(Asked("cloze", *made, number))

    def draw_generated(self):
        """Whether generated questions come next, rather than those that people wrote."""
        return bool(self.generated) and self.rng.random() < self.mix["generated"]

    def written_pairs(self, source, index, generated):
        """(text, [question, answer, ...]) of a passage. Answers that people asked for, a few
        thousand passages' many times over, are mostly replaced."""
        text = source.text(index)
        if generated:
            return text, source.generated[index]
        pairs = source.questions[index]
        if pairs and self.rng.random() < self.mix["augment"]:
            return self.replacer.replace(self.rng, text, pairs)
        return text, pairs

    def ask_written(self, passage, number, generated, asked):
        """Questions that stand with a passage."""
        rng, kind = self.rng, "generated" if generated else "question"
        text, pairs = self.written_pairs(passage.source, passage.index, generated)
        if text != passage.content():
            passage.text = text
        asked += [Asked(kind, q.vary_question(rng, question), answer, number)
                  for question, answer, *_ in pairs if rng.random() < self.mix["keep_question"]]

    def draw_passages(self, budget, question_share, facts, made):
        """Passages of about `budget` tokens with questions: (passages, asked). Shares: passages of
        the question source; filler passages with facts; passages with questions made from text."""
        rng = self.rng
        passages, asked, fact_places, total = [], [], [], 0
        while total < budget:
            written = rng.random() < question_share
            generated = written and self.draw_generated()
            if written:
                pool = self.generated if generated else self.written
                source, start = rng.choice(pool)
                count = rng.choice([6, 10, 16] if budget < 6000 else [8, 20, 40, 60])
            else:
                source, count = self.draw_source(self.cloze_draw), rng.choice([1, 2, 4, 8])
                start = rng.randrange(len(source))
            for index in source.run(start, count):
                if total >= budget:
                    break
                number = len(passages)
                weight = 1.0 if source is not self.questions else 0.2
                passage = Passage(source, index, weight, source.passage(index))
                passages.append(passage)
                total += len(passage.tokens) + 1
                if written:
                    self.ask_written(passage, number, generated, asked)
                if rng.random() < facts * (0.4 if written else 1.0):
                    fact_places.append(number)
                elif rng.random() < made * (0.7 if written else 1.0):
                    self.ask_made(passage, number, asked)
        self.plant_facts(passages, fact_places, asked)
        self.tokenize(passages)
        return passages, asked

    def tokenize(self, passages):
        changed = [p for p in passages if p.text is not None]
        encoded = self.tokenizer.encode_batch([p.text for p in changed])
        for passage, ids in zip(changed, encoded):
            passage.tokens = np.array(ids[:PASSAGE_TOKENS_MAX], np.uint16)

    # --- reading: passages repeated in an isolated query -------------------------------------

    def near_passages(self, source, gold, question_tokens, mined):
        """Numbers of passages that a question might be thought to be about: those `mined` for it,
        those that share rare words with it, or any."""
        rng, mix = self.rng, self.mix
        if mined and rng.random() < mix["mined"]:
            near = mined[:MINED_PASSAGES]
        elif source is self.questions and rng.random() < mix["hard"]:
            near = self.index.nearest(question_tokens, 60)
            if rng.random() >= mix["hard_everywhere"]:
                first, last = source.document(gold)
                near = [i for i in near if first <= i < last] or list(range(first, last))
            near = near[:rng.choice([3, 6, 12])]
        else:
            near = [rng.randrange(len(source)) for _ in range(8)]
        rng.shuffle(near)
        return near

    def wrong_passages(self, source, gold, question_tokens, answer, mined, count):
        """Token lists of passages of a source without the answer."""
        out = []
        for index in self.near_passages(source, gold, question_tokens, mined):
            if index != gold and answer not in source.text(index):
                out.append(source.passage(index))
                if len(out) == count:
                    break
        return out

    def refusal(self, question, answer, gold_text, wrong):
        """(question, passage's tokens) that <none> answers, or None: the gold passage without the
        answering sentences, another name or number in the question, or a wrong passage."""
        rng, mix, x = self.rng, self.mix, self.rng.random()
        if x < mix["none_removed"]:
            text = q.without_sentences(gold_text, answer)
            if len(text) >= REMOVED_CHARACTERS_MIN and answer.lower() not in text.lower():
                return question, self.tokenizer.encode(text)[:PASSAGE_TOKENS_MAX]
        elif x < mix["none_removed"] + mix["none_swapped"]:
            swapped = self.replacer.swapped(rng, question, gold_text)
            if swapped:
                return swapped, self.tokenizer.encode(gold_text)[:PASSAGE_TOKENS_MAX]
        others = wrong(self.tokenizer.encode(question), 1)
        return (question, others[0]) if others else None

    def reading_segment(self, question, answer, gold_text, wrong, kind):
        """One isolated query; `wrong` yields so many wrong passages. None if it is too long."""
        rng, mix, x = self.rng, self.mix, self.rng.random()
        refused = self.refusal(question, answer, gold_text, wrong) if x < mix["none"] else None
        if refused:
            question, kind, evidence = refused[0], "refusal", [refused[1]]
        else:
            evidence = [self.tokenizer.encode(gold_text)[:PASSAGE_TOKENS_MAX]]
        question_tokens, answer_tokens = self.tokenizer.encode_batch([question, answer])
        if len(question_tokens) > QUESTION_TOKENS_MAX or len(answer_tokens) >= ANSWER_TOKENS_MAX:
            return None
        if refused:
            answer_tokens = [NONE]
        elif x >= mix["none"] + mix["gold_alone"]:
            evidence += wrong(question_tokens, rng.choice([1, 1, 2, 3]))
            rng.shuffle(evidence)
        parts = [[QUESTION], question_tokens]
        for tokens in evidence:
            parts += [[EVIDENCE], tokens]
        parts += [[QUESTION], question_tokens, [ANSWER]]
        return Segment("isolated", np.concatenate(parts).astype(np.uint16),
                       answer=np.array([*answer_tokens, EOS], np.uint16), answer_type=kind,
                       question_tokens=len(question_tokens))

    def read_written(self):
        """Isolated queries on one passage with written or generated questions."""
        rng, generated = self.rng, self.draw_generated()
        source, gold = rng.choice(self.generated if generated else self.written)
        text, pairs = self.written_pairs(source, gold, generated)
        for question, answer, *mined in rng.sample(pairs, min(3, len(pairs))):
            def wrong(question_tokens, count, answer=answer, mined=mined):
                return self.wrong_passages(source, gold, question_tokens, answer,
                                           mined and mined[0], count)

            yield self.reading_segment(q.vary_question(rng, question), answer, text, wrong,
                                       "read_generated" if generated else "read_question")

    def read_made(self, facts):
        """Isolated queries on a few passages with questions made from text, or with facts."""
        rng = self.rng
        passages, asked = self.draw_passages(900, 0.0, *((0.6, 0.0) if facts else (0.0, 1.0)))
        for item in rng.sample(asked, min(4, len(asked))):
            def wrong(_, count, item=item):
                others = [p for i, p in enumerate(passages) if i != item.gold]
                rng.shuffle(others)
                if facts:  # those with near misses first
                    others.sort(key=lambda p: p.text is None)
                return [p.tokens for p in others if item.answer not in p.content()][:count]

            yield self.reading_segment(item.question, item.answer, passages[item.gold].content(),
                                       wrong, "read_other")

    def reading_segments(self, budget):
        """Isolated queries of at most `budget` tokens, and text for what is left."""
        out, mix, tries = [], self.mix, 0
        while budget > 120 and tries < 200:
            tries += 1
            x = self.rng.random()
            if x < mix["reading_questions"]:
                made = self.read_written()
            else:
                made = self.read_made(x < mix["reading_questions"] + mix["reading_facts"])
            for segment in made:
                if segment is not None and len(segment) <= budget:
                    out.append(segment)
                    budget -= len(segment)
        return out + self.language_segments(budget)

    # --- generation: an answer and its question, of a passage --------------------------------

    def generation_segments(self, budget):
        """Isolated segments of at most `budget` tokens, and text for what is left."""
        out, rng, tries = [], self.rng, 0
        while budget > 120 and tries < 2000:
            tries += 1
            source, index = rng.choice(self.written)
            question, answer, *_ = rng.choice(source.questions[index])
            question, answer = self.tokenizer.encode_batch([question, answer])
            if len(question) > QUESTION_TOKENS_MAX or len(answer) > ANSWER_TOKENS_MAX:
                continue
            segment = Segment("isolated", np.array(generation_prompt(source.passage(index))),
                              answer=np.array([*answer, QUESTION, *question, EOS], np.uint16),
                              answer_type="generation")
            if len(segment) <= budget:
                out.append(segment)
                budget -= len(segment)
        return out + self.language_segments(budget)

    # --- slots -------------------------------------------------------------------------------

    def query_segments(self, asked, budget):
        """Direct queries of at most `budget` tokens."""
        ids = self.tokenizer.encode_batch([a.question for a in asked])
        answers = self.tokenizer.encode_batch([a.answer for a in asked])
        out = []
        for item, question, answer in zip(asked, ids, answers):
            size = len(question) + len(answer) + 3
            if (size > budget or len(question) > QUESTION_TOKENS_MAX
                    or len(answer) > ANSWER_TOKENS_MAX):
                continue
            budget -= size
            out.append(Segment("query", np.array([QUESTION, *question, ANSWER], np.uint16),
                               passage=item.gold, answer=np.array([*answer, EOS], np.uint16),
                               answer_type=item.kind, question_tokens=len(question)))
        return out

    def corpus_slot(self, slot_tokens, phase):
        """Passages and questions about them; large slots hold text and reading beside them."""
        rng, mix, extra = self.rng, self.mix, []
        question_share = mix["question_passages"]
        if slot_tokens > SMALL_SLOT:
            extra = self.language_segments(int(slot_tokens * phase.get("language_inside", 0)))
            extra += self.reading_segments(int(slot_tokens * phase.get("reading_inside", 0)))
        else:  # small slots: one kind of passage
            question_share = 0.85 if rng.random() < question_share else 0.0
        room = slot_tokens - sum(map(len, extra))
        query_budget = int(room * mix["query_share"])
        context_budget = room - query_budget - (slot_tokens // 16 if slot_tokens > SMALL_SLOT else 0)
        passages, asked = self.draw_passages(int(context_budget * 0.93), question_share,
                                             mix["facts"], mix["cloze"])
        rng.shuffle(asked)
        asked.sort(key=lambda item: item.kind != "fact")  # all facts are asked for
        queries = self.query_segments(asked, query_budget)
        contexts = [context_segment(p.tokens, p.weight, i) for i, p in enumerate(passages)]
        total, asked_tokens = sum(map(len, contexts)), sum(map(len, queries))
        while total + asked_tokens > room:
            total -= len(contexts.pop())
        queries = [s for s in queries if s.passage < len(contexts)]
        left, number = room - total - sum(map(len, queries)), len(passages)
        while left > 0:
            source = self.draw_source(self.cloze_draw)
            ids = source.passage(rng.randrange(len(source)))[:left - 1]
            contexts.append(context_segment(ids, 1.0, number))
            left -= len(ids) + 1
            number += 1
        rng.shuffle(contexts)
        rng.shuffle(queries)
        return contexts + queries + extra

    def slot(self, slot_tokens, phase):
        kinds = phase["slots"]
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "language":
            return self.language_segments(slot_tokens)
        if kind == "reading":
            return self.reading_segments(slot_tokens)
        if kind == "generation":
            return self.generation_segments(slot_tokens)
        return self.corpus_slot(slot_tokens, phase)

    # --- packs -------------------------------------------------------------------------------

    def pack(self, seed, phase):
        """Arrays of one step (see PackWriter). `seed`: any string; `phase`: of the TOML."""
        self.rng.seed(seed)
        slot_tokens = min(phase["slot_tokens"], self.config["batch"]["tokens"])
        writer = PackWriter(self.config, slot_tokens, phase["slot_questions"])
        for number in range(self.config["batch"]["tokens"] // slot_tokens):
            writer.add_slot(number, self.slot(slot_tokens, phase), self.rng)
        return writer.finish()


class PackWriter:
    """Lays the segments of slots out in arrays, all of them over the pack's tokens unless said:

      tokens, segment (number), position (in the segment), language_weight (of predicting the next)
      context_group, query_group   slot number, for rows that are seen / that see; otherwise < 0
      passage                      number of the passage in its slot; the last: none
      scale                        of the query rows' logits in the retrieval layers
      answer_rows, answer_types    rows that predict an answer's tokens
      score_rows, score_weights    (slots, questions, ANSWERING_ROWS + rows): rows that predict tokens
                                   of the answer, the first before others, then rows of the
                                   question's tokens, of the questions that auxiliary losses look at
      pointers                     (slots, questions, ANSWERING_ROWS, POINTERS): places in the slot of
                                   the token to be copied, in the gold passage; -1: unused, as for
                                   the first: a place may not know of a key that comes after it
      gold                         (slots, questions): the passage that holds the answer; -1: unused
    """

    def __init__(self, config, slot_tokens, slot_questions):
        total = config["batch"]["tokens"]
        slots, rows = total // slot_tokens, ANSWERING_ROWS + config["batch"]["score_tokens"]
        self.slot_tokens, self.scale_tokens = slot_tokens, config["model"]["attention_scale_tokens"]
        self.sharpen = config["mix"]["sharpen"]
        self.arrays = {
            "tokens": np.zeros(total, np.uint16),
            "segment": np.zeros(total, np.int32),
            "position": np.zeros(total, np.int32),
            "context_group": np.full(total, -1, np.int32),
            "query_group": np.full(total, -2, np.int32),
            "language_weight": np.zeros(total, np.float32),
            "passage": np.full(total, passages_max(slot_tokens) - 1, np.int16),
            "scale": np.ones(total, np.float32),
            "score_rows": np.zeros((slots, slot_questions, rows), np.int32),
            "score_weights": np.zeros((slots, slot_questions, rows), np.float32),
            "pointers": np.full((slots, slot_questions, ANSWERING_ROWS, POINTERS), -1, np.int32),
            "gold": np.full((slots, slot_questions), -1, np.int32),
        }
        self.answer_rows, self.answer_types = [], []
        self.at, self.segments = 0, 0

    def add_slot(self, slot, segments, rng):
        begin, numbers, scored = self.at, {}, []
        visible = sum(len(s) for s in segments if s.kind == "context")
        scale = attention_scale(visible, self.scale_tokens) * self.sharpen ** rng.random()
        for segment in sorted(segments, key=lambda s: s.answer is not None):
            if segment.answer is None:
                self.add_context(slot, segment, numbers)  # before all queries
                continue
            start = self.add_query(slot, segment, scale)
            if segment.kind == "query" and segment.passage in numbers:
                scored.append((start, segment, numbers[segment.passage]))
        assert self.at == begin + self.slot_tokens, "a slot is not full"
        self.add_scored(slot, scored, rng)

    def add_segment(self, tokens):
        """Writes tokens as (the start of) a segment; returns their place."""
        a, place = self.arrays, slice(self.at, self.at + len(tokens))
        a["tokens"][place] = tokens
        a["segment"][place] = self.segments
        a["position"][place] = np.arange(len(tokens))
        self.at += len(tokens)
        self.segments += 1
        return place

    def add_context(self, slot, segment, numbers):
        a, place = self.arrays, self.add_segment(segment.tokens)
        a["language_weight"][place.start:place.stop - 1] = segment.weight
        if segment.kind == "context":
            a["context_group"][place] = slot
            if len(numbers) < passages_max(self.slot_tokens) - 1:
                a["passage"][place] = len(numbers)
                numbers[segment.passage] = len(numbers), place

    def add_query(self, slot, segment, scale):
        a, place = self.arrays, self.add_segment(np.concatenate([segment.tokens, segment.answer]))
        if segment.kind == "query":
            a["query_group"][place] = slot
            a["scale"][place] = scale
        weight = 0.1 if segment.answer_type in ("question", "generated") else 0.05
        a["language_weight"][place.start + 1:place.start + segment.question_tokens] = weight
        first = place.start + len(segment.tokens) - 1
        self.answer_rows += range(first, first + len(segment.answer))
        self.answer_types += [ANSWER_TYPES.index(segment.answer_type)] * len(segment.answer)
        return place.start

    def add_scored(self, slot, scored, rng):
        a = self.arrays
        count, tokens = a["gold"].shape[1], a["score_rows"].shape[2] - ANSWERING_ROWS
        for i, (start, segment, (gold, place)) in enumerate(rng.sample(scored,
                                                                       min(count, len(scored)))):
            later = range(1, len(segment.answer) - 1)  # the last is <eos>
            answering = [0, *rng.sample(later, min(len(later), ANSWERING_ROWS - 1))]
            asked = list(range(start + 1, start + 1 + segment.question_tokens))
            if len(asked) > tokens:
                asked = rng.sample(asked, tokens)
            first = start + len(segment.tokens) - 1
            for rows, at in (([first + j for j in answering], 0), (asked, ANSWERING_ROWS)):
                a["score_rows"][slot, i, at:at + len(rows)] = rows
                a["score_weights"][slot, i, at:at + len(rows)] = 1
            begin = slot * self.slot_tokens
            copied = places_of(segment.answer[:-1], a["tokens"][place])[:POINTERS]
            for row, j in enumerate(answering[1:], 1):
                a["pointers"][slot, i, row, :len(copied)] = copied + place.start + j - begin
            a["gold"][slot, i] = gold

    def finish(self):
        return {**self.arrays, "answer_rows": np.array(self.answer_rows, np.int32),
                "answer_types": np.array(self.answer_types, np.uint8)}


def generation_prompt(passage):
    return [DOC, *passage, ANSWER]


def places_of(answer, tokens):
    """Where an answer's tokens stand in a passage's, in order."""
    places = np.flatnonzero(tokens[:len(tokens) - len(answer) + 1] == answer[0])
    whole = [p for p in places if np.array_equal(tokens[p:p + len(answer)], answer)]
    return np.array(whole, np.int32)


def attention_scale(visible, scale_tokens):
    """Factor of the logits of query rows that see `visible` context tokens."""
    if visible <= 1 or scale_tokens <= 1:
        return 1.0
    return max(1.0, math.log(visible) / math.log(scale_tokens))


def rehearsal_pack(config, phase):
    """A pack without sense, of the right shapes: code is compiled on it while the data loads."""
    slot_tokens = min(phase["slot_tokens"], config["batch"]["tokens"])
    writer, rng = PackWriter(config, slot_tokens, phase["slot_questions"]), random.Random(0)
    for number in range(config["batch"]["tokens"] // slot_tokens):
        words = np.full(slot_tokens, 100, np.uint16)
        query = Segment("query", words[:30], passage=0, answer=words[:2], answer_type="question",
                        question_tokens=20)
        rest = slot_tokens - len(query)
        segments = [Segment("context", words[:min(256, rest - at)], 1.0, at // 256)
                    for at in range(0, rest, 256)]
        writer.add_slot(number, [*segments, query], rng)
    return writer.finish()
