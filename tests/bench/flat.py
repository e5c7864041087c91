"""Whether a row of samples stays flat. Pure: no server, no clock.

Memory that grows with the work done is lost, however slowly. So the slope is taken over requests, not over seconds,
and told for an hour's worth of them; a run on a slow machine and one on a fast one mean the same.
"""
import statistics

# An hour of one busy agent, which calls a tool and asks again, without a pause: a request every 3.6 seconds.
HOUR = 1000


def slope(xs, ys):
    """The middle of the slopes between all pairs of samples (Theil and Sen): a few that lie far off do not move it."""
    pairs = [(b - a, d - c) for i, (a, c) in enumerate(zip(xs, ys)) for b, d in zip(xs[i + 1:], ys[i + 1:])]
    slopes = [rise / run for run, rise in pairs if run > 0]
    return statistics.median(slopes) if slopes else 0.0


def judge(requests, values, step, hourly):
    """What became of one row. `requests`: done when each sample was taken, rising. It grows if the slope over all of
    them is more than `hourly` an hour's worth, or the middle of the last third lies more than `step` above that of the
    first: a jump near the end hardly tilts the line."""
    third = max(len(values) // 3, 1)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    growth = slope(requests, values) * HOUR
    return dict(first=first, last=last, highest=max(values), hourly=growth, flat=growth <= hourly and last - first <= step)
