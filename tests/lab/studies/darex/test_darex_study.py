"""The study of DAREx: its rules on made-up tables, its data, its measuring, its units at toy size."""

from __future__ import annotations

import os

import pytest
import torch

from guywire.lab.studies import load
from guywire.lab.studies.darex import garments, pruning
from guywire.lab.studies.darex.claims import CLAIMS, RATE
from guywire.lab.studies.darex.page import CHECKS
from guywire.lab.studies.darex.verses import GENRES, genres
from guywire.lab.studies.runner import resolve
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Work
from guywire.methods import merging

STUDY = load("darex")
CLAIM = {claim.name: claim for claim in CLAIMS}
AT = f"accuracy at {RATE}"
without_data = pytest.mark.skipif(
    "GUYWIRE_DATA" not in os.environ, reason="needs MNIST and Fashion-MNIST in $GUYWIRE_DATA"
)


def table(cells):
    """Made-up rows: ``{(condition, metric): [one value a seed]}``."""
    return Table(
        {"condition": condition, "seed": seed, "metric": metric, "value": value}
        for (condition, metric), values in cells.items()
        for seed, value in enumerate(values)
    )


def verdict(name, cells):
    return CLAIM[name].judge(table(cells)).verdict


def test_the_rule_of_rescaling_asks_for_ten_points_and_every_seed():
    dare = ("garments: DARE", AT)
    searched = ("garments: 1/q_v", AT)
    assert (
        verdict("rescaling", {dare: [0.5, 0.5, 0.5], searched: [0.61, 0.65, 0.6]}) == "reproduced"
    )
    assert (
        verdict("rescaling", {dare: [0.5, 0.5, 0.5], searched: [0.9, 0.9, 0.49]}) == "inconclusive"
    )
    few = {dare: [0.8, 0.8, 0.8], searched: [0.82, 0.85, 0.84]}
    assert verdict("rescaling", few) == "not reproduced"
    assert verdict("rescaling", {dare: [0.1, 0.1], searched: [0.9, 0.9]}) == "inconclusive"


def test_the_rule_of_labels_allows_three_points():
    labels, none = ("garments: 1/q_v", AT), ("garments: 1/q_e", AT)
    assert verdict("unlabelled", {labels: [0.8] * 3, none: [0.775] * 3}) == "reproduced"
    assert verdict("unlabelled", {labels: [0.8] * 3, none: [0.9] * 3}) == "reproduced"
    assert verdict("unlabelled", {labels: [0.8] * 3, none: [0.75] * 3}) == "not reproduced"


def test_the_rule_of_larger_q_holds_for_both_searches_or_not():
    labels, none = ("garments: 1/q_v", f"q at {RATE}"), ("garments: 1/q_e", f"q at {RATE}")
    low = 1.0 - RATE
    assert verdict("larger", {labels: [0.1, 0.2, 0.1], none: [0.1] * 3}) == "reproduced"
    assert verdict("larger", {labels: [0.1, 0.2, 0.1], none: [0.1, low, 0.1]}) == "inconclusive"
    assert verdict("larger", {labels: [0.1, 0.2, 0.1], none: [low] * 3}) == "not reproduced"


def test_the_rule_of_training_weighs_gain_and_cost():
    def cells(gain, cost):
        return {
            ("garments: DARE", AT): [0.4] * 3,
            ("garments, AdamR-L2: DARE", AT): [0.4 + gain] * 3,
            ("garments: unpruned", "accuracy"): [0.86] * 3,
            ("garments, AdamR-L2: unpruned", "accuracy"): [0.86 - cost] * 3,
        }

    assert verdict("trained", cells(0.2, 0.009)) == "reproduced"
    assert verdict("trained", cells(0.2, 0.02)) == "not reproduced"
    assert verdict("trained", cells(0.05, 0.0)) == "not reproduced"


def test_the_rule_of_large_changes_takes_the_best_rate_and_method():
    cells = {}
    for rate in (0.5, 0.7, 0.9):
        for method, value in (("DARE", 0.8), ("MP", 0.79), ("WANDA", 0.78)):
            cells[f"garments, large: {method}", f"accuracy at {rate}"] = [value] * 3
    assert verdict("large", cells) == "not reproduced"
    cells["garments, large: WANDA", "accuracy at 0.7"] = [0.86] * 3
    assert verdict("large", cells) == "reproduced"


