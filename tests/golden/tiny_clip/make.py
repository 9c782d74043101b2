"""What do transformers and PyTorch make of a tiny random CLIP text tower? Records this folder.

Laid out as Stable Diffusion's: `text_encoder/` (in 2 shards) and `tokenizer/` (of the older files).

python tests/golden/tiny_clip/make.py    (torch 2.13.0, transformers 5.23.0)
"""

import json
from pathlib import Path

import torch
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
LENGTH = 24
LETTERS = 'abcdefghijklmnopqrstuvwxyz,.!'
MERGES = ('r e', 're d</w>', 'c i', 'ci r', 'c l', 'cl e</w>', 'cir cle</w>', 'o n</w>', 'r i')
CAPTIONS = (
    '',
    'a red circle',
    'A small red circle on a large blue square',
    'rings, stars and crosses!',
    'a ' * 40,
    'one <|endoftext|> in the middle',
)


def write_tokenizer() -> CLIPTokenizer:
    """Padding is '!' with the id 0, as in Stable Diffusion 2.1."""
    words = ['!', *(letter for letter in LETTERS if letter != '!')]
    words += [f'{letter}</w>' for letter in LETTERS]
    words += [merge.replace(' ', '') for merge in MERGES]
    words += ['<|startoftext|>', '<|endoftext|>']
    folder = HERE / 'tokenizer'
    folder.mkdir(exist_ok=True)
    vocab = {word: row for row, word in enumerate(words)}
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *MERGES]) + '\n')
    fields = {
        'tokenizer_class': 'CLIPTokenizer',
        'bos_token': '<|startoftext|>',
        'eos_token': '<|endoftext|>',
        'unk_token': '<|endoftext|>',
        'pad_token': '!',
        'model_max_length': LENGTH,
    }
    (folder / 'tokenizer_config.json').write_text(json.dumps(fields, indent=2) + '\n')
    return CLIPTokenizer.from_pretrained(folder)


def write_model(vocab: int) -> CLIPTextModel:
    """Every parameter random, and large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_act='gelu',
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.5
            norm = parameter.ndim == 1 and 'norm' in name and name.endswith('weight')
            parameter.normal_(1.0 if norm else 0.0, scale)
    model.save_pretrained(HERE / 'text_encoder', max_shard_size='60KB')
    return model


def record(tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
    tokens = tokenizer(
        list(CAPTIONS),
        padding='max_length',
        truncation=True,
        max_length=LENGTH,
        return_tensors='pt',
    )
    ids, mask = tokens['input_ids'], tokens['attention_mask']
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    arrays = {
        'ids': ids.int(),
        'mask': mask.int(),
        'states': output.last_hidden_state * mask[..., None],
        'pooled': output.pooler_output,
    }
    save_file(
        {name: array.numpy() for name, array in arrays.items()},
        HERE / 'outputs.safetensors',
        metadata={'captions': json.dumps(CAPTIONS), 'torch': torch.__version__},
    )


if __name__ == '__main__':
    tokenizer = write_tokenizer()
    record(tokenizer, write_model(len(tokenizer)))
