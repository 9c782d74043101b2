"""Which parts make a VAR model?

Class-conditional next-scale prediction (STAR specification 11): learned positions, and
modulation of every layer and of the head by the vector of each image's class. Guidance, filter and
the fields that STAR and VAR share stand in `families/scales.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from star_jax.core.classes import Classes, check_classes
from star_jax.core.condition import LabelCondition
from star_jax.core.settings import Remat
from star_jax.families.scales import Scales
from star_jax.nn.attention_dispatch import AUTOMATIC
from star_jax.nn.conditioning import LabelStart, ModulationOffset, VectorModulation
from star_jax.nn.heads import ModulatedHead
from star_jax.nn.positions import AnyPositions, Learned
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Kernel, LoadEncoder

HEAD_MODULATION_INIT = 0.5  # shrinks the weights of the head's modulation at the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Var(Scales):
    """A class-conditional VAR transformer; the defaults are the published d16 at 256 px.

    Attributes:
        classes: number of classes.
        names: names of the classes in order, as the labels of the data spell them (none: labels are
            numbers from 0).
        positions: position encoding; another kind is chosen in a config file.
        shared_adaln: share one class modulation among all blocks, with a learned offset per block
            (VAR-d36), instead of one projection per block.
        gate_init: factor on the initial gates of the modulation.
    """

    classes: int = 1000
    names: tuple[str, ...] = ()
    positions: AnyPositions = Learned()
    gate_init: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_classes(self.classes, self.names)

    @classmethod
    def published(cls, depth: int, **fields: Any) -> 'Var':
        """The published sizes of a depth: 64 channels per layer, one head for each of them."""
        sizes = {'width': 64 * depth, 'heads': depth, 'drop_path': 0.1 * depth / 24}
        return cls(depth=depth, **(sizes | fields))

    def build(
        self,
        dtype: str = 'float32',
        remat: Remat = 'none',
        unroll: int = 1,
        attend: Kernel = AUTOMATIC,
    ) -> Transformer:
        """The network, with activations of `dtype` and attention computed by `attend`."""
        modulation = functools.partial(VectorModulation, self.width, self._modulation_init)
        if self.shared_adaln:
            modulation = functools.partial(ModulationOffset, self.width, self.offset_init)
        shared = VectorModulation(self.width, self.init) if self.shared_adaln else None
        return self.network(
            starter=LabelStart(self.width, self.classes, self.schedule.sizes[0], self.init),
            block=self.block(attend, self.out_init, modulation=modulation),
            to_logits=ModulatedHead(
                self.width, self.vocabulary.num_logits, self.head_init, self._head_modulation_init
            ),
            modulator=shared,
            remat=remat,
            unroll=unroll,
            dtype=dtype,
        )

    def prompt_encoder(self, load: LoadEncoder) -> Classes:
        """The table of classes; `load` is not called."""
        return Classes(self.classes, self.names)

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> LabelCondition:
        """Shapes of labels."""
        return LabelCondition(ids_B=jax.ShapeDtypeStruct((batch,), jnp.int32))

    def _modulation_init(
        self, key: jax.Array, shape: tuple[int, int], dtype: Any = float
    ) -> jax.Array:
        """Gates shrink to almost nothing, scales and shifts to a half."""
        kernel = self.init(key, shape, dtype)
        gates = 2 * self.width
        return kernel.at[:, :gates].multiply(self.gate_init).at[:, gates:].multiply(0.5)

    def _head_modulation_init(
        self, key: jax.Array, shape: tuple[int, int], dtype: Any = float
    ) -> jax.Array:
        return HEAD_MODULATION_INIT * self.init(key, shape, dtype)
