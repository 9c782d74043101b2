"""Does this library reproduce every recorded case, and does `verify` detect deviations?

The cases are those under $STAR_JAX_GOLDEN, by default the small ones that travel with the tests.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import smoothed_case
from safetensors.numpy import save_file

from star_jax.core import resize
from star_jax.core.filters import NucleusFilter
from star_jax.errors import UserError
from star_jax.nn.positions import RawRotary
from star_jax.verify import cases, check, comparison, sampler, star_options
from star_jax.verify.infinity import RotaryTables
from star_jax.verify.infinity_generate import BitGenerations

SMALL = Path(__file__).parent / 'golden'
ROOT = Path(os.environ.get('STAR_JAX_GOLDEN', SMALL))
# Kinds without a case in the repository.
TOO_LARGE = {('star', 'var'), ('star', 'star_sampler')}
QUANTISER = SMALL / 'star' / 'dev_quant_256scales'
TRAINING = SMALL / 'star' / 'dev_star_train'
SMOOTHED = SMALL / 'star' / 'smoothed_star_train'
GENERATION = SMALL / 'star' / 'dev_star_generate'
ROPE = SMALL / 'star' / 'dev_rope'
TOKENDROP = SMALL / 'star' / 'dev_star_tokendrop'
VQVAE = SMALL / 'star' / 'dev_vqvae'
BITS = SMALL / 'infinity'
RASTER = SMALL / 'llamagen'


def kind_of(folder: Path) -> tuple[str, str]:
    config = json.loads((folder / 'config.json').read_text())
    return config.get('family'), config.get('kind')


def recorded_cases() -> list[Path]:
    folders = sorted(path.parent for path in ROOT.rglob('config.json'))
    return [folder for folder in folders if all(kind_of(folder))]


def folder_of(tmp_path: Path, like: Path, arrays=None, state=None, config=None, after=None) -> Path:
    """A case like another, with some of its files replaced."""
    replaced = {
        'io': arrays or cases.read_arrays(like / 'io.safetensors'),
        'state_dict': state or cases.read_arrays(like / 'state_dict.safetensors'),
        'state_dict_after': after or {},
    }
    for name, tensors in replaced.items():
        if tensors:
            tensors = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
            save_file(tensors, tmp_path / f'{name}.safetensors')
    config = config or json.loads((like / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return tmp_path


def with_changes(tmp_path: Path, like: Path, changes: dict) -> Path:
    """A copy of a case with some of its options changed."""
    shutil.copytree(like, tmp_path, dirs_exist_ok=True)
    config = changed(json.loads((like / 'config.json').read_text()), changes)
    for key in ('vae_config', 'vae_state_dict', 'state_dict_file'):
        if str(config.get(key)).startswith('..'):
            config[key] = str((like / config[key]).resolve())
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return tmp_path


def changed(config: dict, changes: dict) -> dict:
    """The config with some values replaced, also inside its objects and lists of objects."""
    config = dict(config)
    for name, value in changes.items():
        old = config.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            value = changed(old, value)
        config[name] = value
    return config


def failing(folder: Path) -> list[str]:
    return [line.name for line in check.verify(folder).lines if line.verdict == comparison.FAIL]


@pytest.mark.parametrize('folder', recorded_cases(), ids=lambda path: str(path.relative_to(ROOT)))
def test_recorded_case_is_reproduced(folder):
    if kind_of(folder) not in check.KINDS:
        pytest.skip(f'no rules yet for cases of {" ".join(kind_of(folder))}')
    report = check.verify(folder)
    assert not [line for line in report.lines if line.verdict == comparison.FAIL]
    assert not [line for line in report.lines if line.verdict == comparison.SKIPPED]
    assert report.count(comparison.OK) > 0


def test_every_kind_has_a_case_in_the_repository():
    folders = [path.parent for path in SMALL.rglob('config.json')]
    assert set(check.KINDS) - TOO_LARGE <= {kind_of(folder) for folder in folders}


def test_recorded_cases_are_small():
    size = sum(path.stat().st_size for path in SMALL.rglob('*') if path.is_file())
    assert size <= 30 * 2**20


def test_verify_detects_a_changed_weight(tmp_path):
    state = cases.read_arrays(QUANTISER / 'state_dict.safetensors')
    state['quantize.quant_resi.qresi_ls.2.bias'] = (
        state['quantize.quant_resi.qresi_ls.2.bias'] + 1e-3
    )
    failed = failing(folder_of(tmp_path, QUANTISER, state=state))
    assert 'fhat_5' in failed and 'fhat_4' not in failed  # scale 5 is the first of the third phi


def test_verify_detects_only_the_changed_arrays(tmp_path):
    arrays = cases.read_arrays(QUANTISER / 'io.safetensors')
    arrays['fhat_3'][0, 0, 0, 0] += 1e-3
    arrays['idx_1'][0, 0] += 1
    assert failing(folder_of(tmp_path, QUANTISER, arrays)) == ['fhat_3', 'idx_1']


def test_verify_detects_nan_and_another_shape(tmp_path):
    arrays = cases.read_arrays(QUANTISER / 'io.safetensors')
    arrays['fhat_3'][0, 0, 0, 0] = np.nan
    arrays['var_input'] = arrays['var_input'][:1]
    assert failing(folder_of(tmp_path, QUANTISER, arrays)) == ['fhat_3', 'var_input']


def test_verify_command_fails_for_an_array_without_a_rule(tmp_path, capsys):
    arrays = cases.read_arrays(QUANTISER / 'io.safetensors')
    few = {'f': arrays['f'], 'idx_0': arrays['idx_0']}
    assert check.main([folder_of(tmp_path, QUANTISER, few)]) == 0
    assert check.main([folder_of(tmp_path, QUANTISER, few | {'idx_10': few['idx_0']})]) == 1
    assert check.main([folder_of(tmp_path, QUANTISER, few | {'surprise': few['idx_0']})]) == 1
    printed = capsys.readouterr().out
    assert 'surprise' in printed and 'FAIL (no rule computes this array)' in printed


def test_verify_goes_on_after_cases_that_it_refuses(tmp_path, capsys):
    refused = [with_changes(tmp_path / name, ROPE, {name: 1}) for name in ('one', 'two')]
    with pytest.raises(UserError, match='unknown option one, .*; .*unknown option two, '):
        check.main([refused[0], ROPE, refused[1]])
    assert 'dev_rope: passes' in capsys.readouterr().out


def test_verify_detects_a_wrong_or_unknown_trained_parameter(tmp_path):
    config = json.loads((TRAINING / 'config.json').read_text())
    for key in ('vae_config', 'vae_state_dict'):
        config[key] = str((TRAINING / config[key]).resolve())
    after = cases.read_arrays(TRAINING / 'state_dict_after.safetensors')
    after = {name: after[name] for name in ('head_logits.bias', 'pos_start', 'class_emb.weight')}
    after['pos_start'] = after['pos_start'] + 1e-4
    after['surprise'] = after['pos_start']
    failed = failing(folder_of(tmp_path, TRAINING, config=config, after=after))
    assert failed == ['state_dict_after.pos_start', 'state_dict_after.surprise']


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('config.json', None, 'no such file'),
        ('config.json', b'{', 'not valid JSON'),
        ('config.json', b'[]', 'expected an object'),
        ('config.json', b'{"family": "star", "kind": "poem"}', 'star vqvae'),
        ('config.json', b'{"family": "star", "kind": "quantizer"}', 'is missing'),
        ('io.safetensors', None, 'no such file'),
        ('io.safetensors', b'torn', 'damaged'),
        ('state_dict.safetensors', b'torn', 'damaged'),
        ('io.safetensors.gz', b'torn', 'gzipped'),
    ],
)
def test_verify_reports_a_damaged_case(tmp_path, file, content, message):
    folder = folder_of(tmp_path, QUANTISER)
    path = folder / file
    if path.suffix == '.gz':
        path.with_suffix('').unlink()
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        check.verify(folder)


@pytest.mark.parametrize(
    ('case', 'changes', 'field'),
    [
        (QUANTISER, {'codebook_dropout': 0.5}, 'codebook_dropout'),
        (QUANTISER, {'label_smoothing': 0.1}, 'label_smoothing'),
        (TRAINING, {'optimizer': {'amsgrad': True}}, r'optimizer\.amsgrad'),
        (TRAINING, {'optimizer': {'lookahead': {'steps': 5}}}, r'optimizer\.lookahead\.steps'),
        (TRAINING, {'loss_weights': [1, 2]}, 'loss_weights'),
        (GENERATION, {'temperature': 0.5}, 'temperature'),
        (GENERATION, {'runs': [{'name': 'hot', 'temperature': 0.5}]}, r'runs\.0\.temperature'),
        (ROPE, {'tables': [{'table': 0, 'mode': None}]}, r'tables\.0\.mode'),
        (BITS / 'dev_bsc', {'variants': [{'name': 'plain', 'z_drop': 0}]}, r'variants\.0\.z_drop'),
        (BITS / 'dev_generate', {'runs': [{'cfg_sc': 3}]}, r'runs\.0\.cfg_sc'),
        (BITS / 'dev_generate', {'vae': {'scale_factor': 2}}, r'vae\.scale_factor'),
        (BITS / 'dev_quantizer', {'random_flip': 0.1}, 'random_flip'),
        (BITS / 'dev_quantizer_options', {'variants': [{'options': {'keep': 1}}]}, r'.*\.keep'),
        (BITS / 'dev_rope2d', {'tables': [{'theta': 100}]}, r'tables\.0\.theta'),
        (BITS / 'dev_sampling', {'combos': [{'min_p': 0.1}]}, r'combos\.0\.min_p'),
        (
            BITS / 'dev_tf_patchify',
            {'options': {'customized_flash_attn': 1}},
            'options.customized.*',
        ),
        (BITS / 'dev_tokenizer', {'double_z': True}, 'double_z'),
        (BITS / 'dev_train_step', {'runs': [{'focal': 2}]}, r'runs\.0\.focal'),
        (RASTER / 'dev_c2i_gen', {'settings': [{'decay': 1}]}, r'settings\.0\.decay'),
        (RASTER / 'dev_c2i_gqa_tf', {'model': {'qk_norm': True}}, r'model\.qk_norm'),
        (RASTER / 'dev_postproc', {'filter': 'box'}, 'filter'),
        (RASTER / 'dev_rope2d', {'tables': [{'scale': 2}]}, r'tables\.0\.scale'),
        (RASTER / 'dev_sampling', {'settings': [{'min_p': 0.1}]}, r'settings\.0\.min_p'),
        (RASTER / 'dev_vq_nol2', {'double_z': True}, 'double_z'),
        (RASTER / 'dev_vqloss', {'variants': [{'r1': 10}]}, r'variants\.0\.r1'),
    ],
)
def test_verify_refuses_an_unknown_option_by_name(tmp_path, case, changes, field):
    with pytest.raises(UserError, match=f'unknown option {field},'):
        check.verify(with_changes(tmp_path, case, changes))


@pytest.mark.parametrize(
    ('case', 'field', 'value'),
    [
        (TRAINING, 'drop_rate', 0.1),
        (TRAINING, 'attn_drop_rate', 0.1),
        (TRAINING, 'drop_path_rate', 0.05),
        (TRAINING, 'norm_eps', 1e-5),
        (TRAINING, 'parameters_with_weight_decay', ['word_embed.weight']),
        (TRAINING, 'cross_attention', 'mixed: sometimes'),
        (TRAINING, 'optimizer', {'name': 'SGD'}),
        (TRAINING, 'refine_from_scale_index', 2),
        (GENERATION, 'sample_version', '2048'),
        (QUANTISER, 'phi_index_per_scale', [0, 1, 2, 3]),
        (VQVAE, 'dropout', 0.1),
        (VQVAE, 'groupnorm_eps', 1e-5),
        (VQVAE, 'quant_conv_ks', 1),
        (VQVAE, 'downsample', 8),
        (TOKENDROP, 'token_dropping', None),
        (TOKENDROP, 'token_dropping', {'drop_scale_length': 23}),
        (TOKENDROP, 'token_dropping', {'drop_start_idx': 4}),
        (BITS / 'dev_quantizer', 'up', 'nearest'),
        (BITS / 'dev_tf_patchify', 'norm_eps', 1e-5),
        (BITS / 'dev_tf_patchify', 'transformer_d_vae', 6),
        (BITS / 'dev_tokenizer', 'patch_size', 8),
        (BITS / 'dev_train_step', 'options', {'drop_rate': 0.1}),
        (BITS / 'dev_train_step', 'noise_apply_strength', 0.0),
        (BITS / 'dev_train_step', 'schedule_used', [[1, 1, 1], [1, 3, 3]]),
        (RASTER / 'dev_c2i_gen', 'prefix_length', 2),
        (RASTER / 'dev_c2i_gen', 'max_new_tokens', 0),
        (RASTER / 'dev_c2i_gen', 'max_new_tokens', 37),
        (RASTER / 'dev_c2i_gqa_tf', 'model', {'block_size': 10}),
        (RASTER / 'dev_c2i_gqa_tf', 'model', {'class_dropout_prob': 0.0}),
        (RASTER / 'dev_c2i_gqa_tf', 'model', {'cls_token_num': 2}),
        (RASTER / 'dev_c2i_gqa_tf', 'model', {'ffn_hidden': 320}),
        (RASTER / 'dev_c2i_gqa_tf', 'model', {'token_dropout_p': 0.1}),
        (RASTER / 'dev_t2i_small_gen', 'model', {'model_type': 'c2i'}),
        (RASTER / 'dev_t2i_small_tf', 'uncond_tokens', 8),
        (RASTER / 'dev_vq_nol2', 'dropout_p', 0.1),
        (RASTER / 'dev_vq_nol2', 'in_channels', 1),
        (RASTER / 'dev_vqloss', 'discriminator_mode', 'eval'),
        (RASTER / 'dev_vqloss', 'lpips_mode', 'train (dropout on)'),
    ],
)
def test_verify_refuses_a_value_that_it_does_not_compute(tmp_path, case, field, value):
    with pytest.raises(UserError, match=field):
        check.verify(with_changes(tmp_path, case, {field: value}))


@pytest.mark.parametrize('field', ['disc_loss', 'gen_loss', 'rec_loss'])
def test_verify_refuses_an_unknown_loss(tmp_path, field):
    first, *others = json.loads((RASTER / 'dev_vqloss' / 'config.json').read_text())['variants']
    variants = [first | {field: 'wasserstein'}, *others]
    with pytest.raises(UserError, match=f"{field}.*'wasserstein'"):
        check.verify(with_changes(tmp_path, RASTER / 'dev_vqloss', {'variants': variants}))


def test_verify_refuses_an_unknown_reduction_of_bits(tmp_path):
    runs = [{'name': 'reweighted', 'reweight': True, 'bitloss_type': 'max'}]
    folder = with_changes(tmp_path, BITS / 'dev_train_step', {'runs': runs})
    with pytest.raises(
        UserError, match="bitloss_type of reweighted is 'max', expected one of mean"
    ):
        check.verify(folder)


def test_a_generation_that_stops_early_needs_no_later_bits():
    case = cases.read_case(BITS / 'dev_generate')
    arrays = {n: x for n, x in case.arrays.items() if not n.endswith(('s2', 's3'))}
    runs = BitGenerations(dataclasses.replace(case, arrays=arrays))
    sampled = {'top_k': 900, 'trunk_scale': 2, 'gt_leak': 3}
    with pytest.raises(UserError, match='leaked_bits'):
        runs.given('sampled_topp', sampled)
    given = runs.given('sampled_topp', sampled | {'gt_leak': 0})
    assert given.mask_S.tolist() == [True, True, False, False]
    leaked = runs.given('greedy_leak2', {'top_k': 1, 'trunk_scale': 1, 'gt_leak': 2})
    assert leaked.mask_S.tolist() == [True, False, False, False]


def test_a_rotary_table_may_name_its_published_table(tmp_path):
    config = json.loads((BITS / 'dev_rope2d' / 'config.json').read_text())
    apply = config['apply'] | {'published_table': [config['apply']['ratio'], '0.06M'], 'ratio': 1.0}
    folder = with_changes(tmp_path, BITS / 'dev_rope2d', {'apply': apply})
    check.OPTIONS['infinity']['rope2d'].check(config | {'apply': apply}, folder)
    rules = RotaryTables(cases.read_case(folder))
    np.testing.assert_array_equal(
        rules.rotation(apply),
        RotaryTables(cases.read_case(BITS / 'dev_rope2d')).rotation(config['apply']),
    )


def test_verify_accepts_remarks_and_inert_options(tmp_path):
    config = json.loads((QUANTISER / 'config.json').read_text())
    config |= {'noteworthy': 3, 'origin': 'a sentence with spaces', 'io': {'idx_0': [1]}}
    arrays = {'f': cases.read_arrays(QUANTISER / 'io.safetensors')['f']}
    assert not failing(folder_of(tmp_path, QUANTISER, arrays, config=config))
    config = json.loads((TOKENDROP / 'config.json').read_text())
    star_options.OPTIONS['star'].check(config | {'drop_path_rate': 0.5}, tmp_path)


def test_every_kind_has_a_list_of_options():
    listed = {(family, kind) for family, kinds in check.OPTIONS.items() for kind in kinds}
    assert listed == set(check.KINDS)


@pytest.mark.parametrize(('family', 'kind'), check.KINDS)
def test_options_listed_as_read_occur_in_the_code(family, kind):
    folder = Path(check.__file__).parent
    listing = 'star_options', 'infinity_options', 'llamagen_options'
    sources = [path.read_text() for path in folder.glob('*.py') if path.stem not in listing]
    for name in check.OPTIONS[family][kind].read:
        key = name.rpartition('.')[2]
        assert any(f"'{key}'" in source for source in sources), name


def test_information_is_reported_and_never_fails():
    line = comparison.compare(
        'logits_bf16',
        computed=np.ones(3),
        recorded=np.zeros(3),
        tolerance_class=comparison.INFORMATION,
        tolerances={},
    )
    assert line.verdict == comparison.INFORMATION and line.error == 1


@pytest.mark.parametrize(
    ('tolerance_class', 'tolerance', 'recorded', 'good', 'bad'),
    [
        (comparison.BYTES, 1, np.uint8([7]), 8, 9),
        (comparison.FLOORED_GRADIENTS, 2e-4, np.float32([0.0]), 0.9e-6, 1.1e-6),
        (comparison.FLOORED_GRADIENTS, 2e-4, np.float32([10.0]), 10 + 1.9e-3, 10 + 2.1e-3),
        (comparison.ACTIVATIONS, 1e-4, np.float32([0.1]), 0.1 + 0.9e-5, 0.1 + 1.1e-5),
        (comparison.LATENTS, 1e-5, np.float32([0.0]), 0.9e-5, 1.1e-5),
    ],
)
def test_tolerances_of_infinity(tolerance_class, tolerance, recorded, good, bad):
    def verdict(value):
        return comparison.compare(
            'array',
            computed=np.asarray([value]),
            recorded=recorded,
            tolerance_class=tolerance_class,
            tolerances={tolerance_class: tolerance},
        ).verdict

    assert (verdict(good), verdict(bad)) == (comparison.OK, comparison.FAIL)


def test_torch_reproduces_the_smoothed_case(tmp_path):
    """PyTorch's cross-entropy, clipping and AdamW give what `smoothed_star_train` holds."""
    pytest.importorskip('torch')
    smoothed_case.make(tmp_path)
    for name in ('io', 'state_dict_after'):
        recorded = cases.read_arrays(SMOOTHED / f'{name}.safetensors')
        arrays = cases.read_arrays(tmp_path / f'{name}.safetensors')
        assert arrays.keys() == recorded.keys()
        for key, array in arrays.items():
            np.testing.assert_allclose(array, recorded[key], rtol=1e-5, atol=5e-6, err_msg=key)


