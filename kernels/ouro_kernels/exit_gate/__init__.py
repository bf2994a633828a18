"""Exit gate: who leaves after this pass, and at which depth each token is read out."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, check, check_optional, require


def exit_gate(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    survival: torch.Tensor,
    depth: torch.Tensor,
    loop: torch.Tensor,
    threshold: torch.Tensor,
    min_loops: torch.Tensor,
    max_loops: torch.Tensor,
    total_loops: int,
    run_all: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
    exit_mask: torch.Tensor | None = None,
    read_mask: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    deepest: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the exit rule to the N rows of a pass; return (exit_mask, read_mask), bool [N].

    h [N, H]: the normed state after the loop. weight [H], bias [1]: the gate. All arithmetic is
    fp32. loop [N] int32: the loop just run, 0-based, so n = loop + 1 loops are done.
    With lambda = sigmoid(h . weight + bias), survival [N] fp32 (1 before loop 0) is multiplied by
    1 - lambda in place. The rule fires at the first n where 1 - survival >= threshold (fp32 [N];
    >= 1 turns the gate off) and n >= min_loops, or n >= max_loops (both int32 [N]), or n is the
    row's last loop: `deepest` (int32 [N]), T if it is not given.

    depth [N] int32 is updated in place: 0 until the rule fires, then that n.
    read_mask: the rule fired in this very pass, so the row is read out and sampled now.
    exit_mask: the row leaves the column of cells. Rows of `run_all` (bool [N]: prompt positions,
    `exact` mode) leave only at their last loop; for all others the two masks are the same.
    history fp32 [N, T], if given: the new survival is also kept in column `loop` of its row.
    Rows that are not `active` (bool [N]): both masks False, all else untouched.
    """
    check("h", h, (None, None), FLOATS, h.device)
    rows, hidden = h.shape
    device = h.device
    check("weight", weight, (hidden,), FLOATS, device)
    check("bias", bias, (1,), FLOATS, device)
    check("survival", survival, (rows,), torch.float32, device)
    check("threshold", threshold, (rows,), torch.float32, device)
    for name, tensor in (
        ("depth", depth),
        ("loop", loop),
        ("min_loops", min_loops),
        ("max_loops", max_loops),
    ):
        check(name, tensor, (rows,), torch.int32, device)
    check_optional("deepest", deepest, (rows,), torch.int32, device)
    for name, mask in (
        ("run_all", run_all),
        ("active", active),
        ("exit_mask", exit_mask),
        ("read_mask", read_mask),
    ):
        check_optional(name, mask, (rows,), torch.bool, device)
    check_optional("history", history, (rows, total_loops), torch.float32, device)
    require(total_loops >= 1, "total_loops", f"must be at least 1, got {total_loops}")
    return backend("exit_gate", h).exit_gate(
        h,
        weight,
        bias,
        survival,
        depth,
        loop,
        threshold,
        min_loops,
        max_loops,
        total_loops,
        run_all,
        active,
        exit_mask,
        read_mask,
        history,
        deepest,
    )
