# SPDX-License-Identifier: Apache-2.0
"""Word lists and sentence frames of the grammar of wordings.py.

A frame is a line as those of wordings.GRAMMAR; @name stands for the list of that name. What a frame
says need not be likely: which key goes with which value is all that counts. Like the grammar, the lists
leave out the wordings of tests/quality/needles.jsonl and their nouns; test_train.py compares them.
"""


def words_of(text):
    return [part.strip() for part in text.replace("\n", " ").split(",") if part.strip()]


def leads_of(text):
    return [lead.replace(";", ",") for lead in words_of(text)]


LISTS = {name: words_of(text) for name, text in {
    # a:b reads a in the statement and b in the question
    "verb": """carried:carry, hauled:haul, moved:move, delivered:deliver, packed:pack, loaded:load,
        sorted:sort, painted:paint, inspected:inspect, planted:plant, bought:buy, ordered:order,
        repaired:repair, distributed:distribute, promised:promise, collected:collect, sold:sell,
        burned:burn, buried:bury, cleaned:clean, destroyed:destroy, donated:donate, examined:examine,
        exported:export, found:find, gathered:gather, hired:hire, imported:import, invented:invent,
        lent:lend, lost:lose, made:make, mailed:mail, melted:melt, noticed:notice,
        owned:own, polished:polish, printed:print, processed:process, produced:produce,
        purchased:purchase, received:receive, recorded:record, refused:refuse, rejected:reject,
        released:release, removed:remove, rented:rent, replaced:replace, reported:report,
        requested:request, rescued:rescue, returned:return, saved:save, scanned:scan, sealed:seal,
        seized:seize, shipped:ship, signed:sign, smuggled:smuggle, spotted:spot, stacked:stack,
        stored:store, supplied:supply, tested:test, tracked:track, traded:trade,
        transferred:transfer, treated:treat, washed:wash, wrapped:wrap,
        discovered:discover, assembled:assemble, photographed:photograph, studied:study,
        installed:install, mended:mend, dropped:drop, borrowed:borrow, caught:catch, dug up:dig up,
        fed:feed, sent:send, won:win, brought:bring, set aside:set aside, gave away:give away,
        handed out:hand out, picked up:pick up, turned down:turn down, threw out:throw out,
        looked after:look after, paid for:pay for, bought:purchase, purchased:buy,
        gathered:collect, collected:gather, mended:repair, fixed:mend, got:receive, found:discover,
        produced:make, manufactured:produce, transported:carry, lost:lose, shipped:send""",
    "thing": """barrels, cartons, bales, letters, boxes, bottles, panels, engines, jars, shells,
        roses, benches, lamps, blankets, chairs, candles, shirts, hats, gloves, boots, coats,
        carpets, mirrors, pianos, drums, guitars, flutes, ropes, nails, screws, bolts, hammers,
        shovels, wheels, tires, batteries, cables, lenses, cameras, phones, computers, disks, tapes,
        files, forms, reports, maps, charts, photographs, postcards, envelopes, magazines,
        newspapers, leaflets, posters, pens, pencils, notebooks, diamonds, pearls, medals, trophies,
        flags, tents, baskets, buckets, tiles, planks, beams, stones, pipes, valves, pumps, motors,
        turbines, cars, trucks, wagons, bicycles, boats, canoes, kites, balloons, dolls, puzzles,
        chickens, ducks, goats, pigs, horses, camels, cows, bulls, rabbits, bees, butterflies,
        beetles, spiders, frogs, turtles, eggs, loaves, cakes, pies, onions, carrots, melons,
        apples, lemons, olives, peppers, seeds, bulbs, ferns, tablets, vaccines, bandages, samples,
        fossils, bones, skulls, windows, doors, keys, locks, spoons, knives, plates, cups,
        kettles, ovens, umbrellas, scarves, wigs, masks, puppets, statues, vases, rugs, curtains,
        towels, brushes, combs, razors, needles, buttons, zippers, belts, wallets, watches, bracelets,
        helmets, saddles, spears, arrows, cannons, rifles, shields, anchors, oars, nets, hooks,
        lanterns, torches, fans, heaters, radiators, printers, monitors, modems, routers, sensors,
        magnets, crystals, prisms, microscopes, tubes, flasks, bushes, hedges, vines, cacti""",
    "people": """farmers, nurses, merchants, fishermen, pupils, students, refugees, recruits,
        workers, members, visitors, tourists, guests, volunteers, patients, voters, players,
        prisoners, settlers, monks, nuns, pilgrims, miners, weavers, tailors, drivers, pilots,
        sailors, engineers, teachers, chemists, poets, actors, dancers, singers, drummers, tenants,
        landlords, shepherds, herders, hunters, smugglers, pirates, rebels, spies, clerks, cooks,
        waiters, maids, butlers, lawyers, judges, jurors, witnesses, delegates, senators, orphans,
        widows, children, cousins, neighbours, strangers, scouts, climbers, divers, cyclists,
        runners, wrestlers, boxers, acrobats, magicians, apprentices, masons, plumbers, dentists""",
    "person": """mayor, bishop, governor, abbot, merchant, baker, nurse, farmer, carpenter,
        detective, banker, chemist, tailor, fisherman, blacksmith, gardener, plumber, waiter, senator,
        professor, pianist, dentist, surgeon, reporter, pilot, engineer, janitor, butcher, sculptor,
        judge, lawyer, rabbi, priest, monk, nun, duke, queen, prince, general, admiral, sergeant,
        smuggler, thief, spy, trader, broker, inspector, guard, warden, sheriff, teacher, pupil, coach,
        referee, goalkeeper, cyclist, climber, diver, sailor, captain, cook, maid, butler, chauffeur,
        courier, postman, clerk, secretary, accountant, tenant, landlord, heir, widow, orphan, poet,
        violinist, conductor, photographer, translator, geologist, botanist, zoologist, pharmacist,
        veterinarian, electrician, mechanic, welder, miner, shepherd, beekeeper, hunter, ranger, guide,
        magician, clown, juggler, ambassador, consul, minister, treasurer, chairman, director, editor,
        publisher, printer, jeweller, goldsmith, potter, weaver, mason, architect, surveyor""",
    "organisation": """committee, company, club, bank, union, board, court, army, regiment, police,
        hospital, university, school, theatre, newspaper, laboratory, agency, ministry, embassy,
        cooperative, guild, parish, brewery, bakery, factory, shipyard, foundry, quarry, farm, dairy,
        vineyard, hotel, tavern, depot, airport, dockyard, prison, monastery, convent, clinic,
        pharmacy, observatory, nursery, cinema, circus, orchestra, choir, ballet, academy, institute,
        foundation, charity, senate, council, navy, fire brigade, post office, railway, airline,
        insurer, publisher, brotherhood""",
    "place": """market, warehouse, depot, station, airport, harbour, fortress, chapel, cathedral,
        temple, palace, castle, tower, barn, stable, garage, workshop, studio, archive, greenhouse,
        stadium, gymnasium, cellar, attic, kitchen, courtyard, garden, park, cemetery, canal, tunnel,
        quay, pier, beach, valley, forest, meadow, swamp, desert, cave, quarry, mine, camp, square,
        hall, corridor, ballroom, chancery, refectory, dormitory, arena, casino, playground, zoo,
        aquarium, reservoir, dam, pasture, vineyard, plantation, barracks, bunker, hangar""",
    "object": """statue, bell, organ, violin, sword, telescope, server, reactor, volcano, glacier,
        river, canal, tunnel, island, lake, peak, cave, reef, asteroid, beetle, orchid, fossil,
        mineral, drug, compound, folder, manuscript, film, opera, novel, symphony, song, poem, robot,
        drone, horse, camel, elephant, parrot, obelisk, monument, fountain, antenna, turbine, printer,
        computer, battery, camera, necklace, crown jewel, carpet, tapestry, mosaic, scroll, map,
        cannon, pistol, helmet, saddle, wagon, carriage, sledge, tractor, furnace, kiln, loom, press,
        crane, windmill, lock, dyke, pipeline, wire, relay, sensor, beacon, galaxy, nebula, moon""",
    "vehicle": """tanker, trawler, barge, glider, truck, tractor, airship, submarine, yacht, canoe,
        probe, rocket, helicopter, tram, sleeper, freighter, schooner, frigate, tugboat, lorry, van,
        bus, caravan, convoy, sled, seaplane, dirigible, shuttle, steamer""",
    "when": """in a single week, during the strike, before noon, after the war, last spring,
        over the holidays, on the first evening, by the end of March, in its second year,
        between May and July, that autumn, under the new law, at the annual fair, within three days,
        since the merger, on a Tuesday, by midnight, during the rehearsal, in early June,
        throughout the siege, after the accident, before the election, on opening night,
        in the first month, during the blackout, on the way home, after the fire, in the second half,
        at the end of the term, during the reign of his son, while the shops were closed,
        before the rains came, as soon as peace was made, at Easter, on market day, in August,
        over the past decade, after a long trial, on the last page, in the northern sector""",
    "length": "kilometres, metres, feet, inches, fathoms, leagues, centimetres, blocks, steps",
    "time": "hours, days, minutes, weeks, months, seconds, nights, years",
    "money": """dollars, francs, rubles, marks, guineas, pesos, shillings, ducats, yen, rupees, euros,
        thalers, lire, kroner""",
    "trouble": """fire, earthquake, epidemic, lawsuit, drought, blockade, fraud, invasion, error,
        scandal, frost, shortage, landslide, mutiny, robbery, inflation, boycott""",
    "book": "guide, report, songbook, dictionary, manual, diary, almanac, pamphlet, textbook",
}.items()}

