"""The cumulative exit distribution of tokens that were read out; numpy, for both engines."""

import numpy as np


def exit_cdf(survival: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """CDF(1)..CDF(depth) of the gate, then zeros: [..., T] float32.

    Args:
        survival: [..., T] float32, S(1)..S(depth), then anything. depth: [...] integer, 1-based.
    """
    cdf = 1.0 - survival
    # What the gate leaves over exits at the last loop, so its own last value says nothing.
    cdf[..., -1] = 1.0
    cdf[np.arange(survival.shape[-1]) >= depth[..., None]] = 0.0
    return cdf
