"""Which settings does a user choose for sampling?"""

import dataclasses
from typing import Literal

from star_jax.core.argument_types import choice, flag, instance, number, text, whole_number
from star_jax.core.unmasking import Mode
from star_jax.errors import UserError

Dtype = Literal['float32', 'bfloat16']  # dtypes of activations
# What a layer's backward pass recomputes: nothing; all but the outputs of matrix products with
# weights; or all but the layer's input.
Remat = Literal['none', 'dots', 'full']
StableVersion = Literal['off', 'new', '1024']

LIMIT = 1e6  # logits that are scaled by more overflow float32


def check_divisor(temperature: float) -> None:
    """Raises UserError for a temperature by which logits cannot be divided."""
    if not 1 / LIMIT <= temperature <= LIMIT:
        raise UserError(f'temperature must lie in [{1 / LIMIT:g}, {LIMIT:g}], not {temperature}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableSettings:
    """Causal-driven stable sampling, for a model with a refinement head (STAR specification 9).

    Attributes:
        version: off; 'new': the head samples a scale in eight passes; '1024': 15 passes from scale
            13 on, and in earlier scales eight passes, the first five by the base model.
        mode: schedule of the number of tokens that each pass fixes; all of them start with few.
        first: first refined scale, counted from 0 (0: the first scale that the head was trained
            for).
        last: last refined scale (0: the last scale of the model).
        once: passes of the base model fix exactly their number of tokens; the published code also
            fixes as many of the most certain tokens.
    """

    version: StableVersion = 'off'
    mode: Mode = 'arccos'
    first: int = 0
    last: int = 0
    once: bool = False

    def __post_init__(self) -> None:
        choice('stable.version', self.version, StableVersion)
        choice('stable.mode', self.mode, Mode)
        whole_number('stable.first', self.first)
        whole_number('stable.last', self.last)
        flag('stable.once', self.once)
        if min(self.first, self.last) < 0:
            raise UserError(
                f'stable.first and stable.last count scales from 0, not {self.first} and '
                f'{self.last}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are sampled.

    Attributes:
        guidance: classifier-free guidance, as published for the family of the model; that of STAR
            and VAR grows from 0 to this (off, at half the work: 0; Infinity and LlamaGen: 1).
        top_k: sample among this many most probable codes (0, or more than there are: all).
        top_p: then sample among the most probable ones that hold this share of their probability
            (0: all).
        temperature: divisor of the logits; below 1 sharpens the distribution (0: almost only the
            most probable code, of LlamaGen models alone).
        guidance_layers: where guidance combines the rows with and without a prompt: 0 the logits,
            -1 the output of the last layer, -2 of the one before it, and so on.
        guidance_per_step: guidance of each step, in place of `guidance` (none: that for all).
        guided_steps: guide the first so many steps only (0: all); a published cfg_interval of k
            guides k + 2.
        temperature_per_step: temperature of each step, in place of `temperature` (none: that for
            all).
        negative: prompt that guidance moves images away from, in place of the empty prompt ('': the
            empty prompt).
        stop: sample the first so many steps only, for a coarse image (0: all).
        smooth: mix code vectors instead of sampling codes; top_k, top_p and temperature are
            ignored; images are cleaner and follow the prompt less.
        stable: stable sampling of the finer scales in several passes, by a refinement head.
    """

    guidance: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    temperature: float = 1.0
    guidance_layers: tuple[int, ...] = (0,)
    guidance_per_step: tuple[float, ...] = ()
    guided_steps: int = 0
    temperature_per_step: tuple[float, ...] = ()
    negative: str = ''
    stop: int = 0
    smooth: bool = False
    stable: StableSettings = StableSettings()

    def __post_init__(self) -> None:
        number('guidance', self.guidance)
        whole_number('top_k', self.top_k, ' (0: all)')
        number('top_p', self.top_p, ' (0: all)')
        number('temperature', self.temperature)
        for name in ('guidance_layers', 'guidance_per_step', 'temperature_per_step'):
            check = whole_number if name == 'guidance_layers' else number
            for value in instance(name, getattr(self, name), tuple, 'a tuple of numbers'):
                check(f'a number of {name}', value)
        text('negative', self.negative)
        whole_number('stop', self.stop, ' (0: all steps)')
        whole_number('guided_steps', self.guided_steps, ' (0: all steps)')
        flag('smooth', self.smooth)
        instance('stable', self.stable, StableSettings, 'True, False or a StableSettings')
        for guidance in (self.guidance, *self.guidance_per_step):
            if not 0 <= guidance <= LIMIT:
                raise UserError(f'guidance must lie in [0, {LIMIT:g}], not {guidance}')
        if self.stop < 0:
            raise UserError(f'stop must not be negative (0: all steps), not {self.stop}')
        if self.guided_steps < 0:
            raise UserError(
                f'guided_steps must not be negative (0: all steps), not {self.guided_steps}'
            )
        if self.top_k < 0:
            raise UserError(f'top_k must not be negative (0: all), not {self.top_k}')
        if not 0 <= self.top_p <= 1:
            raise UserError(f'top_p must lie in [0, 1], not {self.top_p}')
        for temperature in (self.temperature, *self.temperature_per_step):
            if not 0 <= temperature <= LIMIT:
                raise UserError(f'temperature must lie in [0, {LIMIT:g}], not {temperature}')
        if not self.guidance_layers or max(self.guidance_layers) > 0:
            raise UserError(
                'guidance_layers must hold 0 (the logits) or negative numbers (layers, -1 the '
                f'last), not {self.guidance_layers}'
            )
