# SPDX-License-Identifier: Apache-2.0
"""Synthetic facts ("needles"): an attribute of an entity has a value, in very varied wording.

The wording of the evaluation ("special magic number ... mentioned in the provided text") is left out
on purpose, and a tenth of the words never serves here: the evaluation's keys are drawn from them.
Nearly half of the sets have made-up keys: syllables, codes, hexadecimal digits, numbers.
"""
import hashlib


def words_of(text):
    return [part.strip() for part in text.replace("\n", " ").split(",") if part.strip()]


NUMBER_ATTRIBUTES = words_of("""access code, locker number, passcode, PIN, serial number,
ticket number, account number, lucky number, room number, flight number, phone extension,
badge number, zip code, case number, order number, license number, combination, reference number,
registration number, invoice number, batch number, jersey number, tracking number, secret number,
membership number, code, key, number, password, ID, score, population, price, weight, height, reading,
budget, distance, frequency, quota, item number, magic code, port number, record, total, tally, rank,
vault code, entry number, catalog number, patient number, hash, checksum, offset, limit, token, count,
size, value""")
WORD_ATTRIBUTES = words_of("""password, code word, secret word, nickname, favorite color,
favorite food, favorite animal, hobby, codename, safe word, mascot, call sign, symbol, passphrase,
keyword, alias, label, tag, motto, favorite instrument, role, profession, hiding place, gift, material,
topic, special ingredient, signal""")
PERSON_ATTRIBUTES = words_of("""manager, best friend, teacher, doctor, lawyer, owner, author, captain,
neighbor, mentor, assistant, contact person, landlord, director, founder, inventor, partner, successor,
editor, coach, guardian, rival""")
PLACE_ATTRIBUTES = words_of("""home town, birthplace, headquarters, destination, current location,
meeting place, place of work, base, warehouse, next stop, hiding place, place of birth, office""")
DATE_ATTRIBUTES = words_of("""birthday, deadline, departure date, wedding date, launch date, due date,
start date, anniversary, expiry date, appointment""")
MODIFIERS = words_of("""secret, new, old, official, temporary, private, main, second, hidden, personal,
emergency, lucky, unique, rare, current, original, correct, final, internal, magic, favorite, primary,
backup, unusual""")
MONTHS = words_of("""January, February, March, April, May, June, July, August, September, October,
November, December""")
CITIES = """London Paris Rome Berlin Madrid Vienna Oslo Dublin Lisbon Athens Warsaw Prague Budapest
Cairo Nairobi Lagos Tunis Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Karachi Lahore Dhaka
Bangkok Hanoi Manila Jakarta Sydney Perth Auckland Toronto Montreal Boston Chicago Denver Seattle
Houston Dallas Miami Atlanta Detroit Havana Lima Quito Bogota Santiago Caracas Brasilia Geneva Zurich
Milan Naples Venice Florence Hamburg Munich Cologne Lyon Marseille Bordeaux Seville Valencia Porto
Glasgow Edinburgh Cardiff Belfast Bristol Leeds York Oxford Cambridge Baghdad Tehran Damascus Beirut
Amman Riyadh Doha Kabul Tashkent Moscow Kiev Minsk Riga Vilnius Tallinn Helsinki Stockholm Copenhagen
Bergen""".split()
ROLES = words_of("agent, team, unit, station, customer, vault, gate, user")
THINGS = words_of("department, room, club, company, village, machine, box, ship, garden, school")
PLACES = words_of("Street, River, Hotel, College, Castle, Bridge, Inc, Museum")

