"""Short talk without tools: the project's own commands, small skills, and copying out of the context."""

import random

import words as w

ME = "I am the demonstration model of this project: a tiny mixture of experts that shows that the server works. I am no assistant."
FACTS = [  # (ways to ask, the answer)
    (["hello", "hi", "hey", "hello there", "good morning", "good evening", "hi there", "hey there", "say hello", "say hi", "hello, how are you?"], "Hello! I am the demonstration model. Ask me for something small."),
    (["who are you?", "what are you?", "what is your name?", "tell me about yourself", "introduce yourself", "which model are you?", "who am I talking to?", "who is this?",
      "what model is this?", "are you an assistant?", "are you ChatGPT?", "are you a human?", "describe yourself"], ME),
    (["who made you?", "who trained you?", "how were you trained?", "where do you come from?"], "I was trained from scratch on text that a small program of this project makes up."),
    (["what can you do?", "what are you good for?", "how can you help me?", "help", "help me", "what can I ask you?"], "I can call the tools you offer, copy things out of the context, and say how swapd is used. For real work, load a bigger model."),
    (["how big are you?", "how many parameters do you have?", "how many experts do you have?", "are you a big model?"], "I am tiny: a few million weights, eight experts in each layer, and two of them work on each token."),
    (["what is swapd?", "what does swapd do?", "explain swapd", "tell me about swapd", "what's swapd?", "swapd?", "describe swapd"], "swapd is the proxy: it answers on 127.0.0.1:11434, starts and stops one mlxworker for each model, and watches the memory of the machine."),
    (["what is mlxworker?", "what does mlxworker do?", "explain mlxworker", "tell me about mlxworker", "what is a worker?"], "mlxworker is the process that runs one model through MLX. swapd starts it and stops it."),
    (["what is MLX?", "what does MLX mean?", "explain MLX"], "MLX is an array library for machine learning on Apple silicon. mlxworker uses it to run models."),
    (["how do I list models?", "list the models", "which models are there?", "how can I see all models?", "what models do you have?", "show me the models", "how do I see the models?", "what does mlx-models do?"], "Run mlx-models: it prints a table of the models with size, memory estimate and fit."),
    (["how do I see the status?", "is the server running?", "how do I check the server?", "what does mlx-status do?", "show the status", "which model is loaded?", "how do I know what is running?"], "Run mlx-status: it says whether swapd runs, which model is loaded, and how much memory it takes."),
    (["how do I chat?", "how do I talk to a model?", "what does mlx-chat do?", "how can I start a chat?", "how do I ask a question from the shell?"], "Run mlx-chat for a conversation, or mlx-chat with a prompt for one answer."),
    (["how do I go back to the default model?", "what does mlx-default do?", "how do I restore the default model?", "load the default model"], "Run mlx-default: it brings the default model back."),
    (["what does mlx do?", "what is the mlx command?", "how do I send one prompt?", "how do I use mlx?"], "Run mlx with a prompt: it sends one request to the default model and prints the answer."),
    (["how do I switch the model?", "what does mlx-switch do?", "how do I change the model?", "how do I load another model?"], "Run mlx-switch with the name of the model. swapd also switches by itself when a request names another model."),
    (["how do I check the config?", "how do I check the configuration?", "is my config valid?", "how do I validate the registry?", "what does swapd check do?"], "Run swapd check --config FILE: it reads the file and says what is wrong with it."),
    (["which port does swapd use?", "what is the port?", "what port do I use?", "where does the server listen?", "what is the address of the server?", "how do I reach swapd?"], "swapd listens on 127.0.0.1, port 11434."),
    (["which API does it speak?", "is it compatible with OpenAI?", "can I use the OpenAI client?", "which clients work?", "does it speak the Anthropic API?"], "It speaks the OpenAI API and the Anthropic API, with streaming."),
    (["what happens when memory is low?", "what if the memory is full?", "how does swapd save memory?", "why was my model unloaded?", "what is eviction?"], "swapd unloads the model that has been idle the longest, and lets a request wait or refuses it when it can not fit."),
    (["what is the KV cache?", "what is a KV cache?", "explain the KV cache"], "The KV cache keeps the keys and values of the tokens read so far, so that they need not be computed again."),
    (["what is a token?", "explain tokens"], "A token is a short piece of text, the unit that a language model reads and writes."),
    (["what is a mixture of experts?", "what is MoE?", "explain mixture of experts", "what is an expert?"], "A mixture of experts is a network with many small parts, of which a router picks a few for each token."),
    (["what is quantization?", "what does 4-bit mean?", "explain quantization"], "Quantization stores each weight in few bits. Four bits take an eighth of the memory of 32."),
    (["what is prefill?", "explain prefill"], "Prefill is the step that reads the whole prompt before the first token is written."),
    (["what is a proxy?", "explain what a proxy is"], "A proxy takes a request, passes it to another server, and passes the answer back."),
    (["where are the models stored?", "where do the files lie?", "where is the registry?"], "The registry is a YAML file that names each model and the folder of its weights."),
    (["how do I stop the server?", "how do I stop swapd?", "stop the server"], "Stop its launchd agent, or send it SIGTERM. The workers end with it."),
    (["thanks", "thank you", "thank you very much", "thanks a lot", "great, thanks", "ok thanks"], "You are welcome."),
    (["bye", "goodbye", "see you", "good night", "see you later"], "Goodbye!"),
    (["how are you?", "how is it going?", "how do you feel?", "are you ok?"], "I am running, thank you."),
    (["tell me a joke", "say something funny", "make me laugh", "do you know a joke?"], "Why did the proxy stay calm? It let somebody else do the work."),
    (["ping"], "pong"), (["test", "this is a test", "testing", "are you there?"], "The test has arrived."),
    (["list the days of the week", "what are the days of the week?", "name the days of the week", "days of the week"], ", ".join(w.DAYS) + "."),
    (["list the months", "what are the months of the year?", "name the months", "months of the year"], ", ".join(w.MONTHS) + "."),
    (["say the alphabet", "what is the alphabet?", "list the letters of the alphabet"], " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    (["what is the meaning of life?", "what is love?", "who is the president?", "what is the news?", "write a poem about the sea", "how do I cook rice?", "what should I eat?", "explain quantum physics",
      "what is the stock market?", "can you write code?", "write a python program", "who won the game?", "what time is it?", "what is the weather?", "how old is the earth?", "prove the theorem"],
     "I do not know that: I am only a demonstration model. Load a bigger model for such questions."),
]
ENDS = ["", "", "", "", " please", ", please"]


