"""Hand-written tools of the kind that programs really offer, with the natural ways to ask for them."""

import json

import words as w
from tools import Param, Tool, schema, show


def param(rng, names, kind, value, description=None, **extra):
    return Param(rng.choice(names.split()), schema(kind, rng.choice([description, None]), **extra), value, [])


class Known(Tool):
    """A tool with fixed ways of asking; `asks` hold {0}, {1} … for the values."""

    def __init__(self, rng, holdout, verb, noun, names, description, params, asks, optional=None):
        self.rng, self.holdout, self.verb, self.noun, self.thing = rng, holdout, verb, noun, noun
        self.name, self.description, self.params = rng.choice(names.split()), description, params
        self.required = [p.name for p in params]
        self.given = list(params)
        self.arguments = {p.name: p.value for p in params}
        self.asks = asks
        if optional and rng.random() < 0.5:
            extra, said = optional
            self.params = params + [extra]
            if rng.random() < 0.4:
                self.given, self.arguments = self.params, self.arguments | {extra.name: extra.value}
                self.asks = [a.rstrip("?.") + " " + said for a in asks]

    def request(self):
        ask = self.rng.choice(self.asks)
        return ask.format(*[show(p.value) for p in self.given])

    def result(self):
        rng = self.rng
        if self.noun == "weather" and rng.random() < 0.7:
            sky, t = rng.choice(["sunny", "cloudy", "rainy", "foggy", "windy", "snowing", "clear"]), rng.randint(-10, 38)
            if rng.random() < 0.3:
                return f"{sky}, {t} degrees", f"The result is: {sky}, {t} degrees"
            key = rng.choice(["condition", "sky", "conditions", "summary"])
            tkey = rng.choice(["temperature", "temp", "temperature_c"])
            return json.dumps({tkey: t, key: sky}), f"The {tkey.replace('_', ' ')} is {t} and the {key} is {sky}."
        return super().result()


