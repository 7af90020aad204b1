"""Checks of ArrayRecord files before the first record is read."""

import concurrent.futures
import functools
from collections.abc import Iterable

from array_record.python import array_record_module

from sit_jax import storage
from sit_jax.errors import UserError, check

_THREADS = 16


def check_shards(records: Iterable[tuple[str, int]], remedy: str = "copy it again") -> None:
    """Open each of these files, given with its number of records.

    Raises `UserError` that names the first that is missing, truncated, or holds another number
    of records.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(functools.partial(_check_shard, remedy), records))


def _check_shard(remedy: str, shard: tuple[str, int]) -> None:
    path, expected = shard
    try:
        reader = array_record_module.ArrayRecordReader(path)
        records = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read ({storage.reason(error)}); {remedy}") from error
    check(records == expected, f"{path} has {records:,} records instead of {expected:,}; {remedy}")
