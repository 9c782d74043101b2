"""What do the launch scripts run, and do they complete a run?

`gcloud`, `kubectl`, `sbatch`, `srun` and `scontrol` are stubs on the PATH that log their arguments.
The stub for TPUs also simulates the cloud: it copies to a folder and runs commands there.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from spawn import free_port

from star_jax.errors import UserError
from star_jax.parallel import flags

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SCRIPTS = ('node', 'worker', 'tpu', 'tpu_watch', 'slurm', 'gke')
CONFIG = 'configs/star_d16_256.py'
AWKWARD = ('--note', """it's "a b" $HOME $(id) \\ & é""")
RUN = (CONFIG, '--out', '/shared/d 16', *AWKWARD)
QUEUED = ('gcloud', 'compute', 'tpus', 'queued-resources')
NEW_LINE, WORD = '\x1e', '\x1f'

STUB = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; printf '\\x1e'; } >>"$CALLS"
if [[ "$*" == *--filename=-* ]]; then cat >"$CALLS.stdin"; fi
exit "${STATUS:-0}"
"""


class Machine:
    """A PATH with stubs, and the log of their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder, folder / 'bin', folder / 'calls'
        self.bin.mkdir(parents=True)
        self.environment = {
            'PATH': f'{self.bin}:{os.environ["PATH"]}',
            'HOME': str(folder),
            'CALLS': str(self.log),
        }
        for name in ('gcloud', 'kubectl', 'sbatch', 'srun', 'scontrol'):
            self.stub(name, STUB)

    def stub(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def bash(
        self, *arguments: object, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['bash', *map(str, arguments)],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list[str]]:
        """The arguments of every call so far."""
        text = self.log.read_text() if self.log.exists() else ''
        return [line.split(WORD)[:-1] for line in text.split(NEW_LINE)[:-1]]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path / 'machine')


def error_line(done: subprocess.CompletedProcess) -> str:
    """The single line that a script prints for a user's mistake."""
    assert done.returncode == 2, done
    assert done.stderr.count('\n') == 1 and not done.stdout, done
    return done.stderr


# The text of the scripts.


def test_scripts_pass_shellcheck_and_are_short():
    scripts = [path.relative_to(ROOT) for path in sorted(LAUNCH.glob('*.sh'))]
    checker = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert checker, "shellcheck is missing: pip install -e '.[test]'"
    subprocess.run([checker, '--external-sources', *scripts, '.ci/run'], cwd=ROOT, check=True)
    long = [str(path) for path in LAUNCH.iterdir() if len(path.read_text().splitlines()) > 40]
    assert not long


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_has_an_example(machine, name):
    done = machine.bash(LAUNCH / f'{name}.sh', '--help')
    assert done.returncode == 0 and not done.stderr
    assert f'bash launch/{name}.sh' in done.stdout and 'configs/star_' in done.stdout
    assert 'set -euo' not in done.stdout and '#' not in done.stdout