def test_verify_detects_ignored_label_smoothing(tmp_path):
    failed = failing(with_changes(tmp_path, SMOOTHED, {'label_smoothing': 0.0}))
    assert 'losses' in failed and 'grad_norm_before_clip' in failed


def test_star_config_has_raw_rotary_positions():
    config = json.loads((TRAINING / 'config.json').read_text()) | {'rope_norm': -1, 'rope_theta': 9}
    star = cases.star_config(cases.Case(TRAINING, config, {}))
    assert star.positions == RawRotary(theta=9)


def test_version_old_overwrites_filters_before_refinement():
    expected = {1: 50, 9: 50, 10: 300, 12: 300, 13: 100}
    for first, top_k in expected.items():
        keep = sampler.overwritten(NucleusFilter(top_k=50, top_p=0.5), first)
        assert keep == NucleusFilter(top_k=top_k, top_p=0.8)


@pytest.mark.parametrize(
    ('shared', 'counts', 'prefix', 'phis', 'znorm'),
    [
        (0, 0, 'quantize.quant_resi.{}', (0, 1, 2), True),
        (0, 2, 'quantize.quant_resi.{}', (0, 0, 1), False),
        (1, 0, 'quantize.quant_resi.qresi', (0, 0, 0), False),
        (4, 0, 'quantize.quant_resi.qresi_ls.{}', (0, 2, 3), True),
    ],
)
def test_quantiser_matches_every_phi_sharing_and_z_norm(
    tmp_path, shared, counts, prefix, phis, znorm
):
    rng = np.random.default_rng(shared + counts)
    codebook = rng.normal(size=(9, 3)).astype(np.float32)
    f = rng.normal(size=(1, 3, 3, 3)).astype(np.float32)
    state = {'quantize.embedding.weight': codebook}
    for phi in range(shared or counts or 3):
        state[f'{prefix.format(phi)}.weight'] = rng.normal(size=(3, 3, 3, 3)).astype(np.float32) / 9
        state[f'{prefix.format(phi)}.bias'] = rng.normal(size=3).astype(np.float32)
    names = [prefix.format(phi) for phi in phis]
    config = json.loads((QUANTISER / 'config.json').read_text()) | {
        'v_patch_nums': [1, 2, 3],
        'vocab_size': 9,
        'Cvae': 3,
        'share_quant_resi': shared,
        'phi_index_per_scale': list(phis),
        'default_qresi_counts': counts,
        'using_znorm': znorm,
    }
    arrays = quantise_by_hand(f, state, names, znorm)
    assert not failing(folder_of(tmp_path, QUANTISER, {'f': f, **arrays}, state, config))


