"""Every job by its --mode."""

from sit_jax.jobs import data_card, encode, invert, likelihood, quality, sample, sweep, train
from sit_jax.jobs.evaluation import job as evaluate
from sit_jax.jobs.evaluation import stats
from sit_jax.jobs.excess import job as excess
from sit_jax.jobs.preflight import job as preflight

JOBS = {
    "train": train.JOB,
    "sample": sample.JOB,
    "evaluate": evaluate.JOB,
    "stats": stats.JOB,
    "sweep": sweep.JOB,
    "invert": invert.JOB,
    "likelihood": likelihood.JOB,
    "quality": quality.JOB,
    "excess": excess.JOB,
    "encode": encode.JOB,
    "data": data_card.JOB,
    "preflight": preflight.JOB,
}
