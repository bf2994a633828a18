"""A plain PyTorch LoopLM: `num_layers` sandwich-norm layers, applied `loops` times.

Written for training on fixed shapes, and as the oracle the served engine is compared with. Tensor
names are those of the released Ouro checkpoints, so `state_dict()` is what gets exported.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]
"""K and V [B, heads, S, head_dim] of one layer in one loop."""


@dataclass(frozen=True)
class LoopLMConfig:
    """Shapes of a LoopLM. `head_dim` is `hidden_size / num_heads`."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    loops: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RMSNorm(nn.Module):
    """RMS norm with fp32 statistics; the result is cast back before the weight is applied."""

    def __init__(self, size: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), init))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of shape `positions.shape + (head_dim,)`, fp32, rotate-half layout."""
    freqs = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions.float().unsqueeze(-1) * freqs
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to `x` [..., S, head_dim]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    def __init__(self, cfg: LoopLMConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.o_proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated Q and K, and V, each [B, heads, S, head_dim], of `x` [B, S, D]."""
        b, s, _ = x.shape
        split = (b, s, self.heads, self.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        return q, k, self.v_proj(x).view(split).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention of q [B, heads, S, hd] over k, v [B, heads, P, hd]; bias broadcasts to
        [B, heads, S, P] and is added to the scores. Returns [B, S, D], projected."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2) + bias
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        held: KV | None = None,
        left: Tensor | None = None,
        plane: KV | None = None,
    ) -> tuple[Tensor, KV]:
        """The output, and the K and V of `x` that were read: where `left` [B, S] those of the loop
        before, `held`, stand in for this loop's. A `plane` is read before them."""
        q, k, v = self.qkv(x, cos, sin)
        if held is not None and left is not None:
            gone = left[:, None, :, None]
            k, v = torch.where(gone, held[0], k), torch.where(gone, held[1], v)
        if plane is None:
            return self.mix(q, k, v, bias), (k, v)
        keys, values = torch.cat((plane[0], k), 2), torch.cat((plane[1], v), 2)
        return self.mix(q, keys, values, bias), (k, v)


class MLP(nn.Module):
    def __init__(self, cfg: LoopLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One sandwich-norm layer: norms before and after attention, before and after the MLP."""

    def __init__(self, cfg: LoopLMConfig) -> None:
        super().__init__()
        size, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(size, eps)
        # Below one, so that early in training the residual stream is not drowned by each sublayer.
        self.input_layernorm_2 = RMSNorm(size, eps, 0.5)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm_2 = RMSNorm(size, eps, 0.5)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        held: KV | None = None,
        left: Tensor | None = None,
        plane: KV | None = None,
    ) -> tuple[Tensor, KV]:
        out, read = self.self_attn(self.input_layernorm(h), cos, sin, bias, held, left, plane)
        return self.after_attention(h, out), read

    def after_attention(self, h: Tensor, out: Tensor) -> Tensor:
        """The rest of the layer, given attention's output."""
        h = h + self.input_layernorm_2(out)
        return h + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(h)))


class Body(nn.Module):
    def __init__(self, cfg: LoopLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.early_exit_gate = nn.Linear(cfg.hidden_size, 1)

    def loop(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias: Tensor,
        held: list[KV] | None = None,
        left: Tensor | None = None,
        planes: list[KV] | None = None,
    ) -> tuple[Tensor, list[KV]]:
        """One application of all layers and the final norm to `h` [B, S, D], and its K/V read per
        layer. At positions `left` [B, S] bool the K/V `held` from the loop before stand in. With
        `planes`, K/V of P other positions per layer, `bias` ends in [S, P + S]."""
        read = []
        for i, layer in enumerate(self.layers):
            before = None if held is None else held[i]
            h, kv = layer(h, cos, sin, bias, before, left, None if planes is None else planes[i])
            read.append(kv)
        return self.norm(h), read


class LoopLM(nn.Module):
    def __init__(self, cfg: LoopLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Body(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.loop_fn = self.model.loop
        self.reset()

    def reset(self) -> None:
        """Initial weights, from torch's global generator."""
        for _name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        nn.init.zeros_(self.lm_head.weight)
        nn.init.zeros_(self.model.early_exit_gate.weight)
        # lambda = 0.3 everywhere is close to a uniform p(t) over four loops.
        nn.init.constant_(self.model.early_exit_gate.bias, -0.85)

    def compile(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Compile one loop: all loops share it, so it is compiled once, not `loops` times."""
        self.loop_fn = torch.compile(self.model.loop, dynamic=False, **kwargs)

    def forward(
        self,
        ids: Tensor,
        bias: Tensor,
        pick: Tensor | None = None,
        threshold: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of every loop.

        ids [B, S] int64; bias [B or 1, 1, S, S] float, 0 where attention is allowed and -inf (or
        very negative) elsewhere; pick [N] int64 indexes into the B*S positions. Returns H, float,
        [loops, N, D] with pick, else [loops, B, S, D].

        With threshold [B, S] float a position whose CDF reaches its threshold leaves, as in mode
        `skip` (docs/engine.md): in deeper loops the others read the K/V of the
        loop it left at. 1 and more never leave.
        """
        columns = torch.arange(ids.shape[1], device=ids.device)
        states, _ = self.run_loops(ids, columns, bias, threshold)
        return states if pick is None else states.flatten(1, 2)[:, pick]

    def run_loops(
        self,
        ids: Tensor,
        positions: Tensor,
        bias: Tensor,
        threshold: Tensor | None = None,
        planes: list[KV] | None = None,
    ) -> tuple[Tensor, list[KV]]:
        """`forward` at any positions, [S] or [B, S]: H [loops, B, S, D], and the K/V that the last
        loop read per layer. With threshold those are the exit loop's, the plane of mode `shared`.

        `planes`, K/V of P other positions per layer, are read at every loop; `bias` then ends in
        [S, P + S].
        """
        cos, sin = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)
        if positions.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]
        h = self.model.embed_tokens(ids)
        # Planes come in many widths, and each would be compiled for itself.
        loop = self.loop_fn if planes is None else self.model.loop
        states, held, left = [], None, None
        read: list[KV] = []
        survival = 1.0
        for _ in range(self.cfg.loops):
            h, read = loop(h, cos, sin, bias, held, left, planes)
            states.append(h)
            if threshold is not None:
                stay = 1 - torch.sigmoid(self.gate(h.detach()).detach().float())
                survival = survival * stay
                held, left = read, (1 - survival >= threshold) & (threshold < 1)
        return torch.stack(states), read

    def gate(self, states: Tensor) -> Tensor:
        """Exit logits of `states` [..., D]: [...], lambda being their sigmoid."""
        return self.model.early_exit_gate(states).squeeze(-1)
