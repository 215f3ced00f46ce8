# SPDX-License-Identifier: Apache-2.0
"""Facts in natural wording: what a question asks for stands in a sentence like any other.

Two kinds, both made as sets of near misses: sentences of written questions about other keys, with
other answers; and pairs of a statement and a question from a small grammar, whose frames of
lexicon.py draw nearly all their words. The wordings of tests/quality/needles.jsonl, and their nouns,
are left out on purpose.
"""
import re

import questions as q
from facts import Invention, capital
from lexicon import FRAMES, LEADS, LISTS, QUESTION_LEADS

SET_SIZES = [1, 2, 3, 4, 5, 5, 5, 6, 8, 12, 20]
ASKED = 10  # questions about a set, at most
TRIES = 12  # written questions looked at for one that can be rewritten
STATEMENT_CHARACTERS_MAX = 250
SECOND_WORDING = 0.3  # of the grammar's sets
NAMED_KEYS = 0.25  # of the sets: names of people and places instead of made-up keys
NEARER = 0.5  # of the sets of made-up keys: nearly all a part away from another, not half
REWRITTEN = 0.45  # of the sets: sentences of written questions
LED = 0.2  # of the grammar's sets: words before the statement; half as often before the question

# First words of sentences that no key begins.
LOWERED = {"A", "According", "After", "All", "Along", "Among", "As", "At", "Because", "Before", "Behind",
           "Beside", "Between", "By", "Doctors", "During", "Every", "For", "From", "How", "If", "In",
           "It", "No", "Nobody", "Of", "On", "Only", "Over", "The", "There", "Though", "To", "Under",
           "What", "When", "Where", "Which", "Who", "Whose", "With", "Within"}

