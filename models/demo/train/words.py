"""Word lists and random values. A tenth of all names is held out for the evaluation."""

import zlib

CITIES = """Paris London Berlin Madrid Rome Vienna Zurich Geneva Oslo Stockholm Helsinki Copenhagen Dublin Lisbon Porto
Athens Warsaw Prague Budapest Brussels Amsterdam Munich Hamburg Cologne Lyon Milan Naples Turin Seville Valencia Tokyo
Osaka Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Singapore Jakarta Manila Hanoi Sydney Melbourne Perth Auckland
Toronto Montreal Vancouver Boston Chicago Seattle Denver Austin Dallas Houston Miami Atlanta Portland Cairo Nairobi
Lagos Accra Casablanca Istanbul Ankara Dubai Lima Bogota Santiago Quito Havana Basel Bern Tallinn Riga Vilnius
Reykjavik|New York|San Francisco|Los Angeles|Buenos Aires|Cape Town|Hong Kong|Tel Aviv|Mexico City|Rio de Janeiro"""
CITIES = [c for part in CITIES.split("|") for c in ([part] if part.count(" ") < 3 else part.split())]
CAPITALS = dict(p.split(":") for p in """France:Paris Germany:Berlin Spain:Madrid Italy:Rome Austria:Vienna
Switzerland:Bern Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Portugal:Lisbon
Greece:Athens Poland:Warsaw Hungary:Budapest Belgium:Brussels Japan:Tokyo China:Beijing India:Delhi Thailand:Bangkok
Canada:Ottawa Australia:Canberra Egypt:Cairo Kenya:Nairobi Peru:Lima Chile:Santiago Cuba:Havana Turkey:Ankara
Latvia:Riga Estonia:Tallinn Iceland:Reykjavik Vietnam:Hanoi""".split())
NAMES = """Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karin Leo Mia Noah Olga Paul Rosa Simon Tina Victor Wanda
Alice Bob Carol Dan Eve Frank Grace Henry Iris Jack Kate Liam Mary Nina Oscar Peter Quinn Ruth Sam Tom Uma Vera Walter
Yara Zoe Lena Max Nora Omar Priya Ravi Sofia Yuki Chen Amir Elif Ivan Marta Luca Giulia Pierre Jean John Julia Sarah
Lukas Lisa Daniel Maria""".split()
ADJ = """red blue green small large old new fast slow quiet bright dark warm cold happy clever brave calm gentle golden
silver wooden round simple strange early late open secret lucky busy tall deep wild young fresh heavy light""".split()
THINGS = """apple river mountain garden window letter bridge castle forest island lamp mirror ocean piano rabbit ship tiger
tower violin wolf horse clock key box door book table chair stone flower cloud star moon train road house bird fox cat
dog mouse bear fish tree leaf cup plate spoon coat hat shoe ring map coin drum kite boat wheel rope ladder basket""".split()
FOODS = "bread milk eggs cheese apples rice pasta tea coffee sugar salt butter honey onions carrots lemons olives soup".split()
COLOURS = "red blue green yellow orange purple black white pink brown grey silver".split()
LANGS = "English French German Spanish Italian Polish Turkish Japanese Greek Dutch Swedish Finnish".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
FIRST = "b c d f g h k l m n p r s t v w z br cr dr fl gr kl pl st tr th sh ch qu".split()
MID = "a e i o u ai ea io ou".split()
LAST = "n r s l m t k d x th ng nd rk st sh ff p b g".split()

VERBS = {  # the verb inside a tool's name: how a person says it
    "get": ["get", "fetch", "show me", "give me", "look up", "tell me"], "search": ["search", "find", "look for", "search for"],
    "create": ["create", "make", "add", "set up"], "delete": ["delete", "remove", "erase"], "send": ["send", "deliver"],
    "book": ["book", "reserve"], "update": ["update", "change", "edit"], "list": ["list", "show all", "show me all"],
    "start": ["start", "launch", "begin"], "stop": ["stop", "end", "halt"], "open": ["open"], "close": ["close", "shut"],
    "check": ["check", "verify", "look at"], "order": ["order", "buy"], "schedule": ["schedule", "plan"],
    "cancel": ["cancel", "call off"], "read": ["read", "show me"], "write": ["write", "save"], "play": ["play", "put on"],
    "set": ["set", "change"], "count": ["count", "how many are in"], "measure": ["measure"], "print": ["print"],
    "share": ["share"], "move": ["move"], "copy": ["copy", "duplicate"], "rename": ["rename"], "upload": ["upload"],
    "download": ["download", "fetch"], "translate": ["translate"], "convert": ["convert"], "calculate": ["calculate", "compute"],
    "track": ["track", "follow"], "rate": ["rate"], "lock": ["lock"], "unlock": ["unlock"], "assign": ["assign"],
    "review": ["review"], "archive": ["archive"], "restore": ["restore"], "compare": ["compare"], "pay": ["pay"],
}
NOUNS = """weather forecast flight hotel room table restaurant ticket train taxi car bike parking route map traffic
meeting event reminder alarm timer calendar task note list project document file folder image photo video song playlist
podcast movie book article page message email letter invoice payment order product price stock account balance budget
report chart user profile contact team customer student teacher course lesson exam grade school patient doctor
appointment recipe meal drink pizza grocery garden plant pet lamp light door window thermostat heater fan camera sensor
robot server database backup log process service container job queue model cache token key password certificate network
router device printer package shipment warehouse machine engine battery temperature humidity pressure distance speed
weight currency tax loan insurance license vote survey poll comment review rating badge game score level player quiz
news story quote joke translation dictionary language webpage link domain branch commit issue ticket build release
test deployment cluster node volume snapshot session""".split()
NOUNS = sorted(set(NOUNS))
QUALIFIERS = "user team daily remote local public home office city monthly main guest smart private cloud".split()
PARAM_WORDS = """size mode format color level category priority status region zone group owner author title subject label
name code number type version source target origin destination start end limit offset page count amount quantity total
duration width height depth speed score rating budget price length radius interval delay timeout port path key tag topic
theme style unit currency language country city address street phone email user customer account project folder file room
floor seat ticket order product brand model season day date time month year reason note comment message text query filter
sort direction channel volume brightness temperature""".split()
ENUMS = [["low", "medium", "high"], ["small", "medium", "large"], ["celsius", "fahrenheit"], ["asc", "desc"], ["red", "green", "blue"],
         ["json", "csv", "text"], ["daily", "weekly", "monthly"], ["economy", "business", "first"], ["public", "private"],
         ["north", "south", "east", "west"], ["open", "closed", "pending"], ["fast", "balanced", "careful"], ["on", "off", "auto"],
         ["gold", "silver", "bronze"], ["draft", "final"], ["morning", "afternoon", "evening"], ["metric", "imperial"]]


