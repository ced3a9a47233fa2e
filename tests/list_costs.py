"""What noise on a list costs, found by asking what it may be charged at."""

from fractions import Fraction

from ebbflow.common.privacy.accounting import rho_nano
from ebbflow.common.privacy.composition import covers


def cost_nano(variance: Fraction, sensitivity_squared: int) -> int:
    """Least cost that may stand for it; 0 if none may."""
    if sensitivity_squared == 1:
        return rho_nano(variance, 1)
    low, high = 0, 2**62
    if not covers(high, variance, sensitivity_squared):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if covers(middle, variance, sensitivity_squared) else (middle, high)
    return high
