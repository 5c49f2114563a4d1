"""Confusion, calibration and overlap of particles against answers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.steps.agreement import (
    MISSED,
    SPURIOUS,
    accuracy,
    calibration,
    confusion,
    match_particles,
    missing_atoms,
    roc,
)


def test_confusion_counts_pairs_and_accuracy_forgives_empty_sites_that_are_left_empty():
    true = ["Mo", "Mo", "2S", "2S", "0S", "0S", SPURIOUS]
    found = ["Mo", "2S", "2S", MISSED, MISSED, "1S", "Mo"]
    table = confusion(true, found)
    assert table.true == ("0S", "2S", "Mo", SPURIOUS)
    assert table.found == ("1S", "2S", "Mo", MISSED)
    assert table.counts.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 0]]
    assert accuracy(table, absent=["0S"]) == 3 / 6
    assert accuracy(table) == 2 / 6


def test_accuracy_of_nothing_is_no_number():
    assert np.isnan(accuracy(confusion([], [])))


def test_calibration_of_honest_probabilities_is_near_zero_and_of_boasts_is_what_they_add():
    generator = np.random.default_rng(0)
    stated = generator.uniform(0, 1, 20_000)
    honest = calibration(stated, generator.random(20_000) < stated, bins=10)
    assert honest.error < 0.012
    assert honest.number.sum() == 20_000
    assert np.abs((honest.share - honest.probability) / honest.share_error).max() < 4
    boast = calibration(np.full(1000, 0.95), np.arange(1000) < 700, bins=10)
    assert boast.error == pytest.approx(0.25)
    assert boast.share[9] == 0.7
    assert np.isnan(boast.share[:9]).all()


def test_calibration_leaves_out_what_states_nothing_and_takes_certainty():
    found = calibration(np.array([1.0, np.nan, 0.0]), np.array([True, True, False]), bins=5)
    assert found.number.tolist() == [1, 0, 0, 0, 1]
    assert found.error == 0
    assert np.isnan(calibration(np.empty(0), np.empty(0, bool), bins=5).error)


def squares(*corners, size=40):
    labels = np.zeros((size, size), int)
    for label, (top, left, edge) in enumerate(corners, start=1):
        labels[top : top + edge, left : left + edge] = label
    return labels


def test_particles_are_matched_one_to_one_by_overlap():
    true = squares((0, 0, 10), (20, 20, 10))
    found = squares((20, 22, 10), (0, 0, 10), (35, 0, 4))
    overlap = match_particles(found, true, least=0.5)
    assert overlap.found.tolist() == [1, 2]
    assert overlap.true.tolist() == [2, 1]
    assert overlap.iou == pytest.approx([80 / 120, 1.0])
    assert (overlap.spurious.tolist(), overlap.lost.tolist()) == ([3], [])
    assert (overlap.both, overlap.either) == (180, 236)


def test_a_particle_cut_in_two_is_found_once_at_most():
    true, found = squares((0, 0, 10)), squares((0, 0, 10))
    found[:, 6:] *= 2
    overlap = match_particles(found, true, least=0.5)
    assert (overlap.iou.tolist(), overlap.spurious.tolist()) == ([0.6], [2])
    assert match_particles(found, true, least=0.7).lost.tolist() == [1]


def test_no_particles_at_all():
    empty = np.zeros((8, 8), int)
    overlap = match_particles(empty, empty, least=0.5)
    assert (len(overlap.iou), overlap.both, overlap.either) == (0, 0, 0)
    assert match_particles(empty, squares((0, 0, 3), size=8), least=0.5).lost.tolist() == [1]


def test_missing_atoms_of_paired_and_single_sites():
    assert missing_atoms(["Mo", "2S", "1S", "0S"]) == 3
    assert missing_atoms(["C", "C", "0C", "Si"]) == 1
    assert missing_atoms(["W", "TeSe", "2Te", "1Se", "0Se"]) == 3
    assert missing_atoms([]) == 0


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    wanted, others = np.array([1.0, 1.2, 3.0]), np.array([2.0, 5.0, np.nan, 1.2])
    found = roc(wanted, others)
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in wanted for b in np.nan_to_num(others, nan=np.inf)]
    assert found.area == pytest.approx(np.mean(pairs))
    assert found.true[-1] == found.false[-1] == 1.0
    at = np.flatnonzero(found.threshold == 1.2)[0]
    assert (found.true[at], found.false[at]) == (2 / 3, 1 / 4)


def test_a_threshold_between_what_is_told_apart():
    found = roc(np.array([1.0, 1.1, 1.3]), np.array([2.6, 9.0, np.nan]))
    assert (found.area, found.error) == (1.0, 0.0)
    assert found.best == pytest.approx(np.sqrt(1.3 * 2.6))
    many = roc(np.linspace(1, 1.5, 200), np.linspace(1.4, 9, 200))
    assert 1.35 < many.best < 1.55
    swapped = roc(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    assert swapped.area == 0.0


def test_the_standard_error_of_the_area_is_that_of_repetition():
    generator = np.random.default_rng(0)
    found = [roc(generator.normal(0, 1, 60), generator.normal(1.5, 1, 60)) for _ in range(300)]
    assert np.std([one.area for one in found]) == pytest.approx(np.mean([one.error for one in found]), rel=0.15)
