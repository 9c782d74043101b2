"""Which options may a recorded case of LlamaGen have, and how exact must it be?

The cases carry no tolerances: the marks are the suggested ones of the README beside them.
"""

from collections.abc import Mapping

from star_jax.verify.comparison import (
    BYTES,
    FUNCTIONS,
    GRADIENTS,
    GUIDED_LOGITS,
    HIDDEN,
    LOGITS,
    NORMS,
    OBJECTIVES,
    QUANTISER_GRADIENTS,
    TABLES,
    TOKENIZED,
)
from star_jax.verify.options import Options

MARKS: Mapping[str, float] = {
    LOGITS: 5e-5,
    GUIDED_LOGITS: 2e-4,
    HIDDEN: 1e-4,
    OBJECTIVES: 2e-5,
    GRADIENTS: 5e-5,
    NORMS: 5e-5,
    TOKENIZED: 3e-5,
    QUANTISER_GRADIENTS: 2e-3,  # the entropy at a temperature of 0.01 amplifies rounding
    FUNCTIONS: 1e-5,
    TABLES: 1e-5,
    BYTES: 1,
}

ANY = ('family', 'kind')
DESCRIPTIVE = ('_meta', 'seed')

TRANSFORMER = tuple(
    f'model.{name}'
    for name in (
        'block_size',
        'class_dropout_prob',
        'cls_token_num',
        'dim',
        'ffn_hidden',
        'ffn_dim_multiplier',
        'head_dim',
        'model_type',
        'multiple_of',
        'n_head',
        'n_kv_head',
        'n_layer',
        'norm_eps',
        'rope_base',
        'vocab_size',
    )
)
BY_CLASS, BY_TEXT = 'model.num_classes', 'model.caption_dim'
# Options that only a fresh model or a training step reads.
INERT = ('model.initializer_range',)
NO_DROPOUT = {
    f'model.{name}': 0.0
    for name in (
        'attn_dropout_p',
        'drop_path_rate',
        'ffn_dropout_p',
        'resid_dropout_p',
        'token_dropout_p',
    )
}
GENERATION = (
    'max_new_tokens',
    'prefix_length',
    *(f'settings.*.{name}' for name in ('cache', 'cfg_interval', 'cfg_scale', 'tag', 'use_mask')),
    'temperature',
    'top_k',
    'top_p',
)

OPTIONS: Mapping[str, Options] = {
    'rope2d': Options(
        read=(
            *ANY,
            *(
                f'tables.*.{name}'
                for name in ('cls_token_num', 'grid_size', 'head_dim', 'rope_base')
            ),
            *(f'apply.*.{name}' for name in ('length', 'start', 'table')),
        ),
        descriptive=DESCRIPTIVE,
    ),
    'sampling': Options(
        read=(
            *ANY,
            'cfg_scales',
            *(f'settings.*.{name}' for name in ('temperature', 'top_k', 'top_p')),
        ),
        descriptive=DESCRIPTIVE,
    ),
    'c2i_teacher_forced': Options(
        read=(*ANY, *TRANSFORMER, BY_CLASS),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *INERT, BY_TEXT),
    ),
    't2i_teacher_forced': Options(
        read=(*ANY, *TRANSFORMER, BY_TEXT, 'uncond_tokens'),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *INERT, BY_CLASS, 'caption_lengths'),
    ),
    'c2i_generate': Options(
        read=(*ANY, *TRANSFORMER, *GENERATION, BY_CLASS),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *INERT, BY_TEXT, 'caption_lengths'),
    ),
    't2i_generate': Options(
        read=(*ANY, *TRANSFORMER, *GENERATION, BY_TEXT),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *INERT, BY_CLASS, 'caption_lengths'),
    ),
    'vq': Options(
        read=(
            *ANY,
            'ch',
            'ch_mult',
            'codebook_embed_dim',
            'codebook_l2_norm',
            'codebook_size',
            'commit_loss_beta',
            'entropy_loss_ratio',
            'entropy_temperature',
            'num_res_blocks',
            'z_channels',
        ),
        checked={'in_channels': 3, 'dropout_p': 0},
        descriptive=(*DESCRIPTIVE, 'image_shape', 'latent_shape'),
    ),
    'vqloss': Options(
        read=(
            *ANY,
            'disc_n_layers',
            'disc_ndf',
            'disc_start',
            *(
                f'variants.*.{name}'
                for name in (
                    'adaptive',
                    'disc_loss',
                    'disc_weight',
                    'gen_loss',
                    'global_step',
                    'perceptual_weight',
                    'rec_loss',
                    'rec_weight',
                )
            ),
        ),
        checked={
            'discriminator_mode': 'train (batch statistics)',
            'lpips_mode': 'eval (dropout off)',
        },
        descriptive=(
            *DESCRIPTIVE,
            'batch',
            'codebook_loss',
            'image_size',
            'variants.*.codebook_weight',  # the original ignores it
            'vgg_widths',
        ),
    ),
    'postprocess': Options(read=(*ANY, 'sizes'), descriptive=DESCRIPTIVE),
}