# {A}: attribute, {E}: entity, {V}: value
STATEMENTS = """The {A} of {E} is {V}.
The {A} for {E} is {V}.
{E}'s {A} is {V}.
{E} has the {A} {V}.
For {E}, the {A} is {V}.
Remember that the {A} for {E} is {V}.
Note: {A} of {E}: {V}.
{E} - {A}: {V}.
It was recorded that {E}'s {A} was {V}.
According to the records, the {A} of {E} is {V}.
{V} is the {A} of {E}.
{V} is {E}'s {A}.
Please keep in mind that {V} is the {A} for {E}.
Everyone knows {E}'s {A} is {V}.
I was told the {A} for {E} would be {V}.
The clerk wrote down {V} as the {A} for {E}.
Under {E}, the {A} was listed as {V}.
They changed the {A} of {E} to {V}.
Among the notes: {E}, {A} = {V}.
A message said that the {A} belonging to {E} is {V}.
{A} ({E}): {V}.
Do not forget: {E} uses {V} as the {A}.
The {A} assigned to {E} is {V}.
If anyone asks, the {A} for {E} is {V}.
In the file, {E} is registered with {A} {V}.
{E}: {A} {V}.
By the way, the {A} for {E} happens to be {V}.
As of today the {A} of {E} equals {V}.
Somebody noted that {V} was the {A} given to {E}.
The {A} that goes with {E} is {V}.
One can find that {E} has {V} for a {A}.
We set the {A} for {E} to {V} last week.
It turns out {E}'s {A} is {V}, as far as I know.
A {A} for {E} was chosen: {V}.
One {A} for {E} is: {V}.
Here is the {A} for {E}: {V}.
{E} => {A} => {V}
[{E}] {A}={V}
To open it for {E}, use the {A} {V}.
The documents show {V} for the {A} of {E}.""".split("\n")
QUESTIONS = """What is the {A} of {E}?
What is the {A} for {E}?
What is {E}'s {A}?
Which {A} does {E} have?
Tell me the {A} for {E}.
{E}'s {A}?
What {A} was assigned to {E}?
What was the {A} for {E} mentioned in the documents?
According to the text, what is the {A} of {E}?
Find the {A} of {E}.
What is listed as the {A} for {E}?
Give the {A} of {E}.
Do you remember the {A} of {E}?
I need the {A} for {E}.
What is the {A} that belongs to {E}?
What's the {A} for {E}?
What is the {A} for {E} in the passages above?
the {A} for {E}
Look up {E}: what is the {A}?
Can you tell me what the {A} of {E} is?
What did they say the {A} for {E} was?
what is {E} {A}""".split("\n")
REVERSE_QUESTIONS = """Whose {A} is {V}?
Who or what has the {A} {V}?
Which one has the {A} {V}?
The {A} {V} belongs to whom?""".split("\n")
LIST_QUESTIONS = """What are all the {A}s for {E}?
List every {A} for {E}.
What are the {A}s of {E} mentioned in the documents?""".split("\n")
LIST_ITEMS = ["{E}: {V}", "{A} of {E}: {V}", "{E} = {V}", '"{E}": "{V}",', "The {A} of {E} is {V}.",
              "{E}, {A} {V};"]
ONSETS = """b bl br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p ph pl pr qu r s sh sk sl sn sp st t
th tr tw v w y z""".split()
VOWELS = "a a a e e e i i i o o o u u u ai au ea ee ie oo ou y".split()
ENDINGS = "n l r s t m d x k rk st nd ng sk lt rn th ck mp ss ria nix tor".split()
INVENTIONS = {"word": 60, "name": 8, "two words": 6, "code": 12, "hex": 8, "number": 6}
NEAR_SETS = [2, 2, 3, 4, 5, 6, 12, 30]  # keys of a set: near misses, made-up keys
NEAR_ASKED = 8  # questions about a set, at most
INVENTED_SETS = [1, 1, 2, 2, 3, 4, 4, 6, 6, 8, 12, 20, 40, 60]
INVENTED_ASKED = 16
ENTITY_KINDS = [0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]


def held_out(word):
    """Whether a word is kept for the keys of the evaluation."""
    return hashlib.md5(word.encode()).digest()[0] % 10 == 0


def fill(template, attribute, entity, value):
    return template.replace("{A}", attribute).replace("{E}", entity).replace("{V}", value)


def capital(text):
    return text[:1].upper() + text[1:]


