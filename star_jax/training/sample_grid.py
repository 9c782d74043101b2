"""Which images does a run sample while it trains?

A few validation images are sampled from their captions, on the mesh of the run. Their number is
filled up to one that the mesh divides: a batch that it does not divide would stay whole on every
device, with its whole key-value cache.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.buckets import choose
from star_jax.core.settings import Settings
from star_jax.errors import NO_MEMORY, UserError
from star_jax.nn.transformer import Transformer
from star_jax.parallel import rules
from star_jax.parallel.mesh import batch_shards
from star_jax.protocols import Family
from star_jax.sampling import program as sampling
from star_jax.sampling import weight_layout


def padded_count(images: int, mesh: Mesh) -> int:
    """The number of images that is sampled for a grid of `images`: a multiple of the shards."""
    ways = batch_shards(mesh)
    return -(-images // ways) * ways


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """The program that samples the images of a grid.

    Attributes:
        config: the model.
        settings: how it samples.
        images: images of the grid.
        network: its transformer, with the sharding of the mesh.
        tokenizer: its tokenizer.
        mesh: the devices.
        dtype: dtype of the activations.
        negative: the condition of the settings' negative prompt, one row on the devices, or None.
    """

    config: Family
    settings: Settings
    images: int
    network: Transformer
    tokenizer: nn.Module
    mesh: Mesh
    dtype: str
    negative: Any = None

    def compile(self, params: Any, prompted: Any, empty: Any) -> jax.stages.Compiled:
        """Compiles the program.

        Args:
            params: parameters 'model' and 'tokenizer', abstract or not, with shardings.
            prompted: the condition of one prompt, abstract or not.
            empty: the condition of the empty prompt, on the devices.

        Raises:
            UserError: the program does not fit into the memory of a device.
        """
        count, split = padded_count(self.images, self.mesh), rules.batch_sharding(self.mesh)
        rows = jax.eval_shape(lambda: sampling.image_keys(range(count)))
        abstract = functools.partial(jax.ShapeDtypeStruct, sharding=split)
        prompted = jax.tree.map(lambda x: abstract((count, *x.shape[1:]), x.dtype), prompted)
        inputs = self._inputs(abstract(rows.shape, rows.dtype), prompted, empty)
        try:
            params = sampling.abstract_cast(params, self.dtype)
            params = weight_layout.arrange(params, self.network.schedule, self._platform)
            return self.program.lower(params, inputs).compile()
        except jax.errors.JaxRuntimeError as error:
            if NO_MEMORY not in str(error):
                raise
            raise UserError(
                f'a sample grid of {self.images} images ({count} on this mesh) does not fit into '
                f'the memory of a device ({error}): give fewer with --pace.images, or 0 for none'
            ) from error

    def sample(
        self,
        run: sampling.Program,
        params: Any,
        encode: Callable[[Sequence[str]], Any],
        captions: list[str],
        empty: Any,
    ) -> np.ndarray:
        """uint8 [images, H, W, 3] on every host, of these captions; image i uses seed i.

        Args:
            run: `program`, or its compiled form from `compile`.
            params: as for `compile`, on the devices.
            encode: captions -> their conditions.
            captions: at most `images` captions.
            empty: as for `compile`.
        """
        count = padded_count(self.images, self.mesh)
        rows = rules.process_rows(self.mesh, count)
        padded = [*captions, *[''] * (count - len(captions))]
        keys_B, prompted = rules.shard_batch(
            (sampling.image_keys(rows), encode([padded[row] for row in rows])), self.mesh
        )
        params = weight_layout.arrange_on_devices(
            sampling.cast(params, self.dtype), self.network.schedule, self._platform
        )
        images = run(params, self._inputs(keys_B, prompted, empty))
        return rules.gather(images)[: len(captions)]

    @functools.cached_property
    def program(self) -> Any:
        """The jitted program."""
        buckets = choose(None, self.network.schedule.sizes, self._platform)
        return sampling.compile_program(self.network, self.tokenizer, buckets)

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def _inputs(self, keys_B: Any, prompted: Any, empty: Any) -> sampling.SamplingInputs:
        inputs = sampling.inputs(
            self.config,
            self.settings,
            keys_B=keys_B,
            prompted=prompted,
            empty=empty,
            negative=self.negative,
        )
        arrays = jax.tree.map(jnp.asarray, (inputs.settings, inputs.method))
        settings, method = rules.shard(arrays, rules.replicated(self.mesh))
        return inputs.replace(settings=settings, method=method)
