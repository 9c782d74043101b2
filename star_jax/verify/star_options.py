"""Which options may a recorded case of the STAR and VAR originals have? (See `options`.)"""

from collections.abc import Mapping

from star_jax.verify.options import Options


def _below(parent: str, names: str) -> tuple[str, ...]:
    """The paths of space-separated names below a field."""
    return tuple(f'{parent}.{name}' for name in names.split())


# Sizes and names of the recorded arrays, and measurements of the recording, in any kind of case.
DESCRIPTIVE = (
    'batch',
    'buffers_in_state_dict',
    'case',
    'distinct_codes*',
    'findings',
    'float32_vs_float64*',
    'image_size',
    'layout',
    'loss',
    'max_abs_*',
    'min_*_gap*',
    'names',
    'parameters_with_no_gradient',
    'phi_ticks',
    'published_layout',
    'reference',
    'robustness',
    'seed',
    'stored_fhat_scales',
    '*text_length',
    '*text_lengths',
    'torch',
    'total_tokens',
    'variant',
)
ANY = ('family', 'files', 'kind', 'state_dict_file', 'tolerances')

VQ = (
    'Cvae',
    'default_qresi_counts',
    'quant_resi',
    'share_quant_resi',
    'using_znorm',
    'v_patch_nums',
    'vocab_size',
)
QUANTISER = (*VQ, 'beta', 'phi_index_per_scale')
AUTOENCODER = ('ch', 'ch_mult', 'downsample', 'groupnorm_groups', 'num_res_blocks')
ITS_TOKENIZER = ('vae_config', 'vae_state_dict')  # files of a case that another kind refers to

VAR = (
    'Cvae',
    'attn_l2_norm',
    'depth',
    'embed_dim',
    'mlp_ratio',
    'num_heads',
    'patch_nums',
    'shared_aln',
    'vocab_size',
)
STAR = (
    *VAR,
    'absolute_lvl_emb',
    'enable_adaptive_norm',
    'enable_cross',
    'enable_logit_norm',
    'feat_extract_blocks',
    'in_dim_cross',
    'rope_norm',
    'rope_theta',
    'rotary_pos_emb',
    'sample_from_idx',
)
NO_DROPOUT = {'attn_drop_rate': 0, 'drop_rate': 0, 'norm_eps': 1e-6}
INERT_IN_STAR = ('num_classes',)  # rows of class_emb.weight, which STAR never reads
INERT_IN_EVALUATION = ('drop_path_rate',)  # stochastic depth acts in training steps alone

SAMPLING = ('cfg', 'more_smooth', 'top_k', 'top_p')  # options of a run, by default the case's
GENERATION = (
    *STAR,
    *ITS_TOKENIZER,
    *SAMPLING,
    'sample_version',
    'w_mask',
    *_below('runs.*', 'cross_attention draw name refine text_rows'),
    *_below('runs.*', ' '.join(SAMPLING)),
)

OPTIONS: Mapping[str, Options] = {
    'rope': Options(
        read=(
            *ANY,
            *_below('tables.*', 'table head_dim end_x end_y theta normalize'),
            *_below('applies.*', 'apply head_dim patch_nums theta normalize'),
        ),
        descriptive=(*DESCRIPTIVE, *_below('applies.*', 'batch heads length')),
    ),
    'vqvae': Options(
        read=(*ANY, *QUANTISER, *AUTOENCODER),
        checked={'dropout': 0, 'groupnorm_eps': 1e-6, 'quant_conv_ks': 3},
        descriptive=DESCRIPTIVE,
    ),
    'quantizer': Options(read=(*ANY, *QUANTISER), descriptive=DESCRIPTIVE),
    'star': Options(
        read=(*ANY, *STAR, *_below('token_dropping', 'drop_start_idx drop_scale_length')),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *ITS_TOKENIZER, *INERT_IN_STAR, *INERT_IN_EVALUATION),
    ),
    'star_generate': Options(
        read=(*ANY, *GENERATION),
        checked=NO_DROPOUT,
        descriptive=(*DESCRIPTIVE, *INERT_IN_STAR, *INERT_IN_EVALUATION),
    ),
    'star_sampler': Options(
        read=(*ANY, *GENERATION, 'refine_from_scale_index'),
        checked=NO_DROPOUT,
        descriptive=(
            *DESCRIPTIVE,
            *INERT_IN_STAR,
            *INERT_IN_EVALUATION,
            *_below('runs.*', 'confidence'),
            'steps',
            'token_range_refined',
        ),
    ),
    'star_train': Options(
        read=(
            *ANY,
            *STAR,
            *ITS_TOKENIZER,
            'cross_attention',
            'gradient_accumulation',
            'label_smoothing',
            'parameters_with_weight_decay',
            'parameters_without_weight_decay',
            *_below('optimizer', 'name betas eps grad_clip_global_norm'),
            *_below('optimizer', 'max_iterations peak_lr schedule warmup_iterations'),
            *_below('optimizer', 'weight_decay weight_decay_end wp0 wpe'),
        ),
        checked=NO_DROPOUT | {'drop_path_rate': 0},
        descriptive=(*DESCRIPTIVE, *INERT_IN_STAR, 'log', 'steps', 'unchanged_entries'),
    ),
    'var': Options(
        read=(*ANY, *VAR, *ITS_TOKENIZER, 'num_classes', 'cfg', 'top_k', 'top_p'),
        checked=NO_DROPOUT | {'cond_drop_rate': 0, 'more_smooth': False},
        descriptive=(*DESCRIPTIVE, *INERT_IN_EVALUATION),
    ),
    'sampling': Options(
        read=(
            *ANY,
            *_below('filters.*', 'filter top_k top_p'),
            *_below('gumbel.*', 'gumbel ratio tau'),
        ),
        descriptive=(*DESCRIPTIVE, 'gumbel.*.formula'),
    ),
    'schedule': Options(
        read=(
            *ANY,
            *('max_it', 'peak_lr', 'wd', 'wd_end', 'wp_it', 'wp_it_rounded'),
            *_below('variants.*', 'wp0 wpe'),
        ),
        descriptive=(*DESCRIPTIVE, 'schedules'),
    ),
}