def held(text):
    """True for the tenth of all names that only the evaluation may use."""
    return zlib.crc32(text.encode()) % 10 == 0


def pick(rng, items, holdout=None):
    """A random item. With holdout False no held-out item; with holdout True a held-out one if there is one."""
    if holdout is None:
        return rng.choice(items)
    for _ in range(60):
        item = rng.choice(items)
        if held(str(item)) == holdout:
            return item
    return item


ALL = sorted(set(" ".join([*CITIES, *NAMES, *ADJ, *THINGS, *FOODS, *COLOURS, *LANGS, *DAYS, *MONTHS, *VERBS, *NOUNS, *PARAM_WORDS, *CAPITALS]).split()))


def fragment(rng):
    """Slices of words, put together. They bring every token into a place where it has to be copied."""
    word = ""
    for _ in range(rng.choice([1, 1, 2])):
        source = rng.choice(ALL)
        start = rng.choice([0, rng.randrange(max(1, len(source) - 1))])
        word += source[start:start + rng.randint(2, 8)].lower()
    shape = rng.random()
    return word.capitalize() if shape < 0.3 else word.upper() if shape < 0.36 else word


def pseudo(rng, holdout, low=2, high=3):
    """A word that no dictionary has, mostly a pronounceable one."""
    while True:
        if rng.random() < 0.3:
            word = fragment(rng)
            if held(word) == holdout:
                return word
            continue
        word = "".join(rng.choice(FIRST) + rng.choice(MID) for _ in range(rng.randint(low - 1, high - 1)))
        word += rng.choice(FIRST) + rng.choice(MID) + rng.choice(LAST)
        if held(word) == holdout:
            return word


def code(rng):
    form = rng.randrange(5)
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    return [letters + "-" + digits, letters + digits, digits, letters.lower() + digits, digits + letters][form]


def sentence(rng, holdout):
    """A short free text, as a message or a title would be."""
    name, thing, adj = pick(rng, NAMES, holdout), rng.choice(THINGS), rng.choice(ADJ)
    return rng.choice([
        f"I will be {rng.randint(2, 59)} minutes late", f"The {adj} {thing} is ready", f"Call {name} back", f"Buy {rng.choice(FOODS)}",
        f"Meet {name} at the {thing}", f"{name} found the {thing}", f"Happy birthday {name}", f"See you on {rng.choice(DAYS)}",
        f"Please bring the {adj} {thing}", f"The {thing} needs a new {rng.choice(THINGS)}", f"Hello {name}", f"Thank you {name}",
        f"Pick up the {thing}", f"{adj.capitalize()} {thing}", f"Lunch with {name}", f"Water the {rng.choice(THINGS)}",
        f"Is the {thing} {adj}?", f"We need {rng.randint(2, 40)} more {rng.choice(FOODS)}"])


def number(rng):
    return rng.choice([round(rng.uniform(0, 10), 1), round(rng.uniform(0, 500), 2), rng.randint(1, 99) + 0.5, round(rng.uniform(0, 1), 2)])


def integer(rng):
    return rng.choice([rng.randint(1, 12), rng.randint(1, 99), rng.randint(10, 999), rng.randint(1000, 99999)])


def date(rng):
    return rng.choice([f"{rng.randint(2023, 2029)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}", rng.choice(DAYS), "tomorrow", "today",
                       f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"])


def word_value(rng, holdout):
    """A random string value: a word, a name, a code, a place, a path."""
    kind = rng.randrange(9)
    if kind < 2:
        return pseudo(rng, holdout)
    if kind == 2:
        return pseudo(rng, holdout).capitalize()
    if kind == 3:
        return code(rng)
    if kind == 4:
        return pick(rng, NAMES, holdout)
    if kind == 5:
        return pick(rng, CITIES, holdout)
    if kind == 6:
        return rng.choice(ADJ) + " " + rng.choice(THINGS)
    if kind == 7:
        return pick(rng, THINGS + FOODS + COLOURS, holdout)
    return pseudo(rng, holdout).capitalize() + " " + pseudo(rng, holdout).capitalize()