# kind of value (number, word, person, place, date) | statement | question | choices. A choice a:b reads
# a in the statement and b in the question.
GRAMMAR = """
number | The {a} {E} {b} {V} {c} in a single {d}. | How many {c} did the {a} {E} {b:} in a single {d}? | a=tanker,trawler,truck,barge,glider,convoy; b=carried:carry,hauled:haul,moved:move,delivered:deliver; c=barrels,tonnes,cartons,bales,letters,passengers; d=trip,month,week,quarter,voyage
number | Workers at {E} {b} {V} {c} before {d}. | Before {d}, how many {c} did workers at {E} {b:}? | b=packed:pack,loaded:load,sorted:sort,painted:paint,inspected:inspect; c=boxes,bottles,panels,engines,jars,shells; d=noon,the strike,autumn,the holidays,closing time
number | {V} {c} were {b} by the {a} of {E}. | How many {c} were {b} by the {a} of {E}? | a=mayor,council,bishop,governor,guild,abbot; b=planted,bought,ordered,repaired,distributed,promised; c=roses,benches,lamps,blankets,chairs,houses
number | The {a} known as {E} {b} {V} {c}. | How many {c} did the {a} {E} {b:}? | a=reservoir,stadium,theatre,harbour,barn,cellar; b=holds:hold,can take:take,accommodates:accommodate; c=litres,people,seats,boats,horses,barrels
number | In the {a} at {E} there are {V} {c}. | How many {c} are there in the {a} at {E}? | a=cemetery,convent,archive,hospital,prison,garden; c=graves,exhibits,folders,beds,cells,statues
number | The {a} paid {V} {c} for {E}. | What did the {a} pay for {E}? | a=gallery,collector,duke,bank,company,widow; c=dollars,marks,guineas,rubles,francs,pesos
number | {E} was sold to a {a} for {V} {c}. | How many {c} did the {a} give for {E}? | a=dealer,merchant,farmer,stranger,neighbour; c=dollars,marks,guineas,rubles,francs
number | It took {V} {c} to reach {E} from the {d}. | How many {c} did it take to get to {E} from the {d}? | c=hours,steps,days,minutes,turns; d=coast,camp,capital,station,summit
number | The {a} of {E} rises {V} {c} above the {d}. | How far above the {d} does the {a} of {E} rise, in {c}? | a=tower,peak,spire,dome,cliff; c=feet,metres,fathoms; d=plain,sea,valley,city
number | At {E}, the {a} was measured at {V} {c}. | What was the {a} at {E} measured to be? | a=depth,rainfall,pressure,temperature,wind; c=units,degrees,feet,millimetres
number | {E} scored {V} points in the {a}. | How many points did {E} get in the {a}? | a=final,first match,tournament,second half,derby
number | Nobody but {E} had {b} {V} {c} in one {d}. | How many {c} did {E} {b:} in one {d}? | b=eaten:eat,caught:catch,sold:sell,written:write,shot:shoot; c=eggs,fish,papers,pages,arrows; d=day,night,sitting,hour
number | Volunteers from {E} gathered {V} {c} along the {d}. | Along the {d}, volunteers from {E} gathered how many {c}? | c=shells,bags,signatures,stones,samples; d=shore,road,canal,border
number | The {a} in {E} employs {V} {c}. | How many {c} work at the {a} in {E}? | a=factory,brewery,shipyard,laboratory,bakery; c=people,women,welders,clerks,chemists
number | {E} lost {V} {c} during the {d}. | During the {d}, how many {c} were lost by {E}? | c=ships,votes,cattle,shares,men; d=storm,war,crisis,siege,drought
number | A {a} noted {V} {c} close to {E}. | Close to {E}, how many {c} were noted by a {a}? | a=biologist,shepherd,ranger,tourist,pilot; c=geese,wolves,seals,nests,craters
number | The {a} that {E} built has {V} {c}. | How many {c} does the {a} built by {E} have? | a=palace,staircase,organ,fence,ship; c=rooms,windows,pipes,posts,doors
number | When {E} retired, {b} had published {V} {c}. | How many {c} had {E} published by the time of retirement? | b=he,she; c=papers,novels,maps,songs,articles
number | The recipe from {E} calls for {V} grams of {c}. | How many grams of {c} are needed in the recipe from {E}? | c=flour,butter,salt,almonds,honey
number | The {a} {E} weighs {V} {c} when empty. | What is the weight in {c} of the {a} {E} when empty? | a=rocket,bell,wagon,satellite,anvil; c=kilograms,tons,stone,ounces
number | About {V} {c} attended the {a} in {E}. | How many {c} came to the {a} in {E}? | a=concert,funeral,fair,congress,wedding; c=guests,people,delegates,visitors
number | {E} asked the {a} for {V} {c} and got none. | How many {c} did {E} ask the {a} for? | a=king,bank,army,landlord,committee; c=horses,dollars,rifles,acres,days
number | The engine of the {a} {E} gives {V} {c}. | What does the engine of the {a} {E} give in {c}? | a=tractor,racer,motorboat,airship; c=horsepower,watts,revolutions
number | Sailors on the {E} were given {V} {c} each. | How many {c} was each of the sailors on the {E} given? | c=biscuits,lemons,oranges,pennies,shirts
number | The pupils of {E} read {V} {c} over the {d}. | Over the {d}, how many {c} were read by the pupils of {E}? | c=books,poems,chapters,stories; d=summer,term,holidays,year
number | The {a} of {E} burned for {V} {c}. | For how many {c} did the {a} of {E} burn? | a=forest,granary,oil field,cathedral,candle; c=days,hours,nights,weeks
number | From {E} the army marched {V} {c} without rest. | How many {c} did the army march from {E} without rest? | c=leagues,kilometres,hours,days
number | {E} keeps {V} {c} in the {d}. | How many {c} does {E} keep in the {d}? | c=goats,bees,rifles,snakes,umbrellas; d=cellar,shed,attic,backyard,stable
number | The {a} was fined {V} dollars because of {E}. | How large was the fine that the {a} got because of {E}? | a=driver,company,club,captain,landlord
number | Engineers drilled {V} {c} below {E}. | How deep in {c} did engineers drill below {E}? | c=metres,feet,fathoms
number | Members of {E} owe {V} {c} a year. | How many {c} a year do members of {E} owe? | c=dollars,hours,shillings,days
number | The {a} to {E} leaves from platform {V}. | From which platform does the {a} to {E} leave? | a=train,express,sleeper,tram
number | You get through to {E} with {V} after the {d}. | What does it take after the {d} to get through to {E}? | d=tone,prefix,beep,greeting
number | The {a} of {E} carries the number {V} on its {d}. | Which number is on the {d} of the {a} of {E}? | a=car,boat,jacket,violin,suitcase; d=back,door,lid,side,sleeve
number | {b} wrote {V} on the {d} of {E}. | What did {b} write on the {d} of {E}? | b=Somebody,The clerk,The nurse,A child,The inspector; d=door,folder,wall,label,cover
number | The {a} typed {V} to unlock {E}. | What did the {a} type to unlock {E}? | a=guard,nurse,thief,engineer,pilot
number | {E} can be found in the index at {V}. | At which entry can {E} be found in the index? | a=x
number | The {a} sent to {E} bore the mark {V}. | Which mark did the {a} sent to {E} bear? | a=letter,package,telegram,form,barrel
number | In the register, {E} was given the number {V} by the {a}. | Which number did the {a} give {E} in the register? | a=clerk,priest,doctor,teacher,warden
number | All {a} for {E} are marked with {V}. | With what are the {a} for {E} marked? | a=bags,files,containers,documents,bottles
number | The seal on the {a} from {E} read {V}. | What did the seal on the {a} from {E} read? | a=bottle,envelope,chest,jar,door
number | The {a} transmitted {V} as the signal for {E}. | What was transmitted by the {a} as the signal for {E}? | a=submarine,station,satellite,spy,pilot
number | Visitors to {E} must enter {V} at the {d}. | What must visitors to {E} enter at the {d}? | d=gate,desk,terminal,door,turnstile
number | On the back of {E} the {a} had scratched {V}. | What had the {a} scratched on the back of {E}? | a=prisoner,sculptor,student,monk,sailor
number | The {a} filed the case of {E} as {V}. | As what did the {a} file the case of {E}? | a=court,police,insurer,hospital
number | For {E}, the thermostat was set to {V} by the {a}. | To what did the {a} set the thermostat for {E}? | a=janitor,cook,manager,scientist
number | The {a} {E} circled the {d} {V} times. | How many times did the {a} {E} circle the {d}? | a=plane,satellite,eagle,probe; d=earth,moon,island,field
number | {E} sounded the bell {V} times before {d}. | How many times did {E} sound the bell before {d}? | d=sunrise,the alarm,lunch,anyone came
number | Every night {E} {b} {V} {c}. | How many {c} does {E} {b:} every night? | b=counts:count,feeds:feed,locks:lock,answers:answer; c=sheep,dogs,doors,letters
number | The contract with {E} runs for {V} {c}. | For how many {c} does the contract with {E} run? | c=years,months,weeks,days
number | Doctors gave {E} {V} {c} of the drug. | How much of the drug did doctors give {E}, in {c}? | c=milligrams,doses,drops,pills
number | The field behind {E} yielded {V} {c}. | How many {c} did the field behind {E} yield? | c=potatoes,bushels,melons,pumpkins
number | {E} inherited {V} {c} from an {a}. | How many {c} did {E} inherit from an {a}? | a=uncle,aunt,old friend,admirer; c=acres,books,dollars,cows
word | The guests at {E} were greeted with a {a} of {V}. | With a {a} of what were the guests at {E} greeted? | a=glass,bowl,basket,song
word | {E} painted the {a} in {V}. | In what did {E} paint the {a}? | a=fence,kitchen,boat,ceiling
word | The {a} from {E} always smelled of {V}. | What did the {a} from {E} always smell of? | a=boxes,coats,letters,rooms
word | Traders in {E} swapped their {a} for {V}. | For what did traders in {E} swap their {a}? | a=salt,furs,cloth,pearls
word | {E} is best known for its {V}. | What is {E} best known for? | a=x
word | The {a} of {E} is made of {V}. | What is the {a} of {E} made of? | a=roof,crown,handle,wall,bell
word | They named their {a} {V} after leaving {E}. | What did they name their {a} after leaving {E}? | a=dog,boat,daughter,band
person | {V} {b} {E}. | Who {b} {E}? | b=designed,founded,discovered,betrayed,restored,translated,financed,defended
person | {E} was {b} by {V}. | Who {b} {E}? | b=designed,founded,discovered,betrayed,restored,translated,financed,defended
person | The {a} of {E} was handed over to {V}. | To whom was the {a} of {E} handed over? | a=command,diary,key,fortune,manuscript
person | {V} married {E} in the {a}. | Whom did {E} marry? | a=spring,chapel,garden,capital
person | The prize for {E} went to {V}. | Who won the prize for {E}? | a=x
person | {E} learned {a} from {V}. | Who taught {E} {a}? | a=chess,Latin,sailing,carpentry,music
person | After {E} closed, {V} opened a {a}. | Who opened a {a} after {E} closed? | a=school,bakery,clinic,theatre
place | {E} grew up in {V}. | Where did {E} grow up? | a=x
place | The {a} {E} sank off {V}. | Off which place did the {a} {E} sink? | a=tanker,trawler,submarine,yacht
place | The {a} of {E} were taken to {V}. | Where were the {a} of {E} taken? | a=remains,papers,children,horses
place | {E} opened a second {a} in {V}. | In which city did {E} open a second {a}? | a=shop,office,school,restaurant
place | The road from {E} ends in {V}. | Where does the road from {E} end? | a=x
place | {E} was moved to {V} by {a}. | To which city was {E} moved by {a}? | a=rail,ship,mistake,decree
date | {E} was {b} on {V}. | When was {E} {b}? | b=opened,captured,launched,abandoned,signed,destroyed
date | On {V} the {a} at {E} was closed. | When was the {a} at {E} closed? | a=mine,school,airport,theatre
date | The {a} of {E} began on {V}. | On what date did the {a} of {E} begin? | a=trial,siege,construction,reign
date | {E} left the {a} on {V}. | When did {E} leave the {a}? | a=hospital,army,country,company
date | The {a} {E} was last seen on {V}. | On which day was the {a} {E} last seen? | a=ship,spy,climber,hen
"""


