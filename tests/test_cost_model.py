"""The cost model of `benchmarks.scaling` finds the numbers that made its measurements, and predicts what follows."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cost_model import (
    AllReduce,
    Machine,
    Work,
    fit_compute,
    fit_exchange,
    pays_until,
    slowest_of,
    strong,
    weak,
)

MACHINE = Machine(latency_ms=0.01, bytes_per_ms=3e8, network_bytes_per_ms=5e7, network_latency_ms=0.02, gpus_on_host=8)
WORK = Work(2.0, 0.08, 0.0, 0.001, 0.05, exchanged=1e8)
COUNTS = [2**power for power in range(11)]


def test_compute_is_the_line_through_steps() -> None:
    assert fit_compute({96: 2 + 0.08 * 96, 192: 2 + 0.08 * 192, 384: 2 + 0.08 * 384}) == pytest.approx((2, 0.08))
    assert fit_compute({10: 5.0}) == (0, 0.5)
    launch, sequence = fit_compute({1: 0.9, 2: 2.1, 4: 4.4})  # a line that would cross below 0
    assert launch == 0
    assert sequence == pytest.approx(1.0, abs=0.1)


def test_exchange_is_latency_and_a_rate() -> None:
    measured = [AllReduce(n, size, MACHINE.all_reduce_ms(n, size)) for n in (2, 4) for size in (4.0, 1e6, 1e8)]
    assert fit_exchange(measured) == pytest.approx((0.01, 3e8))
    assert fit_exchange(measured[:3]) == pytest.approx((0.01, 3e8)), "two processes tell both"


def test_a_ring_over_hosts_is_as_fast_as_its_slowest_link() -> None:
    assert MACHINE.all_reduce_ms(1, 1e8) == 0
    within = MACHINE.all_reduce_ms(8, 1e8)
    assert within == pytest.approx(0.03 + 2 * 7 / 8 * 1e8 / 3e8)
    assert MACHINE.all_reduce_ms(16, 1e8) == pytest.approx(0.03 + 0.02 + 2 * 15 / 16 * 1e8 / 3e8)  # 8 cards are faster
    slow = replace(MACHINE, network_bytes_per_ms=1e7)
    assert slow.all_reduce_ms(8, 1e8) == within
    assert slow.all_reduce_ms(16, 1e8) == pytest.approx(0.03 + 0.02 + 2 * 15 / 16 * 1e8 / 8e7)


def test_all_wait_for_the_slowest() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 8, 64):
        drawn = rng.standard_normal((20_000, count)).max(1).mean()
        assert slowest_of(count) == pytest.approx(drawn, abs=0.03)
    steady, uneven = (replace(WORK, spread_ms=spread).step_ms(MACHINE, 8, 96) for spread in (0.0, 0.5))
    assert uneven - steady == pytest.approx(0.5 * slowest_of(8))


def test_a_slow_loader_counts_and_a_fast_one_is_hidden() -> None:
    assert WORK.step_ms(MACHINE, 1, 384) == pytest.approx(2 + 0.08 * 384)
    assert replace(WORK, loader_ms=0.2).step_ms(MACHINE, 1, 384) == pytest.approx(0.2 * 384)


def test_rows_of_the_table_grow_with_all_batches_together() -> None:
    handed = replace(WORK, rows=2048.0)
    more = [handed.step_ms(MACHINE, n, 384) - WORK.step_ms(MACHINE, n, 384) for n in (64, 128)]
    latency = 0.03 + 0.02 * 3
    assert (more[1] - latency - 0.02) / (more[0] - latency) == pytest.approx(2, rel=0.02)


def test_scaling_by_share_and_by_batch() -> None:
    same_share, same_batch = weak(WORK, MACHINE, 384, COUNTS), strong(WORK, MACHINE, 768, COUNTS)
    assert [row.gpus for row in same_batch] == [1, 2, 4, 8, 16, 32, 64, 128, 256], "768 divides by no more"
    assert same_share[0].efficiency == same_batch[0].efficiency == 1
    assert same_share[3].sequences_per_s == pytest.approx(8 * 384 / WORK.step_ms(MACHINE, 8, 384) * 1000)
    for rows in (same_share, same_batch):
        assert all(few.efficiency > many.efficiency for few, many in itertools.pairwise(rows))
    assert pays_until(same_share) == 1024
    until = pays_until(same_batch)
    rate = {row.gpus: row.sequences_per_s for row in same_batch}
    assert rate[until] >= 1.5 * rate[until // 2]
    assert rate[2 * until] < 1.5 * rate[until]
