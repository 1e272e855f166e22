"""A stop_regex whose search could take for ever is refused, and no other."""

import re
import time

import pytest

from sglang_ess.intake import stop_regex

# What each backtracks over stands in the string that it does not match.
ENDLESS = {
    r"(a+)+b": "a",
    r"^(\d+)+$": "1",
    r"(a|aa)+$": "a",
    r"(a|a)*b": "a",
    r"(?:a|b|ab)*c": "ab",
    r"(.*)*x": "a",
    r"(a*?)*?b": "a",
    r"(\w+\s?)*:": "a",
    r"(x+x+)+y": "x",
    r"([a-z]+)*[0-9]": "a",
    r"(a{1,30}){1,30}b": "a",
    r"((a{0,5}){0,5}){0,5}b": "a",
    r"(a?){25}a{25}b": "a",
    r"(?=(a+)+b)a": "a",
    r"(.*a){20}b": "a",
    r"a*a*a*b": "a",
    r".*.*.*=": "a",
    r".*foo.*bar.*x": "foobar",
    r"(?s)(.+)+END": "a",
}
QUICK = (
    *("", ".", "x*", "###|---", "foo|bar", r"\d+\.", r"\n\n+", r"[A-Z]\w*:", r"</\w+>", ".*foo"),
    *(r"\s*\d+\.", r"Answer:.*\n", r"(?s)<think>.*</think>", r"(ab|cd)*x", r"(foo|bar)+x"),
    *(r"\d{3}-\d{4}", r"[.!?]\s", r".{0,200}foo", r"\bstop\b", "(?i)the end", "^END$", "(a|ab)*c"),
    *(r"\n\s*Q\d+:", r"[^\n]*\n\n", '"[^"]*"', r"(yes|no)\b", r"\{[^}]*\}", "a{2,5}b", "é+x"),
    *(r"(\d+)?\.x", "(abc+)?d", "(ab?c)?(d+e)?f", "(a?b){2,9}c"),
    *(r"(?:\d{1,3}\.){3}\d{1,3}", "Observation:?", r"(?P<q>['\"]).*?(?P=q)", "(?i)(a|A)*b"),
)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_endless_search_is_refused(pattern):
    line = stop_regex.problem(pattern)
    assert line.startswith("stop_regex must be") and repr(pattern) in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("pattern", QUICK)
def test_a_quick_search_is_served(pattern):
    assert stop_regex.problem(pattern) is None
    letters = ["a", " ", "1", '"', "foo", "a b ", "\n", "<think>", "ab", "Answer:", "{", "aA"]
    since = time.process_time()
    for text in letters:
        re.search(pattern, (text * stop_regex.LENGTH)[: stop_regex.LENGTH] + "!")
    assert time.process_time() - since < 5


def test_what_is_no_pattern_is_refused():
    assert "regular expression" in stop_regex.problem("(")


def test_a_step_bound_holds_where_steps_can_be_counted():
    """`.*=` fails from each of n starts after n, n - 1, ... characters, out and back."""
    steps = stop_regex.LENGTH * stop_regex._Search(".*=").steps()
    assert stop_regex.LENGTH**2 <= steps <= 10 * stop_regex.LENGTH**2
