"""The exit rule: which rows are read out after a loop.

In numpy: between two passes over a model's weights the code of torch's dispatcher is cold.
"""

import numpy as np


def exit_mask(
    survival: np.ndarray,
    depth: np.ndarray,
    threshold: np.ndarray,
    min_loops: np.ndarray,
    max_loops: np.ndarray,
    loops: int,
) -> np.ndarray:
    """Q-exit with loop limits: a row leaves when the gate's CDF reaches its threshold.

    Source: *Scaling Latent Reasoning via Looped Language Models*, arXiv 2510.25741, section 3.

    Args:
        survival: [N] float32, S(n); the CDF is 1 - S(n).
        depth: [N] integer, n: loops run by each row, this one included.
        threshold: [N] float32; 1 or more turns the gate off for the row.
        min_loops, max_loops: [N] integer; loops: T.

    Returns:
        [N] bool.
    """
    ready = (1.0 - survival >= threshold) & (threshold < 1.0) & (depth >= min_loops)
    return ready | (depth >= max_loops) | (depth >= loops)
