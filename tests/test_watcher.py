"""The log line of an interval has every scalar of its steps by name, including new ones."""

import pytest

from sit_jax.jobs.watcher import summarise_interval


def step(loss=1.0, finite=True, **scalars):
    values = {"grad_norm": 2.0, "learning_rate": 0.1, "skipped_images": 0}
    return {**values, "loss": loss, "finite": finite, **scalars}


def test_a_new_scalar_is_averaged_and_passed_on_by_its_name():
    steps = [step(align_loss=1.0), step(align_loss=4.0)]
    assert summarise_interval(steps)["align_loss"] == pytest.approx(2.5)


def test_known_scalars_come_first_and_in_their_order():
    summary = summarise_interval([step(align_loss=1.0)])
    assert list(summary) == ["loss", "grad_norm", "learning_rate", "align_loss"]


def test_the_learning_rate_is_the_last_and_skipped_images_are_summed():
    steps = [step(learning_rate=0.1, skipped_images=2), step(learning_rate=0.2, skipped_images=3)]
    summary = summarise_interval(steps)
    assert summary["learning_rate"] == 0.2 and summary["skipped_images"] == 5


def test_steps_that_are_not_finite_are_counted_and_left_out_of_the_means():
    steps = [step(loss=float("nan"), finite=False, learning_rate=0.3), step(loss=3.0)]
    summary = summarise_interval(steps)
    assert summary["loss"] == 3.0 and summary["skipped_updates"] == 1
    only_bad = summarise_interval(steps[:1])
    assert "loss" not in only_bad and only_bad["learning_rate"] == 0.3


def test_a_step_carried_over_from_an_older_checkpoint_may_lack_a_scalar():
    assert summarise_interval([step(), step(align_loss=4.0)])["align_loss"] == 4.0
