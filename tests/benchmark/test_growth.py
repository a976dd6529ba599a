"""Growth of cost: every step is measured, and what grows does so in proportion."""

from alexnet_pl.benchmark.growth import grow, grow_classes, grow_epochs, grow_images
from alexnet_pl.studies.growth import grow_trials


def test_images_classes_and_epochs_are_measured(tmp_path):
    rows = [
        *grow(grow_images, (30, 60), tmp_path),
        *grow(grow_classes, (40,), tmp_path),
        *grow(grow_epochs, (3,), tmp_path),
    ]
    assert [(row.quantity, row.count) for row in rows] == [
        ("images", 30),
        ("images", 60),
        ("classes", 40),
        ("epochs", 3),
    ]
    assert rows[1].seconds.keys() == {
        "list the files", "make the shards", "open the shards", "shuffle an epoch", "read an epoch"
    }  # fmt: skip
    assert rows[1].megabytes["shards"] > rows[0].megabytes["shards"]
    assert all(row.megabytes["peak memory"] > 0 and all(taken > 0 for taken in row.seconds.values()) for row in rows)
    assert (tmp_path / "epochs-3" / "report.html").is_file()


def test_a_study_of_synthetic_trials_has_a_report(tmp_path):
    row = grow_trials(8, tmp_path)
    assert row.seconds.keys() >= {"compose and hash", "each further progress line", "report"}
    report = (tmp_path / "trials-8" / "report.md").read_text(encoding="utf-8")
    assert "8 of 8" in report or "8" in report.splitlines()[2]