# A mistake: one sentence, status 2, and no command is called.


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (('tpu',), 'give ACTION NAME ZONE'),
        (('tpu', 'create', 'd16'), 'give ACTION NAME ZONE'),
        (('tpu', 'create', 'd16', 'us-east5-a', 'h100-8'), "'h100-8' is not a TPU"),
        (('tpu', 'explode', 'd16', 'us-east5-a'), "'explode' is not an action"),
        (
            ('tpu', 'start', 'd16', 'us-east5-a', 'configs/none.py'),
            "'configs/none.py' is not a file",
        ),
        (('tpu', 'start', 'd16', 'us-east5-a', CONFIG), 'needs --out'),
        (
            ('tpu', 'start', 'd16', 'us-east5-a', CONFIG, '--out', 'runs/x'),
            'is not a folder that all machines share',
        ),
        (('tpu', 'start', 'd16', 'us-east5-a', CONFIG, '--out', 'gs://b/x'), 'is not a folder'),
        (('tpu_watch', 'd16'), 'give NAME ZONE TYPE'),
        (('tpu_watch', 'd16', 'us-east5-a', 'v5p'), "'v5p' is not a TPU"),
        (('tpu_watch', 'd16', 'us-east5-a', 'v5p-8', '--spot'), 'the first argument is the config'),
        (('slurm',), 'the first argument is the config'),
        (('slurm', '--nodes=2', CONFIG), 'needs --out'),
        (('slurm', '--nodes=2', CONFIG, '--out='), 'needs --out'),
        (('gke', 'start'), 'give an action and a name'),
        (('gke', 'start', 'd16', 'image', 'h100'), "'h100' is not a pool"),
        (('gke', 'start', 'd16', 'image', 'v5e:1x1', 'runs', *RUN), "'v5e:1x1' is not a pool"),
        (('gke', 'start', 'd16', 'image', 'v5e:4x4', 'runs', CONFIG), 'needs --out'),
        (('gke', 'explode', 'd16'), "'explode' is not an action"),
        (('node', 'h100'), "'h100' is not a platform"),
        (('node', 'gpu', CONFIG), 'needs --out'),
        (('worker', 'explode'), "'explode' is not an action"),
    ],
)
def test_scripts_report_a_mistake_in_one_sentence(machine, arguments, sentence):
    name, *rest = arguments
    error = error_line(machine.bash(LAUNCH / f'{name}.sh', *rest))
    assert error.startswith(f'{name}.sh: ') and sentence in error
    assert machine.calls() == []


def test_mistakes_are_shown_without_control_characters(machine):
    error = error_line(machine.bash(LAUNCH / 'node.sh', '\x1b[2J\a[/]'))
    assert "'\\x1b[2J?[/]' is not a platform" in error


# TPUs by queued resources.


def tpu(machine, *arguments, **environment):
    return machine.bash(LAUNCH / 'tpu.sh', *arguments, **environment)


@pytest.mark.parametrize(
    ('kind', 'accelerator', 'runtime', 'nodes'),
    [
        ('v5p-128', 'v5p-128', 'v2-alpha-tpuv5', ['--node-id=d30']),
        ('v5e-256', 'v5litepod-256', 'v2-alpha-tpuv5-lite', ['--node-id=d30']),
        ('1xv6e-8', 'v6e-8', 'v2-alpha-tpuv6e', ['--node-id=d30']),
        (
            '2xv6e-256',
            'v6e-256',
            'v2-alpha-tpuv6e',
            ['--node-count=2', '--node-prefix=d30'],
        ),
    ],
)
def test_tpu_create_requests_one_slice_or_several(machine, kind, accelerator, runtime, nodes):
    done = tpu(machine, 'create', 'd30', 'us-east5-a', kind, '--spot', '--labels=a=b c')
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [
        [
            *QUEUED,
            'create',
            'd30',
            f'--accelerator-type={accelerator}',
            f'--runtime-version={runtime}',
            *nodes,
            '--spot',
            '--labels=a=b c',
            '--zone=us-east5-a',
        ]
    ]


def test_tpu_start_runs_on_all_workers_with_the_same_arguments(machine):
    assert tpu(machine, 'start', 'd16', 'us-east5-a', *RUN).returncode == 0
    ((*before, command, zone),) = machine.calls()
    assert before == [
        *QUEUED,
        'ssh',
        'd16',
        '--node=all',
        '--worker=all',
    ]
    assert zone == '--zone=us-east5-a'
    remote = command.removeprefix('--command=')
    assert remote.startswith('bash star_jax/launch/worker.sh start ')
    printed = machine.bash('-c', f"printf '%s\\x1f' {remote}").stdout
    assert printed.split(WORD)[3:-1] == list(RUN)


def test_tpu_runs_its_other_actions(machine):
    for action in ('stop', 'logs', 'last', 'delete'):
        assert tpu(machine, action, 'd16', 'us-east5-a').returncode == 0
    stop, logs, last, delete = (call[4:] for call in machine.calls())
    assert stop[:4] == ['ssh', 'd16', '--node=all', '--worker=all']
    assert logs[:4] == last[:4] == ['ssh', 'd16', '--node=0', '--worker=0']
    assert '-F' in logs[4] and '-F' not in last[4]
    assert delete == ['delete', 'd16', '--force', '--quiet', '--zone=us-east5-a']


