"""Greedy generation with adaptive depth in plain PyTorch: the oracle for modes and gates.

It always runs every loop, and gets each mode's results by rewriting the K/V cache afterwards. So it
saves no time; it says what the served engine has to say, and measures modes the engine lacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ouro_runtime.training.data import MASKED
from ouro_runtime.training.model import LoopLM, rope_tables

STOP_IDS = (0, 2)
MODES = ("skip", "exact", "shared")


@dataclass(frozen=True)
class Controls:
    """A request's depth controls, as `ouro_runtime.config` says them."""

    exit_threshold: float = 1.0
    min_loops: int = 1
    max_loops: int = 4
    exit_mode: str = "skip"
    exit_rule: str = "gate"

    @property
    def off(self) -> bool:
        """Whether the exit rule never fires: `max_loops` loops run."""
        return self.exit_threshold == 0 if self.exit_rule == "delta" else self.exit_threshold >= 1


@dataclass
class Cache:
    """k and v, [loops, layers, B, heads, capacity, head_dim]; `used` columns hold something.

    Rows are padded on the left, so that all end in one column: bias [B, 1, 1, capacity] masks the
    padding, positions [B] is the position of the next token of each row."""

    k: Tensor
    v: Tensor
    used: int
    bias: Tensor
    positions: Tensor

    def copy(self) -> "Cache":
        return replace(self, k=self.k.clone(), v=self.v.clone(), positions=self.positions.clone())


def exit_depths(lambdas: Tensor, controls: Controls) -> Tensor:
    """Depth [N], 1-based int64, of lambdas [T, N]: the first n with CDF(n) >= q, within the limits.

    CDF(n) = 1 - prod_{j<=n} (1 - lambda_j), in fp32; q >= 1 never fires.
    """
    return first_fired(1 - (1 - lambdas.float()).cumprod(0) >= controls.exit_threshold, controls)


def first_fired(fires: Tensor, controls: Controls) -> Tensor:
    """Depth [N], 1-based int64: the first loop of `fires` [T, N] bool within the limits, else the
    last one that they allow."""
    loops, count = fires.shape
    last = min(controls.max_loops, loops)
    depth = torch.full((count,), last, device=fires.device)
    if not controls.off:
        for n in range(last - 1, controls.min_loops - 1, -1):
            depth = torch.where(fires[n - 1], n, depth)
    return depth


