# SPDX-License-Identifier: Apache-2.0
"""Questions made from any text, and the variation of written ones.

cloze: a sentence with a name, number or phrase replaced by a question word; recurring: the same for
something that another sentence of the passage names too, the sentence itself taken away;
continuation: the words that follow a quotation. Answers of written questions are replaced by
others of their kind, in passage and question alike, against memorising.
"""
import collections
import re

SENTENCE = re.compile(r'(?<=[.!?])["\')\]”’]*\s+|\n')
WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
NAME = re.compile(r"\b[A-Z][\w'’-]*(?:\s+(?:of|the|de|and|van|von)?\s*[A-Z][\w'’-]*)*")
NUMBER = re.compile(r"[$£€]?\d[\d,.]*\d%?|\d%?")
YEAR = re.compile(r"1\d{3}|20\d\d")
STOP_WORDS = set("""the of and to a in is was that for it on as with by at from his he be are this
which or an had were not but have they their has its her she you i we him been who will would there
more no all my one if so what when them than out up do me can your into other about some could then
only time very like any such our now may after these man before over did must most made down said
well us upon how men should much own little where am those see too shall come way see never two
every come himself being through great here still also just because while though might""".split())
ASKED_FOR = {
    "name": ["who", "what", "which", "where", "who", "what"],
    "year": ["how many", "what number", "when", "how much", "what", "what year"],
    "number": ["how many", "what number", "when", "how much", "what", "how many"],
    "other": ["what", "which", "what", "how"],
}
SENTENCE_CHARACTERS = (30, 320)


def sentences_of(text):
    parts = (part.strip() for part in SENTENCE.split(text) if part)
    low, high = SENTENCE_CHARACTERS
    return [part for part in parts if low < len(part) < high]


def without_sentences(text, answer):
    """The text without the sentences that hold the answer."""
    kept = [part for part in SENTENCE.split(text) if part and answer.lower() not in part.lower()]
    return " ".join(kept).strip()


def vary_question(rng, question):
    """A question as people type them: no question mark, lower case, words left out."""
    if rng.random() < 0.15:
        question = question.rstrip("?").rstrip()
    if rng.random() < 0.12:
        question = question.lower()
    if rng.random() < 0.3:
        words, dropped = question.split(" "), rng.choice([0.08, 0.15])
        if len(words) > 5:
            question = " ".join(w for w in words if rng.random() > dropped) or question
    return question


def spans_of(rng, sentence, recurring_in=None):
    """Candidate answers in a sentence: (start, end, kind)."""
    spans = []
    for match in NAME.finditer(sentence):
        name = match.group(0)
        first_word = match.start() == 0 and " " not in name
        if not first_word and len(name) >= 3 and name.lower() not in STOP_WORDS:
            spans.append((match.start(), match.end(), "name"))
    for match in NUMBER.finditer(sentence):
        kind = "year" if YEAR.fullmatch(match.group(0)) else "number"
        spans.append((match.start(), match.end(), kind))
    if recurring_in is not None:
        return [(a, b, kind) for a, b, kind in spans
                if recurring_in.count(sentence[a:b]) > sentence.count(sentence[a:b])]
    if spans and rng.random() >= 0.35:
        return spans
    words = [(m.start(), m.end(), m.group(0)) for m in WORD.finditer(sentence)]
    count = rng.choice([1, 1, 2, 2, 3])

    def phrase(group):
        return (all(word[0].isalnum() for _, _, word in group) and len(group[0][2]) > 2
                and group[0][2].lower() not in STOP_WORDS
                and group[-1][2].lower() not in STOP_WORDS)

    starts = [i for i in range(len(words) - count + 1) if phrase(words[i:i + count])]
    if not starts:
        return spans
    start = rng.choice(starts)
    return [(words[start][0], words[start + count - 1][1], "other")]


def make_question(rng, sentence, start, end, kind):
    """The sentence around a span as a question; None if too little is left of it."""
    answer = sentence[start:end]
    asked = "___" if rng.random() < 0.2 else rng.choice(ASKED_FOR[kind])
    left = WORD.findall(sentence[:start].replace(answer, " "))[-rng.randint(3, 14):]
    right = WORD.findall(sentence[end:].replace(answer, " "))[:rng.randint(3, 14)]
    dropped, words_only = rng.choice([0, 0.1, 0.2, 0.3, 0.45]), rng.random() < 0.75

    def keep(words):
        return [w for w in words
                if (w[0].isalnum() or not words_only) and rng.random() >= dropped]

    left, right = keep(left), keep(right)
    if len(left) + len(right) < 3:
        return None
    order = rng.random()
    if order < 0.35:
        words = [asked] + left + right
    elif order < 0.45:
        words = [asked] + right + left
    elif order < 0.55:
        words = right + [asked] + left
    else:
        words = left + [asked] + right
    if rng.random() < 0.15:
        for _ in range(2):
            i = rng.randrange(len(words))
            j = min(len(words) - 1, i + 1)
            words[i], words[j] = words[j], words[i]
    question = " ".join(words)
    if rng.random() < 0.3:
        question = question.lower()
    elif rng.random() < 0.7:
        question = question[:1].upper() + question[1:]
    return question + "?" if rng.random() < 0.7 else question


