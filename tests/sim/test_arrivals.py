"""Workloads: lengths, arrival processes, trace files."""

import json

import numpy as np
import pytest

from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths, WorkloadError, draw, read_trace

MANY = 20_000
TEN = Lengths("constant", tokens=10)


def sample(lengths, seed=0):
    return lengths.draw(MANY, np.random.default_rng(seed))


# --- lengths ----------------------------------------------------------------------------


def test_uniform_lengths_include_both_ends():
    drawn = sample(Lengths("uniform", low=3, high=6))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert counts.min() > 0.9 * MANY / 4


def test_lognormal_lengths_have_their_median_and_spread_and_stay_within_bounds():
    drawn = sample(Lengths("lognormal", median=1000.0, sigma=0.5, low=200, high=4000))
    assert np.median(drawn) == pytest.approx(1000, rel=0.03)
    assert np.percentile(drawn, 84.1) == pytest.approx(1000 * np.exp(0.5), rel=0.04)
    assert drawn.min() >= 200 and drawn.max() <= 4000
    assert sample(Lengths("lognormal", median=1.0, sigma=3.0)).min() == 1


def test_a_mixture_draws_its_parts_by_weight():
    parts = (Lengths("constant", tokens=5, weight=3.0), Lengths("constant", tokens=9))
    drawn = sample(Lengths("mixture", parts=parts))
    assert set(drawn.tolist()) == {5, 9}
    assert (drawn == 5).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": "zipf"}, "kind must be one of constant, uniform"),
        ({"kind": "constant"}, "tokens must be given for kind 'constant'"),
        ({"kind": "constant", "tokens": 0}, "tokens must be more than 0: got 0"),
        ({"kind": "constant", "tokens": 5, "sigma": 1.0}, "sigma must not be given"),
        ({"kind": "uniform", "low": 9, "high": 3}, r"high must be low \(9\) or more: got 3"),
        ({"kind": "mixture"}, "parts must be given"),
    ],
)
def test_lengths_that_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        Lengths(**fields)


# --- arrivals ---------------------------------------------------------------------------


def test_poisson_arrivals_have_their_rate_and_exponential_gaps():
    seconds = draw(Arrivals("poisson", requests=MANY, rate=4.0), TEN, TEN, 1).seconds
    gaps = np.diff(seconds)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)


def test_other_arrivals():
    fixed = draw(Arrivals("fixed", requests=4, rate=2.0), TEN, TEN, 0)
    assert fixed.seconds.tolist() == [0, 0.5, 1, 1.5]
    assert draw(Arrivals("burst", requests=3), TEN, TEN, 0).seconds.tolist() == [0, 0, 0]
    closed = draw(Arrivals("closed", requests=3, clients=2), TEN, TEN, 0).seconds
    assert closed.tolist() == [0, 0, np.inf]
    assert len(draw(Arrivals("burst", requests=0), TEN, TEN, 0)) == 0


def test_a_seed_gives_one_workload_and_the_rate_does_not_change_its_lengths():
    wide = Lengths("uniform", low=1, high=1000)
    first, again, faster, other = (
        draw(Arrivals("poisson", requests=50, rate=rate), wide, wide, seed)
        for rate, seed in ((1.0, 3), (1.0, 3), (9.0, 3), (1.0, 4))
    )
    assert first.seconds.tolist() == again.seconds.tolist()
    assert first.input_tokens.tolist() == again.input_tokens.tolist()
    assert first.input_tokens.tolist() == faster.input_tokens.tolist()
    assert first.input_tokens.tolist() != other.input_tokens.tolist()
    assert first.input_tokens.tolist() != first.output_tokens.tolist()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": "poisson", "requests": 3}, "rate must be given"),
        ({"kind": "poisson", "requests": 3, "rate": -1.0}, "rate must be more than 0"),
        ({"kind": "burst", "requests": 3, "clients": 2}, "clients must not be given"),
        ({"kind": "trace"}, "path must be given"),
    ],
)
def test_arrivals_that_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        Arrivals(**fields)


# --- traces -----------------------------------------------------------------------------

ROWS = [
    {"time": 2.5, "input_tokens": 30, "output_tokens": 4, "prefix": "b", "prefix_tokens": 7},
    {"time": 0, "input_tokens": 10, "output_tokens": 1},
    {"time": 1, "input_tokens": 20, "output_tokens": 2, "prefix": "a", "prefix_tokens": 5},
    {"time": 9, "input_tokens": 40, "output_tokens": 3, "prefix": "b", "prefix_tokens": 7},
]


def write(path, rows):
    if path.suffix == ".csv":
        names = list(ROWS[0])
        lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
        path.write_text("\n".join(",".join(line) for line in lines) + "\n")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_trace_is_ordered_by_time_and_keeps_who_shares_a_prefix(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    write(path, ROWS)
    workload = read_trace(path)
    assert workload.seconds.tolist() == [0, 1, 2.5, 9]
    assert workload.input_tokens.tolist() == [10, 20, 30, 40]
    assert workload.output_tokens.tolist() == [1, 2, 4, 3]
    assert workload.prefix_tokens.tolist() == [0, 5, 7, 7]
    none, a, b, again = workload.prefix.tolist()
    assert none == -1 and b == again != a
    assert read_trace(path, 2).seconds.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{}", ":1: time: must be given"),
        ('{"time": 0, "input_tokens": 5, "output_tokens": 2}\n[1]', ":2: a line must be a JSON"),
        ("{", ":1: a line must be a JSON object"),
        ('{"time": -1, "input_tokens": 5, "output_tokens": 2}', ":1: time: .* 0 or more: got -1"),
        ('{"time": 0, "input_tokens": 5, "output_tokens": 2.5}', "output_tokens: .* whole number"),
        ('{"time": 0, "input_tokens": 5, "output_tokens": 0}', "output_tokens: .* 1 or more"),
        ('{"time": 0, "input_tokens": 5, "output_tokens": 2, "user": 3}', "user: must be one of"),
        (
            '{"time": 0, "input_tokens": 5, "output_tokens": 2, "prefix": 1, "prefix_tokens": 5}',
            "prefix_tokens: must be fewer than input_tokens",
        ),
        (
            '{"time": 0, "input_tokens": 5, "output_tokens": 2, "prefix_tokens": 3}',
            "prefix: must name",
        ),
    ],
)
def test_a_bad_trace_is_refused_with_file_and_line(tmp_path, text, where):
    path = tmp_path / "trace.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(WorkloadError, match=f"^{path}{where}" if where[0] == ":" else where):
        read_trace(path)


def test_a_short_csv_row_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("time,input_tokens,output_tokens\n0,5\n")
    with pytest.raises(
        WorkloadError, match=f"^{path}:2: a row must have a value for each of the 3"
    ):
        read_trace(path)
    with pytest.raises(WorkloadError, match="trace must be a readable text file"):
        read_trace(tmp_path / "none.csv")