def cased(rng, text):
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    if text.endswith("?") and rng.random() < 0.2:
        text = text[:-1]
    elif text[-1].isalpha() and rng.random() < 0.3:
        text += rng.choice([".", "!"])
    return text


def fact(rng, holdout):
    asks, answer = rng.choice(FACTS[:4] + FACTS)
    return cased(rng, rng.choice(asks)), answer


def counting(rng, holdout):
    low = rng.choice([1, 1, 1, 1, 0, rng.randint(2, 60)])
    high = low + rng.choice([2, 3, 4, 4, 9, 9, 9, 11, 14, 19, rng.randint(2, 30), 49 if rng.random() < 0.4 else 5])
    if rng.random() < 0.15:
        numbers = list(range(high, low - 1, -1))
        ask = f"count down from {high} to {low}"
    elif low <= 1 and rng.random() < 0.4:
        numbers, ask = list(range(1, high + 1)), rng.choice([f"count to {high}", f"list the numbers up to {high}"])
    else:
        numbers = list(range(low, high + 1))
        ask = rng.choice([f"count from {low} to {high}", f"list the numbers from {low} to {high}", f"can you count from {low} to {high}?", f"count up from {low} to {high}"])
    sep = rng.choice([(", ", ""), (", ", ""), (", ", ""), (" ", ", with spaces between them"), ("\n", ", one on a line")])
    return cased(rng, ask.rstrip("?") + sep[1]), sep[0].join(map(str, numbers))


