"""Which options may a recorded case of Infinity have, and how exact must it be?

The cases carry no tolerances: the marks are those of section 2 of the README beside them.
"""

from collections.abc import Mapping

from star_jax.verify.comparison import (
    ACTIVATIONS,
    BYTES,
    FLOORED_GRADIENTS,
    GENERATED,
    LATENTS,
    LOSSES,
    TABLES,
    TOKENIZED,
)
from star_jax.verify.options import Options

MARKS: Mapping[str, float] = {
    TABLES: 2e-5,
    LATENTS: 1e-5,  # quantisers and self-correction; absolute below 1, where sums may cancel
    TOKENIZED: 1e-4,
    ACTIVATIONS: 1e-4,
    FLOORED_GRADIENTS: 2e-4,
    LOSSES: 1e-5,
    GENERATED: 5e-4,
    BYTES: 1,
}

ANY = ('family', 'kind')
DESCRIPTIVE = ('batch', 'case', 'min_*_margin*', 'n_params', '*seed', 'torch')

TOKENIZER = ('base_ch', 'ch_mult', 'num_res_blocks', 'patch_size')

TRANSFORMER = (
    'apply_spatial_patchify',
    'text_channels',
    'text_maxlen',
    *(
        f'options.{name}'
        for name in (
            'add_lvl_embeding_only_first_block',
            'block_chunks',
            'cos_attn',
            'cross_attn_layer_scale',
            'depth',
            'embed_dim',
            'head_aln',
            'head_depth',
            'mlp_ratio',
            'nm0',
            'num_heads',
            'pad_to_multiplier',
            'rms_norm',
            'rope2d_normalized_by_hw',
            'shared_aln',
            'swiglu',
            'tau',
        )
    ),
)
ITS_TOKENIZER = ('codebook_dim', *(f'vae.{name}' for name in TOKENIZER))
# Options without effect in evaluation, and one that chooses a kernel.
INERT_IN_TRANSFORMERS = ('options.drop_path_rate', 'options.fused_norm')
NO_DROPOUT = {'norm_eps': 1e-6, 'options.drop_rate': 0}

OPTIONS: Mapping[str, Options] = {
    'transformer': Options(
        read=(
            *ANY,
            *TRANSFORMER,
            'prefix_schedule',
            'rope_reference_schedule',
            'schedule',
            'tokenizer_codebook_dim',
            'transformer_d_vae',
        ),
        checked=NO_DROPOUT,
        descriptive=(
            *DESCRIPTIVE,
            *INERT_IN_TRANSFORMERS,
            'published_table',
        ),
    ),
    'train_step': Options(
        read=(
            *ANY,
            *TRANSFORMER,
            *ITS_TOKENIZER,
            'always_training_scales',
            'full_schedule',
            'label_smoothing',
            'noise_apply_layers',
            'noise_apply_requant',
            'noise_apply_strength',
            'schedule_used',
            *(f'runs.*.{name}' for name in ('bitloss_type', 'name', 'reweight')),
        ),
        checked=NO_DROPOUT,
        descriptive=(
            *DESCRIPTIVE,
            *INERT_IN_TRANSFORMERS,
            'h_div_w_key',
            'img_hw',
            'pn',
            'runs.*.grads',  # whether the gradients are recorded
        ),
    ),
    'generate': Options(
        read=(
            *ANY,
            *TRANSFORMER,
            *ITS_TOKENIZER,
            'schedule',
            *(
                f'runs.*.{name}'
                for name in (
                    'cfg_insertion_layer',
                    'cfg_list',
                    'gt_leak',
                    'name',
                    'negative',
                    'tau_list',
                    'top_k',
                    'top_p',
                    'trunk_scale',
                )
            ),
        ),
        checked=NO_DROPOUT,
        descriptive=(
            *DESCRIPTIVE,
            *INERT_IN_TRANSFORMERS,
            'h_div_w_key',
            'runs.*.g_seed',
            'runs.*.min_*_margin*',
        ),
    ),
    'rope2d': Options(
        read=(
            *ANY,
            'head_dim',
            'pad_to_multiplier',
            *(f'tables.*.{name}' for name in ('mode', 'ratio', 'pn', 'schedule')),
            *(f'apply.{name}' for name in ('mode', 'ratio', 'scale_inds', 'schedule')),
            *(f'{where}published_table' for where in ('', 'tables.*.', 'apply.')),
        ),
        descriptive=(*DESCRIPTIVE, 'tables.*.rows', 'apply.heads', 'apply.pn'),
    ),
    'quantizer': Options(
        read=(
            *ANY,
            *('codebook_dim', 'inv_temperature', 'schedule'),
            *(f'variants.*.{name}' for name in ('name', 'dim', 'bits', 'schedule')),
            *(
                f'variants.*.options.{name}'
                for name in ('ln_before_quant', 'remove_residual_detach', 'use_decay_factor')
            ),
        ),
        checked={'down': 'area', 'up': 'trilinear'},
        descriptive=(
            *DESCRIPTIVE,
            'latent_hw',
            'schedule_source',
            *(f'variants.*.{name}' for name in ('HW', 'T', 'seed', 'min_*_margin*')),
            *(f'variants.*.options.{name}' for name in ('ln_init_by_sqrt', 'schedule_mode')),
        ),
    ),
    'tokenizer': Options(
        read=(*ANY, *TOKENIZER, 'codebook_dim', 'schedule'),
        checked={'groupnorm_eps': 1e-6},
        descriptive=(*DESCRIPTIVE, 'image_hw', 'schedule_source'),
    ),
    'self_correction': Options(
        read=(
            *ANY,
            'codebook_dim',
            *(
                f'variants.*.{name}'
                for name in (
                    'name',
                    'apply_spatial_patchify',
                    'noise_apply_layers',
                    'noise_apply_requant',
                    'noise_apply_strength',
                    'transformer_schedule',
                    'vae_schedule',
                )
            ),
        ),
        descriptive=(*DESCRIPTIVE, 'variants.*.seed', 'variants.*.min_*_margin*'),
    ),
    'sampling': Options(
        read=(*ANY, *(f'combos.*.{name}' for name in ('id', 'top_k', 'top_p'))),
        descriptive=(*DESCRIPTIVE, 'combos.*.V'),
    ),
}
