"""Benchmarks of training time every loss, and steps with and without a teacher."""

from jettclip.bench_train import benchmark_losses, benchmark_train


def test_losses_are_all_timed():
    table = benchmark_losses(batches=(40,), width=36, repeats=2)
    assert {"svd", "primary_components", "none", "gd", "crd+fd"} <= set(table.what) and (
        table.p50_ms > 0
    ).all()
    assert table.set_index("what").ratio[["svd", "none"]].tolist() == [1, 1]


def test_training_is_timed_with_and_without_a_teacher():
    table = benchmark_train(batch=4, pairs=8, methods=("afd", "mfd"), repeats=2)
    assert list(zip(table.method, table.teacher)) == [
        ("none", ""),
        ("afd", "cached"),
        ("mfd", "cached"),
        ("mfd", "online"),
    ]
    assert table.ratio[0] == 1 and (table.samples_s > 0).all() and table.waiting.between(0, 1).all()
