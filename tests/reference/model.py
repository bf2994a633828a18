"""An independent LoopLM in plain PyTorch: slow, obvious, float32.

It shares no code with the engine and follows the published formulas only:

- a position runs loops 1..T over the same layers, and the final norm closes every loop;
- lambda[t] = sigmoid(gate(H[t])), S(n) = prod_{j<=n} (1 - lambda[j]), CDF(n) = 1 - S(n);
- a token is read out at the first loop n with CDF(n) >= q; q >= 1 runs every loop; or, by another
  rule, at the first whose two likeliest tokens are `threshold` apart in probability (`margin`), or
  that moved the state by no more than `threshold` of its length (`delta`, from loop 2 on);
- the modes differ in the K/V a later token reads at loop t of a position that left at loop d:
  `full` and `exact` slot t, `skip` slot min(t, d), `shared` slot d. Prompt positions left at T.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

MODES = ("full", "exact", "skip", "shared")
NEVER = 1e9
"""Margin of a decision that was not taken."""


@dataclass
class Generation:
    """What the reference generated; every list has one entry per token.

    Attributes:
        tokens, depths, logprobs: the token, the loop it was read out at, log p(token).
        exit_cdf: CDF(1) .. CDF(depth) of each token; CDF(T) is 1.
        logit_margins: top-1 minus top-2 of the logits `choose` saw.
        cdf_margins: the least |CDF - q|, or what another rule reads less its threshold, over the
            exit decisions taken for the token.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    exit_cdf: list[list[float]] = field(default_factory=list)
    logit_margins: list[float] = field(default_factory=list)
    cdf_margins: list[float] = field(default_factory=list)

    @property
    def min_logit_margin(self) -> float:
        return min(self.logit_margins)

    @property
    def min_cdf_margin(self) -> float:
        return min(self.cdf_margins)

    def margin(self, index: int) -> float:
        """How far token `index` was from another token or another depth."""
        return min(self.logit_margins[index], self.cdf_margins[index])


def greedy(logits: Tensor, output: list[int]) -> int:
    """The most probable token."""
    return int(logits.argmax())


Choose = Callable[[Tensor, list[int]], int]


