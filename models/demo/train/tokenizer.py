"""Trains the byte-level BPE tokenizer and writes it, with its Hugging Face configuration, into the model directory.

Spaces, digits and punctuation never merge with letters: a word has the same tokens wherever it stands, so that a small
model can copy it from a sentence into JSON.
"""

import argparse
import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PIECES = r"""\p{N}|\p{L}+|\s+|[^\s\p{L}\p{N}]+ ?"""


def build(vocab, texts):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(PLAIN)
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab - added, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert tok.get_vocab_size() == vocab - added, tok.get_vocab_size()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    return tok


def corpus(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield from (part for part in data.render(data.conversation(rng)).replace("<|im_end|>", "<|im_start|>").split("<|im_start|>"))


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--vocab", type=int, default=2048)
    args.add_argument("--count", type=int, default=6000, help="conversations to learn from")
    args = args.parse_args()
    tok = build(args.vocab, corpus(7, args.count))
    data.MODEL.mkdir(exist_ok=True)
    tok.save(str(data.MODEL / "tokenizer.json"))
    decoder = {str(tok.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": t in SPECIAL}
               for t in SPECIAL + PLAIN}
    config = {"add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder, "additional_special_tokens": SPECIAL[1:], "bos_token": None,
              "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 4096, "pad_token": "<|endoftext|>",
              "split_special_tokens": False, "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
              "chat_template": (data.MODEL / "chat_template.jinja").read_text()}
    (data.MODEL / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    rng = random.Random(99)
    sizes = [len(tok.encode(data.render(data.conversation(rng))).ids) for _ in range(500)]
    print("vocab", tok.get_vocab_size(), "mean tokens", sum(sizes) / 500, "90 %", sorted(sizes)[450], "max", max(sizes))


if __name__ == "__main__":
    main()
