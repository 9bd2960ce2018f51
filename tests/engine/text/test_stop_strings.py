"""Stop strings are found wherever the tokens' borders lie, and nothing of them leaks."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stops import StopMatcher


def cuts(text: str) -> list[list[str]]:
    """Some ways to cut a text into tokens: whole, by character, and in pieces of two and three."""
    return [[text[i : i + n] for i in range(0, len(text), n)] for n in (len(text) or 1, 1, 2, 3)]


def run(matcher: StopMatcher, pieces: list[str]) -> str:
    for piece in pieces:
        if matcher.push(piece):
            break
    return matcher.text


TABLE = [
    ("one END two", ["END"], "one ", "END"),
    ("one EN two", ["END"], "one EN two", None),
    ("ababac", ["abac"], "ab", "abac"),  # the match begins inside a failed one
    ("aaab", ["aab"], "a", "aab"),
    ("x\nUser:", ["\n\n", "\nUser:"], "x", "\nUser:"),
    ("abcd", ["abcd", "bc"], "a", "bc"),  # ends first, wherever it began
    ("xabc", ["bc", "abc", "c"], "x", "abc"),  # of several that end together the longest
    ("END", ["END"], "", "END"),
    ("日本語。次", ["。"], "日本語", "。"),
    ("no stops", [], "no stops", None),
]


@pytest.mark.parametrize(("text", "stops", "kept", "stop"), TABLE)
@pytest.mark.parametrize("include", [False, True])
def test_the_cut_does_not_depend_on_token_borders(
    text: str, stops: list[str], kept: str, stop: str | None, include: bool
) -> None:
    for pieces in cuts(text):
        matcher = StopMatcher(stops, include=include)
        assert run(matcher, pieces) == kept + (stop if include and stop else ""), pieces
        assert matcher.stop == stop


stops_of = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stops=stops_of)
def test_random_texts_stop_where_a_plain_search_says(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(text.index(s) + len(s), -len(s), s) for s in stops if s in text]
    matcher = StopMatcher(stops)
    kept = run(matcher, pieces)
    if not ends:
        assert (kept, matcher.stop) == (text, None)
    else:
        end, _, stop = min(ends)
        assert (kept, matcher.stop) == (text[: end - len(stop)], stop)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stops=stops_of)
def test_what_is_shown_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        if matcher.push(piece):
            break
        text = matcher.text
        longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert matcher.held() == longest, "no more is held back than could become a stop string"
        if len(text) % 3:  # whether or not every token is looked at
            shown += matcher.take()
            assert shown == text[: len(text) - longest]
    text = matcher.text
    assert shown + matcher.take() == text[: len(text) - matcher.held()]


def test_unarmed_text_cannot_end_a_stop_string() -> None:
    matcher = StopMatcher(["ab"])
    assert not matcher.push("ab a", armed=False)
    assert matcher.push("b", armed=True)  # begun before, ended after
    assert matcher.text == "ab "


def test_sixty_four_long_stop_strings_stay_cheap() -> None:
    # 64 x 1,024 characters that all nearly match the text: a naive search costs 65,000 steps a token.
    stops = ["a" * 1022 + chr(0x100 + i) + "a" for i in range(64)]
    matcher = StopMatcher(stops)
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        stopped = [matcher.push("aaaa") for _ in range(500)]
        held = matcher.held()
    finally:
        sys.setprofile(None)
    assert not any(stopped)
    assert held == 1022
    assert calls < 500 * 1000, f"{calls} calls for 500 tokens"
