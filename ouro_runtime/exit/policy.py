"""The exit rules: which rows are read out after a loop.

In numpy: between two passes over a model's weights the code of torch's dispatcher is cold.
"""

import numpy as np


def gate_fires(survival: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """`gate`, the Q-exit: the gate's CDF, 1 - S(n), has reached the threshold. [N] bool.

    Source: *Scaling Latent Reasoning via Looped Language Models*, arXiv 2510.25741, section 3.

    Args:
        survival: [N] float32, S(n). threshold: [N] float32, 0..1; 1 or more turns the rule off.
    """
    return (1.0 - survival >= threshold) & (threshold < 1.0)


def margin_fires(margin: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """`margin`: the loop's own read-out is sure enough of its token. [N] bool.

    Args:
        margin: [N] float32, see `readings.margin`. threshold: [N] float32, 0..1; 1 or more turns
            the rule off.
    """
    return (margin >= threshold) & (threshold < 1.0)


def delta_fires(change: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """`delta`: the loop has hardly changed the state. [N] bool.

    Args:
        change: [N] float32, see `readings.change`. threshold: [N] float32, 0..2; 0 turns the rule
            off.
    """
    return (change <= threshold) & (threshold > 0.0)


def exit_mask(
    fires: np.ndarray, depth: np.ndarray, min_loops: np.ndarray, max_loops: np.ndarray, loops: int
) -> np.ndarray:
    """A row leaves when its rule fires, within the limits of its loops. [N] bool.

    Args:
        fires: [N] bool. depth: [N] integer, n: loops run by each row, this one included.
        min_loops, max_loops: [N] integer; loops: T.
    """
    return (fires & (depth >= min_loops)) | (depth >= max_loops) | (depth >= loops)
