"""Trains the demo model on generated conversations.

    python train.py --preset cpu --minutes 85 --out RUN     one CPU core
    python train.py --preset gpu --minutes 25 --out RUN     one GPU

The schedule follows the clock, not the step count, so that a shared machine still finishes in time:
short sequences first, then longer ones; the last part learns with the weights quantised to 4 bits.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
from model import PRESETS, Model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def orthogonal(g, steps=5):
    """An approximation of the nearest (semi-)orthogonal matrix by an odd quintic polynomial, as the Muon optimiser does; batched."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose matrix update is made orthogonal before it is applied."""

    def __init__(self, params, momentum=0.95, decay=0.01):
        self.params, self.momentum, self.decay = list(params), momentum, decay
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.buffers):
            m.lerp_(p.grad, 1 - self.momentum)
            update = orthogonal(torch.lerp(p.grad, m, self.momentum))
            p.mul_(1 - lr * self.decay).add_(update, alpha=-lr * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


class Stream:
    """Batches of conversations of like length, without padding to speak of."""

    def __init__(self, tokenizer, seed, other_weight):
        self.rng, self.tokenizer, self.other = random.Random(seed), tokenizer, other_weight
        self.batches = []

    def next(self, length, limit, tokens):
        if not self.batches:
            pool = sorted((data.sample(self.rng, self.tokenizer, length, limit, self.other) for _ in range(1000)), key=lambda s: len(s[0]))
            batch = []
            for item in pool:
                if batch and (len(batch) + 1) * len(item[0]) > tokens:
                    self.batches.append(batch)
                    batch = []
                batch.append(item)
            self.batches.append(batch)
            self.rng.shuffle(self.batches)
        batch = self.batches.pop()
        longest = max(len(i) for i, _ in batch)
        ids, weights = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest)
        for row, (i, wt) in enumerate(batch):
            ids[row, :len(i)], weights[row, :len(i)] = torch.tensor(i), torch.tensor(wt)
        return ids.to(DEVICE), weights.to(DEVICE)


def loss_of(model, ids, weights, keep_other=1.0):
    """(weighted loss, loss on the assistant's tokens, balance loss)"""
    target, weight = ids[:, 1:], weights[:, 1:]
    keep = weight >= 1
    if keep_other > 0:
        keep = keep | ((weight > 0) & (torch.rand_like(weight) < keep_other))
    logits, balance = model(ids[:, :-1], keep)
    each, weight = F.cross_entropy(logits, target[keep], reduction="none"), weight[keep]
    own = each[weight >= 1]
    return (each * weight).sum() / weight.sum(), own.mean().detach(), balance


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--preset", choices=PRESETS, default="cpu")
    ap.add_argument("--minutes", type=float, default=85)
    ap.add_argument("--out", type=pathlib.Path, required=True, help="folder for the checkpoint and the log")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--batch", type=int, help="tokens in a batch")
    ap.add_argument("--lr", type=float, default=0.02, help="of the matrices; the rest learns with a fixed share of it")
    ap.add_argument("--quant-from", type=float, default=0.85, help="share of the time after which the weights are quantised")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--resume", type=pathlib.Path, help="checkpoint to go on from (its optimiser's state is not kept)")
    ap.add_argument("--start", type=float, default=0.0, help="share of the time that counts as already spent")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batch = args.batch or (8192 if args.preset == "cpu" else 65536)
    tokenizer = Tokenizer.from_file(str(data.MODEL / "tokenizer.json"))
    cfg = PRESETS[args.preset]
    assert tokenizer.get_vocab_size() == cfg.vocab_size, "train the tokenizer for this preset first"
    model = Model(cfg).to(DEVICE)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, map_location=DEVICE))
    args.out.mkdir(parents=True, exist_ok=True)
    matrices = [p for n, p in model.layers.named_parameters() if p.dim() >= 2 and not n.endswith("mlp.gate")]
    small = [p for p in model.parameters() if not any(p is m for m in matrices)]
    print(f"parameters {sum(p.numel() for p in model.parameters())}, in matrices {sum(p.numel() for p in matrices)}", flush=True)
    muon, adam = Muon(matrices), torch.optim.AdamW(small, lr=1e-3, betas=(0.9, 0.97), weight_decay=0.0)
    stream = Stream(tokenizer, args.seed, other_weight=0.2)
    begun, step, seen, logged = time.time() - 60 * args.minutes * args.start, 0, 0, time.time()
    sums = [0.0, 0.0, 0.0, 0]
    while (progress := (time.time() - begun) / (60 * args.minutes)) < 1:
        length, limit = (0.5, 320) if progress < 0.15 else (1.0, 640) if progress < 0.5 else (1.5, 1088)
        factor = min(1, (step + 1) / 50) * min(1, (1 - progress) / 0.55)
        model.quantised = progress >= args.quant_from
        ids, weights = stream.next(length, limit, batch // 2 if progress < 0.8 else batch)
        loss, own, balance = loss_of(model, ids, weights, keep_other=0.5 if progress < 0.3 else 0.1)
        (loss + 0.01 * balance).backward()
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is not a number")
        torch.nn.utils.clip_grad_norm_(small, 1.0)
        muon.step(args.lr * factor)
        for group in adam.param_groups:
            group["lr"] = 0.2 * args.lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        sums = [sums[0] + loss.item(), sums[1] + own.item(), sums[2] + float(balance.detach()), sums[3] + 1]
        if step % 20 == 0:
            n, now = sums[3], time.time()
            print(f"{(now - begun) / 60:6.2f} min  step {step:5d}  tokens {seen / 1e6:6.2f} M  loss {sums[0] / n:.4f}  assistant {sums[1] / n:.4f}  "
                  f"balance {sums[2] / n:.3f}  {(now - logged) / 20:.2f} s/step  factor {factor:.3f}{'  quantised' if model.quantised else ''}", flush=True)
            sums, logged = [0.0, 0.0, 0.0, 0], now
        if step % 100 == 0:
            torch.save(model.state_dict(), args.out / "model.pt")
    torch.save(model.state_dict(), args.out / "model.pt")
    (args.out / "run.json").write_text(json.dumps({"preset": args.preset, "steps": step, "tokens": seen, "minutes": (time.time() - begun) / 60, "start": args.start, "seed": args.seed}) + "\n")


if __name__ == "__main__":
    main()
