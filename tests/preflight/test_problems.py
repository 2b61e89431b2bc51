from __future__ import annotations

from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.preflight.problems import KEPT_PER_KIND, Problems, kind_of


def test_the_verdict_follows_the_worst_problem():
    problems = Problems()
    assert problems.verdict == "ready"
    problems.add("warning", "odd")
    assert problems.verdict == "warnings"
    problems.add("error", "wrong")
    assert problems.verdict == "not_ready"


def test_an_errors_place_stands_apart_from_its_text():
    problems = Problems()
    problems.add_error(SampleError("bad", file="a.jsonl", line=3, got="x", expected="y", do="z"))
    [problem] = problems.found
    assert (problem.file, problem.line, problem.place) == ("a.jsonl", 3, "a.jsonl:3")
    assert problem.message == "bad; got: x; expected: y; do: z"


def test_each_of_a_group_is_a_problem():
    problems = Problems()
    problems.add_error(ErrorGroup([VlmtuneError("one"), ErrorGroup([VlmtuneError("two")])]))
    assert [p.message for p in problems.found] == ["one", "two"]
    assert problems.num("error") == 2


def test_of_a_kind_a_thousand_are_kept_and_all_are_counted():
    problems = Problems()
    for line in range(KEPT_PER_KIND + 7):
        problems.add_error(SampleError(f"the id '{line}' is used twice", file="a", line=line))
    problems.add("warning", "odd")
    first, second = problems.kinds()
    assert (first.severity, first.count) == ("error", KEPT_PER_KIND + 7)
    assert sum(problem.kind == first.kind for problem in problems.found) == KEPT_PER_KIND
    assert (second.severity, second.count) == ("warning", 1)


def test_names_and_numbers_make_no_kind():
    assert kind_of("the id 'a' is used twice") == kind_of("the id 'b' is used twice")
    assert kind_of("turn 3 (user) is empty") == kind_of("turn 12 (assistant) is empty")
    assert kind_of("the line is not UTF-8 (byte 15)") == "the line is not UTF-8 …"
    assert kind_of("turn 3 is empty") != kind_of("turn 3 has no role")