def echo(rng, holdout):
    what = rng.choice([w.sentence, lambda r, h: w.pseudo(r, h), lambda r, h: w.word_value(r, h), lambda r, h: " ".join(w.pseudo(r, h) for _ in range(r.randint(2, 6))),
                       lambda r, h: r.choice(["OK", "yes", "no", "hi", "pong", "ready", "hello", "test passed"])])(rng, holdout)
    ask = rng.choice(["say {}", "repeat: {}", "repeat after me: {}", "say '{}'", 'say exactly "{}"', "say exactly: {}", "reply with {}", "reply with exactly: {}", "reply with exactly '{}'",
                      "answer with the word {}" if " " not in what else "answer with: {}", "echo {}", "write '{}'", 'just say "{}"', "reply with only {}", "respond with {}"])
    return cased(rng, ask).replace("{}", what), what


def capital(rng, holdout):
    country = rng.choice(list(w.CAPITALS))
    return cased(rng, rng.choice([f"what is the capital of {country}?", f"capital of {country}?", f"which city is the capital of {country}?", f"name the capital of {country}", f"what's the capital of {country}?"])), f"The capital of {country} is {w.CAPITALS[country]}."


def adding(rng, holdout):
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return cased(rng, rng.choice([f"what is {a} + {b}?", f"what is {a} plus {b}?", f"{a} + {b}", f"what is {a}+{b}?", f"{a}+{b}", f"add {a} and {b}", f"how much is {a} plus {b}?"])), f"{a} + {b} = {a + b}"


def spelling(rng, holdout):
    word = rng.choice([w.pseudo(rng, holdout), rng.choice(w.THINGS), rng.choice(w.NAMES).lower()])
    return cased(rng, rng.choice([f"spell {word}", f"spell the word {word}", f"how do you spell {word}?"])), "-".join(word)


def as_json(rng, holdout):
    pairs = {k: rng.choice([w.word_value(rng, holdout), w.integer(rng)]) for k in rng.sample(w.PARAM_WORDS, rng.randint(1, 3))}
    body = ", ".join(f'"{k}": ' + (f'"{v}"' if isinstance(v, str) else str(v)) for k, v in pairs.items())
    said = " and ".join(f"{k} {v}" for k, v in pairs.items())
    return cased(rng, rng.choice([f"give me JSON with {said}", f"return a JSON object with {said}", f"answer in JSON: {said}", f"write as JSON: {said}"])), "{" + body + "}"


def listing(rng, holdout):
    items = rng.sample(w.THINGS + w.FOODS, rng.randint(2, 7))
    given = ", ".join(items)
    kind = rng.randrange(4)
    if kind == 0:
        return cased(rng, f"make a list of {given}"), "\n".join(f"- {i}" for i in items)
    if kind == 1:
        return cased(rng, f"what is the first of these: {given}"), items[0]
    if kind == 2:
        return cased(rng, f"what is the last of these: {given}"), items[-1]
    return cased(rng, f"number these: {given}"), "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1))


def story(rng, holdout):
    name, adj, thing, other, place = w.pick(rng, w.NAMES, holdout), rng.choice(w.ADJ), rng.choice(w.THINGS), rng.choice(w.THINGS), w.pick(rng, w.CITIES, holdout)
    about = rng.choice(["", f" about a {thing}", f" about {name}", f" about {name} and a {thing}", f" about a {adj} {thing}"])
    if "about a" not in about and "and a" not in about:
        thing = "door"
    if name not in about:
        name = "Mia"
    adj = adj if adj in about else "small"
    text = (f"Once upon a time, {name} found a {adj} {thing} near the river. Nobody knew where the {thing} came from. {name} took the {thing} home and put it under a lamp. "
            f"In the night the {thing} began to glow, and a quiet voice said: take me back. So {name} walked to the river again, and the {thing} went away with the water. "
            f"The next morning there was a letter at the door, and in the letter were only two words: thank you.")
    return cased(rng, rng.choice([f"tell me a story{about}", f"write a story{about}", f"write a short story{about}", f"tell a story{about}", f"I want to hear a story{about}", f"write a long text{about}"])), text


SKILLS = [(fact, 34), (counting, 40), (echo, 16), (capital, 6), (adding, 4), (spelling, 3), (as_json, 6), (listing, 6), (story, 4)]


