"""Every job by its --mode."""

from sit_jax.jobs import data_card, encode, invert, likelihood, quality, sample, sweep, train
from sit_jax.jobs.preflight import job as preflight

JOBS = {
    "train": train.JOB,
    "sample": sample.JOB,
    "sweep": sweep.JOB,
    "invert": invert.JOB,
    "likelihood": likelihood.JOB,
    "quality": quality.JOB,
    "encode": encode.JOB,
    "data": data_card.JOB,
    "preflight": preflight.JOB,
}