def test_tpu_returns_the_status_of_gcloud(machine):
    for words in (
        ('create', 'd16', 'z', 'v5p-8'),
        ('start', 'd16', 'z', *RUN),
        ('stop', 'd16', 'z'),
    ):
        assert tpu(machine, *words, STATUS='7').returncode == 7


def test_tpu_install_copies_existing_files_but_no_deleted_ones(machine, tmp_path):
    project = tmp_path / 'project'
    shutil.copytree(LAUNCH, project / 'launch')
    (project / '.gitignore').write_text('runs\n')
    for name in ('kept', 'deleted', 'runs'):
        (project / name).write_text(name)
    for words in ('init -q', 'add .'):
        subprocess.run(['git', *words.split()], cwd=project, check=True)
    (project / 'deleted').unlink()
    (project / 'new').write_text('not added yet')
    machine.stub('gcloud', '#!/usr/bin/env bash\n[[ $4 != scp ]] || tar -tzf "$5" >"$CALLS"\n')
    done = machine.bash(project / 'launch/tpu.sh', 'install', 'd16', 'z')
    assert done.returncode == 0, done
    packed = machine.log.read_text().splitlines()
    assert [name for name in packed if '/' not in name] == ['.gitignore', 'kept', 'new']


def test_dry_run_prints_the_commands_and_runs_none(machine):
    for script, *words in (
        ('tpu', 'create', 'd16', 'z', 'v5p-8'),
        ('tpu', 'install', 'd16', 'z'),
        ('tpu', 'start', 'd16', 'z', *RUN),
        ('tpu', 'delete', 'd16', 'z'),
        ('tpu_watch', 'd16', 'z', 'v5p-8', '--spot', *RUN),
        ('slurm', '--nodes=2', *RUN),
        ('gke', 'start', 'd16', 'image', 'v5e:4x4', 'runs', *RUN),
        ('gke', 'logs', 'd16'),
        ('node', 'gpu', *RUN),
    ):
        done = machine.bash(LAUNCH / f'{script}.sh', '--dry-run', *words)
        assert done.returncode == 0 and done.stdout, (script, done)
    assert machine.calls() == []
    line = machine.bash(LAUNCH / 'tpu.sh', '--dry-run', 'start', 'd16', 'z', *RUN).stdout
    assert tpu(machine, 'start', 'd16', 'z', *RUN).returncode == 0
    machine.bash('-c', line)  # the printed line has the same effect
    ran, printed = machine.calls()
    assert ran == printed


# A simulated cloud in a folder: `vm` is the home of the VM, `state` the state of the resource.

CLOUD = """#!/usr/bin/env bash
{ printf '%s\\x1f' gcloud "$@"; printf '\\x1e'; } >>"$CALLS"
vm="$HOME/vm"
case $4 in
  create) echo ACTIVE >"$HOME/state"; mkdir -p "$vm" ;;
  delete) rm "$HOME/state"; mv "$vm" "$vm.$RANDOM" ;;
  list) cat "$HOME/state" 2>/dev/null || true ;;
  scp) cp "$5" "$vm/star_jax.tar.gz" ;;
  ssh) for word in "$@"; do
      if [[ $word == --command=* ]]; then cd "$vm" && exec bash -c "${word#--command=}"; fi
    done ;;
esac
"""
# Python on the VM: creates environments in which star-jax is PROGRAM.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  '-m uv python find 3.12') echo "$HOME/bin/python3" ;;
  *'-m venv .venv') mkdir -p .venv/bin
    printf '#!/bin/bash\\n' >.venv/bin/pip; chmod +x .venv/bin/pip
    cp "$HOME/program" .venv/bin/python ;;