class Invention:
    """Made-up keys of one form, as lists of parts, from a small alphabet drawn for the purpose: the
    keys of a set resemble each other."""

    def __init__(self, rng):
        self.form = rng.choices(list(INVENTIONS), list(INVENTIONS.values()))[0]
        self.separator = ""
        if self.form == "code":
            letters = rng.choice(["ABCDEFGHJKLMNPQRSTUVWXYZ", "abcdefghijkmnpqrstuvwxyz"])
            self.alphabets = ([letters] * rng.randint(1, 4) + [rng.choice(["", "-", "_"])]
                              + ["0123456789"] * rng.randint(2, 5))
        elif self.form == "hex":
            self.alphabets = ["0123456789abcdef"] * rng.randint(5, 12)
        elif self.form == "number":
            self.alphabets = ["123456789"] + ["0123456789"] * rng.randint(3, 7)
        else:
            syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(6, 18))]
            endings = rng.sample(ENDINGS, rng.randint(2, 5)) + [""] * rng.randint(0, 2)
            self.alphabets = [syllables] * rng.choice([1, 2, 2, 3, 3]) + [endings]
            if self.form == "two words":
                self.alphabets = self.alphabets + [[" "]] + self.alphabets

    def draw(self, rng):
        return [rng.choice(alphabet) if alphabet else "" for alphabet in self.alphabets]

    def near(self, rng, parts):
        """A key that differs in one part; another one if there is only one."""
        places = [i for i, alphabet in enumerate(self.alphabets) if len(set(alphabet)) > 1]
        place, parts = rng.choice(places), list(parts)
        parts[place] = rng.choice([x for x in self.alphabets[place] if x != parts[place]])
        return parts

    def text(self, parts):
        text = "".join(parts)
        return text.title() if self.form == "name" else text

    def keys(self, rng, count, share=0.5):
        """So many different keys, or fewer; a share of them near one before."""
        drawn, tries = [self.draw(rng)], 0
        while len(drawn) < count and tries < 4 * count:
            tries += 1
            near = rng.random() < share
            parts = self.near(rng, rng.choice(drawn)) if near else self.draw(rng)
            if parts not in drawn:
                drawn.append(parts)
        return [self.text(parts) for parts in drawn]


