"""Qwen3-MoE in plain PyTorch, float32, with fake quantisation that follows MLX's affine format."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096


PRESETS = {
    "cpu": Config(),
    "gpu": Config(vocab_size=8192, num_hidden_layers=6, moe_intermediate_size=256),
}
GROUP = 64


def affine(weight, bits):
    """(codes, scale, bias) of MLX's affine quantisation, groups of 64 along the last axis. The end of the range that
    lies farther from zero is met exactly, and zero is met when it can be."""
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    low, high, top = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-7)
    low_wins = low.abs() > high.abs()
    scale = torch.where(low_wins, scale, -scale)
    edge = torch.where(low_wins, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps != 0, edge / torch.where(steps != 0, steps, 1.0), scale)
    bias = torch.where(steps != 0, edge, 0.0)
    return torch.round((groups - bias) / scale).clamp(0, top), scale, bias


def fake_quant(weight, bits):
    """The weight as the quantised file will hold it; the gradient passes straight through."""
    with torch.no_grad():
        codes, scale, bias = affine(weight, bits)
        error = (codes * scale + bias).reshape(weight.shape) - weight
    return weight + error


class Dispatch(torch.autograd.Function):
    """Rows of x copied once for each chosen expert, sorted by expert. Both directions are gathers."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Back from the order by expert to the order by token."""

    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class Experts(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        e, d, m = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.randn(e, m, d) * d**-0.5)
        self.up_proj = nn.Parameter(torch.randn(e, m, d) * d**-0.5)
        self.down_proj = nn.Parameter(torch.randn(e, d, m) * m**-0.5 * 0.3)

    def forward(self, x, chosen, q):
        """x: [tokens, d]; chosen: [tokens, k] → [tokens, k, d]"""
        k = chosen.shape[1]
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        inverse = torch.argsort(order)
        counts = torch.bincount(flat, minlength=self.gate_proj.shape[0]).tolist()
        gate, up, down = q(self.gate_proj, 4), q(self.up_proj, 4), q(self.down_proj, 4)
        gate_up, down = torch.cat([gate, up], 1).unbind(0), down.unbind(0)
        out = []
        for i, rows in enumerate(Dispatch.apply(x, order, inverse, k).split(counts)):
            g, u = F.linear(rows, gate_up[i]).chunk(2, -1)
            out.append(F.linear(F.silu(g) * u, down[i]))
        return Permute.apply(torch.cat(out), order, inverse).view(-1, k, x.shape[-1])


class Sparse(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.k = cfg.num_experts_per_tok
        self.gate = nn.Parameter(torch.randn(cfg.num_experts, cfg.hidden_size) * cfg.hidden_size**-0.5)
        self.experts = Experts(cfg)

    def forward(self, x, q):
        b, t, d = x.shape
        x = x.reshape(-1, d)
        probs = F.softmax(F.linear(x, q(self.gate, 8)), -1)
        top, chosen = probs.topk(self.k, -1)
        top = top / top.sum(-1, keepdim=True)
        out = torch.bmm(top.unsqueeze(1), self.experts(x, chosen, q)).view(b, t, d)
        n = probs.shape[-1]
        share = torch.bincount(chosen.reshape(-1), minlength=n).float() / chosen.numel()
        return out, n * (share * probs.mean(0)).sum()


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.h, self.kv, self.hd, self.eps = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.rms_norm_eps
        d = cfg.hidden_size
        matrix = lambda rows, cols, gain=1.0: nn.Parameter(torch.randn(rows, cols) * cols**-0.5 * gain)
        self.q_proj, self.k_proj = matrix(self.h * self.hd, d), matrix(self.kv * self.hd, d)
        self.v_proj, self.o_proj = matrix(self.kv * self.hd, d), matrix(d, self.h * self.hd, 0.3)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(self.hd)), nn.Parameter(torch.ones(self.hd))

    def forward(self, x, cos, sin, q):
        b, t, _ = x.shape
        qs, ks, vs = F.linear(x, torch.cat([q(self.q_proj, 4), q(self.k_proj, 4), q(self.v_proj, 4)])).split(
            [self.h * self.hd, self.kv * self.hd, self.kv * self.hd], -1)
        qs = rope(F.rms_norm(qs.view(b, t, self.h, self.hd), (self.hd,), self.q_norm, self.eps), cos, sin).transpose(1, 2)
        ks = rope(F.rms_norm(ks.view(b, t, self.kv, self.hd), (self.hd,), self.k_norm, self.eps), cos, sin)
        rep = self.h // self.kv
        wide = lambda z: z.unsqueeze(3).expand(b, t, self.kv, rep, self.hd).reshape(b, t, self.h, self.hd).transpose(1, 2)
        out = F.scaled_dot_product_attention(qs, wide(ks), wide(vs.view(b, t, self.kv, self.hd)), is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(b, t, -1), q(self.o_proj, 4))


def rope(x, cos, sin):
    """x: [batch, time, heads, head_dim], the two halves of each head rotated against each other."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.eps = cfg.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = nn.Parameter(torch.ones(cfg.hidden_size)), nn.Parameter(torch.ones(cfg.hidden_size))
        self.self_attn, self.mlp = Attention(cfg), Sparse(cfg)

    def forward(self, x, cos, sin, q):
        d = (x.shape[-1],)
        x = x + self.self_attn(F.rms_norm(x, d, self.input_layernorm, self.eps), cos, sin, q)
        y, balance = self.mlp(F.rms_norm(x, d, self.post_attention_layernorm, self.eps), q)
        return x + y, balance


class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.quantised = cfg, False
        self.embed_tokens = nn.Parameter(torch.randn(cfg.vocab_size, cfg.hidden_size) * 0.05)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(cfg.hidden_size))
        angle = torch.outer(torch.arange(cfg.max_position_embeddings).float(), cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim))
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)

    def forward(self, ids, keep=None):
        """ids: [batch, time]. `keep` (bool, same shape) names the positions whose logits are wanted. → (logits, balance loss)"""
        q = fake_quant if self.quantised else lambda weight, bits: weight
        table = q(self.embed_tokens, 4)
        x, balance = F.embedding(ids, table), 0.0
        t = ids.shape[1]
        for layer in self.layers:
            x, extra = layer(x, self.cos[:t], self.sin[:t], q)
            balance = balance + extra
        x = x[keep] if keep is not None else x
        return F.linear(F.rms_norm(x, (x.shape[-1],), self.norm, self.cfg.rms_norm_eps), table), balance / len(self.layers)
