"""How was the recorded case `smoothed_star_train` made?

From `dev_star_train`, with label smoothing and gradient accumulation. PyTorch computes the loss,
its gradient with respect to our logits, clipping and AdamW; `jax.vjp` carries that gradient from
our logits to our parameters. It needs torch: `python tests/smoothed_case.py FOLDER`.
"""

import argparse
import gzip
import json
import re
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from star_jax.convert.entries import to_params, to_state
from star_jax.convert.star import star_entries
from star_jax.verify.cases import read_case
from star_jax.verify.star import forward_fn, text_of
from star_jax.verify.train import Training

SOURCE = Path(__file__).parent / 'golden' / 'star' / 'dev_star_train'
SMOOTHING = 0.1
ACCUMULATION = 2
EPSILON = 1e-6  # AdamW's: with the source's 1e-8 the rounding of tiny gradients moves parameters
INPUTS = re.compile(r'step\d+\.(image|encoder_.*)|lr|weight_decay')
REMARKS = ('findings', 'log', 'files', 'unchanged_entries', 'note')  # true of the source alone


def make(folder: Path) -> None:
    """Writes the case to `folder`, which lies beside its source or refers to it by full paths."""
    source = Training(read_case(SOURCE))
    after, losses, norms = train(source)
    recorded = source.case.arrays
    arrays = {name: recorded[name] for name in recorded if INPUTS.fullmatch(name)}
    arrays |= {'losses': losses, 'grad_norm_before_clip': norms}
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / 'io.safetensors.gz', arrays)
    write_arrays(folder / 'state_dict_after.safetensors.gz', after)
    (folder / 'config.json').write_text(json.dumps(config_of(source, folder), indent=1) + '\n')


def train(source: Training) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The state dict after the last step, and loss and gradient norm of every step."""
    import torch

    entries = star_entries(source.star)
    state = {entry.torch_name: source.case.state[entry.torch_name] for entry in entries}
    parameters = {name: torch.tensor(array, requires_grad=True) for name, array in state.items()}
    option = source.case.option
    groups = [
        {'params': [parameters[name] for name in option(listed) if name in parameters]}
        for listed in ('parameters_with_weight_decay', 'parameters_without_weight_decay')
    ]
    optimizer = torch.optim.AdamW(groups, betas=option('optimizer', 'betas'), eps=EPSILON)
    losses, norms = [], []
    for step in source.steps:
        current = {name: tensor.detach().numpy() for name, tensor in parameters.items()}
        loss, gradients = differentiate(source, to_params(entries, current).params, step)
        losses.append(loss)
        norms.append(0.0)
        for name, gradient in to_state(entries, gradients).items():
            tensor, gradient = parameters[name], torch.tensor(np.array(gradient))
            tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        if (step + 1) % ACCUMULATION:
            continue
        clip = option('optimizer', 'grad_clip_global_norm')
        norms[-1] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip))
        for group, decays in zip(optimizer.param_groups, (1.0, 0.0), strict=True):
            group['lr'] = float(source.case.input('lr')[step])
            group['weight_decay'] = decays * float(source.case.input('weight_decay')[step])
        optimizer.step()
        optimizer.zero_grad()
    after = {name: tensor.detach().numpy().copy() for name, tensor in parameters.items()}
    return after, np.array(losses, np.float32), np.array(norms, np.float32)


def differentiate(source: Training, params: dict, step: int) -> tuple[float, dict]:
    """The smoothed loss of a step, and the gradients of its share of an update."""
    import torch

    codes_BL, inputs = source.encoded(int(step))
    text = text_of(source.case, f'step{step}.')
    forward = forward_fn(source.star, tuple(range(source.star.schedule.length)))
    logits_BLV, pull_back = jax.vjp(lambda params: forward(params, inputs, text)[2], params)
    logits = torch.tensor(np.array(logits_BLV), requires_grad=True)
    codes = torch.tensor(np.array(codes_BL), dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), codes.flatten(), label_smoothing=SMOOTHING
    )
    (loss / ACCUMULATION).backward()
    (gradients,) = pull_back(logits.grad.numpy())
    return float(loss.detach()), gradients


def config_of(source: Training, folder: Path) -> dict:
    """The config of the source with the options of this case."""
    config = {name: value for name, value in source.case.config.items() if name not in REMARKS}
    for name in ('vae_config', 'vae_state_dict', 'state_dict_file'):
        path = (SOURCE / config[name]).resolve()
        beside = folder.resolve().parent == SOURCE.parent
        config[name] = f'../{path.relative_to(SOURCE.parent)}' if beside else str(path)
    return config | {
        'case': 'smoothed_star_train',
        'reference': 'tests/smoothed_case.py: PyTorch computes the loss, its gradient with '
        'respect to the logits, clipping and AdamW; jax.vjp carries the gradient on',
        'gradient_accumulation': ACCUMULATION,
        'label_smoothing': SMOOTHING,
        'optimizer': config['optimizer'] | {'eps': EPSILON},
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes gzipped safetensors, the same bytes for the same arrays."""
    path.write_bytes(gzip.compress(safetensors.numpy.save(arrays), mtime=0))


if __name__ == '__main__':
    jax.config.update('jax_default_matmul_precision', 'highest')
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path)
    make(parser.parse_args().folder)
