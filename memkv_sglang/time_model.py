"""How long work takes, learnt from how long it took: for loads and for prefills alike."""

import threading

MEMORY = 0.9
"""Weight of an observation against the one after it: the last ten or so decide."""

_SINGULAR = 1e-9
"""Determinant over the product of the diagonal, below which two quantities tell one thing."""


class TimeModel:
    """Seconds as `a * x + b * y` with `a, b >= 0`, by least squares over what was observed.

    Normal equations with exponential forgetting: see "recursive least squares". Thread-safe.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._lock = threading.Lock()
        self._xx = self._xy = self._yy = self._xt = self._yt = 0.0

    def observe(self, x: float, y: float, seconds: float) -> None:
        """Take note of work that has been done."""
        with self._lock:
            self._xx = MEMORY * self._xx + x * x
            self._xy = MEMORY * self._xy + x * y
            self._yy = MEMORY * self._yy + y * y
            self._xt = MEMORY * self._xt + x * seconds
            self._yt = MEMORY * self._yt + y * seconds

    def predict(self, x: float, y: float) -> float | None:
        """Return the seconds for so much work, the lower end of `bounds`; None if not known."""
        bounds = self.bounds(x, y)
        return None if bounds is None else bounds[0]

    def bounds(self, x: float, y: float) -> tuple[float, float] | None:
        """Return the seconds for so much work, at least and at most; None if not known.

        The two differ where `x` and `y` have always gone together, so that nobody can say which of
        them costs the time.
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
