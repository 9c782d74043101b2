"""What do transformers and PyTorch make of a tiny random T5 encoder? Records this folder.

A whole encoder-decoder as Flan-T5 is published, its heads wider than the model, gated.

python tests/golden/tiny_t5/make.py    (torch 2.13.0, transformers 5.23.0)
"""

import json
import math
from pathlib import Path

import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
LENGTH = 48  # some keys are further away than the last row of distances begins
WORDS = '▁a ▁an ▁on ▁of ▁to ▁the ▁red ▁green ▁blue ▁small ▁large ▁circle ▁square ▁ring s , .'
LETTERS = '▁abcdefghijklmnopqrstuvwxyz'
CAPTIONS = (
    '',
    'a red circle',
    'a small red circle on a large blue square, the ring of a large green circle',
    'Zebra',
    'a ' * 60,
)


def write_tokenizer() -> Tokenizer:
    pieces = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0)]
    pieces += [(word, -2.0 - math.log(1 + row)) for row, word in enumerate(WORDS.split())]
    known = {word for word, _ in pieces}
    pieces += [(letter, -8.0) for letter in LETTERS if letter not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='$A </s>', special_tokens=[('</s>', 1)]
    )
    tokenizer.save(str(HERE / 'tokenizer.json'))
    return tokenizer


def write_model(vocab: int) -> T5ForConditionalGeneration:
    """Every parameter random, and large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab + 3,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=3,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
        feed_forward_proj='gated-gelu',
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.5
            scale = 1.0 if 'relative_attention_bias' in name or 'shared' in name else scale
            parameter.normal_(1.0 if 'norm' in name else 0.0, scale)
    model.save_pretrained(HERE)
    (HERE / 'generation_config.json').unlink(missing_ok=True)
    return model


def record(tokenizer: Tokenizer, model: T5ForConditionalGeneration) -> None:
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token='<pad>')
    encodings = tokenizer.encode_batch(list(CAPTIONS))
    ids = torch.tensor([one.ids for one in encodings])
    mask = torch.tensor([one.attention_mask for one in encodings])
    with torch.no_grad():
        states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    arrays = {
        'ids': ids.int(),
        'mask': mask.int(),
        'states': states * mask[..., None],
        'pooled': states.mean(1),
    }
    save_file(
        {name: array.numpy() for name, array in arrays.items()},
        HERE / 'outputs.safetensors',
        metadata={'captions': json.dumps(CAPTIONS), 'torch': torch.__version__},
    )


if __name__ == '__main__':
    tokenizer = write_tokenizer()
    record(tokenizer, write_model(tokenizer.get_vocab_size()))