class FactMaker:
    """Draws facts from words.json ({"low": [...], "names": [...]}); a share of the sets has made-up
    keys."""

    def __init__(self, words, invented_share=0.0):
        self.invented_share = invented_share
        self.low = [w for w in words["low"] if not held_out(w)]
        self.names = words["names"]
        self.evaluation_words = [w for w in words["low"] if held_out(w)]

    def digits(self, rng, count=None):
        count = count or rng.choice([2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 8, 9, 10])
        return rng.choice("123456789") + "".join(rng.choices("0123456789", k=count - 1))

    def value(self, rng, kind):
        if kind == "number":
            x = rng.random()
            if x < 0.85:
                return self.digits(rng)
            if x < 0.92:
                return self.digits(rng, 3) + "-" + self.digits(rng, rng.choice([3, 4]))
            return "".join(rng.choices("0123456789abcdef", k=rng.randint(5, 9)))
        if kind == "word":
            word = rng.choice(self.low)
            return word if rng.random() < 0.7 else word + " " + rng.choice(self.low)
        if kind == "person":
            name = rng.choice(self.names)
            return name + " " + rng.choice(self.names) if rng.random() < 0.6 else name
        if kind == "place":
            return rng.choice(CITIES)
        day = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
        return day + f", {rng.randint(1700, 2040)}" if rng.random() < 0.4 else day

    def entity(self, rng, kind):
        low, names = self.low, self.names
        name = rng.choice(names)
        if kind == 0:
            return name + " " + rng.choice(names)
        if kind == 1:
            return name
        if kind == 2:
            return rng.choice(low)
        if kind == 3:
            return rng.choice(low) + "-" + rng.choice(low)
        if kind == 4:
            return "Project " + name
        if kind == 5:
            which = name if rng.random() < 0.5 else self.digits(rng, rng.choice([1, 2, 3]))
            return rng.choice(ROLES) + " " + which
        if kind == 6:
            return f"the {rng.choice(low)} {rng.choice(THINGS)}"
        if kind == 7:
            return rng.choice(CITIES)
        if kind == 8:
            return name + " " + rng.choice(PLACES)
        if kind == 9:
            letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2))
            return letters + self.digits(rng, rng.choice([2, 3]))
        return rng.choice(low) + " " + rng.choice(low)

    def attribute(self, rng):
        """(kind of value, attribute)"""
        kind, names = rng.choices(
            [("number", NUMBER_ATTRIBUTES), ("word", WORD_ATTRIBUTES),
             ("person", PERSON_ATTRIBUTES), ("place", PLACE_ATTRIBUTES), ("date", DATE_ATTRIBUTES)],
            [60, 14, 10, 9, 7])[0]
        name = rng.choice(names)
        return kind, rng.choice(MODIFIERS) + " " + name if rng.random() < 0.3 else name

    def fact(self, rng, template, attribute, entity, value, ask=True):
        """(statement, [(question, answer)])"""
        statement = capital(fill(template, attribute, entity, value))
        if not ask:
            return statement, []
        if rng.random() < 0.07:
            question = fill(rng.choice(REVERSE_QUESTIONS), attribute, entity, value)
            return statement, [(question, entity)]
        question = fill(rng.choice(QUESTIONS), attribute, entity, value)
        return statement, [(capital(question) if rng.random() < 0.8 else question, value)]

    def make(self, rng):
        """A set of (statement, [(question, answer)]); the statements of a set are near misses."""
        kind, attribute = self.attribute(rng)
        template, entity_kind = rng.choice(STATEMENTS), rng.choice(ENTITY_KINDS)
        if rng.random() < self.invented_share:
            return self.invented(rng, kind, attribute, template)
        x = rng.random()
        if x < 0.3:
            return [self.fact(rng, template, attribute, self.entity(rng, entity_kind),
                              self.value(rng, kind))]
        if x < 0.85:
            return self.near_misses(rng, kind, attribute, template, entity_kind)
        if x < 0.92:
            return self.several_values(rng, kind, attribute, template, entity_kind)
        return self.dense_list(rng, kind, attribute, entity_kind)

    def near_misses(self, rng, kind, attribute, template, entity_kind):
        """Several keys in one wording, and at times another attribute of the first key."""
        first = self.entity(rng, entity_kind)
        out = []
        for i in range(rng.choice(NEAR_SETS)):
            entity = self.entity(rng, entity_kind)
            if rng.random() < 0.3:  # share a word with the first key
                theirs, ours = first.split(" "), entity.split(" ")
                if len(theirs) > 1 and len(ours) == len(theirs):
                    entity = " ".join([theirs[0]] + ours[1:])
            wording = template if rng.random() < 0.8 else rng.choice(STATEMENTS)
            out.append(self.fact(rng, wording, attribute, entity if i else first,
                                 self.value(rng, kind), ask=i < NEAR_ASKED))
        if rng.random() < 0.4:
            kind, other = self.attribute(rng)
            out.append(self.fact(rng, template, other, first, self.value(rng, kind),
                                 ask=rng.random() < 0.7))
        return out

    def invented(self, rng, kind, attribute, template):
        """Made-up keys, up to a crowd of them in one wording, or several facts about one."""
        keys = Invention(rng).keys(rng, rng.choice(INVENTED_SETS))
        values = Invention(rng) if rng.random() < 0.15 else None
        mixed, out = rng.random() < 0.2, []
        asked = set(rng.sample(range(len(keys)), min(INVENTED_ASKED, len(keys))))
        for i, key in enumerate(keys):
            value = values.text(values.draw(rng)) if values else self.value(rng, kind)
            wording = rng.choice(STATEMENTS) if mixed else template
            out.append(self.fact(rng, wording, attribute, key, value, ask=i in asked))
        if rng.random() < 0.5:  # other attributes of the same keys, at times one word apart
            near = rng.random() < 0.6
            noun = rng.choice(self.low) + " " + attribute.split(" ")[-1]
            other_kind, other = (kind, noun) if near else self.attribute(rng)
            wording = template if near else rng.choice(STATEMENTS)
            for key in keys[:rng.choice([1, 2, 3])] if other != attribute else []:
                out.append(self.fact(rng, wording, other, key, self.value(rng, other_kind)))
        rng.shuffle(out)
        return out

    def several_values(self, rng, kind, attribute, template, entity_kind):
        entity = self.entity(rng, entity_kind)
        values = [self.value(rng, kind) for _ in range(rng.choice([2, 2, 3]))]
        out = [(capital(fill(template, attribute, entity, v)), []) for v in values]
        rng.shuffle(values)
        question = fill(rng.choice(LIST_QUESTIONS), attribute, entity, "")
        out[0] = (out[0][0], [(question, ", ".join(values))])
        return out

    def dense_list(self, rng, kind, attribute, entity_kind):
        entities = [self.entity(rng, entity_kind) for _ in range(rng.randint(4, 9))]
        values = [self.value(rng, kind) for _ in entities]
        separator, item = rng.choice(["\n", " ", " "]), rng.choice(LIST_ITEMS)
        items = [fill(item, attribute, e, v) for e, v in zip(entities, values)]
        text = f"{capital(attribute)} list:{separator}" + separator.join(items)
        asked = rng.sample(range(len(entities)), min(3, len(entities)))
        return [(text, [(fill(rng.choice(QUESTIONS), attribute, entities[i], values[i]), values[i])
                        for i in asked])]