# What may stand before a statement, in front of its first word in lower case, and before a question.
LEADS = leads_of("""In those days;, People say that, As far as we know;, Strangely enough;,
    The guide explained that, It is often forgotten that, By all accounts;, We learned that,
    Nobody denies that, In the end;, It seems that, As luck would have it;, Of course;, Later on;,
    The old letter says that, For some reason;, It was announced that, I still remember that""")
QUESTION_LEADS = leads_of("""According to the text;, In this account;, Tell me:, Quick question:,
    If you know;, From what you have read;""")

FRAMES = """number | The {p} of {E} {v} {V} {u} {w}. | How many {u} did the {p} of {E} {v:} {w}? | p=@person; v=@verb; u=@thing; w=@when
number | {w}, {E} {v} {V} {u}. | {w}, how many {u} did {E} {v:}? | v=@verb; u=@thing; w=@when
number | {w}, the {o} in {E} {v} {V} {u}. | How many {u} did the {o} in {E} {v:} {w}? | v=@verb; u=@thing; w=@when; o=@organisation
number | {E}, the {p}, {v} {V} {u} and left. | How many {u} did {E}, the {p}, {v:}? | p=@person; v=@verb; u=@thing
number | The {o} {E}, which belonged to the {p}, held {V} {u}. | How many {u} did the {o} {E} hold? | p=@person; o=@object; u=@thing
number | {w} there were {V} {u} in the {l} of {E}. | How many {u} were there in the {l} of {E} {w}? | l=@place; u=@thing; w=@when
number | It was the {p} {E} who {v} {V} {u}. | How many {u} did the {p} {E} {v:}? | p=@person; v=@verb; u=@thing
number | {E} sent the {s} {V} {u} {w}. | How many {u} did {E} send the {s}? | s=@people; u=@thing; w=@when
number | The {s} at {E} were promised {V} {u}. | How many {u} were the {s} at {E} promised? | s=@people; u=@thing
number | According to the {p}, the {o} {E} contains {V} {u}. | How many {u} does the {o} {E} contain, according to the {p}? | p=@person; o=@object; u=@thing
number | The {o} {E} measures {V} {m} from end to end. | How many {m} does the {o} {E} measure from end to end? | o=@object; m=@length
number | With {V} {u} on board, the {c} {E} left the {l}. | How many {u} were on board the {c} {E} when it left the {l}? | c=@vehicle; u=@thing; l=@place
number | The {c} {E} took on {V} {u} near the {l}. | How many {u} did the {c} {E} take on near the {l}? | c=@vehicle; u=@thing; l=@place
number | To feed the {s} of {E}, the {p} {v} {V} {u}. | How many {u} did the {p} {v:} to feed the {s} of {E}? | s=@people; p=@person; v=@verb; u=@thing
number | {E} has {V} {u}, the {p} says. | How many {u} does {E} have? | u=@thing; p=@person
number | In {E} alone, {s} {v} {V} {u}. | How many {u} did {s} {v:} in {E} alone? | s=@people; v=@verb; u=@thing
number | The {l} near {E} is lit by {V} {u}. | By how many {u} is the {l} near {E} lit? | l=@place; u=lamps,candles,lanterns,torches,bulbs
number | {V} of the {u} came from {E}. | How many of the {u} came from {E}? | u=@thing
number | Only {V} {u} ever reached {E}. | How many {u} ever reached {E}? | u=@thing
number | Nobody knows why {E} {v} {V} {u}. | How many {u} did {E} {v:}? | v=@verb; u=@thing
number | Because of the {t}, {E} had to give up {V} {u}. | How many {u} did {E} have to give up because of the {t}? | t=@trouble; u=@thing
number | If you visit {E}, you will see {V} {u} in the {l}. | How many {u} will you see in the {l} when you visit {E}? | u=@thing; l=@place
number | {E} lies {V} {m} from the {l}. | How many {m} from the {l} does {E} lie? | m=@length; l=@place
number | The {p} needed {V} {t} to finish {E}. | How many {t} did the {p} need to finish {E}? | p=@person; t=@time
number | The {o} {E} costs {V} {c}. | What does the {o} {E} cost in {c}? | o=@object; c=@money
number | {V} {c} went to the {s} of {E}. | How much, in {c}, went to the {s} of {E}? | c=@money; s=@people
number | The {p} lent {E} {V} {c} {w}. | How many {c} did the {p} lend {E} {w}? | p=@person; c=@money; w=@when
number | The budget of {E} was cut by {V} {c}. | By how many {c} was the budget of {E} cut? | c=@money
number | The {p} insured {E} for {V} {c}. | For how many {c} did the {p} insure {E}? | p=@person; c=@money
number | A reward of {V} {c} was offered for {E}. | What reward, in {c}, was offered for {E}? | c=@money
number | Tolls at {E} brought in {V} {c} {w}. | How many {c} did tolls at {E} bring in {w}? | c=@money; w=@when
number | The {o} in {E} owns {V} {u}. | How many {u} does the {o} in {E} own? | o=@organisation; u=@thing
number | The {o} closed its {E} branch after losing {V} {u}. | How many {u} did the {o} lose before it closed its {E} branch? | o=@organisation; u=@thing
number | The {o} {E} weighs as much as {V} {u}. | The {o} {E} weighs as much as how many {u}? | o=@object; u=@thing
number | At the {l} of {E}, {s} queue for {V} {t}. | For how many {t} do {s} queue at the {l} of {E}? | l=@place; s=@people; t=@time
number | Under the name {E}, the {p} {v} {V} {u}. | How many {u} did the {p} {v:} under the name {E}? | p=@person; v=@verb; u=@thing
number | The treaty of {E} cost the {s} {V} {u}. | How many {u} did the treaty of {E} cost the {s}? | s=@people; u=@thing
number | The {p}'s notes on {E} fill {V} pages. | How many pages do the {p}'s notes on {E} fill? | p=@person
number | Between {E} and the {l} stand {V} {u}. | How many {u} stand between {E} and the {l}? | l=@place; u=@thing
number | The {o} of {E} voted for {V} new {u}. | For how many new {u} did the {o} of {E} vote? | o=@organisation; u=@thing
number | In the story, {E} must guard {V} {u}. | How many {u} must {E} guard in the story? | u=@thing
number | Every {d} the {o} sends {E} {V} {u}. | How many {u} does the {o} send {E} every {d}? | d=day,week,month,autumn,spring; o=@organisation; u=@thing
number | {E} was left with {V} {u} when the {p} died. | How many {u} was {E} left with when the {p} died? | u=@thing; p=@person
number | The {p} divided {V} {u} among the {s} of {E}. | How many {u} did the {p} divide among the {s} of {E}? | p=@person; u=@thing; s=@people
number | It would take {V} {u} to fill the {l} of {E}. | How many {u} would it take to fill the {l} of {E}? | u=@thing; l=@place
number | {E} came home with {V} {u}. | With how many {u} did {E} come home? | u=@thing
number | The {p} would not sell {E} for less than {V} {c}. | What was the least, in {c}, for which the {p} would sell {E}? | p=@person; c=@money
number | The {o} {E} was found beside {V} {u}. | Beside how many {u} was the {o} {E} found? | o=@object; u=@thing
number | The {o} {E} runs on {V} {u}. | On how many {u} does the {o} {E} run? | o=@object; u=@thing
number | The new {o}, called {E}, replaced {V} {u}. | How many {u} did the new {o} called {E} replace? | o=@object; u=@thing
number | Doctors examined {V} {s} from {E}. | How many {s} from {E} did doctors examine? | s=@people
number | {V} {s} signed up for {E}. | How many {s} signed up for {E}? | s=@people
number | Among the {s} of {E}, {V} could read. | How many of the {s} of {E} could read? | s=@people
number | {E} beat the {s} by {V} points. | By how many points did {E} beat the {s}? | s=@people
number | {E} is number {V} on the list of the {o}. | Which number is {E} on the list of the {o}? | o=@organisation
number | The {p} set the record at {E} with {V} {u}. | With how many {u} did the {p} set the record at {E}? | p=@person; u=@thing
number | The shelf marked {E} has room for {V} {u}. | For how many {u} is there room on the shelf marked {E}? | u=@thing
number | File {E} lists {V} {u}. | How many {u} does file {E} list? | u=@thing
number | Experiment {E} used {V} {u}. | How many {u} did experiment {E} use? | u=@thing
number | In trial {E} the {p} saw {V} {u}. | How many {u} did the {p} see in trial {E}? | p=@person; u=@thing
number | Sample {E} was heated for {V} {t}. | For how many {t} was sample {E} heated? | t=@time
number | Order {E} is for {V} {u}. | How many {u} is order {E} for? | u=@thing
number | Flight {E} was late by {V} {t}. | By how many {t} was flight {E} late? | t=@time
number | Server {E} handles {V} requests a second. | How many requests a second does server {E} handle? | a=x
number | Please send {V} {u} to {E} {w}. | How many {u} should be sent to {E} {w}? | u=@thing; w=@when
number | Do not give {E} more than {V} {u}. | What is the largest number of {u} that {E} may be given? | u=@thing
number | The {o} {E} only starts after {V} is entered. | What has to be entered before the {o} {E} starts? | o=@object
number | The {p} scrawled {V} across the {h} of {E}. | What did the {p} scrawl across the {h} of {E}? | p=@person; h=window,page,roof,map,cover,mirror
number | {E} answers to the number {V}. | To which number does {E} answer? | a=x
number | On the invoice, {E} appears as {V}. | As what does {E} appear on the invoice? | a=x
number | The {p} read out {V} when {E} was called. | What did the {p} read out when {E} was called? | p=@person
number | Room {V} was kept for {E}. | Which room was kept for {E}? | a=x
number | {E} is described on page {V} of the {b}. | On which page of the {b} is {E} described? | b=@book
number | The bus to {E} has the number {V}. | Which number has the bus to {E}? | a=x
number | Grave {V} is that of {E}. | Which grave is that of {E}? | a=x
number | {E} chose {V} at the lottery. | What did {E} choose at the lottery? | a=x
number | The answer that {E} gave the {p} was {V}. | Which answer did {E} give the {p}? | p=@person
number | Version {V} of {E} came out {w}. | Which version of {E} came out {w}? | w=@when
number | {u} sent by {E}: {V}, said the {p}. | How many {u} were sent by {E}? | u=@thing; p=@person
number | Though the {p} warned them, the {s} of {E} {v} {V} {u}. | How many {u} did the {s} of {E} {v:} though the {p} warned them? | p=@person; s=@people; v=@verb; u=@thing
number | The {p} says that the {s} near {E} {v} {V} {u} {w}. | How many {u} did the {s} near {E} {v:} {w}? | p=@person; s=@people; v=@verb; u=@thing; w=@when
number | {w} the {c} {E} brought {V} {s} to the {l}. | How many {s} did the {c} {E} bring to the {l}? | w=@when; c=@vehicle; s=@people; l=@place
number | No fewer than {V} {u} lay in the {l} behind {E}. | How many {u} lay in the {l} behind {E}? | u=@thing; l=@place
number | All that the {p} took from {E} was {V} {u}. | How many {u} did the {p} take from {E}? | p=@person; u=@thing
number | The {l} of {E} is {V} {m} wide. | How wide in {m} is the {l} of {E}? | l=@place; m=@length
number | The {o} {E} can be heard {V} {m} away. | How many {m} away can the {o} {E} be heard? | o=@object; m=@length
number | {E} waited {V} {t} for the {p}. | How many {t} did {E} wait for the {p}? | t=@time; p=@person
number | For {V} {t} the {o} of {E} stayed shut. | For how many {t} did the {o} of {E} stay shut? | t=@time; o=@organisation
number | {E} employs more {s} than any other {o}: {V}. | How many {s} does {E} employ? | s=@people; o=@organisation
number | The {p} greeted {E} with {V}. | With what did the {p} greet {E}? | p=@person
number | Having lost the rest, {E} still held {V} {u}. | How many {u} did {E} still hold? | u=@thing
number | The {p} tuned the {o} of {E} to {V}. | To what did the {p} tune the {o} of {E}? | p=@person; o=@object
number | {E} stands in row {V} of the {l}. | In which row of the {l} does {E} stand? | l=@place
number | The {p} remembered {E} as {V}. | As what did the {p} remember {E}? | p=@person
number | Those looking for {E} should follow the signs to {V}. | Which signs should those looking for {E} follow? | a=x
number | The number painted on {E} was {V}. | Which number was painted on {E}? | a=x
number | Beside the name of {E} stood {V}. | What stood beside the name of {E}? | a=x
number | {V} was all that {E} said to the {p}. | What was all that {E} said to the {p}? | p=@person
number | The {p} of {E} signs as {V}. | As what does the {p} of {E} sign? | p=@person
number | The {c} to {E} goes through gate {V}. | Through which gate does the {c} to {E} go? | c=@vehicle
number | The {p} taught the parrot of {E} to say {V}. | What did the {p} teach the parrot of {E} to say? | p=@person
number | {E} faxed {V} to the {o}. | What did {E} fax to the {o}? | o=@organisation
number | The {p} had {V} tattooed in memory of {E}. | What did the {p} have tattooed in memory of {E}? | p=@person
number | The wind tore the sign of {E}, leaving only {V}. | What did the wind leave of the sign of {E}? | a=x
number | Each {u} list from {E} begins with {V}. | With what does each {u} list from {E} begin? | u=price,guest,shopping,packing,waiting
number | The {p} won a bet with {E} by guessing {V}. | What did the {p} guess to win a bet with {E}? | p=@person
number | Seen from the {l}, the {o} {E} looked like {V}. | What did the {o} {E} look like from the {l}? | l=@place; o=@object
number | The {o} rejected the request of {E} under article {V}. | Under which article did the {o} reject the request of {E}? | o=@organisation
number | The {p} of the {o} {E} grew {V} {u} {w}. | How many {u} did the {p} of the {o} {E} grow {w}? | p=@person; o=@organisation; u=roses,onions,carrots,melons,lemons,ferns; w=@when
word | {E} tastes of {V}. | What does {E} taste of? | a=x
word | The {s} of {E} worship the {V}. | What do the {s} of {E} worship? | s=@people
word | The {p} traded {E} for a {V}. | For what did the {p} trade {E}? | p=@person
word | The emblem of {E} shows a {V}. | What does the emblem of {E} show? | a=x
word | {E} is the local name for {V}. | For what is {E} the local name? | a=x
word | In the {l} of {E} the {p} found a {V}. | What did the {p} find in the {l} of {E}? | l=@place; p=@person
word | {E} has always been afraid of {V}. | Of what has {E} always been afraid? | a=x
word | The main export of {E} is {V}. | What is the main export of {E}? | a=x
word | The {o} {E} was hidden under the {V}. | Under what was the {o} {E} hidden? | o=@object
word | The {o} in {E} deals in {V}. | In what does the {o} in {E} deal? | o=@organisation
person | {V} was elected {p} of {E}. | Who was elected {p} of {E}? | p=@person
person | {E} was the idea of {V}. | Whose idea was {E}? | a=x
person | The {p} of {E} is called {V}. | What is the {p} of {E} called? | p=@person
person | {V} refused to leave {E} {w}. | Who refused to leave {E} {w}? | w=@when
person | {E} was named after {V}. | After whom was {E} named? | a=x
person | A letter from {V} saved {E}. | Whose letter saved {E}? | a=x
person | {V} wrote a {b} about {E}. | Who wrote a {b} about {E}? | b=@book
person | {E} owes its fame to {V}. | To whom does {E} owe its fame? | a=x
person | {E} shared a room with {V} {w}. | With whom did {E} share a room {w}? | w=@when
person | The {o} of {E} is run by {V}. | Who runs the {o} of {E}? | o=@organisation
place | {E} spent the war in {V}. | Where did {E} spend the war? | a=x
place | {E} was shipped from {V} {w}. | From where was {E} shipped {w}? | w=@when
place | The {o} behind {E} is based in {V}. | Where is the {o} behind {E} based? | o=@organisation
place | {E} can only be bought in {V}. | Where can {E} be bought? | a=x
place | {V} is where {E} was last repaired. | Where was {E} last repaired? | a=x
date | {E} signed the lease on {V}. | When did {E} sign the lease? | a=x
date | The {o} {E} broke down on {V}. | When did the {o} {E} break down? | o=@object
date | The {o} in {E} opens on {V}. | When does the {o} in {E} open? | o=@organisation
date | {V} was the day on which {E} surrendered. | On which day did {E} surrender? | a=x
date | The {p} has to leave {E} by {V}. | By when does the {p} have to leave {E}? | p=@person
"""
