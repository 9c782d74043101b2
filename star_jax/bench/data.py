"""How fast does the data pipeline deliver batches, compared with one thread that reads alone?"""

import dataclasses
import itertools
import time
from typing import Any

from star_jax.bench import timing
from star_jax.data import pipeline
from star_jax.data.pipeline import Source
from star_jax.errors import UserError
from star_jax.parallel import machine, mesh

MOST_THREADS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingJob:
    """The batches that are read.

    Attributes:
        batch: examples of a batch.
        batches: batches that are timed.
        threads: threads of the pipeline that read ahead.
    """

    batch: int
    batches: int = 20
    threads: int = 4

    def __post_init__(self) -> None:
        if min(self.batch, self.batches) < 1 or self.threads < 0:
            raise UserError(
                'batch and batches must be at least 1 and threads at least 0, not '
                f'{self.batch}, {self.batches} and {self.threads}'
            )
        timing.check_runs('batches', self.batches)
        if self.threads > MOST_THREADS:
            raise UserError(f'threads must be at most {MOST_THREADS:,}, not {self.threads:,}')


def run(source: Source, job: ReadingJob) -> dict[str, Any]:
    """Images per second of the pipeline and of one thread alone, and their ratio.

    The single thread reads as many examples as the pipeline, evenly spread over the source.

    Args:
        source: the dataset.
        job: sizes of the batches, and threads.

    Raises:
        UserError: the dataset is empty, or memory does not hold a batch.
    """
    count = job.batch * job.batches
    if not len(source):
        raise UserError('the dataset is empty: expected at least one example')
    machine.check_memory(f'a batch of {job.batch:,} images', job.batch * source[0]['image'].nbytes)
    start = time.perf_counter()
    for index in range(count):
        source[index * len(source) // count]
    one_thread = count / (time.perf_counter() - start)
    batches = pipeline.batches(source, batch=job.batch, seed=0, threads=job.threads)
    next(batches)  # starts the threads
    start = time.perf_counter()
    for _ in itertools.islice(batches, job.batches):
        pass
    pipelined = count / (time.perf_counter() - start)
    batches.close()
    return {
        'examples': len(source),
        'images_per_second': pipelined,
        'one_thread_images_per_second': one_thread,
        'speedup': pipelined / one_thread,
        'speedup_per_core': pipelined / one_thread / mesh.cores(),
        'environment': machine.describe(),
    }
