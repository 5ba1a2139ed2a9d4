"""Power laws fitted to measurements: y = c x^k, by least squares on the logarithms.

The exponent k is the slope of log y over log x; its range is the 95% confidence interval of that
slope under Student's t with n - 2 degrees of freedom. Timings of a power law plus a fixed cost bend
towards 0 at the short end, which is why small values are left out before fitting.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MIN_POINTS = 5

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; 1.96 at infinity.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent; the exponent lies in [low, high] with 95% confidence."""

    exponent: float
    low: float
    high: float
    coefficient: float


def t95(freedom: int) -> float:
    """Two-sided 95% quantile of Student's t; exact to 3 digits up to 30, 1% above that."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fits y = c x^k.

    Args:
        x, y: positive numbers; at least three, and at least two different x.

    Raises:
        ValueError: fewer points, or a number that is not positive.
    """
    if len(x) != len(y) or len(x) < 3 or len(set(x)) < 2:
        raise ValueError(f"power_law: wants 3 or more points at 2 or more x; got {len(x)}")
    if min(x) <= 0 or min(y) <= 0:
        raise ValueError("power_law: x and y must be positive")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    n = len(log_x)
    mean_x, mean_y = sum(log_x) / n, sum(log_y) / n
    spread = sum((a - mean_x) ** 2 for a in log_x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    half = t95(n - 2) * math.sqrt(residual / (n - 2) / spread)
    return PowerLaw(slope, slope - half, slope + half, math.exp(intercept))


def fit_series(points: Sequence[tuple[int, float]], floor: float, unit: str) -> dict:
    """The exponent of a measured series, or the reason why none is given.

    Args:
        points: (x, y) of each measurement, y in ``unit``.
        floor: measurements must exceed it to be used; below, fixed costs and clocks dominate.
        unit: how the reason names the floor, e.g. "1 ms".

    Returns:
        {"fitted": True, "exponent", "low", "high", "coefficient", "used": [x, ...]} or
        {"fitted": False, "reason", "used": [x, ...]}, JSON-ready.
    """
    kept = sorted((x, y) for x, y in points if y > floor)
    used = [x for x, _ in kept]
    if len(set(used)) < MIN_POINTS:
        reason = f"{len(set(used))} of {len(points)} points over {unit}; {MIN_POINTS} are needed"
        return {"fitted": False, "reason": reason, "used": used}
    law = power_law(used, [y for _, y in kept])
    return {"fitted": True, **asdict(law), "used": used}


def crossing(a: Sequence[tuple[int, float]], b: Sequence[tuple[int, float]]) -> dict:
    """Where the cost ``a`` goes below the cost ``b``, and stays there to the last common x.

    Between the two points it is taken on the straight lines through the logarithms.

    Args:
        a, b: (x, y) of each measurement, y positive.

    Returns:
        {"kind": "from the first" | "at" | "never" | "not measured", "x"}; x is the first common
        one, the crossing, or None.
    """
    costs_a, costs_b = dict(a), dict(b)
    xs = sorted(costs_a.keys() & costs_b.keys())
    if len(xs) < 2:
        return {"kind": "not measured", "x": None}
    gaps = [math.log(costs_a[x] / costs_b[x]) for x in xs]
    if gaps[-1] >= 0:
        return {"kind": "never", "x": None}
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return {"kind": "from the first", "x": xs[0]}
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    low, high = math.log(xs[last]), math.log(xs[last + 1])
    return {"kind": "at", "x": math.exp(low + share * (high - low))}