esac
"""
# Preempted the first time, stopped the second, complete the third.
PROGRAM = """#!/usr/bin/env bash
echo "$*" >>"$HOME/runs"
while (($#)); do [[ $1 == --out ]] && out="$2"; shift; done
case $(wc -l <"$HOME/runs") in
  1) echo SUSPENDED >"$HOME/state"
    for ((i = 0; i < 600; ++i)); do if [[ -d $HOME/vm ]]; then /bin/sleep 0.1; fi; done ;;
  2) ;;
  3) mkdir -p "$out/model" ;;
esac
"""


@pytest.fixture
def cloud(machine) -> Machine:
    machine.stub('gcloud', CLOUD)
    machine.stub('python3', PYTHON)
    machine.stub('sleep', '#!/usr/bin/env bash\nexec /usr/bin/env -i /bin/sleep 0.2\n')
    machine.stub('../program', PROGRAM)
    return machine


def watch(cloud: Machine, *words: str) -> subprocess.CompletedProcess:
    return cloud.bash(LAUNCH / 'tpu_watch.sh', 'd16', 'z', '2xv5e-16', '--spot', CONFIG, *words)


def actions(cloud: Machine) -> list[str]:
    """The requests to the cloud, without those for its state."""
    requests = []
    for _, _, _, _, verb, *words in cloud.calls():
        if verb == 'ssh':
            found = re.search(r'worker\.sh (\w+)', ' '.join(words))
            verb = found.group(1) if found else 'unpack'
        requests.append(verb)
    return [verb for verb in requests if verb not in ('list', 'state')]


def test_tpu_watch_completes_a_run_through_a_preemption(cloud):
    out = cloud.folder / 'shared' / 'd 16'
    done = watch(cloud, '--out', str(out), '--note', 'a "b"')
    assert done.returncode == 0, done
    ran = (cloud.folder / 'runs').read_text().splitlines()
    assert ran == [f'-m star_jax.parallel.flags tpu train {CONFIG} --out {out} --note a "b"'] * 3
    start = ['scp', 'unpack', 'install', 'stop', 'start']
    assert actions(cloud) == ['create', *start, 'delete', 'create', *start, *start, 'delete']
    assert not (cloud.folder / 'state').exists()  # no resource is left that costs money


@pytest.mark.parametrize(('status', 'starts'), [(2, 1), (1, 5)])
def test_tpu_watch_ends_after_repeated_failures(cloud, status, starts):
    cloud.stub('../program', f'#!/bin/bash\necho >>"$HOME/runs"; echo why; exit {status}\n')
    done = watch(cloud, '--out', str(cloud.folder / 'out'))
    assert done.returncode == 2 and f'(ended {status})' in done.stderr and 'why' in done.stderr
    assert len((cloud.folder / 'runs').read_text().splitlines()) == starts
    assert not (cloud.folder / 'state').exists()


# An unattended run, with events that are files in the home of the cloud:
# `refusals` creations fail, as many looks as `deaf` has find that no VM answers.
EVENTFUL = CLOUD.replace(
    'case $4 in',
    """fewer() { # whether a counted event is left; counts it
  local left; left=$(cat "$HOME/$1" 2>/dev/null || echo 0)
  ((left > 0)) && echo $((left - 1)) >"$HOME/$1"
}
case $4 in
  create | ssh) if fewer "$([[ $4 == ssh ]] && echo deaf || echo refusals)"; then exit 1; fi ;;&""",
)
# Each start takes the next line of `plan`, whose words preempt the run or remove its VM.
PLANNED = """#!/usr/bin/env bash
echo "$*" >>"$HOME/runs"
while (($#)); do [[ $1 == --out ]] && out="$2"; shift; done
number=$(wc -l <"$HOME/runs")
wait_for() { for ((i = 0; i < 900; ++i)); do if $1; then return; fi; /bin/sleep 0.1; done; }
gone() { [[ ! -d $HOME/vm ]]; }
answering() { [[ $(<"$HOME/deaf") == 0 ]]; }
for word in $(sed -n "${number}p" "$HOME/plan"); do
  case $word in
    step) mkdir -p "$out/checkpoints/$((number * 100))" ;;
    preempted) echo SUSPENDED >"$HOME/state"; wait_for gone ;;
    refused) echo 2 >"$HOME/refusals" ;;
    absent) rm -r "$HOME/vm/star_jax/.venv" ;;
    deaf*) echo "${word#deaf}" >"$HOME/deaf"; wait_for answering ;;
    fails) exit 1 ;;
    ends) mkdir -p "$out/model" ;;
  esac
