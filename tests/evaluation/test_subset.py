from vlmtune.evaluation.references import fixed_subset


def test_a_subset_is_fixed_by_its_seed_and_keeps_the_order() -> None:
    chosen = fixed_subset(range(100), 10, seed=1)
    assert chosen == sorted(set(chosen)) == fixed_subset(range(100), 10, seed=1)
    assert chosen != fixed_subset(range(100), 10, seed=2)
    assert chosen != list(range(10))


def test_no_limit_or_a_high_one_takes_all() -> None:
    assert fixed_subset("abc", None, seed=0) == fixed_subset("abc", 3, seed=0) == ["a", "b", "c"]