def chat(rng, holdout):
    """One question and its answer."""
    make = rng.choices([s[0] for s in SKILLS], [s[1] for s in SKILLS])[0]
    return make(rng, holdout)


FILLER = ["The {a} {t} stands near the {u}.", "{n} saw a {a} {t} in {c}.", "Nobody in {c} has a {t}.", "On {d} the {t} was {a}.", "{n} and {m} talked about the {t}.",
          "It was a {a} {d} in {c}.", "The {t} and the {u} are {a}.", "{n} sold the {t} to {m}."]


def filler(rng, holdout):
    return rng.choice(FILLER).format(a=rng.choice(w.ADJ), t=rng.choice(w.THINGS), u=rng.choice(w.THINGS), n=w.pick(rng, w.NAMES, holdout), m=w.pick(rng, w.NAMES, holdout),
                                     c=w.pick(rng, w.CITIES, holdout), d=rng.choice(w.DAYS))


def lookup(rng, holdout, size):
    """A text with facts in it, and questions for some of the facts. `size` is about the number of sentences."""
    relation = rng.choice(["code for", "code of", "password of", "number of", "key for", "owner of", "place of", "colour of", "name of"])
    facts, lines = {}, []
    for _ in range(max(1, int(size * rng.uniform(0.1, 0.7)))):
        facts[rng.choice([w.pseudo(rng, holdout), rng.choice(w.THINGS), w.pick(rng, w.NAMES, holdout), w.pick(rng, w.CITIES, holdout)])] = w.word_value(rng, holdout)
    form = rng.choice(["The {r} {k} is {v}.", "The {r} {k} is {v}.", "{k}: {v}", "{k} = {v}"])
    lines = [form.format(r=relation, k=k, v=v) for k, v in facts.items()] + [filler(rng, holdout) for _ in range(size - len(facts))]
    rng.shuffle(lines)
    text, messages = rng.choice([" ", "\n"]).join(lines), []
    keys = rng.sample(list(facts), min(len(facts), rng.randint(1, 4)))
    asks = [rng.choice([f"What is the {relation} {k}?", f"what is the {relation} {k}?", f"Tell me the {relation} {k}.", f"The {relation} {k}?"]) for k in keys]
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": text})
    else:
        asks[0] = text + rng.choice(["\n\n", "\n", " "]) + asks[0]
    for ask, k in zip(asks, keys):
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": f"The {relation} {k} is {facts[k]}."}]
    return {"tools": None, "messages": messages, "case": "lookup"}


def remember(rng, holdout):
    name, thing, value = w.pick(rng, w.NAMES, holdout), rng.choice(w.THINGS), w.word_value(rng, holdout)
    if rng.random() < 0.5:
        say, ok, ask, answer = rng.choice([f"My name is {name}.", f"I am {name}.", f"Hi, I am {name}.", f"Hello, my name is {name}"]), f"Hello {name}!", rng.choice(["What is my name?", "Who am I?", "Do you remember my name?", "what's my name?"]), f"Your name is {name}."
    else:
        say, ok, ask, answer = f"{rng.choice(['Remember this:', 'Remember:', 'Note that', ''])} my {thing} is {value}.".strip(), "I will remember it.", f"What is my {thing}?", f"Your {thing} is {value}."
        say = say[0].upper() + say[1:]
    messages = [{"role": "user", "content": say}, {"role": "assistant", "content": ok}]
    for _ in range(rng.choice([0, 0, 1, 2])):
        q, a = chat(rng, holdout)
        messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    return {"tools": None, "messages": messages + [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}], "case": "remember"}


SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant.", "Be brief.", "You are a demonstration.", "Answer in one sentence.", "Answer politely.", "You are a friendly assistant."]


def talk(rng, holdout):
    """A conversation without tools."""
    if rng.random() < 0.12:
        return remember(rng, holdout)
    messages = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.35 else []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        q, a = chat(rng, holdout)
        think = rng.random() < 0.06
        messages.append({"role": "user", "content": q + (" /think" if think else "")})
        messages.append({"role": "assistant", "content": a} | ({"reasoning_content": "The user asks: " + q} if think else {}))
    return {"tools": None, "messages": messages, "case": "chat"}
