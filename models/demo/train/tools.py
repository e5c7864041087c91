"""Random tools, the requests a person makes of them, their results, and the conversations around all that."""

import json

import words as w


def schema(kind, description=None, **extra):
    out = {"type": kind}
    if description:
        out["description"] = description
    return out | extra


def phrase_list(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def show(value):
    """A JSON value the way a sentence holds it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return phrase_list([show(v) for v in value])
    return str(value)


class Param:
    """One parameter: its schema, a value, and the words of the request that carry the value."""

    def __init__(self, name, spec, value, phrases):
        self.name, self.spec, self.value, self.phrases = name, spec, value, phrases


def random_param(rng, holdout, taken):
    """A parameter with a generated name; the request names it and its value."""
    while True:
        parts = rng.sample(w.PARAM_WORDS, rng.choice([1, 1, 2]))
        if rng.random() < 0.08:
            parts = [w.pseudo(rng, holdout)]
        name = "_".join(parts)
        if len(parts) == 2 and rng.random() < 0.15:
            name = parts[0] + parts[1].capitalize()
        if name not in taken and (len(parts) == 1 or w.held(name) == holdout):
            break
    said = " ".join(parts)
    kind = rng.choice(["string"] * 5 + ["integer"] * 3 + ["number", "boolean", "enum", "enum", "array"])
    describe = rng.choice([f"The {said}", f"{said.capitalize()} to use", None, None])
    if kind == "enum":
        options = list(rng.choice(w.ENUMS)) if rng.random() < 0.6 else [w.pseudo(rng, holdout) for _ in range(rng.randint(2, 4))]
        spec, value = schema("string", describe, enum=options), rng.choice(options)
    elif kind == "array":
        value = [rng.choice([w.pseudo(rng, holdout), rng.choice(w.THINGS), w.pick(rng, w.NAMES, holdout)]) for _ in range(rng.randint(1, 4))]
        spec = schema("array", describe, items={"type": "string"})
    elif kind == "boolean":
        spec, value = schema("boolean", describe), rng.random() < 0.5
    elif kind == "string":
        spec, value = schema("string", describe), w.word_value(rng, holdout)
    else:
        spec, value = schema(kind, describe), w.integer(rng) if kind == "integer" else w.number(rng)
    v = show(value)
    phrases = [f"with {said} {v}", f"with the {said} {v}", f"{said} {v}", f"{said}: {v}", f"{name}={v}", f"{said} set to {v}", f"using {said} {v}"]
    if kind == "string":
        phrases += [f"with {said} '{v}'", f'{said} "{v}"', f"with '{v}' as the {said}"]
    elif kind == "boolean":
        phrases = [f"with {said} {v}", f"{said}={v}", f"{said} {v}", f"with {said} {'on' if value else 'off'}"]
    elif kind != "array":
        phrases.append(f"with {v} as the {said}")
    return Param(name, spec, value, phrases)


def natural_param(rng, holdout, taken):
    """A parameter whose value a request can hold without naming it: a city, a date, a number of people."""
    city, name = w.pick(rng, w.CITIES, holdout), w.pick(rng, w.NAMES, holdout)
    kinds = [
        (["city", "location", "place"], "string", city, [f"in {city}", f"for {city}", f"at {city}"]),
        (["date", "day"], "string", date := w.date(rng), [f"for {date}", f"on {date}"]),
        (["time"], "string", t := f"{rng.randint(0, 23):02d}:{rng.choice([0, 15, 30, 45]):02d}", [f"at {t}"]),
        (["people", "guests", "seats"], "integer", n := rng.randint(1, 20), [f"for {n} people", f"for {n} guests"]),
        (["recipient", "to", "name", "person"], "string", name, [f"for {name}", f"to {name}"]),
        (["email", "to", "address"], "string", mail := f"{name.lower()}@{w.pseudo(rng, holdout)}.com", [f"to {mail}", f"for {mail}"]),
        (["text", "message", "content", "body"], "string", text := w.sentence(rng, holdout), [f"saying '{text}'", f'with the text "{text}"', f"'{text}'"]),
        (["limit", "count", "max_results"], "integer", n2 := rng.randint(1, 50), [f"limited to {n2}", f"at most {n2}", f"up to {n2}"]),
        (["path", "file"], "string", path := f"{rng.choice(['/tmp/', '', 'src/', '/home/' + name.lower() + '/'])}{w.pseudo(rng, holdout)}.{rng.choice(['txt', 'py', 'md', 'json', 'rs'])}", [f"in {path}", f"from {path}", path]),
        (["id", "order_id", "code"], "string", c := w.code(rng), [f"{c}", f"number {c}", f"with id {c}", f"called {c}"]),
        (["price", "amount"], "number", p := w.number(rng), [f"for {p} euros", f"at {p}"]),
        (["minutes", "duration"], "integer", m := rng.randint(1, 90), [f"for {m} minutes"]),
        (["tags", "items", "names"], "array", items := [rng.choice(w.FOODS + w.THINGS) for _ in range(rng.randint(2, 4))], [f"with {phrase_list(items)}", f"for {phrase_list(items)}"]),
        (["language", "target_language"], "string", lang := rng.choice(w.LANGS), [f"in {lang}", f"to {lang}"]),
    ]
    while True:
        names, kind, value, phrases = rng.choice(kinds)
        pname = rng.choice(names)
        if pname not in taken:
            break
    spec = schema(kind, rng.choice([None, f"The {pname.replace('_', ' ')}", f"{pname.replace('_', ' ').capitalize()} to use"]))
    if kind == "array":
        spec["items"] = {"type": "string"}
    return Param(pname, spec, value, phrases + [f"with {pname.replace('_', ' ')} {show(value)}"])


class Tool:
    """A tool, one request for it with the arguments that the request implies, and one result."""

    def __init__(self, rng, holdout, verb=None, noun=None):
        self.rng, self.holdout = rng, holdout
        for _ in range(80):
            self.verb = verb or rng.choice(list(w.VERBS))
            self.noun = noun or rng.choice(w.NOUNS)
            if w.held(self.verb + self.noun) == holdout:
                break
        v, n = self.verb, self.noun
        self.thing = n
        if rng.random() < 0.2:
            q = rng.choice(w.QUALIFIERS)
            self.thing, n = q + " " + n, q + "_" + n
        style = rng.random()
        if style < 0.78:
            self.name = f"{v}_{n}"
        elif style < 0.88:
            self.name = v + "".join(p.capitalize() for p in n.split("_"))
        elif style < 0.94:
            self.name = f"{n}_{v}"
        else:
            self.name = f"{w.pseudo(rng, holdout)}_{v}_{n}"
        article = rng.choice(["a", "the", "the"])
        self.description = rng.choice([f"{v.capitalize()} {article} {self.thing}", f"{v.capitalize()} {article} {self.thing}.",
                                       f"{v.capitalize()}s {article} {self.thing}", f"Use this to {v} {article} {self.thing}"])
        self.params, taken = [], set()
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 2, 3, 3, 4])):
            make = natural_param if rng.random() < 0.5 else random_param
            self.params.append(make(rng, holdout, taken))
            taken.add(self.params[-1].name)
        self.required = [p.name for p in self.params if rng.random() < 0.75]
        self.given = [p for p in self.params if p.name in self.required or rng.random() < 0.5]
        self.arguments = {p.name: p.value for p in self.given}

    def offer(self):
        params = {"type": "object", "properties": {p.name: p.spec for p in self.params}}
        if self.required or self.rng.random() < 0.7:
            params["required"] = self.required
        if self.rng.random() < 0.05:
            params["additionalProperties"] = False
        function = {"name": self.name, "description": self.description, "parameters": params}
        if self.rng.random() < 0.08:
            del function["description"]
        return {"type": "function", "function": function}

    def call(self):
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def request(self):
        """The request without the polite words around it."""
        rng = self.rng
        if rng.random() < 0.06:
            said = [f"{p.name}={show(p.value)}" for p in self.given]
            return f"call {self.name}" + (" with " + ", ".join(said) if said else "")
        given = list(self.given)
        if rng.random() < 0.4:
            rng.shuffle(given)
        det = rng.choice(["the", "a", "the", "my"]) + " " if rng.random() < 0.85 else ""
        verb = self.verb if rng.random() < 0.5 else rng.choice(w.VERBS[self.verb])
        out, last = f"{verb} {det}{self.thing}", ""
        for p in given:
            phrase = rng.choice(p.phrases)
            joint = " and " if last and last.split(" ")[0] == phrase.split(" ")[0] == "with" and rng.random() < 0.6 else rng.choice([" ", " ", ", "])
            out, last = out + joint + phrase, phrase
        return out

    def result(self):
        """(the tool's answer as text, the assistant's sentence about it)"""
        rng, holdout = self.rng, self.holdout
        form = rng.random()
        if form < 0.08:
            why = rng.choice(["not found", "permission denied", "timeout", f"{w.pseudo(rng, holdout)} is not available", "invalid value"])
            return json.dumps({"error": why}), f"That did not work: {why}."
        if form < 0.25:
            text = rng.choice([w.sentence(rng, holdout), f"{w.word_value(rng, holdout)}", f"{rng.choice(w.ADJ)}, {rng.randint(-9, 40)} degrees",
                               str(w.integer(rng)), str(w.number(rng))])
            return text, f"The result is: {text}"
        if form < 0.37:
            items = [w.word_value(rng, holdout) for _ in range(rng.randint(1, 5))]
            return json.dumps(items, ensure_ascii=False), f"I found {len(items)}: {phrase_list(items)}."
        keys = rng.sample(w.PARAM_WORDS, rng.randint(1, 3))
        if rng.random() < 0.3:
            keys[0] = self.noun
        result, said = {}, []
        done = rng.random() < 0.35
        if done:
            result["status"] = rng.choice(["ok", "done", "success"])
        for key in keys:
            value = rng.choice([w.word_value(rng, holdout), w.word_value(rng, holdout), w.integer(rng), w.number(rng)])
            if self.arguments and rng.random() < 0.15:
                key, value = rng.choice(list(self.arguments.items()))
            if key not in result:
                result[key] = value
                said.append(f"the {key.replace('_', ' ')} is {show(value)}")
        if not said:
            return json.dumps(result), "Done."
        text = phrase_list(said) + "."
        return json.dumps(result, ensure_ascii=False), ("Done, " + text if done else text[0].upper() + text[1:])


POLITE = ["{}", "{}", "{}", "Please {}", "Can you {}?", "Could you {}?", "I want you to {}", "{}, please", "Hey, {}", "I need you to {}",
          "I would like to {}", "Would you {}?", "{} for me"]
SYSTEMS = ["You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant with access to tools.", "You can call functions.",
           "Be brief.", "You are an agent. Use the tools when they fit.", "Answer the user.", "Use the tools to answer."]


def polite(rng, text):
    out = text if text.endswith("?") else rng.choice(POLITE).replace("{}", text)
    if rng.random() < 0.75:
        out = out[0].upper() + out[1:]
    if out[-1] not in ".?!'\"" and rng.random() < 0.5:
        out += rng.choice([".", ".", "!", "?"])
    return out


def other_tools(rng, holdout, tool, count):
    """Tools that differ from `tool`, some of them by the verb or the noun only."""
    out = []
    while len(out) < count:
        near = rng.random()
        noun = tool.noun if near < 0.25 and tool.noun in w.NOUNS else None
        verb = tool.verb if 0.25 <= near < 0.5 and tool.verb in w.VERBS else None
        other = Tool(rng, holdout, verb, noun)
        same = {other.name} & ({t.name for t in out} | {tool.name})
        if not same and (other.verb, other.noun) != (tool.verb, tool.noun) and not confusable(other, tool):
            out.append(other)
    return out


def confusable(a, b):
    """Two tools that the same words could ask for."""
    said = [set(w.VERBS.get(t.verb, [])) | {t.verb} for t in (a, b)]
    fixed = hasattr(a, "asks") or hasattr(b, "asks")
    return a.noun == b.noun and (fixed or bool(said[0] & said[1]))


def opening(rng):
    return [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.45 else []


def call_message(*tools):
    return {"role": "assistant", "content": "", "tool_calls": [t.call() for t in tools]}


def missing(rng, holdout, chat):
    """A request for which no offered tool is right: answered with words."""
    tool = Tool(rng, holdout)
    offered = other_tools(rng, holdout, tool, rng.randint(1, 3))
    if rng.random() < 0.65:
        question, answer = chat(rng, holdout)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        while any(t.noun == tool.noun or t.verb == tool.verb for t in offered):
            offered = other_tools(rng, holdout, tool, len(offered))
        turns = [{"role": "user", "content": polite(rng, tool.request())},
                 {"role": "assistant", "content": f"None of my tools can {tool.verb} the {tool.thing}."}]
    return {"tools": [t.offer() for t in offered], "messages": opening(rng) + turns, "case": "none"}


def tool_talk(rng, holdout, chat, known):
    """A conversation with tools: one or several turns, sometimes two calls at once, sometimes a call after a result."""
    if rng.random() < 0.14:
        return missing(rng, holdout, chat)
    tool = known(rng, holdout) if rng.random() < 0.25 else Tool(rng, holdout)
    others = other_tools(rng, holdout, tool, rng.choice([0, 0, 1, 1, 2, 2, 3]))
    messages, case = opening(rng), "single"
    offered = [tool] + others
    if rng.random() < 0.15:
        question, answer = chat(rng, holdout)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    active = [t for t in others if rng.random() < 0.33][:1]
    if active and rng.random() < 0.5:  # two calls in one turn
        case, second = "parallel", active[0]
        ask = f"{tool.request()} {rng.choice(['and', 'and also', 'and then'])} {second.request()}"
        turns = [(ask, [tool, second])]
    else:
        if active:
            case = "several"
        turns = [(t.request(), [t]) for t in [tool] + active]
    for ask, called in turns:
        messages.append({"role": "user", "content": polite(rng, ask)})
        reply = call_message(*called)
        if rng.random() < 0.06:
            messages[-1]["content"] += " /think"
            reply["reasoning_content"] = f"The user wants to {called[0].verb} the {called[0].thing}. The tool {called[0].name} fits."
        messages.append(reply)
        results = [t.result() for t in called]
        messages += [{"role": "tool", "content": r[0]} for r in results]
        messages.append({"role": "assistant", "content": " ".join(r[1] for r in results)})
        if rng.random() < 0.25:
            messages.append({"role": "user", "content": rng.choice(["Thanks", "Thank you!", "thanks", "Great, thank you", "ok thanks"])})
            messages.append({"role": "assistant", "content": "You are welcome."})
    if rng.random() < 0.15:
        question, answer = chat(rng, holdout)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rng.shuffle(offered)
    return {"tools": [t.offer() for t in offered], "messages": messages, "case": case}