def quantise_by_hand(f: np.ndarray, state: dict, names: list[str], znorm: bool) -> dict:
    """STAR specification 1.5 and 1.6 in float64, one cell at a time."""
    codebook = state['quantize.embedding.weight'].astype(np.float64)
    directions = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    rest, canvas, arrays = f[0].astype(np.float64), np.zeros(f.shape[1:]), {}
    for k, name in enumerate(names):
        side = k + 1
        pool, grow = resize.area_matrix(3, side), resize.bicubic_matrix(side, 3)
        z = np.einsum('yh,xw,chw->yxc', pool, pool, rest).reshape(-1, 3)
        distances = -z @ directions.T if znorm else np.square(z[:, None] - codebook).sum(-1)
        codes = distances.argmin(-1)
        h = codebook[codes].reshape(side, side, 3)
        h = np.einsum('yh,xw,hwc->cyx', grow, grow, h)
        padded = np.pad(h, ((0, 0), (1, 1), (1, 1)))
        kernel = state[f'{name}.weight'].astype(np.float64)
        convolved = sum(
            np.einsum('oi,ihw->ohw', kernel[:, :, y, x], padded[:, y : y + 3, x : x + 3])
            for y in range(3)
            for x in range(3)
        )
        added = (h + convolved + state[f'{name}.bias'][:, None, None]) / 2
        canvas, rest = canvas + added, rest - added
        arrays |= {f'idx_{k}': codes[None].astype(np.int32), f'fhat_{k}': canvas[None]}
    return arrays