def known(rng, holdout):
    city, other = w.pick(rng, w.CITIES, holdout), w.pick(rng, w.CITIES, holdout)
    name, text, when = w.pick(rng, w.NAMES, holdout), w.sentence(rng, holdout), w.date(rng)
    word = w.pseudo(rng, holdout)
    mail = f"{name.lower()}@{word}.{rng.choice(['com', 'org', 'net'])}"
    path = rng.choice(["/tmp/", "", "src/", "docs/", f"/home/{name.lower()}/"]) + word + rng.choice([".txt", ".py", ".md", ".json", ".rs", ".toml"])
    a, b, amount, minutes = rng.randint(0, 999), rng.randint(0, 999), rng.choice([w.number(rng), w.integer(rng)]), rng.randint(1, 120)
    topic = rng.choice([f"{rng.choice(w.ADJ)} {rng.choice(w.THINGS)}", f"{name} {word}", f"the history of {city}", f"{rng.choice(w.FOODS)} prices", word])
    lang, unit = rng.choice(w.LANGS), rng.choice(["celsius", "fahrenheit"])
    p = lambda *args, **kw: param(rng, *args, **kw)
    op = rng.choice("+-*/")
    expression = rng.choice([f"{a} {op} {b}", f"{a} {op} {b}", f"({a} + {b}) * {rng.randint(2, 9)}", f"{a}{op}{b}"])
    command = rng.choice([f"ls {path}", "git status", "cargo test", "df -h", f"cat {path}", "uptime", f"echo {word}", f"grep {word} {path}", "mlx-status"])
    c1, c2 = rng.sample(["USD", "EUR", "GBP", "JPY", "CHF", "SEK"], 2)
    make = lambda *args, **kw: Known(rng, holdout, *args, **kw)
    choice = rng.randrange(19)
    if choice <= 2:
        asks = ["what is the weather in {0}?", "what's the weather in {0}?", "what's the weather like in {0}?", "weather in {0}", "how is the weather in {0} today?",
                "tell me the weather in {0}", "what is the weather like in {0} right now?", "is it raining in {0}?", "get the weather for {0}", "how warm is it in {0}?",
                "what's the current weather in {0}?", "what is the temperature in {0}?", "do I need an umbrella in {0}?"]
        return make("get", "weather", "get_weather get_current_weather weather getWeather fetch_weather", rng.choice(["Get the weather for a city", "Get the current weather", "Get the current weather in a given location", "Current weather of a place", "Returns the weather"]),
                    [p("city location city location place", "string", city, "Name of the city")], asks, (Param(rng.choice(["unit", "units"]), schema("string", enum=["celsius", "fahrenheit"]), unit, []), "in {1}"))
    if choice == 3:
        return make("get", "time", "get_time get_current_time current_time", "Get the current time in a city", [p("city location timezone", "string", city)],
                    ["what time is it in {0}?", "what's the time in {0}?", "tell me the time in {0}", "current time in {0}"])
    if choice == 4:
        return make("calculate", "expression", "calculate calculator evaluate", "Evaluate an arithmetic expression", [p("expression expr", "string", expression)],
                    ["what is {0}?", "calculate {0}", "compute {0}", "how much is {0}?", "evaluate {0}"])
    if choice == 5:
        return make("add", "numbers", rng.choice(["add", "add_numbers", "sum"]), "Add two numbers", [Param("a", schema(rng.choice(["integer", "number"])), a, []), Param("b", schema(rng.choice(["integer", "number"])), b, [])],
                    ["what is {0} plus {1}?", "add {0} and {1}", "what is {0} + {1}?", "the sum of {0} and {1}"])
    if choice == 6:
        return make("multiply", "numbers", "multiply multiply_numbers", "Multiply two numbers", [Param("a", schema("integer"), a, []), Param("b", schema("integer"), b, [])],
                    ["what is {0} times {1}?", "multiply {0} by {1}", "multiply {0} and {1}", "what is {0} * {1}?"])
    if choice == 7:
        return make("send", "email", "send_email send_mail email", "Send an email", [p("to recipient", "string", mail), p("body message text subject", "string", text)],
                    ["send an email to {0} saying '{1}'", 'email {0}: "{1}"', "write to {0}: {1}", 'send "{1}" to {0}', "mail {0} that '{1}'"])
    if choice == 8:
        return make("search", "web", "search_web web_search search google_search", "Search the web", [p("query q", "string", topic)],
                    ["search the web for {0}", "search for {0}", "look up {0}", "find information about {0}", "google {0}", "what can you find about {0}?"],
                    (Param("limit", schema("integer"), minutes, []), "with at most {1} results"))
    if choice == 9:
        return make("read", "file", "read_file open_file cat", "Read a file", [p("path file filename", "string", path)],
                    ["read {0}", "show me {0}", "what is in {0}?", "open the file {0}", "read the file {0}", "print {0}", "what does {0} say?"])
    if choice == 10:
        return make("write", "file", "write_file save_file create_file", "Write text to a file", [p("path file", "string", path), p("content text", "string", text)],
                    ["write '{1}' to {0}", "save '{1}' in {0}", 'create {0} with the text "{1}"', "put '{1}' into {0}"])
    if choice == 11:
        return make("run", "command", "run_command shell bash execute run", "Run a shell command", [p("command cmd", "string", command)],
                    ["run {0}", "execute {0}", "run `{0}`", "run the command {0}", "please run '{0}'"])
    if choice == 12:
        return make("set", "timer", "set_timer start_timer", "Set a timer", [p("minutes duration", "integer", minutes)],
                    ["set a timer for {0} minutes", "{0} minute timer", "wake me in {0} minutes", "start a {0} minutes timer"])
    if choice == 13:
        return make("convert", "currency", "convert_currency exchange", "Convert money", [Param("amount", schema("number"), amount, []), p("from from_currency source", "string", c1), p("to_currency target", "string", c2)],
                    ["convert {0} {1} to {2}", "how much is {0} {1} in {2}?", "exchange {0} {1} for {2}", "{0} {1} in {2}"])
    if choice == 14:
        return make("translate", "text", "translate translate_text", "Translate text", [p("text", "string", text), p("language target_language to", "string", lang)],
                    ["translate '{0}' to {1}", 'translate "{0}" into {1}', "how do you say '{0}' in {1}?"])
    if choice == 15:
        return make("play", "song", "play_music play_song", "Play music", [p("song title query", "string", topic)], ["play {0}", "put on {0}", "play the song {0}", "I want to hear {0}"])
    if choice == 16:
        return make("create", "event", "create_event add_event schedule_meeting", "Create a calendar event", [p("title name", "string", text), p("date day", "string", when)],
                    ["create an event '{0}' on {1}", "put '{0}' in my calendar for {1}", "schedule '{0}' for {1}", "add '{0}' on {1} to my calendar"])
    if choice == 17:
        ticker = "".join(rng.choice("ABCDEFGHIKLMNOPRSTUVWX") for _ in range(rng.randint(3, 4)))
        return make("get", "stock", "get_stock_price stock_price", "Get the price of a stock", [p("symbol ticker", "string", ticker)],
                    ["what is the price of {0}?", "stock price of {0}", "how is {0} doing?", "what does {0} cost?", "get the price of {0}"])
    return make("get", "distance", "get_distance get_route directions", "Distance between two cities", [p("from origin start", "string", city), p("to destination end", "string", other)],
                ["how far is it from {0} to {1}?", "distance from {0} to {1}", "how do I get from {0} to {1}?", "route from {0} to {1}"])