def read_grammar(text):
    """(kind, statement, question, {name: choices})"""
    out = []
    for line in text.strip().split("\n"):
        kind, statement, question, choices = (part.strip() for part in line.split("|"))
        pairs = (choice.split("=") for choice in choices.split(";"))
        out.append((kind, statement, question,
                    {name.strip(): LISTS[values[1:].strip()] if values.startswith("@")
                     else values.split(",") for name, values in pairs}))
    return out


def led(lead, text):
    """A sentence behind a lead, its first word in lower case where that is no name."""
    first, space, rest = text.partition(" ")
    if first in LOWERED:
        first = first.lower()
    return lead + " " + first + space + rest


def replace_whole(text, old, new):
    """Every occurrence of `old` between word borders replaced."""
    return re.sub(r"(?<!\w)" + re.escape(old) + r"(?!\w)", lambda _: new, text)


def varied(rng, question, key):
    """A question as people type it, its key whole."""
    other = q.vary_question(rng, question)
    return other if key.lower() in other.lower() else question


class NaturalFacts:
    """Sets of (statement, [(question, answer)]) as FactMaker makes them. `questions`: the corpus of
    written questions; `written`: its passages that have some."""

    def __init__(self, questions, written, replacer, facts):
        self.questions, self.written = questions, written
        self.replacer, self.facts = replacer, facts
        self.grammar = read_grammar(GRAMMAR + FRAMES)

    def make(self, rng):
        """A set of near misses."""
        rewritten = self.rewritten(rng) if rng.random() < REWRITTEN else None
        return rewritten or self.from_grammar(rng)

    def keys(self, rng, count):
        """Different keys, near each other: made up, or names that share a word."""
        if rng.random() >= NAMED_KEYS:
            return Invention(rng).keys(rng, count, 0.9 if rng.random() < NEARER else 0.5)
        names, words = self.facts.names, rng.choice([1, 2, 2])
        first = rng.choices(names, k=words)
        out = [" ".join(first)]
        for _ in range(count - 1):
            other = rng.choices(names, k=words)
            if words > 1 and rng.random() < 0.5:
                other[rng.randrange(words)] = rng.choice(first)
            if " ".join(other) not in out:
                out.append(" ".join(other))
        return out

    # --- sentences of written questions ------------------------------------------------------

    def rewritten(self, rng):
        """A written question's sentence about other keys, with other answers; or None."""
        for _ in range(TRIES):
            index = rng.choice(self.written)
            question, answer, *_ = rng.choice(self.questions.questions[index])
            found = self.key_of(rng, self.questions.text(index), question, answer)
            if found:
                made = self.set_of(rng, *found, question, answer)
                if made:
                    return made
        return None

    def key_of(self, rng, text, question, answer):
        """(sentence, key): the only sentence that holds the answer, if it shares a name or number with
        the question; else None."""
        holding = [s for s in q.sentences_of(text) if answer in s]
        if len(holding) != 1 or len(holding[0]) > STATEMENT_CHARACTERS_MAX:
            return None
        sentence = holding[0]
        if sentence.count(answer) != 1:
            return None
        spans = [m.group(0) for pattern in (q.NAME, q.NUMBER) for m in pattern.finditer(question)
                 if m.start() > 0 and m.group(0).lower() not in q.STOP_WORDS]
        whole = [s for s in spans if s not in answer and answer not in s
                 and replace_whole(sentence, s, "") != sentence]
        return (sentence, rng.choice(whole)) if whole else None

    def set_of(self, rng, sentence, key, question, answer):
        """The set, or None if there are no other answers of the kind."""
        count = rng.choice(SET_SIZES)
        if key[0].isdigit() or not key[0].isalpha():
            others = [self.replacer.other(rng, key) for _ in range(count)]
            keys = list(dict.fromkeys(k for k in others if k))
        else:
            keys = self.keys(rng, count)
        out, numeric = [], answer.isdigit() and not q.YEAR.fullmatch(answer)
        for other in keys:
            value = self.facts.digits(rng) if numeric else self.replacer.other(rng, answer)
            if not value:
                continue
            statement = replace_whole(replace_whole(sentence, answer, value), key, other)
            asked = replace_whole(replace_whole(question, answer, value), key, other)
            if value in statement and other in statement and len(out) < ASKED:
                out.append((statement, [(varied(rng, asked, other), value)]))
        return out

    # --- the grammar -------------------------------------------------------------------------

    def from_grammar(self, rng):
        """Keys in one wording; at times some of them in another one, too, which asks for as much."""
        keys = self.keys(rng, rng.choice(SET_SIZES))
        first = rng.choice(self.grammar)
        out = self.worded(rng, first, keys)
        if rng.random() < SECOND_WORDING:
            second = rng.choice([line for line in self.grammar if line[0] == first[0]])
            if second is not first:
                out += self.worded(rng, second, keys[:3])
        rng.shuffle(out)
        return out

    def worded(self, rng, line, keys):
        kind, statement, question, choices = line
        lead = rng.choice(LEADS) if rng.random() < LED else None
        ask = rng.choice(QUESTION_LEADS) if rng.random() < LED / 2 else None
        chosen = {name: rng.choice(values).strip().partition(":")
                  for name, values in choices.items()}

        def filled(template, key, value):
            for name, (said, _, asked) in chosen.items():
                template = template.replace("{%s:}" % name, asked or said)
                template = template.replace("{%s}" % name, said)
            return capital(template.replace("{E}", key).replace("{V}", value))

        out = []
        for number, key in enumerate(keys):
            value = self.facts.value(rng, kind)
            said, asked = filled(statement, key, value), filled(question, key, value)
            said, asked = led(lead, said) if lead else said, led(ask, asked) if ask else asked
            pairs = [(varied(rng, asked, key), value)] if number < ASKED else []
            out.append((said, pairs))
        return out