class Reference:
    """A checkpoint in the released format.

    Args:
        folder: holds `config.json` and `model.safetensors`.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(str(folder / "model.safetensors"))
        self.w = {name: tensor.float() for name, tensor in tensors.items()}
        self.loops: int = config["total_ut_steps"]
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps: float = config["rms_norm_eps"]
        theta: float = config["rope_theta"]
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.inv_freq = 1.0 / theta**exponent

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        threshold: float = 1.0,
        rule: str = "gate",
        mode: str = "full",
        min_loops: int = 1,
        max_loops: int | None = None,
        forced_depths: Sequence[int] | None = None,
        choose: Choose = greedy,
        stop: frozenset[int] = frozenset(),
    ) -> Generation:
        """Generate up to `max_tokens` tokens, ending after one of `stop`.

        Args:
            min_loops, max_loops: bounds on a token's depth (T if no `max_loops`).
            forced_depths: token i is read out at `forced_depths[i % len]`, whatever the gate says.
            choose: picks a token from logits [vocab] and the tokens generated so far.
        """
        assert mode in MODES, mode
        out = Generation()
        cache = _Cache(self, len(prompt) + max_tokens, mode)
        positions = torch.arange(len(prompt))
        hidden = self.w["model.embed_tokens.weight"][torch.tensor(list(prompt))]
        column = []
        for loop in range(1, self.loops + 1):
            hidden = self._loop(hidden, positions, loop, cache)
            column.append(hidden[-1])
        cache.left[: len(prompt)] = self.loops

        def wanted(depth: int, survival: float) -> bool:
            """Whether the token at hand leaves after `depth` loops; notes how close that was."""
            if forced_depths:
                return depth == forced_depths[len(out.tokens) % len(forced_depths)]
            if depth >= (max_loops or self.loops):
                return True
            if threshold == (0 if rule == "delta" else 1) or depth < min_loops:
                return False
            if rule == "delta":
                if depth == 1:
                    return False
                moved = column[depth - 1] - column[depth - 2]
                reading, sign = float(moved.norm() / column[depth - 1].norm()), -1
            elif rule == "margin":
                probabilities = (self.w["lm_head.weight"] @ column[depth - 1]).softmax(-1)
                first, second = probabilities.topk(2).values.tolist()
                reading, sign = first - second, 1
            else:
                reading, sign = 1.0 - survival, 1
            margins.append(abs(reading - threshold))
            return sign * reading >= sign * threshold

        while True:
            margins: list[float] = [NEVER]
            if out.tokens:
                position = torch.tensor([len(prompt) + len(out.tokens) - 1])
                hidden = self.w["model.embed_tokens.weight"][out.tokens[-1]][None]
                column = []
            survival, depth, cdf = torch.tensor(1.0), 0, []
            for loop in range(1, self.loops + 1):
                if len(column) < loop:
                    hidden = self._loop(hidden, position, loop, cache)
                    column.append(hidden[0])
                if depth:
                    continue
                survival = survival * (1 - self._gate(column[loop - 1]))
                cdf.append(1.0 if loop == self.loops else 1.0 - float(survival))
                if wanted(loop, float(survival)):
                    depth = loop
                    if out.tokens and mode in ("skip", "shared"):
                        break
            if out.tokens:
                cache.left[position] = depth
            logits = self.w["lm_head.weight"] @ column[depth - 1]
            token = choose(logits, out.tokens)
            top = logits.topk(2).values
            out.logit_margins.append(float(top[0] - top[1]))
            out.cdf_margins.append(min(margins))
            out.logprobs.append(float(logits.log_softmax(-1)[token]))
            out.depths.append(depth)
            out.exit_cdf.append(cdf)
            out.tokens.append(token)
            if token in stop or len(out.tokens) == max_tokens:
                return out

    @torch.inference_mode()
    def prompt_states(self, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(lambda [T, n], logits [T, n, vocab]) after every loop at every prompt position."""
        cache = _Cache(self, len(prompt), "full")
        hidden = self.w["model.embed_tokens.weight"][torch.tensor(list(prompt))]
        gates, logits = [], []
        for loop in range(1, self.loops + 1):
            hidden = self._loop(hidden, torch.arange(len(prompt)), loop, cache)
            gates.append(self._gate(hidden))
            logits.append(hidden @ self.w["lm_head.weight"].T)
        return torch.stack(gates), torch.stack(logits)

    def _gate(self, hidden: Tensor) -> Tensor:
        weight, bias = (self.w[f"model.early_exit_gate.{name}"] for name in ("weight", "bias"))
        return torch.sigmoid(hidden @ weight[0] + bias[0])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.w[name]

    def _loop(self, h: Tensor, positions: Tensor, loop: int, cache: _Cache) -> Tensor:
        """One application of the block to the rows `h` [n, hidden] at `positions` [n]."""
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            x = self._norm(h, f"{prefix}.input_layernorm.weight")
            x = self._attention(x, positions, loop, layer, cache)
            h = h + self._norm(x, f"{prefix}.input_layernorm_2.weight")
            x = self._norm(h, f"{prefix}.post_attention_layernorm.weight")
            gate, up, down = (
                self.w[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            x = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            h = h + self._norm(x, f"{prefix}.post_attention_layernorm_2.weight")
        return self._norm(h, "model.norm.weight")

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = (positions[:, None].float() * self.inv_freq).repeat(1, 2)[:, None]
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-right, left), -1) * angle.sin()

    def _attention(
        self, x: Tensor, positions: Tensor, loop: int, layer: int, cache: _Cache
    ) -> Tensor:
        n = len(x)
        weights = (
            self.w[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")
        )
        query, key, value = ((x @ w.T).view(n, -1, self.head_dim) for w in weights)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        group = self.heads // self.kv_heads
        rows = []
        cache.write(loop, layer, positions, key, value)
        for row, position in enumerate(positions.tolist()):
            keys, values = cache.read(loop, layer, position)
            keys, values = (kv.repeat_interleave(group, dim=1) for kv in (keys, values))
            scores = torch.einsum("hd,phd->hp", query[row], keys) * self.head_dim**-0.5
            rows.append(torch.einsum("hp,phd->hd", scores.softmax(-1), values).reshape(-1))
        return torch.stack(rows) @ self.w[f"model.layers.{layer}.self_attn.o_proj.weight"].T


class _Cache:
    """K/V of every (loop, layer, position), and the loop each position left at (0: still here)."""

    def __init__(self, model: Reference, size: int, mode: str) -> None:
        shape = (model.loops + 1, model.layers, size, model.kv_heads, model.head_dim)
        self.key, self.value = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.left = torch.zeros(size, dtype=torch.long)
        self.mode = mode

    def write(self, loop: int, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self.key[loop, layer, positions] = key
        self.value[loop, layer, positions] = value

    def read(self, loop: int, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """K/V [position + 1, heads, head_dim] that `position` sees at `loop`, its own included."""
        left = self.left[: position + 1]
        slot = torch.full_like(left, loop)
        gone = left > 0
        if self.mode == "skip":
            slot[gone] = left[gone].clamp(max=loop)
        elif self.mode == "shared":
            slot[gone] = left[gone]
        index = torch.arange(position + 1)
        return self.key[slot, layer, index], self.value[slot, layer, index]
