"""Progress bars on stderr for what takes long: loading, and prefill of a long prompt."""

import sys
from time import monotonic
from typing import Any

_UNITS = {"load": ("load", "B", True), "prefill": ("prompt", " tok", False)}


class Bars:
    """A progress callback (see amber.Progress) that draws once waiting is noticed: after 0.4 s on a
    terminal, after 1 s and seldom where stderr is a file."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._phase, self._done, self._since = "", 0.0, 0.0
        self._bar: Any = None

    def __call__(self, phase: str, done: float, total: float) -> None:
        now = monotonic()
        if phase != self._phase or done < self._done:
            self.close()
            self._phase, self._since = phase, now
        self._done = done
        if not self._bar and done < total and now - self._since > (0.4 if self._terminal else 1.0):
            self._bar = self._open(phase, total)
        if self._bar:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Removes the bar from the screen."""
        self._phase, bar, self._bar = "", self._bar, None
        if bar:
            bar.close()

    def _open(self, phase: str, total: float) -> Any:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread beside the engine's
        name, unit, scale = _UNITS[phase]
        return tqdm(
            desc=name,
            total=total,
            unit=unit,
            unit_scale=scale,
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.1 if self._terminal else 5,
            bar_format=None if scale else "{l_bar}{bar}| {n:.0f}/{total:.0f} [{rate_fmt}]",
        )
