"""Do ten alternating steps in float64 equal those of a plain PyTorch loop?

The loop and its record: tests/golden/competition/make.py.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from star_jax.convert import adversarial
from star_jax.convert.entries import to_params, to_state
from star_jax.convert.raster_vq import raster_vq_entries
from star_jax.losses.tokenizer import EntropyOfCodes
from star_jax.nn.discriminators import PatchGAN
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.training.adversary import Competition
from star_jax.training.objective import Adversary, Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import TokenizerRun
from star_jax.training.schedules import LearningRate
from star_jax.training.tokenizer_program import TokenizerProgram

RECORD = Path(__file__).parent / 'golden' / 'competition' / 'steps.safetensors'
CLOSE = 1e-6  # relative
BUFFERS = ('.running_mean', '.running_var')
LOSSES = ('loss', 'adversary/generator', 'adversary/adaptive', 'adversary/discriminator')
ADAM = AdamW(
    learning_rate=LearningRate(peak=1e-3, warmup_steps=0, end=1.0), weight_decay=0.0, clip=1.0
)
ADVERSARY = Adversary(
    discriminator=PatchGAN(width=4, layers=2), start=4, adaptive=True, optimizer=ADAM
)
RUN = TokenizerRun(
    model=RasterVQ(
        autoencoder=Autoencoder(
            width=4, multipliers=(1, 2), blocks=1, groups=2, latent=6, fused_attention=False
        ),
        grid=(8, 8),
        codes=16,
        channels=4,
    ),
    objective=Objective(l1=0.0, edges=0.0, entropy=EntropyOfCodes(weight=0.1), adversary=ADVERSARY),
    data=tiny.DATA,
    plain_steps=0,
)


def recorded(when: str, network: str) -> dict[str, np.ndarray]:
    prefix = f'{when}.{network}.'
    arrays = load_file(RECORD)
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


@functools.cache
def trained() -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """The tensors of both networks after the steps, by published name, and the losses of each."""
    arrays = load_file(RECORD)
    steps, _, *size, _ = arrays['images'].shape
    tables = {
        'tokenizer': raster_vq_entries(RUN.model),
        'discriminator': adversarial.discriminator_entries(ADVERSARY.discriminator),
    }
    with jax.enable_x64(True):
        competition = Competition.build(
            ADVERSARY, resolution=tuple(size), steps=steps, images=2, dtype='float32'
        )
        program = TokenizerProgram(
            run=RUN,
            tokenizers={tuple(size): RUN.model.build()},
            optimizer=ADAM.build(steps),
            constants=frozenset(),
            competition=competition,
        )
        found = {
            network: to_params(table, recorded('before', network), BUFFERS)
            for network, table in tables.items()
        }
        assert not any(each.missing or each.unknown for each in found.values())
        state = program.start(found['tokenizer'].params)
        adversary = competition.start(found['discriminator'].params, tuple(size))
        state, losses = state.replace(adversary=adversary), []
        train = jax.jit(functools.partial(program.train, True))
        for images in arrays['images']:
            keys_A = jax.random.split(jax.random.key(0), 1)  # nothing is random
            state, metrics = train(state, (images,), None, keys_A)
            losses.append([float(metrics[name]) for name in LOSSES])
        params = {'tokenizer': state.params, 'discriminator': state.adversary.params}
        params = jax.device_get(params)
        tensors = {network: to_state(tables[network], params[network]) for network in tables}
        for layer in range(1, ADVERSARY.discriminator.layers + 1):
            statistics = jax.device_get(state.adversary.statistics[f'norm_{layer}'])
            for name, x in zip(BUFFERS, statistics, strict=True):
                tensors['discriminator'][f'{adversarial.norm_name(layer)}{name}'] = x
    return tensors, np.array(losses)


@pytest.mark.parametrize('network', ['tokenizer', 'discriminator'])
def test_ten_steps_in_float64_give_the_tensors_of_a_torch_loop(network):
    """Of the discriminator also the running statistics."""
    found, expected = trained()[0][network], recorded('after', network)
    before = recorded('before', network)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == np.float64, name
        # Biases of keys have gradients of rounding alone, in both.
        change = max(np.abs(x - before[name]).max(), ADAM.learning_rate.peak)
        error = np.abs(found[name] - x).max()
        assert error <= CLOSE * change, f'{name}: {error:.1e} of a change of {change:.1e}'


def test_losses_of_ten_steps_in_float64_are_those_of_a_torch_loop():
    np.testing.assert_allclose(trained()[1], load_file(RECORD)['losses'], rtol=CLOSE)