def test_the_rule_of_the_variance_allows_five_per_cent():
    key = ("garments: DARE", "variance ratio")
    assert verdict("variance", {key: [1.04, 0.96, 1.0]}) == "reproduced"
    assert verdict("variance", {key: [1.06, 0.96, 1.0]}) == "inconclusive"
    assert verdict("variance", {key: [1.06, 0.9, 1.2]}) == "not reproduced"


def test_the_checks_notice_a_wrong_factor():
    check = CHECKS[2]
    assert check.holds(table({("garments: DARE", "q at 0.9"): [0.1]}))
    assert not check.holds(table({("garments: DARE", "q at 0.9"): [0.2]}))
    assert not check.holds(table({("garments: MP", "q at 0.9"): [0.5]}))
    assert not check.holds(table({("garments: 1/q_v", "q at 0.9"): [0.05]}))


def test_no_verse_stands_in_two_parts_and_genres_are_equal():
    books = [book for books in GENRES.values() for book in books.split()]
    assert len(books) == len(set(books)) == 66
    verses = [
        (book, f"{book} says {i % 7} {'again' * (i % 2)}") for book in books for i in range(9)
    ]
    verses += [(book, "the same everywhere") for book in books]
    parts = genres(verses, (40, 20, 15), seed=3)
    texts = [set(part) for part, _ in parts]
    assert [len(part) for part in texts] == [40, 20, 15]  # none twice within a part
    assert not (texts[0] & texts[1])
    assert not (texts[0] & texts[2])
    assert not (texts[1] & texts[2])
    number = {book: i for i, books in enumerate(GENRES.values()) for book in books.split()}
    for part, labels in parts:
        assert all(number[text.split()[0]] == y for text, y in zip(part, labels, strict=True)
                   if text != "the same everywhere")  # fmt: skip
    assert [parts[1][1].count(i) for i in range(5)] == [4] * 5
    assert genres(verses, (40,), seed=3) == parts[:1]
    assert genres(verses, (40,), seed=4) != parts[:1]


@pytest.mark.data
def test_every_book_of_the_file_has_a_genre():
    from guywire.lab.studies.darex.verses import bible, data_file

    if not data_file().is_file():
        pytest.skip("needs kjv.txt.gz in $GUYWIRE_DATA")
    known = {book for books in GENRES.values() for book in books.split()}
    assert {book for book, _ in bible()} == known


def toy_bed(change=0.1):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = garments.Network(16)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    tuned = {n: p + change * torch.randn(p.shape, generator=generator) for n, p in base.items()}
    x = torch.randn(60, 784, generator=generator)
    bed = pruning.Bed(model, base, tuned, [(x[:30], torch.zeros(30, dtype=torch.int64))],
                      [(x[30:], torch.ones(30, dtype=torch.int64))], (0, 1, 2), (100, 101))  # fmt: skip
    bed.put(tuned)
    return bed


def test_measuring_leaves_the_fine_tuned_model_and_reports_each_factor():
    bed = toy_bed()
    found = pruning.measure(bed, 0.9)
    assert set(found) == set(pruning.METHODS)
    assert all(torch.equal(p, bed.tuned[n]) for n, p in bed.model.named_parameters())
    assert found["drop only"].q == found["MP"].q == found["WANDA"].q == 1.0
    assert found["DARE"].q == pytest.approx(0.1)
    assert all(0.1 - 1e-9 <= r.q <= 1.0 for r in found.values())
    assert found["MP"].spread == found["WANDA"].spread == 0.0