class Reference:
    """Batched greedy decoding of a `LoopLM`; `gate` (weight [D], bias []) replaces the model's."""

    def __init__(self, model: LoopLM, gate: tuple[Tensor, Tensor] | None = None) -> None:
        self.model = model.eval()
        self.gate = gate or (
            model.model.early_exit_gate.weight[0].detach(),
            model.model.early_exit_gate.bias[0].detach(),
        )

    @torch.no_grad()
    def depths(self, states: Tensor, controls: Controls) -> Tensor:
        """Depth [B] of states [T, B, D] by the exit rule of `controls`."""
        q = controls.exit_threshold
        if controls.exit_rule == "margin":
            top = self.model.lm_head(states).float().softmax(-1).topk(2).values
            return first_fired(top[..., 0] - top[..., 1] >= q, controls)
        if controls.exit_rule == "delta":
            moved = (states[1:] - states[:-1]).float().norm(dim=-1)
            change = moved / states[1:].float().norm(dim=-1)
            never = torch.zeros_like(change[:1], dtype=torch.bool)
            return first_fired(torch.cat([never, change <= q]), controls)
        lambdas = torch.sigmoid((states.float() @ self.gate[0].float()) + self.gate[1].float())
        return exit_depths(lambdas, controls)

    @torch.no_grad()
    def _run(self, ids: Tensor, positions: Tensor, bias: Tensor, cache: Cache) -> Tensor:
        """All loops over `ids` [B, S], written to the cache's next columns. H [T, B, D] of the last
        column."""
        cfg, body = self.model.cfg, self.model.model
        cos, sin = rope_tables(positions, cfg.head_dim, cfg.rope_theta)
        cos, sin = cos[:, None], sin[:, None]
        start, end = cache.used, cache.used + ids.shape[1]
        h = body.embed_tokens(ids)
        states = []
        for t in range(cfg.loops):
            for i, layer in enumerate(body.layers):
                q, k, v = layer.self_attn.qkv(layer.input_layernorm(h), cos, sin)
                cache.k[t, i, :, :, start:end], cache.v[t, i, :, :, start:end] = k, v
                keys, values = cache.k[t, i, :, :, :end], cache.v[t, i, :, :, :end]
                h = layer.after_attention(h, layer.self_attn.mix(q, keys, values, bias[..., :end]))
            h = body.norm(h)
            states.append(h[:, -1])
        cache.used = end
        return torch.stack(states)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Cache, Tensor]:
        """Run the prompts; `room` tokens may follow. The cache, and H [T, B, D] of their ends."""
        cfg = self.model.cfg
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        pad = torch.tensor([width - len(p) for p in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        columns = torch.arange(width + room)
        hidden = torch.where(columns[None] < pad[:, None], MASKED, 0.0)[:, None, None]
        causal = torch.full((width, width), MASKED).triu(1)
        shape = (cfg.loops, cfg.num_layers, len(prompts), cfg.num_heads, width + room, cfg.head_dim)
        cache = Cache(torch.zeros(shape), torch.zeros(shape), 0, hidden, width - pad)
        positions = (columns[:width][None] - pad[:, None]).clamp_min(0)
        return cache, self._run(ids, positions, hidden[..., :width] + causal, cache)

    @torch.no_grad()
    def decode(
        self,
        start: tuple[Cache, Tensor],
        controls: Controls,
        max_tokens: int,
        stop: Sequence[int] = STOP_IDS,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens and their depths per prompt, the stop token included. `start` stays as it was."""
        cache, states = start[0].copy(), start[1]
        rows = states.shape[1]
        if controls.exit_mode == "shared":
            cache.k[:], cache.v[:] = cache.k[-1:].clone(), cache.v[-1:].clone()
        tokens: list[list[int]] = [[] for _ in range(rows)]
        depths: list[list[int]] = [[] for _ in range(rows)]
        live = torch.arange(rows)
        for n in range(max_tokens):
            depth = self.depths(states, controls)
            if n:
                stand_in(cache, depth, controls.exit_mode)
            picked = states[depth - 1, torch.arange(len(depth))]
            token = self.model.lm_head(picked).argmax(-1)
            for row, t, d in zip(live.tolist(), token.tolist(), depth.tolist(), strict=True):
                tokens[row].append(t)
                depths[row].append(d)
            going = ~torch.isin(token, torch.tensor(stop))
            if n + 1 == max_tokens or not going.any():
                break
            if going.sum() <= 0.7 * len(live):
                live, token = live[going], token[going]
                cache = replace(
                    cache,
                    k=cache.k[:, :, going],
                    v=cache.v[:, :, going],
                    bias=cache.bias[going],
                    positions=cache.positions[going],
                )
            states = self._run(token[:, None], cache.positions[:, None], cache.bias, cache)
            cache.positions = cache.positions + 1
        return [_until(t, stop) for t in tokens], [
            d[: len(_until(t, stop))] for t, d in zip(tokens, depths, strict=True)
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        max_tokens: int,
        stop: Sequence[int] = STOP_IDS,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`decode` of `prefill`."""
        return self.decode(self.prefill(prompts, max_tokens), controls, max_tokens, stop)


def stand_in(cache: Cache, depth: Tensor, mode: str) -> None:
    """Rewrite the newest column as `mode` leaves it, of rows read out at `depth` [B] (1-based).

    skip: loops past the exit hold the exit loop's K/V; shared: every loop does; exact: nothing."""
    if mode == "exact":
        return
    column = cache.used - 1
    rows = torch.arange(len(depth))
    for plane in (cache.k, cache.v):
        old = plane[..., column, :].clone()
        for t in range(plane.shape[0]):
            source = depth - 1 if mode == "shared" else (depth - 1).clamp_max(t)
            plane[t, :, :, :, column] = old[source, :, rows].transpose(0, 1)


def _until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Tokens up to the first stop token, included."""
    for i, token in enumerate(tokens):
        if token in stop:
            return tokens[: i + 1]
    return tokens
