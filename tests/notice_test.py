"""Does a run report whether a save fits between the notice of a preemption and the end?"""

import pytest

from star_jax.errors import UserError
from star_jax.training import notice

POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1'}


@pytest.mark.parametrize(
    ('environment', 'seconds', 'holder'),
    [
        (POD, 15, 'a pod on a spot node of GKE'),
        ({'SLURM_JOB_ID': '17'}, 300, 'a job of launch/slurm.sh'),
        (POD | {notice.VARIABLE: '25'}, 25, 'this machine'),
    ],
)
def test_machines_have_different_notices(environment, seconds, holder):
    found = notice.find(environment)
    assert (found.seconds, found.holder) == (seconds, holder)


def test_other_machines_have_none():
    assert notice.find({}) is None and notice.find({notice.VARIABLE: ''}) is None


@pytest.mark.parametrize('given', ['soon', '0', '-1', 'nan', 'inf'])
def test_invalid_notice_is_refused(given):
    with pytest.raises(UserError, match='STAR_JAX_NOTICE must be a number of seconds above 0'):
        notice.find({notice.VARIABLE: given})


def test_size_and_time_of_a_save_are_compared_with_the_notice():
    pod = notice.find(POD)
    assert pod.plan(30 * 10**9) == (
        '30.00 GB; a pod on a spot node of GKE has 15 s after the notice of a preemption: it fits '
        'if written at 2 GB/s or more'
    )
    late = pod.compare(30 * 10**9, 41.26, interval=500)
    assert 'saving 30.00 GB took 41.3 s' in late and 'only 15 s' in late
    assert 'loses the work since the last checkpoint, up to 500 steps' in late
    assert '--pace.save' in late and '\n' not in late
    assert pod.compare(10**9, 3.0, interval=500).endswith('nothing is lost')
    assert pod.fits(15) and not pod.fits(15.1)