def test_what_is_measured_is_the_mean_over_the_test_masks():
    bed = toy_bed()
    values = []
    for seed in (100, 101):
        bed.put(merging.rescale_kept(
            bed.base, bed.tuned,
            merging.keep(bed.base, bed.tuned, 0.9, seed=seed, exclude="head.*"), 0.1,
        ))  # fmt: skip
        assert torch.equal(bed.model.head.weight, bed.tuned["head.weight"])
        values.append(pruning.accuracy(bed.model, bed.test))
    result = pruning.measure(bed, 0.9, ["DARE"])["DARE"]
    assert result.accuracy == pytest.approx(sum(values) / 2)
    assert result.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_searches_never_see_test_data():
    bed = toy_bed()
    broken = pruning.Bed(
        bed.model, bed.base, bed.tuned, bed.valid, [], bed.search_masks, bed.test_masks
    )
    chosen = {}
    for one in (bed, broken):
        inputs = {
            f"encoder.{n}": seen
            for n, seen in merging.layer_inputs(bed.model.encoder, bed.valid).items()
        }
        change = merging.output_change(bed.model.encoder, bed.valid)
        chosen[one is bed] = [
            pruning._factors(one, 0.9, m, inputs, change)
            for m in ("1/q_v", "1/q_e", "1/q by layer, eta", "q*")
        ]
    assert chosen[True] == chosen[False]


def test_the_variance_of_one_layer_is_as_the_formula_says():
    delta = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    x = torch.rand(200, generator=torch.Generator().manual_seed(1))
    assert pruning.output_variance(delta, x, 0.9, 150) == pytest.approx(1.0, abs=0.05)


@pytest.fixture
def work(tmp_path):
    toy = {
        "width": 24, "pretraining_samples": 400, "pretraining_epochs": 1, "samples": 600,
        "epochs": 1, "valid": 60, "test": 200, "rates": [0.9], "large_rates": [0.9], "masks": 2,
        "variance_masks": 3, "rank": 2,
    }  # fmt: skip
    return Work("darex", resolve(STUDY, smoke=False, overrides=toy), "arm", 0, tmp_path)


@without_data
@pytest.mark.data
def test_parts_of_the_images_do_not_overlap():
    train, valid, test = garments.samples("fashion-mnist", 500, 100, 200, 3)
    rows = [{row.numpy().tobytes() for row in part[0]} for part in (train, valid, test)]
    assert [len(part[1]) for part in (train, valid, test)] == [500, 100, 200]
    assert not (rows[0] & rows[1])
    assert not (rows[0] & rows[2])
    assert torch.equal(garments.samples("fashion-mnist", 5, 5, 200, 9)[2][0], test[0])


@without_data
@pytest.mark.data
def test_every_arm_yields_its_rows_and_starts_from_the_same_digits(work):
    (row,) = garments.pretrain_digits(work)
    assert row["metric"] == "accuracy"
    seen = {}
    for arm in ("plain", "large", "LoRA", "AdamR-L2", "AdamR-L1"):
        rows = garments.prune_garments(work, arm=arm, rate=1e-3, strength=0.1)
        seen[arm] = {(r["condition"], r["metric"]): r["value"] for r in rows if "step" not in r}
    methods = {c.split(": ")[1] for c, _ in seen["plain"]}
    assert methods == {*pruning.METHODS, "unpruned"}
    change = {
        arm: next(v for (c, m), v in cells.items() if m == "change") for arm, cells in seen.items()
    }
    assert change["AdamR-L2"] < change["plain"] < change["large"]
    assert change["AdamR-L1"] < change["plain"]
    again = garments.prune_garments(work, arm="AdamR-L2", rate=1e-3, strength=0.1)
    assert all(
        seen["AdamR-L2"][r["condition"], r["metric"]] == r["value"]
        for r in again
        if "step" not in r
    )


@without_data
@pytest.mark.data
def test_choosing_measures_on_validation_data_and_minds_the_floor(work):
    garments.pretrain_digits(work)
    arguments = {"arm": "AdamR-L2", "rate": 1e-3, "strength": 0.01}
    low, high = (garments.tune_garments(work, **arguments, floor=f) for f in (0.0, 1.01))
    found = [{r["metric"]: r["value"] for r in rows} for rows in (low, high)]
    assert found[0]["valid_accuracy"] == found[1]["valid_accuracy"]
    assert 0.0 <= found[0]["valid_score"] <= 1.0
    assert found[1]["valid_score"] == pytest.approx(found[0]["valid_accuracy"] - 1.01 - 1.0)
    plain = garments.tune_garments(work, arm="plain", rate=1e-3)
    assert [r["metric"] for r in plain] == ["valid_accuracy"]
