"""Predict the duration of loads and prefills from earlier ones."""

import threading

MEMORY = 0.9
"""Weight of an observation relative to the next one. About the last ten observations count."""

_SINGULAR = 1e-9
"""Smaller determinants, relative to the product of the diagonal, mean that `x` and `y` are
collinear."""


class TimeModel:
    """Fits seconds as `a * x + b * y`, with `a, b >= 0`, to observations. Thread-safe.

    Uses recursive least squares with exponential forgetting, by the normal equations.
    """

    def __init__(self) -> None:
        """Create a model without observations."""
        self._lock = threading.Lock()
        self._xx = self._xy = self._yy = self._xt = self._yt = 0.0

    def observe(self, x: float, y: float, seconds: float) -> None:
        """Record that the work `x`, `y` took so many seconds."""
        with self._lock:
            self._xx = MEMORY * self._xx + x * x
            self._xy = MEMORY * self._xy + x * y
            self._yy = MEMORY * self._yy + y * y
            self._xt = MEMORY * self._xt + x * seconds
            self._yt = MEMORY * self._yt + y * seconds

    def predict(self, x: float, y: float) -> float | None:
        """Return the predicted seconds, the lower of the `bounds`; None without observations."""
        bounds = self.bounds(x, y)
        return None if bounds is None else bounds[0]

    def bounds(self, x: float, y: float) -> tuple[float, float] | None:
        """Return the lower and upper bound of the predicted seconds; None without observations.

        They differ if `x` and `y` were always proportional, so that the observations do not show
        which of them costs the time.
        """
        with self._lock:
            if not self._xx:
                return None
            x_alone = self._xt / self._xx
            if not self._yy:
                return x_alone * x, x_alone * x
            y_alone = self._yt / self._yy
            determinant = self._xx * self._yy - self._xy**2
            if determinant <= _SINGULAR * self._xx * self._yy:
                return min(x_alone * x, y_alone * y), max(x_alone * x, y_alone * y)
            a = (self._xt * self._yy - self._yt * self._xy) / determinant
            b = (self._yt * self._xx - self._xt * self._xy) / determinant
        a, b = (0.0, y_alone) if a < 0 else (x_alone, 0.0) if b < 0 else (a, b)
        return a * x + b * y, a * x + b * y
