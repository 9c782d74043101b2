"""What do transformers and PyTorch make of a tiny random BERT? Records this folder.

python tests/golden/tiny_bert/make.py    (torch 2.13.0, transformers 5.23.0)
"""

import json
from pathlib import Path

import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

HERE = Path(__file__).parent
LENGTH = 32
WORDS = (
    '[PAD] [UNK] [CLS] [SEP] a an on of to the in and left right above below small large red green '
    'blue yellow white black gray circle square star ring cross background , . ##s ##ish s t a b c '
    '##a ##b ##c'
)
CAPTIONS = (
    '',
    'a red circle',
    'A small red circle to the left of a large blue square on a white background',
    'stars, rings and crosses.',
    'zebra',
    'a ' * 40,
    'the greenish ring',
    'a small star above a large star on the gray background, a ring below and a cross in the left',
)


def write_tokenizer() -> Tokenizer:
    vocab = {word: row for row, word in enumerate(dict.fromkeys(WORDS.split()))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]',
        special_tokens=[('[CLS]', vocab['[CLS]']), ('[SEP]', vocab['[SEP]'])],
    )
    # As in MiniLM's own file: the code that loads it must override both.
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(HERE / 'tokenizer.json'))
    return tokenizer


def write_model(vocab: int) -> BertModel:
    """Every parameter random, and large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        layer_norm_eps=1e-6,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.5
            parameter.normal_(1.0 if name.endswith('LayerNorm.weight') else 0.0, scale)
    model.save_pretrained(HERE)
    return model


def record(tokenizer: Tokenizer, model: BertModel) -> None:
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    ids = torch.zeros(len(CAPTIONS), LENGTH, dtype=torch.int32)
    mask = torch.zeros_like(ids)
    for row, caption in enumerate(CAPTIONS):
        one = tokenizer.encode(caption).ids
        ids[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    with torch.no_grad():
        states = model(input_ids=ids.long(), attention_mask=mask).last_hidden_state
    states *= mask[..., None]
    arrays = {
        'ids': ids,
        'mask': mask,
        'states': states,
        'pooled': states.sum(1) / mask.sum(1, keepdim=True),
    }
    save_file(
        {name: array.numpy() for name, array in arrays.items()},
        HERE / 'outputs.safetensors',
        metadata={'captions': json.dumps(CAPTIONS), 'torch': torch.__version__},
    )


if __name__ == '__main__':
    tokenizer = write_tokenizer()
    record(tokenizer, write_model(tokenizer.get_vocab_size()))