def cloze(rng, text):
    """(question, answer), or None."""
    candidates = sentences_of(text)
    for _ in range(3 if candidates else 0):
        sentence = rng.choice(candidates)
        spans = spans_of(rng, sentence)
        if not spans:
            continue
        start, end, kind = rng.choice(spans)
        if sentence.count(sentence[start:end]) > 1:
            continue
        question = make_question(rng, sentence, start, end, kind)
        if question:
            return question, sentence[start:end]
    return None


def recurring(rng, text):
    """(question, answer, text without the sentence), or None."""
    candidates = sentences_of(text)
    for _ in range(3 if candidates else 0):
        sentence = rng.choice(candidates)
        spans = spans_of(rng, sentence, recurring_in=text)
        if not spans:
            continue
        start, end, kind = rng.choice(spans)
        question = make_question(rng, sentence, start, end, kind)
        rest = re.sub(r" +", " ", text.replace(sentence, "", 1)).strip()
        if question and sentence[start:end] in rest and len(rest) >= 40:
            return question, sentence[start:end], rest
    return None


def continuation(rng, text):
    """(question, answer): some words of the text, and those that follow; or None."""
    words = text.split(" ")
    if len(words) < 30:
        return None
    start, quoted, count = rng.randrange(len(words) - 22), rng.randint(6, 12), rng.randint(3, 8)
    lead = rng.choice(["Continue: ", "What comes after: ", "complete: "])
    middle = start + quoted
    return lead + " ".join(words[start:middle]), " ".join(words[middle:middle + count])


class AnswerReplacer:
    """Replaces the answers of a passage by others of their kind."""

    def __init__(self, questions, names):
        """questions: of every passage of a corpus, whose answers are the replacements."""
        self.names = names
        self.capitalised, self.lower = collections.defaultdict(list), collections.defaultdict(list)
        for pairs in questions:
            for _, answer, *_ in pairs:
                words = answer.split(" ")
                if len(words) <= 4 and not any(c.isdigit() for c in answer):
                    pools = self.capitalised if answer[0].isupper() else self.lower
                    pools[len(words)].append(answer)

    def other(self, rng, answer):
        """Another answer of the same kind, or None."""
        if any(c.isdigit() for c in answer):
            if YEAR.fullmatch(answer):
                return str(rng.randint(1100, 2030))

            def digits(match):
                rest = rng.choices("0123456789", k=len(match.group(0)) - 1)
                return rng.choice("123456789") + "".join(rest)

            return re.sub(r"\d+", digits, answer)
        count = len(answer.split(" "))
        if count > 4:
            return None
        if answer[0].isupper():
            if count <= 2 and rng.random() < 0.4:
                return " ".join(rng.choice(self.names) for _ in range(count))
            return rng.choice(self.capitalised[count]) if self.capitalised[count] else None
        if rng.random() < 0.5 and self.lower[count]:
            return rng.choice(self.lower[count])
        return None

    def swapped(self, rng, question, text):
        """The question about another name or number, which the text does not hold; or None."""
        spans = [m.group(0) for pattern in (NAME, NUMBER) for m in pattern.finditer(question)
                 if m.start() > 0 and m.group(0).lower() not in STOP_WORDS and m.group(0) in text]
        rng.shuffle(spans)
        for span in spans[:3]:
            other = self.other(rng, span)
            if other and other != span and other not in text:
                pattern = r"(?<!\w)" + re.escape(span) + r"(?!\w)"
                changed = re.sub(pattern, lambda _: other, question)
                if changed != question:
                    return changed
        return None

    def replace(self, rng, text, questions):
        """(text, questions) with most answers replaced, in both."""
        questions = [list(pair) for pair in questions]
        for i in rng.sample(range(len(questions)), len(questions)):
            answer = questions[i][1]
            if rng.random() < 0.2 or len(answer) < 2 or not 1 <= text.count(answer) <= 4:
                continue
            other = self.other(rng, answer)
            if not other or other == answer or other in text:
                continue
            pattern = re.compile(r"(?<!\w)" + re.escape(answer) + r"(?!\w)")
            changed = pattern.sub(lambda _: other, text)
            if changed == text:
                continue
            text = changed
            for pair in questions:
                pair[0] = pattern.sub(lambda _: other, pair[0])
                pair[1] = pattern.sub(lambda _: other, pair[1])
        return text, [pair for pair in questions if pair[1] in text]