done
"""


def watch_run(cloud: Machine, *plan: str) -> tuple[subprocess.CompletedProcess, list[str], int]:
    """Watches a run whose starts go as planned; the result, the requests and the starts."""
    cloud.stub('gcloud', EVENTFUL)
    cloud.stub('../program', PLANNED)
    (cloud.folder / 'plan').write_text('\n'.join(plan))
    done = watch(cloud, '--out', str(cloud.folder / 'out'))
    assert not (cloud.folder / 'state').exists(), 'a resource is left that costs money'
    return done, actions(cloud), len((cloud.folder / 'runs').read_text().splitlines())


def test_watch_goes_on_if_creation_fails_twice_after_a_preemption(cloud):
    done, requests, starts = watch_run(cloud, 'step refused preempted', 'ends')
    assert done.returncode == 0 and starts == 2, done
    assert [verb for verb in requests if verb in ('create', 'delete')] == [
        *('create', 'delete', 'create', 'create', 'create', 'delete')
    ]


def test_watch_goes_on_through_five_preemptions(cloud):
    done, requests, starts = watch_run(cloud, *['step preempted'] * 5, 'ends')
    assert done.returncode == 0 and starts == 6, done
    assert requests.count('create') == requests.count('delete') == 6


def test_watch_goes_on_through_failures_with_progress_between(cloud):
    done, requests, starts = watch_run(cloud, *['step fails'] * 5, 'ends')
    assert done.returncode == 0 and starts == 6, done
    assert requests.count('create') == requests.count('delete') == 1


def test_watch_keeps_a_slice_that_does_not_answer_for_some_minutes(cloud):
    done, requests, starts = watch_run(cloud, 'deaf9 ends')
    assert done.returncode == 0 and starts == 1, done
    assert requests.count('create') == requests.count('delete') == 1


def test_watch_replaces_a_slice_that_does_not_answer_for_ten_minutes(cloud):
    done, requests, starts = watch_run(cloud, 'step deaf12', 'ends')
    assert done.returncode == 0 and starts == 2, done
    assert 'no run on this slice for 10 minutes' in done.stdout
    assert requests.count('create') == requests.count('delete') == 2


def test_watch_starts_a_run_that_is_absent_after_its_start(cloud):
    done, requests, starts = watch_run(cloud, 'absent', 'ends')
    assert done.returncode == 0 and starts == 2, done
    assert requests.count('create') == requests.count('delete') == 1


def test_watch_ends_if_the_run_is_always_absent_after_its_start(cloud):
    done, requests, starts = watch_run(cloud, *['absent'] * 9)
    assert done.returncode == 2 and starts == 5, done
    assert 'failures without a new checkpoint (absent)' in done.stderr


def test_state_distinguishes_a_silent_vm_from_one_without_the_run(cloud):
    def state() -> str:
        done = tpu(cloud, 'state', 'd16', 'z', str(cloud.folder / 'out'))
        assert done.returncode == 0
        return done.stdout

    cloud.stub('gcloud', EVENTFUL)
    assert state() == '\n'
    assert tpu(cloud, 'create', 'd16', 'z', 'v6e-8').returncode == 0
    assert state() == 'ACTIVE absent\n'
    (cloud.folder / 'deaf').write_text('1')
    assert state() == 'ACTIVE unreachable\n'
    assert tpu(cloud, 'install', 'd16', 'z').returncode == 0
    assert state() == 'ACTIVE nothing\n'
    for name in ('900', '1000', '1100.orbax-checkpoint-tmp', 'torn-2000'):
        (cloud.folder / 'out/checkpoints' / name).mkdir(parents=True)
    assert state() == 'ACTIVE nothing step 1000\n'


def test_worker_stop_lets_the_run_save(cloud):
    """While a run is active, a second one is refused."""
    out = cloud.folder / 'out'
    saves = 'trap "echo saved; exit 0" TERM; touch "$HOME/ready"; while :; do /bin/sleep 0.1; done'
    cloud.stub('../program', f'#!/usr/bin/env bash\n{saves}\n')

    def call(*words: str) -> subprocess.CompletedProcess:
        return tpu(cloud, *words[:1], 'd16', 'z', *words[1:])

    for words in (('create', 'v6e-8'), ('install',), ('start', CONFIG, '--out', str(out))):
        done = call(*words)
        assert done.returncode == 0, done
    for _ in range(300):
        if (cloud.folder / 'ready').exists():
            break
        time.sleep(0.1)
    assert call('state').stdout == 'ACTIVE running\n'
    assert 'stop it first' in error_line(call('start', CONFIG, '--out', str(out)))
    assert call('stop').returncode == 0
    assert call('state').stdout == 'ACTIVE ended 143\n'
    assert call('last').stdout == 'saved\n'


# SLURM.


def test_slurm_submits_a_job(machine):
    words = ('--nodes=4', '--comment=a b', CONFIG, '--out', '/shared/d16', *AWKWARD)
    assert machine.bash(LAUNCH / 'slurm.sh', *words).returncode == 0
    assert machine.calls() == [
        ['sbatch', '--nodes=4', '--comment=a b', 'launch/slurm.sh', *words[2:]]
    ]
    assert machine.bash(LAUNCH / 'slurm.sh', *words, STATUS='3').returncode == 3
    head = (LAUNCH / 'slurm.sh').read_text().split('\nset ')[0]
    for option in ('--requeue', '--signal=TERM@300', '--open-mode=append', '--ntasks-per-node=8'):
        assert re.search(rf'^#SBATCH .*{option}\b', head, re.MULTILINE)


@pytest.mark.parametrize(('status', 'requeued'), [('0', False), ('143', True), ('1', False)])
def test_slurm_requeues_a_job_that_was_stopped(machine, status, requeued):
    machine.stub('scontrol', STUB.replace('exit "${STATUS:-0}"', 'exit 0'))
    spooled = shutil.copy(LAUNCH / 'slurm.sh', machine.folder / 'slurm_script')  # as SLURM does
    run = (CONFIG, '--out', '/shared/d16', *AWKWARD)
    job = {'SLURM_JOB_ID': '17', 'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_CPUS_PER_TASK': '12'}
    done = machine.bash(spooled, *run, cwd=machine.folder, STATUS=status, **job)
    assert done.returncode == int(status), done
    srun, *rest = machine.calls()
    assert rest == ([['scontrol', 'requeue', '17']] if requeued else [])
    start = srun.index('bash')
    assert srun[start:] == ['bash', 'launch/node.sh', 'gpu', *run]
    assert {'--kill-on-bad-exit=1', '--cpus-per-task=12', '--gpu-bind=none'} <= set(srun[:start])


# Kubernetes.


def manifest(machine: Machine, pool: str) -> dict:
    done = machine.bash(LAUNCH / 'gke.sh', 'start', 'd16', 'here/star_jax:1', pool, 'runs', *RUN)
    assert done.returncode == 0, done
    assert machine.calls()[-1] == ['kubectl', 'apply', '--filename=-']
    return yaml.safe_load(Path(f'{machine.log}.stdin').read_text())


@pytest.mark.parametrize(
    ('pool', 'slices', 'nodes', 'selector', 'limits', 'platform'),
    [
        ('v5p:4x4x4', 1, 16, ('tpu-v5p-slice', '4x4x4'), {'google.com/tpu': 4}, 'tpu'),
        ('2xv5e:16x16', 2, 64, ('tpu-v5-lite-podslice', '16x16'), {'google.com/tpu': 4}, 'tpu'),
        ('v6e:2x2', 1, 1, ('tpu-v6e-slice', '2x2'), {'google.com/tpu': 4}, 'tpu'),
        ('4xnvidia-h100-80gb:8', 1, 4, ('nvidia-h100-80gb',), {'nvidia.com/gpu': 8}, 'gpu'),
    ],
)
def test_gke_requests_the_machines_of_a_pool(
    machine, pool, slices, nodes, selector, limits, platform
):
    jobset = manifest(machine, pool)
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert jobset['metadata']['name'] == 'd16'
    (replicated,) = jobset['spec']['replicatedJobs']
    job = replicated['template']['spec']
    assert (replicated['replicas'], job['parallelism'], job['completions']) == (
        slices,
        nodes,
        nodes,
    )
    preempted, _ = job['podFailurePolicy']['rules']
    assert preempted['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
    pod = job['template']['spec']
    assert tuple(pod['nodeSelector'].values()) == selector
    (container,) = pod['containers']
    assert container['image'] == 'here/star_jax:1'
    assert container['resources']['limits'] == limits
    assert {volume['name'] for volume in pod['volumes']} == {'shared', 'shm'}
    assert pod['volumes'][0]['persistentVolumeClaim'] == {'claimName': 'runs'}
    words = [word.replace('$$(', '$(') for word in container['command']]  # as Kubernetes parses it
    assert words == ['bash', 'launch/node.sh', platform, *RUN]
    variables = {variable['name']: variable for variable in container['env']}
    if platform == 'tpu':
        assert not variables
        return
    assert variables['STAR_JAX_COORDINATOR']['value'] == 'd16-slice-0-0.d16:8476'
    assert variables['STAR_JAX_PROCESSES']['value'] == str(nodes)
    assert 'completion-index' in str(variables['STAR_JAX_PROCESS']['valueFrom'])


@pytest.mark.parametrize(
    ('pool', 'is_printed'),
    [
        ('4xnvidia-h100-mega-80gb:8', True),
        ('2xnvidia-h100-80gb:8', True),
        ('nvidia-h100-80gb:8', False),  # one node
        ('v5e:4x4', False),
    ],
)
def test_gke_prints_that_pods_of_several_gpu_nodes_have_no_gpudirect(machine, pool, is_printed):
    words = ('start', 'd16', 'here/star_jax:1', pool, 'runs', *RUN)
    done = machine.bash(LAUNCH / 'gke.sh', *words)
    assert done.returncode == 0
    assert ('no GPUDirect' in done.stderr) == is_printed and done.stderr.count('\n') == is_printed


def test_gke_follows_and_stops_a_jobset(machine):
    assert machine.bash(LAUNCH / 'gke.sh', 'logs', 'd16').returncode == 0
    assert machine.bash(LAUNCH / 'gke.sh', 'stop', 'd16').returncode == 0
    logs, stop = machine.calls()
    assert logs[:3] == ['kubectl', 'logs', '--follow'] and 'jobset-name=d16' in logs[3]
    assert stop == ['kubectl', 'delete', 'jobset', 'd16']
    assert machine.bash(LAUNCH / 'gke.sh', 'stop', 'd16', STATUS='4').returncode == 4


# One machine.


@pytest.fixture
def clone(machine) -> Path:
    """A folder with the scripts and a stub of Python, which `program` writes."""
    clone = machine.folder / 'clone'
    shutil.copytree(LAUNCH, clone / 'launch')
    (clone / '.venv/bin').mkdir(parents=True)
    (clone / 'config.py').touch()
    return clone


def program(clone: Path, text: str) -> None:
    path = clone / '.venv/bin/python'
    path.write_text(f'#!/usr/bin/env bash\n{text}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ('does', 'status'),
    [('mkdir -p out/model', 0), ('mkdir -p out', 143), ('exit 2', 2), ('exit 1', 1)],
)
def test_node_status_distinguishes_complete_from_stopped_runs(machine, clone, does, status):
    program(clone, f'{{ printf "%s\\x1f" "$@"; printf "\\x1e"; }} >>"$CALLS"; {does}')
    done = machine.bash('launch/node.sh', 'gpu', 'config.py', '--out=out', *AWKWARD, cwd=clone)
    assert done.returncode == status, done
    assert machine.calls() == [
        ['-m', 'star_jax.parallel.flags', 'gpu', 'train', 'config.py', '--out=out', *AWKWARD]
    ]


def test_node_explains_an_abort_by_jax(machine, clone):
    """JAX aborts the other processes, with status 134, if process 0 is lost."""
    program(clone, 'echo "Check failure stack trace" >&2; kill -ABRT $$')
    done = machine.bash('launch/node.sh', 'gpu', 'config.py', '--out=out', cwd=clone)
    assert done.returncode == 1, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith('node.sh: the run was aborted') and 'process 0' in last
    assert 'Start all of them again' in last and last.endswith('from its last checkpoint')


PEER = """
import sys, time, jax
jax.distributed.initialize(
    sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=10,
    cluster_detection_method='deactivate',
)
print('connected', flush=True)
time.sleep(600)
"""


def test_node_explains_the_loss_of_process_0(machine, clone):
    """With JAX itself: no public setting keeps it from aborting process 1."""
    command = [sys.executable, '-c', PEER, f'127.0.0.1:{free_port()}']
    environment = machine.environment | {'JAX_PLATFORMS': 'cpu'}
    program(clone, f'exec {shlex.join([*command, "1"])}')
    with (
        subprocess.Popen([*command, '0'], env=environment, stdout=subprocess.PIPE) as first,
        subprocess.Popen(
            ['bash', 'launch/node.sh', 'cpu', 'config.py', '--out=out'],
            cwd=clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as node,
    ):
        assert first.stdout.readline() and node.stdout.readline()
        first.kill()
        log = node.communicate(timeout=60)[1]
    assert node.returncode == 1 and log.splitlines()[-1].startswith('node.sh: the run was aborted')


def test_node_passes_sigterm_to_the_run(machine, clone):
    program(clone, 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.1; done')
    run = subprocess.Popen(
        ['bash', 'launch/node.sh', 'gpu', 'config.py', '--out', 'out'],
        cwd=clone,
        env=machine.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == 'ready\n'
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == 'saved\n'
    assert run.returncode == 143


# XLA flags.


def test_flags_of_the_user_take_precedence():
    variables = {'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=true', 'HOME': '/home'}
    merged = flags.environment('gpu', variables)
    assert merged['XLA_FLAGS'].endswith(variables['XLA_FLAGS']) and merged['HOME'] == '/home'
    assert merged['XLA_FLAGS'].startswith(flags.GPU[0])
    assert merged['XLA_CLIENT_MEM_FRACTION'] == '0.92'
    assert flags.environment('tpu', {}) == {'LIBTPU_INIT_ARGS': ' '.join(flags.TPU)}
    for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
        variables = {name: '0.5'}
        merged = flags.environment('gpu', variables)
        assert {n: v for n, v in merged.items() if 'FRACTION' in n} == variables
    assert flags.environment('cpu', {}) == flags.ENVIRONMENT['cpu']
    assert flags.environment('cpu', {'GLIBC_TUNABLES': 'x'}) == {'GLIBC_TUNABLES': 'x'}
    with pytest.raises(UserError, match='tpu'):
        flags.environment('npu', {})


def test_xla_accepts_every_flag():
    """XLA ends a process at a flag that does not exist."""
    probe = 'import jax; jax.devices()'
    settings = flags.environment('gpu', os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'})
    subprocess.run([sys.executable, '-c', probe], env=settings, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, '-m', 'star_jax.parallel.flags', 'cpu', 'frain'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "did you mean 'train'" in done.stderr
